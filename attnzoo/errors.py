"""Checks of arguments: every message names the argument, what it got and what was wanted.

Nothing here knows an operation; a room calls these before it changes or allocates anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch


class AttnzooError(Exception):
    """Base of the errors that are this library's own, beside ValueError and TypeError."""


class UnsupportedError(AttnzooError, NotImplementedError):
    """A combination that no back end can serve; the message holds every reason."""


class SeamError(AttnzooError, RuntimeError):
    """An upstream library did not do what a room relies on (an attention was not intercepted, say)."""


class ReachError(AttnzooError, OSError):
    """A hub, a file or a folder that was asked for can't be reached; the message says what would help."""


def check_tensor(name: str, value: Any, ndim: int | None = None, dtypes: Iterable[torch.dtype] | None = None) -> None:
    """Raise TypeError or ValueError unless `value` is a tensor of `ndim` dimensions and one of `dtypes`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got {value.ndim}: {name}.shape={tuple(value.shape)}")
    if dtypes is not None and value.dtype not in (allowed := tuple(dtypes)):
        wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must be one of {wanted}, got {str(value.dtype).removeprefix('torch.')}")


def check_dense(name: str, value: torch.Tensor) -> None:
    """Raise TypeError for a sparse or nested tensor: its rows are not where strides would say."""
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"layout {str(value.layout).removeprefix('torch.')}"
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {kind}; pad ragged batches")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a real number (no bool, no tensor), ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}: {value!r}")


def check_same(attribute: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless the tensors agree in `attribute` ("dtype", "device" or "shape"); None is skipped."""
    given = {name: getattr(t, attribute) for name, t in tensors.items() if t is not None}
    if len(set(given.values())) > 1:
        raise ValueError(
            f"tensors must share one {attribute}, got " + ", ".join(f"{n}.{attribute}={v}" for n, v in given.items())
        )


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in (listed := list(choices)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, listed))}, got {value!r}")


def check_range(name: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Raise ValueError unless low <= value <= high; a None bound is open."""
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"{'-inf' if low is None else low} to {'inf' if high is None else high}"
        raise ValueError(f"{name} must be from {bounds}, got {value!r}")


def per_axis(name: str, value: Any, rank: int, kind: Any = int, low: float | None = None) -> tuple[Any, ...]:
    """`value` as a tuple of `rank` entries of `kind`: one entry stands for every axis.

    Raises TypeError for an entry of another type and ValueError for a wrong count or an entry below `low`.
    """
    entries: Sequence[Any] = (
        tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * rank
    )
    if len(entries) != rank:
        raise ValueError(f"{name} must be one value or one per axis ({rank}), got {len(entries)}: {value!r}")
    for entry in entries:
        if type(entry) is not kind:  # a bool is no int here
            raise TypeError(f"{name} must hold {kind.__name__} entries, got {type(entry).__name__}: {value!r}")
        if low is not None and entry < low:
            raise ValueError(f"{name} must be at least {low} on every axis, got {value!r}")
    return tuple(entries)
