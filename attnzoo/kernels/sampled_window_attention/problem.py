"""What is asked of sampled window attention: sizes as one immutable value, and the checks of every argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_same, check_tensor, per_axis

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Problem:
    """One call in numbers; axes are (vertical, horizontal).

    grid: of the query; key_grid: of key and value; num_samples: keys per window and head.
    """

    batch: int
    grid: tuple[int, int]
    key_grid: tuple[int, int]
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    window_size: tuple[int, int]
    num_samples: int
    scale: float
    dtype: torch.dtype

    @property
    def windows(self) -> tuple[int, int]:
        """Windows per axis."""
        return self.grid[0] // self.window_size[0], self.grid[1] // self.window_size[1]

    @property
    def num_windows(self) -> int:
        """Windows of one map."""
        return self.windows[0] * self.windows[1]

    @property
    def area(self) -> int:
        """Queries of a window."""
        return self.window_size[0] * self.window_size[1]

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.num_heads // self.num_heads_kv

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of lse, statistics, positions and sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def cut(self, tensor: Tensor) -> Tensor:
        """A view of [B, H, W, heads, ...] as [B, windows down, windows across, heads, window height, width, ...].

        H and W may be those of a part of the map that is made of whole windows.
        """
        tensor = tensor.unflatten(2, (-1, self.window_size[1])).unflatten(1, (-1, self.window_size[0]))
        return tensor.movedim((3, 5), (2, 3))


def check_tensors(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, bias: Tensor | None) -> None:
    """Ranks, dtypes, devices, and the sizes that don't depend on the window."""
    for name, tensor, ndim in (("query", query, 5), ("key", key, 5), ("value", value, 5), ("positions", positions, 6)):
        check_tensor(name, tensor, ndim=ndim, dtypes=DTYPES)
    if bias is not None:
        check_tensor("bias", bias, ndim=3, dtypes=DTYPES)
    check_same("dtype", query=query, key=key, value=value)
    check_same("device", query=query, key=key, value=value, positions=positions, bias=bias)
    shape, key_shape = tuple(query.shape), tuple(key.shape)
    if key_shape[0] != shape[0] or key_shape[4] != shape[4]:
        raise ValueError(f"key must have query's batch and head_dim, got query {shape}, key {key_shape}")
    if value.shape[:4] != key.shape[:4]:
        raise ValueError(f"value must have key's batch, grid and heads {key_shape}, got {tuple(value.shape)}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if 0 in tensor.shape[1:]:
            raise ValueError(f"no dimension but the batch may be 0, got {name} {tuple(tensor.shape)}")
    if shape[3] % key_shape[3]:
        raise ValueError(f"query's heads must be a multiple of key's, got {shape[3]} and {key_shape[3]}")


def check_windows(
    query: Tensor, positions: Tensor, bias: Tensor | None, window_size: int | Sequence[int]
) -> tuple[int, int]:
    """window_size per axis, checked against the query's grid, the positions and the bias."""
    window = per_axis("window_size", window_size, 2, int, low=1)
    batch, height, width, heads, _ = query.shape
    if height % window[0] or width % window[1]:
        raise ValueError(
            f"query's grid must be a multiple of window_size on both axes, got grid {(height, width)}, window_size "
            f"{window}; pad the grid"
        )
    wanted = (batch, height // window[0], width // window[1], heads)
    samples = positions.shape[4]
    if tuple(positions.shape[:4]) != wanted or positions.shape[5] != 2 or samples == 0:
        raise ValueError(
            "positions must be [B, windows down, windows across, heads, keys, 2] "
            f"{(*wanted, 'at least 1', 2)}, got {tuple(positions.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (heads, math.prod(window), samples):
        raise ValueError(
            f"bias must be [heads, window area, keys] {(heads, math.prod(window), samples)}, got {tuple(bias.shape)}"
        )
    return window[0], window[1]


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale as a finite number; None means head_dim ** -0.5."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(scale)


def describe(tensors: Sequence[Any], window_size: Sequence[int], scale: float) -> Problem:
    """The numbers of a call whose arguments were checked; tensors: query, key, value, positions, and maybe more."""
    query, key, value, positions = tensors[:4]
    return Problem(
        batch=query.shape[0],
        grid=(query.shape[1], query.shape[2]),
        key_grid=(key.shape[1], key.shape[2]),
        num_heads=query.shape[3],
        num_heads_kv=key.shape[3],
        head_dim=query.shape[4],
        head_dim_v=value.shape[4],
        window_size=(window_size[0], window_size[1]),
        num_samples=positions.shape[4],
        scale=scale,
        dtype=query.dtype,
    )
