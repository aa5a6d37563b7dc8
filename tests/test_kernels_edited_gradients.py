"""edited_attention's gradients, read-outs and group means against float64 formulas, through every back end.

Under TRITON_INTERPRET=1 (the tests with "triton" in their names, in a process of their own) memory that the launchers
allocate begins as NaN, so that what a kernel leaves out shows.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels_edited import BACKENDS, INTERPRETING, close, dense_groups, dense_probs, problems, qkv
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.kernels import dispatch
from attnzoo.kernels.edited_attention import (
    Visibility,
    attention_column_sums,
    attention_probs,
    edited_attention,
    group_value_mean,
    grouped_attention,
)

needs_interpreter = pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
TOLERANCE = 1e-5
relaxed = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@contextmanager
def empty_is_nan():
    """Within, torch.empty gives NaN."""
    empty = torch.empty

    def filled(*arguments, **options):
        made = empty(*arguments, **options)
        return made.fill_(math.nan) if made.is_floating_point() and made.device.type == "cpu" else made

    torch.empty = filled
    try:
        yield
    finally:
        torch.empty = empty


def exact(tensors: dict[str, Tensor], vis: Visibility, groups: Tensor, num_groups: int, **edits):
    """group_output and group_lse by the formula, differentiable also where a group has no key."""
    q, k, v = (tensors[name] for name in ("query", "key", "value"))
    vis = replace(vis, mask=tensors.get("mask", vis.mask))
    s, _ = dense_probs(q, k, vis, **edits, **{n: tensors[n] for n in ("key_bias", "boost") if n in tensors})
    vh = v.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2)
    outs, lses = [], []
    for g in range(num_groups):
        own = s.masked_fill((groups != g).unsqueeze(2), -math.inf)
        top = own.detach().amax(-1, keepdim=True).clamp_min(-1e300)
        e = torch.exp(own - top)
        total = e.sum(-1, keepdim=True)
        safe = torch.where(total == 0, 1.0, total)
        outs.append(e / safe @ vh)
        lses.append(torch.where(total == 0, 0.0, safe.log() + top).squeeze(-1))
    return torch.stack(outs, 3).transpose(1, 2), torch.stack(lses, 3).transpose(1, 2)


def check_gradients(problem, backend: str, tolerance: float = TOLERANCE) -> None:
    """Every gradient of output and lse, error relative to the largest entry of each."""
    q, k, v, vis, edits, groups, num_groups, _ = problem
    given = {"query": q, "key": k, "value": v, "key_bias": edits["key_bias"], "boost": edits["boost"]}
    if vis.mask is not None and vis.mask.is_floating_point():
        given["mask"] = vis.mask
    given = {name: t for name, t in given.items() if t is not None}
    options = {n: edits[n] for n in ("scale", "softcap", "temperature")}
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    doubles = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    with empty_is_nan():
        out, lse = grouped_attention(
            *(leaves[n] for n in ("query", "key", "value")),
            groups,
            num_groups,
            replace(vis, mask=leaves.get("mask", vis.mask)),
            **options,
            **{n: leaves[n] for n in ("key_bias", "boost") if n in leaves},
            backend=backend,
        )
        grad_out, grad_lse = torch.randn(out.shape), torch.randn(lse.shape)
        loss = (out * grad_out).sum() + (lse.masked_fill(torch.isinf(lse), 0.0) * grad_lse).sum()
        got = torch.autograd.grad(loss, list(leaves.values()))
    want_out, want_lse = exact(doubles, vis, groups, num_groups, **options)
    loss = (want_out * grad_out).sum() + (want_lse * grad_lse).sum()
    want = torch.autograd.grad(loss, list(doubles.values()), allow_unused=True)
    for name, a, b in zip(leaves, got, want):
        assert a.shape == given[name].shape and a.dtype == given[name].dtype
        close(a, torch.zeros_like(a, dtype=torch.float64) if b is None else b, tolerance)


@settings(max_examples=40, derandomize=True, **relaxed)
@given(problem=problems())
def test_any_gradient(problem):
    check_gradients(problem, "tiled")


@pytest.mark.slow
@settings(max_examples=400, **relaxed)
@given(problem=problems(), backend=st.sampled_from(["tiled", "reference"]))
def test_any_gradient_long(problem, backend):
    check_gradients(problem, backend)


def tall(D: int, Dv: int, num_groups: int, repeats: int = 2, Nq: int = 5, Nk: int = 37, **edits):
    """A problem of few tiles, for the interpreter."""
    torch.manual_seed(D + Dv + num_groups)
    q, k, v = qkv(2, Nq, Nk, repeats, 1, D, Dv)
    vis = edits.pop("vis", Visibility())
    edits = {"scale": None, "softcap": None, "temperature": 1.0, "key_bias": None, "boost": None} | edits
    heads = edits.pop("group_heads", 1)
    groups = torch.randint(0, num_groups, (2, heads, Nk), dtype=torch.uint8)
    return q, k, v, vis, edits, groups, num_groups, None


TALL = {
    "plain head dims 24 and 40": lambda: tall(24, 40, 1),
    "8 groups by query head, bias by head": lambda: tall(16, 8, 8, group_heads=2, key_bias=torch.randn(2, 2, 37)),
    "softcap, boost, temperature, 3 groups": lambda: tall(
        16, 16, 3, softcap=2.0, temperature=0.7, boost=torch.rand(1, 2, 37)
    ),
    "window, padding, 2 groups": lambda: tall(
        8, 8, 2, vis=Visibility(window_size=6, key_mask=torch.arange(37)[None] % 5 > 0), Nq=20
    ),
    "spans and a cache offset": lambda: tall(
        8,
        8,
        1,
        vis=Visibility(query_offset=9, span_ids=torch.arange(37)[None] // 9 % 3 - 1),
        boost=torch.rand(2, 1, 37),
    ),
    "float mask shared by heads and batch": lambda: tall(
        8, 8, 2, vis=Visibility(is_causal=False, mask=torch.randn(1, 1, 5, 37)), boost=torch.rand(1, 1, 37)
    ),
    "bool mask by head": lambda: tall(8, 16, 2, vis=Visibility(mask=torch.rand(2, 2, 5, 37) > 0.3)),
    "head dim 256": lambda: tall(256, 16, 2, Nq=2, Nk=20),
    "rows that see nothing": lambda: tall(8, 8, 2, vis=Visibility(key_mask=torch.arange(37)[None] > 34), Nq=30),
}


@needs_interpreter
@pytest.mark.parametrize("name", TALL)
def test_triton_gradients(name):
    check_gradients(TALL[name](), "triton")


@needs_interpreter
@settings(max_examples=4, derandomize=True, **relaxed)
@given(problem=problems())
def test_triton_any_gradient(problem):
    check_gradients(problem, "triton")


@needs_interpreter
def test_triton_gradients_are_the_same_bits_and_only_those_asked(monkeypatch):
    """Two runs agree in every bit; a kernel of a gradient that nobody asked for is not launched."""
    backward = importlib.import_module("attnzoo.kernels.edited_attention.triton_backward")
    launched: list[tuple[str, dict]] = []
    launch_with = backward.launch_with

    def watch(kernel, programs, common, **own):
        launched.append((kernel.__name__, own))
        launch_with(kernel, programs, common, **own)

    monkeypatch.setattr(backward, "launch_with", watch)
    q, k, v = qkv(Nq=12)
    bias = torch.randn(1, 4, 12)
    for wanted, names in (
        ((q,), ["edited_grad_query"]),
        ((v,), ["edited_grad_key_value"]),
        ((bias, q), ["edited_grad_query", "edited_grad_key_value"]),
    ):
        for tensor in (q, k, v, bias):
            tensor.requires_grad_(any(tensor is one for one in wanted))
        out = edited_attention(q, k, v, key_bias=bias, backend="triton").square().sum()
        launched.clear()
        first = torch.autograd.grad(out, wanted, retain_graph=True)
        assert [name for name, _ in launched] == names
        flags = launched[-1][1]
        if len(names) == 1 and names[0] == "edited_grad_key_value":
            assert flags["GRAD_VALUE"] and not flags["GRAD_KEY"] and not flags["GRAD_BIAS"]
        again = torch.autograd.grad(out, wanted)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@needs_interpreter
@pytest.mark.parametrize("Nq", [1, 40])
def test_triton_forward_reads_keys_once_for_few_rows(monkeypatch, Nq):
    """One program serves all groups of a decoding step, however they lie."""
    forward = importlib.import_module("attnzoo.kernels.edited_attention.triton")
    launched = []
    launch_with = forward.launch_with

    def watch(kernel, programs, common, **own):
        launched.append((programs, own))
        launch_with(kernel, programs, common, **own)

    monkeypatch.setattr(forward, "launch_with", watch)
    q, k, v = qkv(B=1, Nq=Nq, Nk=60)
    groups = (torch.arange(60) % 4).to(torch.uint8).reshape(1, 1, 60)
    got = grouped_attention(q, k, v, groups, 4, backend="triton")
    for a, b in zip(got, dense_groups(q, k, v, groups, 4, Visibility())):
        close(a, b)
    ((programs, own),) = launched
    assert programs[2] == math.ceil(4 / own["FOLD"]) * own["splits"] and own["SKIP"] == (own["FOLD"] < 4)
    if Nq == 1:
        assert own["FOLD"] == 4 and own["BM"] == 16


@pytest.mark.skipif(INTERPRETING, reason="is the outer process")
def test_triton_in_the_interpreter():
    """Runs this file's triton tests in a process of their own: the variable must not reach other tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype):
    """No worse than 1.5 times plain attention's own in that dtype, both against float64."""
    q, k, v = (t.requires_grad_() for t in qkv(B=1, Nq=64, Nk=64, H=2, D=16, Dv=16, dtype=dtype))
    weight = torch.randn(1, 64, 2, 16)
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    dense = dense_probs(*leaves[:2], Visibility())[1] @ leaves[2].transpose(1, 2)
    want = torch.autograd.grad((dense.transpose(1, 2) * weight).sum(), leaves)
    stock = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)
    out = edited_attention(q, k, v, key_bias=torch.zeros(1, 1, 64), backend="tiled")
    budgets = torch.autograd.grad((stock * weight.to(dtype)).sum(), (q, k, v))
    for got, theirs, exactly in zip(torch.autograd.grad((out * weight.to(dtype)).sum(), (q, k, v)), budgets, want):
        assert got.dtype == dtype
        assert (got.double() - exactly).norm() <= 1.5 * (theirs.double() - exactly).norm()


