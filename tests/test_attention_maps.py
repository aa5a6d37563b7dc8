"""Attention maps and their rollout: against plain formulas in float64, properties of rows, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attnzoo.backbones import attention_maps, attention_rollout, rollout
from attnzoo.errors import UnsupportedError

VIT = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
NAT = {
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "kernel_size": 3,
    "dilations": ((1, 2), (1, 1)),
    "num_classes": 5,
}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "img_size": (48, 32), "num_classes": 5}
ISO = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 40, "patch_size": 8, "num_classes": 5}

# name: (entry point, arguments, image size)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("deit_tiny_patch16_224", VIT, (32, 48)),
    "qk_norm": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}, (32, 48)),
    "dinat": ("dinat_mini", NAT, (45, 61)),
    "isotropic": ("nat_isotropic_small", {**ISO, "kernel_size": 3}, (40, 40)),
    "vitrpb": ("vitrpb_small", ISO, (40, 40)),
    "agent_deit": ("agent_deit_tiny", {**VIT, "agent_num": (4, 4, 4, 4)}, (32, 48)),
    "agent_swin": ("agent_swin_tiny", {**SWIN, "agent_num": (4, 9), "attn_type": "AB", "window_size": 12}, (48, 32)),
    # windows of 4 x 4 in a map of 16 x 8, every other block's shifted
    "windows": (
        "agent_swin_tiny",
        {**SWIN, "img_size": (64, 32), "agent_num": (4, 4), "attn_type": "AA", "window_size": 4},
        (64, 32),
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    entry, kwargs, size = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(entry, **kwargs).double().eval()
    with torch.no_grad():  # so that attention is far from even
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, torch.randn(3, *size, dtype=torch.float64)


def heads_of(model: nn.Module, image: Tensor, path: str) -> tuple[nn.Module, Tensor]:
    """A layer and what it is called with, by a hook of the test's own."""
    layer, seen = model.get_submodule(path), []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(image[None])
    handle.remove()
    return layer, seen[0]


# -- per-head maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "qk_norm"])
def test_a_vits_map_is_the_softmax_of_its_products(name: str) -> None:
    model, image = build(name)
    layer, x = heads_of(model, image, "blocks.1.attn")
    found = attention_maps(model, image, 1)
    query, key, _ = layer.qkv(x)[0].chunk(3, -1)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        q, k = layer.q_norm(query[:, part]), layer.k_norm(key[:, part])
        torch.testing.assert_close(found.weights[head], torch.softmax(q @ k.T * 8**-0.5, -1))
    assert (found.query_grid, found.key_grid, found.num_prefix) == ((4, 6), (4, 6), 1)


