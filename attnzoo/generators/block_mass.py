"""How much of exact attention lies in each block, without a matrix of all pairs; and choosing blocks by it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.generators.blocks import num_blocks

_CHUNK = 1 << 24  # probabilities that are held at once, or those of one query block


class Mass(NamedTuple):
    """mass [B, H, nq, nk]: share of a block's queries' attention (their mean) that lies in a key block of the grid.

    peak: like mass, the largest probability in the block. lse [B, H, Nq]: of the queries, over all keys; the one given
    where one was.
    """

    mass: Tensor
    peak: Tensor
    lse: Tensor


def block_mass(
    query: Tensor,
    key: Tensor,
    num_grid: int,
    block_size: tuple[int, int],
    scale: float | None = None,
    *,
    lse: Tensor | None = None,
    seen: Tensor | None = None,
) -> Mass:
    """exp(q . k scale - lse), summed per block, in pieces of query blocks.

    query [B, H, Nq, D], key [B, Hkv, M, D], whose first num_grid keys are the grid's; the others count in the softmax
    only. lse: of an earlier step, which saves the sum over the keys; mass does not sum to 1 then.
    seen: bool [B or 1, M], False for keys that nobody sees.
    """
    block_q, block_k = block_size
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys = key.to(exact).repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
    rows = query.shape[0] * query.shape[1] * keys.shape[-1]
    step = max(1, _CHUNK // (rows * block_q)) * block_q
    masses, peaks, lses = [], [], []
    for first in range(0, query.shape[2], step):
        logits = query[:, :, first : first + step].to(exact) @ keys * scale
        if seen is not None:
            logits = logits.masked_fill(~seen[:, None, None, :], -math.inf)
        own = logits.logsumexp(-1) if lse is None else lse[:, :, first : first + step].to(exact)
        probability = (logits - own[..., None]).exp()[..., :num_grid]
        count = probability.shape[2]
        blocks = F.pad(probability, (0, -num_grid % block_k, 0, -count % block_q))
        blocks = blocks.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q))
        queries = torch.arange(0, count, block_q, device=query.device)
        queries = (count - queries).clamp(max=block_q).to(exact)
        masses.append(blocks.sum((3, 5)) / queries[:, None])
        peaks.append(blocks.amax((3, 5)))
        lses.append(own)
    return Mass(torch.cat(masses, 2), torch.cat(peaks, 2), torch.cat(lses, 2))


def largest(mass: Tensor, share: Tensor | float) -> Tensor:
    """bool like mass: in every row of blocks the share (a number, or [..., H]) of the largest, at least one."""
    count = mass.shape[-1]
    share = torch.as_tensor(share, dtype=torch.float64, device=mass.device)
    keep = (share * count).round().long().clamp(1, count)[..., None, None]
    order = mass.argsort(dim=-1, descending=True, stable=True)
    chosen = (torch.arange(count, device=mass.device) < keep).expand(mass.shape)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, chosen)


def enough(mass: Tensor, share: float) -> Tensor:
    """bool like mass: in every row of blocks the fewest of the largest that hold `share` of the row's mass."""
    ordered = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    chosen = before < share * ordered.values.sum(-1, keepdim=True)
    chosen[..., 0] = True
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, ordered.indices, chosen)


def recall(mass: Tensor, mask: Tensor) -> Tensor:
    """[B, H]: share of the grid's mass that the chosen blocks hold."""
    return (mass * mask).sum((-1, -2)) / mass.sum((-1, -2))


def block_counts(num_grid: int, block_size: tuple[int, int]) -> tuple[int, int]:
    """(nq, nk) of a grid."""
    return num_blocks(num_grid, block_size[0]), num_blocks(num_grid, block_size[1])
