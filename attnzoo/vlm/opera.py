"""OPERA (CVPR 2024, arXiv 2311.17911; code shikiw/OPERA, MIT): beams that lean on one token of the answer are
penalised, and taken back where they keep leaning on it.

Of every response token the last layer's attention is looked at, largest over heads. Column j of the response gathers
the product over later rows i of sigma w[i, j]: a token that all later ones look at stands out. A running
product per column says the same as the whole matrix, and needs no row twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EARLY = 10  # response tokens, counted with the candidate, whose penalty is their lack of attention to the image
UNIT = 1e-7  # the authors' scale of a column's score
REJECTED = -999.0  # the authors' logit for what must not be chosen


def extend_products(products: Tensor, row: Tensor, scale_factor: float, log: bool = False) -> Tensor:
    """Column products with one more row: [..., T] and the new row's weights [..., T + 1] (sums of whole rows are 1)
    -> [..., T + 1]. log: products are logarithms."""
    if log:
        own = torch.log(row) + math.log(scale_factor)
        return torch.cat([products + own[..., :-1], own[..., -1:]], -1)
    own = scale_factor * row
    return torch.cat([products * own[..., :-1], own[..., -1:]], -1)


@dataclass(frozen=True, eq=False)
class Aggregation:
    """Of each candidate: its columns' scores [..., T], the largest, and where; what it looks at in the image."""

    scores: Tensor
    largest: Tensor
    place: Tensor
    image: Tensor
    penalty: Tensor


def aggregate(products: Tensor, image: Tensor, official: bool = False) -> Aggregation:
    """The penalty of candidates, from column products [..., T] (logarithms unless official) and the candidate rows'
    attention to the image [...].

    official: scores are float16, as in the authors' code: below 3e-8 they are 0, above 65504 infinite, and of equal
    ones the first counts. The default keeps the precision and cuts at the largest finite value.
    """
    if official:
        scores = (UNIT * products).to(torch.float32).to(torch.float16)
    else:
        limit = math.log(torch.finfo(products.dtype).max) - 1.0
        scores = torch.exp((products + math.log(UNIT)).clamp_max(limit))
    largest, place = scores.max(-1)
    if not official:
        place = products.argmax(-1)
    early = products.shape[-1] <= EARLY
    return Aggregation(scores, largest, place, image, -image if early else largest)


def common_place(places: Tensor) -> tuple[Tensor, Tensor]:
    """The most frequent place of a beam's candidates [S, N], and of these over the beams [S]; places [S, N, C].
    Of equally frequent ones the smallest."""
    per_beam = places.mode(-1).values
    return per_beam, per_beam.mode(-1).values


def penalised(candidate_scores: Tensor, penalty: Tensor, penalty_weights: float) -> Tensor:
    """Candidates' logits minus their penalty; float16 penalties are weighted in float16, as the authors do."""
    return candidate_scores - penalty_weights * penalty


def candidates_only(candidate_scores: Tensor, candidates: Tensor, vocabulary: int) -> Tensor:
    """Logits [..., V] that hold the candidates' scores [..., C] and REJECTED everywhere else."""
    whole = torch.full(
        (*candidates.shape[:-1], vocabulary), REJECTED, dtype=candidate_scores.dtype, device=candidates.device
    )
    return whole.scatter(-1, candidates, candidate_scores)


def without_rejected(logits: Tensor, rejected: Tensor) -> Tensor:
    """All logits [N, V] of a prompt's beams, shifted so that each beam's smallest is REJECTED, and so are the flat
    positions `rejected` (beam x V + token), which were taken at this place before."""
    shifted = logits - (-REJECTED + logits.min(-1, keepdim=True).values)
    return shifted.view(-1).scatter(-1, rejected, REJECTED).view_as(logits)


def aggregate_rows(
    rows: Tensor, image: Tensor, response_start: int, scale_factor: float, official: bool = False
) -> Aggregation:
    """`aggregate` from rows that exist already, as a loop would have gathered them.

    rows [..., q, k]: attention, largest over heads, of every query from the prompt's first to the candidate; a row need
    not sum to 1. image [k] bool.
    """
    weights = rows / rows.sum(-1, keepdim=True)
    response = weights[..., response_start:, response_start:]
    products = response[..., 0, :0]
    for i in range(response.shape[-2]):
        products = extend_products(products, response[..., i, : i + 1], scale_factor, log=not official)
    return aggregate(products, weights[..., -1, :][..., image].sum(-1), official)
