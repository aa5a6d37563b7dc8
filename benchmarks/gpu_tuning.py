"""The search for tiles on a GPU: candidates are compiled in processes of their own, checked, timed kernel by kernel."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.kernels.neighborhood_attention import table
from benchmarks import checking, measuring, tuning
from benchmarks import neighborhood_attention as cases_of
from benchmarks.gpu_timing import CudaTimer, Timer

TUNE_HEADS = 6  # heads of a large case while searching: enough programs to fill the GPU


def target_here() -> Any:
    """This GPU as `aot` names them, with its own shared memory, at most that of the least GPU the table serves."""
    from attnzoo.kernels.aot import Target

    major, minor = torch.cuda.get_device_capability()
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    return Target(f"sm_{major}{minor}", "cuda", 10 * major + minor, 32, min(shared, tuning.SHARED_LIMIT))


class Bench:
    """The calls that one group's candidates are timed on: checked against today's tiles, one kernel at a time."""

    def __init__(self, group: tuning.Group, contents: dict[str, Any], timer: Timer) -> None:
        from attnzoo.kernels.neighborhood_attention import triton as kernels

        self.group, self.contents, self.timer, self.kernels = group, contents, timer, kernels
        self.today: dict[str, float] = {}
        dtype = torch.float16 if group.itemsize == 2 else torch.float32
        self.calls = {}
        for name in group.cases:
            case = tuning_case(cases_of.GPU_CASES[name])
            qkv, _, grad = cases_of.tensors(case, "cuda", dtype)
            problem = cases_of.plan(case, dtype).problem
            tensors = [t.detach() for t in qkv]
            out, lse = kernels.forward(*tensors, None, None, None, problem)
            self.calls[name] = (tensors, grad, out, lse, problem)
        self.expected = {name: self._run(name) for name in self.calls}

    def _run(self, name: str) -> list[Tensor]:
        """The group's kernel in earnest: its results."""
        tensors, grad, out, lse, problem = self.calls[name]
        if self.group.kernel == "forward":
            return list(self.kernels.forward(*tensors, None, None, None, problem))
        keys = self.group.kernel == "grad_key_value"
        needs = (True, keys, keys, False, False, False)
        found = self.kernels.backward(grad, None, *tensors, None, None, None, out, lse, problem, needs)
        return [found[1], found[2]] if keys else [found[0]]

    def _launch(self, name: str) -> Callable[[], Any]:
        """The group's kernel alone, ready to be launched again and again."""
        from attnzoo.kernels import launch

        tensors, grad, out, lse, problem = self.calls[name]
        with launch.recording("cuda") as launches:
            self._run(name)
        (wanted,) = (each for each in launches if each.kernel.__name__ == tuning.TRITON_NAMES[self.group.kernel])
        return lambda: wanted.kernel[wanted.programs](**wanted.arguments)

    def cost(self, entry: tuning.Entry) -> float:
        """The geometric mean over the cases of time over today's time. Raises ArithmeticError for other results."""
        ratios = []
        with table.forcing({self.group.kernel: tuning.config_of(entry, self.group, self.contents)}):
            for name in self.calls:
                error = measuring.relative_error(self._run(name), self.expected[name])
                if not error <= (1e-2 if self.group.itemsize == 2 else checking.FLOAT32_BAR):
                    raise ArithmeticError(f"results differ from those of today's tiles by {error:.1e}")
                taken = self.timer(self._launch(name))
                ratios.append(taken / self.today.setdefault(name, taken))
        return math.exp(sum(map(math.log, ratios)) / len(ratios))


def tuning_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case with as many heads as the search needs."""
    large = math.prod(case["grid"]) > 1 << 14
    return {**case, "heads": min(case["heads"], TUNE_HEADS)} if large else case


def _compiled(arguments: tuple) -> dict[str, Any]:
    """`tuning.resources_of` in a process of its own; what goes wrong there is a fault of the candidate."""
    try:
        return tuning.resources_of(*arguments)
    except Exception as error:
        return {"faults": [f"does not compile: {measuring.reason(error)}"]}


@contextmanager
def compilers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile; they see no GPU."""
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield pool


