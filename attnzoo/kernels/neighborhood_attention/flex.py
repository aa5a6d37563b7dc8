"""Neighborhood attention by torch's flex_attention, compiled: a GPU fallback where Triton's own kernel can't be used.

The window becomes a mask function over per-axis tables and the offset bias a score function; only blocks of keys that
some query of a block sees are visited. Unlike the other back ends this is not the custom operator but flex_attention
with its own autograd, so that torch compiles both passes. On a CPU it has neither backward nor lse.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attnzoo.kernels.neighborhood_attention.problem import Problem

_BLOCK = 128


def reasons(problem: Problem) -> list[str]:
    """Why flex can't serve `problem`; empty where it can."""
    found = []
    if problem.dtype == torch.float64:
        found.append("flex takes float32, bfloat16 and float16, not float64")
    if problem.device_type == "cpu" and problem.requires_grad:
        found.append("flex has no backward on a CPU")
    if problem.device_type == "cpu" and problem.return_lse:
        found.append("flex returns no lse on a CPU")
    if problem.device_type == "cuda" and min(problem.head_dim, problem.head_dim_v) < 16:
        found.append(f"flex needs head dimensions from 16 on a GPU, got {problem.head_dim} and {problem.head_dim_v}")
    if problem.bias == "query":
        found.append("flex has no bias by query")
    if problem.border == "zero":
        found.append("flex has no border='zero'")
    if problem.batch == 0:
        found.append("flex takes no empty batch")
    if problem.bias == "offset" and problem.requires_grad and torch.are_deterministic_algorithms_enabled():
        found.append("flex sums the bias's gradient in no fixed order (torch.use_deterministic_algorithms)")
    return found


@lru_cache(maxsize=64)
def _mask(problem: Problem, device: str) -> tuple[Callable[..., Tensor], BlockMask]:
    """The mask function (query, key) -> sees, and its blocks; additional keys stand behind the grid's."""
    tokens, total = problem.num_tokens, problem.num_tokens + problem.num_additional
    shape = (tokens, problem.rank)
    group, position, low, high = (torch.empty(shape, dtype=torch.int32) for _ in range(4))
    coordinates = torch.unravel_index(torch.arange(tokens), problem.grid)
    for axis, at in enumerate(coordinates):
        windows = problem.windows(axis)
        for table, values in (
            (group, windows.group),
            (position, windows.position),
            (low, windows.low),
            (high, windows.high),
        ):
            table[:, axis] = values[at]
    group, position, low, high = (table.to(device) for table in (group, position, low, high))
    rank = problem.rank

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = key.clamp(max=tokens - 1)
        allowed = key < tokens
        for axis in range(rank):
            at = position[near, axis]
            allowed = allowed & (group[query, axis] == group[near, axis])
            allowed = allowed & (at >= low[query, axis]) & (at <= high[query, axis])
        return allowed | (key >= tokens)

    zero = torch.zeros((), dtype=torch.int32, device=device)
    keys = torch.arange(total, device=device)
    seen = []
    for first in range(0, tokens, _BLOCK):
        queries = torch.arange(first, min(first + _BLOCK, tokens), device=device)
        row = sees(zero, zero, queries[:, None], keys[None]).any(0)
        seen.append(torch.nn.functional.pad(row, (0, -total % _BLOCK)).view(-1, _BLOCK).any(1))
    blocks = torch.stack(seen)
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    block_mask = BlockMask.from_kv_blocks(
        counts[None, None], indices[None, None], BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(tokens, total)
    )
    return sees, block_mask


def _score(problem: Problem, bias: Tensor) -> Callable[..., Tensor]:
    """The score function that adds the offset bias to the grid's keys."""
    tokens, extents = problem.num_tokens, [2 * k - 1 for k in problem.kernel_size]
    positions = [problem.windows(axis).position for axis in range(problem.rank)]
    coordinates = torch.unravel_index(torch.arange(tokens), problem.grid)
    place = torch.stack([table[at] for table, at in zip(positions, coordinates)], 1).int().to(bias.device)
    flat = bias.flatten(1)

    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = key.clamp(max=tokens - 1)
        index = torch.zeros_like(key)
        for axis, extent in enumerate(extents):
            offset = (place[near, axis] - place[query, axis] + extent // 2).clamp(0, extent - 1)
            index = index * extent + offset
        return score + torch.where(key < tokens, flat[head, index], 0.0)

    return add


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    problem: Problem,
    compiled: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """out [B, *grid, heads, head_dim_v] and lse [B, *grid, heads] (where asked for), through torch's own autograd.

    compiled=False runs flex_attention eagerly, which forms tokens x tokens: for tests.
    """
    _, block_mask = _mask(problem, str(query.device))

    def heads_first(grid: Tensor, extra: Tensor | None = None) -> Tensor:
        flat = grid.flatten(1, problem.rank)
        return (flat if extra is None else torch.cat([flat, extra], 1)).transpose(1, 2)

    run: Any = _compiled() if compiled else flex_attention
    with warnings.catch_warnings():
        if not compiled:
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        result = run(
            heads_first(query),
            heads_first(key, additional_keys),
            heads_first(value, additional_values),
            score_mod=None if bias is None else _score(problem, bias),
            block_mask=block_mask,
            scale=problem.scale,
            enable_gqa=problem.num_heads != problem.num_heads_kv,
            return_aux=AuxRequest(lse=True) if problem.return_lse else None,
        )
    out, lse = (result[0], result[1].lse) if problem.return_lse else (result, None)

    def heads_last(made: Tensor) -> Tensor:
        return made.transpose(1, 2).unflatten(1, problem.grid).contiguous()

    return heads_last(out), None if lse is None else heads_last(lse)
