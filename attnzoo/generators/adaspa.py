"""AdaSpa: blocks found by exact search at a few steps, kept for the steps in between.

Paper: Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation", ICCV 2025,
arXiv:2502.21079. No public code: adapted. Which statement each step comes from:

    abstract    "a blockified pattern": blocks of tokens are computed or left out as a whole
    abstract    "sparse pattern and LSE vary w.r.t. inputs, layers, and heads, but remain invariant across denoising
                steps": the search is made at few steps, per layer, head and sample, and its result used until the next
    abstract    "Online Precise Search", "Fused LSE-Cached Search": a block's weight is the exact attention mass in it,
                sum of exp(q . k scale - lse); the first search takes lse from the dense pass, the later ones the cached
    abstract    "Head-adaptive": sparsity differs between heads by their recall
    from memory of the paper (shared/specs/generators.md, section 2.1), to be checked: blocks of 64 tokens; dense first
                10 of 50 steps; searches at steps 10 and 30; sparsity 0.8; heads of more (less) than average recall one
                step more (less) sparse so that the mean stays; text is always kept

Ours: blocks are chosen per row of blocks; as many heads go up as go down, those with the highest and the lowest recall;
`recall=` as the budget instead of `sparsity=`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_number, check_range
from attnzoo.generators.block_mass import block_mass, enough, largest, recall
from attnzoo.generators.blocks import BlockMethod, Choice, grid_first
from attnzoo.generators.chain import Layer, Next
from attnzoo.generators.forward import Forward
from attnzoo.generators.layout import StepContext, TokenLayout

DENSE, SEARCH, REUSE = "dense", "search", "reuse"


def head_sparsities(recalls: Tensor, sparsity: float, step: float) -> Tensor:
    """[..., H] like recalls: `sparsity`, `step` more for heads of high recall, `step` less for as many of low recall.

    The n heads with the highest recalls of those above the mean go up and the n lowest of those below it go down, n the
    smaller of both numbers, so that the mean stays `sparsity`. step is cut so that all stay within 0 to 1.
    """
    check_range("sparsity", sparsity, 0.0, 1.0)
    check_range("step", step, 0.0, 1.0)
    step = min(step, sparsity, 1.0 - sparsity)
    mean = recalls.mean(-1, keepdim=True)
    count = torch.minimum((recalls > mean).sum(-1, keepdim=True), (recalls < mean).sum(-1, keepdim=True))
    rank = recalls.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    up, down = rank >= recalls.shape[-1] - count, rank < count
    return sparsity + step * (up.to(torch.float64) - down.to(torch.float64))


class _Found(NamedTuple):
    """What a search left. seen: shape of the queries that it was made for."""

    mask: Tensor
    lse: Tensor
    seen: tuple[int, ...]


class AdaSpa(BlockMethod):
    """Dense steps, then the blocks that hold most of exact attention's mass, searched anew at search_steps.

    sparsity: share of the grid's blocks that are left out (0.8), or recall: share of the mass that every row of blocks
        keeps. head_step: how much sparser (denser) heads of high (low) recall are; 0.0: all alike; with recall= heads
        differ by themselves, and it is not used.
    search_steps: steps of a search, as indices or as shares of the run; all steps before the first are dense.
    block_size, qk_int8, skip_threshold, backend: of `attnzoo.kernels.block_sparse_attention`.

    The step of the first search is dense, too; at later ones the new blocks are used at once. Kept are, per layer and
    branch, the blocks and the lse. sparsity=0.0 and recall=1.0 are neutral.
    """

    name: ClassVar[str] = "adaspa"

    def __init__(
        self,
        rank: int,
        *,
        sparsity: float | None = None,
        recall: float | None = None,
        head_step: float = 0.1,
        search_steps: Sequence[int | float] = (0.2, 0.6),
        block_size: int | Sequence[int] = 64,
        skip_threshold: float | None = None,
        qk_int8: bool = False,
        backend: str = "auto",
    ) -> None:
        """rank: axes of the model's grid. Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank, block_size=block_size, qk_int8=qk_int8, skip_threshold=skip_threshold, backend=backend)
        if sparsity is not None and recall is not None:
            raise ValueError(f"give one of sparsity and recall, got {sparsity!r} and {recall!r}")
        self.sparsity = 0.8 if sparsity is None and recall is None else sparsity
        self.recall = recall
        for name, number in (("sparsity", self.sparsity), ("recall", recall), ("head_step", head_step)):
            if number is not None:
                check_number(name, number)
                check_range(name, number, 0.0, 1.0)
        self.head_step = head_step
        if not isinstance(search_steps, Sequence) or isinstance(search_steps, str) or not search_steps:
            raise TypeError(f"search_steps must be a sequence of at least one step, got {search_steps!r}")
        for step in search_steps:
            check_number("search_steps", step)
            check_range("search_steps", step, 0, None if type(step) is int else 1.0)
        self.search_steps = tuple(search_steps)
        self._neutral = self.sparsity == 0.0 or recall == 1.0
        self._found: dict[tuple[str, str], _Found] = {}
        self._run: int | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "sparsity": self.sparsity,
            "recall": self.recall,
            "head_step": self.head_step,
            "search_steps": self.search_steps,
            **self.block_settings(),
        }

    def expected(self, layout: TokenLayout) -> float | None:
        return None if self.sparsity is None else 1.0 - self.sparsity

    def state_bytes(self) -> int:
        return super().state_bytes() + sum(f.mask.nbytes + f.lse.nbytes for f in list(self._found.values()))

    def forget(self) -> None:
        super().forget()
        self._found, self._run = {}, None

    def phase(self, ctx: StepContext) -> Hashable:
        if self._neutral:
            return DENSE, ctx.branch
        if ctx.step is None or ctx.total is None:
            raise UnsupportedError(
                "adaspa searches at some steps and needs to know the step: call handle.new_run(total_steps) before "
                "each run"
            )
        steps = {step if type(step) is int else int(step * ctx.total) for step in self.search_steps}
        if ctx.step < min(steps):
            return DENSE, ctx.branch
        return SEARCH if ctx.step in steps else REUSE, ctx.branch

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        if ctx.run != self._run:
            self.forget()
            self._run = ctx.run
        return forward()

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
        kind, _ = layer.phase if isinstance(layer.phase, tuple) else (DENSE, "")
        if kind == DENSE:
            return next(query, key, value, mask)
        return super().attend(query, key, value, mask, layout, ctx, layer, next)

    def choose(
        self, query: Tensor, key: Tensor, seen: Tensor | None, layout: TokenLayout, ctx: StepContext, layer: Layer
    ) -> Choice | None:
        assert isinstance(layer.phase, tuple)
        kind, branch = layer.phase
        found = self._found.get((layer.name, branch))
        if found is not None and found.seen != tuple(query.shape):
            found = None
        if kind == REUSE and found is not None:
            return Choice(found.mask)
        keys, seen = grid_first(layout, key), None if seen is None else grid_first(layout, seen, 1)
        lse = None if found is None else found.lse
        mass, _, lse = block_mass(query, keys, layout.num_grid, self.block_size, layer.scale, lse=lse, seen=seen)
        mask = self.blocks(mass)
        self._found[layer.name, branch] = _Found(mask, lse, tuple(query.shape))
        return None if found is None else Choice(mask)

    def blocks(self, mass: Tensor) -> Tensor:
        """The blocks that are kept, bool like mass [B, H, nq, nk]."""
        if self.recall is not None:
            return enough(mass, self.recall)
        assert self.sparsity is not None
        base = largest(mass, 1.0 - self.sparsity)
        if self.head_step == 0.0 or mass.shape[1] == 1:
            return base
        return largest(mass, 1.0 - head_sparsities(recall(mass, base), self.sparsity, self.head_step))