# ---------------------------------------------------------------------------------------------------------- read-outs


def check_readouts(problem, backend: str) -> None:
    q, k, _, vis, edits, _, _, rows = problem
    picked = slice(None) if rows is None else slice(*rows)
    _, p = dense_probs(q, k, vis, **edits)
    p = p[:, :, picked]
    with empty_is_nan():
        options = {"rows": rows, "backend": backend, **edits}
        close(attention_column_sums(q, k, vis, **options), p.sum(2))
        close(attention_probs(q, k, vis, **options), p.transpose(1, 2))
        close(attention_probs(q, k, vis, head_reduction="max", **options), p.amax(1))
        close(attention_probs(q, k, vis, head_reduction="mean", **options), p.mean(1))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@settings(max_examples=25, derandomize=True, **relaxed)
@given(problem=problems())
def test_any_readout(backend, problem):
    check_readouts(problem, backend)


@pytest.mark.slow
@settings(max_examples=300, **relaxed)
@given(problem=problems())
def test_any_readout_long(problem):
    check_readouts(problem, "tiled")


@needs_interpreter
@settings(max_examples=5, derandomize=True, **relaxed)
@given(problem=problems())
def test_triton_any_readout(problem):
    check_readouts(problem, "triton")


@needs_interpreter
@pytest.mark.parametrize("name", ["plain head dims 24 and 40", "rows that see nothing", "head dim 256"])
def test_triton_readouts(name):
    check_readouts(TALL[name](), "triton")


