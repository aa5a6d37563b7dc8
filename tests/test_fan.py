"""FAN, TAP, ADL and RVT: layers against plain formulas, what is special of the models, published counts, errors."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnzoo  # noqa: F401  registers the names
from attnzoo.backbones import (
    ChannelProcessing,
    RVTAttention,
    TokenAwarePooling,
    attention_diversification_loss,
)
from attnzoo.backbones.fan import checkpoint_filter_fn

PARAMETERS = {
    "fan_tiny_12_p16_224": 7_319_920,
    "fan_small_12_p16_224": 28_345_336,
    "fan_base_18_p16_224": 54_350_320,
    "fan_tiny_8_p4_hybrid": 7_467_240,
    "fan_small_12_p4_hybrid": 26_117_944,
    "fan_base_16_p4_hybrid": 50_475_048,
    "fan_large_16_p4_hybrid": 76_855_140,
    "tap_fan_tiny_12_p16_224": 7_404_688,
    "tap_fan_base_16_p4_hybrid": 50_735_528,
    "tap_rvt_tiny": 8_744_968,
    "tap_rvt_base_plus": 89_396_872,
}
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5}
RVT = {"base_dims": (8, 8), "heads": (1, 2), "depths": (2, 1), "num_classes": 5}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PARAMETERS[name]


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def random(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def test_channel_processing_is_the_definition():
    layer = random(ChannelProcessing(8, 2, 12))
    x = randn(2, 3, 5, 8)
    gates = []
    for b in range(2):
        query, key = layer.q(x[b]).flatten(0, 1), x[b].flatten(0, 1)
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            mean = key[:, part].softmax(0).mean(1)
            gates += [
                (query[:, c].softmax(0) @ mean).sigmoid() * layer.temperature[h, 0, 0] for c in range(4 * h, 4 * h + 4)
            ]
    gate = torch.stack(gates).view(2, 1, 1, 8)
    torch.testing.assert_close(layer(x), gate * layer.norm_v(layer.mlp_v(x)))
    hidden = layer.mlp_v.fc1(x)
    local = layer.mlp_v.dwconv(hidden.flatten(1, 2), 3, 5).unflatten(1, (3, 5))
    want = layer.mlp_v.fc2(hidden + layer.mlp_v.gamma * local)
    torch.testing.assert_close(layer.mlp_v(x), want)
    layer.mlp_v.residual = False
    torch.testing.assert_close(layer.mlp_v(x), layer.mlp_v.fc2(layer.mlp_v.gamma * local))


@pytest.mark.parametrize("scales", [1, 2, 4])
def test_token_aware_pooling_is_the_definition(scales):
    """Dilated 3 x 3 averages that count the zeros outside, on maps that are not square and smaller than the window."""
    layer = random(TokenAwarePooling(6, scales))
    x = randn(2, 3, 7, 6)
    weights = layer.weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.double))
    image = x.permute(0, 3, 1, 2)
    want = weights[..., :1] * x
    for k in range(1, scales):
        kernel = torch.full((6, 1, 3, 3), 1 / 9, dtype=torch.double)
        mean = F.conv2d(image, kernel, padding=k, dilation=k, groups=6)
        want = want + weights[..., k : k + 1] * mean.permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), want)


def softmaxes(batch: int, heads: int, tokens: int, scale: float = 3.0) -> Tensor:
    logits = scale * randn(batch, heads, tokens, tokens)
    logits[..., :2] += 4  # two tokens that all look at
    return logits.softmax(-1)


def test_diversification_loss_is_the_definition():
    maps = [softmaxes(2, 3, 8).requires_grad_(), softmaxes(2, 2, 8).requires_grad_()]
    total = 0.0
    for weights in maps:
        for b in range(2):
            rows = weights[b].mean(0)
            mean = torch.stack([rows[:, k].mean() for k in range(8)])
            mean = mean * (mean > 2 / 8)
            cosines = [F.cosine_similarity(mean, row * (row > 2 / 8), dim=0) for row in rows]
            total = total + torch.stack(cosines).mean() / 2
    want = total / (2 + 1e-6)
    got = attention_diversification_loss(maps)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, maps, retain_graph=True), torch.autograd.grad(want, maps)):
        torch.testing.assert_close(a, b)
    assert got > 0


def test_diversification_loss_of_one_image_is_part_of_the_batchs():
    """The corrected default: a batch's loss is the mean of its images'; the authors' code is 0 at batch size 1."""
    maps = softmaxes(3, 2, 8)
    each = torch.stack([attention_diversification_loss([m[None]]) for m in maps])
    torch.testing.assert_close(each.mean(), attention_diversification_loss([maps]))
    assert (each > 0).all()
    assert attention_diversification_loss([maps[:1]], compat="official") == 0
    assert attention_diversification_loss([maps], compat="official") == attention_diversification_loss([maps])
    even = torch.full((2, 1, 8, 8), 1 / 8, requires_grad=True)
    loss = attention_diversification_loss([even])
    loss.backward()
    assert loss == 0 and not even.grad.any()


@pytest.mark.parametrize("name, small", [("tap_fan_tiny_12_p16_224", SMALL), ("tap_rvt_base_plus", RVT)])
def test_attentions_are_the_models(name, small):
    """The explicit path is the fused one, in float64, with gradients through the weights to the parameters."""
    model = random(timm.create_model(name, **small))
    x = randn(2, 3, 64, 48)
    logits, attentions = model.forward_attentions(x)
    torch.testing.assert_close(logits, model(x))
    blocks = 2 if "fan" in name else 3
    assert len(attentions) == blocks
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.double))
    model.zero_grad()
    attention_diversification_loss(attentions, threshold=0.5).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_two_models_do_not_share_attentions():
    one, two = (random(timm.create_model("tap_rvt_tiny", **RVT)) for _ in range(2))
    x = randn(1, 3, 48, 48)
    _, first = one.forward_attentions(x)
    _, second = two.forward_attentions(x)
    assert len(first) == len(second) == 3 and first[0] is not second[0]


