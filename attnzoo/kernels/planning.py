"""What neighborhood attention would cost, counted before anything runs: no tensor is made, no GPU and no triton needed.

Counts are exact, not sampled. Axes are independent, so that everything is counted per axis and multiplied:

    useful pairs     a query and a key that it sees. Causal windows shrink, masked borders lose keys; the zero vectors
                     of border "zero" need no product and are not counted
    executed pairs   what a kernel computes: tile by tile, masked pairs and the fill of cut tiles included

The walks are those of `neighborhood_attention/triton.py` and `triton_backward.py` (tiles within a dilation group, key
tiles from the corner of the hull of the windows) and of the CPU path (`tiling.py`). Source of the idea: Hassani et al.,
"Generalized Neighborhood Attention" (2504.16922), section 3.3, whose own simulator is not released (NATTEN,
docs/simulator.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from attnzoo.errors import check_choice, check_range
from attnzoo.kernels.neighborhood_attention import _geometry, table, tiling
from attnzoo.kernels.neighborhood_attention.problem import Problem, axis_windows

PerAxis = int | Sequence[int]
Tile = tuple[int, ...]

# Products of one pair of tiles, as (of head_dim, of the values' head_dim), each 2 FLOPs per element.
_PRODUCTS = {
    "forward": (1, 1),
    "grad_query": (2, 1),
    "grad_key_value": (2, 2),
    "grad_extra": (2, 2),
    "backward": (3, 2),
}
BACKWARD = ("grad_query", "grad_key_value")


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: dense rates in TFLOP/s by element size (4: IEEE float32, no TF32), memory in TB/s."""

    name: str
    half_tflops: float
    single_tflops: float
    memory_tb: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312.0, 19.5, 2.0),  # SXM, 80 GB
        Gpu("H100", 989.4, 66.9, 3.35),  # SXM
        Gpu("H200", 989.4, 66.9, 4.8),
        Gpu("B200", 2250.0, 75.0, 8.0),
        Gpu("MI300X", 1307.4, 163.4, 5.3),
    )
}


@dataclass(frozen=True)
class Walk:
    """What one kernel executes with one shape of tiles.

    kernel: "forward", "grad_query", "grad_key_value", "grad_extra", or the CPU path's "tiled". queries, keys: the tiles
    per axis of the grid (of the CPU path: the tile of whole rows that it chose; () where the windows are cells).
    num_warps, num_stages: of the table; 0 where only the shape was given.
    steps: pairs of a query tile and a key tile, per head and batch entry, those of additional keys included.
    pairs: query-key pairs computed in them. flops: of the whole call, head dims as wide as the kernel computes them.
    """

    kernel: str
    queries: Tile
    keys: Tile
    num_warps: int
    num_stages: int
    steps: int
    pairs: int
    flops: int


@dataclass(frozen=True)
class Pass:
    """The forward or the backward pass of a call.

    useful_flops: of the useful pairs; dense_flops: of all pairs (dense attention over the grid and the additional
    keys, no mask), both with 2 products per pair forward and 5 backward. triton: the kernels that a GPU would run;
    tiled: the CPU path. others: forward with other tiles, those of the table and those asked for.
    """

    useful_flops: int
    dense_flops: int
    triton: tuple[Walk, ...]
    tiled: Walk
    others: tuple[Walk, ...] = ()

    @property
    def executed_flops(self) -> int:
        """What the Triton kernels execute."""
        return sum(walk.flops for walk in self.triton)

    @property
    def waste(self) -> float:
        """Executed over useful, at least 1."""
        return self.executed_flops / self.useful_flops

    @property
    def bound(self) -> float:
        """Dense over executed: the speed-up over dense attention that runs at the same FLOP rate."""
        return self.dense_flops / self.executed_flops

    @property
    def ideal(self) -> float:
        """Dense over useful: the speed-up of a kernel that wastes nothing."""
        return self.dense_flops / self.useful_flops

    def of(self, walk: Walk) -> dict[str, float]:
        """waste and bound of one walk in place of the chosen kernels."""
        return {"waste": walk.flops / self.useful_flops, "bound": self.dense_flops / walk.flops}


@dataclass(frozen=True)
class Traffic:
    """Estimates of the forward pass's memory traffic, in bytes: of a cache that holds everything, and of none.

    once: query, key, value and additional keys read once, output and lse written once. walked: keys and values read
    anew for every tile of queries.
    """

    once: int
    walked: int


