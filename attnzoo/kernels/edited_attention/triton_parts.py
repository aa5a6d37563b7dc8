"""What the Triton kernels of edited attention share: which keys a tile sees, how its logits are edited, the arguments.

All kernels hold a tile of logits as [rows, keys]. `walk` gives the keys that a tile of rows can see, `rows_seeing` the
rows that can see a tile of keys; `edited_logits` is the formula of the package's docstring on one tile.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.dispatch import interpreting
from attnzoo.kernels.edited_attention.problem import Edits, Visibility
from attnzoo.kernels.launch import launch, vendor
from attnzoo.kernels.triton_shared import LOG2E, load_rows, precision

# Sizes that change from step to step: specialising on them would compile anew while a text grows.
VARYING = ["num_rows", "num_keys", "offset", "window", "splits", "span_b", "real_b", "bias_b", "bias_h", "boost_b"]
VARYING += ["boost_h", "group_b", "group_h", "mask_b", "mask_h", "mask_i"]


@triton.jit
def products(
    a, b, a_pointer, a_offsets, a_valid, b_pointer, b_offsets, b_valid,
    DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T, [rows of a, rows of b], of two tiles [rows, BLOCK] that `load_rows` reads from the pointers given.

    CHUNK < BLOCK: read again, CHUNK columns at a time. float32 products run on NVIDIA's ordinary units, where a thread
    holds whole rows of both: 256 columns are more than it has registers.
    """
    if CHUNK == BLOCK:
        found = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        found = tl.zeros([a_valid.shape[0], b_valid.shape[0]], tl.float32)
        for c in tl.static_range(0, BLOCK, CHUNK):
            if c < DIM:
                some_a = load_rows(a_pointer + c, a_offsets, a_valid, min(DIM - c, CHUNK), CHUNK, UPCAST)
                some_b = load_rows(b_pointer + c, b_offsets, b_valid, min(DIM - c, CHUNK), CHUNK, UPCAST)
                found = tl.dot(some_a, tl.trans(some_b), found, input_precision=PRECISION)
    return found


@triton.jit
def of_batch(
    b, real, spans, mask, bias, boost, groups, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
    bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
):  # fmt: skip
    """real, spans, mask, bias, boost, groups of one batch entry, each a pointer and its strides by head, row, key."""
    b = b.to(tl.int64)
    return (
        (real + b * real_b, real_n),
        (spans + b * span_b, span_n),
        (mask + b * mask_b, mask_h, mask_i, mask_n),
        (bias + b * bias_b, bias_h, bias_n),
        (boost + b * boost_b, boost_h, boost_n),
        (groups + b * group_b, group_h, group_n),
    )


@triton.jit
def per_key(given, head, one_head, n, inside, KIND: tl.constexpr, OTHER: tl.constexpr):
    """[1, keys] or [rows, keys] of a tensor [H, Nk], given as (pointer, stride_h, stride_n).

    KIND "row": the rows belong to several query heads, `head` says which; "key": to one_head, or the tensor has one.
    """
    pointer, stride_h, stride_n = given
    if KIND == "row":
        at = head[:, None] * stride_h + n[None, :] * stride_n
        read = tl.load(pointer + at, mask=inside[None, :], other=OTHER)
    else:
        pointer += one_head.to(tl.int64) * stride_h
        read = tl.load(pointer + n * stride_n, mask=inside, other=OTHER)[None, :]
    return read


@triton.jit
def groups_present(number, first, COUNT: tl.constexpr):
    """Bit g is set where group first + g, g < COUNT, has a key in a tile of group numbers."""
    own = number.to(tl.int32) - first
    bits = tl.where((own >= 0) & (own < COUNT), 1 << tl.minimum(tl.maximum(own, 0), COUNT), 0)
    return tl.reduce_or(tl.reduce_or(bits, 1), 0)


@triton.jit
def walk(first, last, window, num_keys, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr):
    """low, high: rows at the places first..last see keys low..high-1 at most; spans may reach anywhere."""
    low = first * 0
    high = low + num_keys
    if not SPANS:
        if WINDOW:
            low = tl.maximum(first - window + 1, 0)
            high = tl.minimum(high, last + window)
        if CAUSAL:
            high = tl.minimum(high, last + 1)
    return low, high


