"""TransNeXt: its layers against the plain formula, its sizes, its errors."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import attnzoo  # noqa: F401  registers the names
from attnzoo.backbones import AggregatedAttention, CosineAttention
from attnzoo.backbones.blocks.aggregated import relative_log_coordinates

PARAMETERS = {
    "transnext_micro": 12_809_304,
    "transnext_tiny": 28_258_960,
    "transnext_small": 49_741_564,
    "transnext_base": 89_721_496,
    "transnext_micro_AAAA": 13_114_008,
    "transnext_small_384": 49_741_564,
    "transnext_base_384": 89_721_496,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert name in model.pretrained_cfg["architecture"] and model.pretrained_cfg["url"].endswith(".pth")


def random(layer: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer.double()


def plain(layer: AggregatedAttention, x: Tensor) -> Tensor:
    """The definition, one query and head at a time."""
    height, width = x.shape[1:3]
    heads, dim, side = layer.num_heads, layer.head_dim, layer.window_size
    pooled = F.adaptive_avg_pool2d(F.gelu(layer.sr(x.permute(0, 3, 1, 2))), layer.pooled_size(height, width))
    pooled = layer.norm(pooled.permute(0, 2, 3, 1))
    far = layer.kv(pooled).flatten(1, 2).unflatten(-1, (2, heads, dim))
    near = layer.kv(x).unflatten(-1, (2, heads, dim))
    query = layer.q(x).unflatten(-1, (heads, dim))
    unit = layer.pretrain_size or (height, width)

    def coordinate(query: float, key: float, axis: int) -> float:
        r = 8 * (query - key) / (unit[axis] - 1)
        return math.copysign(math.log2(1 + abs(r)) / math.log2(8), r)

    centres = [
        F.adaptive_avg_pool1d(torch.arange(n, dtype=torch.double)[None], k)[0].tolist()
        for n, k in zip((height, width), pooled.shape[1:3])
    ]
    outputs = []
    for b in range(len(x)):
        for i in range(height):
            for j in range(width):
                for h in range(heads):
                    q = F.normalize(query[b, i, j, h], dim=-1)
                    learned = q @ layer.learnable_tokens[h] + layer.learnable_bias[h, 0]
                    keys, values, bias, extra = [], [], [], []
                    for slot in range(side * side):
                        y, z = i + slot // side - side // 2, j + slot % side - side // 2
                        if 0 <= y < height and 0 <= z < width:
                            keys.append(near[b, y, z, 0, h])
                            values.append(near[b, y, z, 1, h])
                            bias.append(layer.relative_pos_bias_local[h, slot])
                            extra.append(learned[slot])
                    for index, (y, z) in enumerate((y, z) for y in centres[0] for z in centres[1]):
                        keys.append(far[b, index, 0, h])
                        values.append(far[b, index, 1, h])
                        place = torch.tensor([coordinate(i, y, 0), coordinate(j, z, 1)], dtype=torch.double)
                        bias.append(layer.cpb_fc2(F.relu(layer.cpb_fc1(place)))[h])
                        extra.append(torch.zeros((), dtype=torch.double))
                    scaled = (q + layer.query_embedding[h, 0]) * F.softplus(layer.temperature[h]) * math.log(len(keys))
                    logits = F.normalize(torch.stack(keys), dim=-1) @ scaled[0] + torch.stack(bias)
                    outputs.append((logits.softmax(0) + torch.stack(extra)) @ torch.stack(values))
    return layer.proj(torch.stack(outputs).view(len(x), height, width, heads * dim))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "size, window, sr_ratio, pretrain, fixed",
    [((5, 7), 3, 2, None, None), ((3, 4), 5, 8, (6, 9), None), ((6, 4), 3, 2, (5, 3), 3)],
)
def test_aggregated_is_the_definition(fused, size, window, sr_ratio, pretrain, fixed):
    """Forward and every gradient, by shifts and by the kernel, at uneven and tiny maps."""
    layer = random(AggregatedAttention(8, 2, window, sr_ratio, pretrain_size=pretrain, fixed_pool_size=fixed))
    layer.fused = fused
    x = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double, requires_grad=True)
    weight = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    tensors = [x, *layer.parameters()]
    want, got = plain(layer, x), layer(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad((want * weight).sum(), tensors)
    for grad, expected in zip(torch.autograd.grad((got * weight).sum(), tensors), wanted):
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pretrain", [None, (9, 3)])
def test_cosine_attention_is_the_definition(pretrain):
    layer = random(CosineAttention(8, 2, pretrain_size=pretrain))
    x = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    query, key, value = layer.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    place = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    r = 8 * (place[:, None] - place) / (torch.tensor(pretrain or (4, 5)) - 1).double()
    bias = layer.cpb_fc2(F.relu(layer.cpb_fc1(r.sign() * (r.abs() + 1).log2() / 3))).permute(2, 0, 1)
    logits = ((query + layer.query_embedding) * F.softplus(layer.temperature) * math.log(20)) @ key.mT + bias
    want = layer.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2).unflatten(1, (4, 5)))
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
def test_half_types(fused):
    layer = AggregatedAttention(16, 2).eval()
    layer.fused = fused
    x = torch.randn(1, 9, 10, 16)
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert (got.float() - want).norm() <= 0.05 * want.norm()
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_relative_coordinates_are_those_of_the_pairs():
    table, index = relative_log_coordinates((7, 10), (3, 4), (9, 5), dtype=torch.double)
    keys = [F.adaptive_avg_pool1d(torch.arange(n, dtype=torch.double)[None], k)[0] for n, k in ((7, 3), (10, 4))]
    rows = (torch.arange(7)[:, None] - keys[0]) / 8 * 8
    columns = (torch.arange(10)[:, None] - keys[1]) / 4 * 8
    r = torch.stack([rows[:, None, :, None].expand(7, 10, 3, 4), columns[None, :, None].expand(7, 10, 3, 4)], -1)
    want = r.sign() * (r.abs() + 1).log2() / 3
    torch.testing.assert_close(table[index], want.reshape(70, 12, 2))


def test_the_image_size_is_only_the_unit_of_positions():
    """A model for 224 used at 384 computes what the 384 entry point does: one set of weights, any size."""
    small = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 1, 1), "num_classes": 3}
    model = timm.create_model("transnext_small", **small).eval()
    larger = timm.create_model("transnext_small_384", **small).eval()
    larger.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 64)
    assert torch.equal(model(x), larger(x))
    other = timm.create_model("transnext_small", pretrain_size=384, **small).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x), other(x))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"img_size": 32}, "pretrain_size must be at least 64"),
        ({"pretrain_size": (224, 63)}, "pretrain_size must be at least 64"),
        ({"window_size": (3, 3, 4, None)}, "window_size must be odd"),
        ({"window_size": (3, None, 3, None)}, r"window_size\[1\]"),
        ({"depths": (1, 1, 1)}, "one entry per stage"),
        ({"num_heads": (5, 4, 8, 16)}, "num_heads must divide"),
    ],
)
def test_mistakes_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        timm.create_model("transnext_micro", device="meta", **wrong)


def test_a_map_of_one_row_without_a_unit_is_refused():
    with pytest.raises(ValueError, match="pretrain_size must be at least 2 x 2"):
        CosineAttention(8, 2)(torch.randn(1, 1, 4, 8))
