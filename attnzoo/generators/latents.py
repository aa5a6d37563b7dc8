"""Moving a pipeline's latents from within its denoiser: the one thing that the model's arguments can't do.

Guidance by a loss on attention maps changes the latents before a step. The pipeline keeps them in a local variable and
hands the model a copy, so the change reaches it where it hands them out next: in `scheduler.step(output, t, latents)`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError


class LatentShift:
    """The pending change of one pipeline's latents, added to `sample` of its scheduler's next step.

    `follow(scheduler)` puts a wrapper on that object (not its class), `release()` takes it away.
    """

    def __init__(self) -> None:
        self._scheduler: Any = None
        self._inner: Any = None
        self._outer: Any = None
        self._pending: Tensor | None = None
        self._at: Hashable = None  # the step that the pending change belongs to

    def follow(self, scheduler: Any) -> None:
        """Wrap `scheduler.step`; a scheduler followed before is released."""
        if scheduler is self._scheduler:
            return
        self.release()
        if not hasattr(scheduler, "step"):
            raise UnsupportedError(
                "this method moves the pipeline's latents through its scheduler's step: enable it on a pipeline, "
                f"not on a bare model (scheduler: {type(scheduler).__name__})"
            )
        inner = scheduler.step

        def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            shift, self._pending = self._pending, None
            if shift is not None:
                sample = sample + shift.to(sample)
            return inner(model_output, timestep, sample, *args, **kwargs)

        scheduler.step = step
        self._scheduler, self._inner, self._outer = scheduler, inner, step

    def release(self) -> None:
        """Take the wrapper away, if nobody has put another on top of it; drop what is pending."""
        scheduler: Any = self._scheduler
        self._scheduler = self._pending = None
        if scheduler is not None and vars(scheduler).get("step") is self._outer:
            if getattr(self._inner, "__self__", None) is scheduler:  # the class's own step
                vars(scheduler).pop("step")
            else:
                scheduler.step = self._inner

    def expect(self, at: Hashable) -> None:
        """A forward of the step `at` begins: what is pending for another one was cancelled, and is dropped."""
        if at != self._at:
            self._at, self._pending = at, None

    def add(self, shift: Tensor, timestep: Any) -> None:
        """Note `shift`, given in the units of the model's input at `timestep`."""
        shift = shift.detach() / _input_scale(self._scheduler, timestep)
        self._pending = shift if self._pending is None else self._pending + shift


def _input_scale(scheduler: Any, timestep: Any) -> float:
    """The factor by which `scheduler.scale_model_input` multiplies latents at `timestep`."""
    scale = getattr(scheduler, "scale_model_input", None)
    if scale is None:
        return 1.0
    at = timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep
    return float(scale(torch.ones(1, dtype=torch.float64), at))
