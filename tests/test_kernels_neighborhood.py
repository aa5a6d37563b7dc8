"""neighborhood_attention on the CPU back ends: a sweep against a plain float64 formula, precision, memory, needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.kernels import neighborhood_attention
from attnzoo.kernels.neighborhood_attention import tiled, tiling


@dataclass(frozen=True)
class Case:
    """A call; a tuple has an entry per axis."""

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    border: str
    bias: str | None = None  # "offset", "query", or "shared": by query, of batch 1
    shut: bool = False  # one entry of the bias in every third head is -inf
    extra: int = 0
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 8
    head_dim_v: int = 8
    size: float = 1.0  # of the queries: 30 makes logits of hundreds
    chunk: int | None = None  # query-key pairs that the CPU path works on at a time
    seed: int = 0


def tensors_of(case: Case) -> list[Tensor | None]:
    """query, key, value, bias, additional keys and values in float64, exact in float32."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    query = normal(case.batch, *case.grid, case.heads, case.head_dim) * case.size
    key = normal(case.batch, *case.grid, case.heads_kv, case.head_dim)
    value = normal(case.batch, *case.grid, case.heads_kv, case.head_dim_v)
    bias, more = None, [None, None]
    if case.bias == "offset":
        bias = normal(case.heads, *(2 * k - 1 for k in case.kernel_size))
    elif case.bias is not None:
        batch = 1 if case.bias == "shared" else case.batch
        bias = normal(batch, *case.grid, case.heads, math.prod(case.kernel_size))
    if bias is not None and case.shut:
        by_head = bias.transpose(0, -2) if case.bias != "offset" else bias
        by_head.flatten(1)[::3, 0] = -math.inf
    if case.extra:
        more = [normal(case.batch, case.extra, case.heads_kv, dim) for dim in (case.head_dim, case.head_dim_v)]
    return [query, key, value, bias, *more]


