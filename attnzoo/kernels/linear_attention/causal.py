"""The normalisers "none", "sum" and "subtract" under causality: row i is over the tokens 0..i.

With u_i = sum_{j<=i} (q_i . k_j) v_j, r_i = q_i . sum_{j<=i} k_j, m_i = mean_{j<=i} v_j and n = i + 1:

    none      out = s u
    sum       out = s u / (s r + eps)
    subtract  out = s / n (u - r m) + m
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.kernels.linear_attention.features import features, pull
from attnzoo.kernels.linear_attention.heads import Heads
from attnzoo.kernels.linear_attention.problem import Problem
from attnzoo.kernels.linear_attention.scan import scan, scan_gradients, sums_after
from attnzoo.kernels.linear_attention.sums import inverse


def forward(problem: Problem, out: Tensor, norm: Tensor) -> None:
    """Fill out [B, N, H, Dv] and, under "sum", norm [B, N, H]."""
    for heads in Heads.of(problem):
        q, k, v = features(heads.query, problem.query_map), features(heads.key, problem.key_map), heads.value
        u = scan(q, k, v)
        if problem.normaliser == "none":
            heads.put(out, u * problem.scale)
            continue
        r = (q * k.cumsum(1)).sum(-1, keepdim=True)
        if problem.normaliser == "sum":
            divisor = r.mul_(problem.scale).add_(problem.eps)
            heads.put(out, u * problem.scale * inverse(divisor))
            heads.put(norm, divisor.squeeze(-1))
        else:
            n = heads.numbers()
            m = v.cumsum(1) / n
            heads.put(out, (u - r * m) * (problem.scale / n) + m)


def backward(
    problem: Problem, grad_out: Tensor | None, grad_norm: Tensor | None, needs: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value, None where `needs` is False; those of the results None for zero."""
    found = [torch.empty_like(t) if n else None for t, n in zip((problem.query, problem.key, problem.value), needs)]
    for heads in Heads.of(problem):
        q, k, v = features(heads.query, problem.query_map), features(heads.key, problem.key_map), heads.value
        grad = torch.zeros_like(q[..., :1]).expand_as(v) if grad_out is None else heads.take(grad_out)
        if problem.normaliser == "none":
            dq, dk, dv = scan_gradients(q, k, v, grad * problem.scale)
        else:
            prefix = k.cumsum(1)
            r = (q * prefix).sum(-1, keepdim=True)
            if problem.normaliser == "sum":
                inv = inverse(r * problem.scale + problem.eps)
                du = grad * (inv * problem.scale)
            else:
                n = heads.numbers()
                m, du = v.cumsum(1) / n, grad * (problem.scale / n)
            dq, dk, dv = scan_gradients(q, k, v, du)
            if problem.normaliser == "sum":
                dr = (q * dq).sum(-1, keepdim=True).mul_(inv).neg_()
                if grad_norm is not None:
                    dr += heads.take(grad_norm.unsqueeze(-1))
                dr *= problem.scale
            else:
                dr = -(du * m).sum(-1, keepdim=True)
                dv += sums_after((grad - r * du) / n)
            dq += dr * prefix
            dk += sums_after(dr * q)
        heads.finish(problem, found, (pull(q, dq, problem.query_map), pull(k, dk, problem.key_map), dv))
    return found
