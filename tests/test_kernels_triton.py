"""Neighborhood attention's Triton kernels: under the interpreter against float64, and compiled for GPUs not here.

The interpreter is chosen when triton is first imported, for the whole process. So the cases run in a process of their
own, this file as a script with TRITON_INTERPRET=1, and each test here reads the outcome of its case.

Every launch in that process is watched: memory that the launchers allocate begins as NaN (what a kernel leaves out
shows), and each load and store must stay inside the tensors that the launch was given.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """One call; tuples have an entry per axis, a single value stands for all axes."""

    grid: tuple[int, ...]
    kernel_size: Any
    stride: Any = 1
    dilation: Any = 1
    is_causal: Any = False
    border: str = "shift"
    bias: str = "none"
    shared_bias: bool = False  # a per-query bias of batch 1
    extra: int = 0
    batch: int = 1
    heads: int = 2
    heads_kv: int | None = None
    head_dim: int = 32
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    scale: float | None = None
    grad_lse: bool = True


CASES = {
    "2d": Case((13, 11), 7),
    "1d, head_dim 24": Case((100,), 9, head_dim=24),
    "3d, head_dim 80": Case((5, 6, 7), (3, 4, 5), head_dim=80, heads=1),
    "dilation does not divide, gqa": Case((13, 18), (3, 5), dilation=(2, 3), heads=4, heads_kv=2, head_dim=16),
    "stride": Case((16, 17), (8, 6), stride=(4, 3), heads=1),
    "stride 3d": Case((6, 9, 8), (4, 5, 6), stride=(2, 5, 3), heads=1, head_dim=16),
    "causal, stride, dilation": Case((14, 13), (4, 6), (4, 3), (2, 1), (False, True), head_dim_v=16, heads=1),
    "causal 1d": Case((70,), 65, stride=5, is_causal=True, head_dim=8),
    "causal on every axis, offset bias": Case((5, 4, 9), (3, 4, 2), is_causal=True, bias="offset", heads=1),
    "mask": Case((9, 7), 7, dilation=2, border="mask", head_dim=16),
    "mask, dilation beyond the grid": Case((3, 9), 3, dilation=5, border="mask", heads=1, head_dim=8),
    "mask, offset bias": Case((11, 7), (5, 4), border="mask", bias="offset", heads=1),
    "zero, offset bias": Case((9, 7), (7, 4), dilation=(2, 1), border="zero", bias="offset", heads=1),
    "zero, causal": Case((9, 7), (6, 4), stride=(3, 1), is_causal=(False, True), border="zero", heads=1),
    "offset bias, additional keys, head_dim 8": Case((9, 12), (7, 4), bias="offset", extra=5, head_dim=8),
    "offset bias, stride, gqa": Case((10, 12), (5, 4), (3, 2), bias="offset", heads=3, heads_kv=1, head_dim=16),
    "offset bias 1d": Case((90,), 30, bias="offset", dilation=2),
    "query bias of batch 1, many additional keys": Case(
        (9, 8), (7, 4), bias="query", shared_bias=True, batch=2, extra=70, heads=1
    ),
    "query bias, mask, causal 3d": Case(
        (7, 4, 5), (3, 4, 2), is_causal=(True, False, True), border="mask", bias="query", heads=1, head_dim=8
    ),
    "additional keys, gqa": Case((9, 8), 5, extra=9, heads=4, heads_kv=2, head_dim=16, batch=2),
    "kernel_size 1": Case((6, 5), 1, heads=1),
    "window of the whole grid": Case((7, 7), 7, bias="offset"),
    "float16": Case((13, 11), 5, bias="offset", extra=3, dtype=torch.float16, heads=1),
    "bfloat16": Case((13, 11), 5, bias="offset", extra=3, dtype=torch.bfloat16, heads=1),
    "packed projection": Case((9, 10), 5, layout="packed"),
    "heads first": Case((9, 10), 5, layout="heads first", bias="query"),
    "last dimension strided": Case((9, 10), 5, layout="last strided", heads=1, extra=4),
    "head_dim 4, value head_dim 40": Case((9, 10), 5, head_dim=4, head_dim_v=40, heads=1),
    "head_dim 256": Case((9, 8), 5, head_dim=256, heads=1),
    "scale 0": Case((9, 8), 5, scale=0.0, heads=1),
    "scale below 0": Case((9, 8), 5, scale=-0.4, heads=1),
    "large window": Case((16, 16), 15, heads=1, head_dim=16),
    "large window 1d": Case((200,), 129, heads=1, head_dim=16),
    "windows that tiles fill": Case((24, 16), (16, 8), stride=8, heads=1, head_dim=16),
    "window of the whole grid 3d": Case((5, 6, 8), (5, 6, 8), heads=1, head_dim=16),
    "without a gradient of lse": Case((9, 8), 5, grad_lse=False, heads=1),
}
# Norm of the error over the norm of the float64 result: out and lse, gradients.
TOLERANCE = {torch.float32: (2e-6, 3e-6), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1e-2, 2e-2)}
NAMES = ("query", "key", "value", "bias", "additional_keys", "additional_values")


# --------------------------------------------------------------------------------- in the interpreter's own process


def make_inputs(case: Case) -> dict[str, Tensor | None]:
    """The tensors of a case under their argument names."""
    rank = len(case.grid)
    heads_kv, dim_v = case.heads_kv or case.heads, case.head_dim_v or case.head_dim
    extents = case.kernel_size if isinstance(case.kernel_size, tuple) else (case.kernel_size,) * rank

    def rows(heads: int, dim: int) -> Tensor:
        shape = (case.batch, *case.grid, heads, dim)
        if case.layout == "heads first":
            return torch.randn(case.batch, heads, *case.grid, dim).movedim(1, -2)
        if case.layout == "last strided":
            return torch.randn(*shape[:-2], dim, heads).transpose(-1, -2)
        return torch.randn(shape)

    query, key, value = rows(case.heads, case.head_dim), rows(heads_kv, case.head_dim), rows(heads_kv, dim_v)
    if case.layout == "packed":
        query, key, value = torch.randn(case.batch, *case.grid, 3, case.heads, case.head_dim).unbind(-3)
    bias = None
    if case.bias == "offset":
        bias = torch.randn(case.heads, *(2 * k - 1 for k in extents))
    if case.bias == "query":
        batch = 1 if case.shared_bias else case.batch
        bias = torch.randn(batch, *case.grid, case.heads, math.prod(extents))
    more = [None, None]
    if case.extra:
        more = [torch.randn(case.batch, case.extra, heads_kv, dim) for dim in (case.head_dim, dim_v)]
    tensors = dict(zip(NAMES, (query, key, value, bias, *more)))
    return {name: t if t is None else t.to(case.dtype) for name, t in tensors.items()}


def make_problem(case: Case, dtype: torch.dtype) -> Any:
    """The case as the back ends read it."""
    from attnzoo.kernels.neighborhood_attention.problem import Problem

    def per_axis(value: Any) -> tuple:
        return value if isinstance(value, tuple) else (value,) * len(case.grid)

    return Problem(
        batch=case.batch,
        grid=case.grid,
        num_heads=case.heads,
        num_heads_kv=case.heads_kv or case.heads,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v or case.head_dim,
        kernel_size=per_axis(case.kernel_size),
        stride=per_axis(case.stride),
        dilation=per_axis(case.dilation),
        is_causal=per_axis(case.is_causal),
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        border=case.border,
        bias=case.bias,
        num_additional=case.extra,
        dtype=dtype,
    )


@contextmanager
def watched() -> Iterator[None]:
    """torch.empty gives NaN, and a launch that touches memory outside its tensors raises."""
    import numpy as np
    from triton.runtime import interpreter

    from attnzoo.kernels.neighborhood_attention import triton as forward_module
    from attnzoo.kernels.neighborhood_attention import triton_backward as backward_module

    allowed: list[tuple[int, int]] = []
    native, empty, launch = interpreter._interpreter, torch.empty, forward_module.launch

    def check(pointers: Any, mask: Any, itemsize: int) -> None:
        touched = pointers[mask].astype(np.int64)
        inside = np.zeros(touched.shape, dtype=bool)
        for first, end in allowed:
            inside |= (touched >= first) & (touched + itemsize <= end)
        assert inside.all(), f"{(~inside).sum()} of {inside.size} accesses lie outside the launch's tensors"

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

        def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
            check(pointers, mask, np.dtype(dtype).itemsize)
            return native.load(pointers, mask, other, dtype)

        def store(self, pointers: Any, value: Any, mask: Any) -> Any:
            check(pointers, mask, value.dtype.itemsize)
            return native.store(pointers, value, mask)

    def filled(*arguments: Any, **options: Any) -> Tensor:
        made = empty(*arguments, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    def launch_watched(kernel: Any, programs: tuple[int, ...], **arguments: Any) -> None:
        allowed.clear()
        for tensor in (a for a in arguments.values() if isinstance(a, Tensor)):
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            allowed.append((tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()))
        launch(kernel, programs, **arguments)

    try:
        interpreter._interpreter, torch.empty = Watched(), filled
        forward_module.launch = backward_module.launch = launch_watched
        yield
    finally:
        interpreter._interpreter, torch.empty = native, empty
        forward_module.launch = backward_module.launch = launch


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise AssertionError unless the shapes agree and the error's norm is within `tolerance` of the result's."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    assert torch.equal(got.isfinite(), want.isfinite()), f"{name}: not finite in other places than the reference"
    finite = want.isfinite()
    error = (got.double() - want)[finite].norm().item()
    norm = want[finite].norm().item()
    assert error <= tolerance * max(norm, 1e-3), f"{name}: relative error {error / max(norm, 1e-3):.1e} > {tolerance}"


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def run_case(case: Case) -> None:
    """Forward and all gradients of one case against the float64 reference."""
    from attnzoo.kernels.neighborhood_attention import reference, triton

    given = make_inputs(case)
    problem = make_problem(case, case.dtype)
    assert triton.reasons(problem) == []
    out_tolerance, grad_tolerance = TOLERANCE[case.dtype]
    with watched():
        out, lse = triton.forward(*given.values(), problem)
    assert out.dtype == case.dtype and lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    exact = [double(t) for t in given.values()]
    exact_problem = make_problem(case, torch.float64)
    wanted_out, wanted_lse = reference.forward(*exact, exact_problem)
    close("out", out, wanted_out, out_tolerance)
    close("lse", lse, wanted_lse, out_tolerance)

    grad_out = torch.randn(out.shape).to(case.dtype)
    if case.layout == "last strided":
        grad_out = grad_out[..., :1].expand(out.shape)
    grad_lse = torch.randn(lse.shape) if case.grad_lse else None
    with watched():
        found = triton.backward(grad_out, grad_lse, *given.values(), out, lse, problem)
    wanted = reference.backward(grad_out.double(), double(grad_lse), *exact, wanted_out, wanted_lse, exact_problem)
    for name, gradient, want in zip(NAMES, found, wanted, strict=True):
        assert (gradient is None) == (want is None), f"gradient of {name}: {gradient is None=}, {want is None=}"
        if gradient is not None and want is not None:
            assert gradient.dtype == case.dtype and gradient.is_contiguous()
            close(f"gradient of {name}", gradient, want, grad_tolerance)


def rows_without_keys() -> None:
    """A query whose keys are all shut out by its bias: out 0, lse -inf, every gradient 0."""
    from attnzoo.kernels.neighborhood_attention import triton

    case = Case((9, 8), 3, bias="query", heads=1, head_dim=16)
    given, problem = make_inputs(case), make_problem(case, torch.float32)
    bias = given["bias"]
    assert bias is not None
    bias[0, 2:5, 3] = -math.inf
    with watched():
        out, lse = triton.forward(*given.values(), problem)
        grads = triton.backward(torch.randn(out.shape), torch.randn(lse.shape), *given.values(), out, lse, problem)
    assert (out[0, 2:5, 3] == 0).all() and (lse[0, 2:5, 3] == -math.inf).all()
    assert (grads[0][0, 2:5, 3] == 0).all() and (grads[3][0, 2:5, 3] == 0).all()
    assert all(g.isfinite().all() for g in grads if g is not None) and lse.isfinite().sum() == lse.numel() - 3


def same_bits_again() -> None:
    """Two runs agree in every bit, 64-bit offsets change none, and gradients that nobody needs are None."""
    from attnzoo.kernels.neighborhood_attention import triton

    case = Case((40,), 5, dilation=2, bias="offset", extra=6, heads=2, heads_kv=1, head_dim=16)
    given, problem = make_inputs(case), make_problem(case, torch.float32)
    out, lse = triton.forward(*given.values(), problem)
    grads = [torch.randn(out.shape), torch.randn(lse.shape)]
    first = triton.backward(*grads, *given.values(), out, lse, problem)
    again = triton.backward(*grads, *given.values(), out, lse, problem)
    narrow, triton.wide = triton.wide, lambda *tensors: True
    try:
        with watched():
            far = (
                *triton.forward(*given.values(), problem),
                *triton.backward(*grads, *given.values(), out, lse, problem),
            )
    finally:
        triton.wide = narrow
    assert all(torch.equal(a, b) for a, b in zip(first, again)), "two runs differ"
    assert all(torch.equal(a, b) for a, b in zip((out, lse, *first), far)), "64-bit offsets change the result"
    for asked in ((0, 4), (1,), (2, 5), (1, 2, 3, 4, 5)):
        needs = tuple(number in asked for number in range(6))
        with watched():
            some = triton.backward(*grads, *given.values(), out, lse, problem, needs)
        for gradient, whole, needed in zip(some, first, needs, strict=True):
            assert (gradient is not None) == needed
            assert gradient is None or torch.allclose(gradient, whole, rtol=1e-5, atol=1e-5)


def nothing_to_do() -> None:
    """Empty batches give empty results and gradients of zero size."""
    from attnzoo.kernels.neighborhood_attention import triton

    case = Case((6, 5), 3, bias="offset", batch=0)
    given, problem = make_inputs(case), make_problem(case, torch.float32)
    out, lse = triton.forward(*given.values(), problem)
    assert out.shape == (0, 6, 5, 2, 32) and lse.shape == (0, 6, 5, 2)
    grads = triton.backward(out, lse, *given.values(), out, lse, problem)
    assert grads[0].shape == out.shape and (grads[3] == 0).all() and grads[4] is None


def windows_and_their_inverse() -> None:
    """`window` is the rule of problem.py, and `queries_of` leaves no query out, for every length up to 9."""
    global queries_of, tl, window  # a jitted function sees the names of its module, not those around it
    import triton
    import triton.language as tl

    from attnzoo.kernels.neighborhood_attention.problem import axis_windows
    from attnzoo.kernels.neighborhood_attention.triton import queries_of, window

    @triton.jit
    def windows_of(p, length, kernel, stride, a, b, found, N: tl.constexpr, CAUSAL: tl.constexpr, BORDER: tl.constexpr):
        i = tl.arange(0, N)
        first, last, start = window(
            tl.load(p + i), tl.load(length + i), tl.load(kernel + i), tl.load(stride + i), CAUSAL, BORDER
        )
        low, high = queries_of(
            tl.load(a + i),
            tl.load(b + i),
            tl.load(length + i),
            tl.load(kernel + i),
            tl.load(stride + i),
            CAUSAL,
            BORDER,
        )
        tl.store(found + i, first)
        tl.store(found + N + i, last)
        tl.store(found + 2 * N + i, start)
        tl.store(found + 3 * N + i, low)
        tl.store(found + 4 * N + i, high)

    rows = [
        (p, length, kernel, stride, a, b)
        for length in range(1, 10)
        for kernel in range(1, 11)
        for stride in range(1, kernel + 1)
        for p in range(length)
        for a in range(length)
        for b in (a, min(a + 3, length - 1))
    ]
    for causal, border in ((False, "shift"), (False, "mask"), (False, "zero"), (True, "shift")):
        kept = [row for row in rows if border != "shift" or causal or row[2] <= row[1]]
        size = triton.next_power_of_2(len(kept))
        columns = torch.tensor(kept + [kept[0]] * (size - len(kept)), dtype=torch.int32).t().contiguous()
        found = torch.zeros(5, size, dtype=torch.int32)
        windows_of[(1,)](*columns, found, size, causal, border)
        first, last, start, low, high = found[:, : len(kept)].tolist()
        rules = {
            axis: [getattr(axis_windows(*axis, 1, causal, border), part).tolist() for part in ("low", "high", "start")]
            for axis in {(length, kernel, stride) for _, length, kernel, stride, _, _ in kept}
        }
        for n, (p, length, kernel, stride, a, b) in enumerate(kept):
            lows, highs, starts = rules[length, kernel, stride]
            want = (lows[p], highs[p] + 1, starts[p])
            assert (first[n], last[n], start[n]) == want, (
                f"window of {kept[n]}: {(first[n], last[n], start[n])}, {want}"
            )
            if first[n] <= b and last[n] > a:
                assert low[n] <= p < high[n], f"{kept[n]}: query {p} is not in {low[n]} .. {high[n] - 1}"


def through_the_public_function() -> None:
    """The registered operation, differentiated by autograd, agrees with its own reference."""
    from attnzoo.kernels import neighborhood_attention

    query, key, value = (torch.randn(1, 9, 8, 2, 16) for _ in range(3))
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        out, lse = neighborhood_attention(*leaves, 5, dilation=(1, 1), return_lse=True, backend=backend)
        (out.square().sum() + lse.sum()).backward()
        results.append([out, lse, *(leaf.grad for leaf in leaves)])
    for name, got, want in zip(("out", "lse", *NAMES), *results):
        close(name, got.detach(), want.detach().double(), 3e-6)


CHECKS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        rows_without_keys,
        same_bits_again,
        nothing_to_do,
        windows_and_their_inverse,
        through_the_public_function,
    )
}


def front_ends() -> None:
    """Every kernel of every case through Triton's front end, every second with 64-bit offsets; JSON as in `main`."""
    from attnzoo.kernels import aot
    from attnzoo.kernels.launch import recording
    from attnzoo.kernels.neighborhood_attention import triton

    narrow, target = triton.wide, aot.TARGETS["sm_90"]
    for number, (name, case) in enumerate(CASES.items()):
        problem = make_problem(case, case.dtype)
        given = [t if t is None else t.to("meta") for t in make_inputs(case).values()]
        kernels = []
        try:
            triton.wide = (lambda *tensors: True) if number % 2 else narrow
            with recording("cuda") as launched:
                out, lse = triton.forward(*given, problem)
                triton.backward(out, lse if case.grad_lse else None, *given, out, lse, problem)
            for each in launched:
                assert "tt.dot" in aot.front_end(each, target)
                kernels.append(each.kernel.__name__)
            outcome = "ok"
        except Exception:  # the case's outcome, as in `main`
            outcome = traceback.format_exc()
        finally:
            triton.wide = narrow
        print(json.dumps({"name": name, "outcome": outcome, "kernels": kernels}), flush=True)


