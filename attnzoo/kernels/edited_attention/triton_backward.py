"""Edited attention in Triton, backward. No atomics: every run gives the same bits.

The formulas are those of `backward.py`; the probabilities are recomputed tile by tile from group_lse, the logits by the
forward's own `edited_logits`. A key belongs to one group, so that a tile's gradient is a sum over the groups that have
keys in it.

    edited_delta           per row and group: <grad_output, output> - grad_lse
    edited_grad_query      row-major, the forward's walk: grad_query
    edited_grad_key_value  key-major: walks the rows that may see the tile's keys, one after another of the query heads
                           that share the kv head: grad_key, grad_value, and per query head those of key_bias and boost
    edited_grad_mask       pair-major: a tile of the mask, summed over the batch entries and heads that share it

Source: Dao, FlashAttention-2 (2023), section 3.1.2, with the groups and edits of this operation.
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
from attnzoo.kernels.edited_attention.problem import Edits, Visibility
from attnzoo.kernels.edited_attention.triton_parts import (
    VARYING,
    common_arguments,
    edited_logits,
    groups_present,
    launch_with,
    of_batch,
    on_meta,
    per_key,
    products,
    rows_seeing,
    span_of,
    walk,
)
from attnzoo.kernels.launch import launch, vendor
from attnzoo.kernels.triton_shared import load_lse, load_rows, on_device, store_rows

# (rows, keys, warps, stages) of every kernel by element size and the power of two, from 32, that holds both head dims.
TILES = {
    "cuda": {
        2: {32: (64, 64, 8, 1), 64: (64, 64, 8, 1), 128: (32, 64, 8, 1), 256: (16, 32, 8, 1)},
        4: {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "hip": {
        2: {32: (64, 32, 4, 1), 64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        4: {32: (32, 32, 4, 1), 64: (32, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
}
LADEN = (32, 32, 8, 1)  # what a tile of more than 32 rows becomes on NVIDIA where groups or many edits are given


def _tiles(query: Tensor, visibility: Visibility, edits: Edits, block: int) -> tuple[int, int, int, int]:
    """The tiles of a call."""
    found = TILES["hip" if vendor() == "hip" else "cuda"][query.element_size()][block]
    many = edits.groups is not None or visibility.mask is not None or visibility.span_ids is not None
    return LADEN if many and found[0] > 32 and vendor() != "hip" else found


def serves(query: Tensor, value: Tensor) -> bool:
    """False for float32 beyond head dim 128 on NVIDIA: the kernels would spill there (1088 to 2756 B with groups)."""
    return not (vendor() == "cuda" and query.element_size() == 4 and max(query.shape[3], value.shape[3]) > 128)


@triton.jit
def logit_gradients(
    dz, s, head, one_head, n, inside, boost, softcap, temperature, BOOST: tl.constexpr, SOFTCAP: tl.constexpr
):
    """From the gradients of the softmax's arguments: those of key_bias and mask, and those of the scaled products."""
    ds = dz / temperature
    da = ds
    if BOOST != "none":
        factor = per_key(boost, head, one_head, n, inside, BOOST, 0.0).to(tl.float32)
        sign = tl.where(s > 0, 1.0, tl.where(s < 0, -1.0, 0.0))
        da = da * (1 + factor * sign)
    if SOFTCAP:
        capped = s / softcap
        da = da * (1 - capped * capped)
    return ds, da


