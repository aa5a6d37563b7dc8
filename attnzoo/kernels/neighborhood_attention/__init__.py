"""Neighborhood attention in one, two and three dimensions: every query attends to a window of keys around it.

Layout: query [B, *grid, heads, head_dim], key [B, *grid, heads_kv, head_dim], value [B, *grid, heads_kv, head_dim_v];
heads a multiple of heads_kv (query head h reads key head h // (heads / heads_kv)). Any last-dimension-contiguous
strides are taken as they are; anything else is copied once. Outputs are contiguous and never alias an input.

The window's rule (kernel_size, stride, dilation, is_causal, border) is written out in `problem.py`. Sources: Hassani et
al., "Neighborhood Attention Transformer" (2204.07143), "Dilated Neighborhood Attention" (2209.15001), "Generalized
Neighborhood Attention" (2504.16922); code NATTEN 8c8729f (window, lse, additional keys) and 0.17.5 (relative bias).
Differences from NATTEN: `border` and `bias` exist together with every other option; kernel_size 1 is allowed; scale 0.0
is 0.0 (NATTEN takes it for None).

There is no attention dropout. lse and softmax statistics are float32, float64 for float64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice, check_dense, check_flag, check_number, check_same, check_tensor, per_axis
from attnzoo.kernels import dispatch, library
from attnzoo.kernels.neighborhood_attention import reference
from attnzoo.kernels.neighborhood_attention.problem import Problem

__all__ = ["na1d", "na2d", "na3d", "neighborhood_attention", "neighborhood_logits"]

NAME = "neighborhood_attention"
BORDERS = ("shift", "mask", "zero")
_LARGEST = 2**24  # positions are 32-bit numbers in the kernels, products of a few of these included
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

PerAxis = int | Sequence[int]


_REASONS: dict[str, dispatch.Reasons] = {name: dispatch.module_reasons(NAME, name) for name in dispatch.BACKENDS}
_OPERATOR_REASONS = {name: reasons for name, reasons in _REASONS.items() if name != "flex"}  # flex has its own autograd


def _bias_kind(bias: Tensor | None, rank: int) -> str:
    return "none" if bias is None else "offset" if bias.ndim == rank + 1 else "query"


def _check_tensors(
    query: Tensor, key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None
) -> None:
    """Shapes, dtypes and devices of everything but the bias, whose types have been checked."""
    if not 4 <= query.ndim <= 6:
        raise ValueError(
            "query must be [B, *grid, heads, head_dim] with one to three grid axes, "
            f"got {query.ndim} dimensions: query.shape={tuple(query.shape)}"
        )
    check_tensor("key", key, ndim=query.ndim)
    check_tensor("value", value, ndim=query.ndim)
    if (additional_keys is None) != (additional_values is None):
        given = "additional_keys" if additional_values is None else "additional_values"
        raise ValueError(f"additional_keys and additional_values go together, got only {given}")
    if additional_keys is not None:
        check_tensor("additional_keys", additional_keys, ndim=4)
        check_tensor("additional_values", additional_values, ndim=4)
    together = {
        "query": query,
        "key": key,
        "value": value,
        "additional_keys": additional_keys,
        "additional_values": additional_values,
    }
    check_same("dtype", **together)
    check_same("device", **together)
    shape, heads_kv = tuple(query.shape), key.shape[-2]
    if key.shape[:-2] != query.shape[:-2] or key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's batch, grid and head_dim {shape}, got {tuple(key.shape)}")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value must have key's batch, grid and heads {tuple(key.shape)}, got {tuple(value.shape)}")
    if 0 in shape[1:] or 0 in (heads_kv, value.shape[-1]):
        raise ValueError(f"no dimension but the batch may be 0, got query {shape}, value {tuple(value.shape)}")
    if shape[-2] % heads_kv:
        raise ValueError(f"query's heads must be a multiple of key's, got {shape[-2]} and {heads_kv}")
    if additional_keys is not None and additional_values is not None:
        wanted: tuple[int, ...] = (shape[0], additional_keys.shape[1], heads_kv)
        if tuple(additional_keys.shape) != (*wanted, shape[-1]):
            got = tuple(additional_keys.shape)
            raise ValueError(f"additional_keys must be [B, any, heads_kv, head_dim] {(*wanted, shape[-1])}, got {got}")
        if tuple(additional_values.shape) != (*wanted, value.shape[-1]):
            got, wanted = tuple(additional_values.shape), (*wanted, value.shape[-1])
            raise ValueError(
                f"additional_values must have additional_keys' batch, length and heads {wanted}, got {got}"
            )


def _check_bias(bias: Tensor | None, query: Tensor, kernel_size: tuple[int, ...]) -> None:
    if bias is None:
        return
    check_same("device", query=query, bias=bias)
    rank, heads = len(kernel_size), query.shape[-2]
    offset = (heads, *(2 * k - 1 for k in kernel_size))
    by_query = (*query.shape[:-1], math.prod(kernel_size))
    shape = tuple(bias.shape)
    if bias.ndim == rank + 1 and shape == offset:
        return
    if bias.ndim == rank + 3 and shape[1:] == by_query[1:] and shape[0] in (1, by_query[0]):
        return
    raise ValueError(
        f"bias must be by offset [heads, *(2 * kernel_size - 1)] {offset} or by query "
        f"[B or 1, *grid, heads, prod(kernel_size)] {by_query}, got {shape}"
    )


def _geometry(
    grid: tuple[int, ...], kernel_size: Any, stride: Any, dilation: Any, is_causal: Any, border: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """kernel_size, stride, dilation and is_causal, one entry per axis, checked against each other and the grid."""
    rank = len(grid)
    kernel_size = per_axis("kernel_size", kernel_size, rank, int, low=1)
    stride = per_axis("stride", stride, rank, int, low=1)
    dilation = per_axis("dilation", dilation, rank, int, low=1)
    for name, values in (("kernel_size", kernel_size), ("dilation", dilation)):
        if any(value > _LARGEST for value in values):
            raise ValueError(f"{name} must be at most {_LARGEST} on every axis, got {values}")
    is_causal = per_axis("is_causal", is_causal, rank, bool)
    check_choice("border", border, BORDERS)
    if any(s > k for s, k in zip(stride, kernel_size)):
        raise ValueError(f"stride must be at most kernel_size on every axis, got {stride} and {kernel_size}")
    if border == "shift" and any(k * d > n for k, d, n in zip(kernel_size, dilation, grid)):
        raise ValueError(
            f"kernel_size * dilation must be at most the grid's size on every axis for border='shift', got kernel_size "
            f"{kernel_size}, dilation {dilation}, grid {grid}; pad the grid, or use border='mask'"
        )
    return kernel_size, stride, dilation, is_causal


def _problem(tensors: Sequence[Tensor | None], options: Sequence[Any], return_lse: bool = False) -> Problem:
    """The operator's arguments as one value."""
    query, key, value, bias, additional_keys, _ = tensors
    assert query is not None and key is not None and value is not None
    kernel_size, stride, dilation, is_causal, scale, border = options[:6]
    rank = query.ndim - 3
    return Problem(
        batch=query.shape[0],
        grid=tuple(query.shape[1:-2]),
        num_heads=query.shape[-2],
        num_heads_kv=key.shape[-2],
        head_dim=query.shape[-1],
        head_dim_v=value.shape[-1],
        kernel_size=tuple(kernel_size),
        stride=tuple(stride),
        dilation=tuple(dilation),
        is_causal=tuple(is_causal),
        scale=scale,
        border=border,
        bias=_bias_kind(bias, rank),
        num_additional=0 if additional_keys is None else additional_keys.shape[1],
        dtype=query.dtype,
        requires_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
        device_type=query.device.type,
        return_lse=return_lse,
    )


