"""Sites: every unit of a kind that a model has, with the numbers it owns and where its activation passes.

| kind | unit | owns | activation (default `at` first) |
|---|---|---|---|
| weight | a single weight of a linear layer, convolution or bank | itself | none |
| row | an output feature of such a matrix | its weights and bias | the module's output |
| column | an input feature | its weights | the module's input |
| block | a rectangle of the grid `block=(high, wide)` of a matrix | its weights | none |
| neuron | a hidden neuron of an FFN | rows (and biases) of gate and up, column of down | `act`, `gate`, `up` |
| head | an attention head | rows of q (of k, v unless shared), columns of o | `out`, `kv` |
| expert | an expert of a mixture | its matrices | none; `router` |
| channel | a residual channel as a sub-layer writes it; a feature map | its row there | the contribution; `residual` |
| layer | a block | all it holds | none; `attention`, `ffn`, ..., `residual` |
| module | a module that holds parameters itself | those | a matrix's or norm's output |
| norm | a feature of a norm | its gain and shift | the norm's output |
| bias | a bias entry | itself | none |
| token | a word of the vocabulary | its row of the embedding | none; `head`: its logit |

"Neuron" means several tensors in the papers. All three `at` are the same neuron and own the same numbers; what
differs is the activation, and with it the numbers that silence it (`Site.writes`):
  act   what enters the down projection (after activation and gate), written by its column of down;
  gate  the output of the gate projection, before its activation: written by that row and bias;
  up    the output of the up projection (before the activation in a plain FFN): written by that row and bias.
A residual channel is kind "channel". `neurograft.anatomy.convert` goes from one to another, or refuses.

Where queries share keys and values, a head (`at="out"`) is one query head and owns no key or value; the shared
key/value heads are `at="kv"`, tapped at the values. Matrices of embeddings, and heads tied to them, are tokens
and not rows, columns or weights. A tap whose site has no `writes` is for reading: no number silences it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from neurograft.anatomy import _block_units, _matrix_units, _stream_units
from neurograft.anatomy._reading import AT, Reading
from neurograft.anatomy.describe import describe
from neurograft.anatomy.inventory import Inventory
from neurograft.core.errors import RequestError, near, one_of
from neurograft.core.units import KINDS, Site

BUILDERS: Mapping[str, Callable[[Reading], Iterator[Site]]] = {
    "weight": _matrix_units.weights,
    "row": _matrix_units.rows,
    "column": _matrix_units.columns,
    "block": _matrix_units.blocks,
    "neuron": _block_units.neurons,
    "head": _block_units.heads,
    "expert": _block_units.experts,
    "channel": _stream_units.channels,
    "layer": _stream_units.layers,
    "module": _matrix_units.modules,
    "norm": _matrix_units.norms,
    "bias": _matrix_units.biases,
    "token": _matrix_units.tokens,
}


def sites(
    model: nn.Module,
    units: str,
    *,
    at: str | None = None,
    layers: Sequence[int | str] | int | str | None = None,
    block: int | tuple[int, int] | None = None,
    match: Sequence[str] | str | None = None,
) -> dict[str, Site]:
    """Return every site of a kind in a model, by name, in the order of the model.

    Args:
        model: any model of a known family, or of an unknown one whose structure can be verified.
        units: one of `neurograft.core.units.KINDS`.
        at: which activation of the unit; see the table above. For matrices: the parameter's short name. Of several,
            as in "gate|up|act", the first that the model has.
        layers: numbers (negative ones count from the end) or module names of blocks; None for everything, also
            outside of blocks.
        block: (output, input) features of a block, for kind "block"; the largest power of two up to 64 that
            divides each side if None.
        match: shell patterns over site names; each must match something.

    Raises:
        RequestError: an unknown kind, `at`, layer or pattern, with the near matches; units the model lacks; a
            model whose anatomy is not known and could not be verified.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> found = sites(pico("llama"), "neuron", layers=[-1])
        >>> [(s.name, s.n, [p.param.split(".")[-2] for p in s.parts]) for s in found.values()]
        [('model.layers.1.mlp/neuron', 48, ['gate_proj', 'up_proj', 'down_proj'])]
    """
    one_of(units, KINDS, what="unit kind")
    if block is not None and units != "block":
        raise RequestError(f"block={block} for units={units!r}", expected="units='block'", do="leave block out")
    if block is not None and not _sides(block):
        raise RequestError(
            f"block={block!r}", expected="two whole numbers, at least 1: its rows and columns", do="give block=(4, 4)"
        )
    reading = read(model)
    found = _matching(_in_layers(of_kind(reading, units, at=at), reading, layers), match)
    if block is None:
        return found
    return of_kind(replace(reading, block=block, only=frozenset(found)), units, at=at)


def read(model: nn.Module) -> Reading:
    """Read a model once, for all kinds of its units."""
    inventory = Inventory(model)
    return Reading(inventory, describe(inventory))


def of_kind(reading: Reading, units: str, *, at: str | None = None) -> dict[str, Site]:
    """Return every site of a kind in a model that has been read; see `sites`."""
    for word in at.split("|") if at else (None,):
        asked = replace(reading, at=_checked(units, word), offered=[])
        found = {site.name: asked.untied(site) for site in BUILDERS[units](asked)}
        if found:
            return found
    raise _nothing(asked, units)


def every_kind(reading: Reading, kinds: Iterable[str] | None = None) -> Iterator[dict[str, Site]]:
    """Yield the sites of every kind, and of every activation it has.

    Args:
        reading: the model.
        kinds: these alone; None for all that the model has.

    Raises:
        RequestError: an unknown kind, or one that was asked for and the model lacks.
    """
    given = None if kinds is None else [one_of(kind, KINDS, what="unit kind") for kind in kinds]
    roles = list(dict.fromkeys(role for branches in reading.anatomy.branches for role in branches))
    for kind in KINDS if given is None else given:
        for i, at in enumerate(("", *roles, "residual") if kind == "layer" else AT.get(kind, ("",))):
            try:
                yield of_kind(reading, kind, at=at if i else None)
            except RequestError:
                if given is not None and i == 0:
                    raise


def _sides(block: object) -> bool:
    """Say whether these are a block's sides."""
    sides = (block, block) if isinstance(block, int) else block
    whole = isinstance(sides, Sequence) and all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides)
    return whole and len(sides) == 2  # type: ignore[arg-type]


