"""Laws of the objectives, over every file of their folder, and their hand numbers."""

import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from neurograft.core.choose import choose, methods
from neurograft.core.context import Step, Trained
from neurograft.core.errors import RequestError
from neurograft.core.region import Region
from neurograft.core.resolve import resolve
from neurograft.train.asked import Asked
from neurograft.worlds.pico import pico, pico_batch

PENALTIES = [n for n in methods("objectives") if "penalty" in choose("objectives", n).card.claims]
DENOISING = [n for n in methods("objectives") if "denoising" in choose("objectives", n).card.claims]
# Of predictions of labels; penalties are of the weights alone, and denoisers predict noise.
ALL = [n for n in methods("objectives") if n not in PENALTIES and n not in DENOISING]
LIKELIHOODS = [n for n in ALL if "cross_entropy" in choose("objectives", n).card.claims]
ANCHORS = [n for n in ALL if "anchor" in choose("objectives", n).card.claims]


class TableForCausalLM(nn.Module):
    """Logits from a table: what token t predicts for t + 1."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.base = table.detach().clone()
        self.calls = 0

    def forward(self, input_ids, labels=None):
        self.calls += 1
        return type("Out", (), {"logits": self.table[input_ids], "loss": None, "aux_loss": None})()


def asked(name, tokens, labels, table, **options):
    model = TableForCausalLM(table)
    step = Step(model, {"input_ids": tokens, "labels": labels}, reference=lambda run: _at(model, model.base, run))
    return model, choose("objectives", name, **options)(step)


def _at(model, table, run):
    now, model.table.data = model.table.data, table
    try:
        with torch.no_grad():
            return run()
    finally:
        model.table.data = now


def problem(dtype=torch.float64, size=30):
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(size, size, generator=rng, dtype=dtype)
    tokens = torch.randint(0, size, (3, 7), generator=rng)
    labels = tokens.clone()
    labels[0, :3] = -100
    labels[2, 5:] = -100
    return table, tokens, labels


def cross_entropy(table, tokens, labels):
    """Cross-entropy, one token at a time."""
    found = []
    for row, marks in zip(tokens.tolist(), labels.tolist()):
        for here, wanted in zip(row, marks[1:]):
            if wanted != -100:
                logits = table[here]
                found.append(torch.logsumexp(logits, 0) - logits[wanted])
    return torch.stack(found).mean()


def test_every_file_is_held_to_a_law():
    assert set(ALL) == set(LIKELIHOODS) | set(ANCHORS)
    assert {"auto", "likelihood", "dft", "eaft"} <= set(LIKELIHOODS)


class HalfForNoise(nn.Module):
    """Says w times what it sees; the noise alone is worth learning from an image of zeros."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, sample, timestep):
        return (self.w * sample,)


@pytest.mark.parametrize("name", DENOISING)
def test_denoising(name):
    """Zero for a model that is right, the same for the same step, another draw for another, and a sound gradient."""
    images = {"sample": torch.zeros(64, 1, 2, 2, dtype=torch.float64)}
    clean = {"num_train_timesteps": 1, "trained_betas": [1.0], "rescale_betas_zero_snr": False}
    of = choose("objectives", name, scheduler=clean)
    assert float(of(Step(HalfForNoise(1.0), images)).detach()) == 0.0
    model = HalfForNoise(0.5)
    value = of(Step(model, images))
    assert float(value.detach()) == pytest.approx(0.25, rel=0.3)
    value.backward()
    assert float(model.w.grad) == pytest.approx(-4 * float(value.detach()), rel=1e-9)
    assert torch.equal(of(Step(model, images)), value)
    assert not torch.equal(of(Step(model, images, step=1)), value)
    with pytest.raises(RequestError, match="clean images"):
        of(Step(model, {"timestep": torch.zeros(1)}))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_cross_entropy_at_the_neutral_setting(name):
    neutral = resolve(f"neurograft.objectives.{name}.NEUTRAL")
    table, tokens, labels = problem()
    model, loss = asked(name, tokens, labels, table, **neutral)
    loss.backward()
    twin = table.clone().requires_grad_(True)
    expected = cross_entropy(twin, tokens, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.table.grad, twin.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name):
    table, tokens, labels = problem()
    _, before = asked(name, tokens, labels, table)
    more = torch.full((3, 4), 9)
    _, after = asked(name, torch.cat([tokens, more], 1), torch.cat([labels, torch.full_like(more, -100)], 1), table)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_no_labelled_token_is_refused(name):
    table, tokens, labels = problem()
    with pytest.raises(RequestError, match="no token has a label"):
        asked(name, tokens, torch.full_like(labels, -100), table)
    with pytest.raises(RequestError, match="label"):
        choose("objectives", name)(Step(TableForCausalLM(table), {"input_ids": tokens}, reference=lambda run: run()))