def main(names: list[str]) -> None:
    """Run the named cases and checks; one line of JSON each."""
    torch.set_num_threads(1)
    if names == ["--front-end"]:
        front_ends()
        return
    for name in names:
        torch.manual_seed(0)
        begun = time.perf_counter()
        try:
            if name in CASES:
                run_case(CASES[name])
            else:
                CHECKS[name]()
            outcome = "ok"
        except Exception:  # whatever it is, it is this case's outcome, and the others still run
            outcome = traceback.format_exc()
        print(json.dumps({"name": name, "outcome": outcome, "seconds": time.perf_counter() - begun}), flush=True)


# ----------------------------------------------------------------------------------------------------- under pytest


def in_a_process(command: list[str], interpret: bool, timeout: float = 550) -> subprocess.CompletedProcess[str]:
    """Run python with TRITON_INTERPRET set or not, whatever it is here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, str]:
    """The outcome of every interpreted case that this session selected."""
    names = [
        item.callspec.params["name"] for item in request.session.items if item.name.startswith("test_interpreted[")
    ]
    done = in_a_process([__file__, *names], interpret=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ended = f"the interpreter's process ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return dict.fromkeys(names, ended) | {each["name"]: each["outcome"] for each in found}


@pytest.mark.parametrize("name", [*CASES, *CHECKS])
def test_interpreted(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "ok", outcomes[name]


def test_every_case_passes_the_compilers_front_end() -> None:
    done = in_a_process([__file__, "--front-end"], interpret=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [each["name"] for each in found] == list(CASES), done.stderr[-4000:]
    for each in found:
        assert each["outcome"] == "ok", f"{each['name']}:\n{each['outcome'][-4000:]}"
    assert {kernel for each in found for kernel in each["kernels"]} == FORWARD | BACKWARD


def compile_ahead(*arguments: str, timeout: float = 550) -> subprocess.CompletedProcess[str]:
    """`python -m attnzoo.kernels.aot` with these arguments."""
    return in_a_process(["-m", "attnzoo.kernels.aot", *arguments], interpret=False, timeout=timeout)


def measured(printed: str) -> list[dict[str, str]]:
    """The rows of a printed table by column name."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def check_compiled(done: subprocess.CompletedProcess[str], kernels: set[str], targets: set[str]) -> None:
    """Every kernel is there for every target, within the limits, and multiplies on the matrix units (16-bit cases)."""
    assert done.returncode == 0, done.stderr[-4000:]
    rows = measured(done.stdout)
    assert {(row["kernel"], row["target"]) for row in rows} >= {(k, t) for k in kernels for t in targets}
    for row in rows:
        assert 0 < int(row["registers"]) <= 512 and int(row["shared KB"]) > 0, row
        assert row["case"].startswith("float32") or int(row["matrix instr."]) > 0, row


