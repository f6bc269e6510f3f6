"""torch.compile and two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

import neurograft as ng
from neurograft.pipeline.collator import collator
from neurograft.train.loop import fit

sys.path.insert(0, str(Path(__file__).parent))
from ddp_worker import TURNING, arguments, blocks, examples, layers, turning


def test_one_graph_when_compiled(llama, pick):
    """fullgraph=True, the losses of eager training, and one compilation although the values change."""
    batches = [collator(llama)(examples()[i : i + 4]) for i in range(0, 16, 4)]

    def run(call):
        with ng.attach(llama, pick(llama)) as live:
            losses = fit(live, batches, steps=5, lr=1e-2, weight_decay=0.1, call=call and call())
            return losses, live.graft()

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compiled():
        torch._dynamo.reset()
        return torch.compile(llama, fullgraph=True, backend=backend, dynamic=False)

    eager, expected = run(None)
    losses, graft = run(compiled)
    assert losses == eager
    for name, delta in expected.deltas.items():
        torch.testing.assert_close(graft.deltas[name].values, delta.values, rtol=0, atol=1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_two_processes_equal_one(llama, pick, tmp_path):
    """DDP over gloo through the Trainer, with uneven labels on the ranks, and a resume; the same with layers that are
    drawn anew every step, with reversible blocks, and with other neurons every step: the same on both ranks, and as in
    one process."""
    pick(llama).save(tmp_path / "where.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "ddp_worker.py"), str(tmp_path)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    alone = ng.tune(llama, examples(), pick(llama), objective="dft", args=arguments(tmp_path / "alone", 4))
    alone_by_layers = ng.tune(llama, examples(), **layers(tmp_path / "alone-layers", 4))
    alone_in_blocks = ng.tune(llama, examples(), **blocks(tmp_path / "alone-blocks", 4))
    turned = {n: ng.tune(llama, examples(), pick(llama), **turning(n, tmp_path / f"alone-{n}", 4)) for n in TURNING}
    said = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    whole = {"graft": alone, "sampled": alone_by_layers, "blocks": alone_in_blocks, **turned}
    # Inputs that are computed back add roundings, which AdamW's division enlarges: a hundredth of a step.
    near = {"blocks": {"rtol": 0, "atol": 1e-5}}
    for name, expected in whole.items():
        close = near.get(name, {"rtol": 0, "atol": 1e-6})
        first, second = (ng.Graft.load(tmp_path / f"{name}{rank}") for rank in range(2))
        assert first.identity == second.identity
        assert first.deltas.keys() == expected.deltas.keys()
        for parameter, delta in expected.deltas.items():
            torch.testing.assert_close(first.deltas[parameter].values, delta.values, **close)
        for one, other in zip(first.operations, expected.operations, strict=True):
            for part, value in other.tensors().items():
                torch.testing.assert_close(one.tensors()[part], value, **close)
    assert {n.split(".")[2] for n in alone_by_layers.deltas if ".layers." in n} == {"0", "1"}
