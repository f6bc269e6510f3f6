"""GMT: at each step the numbers with the largest gradients of the whole window move, and strictly nothing else."""

from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.optimizers.gradient_masked import gradient_masked
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.mixture import mixture
from neurograft.worlds.pico import pico
from neurograft.worlds.tiny import Perceptron
from neurograft.worlds.vectors import vectors
from tests.proofs import bar, effect, note, patched
from tests.proofs._selective import adam_twin, rows_of, twins
from tests.proofs._tools import base, moved, snapshot

PAPER, SCALE = "gmt", "tiny"
HOME = "neurograft.optimizers.gradient_masked"


@contextmanager
def the_smallest_gradients_move():
    """The mask takes the other end."""
    with patched(HOME, "_top", lambda sizes, count: sizes.sort(stable=True).indices[:count].sort().values):
        yield


@contextmanager
def moments_stay_at_their_place_in_the_list():
    """The first numbers of the new mask take over the moments of the first of the old one."""
    carried = resolve("neurograft.core.compact.moments.carried")

    def first(state, old, new, inside, there):
        both = torch.arange(len(inside))
        return carried(state, old, new, both, both)

    with patched(HOME, "carried", first):
        yield


@contextmanager
def strict_masks_gradients_only():
    """Numbers outside of the mask follow their moments and weight decay."""
    with patched(gradient_masked, "_compact", gradient_masked._whole):
        yield


BROKEN = (the_smallest_gradients_move, moments_stay_at_their_place_in_the_list, strict_masks_gradients_only)


def stepped(weight, grads, **options):
    """Return a tensor after each step with the given gradients."""
    p, found = nn.Parameter(torch.tensor(weight)), []
    moving = gradient_masked([{"params": [p]}], **options)
    for grad in grads:
        p.grad = torch.tensor(grad)
        moving.step()
        found.append(p.detach().clone())
    return found, moving


def test_counts_and_ties_by_hand():
    """Exactly the stated count, ties by place, also where most gradients are 0; at least one of each tensor."""
    ((after,), _) = stepped([0.0] * 5, [[1.0, -2, 2, 0, 1]], keep=0.6, of="SGD", lr=1.0)
    assert after.tolist() == [-1, 2, -2, 0, 0]
    p = nn.Parameter(torch.zeros(100))
    p.grad = torch.zeros(100).index_fill_(0, torch.tensor([3, 50, 99, 7, 12]), 1.0)
    chosen = gradient_masked([{"params": [p]}], keep=0.2)._chosen()[p].tolist()
    assert len(chosen) == 20
    assert {3, 7, 12, 50, 99} < set(chosen)
    assert set(chosen) - {50, 99} == set(range(18))


def test_a_global_scope_may_starve_a_tensor():
    """Two tensors of 100, gradients 10 : 1, keep 40 of 200: 40 and 0; by tensor 20 and 20."""
    rng = generator(0, "gmt scope")
    sizes = {}
    for scope in ("global", "tensor"):
        pair = [nn.Parameter(torch.zeros(100)) for _ in range(2)]
        for p, scale in zip(pair, (10.0, 1.0)):
            p.grad = scale * (1 + torch.rand(100, generator=rng))
        moving = gradient_masked([{"params": pair}], keep=0.2, scope=scope, lr=1.0)
        moving.step()
        sizes[scope] = [int((p != 0).sum()) for p in pair]
    assert sizes == {"global": [40, 0], "tensor": [20, 20]}


