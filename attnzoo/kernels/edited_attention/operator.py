"""Edited attention as PyTorch sees it: its custom operators and which back end serves them.

`attnzoo::edited_attention`, with a gradient; `attnzoo::attention_probs` and `attnzoo::attention_column_sums`, without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.kernels import dispatch, library
from attnzoo.kernels.edited_attention import backward, reference
from attnzoo.kernels.edited_attention.problem import Edits, Visibility, check_edits, check_inputs, check_visibility

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? span_ids, Tensor? mask, "
    "Tensor? key_bias, Tensor? boost, Tensor? groups"
)
_OPTIONS = (
    "bool is_causal, SymInt query_offset, SymInt? window_size, float scale, float? softcap, float temperature, "
    "int num_groups, str backend"
)
_DIFFERENTIABLE = ("query", "key", "value", "", "", "mask", "key_bias", "boost", "")


class _Call(NamedTuple):
    """The operator's arguments, named."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    span_ids: Tensor | None
    mask: Tensor | None
    key_bias: Tensor | None
    boost: Tensor | None
    groups: Tensor | None
    is_causal: bool
    query_offset: int
    window_size: int | None
    scale: float
    softcap: float | None
    temperature: float
    num_groups: int
    backend: str

    @property
    def visibility(self) -> Visibility:
        return Visibility(self.is_causal, self.query_offset, self.window_size, self.key_mask, self.span_ids, self.mask)

    @property
    def edits(self) -> Edits:
        return Edits(
            self.scale, self.softcap, self.temperature, self.key_bias, self.boost, self.groups, self.num_groups
        )


def _forward(*arguments: object) -> tuple[Tensor, ...]:
    call = _Call(*arguments)  # type: ignore[arg-type]
    module = dispatch.backend_module("edited_attention", call.backend)
    with torch.autocast(call.query.device.type, enabled=False):
        return module.grouped(call.query, call.key, call.value, call.visibility, call.edits)


def _fake(*arguments: object) -> tuple[Tensor, ...]:
    call = _Call(*arguments)  # type: ignore[arg-type]
    shape = (*call.query.shape[:3], call.num_groups)
    return (
        call.query.new_empty((*shape, call.value.shape[3])),
        call.query.new_empty(shape, dtype=reference.statistics_dtype(call.query.dtype)),
    )


def _backward(grads: tuple, tensors: tuple, results: tuple, options: tuple, needs: tuple) -> list[Tensor | None]:
    call = _Call(*tensors, *options)
    wanted = {name: needed for name, needed in zip(_DIFFERENTIABLE, needs) if name}
    module: Any = backward
    if call.backend == "triton":
        on_gpu = dispatch.backend_module("edited_attention", "triton_backward")
        module = on_gpu if on_gpu.serves(call.query, call.value) else backward
    with torch.autocast(call.query.device.type, enabled=False):
        found = module.gradients(grads, tensors[:3], results, call.visibility, call.edits, wanted)
    return [found.get(name) for name in _DIFFERENTIABLE]


_operator = library.register(
    "edited_attention", _TENSORS, _OPTIONS, ("group_output", "group_lse"), _forward, _fake, _backward
)


REASONS: dict[str, dispatch.Reasons] = {
    "triton": dispatch.module_reasons("edited_attention", "triton"),
    "tiled": lambda problem: [],
    "reference": lambda problem: [],
}


def chosen(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, edits: Edits, backend: str) -> str:
    """The back end that serves the call; raises where the asked one can't."""
    problem = (query, key, value, visibility, edits)
    return dispatch.choose("edited_attention", backend, problem, query.device, REASONS)


def grouped(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, edits: Edits, backend: str
) -> tuple[Tensor, Tensor]:
    """Every row of query edited: group_output [B, R, H, G, Dv], group_lse [B, R, H, G] (G = 1 without groups)."""
    assert visibility.query_offset is not None
    backend = chosen(query, key, value, visibility, edits, backend)
    query, key, value = (library.last_dim_contiguous(tensor) for tensor in (query, key, value))
    output, group_lse = _operator(
        query,
        key,
        value,
        visibility.key_mask,
        visibility.span_ids,
        visibility.mask,
        edits.key_bias,
        edits.boost,
        edits.groups,
        visibility.is_causal,
        visibility.query_offset,
        visibility.window_size,
        edits.scale,
        edits.softcap,
        edits.temperature,
        edits.num_groups,
        backend,
    )
    return output, group_lse


# ------------------------------------------------------------------------------------------------------- read-outs


_READOUT_TENSORS = (
    "Tensor query, Tensor key, Tensor? key_mask, Tensor? span_ids, Tensor? mask, Tensor? key_bias, Tensor? boost"
)
_READOUT_OPTIONS = (
    "bool is_causal, SymInt query_offset, SymInt? window_size, float scale, float? softcap, float temperature, "
    "str backend"
)
_READOUT_MODULES = {"triton": "triton_readout", "tiled": "tiled", "reference": "reference"}


