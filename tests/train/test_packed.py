"""The side path beside weights that are no plain parameters: offloaded, quantized, sharded."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload

import neurograft as ng
from neurograft.adapters._packed import unpacked
from neurograft.core.prompts.collate import collator
from neurograft.worlds.pico import pico

sys.path.insert(0, str(Path(__file__).parent))
from sharded_worker import CHOSEN, trained

QUERY, HEAD = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"


def test_an_offloaded_base_trains_as_one_in_memory(pick, examples, unmoved):
    """accelerate's hooks bring the weights for the length of a module's forward pass; the base is meta tensors."""
    reached = {}
    for kind in ("in memory", "offloaded"):
        model = pico("llama", dtype=torch.float64, tie_word_embeddings=False)
        batch, flags = collator(model)(examples(model)[:4]), [p.requires_grad for p in model.parameters()]
        where, plain = pick(model, CHOSEN), model
        if kind == "offloaded":
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert all(p.device.type == "meta" for p in model.parameters())
            with pytest.raises(ng.RequestError, match="route='side'"):
                ng.attach(model, where)
        with ng.attach(model, where, route="in-place" if model is plain and kind == "in memory" else "side") as live:
            reached[kind] = trained(live, batch), live.state_dict(), live.graft()
            assert live.graft().identity == reached[kind][2].identity
        assert live.graft().identity == reached[kind][2].identity
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not any("neurograft" in name for name, _ in model.named_modules())
    (losses, values, graft), (theirs, found, other) = reached.values()
    torch.testing.assert_close(theirs, losses, rtol=0, atol=1e-10)
    torch.testing.assert_close(found, values, rtol=0, atol=1e-10)
    assert other.base == graft.base
    model = pico("llama", dtype=torch.float64, tie_word_embeddings=False)
    with other.on(model):  # a graft made beside an offloaded base goes onto the base
        torch.testing.assert_close(float(model(**batch).loss.detach()), losses[-1], rtol=0, atol=1e-10)


def int8(model):
    """torchao's int8 weights, which are tensors of a class of their own."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao quantizes on CPU; an optional package")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def bits8(model):
    """bitsandbytes' int8 layers."""
    replaced(model, lambda bnb, old: bnb.nn.Linear8bitLt(old.in_features, old.out_features, False, False))


def bits4(model):
    """bitsandbytes' 4-bit layers, whose weights are [numbers / 2, 1] bytes."""
    replaced(model, lambda bnb, old: bnb.nn.Linear4bit(old.in_features, old.out_features, False, quant_type="nf4"))


def replaced(model, make):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantizes on CPU; an optional package")
    for name, old in list(model.named_modules()):
        if isinstance(old, torch.nn.Linear) and name != "lm_head":
            made = make(bnb, old)
            made.load_state_dict(old.state_dict())
            model.set_submodule(name, made.to("cpu"))


@pytest.mark.parametrize("quantize", [int8, bits8, bits4])
def test_a_quantized_base_trains_as_its_dequantized_twin(quantize, pick, examples):
    chosen = {n: c for n, c in CHOSEN.items() if n != HEAD}
    twin = pico("llama", tie_word_embeddings=False, hidden_size=64)
    where, batch = pick(twin, chosen), collator(twin)(examples(twin)[:4])
    model = pico("llama", tie_word_embeddings=False, hidden_size=64)
    quantize(model)
    with pytest.raises(ng.RequestError, match="route='side'"):
        ng.attach(model, where)
    with torch.no_grad():
        for name in dict(twin.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, torch.nn.Linear):
                twin.get_parameter(name).copy_(unpacked(name, module, leaf))
    before = model(**batch).logits.detach()
    close = {"rtol": 0, "atol": 1e-4}
    reached = []
    for net, route in ((model, "side"), (twin, "in-place")):
        with ng.attach(net, where, route=route) as live:
            reached.append((trained(live, batch), live.state_dict(), live.graft()))
    torch.testing.assert_close(model(**batch).logits.detach(), before, rtol=0, atol=0)
    (losses, values, graft), (theirs, found, other) = reached
    torch.testing.assert_close(losses, theirs, **close)
    torch.testing.assert_close(values, found, **close)
    assert graft.base == other.base
    with graft.on(twin):  # the graft of a quantized base belongs to its dequantized numbers
        torch.testing.assert_close(float(twin(**batch).loss.detach()), losses[-1], **close)


def test_a_base_sharded_over_two_processes(pick, tmp_path):
    """FSDP2 over gloo, half of the batch each: the values of one process with all of it, the same on both ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "sharded_worker.py"), str(tmp_path)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
