"""Varied-size window attention: its limits, its definition in float64, sizes, quirks, published counts, bad input."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from backbone_families import FAMILIES
from torch import Tensor, nn

import attnzoo  # noqa: F401  registers the names
from attnzoo.backbones import ViTAEVSA
from attnzoo.backbones.blocks.vsa import VSA, VariedWindows, VSAMixer, window_bias
from attnzoo.backbones.hosts import PVT, Swin
from attnzoo.errors import UnsupportedError


def layer(dim: int = 8, heads: int = 2, window: int = 3, **kwargs) -> VSA:
    torch.manual_seed(0)
    return VSA(dim, heads, window, **kwargs).double()


def still(module: VariedWindows, scale: float = 0.0) -> None:
    """Windows stay in place, `scale` wider than they are."""
    for net in (module.sampling_offsets, module.sampling_scales):
        nn.init.zeros_(net[2].weight)
        nn.init.zeros_(net[2].bias)
    nn.init.constant_(module.sampling_scales[2].bias, scale)


def windows(x: Tensor, window: int) -> Tensor:
    """[B, H, W, heads, d] -> [B, down, across, heads, window ** 2, d]."""
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def formula(module: VSA, x: Tensor) -> Tensor:
    """The module as the paper says it, with F.grid_sample in coordinates of -1 .. 1, one head at a time."""
    (_, H, W, _), ws, heads = x.shape, module.window_size, module.num_heads
    left, right, top, bottom = module.padding((H, W))
    qkv = F.pad(F.conv2d(x.permute(0, 3, 1, 2), module.qkv.weight, module.qkv.bias), (left, right, top, bottom))
    padded = F.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
    height, width = padded.shape[2:]
    offsets = module.sampling_offsets(padded).unflatten(1, (heads, 2))
    scales = module.sampling_scales(padded).unflatten(1, (heads, 2))
    bias, out = window_bias(module.relative_position_bias_table, ws), []
    y, c = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=x.dtype) for n in (height, width)), indexing="ij")
    coordinates = torch.stack([c, y])  # x first
    centres = F.avg_pool2d(coordinates[None], ws)[0].repeat_interleave(ws, 1).repeat_interleave(ws, 2)
    for h in range(heads):
        steps = torch.tensor([max(W // ws, 1), max(H // ws, 1)]).view(1, 2, 1, 1)
        spread = [(t.repeat_interleave(ws, 2).repeat_interleave(ws, 3)) for t in (offsets[:, h] / steps, scales[:, h])]
        grid = centres + (coordinates - centres) * (1 + spread[1]) + spread[0]
        q, k, v = (t.unflatten(1, (heads, -1))[:, h] for t in qkv.chunk(3, 1))
        k, v = (F.grid_sample(t, grid.permute(0, 2, 3, 1), align_corners=True) for t in (k, v))
        q, k, v = (windows(t.permute(0, 2, 3, 1)[:, :, :, None], ws) for t in (q, k, v))
        out.append(((q @ k.mT * module.scale + bias[h]).softmax(-1) @ v)[:, :, :, 0])
    made = torch.stack(out, 3).unflatten(4, (ws, ws))  # [B, down, across, heads, ws, ws, d]
    made = made.permute(0, 3, 6, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    made = made[:, :, top : top + H, left : left + W]
    return F.conv2d(made, module.proj.weight, module.proj.bias).permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(6, 9), (7, 5), (2, 8), (1, 1)])
@pytest.mark.parametrize("pad", ["end", "both"])
def test_is_the_papers_formula_with_gradients(size, pad):
    if size == (1, 1) and pad == "both":
        size = (4, 2)
    module = layer(pad=pad, out_dim=12)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    parameters = [*module.parameters()]
    results = []
    for function in (module, lambda x: formula(module, x)):
        given = x.clone().requires_grad_()
        out = function(given)
        weights = torch.linspace(-1, 1, out.numel()).to(out).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [given, *parameters])])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-9 * want.abs().max().clamp_min(1e-3)


def test_windows_that_stay_in_place_are_plain_window_attention():
    module, x = layer(), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    still(module)
    qkv = F.conv2d(x.permute(0, 3, 1, 2), module.qkv.weight, module.qkv.bias).permute(0, 2, 3, 1)
    q, k, v = (windows(t, 3) for t in qkv.unflatten(-1, (3, 2, 4)).unbind(3))
    bias = window_bias(module.relative_position_bias_table, 3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(2, 2, 3, 2, 9, 9))
    got = module.attend(*qkv.unflatten(-1, (3, 2, 4)).unbind(3), x, 4**-0.5)
    torch.testing.assert_close(windows(got.unflatten(-1, (2, 4)), 3), want)
    positions = module.positions(x)
    torch.testing.assert_close(positions[0, 1, 2, 0, 4], torch.tensor([4.0, 7.0]).double())


def test_wider_windows_and_windows_without_extent():
    module, x = layer(), torch.randn(1, 6, 9, 8, dtype=torch.float64)
    for scale, spread in ((1.0, 4.0), (-1.0, 0.0)):
        still(module, scale)
        at = module.positions(x)
        torch.testing.assert_close(at.amax(4) - at.amin(4), torch.full_like(at[..., 0, :], spread))


def test_padding_is_zero_tokens_without_bias():
    """Tokens beyond the map add their bias' mass to the softmax and no value."""
    module = layer(window=4)
    still(module)
    x = torch.randn(1, 4, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        module.relative_position_bias_table.zero_()
        module.qkv.weight[:16].zero_()
        module.qkv.bias[:16].zero_()
        module.proj.weight.copy_(torch.eye(8)[..., None, None])
        module.proj.bias.zero_()
        value = F.conv2d(x.permute(0, 3, 1, 2), module.qkv.weight[16:], module.qkv.bias[16:])
        torch.testing.assert_close(module(x)[0, 2, 1], value.sum((0, 2, 3)) / 16)


def test_official_quirks():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 12, 8, dtype=torch.float64)
    for pad in ("end", "both"):
        corrected, official = layer(pad=pad), layer(pad=pad, compat="official")
        same = torch.equal(corrected(x), official(x))
        assert same == (pad == "end")
        torch.testing.assert_close(corrected(x[:, :, :6]), official(x[:, :, :6]))
        with pytest.raises(ValueError, match=r"map of 2 x 6, smaller than window_size 3"):
            official(x[:, :2, :6])
        assert corrected(x[:, :2, :6]).isfinite().all()
    config = {**FAMILIES["vitae_vsa"][1], "dims": 8, "stem_dims": 8, "depths": (1, 2, 3), "num_heads": 2}
    config |= {"reduction_heads": 2, "strides": 2, "kernel_size": 3, "dilations": (1,), "groups": 1}
    config |= {"reduction_groups": 1, "drop_path_rate": 0.5}
    rates = {}
    for compat in ("corrected", "official"):
        model = ViTAEVSA(**config, compat=compat)
        rates[compat] = [round(getattr(c.drop_path, "drop_prob", 0.0), 3) for stage in model.layers for c in stage.NC]
    assert rates == {"corrected": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], "official": [0.0, 0.1, 0.2, 0.2, 0.3, 0.4]}


