"""Where the units of each storage layout lie, against entries picked by hand."""

# fmt: off

import torch

from neurograft.anatomy.sites import sites
from neurograft.worlds.pico import pico

H, D = 32, 8  # hidden size and width of a head in all pico models


def owned(model, site, unit):
    """Return parameter -> bool mask of the entries that one unit owns."""
    masks = {}
    for part in site.parts:
        parameter = model.get_parameter(part.param)
        mask = masks.setdefault(part.param, torch.zeros(parameter.shape, dtype=torch.bool))
        mask.view(-1)[part.flat(torch.tensor([unit])).reshape(-1)] = True
    return masks


def expect(model, site, unit, **by_hand):
    """Check that a unit owns exactly these entries: short parameter name -> index."""
    found = owned(model, site, unit)
    assert len(found) == len(by_hand), sorted(found)
    for short, index in by_hand.items():
        (name,) = [n for n in found if n.endswith(short.replace("__", "."))]
        mask = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
        for each in index if isinstance(index, list) else [index]:
            mask[each] = True
        assert torch.equal(found[name], mask), name


def one(model, kind, match, **options):
    (site,) = sites(model, kind, match=match, **options).values()
    return site


def test_gpt2_stores_its_matrices_in_out_and_fuses_q_k_v():
    model = pico("gpt2")
    q, k, v = (slice(16 + s, 24 + s) for s in (0, H, 2 * H))
    expect(
        model, one(model, "head", "*.0.attn/*"), 2,
        attn__c_attn__weight=[(slice(None), q), (slice(None), k), (slice(None), v)],
        attn__c_attn__bias=[q, k, v],
        attn__c_proj__weight=slice(16, 24),
    )
    expect(model, one(model, "head", "*.0.attn/*", at="kv"), 2,
           c_attn__weight=[(slice(None), k), (slice(None), v)], c_attn__bias=[k, v])
    expect(model, one(model, "neuron", "*.1.mlp/*"), 5,
           mlp__c_fc__weight=(slice(None), 5), mlp__c_fc__bias=5, mlp__c_proj__weight=5)
    row, column = (one(model, kind, "*.0.mlp.c_fc/*") for kind in ("row", "column"))
    expect(model, row, 7, c_fc__weight=(slice(None), 7), c_fc__bias=7)
    expect(model, column, 7, c_fc__weight=7)
    assert (row.n, column.n) == (128, H)


def test_neox_interleaves_q_k_v_head_by_head():
    model = pico("gpt_neox")
    rows = slice(2 * 3 * D, 3 * 3 * D)  # head 2: its q, k and v are neighbours
    expect(model, one(model, "head", "*.0.attention/*"), 2,
           query_key_value__weight=rows, query_key_value__bias=rows, dense__weight=(slice(None), slice(16, 24)))
    kv = slice(2 * 3 * D + D, 3 * 3 * D)
    expect(
        model, one(model, "head", "*.0.attention/*", at="kv"), 2, query_key_value__weight=kv, query_key_value__bias=kv
    )


def test_falcon_groups_queries_with_their_keys_and_values():
    model = pico("falcon")  # two groups of two queries, k, v
    expect(model, one(model, "head", "*.0.self_attention/*"), 3,
           query_key_value__weight=slice((4 + 1) * D, (4 + 2) * D), dense__weight=(slice(None), slice(24, 32)))
    expect(model, one(model, "head", "*.0.self_attention/*", at="kv"), 1,
           query_key_value__weight=slice((4 + 2) * D, (4 + 4) * D))
    single = pico("falcon", new_decoder_architecture=False, multi_query=True)
    expect(single, one(single, "head", "*.0.self_attention/*"), 3,
           query_key_value__weight=slice(3 * D, 4 * D), dense__weight=(slice(None), slice(24, 32)))
    expect(single, one(single, "head", "*.0.self_attention/*", at="kv"), 0,
           query_key_value__weight=slice(4 * D, 6 * D))


def test_phi3_stacks_queries_keys_and_values_and_gate_above_up():
    model = pico("phi3")
    expect(model, one(model, "head", "*.0.self_attn/*"), 3,
           qkv_proj__weight=slice(24, 32), o_proj__weight=(slice(None), slice(24, 32)))
    expect(model, one(model, "head", "*.0.self_attn/*", at="kv"), 1,
           qkv_proj__weight=[slice(H + D, H + 2 * D), slice(H + 3 * D, H + 4 * D)])
    expect(
        model,
        one(model, "neuron", "*.0.mlp/*"),
        5,
        gate_up_proj__weight=[5, 48 + 5],
        down_proj__weight=(slice(None), 5),
    )
    gate, up = (one(model, "neuron", "*.0.mlp/*", at=at) for at in ("gate", "up"))
    assert (gate.tap.start, up.tap.start) == (0, 48)
    assert (gate.writes, up.writes) == ((0,), (1,))


def test_grouped_queries_share_keys_and_values():
    model = pico("qwen2")
    expect(model, one(model, "head", "*.1.self_attn/*"), 3,
           q_proj__weight=slice(24, 32), q_proj__bias=slice(24, 32), o_proj__weight=(slice(None), slice(24, 32)))
    rows = slice(8, 16)
    expect(model, one(model, "head", "*.1.self_attn/*", at="kv"), 1,
           k_proj__weight=rows, k_proj__bias=rows, v_proj__weight=rows, v_proj__bias=rows)


