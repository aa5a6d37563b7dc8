"""Neighborhood attention in Triton, forward; the backward is in `triton_backward.py`.

One kernel serves 1-D, 2-D and 3-D: grids are given three axes, the leading ones of size 1. A program owns one tile of
queries of one dilation group (the tokens with the same coordinate modulo the dilation) of one head of one batch item.
It walks the key tiles of the hull of its queries' windows, starting at the hull's corner, masks each pair exactly, and
keeps an online softmax in float32 and base 2; the additional keys join the same softmax afterwards. Nothing is
permuted or padded in memory: a group is read through strides multiplied by the dilation.

Source of the geometry: NATTEN 8c8729f (see `problem.py`); of the online softmax: Dao, FlashAttention-2 (2023).
Importing this module imports triton, so it is itself imported lazily.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.aot import Case
from attnzoo.kernels.dispatch import interpreting
from attnzoo.kernels.launch import launch, vendor
from attnzoo.kernels.library import last_dim_contiguous
from attnzoo.kernels.neighborhood_attention.problem import Problem
from attnzoo.kernels.triton_shared import (
    LN2,
    LOG2E,
    load_rows,
    on_device,
    online_softmax,
    precision,
    store_rows,
    wide,
    within,
)

MIN_HEAD_DIM, MAX_HEAD_DIM = 1, 256  # below 16 a dot is padded to its smallest width

# Geometry takes many values in one model: specialising on 1 or on multiples of 16 would only multiply compilations.
GEOMETRY = [f"{name}{axis}" for name in ("size", "kernel", "stride", "dilation") for axis in range(3)]
GEOMETRY += ["heads", "num_extra", "bias_weight0", "bias_weight1"]


# ----------------------------------------------------------------------------------------------- parts of the kernels


@triton.jit
def window(p, length, kernel, stride, CAUSAL: tl.constexpr, BORDER: tl.constexpr):
    """First key, one past the last key and unclipped first key of the windows of the queries at positions p."""
    if CAUSAL:
        leader = tl.minimum((p // stride) * stride + stride - 1, length - 1)
        start = leader - kernel + 1
        first = tl.maximum(start, 0)
        last = p + 1
    else:
        leader = tl.minimum((p // stride) * stride + stride // 2, length - 1)
        start = leader - kernel // 2
        if BORDER == "shift":
            start = tl.minimum(tl.maximum(start, 0), length - kernel)
        first = start
        last = start + kernel
        if BORDER == "mask":
            first = tl.maximum(first, 0)
            last = tl.minimum(last, length)
    return first, last, start


@triton.jit
def queries_of(first, last, length, kernel, stride, CAUSAL: tl.constexpr, BORDER: tl.constexpr):
    """The inverse of `window`: a range of query positions that holds all whose windows meet keys first .. last.

    The window's ends never decrease with the query's position, so that two bounds suffice; with a stride they may be
    a few queries too wide, and the pairs are masked exactly in any case.
    """
    if CAUSAL:
        low = first
        high = last + kernel
    else:
        low = first - (kernel - 1) // 2 - stride // 2
        high = last + kernel // 2 - stride // 2 + stride
        if BORDER == "shift":  # queries near an end share the window that was moved inward
            low = tl.where(first < kernel, 0, low)
            high = tl.where(last >= length - kernel, length, high)
    return tl.maximum(low, 0), tl.minimum(high, length)


@triton.jit
def place(n, SHAPE1: tl.constexpr, SHAPE2: tl.constexpr):
    """The three coordinates of the n-th member of a row-major tile [*, SHAPE1, SHAPE2]."""
    return n // (SHAPE1 * SHAPE2), (n // SHAPE2) % SHAPE1, n % SHAPE2


@triton.jit
def nth_tile(t, count1, count2, RANK: tl.constexpr):
    """Row-major tile number -> tile coordinates; axes that the rank lacks cost no division."""
    a0 = t * 0
    a1 = t * 0
    a2 = t
    if RANK >= 2:
        a2 = t % count2
        a1 = t // count2
    if RANK == 3:
        a0 = a1 // count1
        a1 = a1 % count1
    return a0, a1, a2


@triton.jit
def tile_of_program(
    pid, size0, size1, size2, dilation0, dilation1, dilation2,
    RANK: tl.constexpr, TILE0: tl.constexpr, TILE1: tl.constexpr, TILE2: tl.constexpr,
):  # fmt: skip
    """Program number -> (number of (batch, head), group per axis, first position of the tile per axis).

    Tiles of one group are neighbours in the launch order: they share keys in the cache.
    """
    tiles2 = tl.cdiv(tl.cdiv(size2, dilation2), TILE2)
    groups2 = tl.minimum(dilation2, size2)
    t0 = pid * 0
    t1 = pid * 0
    g0 = pid * 0
    g1 = pid * 0
    t2 = pid % tiles2
    rest = pid // tiles2
    if RANK >= 2:
        tiles1 = tl.cdiv(tl.cdiv(size1, dilation1), TILE1)
        t1 = rest % tiles1
        rest = rest // tiles1
    if RANK == 3:
        tiles0 = tl.cdiv(tl.cdiv(size0, dilation0), TILE0)
        t0 = rest % tiles0
        rest = rest // tiles0
    g2 = rest % groups2
    rest = rest // groups2
    if RANK >= 2:
        groups1 = tl.minimum(dilation1, size1)
        g1 = rest % groups1
        rest = rest // groups1
    if RANK == 3:
        groups0 = tl.minimum(dilation0, size0)
        g0 = rest % groups0
        rest = rest // groups0
    return rest, g0, g1, g2, t0 * TILE0, t1 * TILE1, t2 * TILE2


@triton.jit
def query_axis(
    t, i, group, size, kernel, stride, dilation, CAUSAL: tl.constexpr, BORDER: tl.constexpr, TILE: tl.constexpr
):
    """One axis of a tile of queries that begins at position t of its group; i: place in the tile.

    Per query: position, first key, one past the last key, unclipped first key. Of the whole tile: length of the group,
    first key and one past the last key (the ends never decrease with the position: two queries bound them all).
    """
    length = tl.cdiv(size - group, dilation)
    p = t + i
    first, last, start = window(tl.minimum(p, length - 1), length, kernel, stride, CAUSAL, BORDER)
    low, _last, _start = window(tl.minimum(t, length - 1), length, kernel, stride, CAUSAL, BORDER)
    _first, high, _start = window(tl.minimum(t + TILE, length) - 1, length, kernel, stride, CAUSAL, BORDER)
    return p, first, last, start, length, low, high


@triton.jit
def member(c0, c1, c2, length0, length1, length2, RANK: tl.constexpr):
    """Whether the positions lie in their group; borders of zeros reach beyond both ends."""
    inside = (c2 >= 0) & (c2 < length2)
    if RANK >= 2:
        inside = inside & (c1 >= 0) & (c1 < length1)
    if RANK == 3:
        inside = inside & (c0 >= 0) & (c0 < length0)
    return inside


@triton.jit
def visible(c0, c1, c2, first0, last0, first1, last1, first2, last2, RANK: tl.constexpr):
    """Which keys (positions c, one orientation) lie in the windows of which queries (the other orientation)."""
    seen = within(c2, first2, last2)
    if RANK >= 2:
        seen = seen & within(c1, first1, last1)
    if RANK == 3:
        seen = seen & within(c0, first0, last0)
    return seen


@triton.jit
def offsets_of(x0, x1, x2, stride_0, stride_1, stride_2, RANK: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of grid coordinates within one head of one batch item, in 64 bits where WIDE."""
    if WIDE:
        x0 = x0.to(tl.int64)
        x1 = x1.to(tl.int64)
        x2 = x2.to(tl.int64)
    offsets = x2 * stride_2
    if RANK >= 2:
        offsets += x1 * stride_1
    if RANK == 3:
        offsets += x0 * stride_0
    return offsets


