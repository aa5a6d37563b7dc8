"""Bilinear reading in PyTorch operations, for the back ends that are made of them.

A position p on an axis lies between the corners floor(p) and floor(p) + 1, at the fraction p - floor(p). A reading is
the sum over four corners, in the order (0, 0), (0, 1), (1, 0), (1, 1) of (down, across), of weight times what lies
there; what lies outside the map is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Axis(NamedTuple):
    """The two corners of places on one axis, all in the places' dtype."""

    pixel: Pair  # whole numbers within the map: that of the nearest pixel for a corner outside
    weight: Pair  # 0 for a corner outside
    inside: Pair  # 1, and 0 for a corner outside


def axis(places: Tensor, size: int) -> Axis:
    """The corners of `places` on an axis of `size`.

    Both corners of a place that is infinite lie outside; not-a-number stays in the weights, and has a pixel all the
    same.
    """
    places = places.clamp(-2, size)  # beyond the map by as much as makes both corners lie outside
    low = places.floor()
    part = places.sub_(low)
    low.nan_to_num_(nan=0.0)
    high = low + 1
    first, second = low.clamp(0, size - 1), high.clamp(0, size - 1)
    below, above = low.eq_(first), high.eq_(second)
    return Axis((first, second), ((1 - part).mul_(below), part.mul_(above)), (below, above))


def corners(down: Pair, across: Pair, combine: Callable[..., Tensor] = torch.mul) -> Tensor:
    """What a pair per axis makes of the four corners: [..., 4]."""
    return torch.stack([combine(one, other) for one in down for other in across], -1)


def weights(down: Axis, across: Axis) -> Tensor:
    """The corners' weights [..., 4]."""
    return corners(down.weight, across.weight)


def slopes(down: Axis, across: Axis) -> Pair:
    """The weights' derivatives [..., 4] by the place down and by the place across."""
    by_down, by_across = ((-axis.inside[0], axis.inside[1]) for axis in (down, across))
    return corners(by_down, across.weight), corners(down.weight, by_across)
