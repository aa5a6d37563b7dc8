"""How Triton kernels are launched, so that the same launch can be recorded and compiled where there is no GPU.

An operation's launcher calls `launch` instead of `kernel[grid](...)`. Within `recording`, a launch is written down and
not done: run the launcher on meta tensors, and what it would have launched is what `attnzoo.kernels.aot` compiles.
Imports no triton: the kernels come as arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from attnzoo.kernels.dispatch import interpreting


@dataclass(frozen=True)
class Launch:
    """One launch: the jitted function, the programs along its grid, its arguments by name, options included."""

    kernel: Any
    programs: tuple[int, ...]
    arguments: dict[str, Any]


@dataclass
class _Recording:
    vendor: str
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[_Recording | None] = ContextVar("attnzoo_recording", default=None)


@contextmanager
def recording(vendor: str) -> Iterator[list[Launch]]:
    """Within the block launches of this thread (or task) are appended to the list, as for a GPU of `vendor`."""
    current = _Recording(vendor)
    token = _recording.set(current)
    try:
        yield current.launches
    finally:
        _recording.reset(token)


def vendor() -> str:
    """Whose GPUs the kernels are cut for: "cuda", "hip", or "interpreter" for CPU tensors under TRITON_INTERPRET=1."""
    current = _recording.get()
    if current is not None:
        return current.vendor
    return "interpreter" if interpreting() else "hip" if torch.version.hip else "cuda"


def launch(kernel: Any, programs: tuple[int, ...], **arguments: Any) -> None:
    """Run `kernel` on a grid of `programs`; the arguments include num_warps and num_stages.

    Fused multiply-adds are asked for by name: Triton's default for them has changed between versions.
    """
    arguments = {"enable_fp_fusion": True, **arguments}
    current = _recording.get()
    if current is None:
        kernel[programs](**arguments)
    else:
        current.launches.append(Launch(kernel, programs, arguments))