class Held(TorchFunctionMode):
    """Gives what was detached the first time again: a detached weight is a constant of the gradient."""

    def __init__(self):
        super().__init__()
        self.seen, self.next = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.detach:
            return func(*args, **(kwargs or {}))
        if self.next == len(self.seen):
            self.seen.append(func(*args))
        self.next += 1
        return self.seen[self.next - 1]


@pytest.mark.parametrize("name", ALL)
def test_gradient(name):
    """Analytic against numeric gradients in float64, detached weights held fixed."""
    table, tokens, labels = problem(size=8)
    held = Held()

    def loss_of(x):
        model = TableForCausalLM(table)
        del model._parameters["table"]
        model.table, held.next = x, 0
        step = Step(model, {"input_ids": tokens, "labels": labels})

        def reference(run):
            model.table = table.roll(1, 0)
            try:
                with torch.no_grad():
                    return run()
            finally:
                model.table = x

        step.reference = reference
        with held:
            return choose("objectives", name)(step)

    assert torch.autograd.gradcheck(loss_of, (table.clone().requires_grad_(True),))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_accumulated_batches_add_up_to_one(name):
    table, tokens, labels = problem()
    _, whole = asked(name, tokens, labels, table)
    items = int((labels[:, 1:] != -100).sum())
    total = 0.0
    for i in range(3):
        batch = {"input_ids": tokens[i : i + 1], "labels": labels[i : i + 1]}
        step = Step(TableForCausalLM(table), batch, items=items, reference=lambda run: run())
        total += Asked.of(name).loss(step, windows=3)
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-12)


def test_dft_by_hand():
    """p = 1/4 for the label: p * -log p = 0.25 * log 4, and the gradient is that of -p."""
    table = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64))
    model, loss = asked("dft", torch.tensor([[0, 0]]), torch.tensor([[-100, 0]]), table)
    assert math.isclose(loss.item(), 0.25 * math.log(4), rel_tol=1e-12)
    loss.backward()
    twin = table.clone().requires_grad_(True)
    (-twin[0].softmax(0)[0]).backward()
    torch.testing.assert_close(model.table.grad, twin.grad, rtol=0, atol=1e-15)
    torch.testing.assert_close(model.table.grad[0], torch.tensor([-0.1875, 0.1875], dtype=torch.float64))


def test_eaft_by_hand():
    """Uniform over 20 of 25: w = ln 20 / 3; sure: w = 0; the gradient on the logits is w (softmax - one-hot)."""
    uniform = torch.full((25,), -1e9, dtype=torch.float64)
    uniform[:20] = 0.0
    sure = torch.full((25,), -1e9, dtype=torch.float64)
    sure[3] = 0.0
    table = torch.stack([uniform, sure, *[torch.zeros(25, dtype=torch.float64)] * 23])
    model, loss = asked("eaft", torch.tensor([[0, 7]]), torch.tensor([[-100, 7]]), table)
    w = math.log(20) / 3.0
    assert math.isclose(loss.item(), w * math.log(20), rel_tol=1e-12)
    loss.backward()
    expected = w * (uniform.softmax(0) - nn.functional.one_hot(torch.tensor(7), 25))
    torch.testing.assert_close(model.table.grad[0], expected, rtol=0, atol=1e-14)
    _, certain = asked("eaft", torch.tensor([[1, 7]]), torch.tensor([[-100, 7]]), table)
    assert abs(certain.item()) < 1e-6  # the largest possible loss, and no weight
    _, wide = asked("eaft", torch.tensor([[5, 7]]), torch.tensor([[-100, 7]]), table, top=None)
    assert math.isclose(wide.item(), math.log(25), rel_tol=1e-12)  # ln 25 / 3 > 1: held at 1


def test_kl_by_hand():
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
    model = TableForCausalLM(torch.log(torch.stack([q, q])))
    model.base = torch.log(torch.stack([p, p]))
    batch = {"input_ids": torch.tensor([[0, 0]]), "labels": torch.tensor([[-100, 0]])}
    step = Step(model, batch, reference=lambda run: _at(model, model.base, run))
    forward = float(choose("objectives", "kl")(step))
    reverse = float(choose("objectives", "kl", direction="reverse")(step))
    assert math.isclose(forward, 0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel_tol=1e-12)
    assert math.isclose(reverse, 0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel_tol=1e-12)


