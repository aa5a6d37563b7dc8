"""FasterKAN: a stack of Linear layers on a fixed basis of bumps instead of an activation function.

Source: https://github.com/AthanasiosDelis/faster-kan, as MedViTV2 uses it; written here from the formula. One layer is

    y = W flatten(1 - tanh^2((LayerNorm(x) - grid) / denominator))

with the grid points as the fastest axis of flatten, W without bias and no second branch beside it. The grid is no
weight: it is a parameter without gradient, because the published checkpoints hold it. The basis is num_grids times as
large as x, and it is what a training step keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import check_range


class SwitchBasis(nn.Module):
    """[..., dim] -> [..., dim, num_grids]: 1 - tanh^2 around each grid point (the reflectional switch function)."""

    def __init__(
        self,
        num_grids: int = 8,
        denominator: float = 0.33,
        grid_min: float = -2.0,
        grid_max: float = 2.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_range("num_grids", num_grids, low=1)
        if not denominator > 0:
            raise ValueError(f"denominator must be positive, got {denominator!r}")
        self.denominator = denominator
        grid = torch.linspace(grid_min, grid_max, num_grids, device=device, dtype=dtype)
        self.grid = nn.Parameter(grid, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return 1 - torch.tanh((x[..., None] - self.grid) / self.denominator).square()


class FasterKANLayer(nn.Module):
    """One layer, [..., in_dim] -> [..., out_dim]; see the module's text."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_grids: int = 8,
        denominator: float = 0.33,
        grid_min: float = -2.0,
        grid_max: float = 2.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layernorm = nn.LayerNorm(in_dim, **dd)
        self.rbf = SwitchBasis(num_grids, denominator, grid_min, grid_max, **dd)
        self.spline_linear = nn.Linear(in_dim * num_grids, out_dim, bias=False, **dd)
        nn.init.xavier_uniform_(self.spline_linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.spline_linear(self.rbf(self.layernorm(x)).flatten(-2))


class FasterKAN(nn.Module):
    """Layers between the widths of layers_hidden, [..., layers_hidden[0]] -> [..., layers_hidden[-1]].

    Args:
        layers_hidden: at least two widths.
        num_grids: grid points from grid_min to grid_max, evenly spaced.
        denominator: width of the bumps.
    """

    def __init__(
        self,
        layers_hidden: Sequence[int],
        num_grids: int = 8,
        denominator: float = 0.33,
        grid_min: float = -2.0,
        grid_max: float = 2.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if len(layers_hidden) < 2:
            raise ValueError(f"layers_hidden must hold at least two widths, got {list(layers_hidden)}")
        shared = (num_grids, denominator, grid_min, grid_max, device, dtype)
        self.layers = nn.ModuleList(
            FasterKANLayer(before, after, *shared) for before, after in zip(layers_hidden[:-1], layers_hidden[1:])
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
