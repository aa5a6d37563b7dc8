"""What neighborhood_attention refuses: every message names the argument, what it got and what was wanted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from attnzoo.errors import UnsupportedError
from attnzoo.kernels import na1d, na2d, na3d, neighborhood_attention, neighborhood_logits, not_supported_reasons

ROW = (1, 8, 8, 2, 8)


def zeros(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(8, 8, 2, 8), torch.zeros(4, 8, 2, 8)])


def arguments_of(change: dict[str, Any]) -> dict[str, Any]:
    """A good call, but for the change."""
    good: dict[str, Any] = {name: zeros(*ROW) for name in ("query", "key", "value")} | {"kernel_size": 3}
    return good | {name: value() if callable(value) else value for name, value in change.items()}


# name: (arguments that replace the good ones, or functions that make them; error; what its message holds)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # tensors
    "query is a number": ({"query": 1}, TypeError, "query must be a tensor, got int"),
    "query is an array": ({"query": np.zeros(ROW)}, TypeError, "query must be a tensor, got ndarray"),
    "query is None": ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
    "key is a list": ({"key": [[0.0]]}, TypeError, "key must be a tensor, got list"),
    "value is None": ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
    "no grid axis": ({"query": zeros(1, 2, 8)}, ValueError, "one to three grid axes, got 3 dimensions"),
    "four grid axes": ({"query": zeros(1, 2, 2, 2, 2, 2, 8)}, ValueError, "one to three grid axes, got 7 dimensions"),
    "key of another rank": ({"key": zeros(1, 8, 2, 8)}, ValueError, "key must have 5 dimensions, got 4"),
    "value of another rank": ({"value": zeros(8, 8)}, ValueError, "value must have 5 dimensions, got 2"),
    "integers": ({"query": zeros(*ROW, dtype=torch.int64)}, TypeError, "query must be one of float32.*got int64"),
    "complex": ({"value": zeros(*ROW, dtype=torch.complex64)}, TypeError, "value must be one of .*got complex64"),
    "bool": ({"key": zeros(*ROW, dtype=torch.bool)}, TypeError, "key must be one of .*got bool"),
    "float8": ({"query": zeros(*ROW).to(torch.float8_e4m3fn)}, TypeError, "query must be one of .*got float8_e4m3fn"),
    "quantized": (
        {"query": lambda: torch.quantize_per_tensor(zeros(*ROW), 0.1, 0, torch.quint8)},
        TypeError,
        "query must be one of .*got quint8",
    ),
    "sparse": (
        {"key": lambda: zeros(*ROW).to_sparse()},
        TypeError,
        "key must be a dense tensor.*got layout sparse_coo",
    ),
    "nested": ({"query": nested}, TypeError, "query must be a dense tensor.*got a nested tensor.*ragged"),
    "mixed dtypes": ({"key": zeros(*ROW).half()}, ValueError, "share one dtype, got query.dtype=torch.float32, key"),
    "mixed devices": ({"key": zeros(*ROW, device="meta")}, ValueError, "share one device, got query.device=cpu"),
    "key of another grid": (
        {"key": zeros(1, 8, 7, 2, 8)},
        ValueError,
        r"key must have query's .*got \(1, 8, 7, 2, 8\)",
    ),
    "key of another batch": (
        {"key": zeros(3, 8, 8, 2, 8)},
        ValueError,
        r"key must have query's .*got \(3, 8, 8, 2, 8\)",
    ),
    "key of another head_dim": (
        {"key": zeros(1, 8, 8, 2, 9)},
        ValueError,
        r"key must have query's .*got \(1, 8, 8, 2, 9\)",
    ),
    "value of other heads": (
        {"value": zeros(1, 8, 8, 1, 8)},
        ValueError,
        "value must have key's batch, grid and heads",
    ),
    "value of another grid": ({"value": zeros(1, 4, 8, 2, 8)}, ValueError, "value must have key's batch, grid"),
    "heads that do not divide": ({"query": zeros(1, 8, 8, 3, 8)}, ValueError, "multiple of key's, got 3 and 2"),
    "fewer heads than key's": ({"query": zeros(1, 8, 8, 1, 8)}, ValueError, "multiple of key's, got 1 and 2"),
    "empty grid": (
        {name: zeros(1, 0, 8, 2, 8) for name in ("query", "key", "value")},
        ValueError,
        r"no dimension but the batch may be 0, got query \(1, 0, 8, 2, 8\)",
    ),
    "no heads": ({name: zeros(1, 8, 8, 0, 8) for name in ("query", "key", "value")}, ValueError, "may be 0"),
    "no head_dim": ({name: zeros(1, 8, 8, 2, 0) for name in ("query", "key", "value")}, ValueError, "may be 0"),
    "no value head_dim": ({"value": zeros(1, 8, 8, 2, 0)}, ValueError, r"may be 0, got .*value \(1, 8, 8, 2, 0\)"),
    # geometry
    "kernel_size 0": ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1 on every axis, got 0"),
    "kernel_size below 0": ({"kernel_size": (3, -3)}, ValueError, r"kernel_size must be at least 1 .*got \(3, -3\)"),
    "kernel_size a float": ({"kernel_size": 3.0}, TypeError, "kernel_size must hold int entries, got float: 3.0"),
    "kernel_size a bool": ({"kernel_size": True}, TypeError, "kernel_size must hold int entries, got bool"),
    "kernel_size a text": ({"kernel_size": "33"}, TypeError, "kernel_size must hold int entries, got str"),
    "kernel_size None": ({"kernel_size": None}, TypeError, "kernel_size must hold int entries, got NoneType"),
    "kernel_size a tensor": (
        {"kernel_size": torch.tensor(3)},
        TypeError,
        "kernel_size must hold int entries, got Tensor",
    ),
    "kernel_size for three axes": ({"kernel_size": (3, 3, 3)}, ValueError, r"one per axis \(2\), got 3"),
    "kernel_size for no axis": ({"kernel_size": ()}, ValueError, r"one per axis \(2\), got 0"),
    "kernel_size beyond numbers": ({"kernel_size": 2**70, "border": "mask"}, ValueError, "kernel_size must be at most"),
    "kernel_size beyond the grid": (
        {"kernel_size": 9},
        ValueError,
        r"kernel_size \* dilation must be at most .*\(9, 9\)",
    ),
    "stride 0": ({"stride": 0}, ValueError, "stride must be at least 1 on every axis, got 0"),
    "stride beyond kernel_size": ({"stride": 4}, ValueError, r"stride must be at most kernel_size .*got \(4, 4\)"),
    "stride a float": ({"stride": 1.5}, TypeError, "stride must hold int entries, got float"),
    "dilation 0": ({"dilation": (1, 0)}, ValueError, "dilation must be at least 1 on every axis"),
    "dilation beyond the grid": (
        {"dilation": 4},
        ValueError,
        r"kernel_size \* dilation must be at most the grid's size",
    ),
    "dilation beyond numbers": ({"dilation": 2**40, "border": "zero"}, ValueError, "dilation must be at most"),
    "is_causal a number": ({"is_causal": 1}, TypeError, "is_causal must hold bool entries, got int"),
    "is_causal None": ({"is_causal": None}, TypeError, "is_causal must hold bool entries, got NoneType"),
    "is_causal for three axes": ({"is_causal": (True,) * 3}, ValueError, r"is_causal must be .*\(2\), got 3"),
    "border unknown": ({"border": "wrap"}, ValueError, "border must be one of 'shift', 'mask', 'zero', got 'wrap'"),
    "border None": ({"border": None}, ValueError, "border must be one of .*got None"),
    # scale
    "scale NaN": ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "scale infinite": ({"scale": -math.inf}, ValueError, "scale must be finite, got -inf"),
    "scale a text": ({"scale": "1"}, TypeError, "scale must be a number, got str: '1'"),
    "scale a bool": ({"scale": True}, TypeError, "scale must be a number, got bool"),
    "scale a tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number, got Tensor"),
    "scale complex": ({"scale": 1j}, TypeError, "scale must be a number, got complex"),
    # bias
    "bias a number": ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
    "bias too small": ({"bias": zeros(2, 5, 4)}, ValueError, r"bias must be by offset .*\(2, 5, 5\).*got \(2, 5, 4\)"),
    "bias of other heads": ({"bias": zeros(3, 5, 5)}, ValueError, r"bias must be by offset .*got \(3, 5, 5\)"),
    "bias of no rank": ({"bias": zeros()}, ValueError, r"bias must be by offset .*got \(\)"),
    "bias of other slots": ({"bias": zeros(1, 8, 8, 2, 8)}, ValueError, r"\(1, 8, 8, 2, 9\), got \(1, 8, 8, 2, 8\)"),
    "bias of another batch": ({"bias": zeros(2, 8, 8, 2, 9)}, ValueError, r"got \(2, 8, 8, 2, 9\)"),
    "bias of integers": ({"bias": zeros(2, 5, 5, dtype=torch.int32)}, TypeError, "bias must be one of .*got int32"),
    "bias elsewhere": ({"bias": zeros(2, 5, 5, device="meta")}, ValueError, "share one device.*bias.device=meta"),
    "bias sparse": ({"bias": lambda: zeros(2, 5, 5).to_sparse()}, TypeError, "bias must be a dense tensor"),
    # additional keys
    "additional keys alone": (
        {"additional_keys": zeros(1, 2, 2, 8)},
        ValueError,
        "go together, got only additional_keys",
    ),
    "additional values alone": ({"additional_values": zeros(1, 2, 2, 8)}, ValueError, "got only additional_values"),
    "additional keys a list": (
        {"additional_keys": [0.0], "additional_values": zeros(1, 2, 2, 8)},
        TypeError,
        "additional_keys must be a tensor, got list",
    ),
    "additional keys of another rank": (
        {"additional_keys": zeros(1, 2, 8), "additional_values": zeros(1, 2, 2, 8)},
        ValueError,
        "additional_keys must have 4 dimensions, got 3",
    ),
    "additional keys of other heads": (
        {"additional_keys": zeros(1, 2, 1, 8), "additional_values": zeros(1, 2, 1, 8)},
        ValueError,
        r"additional_keys must be .*\(1, 2, 2, 8\), got \(1, 2, 1, 8\)",
    ),
    "additional keys of another batch": (
        {"additional_keys": zeros(2, 2, 2, 8), "additional_values": zeros(2, 2, 2, 8)},
        ValueError,
        r"additional_keys must be .*got \(2, 2, 2, 8\)",
    ),
    "additional values of another length": (
        {"additional_keys": zeros(1, 2, 2, 8), "additional_values": zeros(1, 3, 2, 8)},
        ValueError,
        r"additional_values must have .*\(1, 2, 2, 8\), got \(1, 3, 2, 8\)",
    ),
    "additional keys of another dtype": (
        {"additional_keys": zeros(1, 2, 2, 8).half(), "additional_values": zeros(1, 2, 2, 8)},
        ValueError,
        "share one dtype.*additional_keys.dtype=torch.float16",
    ),
    "additional keys elsewhere": (
        {"additional_keys": zeros(1, 2, 2, 8, device="meta"), "additional_values": zeros(1, 2, 2, 8)},
        ValueError,
        "share one device.*additional_keys.device=meta",
    ),
    # the rest
    "return_lse a number": ({"return_lse": 1}, TypeError, "return_lse must be a bool, got int: 1"),
    "return_lse a text": ({"return_lse": "no"}, TypeError, "return_lse must be a bool, got str"),
    "backend unknown": ({"backend": "fast"}, ValueError, "backend must be one of 'auto', .*got 'fast'"),
    "backend None": ({"backend": None}, ValueError, "backend must be one of .*got None"),
    "backend a number": ({"backend": 3}, ValueError, "backend must be one of .*got 3"),
    "triton without a GPU": ({"backend": "triton"}, UnsupportedError, "triton needs a CUDA or ROCm device.*got cpu"),
}


def test_there_are_more_than_forty_kinds() -> None:
    assert len(BAD) >= 40


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is computed, under autocast too (which unites the dtypes)."""
    change, error, message = BAD[name]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for autocast in (False, True):
        if autocast and "dtype" in name:
            continue
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), pytest.raises(error, match=message):
            neighborhood_attention(**arguments_of(change))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", [name for name in BAD if not BAD[name][0].keys() & {"backend", "return_lse"}])
