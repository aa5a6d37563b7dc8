"""Kernel benchmarks on this machine: ratios to named peers on the same input in the same run.

    python -m benchmarks.ops [OPERATION] [--only CASE] [--threads 1] [--minutes 9] [--flex] [--json FILE]

Without OPERATION every module of this folder that has CASES runs. Per case the operation is first compared with its
reference, output and gradients; where they disagree no speed is printed and the exit status is 1. On the CPU the
figures come from medians of interleaved runs of the thread's CPU time (one thread):

    ms          of ours
    x dense     dense time over our time; other peers stand at the end of the line
    of sgemm    our rate in FLOPs that the formula needs, over that of a 1024 x 1024 x 1024 float32 product measured
                beside the case
    memory      peak allocation beyond inputs and results, over the bytes of inputs and output
    2 threads   x dense again, by wall clock with two threads

On a GPU (--device cuda) ms is wall clock between synchronisations, and "2 threads" is left out; benchmarks.gpu measures
there with more care.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import benchmarks
from benchmarks import measuring

TOLERANCE = 1e-5  # relative, in float32, against the reference
SAME = 1e-3  # a peer's output within this of the reference's computes the same thing
LINE = "  {case:30} {part:20} {ms:>9} {dense:>8} {sgemm:>9} {memory:>7} {wall:>10}  {peers}"


def discover() -> dict[str, ModuleType]:
    """The operations that have a benchmark here, by name."""
    found = {}
    for module in sorted(pkgutil.iter_modules(benchmarks.__path__), key=lambda module: module.name):
        loaded = importlib.import_module(f"benchmarks.{module.name}")
        if hasattr(loaded, "CASES") and hasattr(loaded, "contenders"):
            found[module.name] = loaded
    return found


def peers_of(runs: dict[str, Any], device: str, flex: bool) -> dict[str, Any]:
    """The contenders to time: not the reference, and on a CPU flex only when it was asked for."""
    return {
        name: run for name, run in runs.items() if name != "reference" and (name != "flex" or flex or device != "cpu")
    }


def run_case(
    module: ModuleType, case: dict[str, Any], device: str, threads: int, repeats: int, seconds: float, flex: bool
) -> dict[str, Any]:
    """Compare and measure one case; "error" above TOLERANCE (or NaN) comes without any figure."""
    torch.set_num_threads(threads)
    runs, inputs, grad = module.contenders(case, device, torch.float32)
    wanted = measuring.results(runs["reference"], inputs, grad)
    got = measuring.results(runs["ours"], inputs, grad)
    report: dict[str, Any] = {"error": measuring.relative_error(got, wanted)}
    if not report["error"] <= TOLERANCE:
        return report
    sizes = measuring.nbytes([*inputs, grad])
    timed = peers_of(runs, device, flex)
    report["other_result"] = other_results(timed, wanted[0])
    del got, wanted
    # one thread does all its work on the calling thread; with more, only the process's clock sees it
    clock: Callable[[], float] = time.thread_time if threads == 1 else time.process_time
    if device == "cuda":
        clock = measuring.cuda_clock
    rate = measuring.matmul_rate(clock, device)
    report |= {
        "sgemm_gflops": rate / 1e9,
        "ms": {},
        "absent": {},
        "memory": {},
        "wall_ms_2_threads": {},
        "of_sgemm": {},
    }
    flops = module.useful_flops(case) if hasattr(module, "useful_flops") else None
    share = seconds / (2 if device == "cuda" else 4)
    parts = measuring.passes(timed, inputs, grad)
    for position, (part, contestants) in enumerate(parts.items()):
        report["ms"][part], report["absent"][part] = measuring.medians(contestants, repeats, share, clock)
        report["memory"][part] = measuring.extra_memory(contestants["ours"], device) / sizes
        if flops is not None:
            report["of_sgemm"][part] = flops[position] / (report["ms"][part]["ours"] / 1e3) / rate
    if device == "cpu" and "dense" in timed:
        torch.set_num_threads(2)
        for part, contestants in parts.items():
            pair = {name: contestants[name] for name in ("ours", "dense") if name in report["ms"][part]}
            report["wall_ms_2_threads"][part], _ = measuring.medians(
                pair, max(1, repeats // 2), share / 2, time.perf_counter
            )
        torch.set_num_threads(threads)
    return report


def other_results(timed: dict[str, Any], wanted: torch.Tensor) -> list[str]:
    """Peers, dense attention aside, whose output is not the reference's: they compute something else."""
    differ = []
    for name, run in timed.items():
        if name == "ours" or name.startswith("dense"):
            continue
        try:
            with torch.no_grad():
                error = measuring.relative_error([run()], [wanted])
        except Exception:
            continue  # the timing, which tries it again, tells why
        if not error <= SAME:
            differ.append(name)
    return differ


