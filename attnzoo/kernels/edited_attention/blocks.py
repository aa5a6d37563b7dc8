"""Cutting the problem into blocks of rows and kv heads, and the edits of one block's logits (tiled, backward).

The query heads of one kv head are folded into the rows, [kv heads, repeats * rows, D], so that keys and values are read
in place by one batched matrix product, whatever their strides, and never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.edited_attention.problem import SCORE_ELEMENTS, Edits, Visibility

INF = float("inf")

Keys = slice | Tensor


@dataclass(frozen=True)
class Block:
    """Rows start..stop-1 of kv heads first..last-1 of one batch entry; of the keys, only low..high-1 can be seen."""

    batch: int
    first: int
    last: int
    start: int
    stop: int
    low: int
    high: int
    repeats: int

    @property
    def num_rows(self) -> int:
        """Rows in the block."""
        return self.stop - self.start

    @property
    def where(self) -> tuple[int, slice, slice]:
        """The block in a tensor [B, R, H, ...]."""
        return self.batch, slice(self.start, self.stop), slice(self.first * self.repeats, self.last * self.repeats)

    def of_heads(self, tensor: Tensor) -> Tensor:
        """[kv heads or 1, repeats or 1, ...] view of a tensor [B or 1, H or 1, ...]."""
        tensor = tensor[self.batch if tensor.shape[0] > 1 else 0]
        if tensor.shape[0] == 1:
            return tensor[None]
        return tensor[self.where[2]].unflatten(0, (self.last - self.first, self.repeats))

    def fold(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The block's rows of [B, R, H, D] as [kv heads, repeats * rows, D]."""
        return tensor[self.where].to(dtype).unflatten(1, (-1, self.repeats)).permute(1, 2, 0, 3).flatten(1, 2)

    def unfold(self, tensor: Tensor) -> Tensor:
        """[kv heads, repeats * rows, ...] back as [rows, heads, ...]."""
        return tensor.unflatten(1, (self.repeats, -1)).flatten(0, 1).transpose(0, 1)


def key_range(visibility: Visibility, start: int, stop: int, num_keys: int) -> tuple[int, int]:
    """The keys that rows start..stop-1 can see at most, by causality and window; spans may reach anywhere."""
    offset = visibility.query_offset
    assert offset is not None
    low, high = 0, num_keys
    if visibility.span_ids is None:
        if visibility.window_size is not None:
            low = offset + start - visibility.window_size + 1
            high = offset + stop - 1 + visibility.window_size
        if visibility.is_causal:
            high = min(high, offset + stop)
    high = max(0, min(high, num_keys))
    return min(max(low, 0), high), high


def blocks(query: Tensor, key: Tensor, visibility: Visibility, copies: int = 1) -> Iterator[Block]:
    """Blocks of at most SCORE_ELEMENTS / copies logits, but of no less than one row of one kv head."""
    batch, num_rows, num_heads, _ = query.shape
    num_keys, num_heads_kv = key.shape[1], key.shape[2]
    repeats = num_heads // num_heads_kv
    row = max(1, repeats * num_keys * copies)
    rows = max(1, min(num_rows, 64, SCORE_ELEMENTS // row))
    heads = max(1, min(num_heads_kv, SCORE_ELEMENTS // (row * rows)))
    rows = max(1, min(num_rows, SCORE_ELEMENTS // (row * heads)))
    for b in range(batch):
        for first in range(0, num_heads_kv, heads):
            for start in range(0, num_rows, rows):
                stop = min(start + rows, num_rows)
                low, high = key_range(visibility, start, stop, num_keys)
                yield Block(b, first, min(first + heads, num_heads_kv), start, stop, low, high, repeats)


def _seen(visibility: Visibility, block: Block, keys: Keys, num_keys: int, device: torch.device) -> Tensor | None:
    """bool, broadcastable to [kv heads, repeats, rows, keys]: whether a row sees each of `keys`; None: all of them."""
    offset, window, span_ids = visibility.query_offset, visibility.window_size, visibility.span_ids
    assert offset is not None
    seen: Tensor | None = None
    # Of a single row, key_range has cut the keys to the ones it sees; a span makes it keep them all.
    if (visibility.is_causal or window is not None) and (block.num_rows > 1 or span_ids is not None):
        place = torch.arange(offset + block.start, offset + block.stop, device=device)[:, None]
        key_place = torch.arange(num_keys, device=device)[keys]
        if visibility.is_causal:
            seen = key_place <= place
        if window is not None:
            near = (place - key_place).abs() < window
            seen = near if seen is None else seen & near
        if span_ids is not None and seen is not None:
            ids = span_ids[block.batch if span_ids.shape[0] > 1 else 0]
            inside = (place >= 0) & (place < num_keys)
            own = torch.where(inside, ids[place.clamp(0, max(num_keys - 1, 0))], -1)
            seen = seen | ((own == ids[keys]) & (own >= 0))
    if visibility.key_mask is not None:
        real = visibility.key_mask[block.batch if visibility.key_mask.shape[0] > 1 else 0][keys]
        seen = real if seen is None else seen & real
    if visibility.mask is not None and visibility.mask.dtype == torch.bool:
        given = block.of_heads(visibility.mask)[:, :, block.start : block.stop][..., keys]
        seen = given if seen is None else seen & given
    return seen


def cap(s: Tensor, edits: Edits) -> Tensor:
    """Apply the model's softcap to scaled logits, in place."""
    return s if edits.softcap is None else s.div_(edits.softcap).tanh_().mul_(edits.softcap)


def edit(s: Tensor, block: Block, keys: Keys, visibility: Visibility, edits: Edits, num_keys: int) -> Tensor:
    """Edit capped logits [kv heads, repeats, rows, keys] in place: boost, bias, mask, temperature, visibility."""
    if edits.boost is not None:
        s.addcmul_(s.abs(), block.of_heads(edits.boost)[..., None, keys].to(s.dtype))
    if edits.key_bias is not None:
        s.add_(block.of_heads(edits.key_bias)[..., None, keys].to(s.dtype))
    if visibility.mask is not None and visibility.mask.dtype != torch.bool:
        s.add_(block.of_heads(visibility.mask)[:, :, block.start : block.stop][..., keys].to(s.dtype))
    if edits.temperature != 1.0:
        s.div_(edits.temperature)
    seen = _seen(visibility, block, keys, num_keys, s.device)
    return s if seen is None else s.masked_fill_(~seen, -INF)
