"""Read-outs of the softmax in Triton: column sums and the probabilities of few rows. No gradient, no atomics.

Both begin with the rows' lse, which is the forward without its values; a second pass makes the probabilities of a tile
from it and keeps of them what was asked for:

    edited_column_sums  key-major: a tile of keys of one query head, summed over the rows that may see it
    edited_probs        a tile of rows and keys, stored, or its maximum or mean over the query heads
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.aot import Case
from attnzoo.kernels.edited_attention.problem import Edits, Visibility
from attnzoo.kernels.edited_attention.triton import run
from attnzoo.kernels.edited_attention.triton_parts import (
    VARYING,
    common_arguments,
    edited_logits,
    launch_with,
    of_batch,
    on_meta,
    products,
    rows_seeing,
    span_of,
)
from attnzoo.kernels.launch import vendor
from attnzoo.kernels.triton_shared import load_lse, load_rows, on_device

# (rows, keys, warps, stages) by element size and the power of two, from 32, that holds the head dim.
TILES = {
    "cuda": {
        2: {32: (64, 64, 8, 2), 64: (64, 64, 8, 2), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
        4: {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "hip": {
        2: {32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
        4: {32: (32, 32, 4, 1), 64: (32, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
}


@triton.jit
def probabilities(
    query, key, lse, k, i, head, kv_head, n, b, valid, inside, given, heads,
    scale, softcap, temperature, num_rows, num_keys, offset, window, q_n, q_h, k_n, k_h,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, REAL: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, BOOST: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax [rows, keys] of one query head: rows i, keys n, whose tile is k; query and key at the batch entry."""
    query += head.to(tl.int64) * q_h
    key += kv_head.to(tl.int64) * k_h
    q_offsets = i.to(tl.int64) * q_n
    q = load_rows(query, q_offsets, valid, DIM, BLOCK_D, UPCAST)
    place = offset + i
    own_span = span_of(given[1], place, valid, num_keys, SPANS)
    a = products(
        q, k, query, q_offsets, valid, key, n.to(tl.int64) * k_n, inside, DIM, BLOCK_D, CHUNK, UPCAST, PRECISION
    )
    _, z = edited_logits(
        a * scale, i, head, head, place, own_span, valid, n, inside, given, softcap, temperature, window,
        CAUSAL, WINDOW, REAL, SPANS, MASK, BIAS, BOOST, SOFTCAP,
    )  # fmt: skip
    lse2 = load_lse(lse, (b.to(tl.int64) * num_rows + i) * heads + head, valid)
    return tl.math.exp2(z - lse2[:, None])


