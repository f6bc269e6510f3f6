"""One of two processes: trains through the Trainer, resumes, and says what it got. Started by test_machines."""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import neurograft as ng
from neurograft.core.selection import Selection
from neurograft.worlds.pico import pico


def examples(n=16):
    rng = torch.Generator().manual_seed(3)
    made = []
    for i in range(n):
        tokens = torch.randint(3, 64, (8,), generator=rng)
        labels = tokens.clone()
        labels[: 1 + i % 5] = -100
        made.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return made


def arguments(folder, size):
    return {
        "max_steps": 4, "per_device_train_batch_size": size, "learning_rate": 1e-3, "output_dir": str(folder),
        "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
    }  # fmt: skip


def layers(folder, size):
    """One layer at a time, another every step; both layers of the model have been awake at the end."""
    drawn = {"count": 1, "every": 1, "seed": 2}
    return {"adapter": "dense", "schedule": ("sampled", drawn), "args": arguments(folder, size)}


def blocks(folder, size):
    """Reversible blocks, whose projections move alone at first."""
    parts = [("*.half_*", 2), ("*", 1)]
    return {"adapter": "reversible", "schedule": ("stages", {"parts": parts}), "args": arguments(folder, size)}


TURNING = ("noise", "grad_x_act")


def turning(by, folder, size):
    """Other neurons every step; the ones left behind keep what they learned."""
    chosen = {"locate": {"by": by}, "select": {"count": 3}}
    return {"schedule": ("every", {"steps": 1}), "reselect": chosen, "args": arguments(folder, size)}


def main(folder):
    rank = int(os.environ["RANK"])
    where = Selection.load(folder / "where.safetensors")
    model = pico("llama", seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = {"objective": "dft", "args": arguments(folder / "run", 2)}
    graft = ng.tune(model, examples(), where, **run)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder / "run" / "checkpoint-4")
    dist.barrier()
    resumed = ng.tune(model, examples(), where, resume_from_checkpoint=True, **run)
    assert resumed.identity == graft.identity, "resumed under DDP differs"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model is not as found"
    graft.save(folder / f"graft{rank}")
    sampled = ng.tune(model, examples(), **layers(folder / "layers", 2))
    sampled.save(folder / f"sampled{rank}")
    reversed_ = ng.tune(model, examples(), **blocks(folder / "blocks", 2))
    reversed_.save(folder / f"blocks{rank}")
    for name in TURNING:
        turned = ng.tune(model, examples(), where, **turning(name, folder / name, 2))
        turned.save(folder / f"{name}{rank}")
    if rank == 0:
        shutil.rmtree(folder / "grad_x_act" / "checkpoint-4")
    dist.barrier()
    again = ng.tune(model, examples(), where, resume_from_checkpoint=True, **turning(name, folder / name, 2))
    assert again.identity == turned.identity, "resumed in several processes differs"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model is not as found"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
