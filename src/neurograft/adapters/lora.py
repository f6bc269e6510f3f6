"""Low-rank updates through PEFT's layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from neurograft.core.card import method
from neurograft.core.compact.mount import Mount, regions_of
from neurograft.core.errors import RequestError, near
from neurograft.core.grafts.delta import Delta, LowRank
from neurograft.core.linears import is_linear, transposed
from neurograft.core.seeds import seeded
from neurograft.core.selection import Selection
from neurograft.core.units import Parameters

NAME = "neurograft"


@method(
    claims={"undo", "zero_graft", "resume", "coordinates"},
    departs="Only W + scale * B A: no DoRA, no bias, no weight-changing starts (PiSSA, OLoRA), whose change is no "
    "low-rank product on this base. A selection names matrices: the update reaches all of each.",
)
def lora(
    model: nn.Module,
    where: Selection | None = None,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    r: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Iterable[str] = (),
    seed: int = 0,
) -> Mount:
    """Add scale * B A to linear layers, A random and B zero, so that nothing changes at the start.

    PEFT's layers take the place of the linear ones for the length of the mount (so `state_dict` has PEFT's keys
    meanwhile); the base's weights are never written.

    Args:
        model: any module.
        where: units; every linear layer that owns some gets an update of its whole matrix. None for all linear
            layers but the output head.
        new: parameters the base's checkpoint lacks, trained whole.
        protect: units whose numbers must not move: the matrices that hold them are left out.
        r: rank.
        alpha: scale = alpha / r; 2 r if None.
        dropout: on the update's input.
        rslora: scale = alpha / sqrt(r) instead.
        targets: patterns of module names instead of `where`.
        seed: names the numbers of A.

    Raises:
        RequestError: no linear layer remains, or a selected parameter is no linear layer's weight or is tied.
    """
    if where is not None and targets:
        raise RequestError("targets= beside a selection", expected="one of them", do="leave one out")
    if r < 1:
        raise RequestError(f"r={r} of lora", expected="a rank of at least 1", do="give r=8")
    names = _targets(model, where, list(targets), protect, new)
    scale = (2.0 * r if alpha is None else alpha) / (math.sqrt(r) if rslora else r)
    return LoraMount(model, names, r=r, scale=scale, dropout=dropout, seed=seed, new=new)


class LoraMount(Mount):
    """PEFT's LoRA layers in the place of linear ones."""

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        *,
        r: int,
        scale: float,
        dropout: float,
        seed: int,
        new: Iterable[str] | Mapping[str, int] = (),
        within: Mount | None = None,
    ) -> None:
        super().__init__(model, new=new, within=within)
        self.scale, self.linears = scale, {n: model.get_submodule(n) for n in names}
        with seeded(seed, "lora"):
            _inject(model, self.linears, r=r, scale=scale, dropout=dropout)
        self.layers: dict[str, Any] = {n: model.get_submodule(n) for n in names}
        for layer in self.layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor[NAME].to(torch.float32).requires_grad_(True)
        for name, parameter in self.found.by_name.items():
            parameter.requires_grad_(name in self.new)

    def undo(self) -> None:
        """Take back what an attachment did that failed half way."""
        self._place(getattr(self, "linears", {}))
        super().undo()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the factors, by the weight's name with `.lora_A` or `.lora_B` behind it."""
        return {
            f"{name}.weight.{factor}": getattr(layer, factor)[NAME].weight
            for name, layer in self.layers.items()
            for factor in ("lora_A", "lora_B")
        }

    def deltas(self) -> dict[str, Delta]:
        """Return scale * B A for each weight."""
        found: dict[str, Delta] = {}
        for name, layer in self.layers.items():
            a, b = (getattr(layer, f)[NAME].weight.detach().cpu().float().clone() for f in ("lora_A", "lora_B"))
            shape = tuple(self.found.by_name[f"{name}.weight"].shape)
            found[f"{name}.weight"] = LowRank(shape, a, b, self.scale, bool(layer.fan_in_fan_out))
        return found

    def rest(self) -> Callable[[], None]:
        """Put the plain layers back for a moment."""
        if not self.attached:
            return lambda: None
        self._place(self.linears)
        return lambda: self._place(self.layers)

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._modules[leaf] = module

    def unmount(self) -> None:
        """Put the plain layers back."""
        self._place(self.linears)


def _targets(
    model: nn.Module,
    where: Selection | None,
    patterns: list[str],
    protect: Selection | None,
    new: Iterable[str] | Mapping[str, int],
) -> list[str]:
    if any(hasattr(m, "lora_A") for m in model.modules()):
        raise RequestError(
            "a model with LoRA layers in it",
            expected="plain linear layers",
            do="leave the other attachment first, or merge the adapter into a base of its own",
        )
    found, chosen = Parameters.of(model), _chosen(model, where, patterns)
    shielded = set() if protect is None else set(regions_of(model, protect, tied="both"))
    fresh = list(new)
    names = sorted(
        n for n in chosen if f"{n}.weight" not in shielded and not any(_fits(f"{n}.weight", p) for p in fresh)
    )
    tied = [n for n in names if found.tied(f"{n}.weight")]
    if tied:
        raise RequestError(
            f"a low-rank update of {tied[0]}.weight, which is tied with {found.tied(tied[0] + '.weight')[0]}",
            expected="an untied weight",
            do="leave it out, or use adapter='slice' with tied='both'",
        )
    if not names:
        raise RequestError("a selection without a linear layer", expected="at least one", do="select linear layers")
    return names


def _chosen(model: nn.Module, where: Selection | None, patterns: list[str]) -> list[str]:
    """Return the linear layers that a selection means, or else the patterns; without either, all but the head."""
    linear = {n for n, m in model.named_modules() if is_linear(m)}
    if where is not None:
        weights = list(regions_of(model, where))
        odd = [n for n in weights if n.rpartition(".")[0] not in linear or not n.endswith(".weight")]
        if odd:
            raise RequestError(
                f"a selection in {odd[0]}",
                expected="units of linear layers for adapter='lora'",
                do="use adapter='slice' for embeddings, norms, biases, convolutions and expert banks",
            )
        return [n.rpartition(".")[0] for n in weights]
    if patterns:
        missed = [p for p in patterns if not any(_fits(n, p) for n in linear)]
        if missed:
            raise RequestError(
                f"targets={missed[0]!r}", expected="a linear layer's name or a pattern", do=near(missed[0], linear)
            )
        return [n for n in linear if any(_fits(n, p) for p in patterns)]
    get: Any = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    return [n for n in linear if model.get_submodule(n) is not head]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") or fnmatchcase(name, f"{pattern}.*")


def _inject(model: nn.Module, linears: Mapping[str, nn.Module], *, r: int, scale: float, dropout: float) -> None:
    """Let PEFT put its layers in; one pass for each orientation of the weight."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    alpha: Any = scale * r  # PEFT computes alpha / r, also of a fraction
    for flipped in (False, True):
        mine = [n for n, m in linears.items() if transposed(m) is flipped]
        if mine:
            config = LoraConfig(
                r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=mine, fan_in_fan_out=flipped
            )
            held = dict(vars(model))
            inject_adapter_in_model(config, model, adapter_name=NAME)
            for added in set(vars(model)) - set(held):
                delattr(model, added)
    got = {n for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    if got != set(linears):
        raise RequestError(
            f"linear layers that PEFT did not replace: {sorted(set(linears) ^ got)[:3]}",
            expected="layers PEFT knows",
            do="name other targets",
        )
