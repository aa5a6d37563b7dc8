"""The path of every device, out of stock torch operations; which file serves a call, and nothing else.

Keys and values become a state of head_dim x head_dim_v per head; nothing of queries x keys, or tokens x head_dim x
head_dim_v, is formed. Half-precision tensors are read in pieces and computed in float32; so are all sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.kernels.linear_attention import causal, flow, sums
from attnzoo.kernels.linear_attention.problem import Problem


def reasons(problem: Problem) -> list[str]:
    """It serves every call."""
    return []


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """out [B, Nq, H, Dv] in query's dtype and norm, [B, Nq, H] under "sum" and else empty."""
    rows = problem.query.shape[:3]
    out = problem.query.new_empty((*rows, problem.value.shape[3]))
    norm = problem.query.new_empty(rows if problem.normaliser == "sum" else 0, dtype=problem.dtype)
    if problem.normaliser == "flow":
        flow.forward(problem, out)
    else:
        (causal if problem.is_causal else sums).forward(problem, out, norm)
    return out, norm


def backward(
    problem: Problem, grads: tuple[Tensor | None, Tensor | None], needs: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value, None where `needs` is False; grads of out and norm, None for zero."""
    grad_out, grad_norm = grads
    if problem.normaliser != "sum":  # nobody can have used the empty norm
        if grad_out is None:
            given = (problem.query, problem.key, problem.value)
            return [torch.zeros_like(t) if needed else None for t, needed in zip(given, needs)]
        if problem.normaliser == "flow":
            return flow.backward(problem, grad_out, needs)
        grad_norm = None
    return (causal if problem.is_causal else sums).backward(problem, grad_out, grad_norm, needs)
