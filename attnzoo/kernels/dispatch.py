"""Which back end serves a call.

An operation states, per back end, the reasons why that back end can't serve a given problem (an empty list: it can).
`choose` picks the first that can, or, where the caller named one, that one or an error with ALL its reasons.

    reference   the formula, any dtype including float64, any device: the yardstick
    tiled       fast on CPU, forward and backward; of operations that say so (`portable`) the path of any device
    flex        torch's flex_attention, compiled: portable GPU fallback
    triton      GPU; under TRITON_INTERPRET=1 also CPU tensors (slow, for tests)
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from attnzoo.errors import UnsupportedError, check_choice

BACKENDS = ("reference", "tiled", "flex", "triton")
_ORDER = {"cpu": ("tiled", "reference"), "cuda": ("triton", "flex", "tiled", "reference")}

_forced: ContextVar[str | None] = ContextVar("attnzoo_backend", default=None)

Reasons = Callable[[Any], list[str]]
Describe = Callable[..., tuple[Any, torch.device]]


@dataclass(frozen=True)
class Operation:
    """What an operation tells about itself: its back ends' reasons, and how its public arguments become a problem."""

    reasons: Mapping[str, Reasons]
    describe: Describe
    portable: bool = False  # "tiled" is stock torch operations that serve every device


_operations: dict[str, Operation] = {}


def register(operation: str, reasons: Mapping[str, Reasons], describe: Describe, portable: bool = False) -> None:
    """Make `operation` known to `not_supported_reasons`; an operation's package calls it once, when imported.

    describe(*args, **kwargs): the public function's arguments as (problem, device), raising what that function raises.
    portable: its tiled back end is made of stock torch operations and serves every device, not only the CPU.
    """
    _operations[operation] = Operation(reasons, describe, portable)


def backend_module(operation: str, backend: str) -> Any:
    """The module `attnzoo.kernels.OPERATION.BACKEND`, imported when first asked for (triton may be missing)."""
    return importlib.import_module(f"attnzoo.kernels.{operation}.{backend}")


def module_reasons(operation: str, backend: str) -> Reasons:
    """The `reasons` function of a back end's module; where the module can't be imported, that is the reason."""

    def reasons(problem: Any) -> list[str]:
        try:
            module = backend_module(operation, backend)
        except ImportError as error:
            return [f"{backend} can't be imported: {error}"]
        return module.reasons(problem)

    return reasons


def not_supported_reasons(operation: str, backend: str, *args: Any, **kwargs: Any) -> list[str]:
    """Every reason why `backend` can't serve a call of `operation` with these arguments; empty where it can.

    operation: "neighborhood_attention", say; backend: one of BACKENDS; the rest is what its public function takes
    (without `backend`). Runs nothing. Raises ValueError for an unknown name, and what the function raises for
    arguments that no back end takes.

        not_supported_reasons("neighborhood_attention", "triton", query, key, value, kernel_size=7)
    """
    check_choice("operation", operation, sorted(_operations))
    check_choice("backend", backend, BACKENDS)
    found = _operations[operation]
    problem, device = found.describe(*args, **kwargs)
    if backend not in found.reasons:
        return [f"{operation} has no {backend} back end"]
    return device_reasons(operation, backend, device) + found.reasons[backend](problem)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, `backend="auto"` means `backend`, in this thread (or task) only."""
    check_choice("backend", backend, ("auto", *BACKENDS))
    token = _forced.set(None if backend == "auto" else backend)
    try:
        yield
    finally:
        _forced.reset(token)


@torch.compiler.assume_constant_result
def _forced_here() -> str | None:
    """What use_backend says here; in a compiled graph, what it said while tracing (torch 2.11 can't trace the read)."""
    return _forced.get()


def interpreting() -> bool:
    """True where Triton kernels run through its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_reasons(operation: str, backend: str, device: torch.device) -> list[str]:
    """Why `operation`'s back end can't run on `device`, whatever the call."""
    if backend == "triton" and device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return [f"triton needs a CUDA or ROCm device, or CPU tensors under TRITON_INTERPRET=1; got {device.type}"]
    portable = operation in _operations and _operations[operation].portable
    if backend == "tiled" and device.type != "cpu" and not portable:
        return [f"tiled is the CPU path; got {device.type}"]
    return []


def choose(operation: str, backend: str, problem: Any, device: torch.device, reasons: Mapping[str, Reasons]) -> str:
    """The back end that serves `problem`, a value that the operation's own `reasons` functions understand.

    Raises ValueError for an unknown name and UnsupportedError, listing every reason, where the asked one can't serve.
    """
    check_choice("backend", backend, ("auto", *reasons))
    asked = backend if backend != "auto" else _forced_here()
    if asked is not None:
        if asked not in reasons:
            raise UnsupportedError(
                f"{operation}: backend {asked!r} does not exist here; there are {', '.join(reasons)}"
            )
        why = device_reasons(operation, asked, device) + reasons[asked](problem)
        if why:
            raise UnsupportedError(f"{operation}: backend {asked!r} can't serve this call: " + "; ".join(why))
        return asked
    refusals = {}
    for name in _ORDER.get(device.type, ("reference",)):
        if name in reasons:
            why = device_reasons(operation, name, device) + reasons[name](problem)
            if not why:
                return name
            refusals[name] = why
    told = " | ".join(f"{name}: {'; '.join(why)}" for name, why in refusals.items())
    raise UnsupportedError(f"{operation}: no back end can serve this call on {device.type}: {told}")
