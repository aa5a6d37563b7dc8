"""What a run leaves on the disk, so that a kill at any moment loses nothing that a checkpoint held.

    OUTPUT/config.json                settings and data of the run
    OUTPUT/metrics.jsonl              one line per log step and per epoch
    OUTPUT/checkpoints/step-00000123  the whole state: accelerate's, averaged weights, progress.json
    OUTPUT/last, OUTPUT/best          weights as timm's local-dir
    OUTPUT/summary.json, curves.png   at the end

A checkpoint is written beside and renamed, so one that has its name is whole; the older one goes after that. A file of
an export is replaced in one move.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from timm.utils import ModelEmaV3
from torch import nn

from attnzoo.errors import ReachError

FOLDER, PREFIX, PROGRESS, CONFIG, METRICS = "checkpoints", "step-", "progress.json", "config.json", "metrics.jsonl"


def write_json(path: Path, value: Any) -> None:
    """Write JSON that diffs well, in one move."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(beside)
    os.replace(beside, path)


def find_checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(p for p in (output / FOLDER).glob(f"{PREFIX}*") if (p / PROGRESS).is_file())


def find_resume(resume: str | Path, output: Path) -> Path | None:
    """The checkpoint that `resume` means: "auto", a run's folder, or a checkpoint's; None where auto finds none.

    Raises ReachError for a path that holds none.
    """
    if resume == "auto":
        found = find_checkpoints(output)
        return found[-1] if found else None
    path = Path(resume)
    if (path / PROGRESS).is_file():
        return path
    if found := find_checkpoints(path):
        return found[-1]
    raise ReachError(f"resume {str(path)!r} holds no checkpoint; give 'auto', a run's folder or one of its {FOLDER}")


def save_checkpoint(
    accelerator: Accelerator, output: Path, ema: ModelEmaV3 | None, progress: Mapping[str, Any], config: Any
) -> None:
    """Write the state after `progress["step"]` steps and remove older ones. Every process calls it."""
    name = f"{PREFIX}{progress['step']:08d}"
    beside, final = output / FOLDER / f".{name}.tmp", output / FOLDER / name
    main = accelerator.is_main_process
    if main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(beside), safe_serialization=True)
    accelerator.wait_for_everyone()
    if main:
        if ema is not None:
            state = {k: v.detach().cpu().clone().contiguous() for k, v in ema.module.state_dict().items()}
            save_file(state, beside / "ema.safetensors")
        write_json(beside / CONFIG, config)
        write_json(beside / PROGRESS, dict(progress))
        for path in beside.iterdir():
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        _sync(final.parent)
        for old in (output / FOLDER).iterdir():
            if old != final and old.name.lstrip(".").startswith(PREFIX):
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, ema: ModelEmaV3 | None) -> dict[str, Any]:
    """Put the state back; returns its progress."""
    accelerator.load_state(str(checkpoint))
    if ema is not None:
        ema.module.load_state_dict(load_file(checkpoint / "ema.safetensors"))
    return json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))


def stored_config(checkpoint: Path) -> dict[str, Any]:
    """The settings and data that a checkpoint was made with."""
    return json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))


def begun(output: Path) -> dict[str, Any] | None:
    """The settings of a run that left no checkpoint in `output`; None for an empty folder (or one where the run was
    killed before it wrote them). Raises ValueError for a folder of something else."""
    if (output / CONFIG).is_file() and "settings" in (stored := stored_config(output)):
        return stored
    if not output.is_dir() or any(p.name not in (METRICS, f".{CONFIG}.tmp") for p in output.iterdir()):
        raise ValueError(f"output {str(output)!r} is there already and holds no run that could be resumed")
    return None


# ------------------------------------------------------------------------------------------------------------- metrics


def _kept(raw: bytes, until: int) -> tuple[list[dict[str, Any]], int]:
    """The lines up to a step, and how many bytes they take: steps only grow, so they are the file's beginning. A last
    line that a kill cut off is left out."""
    lines: list[dict[str, Any]] = []
    size = 0
    for text in raw.splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["step"] > until or not text.endswith(b"\n"):
            break
        lines.append(line)
        size += len(text)
    return lines, size


class Metrics:
    """The metrics file: what lies there (or in `source`) up to step `until`, then what is added.

    Only the main process writes, and holds a lock on the file that ends with the process.
    Raises ValueError where another process holds it.
    """

    def __init__(self, path: Path, until: int, writes: bool, source: Path | None = None) -> None:
        self._file = None
        self.lines: list[dict[str, Any]] = []
        if not writes:
            return
        self._file = path.open("a+b")
        try:
            _lock(self._file)
        except OSError as error:
            self._file.close()
            raise ValueError(f"output {str(path.parent)!r} is being written by another run") from error
        self._file.seek(0)  # read through this handle: closing another one would end the lock
        raw = source.read_bytes() if source is not None and source.is_file() else self._file.read()
        self.lines, size = _kept(raw, until)
        self._file.truncate(0 if source else size)
        if source:
            self._file.write(raw[:size])
            self._file.flush()

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """On the disk, before a checkpoint that counts on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# ------------------------------------------------------------------------------------------------------------- exports


def export(
    net: nn.Module,
    folder: Path,
    model_args: dict[str, Any],
    data_config: dict[str, Any],
    classes: tuple[str, ...],
    about: dict[str, Any],
) -> None:
    """Write `net` so that `timm.create_model("local-dir:FOLDER", pretrained=True)` is it, with its class names.

    about: entries of timm's pretrained config that stand for these weights instead of the published ones'.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = dict(model_args)
    if hasattr(net, "in_chans"):
        arguments["in_chans"] = net.in_chans
    weights, config = folder / ".model.safetensors", folder / ".config.json"
    # Tied tensors are written twice: safetensors refuses shared memory.
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}, weights)
    wanted = {key: data_config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    save_config_for_hf(
        net,
        str(config),
        model_config={"label_names": list(classes), "pretrained_cfg": {"tag": "attnzoo", **about, **wanted}},
        model_args=arguments,
        data_config=wanted,
    )
    for path in (config, weights):
        _sync(path)
        os.replace(path, folder / path.name.removeprefix("."))


def _lock(file: Any) -> None:
    """Lock for this process alone; its children don't inherit it, so a killed run's readers don't keep it."""
    if os.name == "posix":
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(path: Path) -> None:
    """Onto the disk: a file's content, or a folder's names (where the system can)."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
