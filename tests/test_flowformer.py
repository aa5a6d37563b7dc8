"""Flowformer for vision and flow attention: what is special, beside the model matrix, the goldens and the kernel."""

from __future__ import annotations

import pytest
import timm
import torch
from backbone_families import FAMILIES
from torch import Tensor

from attnzoo.backbones import FlowAttention, Flowformer, FlowSelfAttention
from attnzoo.backbones.flowformer import checkpoint_filter_fn
from attnzoo.errors import UnsupportedError
from attnzoo.kernels.dispatch import use_backend

_ENTRY, _SMALL, _, _ = FAMILIES["flowformer"]


def small(**kwargs) -> Flowformer:
    return timm.create_model(_ENTRY, **{"num_classes": 5, **_SMALL, **kwargs}).eval()


def plain(attn: FlowSelfAttention, x: Tensor) -> Tensor:
    """The vision code's formula (shared/specs/backbones.md, section 10)."""
    e = 1e-6
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = q.sigmoid(), k.sigmoid()
    count = x.shape[1]
    incoming = 1 / (((q + e) * (k.sum(2, keepdim=True) + e)).sum(-1, keepdim=True) + e)
    outgoing = 1 / (((k + e) * (q.sum(2, keepdim=True) + e)).sum(-1, keepdim=True) + e)
    sink = ((q + e) * ((k * outgoing).sum(2, keepdim=True) + e)).sum(-1, keepdim=True) + e
    source = ((k + e) * ((q * incoming).sum(2, keepdim=True) + e)).sum(-1, keepdim=True) + e
    competition = source.clamp(-1, 1).softmax(2) * count
    out = q @ (k.transpose(2, 3) @ (v * competition)) * incoming * sink.sigmoid()
    return attn.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_layer_and_gradients_against_the_formula(backend):
    attn = FlowSelfAttention(12, 3, qkv_bias=True).double()
    x = torch.randn(2, 10, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *attn.parameters()]
    with use_backend(backend):
        got = attn(x)
        grads = torch.autograd.grad(got.square().sum(), inputs)
    want = plain(attn, x)
    torch.testing.assert_close(got, want)
    for got_grad, want_grad in zip(grads, torch.autograd.grad(want.square().sum(), inputs)):
        torch.testing.assert_close(got_grad, want_grad)


def test_a_map_is_its_tokens():
    attn, x = FlowSelfAttention(12, 3), torch.randn(2, 4, 5, 12)
    torch.testing.assert_close(attn(x).flatten(1, 2), attn(x.flatten(1, 2)))


def test_the_general_layer_crosses_and_defaults():
    attn = FlowAttention(8, 12, 3, 10)
    query, other = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    assert attn(query, other).shape == (2, 5, 10)
    assert torch.equal(attn(query), attn(query, query, query))


def test_causal_rows_do_not_see_what_comes_later():
    attn, x = FlowAttention(8, 12, 3, is_causal=True), torch.randn(1, 9, 8)
    changed = x.clone()
    changed[:, 6:] += 1.0
    torch.testing.assert_close(attn(x)[:, :6], attn(changed)[:, :6])
    assert not torch.allclose(attn(x)[:, 6:], attn(changed)[:, 6:])


def test_in_timms_vision_transformer():
    vit = timm.create_model(
        "vit_tiny_patch16_224", attn_layer=FlowSelfAttention, img_size=32, depth=2, num_classes=4, embed_dim=24
    )
    assert isinstance(vit.blocks[0].attn, FlowSelfAttention)
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_sizes():
    model = small()
    with pytest.raises(ValueError, match=r"set_input_size.*dynamic_img_size=True"):
        model(torch.randn(1, 3, 45, 61))
    model.set_input_size((45, 61))
    assert model(torch.randn(1, 3, 45, 61)).shape == (1, 5)
    any_size = small(dynamic_img_size=True)
    assert any_size(torch.randn(1, 3, 45, 61)).shape == (1, 5)
    fixed, x = small(), torch.randn(1, 3, 32, 32)
    any_size.load_state_dict(fixed.state_dict())
    assert torch.equal(any_size(x), fixed(x))
    oblong = small(img_size=(32, 48))
    assert oblong(torch.randn(1, 3, 32, 48)).shape == (1, 5)


def test_equal_numbers_of_tokens_are_not_equal_shapes():
    model = small(img_size=(16, 64))  # 4 x 16 tokens, and 8 x 8 below
    before = model.pos_embed.detach().clone()
    model.set_input_size(32)
    assert model.pos_embed.shape == before.shape and not torch.equal(model.pos_embed, before)


def test_a_published_embedding_is_resampled():
    model, published = small(img_size=48), small(img_size=32)
    state = checkpoint_filter_fn({"model": published.state_dict()}, model)
    model.load_state_dict(state, strict=True)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 5)


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda: small(num_heads=3), ValueError, "num_heads must divide every embed_dim"),
        (lambda: small(depth=()), ValueError, "depth must hold"),
        (lambda: small(mlp_ratio=(2,)), ValueError, "mlp_ratio must have one entry per stage"),
        (lambda: small(img_size=0), ValueError, "img_size"),
        (lambda: small(attn_drop_rate=0.1), UnsupportedError, "attn_drop must be 0.0"),
        (lambda: FlowSelfAttention(8, 2, scale_norm=True), UnsupportedError, "scale_norm must be False"),
        (lambda: FlowSelfAttention(8, 2)(torch.zeros(1, 3, 8), is_causal=True), UnsupportedError, "is_causal"),
        (lambda: FlowAttention(8, 10, 3), ValueError, "num_heads must divide"),
    ],
)
def test_mistakes_are_named(call, error, said):
    with pytest.raises(error, match=said):
        call()
