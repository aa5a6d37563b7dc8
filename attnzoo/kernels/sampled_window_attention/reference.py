"""The formula, window by window: any dtype, any device. The yardstick of every test.

For query i and key j of a window: logits[i, j] = scale * <query_i, key_j> + bias[i, j], one softmax over the K keys,
the keys and values being read from their maps by index, corner by corner. Windows go through in chunks that hold at
most _CHUNK elements of keys, values and logits, or one window. float64 stays float64; the rest is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.sampled_window_attention import bilinear
from attnzoo.kernels.sampled_window_attention.problem import Problem

_CHUNK = 1 << 24


def reasons(problem: Problem) -> list[str]:
    """Why the reference can't serve `problem`: it serves all."""
    return []


@dataclass(frozen=True)
class Reading:
    """Where the keys of some windows of one item lie, corner by corner: [..., 4] per key."""

    down: bilinear.Axis
    across: bilinear.Axis
    row: Tensor  # of the map [Hk * Wk * heads_kv]
    outside: Tensor  # the corner is: a zero, whatever lies at its row

    def rows(self, flat: Tensor, weights: Tensor) -> Tensor:
        """Sums [..., dim] over the corners of weights [..., 4] times the rows of flat [Hk * Wk * heads_kv, dim]."""
        total = flat.new_zeros((*self.row.shape[:-1], flat.shape[1]))
        for corner in range(4):
            taken = flat[self.row[..., corner]].masked_fill_(self.outside[..., corner, None], 0.0)
            total += taken * weights[..., corner, None]
        return total

    def add_to(self, flat: Tensor, gradient: Tensor) -> None:
        """The transpose of reading: adds gradient [..., dim], weighted, to the rows of flat that were read.

        `index_add_`, which gives the same bits in every run where torch.use_deterministic_algorithms asks for it.
        """
        weights = bilinear.weights(self.down, self.across)
        for corner in range(4):
            given = (gradient * weights[..., corner, None]).masked_fill_(self.outside[..., corner, None], 0.0)
            flat.index_add_(0, self.row[..., corner].flatten(), given.flatten(0, -2))


def reading(positions: Tensor, problem: Problem) -> Reading:
    """The reading of positions [..., heads, K, 2] in the dtype of the computation."""
    down, across = (bilinear.axis(places, size) for places, size in zip(positions.unbind(-1), problem.key_grid))
    head = torch.arange(problem.num_heads, device=positions.device) // problem.group
    (first, second), width = down.pixel, problem.key_grid[1]
    lines, places = (first.long() * width, second.long() * width), (across.pixel[0].long(), across.pixel[1].long())
    row = bilinear.corners(lines, places, torch.add) * problem.num_heads_kv + head[:, None, None]
    return Reading(down, across, row, bilinear.corners(down.inside, across.inside) == 0)


class _Item:
    """One item of the batch, in chunks of windows."""

    def __init__(self, problem: Problem, item: int, query: Tensor, key: Tensor, value: Tensor, positions: Tensor):
        self.problem, self.item, self.dtype = problem, item, problem.compute_dtype
        self.query = self.windows(query)
        self.keys, self.values = (t[item].to(self.dtype).flatten(0, 2) for t in (key, value))
        self.places = positions[item].flatten(0, 1).to(self.dtype)

    def windows(self, tensor: Tensor) -> Tensor:
        """This item of [B, H, W, heads, dim] as [windows, heads, area, dim]."""
        return self.problem.cut(tensor[self.item, None]).flatten(4, 5).flatten(0, 2).to(self.dtype)

    def chunks(self) -> Iterator[tuple[slice, Reading]]:
        """Ranges of windows, with where their keys lie."""
        p = self.problem
        per_window = p.num_heads * (3 * p.area * p.num_samples + 4 * p.num_samples * (p.head_dim + p.head_dim_v))
        step = max(1, _CHUNK // per_window)
        for first in range(0, p.num_windows, step):
            part = slice(first, min(first + step, p.num_windows))
            yield part, reading(self.places[part], p)

    def logits(self, part: slice, keys: Tensor, bias: Tensor | None) -> Tensor:
        """[windows, heads, area, K]."""
        logits = self.query[part] @ keys.transpose(-1, -2) * self.problem.scale
        return logits if bias is None else logits + bias.to(self.dtype)


def forward(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, bias: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """out [B, H, W, heads, head_dim_v] in the query's dtype and lse [B, H, W, heads] in the computation's."""
    out = query.new_empty((*query.shape[:4], problem.head_dim_v))
    lse = query.new_empty(query.shape[:4], dtype=problem.compute_dtype)
    for item in range(problem.batch):
        one = _Item(problem, item, query, key, value, positions)
        made, totals = [], []
        for part, at in one.chunks():
            weights = bilinear.weights(at.down, at.across)
            logits = one.logits(part, at.rows(one.keys, weights), bias)
            total = logits.logsumexp(-1)
            p = torch.exp(logits - total.masked_fill(total == -math.inf, 0.0)[..., None])
            made.append(p @ at.rows(one.values, weights))
            totals.append(total)
        for whole, parts in ((out[item, None], made), (lse[item, None], totals)):
            goal = problem.cut(whole)
            goal.copy_(torch.cat(parts).view(goal.shape))
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of query, key, value, positions and bias, None where `needs` has no use for one.

    With p = exp(logits - lse): dlogits = p * (<grad_out, value> - <grad_out, out> + grad_lse). What arrives at a
    sampled key or value goes to the four corners by their weights, and to the position by the weights' slopes.
    """
    dtype = problem.compute_dtype
    given = (query, key, value, positions, bias)
    found = [t.new_zeros(t.shape, dtype=dtype) if t is not None and n else None for t, n in zip(given, needs)]
    grad_query, grad_key, grad_value, grad_positions, grad_bias = found
    shift = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        shift = shift - grad_lse.to(dtype)
    safe_lse = lse.to(dtype).masked_fill(lse == -math.inf, 0.0)
    for item in range(problem.batch):
        one = _Item(problem, item, query, key, value, positions)
        grads, total, delta = (one.windows(t) for t in (grad_out, safe_lse[..., None], shift[..., None]))
        by_query, by_place = [], []
        for part, at in one.chunks():
            weights = bilinear.weights(at.down, at.across)
            keys, values = at.rows(one.keys, weights), at.rows(one.values, weights)
            p = torch.exp(one.logits(part, keys, bias) - total[part])
            d_logits = p * (grads[part] @ values.transpose(-1, -2) - delta[part])
            d_values = p.transpose(-1, -2) @ grads[part]
            d_keys = d_logits.transpose(-1, -2) @ one.query[part] * problem.scale
            by_query.append(d_logits @ keys * problem.scale)
            if grad_bias is not None:
                grad_bias += d_logits.sum(0)
            if grad_key is not None:
                at.add_to(grad_key[item].flatten(0, 2), d_keys)
            if grad_value is not None:
                at.add_to(grad_value[item].flatten(0, 2), d_values)
            if grad_positions is not None:
                sums = [
                    (d_keys * at.rows(one.keys, slope)).sum(-1) + (d_values * at.rows(one.values, slope)).sum(-1)
                    for slope in bilinear.slopes(at.down, at.across)
                ]
                by_place.append(torch.stack(sums, -1))
        for whole, parts in ((grad_query, by_query), (grad_positions, by_place)):
            if whole is not None:
                goal = problem.cut(whole[item, None]) if whole is grad_query else whole[item]
                goal.copy_(torch.cat(parts).view(goal.shape))
    return [g if g is None or t is None else g.to(t.dtype) for g, t in zip(found, given)]
