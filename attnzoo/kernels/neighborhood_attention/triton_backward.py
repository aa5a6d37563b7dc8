"""Neighborhood attention in Triton, backward. No atomics: every run gives the same bits.

With p = exp(logits - lse) recomputed tile by tile, delta = <grad_out, out> - grad_lse per query and
dlogits = p * (<grad_out, value> - delta):

    na_grad_query        query-major, the forward's walk: delta (kept for the others), grad_query, and the gradient of a
                         per-query bias, each entry of which belongs to one pair
    na_grad_key_value    key-major: walks the queries whose windows may hold the tile's keys (`queries_of`), over all
                         query heads that share the key head
    na_grad_offset_bias  displacement-major: between a tile of queries and the tile of keys at a fixed displacement the
                         offset of each pair of places is the same for every tile, so that dlogits are summed in place
                         over many tiles of queries, and folded into the table once at the end
    na_grad_extra        additional keys and values against all queries, in chunks that are summed afterwards

Source: Dao, FlashAttention-2 (2023), section 3.1.2, with the walks above.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.launch import launch
from attnzoo.kernels.library import last_dim_contiguous
from attnzoo.kernels.neighborhood_attention.problem import Problem
from attnzoo.kernels.neighborhood_attention.triton import (
    GEOMETRY,
    Config,
    Inputs,
    bias_of_queries,
    common_arguments,
    config_for,
    count_tiles,
    grid_strides,
    member,
    nth_tile,
    offsets_of,
    place,
    prepare,
    queries_of,
    query_axis,
    rows_of,
    three,
    tile_of_program,
    visible,
    whole_tiles,
    window,
)
from attnzoo.kernels.triton_shared import LOG2E, load_rows, load_statistics, on_device, store_rows

MOVES = [f"{name}{axis}" for name in ("origin", "moves") for axis in range(3)]
BIAS_PROGRAMS = 1024  # programs of na_grad_offset_bias in flight: bounds its partial sums to 16 MB at 64 x 64 pairs
EXTRA_PROGRAMS = 512  # programs of na_grad_extra aimed at


@triton.jit(do_not_specialize=GEOMETRY)
def na_grad_query(
    query, key, value, bias, extra_key, extra_value, out, lse, grad_out, grad_lse, delta, grad_query, grad_bias,
    scale, heads, num_extra,
    size0, size1, size2, kernel0, kernel1, kernel2, stride0, stride1, stride2, dilation0, dilation1, dilation2,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h, ek_b, ek_n, ek_h, ev_b, ev_n, ev_h,
    do_b, do_0, do_1, do_2, do_h, bias_b, bias_weight0, bias_weight1,
    HEADS_PER_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    RANK: tl.constexpr, CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, CAUSAL2: tl.constexpr, BORDER: tl.constexpr,
    BIAS: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TQ0: tl.constexpr, TQ1: tl.constexpr, TQ2: tl.constexpr, TK0: tl.constexpr, TK1: tl.constexpr, TK2: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, GRAD_BIAS: tl.constexpr,
):  # fmt: skip
    """grad_query and delta of one tile of queries; with GRAD_BIAS also the gradient of a per-query bias."""
    BM: tl.constexpr = TQ0 * TQ1 * TQ2
    BN: tl.constexpr = TK0 * TK1 * TK2
    rest, g0, g1, g2, t0, t1, t2 = tile_of_program(
        tl.program_id(0), size0, size1, size2, dilation0, dilation1, dilation2, RANK, TQ0, TQ1, TQ2
    )
    b = rest // heads
    h = rest % heads
    h_kv = h // HEADS_PER_KV
    i0, i1, i2 = place(tl.arange(0, BM), TQ1, TQ2)
    p0, first0, last0, start0, length0, low0, high0, all_low0, all_high0 = query_axis(
        t0, i0, g0, size0, kernel0, stride0, dilation0, CAUSAL0, BORDER, TQ0
    )
    p1, first1, last1, start1, length1, low1, high1, all_low1, all_high1 = query_axis(
        t1, i1, g1, size1, kernel1, stride1, dilation1, CAUSAL1, BORDER, TQ1
    )
    p2, first2, last2, start2, length2, low2, high2, all_low2, all_high2 = query_axis(
        t2, i2, g2, size2, kernel2, stride2, dilation2, CAUSAL2, BORDER, TQ2
    )
    valid = (p0 < length0) & (p1 < length1) & (p2 < length2)
    last2 = tl.where(valid, last2, first2)  # queries beyond the group see nothing, and read no bias
    count1 = tl.cdiv(high1 - low1, TK1)
    count2 = tl.cdiv(high2 - low2, TK2)
    tiles = tl.maximum(tl.cdiv(high0 - low0, TK0), 0) * tl.maximum(count1, 0) * tl.maximum(count2, 0)
    whole0, end0 = whole_tiles(low0, all_low0, all_high0, TK0)
    whole1, end1 = whole_tiles(low1, all_low1, all_high1, TK1)
    whole2, end2 = whole_tiles(low2, all_low2, all_high2, TK2)

    x0 = g0 + p0 * dilation0
    x1 = g1 + p1 * dilation1
    x2 = g2 + p2 * dilation2
    query += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    key += b.to(tl.int64) * k_b + h_kv.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + h_kv.to(tl.int64) * v_h
    grad_out += b.to(tl.int64) * do_b + h.to(tl.int64) * do_h
    batch_rows = b.to(tl.int64) * size0 * size1 * size2 * heads
    rows = rows_of(x0, x1, x2, size1, size2, heads, h, WIDE)
    q = load_rows(query, offsets_of(x0, x1, x2, q_0, q_1, q_2, RANK, WIDE), valid, DIM, BLOCK_D, UPCAST)
    do = load_rows(grad_out, offsets_of(x0, x1, x2, do_0, do_1, do_2, RANK, WIDE), valid, DIM_V, BLOCK_DV, UPCAST)
    o = load_rows(out + batch_rows * DIM_V, rows * DIM_V, valid, DIM_V, BLOCK_DV, UPCAST)
    natural = tl.load(lse + batch_rows + rows, mask=valid, other=float("-inf"))
    d = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        d -= tl.load(grad_lse + batch_rows + rows, mask=valid, other=0.0)
    d = tl.where(natural == float("-inf"), 0.0, d)
    tl.store(delta + batch_rows + rows, d, mask=valid)
    lse2 = tl.where(natural == float("-inf"), float("inf"), natural * LOG2E)
    bias, bias_row = bias_of_queries(
        bias, rows, b, h, p0, p1, p2, start0, start1, start2, kernel0, kernel1, kernel2,
        bias_b, bias_weight0, bias_weight1, BIAS,
    )  # fmt: skip
    if GRAD_BIAS:
        grad_bias += batch_rows * (kernel0 * bias_weight0)

    acc = tl.zeros([BM, BLOCK_D], tl.float32)
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
        v = load_rows(value, offsets_of(y0, y1, y2, v_0, v_1, v_2, RANK, WIDE), real, DIM_V, BLOCK_DV, UPCAST)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        whole = visible(a0, a1, a2, whole0, end0, whole1, end1, whole2, end2, RANK)
        if BIAS != "none" or not whole:
            seen = visible(
                c0[None, :], c1[None, :], c2[None, :], first0[:, None], last0[:, None], first1[:, None],
                last1[:, None], first2[:, None], last2[:, None], RANK,
            )  # fmt: skip
            if BIAS != "none":
                index = bias_row[:, None] + (c0 * bias_weight0 + c1 * bias_weight1 + c2)[None, :]
                logits += tl.load(bias + index, mask=seen, other=0.0).to(tl.float32) * LOG2E
            logits = tl.where(seen, logits, float("-inf"))
        p = tl.math.exp2(logits - lse2[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - d[:, None])
        if GRAD_BIAS:
            index = bias_row[:, None] + (c0 * bias_weight0 + c1 * bias_weight1 + c2)[None, :]
            tl.store(grad_bias + index, ds, mask=seen)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)

    if EXTRA:
        extra_key += b.to(tl.int64) * ek_b + h_kv.to(tl.int64) * ek_h
        extra_value += b.to(tl.int64) * ev_b + h_kv.to(tl.int64) * ev_h
        for t in tl.range(0, num_extra, BN):
            n = t + tl.arange(0, BN)
            real = n < num_extra
            k = load_rows(extra_key, n * ek_n, real, DIM, BLOCK_D, UPCAST)
            v = load_rows(extra_value, n * ev_n, real, DIM_V, BLOCK_DV, UPCAST)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            p = tl.math.exp2(tl.where(real[None, :], logits, float("-inf")) - lse2[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - d[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)

    store_rows(grad_query + batch_rows * DIM, rows * DIM, valid, acc * scale, DIM, BLOCK_D)


@triton.jit
def key_axis(
    t, j, group, size, kernel, stride, dilation, CAUSAL: tl.constexpr, BORDER: tl.constexpr, TILE: tl.constexpr
):
    """One axis of a tile of keys that begins at position t: positions, length of the group, range of its queries."""
    length = tl.cdiv(size - group, dilation)
    low, high = queries_of(t, tl.minimum(t + TILE, length) - 1, length, kernel, stride, CAUSAL, BORDER)
    return t + j, length, low, high


@triton.jit(do_not_specialize=GEOMETRY)
def na_grad_key_value(
    query, key, value, bias, extra_key, extra_value, lse, grad_out, delta, grad_key, grad_value,
    scale, heads, num_extra,
    size0, size1, size2, kernel0, kernel1, kernel2, stride0, stride1, stride2, dilation0, dilation1, dilation2,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h, ek_b, ek_n, ek_h, ev_b, ev_n, ev_h,
    do_b, do_0, do_1, do_2, do_h, bias_b, bias_weight0, bias_weight1,
    HEADS_PER_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    RANK: tl.constexpr, CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, CAUSAL2: tl.constexpr, BORDER: tl.constexpr,
    BIAS: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TQ0: tl.constexpr, TQ1: tl.constexpr, TQ2: tl.constexpr, TK0: tl.constexpr, TK1: tl.constexpr, TK2: tl.constexpr,
    GRAD_KEY: tl.constexpr, GRAD_VALUE: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value, as asked, of one tile of keys; tiles [keys, queries] are the forward's transposed."""
    BM: tl.constexpr = TQ0 * TQ1 * TQ2
    BN: tl.constexpr = TK0 * TK1 * TK2
    rest, g0, g1, g2, t0, t1, t2 = tile_of_program(
        tl.program_id(0), size0, size1, size2, dilation0, dilation1, dilation2, RANK, TK0, TK1, TK2
    )
    heads_kv = heads // HEADS_PER_KV
    b = rest // heads_kv
    h_kv = rest % heads_kv
    j0, j1, j2 = place(tl.arange(0, BN), TK1, TK2)
    c0, length0, low0, high0 = key_axis(t0, j0, g0, size0, kernel0, stride0, dilation0, CAUSAL0, BORDER, TK0)
    c1, length1, low1, high1 = key_axis(t1, j1, g1, size1, kernel1, stride1, dilation1, CAUSAL1, BORDER, TK1)
    c2, length2, low2, high2 = key_axis(t2, j2, g2, size2, kernel2, stride2, dilation2, CAUSAL2, BORDER, TK2)
    real = (c0 < length0) & (c1 < length1) & (c2 < length2)
    count1 = tl.maximum(tl.cdiv(high1 - low1, TQ1), 0)
    count2 = tl.maximum(tl.cdiv(high2 - low2, TQ2), 0)
    tiles = tl.maximum(tl.cdiv(high0 - low0, TQ0), 0) * count1 * count2

    y0 = g0 + c0 * dilation0
    y1 = g1 + c1 * dilation1
    y2 = g2 + c2 * dilation2
    query += b.to(tl.int64) * q_b
    key += b.to(tl.int64) * k_b + h_kv.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + h_kv.to(tl.int64) * v_h
    grad_out += b.to(tl.int64) * do_b
    tokens = b.to(tl.int64) * size0 * size1 * size2
    lse += tokens * heads
    delta += tokens * heads
    k = load_rows(key, offsets_of(y0, y1, y2, k_0, k_1, k_2, RANK, WIDE), real, DIM, BLOCK_D, UPCAST)
    v = load_rows(value, offsets_of(y0, y1, y2, v_0, v_1, v_2, RANK, WIDE), real, DIM_V, BLOCK_DV, UPCAST)
    key_rows = rows_of(y0, y1, y2, size1, size2, heads_kv, h_kv, WIDE)
    bias_column = c0 * bias_weight0 + c1 * bias_weight1 + c2

    acc_k = tl.zeros([BN, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BN, BLOCK_DV], tl.float32)
    scale2 = scale * LOG2E
    i0, i1, i2 = place(tl.arange(0, BM), TQ1, TQ2)
    for t in tl.range(0, tiles * HEADS_PER_KV):
        h = h_kv * HEADS_PER_KV
        if HEADS_PER_KV > 1:
            h += t // tiles
        a0, a1, a2 = nth_tile(t - (h - h_kv * HEADS_PER_KV) * tiles, count1, count2, RANK)
        p0 = low0 + a0 * TQ0 + i0
        p1 = low1 + a1 * TQ1 + i1
        p2 = low2 + a2 * TQ2 + i2
        valid = (p0 < high0) & (p1 < high1) & (p2 < high2)
        first0, last0, start0 = window(tl.minimum(p0, length0 - 1), length0, kernel0, stride0, CAUSAL0, BORDER)
        first1, last1, start1 = window(tl.minimum(p1, length1 - 1), length1, kernel1, stride1, CAUSAL1, BORDER)
        first2, last2, start2 = window(tl.minimum(p2, length2 - 1), length2, kernel2, stride2, CAUSAL2, BORDER)
        last2 = tl.where(valid, last2, first2)
        x0 = g0 + p0 * dilation0
        x1 = g1 + p1 * dilation1
        x2 = g2 + p2 * dilation2
        rows = rows_of(x0, x1, x2, size1, size2, heads, h, WIDE)
        q_offsets = offsets_of(x0, x1, x2, q_0, q_1, q_2, RANK, WIDE)
        do_offsets = offsets_of(x0, x1, x2, do_0, do_1, do_2, RANK, WIDE)
        q = load_rows(query + h.to(tl.int64) * q_h, q_offsets, valid, DIM, BLOCK_D, UPCAST)
        do = load_rows(grad_out + h.to(tl.int64) * do_h, do_offsets, valid, DIM_V, BLOCK_DV, UPCAST)
        lse2, d = load_statistics(lse, delta, rows, valid)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
        seen = visible(
            c0[:, None], c1[:, None], c2[:, None], first0[None, :], last0[None, :], first1[None, :], last1[None, :],
            first2[None, :], last2[None, :], RANK,
        )  # fmt: skip
        if BIAS != "none":
            pointer, bias_row = bias_of_queries(
                bias, rows, b, h, p0, p1, p2, start0, start1, start2, kernel0, kernel1, kernel2,
                bias_b, bias_weight0, bias_weight1, BIAS,
            )  # fmt: skip
            index = bias_column[:, None] + bias_row[None, :]
            logits += tl.load(pointer + index, mask=seen, other=0.0).to(tl.float32) * LOG2E
        p = tl.math.exp2(tl.where(seen, logits, float("-inf")) - lse2[None, :])
        if GRAD_VALUE:
            acc_v = tl.dot(p.to(do.dtype), do, acc_v, input_precision=PRECISION)
        if GRAD_KEY:
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - d[None, :])
            acc_k = tl.dot(ds.to(q.dtype), q, acc_k, input_precision=PRECISION)

    if GRAD_KEY:
        store_rows(grad_key + tokens * heads_kv * DIM, key_rows * DIM, real, acc_k * scale, DIM, BLOCK_D)
    if GRAD_VALUE:
        store_rows(grad_value + tokens * heads_kv * DIM_V, key_rows * DIM_V, real, acc_v, DIM_V, BLOCK_DV)


