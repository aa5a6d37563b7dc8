"""What is asked of edited attention: which keys a row sees, and the checks of every argument.

With i = query_offset + row the place of a query row on the key axis, a key j is seen when

    (j <= i if is_causal)  and  (|i - j| < window_size if given)       the model's plain mask
    or span_ids[b, i] == span_ids[b, j] >= 0                           a bidirectional span (PaliGemma, Gemma 3)

and, whatever the spans say, key_mask[b, j] is True and mask (bool) is True. A float mask is added to the logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.errors import check_range, check_same, check_tensor
from attnzoo.kernels.library import autocast

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_GROUPS = 8
SCORE_ELEMENTS = 1 << 20
MASK_ELEMENTS = 1 << 22
HEAD_DIMS = (1, 256)


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys a query row sees.

    is_causal: row at place i sees keys j <= i. False: every key.
    query_offset: place of query row 0 on the key axis; None means num_keys - num_queries (a cache that holds exactly
        the tokens so far). Give it for a static cache, whose key axis is longer.
    window_size: keys at distance < window_size (Mistral's and Gemma's sliding_window).
    key_mask: [B or 1, Nk] bool, False for padding; nobody sees such a key.
    span_ids: [B or 1, Nk] integer; tokens of one id >= 0 see each other in both directions, over window and causality
        (transformers' `block_sequence_ids`); negative ids belong to no span. A prefix is a span: id 0 over the prefix.
    mask: [B or 1, H or 1, Nq, Nk], bool (True: seen) or float (added to the logits): what transformers hands over.
        The slow path: it is read as dense as it is. With it, say is_causal=False if it holds the causality already.
    """

    is_causal: bool = True
    query_offset: int | None = None
    window_size: int | None = None
    key_mask: Tensor | None = None
    span_ids: Tensor | None = None
    mask: Tensor | None = None

    def resolved(self, num_queries: int, num_keys: int) -> Visibility:
        """The same with query_offset as a number."""
        return self if self.query_offset is not None else replace(self, query_offset=num_keys - num_queries)

    def rows(self, start: int, stop: int) -> Visibility:
        """The visibility of query rows start..stop-1 alone, for `query[:, start:stop]`; needs query_offset resolved."""
        if self.query_offset is None:
            raise ValueError("query_offset must be a number before rows are taken, got None: call resolved() first")
        mask = self.mask if self.mask is None else self.mask[:, :, start:stop]
        return replace(self, query_offset=self.query_offset + start, mask=mask)


@dataclass(frozen=True, eq=False)
class Edits:
    """What changes the logits of the rows that it is given with; the model's own scale and softcap ride along.

    key_bias, boost: [B or 1, H or 1, Nk]. groups: the same shape, uint8, every entry below num_groups.
    """

    scale: float
    softcap: float | None = None
    temperature: float = 1.0
    key_bias: Tensor | None = None
    boost: Tensor | None = None
    groups: Tensor | None = None
    num_groups: int = 1

    @property
    def neutral(self) -> bool:
        """True where rows with these edits are rows of plain attention (softcap aside)."""
        return self.temperature == 1.0 and self.key_bias is None and self.boost is None and self.groups is None

    def plain(self) -> Edits:
        """Scale and softcap alone: what the unedited rows get."""
        return Edits(self.scale, self.softcap)


def resolve_rows(rows: tuple[int, int | None] | None, num_queries: int) -> tuple[int, int]:
    """`rows` as 0 <= start <= stop <= num_queries; raises TypeError or ValueError for anything but a slice's pair."""
    if rows is None:
        return 0, num_queries
    if not (
        isinstance(rows, tuple) and len(rows) == 2 and isinstance(rows[0], int) and isinstance(rows[1], int | None)
    ):
        raise TypeError(f"rows must be None or a pair (start, stop) of integers, stop may be None; got {rows!r}")
    start, stop = (_position(end, num_queries) for end in (rows[0], num_queries if rows[1] is None else rows[1]))
    if not -num_queries <= rows[0] <= num_queries or stop < start:
        raise ValueError(f"rows must lie within the {num_queries} query rows with start <= stop, got {rows!r}")
    return start, stop


def _position(end: int, length: int) -> int:
    """`end` of a slice as a position; slice.indices does this, but torch 2.11 can't trace it."""
    return min(max(end + length if end < 0 else end, 0), length)


