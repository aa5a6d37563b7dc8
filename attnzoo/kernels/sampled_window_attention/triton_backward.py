"""Sampled window attention in Triton, backward.

With p = exp(logits - lse) recomputed tile by tile, delta = <grad_out, out> - grad_lse per query and
dlogits = p * (<grad_out, value> - delta):

    sampled_grad_query   the forward's walk: delta (kept for the others) and grad_query
    sampled_grad_keys    a tile of sampled keys against all queries of its window: what arrives at each sampled key
                         and value goes to its position by the slopes, and to the corners by the weights
    sampled_grad_bias    a tile of the bias, dlogits summed in place over a share of all windows; the shares are added

Many samples may share a corner. sampled_grad_keys adds to it by atomics in float32, whose order differs between runs;
where torch.use_deterministic_algorithms asks for the same bits in every run, it writes the gradients of sampled keys
and values out, B * windows * heads * K rows in float32, and the reference's index_add_ brings them to the corners.

Source: Dao, FlashAttention-2 (2023), section 3.1.2, with the reading in front and its transpose behind.
"""
# mypy: disallow-incomplete-defs=False
# (Triton kernels annotate only their compile-time arguments.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.kernels.launch import launch
from attnzoo.kernels.library import last_dim_contiguous
from attnzoo.kernels.sampled_window_attention import reference
from attnzoo.kernels.sampled_window_attention.problem import Problem
from attnzoo.kernels.sampled_window_attention.triton import (
    SIZES,
    arguments,
    cell_offsets,
    key_corners,
    prepared,
    sample_rows,
    strides,
    window_queries,
)
from attnzoo.kernels.triton_shared import LOG2E, load_lse, load_rows, on_device, store_rows

BIAS_PROGRAMS = 1024  # programs of sampled_grad_bias aimed at: their partial sums are bounded by it


