"""Composable sparse fine-tuning: a ranking over all matrices by change, a way back to the base, deltas that add up."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForMaskedLM

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Scores, Selection
from neurograft.core.units import Site
from neurograft.locators.change import change
from neurograft.locators.within import within
from neurograft.pipeline.attach import attach
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.run import run
from neurograft.pipeline.summed import summed
from neurograft.selectors.outside import outside
from neurograft.train.loop import fit
from neurograft.worlds.mixture import BOS, EOS
from neurograft.worlds.pairs import MASK
from neurograft.worlds.pico import pico
from neurograft.worlds.tiny import accuracy, classifier
from neurograft.worlds.tiny import fit as plain_fit
from tests.proofs import bar, effect, note, patched
from tests.proofs._selective import rows_of
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "composable-sft", "identity"
QUICK = {"lr": 1e-3, "epochs": 1, "sparse_epochs": 1, "batch": 8, "fraction": 0.05}


@contextmanager
def no_way_back():
    """The sparse phase goes on from what full fine-tuning left."""
    tune = resolve("neurograft.pipeline.tune.tune")
    last = []

    def onwards(model, data, where, **options):
        if last:
            last.pop().apply(model)
        last.append(tune(model, data, where, **options))
        return last[-1]

    with patched("neurograft.pipeline.tune", "tune", onwards):
        yield


@contextmanager
def a_ranking_for_each_matrix():
    """The share is taken of each parameter and not of all together."""
    groups = resolve("neurograft.selectors._quota.groups")
    with patched("neurograft.selectors._quota", "groups", lambda scores, per: groups(scores, "site")):
        yield


@contextmanager
def least_changed_first():
    """The numbers that moved least are kept."""

    def turned(context, **options):
        found = change(context, **options)
        return Scores(found.sites, {n: -v for n, v in found.values.items()}, found.card)

    turned.card = change.card
    with patched("neurograft.locators.change", "change", turned):
        yield


BROKEN = (no_way_back, a_ranking_for_each_matrix, least_changed_first)


def maskable(model):
    """Return the parameters of the base model but norms."""
    return [n for n, _ in model.named_parameters() if n.startswith("bert.") and "LayerNorm" not in n]


def small():
    return pico("bert", num_hidden_layers=1)


def test_the_ticket_is_what_full_tuning_moved_most_and_is_trained_from_the_base():
    """One step of AdamW at rate lr from the base moves a number by lr, wherever four full ones had taken it."""
    model = small()
    before = snapshot(model)
    out = run("composable_sft", model, rows_of(model), changes={**QUICK, "epochs": 4})
    assert not moved(before, model)
    with out.state["full"].on(model):
        far = {n: (p.detach().double() - before[n].double()).abs().reshape(-1) for n, p in model.named_parameters()}
    assert not any("LayerNorm" in n and bool(d.any()) for n, d in far.items())
    assert float(far["classifier.weight"].max()) > 2e-3
    names = maskable(model)
    every = torch.cat([far[n] for n in names])
    best = every.float().sort(descending=True, stable=True).indices[: round(0.05 * len(every))].sort().values
    starts = torch.tensor([0, *(len(far[n]) for n in names)]).cumsum(0)
    with out.graft.on(model):
        changed = moved(before, model)
        steps = torch.cat([(p.detach() - before[n]).reshape(-1) for n, p in model.named_parameters()])
    flat = torch.cat([starts[i] + changed[n] for i, n in enumerate(names) if n in changed])
    assert torch.equal(flat, best)
    assert set(changed) - set(names) == {"classifier.weight", "classifier.bias"}
    assert 0.9e-3 < float(steps[steps != 0].abs().median()) <= float(steps.abs().max()) < 1.001e-3


def test_two_rounds_of_half_the_numbers_are_that_many_distinct_ones():
    model = small()
    before = snapshot(model)
    out = run("composable_sft", model, rows_of(model), changes={**QUICK, "rounds": 2})
    assert not moved(before, model)
    half = round(0.025 * sum(model.get_parameter(n).numel() for n in maskable(model)))
    assert (len(out.state["ticket"]), len(out.state["new"])) == (2 * half, half)
    with out.graft.on(model):
        changed = moved(before, model)
    assert sum(len(v) for n, v in changed.items() if n in maskable(model)) == 2 * half


def test_a_task_learned_on_its_language_adds_up_with_it_in_any_order_and_comes_off_without_a_trace():
    model = small()
    before = snapshot(model)
    language = run("composable_sft", model, rows_of(model), changes={**QUICK, "head": "frozen"}).graft
    other = [{**row, "labels": (row["labels"] + 1) % 2} for row in rows_of(model)]
    task = run("composable_sft", model, other, changes={**QUICK, "on": "language"}, language=language).graft
    assert not moved(before, model)
    alone = []
    for graft in (language, task):
        with graft.on(model):
            alone.append({n: p - before[n] for n, p in snapshot(model).items()})
    assert not alone[0]["classifier.weight"].any()
    assert any(bool(((alone[0][n] != 0) & (alone[1][n] != 0)).any()) for n in before), "they overlap"
    states = []
    for order in ((language, task), (task, language)):
        for graft in order:
            graft.apply(model)
        states.append(snapshot(model))
        for graft in order:
            graft.remove(model)
        assert not moved(before, model)
    for name, base in before.items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], base + alone[0][name] + alone[1][name], rtol=0, atol=1e-7)


def test_what_it_refuses():
    with pytest.raises(RequestError, match="rounds=0"):
        recipe("composable_sft", rounds=0)
    model = small()
    with pytest.raises(RequestError, match="on top of 'language'"):
        run("composable_sft", model, rows_of(model), changes={"on": "language"})
    scores = Scores({"a": Site("a", "row", 3)}, {"a": torch.tensor([3.0, 2, 1])})
    first = scores.top(count=1)
    assert outside(scores, of=first, count=2).ids["a"].tolist() == [1, 2]
    with pytest.raises(RequestError, match="leaves 2"):
        outside(scores, of=first, count=3)
    with pytest.raises(RequestError, match="of="):
        outside(scores, count=1)
    with pytest.raises(RequestError, match="the graft 'one'"):
        summed({"model": model}, of=["one"])


LETTERS_OF_A, LETTERS_OF_B, COUNT = 22, 43, 20  # language B says every letter of A by another one
SUCCESSORS = torch.stack([torch.randperm(COUNT, generator=generator(0, "csft", i)) for i in range(2)], 1)
CLASS = torch.randperm(COUNT, generator=generator(0, "csft", "class")) % 4


def texts(rows, rng):
    """Return rows of 8 letters of a language in which each letter is followed by one of two others."""
    found = [(torch.rand(rows, generator=rng) ** 2 * COUNT).long()]
    for _ in range(7):
        found.append(SUCCESSORS[found[-1], (torch.rand(rows, generator=rng) < 0.3).long()])
    return torch.stack(found, 1)


def said(letters, switched):
    """Return letters between <bos> and <eos>, those switched in B's words."""
    tokens = letters + LETTERS_OF_A + switched.long() * (LETTERS_OF_B - LETTERS_OF_A)
    return F.pad(F.pad(tokens, (1, 0), value=BOS), (0, 1), value=EOS)


