"""The structural fallback: what it finds by dataflow alone, and what it refuses."""

import pytest
import torch
from torch import nn

from neurograft.anatomy._reading import Reading
from neurograft.anatomy.describe import anatomy, describe
from neurograft.anatomy.inventory import Inventory
from neurograft.anatomy.sites import sites
from neurograft.anatomy.structural import structural
from neurograft.anatomy.verify import check
from neurograft.core.errors import RequestError
from neurograft.worlds.pico import families, pico, pico_batch, strangers

# What the fallback must refuse, and the words it says so with.
REFUSED = {
    "codegen": ("head", "neither stacked nor grouped"),
    "fnet": ("head", ""),
    "mamba": ("neuron", "belongs to no attention or FFN"),
    "segformer": ("neuron", "at other positions too"),
    "wavlm": ("head", "did not run by itself"),
}


@pytest.mark.parametrize("name", strangers())
def test_architectures_without_a_file_are_found_by_dataflow_and_verified(name):
    model = pico(name, dtype=torch.float64)
    inventory = Inventory(model)
    known = describe(inventory)
    kinds = [k for k in ("head", "neuron", "layer") if not (name in REFUSED and k in REFUSED[name][0])]
    if name == "mamba":
        assert known.layers == []
        kinds = []
    rows = check(Reading(inventory, known), pico_batch(model), kinds=kinds, limit=1)
    assert known.family == "structural"
    assert not [row for row in rows if row.status == "failed"]
    assert {row.kind for row in rows if row.status == "equal"} == set(kinds)
    if name in REFUSED:
        kind, words = REFUSED[name]
        assert words in known.note
        with pytest.raises(RequestError, match="which has none"):
            sites(model, kind)


# Families whose file says more than dataflow can show, and why.
BEYOND = {
    "dit": "an FFN outside of the layers",
    "llava": "an FFN outside of the layers",
    "olmo2": "a norm over all heads",
    "olmoe": "a norm over all heads",
    "resnet": "convolutions only",
    "siglip": "an FFN outside of the layers",
    "unet": "residual blocks of convolutions",
}
SLOW = {
    "bart",
    "clip",
    "marian",
    "t5",
    "whisper",
    "hubert",
    "gemma2",
    "mistral",
    "qwen2",
    "smollm3",
    "electra",
    "roberta",
}


def shape_of(blocks):
    """Return what is known of the units of some blocks, in a form to compare."""
    heads = {
        (a.module, a.o.span, *sorted((k, s.module, s.span) for k, s in a.made.items()))
        for b in blocks
        for a in b.attentions
    }
    ffns = {
        (f.module, f.up.module, f.up.span, f.gate and (f.gate.module, f.gate.span), f.down)
        for b in blocks
        for f in b.ffns
    }
    return [b.name for b in blocks], heads, ffns


@pytest.mark.parametrize("family", sorted(set(families()) - SLOW - {"unet", "llava", "siglip", "resnet"}))
def test_dataflow_finds_what_the_family_files_say(family):
    model = pico(family)
    said, found = anatomy(model), structural(Inventory(model), pico_batch(model))
    same = shape_of([b for b in said.blocks if b.repeated]) == shape_of(found.blocks)
    same = same and len(said.blocks) == len(found.blocks)
    assert same == (family not in BEYOND), BEYOND.get(family, found.notes)


class Strange(nn.Module):
    """Layers of a gated FFN whose gate comes second and interleaved, and nothing else."""

    def __init__(self, noisy=False):
        super().__init__()
        self.noisy = noisy
        self.layers = nn.ModuleList(
            nn.ModuleDict({"wide": nn.Linear(6, 20), "thin": nn.Linear(10, 6)}) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            y = layer["wide"](x).unflatten(-1, (10, 2))
            x = x + layer["thin"](y[..., 0] * torch.nn.functional.silu(y[..., 1]))
        return x + torch.rand(()) if self.noisy else x


def test_order_and_interleaving_of_a_gate_are_measured():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Strange().double()
    batch = {"x": torch.arange(36.0, dtype=torch.float64).view(2, 3, 6).sin()}
    (first, second) = anatomy(model, batch=batch).blocks
    assert first.ffns[0].gate.span.start == 1
    assert first.ffns[0].gate.span.units == ((10, 2),)
    assert second.ffns[0].up.span.start == 0
    with pytest.raises(RequestError, match="give a batch of your own"):
        structural(Inventory(model))
    assert "batch" in anatomy(model).note
    assert len(sites(model, "row")) == 4


def test_a_model_that_is_not_deterministic_is_refused():
    with pytest.raises(RequestError, match="differ from pass to pass"):
        anatomy(Strange(noisy=True), batch={"x": torch.ones(2, 3, 6)})
