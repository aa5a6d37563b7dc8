"""One layer's attention with its edits, in two formulations of one meaning.

`fused_rows` goes through attnzoo.kernels.edited_attention and never forms the matrix; `dense_rows` forms the rows'
probabilities, for text towers that run on transformers' "eager" implementation anyway (and so can report them).
transformers' layout throughout: query [B, H, Q, D], key and value [B, Hkv, K, D]; outputs [B, R, H, Dv].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.kernels.edited_attention import (
    Visibility,
    attention_column_sums,
    attention_probs,
    edited_attention,
    group_masses,
    grouped_attention,
)

Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RowEdits:
    """What changes in a run of rows.

    boost, key_bias: [B or 1, H or 1, K]. groups: uint8 [B, K] or [B, H, K], with rule: masses [B, R, H, G] -> factors.
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
    visibility: Visibility | None,
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
        groups=_per_head(edits.groups),
        num_groups=edits.num_groups if grouped else None,
        rule=edits.rule,
        backend=backend,
    )
    assert isinstance(output, Tensor)
    return output


def _per_head(groups: Tensor | None) -> Tensor | None:
    return groups[:, None] if groups is not None and groups.ndim == 2 else groups


def dense_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    edits: RowEdits,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with the rows' probabilities: (output [B, R, H, Dv], probabilities [B, H, R, K])."""
    probs = dense_probs(query, key, mask, scale, edits, softcap)
    if edits.groups is not None:
        assert edits.rule is not None
        probs = regroup_probs(probs, edits.groups, edits.num_groups, edits.rule)
    probs = probs.to(query.dtype)
    repeats = query.shape[1] // key.shape[1]
    value = value.repeat_interleave(repeats, 1) if repeats > 1 else value
    return (probs @ value).transpose(1, 2).contiguous(), probs


def dense_probs(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, edits: RowEdits, softcap: float | None = None
) -> Tensor:
    """The rows' softmax with their logit edits, before any re-weighting, [B, H, R, K].

    mask: bool (True: seen) or float (added), broadcasting to [B, H, R, K]; None: every key is seen.
    """
    repeats = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(repeats, 1) if repeats > 1 else key
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
    return torch.softmax(s, -1)


@dataclass(eq=False)
class Rows:
    """A run of one layer's rows: what they see and what is edited in them; gives their output, and reads them.

    query [B, H, R, D]; key, value [B, Hkv, K, D]. visibility serves the fused formulation, mask (see dense_probs) the
    dense one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None
    edits: RowEdits
    dense: bool
    visibility: Visibility | None
    mask: Tensor | None

    def output(self) -> tuple[Tensor, Tensor | None]:
        """(output [B, R, H, Dv], probabilities [B, H, R, K] where the formulation is dense)."""
        if self.dense:
            return dense_rows(self.query, self.key, self.value, self.mask, self.scale, self.edits, self.softcap)
        attended = fused_rows(self.query, self.key, self.value, self.visibility, self.scale, self.edits, self.softcap)
        return attended, None

    def probs(self, head_reduction: str | None = None) -> Tensor:
        """The softmax before re-weighting, [B, R, H, K]; [B, R, K] with head_reduction "max" or "mean"."""
        if self.dense:
            found = self._dense().transpose(1, 2)
            return found if head_reduction is None else found.amax(2) if head_reduction == "max" else found.mean(2)
        query, key = self.query.transpose(1, 2), self.key.transpose(1, 2)
        return attention_probs(
            query, key, self.visibility, self.scale, rows=None, head_reduction=head_reduction, **self._logit_edits()
        )

    def column_sums(self) -> Tensor:
        """What each key gets from these rows before re-weighting, [B, H, K]."""
        if self.dense:
            return self._dense().sum(2)
        with torch.no_grad():
            query, key = self.query.transpose(1, 2), self.key.transpose(1, 2)
            return attention_column_sums(query, key, self.visibility, self.scale, **self._logit_edits())

    def masses(self, groups: Tensor, num_groups: int) -> Tensor:
        """What key groups, uint8 [B, K] or [B, H, K], get before re-weighting, [B, R, H, G]."""
        if self.dense:
            return group_sums(self._dense(), groups, num_groups)
        member = groups[:, None] if groups.ndim == 2 else groups
        query, key, value = (t.transpose(1, 2) for t in (self.query, self.key, self.value))
        _, lse = grouped_attention(
            query, key, value, member, num_groups, self.visibility, self.scale, **self._logit_edits()
        )
        return group_masses(lse)

    def _dense(self) -> Tensor:
        found = dense_probs(self.query, self.key, self.mask, self.scale, self.edits, self.softcap)
        if self.mask is None:
            return found
        seen = self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
        return found.masked_fill(~seen.any(-1, keepdim=True), 0.0)  # padding, whose softmax is over nothing

    def _logit_edits(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "key_bias": self.edits.key_bias, "boost": self.edits.boost}


def group_sums(probs: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Masses [B, R, H, G] of key groups, uint8 [B, K] or [B, H, K], under probabilities [B, H, R, K]."""
    member = torch.nn.functional.one_hot(groups.long(), num_groups).to(probs.dtype)
    return (probs @ (member[:, None] if groups.ndim == 2 else member)).transpose(1, 2)


def regroup_probs(probs: Tensor, groups: Tensor, num_groups: int, rule: Rule) -> Tensor:
    """Probabilities [B, H, R, K], each multiplied by its key group's factor."""
    factors = rule(group_sums(probs, groups, num_groups)).transpose(1, 2)
    index = groups.long().unsqueeze(-2)
    index = (index[:, None] if groups.ndim == 2 else index).expand(probs.shape)
    return probs * factors.expand(*probs.shape[:3], num_groups).gather(-1, index)


def group_sizes(groups: Tensor, num_groups: int) -> Tensor:
    """How many keys each group has, [..., G], from uint8 [..., K]."""
    return torch.stack([(groups == group).sum(-1) for group in range(num_groups)], -1)
