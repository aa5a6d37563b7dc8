"""Block-sparse attention in Triton, forward; the backward is in `triton_backward.py`.

A program owns one query block of one head, or a part of it where a tile can't hold it, and walks the block's list,
each key block in one or more tiles, with an online softmax in float32 and base 2. Rows are read through the orders:
nothing is permuted in memory, and results go where the tokens stand. With skip_threshold a tile holds the whole pair of
blocks, so that the decision is the one that the operation defines.

Source of the online softmax: Dao, FlashAttention-2 (2023). Importing this module imports triton: do it lazily.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.aot import Case
from attnzoo.kernels.block_sparse_attention.problem import Call, Problem
from attnzoo.kernels.block_sparse_attention.sparsity import cut
from attnzoo.kernels.dispatch import interpreting
from attnzoo.kernels.launch import launch, vendor
from attnzoo.kernels.triton_shared import (
    LN2,
    LOG2E,
    load_rows,
    on_device,
    online_softmax,
    precision,
    softmax_step,
    store_rows,
    wide,
)

SKIP_BLOCK = 128  # the largest block that a tile can hold whole, for skip_threshold

# Sizes that change from call to call: specialising on them would compile anew.
VARYING = ["heads", "num_queries", "num_keys", "blocks_q", "width", "list_b", "list_h", "real_b", "first_b", "first_h"]
VARYING += ["order_q", "order_k", "blocks_k"]


# ----------------------------------------------------------------------------------------------- parts of the kernels


@triton.jit
def tokens_of(order, position, valid, ORDERED: tl.constexpr, WIDE: tl.constexpr):
    """Which tokens stand at the positions, in 64 bits where WIDE; 0 where invalid and ordered."""
    token = position
    if ORDERED:
        token = tl.load(order + position, mask=valid, other=0)
    if WIDE:
        token = token.to(tl.int64)
    return token


@triton.jit
def positions_of(block, part, num_tokens, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """(places within the block, positions along the order, which are real) of the part-th tile of a block."""
    place = part * TILE + tl.arange(0, TILE)
    position = block * BLOCK + place
    valid = position < num_tokens
    if BLOCK % TILE != 0:
        valid = valid & (place < BLOCK)
    return place, position, valid


@triton.jit
def real_keys(real, token, inside, real_n, REAL: tl.constexpr):
    """Which keys are there: those within the end, and in the batch entry's row of the key mask."""
    if REAL:
        inside = inside & (tl.load(real + token * real_n, mask=inside, other=0) != 0)
    return inside


