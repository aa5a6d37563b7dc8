"""The search for a table of tiles: which candidates there are, which fit, which is fastest, and how a table takes it.

Nothing here needs a GPU but the timer that is passed in.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnzoo.kernels.neighborhood_attention import table
from attnzoo.kernels.planning import Plan

KERNELS = ("forward", "grad_query", "grad_key_value")
TRITON_NAMES = {"forward": "na_forward", "grad_query": "na_grad_query", "grad_key_value": "na_grad_key_value"}
SPILLS = {"forward": 0, "grad_query": 64, "grad_key_value": 64}  # bytes per thread; docs/kernels.md
SHARED_LIMIT = 163 * 1024  # of an A100, the least of the NVIDIA GPUs that the table serves
WORTH = 0.98  # a new entry must take less than this share of the old one's time

# Only for the order in which candidates are tried: every tile of queries loads all its keys again.
SMALL_QUERIES, SMALL_KEYS = 64, 16

# float32 values per thread by element size, of 255 registers: float32 products hold their operands there too.
FLOATS = {2: (8, 160), 4: (4, 48)}

TOKENS = (16, 32, 64, 128)
MORE_SHAPES = {1: (), 2: ([8, 16], [16, 16]), 3: ([2, 4, 8], [2, 8, 8], [4, 8, 8])}  # beside the table's own
WARPS, STAGES = (4, 8), (1, 2, 3)

Entry = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """What one entry serves: calls of `cases` without a bias."""

    kernel: str
    itemsize: int
    dims: int
    rank: int
    cases: tuple[str, ...] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.kernel}, {self.itemsize} bytes, head dims to {self.dims}, {self.rank}-D"


def groups(cases: Mapping[str, dict[str, Any]], dtypes: Iterable[torch.dtype], kernels: Sequence[str]) -> list[Group]:
    """The searches that the cases ask for, half types first, each with the cases that it is timed on."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for itemsize in sorted({dtype.itemsize for dtype in dtypes}):
        for name, case in cases.items():
            if not case.get("bias"):
                dims = table.bucket(case["head_dim"], case["head_dim"])
                found.setdefault((itemsize, dims, len(case["grid"])), []).append(name)
    return [Group(kernel, *key, tuple(names)) for key, names in found.items() for kernel in kernels]


def current(group: Group, contents: dict[str, Any]) -> Entry:
    """The entry that the table has for such calls on NVIDIA GPUs."""
    entry = contents["kernels"][group.kernel][str(group.itemsize)][str(group.dims)]
    measured = entry.get("cuda", {}).get(f"{group.rank}-D")
    return {name: (measured or entry)[name] for name in ("queries", "keys", "warps", "stages")}


def config_of(entry: Entry, group: Group, contents: dict[str, Any]) -> table.Config:
    """An entry as the kernels take it."""
    return table.entry_config(entry, group.rank, contents["tiles"])


def shared_floor(cfg: table.Config, group: Group) -> int:
    """Bytes of shared memory that an NVIDIA GPU needs at least, for what the loop loads ahead; `aot` knows the rest."""
    loaded = cfg.num_queries if group.kernel == "grad_key_value" else cfg.num_keys
    return (cfg.num_stages - 1) * loaded * 2 * group.dims * group.itemsize


def floats_per_thread(cfg: table.Config, group: Group) -> float:
    """float32 values that a thread holds through the loop: logits and their gradients, and the sums it is there for."""
    pairs = cfg.num_queries * cfg.num_keys * (1 if group.kernel == "forward" else 2)
    sums = {"forward": cfg.num_queries, "grad_query": cfg.num_queries, "grad_key_value": 2 * cfg.num_keys}
    return (pairs + sums[group.kernel] * group.dims) / (32 * cfg.num_warps)


def tile_sizes(rank: int, contents: dict[str, Any]) -> list[Any]:
    """The tiles to try for grids of `rank` axes: the table's, by number of tokens, and further shapes."""
    shapes = contents["tiles"][str(rank)]
    return [n for n in TOKENS if str(n) in shapes] + [s for s in MORE_SHAPES[rank] if s not in shapes.values()]


