"""SPIDER: after each step, numbers whose size outranks their gathered gradient go back to where they began.

The card's world is one in which large weights carry the general task. In a trained decoder nothing says that they do:
there SPIDER keeps more than full tuning, and the same shares at random places keep more still (noted).
"""

import copy
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator
from neurograft.optimizers.anchored import anchored, blended, rank, shares
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.mixture import mixture
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import Scored
from tests.proofs import bar, effect, note, patched
from tests.proofs._selective import rows_of
from tests.proofs._tools import KNOWN, LEARNED, base, moved, snapshot

PAPER, SCALE = "spider", "tiny"
AT = "neurograft.optimizers.anchored"


@contextmanager
def the_blend_starts_from_the_last_step():
    """Losers keep a share of their step and are not put back."""
    with patched(AT, "blended", lambda began, now, c: now * (1 - 0.5 * (c == 0))):
        yield


@contextmanager
def the_task_always_wins():
    """Every number keeps its whole step."""
    with patched(AT, "shares", lambda base, task: torch.ones_like(task)):
        yield


@contextmanager
def sizes_are_not_centred():
    """A rank is the logistic of the plain size."""
    with patched(AT, "rank", lambda t: torch.sigmoid(t.abs().float())):
        yield


BROKEN = (the_blend_starts_from_the_last_step, the_task_always_wins, sizes_are_not_centred)


