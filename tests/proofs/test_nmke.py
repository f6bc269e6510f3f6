"""NMKE: one normal equation for the ROME family, a mask by neurons that speak, and edits that come off one by one."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.grafts.graft import Graft
from neurograft.core.numerics import keyvalue
from neurograft.core.prompts.requests import joined
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.taps.tap import watch
from neurograft.edits import _amplified as lens
from neurograft.edits import _values as values
from neurograft.edits._memory import at_subjects, memories
from neurograft.edits._protected import caches
from neurograft.edits._values import per_row, wanted
from neurograft.pipeline._edited import said
from neurograft.pipeline.edit import edit
from neurograft.pipeline.requests import as_requests
from neurograft.pipeline.rollback import part, rollback
from neurograft.pipeline.run import run
from neurograft.worlds.facts import facts
from neurograft.worlds.pico import pico, pico_batch
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "nmke", "identity"


@contextmanager
def the_busy_directions_are_free():
    """The null space is that of the protected keys' largest eigenvalues."""

    def busy(covariance, below):
        values, vectors = torch.linalg.eigh(covariance.double())
        return vectors[:, values >= below]

    with patched(keyvalue, "null_space", busy):
        yield


@contextmanager
def the_mask_is_of_the_silent_neurons():
    """Neurons that help no prompt are kept, the others masked."""
    chosen = resolve("neurograft.edits._amplified.mask_of")
    with patched("neurograft.edits.nmke", "mask_of", lambda scores: ~chosen(scores)):
        yield


@contextmanager
def every_layer_takes_the_whole_residual():
    """What is missing is not shared among the layers left."""
    change = resolve("neurograft.edits._memory.Memory").change
    cls = resolve("neurograft.edits._memory.Memory")
    with patched(cls, "change", lambda self, model, answers, residuals: change(self, model, answers, 2 * residuals)):
        yield


BROKEN = (the_busy_directions_are_free, the_mask_is_of_the_silent_neurons, every_layer_takes_the_whole_residual)

ASKED = [
    {"prompt": [5, 6, 7, 3], "subject": [6], "target_new": [9]},
    {"prompt": [5, 8, 7], "subject": [8], "target_new": [10, 11]},
    {"prompt": [12, 13, 14, 15], "subject": [13], "target_new": [20]},
]


def drawn(*shape, name=0):
    return torch.randn(*shape, generator=generator(0, "nmke", name), dtype=torch.float64)


def test_the_solver_is_every_member_of_the_family():
    """Against the formulas as they are printed, keys as columns."""
    K, old, seen = drawn(9, 3), drawn(9, 2, name=1), drawn(9, 5, name=2)
    C = seen @ seen.T / 5
    eye = torch.eye(9, dtype=torch.float64)
    ridge = K.T @ torch.linalg.inv(K @ K.T + 0.5 * eye)
    torch.testing.assert_close(keyvalue.answers(K.T, ridge=0.5), ridge)
    full = C + 0.1 * eye
    memit = K.T @ torch.linalg.inv(K @ K.T + 7.0 * full)
    torch.testing.assert_close(keyvalue.answers(K.T, covariance=full, weight=7.0), memit)
    inv = torch.linalg.inv(full)
    rome = (inv @ K[:, :1]).T / (K[:, :1].T @ inv @ K[:, :1])
    torch.testing.assert_close(keyvalue.answers(K.T[:1], covariance=full, weight=1.0, exact=True), rome)
    U, S, _ = torch.linalg.svd(C)
    P = U[:, S < 1e-2] @ U[:, S < 1e-2].T
    alphaedit = torch.linalg.solve(P @ (K @ K.T + old @ old.T) + 0.3 * eye, P @ K)
    found = keyvalue.answers(K.T, covariance=C, null=1e-2, cache=old @ old.T, ridge=0.3)
    torch.testing.assert_close(found, alphaedit.T)
    assert float((found @ seen).abs().max()) < 1e-6
    least = torch.linalg.pinv(K)
    torch.testing.assert_close(keyvalue.answers(K.T, exact=True), least)
    torch.testing.assert_close(keyvalue.answers(K.T, ridge=0.5, mask=torch.ones(9, dtype=torch.bool)), ridge)