def windows(case: Case, axis: int) -> list[list[tuple[int, int, int]]]:
    """Per query of an axis: (key, slot, offset) of all that takes part; key -1 is the zero vector."""
    size, kernel, stride = case.grid[axis], case.kernel_size[axis], case.stride[axis]
    dilation, found = case.dilation[axis], []
    for at in range(size):
        group, place = at % dilation, at // dilation
        length = len(range(group, size, dilation))
        first_of_stride = place - place % stride
        if case.is_causal[axis]:
            leader = min(first_of_stride + stride - 1, length - 1)
            start, last = leader - kernel + 1, place
        else:
            start = min(first_of_stride + stride // 2, length - 1) - kernel // 2
            if case.border == "shift":
                start = max(0, min(start, length - kernel))
            last = start + kernel - 1
        seen = []
        for slot in range(kernel):
            key = start + slot
            inside = 0 <= key < length
            if key > last or not (inside or (case.border == "zero" and not case.is_causal[axis])):
                continue
            seen.append((group + dilation * key if inside else -1, slot, key - place + kernel - 1))
        found.append(seen)
    return found


def formula(case: Case, tensors: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """out and lse by the definition: every query gathers its keys, one softmax, float64."""
    query, key, value, bias, more_keys, more_values = tensors
    per_axis = [windows(case, axis) for axis in range(len(case.grid))]
    repeats = case.heads // case.heads_kv
    keys, values = (F.pad(t.flatten(1, -3), (0, 0, 0, 0, 0, 1)).repeat_interleave(repeats, 2) for t in (key, value))
    outs, lses = [], []
    for number, at in enumerate(itertools.product(*map(range, case.grid))):
        index, slots, offsets = [], [], []
        for parts in itertools.product(*(axis[coordinate] for axis, coordinate in zip(per_axis, at))):
            place = slot = offset = 0
            for (k, s, o), size, kernel in zip(parts, case.grid, case.kernel_size):
                place, slot, offset = place * size + k, slot * kernel + s, offset * (2 * kernel - 1) + o
            index.append(-1 if any(k < 0 for k, _, _ in parts) else place)
            slots.append(slot)
            offsets.append(offset)
        row = query.flatten(1, -3)[:, number]
        logits = torch.einsum("bhd,bkhd->bhk", row, keys[:, index]) * case.head_dim**-0.5
        if case.bias == "offset":
            logits = logits + bias.flatten(1)[:, offsets]
        elif bias is not None:
            logits = logits + bias.flatten(1, -3)[:, number][..., slots]
        seen = values[:, index]
        if more_keys is not None:
            far = torch.einsum("bhd,bkhd->bhk", row, more_keys.repeat_interleave(repeats, 2)) * case.head_dim**-0.5
            logits, seen = torch.cat([logits, far], -1), torch.cat([seen, more_values.repeat_interleave(repeats, 2)], 1)
        outs.append(torch.einsum("bhk,bkhd->bhd", logits.softmax(-1), seen))
        lses.append(logits.logsumexp(-1))
    return torch.stack(outs, 1).unflatten(1, case.grid), torch.stack(lses, 1).unflatten(1, case.grid)


def ours(case: Case, backend: str) -> Callable[[list[Tensor | None]], Any]:
    """The operation as a function of the list of tensors."""

    def run(tensors: list[Tensor | None]) -> Any:
        query, key, value, bias, more_keys, more_values = tensors
        return neighborhood_attention(
            query, key, value, case.kernel_size, case.stride, case.dilation, case.is_causal, border=case.border,
            bias=bias, additional_keys=more_keys, additional_values=more_values, return_lse=True, backend=backend,
        )  # fmt: skip

    return run


def results(function: Callable, tensors: list[Tensor | None], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """out, lse, and the gradient of a fixed sum of both by every tensor."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    out, lse = function(leaves)
    # weights that every dtype holds exactly
    by_out, by_lse = (
        (torch.arange(t.numel()) % 7 - 3).view(t.shape).to(t.dtype) / 4 * t.isfinite() for t in (out, lse)
    )
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], wanted, [by_out, by_lse])]


def error(got: Tensor, want: Tensor, terms: int = 1) -> float:
    """Norm of the difference over the norm of what is wanted.

    Where that cancels, over a tenth of the size that a sum of so many terms of size 1 has.
    """
    assert got.shape == want.shape and torch.equal(got.isfinite(), want.isfinite())
    finite = want.isfinite()
    difference, norm = (got.double() - want)[finite].norm().item(), want[finite].norm().item()
    return difference / max(norm, 0.1 * math.sqrt(max(1, want.numel()) * terms))


@contextmanager
def filled() -> Iterator[None]:
    """Fresh memory holds NaN: what is read without being written shows."""
    functions = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    before = [getattr(owner, name) for owner, name in functions]

    def filling(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*arguments: Any, **options: Any) -> Tensor:
            made = function(*arguments, **options)
            return made.fill_(math.nan) if made.is_floating_point() and made.device.type == "cpu" else made

        return make

    tiled._kept.__dict__.clear()
    try:
        for (owner, name), function in zip(functions, before):
            setattr(owner, name, filling(function))
        yield
    finally:
        for (owner, name), function in zip(functions, before):
            setattr(owner, name, function)


@st.composite
def cases(draw: Any) -> Case:
    rank = draw(st.integers(1, 3))
    border = draw(st.sampled_from(("shift", "mask", "zero")))
    grid = tuple(draw(st.integers(1, (23, 7, 4)[rank - 1])) for _ in range(rank))
    kernel, stride, dilation = [], [], []
    for size in grid:
        d = draw(st.integers(1, min(4, size) if border == "shift" else 5))
        k = draw(st.integers(1, min((9, 5, 3)[rank - 1], size // d) if border == "shift" else (9, 5, 3)[rank - 1]))
        dilation.append(d), kernel.append(k), stride.append(draw(st.integers(1, k)))
    heads_kv = draw(st.integers(1, 2))
    wide = draw(st.sampled_from((8, 9, 16, 24, 33, 64, 80, 128, 256)))
    return Case(
        grid,
        tuple(kernel),
        tuple(stride),
        tuple(dilation),
        tuple(draw(st.booleans()) for _ in grid),
        border,
        draw(st.sampled_from((None, "offset", "query", "shared"))),
        draw(st.booleans()),
        draw(st.sampled_from((0, 0, 1, 3))),
        draw(st.integers(1, 2)),
        heads_kv * draw(st.integers(1, 2)),
        heads_kv,
        wide,
        draw(st.sampled_from((wide, 8, 13))),
        draw(st.sampled_from((1.0, 1.0, 30.0))),
        draw(st.sampled_from((None, 1, 200, 2000))),
        draw(st.integers(0, 99)),
    )


def check(case: Case) -> None:
    """Both CPU back ends in float64, and the fast one in float32, against the formula."""
    tensors = tensors_of(case)
    want = results(lambda t: formula(case, t), tensors)
    assume(all(t.isfinite().all() for t in want))  # a row without keys: see test_kernels.py
    before = tiling.CHUNK
    tiling.CHUNK = case.chunk or before
    try:
        with filled():
            for backend, dtype, bar in (
                ("tiled", torch.float64, 1e-11),
                ("reference", torch.float64, 1e-11),
                ("tiled", torch.float32, 1e-5),
            ):
                found = results(ours(case, backend), tensors, dtype)
                for number, (got, wanted) in enumerate(zip(found, want, strict=True)):
                    # float32 rounds a logit by its size, and the weights in proportion
                    allowed = bar * (30 if case.size > 1 and dtype == torch.float32 else 1)
                    terms = case.batch * math.prod(case.grid) if number > 4 else 1
                    assert error(got, wanted, terms) <= allowed, f"{backend}, {dtype}, result {number}"
    finally:
        tiling.CHUNK = before


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_sweep(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000, deadline=None)
@given(cases())
def test_long_sweep(case: Case) -> None:
    check(case)


def seen(case: Case) -> Tensor:
    """[tokens, tokens]: the query sees the key."""
    axes = []
    for axis, size in enumerate(case.grid):
        table = torch.zeros(size, size, dtype=torch.bool)
        for query, keys in enumerate(windows(case, axis)):
            table[query, [key for key, _, _ in keys]] = True
        axes.append(table)
    joined = axes[0]
    for table in axes[1:]:
        joined = torch.kron(joined.int(), table.int()).bool()
    return joined


LOCAL = Case((14, 13), (7, 5), (1, 1), (1, 2), (False, False), "shift", heads=4, heads_kv=4, head_dim=32, head_dim_v=32)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_err_no_more_than_dense_attention(dtype: torch.dtype, backend: str) -> None:
    rounded = [None if t is None else t.to(dtype).double() for t in tensors_of(LOCAL)]
    mask = seen(LOCAL)

    def dense(tensors: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in tensors[:3])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out = out.transpose(1, 2).unflatten(1, LOCAL.grid)
        return out, out.new_zeros(out.shape[:-1], requires_grad=True) * 1

    def alone(tensors: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        out, _ = ours(LOCAL, backend)(tensors)
        return out, out.new_zeros(out.shape[:-1], requires_grad=True) * 1

    want = results(dense, rounded)
    theirs, found = results(dense, rounded, dtype), results(alone, rounded, dtype)
    for number, (got, other, exact) in enumerate(zip(found, theirs, want, strict=True)):
        if number != 1:  # dense attention returns no lse
            assert got.dtype == dtype
            assert error(got, exact) <= 1.5 * error(other, exact), f"result {number}"
    lse = ours(LOCAL, backend)([None if t is None else t.to(dtype) for t in rounded])[1]
    assert lse.dtype == torch.float32 and error(lse, ours(LOCAL, "reference")(rounded)[1]) < 1e-6


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_float32_is_within_1e_5_of_float64(backend: str) -> None:
    for more in ({}, {"bias": "offset", "extra": 5}, {"bias": "query"}, {"is_causal": (True, False), "size": 3.0}):
        case = Case(**{**vars(LOCAL), **more})
        tensors = tensors_of(case)
        want = results(ours(case, "reference"), tensors)
        for got, exact in zip(results(ours(case, backend), tensors, torch.float32), want, strict=True):
            assert error(got, exact) <= 1e-5


def test_logits_of_any_size_are_exact() -> None:
    """Weights without a maximum are only used where they are exact; the switch is in the middle of these sizes."""
    for size in (1e-4, 1.0, 4.0, 8.0, 12.0, 20.0, 100.0, 1e4):
        case = Case((11, 9), (5, 5), (1, 1), (1, 1), (False, False), "shift", heads=2, head_dim=24, size=size)
        tensors = tensors_of(case)
        want = results(lambda t, case=case: formula(case, t), tensors)
        for number, (got, exact) in enumerate(zip(results(ours(case, "tiled"), tensors), want, strict=True)):
            assert error(got, exact) < 1e-11, (size, number)
    for shift in (-1000.0, -45.0, -30.0, 15.0, 30.0, 1000.0):  # all logits moved: the same weights
        case = Case((11, 9), (5, 5), (1, 1), (1, 1), (False, False), "mask", bias="offset", head_dim=24)
        tensors = tensors_of(case)
        tensors[3] += shift
        want = results(lambda t, case=case: formula(case, t), tensors)
        for number, (got, exact) in enumerate(zip(results(ours(case, "tiled"), tensors), want, strict=True)):
            assert error(got, exact) < 1e-10, (shift, number)


@pytest.mark.parametrize("far", [math.nan, math.inf])
@pytest.mark.parametrize("which", [1, 2])
def test_what_is_not_finite_stays_where_it_is_seen(which: int, far: float) -> None:
    """A key or value of one batch entry and head reaches no other, and no query outside a few tiles around it."""
    case = Case((24, 24), (5, 5), (1, 1), (1, 1), (False, False), "shift", batch=2, heads=2, head_dim=16)
    tensors = tensors_of(case)
    want, _ = ours(case, "tiled")(tensors)
    tensors[which][0, 12, 12, 1, 0] = far
    got, _ = ours(case, "tiled")(tensors)
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[0, :, :, 0], want[0, :, :, 0])
    torch.testing.assert_close(got[0, 23, :, 1], want[0, 23, :, 1])
    assert not got[0, 12, 12, 1].isfinite().all()


def test_the_workspace_of_one_call_is_not_seen_by_the_next() -> None:
    case = Case((9, 9), (3, 3), (1, 1), (1, 1), (False, False), "zero", batch=2, head_dim=16)
    tensors = tensors_of(case)
    want = results(ours(case, "tiled"), tensors)
    bad = [None if t is None else torch.full_like(t, math.nan) for t in tensors]
    results(ours(case, "tiled"), bad)
    for got, exact in zip(results(ours(case, "tiled"), tensors), want, strict=True):
        assert torch.equal(got, exact)
    kept = sum(buffer.numel() for buffer in tiled._kept.memory.buffers.values())
    assert 0 < kept <= tiled._WORKSPACE * tiled._sharing()


def test_the_same_bits_again_under_deterministic_algorithms() -> None:
    case = Case(**{**vars(LOCAL), "bias": "offset", "extra": 3, "batch": 2})
    tensors = tensors_of(case)
    torch.use_deterministic_algorithms(True)
    try:
        for backend in ("tiled", "reference"):
            runs = [results(ours(case, backend), tensors, torch.float32) for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), backend
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("bias", ["offset", "query"])
def test_gradients_that_nobody_needs_are_not_computed(backend: str, bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any subset of the inputs may be frozen: the others' gradients stay, and the back end returns None for it."""
    from attnzoo.kernels.neighborhood_attention import reference

    module, asked = {"tiled": tiled, "reference": reference}[backend], []
    original = module.backward

    def watched(*arguments: Any) -> tuple[Tensor | None, ...]:
        found = original(*arguments)
        asked.append([(needed, gradient is not None) for needed, gradient in zip(arguments[-1], found, strict=True)])
        return found

    monkeypatch.setattr(module, "backward", watched)
    case = Case((6, 5), (3, 3), (1, 1), (1, 1), (False, False), "shift", bias=bias, extra=2, heads=2, heads_kv=1)
    tensors = tensors_of(case)
    want = results(ours(case, backend), tensors)[2:]
    for needs in itertools.product((True, False), repeat=6):
        if not any(needs):
            continue
        leaves = [t.detach().clone().requires_grad_(needed) for t, needed in zip(tensors, needs)]
        out, lse = ours(case, backend)(leaves)
        by_out, by_lse = ((torch.arange(t.numel()) % 7 - 3).view(t.shape).double() / 4 for t in (out, lse))
        torch.autograd.backward([out, lse], [by_out, by_lse])
        for leaf, needed, exact in zip(leaves, needs, want, strict=True):
            assert (leaf.grad is not None) == needed
            if needed:
                torch.testing.assert_close(leaf.grad, exact)
        assert asked[-1] == [(needed, needed) for needed in needs]


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that a call holds at a time beyond what it was given, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del kept
    return most


@pytest.mark.parametrize(
    "grid, kernel, dilation, batch, bias",
    [
        ((56, 56), 7, 1, 1, False),
        ((56, 56), 7, 8, 1, False),
        ((56, 56), 7, 1, 8, True),
        ((28, 28), 7, 1, 1, False),
        ((28, 28), 7, 4, 1, False),
        ((8, 28, 28), (3, 7, 7), 1, 1, False),
        ((4096,), 257, 1, 1, False),
    ],
)
def test_memory(grid: tuple[int, ...], kernel: Any, dilation: int, batch: int, bias: bool) -> None:
    """Beyond its inputs a call holds at most 4 times them and the output, 8 times with the gradients."""
    tensors = [torch.randn(batch, *grid, 4, 32, requires_grad=True) for _ in range(3)]
    table = torch.randn(4, *[2 * kernel - 1] * len(grid), requires_grad=True) if bias else None
    unit = sum(t.nbytes for t in tensors) + tensors[0].nbytes
    grad = torch.randn_like(tensors[0])

    def forward() -> Tensor:
        return neighborhood_attention(*tensors, kernel, dilation=dilation, bias=table, backend="tiled")

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), tensors, grad)

    forward()
    threads = torch.get_num_threads()
    try:
        for (run, bar), count in itertools.product(((forward, 4), (both, 8)), (1, 2)):
            torch.set_num_threads(count)
            tiled._kept.__dict__.clear()
            measured = peak(run)
            assert measured > tensors[0].nbytes  # the output, at least
            assert measured <= bar * unit, f"{measured / unit:.1f} times with {count} threads"
    finally:
        torch.set_num_threads(threads)


FLEX = [
    Case((30,), (7,), (3,), (2,), (True,), "shift", extra=2, head_dim=16, head_dim_v=16),
    Case((9, 8), (5, 4), (2, 1), (1, 2), (False, True), "shift", "offset", heads=4, head_dim=16, head_dim_v=8),
    Case((7, 9), (5, 7), (1, 2), (3, 2), (False, False), "mask", "offset", extra=3, head_dim=16, head_dim_v=16),
    Case((4, 5, 6), (3, 2, 5), (2, 1, 3), (1, 2, 1), (True, False, False), "mask", batch=2, head_dim=16),
    Case((12, 12), (4, 4), (4, 4), (1, 1), (False, False), "shift", head_dim=16, head_dim_v=16),
]


@pytest.mark.parametrize("case", FLEX, ids=lambda case: f"{case.grid}-{case.border}")
def test_flex_says_the_same(case: Case) -> None:
    """Eagerly, out and lse: what flex serves it serves with this library's meaning."""
    from attnzoo.kernels.neighborhood_attention import _problem, flex

    tensors = [None if t is None else t.float() for t in tensors_of(case)]
    options = [case.kernel_size, case.stride, case.dilation, case.is_causal, case.head_dim**-0.5, case.border]
    problem = _problem(tensors, options, return_lse=True)
    assert flex.reasons(problem) == ["flex returns no lse on a CPU"]
    want = formula(case, [None if t is None else t.double() for t in tensors])
    for got, exact in zip(flex.attend(*tensors, problem, compiled=False), want, strict=True):
        assert error(got, exact) < 1e-5
