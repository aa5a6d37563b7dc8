"""Sampled window attention: a window of queries attends to keys and values read at real-valued positions of their map.

Layout: query [B, H, W, heads, head_dim], key [B, Hk, Wk, heads_kv, head_dim], value [B, Hk, Wk, heads_kv, head_dim_v];
heads a multiple of heads_kv (query head h reads key head h // (heads / heads_kv)). The key map may have another size
than the query map. Strided tensors are taken as they are; outputs are contiguous and never alias an input.

The query map is cut into windows of window_size. Every window and head has K positions of its own, anywhere on the key
map and beyond it, at each of which key and value are read by bilinear interpolation:

    key_j = sum over the corners c = floor(y, x) + {0, 1}^2 of (1 - |y - c_y|) (1 - |x - c_x|) key[c]
    logits_ij = scale <query_i, key_j> + bias_ij;   out_i = sum_j softmax_j(logits_i) value_j

Positions are (y, x) in pixels of the key map: (i, j) reads key[i, j] itself, and there is no align_corners to agree on;
`positions_from_normalized` makes them from F.grid_sample's coordinates. A corner outside the map counts as zeros
(grid_sample's padding_mode="zeros"), and a key that lies outside altogether, at infinity too, stays in the softmax as a
zero vector, with logit bias_ij. A position that is not a number makes that window's output of that head not a number,
as such a logit would; no position is ever read outside the map, and none is checked, which would wait for a GPU.

At whole-numbered positions the interpolation has a kink, and the gradient is that of the side above, as it is
F.grid_sample's.

Source: Zhang et al., "VSA: Learning Varied-Size Window Attention in Vision Transformers" (2204.08446), section 3.2;
code ViTAE-VSA 75dc986, which reads with F.grid_sample(align_corners=True). lse and softmax statistics are float32,
float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice, check_same, check_tensor, per_axis
from attnzoo.kernels import dispatch, library
from attnzoo.kernels.sampled_window_attention.problem import (
    DTYPES,
    Problem,
    check_scale,
    check_tensors,
    check_windows,
    describe,
)

__all__ = ["positions_from_normalized", "sampled_window_attention"]

NAME = "sampled_window_attention"
BACKENDS = ("reference", "tiled", "triton")

_REASONS: dict[str, dispatch.Reasons] = {name: dispatch.module_reasons(NAME, name) for name in BACKENDS}


# -- the operator ------------------------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, (window_size, scale, backend) = arguments[:5], arguments[5:]
    problem = describe(tensors, window_size, scale)
    backend = dispatch.choose(NAME, backend, problem, tensors[0].device, _REASONS)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return dispatch.backend_module(NAME, backend).forward(*tensors, problem)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, value = arguments[0], arguments[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*query.shape[:4], value.shape[4])), query.new_empty(query.shape[:4], dtype=dtype)


def _backward(
    gradients: tuple, tensors: tuple, results: tuple, options: tuple, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    window_size, scale, backend = options
    problem = describe(tensors, window_size, scale)
    backend = dispatch.choose(NAME, backend, problem, tensors[0].device, _REASONS)
    grad_out = torch.zeros_like(results[0]) if gradients[0] is None else gradients[0]
    with torch.autocast(tensors[0].device.type, enabled=False):
        module = dispatch.backend_module(NAME, backend)
        return module.backward(grad_out, gradients[1], *tensors, *results, problem, needs)


_operator = library.register(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value, Tensor positions, Tensor? bias",
    options="SymInt[] window_size, float scale, str backend",
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
    positions: Tensor,
    window_size: int | Sequence[int],
    scale: float | None = None,
    *,
    bias: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[tuple[int, int], float]]:
    """The public function's arguments as the operator's: tensors (after autocast) and options but the back end."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
    check_same("device", query=query, key=key, value=value)
    query, key, value = library.autocast(query, key, value)  # type: ignore[assignment]
    check_tensors(query, key, value, positions, bias)
    window = check_windows(query, positions, bias, window_size)
    return (query, key, value, positions, bias), (window, check_scale(scale, query.shape[4]))


