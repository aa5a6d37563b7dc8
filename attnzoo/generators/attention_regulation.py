"""Attention Regulation: cross-attention logits of target tokens, lifted by optimised Gaussians at sampling time.

Paper: Zhang et al., "Enhancing Semantic Fidelity in Text-to-Image Synthesis: Attention Regulation in Diffusion
Models", arXiv:2403.06381 (ECCV 2024). Code: YaNgZhAnG-V5/attention_regulation, attn_processor.py (licence: see the
repository).

In a layer, for every head by itself, sum_k w_k g_k is added to the target tokens' logits, g_k Gaussians on a lattice of
centres. The weights minimise, by plain gradient steps,

    gamma mean_t (quantile_0.9(p_t) - 0.9)^2 + delta mean_t (mean(p_t) - threshold / targets)^2 + epsilon mean w^2,

p_t the target's probabilities over the map. What is added is a mix of it with what the same layer added a step before,
times global_decay ** step; afterwards the first token and the end-of-text token get their old probabilities back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice, check_range
from attnzoo.generators.chain import CROSS, Layer, Method, Next, Stage
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.maps import attention_logits

__all__ = ["AttentionRegulation", "gaussians", "regulate", "regulation_loss"]

_MOST = 1024  # queries of a layer: twenty optimisation steps on larger maps cost more than the rest of the model


def gaussians(grid: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """The Gaussians on a map, [centres, height, width].

    Deviation sigma = width // 16 (of the shorter side, at least 1), centres every 2 sigma from 2 sigma on; the column
    of the centre changes slowest.
    """
    height, width = grid
    sigma = max(1, min(height, width) // 16)
    x, y = (torch.arange(n, dtype=dtype, device=device) for n in (width, height))

    def along(place: Tensor, size: int) -> Tensor:
        centres = torch.arange(2 * sigma, size, 2 * sigma, dtype=dtype, device=device)
        return (-((place - centres[:, None]) ** 2) / (2 * sigma**2)).exp()

    columns, rows = along(x, width), along(y, height)
    return (rows[None, :, :, None] * columns[:, None, None, :]).flatten(0, 1)


def regulation_loss(
    maps: Tensor, weights: Tensor, threshold: float, gamma: float = 1.0, delta: float = 80.0, epsilon: float = 0.09
) -> Tensor:
    """The objective per map, [N].

    maps: probabilities of the targets, [N, height, width, targets]. weights: [N, ..., targets].
    """
    flat, count = maps.flatten(1, 2), maps.shape[-1]
    high = (torch.quantile(flat, 0.9, dim=1) - 0.9).square().mean(-1)
    even = (flat.mean(1) - threshold / count).square().mean(-1)
    return gamma * high + delta * even + epsilon * weights.flatten(1).square().mean(-1)


def regulate(
    logits: Tensor,
    target_ids: Sequence[int],
    init_weights: Tensor,
    *,
    max_iter: int = 20,
    lr: float = 100.0,
    gamma: float = 1.0,
    delta: float = 80.0,
    epsilon: float = 0.09,
    together: bool = False,
) -> Tensor:
    """What to add to the targets' logits, the best of `max_iter` candidates: [N, height, width, targets].

    logits: [N, height, width, T], before the softmax. init_weights: [N, centres, targets], the first candidate.
    together: one best candidate for all N maps, by their mean loss, as in the authors' code (a map's edit then depends
    on what else is in the batch); else each has its own.
    """
    targets = list(target_ids)
    threshold = min(1.0, 0.2 * len(targets))
    logits = logits.detach()
    bumps = gaussians(logits.shape[1:3], logits.dtype, logits.device)
    others = logits.clone()
    others[..., targets] = -torch.inf
    rest = others.logsumexp(-1, keepdim=True)  # the tokens that no candidate changes
    base = logits[..., targets]
    weights = init_weights.detach().to(logits)
    best = torch.full((len(logits),), torch.inf, dtype=logits.dtype, device=logits.device)
    added = torch.zeros_like(base)
    for _ in range(max_iter):
        with torch.enable_grad():
            weights = weights.detach().requires_grad_()
            candidate = torch.einsum("khw,nkt->nhwt", bumps, weights)
            lifted = base + candidate
            total = torch.logaddexp(rest, lifted.logsumexp(-1, keepdim=True))
            losses = regulation_loss((lifted - total).exp(), weights, threshold, gamma, delta, epsilon)
            (gradient,) = torch.autograd.grad(losses.sum(), weights)
        losses = losses.detach()
        judged = losses.mean().expand_as(losses) if together else losses
        better = judged < best
        best = torch.where(better, judged, best)
        added = torch.where(better[:, None, None, None], candidate.detach(), added)
        weights = weights - lr * gradient
    return added


class AttentionRegulation(Method):
    """Lifts target tokens in the first steps, in the conditional rows.

    target_ids: indices of the tokens to lift in the tokenized prompt (the first token is 0). eos_id: index of its
    end-of-text token. num_edit_steps: 25 of 50. max_iter, lr: of the optimisation. decay: share of the step before.
    global_decay: per step. seed: of the first candidates, uniform in 0..1 per layer. Layers with more than 1,024
    queries are left alone (layers= narrows further; the authors name theirs).

    compat="official" keeps three quirks: at the first step the mix is with the random first candidate (default: with
    nothing, the edit in full), the best candidate is chosen for all heads together (default: for each), and edited
    logits are rounded to float16.
    """

    name: ClassVar[str] = "attention_regulation"
    stage: ClassVar[Stage] = Stage.KERNEL
    roles: ClassVar[frozenset[str]] = CROSS

    def __init__(
        self,
        rank: int,
        *,
        target_ids: Sequence[int],
        eos_id: int,
        num_edit_steps: int = 25,
        max_iter: int = 20,
        lr: float = 100.0,
        decay: float = 0.25,
        global_decay: float = 0.99,
        gamma: float = 1.0,
        delta: float = 80.0,
        epsilon: float = 0.09,
        seed: int = 0,
        compat: str | None = None,
    ) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        if rank != 2:
            raise UnsupportedError(f"attention_regulation edits maps of an image: this grid has {rank} axes")
        targets = tuple(target_ids)
        if not targets or any(type(t) is not int or t < 1 or t == eos_id for t in targets):
            raise ValueError(f"target_ids must hold token indices from 1, without eos_id={eos_id}, got {target_ids!r}")
        check_range("num_edit_steps", num_edit_steps, low=0)
        check_range("max_iter", max_iter, low=1)
        check_range("decay", decay, low=0.0, high=1.0)
        check_choice("compat", compat, (None, "official"))
        self.target_ids, self.eos_id, self.num_edit_steps = targets, eos_id, num_edit_steps
        self.decay, self.global_decay, self.seed, self.compat = decay, global_decay, seed, compat
        self.options: dict[str, Any] = {
            "max_iter": max_iter,
            "lr": lr,
            "gamma": gamma,
            "delta": delta,
            "epsilon": epsilon,
        }
        # (layer, branch) -> run, step, what was added there
        self._before: dict[tuple[str, str], tuple[int, int, Tensor]] = {}

    def settings(self) -> dict[str, Any]:
        names = ("target_ids", "eos_id", "num_edit_steps", "decay", "global_decay", "seed", "compat")
        return {**{name: getattr(self, name) for name in names}, **self.options}

    def state_bytes(self) -> int:
        return sum(added.numel() * added.element_size() for _, _, added in self._before.values())

    def forget(self) -> None:
        self._before.clear()

    def phase(self, ctx: StepContext) -> bool:
        if ctx.step is None:
            raise UnsupportedError(
                "attention_regulation needs to know the step: use a pipeline, or handle.new_run(total)"
            )
        return ctx.step < self.num_edit_steps and ctx.branch != "uncond"

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
        if query.shape[-2] > _MOST:
            return next(query, key, value, mask)
        self.refuse_compiling(layer)
        if max(*self.target_ids, self.eos_id) >= key.shape[-2]:
            raise ValueError(f"{layer.name}: target_ids and eos_id must be below {key.shape[-2]}, the number of tokens")
        size = len(query) // len(ctx.parts)
        place = ctx.parts.index("cond") if "cond" in ctx.parts else 0
        rows = slice(place * size, (place + 1) * size)
        own = mask[rows] if mask is not None and mask.ndim == 4 and len(mask) == len(query) else mask
        edited = self._edited(query[rows], key[rows], value[rows], own, layout, ctx, layer)
        if size == len(query):
            return edited
        rest = [slice(0, rows.start), slice(rows.stop, len(query))]
        outs = [
            next(query[r], key[r], value[r], mask[r] if own is not mask and mask is not None else mask)
            if r.start < r.stop
            else query[r]
            for r in rest
        ]
        return torch.cat([outs[0], edited, outs[1]])

    def _edited(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: TokenLayout,
        ctx: StepContext,
        layer: Layer,
    ) -> Tensor:
        logits = attention_logits(query, key, mask, layer.scale)
        plain = logits.softmax(-1)
        flat = logits.flatten(0, 1).unflatten(1, layout.grid)
        edited = self.edit(flat, ctx, layer).flatten(1, 2).view(logits.shape)
        probabilities = edited.softmax(-1)
        probabilities[..., [0, self.eos_id]] = plain[..., [0, self.eos_id]]
        return probabilities @ value

    def edit(self, logits: Tensor, ctx: StepContext, layer: Layer, init_weights: Tensor | None = None) -> Tensor:
        """The edited logits of one layer at one step, [N, height, width, T]; the layer's next step mixes with it.

        init_weights: [N, centres, targets], the first candidate; drawn where None.
        """
        assert ctx.step is not None
        work = logits if logits.dtype == torch.float64 else logits.float()
        targets, official = list(self.target_ids), self.compat == "official"
        if init_weights is None:
            generator = torch.Generator().manual_seed(self.seed + 7919 * ctx.step + 104729 * layer.index)
            centres = len(gaussians(logits.shape[1:3]))
            init_weights = torch.rand(len(logits), centres, len(targets), generator=generator).to(logits.device)
        best = regulate(work, targets, init_weights, together=official, **self.options)
        place = (layer.name, ctx.branch)
        run, step, before = self._before.get(place, (-1, -1, None))
        if before is None or run != ctx.run or step >= ctx.step or before.shape != best.shape:
            before = best
            if official:
                bumps = gaussians(logits.shape[1:3], work.dtype, work.device)
                before = torch.einsum("khw,nkt->nhwt", bumps, init_weights.to(work))
        self._before[place] = (ctx.run, ctx.step, best)
        mixed = before * self.decay + best * (1 - self.decay)
        edited = work.clone()
        edited[..., targets] += self.global_decay**ctx.step * mixed
        return edited.half().to(logits) if official else edited.to(logits)
