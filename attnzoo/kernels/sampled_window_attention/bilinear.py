"""Bilinear reading in PyTorch operations, for the back ends that are made of them.

A position p on an axis lies between the corners low = floor(p) and low + 1, at the fraction p - low. A reading is the sum
over four corners, in the order (0, 0), (0, 1), (1, 0), (1, 1) of (down, across), of weight times what lies there; what
lies outside the map is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def corners(places: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The lower corners, whole numbers in -1 .. size in the dtype of the places, and the fractions; both [2, ...].

    places: [2, ...], down and across. Beyond the map, at infinity too, a place becomes `size`, where both corners are
    outside. Not-a-number stays in the fraction, and its corner is 0, so that any index made of corners is a valid one.
    """
    ends = places.new_tensor(size).view(2, *[1] * (places.ndim - 1))
    places = torch.where(places < -1, ends, places)
    places = torch.minimum(places, ends)
    low = places.floor()
    return low.nan_to_num(nan=0.0), places - low


def weights(part: Tensor) -> Tensor:
    """The corners' weights [..., 4] from the fractions [2, ...]."""
    down, across = torch.stack([1 - part, part], -1)
    return (down[..., :, None] * across[..., None, :]).flatten(-2)


def slopes(part: Tensor) -> tuple[Tensor, Tensor]:
    """The weights' derivatives [..., 4] by the place down and by the place across."""
    down, across = torch.stack([1 - part, part], -1)
    sign = part.new_tensor([-1.0, 1.0])
    by_down = (sign[:, None] * across[..., None, :]).flatten(-2)
    return by_down, (down[..., :, None] * sign).flatten(-2)
