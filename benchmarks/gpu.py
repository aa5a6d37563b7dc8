"""neighborhood_attention on a GPU: checked, tuned, timed, plotted, within half an hour; every step is kept as it ends.

    python -m benchmarks.gpu [--parts check,tune,time,plot] [--out outputs/gpu] [--tune-out FILE] [--minutes 25]
                             [--cases NAME,...] [--dtypes bfloat16,float16,float32] [--passes forward,backward]
                             [--table FILE] [--dry-run [--compile sm_90]]

    check   output and gradients of each case and dtype at sampled queries against float64 (see `checking`): float32
            within 1e-5, half types within 1.5 times the error of torch's own attention. A case that fails is not timed
    tune    the fastest tiles per kernel, element size, head dim and rank (see `tuning`), half types first; with
            --tune-out they are merged into a new table, a copy of the library's. A candidate must give the results of
            today's tiles, must not spill and must fit the shared memory, by compiling it ahead (attnzoo.kernels.aot)
    time    medians by CUDA events with a cleared cache, beside dense attention by cuDNN, flash and torch's
            memory-efficient kernel (once per shape), flex_attention compiled (bfloat16 only: it compiles per case and
            pass), and NATTEN where it is installed. The speed-up over the fastest dense peer is set against the plan's
            bound, and the times against the figures that NATTEN published. The tiles are those that `tune` found in the
            same run, else those of --table, else the library's
    plot    OUT/times.png from OUT/results.json: time by case, the plan's bound as a line

OUT/results.json is written after every step; a run that is repeated goes on where the last one stopped, on the same GPU
with the same torch and the same --table. --dry-run lists cases, peers and candidates, and needs no GPU; with --compile
it also compiles the candidates for a target and says which it drops, which takes seconds each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnzoo.kernels.neighborhood_attention import table
from benchmarks import measuring, tuning
from benchmarks import neighborhood_attention as cases_of
from benchmarks.gpu_timing import PEERS, SAMPLES, CudaTimer, Timer, check, times, told
from benchmarks.gpu_tuning import compilers, entries_of, faults_of, tune_here

PARTS = ("check", "tune", "time", "plot")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PASSES = ("forward", "backward")
TUNE_SHARE = 0.45  # of the time, for the search


@dataclass(frozen=True)
class Step:
    """One piece of work that is kept on its own."""

    part: str
    case: str
    dtype: str
    what: str = ""  # the pass

    @property
    def key(self) -> str:
        """Its name in the results."""
        return "/".join(filter(None, (self.part, self.case, self.dtype, self.what)))


def steps(parts: list[str], cases: list[str], dtypes: list[str], passes: list[str]) -> list[Step]:
    """Checks and timings in the order of their worth: dtype by dtype, forward before backward."""
    made = []
    for dtype in dtypes:
        if "check" in parts or "time" in parts:  # nothing is timed unchecked
            made += [Step("check", case, dtype) for case in cases]
        if "time" in parts:
            made += [Step("time", case, dtype, what) for what in passes for case in cases]
    return made


class Kept:
    """The results on disk, written in one piece after every change."""

    def __init__(self, folder: Path, machine: dict[str, str]) -> None:
        """Raises ValueError where the folder holds the results of another machine, torch or table."""
        self.path = folder / "results.json"
        self.contents: dict[str, Any] = {"machine": machine, "steps": {}}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["machine"] != machine:
                raise ValueError(
                    f"--out {folder} holds results of {found['machine']}, this is {machine}: choose another"
                )
            self.contents = found

    def get(self, key: str) -> Any:
        """A step's result or None."""
        return self.contents["steps"].get(key)

    def put(self, key: str, result: Any) -> None:
        """Keep a step's result."""
        self.contents["steps"][key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.contents, indent=1))
        whole.replace(self.path)


