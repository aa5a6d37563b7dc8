"""Kernel benchmarks: inputs as data, a peer on the same input in the same run, and no number before the results agree.

    python -m benchmarks.ops neighborhood_attention [--threads 1] [--device cpu|cuda] [--only NAME] [--json FILE]

Per input: the operation is compared with its own reference (output and gradients); where they disagree, no speed is
printed and the exit status is 1. On the CPU the number is dense time / our time, from medians of interleaved runs of
the thread's CPU time (one thread), beside wall-clock ratios with two threads. "dense" is scaled_dot_product_attention
over all tokens without a mask; NATTEN's CPU path joins where natten can be imported. On a GPU it is milliseconds and
the GPU's name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels import neighborhood_attention

# name: batch, grid, heads, head_dim, and the operation's own arguments; "bias" asks for an offset bias and its gradient
NEIGHBORHOOD_ATTENTION: dict[str, dict[str, Any]] = {
    "56x56 k7": {"batch": 1, "grid": (56, 56), "heads": 4, "head_dim": 32, "kernel_size": 7},
    "56x56 k7 batch 8": {"batch": 8, "grid": (56, 56), "heads": 4, "head_dim": 32, "kernel_size": 7},
    "56x56 k7 d8 batch 8": {"batch": 8, "grid": (56, 56), "heads": 4, "head_dim": 32, "kernel_size": 7, "dilation": 8},
    "28x28 k7 batch 8": {"batch": 8, "grid": (28, 28), "heads": 4, "head_dim": 32, "kernel_size": 7},
    "56x56 k7 bias": {"batch": 1, "grid": (56, 56), "heads": 4, "head_dim": 32, "kernel_size": 7, "bias": True},
    "8x28x28 k3x7x7": {"batch": 1, "grid": (8, 28, 28), "heads": 4, "head_dim": 32, "kernel_size": (3, 7, 7)},
    "4096 k257 causal": {
        "batch": 1, "grid": (4096,), "heads": 4, "head_dim": 64, "kernel_size": 257, "is_causal": True,
    },
}  # fmt: skip
INPUTS = {"neighborhood_attention": NEIGHBORHOOD_ATTENTION}
TOLERANCE = 1e-5  # relative, in float32, against the reference
SHAPE = ("batch", "grid", "heads", "head_dim", "bias")

Run = Callable[[], Any]


def tensors(case: dict[str, Any], device: str) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """query, key, value; the bias or None; and the output's gradient, from one seed."""
    generator = torch.Generator().manual_seed(0)
    shape = (case["batch"], *case["grid"], case["heads"], case["head_dim"])
    made = [torch.randn(shape, generator=generator).to(device) for _ in range(4)]
    bias = None
    if case.get("bias"):
        kernel = case["kernel_size"]
        kernel = (kernel,) * len(case["grid"]) if isinstance(kernel, int) else kernel
        bias = torch.randn(case["heads"], *(2 * k - 1 for k in kernel), generator=generator).to(device).requires_grad_()
    return [t.requires_grad_() for t in made[:3]], bias, made[3]


def contenders(case: dict[str, Any], device: str) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """What runs on one case, by name, "ours" and "dense" among them; their inputs; the output's gradient."""
    qkv, bias, grad = tensors(case, device)
    options = {k: v for k, v in case.items() if k not in SHAPE}
    query, key, value = qkv
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in qkv)

    def ours() -> Tensor:
        return neighborhood_attention(query, key, value, **options, bias=bias)

    def reference() -> Tensor:
        return neighborhood_attention(query, key, value, **options, bias=bias, backend="reference")

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(grad.shape)

    found: dict[str, Callable[[], Tensor]] = {"ours": ours, "reference": reference, "dense": dense}
    if bias is None and importlib.util.find_spec("natten") is not None:
        import natten

        natten_function = getattr(natten, f"na{len(case['grid'])}d")
        found["natten"] = lambda: natten_function(*qkv, **options)
    return found, [*qkv, *([] if bias is None else [bias])], grad


def disagreement(ours: Run, reference: Run, inputs: list[Tensor], grad: Tensor) -> float:
    """The largest relative error of output and gradients."""
    results = []
    for function in (ours, reference):
        out = function()
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))


def medians(runs: dict[str, Run], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each, the runs interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            taken[name].append(1e3 * (clock() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def cuda_clock() -> float:
    """Seconds, after all work on the GPU is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(case: dict[str, Any], device: str, repeats: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Median milliseconds by pass and contender."""
    runs, inputs, grad = contenders(case, device)
    del runs["reference"]

    def forward(function: Callable[[], Tensor]) -> Run:
        def run() -> None:
            with torch.no_grad():
                function()

        return run

    def both(function: Callable[[], Tensor], given: list[Tensor]) -> Run:
        return lambda: torch.autograd.grad(function(), given, grad)

    passes = {"forward": {name: forward(function) for name, function in runs.items()}}
    passes["forward+backward"] = {
        name: both(function, inputs if name == "ours" else inputs[:3])
        for name, function in runs.items()
        if name != "natten" or device != "cpu"  # natten's CPU path has no backward
    }
    return {name: medians(contestants, repeats, clock) for name, contestants in passes.items()}


def line(name: str, times: dict[str, float], wall: dict[str, float] | None) -> str:
    """One row of the table."""
    peers = [peer for peer in times if peer != "ours"]
    text = ", ".join(f"{times[peer] / times['ours']:.1f} x {peer}" for peer in peers)
    beside = "" if wall is None else f"   (2 threads, wall clock: {wall['dense'] / wall['ours']:.1f} x dense)"
    return f"  {name:17} {text}{beside}"


def main(arguments: list[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("operation", choices=sorted(INPUTS))
    parser.add_argument("--threads", type=int, default=1, help="for the CPU-time medians (1 is the one to quote)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", help="one input's name")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write all times, in milliseconds")
    options = parser.parse_args(arguments)
    cases = INPUTS[options.operation]
    if options.only is not None and options.only not in cases:
        parser.error(f"--only must be one of {', '.join(map(repr, cases))}, got {options.only!r}")
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees, and it sees none")
    for name in ("threads", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    machine = torch.cuda.get_device_name() if cuda else f"{options.threads} CPU thread(s), thread CPU time"
    print(
        f"{options.operation}, float32, torch {torch.__version__}, {machine}, median of {options.repeats}, interleaved"
    )
    report, failed = [], False
    for name, case in cases.items():
        if options.only not in (None, name):
            continue
        torch.set_num_threads(options.threads)
        runs, inputs, grad = contenders(case, options.device)
        error = disagreement(runs["ours"], runs["reference"], inputs, grad)
        print(f"{name}: relative error against the reference {error:.1e}", flush=True)
        if not error <= TOLERANCE:
            print(f"  no speed: more than {TOLERANCE:.0e}")
            failed = True
            continue
        # one thread does all its work on the calling thread; with more, only the process's clock sees it
        clock = cuda_clock if cuda else time.thread_time if options.threads == 1 else time.process_time
        times, wall = measure(case, options.device, options.repeats, clock), {}
        if not cuda:
            torch.set_num_threads(2)
            wall = measure(case, options.device, max(1, options.repeats // 2), time.perf_counter)
        for what, taken in times.items():
            if cuda:
                print(f"  {what:17} " + ", ".join(f"{peer} {t:.3f} ms" for peer, t in taken.items()), flush=True)
            else:
                print(line(what, taken, wall.get(what)), flush=True)
        report.append({"input": name, "error": error, "ms": times, "wall_ms_2_threads": wall})
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"operation": options.operation, "machine": machine, "torch": torch.__version__, "results": report},
                file,
                indent=1,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