@triton.jit(do_not_specialize=[*GEOMETRY, *MOVES, "first_head", "slice_heads", "per_program", "total"])
def na_grad_offset_bias(
    query, key, value, bias, extra_key, extra_value, lse, grad_out, delta, partial,
    scale, heads, num_extra,
    size0, size1, size2, kernel0, kernel1, kernel2, stride0, stride1, stride2, dilation0, dilation1, dilation2,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h, ek_b, ek_n, ek_h, ev_b, ev_n, ev_h,
    do_b, do_0, do_1, do_2, do_h, bias_b, bias_weight0, bias_weight1,
    origin0, origin1, origin2, moves0, moves1, moves2, first_head, slice_heads, per_program, total,
    HEADS_PER_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    RANK: tl.constexpr, CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, CAUSAL2: tl.constexpr, BORDER: tl.constexpr,
    BIAS: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TQ0: tl.constexpr, TQ1: tl.constexpr, TQ2: tl.constexpr, TK0: tl.constexpr, TK1: tl.constexpr, TK2: tl.constexpr,
):  # fmt: skip
    """partial[chunk, head, move, place of query, place of key]: dlogits summed over a chunk of tiles of queries.

    Move (m0, m1, m2) pairs a tile of queries at t with the keys from t + origin + m * TK on, per axis.
    """
    BM: tl.constexpr = TQ0 * TQ1 * TQ2
    BN: tl.constexpr = TK0 * TK1 * TK2
    pid = tl.program_id(0)
    moves = moves0 * moves1 * moves2
    m0, m1, m2 = nth_tile(pid % moves, moves1, moves2, RANK)
    h = first_head + (pid // moves) % slice_heads
    chunk = pid // (moves * slice_heads)
    h_kv = h // HEADS_PER_KV
    i0, i1, i2 = place(tl.arange(0, BM), TQ1, TQ2)
    j0, j1, j2 = place(tl.arange(0, BN), TK1, TK2)
    scale2 = scale * LOG2E
    acc = tl.zeros([BM, BN], tl.float32)
    for tile in tl.range(chunk * per_program, tl.minimum((chunk + 1) * per_program, total)):
        b, g0, g1, g2, t0, t1, t2 = tile_of_program(
            tile, size0, size1, size2, dilation0, dilation1, dilation2, RANK, TQ0, TQ1, TQ2
        )
        p0, first0, last0, start0, length0, low0, high0, _low0, _high0 = query_axis(
            t0, i0, g0, size0, kernel0, stride0, dilation0, CAUSAL0, BORDER, TQ0
        )
        p1, first1, last1, start1, length1, low1, high1, _low1, _high1 = query_axis(
            t1, i1, g1, size1, kernel1, stride1, dilation1, CAUSAL1, BORDER, TQ1
        )
        p2, first2, last2, start2, length2, low2, high2, _low2, _high2 = query_axis(
            t2, i2, g2, size2, kernel2, stride2, dilation2, CAUSAL2, BORDER, TQ2
        )
        f0 = t0 + origin0 + m0 * TK0
        f1 = t1 + origin1 + m1 * TK1
        f2 = t2 + origin2 + m2 * TK2
        meets = (f0 < high0) & (f0 + TK0 > low0) & (f1 < high1) & (f1 + TK1 > low1) & (f2 < high2) & (f2 + TK2 > low2)
        if meets:
            valid = (p0 < length0) & (p1 < length1) & (p2 < length2)
            last2 = tl.where(valid, last2, first2)
            c0 = f0 + j0
            c1 = f1 + j1
            c2 = f2 + j2
            real = member(c0, c1, c2, length0, length1, length2, RANK)
            seen = visible(
                c0[None, :], c1[None, :], c2[None, :], first0[:, None], last0[:, None], first1[:, None], last1[:, None],
                first2[:, None], last2[:, None], RANK,
            )  # fmt: skip
            x0 = g0 + p0 * dilation0
            x1 = g1 + p1 * dilation1
            x2 = g2 + p2 * dilation2
            q_pointer = query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
            do_pointer = grad_out + b.to(tl.int64) * do_b + h.to(tl.int64) * do_h
            do_offsets = offsets_of(x0, x1, x2, do_0, do_1, do_2, RANK, WIDE)
            q = load_rows(q_pointer, offsets_of(x0, x1, x2, q_0, q_1, q_2, RANK, WIDE), valid, DIM, BLOCK_D, UPCAST)
            do = load_rows(do_pointer, do_offsets, valid, DIM_V, BLOCK_DV, UPCAST)
            rows = rows_of(x0, x1, x2, size1, size2, heads, h, WIDE)
            batch_rows = b.to(tl.int64) * size0 * size1 * size2 * heads
            lse2, d = load_statistics(lse + batch_rows, delta + batch_rows, rows, valid)
            y0 = g0 + c0 * dilation0
            y1 = g1 + c1 * dilation1
            y2 = g2 + c2 * dilation2
            k_pointer = key + b.to(tl.int64) * k_b + h_kv.to(tl.int64) * k_h
            v_pointer = value + b.to(tl.int64) * v_b + h_kv.to(tl.int64) * v_h
            v_offsets = offsets_of(y0, y1, y2, v_0, v_1, v_2, RANK, WIDE)
            k = load_rows(k_pointer, offsets_of(y0, y1, y2, k_0, k_1, k_2, RANK, WIDE), real, DIM, BLOCK_D, UPCAST)
            v = load_rows(v_pointer, v_offsets, real, DIM_V, BLOCK_DV, UPCAST)
            pointer, bias_row = bias_of_queries(
                bias, rows, b, h, p0, p1, p2, start0, start1, start2, kernel0, kernel1, kernel2,
                bias_b, bias_weight0, bias_weight1, BIAS,
            )  # fmt: skip
            index = bias_row[:, None] + (c0 * bias_weight0 + c1 * bias_weight1 + c2)[None, :]
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            logits += tl.load(pointer + index, mask=seen, other=0.0).to(tl.float32) * LOG2E
            p = tl.math.exp2(tl.where(seen, logits, float("-inf")) - lse2[:, None])
            acc += p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - d[:, None])

    target = partial + pid.to(tl.int64) * (BM * BN)
    tl.store(target + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], acc)


