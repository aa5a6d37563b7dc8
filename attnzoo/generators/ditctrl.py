"""DiTCtrl: a video edited by its prompt, the target reading the source's keys and values under a mask.

Paper: Cai et al., "DiTCtrl: Exploring Attention Control in Multi-Modal Diffusion Transformer for Tuning-Free
Multi-Prompt Longer Video Generation", arXiv:2412.18597 (CVPR 2025). Code: TencentARC/DiTCtrl,
sat/dit_video_concat.py.

The batch holds [source, target] in every branch. In the chosen steps and layers the target's queries attend the
source's keys and values. With `ref_token_idx` they do so twice, over the foreground and over the background of the
source, and the target's own foreground chooses: foregrounds are where the maps video -> word, averaged over heads and
over the layers of this step so far (this one included) and scaled to 0..1 in each frame, reach `thres`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_range
from attnzoo.generators.chain import Layer, Method, Next, Stage
from attnzoo.generators.layout import StepContext, TokenLayout

_MOST = 1 << 26  # entries of a [B, video, words] table or of a [text + video] x video bias that are made at once


def word_maps(query: Tensor, key: Tensor, words: Sequence[int], layout: TokenLayout, scale: float | None) -> Tensor:
    """How much the grid's tokens look at some words, mean over heads, sum over the words: [B, *grid].

    query, key [B, heads, N, head_dim] of the joint sequence; the softmax runs over all N keys.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    start = 0 if layout.text == "first" else layout.num_image
    own = slice(layout.grid_start, layout.grid_start + layout.num_grid)
    chosen = [start + word for word in words]
    heads, size = query.shape[1], max(1, _MOST // (query.shape[1] * key.shape[2]))
    rows = query[:, :, own]
    parts = []
    for begin in range(0, layout.num_grid, size):
        logits = rows[:, :, begin : begin + size] @ key.transpose(-1, -2) * scale
        parts.append(logits.softmax(-1)[..., chosen].sum((1, 3)) / heads)
    return torch.cat(parts, 1).unflatten(1, layout.grid)


def scaled_per_frame(maps: Tensor) -> Tensor:
    """Maps [B, frames, height, width] scaled to 0..1 in each frame."""
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low + 1e-6)


class DiTCtrl(Method):
    """The second half of each branch's rows reads the first half's keys and values.

    ref_token_idx, cur_token_idx: the words of the subject in the source's and in the target's prompt (indices into the
    text tokens); None: keys and values are shared without masks. thres: of the scaled maps. start_step, stop_step: 2 to
    50 in the authors' settings, whose layers are 5 to 30 (`layers=slice(5, 30)`). Joint video models (CogVideoX,
    HunyuanVideo, Mochi with equal prompts).
    """

    name: ClassVar[str] = "ditctrl"
    stage: ClassVar[Stage] = Stage.KEYS_VALUES
    roles: ClassVar[frozenset[str]] = frozenset({"joint"})

    def __init__(
        self,
        rank: int,
        *,
        ref_token_idx: Sequence[int] | None = None,
        cur_token_idx: Sequence[int] | None = None,
        thres: float = 0.1,
        start_step: int = 2,
        stop_step: int = 50,
    ) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        if (ref_token_idx is None) != (cur_token_idx is None):
            raise ValueError("ref_token_idx and cur_token_idx go together: give both, or neither")
        check_range("thres", thres, low=0.0, high=1.0)
        check_range("stop_step", stop_step, low=start_step)
        if ref_token_idx is not None and rank != 3:
            raise UnsupportedError(f"ditctrl's masks are made per frame: this grid has {rank} axes")
        self.words = None if ref_token_idx is None else (tuple(ref_token_idx), tuple(cur_token_idx or ()))
        self.thres, self.start_step, self.stop_step = thres, start_step, stop_step
        # Which forward; how many layers; the mean maps of both words.
        self._maps: tuple[tuple[Any, ...], int, Tensor, Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        names = ("thres", "start_step", "stop_step")
        return {"words": self.words, **{name: getattr(self, name) for name in names}}

    def state_bytes(self) -> int:
        return 0 if self._maps is None else sum(t.numel() * t.element_size() for t in self._maps[2:])

    def forget(self) -> None:
        self._maps = None

    def phase(self, ctx: StepContext) -> bool:
        if ctx.step is None:
            raise UnsupportedError("ditctrl needs to know the step: use a pipeline, or handle.new_run(total)")
        return self.start_step <= ctx.step < self.stop_step

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
        batch, parts = len(query), len(ctx.parts)
        if batch % (2 * parts):
            raise UnsupportedError(
                f"{layer.name}: ditctrl wants [source, target] in each branch, got a batch of {batch}"
            )
        if mask is not None:
            raise UnsupportedError(f"{layer.name}: ditctrl takes no mask over the joint sequence")
        size = batch // (2 * parts)
        places = torch.arange(batch, device=query.device).view(parts, 2, size)
        source, target = places[:, 0].flatten(), places[:, 1].flatten()
        out = torch.empty_like(query)
        out[source] = next(query[source], key[source], value[source], None)
        if self.words is None:
            out[target] = next(query[target], key[source], value[source], None)
            return out
        maps = self.accumulate(query, key, layout, ctx, layer)
        ref, cur = (scaled_per_frame(m) >= self.thres for m in maps)
        last = places[ctx.parts.index("cond") if "cond" in ctx.parts else -1]
        front, own = ref[last[0]].flatten(1), cur[last[1]].flatten(1)  # of the conditional source and target
        out[target] = self.guided(
            query[target], key[source], value[source], front.repeat(parts, 1), own.repeat(parts, 1), layout, next
        )
        return out

    def accumulate(
        self, query: Tensor, key: Tensor, layout: TokenLayout, ctx: StepContext, layer: Layer
    ) -> tuple[Tensor, Tensor]:
        """Both words' maps [B, *grid], the mean over this layer and those before it in this forward."""
        assert self.words is not None
        ref, cur = (word_maps(query, key, words, layout, layer.scale) for words in self.words)
        forward, before, count = (ctx.run, ctx.step, ctx.branch, layout.grid, len(query)), self._maps, 1
        if before is not None and before[0] == forward:
            count = before[1] + 1
            ref, cur = (mean + (new - mean) / count for mean, new in zip(before[2:], (ref, cur)))
        self._maps = (forward, count, ref, cur)
        return ref, cur

    def guided(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        front: Tensor,
        own: Tensor,
        layout: TokenLayout,
        next: Next,
    ) -> Tensor:
        """Attention over the foreground and over the background keys, joined by the target's own foreground.

        front, own: bool [b, num_grid], the source's foreground (keys) and the target's (rows). Text rows and keys see
        and are seen by all; of the text rows the target's words take the foreground's result.
        """
        assert self.words is not None
        grid = slice(layout.grid_start, layout.grid_start + layout.num_grid)
        text = 0 if layout.text == "first" else layout.num_image
        results = []
        for seen in (front, ~front):
            bias = torch.zeros(len(query), 1, layout.length, layout.length, dtype=query.dtype, device=query.device)
            if bias.numel() > _MOST:
                raise UnsupportedError(f"ditctrl's masks cost all pairs of {layout.length} tokens: share without masks")
            hidden = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, torch.finfo(query.dtype).min)
            bias[:, :, grid, grid] = hidden[:, None, None]
            results.append(next(query, key, value, bias))
        choose = torch.zeros(len(query), layout.length, dtype=torch.bool, device=query.device)
        choose[:, grid] = own
        choose[:, [text + word for word in self.words[1]]] = True
        return torch.where(choose[:, None, :, None], results[0], results[1])
