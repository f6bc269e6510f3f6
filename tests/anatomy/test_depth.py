"""Depths of parameters, by hand for families whose order differs."""

import pytest
from torch import nn

import neurograft as ng
from neurograft.anatomy.depth import depths
from neurograft.worlds.pico import pico


@pytest.mark.parametrize(
    ("family", "expected"),
    {
        "llama": {"model.embed_tokens.weight": 0, "model.layers.0.mlp.up_proj.weight": 1,
                  "model.layers.1.input_layernorm.weight": 2, "model.norm.weight": 3, "lm_head.weight": 3},
        "bert": {"bert.embeddings.LayerNorm.bias": 0, "bert.encoder.layer.1.output.dense.bias": 2,
                 "bert.pooler.dense.weight": 3, "classifier.weight": 3},
        "gpt2": {"transformer.wpe.weight": 0, "transformer.h.0.attn.c_attn.weight": 1, "transformer.ln_f.bias": 3},
        "deberta_v2": {"deberta.encoder.rel_embeddings.weight": 0, "pooler.dense.weight": 3},
        "opt": {"model.decoder.embed_positions.weight": 0, "model.decoder.final_layer_norm.weight": 3},
        "t5": {"shared.weight": 0, "encoder.block.1.layer.0.SelfAttention.q.weight": 2,
               "decoder.block.0.layer.0.SelfAttention.q.weight": 3, "decoder.final_layer_norm.weight": 5},
    }.items(),
)  # fmt: skip
def test_depths_by_hand(family, expected):
    model = pico(family)
    found = depths(model)
    assert {n: found.of(n) for n in expected} == expected
    assert set(found.by_name) == {n for n, _ in model.named_parameters()}
    assert found.layers == max(found.by_name.values()) - 1


def test_names_that_belong_to_nothing_are_refused():
    with pytest.raises(ng.RequestError, match=r"nobody\.weight"):
        depths(pico("llama")).of("nobody.weight")
    with pytest.raises(ng.RequestError, match="without known layers"):
        depths(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
