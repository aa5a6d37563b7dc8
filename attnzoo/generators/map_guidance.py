"""Guidance by a loss on attention maps: the latents move against its gradient before a step is taken.

The base of CONFORM and Bounded Attention. In the chosen steps the denoiser runs on the conditional rows with gradients,
its maps are recorded, a loss of them is taken, and the latents go `step_size` times its gradient downhill; then the
forward that the pipeline asked for runs at the moved latents, and the pipeline's own latents follow through its
scheduler (`Forward.move_latents`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_range
from attnzoo.generators.chain import CROSS, Layer, Method, Next, Stage
from attnzoo.generators.forward import Forward
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.maps import attention_map


class Maps:
    """What one forward's layers showed: (layer, map [B, N, M], mean over heads; layout), in the layers' order."""

    def __init__(self) -> None:
        self.found: list[tuple[Layer, Tensor, TokenLayout]] = []

    def of(self, kind: str, grid: tuple[int, ...]) -> list[Tensor]:
        """The maps of "cross"- or "self"-attention on `grid`. Raises UnsupportedError where there are none."""
        found = [(m, layout.grid) for layer, m, layout in self.found if (layer.role == "cross") == (kind == "cross")]
        chosen = [m for m, own in found if own == grid]
        if not chosen:
            others = sorted({own for _, own in found})
            raise UnsupportedError(f"no {kind}-attention layer on the grid {grid}; the recorded ones are on {others}")
        return chosen

    def mean(self, grid: tuple[int, ...], kind: str = "cross") -> Tensor:
        """The mean of the maps of `kind` on `grid`, [B, N, M]."""
        return torch.stack(self.of(kind, grid)).mean(0)


class MapGuidance(Method):
    """Base of the methods that follow a loss on maps. A subclass gives `loss` and `schedule`."""

    stage: ClassVar[Stage] = Stage.POST_MIX
    roles: ClassVar[frozenset[str]] = CROSS
    moves_latents: ClassVar[bool] = True

    def __init__(self, rank: int, *, max_steps: int, resolution: Sequence[int] | None = None) -> None:
        """max_steps: guidance acts in steps 0 .. max_steps - 1.

        resolution: grid (height, width) of the recorded layers; None: on a UNet the latents' grid halved twice
        (16 x 16 of 64 x 64), else the model's own.
        """
        super().__init__(rank)
        if rank != 2:
            raise UnsupportedError(f"{self.name} looks at maps of an image: this model's grid has {rank} axes")
        check_range("max_steps", max_steps, low=0)
        self.max_steps = max_steps
        self.resolution = None if resolution is None else tuple(resolution)
        self._recording: Maps | None = None
        self._grid: tuple[int, ...] = ()  # of the maps that are looked at
        self._shift: tuple[int, int, Tensor] | None = None  # run, step, the change of the latents

    @abstractmethod
    def loss(self, maps: Maps, layout: TokenLayout, ctx: StepContext) -> Tensor:
        """The loss of one forward's maps, a scalar."""

    @abstractmethod
    def schedule(self, step: int, total: int) -> tuple[float, int]:
        """The step size at `step` of `total`, and how many moves to make (0: none)."""

    def enough(self, loss: Tensor, batch: int) -> bool:
        """Whether the moves of this step may stop, after one from where `loss` was."""
        return False

    def forget(self) -> None:
        self._shift = self._recording = None

    def state_bytes(self) -> int:
        return 0 if self._shift is None else self._shift[2].numel() * self._shift[2].element_size()

    def grid_of(self, layout: TokenLayout) -> tuple[int, ...]:
        """The grid whose layers are looked at."""
        if self.resolution is not None or not layout.pyramid:
            return self.resolution or layout.grid
        return tuple(-(-n // 4) for n in layout.grid)

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
        self.look(query, key, mask, layout, layer)
        return next(query, key, value, mask)

    def look(self, query: Tensor, key: Tensor, mask: Tensor | None, layout: TokenLayout, layer: Layer) -> None:
        """Record the map of a layer on the grid that is looked at, while a recording is on."""
        self.refuse_compiling(layer)
        if self._recording is not None and self._grid == layout.grid:
            self._recording.found.append((layer, attention_map(query, key, mask, layer), layout))

    def recorded(self, forward: Forward, layout: TokenLayout, **changed: Any) -> tuple[Any, Maps]:
        """A forward's output, and the maps of its layers on the grid that is looked at."""
        self._grid = self.grid_of(layout)
        self._recording = maps = Maps()
        try:
            return forward(**changed), maps
        finally:
            self._recording = None

    def record(self, forward: Forward, layout: TokenLayout, ctx: StepContext, latents: Tensor) -> Maps:
        """The maps of the conditional rows at `latents` [b, ...]."""
        branch, given = ("cond", forward.part("cond")) if len(ctx.parts) > 1 else (ctx.branch, {})
        return self.recorded(forward, layout, branch=branch, **{**given, forward.latents_name: latents})[1]

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        if ctx.step is None or ctx.total is None:
            raise UnsupportedError(f"{self.name} needs to know the step: enable it on a pipeline")
        if ctx.step >= self.max_steps:
            return self.watch(forward, layout, ctx)
        shift = self._shift
        if shift is None or shift[:2] != (ctx.run, ctx.step):
            if ctx.branch == "uncond":
                raise UnsupportedError(f"{self.name}: this pipeline runs the unconditional branch first: not supported")
            moved = self._moved(forward, layout, ctx)
            self._shift = shift = (ctx.run, ctx.step, moved)
            forward.move_latents(moved)
        every = shift[2].repeat(len(ctx.parts), *([1] * (shift[2].ndim - 1)))
        return self.watch(forward, layout, ctx, **{forward.latents_name: forward.latents + every})

    def watch(self, forward: Forward, layout: TokenLayout, ctx: StepContext, **changed: Any) -> Any:
        """The forward that the pipeline asked for."""
        return forward(**changed)

    def _moved(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Tensor:
        """How far the latents move in this step, [b, ...]."""
        if torch.is_inference_mode_enabled():
            raise UnsupportedError(f"{self.name} follows a gradient, which inference_mode forbids: use no_grad")
        start = forward.latents[: len(forward.latents) // len(ctx.parts)].detach()
        return self.descend(start, lambda x: self.record(forward, layout, ctx, x), layout, ctx) - start

    def descend(
        self, latents: Tensor, record: Callable[[Tensor], Maps], layout: TokenLayout, ctx: StepContext
    ) -> Tensor:
        """The latents after the moves of step `ctx.step`. record: runs the model at latents and gives its maps."""
        assert ctx.step is not None and ctx.total is not None
        size, moves = self.schedule(ctx.step, ctx.total)
        for _ in range(moves):
            with torch.enable_grad():
                latents = latents.detach().requires_grad_()
                loss = self.loss(record(latents), layout, ctx)
                (gradient,) = torch.autograd.grad(loss, latents)
            latents = latents.detach() - size * gradient
            if self.enough(loss.detach(), len(latents)):
                break
        return latents.detach()
