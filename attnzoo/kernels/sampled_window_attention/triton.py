"""Sampled window attention in Triton, forward.

A program owns a tile of queries of one window of one head. It walks the window's keys: four gathered rows per key,
weighted in float32 and added up, make a tile of keys or values in registers, which meets the queries in an online
softmax. Corners outside the map are not read.

Source: Dao, FlashAttention-2 (2023), section 3.1.1, with the reading in front.

Importing this module imports triton: do it lazily.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.aot import Case
from attnzoo.kernels.dispatch import backend_module, interpreting
from attnzoo.kernels.launch import launch, vendor
from attnzoo.kernels.library import last_dim_contiguous
from attnzoo.kernels.sampled_window_attention.problem import Problem, describe
from attnzoo.kernels.triton_shared import (
    LN2,
    LOG2E,
    load_rows,
    on_device,
    online_softmax,
    precision,
    store_rows,
    wide,
)

MAX_HEAD_DIM = 256
# (most queries, most keys, warps, stages) by kernel, vendor, element size and the power of two, from 32, that holds
# both head dims.
TILES: dict[str, dict[str, dict[int, dict[int, tuple[int, int, int, int]]]]] = {
    "forward": {
        "cuda": {
            2: {32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (64, 16, 8, 1), 256: (64, 16, 8, 1)},
            4: {32: (64, 32, 8, 1), 64: (32, 32, 8, 1), 128: (32, 16, 4, 1), 256: (16, 16, 8, 1)},
        },
        "hip": {
            2: {32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (64, 16, 4, 1)},
            4: {32: (64, 32, 4, 1), 64: (32, 32, 4, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
        },
    },
    "grad_query": {
        "cuda": {
            2: {32: (64, 64, 4, 1), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (32, 16, 8, 1)},
            4: {32: (64, 32, 8, 1), 64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        },
        "hip": {
            2: {32: (64, 64, 4, 1), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (32, 16, 4, 1)},
            4: {32: (64, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
        },
    },
    "grad_keys": {
        "cuda": {
            2: {32: (64, 64, 4, 1), 64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
            4: {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
        },
        "hip": {
            2: {32: (64, 64, 4, 1), 64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
            4: {32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
        },
    },
    "grad_bias": {
        "cuda": {
            2: {32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (32, 16, 8, 1)},
            4: {32: (64, 32, 8, 1), 64: (32, 32, 8, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
        },
        "hip": {
            2: {32: (64, 64, 4, 1), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (32, 16, 4, 1)},
            4: {32: (64, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
        },
    },
}
SIZES = ["height", "width", "key_height", "key_width", "across", "windows", "num_samples"]


@triton.jit
def axis_corners(position, size):
    """(low, fraction) on an axis: corners low and low + 1 lie outside it for a position beyond it, infinity included.

    Not-a-number stays in the fraction.
    """
    position = tl.minimum(tl.maximum(position, -2.0, tl.PropagateNan.ALL), size.to(tl.float32), tl.PropagateNan.ALL)
    low = tl.floor(position)
    return tl.where(low == low, low, 0.0).to(tl.int32), position - low


@triton.jit
def key_corners(positions, n, num_samples, p_n, p_c, key_height, key_width):
    """Of the keys numbered n: y, x, their fractions, and which of the corners down 0, 1 and across 0, 1 lie inside."""
    real = n < num_samples
    offsets = n.to(tl.int64) * p_n
    y, part_y = axis_corners(tl.load(positions + offsets, mask=real, other=-2.0).to(tl.float32), key_height)
    x, part_x = axis_corners(tl.load(positions + offsets + p_c, mask=real, other=-2.0).to(tl.float32), key_width)
    down0 = real & (y >= 0) & (y < key_height)
    down1 = real & (y >= -1) & (y < key_height - 1)
    across0 = (x >= 0) & (x < key_width)
    across1 = (x >= -1) & (x < key_width - 1)
    return y, x, part_y, part_x, down0, down1, across0, across1


@triton.jit
def cell_offsets(y, x, stride_y, stride_x, WIDE: tl.constexpr):
    """Offsets of map cells, in 64 bits where an item's map needs them."""
    if WIDE:
        return y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    else:
        return y * stride_y + x * stride_x


