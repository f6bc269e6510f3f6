"""Promise 2: only the selection moves, under every optimizer, and it does move."""

import inspect

import pytest
import torch
from _compact import adapters, attached, bits, regions, same_bits, some_of
from torch import nn

from neurograft.adapters.slice import slice as compact
from neurograft.core.selection import Selection

SWITCHES = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
EXTRAS = {"weight_decay": 0.1, "momentum": 0.9, "lr": 1e-2}
PLAIN_LOOP = {"foreach": False, "fused": False}


def optimizers():
    """Every optimizer class torch.optim has, in every implementation it offers."""
    for name, cls in sorted(vars(torch.optim).items()):
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            known = inspect.signature(cls.__init__).parameters
            base = {k: v for k, v in EXTRAS.items() if k in known}
            for label, switch in SWITCHES.items():
                if all(k in known for k in switch):
                    loop = {k: v for k, v in PLAIN_LOOP.items() if k in known} if label == "loop" else {}
                    yield pytest.param(cls, {**base, **switch, **loop}, id=f"{name}-{label}")
            if not any(k in known for k in PLAIN_LOOP):
                yield pytest.param(cls, base, id=name)


class Net(nn.Module):
    """Every kind of use in a few numbers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(12, 8), nn.Linear(8, 10)
        self.norm, self.conv, self.head = nn.LayerNorm(10), nn.Conv1d(10, 6, 3), nn.Linear(6, 4)

    def forward(self, tokens):
        h = self.norm(torch.tanh(self.inner(self.embedding(tokens))))
        return self.head(self.conv(h.transpose(1, 2)).mean(-1))


def net():
    torch.manual_seed(0)
    return Net()


TOKENS, LABELS = torch.arange(48).view(6, 8) % 12, torch.arange(6) % 4


def loss(model):
    return nn.functional.cross_entropy(model(TOKENS), LABELS)


@pytest.fixture(autouse=True)
def _rng():
    with torch.random.fork_rng(devices=[]):
        yield


def check(model, where, before, *, moved):
    """Outside of the selection every bit is as before; inside, the given parameters have changed."""
    for name, parameter in model.named_parameters():
        if name not in before:
            continue
        weight, region = parameter.detach().clone(), regions(model, where).get(name)
        changed = weight != before[name]
        if region is None:
            assert not changed.any(), name
            continue
        inside = torch.zeros(weight.numel(), dtype=torch.bool)
        inside[region.flat()] = True
        assert not (changed.reshape(-1) & ~inside).any(), name
        if name in moved:
            assert changed.any(), name


@pytest.mark.parametrize(("cls", "options"), optimizers())
def test_every_optimizer_moves_the_selection_and_nothing_else(cls, options):
    model = net()
    where = some_of(model)
    if cls is torch.optim.Muon:  # takes matrices only
        where = some_of(model, ("rows", "cols"), match="e")
        keep = {n: i for n, i in where.ids.items() if where.sites[n].kind != "weight"}
        where = Selection.of({n: where.sites[n] for n in keep}, keep)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = float(loss(model))
    with compact(model, where) as live:
        optimizer = cls(live.parameters(), **options)
        if cls is torch.optim.SparseAdam:
            loss(model).backward()
            with pytest.raises(RuntimeError, match="dense gradients"):
                optimizer.step()
            return

        def closure():
            optimizer.zero_grad()
            found = loss(model)
            found.backward()
            return found

        seen = [float(optimizer.step(closure)) for _ in range(4)]
        for name, region in regions(model, where).items():
            held = region.read(model.get_parameter(name).detach())
            assert torch.equal(held, live.named_parameters()[name].detach()), name
        check(model, where, before, moved=regions(model, where))
        assert seen[0] == start
        assert seen[-1] != seen[0]
        assert float(loss(model)) < start
    check(model, where, before, moved=())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def invisible(theta):
    theta.data.add_(0.5)


def by_numpy(theta):
    theta.detach().numpy()[...] += 0.5


def new_storage(theta):
    theta.data = theta.data + 0.5


def by_vector(theta):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector([theta]) + 0.5, [theta])


@pytest.mark.parametrize("write", [invisible, by_numpy, new_storage, by_vector])
@pytest.mark.parametrize("grad", [True, False])
def test_writes_that_no_counter_sees_reach_the_next_use(write, grad):
    model, twin = net(), net()
    where = some_of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with compact(model, where) as live:
        for theta in live.parameters():
            write(theta)
        for name, region in regions(model, where).items():
            region.write_(twin.get_parameter(name), region.read(twin.get_parameter(name)) + 0.5)
        with torch.set_grad_enabled(grad):
            assert torch.equal(model(TOKENS), twin(TOKENS))
        check(model, where, before, moved=regions(model, where))


def test_protected_entries_stay():
    model = net()
    where, shield = some_of(model, ("rows",), match="weight"), some_of(model, ("cols",), match="weight", seed=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with compact(model, where, protect=shield) as live:
        optimizer = torch.optim.SGD(live.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        for name, region in regions(model, shield).items():
            assert torch.equal(region.read(model.get_parameter(name).detach()), region.read(before[name])), name
        check(model, where, before, moved=regions(model, where))


def test_the_optimizer_sees_compact_tensors_only():
    model = net()
    where = some_of(model)
    with compact(model, where) as live:
        free = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in free} == {id(p) for p in live.parameters()}
        assert sum(p.numel() for p in free) == where.numel
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        loss(model).backward()
        optimizer.step()
        state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
        assert state == 2 * where.numel


@pytest.mark.parametrize("name", adapters("only_the_selection"))
def test_every_adapter_that_claims_it(name):
    model = net()
    before = bits(model)
    with attached(name, model) as live:
        mine = {id(p) for p in live.parameters()}
        assert mine == {id(p) for p in model.parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        graft = live.graft()
    assert same_bits(bits(model), before)
    assert graft.deltas
    with graft.on(model):
        after = bits(model)
        for key, value in after.items():
            delta = graft.deltas.get(key)
            if delta is None:
                assert torch.equal(value, before[key]), key
            else:
                assert not torch.equal(value, before[key]), key
