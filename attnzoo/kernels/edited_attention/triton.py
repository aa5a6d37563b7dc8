"""Edited attention in Triton, forward; the backward is `backward.py`, on any device.

A program owns a tile of rows of one kv head (the query heads that share it are folded into the rows, so that a decoding
step reads the cache once), one key group and one share of the keys. It walks the key tiles that causality and window
leave, skips those without a key of its group before it reads them, edits the logits in registers and keeps an online
softmax. Keys of one group mostly lie together (an image's tokens), so that G groups cost little more than one pass; in
the worst case, groups that alternate key by key, they cost G. With few rows the keys are shared out over several
programs, whose parts are joined by their lse.

Sources: Dao, FlashAttention-2 (2023) and Flash-Decoding (2023). Importing this module imports triton: do it lazily.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.aot import Case
from attnzoo.kernels.dispatch import interpreting
from attnzoo.kernels.edited_attention.problem import Edits, Visibility
from attnzoo.kernels.edited_attention.reference import softmax_parts
from attnzoo.kernels.launch import launch, vendor
from attnzoo.kernels.triton_shared import (
    LN2,
    LOG2E,
    load_rows,
    on_device,
    online_softmax,
    precision,
    store_rows,
)

# (rows, keys, warps, stages) by element size and the power of two, from 32, that holds both head dims.
TILES = {
    "cuda": {
        2: {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 16, 8, 2)},
        4: {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 4, 2)},
    },
    # A call with so many edits that the threads of the tiles above would run out of registers.
    "cuda, laden": {
        2: {32: (32, 64, 8, 2), 64: (32, 64, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
        4: {32: (32, 32, 8, 1), 64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    # Holds every edit: a thread of 4 warps has 512 registers, of 8 warps 256. One stage, for 64 KiB of shared memory.
    "hip": {
        2: {32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (64, 16, 4, 1)},
        4: {32: (64, 32, 4, 1), 64: (64, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 4, 1)},
    },
}
FILL_PROGRAMS = 256  # programs that keep a large GPU busy: below it, keys are shared out
MIN_SHARE = 256  # keys that are worth a program of their own

# Sizes that change from step to step: specialising on them would compile anew while a text grows.
VARYING = ["num_rows", "num_keys", "offset", "window", "splits", "span_b", "real_b", "bias_b", "bias_h", "boost_b"]
VARYING += ["boost_h", "group_b", "group_h", "mask_b", "mask_h", "mask_i"]


@triton.jit
def per_key(
    pointer, b, head, kv_head, n, inside, stride_b, stride_h, stride_n, KIND: tl.constexpr, OTHER: tl.constexpr
):
    """[1, keys] or [rows, keys] of a tensor [B, H, Nk]; KIND "row": query heads of one program differ."""
    pointer += b.to(tl.int64) * stride_b
    if KIND == "row":
        at = head[:, None] * stride_h + n[None, :] * stride_n
        read = tl.load(pointer + at, mask=inside[None, :], other=OTHER)
    else:
        pointer += kv_head.to(tl.int64) * stride_h
        read = tl.load(pointer + n * stride_n, mask=inside, other=OTHER)[None, :]
    return read


@triton.jit(do_not_specialize=VARYING)
def edited_forward(
    query, key, value, real, spans, mask, bias, boost, groups, out, lse,
    scale, softcap, temperature, num_batches, num_rows, num_keys, heads_kv, num_groups, splits, offset, window,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
    bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    REPEATS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, REAL: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, BOOST: tl.constexpr, GROUPS: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output and lse of one tile of rows, one key group, one share of the keys; arguments as `forward` gives them.

    BIAS, BOOST, GROUPS: "none", "key" or "row", see `per_key`; MASK: "none", "bool" or "float".
    """
    tile = tl.program_id(0) * BM
    b = tl.program_id(1) // heads_kv
    kv_head = tl.program_id(1) % heads_kv
    group = tl.program_id(2) // splits
    split = tl.program_id(2) % splits
    m = tile + tl.arange(0, BM)
    i = m // REPEATS
    head = kv_head * REPEATS + m % REPEATS
    valid = i < num_rows
    place = offset + i

    low = tile * 0
    high = low + num_keys
    if not SPANS:
        first = offset + tile // REPEATS
        last = offset + tl.minimum((tile + BM - 1) // REPEATS, num_rows - 1)
        if WINDOW:
            low = tl.maximum(first - window + 1, 0)
            high = tl.minimum(high, last + window)
        if CAUSAL:
            high = tl.minimum(high, last + 1)
    low = low // BN * BN
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BN), splits) * BN
    low += split * share
    high = tl.minimum(high, low + share)

    query += b.to(tl.int64) * q_b
    key += b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    q = load_rows(query, i.to(tl.int64) * q_n + head.to(tl.int64) * q_h, valid, DIM, BLOCK_D, UPCAST)
    if SPANS:
        known = valid & (place >= 0) & (place < num_keys)
        own_span = tl.load(spans + b.to(tl.int64) * span_b + place.to(tl.int64) * span_n, mask=known, other=-1)

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    # A tile's corner is a 64-bit scalar, what lies within it 32-bit: half the registers of 64-bit tiles of pointers.
    key += low.to(tl.int64) * k_n
    value += low.to(tl.int64) * v_n
    within_k = tl.arange(0, BN) * k_n
    within_v = tl.arange(0, BN) * v_n
    for start in tl.range(low, high, BN):
        n = start + tl.arange(0, BN)
        inside = n < high
        seen = inside[None, :] & valid[:, None]
        if GROUPS != "none":
            number = per_key(groups, b, head, kv_head, n, inside, group_b, group_h, group_n, GROUPS, 255)
            member = inside[None, :] & (number == group)
            seen = seen & member
            busy = tl.max(tl.max(member.to(tl.int32), 1), 0) > 0
        else:
            busy: tl.constexpr = True  # type: ignore[no-redef]  # no branch, so that the loop can be pipelined
        if busy:
            k = load_rows(key, within_k, inside, DIM, BLOCK_D, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if SOFTCAP:
                s = softcap * (1 - 2 / (tl.math.exp2(s * (2 * LOG2E / softcap)) + 1))
            if BOOST != "none":
                factor = per_key(boost, b, head, kv_head, n, inside, boost_b, boost_h, boost_n, BOOST, 0.0)
                s += factor.to(tl.float32) * tl.abs(s)
            if BIAS != "none":
                added = per_key(bias, b, head, kv_head, n, inside, bias_b, bias_h, bias_n, BIAS, 0.0)
                s += added.to(tl.float32)
            if MASK != "none":
                at = i.to(tl.int64) * mask_i + head.to(tl.int64) * mask_h + b.to(tl.int64) * mask_b
                given = tl.load(mask + at[:, None] + n[None, :] * mask_n, mask=seen, other=0)
                if MASK == "bool":
                    seen = seen & (given != 0)
                else:
                    s += given.to(tl.float32)
            if CAUSAL or WINDOW:
                plain = inside[None, :] & valid[:, None]
                if CAUSAL:
                    plain = plain & (n[None, :] <= place[:, None])
                if WINDOW:
                    plain = plain & (n[None, :] - place[:, None] < window) & (place[:, None] - n[None, :] < window)
                if SPANS:
                    span = tl.load(spans + b.to(tl.int64) * span_b + n * span_n, mask=inside, other=-1)
                    plain = plain | ((own_span[:, None] == span[None, :]) & (own_span[:, None] >= 0))
                seen = seen & plain
            if REAL:
                kept = tl.load(real + b.to(tl.int64) * real_b + n * real_n, mask=inside, other=0)
                seen = seen & (kept[None, :] != 0)
            logits = tl.where(seen, s * (LOG2E / temperature), float("-inf"))
            v = load_rows(value, within_v, inside, DIM_V, BLOCK_DV, UPCAST)
            top, total, acc = online_softmax(logits, v, top, total, acc, PRECISION)
        key += BN * k_n
        value += BN * v_n

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    natural = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN2)
    row = ((split * num_batches + b).to(tl.int64) * num_rows + i) * (heads_kv * REPEATS) + head
    row = row * num_groups + group
    store_rows(out, row * DIM_V, valid, acc, DIM_V, BLOCK_DV)
    tl.store(lse + row, natural, mask=valid)