@dataclass(frozen=True)
class Plan:
    """What a call would cost. `pairs` counts are per head and batch entry.

    density: useful pairs over all pairs, additional keys included in both.
    """

    problem: Problem
    useful_pairs: int
    dense_pairs: int
    forward: Pass
    backward: Pass
    traffic: Traffic

    @property
    def density(self) -> float:
        """The share of all pairs that is useful."""
        return self.useful_pairs / self.dense_pairs

    def roofline(self, gpu: str) -> dict[str, Any]:
        """An estimate: the forward pass's least time in milliseconds on a GPU of GPUS at its data sheet's rates.

        "compute": executed FLOPs at the dense rate; "memory": every tensor moved once; "bound": which is longer.
        Nothing reaches either. Raises ValueError for an unknown GPU or float64.
        """
        check_choice("gpu", gpu, GPUS)
        sheet, itemsize = GPUS[gpu], self.problem.dtype.itemsize
        if itemsize > 4:
            raise ValueError(f"dtype must be float32, float16 or bfloat16 for an estimate on a GPU, got {itemsize=}")
        rate = sheet.half_tflops if itemsize == 2 else sheet.single_tflops
        compute, memory = self.forward.executed_flops / rate / 1e9, self.traffic.once / sheet.memory_tb / 1e9
        return {"gpu": gpu, "compute": compute, "memory": memory, "bound": "compute" if compute > memory else "memory"}

    def to_dict(self) -> dict[str, Any]:
        """All counts as plain data (JSON)."""
        made: dict[str, Any] = {
            "problem": {**asdict(self.problem), "dtype": str(self.problem.dtype).removeprefix("torch.")},
            "useful_pairs": self.useful_pairs,
            "dense_pairs": self.dense_pairs,
            "density": self.density,
            "estimated_traffic_bytes": asdict(self.traffic),
        }
        for name, part in (("forward", self.forward), ("backward", self.backward)):
            made[name] = {
                "useful_flops": part.useful_flops,
                "dense_flops": part.dense_flops,
                "executed_flops": part.executed_flops,
                "waste": part.waste,
                "bound": part.bound,
                "ideal": part.ideal,
                "triton": [asdict(walk) for walk in part.triton],
                "tiled": {**asdict(part.tiled), **part.of(part.tiled)},
                "others": [{**asdict(walk), **part.of(walk)} for walk in part.others],
            }
        return made


# -- one axis ----------------------------------------------------------------------------------------------------------

Axis = tuple[int, int, int, int, bool, str]  # size, kernel_size, stride, dilation, is_causal, border


def axis_pairs(
    size: int, kernel_size: int, stride: int = 1, dilation: int = 1, is_causal: bool = False, border: str = "shift"
) -> int:
    """Pairs of a query and a key of one axis that it sees; the product over the axes is a grid's."""
    seen = axis_windows(size, kernel_size, stride, dilation, is_causal, border)
    counts = torch.minimum(seen.high, seen.length - 1) - seen.low.clamp(min=0) + 1
    return int(counts.clamp(min=0).sum())


