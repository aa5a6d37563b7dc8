"""Block-sparse attention in Triton, backward. No atomics: every run gives the same bits.

With p = exp(logits - lse) recomputed tile by tile, delta = <grad_out, out> - grad_lse per query and
dlogits = p * (<grad_out, value> - delta):

    block_sparse_grad_query       a program owns what a forward one owns, and walks the same list; it keeps delta
    block_sparse_grad_key_value   owns a tile of keys of one key head, and walks the lists by key of the query heads
                                  that share it

Source: Dao, FlashAttention-2 (2023), section 3.1.2.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.block_sparse_attention.problem import Call
from attnzoo.kernels.block_sparse_attention.sparsity import Lists, cut
from attnzoo.kernels.block_sparse_attention.triton import (
    VARYING,
    common_arguments,
    list_strides,
    positions_of,
    real_keys,
    tiles_for,
    tokens_of,
    visible,
)
from attnzoo.kernels.launch import launch
from attnzoo.kernels.triton_shared import LOG2E, load_rows, load_statistics, on_device, store_rows


@triton.jit(do_not_specialize=VARYING)
def block_sparse_grad_query(
    query, key, value, counts, indices, tile_ids, tiles, real, query_order, key_order,
    out, lse, grad_out, grad_lse, delta, grad_query,
    scale, heads, num_queries, num_keys, width, list_b, list_h, order_q, order_k,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, real_b, real_n,
    HEADS_PER_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr, REAL: tl.constexpr, CAUSAL: tl.constexpr,
    QUERY_ORDER: tl.constexpr, KEY_ORDER: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, GRAD_QUERY: tl.constexpr,
):  # fmt: skip
    """delta of one tile of queries, and where GRAD_QUERY their gradient."""
    PARTS_Q: tl.constexpr = (BLOCK_Q + BM - 1) // BM
    PARTS_K: tl.constexpr = (BLOCK_K + BN - 1) // BN
    block = tl.program_id(0) // PARTS_Q
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    h_kv = h // HEADS_PER_KV
    row = (b * list_b + h * list_h + block).to(tl.int64)
    indices += row * width
    tile_ids += row * width
    query_order += h * order_q
    key_order += h_kv * order_k
    real += b.to(tl.int64) * real_b
    query += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    key += b.to(tl.int64) * k_b + h_kv.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + h_kv.to(tl.int64) * v_h
    grad_out += b.to(tl.int64) * do_b + h.to(tl.int64) * do_h

    m, position, valid = positions_of(block, tl.program_id(0) % PARTS_Q, num_queries, BLOCK_Q, BM)
    i = tokens_of(query_order, position, valid, QUERY_ORDER, WIDE)
    rows = (b.to(tl.int64) * num_queries + i) * heads + h
    do = load_rows(grad_out, i * do_n, valid, DIM_V, BLOCK_DV, UPCAST)
    o = load_rows(out, rows * DIM_V, valid, DIM_V, BLOCK_DV, UPCAST)
    natural = tl.load(lse + rows, mask=valid, other=float("-inf"))
    d = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        d -= tl.load(grad_lse + rows, mask=valid, other=0.0)
    d = tl.where(natural == float("-inf"), 0.0, d)
    tl.store(delta + rows, d, mask=valid)

    if GRAD_QUERY:
        q = load_rows(query, i * q_n, valid, DIM, BLOCK_D, UPCAST)
        lse2 = tl.where(natural == float("-inf"), float("inf"), natural * LOG2E)
        acc = tl.zeros([BM, BLOCK_D], tl.float32)
        for step in tl.range(0, tl.load(counts + row) * PARTS_K):
            listed = tl.load(indices + step // PARTS_K)
            tile = listed
            if PARTIAL:
                tile = tl.load(tile_ids + step // PARTS_K)
            c, n, inside = positions_of(listed, step % PARTS_K, num_keys, BLOCK_K, BN)
            j = tokens_of(key_order, n, inside, KEY_ORDER, WIDE)
            inside = real_keys(real, j, inside, real_n, REAL)
            k = load_rows(key, j * k_n, inside, DIM, BLOCK_D, UPCAST)
            v = load_rows(value, j * v_n, inside, DIM_V, BLOCK_DV, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            seen = visible(
                tiles, tile, j, i, inside, valid, c, m, num_keys - num_queries,
                CAUSAL, PARTIAL, BLOCK_Q, BLOCK_K, False,
            )  # fmt: skip
            p = tl.math.exp2(tl.where(seen, s, float("-inf")) - lse2[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - d[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
        store_rows(grad_query, rows * DIM, valid, acc * scale, DIM, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def block_sparse_grad_key_value(
    query, key, value, counts, indices, tile_ids, tiles, real, query_order, key_order,
    lse, grad_out, delta, grad_key, grad_value,
    scale, heads, num_queries, num_keys, width, list_b, list_h, order_q, order_k,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, real_b, real_n,
    HEADS_PER_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr, REAL: tl.constexpr, CAUSAL: tl.constexpr,
    QUERY_ORDER: tl.constexpr, KEY_ORDER: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GRAD_KEY: tl.constexpr, GRAD_VALUE: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of one tile of keys; tiles [keys, queries] are the transposed ones of the forward."""
    PARTS_Q: tl.constexpr = (BLOCK_Q + BM - 1) // BM
    PARTS_K: tl.constexpr = (BLOCK_K + BN - 1) // BN
    heads_kv = heads // HEADS_PER_KV
    block = tl.program_id(0) // PARTS_K
    b = tl.program_id(1) // heads_kv
    h_kv = tl.program_id(1) % heads_kv
    key_order += h_kv * order_k
    real += b.to(tl.int64) * real_b
    key += b.to(tl.int64) * k_b + h_kv.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + h_kv.to(tl.int64) * v_h
    query += b.to(tl.int64) * q_b
    grad_out += b.to(tl.int64) * do_b
    lse += b.to(tl.int64) * num_queries * heads
    delta += b.to(tl.int64) * num_queries * heads

    c, n, inside = positions_of(block, tl.program_id(0) % PARTS_K, num_keys, BLOCK_K, BN)
    j = tokens_of(key_order, n, inside, KEY_ORDER, WIDE)
    there = real_keys(real, j, inside, real_n, REAL)
    k = load_rows(key, j * k_n, there, DIM, BLOCK_D, UPCAST)
    v = load_rows(value, j * v_n, there, DIM_V, BLOCK_DV, UPCAST)
    acc_k = tl.zeros([BN, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BN, BLOCK_DV], tl.float32)
    for member in range(HEADS_PER_KV):
        h = h_kv * HEADS_PER_KV + member
        row = (b * list_b + h * list_h + block).to(tl.int64)
        own_q = query + h.to(tl.int64) * q_h
        own_do = grad_out + h.to(tl.int64) * do_h
        for step in tl.range(0, tl.load(counts + row) * PARTS_Q):
            at = row * width + step // PARTS_Q
            listed = tl.load(indices + at)
            tile = listed
            if PARTIAL:
                tile = tl.load(tile_ids + at)
            m, position, valid = positions_of(listed, step % PARTS_Q, num_queries, BLOCK_Q, BM)
            i = tokens_of(query_order + h * order_q, position, valid, QUERY_ORDER, WIDE)
            q = load_rows(own_q, i * q_n, valid, DIM, BLOCK_D, UPCAST)
            do = load_rows(own_do, i * do_n, valid, DIM_V, BLOCK_DV, UPCAST)
            lse2, d = load_statistics(lse, delta, i * heads + h, valid)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            seen = visible(
                tiles, tile, j, i, there, valid, c, m, num_keys - num_queries,
                CAUSAL, PARTIAL, BLOCK_Q, BLOCK_K, True,
            )  # fmt: skip
            p = tl.math.exp2(tl.where(seen, s, float("-inf")) - lse2[None, :])
            if GRAD_VALUE:
                acc_v = tl.dot(p.to(do.dtype), do, acc_v, input_precision=PRECISION)
            if GRAD_KEY:
                ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - d[None, :])
                acc_k = tl.dot(ds.to(q.dtype), q, acc_k, input_precision=PRECISION)

    rows = (b.to(tl.int64) * num_keys + j) * heads_kv + h_kv
    if GRAD_KEY:
        store_rows(grad_key, rows * DIM, inside, acc_k * scale, DIM, BLOCK_D)
    if GRAD_VALUE:
        store_rows(grad_value, rows * DIM_V, inside, acc_v, DIM_V, BLOCK_DV)


