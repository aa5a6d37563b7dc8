"""What the Triton kernels of all operations share: rows in and out, the online softmax, and how to launch.

Importing this module imports triton, so it is itself imported lazily, by the operations' own Triton modules.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.launch import vendor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def within(k, first, last):
    """first <= k < last with one comparison: as unsigned numbers, k below first is larger than any width."""
    return (k - first).to(tl.uint32, bitcast=True) < (last - first).to(tl.uint32, bitcast=True)


@triton.jit
def load_rows(pointer, offsets, valid, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of COLUMNS contiguous elements as a tile [rows, BLOCK], zero where invalid or beyond COLUMNS.

    UPCAST is for the interpreter, whose bfloat16 arithmetic is wrong.
    """
    column = tl.arange(0, BLOCK)
    mask = valid[:, None]
    if COLUMNS != BLOCK:
        mask = mask & (column[None, :] < COLUMNS)
    tile = tl.load(pointer + offsets[:, None] + column[None, :], mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(pointer, offsets, valid, tile, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_rows`, in the pointer's dtype."""
    column = tl.arange(0, BLOCK)
    mask = valid[:, None]
    if COLUMNS != BLOCK:
        mask = mask & (column[None, :] < COLUMNS)
    tl.store(pointer + offsets[:, None] + column[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def softmax_step(logits, top, total):
    """Base-2 logits [BM, BN] into running maximum and sum; also the weights, and the factor of what came before."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have met no key yet
    p = tl.math.exp2(logits - safe[:, None])
    fade = tl.math.exp2(top - safe)
    return new_top, total * fade + tl.sum(p, 1), p, fade


@triton.jit
def online_softmax(logits, v, top, total, acc, PRECISION: tl.constexpr):
    """One step: base-2 logits [BM, BN] and values [BN, DV] into running maximum, sum and weighted values."""
    top, total, p, fade = softmax_step(logits, top, total)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return top, total, acc


@triton.jit
def load_lse(lse, rows, valid):
    """Base-2 lse per query; +inf where a query saw no key, so that its weights are 0 and not NaN."""
    natural = tl.load(lse + rows, mask=valid, other=float("-inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural * LOG2E)


@triton.jit
def load_statistics(lse, delta, rows, valid):
    """`load_lse`, and delta per query."""
    return load_lse(lse, rows, valid), tl.load(delta + rows, mask=valid, other=0.0)


def precision() -> str:
    """float32 products are exact (IEEE) unless torch itself was told to use TF32 for its matrix products."""
    if vendor() == "hip":  # Triton has no TF32 there
        return "ieee"
    switches: Any = torch.backends
    asked = switches.cuda.matmul.fp32_precision
    if asked == "none":  # not set by itself: it follows the general switch
        asked = switches.fp32_precision
    return "tf32" if asked == "tf32" else "ieee"


def wide(*tensors: Tensor | None) -> bool:
    """Whether an offset within one batch item of any of the tensors can pass 2^31 - 1."""
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(t.shape[1:], t.stride()[1:])) >= 2**31 - 1
        for t in tensors
        if t is not None
    )


def on_device(tensor: Tensor) -> Any:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device_of(tensor)