def reasons(problem: tuple[Tensor, Tensor, Tensor, Visibility, Edits]) -> list[str]:
    """Why the Triton kernel can't serve a problem; an empty list where it can."""
    dtype = problem[0].dtype
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return []
    return [f"triton computes float32, float16 and bfloat16; got {str(dtype).removeprefix('torch.')}"]


def _strides(tensor: Tensor | None, names: str) -> dict[str, int]:
    """The named strides of a tensor, 0 along axes of size 1 (broadcast) and for no tensor."""
    listed = names.split()
    if tensor is None:
        return dict.fromkeys(listed, 0)
    return {n: (stride if size > 1 else 0) for n, size, stride in zip(listed, tensor.shape, tensor.stride())}


def _kind(tensor: Tensor | None, repeats: int) -> str:
    """How `per_key` reads a [B or 1, H or 1, Nk] tensor."""
    if tensor is None:
        return "none"
    return "row" if tensor.shape[1] > 1 and repeats > 1 else "key"


def _tiles(query: Tensor, visibility: Visibility, edits: Edits, repeats: int) -> dict[int, tuple[int, int, int, int]]:
    """The part of TILES that a call takes, by head dim.

    Registers go to what has the shape of the logits: a mask or spans make a call laden, a tensor read by "row" counts
    as two edits, and float32 products, which run on the ordinary units, leave room for one edit instead of two.
    """
    size = query.element_size()
    if vendor() == "hip":
        return TILES["hip"][size]
    kinds = [_kind(tensor, repeats) for tensor in (edits.key_bias, edits.boost, edits.groups)]
    by_key = [visibility.window_size, visibility.key_mask, edits.softcap]
    count = 2 * kinds.count("row") + kinds.count("key") + sum(given is not None for given in by_key)
    laden = visibility.mask is not None or visibility.span_ids is not None or count > (2 if size == 2 else 1)
    return TILES["cuda, laden" if laden else "cuda"][size]