def corpus(share, count, *, task=False, batch=48, seed=0):
    """Return batches of texts of which a share of the letters is said in B: masked words, or the first one's class."""
    rng, found = generator(seed, "csft corpus", task, share), []
    for _ in range(count):
        letters = texts(batch, rng)
        tokens = said(letters, torch.rand(letters.shape, generator=rng) < share)
        made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": CLASS[letters[:, 0]]}
        if not task:
            hidden = (torch.rand(tokens.shape, generator=rng) < 0.25) & (tokens >= LETTERS_OF_A)
            made["labels"] = tokens.masked_fill(~hidden, -100)
            made["input_ids"] = tokens.masked_fill(hidden, MASK)
        found.append(made)
    return found


@cache
def bilingual(seed):
    """Return an encoder for masked words that has met a tenth of B's words between those of A."""
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = pico("bert", seed=seed, **shape, **still).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.copy_(
                    torch.randn(weight.shape, generator=generator(seed, "csft", name)) * 0.5 / weight.shape[1] ** 0.5
                )
    return plain_fit(model, corpus(0.1, 200, seed=seed), lr=3e-3)


def prepare():
    """Train the encoders."""
    for seed in range(3):
        bilingual(seed)


def sparse(model, batches, *, full, steps, lr, on=None, drawn=False, seed=0):
    """Return the delta of the base model's 8 % that full tuning moves most (or that are drawn), and of the head."""
    base = {"of": "base", "without": ["norm"], "entries": True}
    context = Context(model, sites(model, "module"), seed=seed)
    heads = within(context, by="noise", of="head").top(fraction=1.0)
    used = {n: i for n, i in heads.ids.items() if "transform" in n or "classifier" in n}
    head = Selection.of({n: heads.sites[n] for n in used}, used)
    options = {"warmup": 10, "decay": "linear", "lr": lr, "seed": seed}
    with on.on(model) if on is not None else nullcontext():
        ticket = within(context, by="noise", **base).top(fraction=0.08)
        if not drawn:
            everything = within(context, by="noise", **base).top(fraction=1.0)
            with attach(model, everything | head, tied="untie") as live:
                fit(live, batches, steps=full, **options)
                far = live.graft()
            ticket = within(replace(context, against=far), by="change", **base).top(fraction=0.08)
        with attach(model, ticket | head, tied="untie") as live:
            fit(live, batches, steps=steps, **options)
            return live.graft()