def test_a_mask_after_the_solve_lets_protected_keys_drift_and_one_inside_it_does_not():
    """The card's example: 40 entries, 25 protected keys, 28 entries kept; the null space is found again inside."""
    seen, keys, residual = drawn(25, 40, name=3), drawn(2, 40, name=4), drawn(2, 6, name=5)
    mask = torch.zeros(40, dtype=torch.bool)
    mask[torch.randperm(40, generator=generator(0, "nmke", "kept"))[:28]] = True
    how = {"covariance": seen.T @ seen / 25, "null": 1e-9, "ridge": 1e-6}
    drift, error = {}, {}
    for name, more in {
        "none": {},
        "post": {"mask": mask, "masked": "post"},
        "solve": {"mask": mask, "masked": "solve"},
    }.items():
        change = residual.T @ keyvalue.answers(keys, **how, **more)
        drift[name] = float((change @ seen.T).abs().max())
        error[name] = float((change @ keys.T - residual.T).abs().max())
    assert drift["none"] < 1e-6
    assert drift["solve"] < 1e-6
    assert drift["post"] > 0.05
    assert error["solve"] < 1e-2 < error["post"]
    note(drift=list(drift.values()), error=list(error.values()))


def test_the_solver_refuses_what_leaves_the_map_open():
    with pytest.raises(ValueError, match="ridge"):
        keyvalue.answers(drawn(2, 4), covariance=torch.zeros(4, 4), weight=1.0)
    with pytest.raises(ValueError, match="no covariance"):
        keyvalue.answers(drawn(2, 4), null=1.0)
    with pytest.raises(ValueError, match="null space below"):
        keyvalue.answers(drawn(2, 4), covariance=torch.eye(4), null=1e-3)


