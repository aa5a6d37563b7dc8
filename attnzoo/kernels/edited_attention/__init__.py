"""Attention whose softmax is edited for some rows, without the matrix for the rest.

Layout: query [B, Nq, H, D], key [B, Nk, Hkv, D], value [B, Nk, Hkv, Dv], H a multiple of Hkv. Strided tensors are taken
as they are (transformers' [B, H, N, D] enters as `tensor.transpose(1, 2)`). One row of logits, a = q . k * scale:

    s = softcap tanh(a / softcap)         (Gemma 2; s = a where softcap is None)
    s = s + boost |s|                     (edit: PAI, PAINT)
    s = s + key_bias                      (edit: PASTA, ZeroTuning)
    s = (s + mask) / temperature          (edit: temperature)
    p = softmax(s over the keys that the row sees)

scale, softcap and visibility belong to the model and hold for every row; the edits hold for `rows`. Different edits for
different rows are several calls on `query[:, start:stop]` with `visibility.rows(start, stop)`.

With `groups` [B or 1, H or 1, Nk] (uint8) the keys are split into num_groups <= 8 groups and every group gets its own
softmax: group_output [B, R, H, G, Dv] and group_lse [B, R, H, G]. A key numbered num_groups or more is in no group and
not attended to. The groups' masses are softmax(group_lse), so that whatever multiplies p by one factor per group (VAR,
ACT, GIFT) is a sum over G vectors: `combine_groups`.

Memory: unedited rows go through F.scaled_dot_product_attention, at most MASK_ELEMENTS mask entries at a time (with a
softcap, or where their lse is asked for, they go where the edited rows go). Edited rows hold SCORE_ELEMENTS logits at a
time on the CPU, or those of one row where that is more, and none on the GPU, forward and backward (float32 beyond head
dim 128 on NVIDIA takes the CPU's backward); only the back end "reference", which serves float64 on a GPU, forms the
matrix.

Sources: shared/specs/vlm.md section 2 (kernel contract); PAI 9bbd8bd attention.py; VAR 98e62d6 src/logic/logic.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice
from attnzoo.kernels.edited_attention import operator, reference, stock, tiled
from attnzoo.kernels.edited_attention.problem import (
    MASK_ELEMENTS,
    MAX_GROUPS,
    SCORE_ELEMENTS,
    Edits,
    Visibility,
    check_edits,
    check_inputs,
    check_visibility,
    resolve_rows,
)
from attnzoo.kernels.edited_attention.value_mean import group_value_mean

__all__ = [
    "MASK_ELEMENTS",
    "MAX_GROUPS",
    "SCORE_ELEMENTS",
    "Visibility",
    "attention_column_sums",
    "attention_probs",
    "combine_groups",
    "edited_attention",
    "group_masses",
    "group_value_mean",
    "grouped_attention",
]

Rows = tuple[int, int | None] | None
Rule = Callable[[Tensor], Tensor]


def edited_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility | None = None,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    key_bias: Tensor | None = None,
    boost: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int | None = None,
    rule: Rule | Tensor | None = None,
    renormalise: bool = False,
    rows: Rows = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with the edits applied to `rows`; unedited rows go through F.scaled_dot_product_attention.

    visibility: which keys a row sees; None is causal, the queries being the last Nq of the Nk tokens.
    scale: None means D ** -0.5; 0.0 is 0.0.
    key_bias, boost: [B or 1, H or 1, Nk], see the formulas above.
    rule: needed with groups: a function from the masses [B, R, H, G] (float32) to factors that broadcast to them, or
        the factors themselves. Each group's probabilities are multiplied by its factor, and rescaled to sum 1 where
        `renormalise` is set.
    rows: the edited rows, (start, stop) as in a slice (negative numbers and stop=None included). None: all; (-1, None):
        the last.
    return_lse: also the natural-log normaliser of the edited logits, before `rule`, for all rows; the unedited rows
        then go through this operation too.
    Returns output [B, Nq, H, Dv], contiguous, in query's dtype, and with return_lse the lse, float32 [B, Nq, H]. A row
    that sees no key gives output 0, lse -inf and gradient 0.
    Raises TypeError or ValueError that names the argument, and UnsupportedError where a back end can't serve.
    """
    query, key, value = check_inputs(query, key, value)
    seen = check_visibility(Visibility() if visibility is None else visibility, query, key)
    edits = check_edits(query, key, scale, softcap, temperature, key_bias, boost, groups, num_groups)
    if (rule is None) != (groups is None):
        raise ValueError(f"rule and groups go together, got rule={type(rule).__name__}, groups={type(groups).__name__}")
    num_rows = query.shape[1]
    start, stop = resolve_rows(rows, num_rows)
    check_choice("backend", backend, ("auto", *operator.REASONS))
    if edits.neutral:
        start, stop = 0, 0
    pieces: list[Tensor] = []
    lses: list[Tensor] = []
    for first, last, edited in ((0, start, False), (start, stop, True), (stop, num_rows, False)):
        if first == last:
            continue
        q, part = query[:, first:last], seen.rows(first, last)
        if not edited and not return_lse and softcap is None:
            pieces.append(stock.rows(q, key, value, part, edits.scale))
            continue
        if edited and rule is not None and not return_lse and _few_on_cpu(q, key, value, part, edits, backend):
            pieces.append(_regrouped(q, key, value, part, edits, rule, renormalise))
            continue
        group_output, group_lse = operator.grouped(q, key, value, part, edits if edited else edits.plain(), backend)
        if edited and rule is not None:
            masses = group_masses(group_lse)
            pieces.append(
                _combine(group_output, masses, rule if isinstance(rule, Tensor) else rule(masses), renormalise)
            )
        else:
            pieces.append(group_output.squeeze(3))
        if return_lse:
            lses.append(reference.softmax_parts(group_lse)[1])
    if pieces:
        output = (torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]).contiguous()
    else:
        output = query.new_zeros((*query.shape[:3], value.shape[3]))
    if not return_lse:
        return output
    return output, torch.cat(lses, 1) if lses else query.new_zeros(query.shape[:3], dtype=torch.float32)