class _Readout(NamedTuple):
    """The arguments that both read-outs take, named."""

    query: Tensor
    key: Tensor
    key_mask: Tensor | None
    span_ids: Tensor | None
    mask: Tensor | None
    key_bias: Tensor | None
    boost: Tensor | None
    is_causal: bool
    query_offset: int
    window_size: int | None
    scale: float
    softcap: float | None
    temperature: float
    backend: str

    @property
    def visibility(self) -> Visibility:
        return Visibility(self.is_causal, self.query_offset, self.window_size, self.key_mask, self.span_ids, self.mask)

    @property
    def edits(self) -> Edits:
        return Edits(self.scale, self.softcap, self.temperature, self.key_bias, self.boost)

    @property
    def problem(self) -> tuple[Tensor, Tensor, Visibility, Edits]:
        return self.query, self.key, self.visibility, self.edits

    @property
    def module(self) -> Any:
        return dispatch.backend_module("edited_attention", _READOUT_MODULES[self.backend])


def _probs_forward(*arguments: object) -> tuple[Tensor, ...]:
    call = _Readout(*arguments[:-1])  # type: ignore[arg-type]
    with torch.autocast(call.query.device.type, enabled=False):
        return (call.module.probs(*call.problem, arguments[-1]),)


def _probs_fake(*arguments: object) -> tuple[Tensor, ...]:
    call = _Readout(*arguments[:-1])  # type: ignore[arg-type]
    batch, num_rows, num_heads, _ = call.query.shape
    heads = (num_heads,) if arguments[-1] == "none" else ()
    shape = (batch, num_rows, *heads, call.key.shape[1])
    return (call.query.new_empty(shape, dtype=reference.statistics_dtype(call.query.dtype)),)


def _sums_forward(*arguments: object) -> tuple[Tensor, ...]:
    call = _Readout(*arguments)  # type: ignore[arg-type]
    with torch.autocast(call.query.device.type, enabled=False):
        return (call.module.column_sums(*call.problem),)


def _sums_fake(*arguments: object) -> tuple[Tensor, ...]:
    call = _Readout(*arguments)  # type: ignore[arg-type]
    shape = (call.query.shape[0], call.query.shape[2], call.key.shape[1])
    return (call.query.new_empty(shape, dtype=reference.statistics_dtype(call.query.dtype)),)


_probs_operator = library.register(
    "attention_probs",
    _READOUT_TENSORS,
    f"{_READOUT_OPTIONS}, str head_reduction",
    ("probs",),
    _probs_forward,
    _probs_fake,
    None,
)
_sums_operator = library.register(
    "attention_column_sums", _READOUT_TENSORS, _READOUT_OPTIONS, ("sums",), _sums_forward, _sums_fake, None
)


def _readout(operation: str, query: Tensor, key: Tensor, visibility: Visibility, edits: Edits, backend: str) -> tuple:
    assert visibility.query_offset is not None
    backend = dispatch.choose(operation, backend, (query, key, key, visibility, edits), query.device, REASONS)
    return _Readout(
        library.last_dim_contiguous(query),
        library.last_dim_contiguous(key),
        visibility.key_mask,
        visibility.span_ids,
        visibility.mask,
        edits.key_bias,
        edits.boost,
        visibility.is_causal,
        visibility.query_offset,
        visibility.window_size,
        edits.scale,
        edits.softcap,
        edits.temperature,
        backend,
    )


def probs(
    query: Tensor, key: Tensor, visibility: Visibility, edits: Edits, head_reduction: str, backend: str
) -> Tensor:
    """The softmax of every row of query, [B, R, H, Nk]; [B, R, Nk] for head_reduction "max" or "mean" over heads."""
    found: Any = _probs_operator(*_readout("attention_probs", query, key, visibility, edits, backend), head_reduction)
    return found


def column_sums(query: Tensor, key: Tensor, visibility: Visibility, edits: Edits, backend: str) -> Tensor:
    """The softmax summed over every row of query, [B, H, Nk]."""
    found: Any = _sums_operator(*_readout("attention_column_sums", query, key, visibility, edits, backend))
    return found


# ------------------------------------------------------------------------------------------- which back end, and why


def describe_readout(
    query: Tensor,
    key: Tensor,
    visibility: Visibility | None = None,
    scale: float | None = None,
    **others: Any,
) -> tuple[tuple, torch.device]:
    """A read-out's arguments as the problem that REASONS judges, and the device; raises what it raises."""
    return describe(query, key, key, visibility, scale, **others)


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility | None = None,
    scale: float | None = None,
    **others: Any,
) -> tuple[tuple, torch.device]:
    """`edited_attention`'s arguments as the problem that REASONS judges, and the device; raises what it raises."""
    query, key, value = check_inputs(query, key, value)
    seen = check_visibility(Visibility() if visibility is None else visibility, query, key)
    names = ("softcap", "temperature", "key_bias", "boost", "groups", "num_groups")
    defaults = {"softcap": None, "temperature": 1.0, "key_bias": None, "boost": None}
    edits = check_edits(query, key, scale, **(defaults | {n: others[n] for n in names if n in others}))
    return (query, key, value, seen, edits), query.device


dispatch.register("edited_attention", REASONS, describe)
dispatch.register("attention_probs", REASONS, describe_readout)
dispatch.register("attention_column_sums", REASONS, describe_readout)