def tile_pairs(rank: int, contents: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All pairs of them as shapes, for a plan to count."""
    shapes = [table.tile_shape(size, rank, contents["tiles"])[3 - rank :] for size in tile_sizes(rank, contents)]
    return [(queries, keys) for queries in shapes for keys in shapes]


def candidates(
    group: Group, contents: dict[str, Any], plans: Sequence[Plan] = (), limit: int = SHARED_LIMIT
) -> list[Entry]:
    """The table's own entry first, then every other that may fit, the likely ones first.

    plans: of the group's cases, with `tile_pairs` counted. The order, so that a search cut short has tried the likely
    ones: what the forward's walk executes with the tiles, times what small tiles cost by being small. Left out: what
    needs more registers or less than a warp's share of work by `floats_per_thread`, or more shared memory than `limit`
    by its loads alone.
    """
    sizes = tile_sizes(group.rank, contents)
    own = current(group, contents)
    found: dict[table.Config, Entry] = {}
    for queries in sizes:
        for keys in sizes:
            for warps in WARPS:
                for stages in STAGES:
                    entry = {"queries": queries, "keys": keys, "warps": warps, "stages": stages}
                    cfg = config_of(entry, group, contents)
                    fitting = FLOATS[group.itemsize][0] <= floats_per_thread(cfg, group) <= FLOATS[group.itemsize][1]
                    if fitting and shared_floor(cfg, group) <= limit:
                        found.setdefault(cfg, entry)
    ours = config_of(own, group, contents)
    found.pop(ours, None)

    def cost(cfg: table.Config) -> float:
        small = (1 + SMALL_QUERIES / cfg.num_queries) * (1 + SMALL_KEYS / cfg.num_keys)
        warps = 4 if cfg.num_queries <= 64 else 8
        return small * (1 + sum(_relative_work(plan, cfg) for plan in plans)) * (1.1 if cfg.num_warps != warps else 1.0)

    ranked = sorted(found, key=lambda cfg: cost(cfg) * {2: 1.0, 3: 1.05, 1: 1.1}[cfg.num_stages])
    return [own, *(found[cfg] for cfg in ranked)]


def _relative_work(plan: Plan, cfg: table.Config) -> float:
    rank = plan.problem.rank
    tiles = cfg.queries[3 - rank :], cfg.keys[3 - rank :]
    for walk in (*plan.forward.triton, *plan.forward.others):
        if (walk.queries, walk.keys) == tiles:
            return walk.flops / plan.forward.useful_flops
    return math.inf


@dataclass
class Choice:
    """A search's outcome. cost and baseline in the timer's unit; tried: every candidate with its cost or reason."""

    entry: Entry
    cost: float
    baseline: float
    tried: list[dict[str, Any]]


def search(
    entries: Sequence[Entry],
    fits: Callable[[Entry], str | None],
    cost: Callable[[Entry], float],
    seconds: float,
    finals: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """The cheapest entry that fits, by `cost`; the first of `entries`, today's, stays unless another is clearly better.

    fits: why an entry can't be taken, or None. cost may raise: the reason is noted and the entry is out. When `seconds`
    are over, what was not tried is noted as such. The best `finals` are measured again beside today's before one wins.
    Raises ValueError where today's entry itself can't be measured.
    """
    begun, tried, costs = clock(), [], {}
    for number, entry in enumerate(entries):
        note: dict[str, Any] = {"entry": entry}
        tried.append(note)
        if number and clock() - begun > seconds:
            note["reason"] = "no time left"
            continue
        why = fits(entry) if number else None
        if why is not None:
            note["reason"] = why
            continue
        try:
            costs[number] = note["cost"] = cost(entry)
        except Exception as error:
            if number == 0:
                raise ValueError(f"the table's own entry {entry} can't be measured: {error}") from error
            note["reason"] = f"{type(error).__name__}: {error}"[:200]
    ranked = sorted((n for n in costs if n), key=costs.__getitem__)[:finals]
    again = {number: min(costs[number], cost(entries[number])) for number in (0, *ranked)}
    best = min(again, key=again.__getitem__)
    if again[best] > WORTH * again[0]:
        best = 0
    return Choice(dict(entries[best]), again[best], again[0], tried)


def merged(contents: dict[str, Any], group: Group, entry: Entry) -> dict[str, Any]:
    """A copy of a table in which `entry` serves the group's calls on NVIDIA GPUs, and nothing else has changed."""
    made = copy.deepcopy(contents)
    target = made["kernels"][group.kernel][str(group.itemsize)][str(group.dims)]
    target.setdefault("cuda", {})[f"{group.rank}-D"] = dict(entry)
    return made


def with_choice(contents: dict[str, Any], group: Group, entry: Entry) -> dict[str, Any]:
    """`merged`, or the table as it is where `entry` is what it has."""
    return contents if entry == current(group, contents) else merged(contents, group, entry)


def dumps(contents: Any, depth: int = 4, indent: int = 0) -> str:
    """JSON with an entry on one line, as the packaged table is written."""
    if not isinstance(contents, dict) or depth == 0 or not any(isinstance(v, dict) for v in contents.values()):
        return json.dumps(contents)
    pad = " " * (indent + 2)
    lines = [f"{pad}{json.dumps(key)}: {dumps(value, depth - 1, indent + 2)}" for key, value in contents.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def packaged_path() -> Path:
    """Where the table of the library lies."""
    from importlib import resources

    return Path(str(resources.files("attnzoo.configs").joinpath("autotune/neighborhood_attention.json")))


def read_table(path: Path | None) -> dict[str, Any]:
    """A table's contents; the packaged one without a path, or where the file is not there yet."""
    return json.loads(path.read_text()) if path is not None and path.exists() else copy.deepcopy(table.packaged())


def write_table(path: Path, contents: dict[str, Any]) -> None:
    """Write a table in one piece: a killed run leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".part")
    whole.write_text(dumps(contents) + "\n")
    whole.replace(path)


def resources_of(
    group: Group, case: dict[str, Any], entry: Entry, contents: dict[str, Any], target: Any
) -> dict[str, Any]:
    """Registers, spill and shared memory of one candidate, compiled ahead of time for `target`; runs in any process."""
    from attnzoo.kernels import aot
    from attnzoo.kernels.neighborhood_attention import triton as kernels
    from benchmarks.neighborhood_attention import plan

    dtype = torch.float16 if group.itemsize == 2 else torch.float32
    problem = plan(case, dtype).problem

    def run() -> None:
        query = torch.empty(
            problem.batch, *problem.grid, problem.num_heads, problem.head_dim, dtype=dtype, device="meta"
        )
        out, lse = kernels.forward(query, query, query, None, None, None, problem)
        if group.kernel != "forward":
            kernels.backward(out, None, query, query, query, None, None, None, out, lse, problem)

    compiled = aot.Case(str(group), run, spills={TRITON_NAMES[group.kernel]: SPILLS[group.kernel]})
    with table.forcing({group.kernel: config_of(entry, group, contents)}):
        (launched,) = (
            each for each in aot.launches(compiled, target) if each.kernel.__name__ == TRITON_NAMES[group.kernel]
        )
    measured = aot.measure(launched, compiled, target)
    return {
        "registers": measured.registers,
        "spill": measured.spill,
        "shared": measured.shared,
        "faults": measured.faults,
    }
