"""Checks of the methods' arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

from attnzoo.errors import check_range


def as_number(name: str, value: object, low: float | None = None, high: float | None = None) -> float:
    """`value` as a float; raises TypeError for what is no number and ValueError for one that is not within bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    check_range(name, float(value), low, high)
    return float(value)


def as_layers(value: object, num_layers: int, first: int, last: int | None = None) -> tuple[int, ...]:
    """Layer indices, sorted and without repeats; None means first .. last - 1 (last None: all).

    Raises TypeError for what is no iterable of integers, ValueError for an empty one or an index out of range.
    """
    if value is None:
        layers = tuple(range(first, num_layers if last is None else last))
        if not layers:
            raise ValueError(f"layers must be given for a model of {num_layers} layers: the default starts at {first}")
        return layers
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"layers must be an iterable of integers or None, got {type(value).__name__}: {value!r}")
    given = tuple(value)
    for layer in given:
        if type(layer) is not int:
            raise TypeError(f"layers must hold integers, got {type(layer).__name__}: {layer!r}")
        if not 0 <= layer < num_layers:
            raise ValueError(f"layers must hold integers from 0 to {num_layers - 1}, got {layer}")
    if not given:
        raise ValueError("layers must name at least one layer, got none")
    return tuple(sorted(set(given)))


def as_heads(name: str, value: object, num_heads: int) -> tuple[int, ...] | None:
    """Head indices, sorted and without repeats; None (all heads) stays None.

    Raises TypeError for what is no iterable of integers, ValueError for an empty one or an index out of range.
    """
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be an iterable of integers or None, got {type(value).__name__}: {value!r}")
    given = tuple(value)
    if not given or any(type(head) is not int or not 0 <= head < num_heads for head in given):
        raise ValueError(f"{name} must hold integers from 0 to {num_heads - 1}, at least one, got {value!r}")
    return tuple(sorted(set(given)))
