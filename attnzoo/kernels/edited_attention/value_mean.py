"""The mean of the values over a key group, for receivers that share a mass equally (ViF)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.errors import check_range, check_same, check_tensor
from attnzoo.kernels.edited_attention.problem import (
    FLOATS,
    HEAD_DIMS,
    MASK_ELEMENTS,
    MAX_GROUPS,
    Visibility,
    check_broadcast,
    check_visibility,
    resolve_rows,
)
from attnzoo.kernels.edited_attention.reference import statistics_dtype, visible


def group_value_mean(
    value: Tensor,
    groups: Tensor,
    num_groups: int,
    visibility: Visibility | None = None,
    *,
    num_queries: int | None = None,
    num_heads: int | None = None,
    rows: tuple[int, int | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row and key group, the plain mean of the values of the keys that the row sees, and how many they are.

    What a group receives that is given a mass uniformly: adding mass m to group g, m / count per key, adds
    m * mean[..., g, :] to the row's output (ViF's receivers, 2509.21789).

    value [B, Nk, Hkv, Dv]; groups [B or 1, H or 1, Nk] uint8, a key numbered num_groups or more is in no group.
    visibility: as in `edited_attention`, for num_queries rows; None is causal. num_queries: None means Nk. num_heads:
    H, a multiple of Hkv; None means Hkv. rows: which of the rows, as in `edited_attention`.
    Returns mean [B, R, H, G, Dv] in value's dtype and count [B, R, 1 or H, G], int64; a group without visible keys has
    mean 0 and count 0. Differentiable in value.

    Sums are float32 (float64 for float64). Where the visibility is causality, or none, and padding, they run over the
    keys once and each row takes the running sum at its place, at most MASK_ELEMENTS numbers beside the result at a
    time; with a window, spans or a bool mask they are products with the rows' visibility, as many rows at a time.
    Raises TypeError or ValueError that names the argument; a float mask is refused, it says nothing about who is seen.
    """
    check_tensor("value", value, 4, FLOATS)
    check_range("value.shape[-1] (head_dim)", value.shape[-1], *HEAD_DIMS)
    batch, num_keys, heads_kv, _ = value.shape
    num_heads = heads_kv if num_heads is None else num_heads
    num_queries = num_keys if num_queries is None else num_queries
    check_range("num_queries", num_queries, 0)
    check_range("num_heads", num_heads, 1)
    if heads_kv == 0 or num_heads % heads_kv:
        raise ValueError(f"num_heads must be a multiple of value's heads, got {num_heads} and {heads_kv}")
    check_tensor("groups", groups, 3, [torch.uint8])
    check_broadcast("groups", groups, [("B", batch, True), ("H", num_heads, True), ("Nk", num_keys, False)])
    check_range("num_groups", num_groups, 1, MAX_GROUPS)
    check_same("device", value=value, groups=groups)
    seen = check_visibility(
        Visibility() if visibility is None else visibility,
        value.new_empty((batch, num_queries, num_heads, 0)),
        value,
    )
    if seen.mask is not None and seen.mask.dtype != torch.bool:
        raise TypeError(f"visibility.mask must be bool for a mean over visible keys, got {seen.mask.dtype}")
    start, stop = resolve_rows(rows, num_queries)
    seen = seen.rows(start, stop)
    member = groups.unsqueeze(2) == torch.arange(num_groups, dtype=torch.uint8, device=groups.device)[:, None]
    if seen.key_mask is not None:
        member = member & seen.key_mask[:, None, None, :]
    plain = seen.window_size is None and seen.mask is None and (seen.span_ids is None or not seen.is_causal)
    sums, count = (_running if plain else _products)(value, member, seen, stop - start)
    repeats = num_heads // heads_kv
    if count.shape[2] == num_heads:
        shared = count.unflatten(2, (heads_kv, repeats))
    else:
        shared = count.unsqueeze(3)
    mean = (sums / shared.clamp_min(1)[..., None]).to(value.dtype)
    count = count.expand(batch, *count.shape[1:]).contiguous()
    return mean.expand(-1, -1, -1, repeats, -1, -1).flatten(2, 3).contiguous(), count


