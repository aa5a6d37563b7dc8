"""What kernel tests share: errors, gradients of a fixed loss, and memory that is NaN until it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor


def gradients(run: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """run(*tensors)'s results, and the gradient by every tensor of one random weighting of them; -inf has no weight."""
    given = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    results = list(run(*given))
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for result in results:
        weight = torch.randn(result.shape, generator=generator).bfloat16()  # every dtype holds it exactly
        finite = result.masked_fill(torch.isinf(result), 0.0)
        loss = loss + (finite * weight.to(result.dtype)).double().sum()
    return [*results, *torch.autograd.grad(loss, [t for t in given if t is not None])]


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """Relative errors by norm; infinities must stand at the same places.

    Measured against entries of 0.05 at least: a gradient that is zero by an identity is rounding of what cancels in it.
    """
    found = []
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert torch.equal(torch.isinf(a), torch.isinf(b))
        a, b = (t.detach().double().masked_fill(torch.isinf(t), 0.0) for t in (a, b))
        found.append(((a - b).norm() / b.norm().clamp_min(0.05 * max(1, b.numel()) ** 0.5)).item())
    return found


@contextmanager
def nan_memory() -> Iterator[None]:
    """Within the block torch.empty, empty_like and new_empty give NaN, so that whatever is read unwritten shows."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, filled(getattr(owner, name)))
        yield
