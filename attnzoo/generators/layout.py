"""What a method may know about one forward pass: where the tokens stand, and where in the denoising run we are.

Both values are immutable and built once per forward by the denoiser's root hook; every self-attention layer reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import SeamError, UnsupportedError


class TextGroup(NamedTuple):
    """Samples of a batch that have equally many valid text tokens.

    samples: [b] indices into the batch, None for the whole batch in its order. tokens: [b, L] indices into the text.
    """

    samples: Tensor | None
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """One forward's token sequence: `[text] grid [references] [text]`, row-major over the grid.

    grid: tokens per axis of what is being generated, (height, width) or (frames, height, width).
    num_text: text tokens in the joint sequence (0 where text is read by cross-attention); text: where they stand,
    "first" | "last" | "none".
    references: token count of each reference image that follows the grid (Kontext, Qwen edit).
    padding: bool [B, num_text], True where a text token is real; None where the model masks none. text_groups: the
    same as indices; empty where all are real.
    num_context: text tokens that cross-attention layers read (0 where text stands in the joint sequence).
    masks: how the model keeps padding text out of attention: "keys" (a mask over the keys), "pairs" (over queries and
    keys, so that a padding token sees nothing), "compact" (one call per sample that holds its real text tokens only).
    permutation: [length], the canonical token that each sequence position holds (context parallel); None: canonical.
    pyramid: a UNet, whose deeper levels halve the grid (rounding up).
    """

    grid: tuple[int, ...]
    num_text: int = 0
    text: str = "none"
    references: tuple[int, ...] = ()
    padding: Tensor | None = None
    permutation: Tensor | None = None
    pyramid: bool = False
    text_groups: tuple[TextGroup, ...] = field(default=())
    num_context: int = 0
    masks: str = "keys"

    @property
    def num_grid(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def num_image(self) -> int:
        """Tokens of the grid and of the references."""
        return self.num_grid + sum(self.references)

    @property
    def length(self) -> int:
        """Tokens of the joint sequence."""
        return self.num_image + self.num_text

    @property
    def grid_start(self) -> int:
        """Position of the grid's first token."""
        return self.num_text if self.text == "first" else 0

    def with_padding(self, padding: Tensor | None) -> TokenLayout:
        """The same with a text padding mask, bool [B, num_text]. Reads its values: one device synchronisation."""
        if padding is None:
            return self
        padding = padding.bool()
        rows = padding.tolist()
        if all(all(row) for row in rows):
            return replace(self, padding=padding)
        by_count: dict[int, list[int]] = {}
        for sample, row in enumerate(rows):
            by_count.setdefault(sum(row), []).append(sample)
        groups = []
        for samples in by_count.values():
            tokens = [[i for i, real in enumerate(rows[s]) if real] for s in samples]
            index = torch.tensor(tokens, dtype=torch.long, device=padding.device).reshape(len(samples), -1)
            whole = len(samples) == len(rows)
            groups.append(TextGroup(None if whole else torch.tensor(samples, device=padding.device), index))
        return replace(self, padding=padding, text_groups=tuple(groups))

    def for_rows(self, rows: slice) -> TokenLayout:
        """The layout of some samples of the batch."""
        if self.padding is None:
            return self
        if torch.compiler.is_compiling():
            raise UnsupportedError("branches= of one padded batch can't be told apart inside a compiled whole model")
        return replace(self, padding=None, text_groups=()).with_padding(self.padding[rows])

    def for_layer(self, role: str, num_tokens: int, layer: str, num_keys: int | None = None) -> TokenLayout | None:
        """The layout that a layer's attention of `num_tokens` queries has; None where the call is not the layer's own.

        role: "joint" (text, grid and references), "image" (no text), both with as many keys, or "cross" (the grid's
        queries, the text's keys: a call with other keys is an image prompt's). num_keys: as many as queries where None.
        Raises SeamError where a UNet level's tokens are no halving of the grid.
        """
        num_keys = num_tokens if num_keys is None else num_keys
        if num_keys != (self.num_context if role == "cross" else num_tokens):
            return None
        if self.pyramid:
            grid = self.grid
            while math.prod(grid) > num_tokens:
                grid = tuple((n + 1) // 2 for n in grid)
            if math.prod(grid) != num_tokens:
                raise SeamError(f"{layer}: {num_tokens} tokens are no halving of the grid {self.grid} (merged tokens?)")
            return self if grid == self.grid else replace(self, grid=grid)
        if role == "image" and self.num_text:
            bare = replace(self, num_text=0, text="none", padding=None, text_groups=())
            return bare if num_tokens == bare.length else None
        if self.masks == "compact" and self.num_image <= num_tokens <= self.length:
            real = num_tokens - self.num_image
            return replace(self, num_text=real, padding=None, text_groups=(), text=self.text if real else "none")
        return self if num_tokens == self.length else None


@dataclass(frozen=True)
class StepContext:
    """Where in a denoising run one forward pass stands.

    step, total: index into the scheduler's timesteps and their number; None where nobody said (a bare model without
    `handle.new_run(total)`, a scheduler without step_index). timestep: as the model got it, None inside a compiled
    whole model. branch: the name that the pipeline gave its call ("cond", "uncond"), "all" where it gave none.
    run: counts the denoising runs since the method was enabled, from 0.
    noise_level: the timestep on the training schedule's scale, 1000 to 0, where a method asks for it.
    parts: the branches that the batch holds in equal parts, in their order ("uncond", "cond"), where the pipeline (or
    `enable(guidance=)`) says so; else the one branch of the call.
    """

    step: int | None = None
    total: int | None = None
    timestep: Tensor | float | None = None
    branch: str = "all"
    run: int = 0
    parts: tuple[str, ...] = ("all",)
    noise_level: float | None = None