FORWARD = {"na_forward"}
BACKWARD = {"na_grad_query", "na_grad_key_value", "na_grad_offset_bias", "na_grad_extra"}


def test_forward_and_largest_backward_compile_for_every_target() -> None:
    kernels = {"na_forward", "na_grad_key_value"}
    targets = {"sm_80", "sm_90", "sm_100", "gfx942"}
    for kernel in kernels:
        done = compile_ahead("--kernel", kernel, "--case", "float16 d32 2-D offset bias extra")
        check_compiled(done, {kernel}, targets)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_case_compiles_within_its_limits() -> None:
    done = compile_ahead("--all", timeout=3600)
    check_compiled(done, FORWARD | BACKWARD, {"sm_80", "sm_90", "sm_100", "gfx942"})


def test_the_documented_table_has_every_quick_case() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    listed = compile_ahead("--list", "--kernel", "na_")
    assert listed.returncode == 0, listed.stderr[-4000:]
    missing = [line for line in listed.stdout.splitlines() if line not in page]
    assert not missing, "run: python -m attnzoo.kernels.aot --all --write docs/kernels.md\n" + "\n".join(missing)


def test_compiling_under_the_interpreter_is_refused() -> None:
    done = in_a_process(["-m", "attnzoo.kernels.aot"], interpret=True)
    assert done.returncode == 2 and "TRITON_INTERPRET=1 is set" in done.stderr and not done.stdout


def test_a_selection_that_matches_nothing_is_said() -> None:
    done = compile_ahead("--kernel", "na_sideways")
    assert done.returncode == 2 and "nothing matches" in done.stderr


def test_limits_are_faults_by_name() -> None:
    from attnzoo.kernels.aot import Measured

    fine = Measured("na_forward", "c", "gfx942", "64 x 64", 4, 2, 200, 0, 65536, 8, 0, 65536)
    assert fine.faults == []
    over = replace(fine, spill=8, shared=65537)
    assert over.faults == ["spills 8 B, allowed 0", "takes 65537 B of shared memory, there are 65536"]


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    from attnzoo.kernels import aot

    page = tmp_path / "page.md"
    page.write_text(f"before\n{aot.BEGIN}\nold\n{aot.END}\nafter\n")
    aot.write(page, "new")
    assert page.read_text() == f"before\n{aot.BEGIN}\nnew\n{aot.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        aot.write(page, "new")
    assert page.read_text() == "no marks"


if __name__ == "__main__":
    main(sys.argv[1:] or [*CASES, *CHECKS])
