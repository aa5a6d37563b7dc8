"""How the Triton kernels of neighborhood attention are cut: configs/autotune/neighborhood_attention.json and its use.

The table is data; there is no search at run time. What it can choose is compiled ahead of time (`AOT` in `triton.py`).
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

from attnzoo.kernels.launch import vendor
from attnzoo.kernels.neighborhood_attention.problem import Problem

LARGEST_GROWTH = 1.2  # of the keys visited, for a large tile of queries: it halves what each key is loaded for


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def three(values: tuple, filler: Any) -> tuple:
    """A tuple of one entry per axis as three axes, `filler` for the leading ones that the grid lacks."""
    return (*(filler,) * (3 - len(values)), *values)


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: tiles of queries and keys (three axes), warps per program, pipeline stages."""

    queries: tuple[int, int, int]
    keys: tuple[int, int, int]
    num_warps: int
    num_stages: int


@functools.cache
def _table() -> dict[str, Any]:
    text = resources.files("attnzoo.configs").joinpath("autotune/neighborhood_attention.json").read_text()
    return json.loads(text)


def bucket(head_dim: int, head_dim_v: int) -> int:
    """The head dims of the configuration table are powers of two from 32: the one that holds both."""
    return max(32, 1 << (max(head_dim, head_dim_v) - 1).bit_length())


def _tile(rank: int, shape: list[int]) -> tuple[int, int, int]:
    return (*(1,) * (3 - rank), *shape)  # type: ignore[return-value]


@functools.cache
def config(kernel: str, rank: int, bucket_of: int, itemsize: int, kind: str, maker: str) -> tuple[Config, ...]:
    """The table's entry: configs/autotune/neighborhood_attention.json, by kernel, element size, head dim and rank.

    The forward without a bias has one configuration for every shape that its tile of keys may have. kind is "plain", "biased" (a bias's indices take
    registers) or "large" (windows that a large tile of queries hardly widens): an entry may carry other numbers for it,
    and others again for maker "hip", which win. maker is "cuda", "hip" or "interpreter"; the interpreter, whose cost is
    per step, has tiles of its own.
    """
    if maker == "interpreter":
        entry = _table()["interpreter"]
    else:
        entry = _table()["kernels"][kernel][str(itemsize)][str(bucket_of)]
        entry = entry | entry.get(kind, {}) | (entry.get("hip", {}) if maker == "hip" else {})
    shapes = _table()["tiles"][str(rank)]
    queries, keys = shapes[str(entry["queries"])][0], shapes[str(entry["keys"])]
    if kernel != "forward" or kind == "biased":
        keys = keys[:1]
    return tuple(Config(_tile(rank, queries), _tile(rank, each), entry["warps"], entry["stages"]) for each in keys)


def visited(problem: Problem, cfg: Config) -> int:
    """Keys that the walk visits for an interior tile of queries: its windows' hull in whole tiles of keys."""
    total = 1
    axes = zip(problem.grid, problem.kernel_size, problem.stride, problem.dilation, cfg.queries[-problem.rank :])
    for (size, kernel, stride, dilation, queries), keys in zip(axes, cfg.keys[-problem.rank :]):
        hull = min(kernel + (queries - 1) // stride * stride, _cdiv(size, dilation))
        total *= _cdiv(hull, keys) * keys
    return total


def config_for(kernel: str, problem: Problem) -> Config:
    """The configuration of one kernel for a problem, on the GPUs that this torch was built for."""
    arguments = kernel, problem.rank, bucket(problem.head_dim, problem.head_dim_v), problem.dtype.itemsize
    kind = "plain" if problem.bias == "none" else "biased"

    def best(kind: str) -> Config:
        return min(config(*arguments, kind, vendor()), key=lambda cfg: visited(problem, cfg))

    found = best(kind)
    if kind == "plain":
        large = best("large")
        if visited(problem, large) <= LARGEST_GROWTH * visited(problem, found):
            return large
    return found


def count_tiles(problem: Problem, tile: tuple[int, int, int]) -> int:
    """Tiles in all dilation groups of one head of one batch item."""
    per_axis = (
        min(dilation, size) * _cdiv(_cdiv(size, dilation), length)
        for size, dilation, length in zip(three(problem.grid, 1), three(problem.dilation, 1), tile)
    )
    return math.prod(per_axis)
