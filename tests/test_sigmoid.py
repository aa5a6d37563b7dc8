"""Sigmoid attention: the formula, its limits, bounded memory in both passes, timm's VisionTransformer."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.backbones import (
    RootMeanSquareNorm,
    SigmoidAttention,
    SigmoidCrossAttention,
    as_attn_layer,
    sigmoid_attention,
    sigmoid_block,
)
from attnzoo.backbones.blocks.sigmoid import alibi_slopes, rotate_pairs
from attnzoo.errors import UnsupportedError


def inputs(count: int = 11, keys: int = 13, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value [2, N, 3, D], values wider."""
    shapes = ((2, count, 3, 4), (2, keys, 3, 4), (2, keys, 3, 6))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def plain(query, key, value, bias, temperature=0.0, slopes=None, mask=None) -> Tensor:
    logits = torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
    if slopes is not None:
        distance = torch.arange(key.shape[1])[None, :] - torch.arange(query.shape[1])[:, None]
        logits = logits + slopes[:, None, None] * distance
    logits = logits * math.exp(temperature) + bias
    if mask is not None:
        logits = torch.where(mask, logits, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", logits.sigmoid(), value)


@pytest.mark.parametrize("max_weights", [2**22, 200, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_in_chunks(max_weights, masked):
    tensors = inputs()
    bias = torch.tensor([-2.5], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, 11, 13) > 0.4 if masked else None
    slopes = torch.tensor(alibi_slopes(3), dtype=torch.float64)
    options = {"temperature": 0.3, "slopes": slopes, "mask": mask}
    got = sigmoid_attention(*tensors, bias, max_weights=max_weights, **options)
    want = plain(*tensors, bias, **options)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * weight).sum(), [*tensors, bias])
    for one, other in zip(got_grads, torch.autograd.grad((want * weight).sum(), [*tensors, bias])):
        torch.testing.assert_close(one, other)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_more_weights_than_allowed_exist_in_either_pass():
    query, key, value = (torch.randn(1, 96, 2, 4, requires_grad=True) for _ in range(3))
    with Largest() as seen:
        sigmoid_attention(query, key, value, -4.0, max_weights=1000).sum().backward()
    assert seen.elements <= 1000 < 96 * 96
    kept: dict[int, int] = {}  # by storage: every chunk holds on to the same keys and values

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = sigmoid_attention(query, key, value, -4.0, max_weights=1000)
    assert sum(kept.values()) < 96 * 96, "the chunks' weights must not be kept for the backward pass"
    out.sum().backward()


def test_limits():
    query, key, value = inputs(dtype=torch.float64)
    even = sigmoid_attention(query * 0, key, value, math.log(1 / 12))  # sigmoid(log(1 / (n - 1))) = 1 / n
    torch.testing.assert_close(even, value.mean(1, keepdim=True).expand_as(even))
    assert sigmoid_attention(query, key, value, -torch.inf).abs().max() == 0
    hidden = torch.zeros(11, 13, dtype=torch.bool)
    out = sigmoid_attention(query, key, value, 0.0, mask=hidden)
    out.sum().backward()
    assert out.abs().max() == 0 and query.grad.abs().max() == 0  # and no NaN


def test_causal_is_its_mask():
    query, key, value = inputs(13)
    mask = torch.ones(13, 13, dtype=torch.bool).tril()
    for chunk in (2**22, 100):
        got = sigmoid_attention(query, key, value, -2.0, is_causal=True, max_weights=chunk)
        torch.testing.assert_close(got, sigmoid_attention(query, key, value, -2.0, mask=mask))


def test_slopes_and_rotation():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]
    x = torch.randn(1, 9, 2, 8, dtype=torch.float64)
    turned = rotate_pairs(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    same = rotate_pairs(x[:, :1].expand(-1, 9, -1, -1))  # products depend on the distance alone
    products = torch.einsum("bihd,bjhd->bhij", same, same)
    torch.testing.assert_close(products[..., 0, 2], products[..., 5, 7])
    with pytest.raises(ValueError, match="head_dim must be even"):
        rotate_pairs(torch.zeros(1, 2, 1, 5))


def test_bfloat16_keeps_the_constants_digits():
    tensors = [t.detach().bfloat16() for t in inputs(count=64, keys=577)]
    bias = torch.tensor([-math.log(577)])
    got = sigmoid_attention(*tensors, bias)
    want = plain(*(t.double() for t in tensors), bias.double())
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() <= 0.01 * want.norm()


def test_weights_that_are_looked_at_are_those_that_are_used():
    attn = SigmoidAttention(12, 3, qkv_bias=True, qk_norm=True, attn_bias=-2.0, positions="rope", max_weights=50)
    x = torch.randn(2, 7, 12)
    value = attn._project(x)[2]
    out = torch.einsum("bhij,bjhd->bihd", attn.attention_weights(x), value).flatten(2)
    torch.testing.assert_close(attn(x), attn.proj(out))


def test_cross_attention_of_another_width():
    attn = SigmoidCrossAttention(12, 20, 3, attn_bias=-1.9)
    assert attn(torch.randn(2, 5, 12), torch.randn(2, 7, 20)).shape == (2, 5, 12)


def test_dropout_only_while_training():
    attn, x = SigmoidAttention(12, 3, attn_drop=0.5, attn_bias=-2.0, max_weights=60), torch.randn(2, 7, 12)
    assert not torch.equal(attn(x), attn(x))
    assert torch.equal(attn.eval()(x), attn(x))
    attn.train()
    x = torch.randn(1, 7, 12, requires_grad=True)
    torch.manual_seed(3)
    attn(x).sum().backward()  # a recomputed chunk draws the same numbers
    got = x.grad.clone()
    torch.manual_seed(3)
    eps, direction = 1e-2, torch.randn_like(x)
    values = []
    for sign in (1, -1):
        torch.manual_seed(3)
        values.append(attn((x + sign * eps * direction).detach()).sum())
    assert abs((values[0] - values[1]) / (2 * eps) - (got * direction).sum()) < 2e-2 * (
        1 + (got * direction).sum().abs()
    )


def test_the_norm_and_its_published_quirk():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    norm, official = (RootMeanSquareNorm(8, compat=c).double() for c in (None, "official"))
    torch.testing.assert_close(norm(x), x / x.square().mean(-1, keepdim=True).sqrt(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))
    assert not torch.allclose(official(x)[:1], official(x[:1]))  # it depends on the batch
    with pytest.raises(ValueError, match="compat must be one of"):
        RootMeanSquareNorm(8, compat="authors")


def test_block():
    block = sigmoid_block(12, 3, attn_bias=-2.2, mlp_hidden=25, mlp_bias=False, init_values=1e-4, drop_path=0.1)
    assert block.mlp.fc1.bias is None and block.mlp.fc2.bias is None and block.mlp.fc1.out_features == 25
    assert isinstance(block.norm1, nn.LayerNorm) and block.norm1.eps == 1e-5
    assert block(torch.randn(2, 9, 12)).shape == (2, 9, 12)


def vit() -> nn.Module:
    layer = as_attn_layer(SigmoidAttention, attn_bias=-math.log(17), max_weights=1000)  # two chunks
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", attn_layer=layer, qk_norm=True, **options)


def test_in_timms_vision_transformer():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    assert isinstance(model.blocks[0].attn, SigmoidAttention)
    model(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()  # chunks recomputed inside recomputed blocks
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).shape == (2, 4)
    assert "blocks.0.attn.attn_bias" in model.state_dict()


@pytest.mark.slow
def test_compiles():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda q, k, v: sigmoid_attention(q, k[:1], v, 0.0), ValueError, "query, key and value must be"),
        (lambda q, k, v: sigmoid_attention(q[:, :, :2], k, v, 0.0), ValueError, "share batch and heads"),
        (lambda q, k, v: sigmoid_attention(q[0], k, v, 0.0), ValueError, "query must have 4 dimensions"),
        (lambda q, k, v: sigmoid_attention(q, k, v, 0.0, mask=torch.ones(11, 13)), TypeError, "mask must be one of"),
        (lambda q, k, v: sigmoid_attention(q, k, v, 0.0, mask=torch.ones(3, 13) > 0), ValueError, "broadcast"),
        (lambda q, k, v: sigmoid_attention(q, k, v, 0.0, max_weights=0), ValueError, "max_weights"),
        (lambda q, k, v: SigmoidAttention(12, 5, attn_bias=0.0), ValueError, "num_heads must divide"),
        (lambda q, k, v: SigmoidAttention(12, 3), TypeError, "attn_bias"),
        (lambda q, k, v: SigmoidAttention(12, 3, attn_bias=0.0, positions="sin"), ValueError, "positions must be"),
        (lambda q, k, v: SigmoidAttention(12, 3, attn_bias=0.0, scale_norm=True), UnsupportedError, "scale_norm"),
    ],
)
def test_mistakes_are_named(call, error, said):
    with pytest.raises(error, match=said):
        call(*inputs())