def _by_kv_head(tensor: Tensor, heads_kv: int) -> Tensor:
    """[B, H or 1, ...] as [B, Hkv or 1, repeats or 1, ...]."""
    return tensor.unsqueeze(2) if tensor.shape[1] == 1 else tensor.unflatten(1, (heads_kv, -1))


def _running(value: Tensor, member: Tensor, seen: Visibility, num_rows: int) -> tuple[Tensor, Tensor]:
    """Sums [B, R, Hkv, repeats or 1, G, Dv] and counts [B or 1, R, H or 1, G] where a row sees all keys up to a place.

    member: [B or 1, H or 1, G, Nk] bool.
    """
    (batch, num_keys, heads_kv, dim), groups = value.shape, member.shape[2]
    dtype = statistics_dtype(value.dtype)
    offset = seen.query_offset if seen.is_causal else num_keys
    assert offset is not None
    stop = (torch.arange(num_rows, device=value.device) + (offset + 1)).clamp(0, num_keys)  # of the keys a row sees
    counts = torch.nn.functional.pad(member.cumsum(-1), (1, 0))[..., stop].permute(0, 3, 1, 2)
    weights = _by_kv_head(member, heads_kv)
    repeats = weights.shape[2]
    running = value.new_zeros((batch, heads_kv, repeats, groups, dim), dtype=dtype)

    def row(place: int) -> int:
        """The row at a place, of those there are."""
        return min(max(place - offset, 0), num_rows)

    # In the order of their places: rows before the first key, then chunk by chunk, then those that see all.
    parts = [running[:, None].expand(-1, row(0), -1, -1, -1, -1)]
    step = max(1, MASK_ELEMENTS // max(1, batch * heads_kv * repeats * groups * dim))
    for low in range(0, num_keys, step):
        high = min(low + step, num_keys)
        v = value[:, low:high].to(dtype).transpose(1, 2)
        w = weights[..., low:high].to(dtype)
        first, last = row(low), row(high)
        if first < last:
            upto = (w[..., None] * v[:, :, None, None]).cumsum(4) + running.unsqueeze(4)
            parts.append(upto[:, :, :, :, first + offset - low : last + offset - low].permute(0, 4, 1, 2, 3, 5))
            running = upto[:, :, :, :, -1]
        else:
            running = running + (w.flatten(2, 3) @ v).unflatten(2, (repeats, groups))
    parts.append(running[:, None].expand(-1, num_rows - row(num_keys), -1, -1, -1, -1))
    return torch.cat(parts, 1), counts


def _products(value: Tensor, member: Tensor, seen: Visibility, num_rows: int) -> tuple[Tensor, Tensor]:
    """As `_running`, for any visibility."""
    (batch, num_keys, heads_kv, dim), groups = value.shape, member.shape[2]
    dtype = statistics_dtype(value.dtype)
    heads = max(member.shape[1], 1 if seen.mask is None else seen.mask.shape[1])
    repeats = 1 if heads == 1 else heads // heads_kv
    v = value.to(dtype).transpose(1, 2)
    sums, counts = [value.new_zeros((batch, 0, heads_kv, repeats, groups, dim), dtype=dtype)], []
    step = max(1, MASK_ELEMENTS // max(1, batch * heads * groups * num_keys))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        allowed = visible(seen.rows(start, stop), stop - start, num_keys, value.device)
        assert allowed is not None
        weights = _by_kv_head(member.unsqueeze(2) & allowed.unsqueeze(3), heads_kv)
        counts.append(weights.flatten(1, 2).sum(-1).transpose(1, 2))
        part = weights.to(dtype).flatten(2, 4) @ v
        part = part.unflatten(2, (repeats, stop - start, groups))
        sums.append(part.permute(0, 3, 1, 2, 4, 5))
    if not counts:
        counts = [member.new_zeros((batch, 0, heads, groups), dtype=torch.int64)]
    return torch.cat(sums, 1), torch.cat(counts, 1)
