"""Gradients of a formula written in ordinary torch operations, for a backward operator to return."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    formula: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each tensor that `needs` names, None for the others, by running formula(*tensors) again.

    grads: what arrives at each of the formula's results, None for zero. Inside a custom operator autograd's own graph
    is not recorded; torch.func's is.
    """
    wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]

    def of_wanted(*some: Tensor | None) -> tuple[Tensor, ...]:
        left = iter(some)
        results = formula(*(next(left) if needed else tensor for tensor, needed in zip(tensors, needs, strict=True)))
        return tuple(result for result, grad in zip(results, grads, strict=True) if grad is not None)

    pull = torch.func.vjp(of_wanted, *wanted)[1]
    found = iter(pull(tuple(grad for grad in grads if grad is not None)))
    return [next(found) if needed else None for needed in needs]
