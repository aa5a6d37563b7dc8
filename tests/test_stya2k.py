"""All-to-key attention beyond its goldens: shapes, remainders, gradients, cost, bad input."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from attnzoo.generators import AllToKeyAttention, StyleTransform


def layer(region: int = 4, **options: int) -> AllToKeyAttention:
    torch.manual_seed(0)
    return AllToKeyAttention(8, region, **{"num_heads": 2, **options}).double()


def test_maps_of_other_shapes_than_square_and_a_remainder_keeps_its_content() -> None:
    module, content, style = layer(), torch.randn(2, 8, 9, 14).double(), torch.randn(2, 8, 5, 21).double()
    out = module(content, style)
    rest = content + module.fusion1.bias[:, None, None] + module.fusion2.bias[:, None, None]
    assert torch.allclose(out[:, :, 8:], rest[:, :, 8:]) and torch.allclose(out[:, :, :, 12:], rest[:, :, :, 12:])
    assert not torch.allclose(out[:, :, :8, :12], rest[:, :, :8, :12])


def test_regions_and_back() -> None:
    module, x = layer(), torch.randn(2, 8, 8, 12).double()
    regions = module._regions(x)
    assert regions.shape == (2, 2, 6, 16, 4)
    assert torch.equal(regions[1, 1, 4, 5], x[1, 4:, 5, 5])  # region (1, 1), pixel (1, 1)
    assert torch.equal(module._map(regions, x.shape[-2:]), x)


@torch.no_grad()
def test_attention_by_its_formula() -> None:
    """Sums over single pixels and regions, written out."""
    module = layer()
    q, k, v = torch.randn(3, 1, 2, 3, 16, 4).double()
    got = module.distributed(q, k, v)
    keys, values = torch.zeros(1, 2, 3, 4).double(), torch.zeros(1, 2, 3, 4).double()
    for head in range(2):
        for region in range(3):
            centre, mean = k[0, head, region].mean(0), v[0, head, region].mean(0)
            near = [torch.sigmoid(module.sim_beta + module.sim_alpha * (centre @ p)) for p in k[0, head, region]]
            keys[0, head, region] = (sum(s * p for s, p in zip(near, k[0, head, region])) + centre) / 17
            values[0, head, region] = (sum(s * p for s, p in zip(near, v[0, head, region])) + mean) / 17
    wanted = torch.einsum("bhrpn,bhnd->bhrpd", torch.einsum("bhrpd,bhnd->bhrpn", q, keys).softmax(-1), values)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    matched = module.matched(q, k)
    assert matched[0, 0, 0] == max(range(3), key=lambda n: float((q[0, 0, 0] * k[0, 0, n]).sum()))
    one = (q[0, 1, 2] @ k[0, 1, matched[0, 1, 2]].T).softmax(-1) @ v[0, 1, matched[0, 1, 2]]
    torch.testing.assert_close(module.progressive(q, k, v)[0, 1, 2], one, rtol=1e-9, atol=1e-9)


def test_gradients() -> None:
    module = layer()
    content, style = (torch.randn(1, 8, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(module, (content, style), fast_mode=True)


def test_transform_joins_two_levels() -> None:
    module = StyleTransform(8)
    fine, coarse = torch.randn(2, 1, 8, 16, 24), torch.randn(2, 1, 8, 8, 12)
    assert module(fine[0], fine[1], coarse[0], coarse[1]).shape == (1, 8, 16, 24)


@pytest.mark.parametrize(
    ("content", "style", "words"),
    [
        ((1, 8, 8, 3), (1, 8, 8, 8), "content must be"),
        ((1, 8, 8, 8), (1, 6, 8, 8), "style must be"),
        ((2, 8, 8, 8), (1, 8, 8, 8), "batch of 2"),
    ],
)
def test_bad_maps_are_named(content: tuple[int, ...], style: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer()(torch.randn(content).double(), torch.randn(style).double())
    with pytest.raises(ValueError, match="num_heads"):
        AllToKeyAttention(9, num_heads=2)