def _few_on_cpu(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, edits: Edits, backend: str) -> bool:
    """Whether the rows' probabilities may be held, and are all that is needed: a decoding step on the CPU."""
    assert edits.groups is not None
    return (
        query.device.type == "cpu"
        and query.shape[0] * query.shape[1] * query.shape[2] * key.shape[1] <= SCORE_ELEMENTS
        and edits.groups.shape[1] == 1
        and not _asks_for_a_gradient(query, key, value, edits.key_bias, edits.boost, seen.mask)
        and operator.chosen(query, key, value, seen, edits, backend) == "tiled"
    )


def _regrouped(
    query: Tensor, key: Tensor, value: Tensor, seen: Visibility, edits: Edits, rule: Rule | Tensor, renormalise: bool
) -> Tensor:
    assert edits.groups is not None
    member = edits.groups[:, 0] < edits.num_groups
    seen = replace(seen, key_mask=member if seen.key_mask is None else seen.key_mask & member)
    probs = operator.probs(query, key, seen, replace(edits, groups=None, num_groups=1), "none", "tiled")
    with torch.autocast("cpu", enabled=False):
        found = tiled.regrouped(probs, value, edits.groups, edits.num_groups, rule, renormalise)
    return found.to(query.dtype)


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Tensor,
    num_groups: int,
    visibility: Visibility | None = None,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    key_bias: Tensor | None = None,
    boost: Tensor | None = None,
    rows: Rows = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Per key group an attention of its own, for `rows` only.

    Arguments as in `edited_attention`. Returns group_output [B, R, H, G, Dv] in query's dtype and group_lse
    [B, R, H, G] float32, R the number of `rows`; an empty group gives output 0 and lse -inf.
    """
    query, key, value = check_inputs(query, key, value)
    seen = check_visibility(Visibility() if visibility is None else visibility, query, key)
    edits = check_edits(query, key, scale, softcap, temperature, key_bias, boost, groups, num_groups)
    start, stop = resolve_rows(rows, query.shape[1])
    return operator.grouped(query[:, start:stop], key, value, seen.rows(start, stop), edits, backend)


def group_masses(group_lse: Tensor) -> Tensor:
    """Share of each key group in its row's softmax: [..., G] from group_lse [..., G]; 0 for a row without keys."""
    return reference.softmax_parts(group_lse)[0]


