"""Tied weights taken apart for as long as a graft is on: one parameter with two names becomes two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.units import Parameters

if TYPE_CHECKING:
    from neurograft.core.grafts.delta import Slice
    from neurograft.core.grafts.operation import Operation

ATTRIBUTE = "_neurograft_untied"
FLAG = "tie_word_embeddings"


class Untie:
    """Gives parameters that share their numbers with others numbers of their own, equal at first.

    The model's config says so too, so that `save_pretrained` writes both and `from_pretrained` keeps them apart.

    Args:
        names: parameters, by the names that are to stand for themselves.

    Example:
        >>> net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
        >>> net[1].weight = net[0].weight
        >>> apart = Untie.of(net, ["1.weight"]).mount(net)
        >>> net[1].weight is net[0].weight
        False
        >>> apart.remove()
        >>> net[1].weight is net[0].weight
        True
    """

    scalable = True
    early = True  # mounted before the model's tensors are looked up

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(sorted(names))

    @staticmethod
    def of(model: nn.Module, names: Iterable[str]) -> Untie:
        """Return what unties the given parameters of a model.

        One flag of a transformers config governs all ties of the model, so all that it governs come apart.

        Raises:
            RequestError: one of them is not tied.
        """
        found, governed = Parameters.of(model), getattr(model, "all_tied_weights_keys", None) or {}
        wanted: set[str] = set()
        for name in names:
            tied = [name, *found.tied(name)]
            if len(tied) == 1:
                raise RequestError(f"the untying of {name}", expected="a tied parameter", do="leave tied='untie' out")
            copies = [n for n in tied if n in governed]
            wanted |= set(governed) if copies else {n for n in tied if n != found.alias[name]}
        return Untie(n for n in wanted if n in found.alias and found.tied(n))

    @staticmethod
    def from_parts(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Untie:
        """Read what `meta` wrote."""
        return Untie(meta["names"])

    def meta(self) -> dict[str, Any]:
        """Return plain data."""
        return {"type": "neurograft.core.untie.Untie", "names": list(self.names)}

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the numbers are in the graft's deltas."""
        return {}

    def mount(self, model: nn.Module) -> Untied:
        """Take the parameters apart; one that another graft has taken apart already stays so for both.

        Raises:
            RequestError: the model has no such parameter, or does not tie it.
        """
        return Untied(model, self.names)

    def fold(self, model: nn.Module) -> dict[str, Slice]:
        """Refuse: a tie is no number."""
        raise RequestError(
            self.describe(), expected="a change of numbers", do="keep it as it is; it ships in the graft"
        )

    def clashes(self, other: Operation) -> bool:
        """Say no: untying twice is untying."""
        return False

    def scaled(self, s: float) -> Untie:
        """Return itself: whatever the strength of the change, the copies stand apart."""
        return self

    def describe(self) -> str:
        """Return a few words for messages."""
        return f"untied {', '.join(self.names)}"


@dataclass
class Apart:
    """What is untied on a model, kept on it.

    Args:
        held: parameter name -> (the shared parameter, how many users want it apart).
        flags: config and its former flag.
        keys: the model's former list of ties.
    """

    held: dict[str, tuple[nn.Parameter, int]] = field(default_factory=dict)
    flags: list[tuple[Any, bool]] = field(default_factory=list)
    keys: dict[str, str] | None = None

    @staticmethod
    def of(model: nn.Module) -> Apart:
        """Return the model's, an empty one if nothing is untied."""
        found: Apart = model.__dict__.get(ATTRIBUTE) or Apart()
        return found


class Untied:
    """Parameters taken apart, and the way back.

    Args:
        model: the model.
        names: the parameters that get their own numbers.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.model, self.names = model, names
        self.apart, found = Apart.of(model), Parameters.of(model)
        for name in names:
            if name not in self.apart.held and not (name in found.alias and found.tied(name)):
                raise RequestError(
                    f"a graft that unties {name}, which is not tied here",
                    expected="the model as the graft was made on, with tied weights",
                    do="load the base the graft was made on, with its own config",
                )
        shared = {n: found.by_name[found.alias[n]] for n in names if n not in self.apart.held}
        # Copied before anything changes: memory may run out.
        own = {n: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for n, p in shared.items()}
        if not self.apart.held:
            self._say_so()
        for name in names:
            old, users = self.apart.held.get(name) or (shared[name], 0)
            self.apart.held[name] = (old, users + 1)
        for name, parameter in own.items():
            self._place(name, parameter)
        model.__dict__[ATTRIBUTE] = self.apart

    def _say_so(self) -> None:
        self.apart.flags = [(c, True) for c in _configs(self.model) if getattr(c, FLAG, False)]
        for config, _ in self.apart.flags:
            setattr(config, FLAG, False)
        self.apart.keys = getattr(self.model, "all_tied_weights_keys", None)
        if self.apart.keys is not None:
            self.model.all_tied_weights_keys = {}  # type: ignore[assignment]

    def _place(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[leaf] = parameter

    def remove(self) -> None:
        """Tie again what nobody else keeps apart."""
        for name in self.names:
            old, users = self.apart.held.pop(name)
            if users > 1:
                self.apart.held[name] = (old, users - 1)
            else:
                self._place(name, old)
        if not self.apart.held:
            self.model.__dict__.pop(ATTRIBUTE, None)
            for config, flag in self.apart.flags:
                setattr(config, FLAG, flag)
            if self.apart.keys is not None:
                self.model.all_tied_weights_keys = self.apart.keys  # type: ignore[assignment]


def _configs(model: nn.Module) -> list[Any]:
    config = getattr(model, "config", None)
    if config is None:
        return []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config] if text is config else [config, text]