def of_the_encoder(graft):
    """Return a language's delta without the head for masked words."""
    return replace(graft, operations=(), deltas={n: d for n, d in graft.deltas.items() if n.startswith("bert.")})


@effect
def test_a_language_and_a_task_learned_apart_work_together():
    """The task is learned in A and asked in B: with B's delta, without, and with a random support; 3 seeds.

    The card asks for a wide margin (0.2 here) and for more than a random support. Reached: 0.03, and 0.02 less than
    random. Our guess: in so small a model nothing ties what is learned of B's words to those of A.
    """
    table = {"in_a": [], "without": [], "with": [], "random": []}
    for seed in range(3):
        model = bilingual(seed)
        a = of_the_encoder(sparse(model, corpus(0.0, 40, seed=seed), full=20, steps=40, lr=2e-3))
        words = corpus(1.0, 60, seed=seed)
        b = of_the_encoder(sparse(model, words, full=60, steps=120, lr=3e-3))
        drawn = of_the_encoder(sparse(model, words, full=0, steps=120, lr=3e-3, drawn=True))
        net = classifier(model, 4, seed=seed)
        task = sparse(net, corpus(0.0, 60, task=True, seed=seed), full=60, steps=120, lr=3e-3, on=a)
        for name, language, share in (
            ("in_a", a, 0.0),
            ("without", None, 1.0),
            ("with", b, 1.0),
            ("random", drawn, 1.0),
        ):
            with task.on(net), language.on(net) if language is not None else nullcontext():
                table[name].append(accuracy(net, corpus(share, 4, task=True, batch=128, seed=99)))
    note(**table)
    gained = [x - y for x, y in zip(table["with"], table["without"])]
    bar("accuracy that the other language's delta adds (a wide margin)", gained, at_least=0.2, missed=True)
    better = [x - y for x, y in zip(table["with"], table["random"])]
    bar("accuracy above that of a random support of the same size", better, at_least=0.0, missed=True)
