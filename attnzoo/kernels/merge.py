"""Partial attention results joined into one, by their lse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.errors import check_same, check_tensor


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attentions of the same queries over disjoint sets of keys into the attention over all of them.

    outputs: each [..., heads, head_dim_v], all of one shape and dtype, normalised. lses: each [..., heads], the natural
    log of the softmax's denominator, in float32 or float64; -inf where a query saw no key.
    Returns out, in the outputs' dtype, and lse, in the lses'; a query without any key gets 0 and -inf. The sum runs in
    the lses' dtype. Differentiable in everything. Source: NATTEN 8c8729f, attn_merge.py.

    Raises TypeError for other types and ValueError for empty lists, differing lengths or shapes.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"outputs and lses must be of one length, at least 1, got {len(outputs)} and {len(lses)}")
    for index, (out, lse) in enumerate(zip(outputs, lses)):
        check_tensor(f"outputs[{index}]", out)
        check_tensor(f"lses[{index}]", lse, dtypes=(torch.float32, torch.float64))
        if out.shape[:-1] != lse.shape:
            raise ValueError(
                f"lses[{index}] must have the shape of outputs[{index}] without its last dimension, "
                f"{tuple(out.shape[:-1])}, got {tuple(lse.shape)}"
            )
    for attribute in ("shape", "dtype", "device"):
        check_same(attribute, **{f"outputs[{i}]": out for i, out in enumerate(outputs)})
    check_same("dtype", **{f"lses[{i}]": lse for i, lse in enumerate(lses)})
    stacked = torch.stack(list(lses))
    # a row that no part sees has lse -inf; exp(-inf - 0) keeps its weights, and their gradients, at 0
    highest = stacked.detach().amax(0)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = torch.exp(stacked - shift)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = sum((w / total)[..., None] * o for w, o in zip(weights, outputs))
    assert isinstance(out, Tensor)
    lse = (shift + total.log()).masked_fill(empty, -torch.inf)
    return out.to(outputs[0].dtype), lse
