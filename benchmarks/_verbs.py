"""What `verbs.py` times: every verb beside something that it cannot do without, on two models of about 90 M numbers."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import neurograft as ng
from neurograft.core.grafts.coordinates import coordinates
from neurograft.core.seeds import generator
from neurograft.pipeline.apply import apply
from neurograft.pipeline.inputs import as_dataset

VOCABULARY, WORDS = 16384, 64
STEPS = 5  # of the edit
HASH = "sha256 of the touched tensors"


@dataclass(frozen=True)
class Case:
    """One verb, or a floor.

    Args:
        name: of the verb and what it is asked.
        run: one call of it; leaves the model as it was found.
        floor: name of what stands beside it, as often as `times`; None for a floor.
        times: how often the verb has to do what its floor does, by its own documentation.
        at_most: target for the ratio of its seconds to `times` floors; None where the floor is of another kind.
    """

    name: str
    run: Callable[[], object]
    floor: str | None = None
    times: int = 1
    at_most: float | None = None


def llama() -> PreTrainedModel:
    """Return a Llama of 94 M numbers, float32, frozen."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2304, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def mixtral() -> PreTrainedModel:
    """Return a Mixtral of 97 M numbers, bfloat16, frozen, whose experts lie in banks."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return MixtralForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": llama, "mixtral": mixtral}


def rows(count: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    """Return random texts, labelled with themselves."""
    tokens = torch.randint(0, VOCABULARY, (count, length), generator=generator(seed, "rows"))
    return [{"input_ids": row, "labels": row} for row in tokens]


@dataclass
class Bench:
    """A model and what its verbs work on; nothing here needs a gradient, so that a process may fork afterwards.

    Args:
        kind: a key of `MODELS`.
        folder: for files.
        seed: of data and changes.
    """

    kind: str
    folder: Path
    seed: int = 0

    def __post_init__(self) -> None:
        self.net = MODELS[self.kind]()
        self.data = rows(8, 32, self.seed + 1)
        self.few, self.kept = rows(2, 16, self.seed + 2), rows(2, 16, self.seed + 3)
        self.scores = ng.locate(self.net, by="magnitude")
        self.where = self.scores.top(fraction=0.02, per="layer")
        with ng.attach(self.net, self.where) as live:
            for i, p in enumerate(live.parameters()):
                p.data.add_(0.01 * torch.randn(p.shape, generator=generator(self.seed, "change", i)))
            self.graft = live.graft()

    @cached_property
    def touched(self) -> list[Tensor]:
        """The base's tensors that the graft touches."""
        where = coordinates(self.net)
        return [where.read(name) for name in self.graft.base]

    @cached_property
    def base(self) -> Path:
        """The base as a checkpoint."""
        self.net.save_pretrained(self.folder / "base")
        return self.folder / "base"

    @cached_property
    def saved(self) -> Path:
        """The graft as files."""
        return self.graft.save(self.folder / "graft")

    @cached_property
    def tuned(self) -> nn.Module:
        """The base with the graft in it, as a model of its own."""
        made = MODELS[self.kind]()
        self.graft.apply(made)
        made.__dict__.pop("_neurograft_stack")  # it knows nothing of grafts
        return made

    @cached_property
    def edited(self) -> ng.Graft:
        """Two facts, written together."""
        return self.edit(1)

    def edit(self, steps: int) -> ng.Graft:
        """Write two facts into the middle layer."""
        asked = [{"prompt": [5, 6, 7], "target_new": [9]}, {"prompt": [8, 5, 6], "target_new": [4]}]
        how = {"mask": "none", "null": None, "steps": steps}
        return ng.edit(self.net, asked, by=("nmke", how), layers=[self.net.config.num_hidden_layers // 2])

    def fresh(self, name: str) -> Path:
        """Return a path of this name where nothing is."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name


def floors(b: Bench) -> list[Case]:
    """Return what no verb can do without."""
    sides = {name: _batch(found) for name, found in (("8 rows", b.data), ("2 rows", b.few))}

    def forward(batch: dict[str, Tensor]) -> None:
        with torch.no_grad():
            b.net(**batch)

    def backward(batch: dict[str, Tensor]) -> None:
        start = b.net.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        b.net(inputs_embeds=start, labels=batch["labels"]).loss.backward()

    def digests() -> None:
        for t in b.touched:
            hashlib.sha256(t.contiguous().view(torch.uint8).numpy())

    numbers = {f"{i}": s.values.clone() for i, s in enumerate(b.graft.deltas.values())}
    words = processor()
    return [
        *(Case(f"forward, {n}", lambda batch=batch: forward(batch)) for n, batch in sides.items()),
        *(Case(f"forward and backward, {n}", lambda batch=batch: backward(batch)) for n, batch in sides.items()),
        Case("copy of the weights", lambda: [p.clone() for p in b.net.parameters()]),
        Case("norms of the weights", lambda: [p.float().square().sum(-1) for p in b.net.parameters()]),
        Case(HASH, digests),
        Case("sorting the scores", lambda: torch.cat(list(b.scores.values.values())).sort()),
        Case("writing the numbers", lambda: save_file(numbers, b.folder / "numbers.safetensors")),
        Case("reading the numbers", lambda: load_file(b.saved / "graft.safetensors")),
        Case("reading and writing the model", lambda: _through(b)),
        Case("reading the model", lambda: type(b.net).from_pretrained(b.base)),
        Case("comparing the weights", lambda: [torch.equal(*pair) for pair in _pairs(b)]),
        Case("the tokenizer", lambda: [words(text, truncation=True) for text in texts()]),
    ]  # fmt: skip


def verbs(b: Bench) -> list[Case]:
    """Return every verb of a model whose units are those of plain matrices."""
    backward, few, files = "forward and backward, 8 rows", "forward, 2 rows", "reading and writing the model"
    args = {"per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    how: dict[str, Any] = {"gain": b.few, "keep": {"kept": b.kept}}
    site, layers = next(iter(b.where.sites)), b.net.config.num_hidden_layers
    words = processor()
    return [
        *banks(b),
        Case("locate magnitude", lambda: ng.locate(b.net, by="magnitude"), "norms of the weights", 1, 2.0),
        Case("locate activation", lambda: ng.locate(b.net, b.data, by="activation"), "forward, 8 rows", 1, 1.2),
        Case("tune, one step", lambda: ng.tune(b.net, b.data, b.where, args=args), backward, 1, 2.5),
        Case("evidence, 2 controls", lambda: ng.evidence(b.net, b.where, b.few, controls=2), few, 6, 1.6),
        Case("neuron, weights alone", lambda: ng.neuron(b.net, f"{site}:3"), few),
        Case("neuron, 2 examples", lambda: ng.neuron(b.net, f"{site}:3", b.few, controls=0), few),
        Case("audit", lambda: ng.audit(b.net, b.graft, neurons=0, **how), few, 36 + layers, 1.5),
        Case("trim", lambda: ng.trim(b.net, b.graft, rules={"tolerance": -9.0}, **how), few, 2 * (layers + 2), 1.6),
        Case("edit", lambda: b.edit(STEPS), "forward and backward, 2 rows", STEPS),
        Case("rollback", lambda: ng.rollback(b.edited, [0]), few),
        Case("intervene, a forward pass in it", lambda: _within(b), few, 1, 1.2),
        Case("intervene, folded", lambda: ng.intervene(b.net, b.where, "scale", factor=0.5).fold(), few),
        Case("plan", lambda: ng.plan(b.net, ng.recipe("s2ft")), few),
        Case("encode", lambda: _encoded(b, words), "the tokenizer"),
        Case("diff of folders", lambda: ng.diff(b.base, _applied(b)), "reading the model", 2),
        Case("apply, the verb", lambda: apply(b.base, [b.saved], b.fresh("on")), files, 1, 2.5),
        Case("export merged", lambda: b.graft.export(b.fresh("whole"), to="merged", model=b.net), files, 1, 2.5),
        Case("export supertuning", lambda: b.graft.export(b.fresh("su"), to="supertuning", model=b.net), HASH, 1, 4.0),
    ]  # fmt: skip


def banks(b: Bench) -> list[Case]:
    """Return the verbs that look at matrices, which may lie in banks."""
    half = b.graft.scale(0.5)
    return [
        Case("locate", lambda: ng.locate(b.net, b.data), "forward and backward, 8 rows", 1, 1.3),
        Case("select", lambda: b.scores.top(fraction=0.02, per="layer"), "sorting the scores"),
        Case("attach and detach", lambda: _attached(b), "copy of the weights"),
        Case("attach, its graft", lambda: _attached(b, graft=True), HASH, 1, 4.0),
        Case("graft on and off", lambda: _on(b.graft, b.net), HASH, 1, 2.5),
        Case("graft on and off at half strength", lambda: _on(half, b.net), HASH, 1, 2.5),
        Case("save", lambda: b.graft.save(b.folder / "again"), "writing the numbers"),
        Case("load", lambda: ng.Graft.load(b.saved), "reading the numbers"),
        Case("diff of live models", lambda: ng.diff(b.net, b.tuned), "comparing the weights"),
        Case("export lora", lambda: b.graft.export(b.fresh("lora"), to="lora", model=b.net), HASH, 1, 6.0),
        Case("export patch", lambda: b.graft.export(b.fresh("patch"), to="patch", model=b.net), HASH, 1, 4.0),
    ]  # fmt: skip


def processor() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words."""
    made = Tokenizer(WordLevel({**{f"w{i}": i for i in range(WORDS)}, "?": WORDS}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="?", model_max_length=1024)


def texts() -> Iterable[str]:
    """Return a thousand texts of thirty words."""
    return (" ".join(f"w{(i * j) % WORDS}" for j in range(30)) for i in range(1000))


def _batch(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in found]) for key in found[0]}


def _pairs(b: Bench) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(b.net.parameters(), b.tuned.parameters())


def _through(b: Bench) -> None:
    type(b.net).from_pretrained(b.base).save_pretrained(b.fresh("copy"))


def _applied(b: Bench) -> Path:
    found = b.folder / "applied"
    return found if found.is_dir() else apply(b.base, [b.saved], found)


def _encoded(b: Bench, words: Any) -> object:
    return as_dataset([{"text": text} for text in texts()], b.net, processing_class=words)


def _on(graft: ng.Graft, net: nn.Module) -> None:
    with graft.on(net):
        pass


def _attached(b: Bench, *, graft: bool = False) -> None:
    with ng.attach(b.net, b.where) as live:
        if graft:
            live.graft()


def _within(b: Bench) -> None:
    with ng.intervene(b.net, b.where, "scale", factor=0.5), torch.no_grad():
        b.net(**_batch(b.few))