def test_reasons_are_asked_with_the_same_checks(name: str) -> None:
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        not_supported_reasons("neighborhood_attention", "reference", **arguments_of(change))


def test_logits_check_the_same() -> None:
    query = zeros(*ROW)
    with pytest.raises(ValueError, match="scale must be finite"):
        neighborhood_logits(query, query, 3, scale=math.inf)
    with pytest.raises(ValueError, match="key must have query's"):
        neighborhood_logits(query, query[:, :4], 3)
    with pytest.raises(TypeError, match="bias must be a tensor"):
        neighborhood_logits(query, query, 3, bias=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("function, rank", [(na1d, 1), (na2d, 2), (na3d, 3)])
def test_natten_names_check_too(function: Any, rank: int) -> None:
    good = zeros(1, *[4] * rank, 2, 8)
    wrong = zeros(1, *[4] * (rank % 3 + 1), 2, 8)
    with pytest.raises(ValueError, match=f"query must have {rank + 3} dimensions"):
        function(wrong, wrong, wrong, 3)
    with pytest.raises(TypeError, match="return_lse must be a bool"):
        function(good, good, good, 3, return_lse=None)
    with pytest.raises(ValueError, match="scale must be finite"):
        function(good, good, good, 3, scale=math.nan)
    with pytest.raises(ValueError, match="at most the grid's size"):
        function(good, good, good, 5)


def test_what_is_empty_and_well_defined() -> None:
    """An empty batch gives empty results; no additional keys are as none."""
    empty = zeros(0, 8, 8, 2, 8, requires_grad=True)
    for backend in ("reference", "tiled"):
        out, lse = neighborhood_attention(empty, empty, empty, 3, return_lse=True, backend=backend)
        assert out.shape == (0, 8, 8, 2, 8) and lse.shape == (0, 8, 8, 2)
        (grad,) = torch.autograd.grad(out.sum() + lse.sum(), empty)
        assert grad.shape == empty.shape
        query = torch.randn(ROW)
        none = torch.zeros(1, 0, 2, 8, requires_grad=True)
        with_none = neighborhood_attention(
            query, query, query, 3, additional_keys=none, additional_values=none, backend=backend
        )
        torch.testing.assert_close(with_none, neighborhood_attention(query, query, query, 3, backend="reference"))
        assert torch.autograd.grad(with_none.sum(), none)[0].shape == none.shape


def test_what_is_not_finite_is_passed_on() -> None:
    """NaN in, NaN out, where it is seen; no back end hides it."""
    for backend in ("reference", "tiled"):
        query = torch.randn(ROW)
        query[0, 2, 3, 1, 0] = math.nan
        out = neighborhood_attention(query, torch.randn(ROW), torch.randn(ROW), 3, backend=backend)
        assert out[0, 2, 3, 1].isnan().all() and out.isnan().sum() == 8
        value = torch.randn(ROW)
        value[0, 2, 3, 1, 0] = math.inf
        out = neighborhood_attention(torch.randn(ROW), torch.randn(ROW), value, 3, backend=backend)
        assert not out[0, 1:4, 2:5, 1, 0].isfinite().any() and out[..., 0, :].isfinite().all()


def test_meta_tensors_have_shapes_only() -> None:
    query = zeros(*ROW, device="meta", requires_grad=True)
    out, lse = neighborhood_attention(query, query, query, 3, return_lse=True)
    assert out.device.type == lse.device.type == "meta" and out.shape == ROW and lse.shape == ROW[:-1]
    assert torch.autograd.grad(out.sum(), query)[0].device.type == "meta"
