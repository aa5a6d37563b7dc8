"""A tiny classifier and tiny data that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnzoo.backbones.training import ClassificationData, TrainConfig

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
