"""What methods that choose blocks share: which tokens are cut into blocks, what is always kept, and the attention.

The grid's tokens are cut into blocks of block_size = (queries, keys) tokens; the method says which blocks of the grid
its queries see. Text and reference tokens are seen by all, and their own queries stay dense.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.errors import UnsupportedError, check_choice, check_flag, check_number, per_axis
from attnzoo.generators.chain import Layer, Method, Next, Stage
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.kernels import BACKENDS, BlockSparsity, block_sparse_attention

_CHUNK = 1 << 24  # entries of an element mask that the general-mask path holds at once
_MOST_MASKED = 1 << 12  # tokens beyond which a general mask is refused: it costs all pairs, and hides it


class Choice(NamedTuple):
    """The blocks that the grid's queries see. mask: bool [B or 1, H or 1, nq, nk], True for active blocks of the grid.

    order: int [H or 1, num_grid], which token of the grid stands at each place of the sequence that is cut; None:
    row-major.
    """

    mask: Tensor
    order: Tensor | None = None


def num_blocks(num_tokens: int, block: int) -> int:
    """Blocks of `block` tokens, the last one perhaps in part."""
    return -(-num_tokens // block)


def grid_of(layout: TokenLayout, tokens: Tensor, axis: int = 2) -> Tensor:
    """The grid's tokens among all, along `axis`."""
    return tokens.narrow(axis, layout.grid_start, layout.num_grid)


def grid_first(layout: TokenLayout, tokens: Tensor, axis: int = 2) -> Tensor:
    """All tokens, the grid's before the others, along `axis`."""
    if layout.grid_start == 0:
        return tokens
    stop = layout.grid_start + layout.num_grid
    rest = tokens.narrow(axis, 0, layout.grid_start), tokens.narrow(axis, stop, layout.length - stop)
    return torch.cat([grid_of(layout, tokens, axis), *rest], axis)


def visible_keys(mask: Tensor | None) -> Tensor | None:
    """bool [B or 1, M] where `mask` is the same for all heads and queries and bool, else None."""
    if mask is not None and mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0]
    return None


def with_others(mask: Tensor, num_grid: int, num_keys: int, block: int) -> Tensor:
    """A mask over the grid's blocks of keys as one over all keys, grid first: every block with other tokens is kept.

    mask: bool [..., ceil(num_grid / block)]. Returns bool [..., ceil(num_keys / block)].
    """
    total, inside = num_blocks(num_keys, block), num_grid // block  # from `inside` on blocks hold others, if there are
    if num_keys == num_grid:
        return mask
    return torch.cat([mask[..., :inside], mask.new_ones(*mask.shape[:-1], total - inside)], dim=-1)