def faults_of(
    group: tuning.Group, entries: list[tuning.Entry], contents: dict[str, Any], target: Any, pool: Any
) -> Callable[[tuning.Entry], str | None]:
    """A function that says why an entry can't be taken on `target`; all entries are given to the pool at once."""
    case = tuning_case(cases_of.GPU_CASES[group.cases[0]])
    waiting = {json.dumps(e): pool.submit(_compiled, (group, case, e, contents, target)) for e in entries}

    def fits(entry: tuning.Entry) -> str | None:
        return "; ".join(waiting[json.dumps(entry)].result()["faults"]) or None

    return fits


def entries_of(group: tuning.Group, contents: dict[str, Any], most: int) -> list[tuning.Entry]:
    """The group's candidates, today's first, then those with the least work by the plans of its cases."""
    dtype = torch.float16 if group.itemsize == 2 else torch.float32
    pairs = tuning.tile_pairs(group.rank, contents)
    plans = [cases_of.plan(cases_of.GPU_CASES[name], dtype, tiles=pairs) for name in group.cases]
    return tuning.candidates(group, contents, plans)[: most or None]


def tune(
    groups: list[tuning.Group],
    contents: dict[str, Any],
    seconds: float,
    most: int,
    bench_of: Callable[[tuning.Group, dict[str, Any]], Callable[[tuning.Entry], float]],
    fits_of: Callable[[tuning.Group, list[tuning.Entry]], Callable[[tuning.Entry], str | None]],
    keep: Callable[[tuning.Group, tuning.Choice], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Search group by group, each with an equal share of the time that is left; returns the table with all choices.

    keep(group, choice) is called after each, so that a killed run loses at most one group. A group that can't be
    searched is told and left as it is.
    """
    begun = clock()
    for position, group in enumerate(groups):
        left = (seconds - (clock() - begun)) / (len(groups) - position)
        if left <= 0:
            print(f"tune {group}: no time left")
            continue
        entries = entries_of(group, contents, most)
        try:
            choice = tuning.search(entries, fits_of(group, entries), bench_of(group, contents), left, clock=clock)
        except Exception as error:  # the other groups, and the timings after them, are worth having
            print(f"tune {group}: not searched: {measuring.reason(error)}")
            continue
        contents = tuning.with_choice(contents, group, choice.entry)
        tried = sum("cost" in note for note in choice.tried)
        print(
            f"tune {group}: {json.dumps(choice.entry)}, {choice.cost / choice.baseline:.2f} of today's time; "
            f"{tried} of {len(entries)} candidates timed",
            flush=True,
        )
        keep(group, choice)
    return contents


def tune_here(
    groups: list[tuning.Group], contents: dict[str, Any], kept: Any, seconds: float, most: int, path: Path | None
) -> dict[str, Any]:
    """Search on this GPU within `seconds`; returns the table with what was found.

    kept: the results (`gpu.Kept`); searches of an earlier run count. path: the table to write into, or None.
    """
    left = []
    for group in groups:
        done = kept.get(f"tune/{group}")
        if done is None:
            left.append(group)
        elif done["entry"] != tuning.current(group, contents):
            contents = tuning.merged(contents, group, done["entry"])
    target, timer = target_here(), CudaTimer(repeats=10, seconds=0.2)

    def keep(group: tuning.Group, choice: tuning.Choice) -> None:
        figures = {"entry": choice.entry, "cost": choice.cost, "baseline": choice.baseline, "tried": choice.tried}
        kept.put(f"tune/{group}", figures)
        if path is not None:
            tuning.write_table(path, tuning.with_choice(tuning.read_table(path), group, choice.entry))
        gc.collect()
        torch.cuda.empty_cache()

    with compilers(os.cpu_count() or 1) as pool:
        return tune(
            left,
            contents,
            seconds,
            most,
            lambda group, made: Bench(group, made, timer).cost,
            lambda group, entries: faults_of(group, entries, contents, target, pool),
            keep,
        )
