"""Miniatures: one synthetic world, models trained on it that ship with the library, and the recipes that train them.

`load("llava")`, `load("dinat_world")`, `load("dinat_digits")`, `load("detector")`, `load("generator")`;
`train(name, out)`; `check()` measures the shipped weights on held-out data. The world itself is
`attnzoo.miniatures.world` (numpy and Pillow only).
transformers and diffusers are imported by what needs them, when it is called.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

NAMES = ("llava", "dinat_world", "dinat_digits", "detector", "generator")

_LAZY = {
    "CaptionRow": "evaluate",
    "bootstrap_summary": "evaluate",
    "check": "figures",
    "classify": "classifiers",
    "detect": "detector",
    "drop_last_control": "evaluate",
    "measure": "figures",
    "evaluate_captions": "evaluate",
    "answer_questions": "evaluate",
    "matched_control": "evaluate",
    "paired_bootstrap": "evaluate",
    "sample_scene": "world",
    "placed_scene": "world",
    "score_caption": "evaluate",
    "summarise": "evaluate",
    "write_card": "cards",
}

__all__ = ["NAMES", "load", "train", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"attnzoo.miniatures.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'attnzoo.miniatures' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


def load(name: str, folder: str | Path | None = None) -> Any:
    """A trained miniature, from `folder` or, if None, the shipped one.

    "llava": (LlavaForConditionalGeneration, LlavaProcessor). "dinat_world", "dinat_digits": a timm model in eval mode.
    "detector": torchvision's FasterRCNN in eval mode. "generator": a diffusers-like pipeline.
    Raises ValueError for another name.
    """
    _check_name(name)
    place = None if folder is None else Path(folder)
    if name == "llava":
        from attnzoo.miniatures import llava

        return llava.load(place)
    if name == "generator":
        from attnzoo.miniatures import generator

        return generator.load() if place is None else generator.load(place)
    if name == "detector":
        from attnzoo.miniatures import detector

        return detector.load(place)
    from attnzoo.miniatures import classifiers

    return classifiers.load(name, place)


def train(
    name: str,
    out: str | Path,
    seed: int = 0,
    device: str = "cpu",
    steps: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a miniature by its recipe (configs/recipes/`name`.toml) into the folder `out`, measure it and write its
    card.

    steps: cuts every stage to this many steps, for a trial, which is neither measured nor given a card.
    Returns what `out`/training.json says. Raises ValueError for an unknown name.
    """
    _check_name(name)
    options: dict[str, Any] = {"seed": seed, "device": device, "steps": steps, "progress": progress}
    if name == "generator":
        from attnzoo.miniatures import generator

        report = generator.train(out, **options)
    elif name == "llava":
        from attnzoo.miniatures import llava

        report = llava.train(out, **options)
    elif name == "detector":
        from attnzoo.miniatures import detector

        report = detector.train(out, **options)
    else:
        from attnzoo.miniatures import classifiers

        report = classifiers.train(name, out, **options)
    if steps is None:
        from attnzoo.miniatures import cards

        cards.write_card(name, out)
    return report


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