def _by_key(call: Call) -> Lists:
    """The lists by key block: those that came with the call, or, where none did, made here."""
    if call.by_key_counts is None or call.by_key_indices is None:
        return call.sparsity.by_key()
    return Lists(call.by_key_counts, call.by_key_indices, call.by_key_tile_ids)


def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key and value that `needs` asks for; grad_out's last dimension is contiguous."""
    batch, _, heads, _ = call.query.shape
    found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) if n else None for t, n in zip(call[:3], needs)]
    if not any(needs):
        return None, None, None
    if out.numel() == 0:
        return found[0], found[1], found[2]
    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    common = common_arguments(call, call.query, call.key, grad_out, out) | {
        "lse": lse,
        "grad_out": grad_out,
        "delta": delta,
        **dict(zip(("do_b", "do_n", "do_h"), grad_out.stride())),
    }
    blocks_q, blocks_k = call.sparsity.num_blocks
    with on_device(call.query):
        sizes = tiles_for("grad_query", call)
        launch(
            block_sparse_grad_query,
            (blocks_q * cut(call.block_q, sizes["BM"]), batch * heads),
            **common,
            counts=call.counts,
            indices=call.indices,
            tile_ids=call.query if call.tile_ids is None else call.tile_ids,
            width=call.indices.shape[3],
            **list_strides(call.counts),
            out=out,
            grad_lse=out if grad_lse is None else grad_lse.contiguous(),
            grad_query=out if found[0] is None else found[0],
            HAS_GRAD_LSE=grad_lse is not None,
            GRAD_QUERY=needs[0],
            **sizes,
        )
        if needs[1] or needs[2]:
            turned = _by_key(call)
            sizes = tiles_for("grad_key_value", call)
            launch(
                block_sparse_grad_key_value,
                (blocks_k * cut(call.block_k, sizes["BN"]), batch * call.key.shape[2]),
                **common,
                counts=turned.counts,
                indices=turned.indices,
                tile_ids=call.query if turned.tile_ids is None else turned.tile_ids,
                width=turned.indices.shape[3],
                **list_strides(turned.counts),
                grad_key=out if found[1] is None else found[1],
                grad_value=out if found[2] is None else found[2],
                GRAD_KEY=needs[1],
                GRAD_VALUE=needs[2],
                **sizes,
            )
    return found[0], found[1], found[2]