@pytest.mark.parametrize("name", ANCHORS)
def test_an_anchor_is_zero_on_the_base(name):
    table, tokens, labels = problem()
    model, loss = asked(name, tokens, labels, table)
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert float(model.table.grad.abs().max()) < 1e-15
    with pytest.raises(RequestError, match="reference"):
        choose("objectives", name)(Step(TableForCausalLM(table), {"input_ids": tokens, "labels": labels}))


def test_anchors_add_with_their_weight_and_their_own_data():
    table, tokens, labels = problem()
    first = {"input_ids": tokens[:1], "labels": labels[:1]}
    second = {"input_ids": tokens[1:2], "labels": labels[1:2]}
    _, a = asked("likelihood", tokens[:1], labels[:1], table)
    _, b = asked("likelihood", tokens[1:2], labels[1:2], table)
    both = Asked.of("likelihood", ("likelihood", {"weight": 0.5, "data": [second]}))
    model = TableForCausalLM(table)
    torch.testing.assert_close(both.loss(Step(model, first)), a + 0.5 * b)
    torch.testing.assert_close(both.loss(Step(model, first), anchored=False), a)
    # in a window of two batches each anchor counts half; the objective already counts its share of the labels
    items = 2 * int((labels[:1, 1:] != -100).sum())
    torch.testing.assert_close(both.loss(Step(model, first, items=items), windows=2), a / 2 + 0.25 * b)
    draws = [Asked.of("auto", ("likelihood", {"data": [0, 1, 2]})).anchors[0].batch(i) for i in range(6)]
    assert sorted(draws[:3]) == sorted(draws[3:]) == [0, 1, 2]
    with pytest.raises(RequestError, match="empty data"):
        Asked.of("auto", ("kl", {"data": []}))


def test_a_callable_of_model_and_batch():
    net = nn.Linear(2, 1)
    loss = Asked.of(lambda model, batch: model(batch["x"]).sum()).loss(Step(net, {"x": torch.ones(1, 2)}))
    torch.testing.assert_close(loss, net(torch.ones(1, 2)).sum())
    with pytest.raises(RequestError, match="scalar"):
        Asked.of(lambda model, batch: model(batch["x"])).loss(Step(net, {"x": torch.ones(3, 2)}))


def test_auto_says_what_to_do_without_a_loss():
    class Bare(nn.Module):
        def forward(self, x):
            return type("Out", (), {"logits": x})()

    with pytest.raises(RequestError, match="objective=callable"):
        choose("objectives", "auto")(Step(Bare(), {"x": torch.ones(1)}))


def test_auto_says_that_nothing_has_a_label():
    """Not "the loss is nan", as the mean over no label is."""
    model = pico("t5")
    batch = pico_batch(model)
    with pytest.raises(RequestError, match="nothing has a label"):
        choose("objectives", "auto")(Step(model, {**batch, "labels": torch.full_like(batch["labels"], -100)}))


@pytest.mark.parametrize("kind", ["NextSentencePrediction", "EncoderDecoder"])
def test_means_over_labels_add_up_over_a_window(kind):
    from transformers import BertConfig, BertForNextSentencePrediction, BertLMHeadModel, BertModel, EncoderDecoderModel

    how = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if kind == "EncoderDecoder":
        decoder = BertLMHeadModel(BertConfig(**how, is_decoder=True, add_cross_attention=True))
        model = EncoderDecoderModel(encoder=BertModel(BertConfig(**how)), decoder=decoder)
        model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
        labels = torch.tensor([[3, 4, 5], [6, -100, -100], [7, -100, -100]])
    else:
        model, labels = BertForNextSentencePrediction(BertConfig(**how)), torch.tensor([0, 1, 1])
    model, rows = model.double().eval(), {"input_ids": torch.randint(3, 16, (3, 4)), "labels": labels}
    asked, items = Asked.of("auto"), int((labels != -100).sum())
    parts = [{k: v[a:b] for k, v in rows.items()} for a, b in ((0, 1), (1, 3))]
    total = sum(asked.loss(Step(model, part, items=items), windows=2) for part in parts)
    torch.testing.assert_close(total, asked.loss(Step(model, rows)), rtol=0, atol=1e-12)


