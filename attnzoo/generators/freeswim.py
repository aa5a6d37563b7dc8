"""FreeSwim: videos larger than those of training, in windows of the trained size, guided by a full branch.

Paper: Wu et al., "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free Ultra-High-Resolution
Video Generation", arXiv:2511.14712. Code: WillWu111/FreeSwim 9f35a72 (no licence file); written from the formulas.

    window branch   every token sees (2 (base_h // 2) + 1) x (2 (base_w // 2) + 1) places around it, moved inward at the
                    borders, in all frames
    full branch     every token sees all; the batch is [window branch, full branch] of the same latents
    cross-attention the full branch's result stands for both
    scale           sqrt(log_n(2 n) / head_dim) with n the tokens of a frame in training, for both branches

The window branch is the result. With cache_steps the full branch runs at every cache_steps-th step of the conditional
branch only; in between its last cross-attention results are used again, and the unconditional branch has its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_flag, check_number, check_range, per_axis
from attnzoo.generators.chain import CROSS, SELF, Layer, Method, Next, Stage
from attnzoo.generators.forward import Forward, first_tensor, map_batch, with_tensor
from attnzoo.generators.gna import GNA
from attnzoo.generators.layout import StepContext, TokenLayout

_ALL_FRAMES = 1 << 24
DUAL, REUSE, WINDOW = "dual", "reuse", "window"


def entropy_scale(head_dim: int, tokens: int = 2 * 30 * 52, base_tokens: int = 30 * 52) -> float:
    """sqrt(log(tokens) / log(base_tokens) / head_dim): what stands for head_dim ** -0.5 where more tokens are seen.

    The defaults are the authors' numbers for Wan 2.1 at 480 x 832 (30 x 52 tokens of a frame), used at any size.
    """
    check_range("head_dim", head_dim, 1)
    check_range("base_tokens", base_tokens, 2)
    check_range("tokens", tokens, 1)
    return math.sqrt(math.log(tokens, base_tokens) / head_dim)


def inward_window(grid: Sequence[int], base_grid: Sequence[int]) -> tuple[int, ...]:
    """The window in tokens of a grid (height, width) or (frames, height, width): all frames, 2 (base // 2) + 1 places.

    It is at most the grid. For `window_mask(grid, ...)` and `neighborhood_attention`.
    """
    base = per_axis("base_grid", base_grid, 2, low=1)
    if len(grid) not in (2, 3):
        raise ValueError(f"grid must be (height, width) or (frames, height, width), got {tuple(grid)}")
    window = (_ALL_FRAMES, *(2 * (side // 2) + 1 for side in base))[-len(grid) :]
    return tuple(min(size, side) for size, side in zip(window, grid))


class FreeSwim(Method):
    """Windows of the trained size over a video (or image), and a full branch beside them that gives the text's part.

    base_grid: tokens of a frame in training, (height, width); (30, 52) is Wan 2.1 at 480 x 832.
    dual: run the full branch (twice the batch); without it this is a window over all frames.
    scale: "entropy", or "model": the model's own, or a number.
    cache_steps: run the full branch at every cache_steps-th step, for the conditional branch only (the authors' fast
        mode: 5); None: at every step, for both branches. Needs to know the step and, where a batch holds both branches,
        runs them one after the other.
    backend: of `attnzoo.kernels.neighborhood_attention`.

    layers: chooses among self- and cross-attentions; a model without cross-attention that reads the text has nothing
    that the full branch could give: dual=False there. Where the grid is no larger than the window, scale="model" and
    dual=False are neutral.
    """

    name: ClassVar[str] = "freeswim"
    stage: ClassVar[Stage] = Stage.KERNEL
    roles: ClassVar[frozenset[str]] = SELF | CROSS

    def __init__(
        self,
        rank: int,
        *,
        base_grid: Sequence[int] = (30, 52),
        dual: bool = True,
        scale: float | str = "entropy",
        cache_steps: int | None = None,
        backend: str = "auto",
    ) -> None:
        """rank: axes of the model's grid. Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        height, width = self.base_grid = per_axis("base_grid", base_grid, 2, low=1)
        check_flag("dual", dual)
        if isinstance(scale, str):
            if scale not in ("entropy", "model"):
                raise ValueError(f"scale must be 'entropy', 'model' or a number, got {scale!r}")
        else:
            check_number("scale", scale)
        if scale == "entropy":
            check_range("height * width of base_grid", height * width, 2)
        if cache_steps is not None:
            per_axis("cache_steps", cache_steps, 1, low=1)
            if not dual:
                raise ValueError(f"cache_steps={cache_steps} caches what the full branch gives: it needs dual=True")
        self.dual, self.scale, self.cache_steps = dual, scale, cache_steps
        window = (_ALL_FRAMES, 2 * (height // 2) + 1, 2 * (width // 2) + 1)[-rank:]
        self._gna = GNA(rank, kernel_size=window, backend=backend)
        self._mode = WINDOW
        self._cache: dict[tuple[str, str], Tensor] = {}
        self._run: int | None = None
        self._kept_at: tuple[str, int] | None = None  # branch, and the step of its last full branch

    def settings(self) -> dict[str, Any]:
        return {
            "base_grid": self.base_grid,
            "dual": self.dual,
            "scale": self.scale,
            "cache_steps": self.cache_steps,
            "backend": self._gna.backend,
        }

    def density(self, layout: TokenLayout) -> float:
        share = self._gna.density(layout)
        if not self.dual:
            return share
        return share + (1.0 if self.cache_steps is None else 1.0 / self.cache_steps)

    def state_bytes(self) -> int:
        return sum(kept.nbytes for kept in list(self._cache.values()))

    def forget(self) -> None:
        self._cache, self._run, self._kept_at = {}, None, None

    def phase(self, ctx: StepContext) -> Hashable:
        return self._mode, ctx.branch

    def scale_of(self, head_dim: int) -> float:
        """The factor of the dot products."""
        if self.scale == "entropy":
            tokens = math.prod(self.base_grid)
            return entropy_scale(head_dim, 2 * tokens, tokens)
        return head_dim**-0.5 if isinstance(self.scale, str) else self.scale

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        if not self.dual:
            return forward()
        if layout.num_context == 0:
            raise UnsupportedError(
                "freeswim's full branch speaks through cross-attention to the text, which "
                f"{type(forward.model).__name__} has none of: use dual=False"
            )
        if self.cache_steps is None:
            return self._both(forward, ctx)
        if ctx.step is None:
            raise UnsupportedError(
                "freeswim's cache_steps= needs to know the step: call handle.new_run(total_steps) before each run"
            )
        if ctx.run != self._run:
            self.forget()
            self._run = ctx.run
        if len(ctx.parts) == 1:
            return self._cached(forward, ctx, ctx.branch)
        count, batch = len(ctx.parts), len(forward.latents)
        outs = []
        for index, branch in enumerate(ctx.parts):
            rows = slice(index * batch // count, (index + 1) * batch // count)
            part = map_batch(forward.given, batch, itemgetter(rows))
            outs.append(self._cached(forward, replace(ctx, branch=branch, parts=(branch,)), branch, part))
        return with_tensor(outs[0], torch.cat([first_tensor(out) for out in outs]))

    def _cached(self, forward: Forward, ctx: StepContext, branch: str, given: dict[str, Any] | None = None) -> Any:
        """One branch of the fast mode."""
        given = forward.given if given is None else given
        if branch == "uncond":
            return self._in_mode(WINDOW, forward, branch, given)
        assert ctx.step is not None and self.cache_steps is not None
        due = ctx.step % self.cache_steps == 0 or self._kept_at is None or self._kept_at[0] != branch
        if not due:
            return self._in_mode(REUSE, forward, branch, given)
        self._cache.clear()
        self._kept_at = None
        out = self._both(forward, ctx, given)
        self._kept_at = branch, ctx.step
        return out

    def _both(self, forward: Forward, ctx: StepContext, given: dict[str, Any] | None = None) -> Any:
        """The batch [window branch, full branch]; returns the first half."""
        given = forward.given if given is None else given
        batch = len(given[forward.latents_name])
        twice = map_batch(given, batch, lambda tensor: torch.cat([tensor, tensor]))
        out = self._in_mode(DUAL, forward, ctx.branch, twice, ctx.parts * 2)
        return with_tensor(out, first_tensor(out)[:batch])

    def _in_mode(
        self, mode: str, forward: Forward, branch: str, given: dict[str, Any], parts: tuple[str, ...] | None = None
    ) -> Any:
        self._mode = mode
        try:
            return forward(branch=branch, parts=parts, **given)
        finally:
            self._mode = WINDOW

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
        mode, branch = layer.phase if isinstance(layer.phase, tuple) else (self._mode, ctx.branch)
        half = len(query) // 2
        if layer.role in CROSS:
            if mode == WINDOW:
                return next(query, key, value, mask)
            if mode == REUSE:
                return self._cache[layer.name, branch]
            mask = mask[half:] if mask is not None and mask.ndim == 4 and len(mask) == 2 * half else mask
            full = next(query[half:], key[half:], value[half:], mask)
            if self.cache_steps is not None:
                self._cache[layer.name, branch] = full.detach()
            return torch.cat([full, full])
        own = query.shape[-1] ** -0.5 if layer.scale is None else layer.scale
        scale = self.scale_of(query.shape[-1]) if self.scale != "model" else own
        ratio = 1.0 if scale == own else scale / own  # `next` has the model's own scale

        def scaled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return next(query if ratio == 1.0 else query * ratio, key, value, mask)

        layer = layer if ratio == 1.0 else replace(layer, scale=scale)
        if mode != DUAL:
            return self._gna.attend(query, key, value, mask, layout, ctx, layer, scaled)
        first, second = slice(None, half), slice(half, None)
        masks = [mask, mask]
        if mask is not None and mask.ndim == 4 and len(mask) == 2 * half:
            masks = [mask[first], mask[second]]
        window = self._gna.attend(
            query[first], key[first], value[first], masks[0], layout.for_rows(first), ctx, layer, scaled
        )
        return torch.cat([window, scaled(query[second], key[second], value[second], masks[1])])
