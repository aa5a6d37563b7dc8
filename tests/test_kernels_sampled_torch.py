"""sampled_window_attention as PyTorch and its user meet it: gradients, operator checks, compile, autocast, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from test_kernels_sampled import INTERPRETING, call, compare, dense, make, results

from attnzoo.errors import UnsupportedError
from attnzoo.kernels import dispatch, positions_from_normalized, sampled_window_attention


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend, bias):
    """Output and lse by query, key, value, positions and bias; positions stay clear of the kinks."""
    tensors = make((1, 2), (1, 2), (3, 3), heads=2, heads_kv=1, dim=2, dim_v=1, samples=3, batch=1, bias=bias)
    tensors[3] = (tensors[3].floor() + 0.2 + 0.6 * torch.rand_like(tensors[3])).double()
    given = [t if t is None else t.double().requires_grad_() for t in tensors]
    wanted = [t for t in given if t is not None]
    assert torch.autograd.gradcheck(lambda *t: call([*t, *[None] * (5 - len(t))], (1, 2), backend=backend), wanted)


def test_double_backward_is_refused():
    query, *rest = make()
    out, _ = call([query.requires_grad_(), *rest], (3, 4))
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_gradients_that_nobody_asks_for(backend):
    """Every subset of one or two gradients is what the full set holds."""
    tensors = make((1, 2), batch=1)
    want = results(lambda t: call(t, (3, 4), backend=backend), tensors)
    made = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=made).bfloat16().to(t.dtype) for t in want[:2]]
    for first in range(5):
        for second in range(first, 5):
            given = [t.detach().requires_grad_(i in (first, second)) for i, t in enumerate(tensors)]
            found = torch.autograd.grad(
                call(given, (3, 4), backend=backend), [t for t in given if t.requires_grad], weights
            )
            for a, i in zip(found, sorted({first, second})):
                torch.testing.assert_close(a, want[2 + i], rtol=1e-5, atol=1e-5)
    given = [t.detach().requires_grad_(i == 0) for i, t in enumerate(tensors)]
    _, lse = call(given, (3, 4), backend=backend)
    (by_query,) = torch.autograd.grad(lse.sum(), given[0])
    exact = [t.double() for t in tensors]
    exact[0].requires_grad_()
    (wanted,) = torch.autograd.grad(dense(*exact, (3, 4))[1].sum(), exact[0])
    torch.testing.assert_close(by_query.double(), wanted, rtol=1e-5, atol=1e-5)


def test_same_bits_in_every_run():
    tensors = make((3, 3), keys=(3, 3), batch=2)
    first, again = (results(lambda t: call(t, (3, 4), backend="tiled"), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    tensors = make((1, 2), batch=1, bias=bias)
    for differentiable in (True, False):
        given = [t if t is None else t.detach().requires_grad_(differentiable) for t in tensors]
        operator = torch.ops.attnzoo.sampled_window_attention.default
        torch.library.opcheck(operator, (*given, (3, 4), 0.3, "tiled"))


def compiled_equals_eager(compiler):
    def run(query, key, value, positions, bias):
        out, lse = sampled_window_attention(query, key, value, positions * 1.5, (3, 4), bias=bias, return_lse=True)
        return out * 2, lse

    compiled = torch.compile(run, fullgraph=True, backend=compiler, dynamic=True)
    for windows in ((1, 2), (2, 3)):
        tensors = make(windows)
        compare(results(lambda t: compiled(*t), tensors), results(lambda t: run(*t), tensors), 1e-6)


def test_compiles_in_one_graph():
    compiled_equals_eager("aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor():
    compiled_equals_eager("inductor")


def test_autocast_casts_query_key_value_only():
    query, key, value, positions, bias = make()
    seen = []
    hook = dispatch.backend_module("sampled_window_attention", "tiled")
    forward = hook.forward
    try:
        hook.forward = lambda *a: (seen.extend(a[:5]), forward(*a))[1]
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = call((query, key, value.bfloat16(), positions, bias), (3, 4), backend="tiled")
    finally:
        hook.forward = forward
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert [t.dtype for t in seen] == [torch.bfloat16] * 3 + [torch.float32] * 2
    halves = [t.bfloat16() for t in (query, key, value)]
    for a, b in zip((out, lse), call((*halves, positions, bias), (3, 4))):
        assert torch.equal(a, b)


def test_inputs_are_taken_as_they_are_and_outputs_never_alias():
    plain = make()
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in plain]
    one, other = (results(lambda t: call(t, (3, 4)), t) for t in (plain, strided))
    compare(one, [t.double() for t in other], 1e-6)
    storages = {t.untyped_storage().data_ptr() for t in plain}
    assert all(t.untyped_storage().data_ptr() not in storages for t in one)
    before = [t.clone() for t in plain]
    results(lambda t: call(t, (3, 4)), plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, before))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_an_empty_batch(backend):
    got = results(lambda t: call(t, (3, 4), backend=backend), make(batch=0))
    assert got[0].shape == (0, 6, 8, 4, 8) and got[1].shape == (0, 6, 8, 4)
    assert not got[6].any() and got[6].shape == (4, 12, 9)


def test_dtypes_of_positions_and_bias_are_free():
    query, key, value, positions, bias = make()
    got = results(lambda t: call(t, (3, 4)), [query, key, value, positions.double(), bias.half()])
    assert [g.dtype for g in got] == [torch.float32] * 5 + [torch.float64, torch.float16]
    want = results(lambda t: call(t, (3, 4)), [query, key, value, positions, bias.half().float()])
    compare(got, [w.double() for w in want], 1e-3)


def test_scale_and_window_size():
    query, key, value, positions, bias = make(window=(4, 4), samples=16)
    by_number = sampled_window_attention(query, key, value, positions, 4, bias=bias)
    assert torch.equal(by_number, sampled_window_attention(query, key, value, positions, [4, 4], 8**-0.5, bias=bias))
    inside = positions.clamp(0.1, 3.9)
    even = sampled_window_attention(query, key, torch.ones_like(value), inside, 4, 0.0)
    torch.testing.assert_close(even, torch.ones_like(even))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(2, 6, 8, 8)}, ValueError, "query must have 5 dimensions"),
        ({"query": [1]}, TypeError, "query must be a tensor"),
        ({"query": torch.zeros(2, 6, 8, 4, 8).int()}, TypeError, "query must be one of"),
        ({"query": torch.zeros(2, 6, 8, 4, 8).half()}, ValueError, "share one dtype"),
        ({"query": torch.zeros(2, 6, 8, 3, 8)}, ValueError, "multiple of key's, got 3 and 2"),
        ({"query": torch.zeros(2, 6, 8, 4, 8, device="meta")}, ValueError, "share one device"),
        ({"query": torch.zeros(2, 6, 0, 4, 8)}, ValueError, "no dimension but the batch may be 0, got query"),
        ({"key": torch.zeros(2, 5, 6, 2, 7)}, ValueError, "key must have query's batch and head_dim"),
        ({"key": torch.zeros(1, 5, 6, 2, 8)}, ValueError, "key must have query's batch and head_dim"),
        ({"value": torch.zeros(2, 5, 5, 2, 8)}, ValueError, "value must have key's"),
        ({"value": torch.zeros(2, 5, 6, 2, 0)}, ValueError, "no dimension but the batch may be 0, got value"),
        ({"positions": torch.zeros(2, 2, 2, 9, 2)}, ValueError, "positions must have 6 dimensions"),
        (
            {"positions": torch.zeros(2, 2, 2, 2, 9, 2)},
            ValueError,
            r"positions must be .*\(2, 2, 2, 4, 'at least 1', 2\)",
        ),
        ({"positions": torch.zeros(2, 2, 2, 4, 9, 3)}, ValueError, "positions must be"),
        ({"positions": torch.zeros(2, 2, 2, 4, 0, 2)}, ValueError, "positions must be"),
        ({"positions": torch.zeros(2, 2, 2, 4, 9, 2).long()}, TypeError, "positions must be one of"),
        ({"window_size": (4, 4)}, ValueError, r"multiple of window_size .* got grid \(6, 8\), window_size \(4, 4\)"),
        ({"window_size": (3, 4, 1)}, ValueError, "window_size must be one value or one per axis"),
        ({"window_size": 0}, ValueError, "window_size must be at least 1"),
        ({"window_size": 2.0}, TypeError, "window_size must hold int"),
        ({"bias": torch.zeros(4, 12)}, ValueError, "bias must have 3 dimensions"),
        ({"bias": torch.zeros(4, 9, 12)}, ValueError, r"bias must be .*\(4, 12, 9\), got \(4, 9, 12\)"),
        ({"bias": torch.zeros(4, 12, 9).int()}, TypeError, "bias must be one of"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"backend": "flex"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input_is_named(change, error, words):
    query, key, value, positions, bias = make()
    given = {"query": query, "key": key, "value": value, "positions": positions, "window_size": (3, 4), "bias": bias}
    with pytest.raises(error, match=words):
        sampled_window_attention(**(given | change))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0.0, 0.0], 4), TypeError, "coordinates must be a tensor"),
        ((torch.zeros(3), 4), ValueError, r"coordinates must be \[..., 2\]"),
        ((torch.zeros(3, 2).int(), 4), TypeError, "coordinates must be one of"),
        ((torch.zeros(3, 2), (4, 0)), ValueError, "size must be at least 1"),
        ((torch.zeros(3, 2), 4, 1), TypeError, "align_corners must be a bool"),
    ],
)
def test_bad_coordinates_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        positions_from_normalized(*arguments)


def test_reasons_are_told():
    query, key, value, positions, bias = make()
    name = "sampled_window_attention"
    assert dispatch.not_supported_reasons(name, "tiled", query, key, value, positions, (3, 4), bias=bias) == []
    assert dispatch.not_supported_reasons(name, "flex", query, key, value, positions, (3, 4))
    big = make(dim=257, dim_v=300, dtype=torch.float64)
    told = dispatch.not_supported_reasons(name, "triton", *big[:4], (3, 4))
    assert len(told) == (3 if INTERPRETING else 4) and "head_dim up to 256; got 257" in "".join(told)
    if not INTERPRETING:
        with pytest.raises(UnsupportedError, match="triton needs a CUDA"):
            call((query, key, value, positions, bias), (3, 4), backend="triton")
