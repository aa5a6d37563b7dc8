"""One layer's attention with its edits, in two formulations of one meaning.

`fused_rows` goes through attnzoo.kernels.edited_attention and never forms the matrix; `dense_rows` forms the rows'
probabilities, for text towers that run on transformers' "eager" implementation anyway (and so can report them).
transformers' layout throughout: query [B, H, Q, D], key and value [B, Hkv, K, D]; outputs [B, R, H, Dv].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.kernels.edited_attention import (
    Visibility,
    attention_column_sums,
    attention_probs,
    edited_attention,
    group_masses,
    group_value_mean,
    grouped_attention,
)

Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RowEdits:
    """What changes in a run of rows.

    boost, key_bias: [B or 1, H or 1, K]. groups: uint8 [B, K] or [B, H, K], with rule: masses [B, R, H, G] -> factors.
    copied, log_weights [B, K]: group `copied` stands once more, weighted (see edits.Regroup).
    share: masses, counts -> (factors, gifts) instead of rule (see edits.Spread); leaky: gifts go to unseen keys too.
    """

    boost: Tensor | None = None
    key_bias: Tensor | None = None
    temperature: float = 1.0
    groups: Tensor | None = None
    num_groups: int = 1
    rule: Rule | None = None
    copied: int | None = None
    log_weights: Tensor | None = None
    share: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    leaky: bool = False

    def of_logits(self, softcap: float | None) -> dict[str, Any]:
        """The arguments that edited_attention's functions share."""
        return {
            "softcap": softcap,
            "key_bias": self.key_bias,
            "boost": self.boost,
            "temperature": self.temperature,
        }


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
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if edits.copied is not None:
        return _with_a_copy(query, key, value, visibility, scale, edits, softcap, backend)
    if edits.share is not None:
        return _shared(query, key, value, visibility, scale, edits, softcap, backend)
    output = edited_attention(
        query,
        key,
        value,
        visibility,
        scale,
        groups=_per_head(edits.groups),
        num_groups=edits.num_groups if edits.groups is not None else None,
        rule=edits.rule,
        backend=backend,
        **edits.of_logits(softcap),
    )
    assert isinstance(output, Tensor)
    return output


def _with_a_copy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility | None,
    scale: float,
    edits: RowEdits,
    softcap: float | None,
    backend: str,
) -> Tensor:
    assert edits.copied is not None and edits.log_weights is not None and edits.rule is not None
    of_logits, groups = edits.of_logits(softcap), _per_head(edits.groups)
    assert groups is not None
    plain, lse = grouped_attention(
        query, key, value, groups, edits.num_groups, visibility, scale, backend=backend, **of_logits
    )
    own = edits.log_weights[:, None]
    of_logits["key_bias"] = own if edits.key_bias is None else edits.key_bias + own
    member = torch.full_like(groups, 255).masked_fill_(groups.eq(edits.copied), 0)  # 255: in no group
    copy, copy_lse = grouped_attention(query, key, value, member, 1, visibility, scale, backend=backend, **of_logits)
    total = torch.logsumexp(lse, -1, keepdim=True)
    total = torch.where(total == -torch.inf, 0.0, total)
    masses = torch.exp(torch.cat([lse, copy_lse], -1) - total)
    weights = masses * edits.rule(masses)
    return (weights[..., None, :] @ torch.cat([plain, copy], 3).to(weights.dtype)).squeeze(-2).to(query.dtype)


def _shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility | None,
    scale: float,
    edits: RowEdits,
    softcap: float | None,
    backend: str,
) -> Tensor:
    assert edits.groups is not None and edits.share is not None
    groups = _per_head(edits.groups)
    assert groups is not None
    own, lse = grouped_attention(
        query, key, value, groups, edits.num_groups, visibility, scale, backend=backend, **edits.of_logits(softcap)
    )
    receivers = Visibility(is_causal=False) if edits.leaky else visibility
    mean, counts = group_value_mean(
        value, groups, edits.num_groups, receivers, num_queries=query.shape[1], num_heads=query.shape[2]
    )
    masses = group_masses(lse)
    factors, gifts = edits.share(masses, counts)
    weights = torch.cat([masses * factors, gifts], -1).to(masses.dtype)
    both = torch.cat([own, mean], 3).to(weights.dtype)
    return (weights[..., None, :] @ both).squeeze(-2).to(query.dtype)


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
        probs = _reweighted(probs, mask, edits)
    probs = probs.to(query.dtype)
    repeats = query.shape[1] // key.shape[1]
    value = value.repeat_interleave(repeats, 1) if repeats > 1 else value
    return (probs @ value).transpose(1, 2).contiguous(), probs