@triton.jit(do_not_specialize=VARYING)
def edited_column_sums(
    query, key, real, spans, mask, bias, boost, groups, lse, sums,
    scale, softcap, temperature, num_rows, num_keys, heads_kv, offset, window,
    q_b, q_n, q_h, k_b, k_n, k_h, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
    bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    REPEATS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, REAL: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, BOOST: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """sums [B, H, Nk] of one tile of keys of one query head."""
    heads = heads_kv * REPEATS
    b = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    kv_head = head // REPEATS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < num_keys
    last = tl.minimum(tl.program_id(0) * BN + BN, num_keys) - 1
    low, high = rows_seeing(tl.program_id(0) * BN, last, offset, window, num_rows, CAUSAL, WINDOW, SPANS)
    query += b.to(tl.int64) * q_b
    key += b.to(tl.int64) * k_b
    given = of_batch(
        b, real, spans, mask, bias, boost, groups, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
        bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    )  # fmt: skip
    k = load_rows(key + kv_head.to(tl.int64) * k_h, n.to(tl.int64) * k_n, inside, DIM, BLOCK_D, UPCAST)
    total = tl.zeros([BN], tl.float32)
    for start in tl.range(low, high, BM):
        i = start + tl.arange(0, BM)
        p = probabilities(
            query, key, lse, k, i, head, kv_head, n, b, i < high, inside, given, heads,
            scale, softcap, temperature, num_rows, num_keys, offset, window, q_n, q_h, k_n, k_h,
            DIM, BLOCK_D, CHUNK, CAUSAL, WINDOW, REAL, SPANS, MASK, BIAS, BOOST, SOFTCAP, UPCAST, PRECISION,
        )  # fmt: skip
        total += tl.sum(p, 0)
    tl.store(sums + tl.program_id(1).to(tl.int64) * num_keys + n, total, mask=inside)


@triton.jit(do_not_specialize=[*VARYING, "out_heads"])
def edited_probs(
    query, key, real, spans, mask, bias, boost, groups, lse, probs,
    scale, softcap, temperature, num_rows, num_keys, heads_kv, out_heads, offset, window,
    q_b, q_n, q_h, k_b, k_n, k_h, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
    bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    REPEATS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, REAL: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, BOOST: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    REDUCTION: tl.constexpr,
):  # fmt: skip
    """probs [B, R, out_heads, Nk] of one tile of rows and keys; REDUCTION: "none", or "max" or "mean" over heads."""
    heads = heads_kv * REPEATS
    b = tl.program_id(2) // out_heads
    own_head = tl.program_id(2) % out_heads
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    valid = i < num_rows
    inside = n < num_keys
    query += b.to(tl.int64) * q_b
    key += b.to(tl.int64) * k_b
    given = of_batch(
        b, real, spans, mask, bias, boost, groups, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
        bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    )  # fmt: skip
    kept = tl.zeros([BM, BN], tl.float32)
    for one in tl.range(0, heads // out_heads):
        head = own_head + one
        kv_head = head // REPEATS
        k = load_rows(key + kv_head.to(tl.int64) * k_h, n.to(tl.int64) * k_n, inside, DIM, BLOCK_D, UPCAST)
        p = probabilities(
            query, key, lse, k, i, head, kv_head, n, b, valid, inside, given, heads,
            scale, softcap, temperature, num_rows, num_keys, offset, window, q_n, q_h, k_n, k_h,
            DIM, BLOCK_D, CHUNK, CAUSAL, WINDOW, REAL, SPANS, MASK, BIAS, BOOST, SOFTCAP, UPCAST, PRECISION,
        )  # fmt: skip
        if REDUCTION == "max":
            kept = tl.maximum(kept, p)
        else:
            kept += p
    if REDUCTION == "mean":
        kept = kept / heads
    at = ((b.to(tl.int64) * num_rows + i) * out_heads + own_head) * num_keys
    tl.store(probs + at[:, None] + n[None, :], kept, mask=valid[:, None] & inside[None, :])


def _tiles(query: Tensor, num_rows: int, block_d: int) -> dict[str, int]:
    """Tiles and options of a call, by argument."""
    table = TILES["hip" if vendor() == "hip" else "cuda"][query.element_size()]
    rows, keys, num_warps, num_stages = table[max(32, block_d)]
    rows = min(rows, max(16, triton.next_power_of_2(num_rows)))
    return {"BM": rows, "BN": keys, "num_warps": num_warps, "num_stages": num_stages}


def column_sums(query: Tensor, key: Tensor, visibility: Visibility, edits: Edits) -> Tensor:
    """Sum over all of query's rows of the softmax, float32 [B, H, Nk]."""
    (batch, num_rows, num_heads, _), num_keys = query.shape, key.shape[1]
    sums = torch.empty((batch, num_heads, num_keys), dtype=torch.float32, device=query.device)
    if sums.numel() == 0 or num_rows == 0:
        return sums.zero_()
    lse = run(query, key, key, visibility, edits, values=False)[1]
    common = common_arguments(query, key, key, visibility, edits, 1)
    tiles = _tiles(query, num_rows, common["BLOCK_D"])
    grid = (triton.cdiv(num_keys, tiles["BN"]), batch * num_heads)
    with on_device(query):
        launch_with(edited_column_sums, grid, common, lse=lse, sums=sums, **tiles)
    return sums


def probs(query: Tensor, key: Tensor, visibility: Visibility, edits: Edits, head_reduction: str) -> Tensor:
    """The softmax of all of query's rows, float32 [B, R, H, Nk]; [B, R, Nk] for head_reduction "max" or "mean"."""
    (batch, num_rows, num_heads, _), num_keys = query.shape, key.shape[1]
    reduced = head_reduction != "none"
    shape = (batch, num_rows, num_keys) if reduced else (batch, num_rows, num_heads, num_keys)
    found = torch.empty(shape, dtype=torch.float32, device=query.device)
    if found.numel() == 0:
        return found
    lse = run(query, key, key, visibility, edits, values=False)[1]
    common = common_arguments(query, key, key, visibility, edits, 1)
    tiles = _tiles(query, num_rows, common["BLOCK_D"])
    out_heads = 1 if reduced else num_heads
    grid = (triton.cdiv(num_rows, tiles["BM"]), triton.cdiv(num_keys, tiles["BN"]), batch * out_heads)
    with on_device(query):
        launch_with(
            edited_probs, grid, common, lse=lse, probs=found, out_heads=out_heads, REDUCTION=head_reduction, **tiles
        )
    return found


# ------------------------------------------------------------------------------------------- compiled ahead of time


def _call_on_meta(dtype: torch.dtype, head_dim: int, edited: str, what: str) -> None:
    query, key, _, visibility, edits = on_meta(dtype, 512 if what == "column sums" else 1, head_dim, edited)
    edits = Edits(edits.scale, edits.softcap, edits.temperature, edits.key_bias, edits.boost)
    if what == "column sums":
        column_sums(query, key, visibility, edits)
    else:
        probs(query, key, visibility, edits, what.removeprefix("probs "))


AOT = [
    Case(
        f"{str(dtype).removeprefix('torch.')} d{head_dim} {what} {edited}",
        functools.partial(_call_on_meta, dtype, head_dim, edited, what),
        quick=dtype == torch.float16,
    )
    for dtype, head_dim, edited, what in (
        (torch.bfloat16, 128, "boost", "column sums"),
        (torch.bfloat16, 128, "everything", "column sums"),
        (torch.float16, 64, "everything", "column sums"),
        (torch.float32, 128, "bias by head", "column sums"),
        (torch.float32, 256, "everything", "column sums"),
        (torch.bfloat16, 128, "boost", "probs max"),
        (torch.float16, 64, "everything", "probs mean"),
        (torch.float32, 128, "everything", "probs none"),
        (torch.bfloat16, 256, "mask", "probs none"),
    )
]
