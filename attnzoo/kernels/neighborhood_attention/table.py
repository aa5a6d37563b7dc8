"""How the Triton kernels are cut: configs/autotune/neighborhood_attention.json, read without triton.

An entry is chosen by kernel, element size and head dim (the power of two from 32 that holds both): {"queries", "keys",
"warps", "stages"}, the tiles as a number of tokens, whose shape per rank stands under "tiles", or as a shape of their
own. It may carry other numbers that win for some calls:

    "biased"   calls with a bias, whose indices take registers
    "hip"      AMD GPUs
    "cuda"     {"1-D" | "2-D" | "3-D": a whole entry}: NVIDIA GPUs, for calls without a bias:
               measured there, or the first without a spill
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import resources
from typing import Any

KERNELS = ("forward", "grad_query", "grad_key_value", "grad_offset_bias", "grad_extra")


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: tiles of queries and keys (three axes), warps per program, pipeline stages."""

    queries: tuple[int, int, int]
    keys: tuple[int, int, int]
    num_warps: int
    num_stages: int

    @property
    def num_queries(self) -> int:
        """Queries of a tile."""
        return math.prod(self.queries)

    @property
    def num_keys(self) -> int:
        """Keys of a tile."""
        return math.prod(self.keys)


_replaced: dict[str, Any] | None = None
_forced: ContextVar[Mapping[str, Config] | None] = ContextVar("attnzoo_neighborhood_configs", default=None)


@functools.cache
def packaged() -> dict[str, Any]:
    """The table that comes with the library. Don't change the result."""
    text = resources.files("attnzoo.configs").joinpath("autotune/neighborhood_attention.json").read_text()
    return json.loads(text)


def use_table(contents: dict[str, Any] | None) -> None:
    """Take `contents` for the table from now on, in the whole process; None means the packaged one again."""
    global _replaced
    _replaced = contents
    _read.cache_clear()


@contextmanager
def forcing(configs: Mapping[str, Config]) -> Iterator[None]:
    """Within the block and on this thread the named kernels take these configurations, whatever the call: for tuning.

    Autograd runs the backward pass of GPU tensors on a thread of its own: call `triton_backward.backward` directly.
    """
    token = _forced.set({**(_forced.get() or {}), **configs})
    try:
        yield
    finally:
        _forced.reset(token)


def bucket(head_dim: int, head_dim_v: int) -> int:
    """The head dims of the table are powers of two from 32: the one that holds both."""
    return max(32, 1 << (max(head_dim, head_dim_v) - 1).bit_length())


def tile_shape(tile: int | list[int], rank: int, shapes: Mapping[str, Any]) -> tuple[int, int, int]:
    """A tile as three axes, from a number of tokens or a shape; shapes: the table's "tiles"."""
    shape = shapes[str(rank)][str(tile)] if isinstance(tile, int) else tile
    return (*(1,) * (3 - rank), *shape)  # type: ignore[return-value]


def entry_config(entry: Mapping[str, Any], rank: int, shapes: Mapping[str, Any]) -> Config:
    """An entry of the table as a configuration for grids of `rank` axes."""
    queries, keys = (tile_shape(entry[name], rank, shapes) for name in ("queries", "keys"))
    return Config(queries, keys, entry["warps"], entry["stages"])


def config(kernel: str, rank: int, head_dim: int, head_dim_v: int, itemsize: int, biased: bool, maker: str) -> Config:
    """The configuration of one of KERNELS; see the module's text.

    itemsize: bytes per element. biased: the call has a bias. maker: "cuda", "hip" or "interpreter" (whose cost is per
    step: it has tiles of its own).
    """
    forced = _forced.get()
    if forced is not None and kernel in forced:
        return forced[kernel]
    return _read(kernel, rank, bucket(head_dim, head_dim_v), itemsize, biased, maker)


def calls() -> Iterator[tuple[int, int, int, bool, bool]]:
    """(itemsize, head dim, rank, biased, backward) of calls that between them choose every configuration of the table.

    Calls with a bias run every kernel. Those without one skip masks, so that their forward is another kernel; their
    backward is the same with less in it, and is asked for only where one of its kernels is cut otherwise.
    """
    entries = (packaged() if _replaced is None else _replaced)["kernels"]["forward"]
    for itemsize, dims, rank in ((int(i), int(d), rank) for i in entries for d in entries[i] for rank in (1, 2, 3)):
        cut = {
            biased: [
                config(kernel, rank, dims, dims, itemsize, biased, maker)
                for kernel in ("grad_query", "grad_key_value", "grad_extra")
                for maker in ("cuda", "hip")
            ]
            for biased in (False, True)
        }
        yield itemsize, dims, rank, True, True
        yield itemsize, dims, rank, False, cut[False] != cut[True]


@functools.cache
def _read(kernel: str, rank: int, dims: int, itemsize: int, biased: bool, maker: str) -> Config:
    table = packaged() if _replaced is None else _replaced
    if maker == "interpreter":
        return entry_config(table["interpreter"], rank, table["tiles"])
    entry = table["kernels"][kernel][str(itemsize)][str(dims)]
    entry = entry | (entry.get("biased", {}) if biased else {}) | (entry.get("hip", {}) if maker == "hip" else {})
    measured = entry.get("cuda", {}).get(f"{rank}-D") if maker == "cuda" and not biased else None
    return entry_config(measured or entry, rank, table["tiles"])