@triton.jit
def rows_of(x0, x1, x2, size1, size2, heads, h, WIDE: tl.constexpr):
    """Rows of contiguous [*grid, heads] tensors within one batch item, in 64 bits where WIDE."""
    token = (x0 * size1 + x1) * size2 + x2
    if WIDE:
        token = token.to(tl.int64)
    return token * heads + h


@triton.jit
def bias_of_queries(
    bias, rows, b, h, p0, p1, p2, start0, start1, start2, kernel0, kernel1, kernel2, bias_b, bias_weight0, bias_weight1,
    BIAS: tl.constexpr,
):  # fmt: skip
    """(pointer, index per query): a pair's bias is at index + the key's position . (bias_weight0, bias_weight1, 1).

    That holds for both kinds: an offset bias is linear in key - query, a per-query one in key - start of the window.
    """
    index = rows * 0
    if BIAS == "offset":
        bias += h * (2 * kernel0 - 1) * bias_weight0
        index = (kernel0 - 1 - p0) * bias_weight0 + (kernel1 - 1 - p1) * bias_weight1 + kernel2 - 1 - p2
    if BIAS == "query":
        bias += b.to(tl.int64) * bias_b
        index = rows * (kernel0 * bias_weight0) - start0 * bias_weight0 - start1 * bias_weight1 - start2
    return bias, index