@triton.jit(do_not_specialize=[*GEOMETRY, "batch", "per_program"])
def na_grad_extra(
    query, key, value, bias, extra_key, extra_value, lse, grad_out, delta, grad_key, grad_value,
    scale, heads, num_extra,
    size0, size1, size2, kernel0, kernel1, kernel2, stride0, stride1, stride2, dilation0, dilation1, dilation2,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h, ek_b, ek_n, ek_h, ev_b, ev_n, ev_h,
    do_b, do_0, do_1, do_2, do_h, bias_b, bias_weight0, bias_weight1, batch, per_program,
    HEADS_PER_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    RANK: tl.constexpr, CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, CAUSAL2: tl.constexpr, BORDER: tl.constexpr,
    BIAS: tl.constexpr, EXTRA: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TQ0: tl.constexpr, TQ1: tl.constexpr, TQ2: tl.constexpr, TK0: tl.constexpr, TK1: tl.constexpr, TK2: tl.constexpr,
    GRAD_KEY: tl.constexpr, GRAD_VALUE: tl.constexpr,
):  # fmt: skip
    """Gradients [chunk, B, n, heads_kv, dim] of a tile of additional keys and values over a chunk of all queries."""
    BM: tl.constexpr = TQ0 * TQ1 * TQ2
    BN: tl.constexpr = TK0 * TK1 * TK2
    tokens = size0 * size1 * size2
    tiles = tl.cdiv(num_extra, BN)
    heads_kv = heads // HEADS_PER_KV
    pid = tl.program_id(0)
    n = (pid % tiles) * BN + tl.arange(0, BN)
    rest = pid // tiles
    h_kv = rest % heads_kv
    rest = rest // heads_kv
    b = rest % batch
    chunk = rest // batch
    real = n < num_extra
    key_pointer = extra_key + b.to(tl.int64) * ek_b + h_kv.to(tl.int64) * ek_h
    value_pointer = extra_value + b.to(tl.int64) * ev_b + h_kv.to(tl.int64) * ev_h
    k = load_rows(key_pointer, n * ek_n, real, DIM, BLOCK_D, UPCAST)
    v = load_rows(value_pointer, n * ev_n, real, DIM_V, BLOCK_DV, UPCAST)
    query += b.to(tl.int64) * q_b
    grad_out += b.to(tl.int64) * do_b
    batch_rows = b.to(tl.int64) * tokens * heads
    acc_k = tl.zeros([BN, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BN, BLOCK_DV], tl.float32)
    scale2 = scale * LOG2E
    total = tl.cdiv(tokens, BM) * HEADS_PER_KV
    for x in tl.range(chunk * per_program, tl.minimum((chunk + 1) * per_program, total)):
        h = h_kv * HEADS_PER_KV + x % HEADS_PER_KV
        token = (x // HEADS_PER_KV) * BM + tl.arange(0, BM)
        valid = token < tokens
        x0, x1, x2 = nth_tile(token, size1, size2, RANK)
        rows = rows_of(x0, x1, x2, size1, size2, heads, h, WIDE)
        q_offsets = offsets_of(x0, x1, x2, q_0, q_1, q_2, RANK, WIDE)
        do_offsets = offsets_of(x0, x1, x2, do_0, do_1, do_2, RANK, WIDE)
        q = load_rows(query + h.to(tl.int64) * q_h, q_offsets, valid, DIM, BLOCK_D, UPCAST)
        do = load_rows(grad_out + h.to(tl.int64) * do_h, do_offsets, valid, DIM_V, BLOCK_DV, UPCAST)
        lse2, d = load_statistics(lse + batch_rows, delta + batch_rows, rows, valid)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
        p = tl.math.exp2(tl.where(real[:, None], logits, float("-inf")) - lse2[None, :])
        if GRAD_VALUE:
            acc_v = tl.dot(p.to(do.dtype), do, acc_v, input_precision=PRECISION)
        if GRAD_KEY:
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - d[None, :])
            acc_k = tl.dot(ds.to(q.dtype), q, acc_k, input_precision=PRECISION)

    start = (chunk.to(tl.int64) * batch + b) * num_extra * heads_kv + h_kv
    if GRAD_KEY:
        store_rows(grad_key + start * DIM, n * (heads_kv * DIM), real, acc_k * scale, DIM, BLOCK_D)
    if GRAD_VALUE:
        store_rows(grad_value + start * DIM_V, n * (heads_kv * DIM_V), real, acc_v, DIM_V, BLOCK_DV)


