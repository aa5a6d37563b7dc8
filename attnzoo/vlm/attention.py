"""One layer's attention with its edits, in two formulations of one meaning.

`fused_rows` goes through attnzoo.kernels.edited_attention and never forms the matrix; `dense_rows` forms the rows'
probabilities, for text towers that run on transformers' "eager" implementation anyway (and so can report them).
transformers' layout throughout: query [B, H, Q, D], key and value [B, Hkv, K, D]; outputs [B, R, H, Dv].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.edited_attention import Visibility, edited_attention

Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RowEdits:
    """What changes in a run of rows.

    boost, key_bias: [B or 1, H or 1, K]. groups: uint8 [B, K], with rule: masses [B, R, H, G] -> factors.
    """

    boost: Tensor | None = None
    key_bias: Tensor | None = None
    groups: Tensor | None = None
    num_groups: int = 1
    rule: Rule | None = None


def fused_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    scale: float,
    edits: RowEdits,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Edited attention of the given rows, [B, R, H, Dv], without their probabilities."""
    grouped = edits.groups is not None
    output = edited_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        visibility,
        scale,
        softcap=softcap,
        key_bias=edits.key_bias,
        boost=edits.boost,
        groups=edits.groups[:, None] if edits.groups is not None else None,
        num_groups=edits.num_groups if grouped else None,
        rule=edits.rule,
        backend=backend,
    )
    assert isinstance(output, Tensor)
    return output


def dense_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    edits: RowEdits,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with the rows' probabilities: (output [B, R, H, Dv], probabilities [B, H, R, K]).

    mask: bool (True: seen) or float (added), broadcasting to [B, H, R, K]; None: every key is seen.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (key, value))
    work = torch.promote_types(query.dtype, torch.float32)
    s = (query @ key.transpose(2, 3)).to(work) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if edits.boost is not None:
        s = s + edits.boost.to(work)[:, :, None] * s.abs()
    if edits.key_bias is not None:
        s = s + edits.key_bias.to(work)[:, :, None]
    if mask is not None:
        s = s.masked_fill(~mask, torch.finfo(work).min) if mask.dtype == torch.bool else s + mask.to(work)
    probs = torch.softmax(s, -1)
    if edits.groups is not None:
        assert edits.rule is not None
        probs = regroup_probs(probs, edits.groups, edits.num_groups, edits.rule)
    probs = probs.to(query.dtype)
    return (probs @ value).transpose(1, 2).contiguous(), probs


def group_sums(probs: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Masses [B, R, H, G] of key groups, uint8 [B, K], under probabilities [B, H, R, K]."""
    member = torch.nn.functional.one_hot(groups.long(), num_groups).to(probs.dtype)
    return (probs @ member[:, None]).transpose(1, 2)


def regroup_probs(probs: Tensor, groups: Tensor, num_groups: int, rule: Rule) -> Tensor:
    """Probabilities [B, H, R, K], each multiplied by its key group's factor."""
    factors = rule(group_sums(probs, groups, num_groups)).transpose(1, 2)
    index = groups.long()[:, None, None].expand(probs.shape)
    return probs * factors.expand(*probs.shape[:3], num_groups).gather(-1, index)


def group_sizes(groups: Tensor, num_groups: int) -> Tensor:
    """How many keys each group has, [B, G], from uint8 [B, K]."""
    return torch.stack([(groups == group).sum(1) for group in range(num_groups)], 1)