def ratio(value: float) -> str:
    """A ratio with the digits that say something."""
    return f"{value:.1f} x" if value >= 1 else f"{value:.2f} x"


def lines(name: str, report: dict[str, Any]) -> Iterator[str]:
    """A case's report as text."""
    if "ms" not in report:
        yield f"  {name}: no speed: relative error {report['error']:.1e} against the reference, allowed {TOLERANCE:.0e}"
        return
    for part, times in report["ms"].items():
        wall, peers = report["wall_ms_2_threads"].get(part, {}), []
        for peer, taken in times.items():
            if peer not in ("ours", "dense"):
                other = " (another result)" if peer in report["other_result"] else ""
                peers.append(f"{ratio(taken / times['ours'])} {peer}{other}")
        peers += [f"{peer}: {why}" for peer, why in report["absent"][part].items()]
        yield LINE.format(
            case=name if part == "forward" else f"  (error {report['error']:.0e})",
            part=part,
            ms=f"{times['ours']:.3f}",
            dense=ratio(times["dense"] / times["ours"]) if "dense" in times else "-",
            sgemm=f"{100 * report['of_sgemm'][part]:.0f} %" if part in report["of_sgemm"] else "-",
            memory=f"{report['memory'][part]:.2f} x",
            wall=ratio(wall["dense"] / wall["ours"]) if "dense" in wall else "-",
            peers=", ".join(peers),
        ).rstrip()


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises ValueError for a value that can't be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("operation", nargs="?", help="all of them without it")
    parser.add_argument("--threads", type=int, default=1, help="for the CPU-time medians (1 is the one to quote)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", help="one case's name")
    parser.add_argument("--repeats", type=int, default=7, help="most runs of one contender")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything; what is left is shared out")
    parser.add_argument("--flex", action="store_true", help="flex_attention as a peer on a CPU too: it compiles long")
    parser.add_argument("--json", metavar="FILE", help="write all figures, after each case")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; see the module's text. Raises ValueError for arguments that can't be served."""
    options = _arguments(arguments)
    found = discover()
    if options.operation is not None and options.operation not in found:
        raise ValueError(f"operation must be one of {', '.join(map(repr, found))}, got {options.operation!r}")
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch sees, and it sees none")
    for name in ("threads", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not options.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes}")
    chosen = found if options.operation is None else {options.operation: found[options.operation]}
    work = [
        (operation, name, case)
        for operation, module in chosen.items()
        for name, case in module.CASES.items()
        if options.only in (None, name)
    ]
    if not work:
        names = [name for module in chosen.values() for name in module.CASES]
        raise ValueError(f"--only must be one of {', '.join(map(repr, names))}, got {options.only!r}")

    cuda = options.device == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"{options.threads} CPU thread(s), thread CPU time"
    print(f"float32, torch {torch.__version__}, {machine}; medians of at most {options.repeats}, interleaved")
    heading = {"case": "case", "part": "pass", "ms": "ms", "dense": "x dense", "sgemm": "of sgemm"}
    heading |= {"memory": "memory", "wall": "2 threads", "peers": "other peers"}
    deadline = time.perf_counter() + 60 * options.minutes
    reports: dict[str, Any] = {}
    failed, previous, threads = False, None, torch.get_num_threads()
    try:
        for position, (operation, name, case) in enumerate(work):
            if operation != previous:
                print(f"{operation}\n{LINE.format(**heading)}", flush=True)
                previous = operation
            left = deadline - time.perf_counter()
            if left <= 0:
                print(f"  {name}: not measured, the {options.minutes:g} minutes are over")
                failed = True
                continue
            seconds = left / (len(work) - position)
            report = run_case(
                found[operation], case, options.device, options.threads, options.repeats, seconds, options.flex
            )
            print("\n".join(lines(name, report)), flush=True)
            failed |= "ms" not in report
            reports.setdefault(operation, {})[name] = report
            if options.json:
                whole = {"machine": machine, "torch": torch.__version__, "operations": reports}
                Path(options.json).write_text(json.dumps(whole, indent=1))
    finally:
        torch.set_num_threads(threads)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