# ------------------------------------------------------------------------------------------------------- the launchers


def _offset_bias_moves(problem: Problem, cfg: Config) -> tuple[list[int], list[int]]:
    """Per axis: where the first tile of keys begins relative to a tile of queries, and how many there are.

    Move 0 or the one after it begins where the windows of an interior tile begin, so that interior tiles of queries
    meet no more tiles of keys than in the forward; the other moves serve the tiles near borders.
    """
    origins, counts = [], []
    axes = zip(three(problem.kernel_size, 1), three(problem.stride, 1), three(problem.is_causal, False))
    for (kernel, stride, causal), queries, keys in zip(axes, cfg.queries, cfg.keys):
        start = -(kernel - 1) if causal else -(kernel // 2)
        lowest, highest = -(kernel - 1), 0 if causal else kernel - 1  # of key - query
        if not causal and stride == 1 and problem.border != "shift":
            lowest, highest = -(kernel // 2), (kernel - 1) // 2
        first = (lowest - start) // keys
        origins.append(start + first * keys)
        counts.append((queries - 1 + highest - start) // keys - first + 1)
    return origins, counts


@functools.lru_cache(maxsize=64)
def _offset_of_places(kernel: int, queries: int, keys: int, origin: int, moves: int, device: torch.device) -> Tensor:
    """One axis: [moves, queries, keys, 2 * kernel - 1], 1 where a pair of places has that offset."""
    move, i, j = (torch.arange(n, device=device) for n in (moves, queries, keys))
    offset = origin + kernel - 1 + move[:, None, None] * keys + j[None, None, :] - i[None, :, None]
    return (offset[..., None] == torch.arange(2 * kernel - 1, device=device)).float()


def _grad_offset_bias(
    inputs: Inputs, grad_out: Tensor, lse: Tensor, delta: Tensor, problem: Problem, cfg: Config
) -> Tensor:
    """The gradient of an offset bias, [heads, *(2 * kernel_size - 1)] in float32."""
    device = grad_out.device
    kernel_size = three(problem.kernel_size, 1)
    origins, counts = _offset_bias_moves(problem, cfg)
    moves = counts[0] * counts[1] * counts[2]
    total = problem.batch * count_tiles(problem, cfg.queries)
    slice_heads = max(1, min(problem.num_heads, BIAS_PROGRAMS // moves))
    per_program = triton.cdiv(total, max(1, BIAS_PROGRAMS // (moves * slice_heads)))
    chunks = triton.cdiv(total, per_program)
    places = [
        _offset_of_places(kernel, queries, keys, origin, count, device)
        for kernel, queries, keys, origin, count in zip(kernel_size, cfg.queries, cfg.keys, origins, counts)
    ]
    arguments = common_arguments(inputs, problem, cfg, grad_out) | grid_strides("do", grad_out)
    arguments |= {f"origin{axis}": value for axis, value in enumerate(origins)}
    arguments |= {f"moves{axis}": value for axis, value in enumerate(counts)}
    table = torch.empty((problem.num_heads, *(2 * k - 1 for k in kernel_size)), dtype=torch.float32, device=device)
    for first in range(0, problem.num_heads, slice_heads):
        heads = min(slice_heads, problem.num_heads - first)
        partial = torch.empty((chunks, heads, *counts, *cfg.queries, *cfg.keys), dtype=torch.float32, device=device)
        launch(
            na_grad_offset_bias,
            (chunks * heads * moves,),
            lse=lse,
            grad_out=grad_out,
            delta=delta,
            partial=partial,
            first_head=first,
            slice_heads=heads,
            per_program=per_program,
            total=total,
            **arguments,
        )
        table[first : first + heads] = torch.einsum("hxyzabcdef,xadu,ybev,zcfw->huvw", partial.sum(0), *places)
    return table.reshape(problem.num_heads, *(2 * k - 1 for k in problem.kernel_size))


def _grad_extra(
    inputs: Inputs,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    problem: Problem,
    cfg: Config,
    needs: tuple[bool, bool],
) -> list[Tensor | None]:
    """The gradients of additional keys and values, [B, n, heads_kv, dim] in float32, None where not needed."""
    queries, keys = (n[0] * n[1] * n[2] for n in (cfg.queries, cfg.keys))
    programs = triton.cdiv(problem.num_additional, keys) * problem.num_heads_kv * problem.batch
    steps = triton.cdiv(problem.num_tokens, queries) * (problem.num_heads // problem.num_heads_kv)
    per_program = triton.cdiv(steps, max(1, EXTRA_PROGRAMS // programs))
    chunks = triton.cdiv(steps, per_program)
    shape = (chunks, problem.batch, problem.num_additional, problem.num_heads_kv)
    found = [
        torch.empty((*shape, dim), dtype=torch.float32, device=grad_out.device) if needed else None
        for dim, needed in zip((problem.head_dim, problem.head_dim_v), needs)
    ]
    launch(
        na_grad_extra,
        (programs * chunks,),
        lse=lse,
        grad_out=grad_out,
        delta=delta,
        grad_key=delta if found[0] is None else found[0],
        grad_value=delta if found[1] is None else found[1],
        batch=problem.batch,
        per_program=per_program,
        GRAD_KEY=needs[0],
        GRAD_VALUE=needs[1],
        **common_arguments(inputs, problem, cfg, grad_out),
        **grid_strides("do", grad_out),
    )
    return [None if gradient is None else gradient.sum(0) for gradient in found]


def _delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None, lse: Tensor) -> Tensor:
    """<grad_out, out> - grad_lse per query, 0 for a row without keys, where no kernel has made it on its way."""
    delta = torch.linalg.vecdot(grad_out.float(), out.float())
    if grad_lse is not None:
        delta -= grad_lse
    return delta.masked_fill_(lse == -torch.inf, 0.0)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, bias, additional_keys, additional_values, each of its tensor's shape and dtype.

    None stands where there is no such tensor. `needs`, in the same order, spares the kernels of gradients that nobody
    asked for; those come as None too. The results are contiguous, and the same bits in every run.
    """
    inputs = prepare(query, key, value, bias, additional_keys, additional_values, problem)
    given = (query, key, value, bias, additional_keys, additional_values)
    if query.numel() == 0:
        zeros = [torch.zeros_like(t, memory_format=torch.contiguous_format) if t is not None else None for t in given]
        return tuple(zeros)  # type: ignore[return-value]
    grad_out, out, lse = last_dim_contiguous(grad_out), out.contiguous(), lse.contiguous()
    per_query_bias = problem.bias == "query" and bias is not None and needs[3]
    grad_bias = None
    if per_query_bias:  # pairs that no tile visits keep the zero
        shape = (problem.batch, *problem.grid, problem.num_heads, problem.num_slots)
        grad_bias = torch.zeros(shape, dtype=torch.float32, device=query.device)
    delta = torch.empty(lse.shape, dtype=torch.float32, device=query.device)
    grad_query = grad_key = grad_value = grad_extra_key = grad_extra_value = None
    with on_device(query):
        if needs[0] or per_query_bias:
            grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            cfg = config_for("grad_query", problem)
            launch(
                na_grad_query,
                (problem.batch * problem.num_heads * count_tiles(problem, cfg.queries),),
                out=out,
                lse=lse,
                grad_out=grad_out,
                grad_lse=lse if grad_lse is None else grad_lse.float().contiguous(),
                delta=delta,
                grad_query=grad_query,
                grad_bias=delta if grad_bias is None else grad_bias,
                HAS_GRAD_LSE=grad_lse is not None,
                GRAD_BIAS=per_query_bias,
                **common_arguments(inputs, problem, cfg, out, grad_out, grad_bias),
                **grid_strides("do", grad_out),
            )
        elif needs[1] or needs[3] or needs[4]:
            delta = _delta(grad_out, out, grad_lse, lse)
        if needs[1] or needs[2]:
            grad_key, grad_value = (
                torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None
                for t, needed in ((key, needs[1]), (value, needs[2]))
            )
            cfg = config_for("grad_key_value", problem)
            launch(
                na_grad_key_value,
                (problem.batch * problem.num_heads_kv * count_tiles(problem, cfg.keys),),
                lse=lse,
                grad_out=grad_out,
                delta=delta,
                grad_key=delta if grad_key is None else grad_key,
                grad_value=delta if grad_value is None else grad_value,
                GRAD_KEY=needs[1],
                GRAD_VALUE=needs[2],
                **common_arguments(inputs, problem, cfg, out, grad_out),
                **grid_strides("do", grad_out),
            )
        if problem.bias == "offset" and bias is not None and needs[3]:
            cfg = config_for("grad_offset_bias", problem)
            grad_bias = _grad_offset_bias(inputs, grad_out, lse, delta, problem, cfg)
        if inputs.extra_key is not None and (needs[4] or needs[5]):
            cfg = config_for("grad_extra", problem)
            grad_extra_key, grad_extra_value = _grad_extra(
                inputs, grad_out, lse, delta, problem, cfg, (needs[4], needs[5])
            )
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)

    found = (grad_query, grad_key, grad_value, grad_bias, grad_extra_key, grad_extra_value)
    results: list[Tensor | None] = []
    for gradient, tensor, needed in zip(found, given, needs, strict=True):
        if tensor is None or not needed:
            results.append(None)
        elif gradient is None:  # additional keys of which there are none
            results.append(torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device))
        else:
            results.append(gradient.to(tensor.dtype))
    return tuple(results)  # type: ignore[return-value]
