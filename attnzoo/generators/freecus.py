"""FreeCus: a subject carried from a reference picture into new ones by keys and values of a few vital layers.

Paper: Zhang et al., "FreeCus: Free Lunch Subject-driven Customization in Diffusion Transformers", arXiv:2507.15249
(ICCV 2025). Code: Monalissaa/FreeCus, sa_handler_for_flux_clean.py. Only its attention sharing is here; the paper's
noise shifting and its captions by language models are not.

Two passes of equal steps. Recording: keys (times `scale`) and values of the subject's tokens are kept per layer and
step. Using: in the vital layers the text's keys are multiplied by `scale`, too, and what was kept stands before the
layer's own keys and values. Differences from the authors' code: any number of text tokens (they hard-code 512), state
per layer and step instead of module globals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_range
from attnzoo.generators.chain import Layer, Method, Next, Stage
from attnzoo.generators.layout import StepContext, TokenLayout

#: Layers that the authors call vital in FLUX.1, counted over double and then single blocks.
VITAL_LAYERS = (0, 1, 2, 17, 18, 25, 28, 53, 54, 56)


class FreeCus(Method):
    """Attention sharing with a recorded reference.

    subject: indices of the subject's tokens among the grid's, row by row, or a bool mask of the grid's shape. scale: of
    the kept and the text's keys. layers= chooses the vital layers; `VITAL_LAYERS` are the authors' for FLUX.1.

        with enable(pipe, "freecus", subject=mask, layers=VITAL_LAYERS) as handle:
            with handle.methods("freecus")[0].recording():
                pipe("a photo of a corgi", ...)          # the reference
            pipe("a corgi on the moon", ...)             # the same number of steps

    Before anything was recorded a call is an error. What is kept is freed when the method is disabled.
    """

    name: ClassVar[str] = "freecus"
    stage: ClassVar[Stage] = Stage.KEYS_VALUES
    roles: ClassVar[frozenset[str]] = frozenset({"joint"})

    def __init__(self, rank: int, *, subject: Sequence[int] | Tensor, scale: float = 1.1) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        check_range("scale", scale, low=0.0)
        tokens = torch.as_tensor(subject)
        self.shape = tuple(tokens.shape) if tokens.dtype == torch.bool else None
        tokens = tokens.flatten().nonzero()[:, 0] if tokens.dtype == torch.bool else tokens
        if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point() or int(tokens.min()) < 0:
            raise ValueError(f"subject must be token indices from 0 or a bool mask with a token in it, got {subject!r}")
        self.subject, self.scale = tokens.long(), scale
        self._kept: dict[tuple[str, int | None, str], tuple[Tensor, Tensor]] = {}
        self._recording = False

    def settings(self) -> dict[str, Any]:
        return {"subject": self.subject.tolist(), "scale": self.scale, "recorded": len(self._kept)}

    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self._kept.values() for t in pair)

    def forget(self) -> None:
        self._kept.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block the reference is drawn, and kept; what was kept before is dropped."""
        self._kept.clear()
        self._recording = True
        try:
            yield
        except BaseException:
            self._kept.clear()
            raise
        finally:
            self._recording = False

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
        if (self.shape not in (None, layout.grid)) or int(self.subject.max()) >= layout.num_grid:
            raise ValueError(f"{layer.name}: subject lies outside of the grid {layout.grid}")
        if mask is not None:
            raise UnsupportedError(f"{layer.name}: freecus lengthens the keys and takes no mask")
        place = (layer.name, ctx.step, ctx.branch)
        if self._recording:
            chosen = self.subject.to(key.device) + layout.grid_start
            self._kept[place] = (self.scale * key[:, :, chosen].detach(), value[:, :, chosen].detach())
            return next(query, key, value, None)
        if place not in self._kept:
            raise UnsupportedError(
                f"{layer.name}: nothing was recorded at step {ctx.step} of branch {ctx.branch!r}: draw the reference "
                "within recording(), in as many steps"
            )
        keys, values = (t.expand(len(key), -1, -1, -1).to(key) for t in self._kept[place])
        text = slice(0, layout.num_text) if layout.text == "first" else slice(layout.num_image, layout.length)
        scaled = key.clone()
        scaled[:, :, text] *= self.scale
        return next(query, torch.cat([keys, scaled], 2), torch.cat([values, value], 2), None)
