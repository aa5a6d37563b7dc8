"""Cutting [B, N, heads, D] tensors into pieces that stay in cache: a few batch entries, heads and tokens at a time.

A piece is worked on as [batch * heads, tokens, D], so that one batched matrix product does it. Where it holds a single
batch entry, that is a view of the tensor as it lies; else it is a copy of the piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ELEMENTS = {"cpu": 1 << 19}  # of the widest intermediate of one piece: two megabytes of float32
ELEMENTS_ELSEWHERE = 1 << 26
COPY = 2  # batch entries, which must be copied to lie side by side, are taken together only up to this share of it


@dataclass(frozen=True)
class Piece:
    """Some batch entries and key/value heads, and how many tokens to take at a time.

    repeats: query heads per key/value head.
    """

    batch: slice
    heads: slice
    step: int
    repeats: int = 1

    @property
    def counts(self) -> tuple[int, int]:
        """Batch entries and key/value heads."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start

    @property
    def query_heads(self) -> slice:
        """The query heads that read these key/value heads."""
        return slice(self.heads.start * self.repeats, self.heads.stop * self.repeats)

    def steps(self, num_tokens: int) -> Iterator[slice]:
        """The tokens, `step` at a time."""
        for start in range(0, num_tokens, self.step):
            yield slice(start, min(start + self.step, num_tokens))

    def take(self, tensor: Tensor, tokens: slice, dtype: torch.dtype) -> Tensor:
        """[batch * heads, tokens, D] of a tensor [B, N, key/value heads, D]."""
        return tensor[self.batch, tokens, self.heads].to(dtype).transpose(1, 2).flatten(0, 1)

    def put(self, into: Tensor, tokens: slice, part: Tensor) -> None:
        """Write [batch * heads, tokens, ...] into [B, N, key/value heads, ...]."""
        into[self.batch, tokens, self.heads] = part.unflatten(0, self.counts).transpose(1, 2)

    def put_product(self, into: Tensor, tokens: slice, a: Tensor, b: Tensor) -> None:
        """Write the product a @ b [batch * heads, tokens, ...], without a copy where it can go there directly."""
        if self.counts[0] == 1 and into.dtype == a.dtype:
            torch.bmm(a, b, out=into[self.batch.start, tokens, self.heads].transpose(0, 1))
        else:
            self.put(into, tokens, torch.bmm(a, b))

    def fold(self, tensor: Tensor, tokens: slice, dtype: torch.dtype) -> Tensor:
        """[batch * heads, repeats * tokens, D] of a tensor [B, N, query heads, D]."""
        if self.repeats == 1:
            return self.take(tensor, tokens, dtype)
        part = tensor[self.batch, tokens, self.query_heads].to(dtype).transpose(1, 2)
        return part.reshape(-1, self.repeats * part.shape[2], part.shape[3])

    def unfold(self, into: Tensor, tokens: slice, part: Tensor) -> None:
        """Write [batch * heads, repeats * tokens, ...] into [B, N, query heads, ...]."""
        self.view(into, tokens).copy_(self.lay(part))

    def view(self, tensor: Tensor, tokens: slice) -> Tensor:
        """The piece's part of [B, N, query heads, ...] as it lies."""
        return tensor[self.batch, tokens, self.query_heads]

    def lay(self, part: Tensor) -> Tensor:
        """[batch * heads, repeats * tokens, ...] as [batch, tokens, query heads, ...], as in `view`."""
        batch, heads = self.counts
        own = part.reshape(batch, heads * self.repeats, part.shape[1] // self.repeats, *part.shape[2:])
        return own.transpose(1, 2)


def pieces(
    batch: int, num_heads: int, num_tokens: int, width: int, device: torch.device, repeats: int = 1, whole: bool = False
) -> Iterator[Piece]:
    """Pieces whose tokens * width elements stay below the device's limit, but of no less than one token of one head.

    width: elements per token and key/value head of the widest intermediate. whole: never cut the token axis.
    """
    limit = ELEMENTS.get(device.type, ELEMENTS_ELSEWHERE)
    step = num_tokens if whole else max(1, min(num_tokens, limit // width))
    heads = max(1, min(num_heads, limit // (width * step)))
    together = limit if device.type != "cpu" else limit // COPY
    entries = max(1, min(batch, together // (width * step * heads))) if heads == num_heads else 1
    for b in range(0, batch, entries):
        for h in range(0, num_heads, heads):
            yield Piece(slice(b, min(b + entries, batch)), slice(h, min(h + heads, num_heads)), step, repeats)