def test_two_rows_of_three_by_hand():
    """w0 sizes 1..6 by position, gradients 6..1: winners are the three smallest weights.

    |w0| has mean 3.5 and unbiased std sqrt(3.5); so has the gradient, in the other order. With z = 2.5, 1.5, 0.5 over
    sqrt(3.5) and r(z) = 1 / (1 + exp(-z)): I - at the winners r(z), I0 = 1 - r(z), so c = r(z) before it is divided
    by the mean of the three.
    """
    w0 = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    grad = torch.tensor([[6.0, 5.0, -4.0], [3.0, -2.0, 1.0]])
    z = torch.tensor([2.5, 1.5, 0.5], dtype=torch.float64) / 3.5**0.5
    r = 1 / (1 + (-z).exp())
    c = (r / r.mean()).clamp(max=1.0)
    w = torch.nn.Parameter(w0.clone())
    moving = anchored([{"params": [w]}], lr=0.1, optimizer="SGD")
    w.grad = grad.clone()
    moving.step()
    wanted = w0.double()
    wanted[0] -= 0.1 * c * grad[0].double()
    torch.testing.assert_close(w.detach().double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(w.detach()[1], w0[1])
    state = moving.state[w]
    torch.testing.assert_close(rank(state["anchor"]).reshape(-1)[:3].double(), 1 - r, rtol=0, atol=1e-7)
    assert float(shares(rank(state["anchor"]), rank(state["gathered"])).max()) == 1.0
    w.grad = grad.clone()
    moving.step()  # the same winners: (1 - c) w0 + c (w - 0.1 g), the earlier step shrunk by c once more
    wanted[0] = (1 - c) * w0[0].double() + c * (wanted[0] - 0.1 * grad[0].double())
    torch.testing.assert_close(w.detach().double(), wanted, rtol=0, atol=1e-6)


def test_gradients_are_summed_with_their_sign():
    """Two opposite gradients cancel, so that the second step finds no task in them and goes back whole."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    moving = anchored([{"params": [w]}], lr=0.1, optimizer="SGD")
    for sign in (1.0, -1.0):
        w.grad = sign * torch.tensor([3.0, 2.0, 1.0])
        moving.step()
    assert w.tolist() == [1.0, 2.0, 3.0]


def test_gradients_made_by_a_closure_are_those_of_the_step():
    """The closure is asked once, before anything is read; the loss it gives is handed on."""
    pull, ends, asked = torch.tensor([3.0, 2.0, 1.0]), [], []
    for by_closure in (False, True):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        moving = anchored([{"params": [w]}], lr=1.0, optimizer="SGD")

        def closure(w=w):
            asked.append(1)
            w.grad = None
            loss = (w * pull).sum()
            loss.backward()
            return loss

        for _ in range(2):
            if not by_closure:
                w.grad = pull.clone()
            value = moving.step(closure if by_closure else None)
        ends.append(w.tolist())
    assert ends[0] == ends[1]
    assert len(asked) == 2
    assert float(value.detach()) == pytest.approx(3.0 * -2 + 2 * -2 + 3)


def test_ranks_and_shares_at_their_ends():
    assert rank(torch.zeros(3)).tolist() == [0.0] * 3
    assert rank(torch.full((3,), -2.0)).tolist() == [0.5] * 3
    assert rank(torch.tensor([4.0])).tolist() == [0.5]
    assert shares(torch.ones(2), torch.zeros(2)).tolist() == [0.0, 0.0]
    assert shares(torch.zeros(2), torch.tensor([0.3, 0.9])).tolist() == [1.0, 1.0]
    began, now = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(blended(began, now, torch.zeros(64)), began)
    assert torch.equal(blended(began, now, torch.ones(64)), now)


def literal(model, batches, lr):
    """AdamW, gradients clipped, written out; then the reference's blend, tensor by tensor."""
    named = dict(model.named_parameters())
    began = {n: p.detach().clone() for n, p in named.items()}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    first, second = ({n: torch.zeros_like(p) for n, p in named.items()} for _ in "ab")

    def sigmoid(t):
        if not t.any():
            return torch.zeros_like(t)
        if t.abs().min() == t.abs().max():
            return torch.full_like(t, 0.5)
        return 1 / (1 + torch.exp(-(t.abs() - t.abs().mean()) / t.abs().std()))

    for step, batch in enumerate(batches, 1):
        model.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for n, p in named.items():
                first[n] = 0.9 * first[n] + 0.1 * p.grad
                second[n] = 0.999 * second[n] + 0.001 * p.grad**2
                size = (second[n] / (1 - 0.999**step)).sqrt() + 1e-8
                after = p - lr * first[n] / (1 - 0.9**step) / size
                total[n] += p.grad
                held, task = sigmoid(began[n]), sigmoid(total[n])
                c = torch.where(task > held, task / (held + task), torch.zeros_like(task))
                if c.any():
                    c = (c / c[c != 0].mean()).clamp(max=1)
                p.copy_((1 - c) * began[n] + c * after)


def test_training_equals_the_rule_written_out():
    model, twin = (pico("llama", dtype=torch.float64) for _ in "ab")
    batches = [pico_batch(model, seed=s) for s in range(3)]
    with attach(model, adapter="dense") as live:
        how = {"optimizer": "anchored", "lr": 1e-2}
        fit(live, lambda draw, phase: batches[draw], steps=3, **how)
        literal(twin, batches, 1e-2)
        for name, p in live.named_parameters().items():
            # transformers' own loss is float32 whatever the model is
            torch.testing.assert_close(p, twin.get_parameter(name), rtol=0, atol=1e-7)


def test_with_every_share_one_it_is_plain_training():
    graft = {}
    for name in ("AdamW", "SGD", "anchored", ("anchored", {"optimizer": "SGD", "momentum": 0.9})):
        model = pico("llama")
        batches = [pico_batch(model, seed=s) for s in range(3)]
        options = ("SGD", {"momentum": 0.9}) if name == "SGD" else name
        with patched(AT, "shares", lambda base, task: torch.ones_like(task)), attach(model, adapter="dense") as live:
            fit(live, batches, steps=3, lr=1e-2, weight_decay=0.1, optimizer=options)
            graft[str(name)] = live.graft().identity
    plain, sgd, ours, ours_sgd = graft.values()
    assert plain == ours != sgd == ours_sgd


def test_the_recipe_leaves_losers_at_the_base_and_resumes_in_the_same_place():
    model = pico("llama")
    before = snapshot(model)
    changes = {"lr": 1e-2, "epochs": 2, "batch": 4, "warmup": 0.0}
    graft = run("spider", model, rows_of(model), changes=changes).graft
    assert not moved(before, model)
    with graft.on(model):
        at = moved(before, model)
    for name, value in before.items():
        if value.dim() == 2 and name != "model.embed_tokens.weight":
            assert 0 < len(at[name]) < 0.7 * value.numel(), name
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    moving = anchored([{"params": [w]}], lr=0.1)
    w.grad = torch.tensor([3.0, 2.0, 1.0])
    moving.step()
    other = torch.nn.Parameter(w.detach().clone())
    again = anchored([{"params": [other]}], lr=0.1)
    again.load_state_dict(copy.deepcopy(moving.state_dict()))
    for p, o in ((w, moving), (other, again)):
        p.grad = torch.tensor([1.0, 5.0, 1.0])
        o.step()
    assert torch.equal(w, other)
    with pytest.raises(RequestError, match="'LBFGS'"):
        anchored([{"params": [w]}], optimizer="LBFGS")


class Reached(Exception):
    """The new task is known well enough."""


@contextmanager
def shuffled(seed):
    """The same shares, at random places of each tensor, the same ones at each step."""

    def elsewhere(base, task):
        c = shares(base, task).reshape(-1)
        order = torch.randperm(len(c), generator=generator(seed, "elsewhere", len(c)))
        return c[order].reshape(task.shape)

    with patched(AT, "shares", elsewhere):
        yield


ARMS = (("full", "AdamW", False), ("spider", "anchored", False), ("shuffled", "anchored", True))


def compared(seed, tuned):
    """Return arm -> what tuning with its optimizer found."""
    found = {}
    for name, optimizer, mixed in ARMS:
        with shuffled(seed) if mixed else nullcontext():
            found[name] = tuned(seed, optimizer)
    return found


def held_against(every):
    """Tables of the arms over seeds, and the differences the card asks about."""
    rise = {name: [one[name]["rise"] for one in every] for name, *_ in ARMS}
    steps = {f"{name}_steps": [one[name]["steps"] for one in every] for name, *_ in ARMS}
    over = {name: [a - b for a, b in zip(rise[name], rise["spider"])] for name in ("full", "shuffled")}
    return rise, steps, over


CLASSES, HALF = 8, 32


class Bags(nn.Module):
    """Reads bags of features by one matrix."""

    def __init__(self, weight):
        super().__init__()
        self.read = nn.Linear(2 * HALF, CLASSES, bias=False)
        self.read.weight.data.copy_(weight)

    def forward(self, features, labels=None):
        logits = self.read(features)
        return Scored(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def bags(rng, count, *, general):
    """Four of the first 32 features a row, and for the target task four of the others too."""
    chosen = torch.rand(count, HALF, generator=rng).topk(4, 1).indices
    x = torch.zeros(count, 2 * HALF).scatter_(1, chosen, 1.0)
    if not general:
        also = torch.rand(count, HALF, generator=rng).topk(4, 1).indices
        x.scatter_(1, HALF + also, 1.0)
    return x


def planted(seed, optimizer):
    """A general task read by large weights; a teacher that differs in a quarter of the small ones."""
    rng = generator(seed, "spider")
    weight = torch.randn(CLASSES, 2 * HALF, generator=rng)
    weight[:, :HALF] += weight[:, :HALF].sign()
    weight[:, HALF:] *= 0.1
    support = torch.rand(CLASSES, HALF, generator=rng) < 0.25
    teacher = weight.clone()
    teacher[:, HALF:] += 2 * support * torch.randn(CLASSES, HALF, generator=rng).sign()
    known = bags(rng, 1024, general=True)
    general = [{"features": known, "labels": (known @ weight.t()).argmax(-1)}]
    train = [{"features": bags(rng, 32, general=False)} for _ in range(40)]
    test = bags(rng, 1024, general=False)
    model, found = Bags(weight), {}
    before = loss_on(model, general)

    def distance(net, batch):
        wanted = (batch["features"] @ teacher.t()).log_softmax(-1)
        got = net(batch["features"]).logits.log_softmax(-1)
        return F.kl_div(got, wanted, log_target=True, reduction="batchmean")

    def look(step):
        with torch.no_grad():
            left = float(distance(model, {"features": test}))
        found.update(rise=loss_on(model, general) - before, steps=step, left=left)
        if left < 0.2:
            raise Reached

    with attach(model, adapter="dense") as live, suppress(Reached):
        fit(live, train, steps=200, lr=2e-2, optimizer=optimizer, objective=distance, evaluate=look, seed=seed)
    return found


@effect
def test_what_large_weights_carry_is_kept_where_small_ones_can_learn():
    """A planted delta among small weights, a general task read by large ones; stopped at 0.2 nats from the teacher.

    3 seeds. Shuffled shares never come so near: they are read after 200 steps, worse on both tasks.
    """
    every = [compared(seed, planted) for seed in range(3)]
    rise, steps, over = held_against(every)
    left = {f"{name}_left": [one[name]["left"] for one in every] for name, *_ in ARMS}
    note(**{f"planted_{k}": v for k, v in {**rise, **steps, **left}.items()})
    assert all(one[name]["left"] < 0.2 for one in every for name in ("full", "spider"))
    assert all(one["shuffled"]["left"] > 0.2 for one in every)
    bar("planted: full tuning's rise over ours", over["full"], at_least=0.0)
    bar("planted: shuffled shares' rise over ours", over["shuffled"], at_least=0.0)


def loss_on(model, batches):
    """Mean loss."""
    with torch.no_grad():
        return float(sum(model(**b).loss for b in batches) / len(batches))


def decoder(seed, optimizer):
    """Learn to count until the loss is below 1; return the rise of the loss on what the base knew."""
    model = base(seed)
    train = mixture((LEARNED,), count=40, batch=32, length=3, seed=50 + seed)
    test = mixture((LEARNED,), count=1, batch=128, length=3, seed=90)
    held = mixture(KNOWN, count=1, batch=128, length=3, seed=91)
    before, found = loss_on(model, held), {}

    def look(step):
        if loss_on(model, test) < 1.0:
            found.update(rise=loss_on(model, held) - before, steps=step)
            raise Reached

    with attach(model, adapter="dense") as live, suppress(Reached):
        fit(live, train, steps=300, lr=1e-3, warmup=10, optimizer=optimizer, evaluate=look, seed=seed)
    model.eval()
    assert found, f"the loss on {LEARNED} never fell below 1"
    return found


@effect
def test_a_decoder_keeps_more_than_by_full_tuning():
    """A decoder that copies and reverses learns to count; 3 seeds. Shuffled shares are noted: see above."""
    rise, steps, over = held_against([compared(seed, decoder) for seed in range(3)])
    note(**rise, **steps)
    bar("decoder: full tuning's rise over ours", over["full"], at_least=0.0)