@triton.jit
def visible(
    tiles, tile, key_token, query_token, key_valid, query_valid, key_place, query_place, offset,
    CAUSAL: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile are visible: [queries, keys], or [keys, queries] where KEYS_FIRST.

    tile: number of the mask tile, negative for none.
    """
    if KEYS_FIRST:
        seen = key_valid[:, None] & query_valid[None, :]
    else:
        seen = key_valid[None, :] & query_valid[:, None]
    if CAUSAL:
        if KEYS_FIRST:
            seen = seen & (key_token[:, None] <= query_token[None, :] + offset)
        else:
            seen = seen & (key_token[None, :] <= query_token[:, None] + offset)
    if PARTIAL:
        own = tiles + tile.to(tl.int64) * (BLOCK_Q * BLOCK_K)
        if KEYS_FIRST:
            at = key_place[:, None] + query_place[None, :] * BLOCK_K
        else:
            at = key_place[None, :] + query_place[:, None] * BLOCK_K
        seen = seen & (tl.load(own + at, mask=seen & (tile >= 0), other=1) != 0)
    return seen


@triton.jit(do_not_specialize=VARYING)
def block_sparse_forward(
    query, key, value, counts, indices, tile_ids, tiles, real, query_order, key_order, query_scale, key_scale, out, lse,
    scale, threshold, heads, num_queries, num_keys, blocks_q, blocks_k, width, list_b, list_h, order_q, order_k,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, real_b, real_n,
    HEADS_PER_KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr, REAL: tl.constexpr, CAUSAL: tl.constexpr,
    QUERY_ORDER: tl.constexpr, KEY_ORDER: tl.constexpr, INT8: tl.constexpr, SKIP: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output and lse of one tile of queries; arguments as `common_arguments` gives them."""
    PARTS_Q: tl.constexpr = (BLOCK_Q + BM - 1) // BM
    PARTS_K: tl.constexpr = (BLOCK_K + BN - 1) // BN
    block = tl.program_id(0) // PARTS_Q
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    h_kv = h // HEADS_PER_KV
    row = (b * list_b + h * list_h + block).to(tl.int64)
    count = tl.load(counts + row)
    indices += row * width
    tile_ids += row * width
    query_order += h * order_q
    key_order += h_kv * order_k
    real += b.to(tl.int64) * real_b
    query += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    key += b.to(tl.int64) * k_b + h_kv.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + h_kv.to(tl.int64) * v_h

    m, position, valid = positions_of(block, tl.program_id(0) % PARTS_Q, num_queries, BLOCK_Q, BM)
    i = tokens_of(query_order, position, valid, QUERY_ORDER, WIDE)
    q = load_rows(query, i * q_n, valid, DIM, BLOCK_D, UPCAST)
    factor = scale * LOG2E
    if INT8:
        factor *= tl.load(query_scale + (b * heads + h).to(tl.int64) * blocks_q + block)
        key_scale += (b * (heads // HEADS_PER_KV) + h_kv).to(tl.int64) * blocks_k

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    for step in tl.range(0, count * PARTS_K):
        listed = tl.load(indices + step // PARTS_K)
        tile = listed
        if PARTIAL:
            tile = tl.load(tile_ids + step // PARTS_K)
        c, n, inside = positions_of(listed, step % PARTS_K, num_keys, BLOCK_K, BN)
        j = tokens_of(key_order, n, inside, KEY_ORDER, WIDE)
        inside = real_keys(real, j, inside, real_n, REAL)
        k = load_rows(key, j * k_n, inside, DIM, BLOCK_D, UPCAST)
        if INT8:
            s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * (factor * tl.load(key_scale + listed))
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        seen = visible(
            tiles, tile, j, i, inside, valid, c, m, num_keys - num_queries,
            CAUSAL, PARTIAL, BLOCK_Q, BLOCK_K, False,
        )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))
        if SKIP:
            own = tl.max(s, 1)
            top, total, p, fade = softmax_step(s, top, total)
            counts_here = (own + threshold * LOG2E >= top) & (own > float("-inf"))
            # Where the block is skipped no maximum has moved, in no row that sees a key: fade is 1.
            if tl.max(counts_here.to(tl.int32), 0) > 0:
                v = load_rows(value, j * v_n, inside, DIM_V, BLOCK_DV, UPCAST)
                acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        else:
            v = load_rows(value, j * v_n, inside, DIM_V, BLOCK_DV, UPCAST)
            top, total, acc = online_softmax(s, v, top, total, acc, PRECISION)

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    natural = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN2)
    rows = (b.to(tl.int64) * num_queries + i) * heads + h
    store_rows(out, rows * DIM_V, valid, acc, DIM_V, BLOCK_DV)
    tl.store(lse + rows, natural, mask=valid)


# ------------------------------------------------------------------------------------------------------- the launcher


class Tiles(NamedTuple):
    """How a kernel is cut: at most so many queries and keys in a tile, warps per program, pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By element size and the power of two, from 32, that holds both head dims.
TILES: dict[str, dict[str, dict[int, dict[int, Tiles]]]] = {
    "cuda": {
        "forward": {
            2: {
                32: Tiles(128, 64, 8, 3),
                64: Tiles(128, 64, 8, 3),
                128: Tiles(128, 32, 8, 2),
                256: Tiles(64, 16, 4, 2),
            },
            4: {32: Tiles(32, 32, 4, 2), 64: Tiles(32, 32, 8, 2), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        },
        "grad_query": {
            2: {32: Tiles(64, 64, 4, 2), 64: Tiles(64, 32, 8, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 16, 8, 1)},
            4: {32: Tiles(32, 32, 8, 1), 64: Tiles(32, 16, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        },
        "grad_key_value": {
            2: {32: Tiles(64, 64, 8, 2), 64: Tiles(32, 64, 8, 1), 128: Tiles(32, 64, 8, 1), 256: Tiles(16, 32, 8, 1)},
            4: {32: Tiles(32, 32, 8, 1), 64: Tiles(16, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        },
    },
    "hip": {
        "forward": {
            2: {32: Tiles(64, 64, 4, 1), 64: Tiles(64, 64, 4, 1), 128: Tiles(64, 64, 8, 1), 256: Tiles(64, 16, 4, 1)},
            4: {32: Tiles(64, 32, 4, 1), 64: Tiles(64, 32, 8, 1), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 16, 4, 1)},
        },
        "grad_query": {
            2: {32: Tiles(64, 64, 8, 1), 64: Tiles(64, 64, 8, 1), 128: Tiles(64, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
            4: {32: Tiles(32, 32, 8, 1), 64: Tiles(32, 16, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        },
        "grad_key_value": {
            2: {32: Tiles(64, 64, 8, 1), 64: Tiles(32, 64, 8, 1), 128: Tiles(32, 64, 8, 1), 256: Tiles(16, 32, 8, 1)},
            4: {32: Tiles(32, 32, 8, 1), 64: Tiles(16, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
        },
    },
}


def _tile(block: int, most: int) -> int:
    """The largest power of two up to `most` that wastes at most a quarter of a block's last tile; 16 or more."""
    if vendor() == "interpreter":
        return min(most, max(16, triton.next_power_of_2(block)))
    size = most
    while size > 16 and cut(block, size) * size > 1.25 * block:
        size //= 2
    return size


def _bucket(call: Call) -> int:
    return max(32, triton.next_power_of_2(max(call.query.shape[3], call.value.shape[3])))


def tiles_for(kernel: str, call: Call) -> dict[str, int]:
    """Tile sizes, warps and stages of a kernel for a call."""
    if vendor() == "interpreter":  # its cost is per step
        found = Tiles(128, 128, 1, 1)
    else:
        found = TILES[vendor()][kernel][call.query.element_size()][_bucket(call)]
    sizes = {"BM": _tile(call.block_q, found.queries), "BN": _tile(call.block_k, found.keys)}
    if kernel == "forward" and call.query.element_size() == 2 and sizes["BM"] < found.queries:
        # Half the queries: half the warps, or, where the rows are long, room for more keys.
        if _bucket(call) <= 64:
            found = found._replace(num_warps=max(4, found.num_warps // 2))
        else:
            sizes["BN"] = _tile(call.block_k, min(64, 2 * found.keys))
    if kernel == "forward" and call.skip_threshold is not None:
        found, sizes = _skip_tiles(call, found)
    return {**sizes, "num_warps": found.num_warps, "num_stages": found.num_stages}


def _skip_tiles(call: Call, found: Tiles) -> tuple[Tiles, dict[str, int]]:
    """Tiles that hold whole blocks, as skip_threshold wants them; more warps for more than 64 x 64 pairs."""
    sizes = {"BM": max(16, triton.next_power_of_2(call.block_q)), "BN": max(16, triton.next_power_of_2(call.block_k))}
    large = sizes["BM"] * sizes["BN"] > 64 * 64
    return found._replace(num_warps=8 if large else found.num_warps, num_stages=1), sizes


def bytes_of(tensor: Tensor | None) -> Tensor | None:
    """A bool tensor as bytes."""
    return None if tensor is None else tensor.view(torch.uint8)


def _strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    return dict(zip((f"{prefix}_b", f"{prefix}_n", f"{prefix}_h"), tensor.stride()))


def list_strides(counts: Tensor) -> dict[str, int]:
    """How many rows of lists lie between batch entries and heads; 0 where there is one for all."""
    batch, heads, rows = counts.shape
    return {"list_b": heads * rows if batch > 1 else 0, "list_h": rows if heads > 1 else 0}


def common_arguments(call: Call, query: Tensor, key: Tensor, *others: Tensor) -> dict[str, Any]:
    """What forward and backward kernels share; a tensor that is absent is stood in for by the query, never read.

    query, key: the rows that are multiplied. others: tensors of the call beyond the inputs, for the width of offsets.
    """
    heads, dim, dim_v = call.query.shape[2], call.query.shape[3], call.value.shape[3]
    real, order = call.key_mask, (call.query_order, call.key_order)
    least = 32 if query.dtype == torch.int8 else 16
    return {
        "query": query,
        "key": key,
        "value": call.value,
        "tiles": query if call.tiles is None else bytes_of(call.tiles),
        "real": query if real is None else bytes_of(real),
        "query_order": query if order[0] is None else order[0],
        "key_order": query if order[1] is None else order[1],
        "scale": call.scale,
        "heads": heads,
        "num_queries": call.query.shape[1],
        "num_keys": call.key.shape[1],
        **_strides("q", query),
        **_strides("k", key),
        **_strides("v", call.value),
        "real_b": real.stride(0) if real is not None and real.shape[0] > 1 else 0,
        "real_n": 0 if real is None else real.stride(1),
        "order_q": order[0].shape[1] if order[0] is not None and order[0].shape[0] > 1 else 0,
        "order_k": order[1].shape[1] if order[1] is not None and order[1].shape[0] > 1 else 0,
        "HEADS_PER_KV": heads // call.key.shape[2],
        "DIM": dim,
        "DIM_V": dim_v,
        "BLOCK_D": max(least, triton.next_power_of_2(dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(dim_v)),
        "BLOCK_Q": call.block_q,
        "BLOCK_K": call.block_k,
        "PARTIAL": call.tiles is not None,
        "REAL": real is not None,
        "CAUSAL": call.is_causal,
        "QUERY_ORDER": order[0] is not None,
        "KEY_ORDER": order[1] is not None,
        "WIDE": wide(query, key, call.value, *others),
        "UPCAST": interpreting() and call.query.dtype == torch.bfloat16,
        "PRECISION": precision(),
    }


def reasons(problem: Problem) -> list[str]:
    """Why the Triton kernels can't serve a problem; an empty list where they can."""
    why = []
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        why.append(f"triton computes float32, float16 and bfloat16; got {str(problem.dtype).removeprefix('torch.')}")
    if problem.skips and max(problem.block_size) > SKIP_BLOCK:
        why.append(f"triton takes skip_threshold for blocks of up to {SKIP_BLOCK} tokens, got {problem.block_size}")
    if problem.skips and problem.dtype == torch.float32 and problem.block_size[0] * problem.block_size[1] > 32 * 32:
        why.append(f"triton takes skip_threshold in float32 for pairs of up to 32 x 32, got {problem.block_size}")
    return why


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Nq, H, Dv] in query's dtype and lse [B, Nq, H] float32."""
    batch, num_queries, heads, _ = call.query.shape
    out = torch.empty(
        (batch, num_queries, heads, call.value.shape[3]), dtype=call.query.dtype, device=call.query.device
    )
    lse = torch.empty((batch, num_queries, heads), dtype=torch.float32, device=call.query.device)
    if out.numel() == 0:
        return out, lse
    query, key = call.query, call.key
    int8 = call.query_int8 is not None and call.key_int8 is not None
    if call.query_int8 is not None and call.key_int8 is not None:
        query, key = call.query_int8, call.key_int8
    sizes = tiles_for("forward", call)
    blocks_q, blocks_k = call.sparsity.num_blocks
    arguments = common_arguments(call, query, key, out) | {
        "counts": call.counts,
        "indices": call.indices,
        "tile_ids": query if call.tile_ids is None else call.tile_ids,
        "query_scale": query if call.query_scale is None else call.query_scale,
        "key_scale": query if call.key_scale is None else call.key_scale,
        "out": out,
        "lse": lse,
        "threshold": call.skip_threshold or 0.0,
        "blocks_q": blocks_q,
        "blocks_k": blocks_k,
        "width": call.indices.shape[3],
        **list_strides(call.counts),
        "INT8": int8,
        "SKIP": call.skip_threshold is not None,
        **sizes,
    }
    with on_device(query):
        launch(block_sparse_forward, (blocks_q * cut(call.block_q, sizes["BM"]), batch * heads), **arguments)
    return out, lse


def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key and value that `needs` asks for."""
    from attnzoo.kernels.block_sparse_attention import triton_backward  # it builds on this module

    return triton_backward.backward(call, grad_out, grad_lse, out, lse, needs)


# ------------------------------------------------------------------------------------------- compiled ahead of time


def _call_on_meta(dtype: torch.dtype, head_dim: int, block: int, kind: str) -> None:
    """Forward and backward of one call on tensors without memory: its launches are what `aot` compiles."""
    everything = kind == "everything"
    partial, ordered = "partial" in kind or everything, "ordered" in kind or everything
    int8, skip = "int8" in kind, "skip" in kind

    def make(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, num_tokens, heads = 2, 4096, 4
    n = num_tokens // block
    rows = make(batch, num_tokens, heads, head_dim, dtype=dtype)
    tile_ids = make(1, heads, n, n // 4) if partial else None
    order = make(heads, num_tokens) if ordered else None
    eight, scales = (
        make(batch, num_tokens, heads, head_dim, dtype=torch.int8),
        make(batch, heads, n, dtype=torch.float32),
    )
    lists = make(1, heads, n), make(1, heads, n, n // 4)
    call = Call(
        rows,
        rows,
        rows,
        lists[0],
        lists[1],
        tile_ids,
        make(16, block, block, dtype=torch.bool) if partial else None,
        lists[0],
        lists[1],
        tile_ids,
        make(batch, num_tokens, dtype=torch.bool) if everything else None,
        order,
        order,
        eight if int8 else None,
        eight if int8 else None,
        scales if int8 else None,
        scales if int8 else None,
        block,
        block,
        everything,
        head_dim**-0.5,
        5.0 if skip else None,
        "triton",
    )
    out, lse = forward(call)
    if not int8 and not skip:
        backward(call, out, lse, out, lse, (True, True, True))


_SPILLS = dict.fromkeys(("block_sparse_grad_query", "block_sparse_grad_key_value"), 64)
AOT = [
    Case(
        f"{str(dtype)[6:]} d{head_dim} block {block} {kind}",
        functools.partial(_call_on_meta, dtype, head_dim, block, kind),
        quick=(dtype, head_dim, block, kind) == (torch.float16, 64, 64, "partial"),
        spills=_SPILLS,
    )
    for dtype, head_dim, block, kind in (
        (torch.float16, 64, 64, "partial"),
        (torch.float16, 64, 128, "plain"),
        (torch.float16, 128, 128, "partial"),
        (torch.float16, 128, 128, "everything"),
        (torch.float16, 64, 64, "everything"),
        (torch.bfloat16, 64, 64, "ordered"),
        (torch.bfloat16, 128, 64, "partial ordered"),
        (torch.bfloat16, 128, 128, "plain"),
        (torch.bfloat16, 128, 128, "int8 skip"),
        (torch.bfloat16, 128, 64, "int8 ordered"),
        (torch.float16, 64, 64, "int8 skip"),
        (torch.float16, 256, 64, "partial ordered"),
        (torch.float32, 64, 64, "everything"),
        (torch.float32, 128, 64, "plain"),
        (torch.float32, 64, 32, "skip"),
    )
]