@triton.jit
def rows_seeing(first, last, offset, window, num_rows, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr):
    """low, high: keys first..last are seen by rows low..high-1 at most; the inverse of `walk`."""
    low = first * 0
    high = low + num_rows
    if not SPANS:
        if WINDOW:
            low = tl.maximum(first - window + 1 - offset, 0)
            high = tl.minimum(high, last + window - offset)
        if CAUSAL:
            low = tl.maximum(first - offset, low)
    return low, high


@triton.jit
def span_of(spans, place, valid, num_keys, SPANS: tl.constexpr):
    """The spans of rows, by their places on the key axis; -1 for none, and for rows beyond the keys."""
    own = place * 0 - 1
    if SPANS:
        pointer, stride_n = spans
        known = valid & (place >= 0) & (place < num_keys)
        own = tl.load(pointer + place.to(tl.int64) * stride_n, mask=known, other=-1)
    return own


@triton.jit
def edited_logits(
    s, i, head, one_head, place, own_span, valid, n, inside, given, softcap, temperature, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, REAL: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, BOOST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """From scaled products s [rows, keys]: (capped products, edited base-2 logits, -inf where a key is not seen).

    given: from `of_batch`. BIAS, BOOST: "none", "key" or "row", see `per_key`; MASK: "none", "bool" or "float".
    """
    real, spans, mask, bias, boost, _ = given
    if SOFTCAP:
        s = softcap * (1 - 2 / (tl.math.exp2(s * (2 * LOG2E / softcap)) + 1))
    z = s
    if BOOST != "none":
        z += per_key(boost, head, one_head, n, inside, BOOST, 0.0).to(tl.float32) * tl.abs(s)
    if BIAS != "none":
        z += per_key(bias, head, one_head, n, inside, BIAS, 0.0).to(tl.float32)
    seen = inside[None, :] & valid[:, None]
    if CAUSAL or WINDOW:
        if CAUSAL:
            seen = seen & (n[None, :] <= place[:, None])
        if WINDOW:
            seen = seen & (n[None, :] - place[:, None] < window) & (place[:, None] - n[None, :] < window)
        if SPANS:
            pointer, stride_n = spans
            span = tl.load(pointer + n * stride_n, mask=inside, other=-1)
            together = (own_span[:, None] == span[None, :]) & (own_span[:, None] >= 0)
            seen = seen | (together & inside[None, :] & valid[:, None])
    if MASK != "none":
        pointer, stride_h, stride_i, stride_n = mask
        at = i.to(tl.int64) * stride_i + head.to(tl.int64) * stride_h
        read = tl.load(pointer + at[:, None] + n[None, :] * stride_n, mask=seen, other=0)
        if MASK == "bool":
            seen = seen & (read != 0)
        else:
            z += read.to(tl.float32)
    if REAL:
        pointer, stride_n = real
        kept = tl.load(pointer + n * stride_n, mask=inside, other=0)
        seen = seen & (kept[None, :] != 0)
    return s, tl.where(seen, z * (LOG2E / temperature), float("-inf"))


# ------------------------------------------------------------------------------------------------------- the launchers


def strides(tensor: Tensor | None, names: str) -> dict[str, int]:
    """The named strides of a tensor, 0 along axes of size 1 (broadcast) and for no tensor."""
    listed = names.split()
    if tensor is None:
        return dict.fromkeys(listed, 0)
    return {n: (stride if size > 1 else 0) for n, size, stride in zip(listed, tensor.shape, tensor.stride())}


def kind(tensor: Tensor | None, folded: int) -> str:
    """How `per_key` reads a [B or 1, H or 1, Nk] tensor where a program's rows belong to `folded` query heads."""
    if tensor is None:
        return "none"
    return "row" if tensor.shape[1] > 1 and folded > 1 else "key"


def as_bytes(tensor: Tensor | None) -> Tensor | None:
    """A bool tensor as bytes; anything else as it is."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


def blocks_of(dim: int) -> int:
    """The power of two, from 16, that holds a head dim."""
    return max(16, triton.next_power_of_2(dim))


def chunk_of(block: int, query: Tensor) -> int:
    """Columns of a tile that `products` contracts at a time."""
    return min(block, 64) if query.element_size() == 4 and vendor() == "cuda" else block


def common_arguments(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, edits: Edits, folded: int
) -> dict[str, Any]:
    """What the kernels are given beside their own tensors; `folded` as in `kind`. Absent tensors stand as query."""
    mask, real = as_bytes(visibility.mask), as_bytes(visibility.key_mask)
    repeats, dim, dim_v = query.shape[2] // key.shape[2], query.shape[3], value.shape[3]
    given: dict[str, Tensor | None] = {"query": query, "key": key, "value": value, "real": real, "mask": mask}
    given |= {"spans": visibility.span_ids, "bias": edits.key_bias, "boost": edits.boost, "groups": edits.groups}
    return {
        **{name: query if tensor is None else tensor for name, tensor in given.items()},
        "scale": edits.scale,
        "softcap": edits.softcap or 1.0,
        "temperature": edits.temperature,
        "num_rows": query.shape[1],
        "num_keys": key.shape[1],
        "heads_kv": key.shape[2],
        "num_groups": edits.num_groups,
        "offset": visibility.query_offset,
        "window": visibility.window_size or 0,
        **strides(query, "q_b q_n q_h"),
        **strides(key, "k_b k_n k_h"),
        **strides(value, "v_b v_n v_h"),
        **strides(real, "real_b real_n"),
        **strides(visibility.span_ids, "span_b span_n"),
        **strides(mask, "mask_b mask_h mask_i mask_n"),
        **strides(edits.key_bias, "bias_b bias_h bias_n"),
        **strides(edits.boost, "boost_b boost_h boost_n"),
        **strides(edits.groups, "group_b group_h group_n"),
        "REPEATS": repeats,
        "DIM": dim,
        "DIM_V": dim_v,
        "BLOCK_D": blocks_of(dim),
        "BLOCK_DV": blocks_of(dim_v),
        "CHUNK": chunk_of(blocks_of(dim), query),
        "CHUNK_V": chunk_of(blocks_of(dim_v), query),
        "CAUSAL": visibility.is_causal,
        "WINDOW": visibility.window_size is not None,
        "REAL": real is not None,
        "SPANS": visibility.span_ids is not None and (visibility.is_causal or visibility.window_size is not None),
        "MASK": "none" if mask is None else "bool" if mask.dtype == torch.uint8 else "float",
        "BIAS": kind(edits.key_bias, folded),
        "BOOST": kind(edits.boost, folded),
        "GROUPS": kind(edits.groups, folded),
        "SOFTCAP": edits.softcap is not None,
        "UPCAST": interpreting() and query.dtype == torch.bfloat16,
        "PRECISION": precision(),
    }


def launch_with(kernel: Any, programs: tuple[int, ...], common: dict[str, Any], **own: Any) -> None:
    """Launch a kernel with its own arguments and those of the common ones that it has parameters for."""
    given = {name: value for name, value in common.items() if name in kernel.arg_names}
    launch(kernel, programs, **(given | own))


def on_meta(
    dtype: torch.dtype, num_rows: int, head_dim: int, edited: str
) -> tuple[Tensor, Tensor, Tensor, Visibility, Edits]:
    """A problem on tensors without memory, for ahead-of-time compilation; edited: what it is given, by name."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, num_keys, heads, heads_kv = 2, 2048, 32, 8
    key = make(batch, heads_kv, num_keys, head_dim, dtype=dtype).transpose(1, 2)
    query = make(batch, num_rows, heads, head_dim, dtype=dtype)
    everything = edited == "everything"
    num_groups = 8 if "8 groups" in edited else 4 if "groups" in edited or everything else 1
    visibility = Visibility(
        is_causal="mask" not in edited,
        query_offset=num_keys - num_rows,
        window_size=1024 if everything else None,
        key_mask=make(batch, num_keys, dtype=torch.bool) if everything else None,
        span_ids=make(batch, num_keys, dtype=torch.int64) if everything else None,
        mask=make(batch, 1, num_rows, num_keys, dtype=torch.bool if edited == "mask" else torch.float32)
        if "mask" in edited
        else None,
    )
    edits = Edits(
        scale=head_dim**-0.5,
        softcap=50.0 if everything else None,
        key_bias=make(1, heads, num_keys) if edited in ("bias by head", "everything") else None,
        boost=make(batch, 1, num_keys) if edited in ("boost", "mask", "everything") else None,
        groups=make(batch, heads if "by head" in edited else 1, num_keys, dtype=torch.uint8)
        if num_groups > 1
        else None,
        num_groups=num_groups,
    )
    return query, key, key, visibility, edits