def test_auto_is_the_loss_of_the_model_itself():
    """Causal models, experts with their balance loss, encoders, encoder-decoders, CTC, contrastive pairs, images."""
    kinds = ["llama", "gpt2", "mixtral", "qwen3_moe", "bert", "t5", "wav2vec2", "clip", "vit"]
    for family in kinds:
        options = {"output_router_logits": True} if family in ("mixtral", "qwen3_moe") else {}
        model = pico(family, **options)
        batch = pico_batch(model, batch=3)
        more = {"return_loss": True} if family == "clip" else {}
        expected = model(**batch, **more).loss
        found = choose("objectives", "auto")(Step(model, batch))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=family)
        if options:
            assert model(**batch).aux_loss > 0


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("layout", ["rows", "flat", "all"])
def test_a_penalty_is_of_what_is_trained_alone(name, layout):
    """No data, no labels; analytic against numeric gradients; refused where nothing of that shape is trained."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 24, generator=rng, dtype=torch.float64)
    ids = {"rows": [1, 3, 8], "flat": list(range(0, 480, 7)), "all": ()}[layout]
    region = Region.of((20, 24), layout, ids)
    original = region.read(weight)
    model = nn.Linear(24, 20, bias=False).double()

    def loss_of(values):
        return choose("objectives", name)(
            Step(model, {}, trained=lambda: {"weight": Trained(values, region, original)})
        )

    moved = original + torch.randn(original.shape, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss_of, (moved.requires_grad_(True),))
    with pytest.raises(RequestError):
        choose("objectives", name)(Step(model, {}))


def test_pull_by_hand():
    """Two trained of eight numbers, moved by 3 and -1: 4 / 8."""
    region = Region.of((2, 4), "flat", [1, 6])
    held = Trained(torch.tensor([4.0, 1.0]), region, torch.tensor([1.0, 2.0]))
    step = Step(nn.Linear(4, 2, bias=False), {}, trained=lambda: {"weight": held})
    assert float(choose("objectives", "pull")(step)) == 0.5


def test_what_was_remembered_is_heard_beside_the_inputs_too():
    """A Trainer hands over columns that the model does not take apart from those it does."""
    table, tokens, labels = problem()
    batch, then = {"input_ids": tokens, "labels": labels}, table.flip(0)[tokens]
    inside = choose("objectives", "remembered")(Step(TableForCausalLM(table), {**batch, "remembered": then}))
    beside = choose("objectives", "remembered")(Step(TableForCausalLM(table), batch, extra={"remembered": then}))
    alone = choose("objectives", "remembered")(Step(TableForCausalLM(table), batch))
    assert torch.equal(inside, beside)
    assert float(inside - alone) > 0.1


def softened(table, temperature):
    """Log-probabilities, one by one."""
    return [[v / temperature - math.log(sum(math.exp(w / temperature) for w in row)) for v in row] for row in table]


@pytest.mark.parametrize("name", ["kl", "remembered"])
def test_temperatures_soften_both_and_the_square_makes_up_for_it(name):
    """Of two labelled tokens among four; the last position predicts nothing."""
    rng = torch.Generator().manual_seed(3)
    base, table = torch.randn(2, 5, 5, generator=rng, dtype=torch.float64)
    tokens, labels = torch.tensor([[1, 3, 0, 2]]), torch.tensor([[-100, -100, 0, 2]])
    model = TableForCausalLM(table)
    model.base = base
    batch = {"input_ids": tokens, "labels": labels}
    step = Step(model, batch, reference=lambda run: _at(model, base, run), extra={"remembered": base[tokens]})
    found = choose("objectives", name, temperature=2.0)(step)
    then, now = softened(base.tolist(), 2.0), softened(table.tolist(), 2.0)
    apart = [sum(math.exp(p) * (p - q) for p, q in zip(then[t], now[t])) for t in (3, 0)]
    plain = float(choose("objectives", "likelihood")(Step(model, batch))) if name == "remembered" else 0.0
    assert float(found) == pytest.approx(plain + 4.0 * sum(apart) / 2, abs=1e-6)


def test_what_was_remembered_counts_by_its_share_of_the_window():
    model = pico("llama", dtype=torch.float64)
    batch = pico_batch(model, batch=3)
    batch |= {"remembered": torch.randn(*batch["labels"].shape, model.config.vocab_size, dtype=torch.float64)}
    batch["labels"][0, :5] = -100
    items = (batch["labels"][:, 1:] != -100).sum()
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(1), slice(1, 3))]
    remembered = choose("objectives", "remembered", weight=2.0)
    whole = float(remembered(Step(model, batch)).detach())
    assert sum(float(remembered(Step(model, part, items=items)).detach()) for part in parts) == pytest.approx(
        whole, rel=1e-5
    )
