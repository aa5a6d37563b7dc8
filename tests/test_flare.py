"""FLARE: the formula, padding, shapes, timm's VisionTransformer."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from attnzoo.backbones import FlareAttention, FlareBlock, FlareModel, as_attn_layer
from attnzoo.backbones.blocks.flare import ResidualMLP
from attnzoo.errors import UnsupportedError
from attnzoo.kernels.dispatch import use_backend


def plain(attn: FlareAttention, x: Tensor) -> Tensor:
    """Both softmaxes with their matrices."""
    key, value = (p(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for p in (attn.k_proj, attn.v_proj))
    latents = attn.latent_q.reshape(attn.num_heads, attn.num_latents, attn.head_dim)
    latents, key = attn.q_norm(latents), attn.k_norm(key)
    logits = attn.attn_scale * latents @ key.transpose(2, 3)
    out = logits.transpose(2, 3).softmax(-1) @ (logits.softmax(-1) @ value)
    return attn.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_layer_and_gradients_against_the_formula(backend, qk_norm):
    attn = FlareAttention(12, 3, num_latents=5, qk_norm=qk_norm, attn_scale=0.5, num_layers_k_proj=1).double()
    x = torch.randn(2, 13, 12, dtype=torch.float64, requires_grad=True)
    wanted = [x, *attn.parameters()]
    with use_backend(backend):
        got = attn(x)
        grads = torch.autograd.grad(got.square().sum(), wanted)
    want = plain(attn, x)
    torch.testing.assert_close(got, want)
    for one, other in zip(grads, torch.autograd.grad(want.square().sum(), wanted)):
        torch.testing.assert_close(one, other)


def test_order_of_points_does_not_matter_and_a_grid_is_its_points():
    attn, x = FlareAttention(16, 2, num_latents=4), torch.randn(2, 12, 16)
    order = torch.randperm(12)
    torch.testing.assert_close(attn(x[:, order]), attn(x)[:, order])
    torch.testing.assert_close(attn(x.unflatten(1, (3, 4))).flatten(1, 2), attn(x))


def test_padding_changes_nothing():
    model = FlareModel(3, 2, 16, 2, 2, attn_options={"num_latents": 4}).eval()
    x = torch.randn(2, 10, 3)
    padded = torch.cat([x, 9.0 * torch.randn(2, 3, 3)], 1)
    key_mask = torch.arange(13)[None] < 10
    torch.testing.assert_close(model(padded, key_mask)[:, :10], model(x), rtol=1e-5, atol=1e-6)


def test_residuals_of_the_mlps():
    x = torch.randn(4, 6)
    linear = ResidualMLP(6, 6, 6, -1, input_residual=True, output_residual=True)
    assert list(linear.state_dict()) == ["fc.weight", "fc.bias"]
    torch.testing.assert_close(linear(x), x + linear.fc(x))
    wider = ResidualMLP(6, 8, 6, 0, input_residual=True, output_residual=True)  # no width to add at either end
    torch.testing.assert_close(wider(x), wider.fc2(nn.functional.gelu(wider.fc1(x), approximate="tanh")))


def test_heads_default_to_an_eighth_of_the_channels():
    assert FlareModel(3, 2, 32, 1).blocks[0].att.num_heads == 4
    assert FlareBlock(16, 2, norm_layer=nn.RMSNorm, act="silu")(torch.randn(1, 7, 16)).shape == (1, 7, 16)


def vit() -> nn.Module:
    layer = as_attn_layer(FlareAttention, num_latents=6, num_layers_k_proj=0, num_layers_v_proj=0)
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", attn_layer=layer, **options)


def test_in_timms_vision_transformer():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    assert isinstance(model.blocks[0].attn, FlareAttention)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    assert (low.float() - model(x)).norm() <= 0.1 * model(x).norm()


@pytest.mark.slow
def test_compiles():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda: FlareAttention(12, 5), ValueError, "num_heads must divide"),
        (lambda: FlareAttention(12, 3, attn_scale=0.0), ValueError, "attn_scale must be above 0"),
        (lambda: FlareAttention(12, 3, num_latents=0), ValueError, "num_latents"),
        (lambda: FlareAttention(12, 3, act="relu"), ValueError, "act must be one of"),
        (lambda: FlareAttention(12, 3, num_layers_k_proj=-2), ValueError, "num_layers"),
        (lambda: FlareAttention(12, 3, attn_drop=0.1), UnsupportedError, "attn_drop"),
        (lambda: FlareAttention(12, 3)(torch.zeros(1, 2, 12), is_causal=True), UnsupportedError, "is_causal"),
    ],
)
def test_mistakes_are_named(call, error, said):
    with pytest.raises(error, match=said):
        call()