# -- the operator ------------------------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, options = arguments[:6], arguments[6:]
    problem = _problem(tensors, options)
    backend = dispatch.choose(NAME, options[-1], problem, tensors[0].device, _OPERATOR_REASONS)
    return dispatch.backend_module(NAME, backend).forward(
        *(t if t is None else library.last_dim_contiguous(t) for t in tensors), problem
    )


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, value = arguments[0], arguments[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=dtype)


def _backward(
    gradients: tuple, tensors: tuple, results: tuple, options: tuple, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    problem = _problem(tensors, options)
    backend = dispatch.choose(NAME, options[-1], problem, tensors[0].device, _OPERATOR_REASONS)
    out, lse = results
    grad_out = torch.zeros_like(out) if gradients[0] is None else library.last_dim_contiguous(gradients[0])
    given = (t if t is None else library.last_dim_contiguous(t) for t in tensors)
    return list(
        dispatch.backend_module(NAME, backend).backward(grad_out, gradients[1], *given, out, lse, problem, needs)
    )


_operator = library.register(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? additional_keys, Tensor? additional_values",
    options="SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, bool[] is_causal, float scale, str border, "
    "str backend",
    outputs=("out", "lse"),
    forward=_forward,
    fake=_fake,
    backward=_backward,
)


# -- the public functions ----------------------------------------------------------------------------------------------


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    border: str = "shift",
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The public function's arguments as the operator's: tensors (after autocast) and options but the back end."""
    given = {"query": query, "key": key, "value": value}
    optional = {"bias": bias, "additional_keys": additional_keys, "additional_values": additional_values}
    for name, tensor in (given | {name: tensor for name, tensor in optional.items() if tensor is not None}).items():
        check_tensor(name, tensor, dtypes=_DTYPES)
        check_dense(name, tensor)
    if scale is not None:
        check_number("scale", scale)
    query, key, value, additional_keys, additional_values = library.autocast(  # type: ignore[assignment]
        query, key, value, additional_keys, additional_values
    )
    _check_tensors(query, key, value, additional_keys, additional_values)
    geometry = _geometry(tuple(query.shape[1:-2]), kernel_size, stride, dilation, is_causal, border)
    _check_bias(bias, query, geometry[0])
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return (query, key, value, bias, additional_keys, additional_values), (*geometry, scale, border)


def _describe(*args: Any, **kwargs: Any) -> tuple[Problem, torch.device]:
    """What `not_supported_reasons` asks about, from the public function's arguments."""
    return_lse = bool(kwargs.pop("return_lse", False))
    tensors, options = _prepare(*args, **kwargs)
    assert tensors[0] is not None
    return _problem(tensors, options, return_lse), tensors[0].device


dispatch.register(NAME, _REASONS, _describe)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    border: str = "shift",
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Softmax attention of every query over the window of keys around it, and over the additional keys.

    query: [B, *grid, heads, head_dim], one to three grid axes; float32, bfloat16, float16 or float64 (float64 on the
        CPU paths and the reference). key: [B, *grid, heads_kv, head_dim]; value: [B, *grid, heads_kv, head_dim_v].
    kernel_size, stride, dilation: in tokens, one number or one per axis; stride <= kernel_size. is_causal per axis: a
        query sees no later key on that axis.
    scale: of the dot products; None means head_dim ** -0.5, and 0.0 is 0.0.
    border: what a window does at the grid's edge: "shift" moves inward (needs kernel_size * dilation <= size on every
        axis), "mask" loses the keys outside, "zero" keeps them as zero vectors that take softmax mass; the latter two
        at any size. On a causal axis the window loses keys at the start, whatever the border.
    bias: added to the logits, in any floating-point dtype; None, or by offset [heads, *(2 * kernel_size - 1)]
        (relative position bias: entry key position - query position + kernel_size - 1, in dilated units, NATTEN
        0.17.5's sign), or by query and window slot [B or 1, *grid, heads, prod(kernel_size)].
    additional_keys, additional_values: [B, n, heads_kv, head_dim or head_dim_v], seen by every query in the same
        softmax, without bias.
    return_lse: also return the natural log of the softmax's denominator.
    backend: "auto", "reference", "tiled" (CPU), "flex" or "triton"; it changes speed, not meaning.

    Returns out [B, *grid, heads, head_dim_v] in the query's dtype, or (out, lse) with lse [B, *grid, heads] in float32
    (float64 for float64 inputs), differentiable too. A query without any key (possible only with a bias of -inf) has
    out 0, lse -inf and gradients 0. Under autocast query, key, value and the additional ones are cast, the bias is not.
    There is no attention dropout, and no double backward (UnsupportedError).

    Raises TypeError, ValueError for arguments that don't fit, UnsupportedError where the asked back end can't serve.
    """
    tensors, options = _prepare(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        border=border,
        bias=bias,
        additional_keys=additional_keys,
        additional_values=additional_values,
    )
    check_flag("return_lse", return_lse)
    check_choice("backend", backend, ("auto", *dispatch.BACKENDS))
    if not torch.compiler.is_compiling():  # a compiled graph must not freeze the choice: there the operator chooses
        backend = dispatch.choose(NAME, backend, _problem(tensors, options, return_lse), query.device, _REASONS)
    if backend == "flex":
        out, lse = dispatch.backend_module(NAME, "flex").attend(*tensors, _problem(tensors, options, return_lse))
    else:
        out, lse = _operator(*tensors, *options, backend)
    return (out, lse) if return_lse else out


def neighborhood_logits(
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    border: str = "shift",
    bias: Tensor | None = None,
) -> Tensor:
    """The logits of `neighborhood_attention` before its softmax, to look at: [B, *grid, heads, prod(kernel_size)].

    Slots are the window's positions, row-major; those that take no part are -inf. `softmax(-1)` gives the weights, and
    with the default arguments it is NATTEN 0.17's `na*d_qk`. Arguments, dtype of the result (float32, or float64 for
    float64 inputs) and errors as in `neighborhood_attention`; ordinary PyTorch, so it differentiates and needs
    prod(kernel_size) times the memory of a head's map.
    """
    tensors, options = _prepare(
        query, key, key, kernel_size, stride, dilation, is_causal, scale, border=border, bias=bias
    )
    cast_query, cast_key = tensors[:2]
    assert cast_query is not None and cast_key is not None
    return reference.window_logits(cast_query, cast_key, bias, _problem(tensors, options))


_NATTEN_BACKENDS = ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna")


def _natten(rank: int) -> Callable[..., Any]:
    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        is_causal: bool | Sequence[bool] | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: PerAxis | None = None,
        kv_tile_shape: PerAxis | None = None,
        backward_q_tile_shape: PerAxis | None = None,
        backward_kv_tile_shape: PerAxis | None = None,
        backward_kv_splits: PerAxis | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ) -> Any:
        check_tensor("query", query, ndim=rank + 3)
        check_flag("return_lse", return_lse)
        if backend in _NATTEN_BACKENDS:
            here = ", ".join(dispatch.BACKENDS)
            raise ValueError(f"backend {backend!r} is NATTEN's own; here it is None, auto or one of {here}")
        if attention_kwargs:
            raise ValueError(
                "attention_kwargs configures NATTEN's second kernel for additional keys; here they share one softmax "
                f"and one kernel, so it must be None, got {attention_kwargs!r}"
            )
        return neighborhood_attention(
            query,
            key,
            value,
            kernel_size,
            stride,
            dilation,
            bool(is_causal) if is_causal is None else is_causal,
            scale,
            additional_keys=additional_keys,
            additional_values=additional_values,
            return_lse=return_lse,
            backend=backend or "auto",
        )

    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__doc__ = f"""{rank}-D neighborhood attention under NATTEN 0.21's name, signature and semantics.

    query, key, value: [B, {", ".join("XYZ"[:rank])}, heads, head_dim]. From `kernel_size` to `additional_values`, and
    `return_lse`: as in `neighborhood_attention` with border="shift". backend: None ("auto") or one of this library's.
    NATTEN's tuning arguments (tile shapes, splits, schedule, torch_compile, ...) name its own kernels' settings: they
    never change a result and have no effect here. A non-empty attention_kwargs or a NATTEN back end: ValueError.
    """
    return function


na1d, na2d, na3d = _natten(1), _natten(2), _natten(3)