def setting(family="llama", **config):
    """Return a pico model with norms that are not 1, its requests, memories and rows."""
    model = pico(family, **config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "bias" not in name:
                weight.add_(0.5 * torch.rand(weight.shape, generator=generator(0, name)))
    requests = as_requests(ASKED, model, None)
    context = Context(model, {}, [pico_batch(model, batch=4)], requests=requests)
    return model, context, memories(context, [0, 1], (0, 1)), joined(requests)


def _lens_is_literal(family):
    model, _, (memory, _), rows = setting(family)
    scores = lens.amplified(model, memory, rows, gain=30.0)
    norm = model.model.norm if family == "llama" else model.gpt_neox.final_layer_norm
    head = model.get_output_embeddings()
    seen, out = {}, {}
    hook = norm.register_forward_hook(lambda m, i, o: out.update(end=i[0].detach(), normed=o.detach()))
    found = {s.name: s for s in (memory.keys, memory.values, memory.stream)}
    with watch(model, found, lambda n, x: seen.__setitem__(n, x.clone())), torch.no_grad():
        model(**{k: v for k, v in rows.batch.items() if k != "labels"})
    hook.remove()
    real = rows.batch["attention_mask"].bool().reshape(-1).cumsum(0) - 1
    at = real[torch.arange(3) * rows.batch["input_ids"].shape[1] + rows.last]
    weight = model.get_parameter(memory.weight).detach()
    for i in range(3):
        end = out["end"][i, rows.last[i]]
        mean = end.mean() if family != "llama" else 0.0
        size = ((end - mean) ** 2).mean().sqrt()
        bias = 0.0 if family == "llama" else norm.bias.detach()
        word = head(out["normed"][i, rows.last[i]]).argmax()
        stream = seen[memory.stream.name][at[i]] - seen[memory.values.name][at[i]]

        def logp(v, size=size, bias=bias, word=word):  # the divisor alone is held
            mean = v.mean() if family != "llama" else 0.0
            return head((v - mean) / size * norm.weight.detach() + bias).log_softmax(-1)[word]

        for j in (0, 7, 47):
            moved_by = 30 * seen[memory.keys.name][at[i], j] * weight[:, j]
            literal = float((logp(stream + moved_by) - logp(stream)).detach())
            assert abs(literal - float(scores[i, j])) < 2e-3


def test_the_lens_is_literal():
    _lens_is_literal("llama")
    _lens_is_literal("gpt_neox")


def test_the_mask_takes_neurons_that_help_many_prompts_or_one_much():
    """Ten neurons, two prompts: 0 and 1 help both, 2 helps one a lot; the others stand below their prompts' means."""
    scores = torch.full((2, 10), -1.0)
    scores[:, 0], scores[:, 1] = 1.0, 0.9
    scores[0, 2] = 3.0
    found = lens.mask_of(scores, general=(0.2, 0.0), specific=(0.1, 0.0))
    assert found.nonzero().reshape(-1).tolist() == [0, 1, 2]
    # one prompt, one loud neuron: both entropies near 0, shares 0.3 of 10: the cut lies among the ties
    loud = torch.arange(10.0)[None]
    assert lens.mask_of(loud, general=(0.0, 0.0), specific=(0.3, 0.0)).nonzero().reshape(-1).tolist() == [5, 6, 7, 8, 9]


def test_values_are_found_for_each_request_alone_and_never_past_the_clamp():
    model, context, (_, last), rows = setting()
    before = snapshot(model)
    how = {"steps": 8, "lr": 0.5, "clamp": 0.75, "decay": 0.0, "kl": 0.0625}
    together = wanted(model, last, context.requests, **how)
    alone = wanted(model, last, context.requests, **how, at_once=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    start = at_subjects(model, {"s": last.stream}, rows)["s"]
    far = (together - start).norm(dim=1) / start.norm(dim=1)
    assert bool((far <= 0.75 + 1e-4).all())
    assert bool((far > 0.1).all())
    assert not moved(before, model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_drift_counts_from_what_is_predicted_now_to_what_was():
    """KL(now || before), as torch's kl_div with ROME's order of arguments has it; before is the untouched model's."""
    model, context, (_, last), _ = setting()
    plain, told = values.drifted, []

    def seen(before, now):
        found = plain(before, now)
        literal = F.kl_div(before, now, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(found, literal, rtol=0, atol=1e-7)
        told.append((before, now.detach(), found.detach()))
        return found

    with patched(values, "drifted", seen):
        wanted(model, last, context.requests, steps=3, lr=0.5, clamp=2.0, decay=0.0, kl=0.0625)
    assert len(told) == 3
    assert all(torch.equal(before, told[0][1]) for before, _, _ in told)
    assert bool((told[2][2] > 1e-4).all()), "it has moved, so that the order of arguments shows"


def test_an_exact_edit_of_one_layer_brings_the_stream_where_it_was_wanted():
    model, context, (first, _), rows = setting()
    how = {"steps": 4, "clamp": 2.0, "decay": 0.0}
    goal = wanted(model, first, context.requests, lr=0.5, kl=0.0625, **how)
    options = {"mask": "none", "null": None, "weight": 1.0, "exact": True, "layers": [0], **how}
    graft = edit(model, ASKED, by=("nmke", options), general=context.batches)
    with graft.on(model):
        torch.testing.assert_close(at_subjects(model, {"s": first.stream}, rows)["s"], goal, rtol=1e-3, atol=1e-4)
        labels = per_row(model(**rows.batch).logits.detach(), rows)
    assert bool((labels < per_row(model(**rows.batch).logits.detach(), rows)).all())


def test_only_the_mask_moves_and_it_is_the_mask_of_the_scores():
    for mask in ("post", "solve"):
        model, context, (first, _), rows = setting()
        wide = {"null": None, "weight": 0.1, "layers": [0], "steps": 3}
        before = snapshot(model)
        graft = edit(model, ASKED, by=("nmke", {"mask": mask, **wide}), general=context.batches)
        assert not moved(before, model)
        scores = lens.amplified(model, first, rows, gain=30 * first.keys.n / 14_336)
        z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
        busiest = int((z > 0).sum(0).mul(100.0).add(scores.max(0).values).argmax())
        with graft.on(model):
            now = moved(before, model)
        assert set(now) == {first.weight}
        columns = set((now[first.weight] % first.keys.n).tolist())
        assert busiest in columns
        assert columns <= set(lens.mask_of(scores).nonzero().reshape(-1).tolist())
        assert 0.2 * first.keys.n < len(columns) < 0.9 * first.keys.n


def test_a_selection_limits_the_neurons_further():
    model, context, _, _ = setting()
    where = Selection.of(sites(model, "neuron"), {"model.layers.0.mlp/neuron": [1, 5, 8]})
    options = {"mask": "none", "null": None, "weight": 0.1, "layers": [0], "steps": 2}
    graft = edit(model, ASKED, by=("nmke", options), where=where, general=context.batches)
    used = next(iter(graft.deltas.values())).A.abs().sum(0).nonzero().reshape(-1).tolist()
    assert used == [1, 5, 8]


def test_every_request_comes_off_again():
    model, context, _, _ = setting()
    options = {"null": None, "weight": 0.1, "layers": [0, 1], "steps": 3}
    graft = edit(model, ASKED, by=("nmke", options), general=context.batches, batch=2)
    assert graft.card["batches"] == [2, 1]
    assert [len(d.A) for d in graft.deltas.values()] == [3, 3]
    rest = rollback(graft, [1])
    assert [r["target"] for r in rest.card["requests"]] == [[9], [20]]
    one = part(graft, [1])
    for name, delta in graft.deltas.items():
        parts = rest.deltas[name].product() + one.deltas[name].product()
        torch.testing.assert_close(parts, delta.product(), rtol=0, atol=1e-6)
    before = snapshot(model)
    rest.apply(model)
    one.apply(model)
    one.remove(model)
    assert set(moved(before, model)) == {m for m in before if "down_proj" in m}
    rest.remove(model)
    assert not moved(before, model)
    with pytest.raises(ValueError, match="from 0 to 2"):
        part(graft, [3])


def test_keys_of_earlier_edits_are_cached():
    model, context, found, _ = setting()
    options = {"null": None, "weight": 0.1, "layers": [0], "steps": 2, "mask": "none"}
    assert caches(context, found) == {}
    with edit(model, ASKED[:2], by=("nmke", options), general=context.batches).on(model):
        keys = at_subjects(model, {"k": found[0].keys}, joined(as_requests(ASKED[:2], model, None)))["k"].double()
        torch.testing.assert_close(caches(context, found)[found[0].keys.name], keys.T @ keys)


def test_layers_share_what_is_missing():
    """The first of two layers moves the stream half of the way when met exactly, the last one what is missing then."""
    model, context, (first, last), rows = setting()
    how = {"steps": 4, "clamp": 2.0, "decay": 0.0}
    goal = wanted(model, last, context.requests, lr=0.5, kl=0.0625, **how)
    start = at_subjects(model, {"s": last.stream}, rows)["s"]
    options = {"mask": "none", "null": None, "weight": 1.0, "exact": True, "layers": [0, 1], **how}
    graft = edit(model, ASKED, by=("nmke", options), general=context.batches)
    size = graft.deltas[first.weight].B.T
    torch.testing.assert_close(size, (goal - start) / 2, rtol=1e-3, atol=1e-4)
    with Graft.made(model, {first.weight: graft.deltas[first.weight]}).on(model):
        now = at_subjects(model, {"s": last.stream}, rows)["s"]
    torch.testing.assert_close(graft.deltas[last.weight].B.T, goal - now, rtol=1e-3, atol=1e-4)


def test_the_recipe_edits_in_batches():
    model = pico("llama")
    out = run("nmke", model, ASKED, changes={"batch": 2, "steps": 2, "layers": [0]})
    assert out.graft.card["batches"] == [2, 1]
    assert out.graft.card["recipe"]["name"] == "nmke"


@cache
def world(seed):
    """Return a world of facts, a model that knows them, and general data."""
    made = facts(seed=seed)
    model = made.base(seed=seed, steps=220, hidden_size=48, intermediate_size=192)
    return made, model, made.batches(range(32), phrasings=(0, 1), batch=128)


def prepare():
    for seed in range(3):
        world(seed)


def edited(seed, mask):
    """Edit 50 facts one at a time and return how many hold, in another phrasing too, and how many others stay."""
    made, model, general = world(seed)
    new = made.changed(range(25), seed=seed)
    pairs = zip(new.rows(range(25)), new.rows(range(25), phrasings=(1,)))
    asked = [{"prompt": q, "target_new": a[:1], "rephrase": [p]} for (q, a), (p, _) in pairs]
    others = [{"prompt": q, "target_new": a[:1]} for q, a in made.rows(range(25, 32), phrasings=(0, 1, 2))]
    kept = as_requests(others, model, None)
    before = said(model, kept)
    options = {
        "mask": mask,
        "null": 1.0,
        "ridge": 0.1,
        "layers": [0],
        "steps": 8,
        "lr": 1.0,
        "clamp": 1.0,
        "decay": 0.0,
    }
    if mask == "random":
        options["mask"] = "post"
        rng, chosen = generator(seed, "random mask"), lens.mask_of
        with patched(
            "neurograft.edits.nmke", "mask_of", lambda s: (m := chosen(s))[torch.randperm(len(m), generator=rng)]
        ):
            graft = edit(model, asked, by=("nmke", options), general=general, batch=1, seed=seed)
    else:
        graft = edit(model, asked, by=("nmke", options), general=general, batch=1, seed=seed)
    with graft.on(model):
        stayed = float((said(model, kept) == before).float().mean())
    return graft.card["reliability"], graft.card["rephrase"], stayed


@effect
def test_fifty_facts_one_at_a_time():
    """AlphaEdit on a two-layer model of facts, its null space the directions below the mean; the mask of the paper.

    Threshold and amplification matter. With a null space of few directions (null=0.1, amplification 30 as at 14,336
    neurons, here 192) the mask spoils both: reliability .06 against .99, locality .02 against .63. The settings here
    were chosen after that, with a probe on seed 0, which is among the seeds reported. In these, nearer the paper's
    proportions, the mask's gains are small, one seed of three goes the other way in each, and it costs reliability.
    Hence the scale "identity": whether the means reach their bars is up to rounding.
    """
    table = {mask: [edited(seed, mask) for seed in range(3)] for mask in ("none", "post", "random")}
    note(**{f"{m}_{what}": [r[i] for r in rows] for m, rows in table.items() for i, what in enumerate(WHAT)})
    bar(
        "locality of the masked edit less that of the unmasked",
        [m[2] - n[2] for m, n in zip(table["post"], table["none"])],
        at_least=0.0,
        missed=True,
    )
    bar(
        "reliability of the mask less that of a random one of its size",
        [m[0] - n[0] for m, n in zip(table["post"], table["random"])],
        at_least=0.0,
        missed=True,
    )


WHAT = ("reliability", "rephrase", "locality")
