"""The formula, gathered window by window: any dtype, any device, every option. The yardstick of every test.

For query n and slot k of its window: logits[n, k] = scale * <query_n, key_k> + bias, one softmax over the slots that
take part and the additional keys. Queries go through in chunks, so that the gathered keys stay within _CHUNK elements.
float64 stays float64; everything else is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.neighborhood_attention.problem import Problem

_CHUNK = 1 << 24


def reasons(problem: Problem) -> list[str]:
    """Why the reference can't serve `problem`: it serves all."""
    return []


@dataclass(frozen=True)
class _Windows:
    """The windows of the queries first .. last - 1: tensors [queries, slots]."""

    first: int
    last: int
    key: Tensor  # linear index of the key in the grid, clamped into it
    present: Tensor  # the slot takes part in the softmax
    inside: Tensor | None  # the key lies in the grid; None where all present ones do
    offset: Tensor  # linear index into an offset bias, clamped into it


def _windows(problem: Problem, device: torch.device) -> Iterator[_Windows]:
    """The windows of all queries in chunks of bounded size, queries in row-major order."""
    per_query = (
        problem.batch
        * problem.num_slots
        * (problem.num_heads_kv * max(problem.head_dim, problem.head_dim_v) + 2 * problem.num_heads)
    )
    step = max(1, _CHUNK // max(1, per_query))
    axes = [problem.windows(axis) for axis in range(problem.rank)]
    for first in range(0, problem.num_tokens, step):
        last = min(first + step, problem.num_tokens)
        coordinates = torch.unravel_index(torch.arange(first, last), problem.grid)
        key = offset = torch.zeros(1, dtype=torch.long)
        present = inside = torch.ones(1, dtype=torch.bool)
        for axis, (window, at) in enumerate(zip(axes, coordinates)):
            kernel_size, shape = problem.kernel_size[axis], [last - first] + [1] * problem.rank
            shape[1 + axis] = kernel_size

            def spread(table: Tensor, at: Tensor = at) -> Tensor:
                return table[at].view(-1, *[1] * problem.rank)

            position = spread(window.start) + torch.arange(kernel_size).view(shape[1:])
            within = (position >= 0) & (position < spread(window.length))
            coordinate = spread(window.group) + problem.dilation[axis] * position
            key = key * problem.grid[axis] + coordinate.clamp(0, problem.grid[axis] - 1)
            present = present & (position >= spread(window.low)) & (position <= spread(window.high))
            inside = inside & within
            relative = (position - spread(window.position) + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
            offset = offset * (2 * kernel_size - 1) + relative
        full = (last - first, *problem.kernel_size)
        flat = [t.expand(full).reshape(last - first, -1).to(device) for t in (key, present, inside, offset)]
        yield _Windows(first, last, flat[0], flat[1], flat[2] if problem.border == "zero" else None, flat[3])


def _gather(tensor: Tensor, windows: _Windows, dtype: torch.dtype) -> Tensor:
    """[B, queries, slots, heads_kv, dim] of a flat [B, tokens, heads_kv, dim], zero where the key lies outside."""
    taken = tensor.index_select(1, windows.key.flatten()).to(dtype)
    taken = taken.view(tensor.shape[0], *windows.key.shape, *tensor.shape[2:])
    return taken if windows.inside is None else taken * windows.inside[:, :, None, None].to(dtype)


def _bias(bias: Tensor | None, windows: _Windows, problem: Problem) -> Tensor | None:
    """The bias as [B or 1, queries, heads, slots]."""
    if bias is None:
        return None
    if problem.bias == "offset":
        return bias.flatten(1)[:, windows.offset].transpose(0, 1)[None].to(problem.compute_dtype)
    flat = bias.reshape(bias.shape[0], problem.num_tokens, *bias.shape[-2:])
    return flat[:, windows.first : windows.last].to(problem.compute_dtype)


def _logits(
    query: Tensor, keys: Tensor, bias: Tensor | None, windows: _Windows, extra: Tensor | None, problem: Problem
) -> Tensor:
    """[B, queries, heads_kv, group, slots + additional], -inf where a slot takes no part."""
    logits = torch.einsum("bnhgd,bnkhd->bnhgk", query, keys) * problem.scale
    if (taken := _bias(bias, windows, problem)) is not None:
        logits = logits + taken.unflatten(2, (problem.num_heads_kv, -1))
    logits = logits.masked_fill(~windows.present[None, :, None, None], -math.inf)
    if extra is not None:
        logits = torch.cat([logits, torch.einsum("bnhgd,bmhd->bnhgm", query, extra) * problem.scale], dim=-1)
    return logits


def _grouped(tensor: Tensor, problem: Problem) -> Tensor:
    """[B, *grid, heads, ...] as [B, tokens, heads_kv, group, ...] in the dtype of the computation."""
    return tensor.flatten(1, problem.rank).unflatten(2, (problem.num_heads_kv, -1)).to(problem.compute_dtype)


def window_logits(query: Tensor, key: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """The logits before the softmax, [B, *grid, heads, slots], -inf where a slot takes no part."""
    rows, flat_key = _grouped(query, problem), key.flatten(1, problem.rank)
    parts = []
    for windows in _windows(problem, query.device):
        keys = _gather(flat_key, windows, problem.compute_dtype)
        logits = _logits(rows[:, windows.first : windows.last], keys, bias, windows, None, problem)
        parts.append(logits.flatten(2, 3))
    return torch.cat(parts, dim=1).unflatten(1, problem.grid)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """out [B, *grid, heads, head_dim_v] in the query's dtype and lse [B, *grid, heads] in the computation's."""
    dtype, tokens = problem.compute_dtype, problem.num_tokens
    out = query.new_empty(problem.batch, tokens, problem.num_heads, problem.head_dim_v)
    lse = query.new_empty(problem.batch, tokens, problem.num_heads, dtype=dtype)
    rows, flat_key, flat_value = _grouped(query, problem), key.flatten(1, problem.rank), value.flatten(1, problem.rank)
    extra = None if additional_keys is None else additional_keys.to(dtype)
    for windows in _windows(problem, query.device):
        part = slice(windows.first, windows.last)
        logits = _logits(rows[:, part], _gather(flat_key, windows, dtype), bias, windows, extra, problem)
        total = logits.logsumexp(-1)
        weights = torch.exp(logits - total.masked_fill(total == -math.inf, 0.0)[..., None])
        near, far = weights[..., : problem.num_slots], weights[..., problem.num_slots :]
        joined = torch.einsum("bnhgk,bnkhd->bnhgd", near, _gather(flat_value, windows, dtype))
        if additional_values is not None:
            joined = joined + torch.einsum("bnhgm,bmhd->bnhgd", far, additional_values.to(dtype))
        out[:, part] = joined.flatten(2, 3).to(out.dtype)
        lse[:, part] = total.flatten(2, 3)
    return out.unflatten(1, problem.grid), lse.unflatten(1, problem.grid)


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
    """The gradients of query, key, value, bias, additional_keys and additional_values; None where not needed.

    With p = exp(logits - lse): dp = <grad_out, value>, dlogits = p * (dp - <grad_out, out> + grad_lse).
    """
    dtype, slots = problem.compute_dtype, problem.num_slots
    rows, grads = _grouped(query, problem), _grouped(grad_out, problem)
    total = lse.flatten(1, problem.rank).unflatten(2, (problem.num_heads_kv, -1)).to(dtype)
    delta = (grads * _grouped(out, problem)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.flatten(1, problem.rank).unflatten(2, (problem.num_heads_kv, -1)).to(dtype)
    flat_key, flat_value = key.flatten(1, problem.rank), value.flatten(1, problem.rank)
    given = (query, key, value, bias, additional_keys, additional_values)
    asked = [needed and tensor is not None for needed, tensor in zip(needs, given, strict=True)]
    sums = [
        torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if needed and tensor is not None else None
        for needed, tensor in zip(asked, (rows, flat_key, flat_value, *given[3:]))
    ]
    grad_query, grad_key, grad_value, grad_bias, grad_extra, grad_extra_values = sums
    through_logits = asked[0] or asked[1] or asked[3] or asked[4]
    extra = extra_values = None
    if additional_keys is not None and additional_values is not None:
        extra, extra_values = additional_keys.to(dtype), additional_values.to(dtype)
    for windows in _windows(problem, query.device):
        part = slice(windows.first, windows.last)
        row, grad, index = rows[:, part], grads[:, part], windows.key.flatten()
        keys = _gather(flat_key, windows, dtype)
        logits = _logits(row, keys, bias, windows, extra, problem)
        weights = torch.exp(logits - total[:, part].masked_fill(total[:, part] == -math.inf, 0.0)[..., None])
        near, far = weights[..., :slots], weights[..., slots:]
        inside = None if windows.inside is None else windows.inside[:, :, None, None].to(dtype)

        def scatter(goal: Tensor, made: Tensor, inside: Tensor | None = inside, index: Tensor = index) -> None:
            goal.index_add_(1, index, (made if inside is None else made * inside).flatten(1, 2))

        if grad_value is not None:
            scatter(grad_value, torch.einsum("bnhgk,bnhgd->bnkhd", near, grad))
        if grad_extra_values is not None:
            grad_extra_values += torch.einsum("bnhgm,bnhgd->bmhd", far, grad)
        if not through_logits:
            continue
        values = _gather(flat_value, windows, dtype)
        d_near = near * (torch.einsum("bnhgd,bnkhd->bnhgk", grad, values) - delta[:, part, ..., None])
        if grad_query is not None:
            grad_query[:, part] = torch.einsum("bnhgk,bnkhd->bnhgd", d_near, keys) * problem.scale
        if grad_key is not None:
            scatter(grad_key, torch.einsum("bnhgk,bnhgd->bnkhd", d_near, row) * problem.scale)
        if grad_bias is not None:
            d_bias = d_near.flatten(2, 3)
            if problem.bias == "offset":
                by_head = d_bias.sum(0).permute(1, 0, 2).flatten(1)
                grad_bias.view(problem.num_heads, -1).index_add_(1, windows.offset.flatten(), by_head)
            else:
                flat = grad_bias.view(grad_bias.shape[0], problem.num_tokens, problem.num_heads, slots)
                flat[:, part] = d_bias if grad_bias.shape[0] == problem.batch else d_bias.sum(0, keepdim=True)
        if extra is not None and extra_values is not None:
            d_far = far * (torch.einsum("bnhgd,bmhd->bnhgm", grad, extra_values) - delta[:, part, ..., None])
            if grad_query is not None:
                grad_query[:, part] += torch.einsum("bnhgm,bmhd->bnhgd", d_far, extra) * problem.scale
            if grad_extra is not None:
                grad_extra += torch.einsum("bnhgm,bnhgd->bmhd", d_far, row) * problem.scale
    return tuple(
        None if total is None or tensor is None else total.reshape(tensor.shape).to(tensor.dtype)
        for total, tensor in zip(sums, given, strict=True)
    )