def dry_run(options: argparse.Namespace, contents: dict[str, Any]) -> Iterator[str]:
    """What would run, line by line; nothing needs a GPU."""
    for step in steps(options.parts, options.cases, options.dtypes, options.passes):
        case, dtype = cases_of.GPU_CASES[step.case], DTYPES[step.dtype]
        if step.part == "check":
            yield f"{step.key}: {SAMPLES} queries of the first and last batch entry against float64"
            continue
        plan = cases_of.plan(case, dtype)
        part = plan.forward if step.what == "forward" else plan.backward
        left_out = {"natten": bool(case.get("bias")), "flex": dtype != torch.bfloat16}
        peers = ", ".join(peer for peer in PEERS if not left_out.get(peer))
        yield f"{step.key}: ours, {peers}; {part.useful_flops / 1e9:,.0f} useful GFLOP, bound {part.bound:.2f} x"
        if "published" in case and step.what == "forward":
            theirs = {k: v for k, v in case["published"].items() if k != "by"}
            yield f"    published by {case['published']['by']} (theirs): {theirs}"
    if "tune" not in options.parts:
        return
    for group in groups_of(options):
        entries = entries_of(group, contents, options.most)
        yield f"tune/{group}: {len(entries)} candidates on {', '.join(group.cases)}"
        reasons: list[str | None] = [None] * len(entries)
        if options.compile is not None:
            from attnzoo.kernels.aot import TARGETS

            with compilers(os.cpu_count() or 1) as pool:
                fits = faults_of(group, entries, contents, TARGETS[options.compile], pool)
                reasons = [fits(entry) for entry in entries]
        for entry, why in zip(entries, reasons):
            yield f"    {json.dumps(entry)}" + (f"  dropped: {why}" if why else "")


def groups_of(options: argparse.Namespace) -> list[tuning.Group]:
    """The searches that the chosen cases, dtypes and passes ask for."""
    cases = {name: cases_of.GPU_CASES[name] for name in options.cases}
    kernels = [k for k in tuning.KERNELS if ("forward" if k == "forward" else "backward") in options.passes]
    return tuning.groups(cases, [DTYPES[name] for name in options.dtypes], kernels)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises ValueError for a value that can't be."""

    def listed(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", type=listed, default=list(PARTS), help="of check,tune,time,plot")
    parser.add_argument("--cases", type=listed, default=list(cases_of.GPU_CASES), help="names, joined by commas")
    parser.add_argument("--dtypes", type=listed, default=list(DTYPES), help="of bfloat16,float16,float32")
    parser.add_argument("--passes", type=listed, default=list(PASSES), help="of forward,backward")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder for results.json and times.png")
    parser.add_argument("--tune-out", type=Path, help="file for the table with what was found; merged into if there")
    parser.add_argument("--table", type=Path, help="take the tiles from this table instead of the library's")
    parser.add_argument("--minutes", type=float, default=25.0, help="of the GPU, for everything")
    parser.add_argument("--most", type=int, default=40, help="candidates per search, the least work first; 0 for all")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; needs no GPU")
    parser.add_argument("--compile", metavar="TARGET", help="with --dry-run: drop what does not fit, such as sm_90")
    options = parser.parse_args(arguments)
    known = {"parts": PARTS, "cases": cases_of.GPU_CASES, "dtypes": DTYPES, "passes": PASSES}
    for name, choices in known.items():
        given = getattr(options, name)
        if not given or any(value not in choices for value in given):
            raise ValueError(f"--{name} must be of {', '.join(choices)}; got {', '.join(given) or 'nothing'}")
    if not options.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes}")
    if options.most < 0:
        raise ValueError(f"--most must be at least 0, got {options.most}")
    if options.table is not None and not options.table.is_file():
        raise ValueError(f"--table {options.table} is not a file")
    if options.tune_out is not None and options.tune_out.resolve() == tuning.packaged_path().resolve():
        raise ValueError("--tune-out must be a new file, not the library's own table: look at it first, then copy it")
    if options.compile is not None:
        from attnzoo.kernels.aot import TARGETS

        nvidia = [name for name, target in TARGETS.items() if target.vendor == "cuda"]
        if options.compile not in nvidia or not options.dry_run:
            raise ValueError(
                f"--compile goes with --dry-run and takes one of {', '.join(nvidia)}, got {options.compile}"
            )
    return options


