"""MedViTV2: what the authors' reshape does, the KAN against its formula, counts, sizes and bad input."""

from __future__ import annotations

import pytest
import timm
import torch

from attnzoo.backbones import MedViTV2
from attnzoo.backbones.blocks.fasterkan import FasterKAN, FasterKANLayer
from attnzoo.backbones.blocks.medvit import GlobalBlock, LocalBlock, to_map, to_tokens

SMALL = {"stem_chs": (8, 4, 8), "depths": (1, 1, 0, 0), "dims": (8, 36, 36, 36), "head_dim": 4, "num_classes": 5}
COUNTS = {"tiny": 11_719_845, "small": 30_087_295, "base": 66_995_571, "large": 118_291_477}


@pytest.mark.parametrize("size", COUNTS)
def test_published_counts(size):
    model = timm.create_model(f"medvitv2_{size}", device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[size]
    assert model.features[0].compat == "official"  # what the authors' weights are trained with
    assert model.smallest_input() == (97, 97)


def test_official_tokens_are_reinterpreted_memory():
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    official = to_tokens(x, "official")
    assert official.shape == (2, 4, 5, 3)
    assert torch.equal(official[0, 0, 0], x[0, 0, 0, :3])  # three neighbouring pixels of one channel
    assert torch.equal(to_tokens(x, "default")[0, 0, 0], x[0, :, 0, 0])  # one pixel's three channels
    for compat in ("default", "official"):
        assert torch.equal(to_map(to_tokens(x, compat), compat), x)
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)  # the values count, not how they are stored
    assert torch.equal(to_tokens(strided, "official"), official)


def test_the_default_mode_is_local_and_the_official_one_is_not():
    x = torch.randn(1, 8, 16, 16)
    moved = x.clone()
    moved[:, :, 0, 0] += 1
    for compat, local in (("default", True), ("official", False)):
        block = LocalBlock(8, 8, head_dim=4, compat=compat, window=3).eval()
        block.conv = torch.nn.Identity()
        changed = ((block(x) - block(moved)).abs() > 1e-6).any(1)[0]
        assert changed[:2, :2].any() and bool(changed[4:, 4:].any()) != local


def test_kan_is_its_formula_with_gradients():
    layer = FasterKANLayer(3, 4, num_grids=5, denominator=0.5).double()
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    normed = torch.nn.functional.layer_norm(x, (3,))
    want = torch.zeros(7, 4, dtype=torch.float64)
    grid = torch.linspace(-2, 2, 5).double()
    weight = layer.spline_linear.weight.view(4, 3, 5)
    for i in range(3):
        for g in range(5):
            want = want + (1 - ((normed[:, i, None] - grid[g]) / 0.5).tanh() ** 2) * weight[:, i, g]
    got = layer(x)
    assert torch.allclose(got, want, atol=1e-12)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), x, retain_graph=True) for y in (got, want))
    assert torch.allclose(a, b, atol=1e-12)
    assert layer.rbf.grid.grad is None and not layer.rbf.grid.requires_grad
    assert FasterKAN([3, 6, 2])(torch.randn(2, 4, 5, 3)).shape == (2, 4, 5, 2)


def test_unused_parameters_are_just_the_global_convolutions():
    model = MedViTV2(**SMALL)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None and p.requires_grad}
    assert without == model.unused_parameters() and all(name.startswith("features.1.conv.") for name in without)


def test_the_global_attention_pools_runs_of_tokens():
    block = GlobalBlock(8, 36, head_dim=4, sr_ratio=2).eval().double()
    x = torch.randn(1, 32, 6, 5, dtype=torch.float64).flatten(2).transpose(1, 2)
    attn = block.e_mhsa
    pooled = attn.norm(x[:, :28].unflatten(1, (7, 4)).mean(2).transpose(1, 2)).transpose(
        1, 2
    )  # two tokens are left over
    q, k, v = (t.unflatten(-1, (8, 4)).transpose(1, 2) for t in (attn.q(x), attn.k(pooled), attn.v(pooled)))
    want = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(attn(x), attn.proj(want), atol=1e-10)


@pytest.mark.parametrize("compat", ["default", "official"])
def test_all_four_stages(compat):
    model = MedViTV2(**{**SMALL, "depths": (1, 2, 3, 1)}, pad_small=True, compat=compat)
    final, maps = model.eval().forward_intermediates(torch.randn(2, 3, 70, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 18, 13), (36, 9, 7), (36, 5, 4), (36, 3, 2)]
    assert [info["module"] for info in model.feature_info] == [f"features.{i}" for i in (0, 2, 5, 6)]
    assert torch.equal(final, model.norm(maps[-1]))
    assert model.prune_intermediate_layers([1]) == [1] and len(model.features) == 3
    assert len(model.forward_intermediates(torch.ones(1, 3, 70, 50), intermediates_only=True)) == 2


def test_sizes():
    model = MedViTV2(**SMALL).eval()
    assert model.smallest_input() == (25, 25)
    assert model(torch.randn(1, 3, 25, 25)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"stage 0 sees a 6 x 16 map and needs windows of 7 x 7. Use at least 25 x 25"):
        model(torch.randn(1, 3, 24, 64))
    padded = MedViTV2(**SMALL, pad_small=True).eval()
    with pytest.raises(ValueError, match="stage 1 sees a 2 x 2 map and needs at least 16 tokens"):
        padded(torch.randn(1, 3, 16, 16))
    assert padded(torch.randn(1, 3, 24, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"depths": (1, 1, 2, 0)}, "the third a multiple of 3"),
        ({"depths": (0, 0, 0, 0)}, "four stages"),
        ({"dims": (8, 36)}, "dims must have 4 entries"),
        ({"dims": (8, 32, 32, 32)}, "leaves 0 for the convolution"),
        ({"head_dim": 3}, "head_dim must divide"),
        ({"compat": "old"}, "compat must be one of"),
    ],
)
def test_bad_configurations_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        MedViTV2(**{**SMALL, **wrong})


def test_attention_dropout_is_refused():
    with pytest.raises(NotImplementedError, match="attn_drop must be 0"):
        MedViTV2(**SMALL, attn_drop_rate=0.1)


def test_biases_of_another_window_are_resampled():
    from attnzoo.backbones.medvitv2 import checkpoint_filter_fn

    state = MedViTV2(**SMALL).state_dict()
    wide = MedViTV2(**SMALL, kernel_size=9)
    wide.load_state_dict(checkpoint_filter_fn({"model": state}, wide), strict=True)
