"""Some query heads with all their tokens, the keys and values of each beside them, as [heads, tokens, D]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.linear_attention.problem import Problem
from attnzoo.kernels.pieces import Piece, pieces

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Heads:
    """One piece of the problem, in problem.dtype; keys and values that query heads share are repeated for them."""

    piece: Piece
    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Iterator[Heads]:
        """All of them, a few at a time."""
        batch, num_keys, num_heads, head_dim = problem.key.shape
        width, longest = problem.repeats * max(head_dim, problem.value.shape[3]), max(num_keys, problem.query.shape[1])
        for piece in pieces(batch, num_heads, longest, width, problem.query.device, problem.repeats, whole=True):
            apart = Piece(piece.batch, piece.query_heads, piece.step)
            q = apart.take(problem.query, ALL, problem.dtype)
            k, v = (piece.take(t, ALL, problem.dtype) for t in (problem.key, problem.value))
            if problem.repeats > 1:
                k, v = (t.repeat_interleave(problem.repeats, 0) for t in (k, v))
            yield cls(piece, q, k, v)

    def numbers(self) -> Tensor:
        """1 .. N, [N, 1]: how many tokens a causal row has."""
        count = self.query.shape[1]
        return torch.arange(1, count + 1, dtype=self.query.dtype, device=self.query.device).unsqueeze(-1)

    def take(self, tensor: Tensor) -> Tensor:
        """[heads, N, E] of a tensor [B, N, H, E]."""
        return Piece(self.piece.batch, self.piece.query_heads, 1).take(tensor, ALL, self.query.dtype)

    def put(self, into: Tensor, part: Tensor) -> None:
        """Write [heads, N, ...] into [B, N, H, ...]."""
        Piece(self.piece.batch, self.piece.query_heads, 1).put(into, ALL, part)

    def finish(self, problem: Problem, into: Sequence[Tensor | None], parts: tuple[Tensor, Tensor, Tensor]) -> None:
        """Write the gradients of query, key and value, summed over the query heads that share a key head."""
        d_query, d_key, d_value = into
        if d_query is not None:
            self.put(d_query, parts[0])
        for whole, part in ((d_key, parts[1]), (d_value, parts[2])):
            if whole is not None:
                shared = part if problem.repeats == 1 else part.unflatten(0, (-1, problem.repeats)).sum(1)
                self.piece.put(whole, ALL, shared)
