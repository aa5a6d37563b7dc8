"""A tiny classifier, tiny data, and how to look at a run: what the tests of training share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from attnzoo import cli
from attnzoo.backbones.training import ClassificationData, TrainConfig, checkpoints, train

MODEL = {
    "embed_dim": 8,
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 4],
    "mlp_ratio": 2.0,
    "kernel_size": 3,
    "dilations": [[1], [1], [1]],
}
#: Everything that draws random numbers is on.
RANDOM = {
    "mixup": 0.4,
    "cutmix": 1.0,
    "drop_path": 0.3,
    "reprob": 0.5,
    "aa": "rand-m6-mstd0.5",
    "model_ema": True,
    "model_ema_decay": 0.7,
    "clip_grad": 0.5,
}


def config(**changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "model": "dinat_mini",
        "model_kwargs": MODEL,
        "img_size": 48,
        "epochs": 2,
        "batch_size": 4,
        "warmup_epochs": 1,
        "lr": 2e-3,
        "workers": 0,
        "log_interval": 1,
    }
    return TrainConfig(**(base | changes))


class Squares:
    """Grey noise with a square in one of three colours; picture i is a function of i."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng(self.first + index)
        pixels = rng.integers(0, 120, (48, 48, 3), dtype=np.uint8)
        y, x = rng.integers(0, 24, 2)
        pixels[y : y + 24, x : x + 24, index % 3] = 250
        return Image.fromarray(pixels), index % 3


def data(train: int = 18, validation: int = 7) -> ClassificationData:
    return ClassificationData(
        "squares", Squares(train), Squares(validation, 1000), ("red", "green", "blue"), f"{train} {validation}"
    )


def folder(root: Path, count: int = 8, validation: int = 3) -> Path:
    """The same as files, an ImageFolder."""
    for part, pictures in (("train", Squares(count)), ("val", Squares(validation, 1000))):
        for i in range(len(pictures)):
            picture, label = pictures[i]
            place = root / part / ("red", "green", "blue")[label]
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{i}.png")
    return root


def lines(output: Path) -> list[dict]:
    return [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]


def figures(output: Path) -> list[dict]:
    """The metrics without times."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines(output)]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The run's final weights, raw and averaged, optimiser state, and its exports."""
    (final,) = checkpoints.find_checkpoints(output)
    found = {"raw " + k: v for k, v in load_file(final / "model.safetensors").items()}
    if (final / "ema.safetensors").is_file():
        found |= {"ema " + k: v for k, v in load_file(final / "ema.safetensors").items()}
    state = torch.load(final / "optimizer.bin", weights_only=True)["state"]
    found |= {f"adam {i} {k}": v for i, part in state.items() for k, v in part.items()}
    for name in ("last", "best"):
        found |= {f"{name} {k}": v for k, v in load_file(output / name / "model.safetensors").items()}
    return found


def assert_same_run(one: Path, other: Path) -> None:
    assert figures(one) == figures(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, different


def arguments(output: Path, *more: object) -> list[str]:
    """The command line that does what `config` does on a folder."""
    model = [part for key, value in MODEL.items() for part in ("-s", f"{key}={json.dumps(value)}")]
    base = ["--model", "dinat_mini", *model, "--img-size", 48, "--epochs", 2, "-b", 4, "--warmup-epochs", 1]
    base += ["--lr", 2e-3, "--workers", 0, "--log-interval", 1, "--output", output, "--device", "cpu", "--quiet"]
    return [str(part) for part in ("train", "classify", *base, *more)]


def whole_run(root: Path) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run with everything random on, 2 epochs of 2 steps of 2 x 4 pictures: (folder, summary)."""
    torch.set_num_threads(1)
    output = root / "whole"
    return output, train(config(grad_accum=2, **RANDOM), data(), output, progress=False)


def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that runs `attnzoo ARGS` in this process: (exit status, what it printed)."""

    def call(*given: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["attnzoo", *map(str, given)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out + printed.err

    return call
