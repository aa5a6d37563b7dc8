"""Bounded Attention: several subjects in their boxes, each out of the others' attention.

Paper: Dahary et al., "Be Yourself: Bounded Attention for Multi-Subject Text-to-Image Generation", arXiv:2403.16990
(ECCV 2024). Code: omer11a/bounded-attention, bounded_attention.py (licence: see the repository).

Three parts. Masks, in every layer and step: a token inside subjects sees, of what is inside subjects, only its own;
a subject's words are seen from inside it only, function words from nowhere, and the end-of-text token not from the
background. Guidance, in the first steps: the latents move so that the attention of box i stays in it,

    L = sum_i (1 - F_i / (F_i + subjects * B_i))^2,

F_i the attention of the box's tokens to its words (or tokens of the grid), B_i that of the background. Later the boxes
give way to clusters of the self-attention maps, matched to subjects by the cross-attention maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.errors import UnsupportedError, check_choice, check_range
from attnzoo.generators.chain import CROSS, SELF, Layer, Next, Stage
from attnzoo.generators.clusters import cluster_masks, kmeans
from attnzoo.generators.forward import Forward
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.map_guidance import MapGuidance, Maps
from attnzoo.generators.maps import MOST

__all__ = ["BoundedAttention", "box_masks", "hide_from_subjects", "hide_from_words", "subject_losses"]


def box_masks(boxes: Sequence[Sequence[float]], grid: Sequence[int]) -> Tensor:
    """bool [subjects, height * width]: columns round(x0 * width) to round(x1 * width) - 1, rows likewise."""
    height, width = grid
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = True
    return masks.flatten(1)


def hide_from_subjects(subjects: Tensor) -> Tensor:
    """Which pairs of grid tokens see each other, bool [B, N, N]; subjects: bool [B, subjects, N].

    A token that is in no subject, as query or as key, sees and is seen; two that are in some must share one.
    """
    inside = subjects.any(1)
    share = torch.einsum("bsi,bsj->bij", subjects.float(), subjects.float()) > 0
    return share | ~inside[:, :, None] | ~inside[:, None, :]


def hide_from_words(
    subjects: Tensor,
    subject_token_indices: Sequence[Sequence[int]],
    filter_token_indices: Sequence[int],
    eos_token_index: int | None,
    num_text: int,
    from_background: bool = False,
) -> Tensor:
    """Which words each grid token sees, bool [B, N, num_text]; subjects: bool [B, subjects, N].

    eos_token_index: hidden from the background; None: not. from_background: the background sees subjects' words, too,
    and then the end-of-text token is not hidden.
    """
    batch, _, size = subjects.shape
    background = ~subjects.any(1)
    seen = torch.ones(batch, size, num_text, dtype=torch.bool, device=subjects.device)
    seen[:, :, list(filter_token_indices)] = False
    for index, tokens in enumerate(subject_token_indices):
        own = subjects[:, index] | background if from_background else subjects[:, index]
        seen[:, :, list(tokens)] = own[:, :, None]
    if eos_token_index is not None and not from_background:
        seen[:, :, eos_token_index] &= ~background
    return seen


def subject_losses(maps: Sequence[Tensor], contexts: Sequence[Sequence[int] | Tensor], boxes: Tensor) -> Tensor:
    """(1 - F / (F + subjects * B))^2 per image and subject, [B, subjects].

    maps: of the layers, each [B, N, M], whose F and B are averaged. contexts: of each subject, the keys that count
    (indices or bool [M]). boxes: bool [subjects, N].
    """
    background = ~boxes.any(0)
    inner, outer = [], []
    for one in maps:
        own = [one[:, :, context] for context in contexts]
        inner.append(torch.stack([m[:, box].sum((1, 2)) for m, box in zip(own, boxes)], dim=1))
        outer.append(torch.stack([m[:, background].sum((1, 2)) for m in own], dim=1))
    foreground, rest = torch.stack(inner).mean(0), torch.stack(outer).mean(0)
    return (1 - foreground / (foreground + len(boxes) * rest)) ** 2


class BoundedAttention(MapGuidance):
    """Subjects in boxes, without leakage between them.

    boxes: per subject x0 y0 x1 y1 in [0, 1]. subject_token_indices: per subject the indices of its words in the
    tokenized prompt (the first token is 0). eos_token_index: of the end-of-text token. filter_token_indices: function
    words, hidden from all. leading_token_indices: per subject the word whose map says where it is; None: its last.
    cross_loss_coef, self_loss_coef, max_steps, moves_per_step, start_step_size, end_step_size, loss_stopping_value: of
    the guidance. min_clustering_step: from which step on subjects are clusters, not boxes (None: boxes to the end);
    delta_refine_mask_steps: every how many steps these are made anew; num_clusters_per_box, cross_mask_threshold,
    self_mask_threshold, seed: of the clusters. resolution: grid of the layers whose maps are looked at, see
    `MapGuidance`.

    compat="official" keeps a quirk: the loss counts the end-of-text token among every subject's words (the authors mark
    it as to be fixed); default: it doesn't. Clusters come from a k-means of our own with seeded starts.
    """

    name: ClassVar[str] = "bounded_attention"
    stage: ClassVar[Stage] = Stage.MASK
    roles: ClassVar[frozenset[str]] = SELF | CROSS

    def __init__(
        self,
        rank: int,
        *,
        boxes: Sequence[Sequence[float]],
        subject_token_indices: Sequence[Sequence[int]],
        eos_token_index: int,
        filter_token_indices: Sequence[int] = (),
        leading_token_indices: Sequence[int] | None = None,
        mask_eos: bool = True,
        cross_loss_coef: float = 1.5,
        self_loss_coef: float = 0.5,
        max_steps: int = 15,
        moves_per_step: int = 5,
        start_step_size: float = 18.0,
        end_step_size: float = 5.0,
        loss_stopping_value: float = 0.2,
        min_clustering_step: int | None = 15,
        cross_mask_threshold: float = 0.2,
        self_mask_threshold: float = 0.2,
        delta_refine_mask_steps: int = 5,
        num_clusters_per_box: int = 3,
        resolution: Sequence[int] | None = None,
        seed: int = 0,
        compat: str | None = None,
    ) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank, max_steps=max_steps, resolution=resolution)
        check_choice("compat", compat, (None, "official"))
        good = [len(b) == 4 and 0 <= b[0] < b[2] <= 1 and 0 <= b[1] < b[3] <= 1 for b in boxes]
        if not good or not all(good):
            raise ValueError(f"boxes must hold x0 < x1 and y0 < y1 in [0, 1], got {boxes!r}")
        words = subject_token_indices
        if len(words) != len(boxes) or not all(words):
            raise ValueError(f"subject_token_indices must name words for each of {len(boxes)} boxes, got {words!r}")
        leading = [group[-1] for group in words] if leading_token_indices is None else leading_token_indices
        if len(leading) != len(boxes):
            raise ValueError(f"leading_token_indices must name one word per box ({len(boxes)}), got {leading!r}")
        for name, value in (("moves_per_step", moves_per_step), ("num_clusters_per_box", num_clusters_per_box)):
            check_range(name, value, low=1)
        check_range("delta_refine_mask_steps", delta_refine_mask_steps, low=1)
        self.boxes = tuple(tuple(float(x) for x in box) for box in boxes)
        self.words = tuple(tuple(group) for group in subject_token_indices)
        self.filter, self.leading, self.eos = tuple(filter_token_indices), tuple(leading), eos_token_index
        self.mask_eos, self.coefficients = mask_eos, (cross_loss_coef, self_loss_coef)
        self.moves, self.sizes, self.stopping = moves_per_step, (start_step_size, end_step_size), loss_stopping_value
        self.clustering, self.refine = min_clustering_step, delta_refine_mask_steps
        self.thresholds, self.per_box = (cross_mask_threshold, self_mask_threshold), num_clusters_per_box
        self.seed, self.compat = seed, compat
        self._means: dict[str, tuple[Tensor, int]] = {}  # "self" and "cross" -> mean map, how many
        self._subjects: Tensor | None = None  # bool [B, subjects, N] on the grid of the maps
        self._state: tuple[int, int] = (-1, -1)  # run and step that the two belong to

    def settings(self) -> dict[str, Any]:
        return {
            "boxes": self.boxes,
            "subject_token_indices": self.words,
            "eos_token_index": self.eos,
            "filter_token_indices": self.filter,
            "max_steps": self.max_steps,
            "moves_per_step": self.moves,
            "min_clustering_step": self.clustering,
            "compat": self.compat,
        }

    def state_bytes(self) -> int:
        kept = [m for m, _ in self._means.values()] + ([] if self._subjects is None else [self._subjects])
        return super().state_bytes() + sum(t.numel() * t.element_size() for t in kept)

    def forget(self) -> None:
        super().forget()
        self._means.clear()
        self._subjects = None

    # ---------------------------------------------------------------- masks

    def subjects(self, grid: tuple[int, ...], ctx: StepContext, batch: int, device: Any) -> Tensor:
        """Where the subjects are at this step, bool [batch, subjects, N]."""
        if self._subjects is None or self.clustering is None or (ctx.step or 0) < self.clustering:
            return box_masks(self.boxes, grid).to(device).expand(batch, -1, -1)
        known = self._subjects.unflatten(2, self._grid).float()
        return F.interpolate(known, grid, mode="nearest-exact").flatten(2).bool().to(device)

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
        if layout.length != layout.num_grid:
            raise UnsupportedError(
                f"{layer.name}: bounded_attention wants layers of image tokens alone, not joint ones"
            )
        guiding = self._recording is not None and self._guiding
        parts = ctx.parts
        size = len(query) // len(parts)
        subjects = self.subjects(layout.grid, ctx, size, query.device)
        cross = layer.role == "cross"
        if cross:
            eos = self.eos if self.mask_eos else None
            seen = hide_from_words(subjects, self.words, self.filter, eos, key.shape[-2], guiding)
        elif layout.num_grid > MOST:
            return self._in_groups(query, key, value, mask, subjects, next)
        else:
            seen = hide_from_subjects(subjects)
        every = [torch.ones_like(seen) if cross and part == "uncond" else seen for part in parts]
        own = torch.cat(every)[:, None]
        # A row without any key must stay finite: the largest negative number, as in the authors' code, not -inf.
        bias = torch.zeros(own.shape, dtype=query.dtype, device=own.device)
        bias.masked_fill_(~own, torch.finfo(query.dtype).min)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        self.look(query, key, bias, layout, layer)
        return next(query, key, value, bias)

    @staticmethod
    def _in_groups(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, subjects: Tensor, next: Next
    ) -> Tensor:
        """Self-attention of many tokens: queries of the same subjects together, over the keys that they see."""
        if mask is not None:
            raise UnsupportedError(f"bounded_attention above {MOST} tokens takes no further mask")
        outs = torch.empty_like(query)
        for row in range(len(query)):
            own = subjects[row % len(subjects)]
            for pattern in own.T.unique(dim=0):
                rows = (pattern == own.T).all(1)
                seen = own[pattern].any(0) | ~own.any(0) if bool(pattern.any()) else torch.ones_like(rows)
                one = slice(row, row + 1)
                outs[one, :, rows] = next(query[one, :, rows], key[one, :, seen], value[one, :, seen], None)
        return outs

    # ---------------------------------------------------------------- guidance

    _guiding = False

    def record(self, forward: Forward, layout: TokenLayout, ctx: StepContext, latents: Tensor) -> Maps:
        self._guiding = True
        try:
            return super().record(forward, layout, ctx, latents)
        finally:
            self._guiding = False

    def schedule(self, step: int, total: int) -> tuple[float, int]:
        start, stop = self.sizes
        return start + (stop - start) / max(1, self.max_steps) * step, self.moves

    def loss(self, maps: Maps, layout: TokenLayout, ctx: StepContext) -> Tensor:
        """The summed loss of all images and subjects; `normalized` divides it by their number."""
        grid = self.grid_of(layout)
        boxes = box_masks(self.boxes, grid).to(maps.found[0][1].device)
        ends = (self.eos,) if self.compat == "official" else ()
        words = [[*group, *ends] for group in self.words]
        cross, own = maps.of("cross", grid), maps.of("self", grid)
        losses = subject_losses(cross, words, boxes).sum() * self.coefficients[0]
        return losses + subject_losses(own, list(boxes), boxes).sum() * self.coefficients[1]

    def normalized(self, loss: Tensor, batch: int) -> Tensor:
        """The mean loss per image and subject."""
        return loss / batch / len(self.boxes)

    def enough(self, loss: Tensor, batch: int) -> bool:
        return bool(self.normalized(loss, batch) < self.stopping)

    # ---------------------------------------------------------------- clusters

    def watch(self, forward: Forward, layout: TokenLayout, ctx: StepContext, **changed: Any) -> Any:
        """The forward of a step, whose maps go into the means that the clusters come from."""
        step = ctx.step or 0
        if ctx.branch == "uncond" or self.clustering is None:
            return forward(**changed)
        if self._state[0] != ctx.run:
            self._means.clear()
            self._subjects = None
        self._grid = self.grid_of(layout)
        if step >= self.clustering and self._means and (self._subjects is None or step % self.refine == 0):
            self._subjects = self.find_subjects(self._grid)
        self._state = (ctx.run, step)
        output, maps = self.recorded(forward, layout, **changed)
        place = ctx.parts.index("cond") if "cond" in ctx.parts else 0
        for kind in ("cross", "self"):
            for one in maps.of(kind, self._grid):
                size = len(one) // len(ctx.parts)
                self.remember(kind, one[place * size : (place + 1) * size].detach())
        return output

    def remember(self, kind: str, one: Tensor) -> None:
        """Take a layer's map [B, N, M] into the mean of its kind; of cross-attention the leading words only."""
        one = one[:, :, list(self.leading)] if kind == "cross" else one
        mean, count = self._means.get(kind, (torch.zeros_like(one), 0))
        self._means[kind] = (mean * (count / (count + 1)) + one / (count + 1), count + 1)

    def find_subjects(self, grid: tuple[int, ...], labels: Tensor | None = None) -> Tensor:
        """Where the subjects are by the maps so far, bool [B, subjects, N]. labels: int [B, N], clusters given."""
        own, cross = self._means["self"][0], self._means["cross"][0]
        count = len(self.boxes) * self.per_box
        if labels is None:
            labels = kmeans(own / (own.amax(1, keepdim=True) + 1e-5), count, seed=self.seed)
        count = max(count, int(labels.max()) + 1)
        boxes = box_masks(self.boxes, grid).to(own.device)
        known = self._subjects if self._subjects is not None else boxes.expand(len(own), -1, -1)
        found = cluster_masks(labels, count, cross, known, *self.thresholds)
        return fix_empty(found, boxes)


def fix_empty(subjects: Tensor, boxes: Tensor) -> Tensor:
    """A subject without any token gets its box, out of which the others go; bool [B, subjects, N]."""
    subjects = subjects.clone()
    for image in subjects:
        for index, box in enumerate(boxes):
            if not bool(image[index].any()):
                image &= ~box
                image[index] = box
    return subjects
