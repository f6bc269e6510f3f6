"""How examples are batched is nobody's business: scores of batches of one and of four (and two) are the same."""

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose, methods, option_names
from neurograft.core.context import Context, Step
from neurograft.core.errors import RequestError
from neurograft.core.units import Site, Tap
from neurograft.locators._common import per_example
from neurograft.locators.activation import activation
from neurograft.locators.fisher import fisher
from neurograft.locators.grad_x_act import grad_x_act
from neurograft.worlds.pico import pico, pico_batch

LOCATORS = methods("locators")
# contrastive pairs are not here: their loss compares the examples of a batch
WORLDS = [("llama", "neuron"), ("llama", "head"), ("llama", "row"), ("llama", "channel"), ("mixtral", "neuron"),
          ("t5", "neuron"), ("wav2vec2", "neuron"), ("swin", "head"), ("deberta_v2", "row")]  # fmt: skip
SHARED = {"share_att_key": True, "max_relative_positions": 8, "position_buckets": 4}  # as every DeBERTa-v3 that is used
CONFIG = {"deberta_v2": SHARED}
UNIT_BY_UNIT = {"described", "spared"}  # slow, so on heads and rows alone
FAINT = 1e-9  # what float32 leaves of scores that are 0 by construction


def rows(model, seed):
    """Six examples of different lengths, padded on the right; texts with prompts of two tokens."""
    batch = pico_batch(model, batch=6, length=9, seed=seed)
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 2:
        for i, end in enumerate((9, 5, 7, 9, 4, 6)):
            labels[i, min(end, labels.shape[1] - 1 - i % 2) :] = -100
            if labels.shape == batch.get("input_ids", labels[:0]).shape and not model.config.is_encoder_decoder:
                batch["attention_mask"][i] = (torch.arange(9) < end).long()
                labels[i, :2] = -100
    return batch


def cut(batch, count):
    return [{k: v[i : i + count] for k, v in batch.items()} for i in range(0, 6, count)]


def fits(card, kind, family):
    texts = family in ("llama", "mixtral")
    return (not card.kinds or kind in card.kinds) and (texts or not {"per_token", "contrast"} & card.needs)


@pytest.mark.parametrize(("family", "kind"), WORLDS)
def test_scores_do_not_depend_on_the_batch_size(family, kind):
    model, auto = pico(family, **CONFIG.get(family, {})), choose("objectives", "auto")
    where = dict([pair for pair in sites(model, kind).items() if pair[1].layer == (0 if family == "swin" else 1)][:2])
    sides = rows(model, 1), rows(model, 2)
    for name in LOCATORS:
        method = choose("locators", name)
        cheap = {"steps": 2, "joint": True, "epochs": 20, "batch_size": 4}
        method = choose("locators", name, **{k: v for k, v in cheap.items() if k in option_names(method.function)})
        if not fits(method.card, kind, family) or (name in UNIT_BY_UNIT and kind not in ("head", "row")):
            continue
        other = pico(family, seed=1, **CONFIG.get(family, {})) if "against" in method.card.needs else None
        one, four = (
            method(Context(model, where, *(cut(side, count) for side in sides), asked=auto, against=other))
            for count in (1, 4)
        )
        for site, value in one.values.items():
            spread = 1e-3 * float(value.abs().max()) + FAINT
            assert torch.allclose(four.values[site], value, rtol=2e-3, atol=spread), name


