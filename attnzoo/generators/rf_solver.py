"""RF-Solver: rectified flow integrated with second order, in both directions.

Paper: Wang et al., "Taming Rectified Flow for Inversion and Editing", arXiv:2411.04746 (ICML 2025). Code:
wangjiangshan0725/RF-Solver-Edit, sampling.py. The authors' update, x + h v + h^2 / 2 v' with v' by a difference over
half a step, is the explicit midpoint rule: two velocities a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice, check_range
from attnzoo.generators.chain import Layer, Method, Next, Stage
from attnzoo.generators.layout import StepContext, TokenLayout

Velocity = Callable[[Tensor, float], Tensor]


def midpoint_step(velocity: Velocity, x: Tensor, start: float, stop: float) -> Tensor:
    """`x` at time `start` taken to `stop`. velocity(x, t) is dx/dt."""
    half = (stop - start) / 2
    return x + (stop - start) * velocity(x + half * velocity(x, start), start + half)


def integrate(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """`x` taken along `times`: from 1 to 0 draws (noise to image), the reversed grid inverts.

    Raises ValueError for fewer than two times.
    """
    if len(times) < 2:
        raise ValueError(f"times must hold at least a start and an end, got {list(times)}")
    for start, stop in zip(times, times[1:]):
        x = midpoint_step(velocity, x, float(start), float(stop))
    return x


class RFEdit(Method):
    """RF-Edit: the values of some layers, kept while a picture is inverted, used again while it is drawn anew.

        with enable(transformer, "rf_edit", inject_step=4, layers=slice(39, None)) as handle:
            edit = handle.methods("rf_edit")[0]
            noise = edit.integrate(source_velocity, latents, times[::-1], "record")
            result = edit.integrate(target_velocity, noise, times, "inject")

    layers: slice(39, None) are FLUX.1's single blocks above 19, the authors' choice.
    velocity(x, t) calls the transformer, with the source's prompt in the first line and the target's in the second.
    inject_step: the first steps of the drawing take the values (of the whole sequence, text included) that the same
    stretch of time had in the inversion. Calls outside of `integrate` are the plain model's. Two velocities a step.
    """

    name: ClassVar[str] = "rf_edit"
    stage: ClassVar[Stage] = Stage.KEYS_VALUES

    def __init__(self, rank: int, *, inject_step: int) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        check_range("inject_step", inject_step, low=0)
        self.inject_step = inject_step
        self._kept: dict[tuple[str, int, bool], Tensor] = {}  # layer, step of the drawing, at the midpoint?
        self._now: tuple[str, int, bool] | None = None

    def settings(self) -> dict[str, Any]:
        return {"inject_step": self.inject_step, "recorded": len(self._kept)}

    def state_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self._kept.values())

    def forget(self) -> None:
        self._kept.clear()

    def phase(self, ctx: StepContext) -> bool:
        return self._now is not None

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
        self.refuse_compiling(layer)
        assert self._now is not None
        mode, place = self._now[0], (layer.name, *self._now[1:])
        if mode == "record":
            self._kept[place] = value.detach().clone()
        elif place not in self._kept:
            raise UnsupportedError(f"{layer.name}: nothing was recorded for step {place[1]}: invert on the same times")
        else:
            value = self._kept[place].to(value)
        return next(query, key, value, mask)

    def integrate(self, velocity: Velocity, x: Tensor, times: Sequence[float], mode: str | None = None) -> Tensor:
        """`integrate`, and the values kept ("record", times from 0 to 1) or used ("inject", times from 1 to 0)."""
        check_choice("mode", mode, (None, "record", "inject"))
        count = len(times) - 1
        if mode == "record":
            self._kept.clear()
        for n, (start, stop) in enumerate(zip(times, times[1:])):
            step = count - 1 - n if mode == "record" else n

            def told(x: Tensor, t: float, step: int = step, start: float = float(start)) -> Tensor:
                acts = mode is not None and step < self.inject_step
                self._now = (mode or "", step, t != start) if acts else None
                try:
                    return velocity(x, t)
                finally:
                    self._now = None

            x = midpoint_step(told, x, float(start), float(stop))
        return x