def combine_groups(
    group_output: Tensor, group_lse: Tensor, factors: Tensor | None = None, renormalise: bool = False
) -> Tensor:
    """sum over g of factors_g * mass_g * group_output_g: what a post-softmax re-weighting of key groups gives.

    group_output [B, R, H, G, Dv] and group_lse [B, R, H, G] from `grouped_attention`; factors broadcast to group_lse,
    None means ones (plain attention). renormalise divides by sum of factors_g * mass_g (a row where that is 0 gives 0).
    Returns [B, R, H, Dv] in group_output's dtype, contiguous.
    """
    return _combine(group_output, group_masses(group_lse), factors, renormalise)


def _combine(group_output: Tensor, weights: Tensor, factors: Tensor | None, renormalise: bool) -> Tensor:
    if factors is not None:
        weights = weights * factors.to(weights.dtype)
    if renormalise:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
    with torch.autocast(group_output.device.type, enabled=False):
        return (weights[..., None, :] @ group_output.to(weights.dtype)).squeeze(-2).to(group_output.dtype)


def attention_probs(
    query: Tensor,
    key: Tensor,
    visibility: Visibility | None = None,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    key_bias: Tensor | None = None,
    boost: Tensor | None = None,
    rows: Rows = (-1, None),
    head_reduction: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """The softmax rows themselves, for few `rows` (the last by default): a read-out, for OPERA, GIFT, CARVE.

    head_reduction: None, "max" or "mean" over heads. Other arguments as in `edited_attention`.
    Returns [B, R, H, Nk], or [B, R, Nk] where heads are reduced; float32 (float64 for float64 inputs). On a GPU nothing
    larger than that is formed, on a CPU SCORE_ELEMENTS logits at a time.

    Where a gradient is asked for, the rows come from the formula in plain PyTorch, which holds them for all heads:
    backend "auto" and "reference" do that, asking for another raises UnsupportedError.
    """
    check_choice("head_reduction", head_reduction, (None, "max", "mean"))
    check_choice("backend", backend, ("auto", *operator.REASONS))
    query, key, _ = check_inputs(query, key, key)
    seen = check_visibility(Visibility() if visibility is None else visibility, query, key)
    edits = check_edits(query, key, scale, softcap, temperature, key_bias, boost)
    start, stop = resolve_rows(rows, query.shape[1])
    problem = query[:, start:stop], key, seen.rows(start, stop), edits
    reduction = head_reduction or "none"
    if _asks_for_a_gradient(query, key, key_bias, boost, seen.mask):
        if backend not in ("auto", "reference"):
            raise UnsupportedError(
                f"attention_probs: backend {backend!r} has no gradient; backend='reference' has, and no other"
            )
        return reference.probs(*problem, reduction)
    return operator.probs(*problem, reduction, backend)


def attention_column_sums(
    query: Tensor,
    key: Tensor,
    visibility: Visibility | None = None,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    key_bias: Tensor | None = None,
    boost: Tensor | None = None,
    rows: Rows = None,
    backend: str = "auto",
) -> Tensor:
    """Sum over `rows` of the softmax, per key: what every key receives (ACT's sinks), without the matrix.

    Arguments as in `edited_attention`. Returns [B, H, Nk], float32 (float64 for float64 inputs). A read-out without a
    gradient: UnsupportedError where query, key, an edit or a float mask asks for one.
    """
    check_choice("backend", backend, ("auto", *operator.REASONS))
    query, key, _ = check_inputs(query, key, key)
    seen = check_visibility(Visibility() if visibility is None else visibility, query, key)
    edits = check_edits(query, key, scale, softcap, temperature, key_bias, boost)
    if _asks_for_a_gradient(query, key, key_bias, boost, seen.mask):
        raise UnsupportedError("attention_column_sums has no gradient: call it under torch.no_grad()")
    start, stop = resolve_rows(rows, query.shape[1])
    return operator.column_sums(query[:, start:stop], key, seen.rows(start, stop), edits, backend)


def _asks_for_a_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
