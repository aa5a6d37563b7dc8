"""Inputs and peers for `sampled_window_attention`: the sizes of VSA's stages (2204.08446), windows of 7 x 7.

"authors" is what ViTAE-VSA's module does, in plain PyTorch: F.grid_sample over the whole key and value map, windows cut
out of the results, two batched products and a softmax over all of them at once. "channels first" tensors are views of
the [B, C, H, W] maps that a convolution makes (theirs), "channels last" ones lie as [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels.sampled_window_attention import sampled_window_attention

WINDOW = 7
CASES: dict[str, dict[str, Any]] = {
    "56x56 batch 1": {"batch": 1, "grid": (56, 56), "heads": 3, "head_dim": 32},
    "56x56 batch 8": {"batch": 8, "grid": (56, 56), "heads": 3, "head_dim": 32},
    "28x28 batch 8": {"batch": 8, "grid": (28, 28), "heads": 6, "head_dim": 32},
    "14x14 batch 8": {"batch": 8, "grid": (14, 14), "heads": 12, "head_dim": 32},
    "14x14 batch 1": {"batch": 1, "grid": (14, 14), "heads": 12, "head_dim": 32},
    "56x56 batch 1, channels first": {
        "batch": 1, "grid": (56, 56), "heads": 3, "head_dim": 32, "layout": "channels first",
    },
    "56x56 batch 8, channels first": {
        "batch": 8, "grid": (56, 56), "heads": 3, "head_dim": 32, "layout": "channels first",
    },
    "28x28 batch 8, channels first": {
        "batch": 8, "grid": (28, 28), "heads": 6, "head_dim": 32, "layout": "channels first",
    },
}  # fmt: skip


def authors(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
    """The same numbers by F.grid_sample and whole-batch products; arguments as `sampled_window_attention`."""
    batch, height, width, heads, dim = query.shape
    down, across = height // WINDOW, width // WINDOW
    grid = torch.stack([positions[..., 1] * (2 / (width - 1)), positions[..., 0] * (2 / (height - 1))], -1) - 1
    grid = grid.view(batch, down, across, heads, WINDOW, WINDOW, 2).permute(0, 3, 1, 4, 2, 5, 6)
    grid = grid.reshape(batch * heads, height, width, 2)

    def maps(tensor: Tensor) -> Tensor:
        return tensor.permute(0, 3, 4, 1, 2).reshape(batch * heads, dim, height, width)

    def windows(tensor: Tensor) -> Tensor:
        cut = tensor.view(batch, heads, dim, down, WINDOW, across, WINDOW).permute(0, 3, 5, 1, 4, 6, 2)
        return cut.reshape(batch * down * across, heads, WINDOW * WINDOW, dim)

    keys, values = (windows(F.grid_sample(maps(t), grid, align_corners=True)) for t in (key, value))
    logits = windows(maps(query)) @ keys.transpose(-2, -1) * dim**-0.5 + bias
    out = (logits.softmax(-1) @ values).view(batch, down, across, heads, WINDOW, WINDOW, dim)
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads, dim)


def tensors(case: dict[str, Any], device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """query, key, value, positions, bias, and the output's gradient, from one seed.

    Positions are each window's own grid, moved and scaled at random as VSA's are, some of them beyond the map.
    """
    made = torch.Generator().manual_seed(0)
    batch, (height, width), heads, dim = case["batch"], case["grid"], case["heads"], case["head_dim"]

    def rows() -> Tensor:
        if case.get("layout") == "channels first":
            tensor = torch.randn(batch, heads * dim, height, width, generator=made).to(device, dtype)
            return tensor.unflatten(1, (heads, dim)).permute(0, 3, 4, 1, 2)
        return torch.randn(batch, height, width, heads, dim, generator=made).to(device, dtype)

    down, across = height // WINDOW, width // WINDOW
    inner = torch.stack(torch.meshgrid(*[torch.arange(WINDOW) - WINDOW // 2] * 2, indexing="ij"), -1).flatten(0, 1)
    centre = torch.stack(torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij"), -1) * WINDOW
    moved, scaled = (0.5 * torch.randn(batch, down, across, heads, 1, 2, generator=made) for _ in range(2))
    positions = centre[:, :, None, None] + WINDOW // 2 + WINDOW * moved + inner * (1 + scaled)
    bias = torch.randn(heads, WINDOW**2, WINDOW**2, generator=made)
    found = [rows(), rows(), rows(), positions.to(device), bias.to(device)]
    grad = torch.randn(batch, height, width, heads, dim, generator=made).to(device, dtype)
    return [t.detach().requires_grad_() for t in found], grad


def contenders(
    case: dict[str, Any], device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """What runs on one case, by name; the inputs that need gradients; the output's gradient."""
    given, grad = tensors(case, device, dtype)
    query, key, value, positions, bias = given

    def ours() -> Tensor:
        return sampled_window_attention(query, key, value, positions, WINDOW, bias=bias)

    def reference() -> Tensor:
        return sampled_window_attention(query, key, value, positions, WINDOW, bias=bias, backend="reference")

    def plain() -> Tensor:
        return authors(query, key, value, positions.to(dtype), bias.to(dtype))

    return {"ours": ours, "reference": reference, "authors": plain}, given, grad
