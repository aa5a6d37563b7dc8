"""The formula, with the matrix of all queries and keys, in float32 or float64; gradients by torch.func."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels.linear_attention.problem import Problem
from attnzoo.kernels.recompute import gradients


_MAPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "identity": lambda x, axis: x,
    "relu": lambda x, axis: x.relu(),
    "elu": lambda x, axis: F.elu(x) + 1,
    "sigmoid": lambda x, axis: x.sigmoid(),
    "exp": lambda x, axis: x.exp(),
    "softmax": lambda x, axis: x.softmax(axis),
}


def reasons(problem: Problem) -> list[str]:
    """It serves every call."""
    return []


def _formula(problem: Problem) -> tuple[Tensor, Tensor]:
    """out [B, Nq, H, Dv] and norm [B, Nq, H] in float32 or float64."""
    dtype = problem.dtype
    q = problem.query.to(dtype).transpose(1, 2)
    k, v = (t.to(dtype).transpose(1, 2).repeat_interleave(problem.repeats, 1) for t in (problem.key, problem.value))
    q, k = _MAPS[problem.query_map](q, 3), _MAPS[problem.key_map](k, 2)
    products = q @ k.transpose(2, 3)
    seen = torch.ones(products.shape[-2:], dtype=dtype, device=q.device)
    seen = seen.tril() if problem.is_causal else seen
    products = products * seen
    divisor = products.new_ones(products.shape[:-1])
    if problem.normaliser == "flow":
        products = products * _flow(problem, q, k, seen)
    else:
        products = products * problem.scale
    if problem.normaliser == "sum":
        divisor = products.sum(-1) + problem.eps
        zero = divisor == 0
        products = torch.where(zero[..., None], 0.0, products / torch.where(zero, 1.0, divisor)[..., None])
    elif problem.normaliser == "subtract":
        number = seen.sum(-1, keepdim=True)
        mean = products.sum(-1, keepdim=True) / number
        products = products / (number if problem.is_causal else problem.count) + seen * (1 - mean) / number
    return (products @ v).transpose(1, 2), divisor.transpose(1, 2)


def _flow(problem: Problem, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Factors [B, H, Nq, Nk] of q . k; see flow.py. `seen` [Nq, Nk] is 1 where a row sums over a token, else 0."""
    e, f = problem.eps, problem.outer_eps
    number = seen.sum(-1, keepdim=True) if problem.is_causal else 1.0
    # A token's own sums over queries run over those before it too: the same triangle, row by row.
    over_queries = seen if problem.is_causal else seen.transpose(0, 1)
    incoming = number / (((q + e) * (seen @ k + e)).sum(-1, keepdim=True) + f)
    outgoing = number / (((k + e) * (over_queries @ q + e)).sum(-1, keepdim=True) + f)
    sink = ((q + e) * (seen @ (k * outgoing) + e)).sum(-1, keepdim=True) / number + f
    source = ((k + e) * (over_queries @ (q * incoming) + e)).sum(-1, keepdim=True) / number + f
    mass = source.clamp(-1.0, 1.0).exp()
    if problem.is_causal:
        allocation, competition = torch.sigmoid(sink), mass / (seen @ mass) * number
    else:
        allocation = torch.sigmoid(sink * (q.shape[2] / k.shape[2]))
        competition = mass / mass.sum(2, keepdim=True) * k.shape[2]
    return (incoming / number * allocation) * competition.transpose(2, 3)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """out in query's dtype and norm, [B, Nq, H] under "sum" and else empty."""
    out, norm = _formula(problem)
    norm = norm.contiguous() if problem.normaliser == "sum" else norm.new_empty(0)
    return out.to(problem.query.dtype).contiguous(), norm


def backward(
    problem: Problem, grads: tuple[Tensor | None, Tensor | None], needs: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value, None where `needs` is False; grads of out and norm, None for zero."""

    def formula(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return _formula(replace(problem, query=query, key=key, value=value))

    arriving = [grad if grad is None else grad.to(problem.dtype) for grad in grads]
    if problem.normaliser != "sum":
        arriving[1] = None
    given = (problem.query, problem.key, problem.value)
    if all(grad is None for grad in arriving):
        return [torch.zeros_like(t) if needed else None for t, needed in zip(given, needs)]
    return gradients(formula, given, arriving, needs)
