"""A plan by depth: strata of layers, each with its own way of training or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from neurograft.adapters._redrawn import redrawn
from neurograft.adapters.dense import DenseMount
from neurograft.adapters.lora import LoraMount
from neurograft.anatomy.depth import Depths, depths
from neurograft.anatomy.roles import ROLES
from neurograft.anatomy.roles import roles as roles_of
from neurograft.core.card import method
from neurograft.core.compact.mount import Mount, regions_of
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.delta import Delta
from neurograft.core.linears import is_linear
from neurograft.core.selection import Selection

TREATMENTS = ("all", "redrawn", "bias", "norm", "low_rank")
ENDS = ("frozen", "all", "redrawn")
PLAN: Sequence[Mapping[str, Any]] = ({"upto": 0.5, "train": ()}, {"train": ("low_rank",)})


@method(
    paper="spafit",
    claims={"undo", "zero_graft", "resume", "coordinates"},
    departs="Strata that are redrawn start away from the base; nothing else does.",
)
def strata(
    model: nn.Module,
    where: Selection | None = None,
    *,
    plan: Sequence[Mapping[str, Any]] = PLAN,
    embeddings: str = "frozen",
    pooler: str = "frozen",
    head: str = "all",
    low_rank: Sequence[str] = ("q", "v"),
    r: int = 8,
    alpha: float | None = None,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    seed: int = 0,
) -> Mount:
    """Train each stratum of layers as the plan says, from the bottom up.

    Args:
        model: a model of repeated layers.
        where: must be None: the plan says where.
        plan: one dict a stratum: `upto`, its upper cut, in layers (negative: from the top) or as a share of them, left
            out for the last; `train`, words of "all" (every parameter), "redrawn" (drawn anew by the model's own
            initializer, then every parameter), "bias", "norm", "low_rank"; empty for frozen. Biases of matrices with
            a low-rank update stay.
        embeddings: "frozen", "all" or "redrawn": what lies before the layers.
        pooler: the same for the pooler, where there is one; a redrawn stratum needs it redrawn too.
        head: the same for what else lies behind the layers, a final norm too.
        low_rank: roles of the matrices that get scale * B A.
        r: its rank.
        alpha: scale = alpha / r; r if None.
        new: parameters the base's checkpoint lacks, trained whole.
        protect: units whose parameters stay frozen, whole.
        seed: names the numbers of A and what is redrawn.

    Raises:
        RequestError: a selection, an unknown word, cuts out of order, a stratum in which a treatment finds nothing,
            or a redrawn stratum below a pooler that is not.
    """
    if where is not None:
        raise RequestError("a selection for adapter='strata'", expected="a plan", do="say it in plan=, or use 'dense'")
    deep = depths(model)
    whole, low, fresh = _by_layers(model, deep, plan, low_rank)
    behind = [n for n, d in deep.by_name.items() if d > deep.layers]
    ends = {"embeddings": (embeddings, [n for n, d in deep.by_name.items() if d == 0])}
    ends["pooler"] = (pooler, [n for n in behind if "pooler" in n])
    ends["head"] = (head, [n for n in behind if "pooler" not in n])
    if fresh and ends["pooler"][1] and pooler != "redrawn":
        raise RequestError(
            "redrawn layers below a pooler that is not", expected="pooler='redrawn'", do="redraw what reads them too"
        )
    for name, (treatment, mine) in ends.items():
        if one_of(treatment, ENDS, what=f"treatment of the {name}") != "frozen":
            whole += mine
            fresh += mine if treatment == "redrawn" else []
    shielded = set() if protect is None else set(regions_of(model, protect, tied="both"))
    whole = [n for n in dict.fromkeys(whole) if n not in shielded]
    low = [n for n in low if f"{n}.weight" not in shielded]
    if not whole and not low:
        raise RequestError("a plan that trains nothing", expected="something awake", do="give a stratum a treatment")
    fresh = [n for n in fresh if n not in shielded]
    mount = StrataMount(model, whole, low, fresh, r=r, scale=(r if alpha is None else alpha) / r, new=new, seed=seed)
    mount.declared = False  # a plan names strata and not tensors: some (a key's bias) no objective reaches
    return mount


class StrataMount(Mount):
    """Whole parameters and low-rank updates side by side."""

    def __init__(
        self,
        model: nn.Module,
        whole: list[str],
        low: list[str],
        fresh: list[str],
        *,
        r: int,
        scale: float,
        new: Iterable[str] | Mapping[str, int] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(model, new=new)
        self.parts: list[DenseMount | LoraMount] = []
        self.parts.append(DenseMount(model, [n for n in whole if n not in self.new], within=self))
        for module in dict.fromkeys(n.rpartition(".")[0] for n in fresh):
            for name, value in redrawn(model, module, seed=seed).items():
                if name in fresh:
                    self.found.by_name[self.found.alias[name]].data.copy_(value)
        if low:
            self.parts.append(LoraMount(model, low, r=r, scale=scale, dropout=0.0, seed=seed, within=self))
        for parameter in self.parameters():
            parameter.requires_grad_(True)  # the later of the two has frozen the earlier one's

    def undo(self) -> None:
        """Take back what an attachment did that failed half way."""
        self.detach()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the whole parameters and the factors."""
        return {n: p for part in self.parts for n, p in part.trained().items()}

    def deltas(self) -> dict[str, Delta]:
        """Return the changes of both."""
        return {n: d for part in self.parts for n, d in part.deltas().items()}

    def rest(self) -> Callable[[], None]:
        """Put the base back for a moment."""
        if not self.attached:
            return lambda: None
        ended = [part.rest() for part in reversed(self.parts)]

        def over() -> None:
            for end in ended:
                end()

        return over

    def unmount(self) -> None:
        """Put the base back."""
        for part in reversed(self.parts):
            part.unmount()
            part.attached = False


