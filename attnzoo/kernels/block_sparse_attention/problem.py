"""What is asked of block-sparse attention: the operator's arguments by name, and the checks of the public ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_same, check_tensor
from attnzoo.kernels.block_sparse_attention.sparsity import BlockSparsity
from attnzoo.kernels.edited_attention.problem import check_inputs

NAME = "block_sparse_attention"


class Call(NamedTuple):
    """The operator's arguments: tensors (counts to tiles: `BlockSparsity`; by_key_*: its `by_key`), then options.

    query_order, key_order: int32 [H or 1, Nq], [Hkv or 1, Nk]. query_int8, key_int8, query_scale, key_scale: see
    `quantise`; given together or not at all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    counts: Tensor
    indices: Tensor
    tile_ids: Tensor | None
    tiles: Tensor | None
    by_key_counts: Tensor | None
    by_key_indices: Tensor | None
    by_key_tile_ids: Tensor | None
    key_mask: Tensor | None
    query_order: Tensor | None
    key_order: Tensor | None
    query_int8: Tensor | None
    key_int8: Tensor | None
    query_scale: Tensor | None
    key_scale: Tensor | None
    block_q: int
    block_k: int
    is_causal: bool
    scale: float
    skip_threshold: float | None
    backend: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of softmax statistics, and of lse: float32, or float64 where the inputs are float64."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def sparsity(self) -> BlockSparsity:
        """The lists as the value that they came from."""
        num_tokens, sizes = (self.query.shape[1], self.key.shape[1]), (self.block_q, self.block_k)
        order = self.query_order, self.key_order
        return BlockSparsity(self.counts, self.indices, *num_tokens, sizes, self.tile_ids, self.tiles, *order)


@dataclass(frozen=True)
class Problem:
    """What decides which back end can serve a call; `reasons` functions read it."""

    batch: int
    head_dim: int
    head_dim_v: int
    block_size: tuple[int, int]
    dtype: torch.dtype
    device_type: str
    skips: bool
    qk_int8: bool
    requires_grad: bool
    return_lse: bool


@dataclass(frozen=True, eq=False)
class Arguments:
    """The public function's arguments, checked; query, key and value in autocast's dtype."""

    query: Tensor
    key: Tensor
    value: Tensor
    sparsity: BlockSparsity
    scale: float
    key_mask: Tensor | None
    is_causal: bool
    skip_threshold: float | None
    qk_int8: bool
    return_lse: bool

    @property
    def requires_grad(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))

    @property
    def problem(self) -> Problem:
        """What `reasons` functions ask about."""
        return Problem(
            self.query.shape[0],
            self.query.shape[3],
            self.value.shape[3],
            self.sparsity.block_size,
            self.query.dtype,
            self.query.device.type,
            self.skip_threshold is not None,
            self.qk_int8,
            self.requires_grad,
            self.return_lse,
        )


def _number(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _ordered(sparsity: BlockSparsity, query_order: Tensor | None, key_order: Tensor | None) -> BlockSparsity:
    """The sparsity with the call's orders in the place of those that it has not."""
    for name, given in (("query_order", query_order), ("key_order", key_order)):
        if given is not None and getattr(sparsity, name) is not None:
            raise ValueError(f"{name} is given twice: the sparsity was cut along an order of its own")
    if query_order is None and key_order is None:
        return sparsity
    own = sparsity.query_order, sparsity.key_order
    check_same("device", query_order=query_order, key_order=key_order, **{"sparsity.indices": sparsity.indices})
    return sparsity.with_orders(
        own[0] if query_order is None else query_order, own[1] if key_order is None else key_order
    )


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparsity: BlockSparsity,
    scale: float | None = None,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    skip_threshold: float | None = None,
    qk_int8: bool = False,
    return_lse: bool = False,
) -> Arguments:
    """The public function's arguments as one value; raises TypeError, ValueError or UnsupportedError by name."""
    query, key, value = check_inputs(query, key, value)
    if not isinstance(sparsity, BlockSparsity):
        raise TypeError(f"sparsity must be a BlockSparsity, got {type(sparsity).__name__}")
    (batch, num_queries, num_heads, head_dim), (num_keys, num_heads_kv) = query.shape, key.shape[1:3]
    for name, wanted, got in (
        ("num_queries", sparsity.num_queries, num_queries),
        ("num_keys", sparsity.num_keys, num_keys),
    ):
        if wanted != got:
            raise ValueError(f"sparsity.{name} is {wanted}, but the tensors have {got}")
    for name, axis, tokens in (("batch", 0, batch), ("heads", 1, num_heads)):
        size = sparsity.indices.shape[axis]
        if size not in (1, tokens):
            raise ValueError(f"sparsity must have {name} 1 or {tokens} as query has, got {size}")
    sparsity = _ordered(sparsity, query_order, key_order)
    for name, order, heads in (
        ("query_order", sparsity.query_order, num_heads),
        ("key_order", sparsity.key_order, num_heads_kv),
    ):
        if order is not None and order.shape[0] not in (1, heads):
            raise ValueError(f"{name} must be for 1 or {heads} heads, got {order.shape[0]}")
    if key_mask is not None:
        check_tensor("key_mask", key_mask, 2, [torch.bool])
        if key_mask.shape[0] not in (1, batch) or key_mask.shape[1] != num_keys:
            raise ValueError(f"key_mask must be [B={batch} or 1, Nk={num_keys}], got {tuple(key_mask.shape)}")
    check_same("device", query=query, key_mask=key_mask, **{"sparsity.indices": sparsity.indices})
    scale = _number("scale", scale)
    skip_threshold = _number("skip_threshold", skip_threshold)
    if skip_threshold is not None and skip_threshold <= 0:
        raise ValueError(f"skip_threshold must be above 0, in units of the logits, got {skip_threshold!r}")
    arguments = Arguments(
        query,
        key,
        value,
        sparsity,
        head_dim**-0.5 if scale is None else scale,
        key_mask,
        _flag("is_causal", is_causal),
        skip_threshold,
        _flag("qk_int8", qk_int8),
        _flag("return_lse", return_lse),
    )
    named = [n for n, on in (("skip_threshold", skip_threshold is not None), ("qk_int8", qk_int8)) if on]
    if named and arguments.requires_grad:
        raise UnsupportedError(f"{NAME}: {' and '.join(named)} are for inference and have no gradient")
    return arguments