# --------------------------------------------------------------------------------------------------------- the kernel


@triton.jit(do_not_specialize=GEOMETRY)
def na_forward(
    query, key, value, bias, extra_key, extra_value, out, lse, scale, heads, num_extra,
    size0, size1, size2, kernel0, kernel1, kernel2, stride0, stride1, stride2, dilation0, dilation1, dilation2,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h, ek_b, ek_n, ek_h, ev_b, ev_n, ev_h,
    bias_b, bias_weight0, bias_weight1,
    HEADS_PER_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    RANK: tl.constexpr, CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, CAUSAL2: tl.constexpr, BORDER: tl.constexpr,
    BIAS: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TQ0: tl.constexpr, TQ1: tl.constexpr, TQ2: tl.constexpr, TK0: tl.constexpr, TK1: tl.constexpr, TK2: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries. The arguments are those that `common_arguments` and `forward` give."""
    BM: tl.constexpr = TQ0 * TQ1 * TQ2
    BN: tl.constexpr = TK0 * TK1 * TK2
    rest, g0, g1, g2, t0, t1, t2 = tile_of_program(
        tl.program_id(0), size0, size1, size2, dilation0, dilation1, dilation2, RANK, TQ0, TQ1, TQ2
    )
    b = rest // heads
    h = rest % heads
    h_kv = h // HEADS_PER_KV
    i0, i1, i2 = place(tl.arange(0, BM), TQ1, TQ2)
    p0, first0, last0, start0, length0, low0, high0 = query_axis(
        t0, i0, g0, size0, kernel0, stride0, dilation0, CAUSAL0, BORDER, TQ0
    )
    p1, first1, last1, start1, length1, low1, high1 = query_axis(
        t1, i1, g1, size1, kernel1, stride1, dilation1, CAUSAL1, BORDER, TQ1
    )
    p2, first2, last2, start2, length2, low2, high2 = query_axis(
        t2, i2, g2, size2, kernel2, stride2, dilation2, CAUSAL2, BORDER, TQ2
    )
    valid = (p0 < length0) & (p1 < length1) & (p2 < length2)
    last2 = tl.where(valid, last2, first2)  # queries beyond the group see nothing, and read no bias
    count1 = tl.cdiv(high1 - low1, TK1)
    count2 = tl.cdiv(high2 - low2, TK2)
    tiles = tl.maximum(tl.cdiv(high0 - low0, TK0), 0) * tl.maximum(count1, 0) * tl.maximum(count2, 0)

    x0 = g0 + p0 * dilation0
    x1 = g1 + p1 * dilation1
    x2 = g2 + p2 * dilation2
    query += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    key += b.to(tl.int64) * k_b + h_kv.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + h_kv.to(tl.int64) * v_h
    q = load_rows(query, offsets_of(x0, x1, x2, q_0, q_1, q_2, RANK, WIDE), valid, DIM, BLOCK_D, UPCAST)
    batch_rows = b.to(tl.int64) * size0 * size1 * size2 * heads
    rows = rows_of(x0, x1, x2, size1, size2, heads, h, WIDE)
    bias, bias_row = bias_of_queries(
        bias, rows, b, h, p0, p1, p2, start0, start1, start2, kernel0, kernel1, kernel2,
        bias_b, bias_weight0, bias_weight1, BIAS,
    )  # fmt: skip

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    scale2 = scale * LOG2E
    j0, j1, j2 = place(tl.arange(0, BN), TK1, TK2)
    for t in tl.range(0, tiles):
        a0, a1, a2 = nth_tile(t, count1, count2, RANK)
        c0 = low0 + a0 * TK0 + j0
        c1 = low1 + a1 * TK1 + j1
        c2 = low2 + a2 * TK2 + j2
        real = member(c0, c1, c2, length0, length1, length2, RANK)
        y0 = g0 + c0 * dilation0
        y1 = g1 + c1 * dilation1
        y2 = g2 + c2 * dilation2
        k = load_rows(key, offsets_of(y0, y1, y2, k_0, k_1, k_2, RANK, WIDE), real, DIM, BLOCK_D, UPCAST)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        seen = visible(
            c0[None, :], c1[None, :], c2[None, :], first0[:, None], last0[:, None], first1[:, None], last1[:, None],
            first2[:, None], last2[:, None], RANK,
        )  # fmt: skip
        if BIAS != "none":
            index = bias_row[:, None] + (c0 * bias_weight0 + c1 * bias_weight1 + c2)[None, :]
            logits += tl.load(bias + index, mask=seen, other=0.0).to(tl.float32) * LOG2E
        logits = tl.where(seen, logits, float("-inf"))
        v = load_rows(value, offsets_of(y0, y1, y2, v_0, v_1, v_2, RANK, WIDE), real, DIM_V, BLOCK_DV, UPCAST)
        top, total, acc = online_softmax(logits, v, top, total, acc, PRECISION)

    if EXTRA:
        extra_key += b.to(tl.int64) * ek_b + h_kv.to(tl.int64) * ek_h
        extra_value += b.to(tl.int64) * ev_b + h_kv.to(tl.int64) * ev_h
        for t in tl.range(0, num_extra, BN):
            n = t + tl.arange(0, BN)
            real = n < num_extra
            k = load_rows(extra_key, n * ek_n, real, DIM, BLOCK_D, UPCAST)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            logits = tl.where(real[None, :], logits, float("-inf"))
            v = load_rows(extra_value, n * ev_n, real, DIM_V, BLOCK_DV, UPCAST)
            top, total, acc = online_softmax(logits, v, top, total, acc, PRECISION)

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_rows(out + batch_rows * DIM_V, rows * DIM_V, valid, acc, DIM_V, BLOCK_DV)
    natural = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(lse + batch_rows + rows, natural, mask=valid)


# ------------------------------------------------------------------------------------------------------- the launcher


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
    return max(32, triton.next_power_of_2(max(head_dim, head_dim_v)))


@functools.cache
def config(kernel: str, rank: int, head_dim: int, head_dim_v: int, itemsize: int, biased: bool, maker: str) -> Config:
    """The table's entry: configs/autotune/neighborhood_attention.json, by kernel, element size, head dim and rank.

    An entry may carry other numbers for calls with a bias ("biased": its indices take registers), and for "hip", which
    win. maker is "cuda", "hip" or "interpreter"; the interpreter, whose cost is per step, has tiles of its own.
    """
    if maker == "interpreter":
        entry = _table()["interpreter"]
    else:
        entry = _table()["kernels"][kernel][str(itemsize)][str(bucket(head_dim, head_dim_v))]
        entry = entry | (entry.get("biased", {}) if biased else {}) | (entry.get("hip", {}) if maker == "hip" else {})
    shapes = _table()["tiles"][str(rank)]

    def tile(tokens: int) -> tuple[int, int, int]:
        shape = shapes[str(tokens)]
        return (*(1,) * (3 - rank), *shape)  # type: ignore[return-value]

    return Config(tile(entry["queries"]), tile(entry["keys"]), entry["warps"], entry["stages"])


def config_for(kernel: str, problem: Problem) -> Config:
    """The configuration of one kernel for a problem, on the GPUs that this torch was built for."""
    dims = problem.head_dim, problem.head_dim_v
    return config(kernel, problem.rank, *dims, problem.dtype.itemsize, problem.bias != "none", vendor())


def three(values: tuple, filler: Any) -> tuple:
    """A tuple of one entry per axis as three axes, `filler` for the leading ones that the grid lacks."""
    return (*(filler,) * (3 - len(values)), *values)


def grid_strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    """Strides of [B, *grid, heads, dim] as the kernels name them, three axes, 0 for the axes that the grid lacks."""
    batch, *axes, heads, _ = tensor.stride()
    names = [f"{prefix}_{name}" for name in ("b", "0", "1", "2", "h")]
    return dict(zip(names, (batch, *three(tuple(axes), 0), heads)))


def extra_strides(prefix: str, tensor: Tensor | None) -> dict[str, int]:
    """Strides of additional keys or values [B, n, heads_kv, dim]."""
    strides = (0, 0, 0) if tensor is None else tensor.stride()[:3]
    return dict(zip((f"{prefix}_b", f"{prefix}_n", f"{prefix}_h"), strides))


def geometry(problem: Problem) -> dict[str, Any]:
    """The arguments that say where the windows lie, named as in the kernels."""
    arguments: dict[str, Any] = {}
    for name, values in (
        ("size", problem.grid),
        ("kernel", problem.kernel_size),
        ("stride", problem.stride),
        ("dilation", problem.dilation),
    ):
        arguments |= {f"{name}{axis}": value for axis, value in enumerate(three(values, 1))}
    arguments |= {f"CAUSAL{axis}": value for axis, value in enumerate(three(problem.is_causal, False))}
    return arguments | {"RANK": problem.rank, "BORDER": problem.border}


def blocks(problem: Problem) -> dict[str, Any]:
    """The compile-time arguments that head dims, dtype and tensors' sizes decide."""
    return {
        "HEADS_PER_KV": problem.num_heads // problem.num_heads_kv,
        "DIM": problem.head_dim,
        "DIM_V": problem.head_dim_v,
        "BLOCK_D": max(16, triton.next_power_of_2(problem.head_dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(problem.head_dim_v)),
        "UPCAST": interpreting() and problem.dtype == torch.bfloat16,
        "PRECISION": precision(),
    }


def bias_arguments(bias: Tensor | None, problem: Problem) -> dict[str, int | str]:
    """How the kernels index a contiguous bias: linear in key - query (offset) or in the window's slots (query)."""
    extents = [2 * k - 1 if problem.bias == "offset" else k for k in three(problem.kernel_size, 1)]
    batch = 0 if bias is None or problem.bias == "offset" or bias.shape[0] == 1 else bias.stride(0)
    return {
        "BIAS": problem.bias if bias is not None else "none",
        "bias_b": batch,
        "bias_weight0": extents[1] * extents[2],
        "bias_weight1": extents[2],
    }


def tile_arguments(cfg: Config) -> dict[str, int]:
    """Tiles, warps and stages as launch arguments."""
    tiles = {f"TQ{axis}": n for axis, n in enumerate(cfg.queries)} | {f"TK{axis}": n for axis, n in enumerate(cfg.keys)}
    return tiles | {"num_warps": cfg.num_warps, "num_stages": cfg.num_stages}


def count_tiles(problem: Problem, tile: tuple[int, int, int]) -> int:
    """Tiles in all dilation groups of one head of one batch item."""
    per_axis = (
        min(dilation, size) * triton.cdiv(triton.cdiv(size, dilation), length)
        for size, dilation, length in zip(three(problem.grid, 1), three(problem.dilation, 1), tile)
    )
    return math.prod(per_axis)


class Inputs(NamedTuple):
    """The tensors of a call as the kernels take them: last dimensions contiguous, None where there is none."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    extra_key: Tensor | None
    extra_value: Tensor | None


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    problem: Problem,
) -> Inputs:
    """Copies what can't be read as it is: rows that are not contiguous, and a bias that is not."""
    extra = (additional_keys, additional_values) if problem.num_additional else (None, None)
    extra_key, extra_value = (None if t is None else last_dim_contiguous(t) for t in extra)
    query, key, value = (last_dim_contiguous(t) for t in (query, key, value))
    return Inputs(query, key, value, None if bias is None else bias.contiguous(), extra_key, extra_value)


def common_arguments(inputs: Inputs, problem: Problem, cfg: Config, *others: Tensor | None) -> dict[str, Any]:
    """What forward and backward kernels share; a tensor that is absent is stood in for by the query, never read.

    others: tensors of the call beyond the inputs, for the decision whether offsets need 64 bits.
    """
    query, key, value, bias, extra_key, extra_value = inputs
    return {
        "query": query,
        "key": key,
        "value": value,
        "bias": query if bias is None else bias,
        "extra_key": query if extra_key is None else extra_key,
        "extra_value": query if extra_value is None else extra_value,
        "scale": problem.scale,
        "heads": problem.num_heads,
        "num_extra": problem.num_additional,
        "EXTRA": extra_key is not None,
        "WIDE": wide(*inputs, *others),
        **grid_strides("q", query),
        **grid_strides("k", key),
        **grid_strides("v", value),
        **extra_strides("ek", extra_key),
        **extra_strides("ev", extra_value),
        **geometry(problem),
        **blocks(problem),
        **bias_arguments(bias, problem),
        **tile_arguments(cfg),
    }


def reasons(problem: Problem) -> list[str]:
    """Why the Triton kernels can't serve a problem; an empty list where they can."""
    why = []
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        why.append(f"triton computes float32, float16 and bfloat16; got {str(problem.dtype).removeprefix('torch.')}")
    for name, dim in (("head_dim", problem.head_dim), ("value head_dim", problem.head_dim_v)):
        if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
            why.append(f"triton takes {name} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}; got {dim}")
    if not 1 <= problem.rank <= 3:
        why.append(f"triton takes 1 to 3 grid axes; got {problem.rank}")
    return why


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """Attention output [B, *grid, heads, head_dim_v] in the query's dtype, and lse [B, *grid, heads] in float32.

    Inputs are read through their strides; one whose last dimension is not contiguous is copied once, and so is a bias
    that is not contiguous.
    """
    inputs = prepare(query, key, value, bias, additional_keys, additional_values, problem)
    out = torch.empty((*query.shape[:-1], problem.head_dim_v), dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    cfg = config_for("forward", problem)
    programs = problem.batch * problem.num_heads * count_tiles(problem, cfg.queries)
    with on_device(query):
        launch(na_forward, (programs,), out=out, lse=lse, **common_arguments(inputs, problem, cfg, out))
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    needs: tuple[bool, ...] = (True,) * 6,
) -> tuple[Tensor | None, ...]:
    """The gradients of `triton_backward.backward`: query, key, value, bias, additional_keys, additional_values."""
    from attnzoo.kernels.neighborhood_attention import triton_backward  # it builds on this module

    tensors = (query, key, value, bias, additional_keys, additional_values)
    return triton_backward.backward(grad_out, grad_lse, *tensors, out, lse, problem, needs)


# ------------------------------------------------------------------------------------------- compiled ahead of time


def _call_on_meta(
    dtype: torch.dtype, grid: tuple[int, ...], kernel_size: tuple[int, ...], head_dim: int, bias: str, extra: int
) -> None:
    """Forward and backward of one call on tensors without memory: its launches are what `aot` compiles."""
    heads = 4
    query = torch.empty(2, *grid, heads, head_dim, dtype=dtype, device="meta")
    table = torch.empty(heads, *(2 * k - 1 for k in kernel_size), device="meta") if bias == "offset" else None
    if bias == "query":
        table = torch.empty(2, *grid, heads, math.prod(kernel_size), device="meta")
    more = torch.empty(2, extra, heads, head_dim, dtype=dtype, device="meta") if extra else None
    ones, no = (1,) * len(grid), (False,) * len(grid)
    problem = Problem(
        2,
        grid,
        heads,
        heads,
        head_dim,
        head_dim,
        kernel_size,
        ones,
        ones,
        no,
        head_dim**-0.5,
        "shift",
        bias,
        extra,
        dtype,
    )
    out, lse = forward(query, query, query, table, more, more, problem)
    backward(out, lse, query, query, query, table, more, more, out, lse, problem)


_SPILLS = dict.fromkeys(("na_grad_query", "na_grad_key_value", "na_grad_offset_bias", "na_grad_extra"), 64)
_GRIDS = {2: ((56, 56), (7, 7)), 3: ((12, 24, 24), (5, 7, 7))}
AOT = [
    Case(
        f"{str(dtype)[6:]} d{head_dim} {rank}-D" + (f" {bias} bias" if bias != "none" else "") + " extra" * bool(extra),
        functools.partial(_call_on_meta, dtype, *_GRIDS[rank], head_dim, bias, extra),
        quick=(head_dim, bias, dtype) == (32, "offset", torch.float16),
        spills=_SPILLS,
    )
    for dtype, head_dim, rank, bias, extra in (
        (torch.float16, 32, 2, "offset", 16),
        (torch.float16, 64, 3, "offset", 16),
        (torch.float16, 128, 2, "offset", 16),
        (torch.float32, 64, 2, "offset", 16),
    )
]
