"""A prefix: keys and values before an attention's own, against the softmax written out."""

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.prefix import Prefix
from neurograft.core.seeds import generator
from neurograft.worlds.pico import pico, pico_batch

NAME = "vit.layers.1.attention"


def prefixed(model, tokens=3):
    keys, values = (torch.randn(tokens, 32, generator=generator(0, "prefix", n)) for n in ("keys", "values"))
    return Prefix(NAME, keys, values)


def test_attention_sees_the_prefix_before_its_own_tokens():
    model = pico("vit").eval()
    attention, prefix = model.get_submodule(NAME), prefixed(model)
    x = torch.randn(2, 5, 32, generator=generator(0, "x"))
    plain = attention(x)[0]
    mounted = prefix.mount(model)
    said, d = attention(x)[0], attention.head_dim
    mounted.remove()
    assert torch.equal(attention(x)[0], plain)
    heads = []
    for h in range(32 // d):
        at = slice(h * d, (h + 1) * d)
        q = attention.q_proj(x)[..., at]
        k, v = (
            torch.cat([own[:, at].expand(2, -1, -1), of(x)[..., at]], 1)
            for own, of in ((prefix.keys, attention.k_proj), (prefix.values, attention.v_proj))
        )
        heads.append((q @ k.mT * d**-0.5).softmax(-1) @ v)
    torch.testing.assert_close(said, attention.o_proj(torch.cat(heads, -1)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(said, plain)


def test_it_ships_in_a_graft_and_comes_off(tmp_path):
    model = pico("vit").eval()
    batch, prefix = pico_batch(model), prefixed(model)
    plain = model(**batch).logits
    Graft.made(model, {}, operations=(prefix,)).save(tmp_path)
    graft = Graft.load(tmp_path)
    with graft.on(model):
        mounted = model(**batch).logits
    assert not torch.equal(mounted, plain)
    assert torch.equal(model(**batch).logits, plain)
    seat = prefix.mount(model)
    assert torch.equal(model(**batch).logits, mounted)
    seat.remove()


def test_what_it_cannot_be_is_refused():
    model = pico("vit")
    prefix, x = prefixed(model), torch.zeros(1, 2, 32)
    cases = {
        "no attention": lambda: Prefix("vit.layers.1.mlp", prefix.keys, prefix.values).mount(model),
        "no such module|no attention": lambda: Prefix("nowhere", prefix.keys, prefix.values).mount(model),
        "as a weight change": lambda: prefix.fold(model),
        "strength of 0.5": lambda: prefix.scaled(0.5),
    }
    for words, ask in cases.items():
        with pytest.raises(RequestError, match=words):
            ask()
    assert prefix.scaled(1.0) is prefix
    assert prefix.clashes(prefixed(model, 1))
    assert not prefix.clashes(Prefix("vit.layers.0.attention", prefix.keys, prefix.values))
    seat = prefix.mount(model)
    with pytest.raises(RequestError, match="attention mask"):
        model.get_submodule(NAME)(x, torch.zeros(1, 1, 2, 2))
    seat.remove()