def _describe(*args: Any, **kwargs: Any) -> tuple[Problem, torch.device]:
    """What `not_supported_reasons` asks about, from the public function's arguments."""
    kwargs.pop("return_lse", None)
    tensors, options = _prepare(*args, **kwargs)
    return describe(tensors, *options), tensors[0].device


dispatch.register(NAME, _REASONS, _describe)


def sampled_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    window_size: int | Sequence[int],
    scale: float | None = None,
    *,
    bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Softmax attention of each window's queries over keys and values read at the window's own positions.

    query: [B, H, W, heads, head_dim]; float32, bfloat16, float16 or float64 (float64 on the CPU paths and the
        reference). key: [B, Hk, Wk, heads_kv, head_dim]; value: [B, Hk, Wk, heads_kv, head_dim_v].
    positions: [B, H / window height, W / window width, heads, K, 2], any K >= 1: where each window of each query head
        reads, (y, x) in pixels of the key map. Any floating-point dtype; computed with in float32 (float64 for float64
        inputs), and best held in it: bfloat16 knows a position on a map of 56 to a quarter of a pixel only.
    window_size: in query tokens, one number or (height, width); H and W are multiples of it. The queries of a window
        are numbered row by row.
    scale: of the dot products; None means head_dim ** -0.5, and 0.0 is 0.0.
    bias: [heads, window height * window width, K] added to the logits, in any floating-point dtype; None for none.
    return_lse: also return the natural log of the softmax's denominator.
    backend: "auto", "reference", "tiled" (CPU) or "triton"; it changes speed, not meaning.

    Returns out [B, H, W, heads, head_dim_v] in the query's dtype, or (out, lse) with lse [B, H, W, heads] in float32
    (float64 for float64 inputs). Both are differentiable by query, key, value, positions and bias. A query without any
    key (possible only with a bias of -inf) has out 0, lse -inf and gradients 0. Under autocast query, key and value are
    cast, positions and bias are not. There is no attention dropout, and no double backward (UnsupportedError).

    On a GPU the gradients of key and value are added up by atomics, in another order every time; where
    torch.use_deterministic_algorithms asks for it they are written out per sampled key, and added by index_add_.

    Raises TypeError, ValueError for arguments that don't fit, UnsupportedError where the asked back end can't serve.
    """
    tensors, options = _prepare(query, key, value, positions, window_size, scale, bias=bias)
    check_choice("backend", backend, ("auto", *BACKENDS))
    if not torch.compiler.is_compiling():  # a compiled graph must not freeze the choice: there the operator chooses
        problem = describe(tensors, *options)
        backend = dispatch.choose(NAME, backend, problem, tensors[0].device, _REASONS)
    out, lse = _operator(*tensors, *options, backend)
    return (out, lse) if return_lse else out


def positions_from_normalized(coordinates: Tensor, size: int | Sequence[int], align_corners: bool = True) -> Tensor:
    """Positions (y, x) in pixels from F.grid_sample's coordinates (x, y), -1 .. 1 over the map.

    coordinates: [..., 2], x first. size: (Hk, Wk) of the map, or one number for both. align_corners: as given to
    F.grid_sample: with True -1 and 1 are the centres of the outermost pixels, with False their outer edges.
    Returns a tensor of the same shape and dtype, y first; ordinary PyTorch, so it differentiates.
    Raises TypeError or ValueError for what is no floating-point tensor with a last axis of 2, or no size.
    """
    check_tensor("coordinates", coordinates, dtypes=DTYPES)
    if coordinates.ndim == 0 or coordinates.shape[-1] != 2:
        raise ValueError(f"coordinates must be [..., 2], got {tuple(coordinates.shape)}")
    height, width = per_axis("size", size, 2, int, low=1)
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners must be a bool, got {type(align_corners).__name__}")
    x, y = coordinates.unbind(-1)

    def pixels(along: Tensor, length: int) -> Tensor:
        return (along + 1) * ((length - 1) / 2) if align_corners else ((along + 1) * length - 1) / 2

    return torch.stack([pixels(y, height), pixels(x, width)], -1)