def _by_layers(
    model: nn.Module, deep: Depths, plan: Sequence[Mapping[str, Any]], low_rank: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """Return the parameters trained whole, the modules that get a low-rank update, and the parameters drawn anew."""
    whole, low, fresh = list[str](), list[str](), list[str]()
    has, bottom = roles_of(model), 0
    wanted = {one_of(role, ROLES, what="role") for role in low_rank}
    for number, stratum in enumerate(plan):
        odd = set(stratum) - {"upto", "train"}
        if odd:
            raise RequestError(f"{sorted(odd)[0]!r} in a stratum", expected="upto and train", do="check the plan")
        top = _cut(stratum.get("upto"), deep.layers)
        if not bottom <= top <= deep.layers or (number == len(plan) - 1 and top != deep.layers):
            raise RequestError(
                f"a stratum from layer {bottom} up to {top} of {deep.layers}",
                expected="cuts that rise, the last stratum to the end",
                do="order the plan from the bottom up",
            )
        mine = [n for n, d in deep.by_name.items() if bottom < d <= top]
        words = [one_of(w, TREATMENTS, what="treatment") for w in stratum.get("train", ())]
        matrices = _linear(model, [n for n in mine if has.get(n) and has[n] <= wanted]) if "low_rank" in words else []
        rest = [n for n in mine if n.rpartition(".")[0] not in matrices]
        for word in words:
            found = {
                "low_rank": matrices,
                "bias": [n for n in rest if n.endswith("bias")],
                "norm": [n for n in rest if "norm" in has.get(n, ())],
            }.get(word, rest)
            if mine and not found:
                raise RequestError(
                    f"the treatment {word!r} of layers {bottom} to {top - 1}, which have nothing of that kind",
                    expected="a treatment that finds parameters",
                    do="use 'norm' where there are no biases; add the roles that are fused with the wanted ones",
                )
            whole += found if word != "low_rank" else []
            fresh += found if word == "redrawn" else []
        low += matrices
        bottom = top
    return whole, low, fresh


def _linear(model: nn.Module, names: Sequence[str]) -> list[str]:
    owners = [n.rpartition(".")[0] for n in names if n.endswith(".weight")]
    kinds = {owner: model.get_submodule(owner) for owner in owners}
    return [o for o, m in kinds.items() if is_linear(m)]


def _cut(upto: float | None, layers: int) -> int:
    if upto is None:
        return layers
    if isinstance(upto, float):
        return round(upto * layers)
    return upto if upto >= 0 else layers + upto