def test_a_dinats_map_is_the_softmax_over_each_window() -> None:
    model, image = build("dinat")
    layer, x = heads_of(model, image, "levels.0.blocks.1.attn")
    height, width = x.shape[1:3]
    query, key, _ = layer.qkv(x)[0].unflatten(-1, (3, 2, 8)).unbind(2)
    wanted = torch.zeros(2, height, width, height, width, dtype=torch.float64)

    def window(at: int, size: int) -> tuple[list[int], int]:
        """Keys of one axis (dilation 2, 3 wide), and the query's place among its group."""
        group = list(range(at % 2, size, 2))
        start = min(max(at // 2 - 1, 0), len(group) - 3)
        return group[start : start + 3], at // 2

    for row in range(height):
        for column in range(width):
            (rows, y), (columns, z) = window(row, height), window(column, width)
            for head in range(2):
                logits = torch.stack(
                    [
                        torch.stack(
                            [
                                query[row, column, head] @ key[r, c, head] * 8**-0.5
                                + layer.rpb[head, r // 2 - y + 2, c // 2 - z + 2]
                                for c in columns
                            ]
                        )
                        for r in rows
                    ]
                )
                weights = torch.softmax(logits.flatten(), 0).view(3, 3).detach()
                wanted[head, row, column][torch.tensor(rows)[:, None], torch.tensor(columns)] = weights
    found = attention_maps(model, image, 1)
    torch.testing.assert_close(found.weights, wanted.flatten(3).flatten(1, 2))
    torch.testing.assert_close(found.from_token(3, 4), wanted[:, 3, 4])


def test_an_agents_map_is_the_product_of_two_softmaxes() -> None:
    model, image = build("agent_deit")
    layer, x = heads_of(model, image, "blocks.2.attn")
    query, key, _ = layer.qkv(x)[0].chunk(3, -1)
    # 2 x 2 agents of a 4 x 6 map: means of 2 x 3 queries
    agents = query[1:].unflatten(0, (4, 6)).unflatten(0, (2, 2)).unflatten(2, (2, 3)).mean((1, 3)).flatten(0, 1)
    found = attention_maps(model, image)
    mixer = layer.mixer
    into, out_of = mixer.agent_bias()[0].expand(2, -1, -1), mixer.query_bias()[0].expand(2, -1, -1)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        q, k, a = (t[:, part] for t in (query, key, agents))
        collected = torch.softmax(a @ k.T * 8**-0.5 + into[head], -1)
        read = torch.softmax(q @ a.T * 8**-0.5 + out_of[head], -1)
        torch.testing.assert_close(found.weights[head], (read @ collected).detach())
        torch.testing.assert_close(attention_maps(model, image, head=head).weights[0], found.weights[head])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_rows_sum_to_one_and_make_the_layers_output(name: str, layer: int) -> None:
    model, image = build(name)
    found = attention_maps(model, image, layer)
    assert (found.weights >= 0).all()
    torch.testing.assert_close(found.weights.sum(-1), torch.ones_like(found.weights[..., 0]))
    # with the layer's own values and projection they give what the layer gave, local convolutions left out
    modules = [m for n, m in model.named_modules() if n.endswith(".attn")]
    module, seen = modules[layer], []
    if getattr(getattr(module, "mixer", None), "dwc", None) is not None:
        with torch.no_grad():
            module.mixer.dwc.weight.zero_()
            module.mixer.dwc.bias.zero_()
        found = attention_maps(model, image, layer)
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(image[None])
        handle.remove()
        x, out = seen[0]
        value = module.qkv(x[0]).flatten(0, -2).chunk(3, -1)[2]
        heads = len(found.weights)
        mixed = found.weights @ value.unflatten(-1, (heads, -1)).transpose(0, 1)
        torch.testing.assert_close(module.proj(mixed.transpose(0, 1).flatten(1)), out[0].flatten(0, -2))


def test_maps_read_by_place() -> None:
    model, image = build("vit")
    found = attention_maps(model, image)
    torch.testing.assert_close(found.from_prefix(), found.weights[:, 0, 1:].unflatten(1, (4, 6)))
    torch.testing.assert_close(found.from_token(1, 2), found.weights[:, 1 + 8, 1:].unflatten(1, (4, 6)))
    torch.testing.assert_close(found.mean(), found.weights[:, 1:, 1:].mean(1).unflatten(1, (4, 6)))
    with pytest.raises(ValueError, match="row"):
        found.from_token(4, 0)
    model, image = build("dinat")
    with pytest.raises(ValueError, match="prefix"):
        attention_maps(model, image).from_prefix()


# -- rollout -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_rollout_of_rows_that_sum_to_one(tokens: int, layers: int, residual: float, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    matrices = [torch.rand(tokens, tokens, dtype=torch.float64, generator=made).softmax(-1) for _ in range(layers)]
    whole = rollout(matrices, residual)
    torch.testing.assert_close(whole.sum(-1), torch.ones(tokens, dtype=torch.float64))
    eye = torch.eye(tokens, dtype=torch.float64)
    assert torch.equal(rollout([eye] * layers, residual=0.5), eye)
    torch.testing.assert_close(rollout(matrices, 1.0), eye)
    power = eye
    for matrix in matrices:  # the last layer's rows lead to the first layer's columns
        power = (residual * eye + (1 - residual) * matrix) @ power
    torch.testing.assert_close(whole, power)


def test_rollout_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        rollout([])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_of_a_model_is_the_product_of_its_layers(name: str, fusion: str) -> None:
    model, image = build(name)
    made = attention_rollout(model, image, 0.4, fusion)
    torch.testing.assert_close(made.weights.sum(-1), torch.ones_like(made.weights[..., 0]))
    depth = sum(n.endswith(".attn") for n, _ in model.named_modules())
    maps = [attention_maps(model, image, i) for i in range(depth)]
    wanted = torch.eye(maps[0].weights.shape[-1], dtype=torch.float64)
    grid = maps[0].query_grid
    for found in maps:
        if found.query_grid != grid:  # 2 x 2 means, fewer at odd ends
            rows = wanted.T.unflatten(1, grid)
            wanted = F.avg_pool2d(rows[None], 2, ceil_mode=True)[0].flatten(1).T
            grid = found.query_grid
        weights = {"mean": found.weights.mean(0), "max": found.weights.amax(0), "min": found.weights.amin(0)}[fusion]
        total = weights.sum(-1, keepdim=True)
        assert (total > 0).all()
        weights = weights if fusion == "mean" else weights / total
        wanted = (0.4 * torch.eye(len(weights), dtype=torch.float64) + 0.6 * weights) @ wanted
    torch.testing.assert_close(made.weights[0], wanted)
    assert (made.query_grid, made.key_grid) == (maps[-1].query_grid, maps[0].key_grid)
    assert torch.equal(attention_rollout(model, image, 0.4, fusion).weights, made.weights)


def test_nothing_flows_where_no_window_reaches() -> None:
    """One block of 3 x 3 windows: a token reads its window and nothing else."""
    torch.manual_seed(0)
    model = timm.create_model("nat_mini", embed_dim=8, depths=(1,), num_heads=(1,), kernel_size=3).eval()
    made = attention_rollout(model, torch.randn(3, 40, 40)).from_token(5, 5)[0]
    assert (made[4:7, 4:7] > 0).all() and made.count_nonzero() == 9


# -- undone, and refused -----------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("function", [attention_maps, attention_rollout])
@pytest.mark.parametrize("name", ["vit", "dinat", "agent_deit", "windows"])
def test_the_model_is_left_as_it_was(function: Callable, name: str) -> None:
    model, image = build(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():
        before = model(image[None])
        function(model, image)
        assert torch.equal(model(image[None]), before)
    assert hooks(model) == 0 and not model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    last = [m for n, m in model.named_modules() if n.endswith(".attn")][-1]
    handle = last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        function(model, image)
    handle.remove()
    assert hooks(model) == 0


@pytest.mark.parametrize("function", [attention_maps, attention_rollout])
def test_what_is_refused(function: Callable) -> None:
    model, image = build("vit")
    with pytest.raises(TypeError, match="ResNet"):
        function(timm.create_model("resnet18").eval(), image)
    with pytest.raises(ValueError, match="one image"):
        function(model, torch.stack([image, image]))
    with pytest.raises(ValueError, match="eval"):
        function(model.train(), image)
    inline = timm.create_model("inline_deit_tiny", **VIT).eval()
    with pytest.raises(UnsupportedError, match="InLine"):
        function(inline, image.float())
    small = timm.create_model("dinat_mini", pad_small=True, **NAT).eval()
    with pytest.raises(UnsupportedError, match="padded"):
        function(small, torch.randn(3, 16, 16))
    assert hooks(inline) == hooks(small) == 0
    model, image = build("vit")
    for layer in (3, -4):
        with pytest.raises(ValueError, match="layer"):
            attention_maps(model, image, layer)
    with pytest.raises(ValueError, match="head"):
        attention_maps(model, image, head=2)
    with pytest.raises(ValueError, match="residual"):
        attention_rollout(model, image, 1.5)
    with pytest.raises(ValueError, match="head_fusion"):
        attention_rollout(model, image, head_fusion="sum")
