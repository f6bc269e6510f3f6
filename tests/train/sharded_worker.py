"""One of two processes with a sharded base: trains beside it and compares with training in place. See test_packed."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from conftest import _pick as pick

import neurograft as ng
from neurograft.worlds.pico import pico, pico_batch

CHOSEN = {
    "model.layers.0.self_attn.q_proj.weight": ("weight", range(0, 1024, 7)),
    "model.layers.0.mlp.gate_proj.weight": ("row", [1, 5, 40]),
    "model.layers.1.mlp.down_proj.weight": ("column", [0, 7]),
    "lm_head.weight": ("row", [3, 30]),
}


def trained(live, batch, *, accumulate=1, steps=4):
    """The losses of some steps with AdamW, the last one after them."""
    optimizer, losses = torch.optim.AdamW(live.parameters(), lr=1e-2, weight_decay=0.0), []
    for step in range(steps + 1):
        optimizer.zero_grad()
        for rows in range(accumulate):
            size = len(batch["input_ids"]) // accumulate
            part = {k: v[rows * size : (rows + 1) * size] for k, v in batch.items()}
            loss = live.model(**part).loss / accumulate
            if step < steps:
                loss.backward()
        losses.append(float(loss.detach()))
        if step < steps:
            optimizer.step()
    return losses


def main(folder):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    alone, model = (pico("llama", dtype=torch.float64, tie_word_embeddings=False) for _ in range(2))
    batch = pico_batch(alone, batch=4)
    where = pick(alone, CHOSEN)
    with ng.attach(alone, where) as live:
        trained(live, batch, accumulate=4)
        wanted, graft = live.state_dict(), live.graft()
        logits = alone(**batch).logits.detach()
    with ng.attach(model, where, route="side") as live:  # sharded after it was attached to
        pass
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    mine = {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}
    rest = model(**mine).logits.detach()
    model.reshard()
    with pytest.raises(ng.RequestError, match="route='side'"):
        ng.attach(model, where)
    assert torch.equal(model(**mine).logits, rest)  # the forward pass leaves the root's own weights whole
    with ng.attach(model, where, route="side") as live:
        trained(live, mine, accumulate=2)
        found, other = live.state_dict(), live.graft()
        torch.testing.assert_close(model(**mine).logits, logits[2 * rank : 2 * rank + 2], rtol=0, atol=1e-9)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert other.base == graft.base
    torch.testing.assert_close(model(**mine).logits.detach(), rest, rtol=0, atol=0)
    for name, value in found.items():
        theirs = value.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(theirs, value), f"{name} differs between the processes"
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