def test_published_counts(goldens_root):
    entries = json.loads((goldens_root / "backbones/vsa/official_keys.json").read_text())
    for entry in entries:
        model = timm.create_model(entry["entrypoint"], device="meta")
        assert sum(p.numel() for p in model.parameters()) == entry["params"], entry["entrypoint"]


def test_checkpoints_of_other_windows_are_resampled():
    from attnzoo.backbones import vitae_vsa, vsa_swin

    for name, module in (("vitae_vsa", vitae_vsa), ("vsa_swin", vsa_swin)):
        entry, small, size, _ = FAMILIES[name]
        model = timm.create_model(entry, **small)
        other = timm.create_model(entry, **{**small, "window_size": 5})
        other.load_state_dict(module.checkpoint_filter_fn(model.state_dict(), other), strict=True)
        tables = [m.relative_position_bias_table for m in other.modules() if isinstance(m, VariedWindows)]
        assert tables and all(t.shape[0] == 81 for t in tables)
        assert other(torch.randn(1, 3, *size)).isfinite().all()


def test_swin_blocks_span_the_map_and_never_shift():
    entry, small, _, _ = FAMILIES["vsa_swin"]
    model = timm.create_model(entry, **{**small, "attn_type": None, "cpe": False}).eval()
    seen = []
    for block in (b for stage in model.stages for b in stage.blocks):
        assert isinstance(block.attn.mixer, VSAMixer)
        block.attn.mixer.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[3]))
    model(torch.randn(1, 3, 45, 61))
    assert seen == [(12, 16)] * 2 + [(6, 8)] * 2
    model.set_input_size((64, 96))
    assert model(torch.randn(1, 3, 64, 96)).isfinite().all()
    with pytest.raises(ValueError, match="window_size must stay 3"):
        model.set_input_size(64, window_size=4)


def test_is_a_mixer_of_every_host():
    sizes = {"A": (1, 1), "B": (1, 1)}
    mixers = {"A": "vsa", "B": "softmax"}
    model = PVT(32, depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), mlp_ratios=(2, 2), num_classes=3,
                attn_type="AB", mixers=mixers, sr_ratios=sizes)  # fmt: skip
    assert model(torch.randn(1, 3, 40, 48)).shape == (1, 3)
    assert isinstance(Swin(32, depths=(1,), num_heads=(3,), attn_type="A", mixers=mixers), nn.Module)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window_size": 0}, "window_size"),
        ({"num_heads": 3}, "num_heads must divide"),
        ({"pad": "left"}, "pad must be one of"),
        ({"compat": "old"}, "compat must be one of"),
        ({"strides": 3}, "strides must be one of 2, 4, 8"),
        ({"reduction_op": "max"}, "reduction_op must be one of"),
        ({"kernel_size": 1}, "kernel_size must be at least"),
        ({"groups": (1, 2, 3)}, r"groups must be one value or one per stage \(2\)"),
        ({"groups": 5}, "groups must divide"),
        ({"depths": (1, 0)}, "depths"),
        ({"drop_path_rate": 2.0}, "drop_path_rate"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        ViTAEVSA(**{**FAMILIES["vitae_vsa"][1], **change})


def test_attention_dropout_is_refused():
    with pytest.raises(UnsupportedError, match="attn_drop"):
        ViTAEVSA(**FAMILIES["vitae_vsa"][1], attn_drop_rate=0.1)