class Counted(nn.Module):
    """A causal language model as far as a loss can see, whose logits are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.loss_type = logits, "ForCausalLM"

    def forward(self, input_ids):
        return type("Out", (), {"logits": self.logits})()


def test_rows_count_alike_in_a_loss_apart_and_tokens_otherwise():
    # Row 0 has three labels at ln 2 each, row 1 one at ln 4, row 2 none.
    logits = torch.zeros(3, 4, 2)
    logits[1, 2] = torch.tensor([0.0, torch.tensor(3.0).log()])
    labels = torch.tensor([[-100, 0, 1, 0], [-100, -100, -100, 0], [-100] * 4])
    batch = {"input_ids": torch.zeros(3, 4, dtype=torch.long), "labels": labels}
    ln2, likelihood = torch.tensor(2.0).log().item(), choose("objectives", "likelihood")
    assert float(likelihood(Step(Counted(logits), batch))) == pytest.approx((3 * ln2 + 2 * ln2) / 4)
    assert float(likelihood(Step(Counted(logits), batch, apart=True))) == pytest.approx((ln2 + 2 * ln2 + 0) / 3)
    same = {k: v[:1].repeat(2, 1) for k, v in batch.items()}
    net = Counted(logits[:1].repeat(2, 1, 1))
    assert torch.equal(likelihood(Step(net, same, apart=True)), likelihood(Step(net, same)))


@pytest.mark.parametrize("family", ["t5", "marian", "wav2vec2"])
def test_the_loss_a_model_returns_is_the_mean_of_its_rows_alone(family):
    model, auto = pico(family), choose("objectives", "auto")
    batch = rows(model, 3)
    alone = sum(float(auto(Step(model, one, apart=True))) for one in cut(batch, 1)) / 6
    assert float(auto(Step(model, batch, apart=True))) == pytest.approx(alone, rel=1e-5)
    assert float(auto(Step(model, batch))) != pytest.approx(alone, rel=1e-4)


def test_an_expert_without_a_token_adds_nothing():
    assert per_example(torch.empty(0, 3), torch.empty(0, dtype=torch.long), 2).tolist() == [[0.0] * 3] * 2


def test_an_expert_that_does_not_tell_whose_tokens_it_got_is_no_ground_for_scores_by_example():
    model, auto = pico("switch_transformers"), choose("objectives", "auto")
    where = {n: s for n, s in sites(model, "neuron").items() if "experts" in n}
    given = Context(model, where, [pico_batch(model, batch=4)], asked=auto)
    with pytest.raises(RequestError, match="whose tokens"):
        grad_x_act(given)
    with pytest.raises(RequestError, match="whose tokens"):
        activation(given, pool="max")
    for found in (grad_x_act(given, over="data"), grad_x_act(given, over="token"), activation(given)):
        assert any(bool(v.any()) for v in found.values.values())


class Twice(nn.Module):
    """u passes `mid` twice, +1 and -1 times: what is added over the uses is 0, what each adds alone is not."""

    def __init__(self):
        super().__init__()
        self.mid = nn.Identity()

    def forward(self, x):
        return self.mid(x) - 0.5 * self.mid(2 * x)


def test_a_module_that_layers_share_counts_the_sum_of_its_uses():
    site = {"u": Site("u", "neuron", 1, (), Tap("mid"))}
    given = Context(Twice(), site, [{"x": torch.tensor([[3.0], [5.0]])}], target=lambda out, batch: out.mean())
    # uses: +x and -0.5 * 2x, so every example's effect is 0
    assert grad_x_act(given).values["u"].tolist() == [0.0]
    assert grad_x_act(given, over="token").values["u"].tolist() == [8.0]
    assert fisher(given, on="gate").values["u"].tolist() == [0.0]


def mentions(side, counts):
    """Prompts of six lengths whose last token but two stands earlier too, and others that have no such token."""
    rng = torch.Generator().manual_seed(3)
    found = []
    for ask in (True, False):
        rows = []
        for length, place in ((9, 1), (6, 0), (8, 3), (12, 2), (7, 2), (10, 0)):
            tokens = torch.randint(10, 64, (length,), generator=rng)
            tokens[-4] = tokens[place] if ask else 5  # the answer is last, the end stands before it
            rows.append(tokens)
        batches, at = [], 0
        for count in counts:
            part = rows[at : at + count]
            wide = max(map(len, part))
            pads = [((wide - len(t), 0) if side == "left" else (0, wide - len(t))) for t in part]
            ids, mask, labels = (
                torch.stack([nn.functional.pad(v, p, value=fill) for v, p in zip(values, pads)])
                for values, fill in (
                    (part, 0),
                    ([torch.ones_like(t) for t in part], 0),
                    ([torch.where(torch.arange(len(t)) == len(t) - 1, t, -100) for t in part], -100),
                )
            )
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
            at += count
        found.append(batches)
    return found


PLACES = [("path_patching", at) for at in ("mention", "mention+1", "end-2", "end-5")] + [
    ("dcm", "end-2"),
    ("dcm", "end-5"),
]


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_places_are_the_same_whatever_the_batches_and_the_side_of_padding(name, at):
    model = pico("llama")
    where = sites(model, "head")
    options = {} if name == "path_patching" else {"batch_size": 4}
    found = [
        choose("locators", name, at=at, **options)(Context(model, where, *mentions(side, counts)))
        for side, counts in (("right", (6,)), ("right", (1,) * 6), ("left", (4, 2)), ("left", (1, 5)))
    ]
    for other in found[1:]:
        for site, value in found[0].values.items():
            torch.testing.assert_close(other.values[site], value, rtol=2e-3, atol=1e-5)
        assert other.card == found[0].card