def test_readouts_are_operators():
    """opcheck, one graph under torch.compile, no gradient where there is none, and one where it is promised."""
    q, k, _ = qkv()
    real, bias = torch.rand(2, 12) > 0.3, torch.randn(1, 4, 12)
    operands = (q, k, real, None, None, bias, None, True, 3, None, 0.5, None, 0.8, "tiled")
    for name, more in (("attention_column_sums", ()), ("attention_probs", ("none",)), ("attention_probs", ("max",))):
        # test_aot_dispatch_dynamic differentiates, which these refuse.
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.attnzoo, name).default, (*operands, *more), test_utils=tests)

    def run(q, k):
        return attention_probs(q, k, rows=(2, None), head_reduction="max"), attention_column_sums(q, k, key_bias=bias)

    for got, want in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k), run(q, k)):
        close(got, want, 1e-6)
    leaf = q.detach().requires_grad_()
    with pytest.raises(UnsupportedError, match="attention_column_sums has no gradient"):
        attention_column_sums(leaf, k)
    with torch.no_grad():
        close(attention_column_sums(leaf, k), attention_column_sums(q, k), 1e-6)
    with pytest.raises(UnsupportedError, match="attention_probs: backend 'tiled' has no gradient"):
        attention_probs(leaf, k, backend="tiled")
    doubles = [t.detach().double().requires_grad_() for t in (q, k)]
    assert torch.autograd.gradcheck(lambda q, k: attention_probs(q, k, head_reduction="mean"), doubles)
    close(attention_probs(leaf, k), attention_probs(q, k), 1e-6)


