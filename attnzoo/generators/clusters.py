"""Clusters of attention maps, and which subject each belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cluster_masks", "kmeans"]


def kmeans(points: Tensor, count: int, *, seed: int = 0, starts: int = 8, iterations: int = 50) -> Tensor:
    """Lloyd's algorithm: the cluster of each point, int64 [B, n].

    points: [B, n, d]. count: clusters, at most n. starts: seeded beginnings (points drawn one by one, each with
    probability proportional to its squared distance from those before), of which the one with the smallest sum of
    squared distances wins.
    """
    batch, size, _ = points.shape
    if not 1 <= count <= size:
        raise ValueError(f"count must be 1 to {size}, the number of points, got {count}")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(batch, size, dtype=torch.long, device=points.device)
    for index, one in enumerate(points.detach().float()):
        best = torch.inf
        for _ in range(starts):
            centres = one[torch.randint(size, (1,), generator=generator).to(one.device)]
            while len(centres) < count:
                far = torch.cdist(one, centres).amin(1).square().cpu()
                far = far if float(far.sum()) > 0 else torch.ones_like(far)
                centres = torch.cat([centres, one[torch.multinomial(far, 1, generator=generator).to(one.device)]])
            for _ in range(iterations):
                nearest = torch.cdist(one, centres).argmin(1)
                members = torch.nn.functional.one_hot(nearest, count).to(one)
                sums, sizes = members.T @ one, members.sum(0)[:, None]
                moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
                if torch.equal(moved, centres):
                    break
                centres = moved
            spread = float(torch.cdist(one, centres).amin(1).square().sum())
            if spread < best:
                best, labels[index] = spread, torch.cdist(one, centres).argmin(1)
    return labels


def cluster_masks(
    labels: Tensor,
    count: int,
    cross: Tensor,
    known: Tensor,
    cross_threshold: float = 0.2,
    self_threshold: float = 0.2,
    sharpness: float = 10.0,
) -> Tensor:
    """The clusters that belong to each subject, bool [B, subjects, N].

    labels: int [B, N]. cross: [B, N, subjects], how much each token looks at each subject's word. known: bool
    [B, subjects, N], where the subjects were before. A subject's map is scaled to its largest value, pushed through
    sigmoid(sharpness (m - cross_threshold)), scaled to 0..1 and cut to `known`; a cluster goes to the subject with the
    largest overlap, relative to the smaller of the two areas, if that reaches self_threshold.
    """
    tiny = 1e-5
    maps = torch.sigmoid(sharpness * (cross / (cross.amax(1, keepdim=True) + tiny) - cross_threshold))
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    maps = ((maps - low) / (high - low + tiny)).transpose(1, 2) * known
    members = torch.nn.functional.one_hot(labels, count).to(maps)
    area, own = members.sum(1)[:, None, :], maps.sum(2)[:, :, None]
    scores, subjects = (maps @ members / torch.minimum(own, area)).max(1)
    chosen = torch.nn.functional.one_hot(subjects.gather(1, labels), maps.shape[1]).transpose(1, 2).bool()
    return chosen & (scores.gather(1, labels) >= self_threshold)[:, None]
