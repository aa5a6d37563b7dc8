"""AlignedGen: pictures of one batch in the first one's style, for diffusion transformers with rotary positions.

Paper: Zhang et al., "AlignedGen: Aligning Style Across Generated Images", arXiv:2509.17088. Code:
Jiexuanz/AlignedGen, aligngen/attention_processor.py and aligned_pipeline.py (licence not verified).

In joint self-attention, image queries and keys of every picture take the mean and deviation over tokens of the first
one's (`style_aligned.adain`), before the rotary embedding; then the first picture's image keys, rotated as if that
picture stood to the right of the others (ShiftPE), times `style_lambda`, stand behind all keys, with its values.

The middleware sees keys that are rotated already, so it turns them back by the rotary table, which is orthogonal.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice
from attnzoo.generators.chain import Layer, Method, Next, Stage
from attnzoo.generators.forward import Forward
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.style_aligned import adain, of_first, widened

Table = tuple[Tensor, Tensor]


def rotated(x: Tensor, table: Table, back: bool = False) -> Tensor:
    """`x` [B, heads, N, head_dim] turned by a rotary table (cos, sin) [N, head_dim] in neighbouring pairs.

    back: turned back.
    """
    cos, sin = (t.to(x) for t in table)
    left, right = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-right, left], -1).flatten(-2)
    return x * cos - turned * sin if back else x * cos + turned * sin


def shifted_ids(ids: Tensor, width: int) -> Tensor:
    """Flux's positions [N, axes] (t, y, x, ...) of a picture that stands to the right of one `width` tokens wide."""
    ids = ids.clone()
    ids[..., 2] += width
    return ids


class AlignedGen(Method):
    """Every picture of the batch in the style of the first, for Flux and Flux 2.

    Generate the reference and the pictures in one call. style_lambda: factor on the shared keys, or "decrease" for
    (noise level)^2, which falls from 1 to 0 over the run. The authors act in FLUX.1's single blocks (layers="single*")
    in the first 30 steps (steps=slice(0, 30)). The first picture does not see the shared copy of itself.

    Differences from the authors' code: any number of heads (they hard-code 24). Models without rotary positions in
    img_ids are refused: `style_aligned` serves them.
    """

    name: ClassVar[str] = "aligned_gen"
    stage: ClassVar[Stage] = Stage.KEYS_VALUES
    roles: ClassVar[frozenset[str]] = frozenset({"joint"})

    def __init__(self, rank: int, *, style_lambda: float | str = 1.1) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        if isinstance(style_lambda, str):
            check_choice("style_lambda", style_lambda, ("decrease",))
        elif isinstance(style_lambda, bool) or not isinstance(style_lambda, int | float):
            raise TypeError(f"style_lambda must be a number or 'decrease', got {style_lambda!r}")
        self.style_lambda = style_lambda
        self._tables: tuple[Table, Table] | None = None  # of the whole sequence, and of the grid moved to the right

    def settings(self) -> dict[str, Any]:
        return {"style_lambda": self.style_lambda}

    def factor(self, ctx: StepContext) -> float:
        """What the shared keys are multiplied by."""
        if not isinstance(self.style_lambda, str):
            return float(self.style_lambda)
        if ctx.timestep is None:
            raise UnsupportedError("style_lambda='decrease' needs the timestep, which a compiled whole model hides")
        level = float(torch.as_tensor(ctx.timestep).reshape(-1)[0])
        return (level / 1000 if level > 1 else level) ** 2  # Flux gets its timestep divided by 1000

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        given, embed = forward.given, getattr(forward.model, "pos_embed", None)
        if embed is None or "img_ids" not in given or "txt_ids" not in given:
            kind = type(forward.model).__name__
            raise UnsupportedError(f"aligned_gen moves positions in img_ids, and {kind} has none: use style_aligned")
        text, image = (ids[0] if ids.ndim == 3 else ids for ids in (given["txt_ids"], given["img_ids"]))
        own = image[: layout.num_grid]

        def table(ids: Tensor) -> Table:
            cos, sin = embed(ids)
            return cos, sin

        if given["img_ids"].shape[-1] == 3:  # Flux embeds the sequence as one, Flux 2 text and image apart
            whole = table(torch.cat([text, image]))
        else:
            parts = table(text), table(image)
            whole = torch.cat([parts[0][0], parts[1][0]]), torch.cat([parts[0][1], parts[1][1]])
        self._tables = whole, table(shifted_ids(own, layout.grid[-1]))
        try:
            return forward()
        finally:
            self._tables = None

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
        assert self._tables is not None
        batch, groups = len(query), len(ctx.parts)
        if batch % groups:
            raise UnsupportedError(f"{layer.name}: a batch of {batch} holds no {groups} equal parts")
        grid = slice(layout.grid_start, layout.grid_start + layout.num_grid)
        (cos, sin), moved = self._tables
        own = cos[grid], sin[grid]
        query, key = query.clone(), key.clone()
        bare = adain(rotated(key[:, :, grid], own, back=True), groups)
        query[:, :, grid] = rotated(adain(rotated(query[:, :, grid], own, back=True), groups), own)
        key[:, :, grid] = rotated(bare, own)
        shared = rotated(of_first(bare, groups), moved) * self.factor(ctx)
        first = torch.arange(batch, device=query.device) % (batch // groups) == 0
        wide = widened(mask, query, key.shape[2], layout.num_grid, blind=first)
        values = of_first(value[:, :, grid], groups)
        return next(query, torch.cat([key, shared], 2), torch.cat([value, values], 2), wide)
