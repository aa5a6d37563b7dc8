"""Backbones beside timm's nearest, on this CPU: what docs/backbones.md and its table say of speed and memory.

    python -m benchmarks.backbones times  [NAME[@SIZE] ...] [--runs 9]    one row a model of `backbone_cases.PEERS`
    python -m benchmarks.backbones curves [TITLE ...] [--runs 5]          time against resolution, and the picture
    python -m benchmarks.backbones memory [NAME@SIZE ...]                 peak memory in processes of their own
    python -m benchmarks.backbones table                                  docs/backbones_table.md

Times are one thread's CPU time, the model and its peer run in turns in one process; printed is the median of the ratios
(ours over theirs: below 1 ours is faster) and the middle half of them. Nothing is timed before its outputs agree with
those of the reference back end (or, for variants of timm's own models, with timm's under the same weights): in float32
to 1e-5, else in float64 to 1e-9. What is measured goes to benchmarks/backbones.json with the revision and the machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from attnzoo.kernels import use_backend
from benchmarks import backbone_cases as cases
from benchmarks import measuring

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".json")
TABLE = ROOT / "docs" / "backbones_table.md"
PICTURE = ROOT / "docs" / "pictures" / "backbone_times.png"
FLOAT32_BAR, FLOAT64_BAR = 1e-5, 1e-9
MEMORY = ("dinat_tiny@512", "dinat_tiny@1024")


def revision() -> str:
    """The commit that runs, with a + where the code differs from it."""
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "attnzoo/*.py"], cwd=ROOT, check=False).returncode
    return (told.stdout.strip() or "unknown") + ("+" if changed else "")


def machine() -> str:
    """Processor and torch, in words."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, timm {timm.__version__}"


def keep(section: str, rows: dict[str, Any], path: Path) -> None:
    """Merge rows into a section of the results, each with the revision and the machine it was measured on."""
    contents = json.loads(path.read_text()) if path.exists() else {}
    here = {"revision": revision(), "machine": machine()}
    contents.setdefault(section, {}).update({name: {**row, **here} for name, row in rows.items()})
    path.write_text(json.dumps(contents, indent=1) + "\n")


def agree(
    run: Callable[[nn.Module, Tensor], Tensor], want: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor
) -> bool:
    """Whether two ways to run a model give the same; in float64 where untrained layers grow float32's rounding."""
    if measuring.relative_error([run(model, x)], [want(model, x)]) <= FLOAT32_BAR:
        return True
    model, x = copy.deepcopy(model).double(), x.double()
    return measuring.relative_error([run(model, x)], [want(model, x)]) <= FLOAT64_BAR


def _plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _reference(model: nn.Module, x: Tensor) -> Tensor:
    with use_backend("reference"):
        return model(x)


def right(name: str, model: nn.Module, peer: nn.Module, x: Tensor) -> bool:
    """Whether a model's outputs are known to be right; a variant of timm's own takes its weights to `peer` first."""
    if not name.endswith("_attnzoo"):
        return agree(_plain, _reference, model, x)
    peer.load_state_dict(model.state_dict())

    def theirs(_: nn.Module, x: Tensor) -> Tensor:
        return (peer.double() if x.dtype == torch.float64 else peer.float())(x)

    good = agree(_plain, theirs, model, x)
    peer.float()
    return good


def measure(name: str, size: int, runs: int, batch: int = 1) -> dict[str, Any] | None:
    """One row: how a model's time stands to its peer's; None where its outputs are not right."""
    peer_name = cases.PEERS[name]
    model, peer = (cases.perturb(cases.build(each, size)) for each in (name, peer_name))
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not right(name, model, peer, x):
            return None
        ratio = measuring.paired_ratio(lambda: model(x), lambda: peer(x), runs, time.thread_time)
    low, middle, high = ratio
    return {
        "model": name,
        "peer": peer_name,
        "size": size,
        "batch": batch,
        "runs": runs,
        "ratio": middle,
        "low": low,
        "high": high,
    }


def times(names: list[str], runs: int, batch: int, out: Path = RESULTS) -> int:
    """The command `times`; 1 where a model's outputs are wrong."""
    failed = 0
    for entry in names or cases.PEERS:
        name, _, size = entry.partition("@")
        side = int(size) if size else cases.native_size(name)
        row = measure(name, side, runs, batch)
        if row is None:
            print(f"{name} at {side}: outputs are wrong, no speed is given")
            failed = 1
            continue
        keep("times", {f"{name}@{side}": row}, out)
        print(told(row), flush=True)
    return failed


def told(row: dict[str, Any]) -> str:
    """A row as text."""
    return (
        f"{row['model']} at {row['size']}, batch {row['batch']}: {row['ratio']:.2f} x the time of {row['peer']} "
        f"(middle half {row['low']:.2f} to {row['high']:.2f}, {row['runs']} runs)"
    )


