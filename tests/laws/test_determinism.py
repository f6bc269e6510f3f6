"""Promise 9: the same seed gives the same bytes, and the global random state is back where it was."""

import pytest
import torch
from _compact import adapters, attached, some_of

from neurograft.adapters.slice import slice as compact
from neurograft.core.selection import Scores
from neurograft.worlds.pico import pico, pico_batch


def trained(name, seed):
    """A graft from a short training with dropout; the caller's global seed names the dropout."""
    model = pico("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train()
    batch = pico_batch(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with attached(name, model, tied="both") as live:
            optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2, fused=True)
            for _ in range(3):
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
            return live.graft()


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", adapters("only_the_selection"))
def test_the_same_seed_gives_the_same_bytes(name, tmp_path):
    first = content(trained(name, 0).save(tmp_path / "first"))
    assert content(trained(name, 0).save(tmp_path / "again")) == first
    assert content(trained(name, 1).save(tmp_path / "other")) != first


def test_scores_and_selections_are_written_the_same_every_time(tmp_path):
    where = some_of(pico("llama"))
    scores = Scores(where.sites, {n: torch.arange(s.n, dtype=torch.float32) for n, s in where.sites.items()})
    for value in (where, scores):
        assert len({value.save(tmp_path / f"{turn}.safetensors").read_bytes() for turn in range(4)}) == 1


def test_attaching_training_and_detaching_draw_no_global_number():
    model = pico("llama")
    batch, state = pico_batch(model), torch.get_rng_state()
    with compact(model, some_of(model)) as live:
        optimizer = torch.optim.AdamW(live.parameters())
        model(**batch).loss.backward()
        optimizer.step()
        live.graft()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_training_equals_an_uninterrupted_one():
    def steps(model, live, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(**pico_batch(model)).loss.backward()
            optimizer.step()
        return live.state_dict(), optimizer.state_dict()

    def fresh():
        model = pico("llama", dtype=torch.bfloat16)
        live = compact(model, some_of(model, match="proj"))
        return model, live, torch.optim.AdamW(live.parameters(), lr=1e-3, fused=True)

    whole, _ = steps(*fresh(), 6)
    values, state = steps(*fresh(), 3)
    model, live, optimizer = fresh()
    live.load_state_dict(values)
    optimizer.load_state_dict(state)
    resumed, _ = steps(model, live, optimizer, 3)
    assert all(torch.equal(resumed[n], v) for n, v in whole.items())
