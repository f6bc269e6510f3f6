"""A pass of which activations alone are read computes no loss, and shows the same bits as one that does."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose, methods, option_names
from neurograft.core.context import Context, Said, Step
from neurograft.core.errors import RequestError
from neurograft.core.running import run, without_loss
from neurograft.core.taps.look import look
from neurograft.core.taps.tap import watch
from neurograft.core.units import Site, Tap
from neurograft.worlds.pico import families, pico, pico_batch, strangers

LABELLED = [f for f in [*families(), *strangers()] if "labels" in inspect.signature(type(pico(f)).forward).parameters]
STRIDED = {"codegen", "gpt_neo", "gptj"}  # their eager attention rounds otherwise where keys lie otherwise in memory
LOSSES = ("nll_loss", "ctc_loss", "binary_cross_entropy", "mse_loss")


class Losses(TorchDispatchMode):
    """Counts losses, and the numbers of the largest tensor that came out of a product."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, found = str(func), func(*args, **(kwargs or {}))
        self.count += any(word in name for word in LOSSES) and "backward" not in name
        if any(word in name for word in ("mm.", "linear.")):
            self.largest = max(self.largest, found.numel())
        return found


def tapped(model):
    """Every neuron, head and channel with a tap, but those of Mamba's convolution, whose kernel bypasses its module."""
    found = {}
    for kind in ("neuron", "head", "channel"):
        try:
            found |= {
                f"{kind} {n}": s for n, s in sites(model, kind).items() if s.tap is not None and "conv1d" not in n
            }
        except RequestError:  # units that the model lacks
            continue
    return found


def seen(model, where, call, batch):
    found = {}
    with watch(model, where, lambda name, x: found.setdefault(name, []).append(x.clone())), torch.no_grad():
        call(model, batch)
    return found


