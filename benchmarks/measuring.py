"""How results are compared, and how time and memory are measured."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
LONG = 0.3  # seconds: a first run that took longer counts as a measurement, warming up is a small part of it


def relative_error(got: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """The largest ratio of the norm of the error to the norm of what was wanted; NaN counts as infinite.

    None, a gradient that does not exist, is a zero: it must meet None or zeros.
    """
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        if a.shape != b.shape:
            return float("inf")
        error, size = (a.double() - b.double()).norm().item(), b.double().norm().item()
        ratio = error if size == 0.0 else error / size
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def results(function: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """The output of `function` and its gradients."""
    out = function()
    if not inputs:  # an inference-only call
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, list(inputs), grad, allow_unused=True)]


def passes(
    runs: Mapping[str, Callable[[], Tensor]], inputs: Sequence[Tensor], grad: Tensor
) -> dict[str, dict[str, Run]]:
    """What to time, by pass and contender; forward runs without autograd."""

    def forward(function: Callable[[], Tensor]) -> Run:
        def run() -> Tensor:
            with torch.no_grad():
                return function()

        return run

    def both(function: Callable[[], Tensor]) -> Run:
        return lambda: torch.autograd.grad(function(), list(inputs), grad, allow_unused=True)

    found = {"forward": {name: forward(function) for name, function in runs.items()}}
    if inputs:
        found["forward + backward"] = {name: both(function) for name, function in runs.items()}
    return found


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def medians(
    runs: Mapping[str, Run],
    repeats: int,
    seconds: float,
    clock: Callable[[], float],
    wall: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, float], dict[str, str]]:
    """(median milliseconds by `clock`, why a contender could not run), the runs interleaved.

    Each runs once to warm up, then as often as an equal share of `seconds` by `wall` allows: at least once ("ours"
    three times), at most `repeats`. A contender that raises is left out.
    """
    taken: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    absent: dict[str, str] = {}
    for name, run in runs.items():
        begun, start = wall(), clock()
        try:
            run()
        except Exception as error:
            absent[name] = reason(error)
            continue
        first, cost = clock() - start, wall() - begun
        taken[name] = [1e3 * first] if cost > LONG else []
        least = (3 if name == "ours" else 1) - len(taken[name])
        counts[name] = max(least, min(repeats, int(seconds / len(runs) / max(cost, 1e-9))) - len(taken[name]))
    for turn in range(max(counts.values(), default=0)):
        for name, count in counts.items():
            if turn < count:
                start = clock()
                runs[name]()
                taken[name].append(1e3 * (clock() - start))
    return {name: statistics.median(times) for name, times in taken.items()}, absent


def paired_ratio(ours: Run, theirs: Run, repeats: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile) of the ratios of ours to theirs, run in turns after one run each."""
    ours()
    theirs()
    found = []
    for _ in range(repeats):
        marks = [clock()]
        for run in (ours, theirs):
            run()
            marks.append(clock())
        found.append((marks[1] - marks[0]) / max(marks[2] - marks[1], 1e-9))
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if repeats > 1 else found * 3
    return low, middle, high


def turns(runs: Mapping[str, Run], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each by `clock`, run in turns after one run each."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            taken[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def cuda_clock() -> float:
    """Seconds, after all work on the GPU is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(clock: Callable[[], float], device: str = "cpu", size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a float32 product of square matrices, by the best of a few runs."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        torch.mm(a, b, out=out)
        best = min(best, clock() - start)
    return 2 * size**3 / best


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler's library writes to the standard error by itself."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def extra_memory(run: Run, device: str = "cpu") -> int:
    """Bytes that `run` allocates at its peak beyond what it returns, by torch's profiler or the GPU's allocator."""
    if device == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del kept
        return extra
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak - held


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