class Pulled(nn.Module):
    """A weight of two numbers whose gradient is what the batch says."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, pull):
        return (self.weight * pull).sum()


def test_the_mask_is_of_the_windows_mean():
    """Pulls (1, 0.9) and (-0.5, 0.9), keep 1 of 2: only the second moves, by 0.9; a mask per batch would give 0.45."""
    model = Pulled()
    pulls = [{"pull": torch.tensor([1.0, 0.9])}, {"pull": torch.tensor([-0.5, 0.9])}]
    options = {"steps": 1, "lr": 1.0, "optimizer": ("gradient_masked", {"keep": 0.5, "of": "SGD"}), "max_norm": None}
    with attach(model) as live:
        fit(live, pulls, accumulate=2, objective=lambda net, batch: net(batch["pull"]), **options)
        assert model.weight[0].item() == 0.0
        assert model.weight[1].item() == pytest.approx(-0.9)
    rows = vectors(count=1, batch=32)[0]
    quarters = [{k: v[i : i + 8] for k, v in rows.items()} for i in range(0, 32, 8)]
    ends = []
    for given, accumulate in (([rows], 1), (quarters, 4)):
        net = Perceptron(24).double()
        data = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in given]
        with attach(net) as live:
            fit(
                live,
                data,
                steps=3,
                lr=1e-2,
                accumulate=accumulate,
                optimizer=("gradient_masked", {"keep": 0.2, "of": "SGD"}),
                objective=lambda model, batch: model(**batch).loss,
            )
            ends.append(snapshot(net))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-12)


def test_strict_stands_still_and_masked_gradients_do_not():
    """A number masked at step 2 moves by 0.067 at rate 0.1 in the second, and under weight decay."""
    pulls = [[1.0, 0.5], [0.0, 1.0]]
    (_, loose), _ = stepped([0.0, 0.0], pulls, keep=0.5, strict=False, lr=0.1)
    (first, strict), moving = stepped([0.0, 0.0], pulls, keep=0.5, lr=0.1)
    assert float(first[0] - loose[0]) == pytest.approx(0.067, abs=1e-3)
    assert strict.tolist() == pytest.approx([-0.1, -0.1 * (0.1 / 0.19) / (0.001 / 0.001999) ** 0.5], abs=1e-6)
    (state,) = moving.state.values()
    assert (state["ids"].tolist(), state["exp_avg"].numel()) == ([1], 1)
    decay = {"lr": 0.1, "weight_decay": 0.5, "keep": 0.5}
    (held, still), _ = stepped([3.0, 2.0], pulls, **decay)
    assert (held[1].item(), still[0].item()) == (2.0, held[0].item())
    (held, loose), _ = stepped([3.0, 2.0], pulls, strict=False, **decay)
    assert held[1].item() != 2.0
    assert loose[0].item() != held[0].item()


def test_everything_kept_is_the_optimizer_inside_bit_for_bit():
    ends = []
    for optimizer in ("AdamW", ("gradient_masked", {"keep": 1.0}), ("gradient_masked", {"keep": 1.0, "strict": False})):
        net = Perceptron(24)
        with attach(net) as live:
            fit(live, vectors(count=6), steps=6, lr=1e-2, weight_decay=0.1, optimizer=optimizer)
            ends.append(snapshot(net))
    assert all(torch.equal(ends[0][n], e[n]) for e in ends[1:] for n in ends[0])


def test_moments_that_are_dropped_begin_anew_in_every_mask():
    """SGD with momentum 1 and equal pulls on one number of two: -1, then -2 more with its moment, -1 without."""
    pulls = [[1.0, 0.0], [1.0, 0.0]]
    how = {"keep": 0.5, "of": "SGD", "lr": 1.0, "momentum": 1.0}
    (_, kept), _ = stepped([0.0, 0.0], pulls, **how)
    (_, fresh), _ = stepped([0.0, 0.0], pulls, moments="drop", **how)
    assert (kept.tolist(), fresh.tolist()) == ([-3.0, 0.0], [-2.0, 0.0])


def test_a_tensor_that_is_left_out_holds_no_state_and_places_stay_whole_numbers():
    pair = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    moving = gradient_masked([{"params": pair}], keep=0.25, scope="global", lr=1.0)
    for strong, weak in ((0, 1), (1, 0)):
        pair[strong].grad, pair[weak].grad = torch.full((4,), 2.0), torch.full((4,), 1.0)
        moving.step()
        assert [len(moving.state.get(p, {})) > 0 for p in pair] == [n == strong for n in range(2)]
    held = moving.state[pair[1]]["ids"]
    moving.load_state_dict(deepcopy(moving.state_dict()))
    again = moving.state[pair[1]]["ids"]
    assert again.dtype == torch.int64  # as floats, places beyond 2^24 would be rounded
    assert torch.equal(again, held)


def test_a_tensor_in_another_memory_order_moves_as_in_the_usual_one():
    """Convolutions are often stored with their channels last."""
    ends = []
    for order in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(torch.ones(4, 3, 3, 3).to(memory_format=order))
        moving = gradient_masked([{"params": [weight]}], keep=0.3, lr=0.1)
        for step in range(2):
            weight.grad = torch.randn(weight.shape, generator=generator(0, "gmt order", step)).to(memory_format=order)
            moving.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], torch.ones(4, 3, 3, 3))


def test_masks_change_and_moments_are_those_of_a_dense_twin():
    """In float64, to 1e-10; what both masks hold keeps its moments; a checkpoint in the middle changes nothing."""
    ours, twin, batch = twins()
    options = {"keep": 0.3, "lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.0}
    moving, history, seen = gradient_masked([{"params": list(ours.parameters())}], **options), [snapshot(ours)], []
    for step in range(6):
        if step == 3:
            saved = deepcopy(moving.state_dict())
            moving = gradient_masked([{"params": list(ours.parameters())}], **options)
            moving.load_state_dict(saved)
        ours.zero_grad()
        ours(**batch).loss.backward()
        moving.step()
        history.append(snapshot(ours))
        seen.append({n: set(moving.state[p]["ids"].tolist()) for n, p in ours.named_parameters()})
        for name, weight in history[-1].items():
            flat = (weight != history[-2][name]).reshape(-1).nonzero().reshape(-1)
            assert set(flat.tolist()) <= seen[-1][name]
            assert len(seen[-1][name]) == int(0.3 * weight.numel() + 0.5)
    assert all(one["second.weight"] != two["second.weight"] for one, two in pairwise(seen))
    assert all(one["second.weight"] & two["second.weight"] for one, two in pairwise(seen))

    def masks(step):
        twin.zero_grad()
        twin(**batch).loss.backward()
        found = {}
        for name, p in twin.named_parameters():
            best = p.grad.abs().reshape(-1).topk(int(0.3 * p.numel() + 0.5)).indices
            found[name] = torch.zeros(p.numel(), dtype=torch.bool).index_fill_(0, best, True).view_as(p)
        return found

    adam_twin(twin, lambda: twin(**batch).loss, masks, steps=6, lr=1e-2, betas=(0.9, 0.95))
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).detach(), weight.detach(), rtol=0, atol=1e-10)


def test_the_recipe_changes_a_share_of_each_tensor_and_comes_off():
    model = pico("llama")
    before = snapshot(model)
    graft = run("gmt", model, rows_of(model), changes={"batch": 8, "epochs": 1, "lr": 1e-3, "warmup": 0.0}).graft
    assert not moved(before, model)
    with graft.on(model):
        changed = moved(before, model)
    assert set(changed) == set(before)
    for name, flat in changed.items():
        assert len(flat) <= int(0.2 * before[name].numel() + 0.5)
    assert sum(map(len, changed.values())) > 0.15 * sum(w.numel() for w in before.values())


def test_what_it_refuses():
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(RequestError, match=r"keep=0\b"):
        gradient_masked([{"params": [p]}], keep=0)
    with pytest.raises(RequestError, match="of='AdamV'"):
        gradient_masked([{"params": [p]}], of="AdamV")
    with pytest.raises(RequestError, match="scope"):
        gradient_masked([{"params": [p]}], scope="layer")


@effect
def test_the_largest_gradients_lower_the_loss_more_than_random_ones_on_every_batch():
    """One small step of SGD each on 4 batches, masks of equal size, 3 seeds; the share of the squared gradient."""
    wins, shares = [], []
    for seed in range(3):
        model, better = base(seed), []
        for number, batch in enumerate(mixture(("sort", "shift"), count=4, batch=16, length=3, seed=30 + seed)):
            drops = {}
            for name in ("top", "random"):
                net = deepcopy(model)
                start = net(**batch).loss
                start.backward()
                params = [p for p in net.parameters() if p.grad is not None]
                whole = sum(float(p.grad.square().sum()) for p in params)
                small = 1e-3 * float(start) / whole  # a full step of it would lower the loss by a thousandth
                moving = gradient_masked([{"params": params}], keep=0.1, of="SGD", lr=small)
                if name == "top":
                    kept = sum(float(p.grad.reshape(-1)[ids].square().sum()) for p, ids in moving._chosen().items())
                    shares.append(kept / whole)
                else:
                    rng = generator(seed, "gmt random", number)
                    for p in params:
                        away = torch.rand(p.numel(), generator=rng).argsort()[int(0.1 * p.numel() + 0.5) :]
                        p.grad.view(-1)[away] = 0.0
                moving.step()
                with torch.no_grad():
                    drops[name] = float(start - net(**batch).loss)
            better.append(drops["top"] >= drops["random"])
        wins.append(sum(better) / len(better))
    note(share_of_squared_gradient=shares)
    bar(
        "share of batches on which the top gradients lower the loss at least as much as random ones", wins, at_least=1.0
    )
