"""CONFORM: contrast between the attention maps of a prompt's groups of tokens.

Paper: Meral et al., "CONFORM: Contrast is All You Need For High-Fidelity Text-to-Image Diffusion Models",
arXiv:2312.06059 (CVPR 2024). Code: gemlab-vt/CONFORM, pipeline_conform.py (MIT).

Tokens that belong together (an object and its attributes) should look at the same place, others elsewhere: every
token's cross-attention map is an embedding, its group a class, the maps of the step before are further members, and
the loss is NTXent over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from attnzoo.errors import check_choice, check_range
from attnzoo.generators.forward import Forward
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.map_guidance import MapGuidance, Maps

__all__ = ["Conform", "conform_loss", "ntxent_loss", "pair_loss", "strongest", "token_maps"]

LOSSES = ("ntxent", "contrastive", "ntxent_contrastive")


def token_maps(maps: Tensor, softmax_normalize: bool = True) -> Tensor:
    """Maps [height, width, T] without the first and the last token, [height, width, T - 2].

    softmax_normalize: sharpened by a softmax over tokens of 100 times the map. The authors' code multiplies the maps
    that it was handed in place; this does not.
    """
    maps = maps[..., 1:-1]
    return (100 * maps).softmax(-1) if softmax_normalize else maps


def smooth(maps: Tensor, kernel_size: int = 3, sigma: float = 0.5) -> Tensor:
    """Smoothing over [..., height, width], mirrored at the edges, by exp(-(x / (2 sigma))^2) along each axis.

    That is a Gaussian of deviation sqrt(2) sigma; the authors' settings are meant for it.
    """
    return gaussian_blur(maps, [kernel_size, kernel_size], [2**0.5 * sigma] * 2)


def _pairs(embeddings: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine similarities [n, n], and which pairs are of one class (without itself) and of two."""
    unit = F.normalize(embeddings, dim=-1)
    same = classes[:, None] == classes[None, :]
    return unit @ unit.T, same & ~torch.eye(len(classes), dtype=torch.bool, device=same.device), ~same


def ntxent_loss(embeddings: Tensor, classes: Tensor, temperature: float = 0.5) -> Tensor:
    """Mean over pairs of one class of -log(e^(s_ap / t) / (e^(s_ap / t) + sum_n e^(s_an / t))), n of other classes.

    embeddings [n, d], classes int [n]; s is the cosine similarity. 0 where no class has two members.
    """
    similarity, positive, negative = _pairs(embeddings, classes)
    logits = similarity / temperature
    others = logits.masked_fill(~negative, -torch.inf).logsumexp(1, keepdim=True)
    losses = torch.logaddexp(logits, others) - logits
    return losses[positive].mean() if bool(positive.any()) else logits.sum() * 0.0


def pair_loss(embeddings: Tensor, classes: Tensor) -> Tensor:
    """Contrastive loss on cosine similarities: pairs of one class pulled to 1, pairs of two pushed to 0.

    Each of the two sums is a mean over its terms above zero.
    """
    similarity, positive, negative = _pairs(embeddings, classes)
    total = similarity.sum() * 0.0
    for losses in ((1 - similarity[positive]).relu(), similarity[negative].relu()):
        above = losses[losses > 0]
        total = total + (above.mean() if len(above) else 0.0)
    return total


def conform_loss(
    maps: Tensor,
    token_groups: Sequence[Sequence[int]],
    previous: Tensor | None = None,
    *,
    loss_type: str = "ntxent",
    temperature: float = 0.5,
    softmax_normalize: bool = True,
    softmax_normalize_attention_maps: bool = False,
    do_smoothing: bool = True,
    smoothing_kernel_size: int = 3,
    smoothing_sigma: float = 0.5,
) -> Tensor:
    """The loss of one image's maps.

    maps: [height, width, T], cross-attention averaged over heads and layers. token_groups: indices into the T tokens;
    neither the first nor the last. previous: the same of the step before, without gradient.
    loss_type: "ntxent", "contrastive", or the authors' "ntxent_contrastive", which takes NTXent if the first group has
    several tokens and the contrastive loss else.
    """
    check_choice("loss_type", loss_type, LOSSES)
    tokens = [token for group in token_groups for token in group]
    if not tokens or min(tokens) < 1 or max(tokens) > maps.shape[-1] - 2:
        raise ValueError(f"token_groups must hold indices 1 to {maps.shape[-1] - 2} of the prompt, got {token_groups}")
    classes, embeddings = [], []
    for source in (maps,) if previous is None else (maps, previous):
        chosen = token_maps(source, softmax_normalize)
        for number, group in enumerate(token_groups):
            for token in group:
                one = chosen[..., token - 1]
                one = (smooth(one[None], smoothing_kernel_size, smoothing_sigma)[0] if do_smoothing else one).flatten()
                embeddings.append((100 * one).softmax(-1) if softmax_normalize_attention_maps else one)
                classes.append(number)
    stacked, labels = torch.stack(embeddings), torch.tensor(classes, device=maps.device)
    if loss_type == "contrastive" or (loss_type == "ntxent_contrastive" and len(token_groups[0]) < 2):
        return pair_loss(stacked, labels)
    return ntxent_loss(stacked, labels, temperature)


