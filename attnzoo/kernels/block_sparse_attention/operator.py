"""Block-sparse attention as PyTorch sees it: the custom operator, and which back end serves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice
from attnzoo.kernels import dispatch, library
from attnzoo.kernels.block_sparse_attention.problem import NAME, Arguments, Call, Problem, check
from attnzoo.kernels.block_sparse_attention.quantise import quantise
from attnzoo.kernels.block_sparse_attention.sparsity import Lists

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor counts, Tensor indices, Tensor? tile_ids, Tensor? tiles, "
    "Tensor? by_key_counts, Tensor? by_key_indices, Tensor? by_key_tile_ids, Tensor? key_mask, "
    "Tensor? query_order, Tensor? key_order, Tensor? query_int8, Tensor? key_int8, Tensor? query_scale, "
    "Tensor? key_scale"
)
_OPTIONS = "int block_q, int block_k, bool is_causal, float scale, float? skip_threshold, str backend"
_COUNT = len(_TENSORS.split(","))


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    with torch.autocast(call.query.device.type, enabled=False):
        return dispatch.backend_module(NAME, call.backend).forward(call)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    return (
        call.query.new_empty((*call.query.shape[:3], call.value.shape[3])),
        call.query.new_empty(call.query.shape[:3], dtype=call.dtype),
    )


def _backward(grads: tuple, tensors: tuple, results: tuple, options: tuple, needs: tuple) -> list[Tensor | None]:
    call = Call(*tensors, *options)
    if call.skip_threshold is not None or call.query_int8 is not None:
        raise UnsupportedError(f"{NAME}: skip_threshold and qk_int8 are for inference and have no gradient")
    out, lse = results
    grad_out = torch.zeros_like(out) if grads[0] is None else library.last_dim_contiguous(grads[0])
    module = dispatch.backend_module(NAME, call.backend)
    with torch.autocast(call.query.device.type, enabled=False):
        found = module.backward(call, grad_out, grads[1], out, lse, needs[:3])
    return [*found, *(None,) * (_COUNT - 3)]


_operator = library.register(NAME, _TENSORS, _OPTIONS, ("out", "lse"), _forward, _fake, _backward)


def _cpu(problem: Problem) -> list[str]:
    return []


REASONS: dict[str, dispatch.Reasons] = {
    "triton": dispatch.module_reasons(NAME, "triton"),
    "flex": dispatch.module_reasons(NAME, "flex"),
    "tiled": _cpu,
    "reference": _cpu,
}


def _lists_by_key(arguments: Arguments, backend: str) -> Lists | None:
    """The lists that the back end's gradient walks, where there will be one."""
    if backend == "triton" and arguments.requires_grad:
        return arguments.sparsity.by_key()
    return None


def attend(arguments: Arguments, backend: str) -> tuple[Tensor, Tensor | None]:
    """out [B, Nq, H, Dv], and lse [B, Nq, H] where it was asked for."""
    check_choice("backend", backend, ("auto", *dispatch.BACKENDS))
    backend = dispatch.choose(NAME, backend, arguments.problem, arguments.query.device, REASONS)
    if backend == "flex":
        return dispatch.backend_module(NAME, "flex").attend(arguments)
    sparsity, scale = arguments.sparsity, arguments.scale
    query, key, value = (library.last_dim_contiguous(t) for t in (arguments.query, arguments.key, arguments.value))
    int8: tuple[Tensor | None, ...] = (None,) * 4
    shift: Tensor | None = None
    if arguments.qk_int8:
        int8, shift = quantise(query, key, arguments.key_mask, sparsity)
    turned = _lists_by_key(arguments, backend)
    out, lse = _operator(
        query,
        key,
        value,
        sparsity.counts,
        sparsity.indices,
        sparsity.tile_ids,
        sparsity.tiles,
        None if turned is None else turned.counts,
        None if turned is None else turned.indices,
        None if turned is None else turned.tile_ids,
        arguments.key_mask,
        sparsity.query_order,
        sparsity.key_order,
        *int8,
        *sparsity.block_size,
        arguments.is_causal,
        scale,
        arguments.skip_threshold,
        backend,
    )
    if not arguments.return_lse:
        return out, None
    return out, lse if shift is None else lse + shift * scale


def describe(*args: Any, **kwargs: Any) -> tuple[Problem, torch.device]:
    """The public function's arguments as the problem that REASONS judges, and the device; raises what it raises."""
    arguments = check(*args, **kwargs)
    return arguments.problem, arguments.query.device


dispatch.register(NAME, REASONS, describe)
