"""The formula, dense in both axes, in float32 or float64; plain autograd gives its gradients. The tests' yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.kernels.edited_attention.problem import Edits, Visibility


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible(visibility: Visibility, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """bool [B or 1, H or 1, Nq, Nk], True where a row sees a key; None where every row sees every key.

    A float mask is not part of it. Needs query_offset resolved.
    """
    assert visibility.query_offset is not None
    place = visibility.query_offset + torch.arange(num_queries, device=device)[:, None]
    key_place = torch.arange(num_keys, device=device)
    seen: Tensor | None = None
    if visibility.is_causal:
        seen = key_place <= place
    if visibility.window_size is not None:
        near = (place - key_place).abs() < visibility.window_size
        seen = near if seen is None else seen & near
    if seen is not None:
        seen = seen[None, None]
    if visibility.span_ids is not None and seen is not None:
        flat = place[:, 0]
        inside = (flat >= 0) & (flat < num_keys)
        own = torch.where(inside, visibility.span_ids[:, flat.clamp(0, max(num_keys - 1, 0))], -1)
        same = (own[:, :, None] == visibility.span_ids[:, None, :]) & (own[:, :, None] >= 0)
        seen = seen | same[:, None]
    if visibility.key_mask is not None:
        real = visibility.key_mask[:, None, None, :]
        seen = real if seen is None else seen & real
    if visibility.mask is not None and visibility.mask.dtype == torch.bool:
        seen = visibility.mask if seen is None else seen & visibility.mask
    return seen


def logits(query: Tensor, key: Tensor, visibility: Visibility, edits: Edits) -> Tensor:
    """Edited logits [B, H, Nq, Nk] in the statistics dtype, -inf where a row does not see a key."""
    dtype = statistics_dtype(query.dtype)
    repeats = query.shape[2] // key.shape[2]
    q = query.to(dtype).transpose(1, 2)
    k = key.to(dtype).transpose(1, 2).repeat_interleave(repeats, dim=1)
    with torch.autocast(query.device.type, enabled=False):
        s = (q * edits.scale) @ k.transpose(2, 3)
    if edits.softcap is not None:
        s = edits.softcap * torch.tanh(s / edits.softcap)
    if edits.boost is not None:
        s = s + edits.boost.to(dtype)[:, :, None, :] * s.abs()
    if edits.key_bias is not None:
        s = s + edits.key_bias.to(dtype)[:, :, None, :]
    if visibility.mask is not None and visibility.mask.dtype != torch.bool:
        s = s + visibility.mask.to(dtype)
    s = s / edits.temperature
    seen = visible(visibility, query.shape[1], key.shape[1], query.device)
    return s if seen is None else s.masked_fill(~seen, float("-inf"))


def softmax_parts(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and its natural-log normaliser; a row of -inf gives 0 and -inf, and gradient 0."""
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), float("-inf"))
    top = torch.where(top == float("-inf"), 0.0, top).detach()
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), safe.log() + top)
    return e / safe, lse.squeeze(-1)


def grouped(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, edits: Edits) -> tuple[Tensor, Tensor]:
    """group_output [B, Nq, H, G, Dv] in query's dtype and group_lse [B, Nq, H, G]; see the operation's contract."""
    s = logits(query, key, visibility, edits)
    repeats = query.shape[2] // key.shape[2]
    v = value.to(s.dtype).transpose(1, 2).repeat_interleave(repeats, dim=1)
    outputs, normalisers = [], []
    for group in range(edits.num_groups):
        own = s
        if edits.groups is not None:
            own = s.masked_fill((edits.groups != group)[:, :, None, :], float("-inf"))
        p, lse = softmax_parts(own)
        outputs.append(p @ v)
        normalisers.append(lse)
    output = torch.stack(outputs, 3).transpose(1, 2).to(query.dtype)
    return output.contiguous(), torch.stack(normalisers, 3).transpose(1, 2).contiguous()


def probs(query: Tensor, key: Tensor, visibility: Visibility, edits: Edits, head_reduction: str) -> Tensor:
    """The softmax [B, Nq, H, Nk], or [B, Nq, Nk] for head_reduction "max" or "mean" ("none": as it is)."""
    p = softmax_parts(logits(query, key, visibility, edits))[0].transpose(1, 2)
    if head_reduction == "none":
        return p.contiguous()
    return p.amax(2) if head_reduction == "max" else p.mean(2)


def column_sums(query: Tensor, key: Tensor, visibility: Visibility, edits: Edits) -> Tensor:
    """The softmax summed over all rows, [B, H, Nk]."""
    return softmax_parts(logits(query, key, visibility, edits))[0].sum(2)
