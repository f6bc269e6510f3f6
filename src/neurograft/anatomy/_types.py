"""What is known of a network: slots, attentions, FFNs, mixtures, branches, blocks, and the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from neurograft.anatomy.matrix import Bank, Matrix, Span


@dataclass(frozen=True)
class Slot:
    """Like units along one side of the matrix of a module."""

    module: str
    matrix: Matrix
    span: Span


@dataclass(frozen=True)
class Attention:
    """An attention: where the queries, keys and values of its heads are made and what reads the heads' outputs.

    Args:
        module: its module.
        role: "attention" or "cross_attention".
        made: query, key, value and further projections by letter, each cut into heads; keys and values have
            fewer heads where queries share them.
        o: the output projection, its input cut into heads.
        mixed: whether queries and keys pass a norm over all heads, so that heads do not keep quite apart.
    """

    module: str
    role: str
    made: Mapping[str, Slot]
    o: Slot
    mixed: bool = False


@dataclass(frozen=True)
class Ffn:
    """A pair of linear layers with an activation between them, gated or plain; or one expert of that shape.

    Args:
        module: its module.
        role: name of its branch.
        up: makes the hidden neurons.
        down: reads them.
        gate: makes their gates, or None.
        expert: its number, if it is an expert of a fused bank; `down.module` is then the bank's module.
    """

    module: str
    role: str
    up: Slot
    down: Slot
    gate: Slot | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Mixture:
    """The experts of a block.

    Args:
        module: the module that routes and joins them.
        experts: module of each expert, or the one module of a fused bank.
        banks: the fused bank's parameters, up (and gate) first, `down_proj` last; empty for separate modules.
        router: module whose first output is the routing logits, or None.
    """

    module: str
    experts: tuple[str, ...]
    banks: tuple[Bank, ...] = ()
    router: str | None = None


@dataclass(frozen=True)
class Branch:
    """A sub-layer whose contribution is added to the residual stream.

    Args:
        role: "attention", "cross_attention", "ffn" or the family's word.
        module: its output is the contribution before residual and norm.
        writers: modules that write it; without their numbers the contribution is zero.
        banks: fused banks that write it.
    """

    role: str
    module: str
    writers: tuple[str, ...] = ()
    banks: tuple[Bank, ...] = ()


@dataclass(frozen=True)
class Block:
    """What is known of one block.

    Args:
        name: its module.
        family: whose file described it, or "structural".
        attentions: its attentions.
        ffns: its FFNs, experts among them.
        mixtures: its mixtures of experts.
        branches: its sub-layers.
        repeated: whether it is a layer; False for a module of that kind outside of the layers.
        dim: feature axis of its output.
    """

    name: str
    family: str
    attentions: tuple[Attention, ...] = ()
    ffns: tuple[Ffn, ...] = ()
    mixtures: tuple[Mixture, ...] = ()
    branches: tuple[Branch, ...] = ()
    repeated: bool = True
    dim: int = -1


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are.

    Args:
        family: names of the families its blocks belong to, joined by "+"; "structural" for blocks found by
            shape and dataflow.
        layers: modules of its repeated blocks, in the order of the model.
        branches: for each layer, role -> the module whose output is that sub-layer's contribution before the
            residual and its norm.
        embedding: module of the token embedding, or None.
        head: module of the output head, or None.
        norms: modules of all norms.
        blocks: what is known of each block, and of modules of that kind outside of the layers.
        channels: convolutions whose feature maps leave through a norm: convolution -> norm.
        one_plus: norms that multiply by 1 + weight.
        note: what of an unknown architecture was not recognized, and why.
    """

    family: str
    layers: list[str]
    branches: list[dict[str, str]]
    embedding: str | None
    head: str | None
    norms: list[str]
    blocks: tuple[Block, ...] = ()
    channels: Mapping[str, str] = field(default_factory=dict)
    one_plus: frozenset[str] = frozenset()
    note: str = ""