def curve(title: str, runs: int, sizes: tuple[int, ...] = cases.SIZES) -> dict[str, Any] | None:
    """Median times of a group's models per size, in units of its last at the first size; None where one is wrong."""
    taken: dict[str, list[float]] = {label: [] for label, _, _ in cases.CURVES[title]}
    for size in sizes:
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        models = {
            label: cases.perturb(cases.build(name, size, **kwargs)) for label, name, kwargs in cases.CURVES[title]
        }
        with torch.inference_mode():
            if size == sizes[0] and not all(agree(_plain, _reference, model, x) for model in models.values()):
                return None
            medians = measuring.turns(
                {label: _caller(model, x) for label, model in models.items()}, runs, time.thread_time
            )
        for label, seconds in medians.items():
            taken[label].append(seconds)
    unit = taken[cases.CURVES[title][-1][0]][0]
    return {"sizes": list(sizes), "runs": runs, "times": {k: [t / unit for t in v] for k, v in taken.items()}}


def _caller(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x)


def curves(titles: list[str], runs: int, sizes: tuple[int, ...], out: Path = RESULTS) -> int:
    """The command `curves`; 1 where a model's outputs are wrong."""
    failed = 0
    for title in titles or cases.CURVES:
        found = curve(title, runs, sizes)
        if found is None:
            print(f"{title}: outputs are wrong, no speed is given")
            failed = 1
            continue
        keep("curves", {title: found}, out)
        for label, values in found["times"].items():
            print(
                f"{title}, {label}: " + ", ".join(f"{s}: {v:.2f}" for s, v in zip(found["sizes"], values)), flush=True
            )
    from benchmarks.plotting import plot_curves

    print(plot_curves(json.loads(out.read_text())["curves"], PICTURE))
    return failed


def peak(name: str, size: int, training: bool) -> int:
    """KiB by which this process grows at its peak when a model of batch 1 is built and run: for a process of its own.

    Before the count begins, a model of 2 channels has loaded what libraries load at their first call.
    """
    first = nn.Sequential(nn.Conv2d(3, 2, 3), nn.GELU(), nn.Flatten())
    first(torch.randn(1, 3, 8, 8)).sum().backward()
    before = _resident()
    model = cases.build(name, size)
    x = torch.randn(1, 3, size, size)
    if training:
        model.train()(x).sum().backward()
    else:
        with torch.inference_mode():
            model(x)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def _resident() -> int:
    """KiB that this process holds now."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0])


def memory(entries: list[str], out: Path = RESULTS, repeats: int = 3) -> int:
    """The command `memory`: medians of peaks in fresh processes, ours over timm's."""
    for entry in entries or MEMORY:
        name, _, size = entry.partition("@")
        for mode in ("inference", "training"):
            found = {}
            for each in (name, cases.PEERS[name]):
                command = [sys.executable, "-m", "benchmarks.backbones", "peak", f"{each}@{size}", "--mode", mode]
                told = [
                    int(
                        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]
                    )
                    for _ in range(repeats)
                ]
                found[each] = sorted(told)[repeats // 2] / 1024
            ratio = found[name] / found[cases.PEERS[name]]
            row = {"model": name, "peer": cases.PEERS[name], "size": int(size), "mode": mode, "mib": found}
            keep("memory", {f"{entry}/{mode}": {**row, "ratio": ratio, "repeats": repeats}}, out)
            print(f"{entry}, {mode}: {ratio:.2f} x {cases.PEERS[name]}, MiB: {found}", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command; see the module's text. Raises ValueError for arguments that can't be served."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backbones", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("times", "curves", "memory", "table", "peak"))
    parser.add_argument("names", nargs="*", help="NAME or NAME@SIZE, or titles of curves; all without")
    parser.add_argument("--runs", type=int, default=None, help="of each contender, after one that warms up")
    parser.add_argument("--batch", type=int, default=1, help="images per run of `times`")
    parser.add_argument("--sizes", type=int, nargs="+", default=cases.SIZES, help="of `curves`, pixels a side")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that what is measured is merged into")
    parser.add_argument("--times-only", action="store_true", help="of `table`: keep what the page has counted")
    parser.add_argument("--mode", choices=("inference", "training"), default="inference", help="of `peak`")
    options = parser.parse_args(arguments)
    for value, name in ((options.runs, "runs"), (options.batch, "batch")):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    for entry in options.names:
        name, _, size = entry.partition("@")
        known: Any = cases.CURVES if options.what == "curves" else {*cases.PEERS, *cases.PEERS.values()}
        if name not in known or (size and not size.isdigit()):
            raise ValueError(f"NAME must be one of {', '.join(sorted(known))}, with @SIZE or without; got {entry!r}")
    torch.set_num_threads(1)
    if options.what == "times":
        return times(options.names, options.runs or 9, options.batch, options.out)
    if options.what == "curves":
        return curves(options.names, options.runs or 5, tuple(options.sizes), options.out)
    if options.what == "memory":
        return memory(options.names, options.out)
    if options.what == "peak":
        name, _, size = options.names[0].partition("@")
        print(peak(name, int(size), options.mode == "training"))
        return 0
    from benchmarks.backbone_table import table

    TABLE.write_text(table(options.out, TABLE.read_text() if options.times_only else None))
    print(TABLE)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