@triton.jit
def sample_rows(
    pointer, y, x, part_y, part_x, down0, down1, across0, across1, stride_y, stride_x,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows read at real-valued positions, [positions, BLOCK] in the pointer's dtype (float32 with UPCAST)."""
    offsets = cell_offsets(y, x, stride_y, stride_x, WIDE)
    rest_y = 1.0 - part_y
    rest_x = 1.0 - part_x
    row = load_rows(pointer, offsets, down0 & across0, COLUMNS, BLOCK, UPCAST)
    total = row.to(tl.float32) * (rest_y * rest_x)[:, None]
    row = load_rows(pointer, offsets + stride_x, down0 & across1, COLUMNS, BLOCK, UPCAST)
    total += row.to(tl.float32) * (rest_y * part_x)[:, None]
    row = load_rows(pointer, offsets + stride_y, down1 & across0, COLUMNS, BLOCK, UPCAST)
    total += row.to(tl.float32) * (part_y * rest_x)[:, None]
    row = load_rows(pointer, offsets + stride_y + stride_x, down1 & across1, COLUMNS, BLOCK, UPCAST)
    total += row.to(tl.float32) * (part_y * part_x)[:, None]
    return total.to(row.dtype)


@triton.jit
def window_queries(i, window, across, height, width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(row, column, number on the map, exists) of the queries numbered i of a window."""
    y = (window // across) * HEIGHT + i // WIDTH
    x = (window % across) * WIDTH + i % WIDTH
    return y, x, y * width + x, i < HEIGHT * WIDTH


@triton.jit(do_not_specialize=SIZES)
def sampled_forward(
    query, key, value, positions, bias, out, lse, scale, heads,
    height, width, key_height, key_width, across, windows, num_samples,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h, p_b, p_down, p_across, p_h, p_n, p_c,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output and lse of one tile of queries of one window and head."""
    TILES: tl.constexpr = (HEIGHT * WIDTH + BM - 1) // BM
    pid = tl.program_id(0)
    i = (pid % TILES) * BM + tl.arange(0, BM)
    h = (pid // TILES) % heads
    window = (pid // TILES // heads) % windows
    b = (pid // TILES // heads // windows).to(tl.int64)
    y, x, token, valid = window_queries(i, window, across, height, width, HEIGHT, WIDTH)
    query += b * q_b + h.to(tl.int64) * q_h
    key += b * k_b + (h // GROUP).to(tl.int64) * k_h
    value += b * v_b + (h // GROUP).to(tl.int64) * v_h
    positions += b * p_b + (window // across).to(tl.int64) * p_down + (window % across).to(tl.int64) * p_across
    positions += h.to(tl.int64) * p_h
    q = load_rows(query, cell_offsets(y, x, q_y, q_x, WIDE), valid, DIM, BLOCK_D, UPCAST)
    if BIAS:
        bias += h.to(tl.int64) * (HEIGHT * WIDTH) * num_samples
        bias_row = i.to(tl.int64) * num_samples

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    for start in tl.range(0, num_samples, BN):
        n = start + tl.arange(0, BN)
        ky, kx, part_y, part_x, down0, down1, across0, across1 = key_corners(
            positions, n, num_samples, p_n, p_c, key_height, key_width
        )
        k = sample_rows(
            key, ky, kx, part_y, part_x, down0, down1, across0, across1, k_y, k_x, DIM, BLOCK_D, WIDE, UPCAST
        )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        seen = (n < num_samples)[None, :]
        if BIAS:
            added = tl.load(bias + bias_row[:, None] + n[None, :], mask=seen & valid[:, None], other=0.0)
            logits += added.to(tl.float32) * LOG2E
        logits = tl.where(seen, logits, float("-inf"))
        v = sample_rows(
            value, ky, kx, part_y, part_x, down0, down1, across0, across1, v_y, v_x, DIM_V, BLOCK_DV, WIDE, UPCAST
        )
        top, total, acc = online_softmax(logits, v, top, total, acc, PRECISION)

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    natural = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN2)
    row = b * height * width * heads + token.to(tl.int64) * heads + h
    store_rows(out, row * DIM_V, valid, acc, DIM_V, BLOCK_DV)
    tl.store(lse + row, natural, mask=valid)


def reasons(problem: Problem) -> list[str]:
    """Why the Triton kernels can't serve a problem; an empty list where they can."""
    why = []
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        why.append(f"triton computes float32, float16 and bfloat16; got {str(problem.dtype).removeprefix('torch.')}")
    for name, dim in (("head_dim", problem.head_dim), ("value head_dim", problem.head_dim_v)):
        if dim > MAX_HEAD_DIM:
            why.append(f"triton takes {name} up to {MAX_HEAD_DIM}; got {dim}")
    return why


def strides(tensor: Tensor, prefix: str, names: str) -> dict[str, int]:
    """The named strides of a tensor, 0 along axes of size 1."""
    listed = zip(names.split(), tensor.shape, tensor.stride())
    return {f"{prefix}_{name}": (stride if size > 1 else 0) for name, size, stride in listed}


def arguments(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, bias: Tensor | None, problem: Problem,
    *others: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """What all kernels of this operation take; tensors with a last dimension of stride 1, a contiguous bias."""
    blocks = {
        name: max(16, triton.next_power_of_2(dim))
        for name, dim in (("BLOCK_D", problem.head_dim), ("BLOCK_DV", problem.head_dim_v))
    }
    tiles = TILES[kernel]["hip" if vendor() == "hip" else "cuda"][query.element_size()][max(32, *blocks.values())]
    return {
        "query": query,
        "key": key,
        "value": value,
        "positions": positions,
        "bias": query if bias is None else bias,
        "scale": problem.scale,
        "heads": problem.num_heads,
        "height": problem.grid[0],
        "width": problem.grid[1],
        "key_height": problem.key_grid[0],
        "key_width": problem.key_grid[1],
        "across": problem.windows[1],
        "windows": problem.num_windows,
        "num_samples": problem.num_samples,
        **strides(query, "q", "b y x h"),
        **strides(key, "k", "b y x h"),
        **strides(value, "v", "b y x h"),
        **strides(positions, "p", "b down across h n c"),
        "GROUP": problem.group,
        "DIM": problem.head_dim,
        "DIM_V": problem.head_dim_v,
        **blocks,
        "HEIGHT": problem.window_size[0],
        "WIDTH": problem.window_size[1],
        "BIAS": bias is not None,
        "WIDE": wide(query, key, value, *others),
        "UPCAST": interpreting() and query.dtype == torch.bfloat16,
        "PRECISION": precision(),
        "BM": min(tiles[0], max(16, triton.next_power_of_2(problem.area))),
        "BN": min(tiles[1], max(16, triton.next_power_of_2(problem.num_samples))),
        "num_warps": tiles[2],
        "num_stages": tiles[3],
    }


def prepared(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors as the kernels take them: one copy of what is not laid out so."""
    query, key, value = (last_dim_contiguous(tensor) for tensor in (query, key, value))
    return query, key, value, positions, None if bias is None else bias.contiguous()


def forward(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, bias: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """out [B, H, W, heads, head_dim_v] in the query's dtype and lse [B, H, W, heads] in float32."""
    given = prepared(query, key, value, positions, bias)
    out = torch.empty((*query.shape[:4], problem.head_dim_v), dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    shared = arguments("forward", *given, problem)
    programs = triton.cdiv(problem.area, shared["BM"]) * problem.num_heads * problem.num_windows * problem.batch
    with on_device(query):
        launch(sampled_forward, (programs,), out=out, lse=lse, **shared)
    return out, lse


def fused_backward(problem: Problem) -> bool:
    """False for float32 beyond head dim 128 on NVIDIA: `sampled_grad_query` would spill 600 bytes and more there."""
    return not (vendor() == "cuda" and problem.dtype.itemsize == 4 and max(problem.head_dim, problem.head_dim_v) > 128)


def backward(*given: Any) -> list[Tensor | None]:
    """See `triton_backward.backward` (imported when first called: it imports from here); the reference's where
    `fused_backward` says no."""
    module = "triton_backward" if fused_backward(given[-2]) else "reference"
    return backend_module("sampled_window_attention", module).backward(*given)


# ------------------------------------------------------------------------------------------- compiled ahead of time


def _call_on_meta(dtype: torch.dtype, head_dim: int, window: int, samples: int) -> None:
    """Forward and backward on tensors without memory, every gradient asked for."""
    heads, size = 6, 8 * window
    query = torch.empty(2, size, size, heads, head_dim, dtype=dtype, device="meta")
    positions = torch.empty(2, 8, 8, heads, samples, 2, device="meta")
    bias = torch.empty(heads, window**2, samples, device="meta")
    problem = describe((query, query, query, positions), (window, window), head_dim**-0.5)
    out, lse = forward(query, query, query, positions, bias, problem)
    if fused_backward(problem):
        backward(out, lse, query, query, query, positions, bias, out, lse, problem, (True,) * 5)


_SPILLS = dict.fromkeys(("sampled_grad_query", "sampled_grad_keys", "sampled_grad_bias"), 64)
AOT = [
    Case(
        f"{str(dtype).removeprefix('torch.')} d{head_dim} window {window} keys {samples}",
        functools.partial(_call_on_meta, dtype, head_dim, window, samples),
        quick=(dtype, head_dim) == (torch.float16, 32),
        spills=_SPILLS,
    )
    for dtype, head_dim, window, samples in (
        (torch.float16, 32, 7, 49),
        (torch.bfloat16, 64, 14, 196),
        (torch.float16, 80, 7, 49),
        (torch.bfloat16, 256, 7, 49),
        (torch.float32, 32, 7, 49),
        (torch.float32, 64, 7, 49),
        (torch.float32, 128, 7, 49),
        (torch.float32, 256, 7, 49),
    )
]