def check_broadcast(name: str, tensor: Tensor, wanted: Iterable[tuple[str, int, bool]]) -> None:
    """Raise ValueError unless each axis has its size, or 1 where it may be broadcast."""
    axes = list(wanted)
    fits = all(size == want or (may_be_one and size == 1) for size, (_, want, may_be_one) in zip(tensor.shape, axes))
    if not fits:
        told = ", ".join(f"{axis}={want}{' or 1' if may_be_one else ''}" for axis, want, may_be_one in axes)
        raise ValueError(f"{name} must have the shape [{told}], got {tuple(tensor.shape)}")


def check_visibility(visibility: Visibility, query: Tensor, key: Tensor) -> Visibility:
    """Check every field against query [B, Nq, H, D] and key [B, Nk, Hkv, D]; returns it with query_offset resolved.

    Raises TypeError or ValueError, naming the field.
    """
    if not isinstance(visibility, Visibility):
        raise TypeError(f"visibility must be a Visibility, got {type(visibility).__name__}")
    batch, num_queries, num_heads, _ = query.shape
    num_keys = key.shape[1]
    if visibility.window_size is not None:
        check_range("window_size", visibility.window_size, 1)
    over_keys = [("B", batch, True), ("Nk", num_keys, False)]
    if visibility.key_mask is not None:
        check_tensor("key_mask", visibility.key_mask, 2, [torch.bool])
        check_broadcast("key_mask", visibility.key_mask, over_keys)
    if visibility.span_ids is not None:
        check_tensor("span_ids", visibility.span_ids, 2, [torch.int8, torch.int16, torch.int32, torch.int64])
        check_broadcast("span_ids", visibility.span_ids, over_keys)
    if visibility.mask is not None:
        check_tensor("mask", visibility.mask, 4, [torch.bool, *FLOATS])
        axes = [("B", batch, True), ("H", num_heads, True), ("Nq", num_queries, False), ("Nk", num_keys, False)]
        check_broadcast("mask", visibility.mask, axes)
    check_same("device", query=query, key_mask=visibility.key_mask, span_ids=visibility.span_ids, mask=visibility.mask)
    return visibility.resolved(num_queries, num_keys)


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check layout, heads, dtype and device of [B, N, heads, head_dim] tensors; raises TypeError or ValueError.

    Returns them in autocast's dtype where autocast is on.
    """
    check_tensor("query", query, 4, FLOATS)
    check_tensor("key", key, 4, FLOATS)
    check_tensor("value", value, 4, FLOATS)
    query, key, value = (tensor for tensor in autocast(query, key, value) if tensor is not None)
    check_same("dtype", query=query, key=key, value=value)
    check_same("device", query=query, key=key, value=value)
    (batch, _, num_heads, head_dim), num_heads_kv = query.shape, key.shape[2]
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"key must be [B={batch}, Nk, Hkv, D={head_dim}] as query is {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if num_heads_kv == 0 or num_heads % num_heads_kv:
        raise ValueError(f"query's heads must be a multiple of key's, got {num_heads} and {num_heads_kv}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be [B, Nk, Hkv, Dv] with {tuple(key.shape[:3])} first, got {tuple(value.shape)}")
    check_range("query.shape[-1] (head_dim)", head_dim, *HEAD_DIMS)
    check_range("value.shape[-1] (head_dim)", value.shape[-1], *HEAD_DIMS)
    return query, key, value


def check_edits(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    key_bias: Tensor | None,
    boost: Tensor | None,
    groups: Tensor | None = None,
    num_groups: int | None = None,
) -> Edits:
    """The edits as one value, each checked against query and key; raises TypeError or ValueError by name."""
    batch, _, num_heads, head_dim = query.shape
    axes = [("B", batch, True), ("H", num_heads, True), ("Nk", key.shape[1], False)]
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for none, got {softcap!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    for name, tensor in (("key_bias", key_bias), ("boost", boost)):
        if tensor is not None:
            check_tensor(name, tensor, 3, FLOATS)
            check_broadcast(name, tensor, axes)
    if (groups is None) != (num_groups is None):
        raise ValueError(
            f"groups and num_groups go together, got groups={type(groups).__name__}, num_groups={num_groups!r}"
        )
    if groups is not None and num_groups is not None:
        check_tensor("groups", groups, 3, [torch.uint8])
        check_broadcast("groups", groups, axes)
        check_range("num_groups", num_groups, 1, MAX_GROUPS)
    check_same("device", query=query, key_bias=key_bias, boost=boost, groups=groups)
    scale = head_dim**-0.5 if scale is None else float(scale)
    return Edits(scale, softcap, float(temperature), key_bias, boost, groups, num_groups or 1)
