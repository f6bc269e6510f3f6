"""How often the audit cries wolf: verdicts on changes that are known to do nothing, and on changes that do harm.

    python benchmarks/false_alarms.py [--rounds 100] [--threads 2]

A small Llama is trained on three synthetic languages. In every round it is audited anew, on fresh items of a task
and of the three languages, with: an empty graft; two null grafts, drawn with a fresh seed, that put noise on a tenth
of all FFN neurons (2 % and 5 % of the norm of the touched rows and columns); and a graft that does harm (noise of
300 % of that norm). An alarm on the first three, "ship" as well as "do not ship", is false.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from _bench import arguments, environment, table, target, write
from torch import Tensor, nn

from neurograft.audits._statistics import t_quantile
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.core.seeds import generator
from neurograft.pipeline.audit import audit
from neurograft.worlds.pico import pico

LANGUAGES, LENGTH, ITEMS, VOCABULARY = ("code", "news", "dialogue"), 16, 32, 64
SIZES = {"null, 2 %": 0.02, "null, 5 %": 0.05, "harm, 300 %": 3.0}
Batch = dict[str, Tensor]


def text(language: str, items: int, *names: object) -> Batch:
    """Return items of a synthetic language: a Markov chain with a few likely followers of every token."""
    rng = generator(7, "chain", language)
    odds = torch.rand(VOCABULARY, VOCABULARY, generator=rng).pow(30)
    odds, rng = odds / odds.sum(1, keepdim=True), generator(0, "draw", language, *names)
    tokens = torch.randint(3, VOCABULARY, (items, 1), generator=rng)
    for _ in range(LENGTH - 1):
        tokens = torch.cat([tokens, torch.multinomial(odds[tokens[:, -1]], 1, generator=rng)], 1)
    return {"input_ids": tokens, "labels": tokens.clone()}


def trained(steps: int) -> nn.Module:
    """Return a small Llama that knows the three languages."""
    model = pico("llama", seed=1, vocab_size=VOCABULARY).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        batches = [text(language, 8, "train", step) for language in LANGUAGES]
        loss = model(**{k: torch.cat([b[k] for b in batches]) for k in batches[0]}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def noise(model: nn.Module, share: float, *names: object) -> Graft:
    """Return a graft of noise on a tenth of the FFN neurons, as large as `share` of what it touches."""
    deltas = {}
    for name, weight in model.named_parameters():
        if ".mlp." not in name:
            continue
        rng = generator(3, "noise", name, *names)
        width = 48
        ids = torch.randperm(width, generator=rng)[: width // 10]
        region = Region.of(tuple(weight.shape), "cols" if "down" in name else "rows", ids)
        base = region.read(weight)
        delta = torch.randn(base.shape, generator=rng)
        deltas[name] = Slice(region, base + delta * (share * base.norm() / delta.norm()))
    return Graft.made(model, deltas)


def share(hits: int, n: int) -> dict[str, Any]:
    """Return a share with the exact (Clopper-Pearson) upper and lower 95 % limits, by bisection."""

    def tail(p: float, most: int) -> float:
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(most + 1))

    def solve(wanted: float, most: int) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(middle, most) > wanted else (low, middle)
        return low

    low = 0.0 if hits == 0 else solve(0.975, hits - 1)
    high = 1.0 if hits == n else solve(0.025, hits)
    return {"alarms": hits, "of": n, "share": hits / n, "low": round(low, 5), "high": round(high, 5)}


def main() -> None:
    """Run the rounds and write `benchmarks/results/false_alarms.json`."""
    parser = arguments(__doc__ or "", rounds=100)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = trained(given.steps)
    verdicts: dict[str, list[str]] = {"empty": [], **{name: [] for name in SIZES}}
    losses: dict[str, list[float]] = {name: [] for name in verdicts}
    flagged, gained = dict.fromkeys(verdicts, 0), dict.fromkeys(verdicts, 0)
    for i in range(given.rounds):
        keep = {language: [text(language, ITEMS, "keep", i)] for language in LANGUAGES}
        gain = [text("task", ITEMS, "gain", i)]
        changes = {"empty": Graft(), **{name: noise(model, s, name, i) for name, s in SIZES.items()}}
        for name, change in changes.items():
            report = audit(model, change, gain=gain, keep=keep, probes="none", rules={"draws": 1000}, seed=i)
            verdicts[name].append(report.verdict)
            domains = report.data["verdict"]["domains"].values()
            gained[name] += report.data["verdict"]["gain"]["status"] != "cannot tell"
            flagged[name] += sum(d["status"] == "lost" for d in domains)
            losses[name] += [d["tests"]["loss"]["change"]["value"] for d in domains]
    rows: dict[str, Any] = {}
    for name, found in verdicts.items():
        alarms = (
            sum(v == "do not ship" for v in found)
            if name.startswith("harm")
            else sum(v != "cannot tell" for v in found)
        )
        spread = torch.tensor(losses[name], dtype=torch.float64)
        half = t_quantile(0.975, len(spread) - 1) * float(spread.std()) / math.sqrt(len(spread))
        rows[name] = {
            **share(alarms, len(found)),
            "verdicts": {v: found.count(v) for v in ("ship", "cannot tell", "do not ship")},
            "gain_decided": share(gained[name], len(found)),
            "domains_flagged": share(flagged[name], len(losses[name])),
            "mean_loss": {
                "value": float(spread.mean()),
                "low": float(spread.mean()) - half,
                "high": float(spread.mean()) + half,
            },
        }
    nulls = [r for name, r in rows.items() if not name.startswith("harm")]
    worst = max(r["share"] for r in nulls)
    payload = {"environment": environment(), "rounds": given.rounds, "items": ITEMS, "domains": list(LANGUAGES)}
    payload |= {"changes": rows, "false_alarms": target(worst, 0.05)}
    print(
        table(
            [[n, r["alarms"], r["of"], r["low"], r["high"]] for n, r in rows.items()],
            ["change", "alarms", "of", "low", "high"],
        )
    )
    print(write("false_alarms", payload, output=given.output))


if __name__ == "__main__":
    main()
