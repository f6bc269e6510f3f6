"""Where each change of a graft goes in a LoRA adapter, and which have no place there."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from neurograft.core.grafts.graft import Graft
from neurograft.core.linears import is_linear
from neurograft.export._changes import Touched, tied_names, touched
from neurograft.export._factors import Factors, factors, mismatches


@dataclass
class Found:
    """What of a graft goes where in a LoRA adapter."""

    layers: dict[str, tuple[Touched, Factors]] = field(default_factory=dict)
    banks: dict[str, tuple[Touched, Factors]] = field(default_factory=dict)
    biases: dict[str, Touched] = field(default_factory=dict)
    tokens: dict[str, Touched] = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    new: dict[str, Touched] = field(default_factory=dict)
    mismatches: int = 0
    numel: int = 0
    dtype: str = ""

    @staticmethod
    def of(graft: Graft, model: nn.Module) -> Found:
        """Sort a graft's changes."""
        found, biases = Found(), []
        for item in touched(graft, model):
            found.dtype = str(item.weight.dtype).removeprefix("torch.")
            if item.new:
                found.new[item.name] = item
                found.heads[item.module] = item.owner
            elif tied_names(model, item.name):
                found.unfit[item.name] = "tied weights; an adapter would change one of their uses"
            elif item.leaf == "bias" and (is_linear(item.owner) or isinstance(item.owner, nn.Conv2d)):
                biases.append(item)
            else:
                found._weight(item)
        found._take_biases(biases)
        for item, made in (*found.layers.values(), *found.banks.values()):
            found.mismatches += mismatches(item, made, narrow=item.name in found.banks)
        for item in found.biases.values():
            found.mismatches += sum(item.mismatches(change, s) for change, s in item.members)
        kept = [i for i, _ in (*found.layers.values(), *found.banks.values())]
        # Token rows are replaced, not added to: they cannot mismatch.
        for item in (*kept, *found.biases.values(), *found.tokens.values()):
            found.numel += sum(change.region.numel for change, _ in item.members)
        return found

    def _weight(self, item: Touched) -> None:
        owner, dim = item.owner, item.weight.dim()
        if isinstance(owner, nn.Embedding):
            rows = len(item.members) == 1 and item.members[0][0].region.layout == "rows"
            if rows:
                self.tokens[item.name] = item
            else:
                self.unfit[item.name] = "a change of an embedding that is not whole rows"
            return
        plain = is_linear(owner) and item.leaf == "weight"
        filters = isinstance(owner, nn.Conv2d) and owner.groups == 1
        bank = dim == 3 and not isinstance(owner, nn.modules.conv._ConvNd)
        if not (plain or filters or bank):
            self.unfit[item.name] = "a norm, bias or other parameter that LoRA has no factors for"
            return
        made = factors(item)
        if isinstance(made, str):
            self.unfit[item.name] = made
        elif filters and not all(c.region.layout == "rows" for c, _ in item.members):
            self.unfit[item.name] = "a change of a convolution that is not whole filters"
        else:
            (self.banks if bank else self.layers)[item.name] = (item, made)

    def _take_biases(self, biases: list[Touched]) -> None:
        """Biases fit if every adapted layer has one: `lora_bias` is one switch for all of them."""
        owners = [item.owner for item, _ in self.layers.values()] + [item.owner for item in biases]
        fits = bool(biases) and not self.banks and all(o.bias is not None for o in owners)
        for item in biases:
            if fits:
                self.biases[item.name] = item
            else:
                self.unfit[item.name] = "a bias, while some adapted layer has none (or experts are adapted too)"

    def ranks(self) -> dict[str, int]:
        """Return the rank of every adapted module or expert bank, by full name."""
        ranks = {i.module: sum(P.shape[1] for P, _ in f[0]) for i, f in self.layers.values()}
        ranks |= {i.module: ranks.get(i.module, 1) for i in self.biases.values()}
        per_bank = {
            n: max(sum(P.shape[1] for P, _ in pairs) for pairs in f.values()) for n, (_, f) in self.banks.items()
        }
        return ranks | per_bank