def same_shape(kept: Kept, step: Step) -> dict[str, Any] | None:
    """A kept timing of another case with the same tensors, dtype and pass."""
    shape = [cases_of.GPU_CASES[step.case][name] for name in ("batch", "grid", "heads", "head_dim")]
    for name, case in cases_of.GPU_CASES.items():
        if name != step.case and [case[part] for part in ("batch", "grid", "heads", "head_dim")] == shape:
            found = kept.get(Step("time", name, step.dtype, step.what).key)
            if found is not None:
                return found
    return None


def run_steps(
    options: argparse.Namespace, kept: Kept, device: str, timer: Timer, deadline: float, clock: Callable[[], float]
) -> bool:
    """Checks and timings, what is kept already left out; False where a check failed or the time was over."""
    good = True
    for step in steps(options.parts, options.cases, options.dtypes, options.passes):
        case, dtype = cases_of.GPU_CASES[step.case], DTYPES[step.dtype]
        result = kept.get(step.key)
        if result is None and clock() > deadline:
            print(f"{step.key}: not run, the {options.minutes:g} minutes are over")
            good = False
            continue
        if step.part == "check":
            if result is None:
                try:
                    result = check(case, device, dtype)
                except Exception as error:
                    result = {"ok": False, "failure": measuring.reason(error)}
                kept.put(step.key, result)
            if not result["ok"]:
                good = False
                print(f"{step.key}: WRONG, no speed will be given: {json.dumps(result)}")
            else:
                worst = max(
                    result["errors"], key=lambda name: result["errors"][name] / max(result["bars"][name], 1e-30)
                )
                figures = f"{result['errors'][worst]:.1e}, allowed {result['bars'][worst]:.1e}"
                print(f"{step.key}: right; nearest to its bar is {worst}, {figures}", flush=True)
        else:
            checked = kept.get(Step("check", step.case, step.dtype).key)
            if checked is None or not checked["ok"]:
                print(f"{step.key}: no speed, its results are not known to be right")
                good = False
                continue
            if result is None:
                result = times(case, device, dtype, step.what, timer, same_shape(kept, step))
                if "ours" in result["ms"]:
                    kept.put(step.key, result)
            good &= "ours" in result["ms"]
            print("\n".join(told(step.case, step.dtype, step.what, result)), flush=True)
        if device == "cuda":  # the next case needs the memory
            gc.collect()
            torch.cuda.empty_cache()
    return good


def main(arguments: list[str] | None = None) -> int:
    """The command; see the module's text. Raises ValueError for arguments that can't be served."""
    options = _arguments(arguments)
    contents = tuning.read_table(options.table)
    if options.dry_run:
        table.use_table(contents)
        try:
            print("\n".join(dry_run(options, contents)))
        finally:
            table.use_table(None)
        return 0
    needs_gpu = set(options.parts) - {"plot"}
    if needs_gpu and not torch.cuda.is_available():
        raise ValueError("bench-gpu needs a GPU that torch sees, and it sees none (--dry-run says what would run)")
    if "tune" in options.parts and torch.version.hip:
        raise ValueError("tune searches for NVIDIA GPUs only: leave it out of --parts")
    clock, good = time.perf_counter, True
    deadline = clock() + 60 * options.minutes
    if needs_gpu:
        machine = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "table": str(options.table or "own"),
        }
        kept = Kept(options.out, machine)
        timer = CudaTimer()
        if "tune" in options.parts:
            share = 60 * options.minutes * (TUNE_SHARE if "time" in options.parts else 1.0)
            contents = tune_here(groups_of(options), contents, kept, share, options.most, options.tune_out)
        table.use_table(contents)
        good = run_steps(options, kept, "cuda", timer, deadline, clock)
    if "plot" in options.parts:
        from benchmarks import plotting

        print(plotting.plot(options.out / "results.json", options.out / "times.png"))
    return int(not good)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
