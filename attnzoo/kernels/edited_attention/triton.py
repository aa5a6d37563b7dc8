"""Edited attention in Triton, forward.

A program owns a tile of rows of one kv head (the query heads that share it are folded into the rows), FOLD key groups
and one share of the keys. It walks the key tiles that causality and window leave, edits the logits of a tile once, in
registers, and keeps one online softmax per group: only the groups that have keys in the tile pay for it. FOLD is all
groups where their accumulators fit into the registers, which they do for few rows, so that a decoding step reads keys
and values once however the groups lie. Where they don't, the groups are shared out over several programs, each of which
skips the tiles without a key of its own before it reads them. With few rows the keys are shared out over several
programs too, whose parts are joined by their lse.

Sources: Dao, FlashAttention-2 (2023) and Flash-Decoding (2023). Importing this module imports triton: do it lazily.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.aot import Case
from attnzoo.kernels.edited_attention.problem import Edits, Visibility
from attnzoo.kernels.edited_attention.reference import softmax_parts
from attnzoo.kernels.edited_attention.triton_parts import (
    VARYING,
    common_arguments,
    edited_logits,
    groups_present,
    kind,
    launch_with,
    of_batch,
    on_meta,
    per_key,
    products,
    span_of,
    walk,
)
from attnzoo.kernels.launch import vendor
from attnzoo.kernels.triton_shared import (
    LN2,
    load_rows,
    on_device,
    online_softmax,
    softmax_step,
    store_rows,
)

# (rows, keys, warps, stages) by element size and the power of two, from 32, that holds both head dims.
TILES = {
    "cuda": {
        2: {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (64, 16, 8, 2)},
        4: {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    # A call with groups, or with a tensor that is read by query head.
    "cuda, grouped": {
        2: {32: (64, 64, 8, 2), 64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 16, 8, 2)},
        4: {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
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


@triton.jit
def _step(logits, v, top, total, acc, VALUES: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax; without VALUES acc stays as it is."""
    if VALUES:
        top, total, acc = online_softmax(logits, v, top, total, acc, PRECISION)
    else:
        top, total, _, _ = softmax_step(logits, top, total)
    return top, total, acc


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
    CHUNK: tl.constexpr, FOLD: tl.constexpr, SKIP: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Output and lse of one tile of rows, FOLD key groups, one share of the keys; arguments as `run` gives them.

    BIAS, BOOST, GROUPS: "none", "key" or "row", see `per_key`; MASK: "none", "bool" or "float". SKIP: the groups are
    shared out over programs. VALUES: False computes the lse alone.
    """
    tile = tl.program_id(0) * BM
    b = tl.program_id(1) // heads_kv
    kv_head = tl.program_id(1) % heads_kv
    first_group = tl.program_id(2) // splits * FOLD
    split = tl.program_id(2) % splits
    m = tile + tl.arange(0, BM)
    i = m // REPEATS
    one_head = kv_head * REPEATS
    head = one_head + m % REPEATS
    valid = i < num_rows
    place = offset + i

    last_row = tl.minimum((tile + BM - 1) // REPEATS, num_rows - 1)
    low, high = walk(offset + tile // REPEATS, offset + last_row, window, num_keys, CAUSAL, WINDOW, SPANS)
    low = low // BN * BN
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BN), splits) * BN
    low += split * share
    high = tl.minimum(high, low + share)

    query += b.to(tl.int64) * q_b
    key += b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    value += b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    given = of_batch(
        b, real, spans, mask, bias, boost, groups, real_b, real_n, span_b, span_n, mask_b, mask_h, mask_i, mask_n,
        bias_b, bias_h, bias_n, boost_b, boost_h, boost_n, group_b, group_h, group_n,
    )  # fmt: skip
    q_offsets = i.to(tl.int64) * q_n + head.to(tl.int64) * q_h
    q = load_rows(query, q_offsets, valid, DIM, BLOCK_D, UPCAST)
    own_span = span_of(given[1], place, valid, num_keys, SPANS)

    tops = (tl.full([BM], float("-inf"), tl.float32),) * FOLD
    totals = (tl.zeros([BM], tl.float32),) * FOLD
    accs = (tl.zeros([BM, BLOCK_DV], tl.float32),) * FOLD
    # A tile's corner is a 64-bit scalar, what lies within it 32-bit: half the registers of 64-bit tiles of pointers.
    key += low.to(tl.int64) * k_n
    value += low.to(tl.int64) * v_n
    within_k = tl.arange(0, BN) * k_n
    within_v = tl.arange(0, BN) * v_n
    for start in tl.range(low, high, BN):
        n = start + tl.arange(0, BN)
        inside = n < high
        number = 0
        present = 1
        if GROUPS != "none":
            number = per_key(given[5], head, one_head, n, inside, GROUPS, 255)
            present = groups_present(number, first_group, FOLD)
        if SKIP:
            busy = present != 0
        else:
            busy: tl.constexpr = True  # type: ignore[no-redef]  # no branch, so that the loop can be pipelined
        if busy:
            k = load_rows(key, within_k, inside, DIM, BLOCK_D, UPCAST)
            s = products(q, k, query, q_offsets, valid, key, within_k, inside, DIM, BLOCK_D, CHUNK, UPCAST, PRECISION)
            _, logits = edited_logits(
                s * scale, i, head, one_head, place, own_span, valid, n, inside, given, softcap, temperature, window,
                CAUSAL, WINDOW, REAL, SPANS, MASK, BIAS, BOOST, SOFTCAP,
            )  # fmt: skip
            v = load_rows(value, within_v, inside, DIM_V, BLOCK_DV, UPCAST) if VALUES else k
            new_tops = ()
            new_totals = ()
            new_accs = ()
            for g in tl.static_range(FOLD):
                top = tops[g]
                total = totals[g]
                acc = accs[g]
                own = logits
                if GROUPS != "none":
                    own = tl.where(number == first_group + g, logits, float("-inf"))
                if FOLD == 1:
                    top, total, acc = _step(own, v, top, total, acc, VALUES, PRECISION)
                else:
                    if (present >> g) & 1:
                        top, total, acc = _step(own, v, top, total, acc, VALUES, PRECISION)
                new_tops = new_tops + (top,)  # type: ignore[assignment]
                new_totals = new_totals + (total,)  # type: ignore[assignment]
                new_accs = new_accs + (acc,)  # type: ignore[assignment]
            tops = new_tops
            totals = new_totals
            accs = new_accs
        key += BN * k_n
        value += BN * v_n

    row = ((split * num_batches + b).to(tl.int64) * num_rows + i) * (heads_kv * REPEATS) + head
    row = row * num_groups + first_group
    for g in tl.static_range(FOLD):
        stored = valid & (first_group + g < num_groups)
        empty = totals[g] == 0.0
        total = tl.where(empty, 1.0, totals[g])
        if VALUES:
            store_rows(out, (row + g) * DIM_V, stored, accs[g] / total[:, None], DIM_V, BLOCK_DV)
        natural = tl.where(empty, float("-inf"), (tops[g] + tl.math.log2(total)) * LN2)
        tl.store(lse + row + g, natural, mask=stored)


def reasons(problem: tuple[Tensor, Tensor, Tensor, Visibility, Edits]) -> list[str]:
    """Why the Triton kernel can't serve a problem; an empty list where it can."""
    dtype = problem[0].dtype
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return []
    return [f"triton computes float32, float16 and bfloat16; got {str(dtype).removeprefix('torch.')}"]


