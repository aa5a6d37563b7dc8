"""The GPU's results held to float64 at any size: some queries of each case, against every key, by the formula.

Dense matrices of a whole case would not fit a GPU. So the output is compared at sampled queries, and the gradients are
those of a loss that only reads the sampled queries: then each gradient, of all keys and values too, follows from
[samples, tokens] matrices. Tiles that such a loss does not reach add zeros; other samples reach others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels.neighborhood_attention.problem import Problem
from benchmarks import measuring

FLOAT32_BAR = 1e-5  # relative, against float64
HALF_BAR = 1.5  # times the error of scaled_dot_product_attention in the same dtype on the same rows


def sampled_rows(problem: Problem, count: int, seed: int = 0) -> Tensor:
    """Distinct query numbers, the first and the last (corners of the grid) among them, ascending."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(problem.num_tokens, generator=generator)[: max(count - 2, 0)]
    return torch.unique(torch.cat([some, torch.tensor([0, problem.num_tokens - 1])]))


def seen_by(problem: Problem, rows: Tensor) -> Tensor:
    """bool [rows, tokens]: which keys the given queries see. Borders "shift" and "mask"."""
    seen = torch.ones(len(rows), 1, dtype=torch.bool)
    for axis, at in enumerate(torch.unravel_index(rows, problem.grid)):
        own = problem.windows(axis)
        place = own.position[None]
        part = (place >= own.low[at, None]) & (place <= own.high[at, None]) & (own.group[None] == own.group[at, None])
        seen = (seen[:, :, None] & part[:, None, :]).flatten(1)
    return seen


def offsets(problem: Problem, rows: Tensor) -> Tensor:
    """[rows, tokens]: linear index into an offset bias, clamped where the key is not seen."""
    index = torch.zeros(len(rows), 1, dtype=torch.long)
    for axis, at in enumerate(torch.unravel_index(rows, problem.grid)):
        position, kernel = problem.windows(axis).position, problem.kernel_size[axis]
        part = (position[None] - position[at, None] + kernel - 1).clamp(0, 2 * kernel - 2)
        index = (index[:, :, None] * (2 * kernel - 1) + part[:, None, :]).flatten(1)
    return index


def formula(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, bias: Tensor | None, mask: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """(out, grad_query, grad_key, grad_value, grad_logits) of one head: query, grad [S, dim], key, value [N, dim].

    bias: [S, N] or None. All in the dtype that comes in.
    """
    logits = query @ key.T * scale
    if bias is not None:
        logits = logits + bias
    weights = torch.softmax(logits.masked_fill(~mask, -math.inf), -1)
    out = weights @ value
    d_weights = grad @ value.T
    d_logits = weights * (d_weights - (grad * out).sum(-1, keepdim=True))
    return out, d_logits @ key * scale, d_logits.T @ query * scale, weights.T @ grad, d_logits


def wanted(tensors: list[Tensor], bias: Tensor | None, grad: Tensor, problem: Problem, rows: Tensor) -> list[Tensor]:
    """[out, grad_query, grad_key, grad_value, (grad_bias)] in float64 for one batch entry [1, *grid, heads, dim].

    out and grad_query only at the sampled rows, [S, heads, dim]; the others whole, [N, heads, dim].
    """
    mask = seen_by(problem, rows).to(grad.device)
    index = None if bias is None else offsets(problem, rows).to(grad.device)
    rows = rows.to(grad.device)
    flat = [t.detach().flatten(0, -3) for t in (*tensors, grad)]
    made: list[list[Tensor]] = [[], [], [], []]
    d_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float64, device=bias.device)
    for head in range(problem.num_heads):
        query, key, value, of_out = (t[:, head].double() for t in flat)
        added = None if bias is None or index is None else bias.detach()[head].double().flatten()[index]
        *parts, d_logits = formula(query[rows], key, value, of_out[rows], added, mask, problem.scale)
        for kept, part in zip(made, parts):
            kept.append(part)
        if d_bias is not None and index is not None:
            d_bias[head].view(-1).index_add_(0, index.flatten(), (d_logits * mask).flatten())
    found = [torch.stack(parts, 1) for parts in made]
    return found if d_bias is None else [*found, d_bias]


def got(
    function: Callable[..., Tensor],
    tensors: list[Tensor],
    bias: Tensor | None,
    grad: Tensor,
    rows: Tensor,
    entry: int = 0,
) -> list[Tensor]:
    """The same list from `function(query, key, value, bias)` on a whole batch, of which `entry` is looked at."""
    rows = rows.to(grad.device)
    leaves = [t.detach().requires_grad_() for t in tensors]
    table = None if bias is None else bias.detach().requires_grad_()
    out = function(*leaves, table)
    only = torch.zeros_like(grad)
    flat_only, flat_grad = (t[entry].flatten(0, -3) for t in (only, grad))
    flat_only[rows] = flat_grad[rows]
    inputs = leaves if table is None else [*leaves, table]
    gradients = torch.autograd.grad(out, inputs, only)
    d_query, d_key, d_value = (t[entry].flatten(0, -3) for t in gradients[:3])
    found = [out.detach()[entry].flatten(0, -3)[rows], d_query[rows], d_key, d_value]
    return found if table is None else [*found, gradients[3]]


def sdpa(problem: Problem, rows: Tensor) -> Callable[..., Tensor]:
    """Masked scaled_dot_product_attention over the sampled queries as a function for `got`: zero at other queries."""
    mask = seen_by(problem, rows)

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        at = rows.to(query.device)
        added: Tensor = mask.to(query.device)
        if bias is not None:
            index = offsets(problem, rows).to(query.device)
            added = bias.to(query.dtype).flatten(1)[:, index].masked_fill(~added, -math.inf)[None]
        q, k, v = (t.flatten(0, -3).transpose(0, 1)[None] for t in (query, key, value))
        some = F.scaled_dot_product_attention(q[:, :, at], k, v, attn_mask=added, scale=problem.scale)
        whole = torch.zeros_like(q).index_copy(2, at, some)
        return whole[0].transpose(0, 1).reshape(query.shape)

    return function


def check(
    function: Callable[..., Tensor],
    tensors: list[Tensor],
    bias: Tensor | None,
    grad: Tensor,
    problem: Problem,
    count: int,
) -> dict[str, Any]:
    """Hold `function(query, key, value, bias)` to float64 in the first and last batch entry.

    tensors and grad: [B, *grid, heads, dim]; problem: of one batch entry. Returns {"errors", "bars", "ok"}, a figure
    per result: float32 within FLOAT32_BAR, half types within HALF_BAR times what SDPA's own error is.
    """
    names = ["out", "grad_query", "grad_key", "grad_value", *([] if bias is None else ["grad_bias"])]
    errors, bars = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for entry in sorted({0, grad.shape[0] - 1}):
        rows = sampled_rows(problem, count, seed=entry)
        part, part_grad = [t[entry : entry + 1] for t in tensors], grad[entry : entry + 1]
        truth = wanted(part, bias, part_grad, problem, rows)
        mine = got(function, tensors, bias, grad, rows, entry)
        plain = None if grad.dtype == torch.float32 else got(sdpa(problem, rows), part, bias, part_grad, rows)
        for position, name in enumerate(names):
            errors[name] = max(errors[name], measuring.relative_error([mine[position]], [truth[position]]))
            bar = FLOAT32_BAR
            if plain is not None:
                bar = HALF_BAR * measuring.relative_error([plain[position]], [truth[position]])
            bars[name] = max(bars[name], bar)
    return {"errors": errors, "bars": bars, "ok": all(errors[name] <= bars[name] for name in names)}
