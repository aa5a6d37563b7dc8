"""Generalized Neighborhood Attention in a pretrained generator, without training.

Paper: Hassani et al., arXiv:2504.16922 (2025). Code: SHI-Labs/NATTEN (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice, per_axis
from attnzoo.generators.chain import Layer, Method, Next, Stage
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.window import axis_table, density
from attnzoo.kernels import BACKENDS, neighborhood_attention

_CHUNK = 1 << 26  # entries of a window mask that the general-mask path holds at once
_MOST_MASKED = 1 << 14  # tokens beyond which a general mask is refused: it costs all pairs, and hides it


@dataclass(frozen=True)
class Window:
    """The window on one grid, after clamping; one entry per axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    neutral: bool


class GNA(Method):
    """Tokens of the grid attend their window and all text and reference tokens, in one softmax; the rest stays dense.

    kernel_size, stride, dilation: one int, or one per axis, (height, width) or (frames, height, width); is_causal: one
    bool, or one per axis. Per axis and layer, kernel_size is clamped to grid // dilation, and stride to kernel_size: a
    window as large as the grid (dilation 1, not causal) is neutral and takes the model's own attention call.
    backend: of `attnzoo.kernels.neighborhood_attention`.
    """

    name: ClassVar[str] = "gna"
    stage: ClassVar[Stage] = Stage.KERNEL

    def __init__(
        self,
        rank: int,
        *,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        backend: str = "auto",
    ) -> None:
        """rank: axes of the model's grid. Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        self.kernel_size = per_axis("kernel_size", kernel_size, rank, low=1)
        self.stride = per_axis("stride", stride, rank, low=1)
        self.dilation = per_axis("dilation", dilation, rank, low=1)
        self.is_causal = per_axis("is_causal", is_causal, rank, kind=bool)
        if any(s > k for s, k in zip(self.stride, self.kernel_size)):
            raise ValueError(f"stride must be at most kernel_size on every axis, got stride={stride} for {kernel_size}")
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.backend = backend

    def window(self, grid: tuple[int, ...], layer: str) -> Window:
        """The window on `grid`. Raises ValueError where the dilation exceeds an axis."""
        if any(d > n for d, n in zip(self.dilation, grid)):
            raise ValueError(
                f"dilation={self.dilation} exceeds the grid {grid} of {layer}: choose a smaller one, or leave the "
                "layer out with layers="
            )
        kernel_size = tuple(min(k, n // d) for k, n, d in zip(self.kernel_size, grid, self.dilation))
        stride = tuple(min(s, k) for s, k in zip(self.stride, kernel_size))
        axes = zip(kernel_size, grid, self.is_causal)
        neutral = all(k == n and not (causal and n > 1) for k, n, causal in axes)
        return Window(kernel_size, stride, self.dilation, self.is_causal, neutral)

    def settings(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "backend": self.backend,
        }

    def density(self, layout: TokenLayout) -> float:
        window = self.window(layout.grid, "this layout")
        share = density(layout.grid, window.kernel_size, window.stride, window.dilation, window.is_causal)
        skipped = (1.0 - share) * layout.num_grid**2
        return 1.0 - skipped / layout.length**2

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
        window = self.window(layout.grid, layer.name)
        if window.neutral:
            return next(query, key, value, mask)
        if layer.dropout_p:
            raise UnsupportedError(f"{layer.name}: gna has no attention dropout, got dropout_p={layer.dropout_p}")
        if key.shape[-2] != layout.length or query.shape[-2] != layout.length:
            raise UnsupportedError(
                f"{layer.name}: gna wants the layout's {layout.length} queries and keys, got {query.shape[-2]} and "
                f"{key.shape[-2]}: another method changed them"
            )
        start, stop = layout.grid_start, layout.grid_start + layout.num_grid
        if mask is not None and (layout.padding is None or not (layout.masks == "pairs" or _is_padding(mask))):
            image = self._masked(query[:, :, start:stop], key, value, mask, layout, window, layer)
        else:
            image = self._windowed(query, key, value, layout, window, layer)
        if layout.length == layout.num_grid:
            return image
        others = torch.cat([query[:, :, :start], query[:, :, stop:]], dim=2)
        if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            mask = torch.cat([mask[..., :start, :], mask[..., stop:, :]], dim=-2)
        dense = next(others, key, value, mask)
        return torch.cat([dense[:, :, :start], image, dense[:, :, start:]], dim=2)

    def _windowed(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, window: Window, layer: Layer
    ) -> Tensor:
        """The grid's rows by the kernel, [B, heads, num_grid, head_dim]; the extra keys are the real text tokens."""
        if not layout.text_groups:
            return self._kernel(query, key, value, layout, window, layer, None)
        parts = []
        for samples, tokens in layout.text_groups:
            q, k, v = (t if samples is None else t[samples] for t in (query, key, value))
            parts.append(self._kernel(q, k, v, layout, window, layer, tokens))
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([samples for samples, _ in layout.text_groups if samples is not None])
        return torch.cat(parts)[order.argsort()]

    def _kernel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        window: Window,
        layer: Layer,
        tokens: Tensor | None,
    ) -> Tensor:
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, N, heads, head_dim]
        start, stop = layout.grid_start, layout.grid_start + layout.num_grid

        def extra(tensor: Tensor) -> Tensor | None:
            rest = [tensor[:, :start], tensor[:, stop:]]
            if tokens is not None:  # keep the real text tokens; in the second part text follows the references
                side = 0 if layout.text == "first" else 1
                text = rest[side]
                offset = 0 if side == 0 else text.shape[1] - layout.num_text
                index = (tokens + offset)[:, :, None, None].expand(-1, -1, *tensor.shape[2:])
                rest[side] = torch.cat([text[:, :offset], text.gather(1, index)], dim=1)
            rest = [part for part in rest if part.shape[1]]
            return torch.cat(rest, dim=1) if rest else None

        q, k, v = (t[:, start:stop].unflatten(1, layout.grid) for t in (query, key, value))
        out = neighborhood_attention(
            q,
            k,
            v,
            window.kernel_size,
            window.stride,
            window.dilation,
            window.is_causal,
            layer.scale,
            additional_keys=extra(key),
            additional_values=extra(value),
            backend=self.backend,
        )
        return out.flatten(1, len(layout.grid)).transpose(1, 2)

    def _masked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        layout: TokenLayout,
        window: Window,
        layer: Layer,
    ) -> Tensor:
        """The grid's rows under the window AND a mask of any form: dense attention in chunks of queries."""
        if layout.length > _MOST_MASKED:
            raise UnsupportedError(
                f"{layer.name}: an attention mask that is no text padding costs all pairs of {layout.length} tokens; "
                f"gna does so up to {_MOST_MASKED} only"
            )
        axes = zip(layout.grid, window.kernel_size, window.stride, window.dilation, window.is_causal)
        tables = [axis_table(*axis).to(query.device) for axis in axes]
        places = torch.unravel_index(torch.arange(layout.num_grid, device=query.device), layout.grid)
        start, size = layout.grid_start, max(1, _CHUNK // layout.length)
        mask = mask.expand(*mask.shape[:-2], layout.length, layout.length)
        outs = []
        for first in range(0, layout.num_grid, size):
            rows = slice(first, min(first + size, layout.num_grid))
            seen = torch.ones(rows.stop - rows.start, 1, dtype=torch.bool, device=query.device)
            for table, place in zip(tables, places):
                seen = (seen[:, :, None] & table[place[rows]][:, None, :]).flatten(1)
            seen = torch.nn.functional.pad(seen, (start, layout.length - start - layout.num_grid), value=True)
            part = mask[..., start + rows.start : start + rows.stop, :]
            part = part & seen if part.dtype == torch.bool else part.masked_fill(~seen, -math.inf)
            outs.append(
                torch.nn.functional.scaled_dot_product_attention(query[:, :, rows], key, value, part, scale=layer.scale)
            )
        return torch.cat(outs, dim=2)


def _is_padding(mask: Tensor) -> bool:
    """Whether `mask` has the form of a text padding mask: bool, the same for all heads and queries."""
    return mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1
