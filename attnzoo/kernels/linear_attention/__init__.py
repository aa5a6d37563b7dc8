"""Attention without a softmax over keys: phi(q) (phi(k)^T v), at a cost that grows with the tokens, not their pairs.

Layout: query [B, *grid, H, D], key [B, *grid, Hkv, D], value [B, *grid, Hkv, Dv], H a multiple of Hkv. With q and k
after their feature maps and w_ij = scale q_i . k_j, a row is

    normaliser   out_i                                                                used by
    none         sum_j w_ij v_j                                                       efficient attention
    sum          sum_j w_ij v_j / norm_i,  norm_i = sum_j w_ij + eps                  CARE, linear transformers
    subtract     sum_j (w_ij / count + (1 - mean_j w_ij) / Nk) v_j                    InLine
    flow         Flowformer's: see flow.py                                            Flowformer

    efficient attention   feature_map="softmax", scale=1.0
    CARE                  feature_map="elu", normaliser="sum", scale=1 / N  (its products and sums are means)
    InLine                normaliser="subtract"; count = number of queries in its code, number of keys by default here:
                          they differ only where keys were reduced, and only with the latter do the weights sum to 1
    Flowformer            feature_map="sigmoid", normaliser="flow"; outer_eps=1e-6 in its vision code, 0 in its general
                          one; is_causal=True is its causal variant

There is no softmax over keys, and so no lse; "sum" has norm, by which partial results over split keys join as others
do by lse: out = sum_p norm_p out_p / sum_p norm_p (with eps = 0).

Memory: the state of D x Dv per head, and pieces. Kept for the backward pass are the inputs and results; the rest is
computed again. "flow" and is_causal work on all tokens of a few heads at a time (one head at least), and hold a dozen
tensors of that size.

There is no Triton kernel. That is a decision by arithmetic, not a measurement. The sums over keys must be complete
before the first row, so that a kernel of our own reads key and value once, query once and writes out once, in two
launches, as two batched matrix products do: (2 D + 2 Dv) elements and 4 D Dv operations a token and head, 32 operations
per byte for D = Dv = 64 in bfloat16, far below the 300 at which an H100's matrix units are the limit. With "none" and
the identity in float32 the products here move just these bytes. A feature map, a cast of half precision to float32, or
a normaliser each add passes over query, key or out, which a fused kernel would not have: by that count half-precision
calls and "flow" may cost more than the 1.2 x at which a kernel is owed. That is for a GPU to say.

Sources: Katharopoulos et al. (ICML 2020); efficient attention (Shen et al., WACV 2021), cmsflash/efficient-attention
46a5f9e; Flowformer (Wu et al., ICML 2022), thuml/Flowformer 61f5d8c; InLine (Han et al., NeurIPS 2024),
LeapLabTHU/InLine e463a6f; CARE Transformer (Zhou et al., CVPR 2025), zhouyuan888888/CARE-Transformer 400bf94;
shared/specs/backbones.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice
from attnzoo.kernels import dispatch, library
from attnzoo.kernels.linear_attention.problem import FEATURE_MAPS, NORMALISERS, Problem, check

__all__ = ["FEATURE_MAPS", "NORMALISERS", "linear_attention"]

NAME = "linear_attention"
_REASONS: dict[str, dispatch.Reasons] = {b: dispatch.module_reasons(NAME, b) for b in ("tiled", "reference")}


def _run(tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Any, Problem]:
    query, key, value = tensors
    scale, is_causal, query_map, key_map, normaliser, eps, outer_eps, count, backend = options
    problem = Problem(query, key, value, scale, is_causal, query_map, key_map, normaliser, eps, outer_eps, count)
    chosen = dispatch.choose(NAME, backend, problem, query.device, _REASONS)
    return dispatch.backend_module(NAME, chosen), problem


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    module, problem = _run(arguments[:3], arguments[3:])
    with torch.autocast(problem.query.device.type, enabled=False):
        return module.forward(problem)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, _, value = arguments[:3]
    norm = query.shape[:3] if arguments[7] == "sum" else (0,)
    return (
        query.new_empty((*query.shape[:3], value.shape[3])),
        query.new_empty(norm, dtype=torch.promote_types(query.dtype, torch.float32)),
    )


def _backward(grads: tuple, tensors: tuple, results: tuple, options: tuple, needs: tuple) -> list[Tensor | None]:
    module, problem = _run(tensors, options)
    with torch.autocast(problem.query.device.type, enabled=False):
        return module.backward(problem, grads, needs)


_operator = library.register(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value",
    options="float scale, bool is_causal, str query_map, str key_map, str normaliser, float eps, float outer_eps, "
    "SymInt count, str backend",
    outputs=("out", "norm"),
    forward=_forward,
    fake=_fake,
    backward=_backward,
)


def _describe(*args: Any, **kwargs: Any) -> tuple[Problem, torch.device]:
    problem = check(*args, **kwargs)
    return problem, problem.query.device


dispatch.register(NAME, _REASONS, _describe, portable=True)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    feature_map: str | Sequence[str] = "identity",
    normaliser: str = "none",
    eps: float | None = None,
    outer_eps: float | None = None,
    count: int | None = None,
    return_normaliser: bool = False,
    backend: str = "auto",
) -> Any:
    """Linear attention of every query over all keys, or with is_causal over those up to its own; see the module's text.

    query: [B, *grid, H, D], one to three grid axes; float32, bfloat16, float16 or float64. key: [B, *grid, Hkv, D] and
        value: [B, *grid, Hkv, Dv], a grid of their own, H a multiple of Hkv.
    scale: of the products q . k after the feature maps; None means D ** -0.5, and 0.0 is 0.0. "flow" has none.
    is_causal: tokens in row-major order, as many queries as keys. "subtract" then takes counts and means over the
        tokens so far. ValueError with a key feature map of "softmax", which runs over all positions.
    feature_map: one name for both or (query's, key's): "identity", "relu", "elu" (elu + 1), "sigmoid", "exp", "softmax"
        (queries: over the head's channels; keys: over the positions, per channel). "flow" takes elementwise ones. Other
        maps are applied by the caller.
    normaliser: "none", "sum", "subtract" or "flow".
    eps: of "sum" (added to norm) and "flow" (added to both factors of its products); None means 1e-6.
    outer_eps: of "flow" without is_causal, added to its products; None means 0.
    count: of "subtract" without is_causal, what the products are divided by; None means the number of keys.
    return_normaliser: with "sum", also return norm.
    backend: "auto", "tiled" (stock torch operations, every device) or "reference"; it changes speed, not meaning.

    Returns out [B, *grid, H, Dv] in query's dtype, contiguous, or (out, norm) with norm [B, *grid, H] in float32
    (float64 for float64 inputs), differentiable too. Where norm is 0 (features all 0 and eps=0) out is 0 and its
    gradients are 0. Sums are in float32. Under autocast query, key and value are cast. No double backward
    (UnsupportedError).

    Raises TypeError, ValueError for arguments that don't fit or that the normaliser has no use for, UnsupportedError
    where the asked back end can't serve.
    """
    problem = check(
        query,
        key,
        value,
        scale,
        is_causal=is_causal,
        feature_map=feature_map,
        normaliser=normaliser,
        eps=eps,
        outer_eps=outer_eps,
        count=count,
        return_normaliser=return_normaliser,
    )
    check_choice("backend", backend, ("auto", *dispatch.BACKENDS))
    if not torch.compiler.is_compiling():  # a compiled graph must not freeze the choice: there the operator chooses
        backend = dispatch.choose(NAME, backend, problem, query.device, _REASONS)
    tensors = (library.last_dim_contiguous(t) for t in (problem.query, problem.key, problem.value))
    out, norm = _operator(
        *tensors,
        problem.scale,
        problem.is_causal,
        problem.query_map,
        problem.key_map,
        problem.normaliser,
        problem.eps,
        problem.outer_eps,
        problem.count,
        backend,
    )
    out = out.unflatten(1, query.shape[1:-2])
    return (out, norm.unflatten(1, query.shape[1:-2])) if return_normaliser else out