class BlockMethod(Method):
    """Base of the methods that choose blocks. It keeps the last density per layer for the report."""

    stage: ClassVar[Stage] = Stage.KERNEL

    def __init__(
        self,
        rank: int,
        *,
        block_size: int | Sequence[int],
        qk_int8: bool,
        skip_threshold: float | None,
        backend: str,
    ) -> None:
        super().__init__(rank)
        sizes = per_axis("block_size", block_size, 2, low=1)
        self.block_size = (sizes[0], sizes[1])
        check_flag("qk_int8", qk_int8)
        self.qk_int8 = qk_int8
        if skip_threshold is not None:
            check_number("skip_threshold", skip_threshold)
            if skip_threshold <= 0:
                raise ValueError(f"skip_threshold must be above 0, got {skip_threshold!r}")
        self.skip_threshold = skip_threshold
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.backend = backend
        self._seen: dict[str, tuple[tuple[int, ...], Tensor]] = {}

    @abstractmethod
    def choose(
        self, query: Tensor, key: Tensor, seen: Tensor | None, layout: TokenLayout, ctx: StepContext, layer: Layer
    ) -> Choice | None:
        """Which blocks the grid's queries see; None where this call is dense, which takes the model's own attention.

        query [B, heads, num_grid, head_dim]: the grid's; key [B, heads_kv, length, head_dim]: all of them, see
        `grid_of`; seen: bool [B or 1, length] or None, False for keys that a mask hides from all.
        """

    def expected(self, layout: TokenLayout) -> float | None:
        """Share of the grid's blocks that the settings alone tell; None where it depends on the values."""
        return None

    def density(self, layout: TokenLayout) -> float:
        """Of the last call on each layer of this grid where there was one, else what the settings tell, else 1.0."""
        found = [float(seen) for grid, seen in list(self._seen.values()) if grid == layout.grid]
        share = sum(found) / len(found) if found else self.expected(layout)
        return 1.0 if share is None else 1.0 - (1.0 - share) * layout.num_grid**2 / layout.length**2

    def state_bytes(self) -> int:
        return sum(seen.nbytes for _, seen in list(self._seen.values()))

    def forget(self) -> None:
        self._seen = {}

    def block_settings(self) -> dict[str, Any]:
        """The settings that all block methods have."""
        return {
            "block_size": self.block_size,
            "qk_int8": self.qk_int8,
            "skip_threshold": self.skip_threshold,
            "backend": self.backend,
        }

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: TokenLayout,
        ctx: StepContext,
        layer: Layer,
        next: Next,
    ) -> Tensor:
        if layer.dropout_p:
            raise UnsupportedError(
                f"{layer.name}: {self.name} has no attention dropout, got dropout_p={layer.dropout_p}"
            )
        if key.shape[-2] != layout.length or query.shape[-2] != layout.length:
            raise UnsupportedError(
                f"{layer.name}: {self.name} wants the layout's {layout.length} queries and keys, got "
                f"{query.shape[-2]} and {key.shape[-2]}: another method changed them"
            )
        start, stop = layout.grid_start, layout.grid_start + layout.num_grid
        q = query[:, :, start:stop]
        with torch.no_grad():
            choice = self.choose(q, key, visible_keys(mask), layout, ctx, layer)
        if choice is None:
            return next(query, key, value, mask)
        if not torch.compiler.is_compiling():
            self._seen[layer.name] = (layout.grid, choice.mask.float().mean())
        image = self.attend_blocks(q, key, value, mask, choice, layout, layer)
        if layout.length == layout.num_grid:
            return image
        others = torch.cat([query[:, :, :start], query[:, :, stop:]], dim=2)
        if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            mask = torch.cat([mask[..., :start, :], mask[..., stop:, :]], dim=-2)
        dense = next(others, key, value, mask)
        return torch.cat([dense[:, :, :start], image, dense[:, :, start:]], dim=2)

    def attend_blocks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        choice: Choice,
        layout: TokenLayout,
        layer: Layer,
    ) -> Tensor:
        """The grid's queries [B, heads, num_grid, head_dim] over the chosen blocks and all other tokens."""
        num_grid, length = layout.num_grid, layout.length
        blocks = with_others(choice.mask, num_grid, length, self.block_size[1])
        key_order = self._key_order(choice.order, layout, query.device)
        seen = visible_keys(mask)
        if mask is not None and seen is None:
            return self._masked(query, key, value, mask, blocks, choice.order, key_order, layout, layer)
        trim = query.device.type == "cpu"  # elsewhere the widths of lists made anew at every call would be waited for
        sparsity = BlockSparsity.from_mask(blocks, num_grid, length, self.block_size, trim=trim)
        order = None if choice.order is None else choice.order.to(query.device, torch.int32).contiguous()
        if key_order is not None:
            heads, heads_kv = query.shape[1], key.shape[1]
            if len(key_order) > 1 and heads != heads_kv:
                raise UnsupportedError(f"{layer.name}: orders per head need a key head for each query head")
            key_order = key_order.to(torch.int32).contiguous()
        sparsity = replace(sparsity, query_order=order, key_order=key_order)
        out = block_sparse_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            sparsity,
            layer.scale,
            key_mask=seen,
            skip_threshold=self.skip_threshold,
            qk_int8=self.qk_int8,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    def _key_order(self, order: Tensor | None, layout: TokenLayout, device: torch.device) -> Tensor | None:
        """[H or 1, length]: the grid's tokens along `order`, then all others; None where they stand so."""
        start, stop = layout.grid_start, layout.grid_start + layout.num_grid
        if order is None:
            if start == 0:
                return None
            order = torch.arange(layout.num_grid, device=device)[None]
        others = torch.cat([torch.arange(start, device=device), torch.arange(stop, layout.length, device=device)])
        return torch.cat([order.to(device) + start, others.expand(len(order), -1)], dim=1)

    def _masked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        blocks: Tensor,
        order: Tensor | None,
        key_order: Tensor | None,
        layout: TokenLayout,
        layer: Layer,
    ) -> Tensor:
        """The chosen blocks AND a mask of any form: dense attention in chunks of queries."""
        if layout.length > _MOST_MASKED:
            raise UnsupportedError(
                f"{layer.name}: an attention mask that is no padding costs all pairs of {layout.length} tokens; "
                f"{self.name} does so up to {_MOST_MASKED} only"
            )
        device, (block_q, block_k) = query.device, self.block_size
        key_block = torch.arange(layout.length, device=device) // block_k
        key_block = key_block[None] if key_order is None else key_block[key_order.argsort(-1)]  # [H or 1, length]
        query_block = torch.arange(layout.num_grid, device=device) // block_q
        query_block = query_block[None] if order is None else query_block[order.to(device).argsort(-1)]
        heads = max(blocks.shape[1], len(key_block), len(query_block))
        blocks = blocks.expand(-1, heads, -1, -1)
        mask = mask.view(*(1,) * (4 - mask.ndim), *mask.shape)
        mask = mask.expand(*mask.shape[:2], layout.length, layout.length)
        start, size = layout.grid_start, max(1, _CHUNK // (layout.length * heads * len(blocks)))
        outs = []
        for first in range(0, layout.num_grid, size):
            rows = slice(first, min(first + size, layout.num_grid))
            at = query_block[:, rows].expand(heads, -1)[None, :, :, None]
            shown = blocks.gather(2, at.expand(len(blocks), -1, -1, blocks.shape[-1]))
            columns = key_block.expand(heads, -1)[None, :, None, :]
            shown = shown.gather(3, columns.expand(*shown.shape[:3], -1))
            part = mask[:, :, start + rows.start : start + rows.stop]
            part = part & shown if part.dtype == torch.bool else part.masked_fill(~shown, -math.inf)
            outs.append(
                F.scaled_dot_product_attention(
                    query[:, :, rows],
                    key,
                    value,
                    part,
                    scale=layer.scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        return torch.cat(outs, dim=2)