def test_a_masks_table_is_resampled_for_another_grid():
    layer = random(RVTAttention(8, 2, mask_grid=(3, 4)))
    assert torch.equal(layer._mask(3, 4), layer.att_mask)
    larger = layer._mask(6, 8)
    assert larger.shape == (2, 48, 48)
    with torch.no_grad():  # a table that depends on rows only is resampled along rows only
        layer.att_mask.copy_(torch.arange(3.0).repeat_interleave(4).view(1, 12, 1).expand(2, 12, 12))
    rows = layer._mask(6, 8).view(2, 6, 8, 48)
    assert torch.allclose(rows, rows[:, :, :1, :1].expand_as(rows))
    official = RVTAttention(8, 2, mask_grid=(3, 4), compat="official")
    assert torch.equal(official._mask(2, 3), official.att_mask[:, :6, :6])
    with pytest.raises(ValueError, match="at most 12 tokens"):
        official(torch.randn(1, 4, 4, 8))


def test_a_class_token_reads_all_tokens():
    """Every pixel reaches the logits, and `global_pool=""` keeps the tokens with the class token first."""
    model = random(timm.create_model("fan_tiny_12_p16_224", **SMALL))
    x = randn(1, 3, 32, 48).requires_grad_()
    model(x).sum().backward()
    assert (x.grad.abs().amax((0, 1)) > 0).all()
    tokens = model.forward_features(x)
    assert tokens.shape == (1, 1 + 2 * 3, 16)
    model.reset_classifier(5, "")
    assert model(x).shape == (1, 7, 5)


def test_widths_that_change_between_blocks():
    model = random(timm.create_model("fan_tiny_12_p16_224", **{**SMALL, "channel_dims": (16, 24), "num_heads": (2, 3)}))
    assert [m.shape[1:] for m in model.forward_intermediates(randn(1, 3, 64, 64), intermediates_only=True)] == [
        (16, 4, 4),
        (24, 2, 2),
    ]
    assert model(randn(1, 3, 64, 64)).shape == (1, 5)
    maps = timm.create_model(
        "fan_tiny_12_p16_224", features_only=True, out_indices=(0,), **{**SMALL, "channel_dims": (16, 24)}
    )
    assert maps(torch.randn(1, 3, 64, 64))[0].shape == (1, 16, 4, 4)


def test_the_hybrid_stem_pads():
    model = random(timm.create_model("fan_tiny_8_p4_hybrid", **SMALL, hybrid_depths=(1, 1), hybrid_dims=(8, 12)))
    x = randn(1, 3, 40, 50)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 14, 0, 8))))
    norm = model.patch_embed.backbone.stages[1].downsample[0]
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.bias.fill_(0)
    assert torch.allclose(
        norm(randn(1, 8, 3, 3)).var(1, correction=1), torch.ones(1, 3, 3, dtype=torch.double), atol=1e-4
    )


def test_older_checkpoint_names():
    model = timm.create_model("fan_tiny_12_p16_224", **SMALL)
    state = model.state_dict()
    old = {}
    for key, value in state.items():
        if "cls_attn_blocks" in key and ".attn.q." in key:
            parts = [state[key.replace(".q.", f".{name}.")] for name in "qkv"]
            old["module." + key.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not ("cls_attn_blocks" in key and (".attn.k." in key or ".attn.v." in key)):
            old["module." + key.replace("pos_embed.", "pos_embeder.")] = value
    fitted = checkpoint_filter_fn({"state_dict_ema": old}, model)
    assert fitted.keys() == state.keys() and all(torch.equal(fitted[k], state[k]) for k in state)


@pytest.mark.parametrize(
    "name, wrong, said",
    [
        ("fan_tiny_12_p16_224", {"patch_size": 32}, "patch_size must be one of"),
        ("fan_tiny_12_p16_224", {"num_heads": (2, 2)}, "one entry per block"),
        ("fan_tiny_12_p16_224", {"num_heads": 5}, "num_heads must divide"),
        ("fan_tiny_12_p16_224", {"global_pool": "avg"}, "global_pool must be one of 'token'"),
        ("fan_swin_tiny_patch4_window7_224", {"mlp_type": ("FAN",)}, "one entry per stage"),
        ("fan_swin_tiny_patch4_window7_224", {"mlp_type": ("FAN", "FAN", "X", "Mlp")}, "mlp_type must be one of"),
        ("tap_rvt_tiny", {"depths": (1,)}, "one entry per stage"),
        ("tap_rvt_tiny", {"num_scales": 0}, "num_scales must be from 1"),
        ("tap_rvt_tiny", {"compat": "old"}, "compat must be one of"),
    ],
)
def test_mistakes_are_named(name, wrong, said):
    with pytest.raises(ValueError, match=said):
        timm.create_model(name, device="meta", **wrong)


def test_an_image_without_a_token_is_refused():
    model = timm.create_model("tap_rvt_tiny", **RVT).eval()
    assert model(torch.randn(1, 3, 15, 15)).shape == (1, 5)
    with pytest.raises(ValueError, match="at least 15 pixels"):
        model(torch.randn(1, 3, 14, 32))
    with pytest.raises(ValueError, match="at least one layer"):
        attention_diversification_loss([])
