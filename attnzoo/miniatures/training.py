"""What the recipes share: reading them, streams of random numbers, the optimisation loop, what a run reports."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from attnzoo.configs import read_toml
from attnzoo.errors import ReachError

#: Streams of random numbers that never meet: nothing is chosen on "test".
SPLITS = {"train": 0, "validation": 1, "test": 2}

WEIGHTS = Path(__file__).parent / "weights"


def read_recipe(name: str) -> dict[str, Any]:
    """The recipe configs/recipes/`name`.toml as a dict."""
    return read_toml(f"recipes/{name}.toml")


def trained_folder(name: str, folder: Path | None) -> Path:
    """`folder`, or the shipped one of that name if None; ReachError where it holds no weights."""
    place = WEIGHTS / name if folder is None else Path(folder)
    if not (place / "model.safetensors").is_file():
        raise ReachError(f"folder {str(place)!r} holds no model.safetensors; `attnzoo train miniature {name}` makes it")
    return place


def generator(split: str, seed: int, purpose: int = 0) -> np.random.Generator:
    """A random generator for a split ("train", "validation", "test"); other arguments give an independent stream."""
    return np.random.default_rng([SPLITS[split], seed, purpose])


@contextmanager
def seeded(seed: int, device: str | torch.device) -> Iterator[None]:
    """torch's global generators (also the GPUs' where `device` is one) seeded inside, and as before after it."""
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed_all(seed)
        yield


def capped(recipe: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """The recipe with every stage cut to `steps` and its data to match, for a trial run; unchanged if None."""
    if steps is None:
        return recipe
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    cut = {name: dict(part) for name, part in recipe.items()}
    for part in cut.values():
        if "steps" in part:
            part["steps"] = min(part["steps"], steps)
    batch = max(part.get("batch", 0) for part in cut.values())
    for key in ("balanced", "prior", "blank"):
        if key in cut["data"]:
            cut["data"][key] = min(cut["data"][key], max(16, 2 * steps * batch))
    if "scenes" in cut["validation"]:
        cut["validation"]["scenes"] = min(cut["validation"]["scenes"], 8)
    return cut


@dataclass
class Clock:
    """Wall and CPU seconds of this process since it was made, and when each stage ended."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)
    stages: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str) -> None:
        """Note the CPU seconds since the last stage under `name`."""
        self.stages[name] = round(time.process_time() - self.cpu - sum(self.stages.values()), 1)

    def report(self, seed: int, steps: int | None, device: str) -> dict[str, Any]:
        """What the model card says of the training run."""
        return {
            "seed": seed,
            "steps": steps,
            "device": device,
            "cpu_seconds": round(time.process_time() - self.cpu, 1),
            "wall_seconds": round(time.perf_counter() - self.wall, 1),
            "cpu_seconds_by_stage": self.stages,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor_name()}",
            "torch": torch.__version__,
        }


def processor_name() -> str:
    """The CPU's name as Linux gives it; the platform module's where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def fit(
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[int], torch.Tensor],
    stage: dict[str, Any],
    optimizer: dict[str, Any],
    description: str,
    progress: bool = True,
    every: Callable[[int], None] | None = None,
) -> list[float]:
    """Minimise `loss(step)` with AdamW, a linear warm-up and a cosine to `final_fraction` of the learning rate.

    stage: steps and learning_rate; optimizer: betas, weight_decay, warmup, final_fraction, clip (the recipe's tables).
    every: called with the number of steps done after each. Returns the losses.
    Raises FloatingPointError at the first loss that is not finite.
    """
    chosen = [p for p in parameters if p.requires_grad]
    steps, top, low = stage["steps"], stage["learning_rate"], optimizer["final_fraction"]
    decayed, plain = [p for p in chosen if p.ndim > 1], [p for p in chosen if p.ndim <= 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optimizer["weight_decay"]}, {"params": plain, "weight_decay": 0.0}],
        lr=top,
        betas=tuple(optimizer["betas"]),
    )
    losses: list[float] = []
    with tqdm(range(steps), desc=description, disable=not progress, mininterval=1.0) as bar:
        for step in bar:
            cosine = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in adam.param_groups:
                group["lr"] = top * min(1.0, (step + 1) / optimizer["warmup"]) * cosine
            value = loss(step)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"{description}: the loss is {losses[-1]} at step {step}")
            adam.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(chosen, optimizer["clip"])
            adam.step()
            if step % 20 == 19:
                bar.set_postfix(loss=f"{np.mean(losses[-20:]):.4f}", refresh=False)
            if every is not None:
                every(step + 1)
    return losses


def say(text: str) -> None:
    """One line on stderr, above the progress bars."""
    tqdm.write(text, file=sys.stderr)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON that diffs well."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
