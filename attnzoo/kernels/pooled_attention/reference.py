"""The formula, dense in both stages, in float32 or float64; its gradients by torch.func. The tests' yardstick."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.kernels.edited_attention.reference import softmax_parts
from attnzoo.kernels.pooled_attention.problem import Problem
from attnzoo.kernels.recompute import gradients


def reasons(problem: Problem) -> list[str]:
    """It serves every call."""
    return []


def _formula(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, agent_value, agent_lse in float32 or float64, [B, N or A, H, ...] each."""
    dtype = torch.promote_types(problem.query.dtype, torch.float32)
    repeats = problem.query.shape[2] // problem.key.shape[2]
    q, a = problem.query.to(dtype), problem.agents.to(dtype)
    k, v = (t.to(dtype).repeat_interleave(repeats, dim=2) for t in (problem.key, problem.value))
    a = a.expand(q.shape[0], -1, -1, -1)
    s = torch.einsum("bahd,bnhd->bhan", a, k) * problem.scale
    if problem.agent_bias is not None:
        s = s + problem.agent_bias.to(dtype)
    if problem.key_mask is not None:
        s = s.masked_fill(~problem.key_mask[:, None, None, :], float("-inf"))
    p, agent_lse = softmax_parts(s)
    agent_value = torch.einsum("bhan,bnhd->bahd", p, v)
    s = torch.einsum("bnhd,bahd->bhna", q, a) * problem.query_scale
    if problem.query_bias is not None:
        s = s + problem.query_bias.to(dtype)
    p, lse = softmax_parts(s)
    out = torch.einsum("bhna,bahd->bnhd", p, agent_value)
    return out, lse.transpose(1, 2), agent_value, agent_lse.transpose(1, 2)


def forward(problem: Problem, want_lse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, agent_value, agent_lse; out and agent_value in the query's dtype."""
    out, lse, agent_value, agent_lse = (t.contiguous() for t in _formula(problem))
    return out.to(problem.query.dtype), lse, agent_value.to(problem.query.dtype), agent_lse


def backward(
    problem: Problem,
    grads: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> list[Tensor | None]:
    """Gradients of query, key, value, agents, agent_bias, query_bias, None where `needs` is False."""
    names = ("query", "key", "value", "agents", "agent_bias", "query_bias")

    def formula(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _formula(replace(problem, **dict(zip(names, tensors))))  # type: ignore[arg-type]

    dtype = torch.promote_types(problem.query.dtype, torch.float32)
    arriving = [grad if grad is None else grad.to(dtype) for grad in grads]
    return gradients(formula, [getattr(problem, name) for name in names], arriving, needs)
