"""The normalisers "none", "sum" and "subtract" without causality: keys and values become one state, in pieces.

With S = sum_j k_j v_j^T, z = sum_j k_j, mv = mean_j v_j (k, q after their feature maps), every row is q M + c, over
q w + eps under "sum":

    none      M = s S                                w none     c = 0
    sum       M = s S                                w = s z    c = 0
    subtract  M = s / count S - s / Nk z mv^T        w none     c = mv
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.linear_attention.features import features, pull
from attnzoo.kernels.linear_attention.problem import Problem
from attnzoo.kernels.pieces import Piece, pieces


@dataclass
class _State:
    """S, z, mv; keys after their map, where one step holds them all, else, if that is a softmax over positions, the log
    of its denominator per channel.
    """

    S: Tensor
    z: Tensor
    mv: Tensor
    kept: Tensor | None
    positions: Tensor | None

    def keys(self, problem: Problem, piece: Piece, some: slice) -> Tensor:
        """[heads, tokens, D] after the feature map."""
        if self.kept is not None:
            return self.kept
        k = piece.take(problem.key, some, problem.dtype)
        return features(k, problem.key_map) if self.positions is None else (k - self.positions).exp_()


def _cut(problem: Problem) -> list[Piece]:
    batch, num_keys, num_heads, head_dim = problem.key.shape
    width = max(head_dim, problem.value.shape[3]) * problem.repeats
    longest = max(num_keys, problem.query.shape[1])
    return list(pieces(batch, num_heads, longest, width, problem.query.device, problem.repeats))


def _collect(problem: Problem, piece: Piece) -> _State:
    num_keys, dtype = problem.key.shape[1], problem.dtype
    steps = list(piece.steps(num_keys))
    kept = positions = None
    if problem.key_map == "softmax" and len(steps) > 1:
        parts = [piece.take(problem.key, some, dtype).logsumexp(1, keepdim=True) for some in steps]
        positions = torch.cat(parts, 1).logsumexp(1, keepdim=True)
    elif problem.key_map == "softmax":
        k = piece.take(problem.key, steps[0], dtype)
        kept = (k - k.amax(1, keepdim=True)).exp_()
        kept.div_(kept.sum(1, keepdim=True))
    elif len(steps) == 1:
        kept = features(piece.take(problem.key, steps[0], dtype), problem.key_map)
    heads = piece.counts[0] * piece.counts[1]
    head_dim, value_dim = problem.key.shape[3], problem.value.shape[3]
    zeros = problem.key.new_zeros((heads, head_dim + 1, value_dim), dtype=dtype)
    state = _State(zeros[:, :-1], zeros.new_zeros((heads, head_dim, 1)), zeros[:, -1:], kept, positions)
    for some in steps:
        k, v = state.keys(problem, piece, some), piece.take(problem.value, some, dtype)
        state.S = torch.baddbmm(state.S, k.transpose(1, 2), v) if some.start else torch.bmm(k.transpose(1, 2), v)
        if problem.normaliser != "none":
            state.z += k.sum(1).unsqueeze(-1)
        if problem.normaliser == "subtract":
            state.mv += v.sum(1, keepdim=True).div_(num_keys)
    return state


def _matrix(problem: Problem, state: _State) -> Tensor:
    """M."""
    if problem.normaliser != "subtract":
        return state.S * problem.scale
    correction = torch.bmm(state.z, state.mv).mul_(problem.scale / problem.key.shape[1])
    return (state.S * (problem.scale / problem.count)).sub_(correction)


def inverse(divisor: Tensor) -> Tensor:
    """1 / divisor, and 0 where that is 0: such a row gives 0 and has no gradient."""
    return divisor.reciprocal().masked_fill_(divisor == 0, 0.0)


def forward(problem: Problem, out: Tensor, norm: Tensor) -> None:
    """Fill out [B, Nq, H, Dv] and, under "sum", norm [B, Nq, H]."""
    for piece in _cut(problem):
        state = _collect(problem, piece)
        matrix = _matrix(problem, state)
        for some in piece.steps(problem.query.shape[1]):
            q = features(piece.fold(problem.query, some, problem.dtype), problem.query_map)
            if problem.normaliser == "none" and problem.repeats == 1:
                piece.put_product(out, some, q, matrix)
                continue
            row = torch.bmm(q, matrix)
            if problem.normaliser == "subtract":
                constant = state.mv.expand(-1, piece.repeats, -1)
                torch.add(piece.lay(row), piece.lay(constant), out=piece.view(out, some))
            elif problem.normaliser == "sum":
                divisor = torch.bmm(q, state.z * problem.scale).add_(problem.eps)
                torch.mul(piece.lay(row), piece.lay(inverse(divisor)), out=piece.view(out, some))
                piece.unfold(norm, some, divisor.squeeze(-1))
            else:
                piece.unfold(out, some, row)


def backward(
    problem: Problem, grad_out: Tensor | None, grad_norm: Tensor | None, needs: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of query, key, value, None where `needs` is False; those of the results None for zero."""
    dtype, scale, num_keys = problem.dtype, problem.scale, problem.key.shape[1]
    query, key, value = problem.query, problem.key, problem.value
    found = [t.new_empty(t.shape) if needed else None for t, needed in zip((query, key, value), needs, strict=True)]
    d_query, d_key, d_value = found
    past = d_key is not None or d_value is not None
    total = problem.normaliser == "sum"
    if grad_out is None:
        grad_out = value.new_zeros(()).expand(*query.shape[:3], value.shape[3])
    for piece in _cut(problem):
        state = _collect(problem, piece)
        matrix, weight = _matrix(problem, state), state.z * scale
        d_matrix, d_weight = torch.zeros_like(matrix), torch.zeros_like(weight)
        d_constant = torch.zeros_like(state.mv)
        for some in piece.steps(query.shape[1]):
            q = features(piece.fold(query, some, dtype), problem.query_map)
            grad = piece.fold(grad_out, some, dtype)
            if total:
                inv = inverse(torch.bmm(q, weight).add_(problem.eps))
                grad = grad * inv
            dq = torch.bmm(grad, matrix.transpose(1, 2))
            if total:
                d_divisor = (q * dq).sum(-1, keepdim=True).mul_(inv).neg_()
                if grad_norm is not None:
                    d_divisor += piece.fold(grad_norm.unsqueeze(-1), some, dtype)
                dq.addcmul_(d_divisor, weight.transpose(1, 2))
                d_weight.baddbmm_(q.transpose(1, 2), d_divisor)
            if past:
                d_matrix.baddbmm_(q.transpose(1, 2), grad)
                if problem.normaliser == "subtract":
                    d_constant += grad.sum(1, keepdim=True)
            if d_query is not None:
                piece.unfold(d_query, some, pull(q, dq, problem.query_map))
        if not past:
            continue
        dz, dv_each = d_weight * scale, None
        if problem.normaliser == "subtract":
            share = scale / num_keys
            dz = torch.bmm(d_matrix, state.mv.transpose(1, 2)).mul_(-share)
            dv_each = d_constant.sub_(torch.bmm(state.z.transpose(1, 2), d_matrix).mul_(share)).div_(num_keys)
        dS = d_matrix * (scale / problem.count)
        for some in piece.steps(num_keys):
            k = state.keys(problem, piece, some)
            if d_value is not None:
                dv = torch.bmm(k, dS)
                piece.put(d_value, some, dv if dv_each is None else dv.add_(dv_each))
            if d_key is not None:
                dk = torch.bmm(piece.take(value, some, dtype), dS.transpose(1, 2))
                if problem.normaliser != "none":
                    dk += dz.transpose(1, 2)
                if problem.key_map != "softmax":
                    dk = pull(k, dk, problem.key_map)
                else:  # sum_j k_j dk_j of a softmax over positions, without a pass over them
                    inner = (state.S * dS).sum(-1, keepdim=True)
                    inner = inner if problem.normaliser == "none" else inner + state.z * dz
                    dk = dk.sub_(inner.transpose(1, 2)).mul_(k)
                piece.put(d_key, some, dk)
    return found
