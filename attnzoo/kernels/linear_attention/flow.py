"""The normaliser "flow" (Flowformer): what a token gives and takes is held constant, and competes.

With q, k after their feature maps, sums over tokens, S = Nq and N = Nk, e = eps, f = outer_eps:

    I_i = 1 / ((q_i + e) . (sum k + e) + f)              O_j = 1 / ((k_j + e) . (sum q + e) + f)
    sink_i = (q_i + e) . (sum_j k_j O_j + e) + f         source_j = clamp((k_j + e) . (sum_i q_i I_i + e) + f, -1, 1)
    allocation_i = sigmoid(sink_i S / N)                 competition_j = N softmax(source)_j
    out_i = I_i allocation_i q_i sum_j k_j competition_j v_j

Under causality every sum runs over the tokens up to its own, n_i = i + 1 of them, and

    I_i = n_i / (..)   O_j = n_j / (..)   sink_i = (..) / n_i   source_j = clamp((..) / n_j, -1, 1)
    allocation_i = sigmoid(sink_i)   competition_j = n_j exp(source_j) / sum_{l <= j} exp(source_l)
    out_i = I_i / n_i allocation_i q_i sum_{j <= i} k_j competition_j v_j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.linear_attention.features import features, pull
from attnzoo.kernels.linear_attention.heads import Heads
from attnzoo.kernels.linear_attention.problem import Problem
from attnzoo.kernels.linear_attention.scan import scan, scan_gradients, sums_after


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """sum over channels of a * b, [heads, N, 1]."""
    return (a * b).sum(-1, keepdim=True) if b.shape[1] == a.shape[1] else torch.bmm(a, b.transpose(1, 2))


@dataclass
class _Flow:
    """The steps of one piece, kept for its gradient. Sums over tokens are [heads, 1 or N, D], the others [heads, N, 1].

    n: 1 without causality, else how many tokens a row has. source is not clamped yet.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    n: Tensor | float
    sum_k: Tensor
    sum_q: Tensor
    incoming: Tensor
    outgoing: Tensor
    sum_ko: Tensor
    sum_qi: Tensor
    source: Tensor
    allocation: Tensor
    competition: Tensor
    mass: Tensor


def _flow(problem: Problem, heads: Heads) -> _Flow:
    causal, e, f = problem.is_causal, problem.eps, problem.outer_eps
    q, k, v = features(heads.query, problem.query_map), features(heads.key, problem.key_map), heads.value
    n = heads.numbers() if causal else 1.0

    def over(x: Tensor) -> Tensor:
        return x.cumsum(1) if causal else x.sum(1, keepdim=True)

    def dot(a: Tensor, b: Tensor) -> Tensor:  # (a + e) . (b + e)
        b = b + e
        return _row_dot(a, b).add_(b.sum(-1, keepdim=True), alpha=e)

    sum_k, sum_q = over(k), over(q)
    incoming, outgoing = n / (dot(q, sum_k) + f), n / (dot(k, sum_q) + f)
    sum_ko, sum_qi = over(k * outgoing), over(q * incoming)
    sink, source = dot(q, sum_ko) / n + f, dot(k, sum_qi) / n + f
    ratio = 1.0 if causal else q.shape[1] / k.shape[1]
    allocation = torch.sigmoid(sink * ratio)
    mass = source.clamp(-1.0, 1.0).exp_()
    competition = mass * (n if causal else float(k.shape[1])) / over(mass)
    return _Flow(
        q, k, v, n, sum_k, sum_q, incoming, outgoing, sum_ko, sum_qi, source, allocation, competition, mass
    )  # fmt: skip


def forward(problem: Problem, out: Tensor) -> None:
    """Fill out [B, Nq, H, Dv]."""
    for heads in Heads.of(problem):
        w = _flow(problem, heads)
        given = w.v * w.competition
        u = scan(w.q, w.k, given) if problem.is_causal else torch.bmm(w.q, torch.bmm(w.k.transpose(1, 2), given))
        heads.put(out, u * (w.incoming / w.n * w.allocation))


def backward(problem: Problem, grad_out: Tensor | None, needs: tuple[bool, bool, bool]) -> list[Tensor | None]:
    """Gradients of query, key, value, None where `needs` is False."""
    found = [torch.empty_like(t) if n else None for t, n in zip((problem.query, problem.key, problem.value), needs)]
    for heads in Heads.of(problem):
        w = _flow(problem, heads)
        assert grad_out is not None
        heads.finish(problem, found, _gradients(problem, w, heads.take(grad_out)))
    return found


def _gradients(problem: Problem, w: _Flow, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, in the order in which the steps of `_flow` are undone."""
    causal, e = problem.is_causal, problem.eps
    q, k, v, n = w.q, w.k, w.v, w.n

    def over(x: Tensor) -> Tensor:  # what arrives at each summand of a sum that got x
        return sums_after(x) if causal else x.sum(1, keepdim=True)

    given = v * w.competition
    du = grad * (w.incoming / n * w.allocation)
    if causal:
        reached = _row_dot(grad, scan(q, k, given))
        dq, dk, d_given = scan_gradients(q, k, given, du)
    else:
        state, d_state = torch.bmm(k.transpose(1, 2), given), torch.bmm(q.transpose(1, 2), du)
        plain = torch.bmm(grad, state.transpose(1, 2))
        reached = _row_dot(q, plain)
        dq = plain.mul_(w.incoming * w.allocation)
        dk, d_given = torch.bmm(given, d_state.transpose(1, 2)), torch.bmm(k, d_state)
    dv = d_given * w.competition
    # competition = mass * count / over(mass), mass = exp(clamped source)
    share = w.competition / w.mass
    d_competition = _row_dot(d_given, v)
    passed = d_competition * w.competition * share / (n if causal else float(k.shape[1]))
    d_source = (d_competition * share - over(passed)) * w.mass
    d_source = d_source.masked_fill((w.source < -1.0) | (w.source > 1.0), 0.0) / n
    d_incoming = reached * w.allocation / n
    ratio = 1.0 if causal else q.shape[1] / k.shape[1]
    d_sink = reached * w.incoming / n * w.allocation * (1.0 - w.allocation) * ratio / n
    # sink = (q + e) . (sum_ko + e) / n, source = (k + e) . (sum_qi + e) / n
    dq += d_sink * (w.sum_ko + e)
    dk += d_source * (w.sum_qi + e)
    d_ko, d_qi = over(d_sink * (q + e)), over(d_source * (k + e))
    dk += w.outgoing * d_ko
    dq += w.incoming * d_qi
    d_outgoing, d_incoming = _row_dot(k, d_ko), d_incoming + _row_dot(q, d_qi)
    # incoming = n / ((q + e) . (sum_k + e) + f), outgoing = n / ((k + e) . (sum_q + e) + f)
    d_in, d_out = -d_incoming * w.incoming.square() / n, -d_outgoing * w.outgoing.square() / n
    dq += d_in * (w.sum_k + e) + over(d_out * (k + e))
    dk += d_out * (w.sum_q + e) + over(d_in * (q + e))
    return pull(q, dq, problem.query_map), pull(k, dk, problem.key_map), dv