def _checked(units: str, at: str | None) -> str | None:
    known = [a for a in AT.get(units, ()) if a]
    if at is None or units not in AT or units == "layer":
        return at
    if not known:
        raise RequestError(f"at={at!r} for units={units!r}", expected="no at", do="leave at out")
    return one_of(at, known, what=f"at of kind {units}")


def _nothing(reading: Reading, units: str) -> RequestError:
    name = type(reading.inventory.model).__name__
    if reading.at is not None and reading.offered:
        return RequestError(
            f"at={reading.at!r} for units={units!r} of {name}",
            expected=f"one of {', '.join(reading.offered)}, or no at",
            do=near(reading.at, reading.offered),
        )
    anything = replace(reading, at=None)
    have = [kind for kind in KINDS if next(iter(BUILDERS[kind](anything)), None)]
    unknown = f" (its blocks could not be read: {reading.anatomy.note})" if reading.anatomy.note else ""
    return RequestError(
        f"units={units!r} for {name}, which has none{unknown}",
        expected=f"one of {', '.join(have)}",
        do="choose a kind that this model has",
    )


def _in_layers(
    found: dict[str, Site], reading: Reading, layers: Sequence[int | str] | int | str | None
) -> dict[str, Site]:
    if layers is None:
        return found
    names = reading.anatomy.layers
    wanted = set()
    for layer in [layers] if isinstance(layers, (int, str)) else layers:
        if isinstance(layer, str):
            wanted.add(names.index(one_of(layer, names, what="layer")))
        elif isinstance(layer, int) and -len(names) <= layer < len(names):
            wanted.add(layer % len(names))
        else:
            raise RequestError(
                f"layer {layer!r} of a model with {len(names)} blocks",
                expected=f"{-len(names)} to {len(names) - 1}",
                do="count blocks from 0",
            )
    chosen = {name: site for name, site in found.items() if site.layer in wanted}
    if not chosen:
        raise RequestError(
            f"layers={layers!r}, in which this kind has no units",
            expected=f"layers among {sorted({s.layer for s in found.values() if s.layer is not None})}",
            do="choose other layers",
        )
    return chosen


def _matching(found: dict[str, Site], match: Iterable[str] | str | None) -> dict[str, Site]:
    if match is None:
        return found
    patterns = [match] if isinstance(match, str) else list(match)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise RequestError(
                f"the pattern {pattern!r}, which matches no site",
                expected="a pattern over site names",
                do=near(pattern, found),
            )
    return {n: s for n, s in found.items() if any(fnmatchcase(n, p) for p in patterns)}