def strongest(maps: Tensor, token_groups: Sequence[Sequence[int]], compat: str | None = None) -> Tensor:
    """The largest value of each group's first token in the smoothed maps [height, width, T]: [groups].

    compat="official" reads the token to the left of it (the authors count as if the first token had been dropped).
    """
    check_choice("compat", compat, (None, "official"))
    shift = 1 if compat == "official" else 0
    return smooth(maps.movedim(-1, 0)[[group[0] - shift for group in token_groups]]).amax((1, 2))


class Conform(MapGuidance):
    """Guides the first steps so that each group of tokens shares a place, and different groups don't.

    token_groups: per group the indices of its tokens in the tokenized prompt (the first token is 0). max_steps: 25.
    scale_factor, scale_range: step size scale_factor * sqrt(linspace(*scale_range, total)). refinement_steps: steps in
    which `refinement_moves` moves are made, instead of one. The rest as for `conform_loss`. The maps are those of the
    conditional rows; with several images the losses add up.
    """

    name: ClassVar[str] = "conform"

    def __init__(
        self,
        rank: int,
        *,
        token_groups: Sequence[Sequence[int]],
        max_steps: int = 25,
        scale_factor: float = 20.0,
        scale_range: tuple[float, float] = (1.0, 0.5),
        refinement_steps: Sequence[int] = (0, 10, 20),
        refinement_moves: int = 20,
        loss_type: str = "ntxent",
        temperature: float = 0.5,
        use_previous_maps: bool = True,
        softmax_normalize: bool = True,
        do_smoothing: bool = True,
        resolution: Sequence[int] | None = None,
    ) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank, max_steps=max_steps, resolution=resolution)
        check_choice("loss_type", loss_type, LOSSES)
        check_range("temperature", temperature, low=1e-6)
        check_range("refinement_moves", refinement_moves, low=1)
        groups = tuple(tuple(group) for group in token_groups)
        if not groups or not all(groups) or any(type(t) is not int for group in groups for t in group):
            raise ValueError(f"token_groups must hold groups of token indices, got {token_groups!r}")
        self.token_groups, self.scale_factor, self.scale_range = groups, scale_factor, tuple(scale_range)
        self.refinement_steps, self.refinement_moves = tuple(refinement_steps), refinement_moves
        self.use_previous_maps = use_previous_maps
        self.options: dict[str, Any] = {
            "loss_type": loss_type,
            "temperature": temperature,
            "softmax_normalize": softmax_normalize,
            "do_smoothing": do_smoothing,
        }
        self._previous: tuple[int, int, Tensor] | None = None  # run, step, maps [B, height, width, T]

    def settings(self) -> dict[str, Any]:
        names = ("token_groups", "max_steps", "scale_factor", "scale_range", "refinement_steps", "refinement_moves")
        return {**{name: getattr(self, name) for name in names}, **self.options}

    def forget(self) -> None:
        super().forget()
        self._previous = None

    def schedule(self, step: int, total: int) -> tuple[float, int]:
        factors = torch.linspace(self.scale_range[0], self.scale_range[1], total, dtype=torch.float64)
        moves = self.refinement_moves if step in self.refinement_steps else 1
        return self.scale_factor * float(factors[step]) ** 0.5, moves

    def _maps(self, maps: Maps, layout: TokenLayout) -> Tensor:
        grid = self.grid_of(layout)
        return maps.mean(grid).unflatten(1, grid)

    def loss(self, maps: Maps, layout: TokenLayout, ctx: StepContext) -> Tensor:
        now = self._maps(maps, layout)
        before = self._previous
        known = self.use_previous_maps and before is not None and before[0] == ctx.run and before[2].shape == now.shape
        losses = [
            conform_loss(one, self.token_groups, before[2][index] if known and before else None, **self.options)
            for index, one in enumerate(now)
        ]
        return torch.stack(losses).sum()

    def watch(self, forward: Forward, layout: TokenLayout, ctx: StepContext, **changed: Any) -> Any:
        """Keep the maps of the latents that the step is taken from: they are the next step's previous ones."""
        if not self.use_previous_maps or ctx.branch == "uncond" or (ctx.step or 0) >= self.max_steps:
            return forward(**changed)
        output, maps = self.recorded(forward, layout, **changed)
        kept = self._maps(maps, layout).detach()
        size = len(kept) // len(ctx.parts)
        place = ctx.parts.index("cond") if "cond" in ctx.parts else 0
        self._previous = (ctx.run, ctx.step or 0, kept[place * size : (place + 1) * size].clone())
        return output