@triton.jit
def rows_of(
    grad_out, lse, delta, row, valid, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, GROUPS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_out, base-2 lse and delta of a tile of rows, for `through_softmax`; with groups nothing."""
    if GROUPS == "none":
        do = load_rows(grad_out, row * DIM_V, valid, DIM_V, BLOCK_DV, UPCAST)
        return do, load_lse(lse, row, valid), tl.load(delta + row, mask=valid, other=0.0)
    else:
        return 0, 0, 0


@triton.jit
def through_softmax(
    z, v, acc_v, row, number, num_groups, do, lse2, d, grad_out, lse, delta, valid, value, within_v, inside,
    DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_V: tl.constexpr, GROUPS: tl.constexpr,
    GRAD_VALUE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz of a tile of logits, and with GRAD_VALUE acc_v with the tile's part of the values' gradient added.

    row: the rows' numbers in [B, R, H]. Without groups do, lse2 and d are theirs; with groups those of each group that
    has a key here are read from grad_out, lse and delta [B, R, H, G].
    """
    if GROUPS == "none":
        p = tl.math.exp2(z - lse2[:, None])
        if GRAD_VALUE:
            acc_v = tl.dot(tl.trans(p.to(do.dtype)), do, acc_v, input_precision=PRECISION)
        dp = products(
            do, v, grad_out, row * DIM_V, valid, value, within_v, inside, DIM_V, BLOCK_DV, CHUNK_V, UPCAST, PRECISION
        )
        dz = p * (dp - d[:, None])
    else:
        dz = tl.zeros_like(z)
        present = groups_present(number, 0, 8)
        for g in tl.range(0, num_groups):
            if (present >> g) & 1:
                at = row * num_groups + g
                own_do = load_rows(grad_out, at * DIM_V, valid, DIM_V, BLOCK_DV, UPCAST)
                own_lse2 = load_lse(lse, at, valid)
                own_d = tl.load(delta + at, mask=valid, other=0.0)
                p = tl.math.exp2(tl.where(number == g, z, float("-inf")) - own_lse2[:, None])
                if GRAD_VALUE:
                    acc_v = tl.dot(tl.trans(p.to(own_do.dtype)), own_do, acc_v, input_precision=PRECISION)
                dp = products(
                    own_do, v, grad_out, at * DIM_V, valid, value, within_v, inside, DIM_V, BLOCK_DV, CHUNK_V, UPCAST,
                    PRECISION,
                )  # fmt: skip
                dz += p * (dp - own_d[:, None])
    return dz, acc_v


@triton.jit
def edited_delta(
    out, grad_out, lse, grad_lse, delta, count, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """delta of BM of the `count` rows and groups, which lie one after another; 0 where the group has no keys."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    valid = row < count
    o = load_rows(out, row * DIM_V, valid, DIM_V, BLOCK_DV, UPCAST)
    do = load_rows(grad_out, row * DIM_V, valid, DIM_V, BLOCK_DV, UPCAST)
    d = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        d -= tl.load(grad_lse + row, mask=valid, other=0.0)
    natural = tl.load(lse + row, mask=valid, other=0.0)
    tl.store(delta + row, tl.where(natural == float("-inf"), 0.0, d), mask=valid)


@triton.jit(do_not_specialize=VARYING)
def edited_grad_query(
    query, key, value, real, spans, mask, bias, boost, groups, lse, delta, grad_out, grad_query,
    scale, softcap, temperature, num_rows, num_keys, heads_kv, num_groups, offset, window,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
    bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    REPEATS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, REAL: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, BOOST: tl.constexpr, GROUPS: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
):  # fmt: skip
    """grad_query of one tile of rows of one kv head, the query heads that share it folded in as in the forward."""
    tile = tl.program_id(0) * BM
    b = tl.program_id(1) // heads_kv
    kv_head = tl.program_id(1) % heads_kv
    m = tile + tl.arange(0, BM)
    i = m // REPEATS
    one_head = kv_head * REPEATS
    head = one_head + m % REPEATS
    valid = i < num_rows
    place = offset + i
    last_row = tl.minimum((tile + BM - 1) // REPEATS, num_rows - 1)
    low, high = walk(offset + tile // REPEATS, offset + last_row, window, num_keys, CAUSAL, WINDOW, SPANS)
    low = low // BN * BN

    query += b.to(tl.int64) * q_b
    key += b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    given = of_batch(
        b, real, spans, mask, bias, boost, groups, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
        bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    )  # fmt: skip
    q_offsets = i.to(tl.int64) * q_n + head.to(tl.int64) * q_h
    q = load_rows(query, q_offsets, valid, DIM, BLOCK_D, UPCAST)
    own_span = span_of(given[1], place, valid, num_keys, SPANS)
    row = (b.to(tl.int64) * num_rows + i) * (heads_kv * REPEATS) + head
    do, lse2, d = rows_of(grad_out, lse, delta, row, valid, DIM_V, BLOCK_DV, GROUPS, UPCAST)

    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    key += low.to(tl.int64) * k_n
    value += low.to(tl.int64) * v_n
    within_k = tl.arange(0, BN) * k_n
    within_v = tl.arange(0, BN) * v_n
    for start in tl.range(low, high, BN):
        n = start + tl.arange(0, BN)
        inside = n < high
        k = load_rows(key, within_k, inside, DIM, BLOCK_D, UPCAST)
        v = load_rows(value, within_v, inside, DIM_V, BLOCK_DV, UPCAST)
        a = products(q, k, query, q_offsets, valid, key, within_k, inside, DIM, BLOCK_D, CHUNK, UPCAST, PRECISION)
        s, z = edited_logits(
            a * scale, i, head, one_head, place, own_span, valid, n, inside, given, softcap, temperature, window,
            CAUSAL, WINDOW, REAL, SPANS, MASK, BIAS, BOOST, SOFTCAP,
        )  # fmt: skip
        number = 0
        if GROUPS != "none":
            number = per_key(given[5], head, one_head, n, inside, GROUPS, 255)
        dz, _ = through_softmax(
            z, v, 0, row, number, num_groups, do, lse2, d, grad_out, lse, delta, valid, value, within_v, inside,
            DIM_V, BLOCK_DV, CHUNK_V, GROUPS, False, UPCAST, PRECISION,
        )  # fmt: skip
        _, da = logit_gradients(dz, s, head, one_head, n, inside, given[4], softcap, temperature, BOOST, SOFTCAP)
        acc = tl.dot(da.to(k.dtype), k, acc, input_precision=PRECISION)
        key += BN * k_n
        value += BN * v_n
    store_rows(grad_query, row * DIM, valid, acc * scale, DIM, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def edited_grad_key_value(
    query, key, value, real, spans, mask, bias, boost, groups, lse, delta, grad_out,
    grad_key, grad_value, grad_bias, grad_boost,
    scale, softcap, temperature, num_rows, num_keys, heads_kv, num_groups, offset, window,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
    bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    REPEATS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, REAL: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, BOOST: tl.constexpr, GROUPS: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, GRAD_KEY: tl.constexpr, GRAD_VALUE: tl.constexpr,
    GRAD_BIAS: tl.constexpr, GRAD_BOOST: tl.constexpr,
):  # fmt: skip
    """Of one tile of keys of one kv head: grad_key, grad_value, and [B, H, Nk] of key_bias and boost, what is asked."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1) // heads_kv
    kv_head = tl.program_id(1) % heads_kv
    inside = n < num_keys
    last = tl.minimum(tl.program_id(0) * BN + BN, num_keys) - 1
    low, high = rows_seeing(tl.program_id(0) * BN, last, offset, window, num_rows, CAUSAL, WINDOW, SPANS)

    query += b.to(tl.int64) * q_b
    key += b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    given = of_batch(
        b, real, spans, mask, bias, boost, groups, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
        bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    )  # fmt: skip
    k_offsets = n.to(tl.int64) * k_n
    v_offsets = n.to(tl.int64) * v_n
    k = load_rows(key, k_offsets, inside, DIM, BLOCK_D, UPCAST)
    v = load_rows(value, v_offsets, inside, DIM_V, BLOCK_DV, UPCAST)
    acc_k = tl.zeros([BN, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BN, BLOCK_DV], tl.float32)
    for repeat in tl.range(0, REPEATS):
        head = kv_head * REPEATS + repeat
        sum_bias = tl.zeros([BN], tl.float32)
        sum_boost = tl.zeros([BN], tl.float32)
        number = 0
        if GROUPS != "none":
            number = per_key(given[5], head, head, n, inside, GROUPS, 255)
        for start in tl.range(low, high, BM):
            i = start + tl.arange(0, BM)
            valid = i < high
            place = offset + i
            q_offsets = i.to(tl.int64) * q_n + head.to(tl.int64) * q_h
            q = load_rows(query, q_offsets, valid, DIM, BLOCK_D, UPCAST)
            own_span = span_of(given[1], place, valid, num_keys, SPANS)
            row = (b.to(tl.int64) * num_rows + i) * (heads_kv * REPEATS) + head
            do, lse2, d = rows_of(grad_out, lse, delta, row, valid, DIM_V, BLOCK_DV, GROUPS, UPCAST)
            a = products(q, k, query, q_offsets, valid, key, k_offsets, inside, DIM, BLOCK_D, CHUNK, UPCAST, PRECISION)
            s, z = edited_logits(
                a * scale, i, head, head, place, own_span, valid, n, inside, given, softcap, temperature, window,
                CAUSAL, WINDOW, REAL, SPANS, MASK, BIAS, BOOST, SOFTCAP,
            )  # fmt: skip
            dz, acc_v = through_softmax(
                z, v, acc_v, row, number, num_groups, do, lse2, d, grad_out, lse, delta, valid, value, v_offsets,
                inside, DIM_V, BLOCK_DV, CHUNK_V, GROUPS, GRAD_VALUE, UPCAST, PRECISION,
            )  # fmt: skip
            ds, da = logit_gradients(dz, s, head, head, n, inside, given[4], softcap, temperature, BOOST, SOFTCAP)
            if GRAD_BIAS:
                sum_bias += tl.sum(ds, 0)
            if GRAD_BOOST:
                sum_boost += tl.sum(ds * tl.abs(s), 0)
            if GRAD_KEY:
                acc_k = tl.dot(tl.trans(da.to(q.dtype)), q, acc_k, input_precision=PRECISION)
        per_head = (b.to(tl.int64) * (heads_kv * REPEATS) + head) * num_keys
        if GRAD_BIAS:
            tl.store(grad_bias + per_head + n, sum_bias, mask=inside)
        if GRAD_BOOST:
            tl.store(grad_boost + per_head + n, sum_boost, mask=inside)
    key_row = (b.to(tl.int64) * num_keys + n) * heads_kv + kv_head
    if GRAD_KEY:
        store_rows(grad_key, key_row * DIM, inside, acc_k * scale, DIM, BLOCK_D)
    if GRAD_VALUE:
        store_rows(grad_value, key_row * DIM_V, inside, acc_v, DIM_V, BLOCK_DV)


@triton.jit(do_not_specialize=[*VARYING, "mask_batches", "mask_heads"])
def edited_grad_mask(
    query, key, value, real, spans, mask, bias, boost, groups, lse, delta, grad_out, grad_mask,
    scale, softcap, temperature, num_rows, num_keys, heads_kv, num_groups, offset, window, num_batches,
    mask_batches, mask_heads,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
    bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    REPEATS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, REAL: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, BOOST: tl.constexpr, GROUPS: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
):  # fmt: skip
    """One tile [rows, keys] of a mask's gradient [mask_batches, mask_heads, R, Nk], over all that share its entries."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    num_heads = heads_kv * REPEATS
    own_b = tl.program_id(2) // mask_heads
    own_head = tl.program_id(2) % mask_heads
    shared_batches = num_batches // mask_batches
    shared_heads = num_heads // mask_heads
    valid = i < num_rows
    inside = n < num_keys
    place = offset + i
    total = tl.zeros([BM, BN], tl.float32)
    for one in tl.range(0, shared_batches * shared_heads):
        b = own_b + one // shared_heads
        head = own_head + one % shared_heads
        kv_head = head // REPEATS
        given = of_batch(
            b, real, spans, mask, bias, boost, groups, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
            bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
        )  # fmt: skip
        own_query = query + b.to(tl.int64) * q_b
        own_key = key + b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
        own_value = value + b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
        q_offsets = i.to(tl.int64) * q_n + head.to(tl.int64) * q_h
        k_offsets = n.to(tl.int64) * k_n
        v_offsets = n.to(tl.int64) * v_n
        q = load_rows(own_query, q_offsets, valid, DIM, BLOCK_D, UPCAST)
        k = load_rows(own_key, k_offsets, inside, DIM, BLOCK_D, UPCAST)
        v = load_rows(own_value, v_offsets, inside, DIM_V, BLOCK_DV, UPCAST)
        own_span = span_of(given[1], place, valid, num_keys, SPANS)
        row = (b.to(tl.int64) * num_rows + i) * num_heads + head
        do, lse2, d = rows_of(grad_out, lse, delta, row, valid, DIM_V, BLOCK_DV, GROUPS, UPCAST)
        a = products(
            q, k, own_query, q_offsets, valid, own_key, k_offsets, inside, DIM, BLOCK_D, CHUNK, UPCAST, PRECISION
        )
        s, z = edited_logits(
            a * scale, i, head, head, place, own_span, valid, n, inside, given, softcap, temperature, window,
            CAUSAL, WINDOW, REAL, SPANS, MASK, BIAS, BOOST, SOFTCAP,
        )  # fmt: skip
        number = 0
        if GROUPS != "none":
            number = per_key(given[5], head, head, n, inside, GROUPS, 255)
        dz, _ = through_softmax(
            z, v, 0, row, number, num_groups, do, lse2, d, grad_out, lse, delta, valid, own_value, v_offsets,
            inside, DIM_V, BLOCK_DV, CHUNK_V, GROUPS, False, UPCAST, PRECISION,
        )  # fmt: skip
        total += dz / temperature
    at = (tl.program_id(2).to(tl.int64) * num_rows + i) * num_keys
    tl.store(grad_mask + at[:, None] + n[None, :], total, mask=valid[:, None] & inside[None, :])


# ------------------------------------------------------------------------------------------------------- the launchers


def gradients(
    grads: tuple[Tensor | None, Tensor | None],
    tensors: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    visibility: Visibility,
    edits: Edits,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """As `backward.gradients`: of query, key, value, key_bias, boost and mask those that `needs` names."""
    query, key, value = tensors
    output, group_lse = (tensor.contiguous() for tensor in results)
    wanted: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
    wanted |= {"key_bias": edits.key_bias, "boost": edits.boost, "mask": visibility.mask}
    asked = {name: tensor for name, tensor in wanted.items() if tensor is not None and needs[name]}
    if output.numel() == 0 or key.numel() == 0:
        return {name: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for name, t in asked.items()}
    (batch, num_rows, num_heads, _), (num_keys, heads_kv) = query.shape, key.shape[1:3]
    repeats = num_heads // heads_kv
    device = query.device
    grad_output = torch.zeros_like(output) if grads[0] is None else grads[0].to(output.dtype).contiguous()
    delta = torch.empty(group_lse.shape, dtype=torch.float32, device=device)
    made: dict[str, Tensor] = {}

    def empty(name: str, *shape: int) -> Tensor:
        """Memory for a gradient, or a stand-in that no kernel touches."""
        if name not in asked:
            return delta
        dtype = asked[name].dtype if name in ("query", "key", "value") else torch.float32
        made[name] = torch.empty(shape, dtype=dtype, device=device)
        return made[name]

    shared: dict[str, Any] = {"lse": group_lse, "delta": delta, "grad_out": grad_output}
    by_row = common_arguments(query, key, value, visibility, edits, repeats)
    by_head = common_arguments(query, key, value, visibility, edits, 1)
    block = max(32, by_row["BLOCK_D"], by_row["BLOCK_DV"])
    most_rows, keys, num_warps, num_stages = _tiles(query, visibility, edits, block)
    rows = min(most_rows, max(16, triton.next_power_of_2(num_rows * repeats)))
    tiles = {"BN": keys, "num_warps": num_warps, "num_stages": num_stages}
    per_head = {"BM": min(rows, max(16, triton.next_power_of_2(num_rows))), **tiles}
    with on_device(query):
        flat = max(1, 2048 // by_row["BLOCK_DV"])
        launch(
            edited_delta,
            (triton.cdiv(delta.numel(), flat),),
            out=output,
            grad_out=grad_output,
            lse=group_lse,
            grad_lse=delta if grads[1] is None else grads[1].float().contiguous(),
            delta=delta,
            count=delta.numel(),
            DIM_V=value.shape[3],
            BLOCK_DV=by_row["BLOCK_DV"],
            BM=flat,
            HAS_GRAD_LSE=grads[1] is not None,
            UPCAST=by_row["UPCAST"],
            num_warps=4,
            num_stages=1,
        )
        if "query" in asked:
            grid = (triton.cdiv(num_rows * repeats, rows), batch * heads_kv)
            grad = empty("query", *query.shape)
            launch_with(edited_grad_query, grid, by_row, grad_query=grad, BM=rows, **shared, **tiles)
        if asked.keys() & {"key", "value", "key_bias", "boost"}:
            launch_with(
                edited_grad_key_value,
                (triton.cdiv(num_keys, keys), batch * heads_kv),
                by_head,
                grad_key=empty("key", *key.shape),
                grad_value=empty("value", *value.shape),
                grad_bias=empty("key_bias", batch, num_heads, num_keys),
                grad_boost=empty("boost", batch, num_heads, num_keys),
                GRAD_KEY="key" in asked,
                GRAD_VALUE="value" in asked,
                GRAD_BIAS="key_bias" in asked,
                GRAD_BOOST="boost" in asked,
                **shared,
                **per_head,
            )
        if "mask" in asked:
            mask = asked["mask"]
            launch_with(
                edited_grad_mask,
                (triton.cdiv(num_rows, per_head["BM"]), triton.cdiv(num_keys, keys), mask.shape[0] * mask.shape[1]),
                by_head,
                grad_mask=empty("mask", *mask.shape),
                num_batches=batch,
                mask_batches=mask.shape[0],
                mask_heads=mask.shape[1],
                **shared,
                **per_head,
            )
    return {name: made[name].sum_to_size(tensor.shape).to(tensor.dtype) for name, tensor in asked.items()}


# ------------------------------------------------------------------------------------------- compiled ahead of time


def _call_on_meta(dtype: torch.dtype, head_dim: int, edited: str) -> None:
    query, key, value, visibility, edits = on_meta(dtype, 512, head_dim, edited)
    output = torch.empty((*query.shape[:3], edits.num_groups, head_dim), dtype=dtype, device="meta")
    lse = torch.empty(output.shape[:-1], dtype=torch.float32, device="meta")
    mask = visibility.mask is not None and visibility.mask.is_floating_point()
    needs = dict.fromkeys(("query", "key", "value", "key_bias", "boost"), True) | {"mask": mask}
    gradients((output, lse), (query, key, value), (output, lse), visibility, edits, needs)


SPILLS = dict.fromkeys(("edited_grad_query", "edited_grad_key_value", "edited_grad_mask"), 64)

AOT = [
    Case(
        f"{str(dtype).removeprefix('torch.')} d{head_dim} gradients {edited}",
        functools.partial(_call_on_meta, dtype, head_dim, edited),
        quick=(dtype, head_dim, edited) == (torch.float16, 64, "everything"),
        spills=SPILLS,
    )
    for dtype, head_dim, edited in (
        (torch.bfloat16, 128, "boost"),
        (torch.bfloat16, 128, "groups"),
        (torch.bfloat16, 128, "groups by head"),
        (torch.bfloat16, 128, "float mask"),
        (torch.bfloat16, 128, "everything"),
        (torch.bfloat16, 256, "groups"),
        (torch.float16, 64, "groups"),
        (torch.float16, 64, "everything"),
        (torch.float16, 80, "bias by head"),
        (torch.float32, 64, "groups"),
        (torch.float32, 128, "everything"),
    )
]