def test_mixtral_keeps_all_experts_of_a_block_in_two_banks():
    model = pico("mixtral")
    expect(model, one(model, "neuron", "*.0.mlp.experts.2/*"), 5,
           gate_up_proj=(2, [5, 48 + 5]), down_proj=(2, slice(None), 5))
    expect(model, one(model, "expert", "*.0.mlp.experts/*"), 3, gate_up_proj=3, down_proj=3)
    row, column, weight, block = (
        one(model, kind, "*.0.mlp.experts/*", at="down_proj", block=16 if kind == "block" else None)
        for kind in ("row", "column", "weight", "block")
    )
    expect(model, row, H + 3, down_proj=(1, 3))
    expect(model, column, 48 + 7, down_proj=(1, slice(None), 7))
    expect(model, weight, H * 48 + 3 * 48 + 7, down_proj=(1, 3, 7))
    expect(model, block, 6 + 3 + 1, down_proj=(1, slice(16, 32), slice(16, 32)))
    expect(model, one(model, "channel", "*.0.mlp/*"), 9, down_proj=(slice(None), 9))
    assert one(model, "neuron", "*.0.mlp.experts.2/*").tap.expert == 2


def test_gpt_oss_stores_its_banks_in_out_and_interleaves_gate_and_up():
    model = pico("gpt_oss")
    expect(model, one(model, "neuron", "*.0.mlp.experts.2/*"), 5,
           gate_up_proj=(2, slice(None), slice(10, 12)), gate_up_proj_bias=(2, slice(10, 12)), down_proj=(2, 5))
    expect(model, one(model, "row", "*.0.mlp.experts/*", at="down_proj"), H + 3,
           down_proj=(1, slice(None), 3), down_proj_bias=(1, 3))
    expect(model, one(model, "column", "*.0.mlp.experts/*", at="down_proj"), 48 + 7, down_proj=(1, 7))
    expect(model, one(model, "weight", "*.0.mlp.experts/*", at="down_proj"), H * 48 + 3 * 48 + 7, down_proj=(1, 7, 3))
    expect(
        model,
        one(model, "channel", "*.0.mlp/*"),
        9,
        down_proj=(slice(None), slice(None), 9),
        down_proj_bias=(slice(None), 9),
    )


def test_convolutions_have_filters_and_input_channels():
    model = pico("resnet")
    name = "*.stages.1.layers.0.layer.1.convolution/*"
    expect(model, one(model, "row", name), 3, convolution__weight=3)
    expect(model, one(model, "column", name), 3, convolution__weight=(slice(None), 3))
    expect(model, one(model, "channel", name), 3,
           convolution__weight=3, normalization__weight=3, normalization__bias=3)
    assert one(model, "channel", name).tap.module.endswith("layer.1.normalization")
    assert one(model, "channel", name).tap.dim == 1
    depthwise = pico("convnext")
    assert not [n for n in sites(depthwise, "column") if "dwconv" in n]
    expect(depthwise, one(depthwise, "row", "*.0.layers.0.dwconv/*"), 3, dwconv__weight=3, dwconv__bias=3)


def test_blocks_weights_norms_biases_modules_tokens():
    model = pico("bert")
    name = "*.0.intermediate.dense/*"
    expect(model, one(model, "block", name, block=(12, 8)), 4 + 1, dense__weight=(slice(12, 24), slice(8, 16)))
    expect(model, one(model, "weight", name), 2 * H + 5, dense__weight=(2, 5))
    expect(model, one(model, "bias", name), 5, dense__bias=5)
    expect(model, one(model, "module", name), 0, dense__weight=..., dense__bias=...)
    expect(model, one(model, "norm", "*.0.output.LayerNorm/*"), 5, LayerNorm__weight=5, LayerNorm__bias=5)
    expect(model, one(model, "token", "*"), 5, word_embeddings__weight=5)
    flipped = pico("gpt2")
    expect(flipped, one(flipped, "block", "*.0.mlp.c_fc/*", block=(32, 16)), 2 + 1,
           c_fc__weight=(slice(16, 32), slice(32, 64)))
    expect(flipped, one(flipped, "weight", "*.0.mlp.c_fc/*"), 2 * H + 5, c_fc__weight=(5, 2))


def test_a_layer_owns_all_it_holds_and_writes_with_its_outputs():
    model = pico("gpt2")
    site = one(model, "layer", "transformer.h.1/*")
    held = {f"transformer.h.1.{n}" for n, _ in model.transformer.h[1].named_parameters()}
    assert {p.param for p in site.parts} == held
    written = {site.parts[i].param.removeprefix("transformer.h.1.") for i in site.writes}
    assert written == {"attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"}
    part = one(model, "layer", "transformer.h.1/*", at="ffn")
    assert {p.param.removeprefix("transformer.h.1.mlp.") for p in part.parts} == {
        "c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"
    }


def test_torch_s_own_attention_offers_its_packed_matrix_and_no_tap():
    model = pico("siglip")
    site = one(model, "row", "vision_model.head.attention/*")
    assert site.at == "in_proj_weight"
    assert site.tap is None
    expect(model, site, 40, in_proj_weight=40, in_proj_bias=40)
    assert one(model, "row", "vision_model.head.attention.out_proj/*").tap is None
