"""Block-sparse attention by torch's flex_attention, compiled: a GPU fallback where Triton's own kernel can't be used.

The lists become a BlockMask, the mask tiles, key_mask and causality its mask function. Unlike the other back ends this
is not the custom operator but flex_attention with its own autograd, so that torch compiles both passes; and orders are
a copy here: queries, keys and values are permuted before, the results after. On a CPU it has neither backward nor lse.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attnzoo.kernels.block_sparse_attention.orders import in_order, inverse
from attnzoo.kernels.block_sparse_attention.problem import Arguments, Problem
from attnzoo.kernels.block_sparse_attention.sparsity import EMPTY, FULL, lists

_LEAST = 16  # of a block and of a head dim, on a GPU


def reasons(problem: Problem) -> list[str]:
    """Why flex can't serve `problem`; empty where it can."""
    found = []
    if problem.dtype == torch.float64:
        found.append("flex takes float32, bfloat16 and float16, not float64")
    if problem.skips:
        found.append("flex has no skip_threshold")
    if problem.qk_int8:
        found.append("flex has no qk_int8")
    if problem.device_type == "cpu" and problem.requires_grad:
        found.append("flex has no backward on a CPU")
    if problem.device_type == "cpu" and problem.return_lse:
        found.append("flex returns no lse on a CPU")
    if problem.device_type == "cuda":
        if min(problem.head_dim, problem.head_dim_v) < _LEAST:
            found.append(
                f"flex needs head dims from {_LEAST} on a GPU, got {problem.head_dim} and {problem.head_dim_v}"
            )
        if any(size < _LEAST or size & (size - 1) for size in problem.block_size):
            found.append(f"flex needs blocks of powers of two from {_LEAST} on a GPU, got {problem.block_size}")
    if problem.batch == 0:
        found.append("flex takes no empty batch")
    return found


def _sees(arguments: Arguments, table: Tensor) -> Callable[..., Tensor]:
    """The mask function (batch, head, query, key) -> sees, of positions along the orders."""
    sparsity, real = arguments.sparsity, arguments.key_mask
    (block_q, block_k), tiles = sparsity.block_size, sparsity.tiles
    by_batch, by_head = (int(size > 1) for size in table.shape[:2])
    repeats = arguments.query.shape[2] // arguments.key.shape[2]
    offset = sparsity.num_keys - sparsity.num_queries
    query_order, key_order = sparsity.query_order, sparsity.key_order

    def token(order: Tensor | None, head: Tensor, position: Tensor) -> Tensor:
        return position if order is None else order[head * int(order.shape[0] > 1), position]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        state = table[batch * by_batch, head * by_head, query // block_q, key // block_k]
        seen = state != EMPTY
        if tiles is not None:
            seen = seen & ((state == FULL) | tiles[state.clamp(min=0), query % block_q, key % block_k])
        if real is not None:
            seen = seen & real[batch * int(real.shape[0] > 1), token(key_order, head // repeats, key)]
        if arguments.is_causal:
            seen = seen & (token(key_order, head // repeats, key) <= token(query_order, head, query) + offset)
        return seen

    return sees


def _block_mask(arguments: Arguments) -> BlockMask:
    """The lists as a BlockMask, kept with the sparsity unless a key mask is part of it."""
    sparsity = arguments.sparsity
    repeats = arguments.query.shape[2] // arguments.key.shape[2]
    name = f"flex {arguments.is_causal} {repeats}"
    if arguments.key_mask is None and name in sparsity._kept:
        return sparsity._kept[name]
    table = sparsity.table()
    masked = arguments.key_mask is not None or arguments.is_causal  # then no block is known to be visible as a whole
    whole = torch.where(table == FULL, FULL, EMPTY)
    part = lists(table if masked else torch.where(table == FULL, EMPTY, table), False, trim=False)
    full = None if masked else lists(whole, False, trim=False)
    made = BlockMask.from_kv_blocks(
        part.counts,
        part.indices.contiguous(),
        None if full is None else full.counts,
        None if full is None else full.indices.contiguous(),
        BLOCK_SIZE=sparsity.block_size,
        mask_mod=_sees(arguments, table),
        seq_lengths=(sparsity.num_queries, sparsity.num_keys),
    )
    if arguments.key_mask is None:
        sparsity._kept[name] = made
    return made


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _options(arguments: Arguments) -> dict[str, int] | None:
    """Tiles that divide the blocks, which flex wants on a GPU."""
    if arguments.query.device.type != "cuda":
        return None
    (rows, columns), large = arguments.sparsity.block_size, 64 if arguments.query.element_size() == 2 else 32
    least = min(32, rows, columns)
    named = {"BLOCK_M": min(large, rows), "BLOCK_N": min(large, columns), "BLOCK_M1": least, "BLOCK_N2": least}
    return named | {"BLOCK_N1": min(large, columns), "BLOCK_M2": min(large, rows)}


def attend(arguments: Arguments, compiled: bool = True) -> tuple[Tensor, Tensor | None]:
    """out [B, Nq, H, Dv] and lse [B, Nq, H] (where asked for), through torch's own autograd.

    compiled=False runs flex_attention eagerly, which forms all pairs of tokens: for tests.
    """
    sparsity = arguments.sparsity
    query = in_order(arguments.query.transpose(1, 2), sparsity.query_order)
    key, value = (in_order(t.transpose(1, 2), sparsity.key_order) for t in (arguments.key, arguments.value))
    run: Any = _compiled() if compiled else flex_attention
    with warnings.catch_warnings():
        if not compiled:
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        result = run(
            query,
            key,
            value,
            block_mask=_block_mask(arguments),
            scale=arguments.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=_options(arguments),
            return_aux=AuxRequest(lse=True) if arguments.return_lse else None,
        )
    out, lse = (result[0], result[1].lse) if arguments.return_lse else (result, None)
    back = inverse(sparsity.query_order)
    out = in_order(out, back).transpose(1, 2).contiguous()
    return out, None if lse is None else in_order(lse, back).transpose(1, 2).contiguous()