def _groups(size: int, dilation: int) -> Mapping[int, int]:
    """Dilation groups of an axis by their number of members: {members: groups}."""
    longest = -(-size // dilation)
    full = size - dilation * (longest - 1)  # the first groups have the longest length
    return {longest: full} if longest == 1 else {longest: full, longest - 1: dilation - full}


@lru_cache(maxsize=1024)
def _query_major(axis: Axis, queries: int, keys: int) -> tuple[int, int]:
    """(query tiles, pairs of a query tile and a key tile) along an axis: `query_axis` of triton.py.

    Every dilation group has as many tiles as the longest. A tile beyond its group walks what the last query sees.
    """
    size, kernel_size, stride, dilation, is_causal, border = axis
    first_of_tiles = range(0, -(-size // dilation), queries)
    steps = 0
    for length, groups in _groups(size, dilation).items():
        seen = axis_windows(length, kernel_size, stride, 1, is_causal, border)
        low, high = seen.low.tolist(), (seen.high + 1).tolist()
        hulls = (high[min(t + queries, length) - 1] - low[min(t, length - 1)] for t in first_of_tiles)
        steps += groups * sum(max(-(-hull // keys), 0) for hull in hulls)
    return min(dilation, size) * len(first_of_tiles), steps


def _queries_of(first: int, last: int, length: int, axis: Axis) -> tuple[int, int]:
    """The range of queries that the key-major kernel visits for the keys first .. last: `queries_of` of triton.py."""
    _, kernel_size, stride, _, is_causal, border = axis
    if first > last:
        return 0, 0
    if is_causal:
        low, high = first, (last + kernel_size) // stride * stride
        all_after = last + kernel_size >= length
    else:
        before, lead = kernel_size // 2, stride // 2
        low = -(-max(first - (kernel_size - 1) // 2 - lead, 0) // stride) * stride
        high = ((last + before - lead) // stride + 1) * stride
        all_after = last + before + 1 >= length
        if border == "shift":
            low = 0 if first < kernel_size else low
            all_after = last + kernel_size >= length
    return low, length if all_after else min(high, length)


@lru_cache(maxsize=1024)
def _key_major(axis: Axis, queries: int, keys: int) -> tuple[int, int]:
    """(key tiles, pairs of a key tile and a query tile) along an axis: `key_axis` of triton_backward.py."""
    size, dilation = axis[0], axis[3]
    first_of_tiles = range(0, -(-size // dilation), keys)
    steps = 0
    for length, groups in _groups(size, dilation).items():
        for t in first_of_tiles:
            low, high = _queries_of(t, min(t + keys, length) - 1, length, axis)
            steps += groups * max(-(-(high - low) // queries), 0)
    return min(dilation, size) * len(first_of_tiles), steps


# -- a call ------------------------------------------------------------------------------------------------------------


def _axes(problem: Problem) -> list[Axis]:
    return [
        (*numbers, problem.border)
        for numbers in zip(problem.grid, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    ]


def _flops(problem: Problem, kernel: str, pairs: int, padded: bool) -> int:
    """FLOPs of `pairs` per head and batch entry; padded: head dims as wide as the Triton kernels compute them."""
    dims = problem.head_dim, problem.head_dim_v
    if padded:
        dims = tuple(max(16, 1 << (dim - 1).bit_length()) for dim in dims)  # type: ignore[assignment]
    of_keys, of_values = _PRODUCTS[kernel]
    return 2 * pairs * problem.batch * problem.num_heads * (of_keys * dims[0] + of_values * dims[1])


def _walk(problem: Problem, kernel: str, cfg: table.Config) -> Walk:
    """What a Triton kernel executes for `problem` with a configuration."""
    queries, keys, extra = cfg.queries[3 - problem.rank :], cfg.keys[3 - problem.rank :], problem.num_additional
    if kernel == "grad_extra":  # tiles of additional keys against all queries in rows
        steps = -(-problem.num_tokens // cfg.num_queries) * -(-extra // cfg.num_keys)
    else:
        count = _key_major if kernel == "grad_key_value" else _query_major
        counts = [count(*axis) for axis in zip(_axes(problem), queries, keys)]
        steps = math.prod(n for _, n in counts)
        if kernel != "grad_key_value":
            steps += math.prod(n for n, _ in counts) * -(-extra // cfg.num_keys)
    pairs = steps * cfg.num_queries * cfg.num_keys
    flops = _flops(problem, kernel, pairs, padded=True)
    return Walk(kernel, queries, keys, cfg.num_warps, cfg.num_stages, steps, pairs, flops)


def _tiled(problem: Problem, kernel: str) -> Walk:
    """What the CPU path executes for `problem`, forward or backward."""
    cut = tiling.plan(problem)
    steps = math.prod(cut.groups) * math.prod(tiles.count for tiles in cut.axes)
    pairs = steps * cut.queries * (cut.keys + problem.num_additional)
    axes = cut.inner if cut.own_loop else cut.axes
    queries, keys = (tuple(part) for part in zip(*((tiles.tile, tiles.width) for tiles in axes)))
    return Walk("tiled", queries, keys, 0, 0, steps, pairs, _flops(problem, kernel, pairs, padded=False))


def _other_configs(problem: Problem, maker: str, tiles: Iterable[tuple[Tile, Tile]]) -> list[table.Config]:
    """The forward tiles of the whole table for this rank, and those asked for, each shape once."""
    contents = table.packaged()
    found: dict[tuple, table.Config] = {}
    for entries in contents["kernels"]["forward"].values():
        for entry in entries.values():
            for more in ({}, entry.get("biased", {}), entry.get("hip", {}) if maker == "hip" else {}):
                cfg = table.entry_config(entry | more, problem.rank, contents["tiles"])
                found.setdefault((cfg.queries, cfg.keys), cfg)
    for queries, keys in tiles:
        fill = (1,) * (3 - problem.rank)
        cfg = table.Config((*fill, *queries), (*fill, *keys), 0, 0)  # type: ignore[arg-type]
        found.setdefault((cfg.queries, cfg.keys), cfg)
    return list(found.values())


def _check_tiles(tiles: Any, rank: int) -> list[tuple[Tile, Tile]]:
    checked = []
    for pair in tiles:
        if len(pair) != 2 or any(len(tile) != rank for tile in pair):
            raise ValueError(f"tiles must hold (queries, keys), each one number per axis ({rank}), got {pair!r}")
        for tile in pair:
            if any(type(n) is not int or n < 1 or n & (n - 1) for n in tile):
                raise ValueError(f"tiles must hold powers of two, got {pair!r}")
        checked.append((tuple(pair[0]), tuple(pair[1])))
    return checked


def plan_neighborhood_attention(
    grid: Sequence[int],
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    border: str = "shift",
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float16,
    additional_keys: int = 0,
    biased: bool = False,
    maker: str = "cuda",
    tiles: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
) -> Plan:
    """Useful and executed FLOPs of a `neighborhood_attention` call, its density and its speed-up bound over dense.

    grid: tokens per axis, one to three axes. kernel_size to border: as in `neighborhood_attention`. batch, heads,
    heads_kv (heads without it), head_dim, head_dim_v (head_dim without it), dtype: of the tensors; float64 is counted
    as float32 is, whose tiles it would have. additional_keys: how many.
    biased: the call has an offset bias, which may choose other tiles; the work of the bias's own gradient is not
    counted. maker: "cuda" or "hip", whose GPUs the tiles are for. tiles: further (queries, keys) to try forward, each
    a shape of powers of two.

    Raises TypeError, ValueError as `neighborhood_attention` does, and for a grid, head_dim, ... that is no shape.
    """
    sizes = {"batch": batch, "heads": heads, "heads_kv": heads if heads_kv is None else heads_kv, "head_dim": head_dim}
    sizes["head_dim_v"] = head_dim if head_dim_v is None else head_dim_v
    if isinstance(grid, int) or not 1 <= len(grid) <= 3:
        raise ValueError(f"grid must be one to three sizes, got {grid!r}")
    shape = tuple(grid)
    numbers = {**{f"grid[{axis}]": n for axis, n in enumerate(shape)}, **sizes, "additional_keys": additional_keys}
    for name, value in numbers.items():
        if type(value) is not int:
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        check_range(name, value, 0 if name == "additional_keys" else 1)
    for name in ("head_dim", "head_dim_v"):
        check_range(name, sizes[name], 1, 256)
    check_choice("maker", maker, ("cuda", "hip"))

    if heads % sizes["heads_kv"]:
        raise ValueError(f"heads must be a multiple of heads_kv, got {heads} and {sizes['heads_kv']}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    check_choice("dtype", dtype, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    problem = Problem(
        batch,
        shape,
        heads,
        sizes["heads_kv"],
        head_dim,
        sizes["head_dim_v"],
        *_geometry(shape, kernel_size, stride, dilation, is_causal, border),
        head_dim**-0.5,
        border,
        "offset" if biased else "none",
        additional_keys,
        dtype,
    )
    asked = _check_tiles(tiles, problem.rank)

    itemsize = min(dtype.itemsize, 4)

    def chosen(kernel: str) -> Walk:
        dims = problem.head_dim, problem.head_dim_v
        return _walk(problem, kernel, table.config(kernel, problem.rank, *dims, itemsize, biased, maker))

    useful = math.prod(axis_pairs(*axis) for axis in _axes(problem)) + problem.num_tokens * additional_keys
    dense = problem.num_tokens * (problem.num_tokens + additional_keys)
    forward = chosen("forward")
    others = [_walk(problem, "forward", cfg) for cfg in _other_configs(problem, maker, asked)]
    passes = {}
    for name, walks in (
        ("forward", (forward,)),
        ("backward", tuple(chosen(kernel) for kernel in (*BACKWARD, *(("grad_extra",) if additional_keys else ())))),
    ):
        passes[name] = Pass(
            _flops(problem, name, useful, padded=False),
            _flops(problem, name, dense, padded=False),
            walks,
            _tiled(problem, name),
            tuple(w for w in others if (w.queries, w.keys) != (forward.queries, forward.keys))
            if name == "forward"
            else (),
        )
    return Plan(problem, useful, dense, passes["forward"], passes["backward"], _traffic(problem, forward))


def _traffic(problem: Problem, walk: Walk) -> Traffic:
    size, width = problem.dtype.itemsize, problem.head_dim + problem.head_dim_v
    rows = problem.batch * problem.num_heads * problem.num_tokens
    queries = rows * (width * size + problem.compute_dtype.itemsize)  # query in, output and lse out
    keys = problem.batch * problem.num_heads_kv * (problem.num_tokens + problem.num_additional) * width * size
    walked = problem.batch * problem.num_heads * walk.steps * math.prod(walk.keys) * width * size
    return Traffic(queries + keys, queries + walked)