@pytest.mark.parametrize("family", LABELLED)
def test_activations_and_logits_are_the_bits_of_a_pass_with_labels(family):
    model = pico(family)
    batch, where, said = pico_batch(model), tapped(model), {}
    with Losses() as plain:
        wanted = seen(model, where, lambda m, b: said.update(plain=m(**b), bare=run(m, b)), batch)
    with Losses() as spared:
        found = seen(model, where, look, batch)
    assert plain.count > 0
    assert torch.equal(said["plain"].logits, said["bare"].logits)
    needy = family == "whisper"  # tells nobody how it makes its decoder's input
    assert (said["bare"].loss is None, spared.count == 0) == (not needy, not needy)
    wanted = {name: parts[: len(parts) // 2] for name, parts in wanted.items()}
    assert wanted.keys() == found.keys()
    for name, parts in wanted.items():
        assert len(parts) == len(found[name]), name
        for x, y in zip(parts, found[name]):
            assert torch.equal(x, y) or (family in STRIDED and torch.allclose(x, y, rtol=0, atol=1e-6)), name


def test_a_model_that_takes_no_batch_without_labels_gets_them():
    class Needy(torch.nn.Module):
        def forward(self, x, labels):
            return x

    class Masked(torch.nn.Module):  # as EncoderDecoderModel, which also makes a mask from them
        config = type("C", (), {"is_encoder_decoder": True, "has_no_defaults_at_init": True})()

        def forward(self, x, labels=None):
            return x

        def prepare_decoder_input_ids_from_labels(self, labels):
            raise AssertionError

    batch = {"x": torch.ones(2), "labels": torch.ones(2, 3, dtype=torch.long)}
    assert without_loss(Needy(), batch) == batch
    assert without_loss(Masked(), batch) == batch
    given = {"input_ids": torch.ones(1, 2), "decoder_input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)}
    assert "labels" not in without_loss(pico("t5"), given)


def test_logits_of_every_token_are_computed_only_for_who_looks_at_them():
    model = pico("llama", vocab_size=5000)
    batch = pico_batch(model, batch=2, length=8)
    inner, outer = (
        {name: Site(name, "channel", n, tap=Tap(name))} for name, n in (("model.norm", 32), ("lm_head", 5000))
    )
    with Losses() as inside:
        seen(model, inner, look, batch)
    assert inside.largest == 2 * 5000
    with Losses() as outside:
        found = seen(model, outer, look, batch)
    assert outside.largest == 16 * 5000
    assert found["lm_head"][0].shape == (14, 5000)
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda m, a, y: shapes.append(y.shape[1]))
    look(model, batch, hooked=["lm_head"])
    look(model, batch, hooked=["model.layers.0"])
    look(model, {**batch, "logits_to_keep": 3})
    hook.remove()
    assert shapes == [8, 1, 3]


# `spared` measures the labels' log-probability itself
READERS = [n for n in methods("locators") if "gradients" not in choose("locators", n).card.needs and n != "spared"]
KINDS = ("head", "neuron", "layer", "channel")
CHEAP = {"steps": 2, "epochs": 2, "k": 2}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_locators_that_take_no_gradient_compute_no_loss_and_few_logits(family):
    model = pico(family, vocab_size=3000)
    sides = [pico_batch(model, seed=seed) for seed in range(2)]
    for side in sides:
        side["labels"][:, :2] = -100 if family == "llama" else side["labels"][:, :2]
    ran = 0
    for name in READERS:
        method = choose("locators", name)
        method = choose("locators", name, **{k: v for k, v in CHEAP.items() if k in option_names(method.function)})
        kind = next((k for k in KINDS if not method.card.kinds or k in method.card.kinds), None)
        if kind is None or {"rehearse"} & method.card.needs or (family == "t5" and "per_token" in method.card.needs):
            continue
        where = dict(list(sites(model, kind, at="residual" if kind == "layer" else None).items())[:3])
        other = pico(family, seed=1, vocab_size=3000) if "against" in method.card.needs else None
        given = Context(model, where, sides[:1], sides[1:], asked=choose("objectives", "auto"), against=other)
        with Losses() as spared:
            try:
                method(given)
            except RequestError:
                continue
        ran += 1
        assert spared.count == 0, name
        reads = family == "t5" or {"labels"} & method.card.needs or name == "path_patching"
        assert reads or spared.largest < 16 * 3000, name
    assert ran > 8


def test_a_target_that_reads_no_loss_has_none_computed():
    model = pico("llama")
    batch = pico_batch(model)
    told = {}

    def target(outputs, given):
        told["loss"], told["labels"] = outputs.loss, "labels" in given
        return outputs.logits.mean()

    for made, wanted in ((target, False), (Said(target), True)):
        with torch.no_grad():
            Context(model, {}, [batch], target=made).scalar(batch)
        assert (told["loss"] is None) is wanted
        assert told["labels"]


@pytest.mark.parametrize("name", ["grad_x_act", "integrated_gradients", "fisher"])
def test_gradients_at_the_tokens_of_an_answer(name):
    """The model is called without the labels, and the taps know them all the same."""
    model = pico("llama")
    batch, auto = pico_batch(model), choose("objectives", "auto")
    batch["labels"][:, :3] = -100
    marks = batch["labels"] != -100
    options = {"on": "gate"} if name == "fisher" else {"steps": 2} if name == "integrated_gradients" else {}
    by_word, by_hand = (
        choose("locators", name, **options)(Context(model, sites(model, "neuron"), [batch], asked=auto, positions=p))
        for p in ("answer", lambda told: (told["input_ids"] >= 0) & torch.isin(told["labels"], batch["labels"][marks]))
    )
    for site, value in by_word.values.items():
        assert torch.equal(value, by_hand.values[site])
        assert bool(value.any())


def test_the_batch_that_taps_are_told_of_is_gone_behind_the_pass():
    model = pico("llama")
    batch, where = pico_batch(model), sites(model, "neuron")
    with pytest.raises(IndexError), watch(model, where, lambda name, x: None):
        run(model, {**batch, "input_ids": batch["input_ids"] + 64})
    assert not [name for name in vars(model) if name.startswith("_neurograft")]
    assert Step(model, batch).predictions.loss is None
    assert not [name for name in vars(model) if name.startswith("_neurograft")]