def _fold(num_groups: int, rows: int, block_dv: int, num_warps: int, size: int) -> int:
    """How many key groups a program serves, evenly shared out: as many as their accumulators leave registers for.

    A tile of 16 rows holds them all (of float32 four), larger ones fewer: beyond what stands here they spill.
    """
    hip = vendor() == "hip"
    registers = 64 if rows == 16 else 0 if hip else 48 if size == 2 else 16
    most = max(1, registers * num_warps * (64 if hip else 32) // (rows * block_dv))
    if size == 4:
        most = min(most, 4)
    return triton.cdiv(num_groups, triton.cdiv(num_groups, most))


def _tiles(query: Tensor, visibility: Visibility, edits: Edits, repeats: int) -> dict[int, tuple[int, int, int, int]]:
    """The part of TILES that a call takes, by head dim.

    Registers go to what has the shape of the logits: a mask or spans make a call laden, a tensor read by "row" counts
    as two edits, and float32 products, which run on the ordinary units, leave room for one edit instead of two.
    """
    size = query.element_size()
    if vendor() == "hip":
        return TILES["hip"][size]
    kinds = [kind(tensor, repeats) for tensor in (edits.key_bias, edits.boost, edits.groups)]
    by_key = [visibility.window_size, visibility.key_mask, edits.softcap]
    count = 2 * kinds.count("row") + kinds.count("key") + sum(given is not None for given in by_key)
    laden = visibility.mask is not None or visibility.span_ids is not None or count > (2 if size == 2 else 1)
    grouped = edits.groups is not None or "row" in kinds
    return TILES["cuda, laden" if laden else "cuda, grouped" if grouped else "cuda"][size]


def run(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, edits: Edits, values: bool
) -> tuple[Tensor, Tensor]:
    """As `grouped`; without `values` the output is left out (query stands for it) and value is not read."""
    batch, num_rows, num_heads, _ = query.shape
    num_keys, heads_kv, dim_v = value.shape[1:]
    repeats, num_groups = num_heads // heads_kv, edits.num_groups
    shape = (batch, num_rows, num_heads, num_groups)
    out = torch.empty((*shape, dim_v), dtype=query.dtype, device=query.device) if values else query
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    if lse.numel() == 0:
        return out, lse
    common = common_arguments(query, key, value, visibility, edits, repeats)
    block = max(32, common["BLOCK_D"], common["BLOCK_DV"])
    most_rows, keys, num_warps, num_stages = _tiles(query, visibility, edits, repeats)[block]
    rows = min(most_rows, max(16, triton.next_power_of_2(num_rows * repeats)))
    if rows == 16 < most_rows and (edits.groups is None or vendor() == "hip"):
        num_warps = min(num_warps, 4)
    fold = _fold(num_groups, rows, common["BLOCK_DV"], num_warps, query.element_size())
    if fold > 4 and common["GROUPS"] == "row":
        keys = min(keys, 32)
    parts = triton.cdiv(num_groups, fold)
    programs = triton.cdiv(num_rows * repeats, rows) * batch * heads_kv * parts
    splits = max(1, min(triton.cdiv(num_keys, MIN_SHARE), FILL_PROGRAMS // programs))
    into, into_lse = out, lse
    if splits > 1:
        if values:
            into = torch.empty((splits, *out.shape), dtype=torch.float32, device=query.device)
        into_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=query.device)
    grid = (triton.cdiv(num_rows * repeats, rows), batch * heads_kv, parts * splits)
    with on_device(query):
        launch_with(
            edited_forward,
            grid,
            common,
            out=into,
            lse=into_lse,
            num_batches=batch,
            splits=splits,
            BM=rows,
            BN=keys,
            FOLD=fold,
            SKIP=parts > 1,
            VALUES=values,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    if splits > 1:
        shares, whole = softmax_parts(into_lse.movedim(0, -1))
        if values:
            out.copy_((into * shares.movedim(-1, 0)[..., None]).sum(0))
        lse.copy_(whole)
    return out, lse


def grouped(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, edits: Edits) -> tuple[Tensor, Tensor]:
    """group_output [B, R, H, G, Dv] in query's dtype and group_lse [B, R, H, G] float32, of all of query's rows."""
    return run(query, key, value, visibility, edits, values=True)


# ------------------------------------------------------------------------------------------- compiled ahead of time


def _call_on_meta(dtype: torch.dtype, num_rows: int, head_dim: int, edited: str) -> None:
    grouped(*on_meta(dtype, num_rows, head_dim, edited))


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
        (torch.bfloat16, 1, 128, "8 groups"),
        (torch.bfloat16, 1, 128, "groups by head"),
        (torch.bfloat16, 1, 128, "mask"),
        (torch.bfloat16, 512, 128, "8 groups"),
        (torch.bfloat16, 512, 128, "groups by head"),
        (torch.bfloat16, 512, 256, "groups"),
        (torch.float16, 512, 64, "groups"),
        (torch.float16, 512, 64, "everything"),
        (torch.float16, 512, 80, "groups"),
        (torch.float32, 512, 64, "groups"),
        (torch.float32, 512, 128, "groups"),
        (torch.float32, 1, 256, "groups"),
        (torch.float32, 1, 256, "groups by head"),
        (torch.float32, 512, 256, "groups by head"),
    )
]