def _bytes(tensor: Tensor | None) -> Tensor | None:
    """A bool tensor as bytes; anything else as it is."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


def grouped(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, edits: Edits) -> tuple[Tensor, Tensor]:
    """group_output [B, R, H, G, Dv] in query's dtype and group_lse [B, R, H, G] float32, of all of query's rows."""
    batch, num_rows, num_heads, dim = query.shape
    num_keys, heads_kv, dim_v = value.shape[1:]
    repeats, num_groups = num_heads // heads_kv, edits.num_groups
    shape = (batch, num_rows, num_heads, num_groups)
    out = torch.empty((*shape, dim_v), dtype=query.dtype, device=query.device)
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    blocks = {name: max(16, triton.next_power_of_2(d)) for name, d in (("BLOCK_D", dim), ("BLOCK_DV", dim_v))}
    most_rows, keys, num_warps, num_stages = _tiles(query, visibility, edits, repeats)[max(32, *blocks.values())]
    rows = min(most_rows, max(16, triton.next_power_of_2(num_rows * repeats)))
    if rows == 16 < most_rows:
        num_warps = min(num_warps, 4)
    programs = triton.cdiv(num_rows * repeats, rows) * batch * heads_kv * num_groups
    splits = max(1, min(triton.cdiv(num_keys, MIN_SHARE), FILL_PROGRAMS // programs))
    mask, real = _bytes(visibility.mask), _bytes(visibility.key_mask)
    mask_kind = "none" if mask is None else "bool" if mask.dtype == torch.uint8 else "float"
    into, into_lse = out, lse
    if splits > 1:
        into = torch.empty((splits, *out.shape), dtype=torch.float32, device=query.device)
        into_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=query.device)
    arguments: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "real": query if real is None else real,
        "spans": query if visibility.span_ids is None else visibility.span_ids,
        "mask": query if mask is None else mask,
        "bias": query if edits.key_bias is None else edits.key_bias,
        "boost": query if edits.boost is None else edits.boost,
        "groups": query if edits.groups is None else edits.groups,
        "out": into,
        "lse": into_lse,
        "scale": edits.scale,
        "softcap": edits.softcap or 1.0,
        "temperature": edits.temperature,
        "num_batches": batch,
        "num_rows": num_rows,
        "num_keys": num_keys,
        "heads_kv": heads_kv,
        "num_groups": num_groups,
        "splits": splits,
        "offset": visibility.query_offset,
        "window": visibility.window_size or 0,
        **_strides(query, "q_b q_n q_h"),
        **_strides(key, "k_b k_n k_h"),
        **_strides(value, "v_b v_n v_h"),
        **_strides(real, "real_b real_n"),
        **_strides(visibility.span_ids, "span_b span_n"),
        **_strides(mask, "mask_b mask_h mask_i mask_n"),
        **_strides(edits.key_bias, "bias_b bias_h bias_n"),
        **_strides(edits.boost, "boost_b boost_h boost_n"),
        **_strides(edits.groups, "group_b group_h group_n"),
        "REPEATS": repeats,
        "DIM": dim,
        "DIM_V": dim_v,
        **blocks,
        "CAUSAL": visibility.is_causal,
        "WINDOW": visibility.window_size is not None,
        "REAL": real is not None,
        "SPANS": visibility.span_ids is not None and (visibility.is_causal or visibility.window_size is not None),
        "MASK": mask_kind,
        "BIAS": _kind(edits.key_bias, repeats),
        "BOOST": _kind(edits.boost, repeats),
        "GROUPS": _kind(edits.groups, repeats),
        "SOFTCAP": edits.softcap is not None,
        "UPCAST": interpreting() and query.dtype == torch.bfloat16,
        "PRECISION": precision(),
        "BM": rows,
        "BN": keys,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    grid = (triton.cdiv(num_rows * repeats, rows), batch * heads_kv, num_groups * splits)
    with on_device(query):
        launch(edited_forward, grid, **arguments)
    if splits > 1:
        shares, whole = softmax_parts(into_lse.movedim(0, -1))
        out.copy_((into * shares.movedim(-1, 0)[..., None]).sum(0))
        lse.copy_(whole)
    return out, lse


# ------------------------------------------------------------------------------------------- compiled ahead of time


def _call_on_meta(dtype: torch.dtype, num_rows: int, head_dim: int, edited: str) -> None:
    """One call on tensors without memory; edited: what it is given, by name."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, num_keys, heads, heads_kv = 2, 2048, 32, 8
    key = make(batch, heads_kv, num_keys, head_dim, dtype=dtype).transpose(1, 2)
    query = make(batch, num_rows, heads, head_dim, dtype=dtype)
    everything, groups = edited == "everything", edited in ("groups", "everything")
    visibility = Visibility(
        is_causal=edited != "mask",
        query_offset=num_keys - num_rows,
        window_size=1024 if everything else None,
        key_mask=make(batch, num_keys, dtype=torch.bool) if everything else None,
        span_ids=make(batch, num_keys, dtype=torch.int64) if everything else None,
        mask=make(batch, 1, num_rows, num_keys, dtype=torch.bool) if edited == "mask" else None,
    )
    edits = Edits(
        scale=head_dim**-0.5,
        softcap=50.0 if everything else None,
        key_bias=make(1, heads, num_keys) if edited in ("bias by head", "everything") else None,
        boost=make(batch, 1, num_keys) if edited in ("boost", "mask", "everything") else None,
        groups=make(batch, 1, num_keys, dtype=torch.uint8) if groups else None,
        num_groups=4 if groups else 1,
    )
    grouped(query, key, key, visibility, edits)


AOT = [
    Case(
        f"{str(dtype).removeprefix('torch.')} d{head_dim} {'decode' if num_rows == 1 else 'rows'} {edited}",
        functools.partial(_call_on_meta, dtype, num_rows, head_dim, edited),
        quick=(dtype, num_rows, head_dim, edited) == (torch.float16, 512, 64, "everything"),
    )
    for dtype, num_rows, head_dim, edited in (
        (torch.bfloat16, 512, 128, "boost"),
        (torch.bfloat16, 512, 128, "groups"),
        (torch.bfloat16, 512, 128, "bias by head"),
        (torch.bfloat16, 512, 128, "everything"),
        (torch.bfloat16, 1, 128, "boost"),
        (torch.bfloat16, 1, 128, "groups"),
        (torch.bfloat16, 1, 128, "mask"),
        (torch.bfloat16, 512, 256, "groups"),
        (torch.float16, 512, 64, "groups"),
        (torch.float16, 512, 64, "everything"),
        (torch.float16, 512, 80, "groups"),
        (torch.float32, 512, 64, "groups"),
        (torch.float32, 512, 128, "groups"),
        (torch.float32, 1, 256, "groups"),
    )
]
