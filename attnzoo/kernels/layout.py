"""Checks of what operations over [B, *grid, heads, head_dim] tensors share: layout, head counts, biases, scales."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_range, check_same, check_tensor
from attnzoo.kernels.library import autocast

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEAD_DIMS = (1, 256)


def cast_and_check(query: Tensor, key: Tensor, value: Tensor, **more: Tensor) -> tuple[Tensor, ...]:
    """query, key, value and `more` (by name), [B, *grid, heads, head_dim] each, flattened to [B, N, heads, head_dim].

    Under autocast they come back in its dtype. Checked: floating-point tensors of one dtype on one device, one to three
    grid axes, no empty axis but the batch, head_dim 1 to 256; query's heads a multiple of key's; key with query's batch
    and head_dim; value with key's batch, grid and heads. Raises TypeError or ValueError that names the argument.
    """
    given = {"query": query, "key": key, "value": value, **more}
    for name, tensor in given.items():
        check_tensor(name, tensor, dtypes=FLOATS)
        if not 4 <= tensor.ndim <= 6:
            raise ValueError(
                f"{name} must be [B, *grid, heads, head_dim] with one to three grid axes, got {tuple(tensor.shape)}"
            )
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{name} must have no empty axis but the batch, got {tuple(tensor.shape)}")
        check_range(f"{name}.shape[-1] (head_dim)", tensor.shape[-1], *HEAD_DIMS)
    given = dict(zip(given, (t for t in autocast(*given.values()) if t is not None), strict=True))
    check_same("dtype", **given)
    check_same("device", **given)
    query, key, value = given["query"], given["key"], given["value"]
    if key.shape[0] != query.shape[0] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must be [B={query.shape[0]}, *grid, heads_kv, head_dim={query.shape[-1]}] as query is "
            f"{tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must be [B, *grid, heads_kv, head_dim_v] with key's {tuple(key.shape[:-1])} first, "
            f"got {tuple(value.shape)}"
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(f"query's heads must be a multiple of key's, got {query.shape[-2]} and {key.shape[-2]}")
    return tuple(tensor.flatten(1, -3) for tensor in given.values())


def check_axes(name: str, tensor: Tensor, axes: Iterable[tuple[str, int, bool]]) -> None:
    """Raise ValueError unless `tensor` has these axes, (label, size, may be 1 instead) each."""
    axes = list(axes)
    fits = tensor.ndim == len(axes) and all(
        size == want or (may_be_one and size == 1) for size, (_, want, may_be_one) in zip(tensor.shape, axes)
    )
    if not fits:
        told = ", ".join(f"{label}={want}{' or 1' if may_be_one else ''}" for label, want, may_be_one in axes)
        raise ValueError(f"{name} must have the shape [{told}], got {tuple(tensor.shape)}")


def check_number(name: str, value: Any, default: float) -> float:
    """`value` as a finite float, `default` for None; raises TypeError or ValueError by name."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or None, got {type(value).__name__}: {value!r}")
    if torch.compiler.is_compiling():  # perhaps a symbol, made of a size: no question can be asked of it
        return value
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)