def _reweighted(probs: Tensor, mask: Tensor | None, edits: RowEdits) -> Tensor:
    groups, count = edits.groups, edits.num_groups
    assert groups is not None
    if edits.share is not None:
        seen = torch.ones_like(probs[:, :1], dtype=torch.bool)
        if mask is not None and not edits.leaky:
            seen = seen & sees(mask)
        each = groups[:, None, None] if groups.ndim == 2 else groups[:, :, None]
        counts = torch.stack([(seen & (each == group)).sum(-1) for group in range(count)], -1).transpose(1, 2)
        factors, gifts = edits.share(group_sums(probs, groups, count), counts)
        given = gifts / counts.clamp_min(1)
        return probs * _by_key(factors, groups, probs) + _by_key(given, groups, probs) * seen
    assert edits.rule is not None
    if edits.copied is None:
        return regroup_probs(probs, groups, count, edits.rule)
    assert edits.log_weights is not None
    each = groups[:, None, None] if groups.ndim == 2 else groups[:, :, None]
    copy = probs * (each == edits.copied) * edits.log_weights.to(probs.dtype)[:, None, None].exp()
    masses = torch.cat([group_sums(probs, groups, count), copy.sum(-1).transpose(1, 2)[..., None]], -1)
    factors = edits.rule(masses)
    return probs * _by_key(factors[..., :count], groups, probs) + copy * factors[..., count:].transpose(1, 2)


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
    if edits.temperature != 1.0:
        s = (s / edits.temperature).clamp_min(torch.finfo(work).min)
    probs = torch.softmax(s, -1)
    if mask is not None and mask.dtype == torch.bool:  # a row that sees nothing: 0, as in the kernel
        probs = probs.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return probs


def sees(mask: Tensor) -> Tensor:
    """A bool or additive mask as bool, True where a key is seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@dataclass(eq=False)
class Rows:
    """A run of one layer's rows: what they see and what is edited in them; gives their output, and reads them.

    query [B, H, R, D]; key, value [B, Hkv, K, D]. visibility serves the fused formulation, mask (see dense_probs) the
    dense one. real: bool [B, R], rows that are no padding, where read-outs that sum over rows must leave it out.
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
    real: Tensor | None = None

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
            query,
            key,
            self.visibility,
            self.scale,
            rows=None,
            head_reduction=head_reduction,
            **self.edits.of_logits(self.softcap),
        )

    def column_sums(self) -> Tensor:
        """What each key gets from these rows before re-weighting, [B, H, K]."""
        if self.dense:
            found = self._dense()
            return (found if self.real is None else found * self.real[:, None, :, None]).sum(2)
        seen = self.visibility
        if self.real is not None and seen is not None and seen.mask is not None:  # else padding sees nothing anyway
            rows, mask = self.real[:, None, :, None], seen.mask
            hidden = mask & rows if mask.dtype == torch.bool else mask.masked_fill(~rows, -torch.inf)
            seen = replace(seen, mask=hidden)
        with torch.no_grad():
            query, key = self.query.transpose(1, 2), self.key.transpose(1, 2)
            return attention_column_sums(query, key, seen, self.scale, **self.edits.of_logits(self.softcap))

    def masses(self, groups: Tensor, num_groups: int) -> Tensor:
        """What key groups, uint8 [B, K] or [B, H, K], get before re-weighting, [B, R, H, G]."""
        if self.dense:
            return group_sums(self._dense(), groups, num_groups)
        member = groups[:, None] if groups.ndim == 2 else groups
        query, key, value = (t.transpose(1, 2) for t in (self.query, self.key, self.value))
        _, lse = grouped_attention(
            query, key, value, member, num_groups, self.visibility, self.scale, **self.edits.of_logits(self.softcap)
        )
        return group_masses(lse)

    def _dense(self) -> Tensor:
        found = dense_probs(self.query, self.key, self.mask, self.scale, self.edits, self.softcap)
        if self.mask is None:
            return found
        return found.masked_fill(~sees(self.mask).any(-1, keepdim=True), 0.0)  # padding, whose softmax is over nothing


def group_sums(probs: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Masses [B, R, H, G] of key groups, uint8 [B, K] or [B, H, K], under probabilities [B, H, R, K]."""
    member = torch.nn.functional.one_hot(groups.long(), num_groups).to(probs.dtype)
    return (probs @ (member[:, None] if groups.ndim == 2 else member)).transpose(1, 2)


def regroup_probs(probs: Tensor, groups: Tensor, num_groups: int, rule: Rule) -> Tensor:
    """Probabilities [B, H, R, K], each multiplied by its key group's factor."""
    return probs * _by_key(rule(group_sums(probs, groups, num_groups)), groups, probs)


def _by_key(per_group: Tensor, groups: Tensor, probs: Tensor) -> Tensor:
    """Numbers of key groups [B, R, H, G] as numbers of keys [B, H, R, K]."""
    index = groups.long().unsqueeze(-2)
    index = (index[:, None] if groups.ndim == 2 else index).expand(probs.shape)
    return per_group.transpose(1, 2).expand(*probs.shape[:3], -1).gather(-1, index)


def group_sizes(groups: Tensor, num_groups: int) -> Tensor:
    """How many keys each group has, [..., G], from uint8 [..., K]."""
    return torch.stack([(groups == group).sum(-1) for group in range(num_groups)], -1)