@triton.jit
def weights_and_slopes(
    q, k, d_weights, bias, bias_row, n, num_samples, lse2, delta, valid, scale, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(p, dlogits) [queries, keys] of a tile, from d_weights = <grad_out, value>."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    seen = (n < num_samples)[None, :] & valid[:, None]
    if BIAS:
        added = tl.load(bias + bias_row[:, None] + n[None, :], mask=seen, other=0.0)
        logits += added.to(tl.float32) * LOG2E
    p = tl.math.exp2(tl.where(seen, logits, float("-inf")) - lse2[:, None])
    return p, p * (d_weights - delta[:, None])


@triton.jit(do_not_specialize=SIZES)
def sampled_grad_query(
    query, key, value, positions, bias, out, lse, grad_out, grad_lse, delta, grad_query, scale, heads,
    height, width, key_height, key_width, across, windows, num_samples,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h, p_b, p_down, p_across, p_h, p_n, p_c,
    do_b, do_y, do_x, do_h,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """delta and grad_query of one tile of queries of one window and head."""
    TILES: tl.constexpr = (HEIGHT * WIDTH + BM - 1) // BM
    pid = tl.program_id(0)
    i = (pid % TILES) * BM + tl.arange(0, BM)
    h = (pid // TILES) % heads
    window = (pid // TILES // heads) % windows
    b = (pid // TILES // heads // windows).to(tl.int64)
    y, x, token, valid = window_queries(i, window, across, height, width, HEIGHT, WIDTH)
    query += b * q_b + h.to(tl.int64) * q_h
    grad_out += b * do_b + h.to(tl.int64) * do_h
    key += b * k_b + (h // GROUP).to(tl.int64) * k_h
    value += b * v_b + (h // GROUP).to(tl.int64) * v_h
    positions += b * p_b + (window // across).to(tl.int64) * p_down + (window % across).to(tl.int64) * p_across
    positions += h.to(tl.int64) * p_h
    row = b * height * width * heads + token.to(tl.int64) * heads + h
    q = load_rows(query, cell_offsets(y, x, q_y, q_x, WIDE), valid, DIM, BLOCK_D, UPCAST)
    do = load_rows(grad_out, cell_offsets(y, x, do_y, do_x, WIDE), valid, DIM_V, BLOCK_DV, UPCAST)
    o = load_rows(out, row * DIM_V, valid, DIM_V, BLOCK_DV, UPCAST)
    d = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        d -= tl.load(grad_lse + row, mask=valid, other=0.0)
    lse2 = load_lse(lse, row, valid)
    d = tl.where(lse2 == float("inf"), 0.0, d)
    tl.store(delta + row, d, mask=valid)
    if BIAS:
        bias += h.to(tl.int64) * (HEIGHT * WIDTH) * num_samples
    bias_row = i.to(tl.int64) * num_samples

    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    for start in tl.range(0, num_samples, BN):
        n = start + tl.arange(0, BN)
        ky, kx, part_y, part_x, down0, down1, across0, across1 = key_corners(
            positions, n, num_samples, p_n, p_c, key_height, key_width
        )
        v = sample_rows(
            value, ky, kx, part_y, part_x, down0, down1, across0, across1, v_y, v_x, DIM_V, BLOCK_DV, WIDE, UPCAST
        )
        d_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        k = sample_rows(
            key, ky, kx, part_y, part_x, down0, down1, across0, across1, k_y, k_x, DIM, BLOCK_D, WIDE, UPCAST
        )
        _, ds = weights_and_slopes(
            q, k, d_weights, bias, bias_row, n, num_samples, lse2, d, valid, scale, BIAS, PRECISION
        )  # fmt: skip
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)

    store_rows(grad_query, row * DIM, valid, acc * scale, DIM, BLOCK_D)


@triton.jit
def at_corner(
    pointer, goal, gradient, offsets, goal_offsets, inside, weight,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr, READ: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """<gradient, what lies at the corner> per sampled row (READ), and weight * gradient added there (ADD)."""
    product = weight * 0.0
    if READ:
        row = load_rows(pointer, offsets, inside, COLUMNS, BLOCK, UPCAST)
        product = tl.sum(row.to(tl.float32) * gradient, 1)
    if ADD:
        column = tl.arange(0, BLOCK)
        mask = inside[:, None] & (column[None, :] < COLUMNS)
        tl.atomic_add(
            goal + goal_offsets[:, None] + column[None, :], weight[:, None] * gradient, mask=mask, sem="relaxed"
        )
    return product


@triton.jit
def to_corners(
    pointer, goal, gradient, y, x, part_y, part_x, down0, down1, across0, across1, stride_y, stride_x, goal_y, goal_x,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    READ: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The transpose of `sample_rows`: gradient to the corners (ADD); returns the gradients of y and of x (READ)."""
    offsets = cell_offsets(y, x, stride_y, stride_x, WIDE)
    goals = cell_offsets(y, x, goal_y, goal_x, WIDE)
    rest_y = 1.0 - part_y
    rest_x = 1.0 - part_x
    c00 = at_corner(
        pointer, goal, gradient, offsets, goals, down0 & across0, rest_y * rest_x, COLUMNS, BLOCK, UPCAST, READ, ADD
    )
    c01 = at_corner(
        pointer, goal, gradient, offsets + stride_x, goals + goal_x, down0 & across1, rest_y * part_x,
        COLUMNS, BLOCK, UPCAST, READ, ADD,
    )  # fmt: skip
    c10 = at_corner(
        pointer, goal, gradient, offsets + stride_y, goals + goal_y, down1 & across0, part_y * rest_x,
        COLUMNS, BLOCK, UPCAST, READ, ADD,
    )  # fmt: skip
    c11 = at_corner(
        pointer, goal, gradient, offsets + stride_y + stride_x, goals + goal_y + goal_x, down1 & across1,
        part_y * part_x, COLUMNS, BLOCK, UPCAST, READ, ADD,
    )  # fmt: skip
    return rest_x * (c10 - c00) + part_x * (c11 - c01), rest_y * (c01 - c00) + part_y * (c11 - c10)


@triton.jit(do_not_specialize=SIZES)
def sampled_grad_keys(
    query, key, value, positions, bias, lse, grad_out, delta, grad_key, grad_value, grad_positions, scale, heads,
    height, width, key_height, key_width, across, windows, num_samples,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h, p_b, p_down, p_across, p_h, p_n, p_c,
    do_b, do_y, do_x, do_h,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GRAD_KEY: tl.constexpr, GRAD_VALUE: tl.constexpr, GRAD_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of sampled keys and values of one window and head.

    GRAD_KEY, GRAD_VALUE: "add" to the float32 maps grad_key and grad_value, "store" the sampled rows' own gradients
    there, [B, windows, heads, K, dim], or "none". grad_positions: [B, windows, heads, K, 2].
    """
    tiles = tl.cdiv(num_samples, BN)
    heads_kv = heads // GROUP
    pid = tl.program_id(0)
    n = (pid % tiles) * BN + tl.arange(0, BN)
    h = (pid // tiles) % heads
    window = (pid // tiles // heads) % windows
    b = (pid // tiles // heads // windows).to(tl.int64)
    query += b * q_b + h.to(tl.int64) * q_h
    grad_out += b * do_b + h.to(tl.int64) * do_h
    key += b * k_b + (h // GROUP).to(tl.int64) * k_h
    value += b * v_b + (h // GROUP).to(tl.int64) * v_h
    positions += b * p_b + (window // across).to(tl.int64) * p_down + (window % across).to(tl.int64) * p_across
    positions += h.to(tl.int64) * p_h
    if BIAS:
        bias += h.to(tl.int64) * (HEIGHT * WIDTH) * num_samples
    ky, kx, part_y, part_x, down0, down1, across0, across1 = key_corners(
        positions, n, num_samples, p_n, p_c, key_height, key_width
    )
    k = sample_rows(key, ky, kx, part_y, part_x, down0, down1, across0, across1, k_y, k_x, DIM, BLOCK_D, WIDE, UPCAST)
    v = sample_rows(
        value, ky, kx, part_y, part_x, down0, down1, across0, across1, v_y, v_x, DIM_V, BLOCK_DV, WIDE, UPCAST
    )
    first_row = b * height * width * heads + h

    acc_k = tl.zeros([BN, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BN, BLOCK_DV], tl.float32)
    for start in tl.range(0, HEIGHT * WIDTH, BM):
        i = start + tl.arange(0, BM)
        y, x, token, valid = window_queries(i, window, across, height, width, HEIGHT, WIDTH)
        row = first_row + token.to(tl.int64) * heads
        q = load_rows(query, cell_offsets(y, x, q_y, q_x, WIDE), valid, DIM, BLOCK_D, UPCAST)
        do = load_rows(grad_out, cell_offsets(y, x, do_y, do_x, WIDE), valid, DIM_V, BLOCK_DV, UPCAST)
        lse2 = load_lse(lse, row, valid)
        d = tl.load(delta + row, mask=valid, other=0.0)
        d_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p, ds = weights_and_slopes(
            q, k, d_weights, bias, i.to(tl.int64) * num_samples, n, num_samples, lse2, d, valid, scale, BIAS, PRECISION
        )
        acc_v = tl.dot(tl.trans(p.to(do.dtype)), do, acc_v, input_precision=PRECISION)
        acc_k = tl.dot(tl.trans(ds.to(q.dtype)), q, acc_k, input_precision=PRECISION)
    acc_k *= scale

    sample = ((b * windows + window) * heads + h) * num_samples + n
    real = n < num_samples
    cells = b * key_height * key_width * heads_kv + h // GROUP
    if GRAD_KEY == "store":
        store_rows(grad_key, sample * DIM, real, acc_k, DIM, BLOCK_D)
    if GRAD_KEY == "add":
        grad_key += cells * DIM
    by_key_y, by_key_x = to_corners(
        key, grad_key, acc_k, ky, kx, part_y, part_x, down0, down1, across0, across1, k_y, k_x,
        key_width * heads_kv * DIM, heads_kv * DIM, DIM, BLOCK_D, WIDE, UPCAST, GRAD_POSITIONS, GRAD_KEY == "add",
    )  # fmt: skip
    if GRAD_VALUE == "store":
        store_rows(grad_value, sample * DIM_V, real, acc_v, DIM_V, BLOCK_DV)
    if GRAD_VALUE == "add":
        grad_value += cells * DIM_V
    by_value_y, by_value_x = to_corners(
        value, grad_value, acc_v, ky, kx, part_y, part_x, down0, down1, across0, across1, v_y, v_x,
        key_width * heads_kv * DIM_V, heads_kv * DIM_V, DIM_V, BLOCK_DV, WIDE, UPCAST, GRAD_POSITIONS,
        GRAD_VALUE == "add",
    )  # fmt: skip
    if GRAD_POSITIONS:
        tl.store(grad_positions + sample * 2, by_key_y + by_value_y, mask=real)
        tl.store(grad_positions + sample * 2 + 1, by_key_x + by_value_x, mask=real)


@triton.jit(do_not_specialize=[*SIZES, "per_program", "total"])
def sampled_grad_bias(
    query, key, value, positions, bias, lse, grad_out, delta, partial, scale, heads,
    height, width, key_height, key_width, across, windows, num_samples, per_program, total,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h, p_b, p_down, p_across, p_h, p_n, p_c,
    do_b, do_y, do_x, do_h,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial[share, head, query, key]: dlogits of a tile of the bias, summed over a share of all windows."""
    TILES: tl.constexpr = (HEIGHT * WIDTH + BM - 1) // BM
    tiles = tl.cdiv(num_samples, BN)
    pid = tl.program_id(0)
    n = (pid % tiles) * BN + tl.arange(0, BN)
    i = (pid // tiles % TILES) * BM + tl.arange(0, BM)
    h = (pid // tiles // TILES) % heads
    share = pid // tiles // TILES // heads
    h_kv = (h // GROUP).to(tl.int64)
    bias += h.to(tl.int64) * (HEIGHT * WIDTH) * num_samples
    bias_row = i.to(tl.int64) * num_samples
    acc = tl.zeros([BM, BN], tl.float32)
    for unit in tl.range(share * per_program, tl.minimum((share + 1) * per_program, total)):
        window = unit % windows
        b = (unit // windows).to(tl.int64)
        y, x, token, valid = window_queries(i, window, across, height, width, HEIGHT, WIDTH)
        row = b * height * width * heads + token.to(tl.int64) * heads + h
        places = positions + b * p_b + (window // across).to(tl.int64) * p_down + h.to(tl.int64) * p_h
        places += (window % across).to(tl.int64) * p_across
        ky, kx, part_y, part_x, down0, down1, across0, across1 = key_corners(
            places, n, num_samples, p_n, p_c, key_height, key_width
        )
        queries = query + b * q_b + h.to(tl.int64) * q_h
        grads = grad_out + b * do_b + h.to(tl.int64) * do_h
        v = sample_rows(
            value + b * v_b + h_kv * v_h, ky, kx, part_y, part_x, down0, down1, across0, across1, v_y, v_x,
            DIM_V, BLOCK_DV, WIDE, UPCAST,
        )  # fmt: skip
        do = load_rows(grads, cell_offsets(y, x, do_y, do_x, WIDE), valid, DIM_V, BLOCK_DV, UPCAST)
        d_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        k = sample_rows(
            key + b * k_b + h_kv * k_h, ky, kx, part_y, part_x, down0, down1, across0, across1, k_y, k_x,
            DIM, BLOCK_D, WIDE, UPCAST,
        )  # fmt: skip
        q = load_rows(queries, cell_offsets(y, x, q_y, q_x, WIDE), valid, DIM, BLOCK_D, UPCAST)
        lse2 = load_lse(lse, row, valid)
        d = tl.load(delta + row, mask=valid, other=0.0)
        _, ds = weights_and_slopes(
            q, k, d_weights, bias, bias_row, n, num_samples, lse2, d, valid, scale, BIAS, PRECISION
        )  # fmt: skip
        acc += ds

    partial += (share.to(tl.int64) * heads + h) * (HEIGHT * WIDTH) * num_samples
    mask = (i < HEIGHT * WIDTH)[:, None] & (n < num_samples)[None, :]
    tl.store(partial + bias_row[:, None] + n[None, :], acc, mask=mask)


# ------------------------------------------------------------------------------------------------------- the launchers


def _grad_bias(shared: dict[str, Any], problem: Problem, device: torch.device) -> Tensor:
    """The gradient of the bias, [heads, area, K] in float32."""
    tiles = triton.cdiv(problem.area, shared["BM"]) * triton.cdiv(problem.num_samples, shared["BN"])
    total = problem.batch * problem.num_windows
    per_program = triton.cdiv(total, max(1, BIAS_PROGRAMS // (tiles * problem.num_heads)))
    shares = triton.cdiv(total, per_program)
    shape = (shares, problem.num_heads, problem.area, problem.num_samples)
    partial = torch.empty(shape, dtype=torch.float32, device=device)
    programs = shares * problem.num_heads * tiles
    launch(sampled_grad_bias, (programs,), partial=partial, per_program=per_program, total=total, **shared)
    return partial.sum(0)


def _add_to_corners(sampled: Tensor, positions: Tensor, goal: Tensor, problem: Problem) -> None:
    """Sampled rows' gradients [B, windows, heads, K, dim] to the map goal [B, Hk, Wk, heads_kv, dim], item by item."""
    for item in range(problem.batch):
        at = reference.reading(positions[item].flatten(0, 1).float(), problem)
        at.add_to(goal[item].flatten(0, 2), sampled[item])


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of query, key, value, positions and bias, None where `needs` has no use for one."""
    given = (query, key, value, positions, bias)
    if query.numel() == 0:
        zeros = (t if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in given)
        return [zero if needed else None for zero, needed in zip(zeros, needs)]
    device, laid = query.device, prepared(query, key, value, positions, bias)
    grad_out, out, lse = last_dim_contiguous(grad_out), out.contiguous(), lse.contiguous()
    more = {"lse": lse, "grad_out": grad_out, **strides(grad_out, "do", "b y x h")}
    delta = torch.empty(lse.shape, dtype=torch.float32, device=device)
    found: list[Tensor | None] = [None] * 5
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=device)
    units = problem.batch * problem.num_windows * problem.num_heads
    with on_device(query):
        shared = arguments("grad_query", *laid, problem, grad_out)
        launch(
            sampled_grad_query,
            (units * triton.cdiv(problem.area, shared["BM"]),),
            out=out,
            grad_lse=lse if grad_lse is None else grad_lse.float().contiguous(),
            delta=delta,
            grad_query=grad_query,
            HAS_GRAD_LSE=grad_lse is not None,
            **shared,
            **more,
        )
        found[0] = grad_query
        if any(needs[1:4]):
            how = "store" if torch.are_deterministic_algorithms_enabled() else "add"
            goals: list[Tensor | None] = [None, None]
            for place, (tensor, needed) in enumerate(zip((key, value), needs[1:3])):
                if needed and how == "add":
                    goals[place] = torch.zeros(tensor.shape, dtype=torch.float32, device=device)
                elif needed:
                    shape = (
                        problem.batch,
                        problem.num_windows,
                        problem.num_heads,
                        problem.num_samples,
                        tensor.shape[4],
                    )
                    goals[place] = torch.empty(shape, dtype=torch.float32, device=device)
            grad_positions = torch.empty(positions.shape, dtype=torch.float32, device=device) if needs[3] else None
            shared = arguments("grad_keys", *laid, problem, grad_out)
            launch(
                sampled_grad_keys,
                (units * triton.cdiv(problem.num_samples, shared["BN"]),),
                delta=delta,
                grad_key=delta if goals[0] is None else goals[0],
                grad_value=delta if goals[1] is None else goals[1],
                grad_positions=delta if grad_positions is None else grad_positions,
                GRAD_KEY="none" if goals[0] is None else how,
                GRAD_VALUE="none" if goals[1] is None else how,
                GRAD_POSITIONS=needs[3],
                **shared,
                **more,
            )
            for place, tensor in ((1, key), (2, value)):
                made = goals[place - 1]
                if made is not None and how == "store":
                    sampled, made = made, torch.zeros(tensor.shape, dtype=torch.float32, device=device)
                    _add_to_corners(sampled, positions, made, problem)
                found[place] = made
            found[3] = grad_positions
        if bias is not None and needs[4]:
            shared = arguments("grad_bias", *laid, problem, grad_out)
            found[4] = _grad_bias({"delta": delta, **shared, **more}, problem, device)
    return [
        gradient.to(tensor.dtype) if gradient is not None and tensor is not None and needed else None
        for gradient, tensor, needed in zip(found, given, needs)
    ]