def test_readouts_tell_their_reasons():
    q, k, _ = qkv()
    for operation in ("attention_probs", "attention_column_sums"):
        assert dispatch.not_supported_reasons(operation, "tiled", q, k) == []
        if not INTERPRETING:
            assert "CUDA" in dispatch.not_supported_reasons(operation, "triton", q, k)[0]
    for readout in (attention_probs, attention_column_sums):
        with pytest.raises(ValueError, match="backend must be one of"):
            readout(q, k, backend="cuda")
    with pytest.raises(ValueError, match="head_reduction must be one of"):
        attention_probs(q, k, head_reduction="sum")


# -------------------------------------------------------------------------------------------------------- group means


@pytest.mark.parametrize("elements", [64, 1 << 22])
def test_group_value_mean(monkeypatch, elements):
    """Against attention with scale 0, whose softmax is uniform; cut into pieces of few elements, and in one."""
    module = importlib.import_module("attnzoo.kernels.edited_attention.value_mean")
    monkeypatch.setattr(module, "MASK_ELEMENTS", elements)

    @settings(max_examples=40, derandomize=True, **relaxed)
    @given(problem=problems())
    def check(problem):
        q, _, v, vis, _, groups, num_groups, rows = problem
        if vis.mask is not None and vis.mask.is_floating_point():
            vis = replace(vis, mask=vis.mask > 0)
        mean, count = group_value_mean(
            v, groups, num_groups, vis, num_queries=q.shape[1], num_heads=q.shape[2], rows=rows
        )
        k = v.new_zeros(*v.shape[:3], q.shape[3])
        want, lse = dense_groups(q, k, v, groups, num_groups, vis, scale=0.0)
        picked = slice(None) if rows is None else slice(*rows)
        close(mean, want[:, picked])
        counted = lse.exp().round().long()[:, picked]
        assert torch.equal(count.expand(counted.shape), counted) and mean.is_contiguous()

    check()


def test_group_value_mean_differentiates_and_compiles():
    v = torch.randn(1, 7, 2, 3, dtype=torch.float64, requires_grad=True)
    groups = (torch.arange(7) % 3).to(torch.uint8).reshape(1, 1, 7)
    assert torch.autograd.gradcheck(lambda v: group_value_mean(v, groups, 2, num_heads=4)[0], v)
    spans = Visibility(span_ids=(torch.arange(7) // 3).reshape(1, 7))
    assert torch.autograd.gradcheck(lambda v: group_value_mean(v, groups, 2, spans)[0], v)

    def run(v):
        return group_value_mean(v, groups, 3, rows=(-2, None))

    for got, want in zip(torch.compile(run, fullgraph=True, backend="eager")(v.detach()), run(v.detach())):
        close(got, want, 1e-12)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"value": torch.zeros(2, 12, 8)}, ValueError, "value must have 4 dimensions"),
        ({"groups": torch.zeros(2, 1, 12)}, TypeError, "groups must be one of uint8"),
        ({"groups": torch.zeros(2, 1, 11, dtype=torch.uint8)}, ValueError, "groups must have the shape"),
        ({"num_groups": 9}, ValueError, "num_groups must be from 1 to 8"),
        ({"num_heads": 3}, ValueError, "num_heads must be a multiple"),
        ({"rows": (4, 2)}, ValueError, "rows must lie"),
        ({"visibility": Visibility(mask=torch.zeros(2, 1, 12, 12))}, TypeError, "visibility.mask must be bool"),
    ],
)
def test_group_value_mean_names_bad_input(change, error, words):
    given = {"value": torch.zeros(2, 12, 2, 8), "groups": torch.zeros(2, 1, 12, dtype=torch.uint8), "num_groups": 2}
    with pytest.raises(error, match=words):
        group_value_mean(**(given | change))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_without_keys_beside_one_of_no_mass(backend):
    """The CPU's one softmax for all groups must not take the first for the second."""
    q, k, v = qkv(Nq=1)
    groups = torch.zeros(1, 1, 12, dtype=torch.uint8)
    groups[..., :2] = 1
    groups[..., 4] = 3
    bias = torch.where(groups == 1, -300.0, 0.0)
    got = grouped_attention(q, k, v, groups, 4, key_bias=bias, backend=backend)
    for a, b in zip(got, dense_groups(q, k, v, groups, 4, Visibility(), key_bias=bias)):
        close(a, b)
