"""One operation as PyTorch sees it: a `torch.library` custom operator with a fake, and a backward operator of its own.

`register` makes two operators, `attnzoo::NAME` and `attnzoo::NAME_backward`. Both are opaque to torch.compile and have
fakes, so they trace with fullgraph=True; the first differentiates through the second, and the second refuses to be
differentiated. Outputs never alias inputs and are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError

NAMESPACE = "attnzoo"


@contextmanager
def _ordinary() -> Iterator[None]:
    """Outside of inference mode: what a back end keeps for later calls (buffers, tables) must not be inference tensors,
    which the next call outside could not write to."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _count(declaration: str) -> int:
    return len([part for part in declaration.split(",") if part.strip()])


def register(
    name: str,
    tensors: str,
    options: str,
    outputs: Sequence[str],
    forward: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., list[Tensor | None]] | None,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register an operation and return the callable that runs it.

    name: the operator's name in the namespace "attnzoo".
    tensors: its tensor arguments as schema text, e.g. "Tensor query, Tensor key, Tensor? bias"; they come first.
    options: its other arguments as schema text, e.g. "int[] kernel_size, float scale, str backend".
    outputs: the names of what it returns, all floating-point tensors, e.g. ("out", "lse").
    forward(*tensors, *options) -> the outputs, freshly allocated.
    fake(*tensors, *options) -> empty outputs of the same shapes, dtypes and strides, nothing read.
    backward(grads, tensors, results, options, needs) -> one gradient per tensor argument, None where `needs` is False;
        grads, tensors and results are tuples (grads hold None for an output whose gradient is zero), options too.
        None in place of the function: the operation has no gradient, and asking for one raises UnsupportedError.

    Differentiating the gradient raises UnsupportedError.
    """
    num_tensors, num_outputs = _count(tensors), len(outputs)
    returns = "Tensor" if num_outputs == 1 else "(" + ", ".join(["Tensor"] * num_outputs) + ")"
    full = f"{NAMESPACE}::{name}"

    def run_forward(*arguments: Any) -> Any:
        with _ordinary():
            results = forward(*arguments)
        return results[0] if num_outputs == 1 else tuple(results)

    def run_fake(*arguments: Any) -> Any:
        results = fake(*arguments)
        return results[0] if num_outputs == 1 else tuple(results)

    operator: Any = torch.library.custom_op(
        full, run_forward, mutates_args=(), schema=f"({tensors}, {options}) -> {returns}"
    )
    operator.register_fake(run_fake)

    def refuse(*_: Any) -> None:
        raise UnsupportedError(
            f"{name}: "
            + ("it has no gradient" if backward is None else "the gradient has no gradient (double backward)")
        )

    if backward is None:
        operator.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)
        return operator

    grads = ", ".join(f"Tensor? grad_{output}" for output in outputs)
    results_text = ", ".join(f"Tensor {output}" for output in outputs)
    backward_schema = f"({grads}, {tensors}, {results_text}, {options}, bool[] needs) -> Tensor[]"

    def split(arguments: Sequence[Any]) -> tuple[tuple, tuple, tuple, tuple, tuple[bool, ...]]:
        ends = (num_outputs, num_outputs + num_tensors, 2 * num_outputs + num_tensors)
        given = tuple(arguments)
        return (
            given[: ends[0]],
            given[ends[0] : ends[1]],
            given[ends[1] : ends[2]],
            given[ends[2] : -1],
            tuple(given[-1]),
        )

    def run_backward(*arguments: Any) -> list[Tensor]:
        needs = split(arguments)[-1]
        with _ordinary():
            gradients = backward(*split(arguments))
        return [g for g, needed in zip(gradients, needs, strict=True) if needed and g is not None]

    def run_backward_fake(*arguments: Any) -> list[Tensor]:
        _, given, _, _, needs = split(arguments)
        return [t.new_empty(t.shape) for t, needed in zip(given, needs, strict=True) if needed]

    backward_operator: Any = torch.library.custom_op(
        f"{full}_backward", run_backward, mutates_args=(), schema=backward_schema
    )
    backward_operator.register_fake(run_backward_fake)
    backward_operator.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        results = (output,) if num_outputs == 1 else tuple(output)
        ctx.save_for_backward(*inputs[:num_tensors], *results)
        ctx.options = inputs[num_tensors:]
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple:
        nothing = (None,) * len(ctx.options)
        needs = [bool(n) for n in ctx.needs_input_grad[:num_tensors]]
        if all(g is None for g in gradients) or not any(needs):
            return (None,) * num_tensors + nothing
        saved = ctx.saved_tensors
        found = iter(backward_operator(*gradients, *saved[:num_tensors], *saved[num_tensors:], *ctx.options, needs))
        return tuple(next(found) if needed else None for needed in needs) + nothing

    operator.register_autograd(differentiate, setup_context=setup_context)
    return operator


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast wants the inputs of a matrix product: in its dtype where it is on, float64 left alone.

    Give it query, key and value (and what joins them), not biases: those stay in the precision they have.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):  # "meta" has none
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def last_dim_contiguous(tensor: Tensor) -> Tensor:
    """`tensor` itself where its last dimension has stride 1, else one contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
