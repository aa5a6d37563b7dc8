"""What is asked of linear attention, as one value that every back end reads, and the checks of the arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice
from attnzoo.kernels.layout import cast_and_check, check_number

FEATURE_MAPS = ("identity", "relu", "elu", "sigmoid", "exp", "softmax")
NORMALISERS = ("none", "sum", "subtract", "flow")
EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Problem:
    """One call, grids flattened: query [B, Nq, H, D], key [B, Nk, Hkv, D], value [B, Nk, Hkv, Dv].

    count: what the products are divided by under "subtract"; 1 elsewhere, and unused where is_causal.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    is_causal: bool
    query_map: str
    key_map: str
    normaliser: str
    eps: float
    outer_eps: float
    count: int

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in: float32, or float64 for float64."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def repeats(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[2] // self.key.shape[2]


def _check_maps(feature_map: str | Sequence[str]) -> tuple[str, str]:
    maps = (feature_map, feature_map) if isinstance(feature_map, str) else feature_map
    if not (isinstance(maps, tuple | list) and len(maps) == 2):
        raise TypeError(f"feature_map must be a name or a pair (query's, key's) of names, got {feature_map!r}")
    for name in maps:
        check_choice("feature_map", name, FEATURE_MAPS)
    return maps[0], maps[1]


def _only_for(name: str, value: Any, serves: bool, where: str) -> None:
    if value is not None and not serves:
        raise ValueError(f"{name} belongs to {where}, and must be None here; got {value!r}")


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    feature_map: str | Sequence[str] = "identity",
    normaliser: str = "none",
    eps: float | None = None,
    outer_eps: float | None = None,
    count: int | None = None,
    return_normaliser: bool = False,
) -> Problem:
    """The public function's arguments, checked; raises TypeError or ValueError that names the argument."""
    query, key, value = cast_and_check(query, key, value)
    query_map, key_map = _check_maps(feature_map)
    check_choice("normaliser", normaliser, NORMALISERS)
    check_choice("is_causal", is_causal, (False, True))
    num_queries, num_keys = query.shape[1], key.shape[1]
    flow = normaliser == "flow"
    if is_causal and num_queries != num_keys:
        raise ValueError(f"is_causal needs as many queries as keys, got {num_queries} and {num_keys}")
    if is_causal and key_map == "softmax":
        raise ValueError("is_causal and a key feature_map of 'softmax' exclude each other: it runs over all positions")
    if flow and "softmax" in (query_map, key_map):
        raise ValueError(f"normaliser 'flow' takes elementwise feature maps, got {(query_map, key_map)!r}")
    _only_for("scale", scale, not flow, "the normalisers 'none', 'sum' and 'subtract'")
    _only_for("eps", eps, normaliser in ("sum", "flow"), "the normalisers 'sum' and 'flow'")
    _only_for("outer_eps", outer_eps, flow and not is_causal, "the normaliser 'flow' without is_causal")
    _only_for("count", count, normaliser == "subtract" and not is_causal, "the normaliser 'subtract' without is_causal")
    if return_normaliser and normaliser != "sum":
        raise ValueError(f"return_normaliser needs the normaliser 'sum', got {normaliser!r}, which has none to return")
    inner, outer = check_number("eps", eps, EPS), check_number("outer_eps", outer_eps, 0.0)
    for name, number in (("eps", inner), ("outer_eps", outer)):
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number!r}")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int | torch.SymInt)):
        raise TypeError(f"count must be an integer or None, got {type(count).__name__}: {count!r}")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count!r}")
    if normaliser != "subtract":
        count = 1
    elif count is None:
        count = num_keys
    scale = 1.0 if flow else check_number("scale", scale, query.shape[3] ** -0.5)
    return Problem(query, key, value, scale, bool(is_causal), query_map, key_map, normaliser, inner, outer, count)
