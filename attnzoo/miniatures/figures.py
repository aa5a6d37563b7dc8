"""The figures of the miniatures, measured on held-out data from the weights in a folder, against their bars.

Every figure is a row: name (the miniature), figure, value, interval (95 %, or None), n (how many it is a share of), bar
(in words, "" where the figure is only reported) and ok (None where there is no bar).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.errors import check_choice
from attnzoo.miniatures import NAMES, classifiers, evaluate, training, world

#: Test scenes of each kind, and resamples of the bootstrap.
SCENES = {"broken": 2000, "intact": 500, "captioned": 1000, "world": 4800, "detector": 900}
RESAMPLES = 1000


def row(
    name: str,
    figure: str,
    value: float,
    n: int,
    interval: Sequence[float] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> dict[str, Any]:
    """One figure; `low` and `high` are the bar that the value must lie between (either may be None)."""
    words = {
        (False, False): "",
        (True, False): f">= {low}",
        (False, True): f"<= {high}",
        (True, True): f"{low} to {high}",
    }
    bar = words[(low is not None, high is not None)]
    ok = None if not bar else bool((low is None or value >= low) and (high is None or value <= high))
    edges = None if interval is None else [round(float(x), 4) for x in interval]
    return {
        "name": name,
        "figure": figure,
        "value": round(float(value), 4),
        "interval": edges,
        "n": n,
        "bar": bar,
        "ok": ok,
    }


def share(name: str, figure: str, right: int, n: int, **bars: float | None) -> dict[str, Any]:
    """A row for a proportion, with Wilson's interval."""
    return row(name, figure, right / n, n, evaluate.wilson_interval(right, n), **bars)


def measure(name: str, folder: str | Path | None = None, seed: int = 0, scale: float = 1.0) -> list[dict[str, Any]]:
    """The rows of one miniature, measured on test data.

    folder: the trained model's; the shipped one if None. seed: of the test scenes; the model card's figures are those
    of seed 0. scale: measures on this share of the test scenes, for a quick look.
    Raises ValueError for an unknown name or a scale outside (0, 1].
    """
    check_choice("name", name, NAMES)
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be above 0 and at most 1, got {scale!r}")
    place = None if folder is None else Path(folder)
    if name == "generator":
        from attnzoo.miniatures import generator

        return generator.measure(place, seed=seed, scale=scale)
    if name == "llava":
        return _llava(place, seed, scale)
    if name == "detector":
        from attnzoo.miniatures import detector

        return detector.measure(place, seed, scale)
    return _classifier(name, place, seed, scale)


def check(names: Sequence[str] | None = None, seed: int = 0, scale: float = 1.0) -> list[dict[str, Any]]:
    """Measure the shipped miniatures `names` (all if None) against their bars: `attnzoo check miniatures`."""
    chosen = NAMES if names is None else tuple(names)
    for name in chosen:
        check_choice("names", name, NAMES)
    return [r for name in chosen for r in measure(name, seed=seed, scale=scale)]


def _classifier(name: str, folder: Path | None, seed: int, scale: float) -> list[dict[str, Any]]:
    model, bar = classifiers.load(name, folder), training.read_recipe(name)["bars"]["top1"]
    if name == "dinat_digits":
        pixels, labels = classifiers.held_out_digits()
        kept = max(1, round(scale * len(labels)))
        right = classifiers.correct(model, pixels[:kept], labels[:kept])
        return [share(name, "top-1, held-out third", int(right.sum()), kept, low=bar)]
    n = max(24, round(scale * SCENES["world"]))
    sizes = training.read_recipe(name)["data"]["sizes"]
    pictures, labels = classifiers.held_out_world("test", n, seed)
    right = classifiers.correct(model, pictures, labels)
    rows = [share(name, f"top-1, held-out scenes of {sizes[0]} to {sizes[-1]} pixels", int(right.sum()), n, low=bar)]
    for size in (sizes[0], sizes[-1]):
        of_size = right[[p.shape[0] == size for p in pictures]]
        rows.append(share(name, f"top-1, those of {size} pixels", int(of_size.sum()), len(of_size)))
    pictures, labels = classifiers.held_out_world("test", n // 2, seed, "placed")
    right = classifiers.correct(model, pictures, labels)
    rows.append(share(name, "top-1, the generator's plain one-object scenes, 32 pixels", int(right.sum()), len(right)))
    pictures, labels = classifiers.held_out_world("test", n // 2, seed, "hard")
    right = classifiers.correct(model, pictures, labels)
    rows.append(share(name, "top-1, hard scenes only", int(right.sum()), len(right)))
    return rows


def _llava(folder: Path | None, seed: int, scale: float) -> list[dict[str, Any]]:
    from attnzoo.miniatures import llava

    name, bars = "llava", training.read_recipe("llava")["bars"]
    model, processor = llava.load(folder)
    counts = {kind: max(20, round(scale * n)) for kind, n in SCENES.items()}
    size = training.read_recipe("llava")["model"]["image_size"]

    rng = training.generator("test", seed, 0)
    broken = [world.sample_scene(rng, "broken", size) for _ in range(counts["broken"])]
    intact = [world.sample_scene(rng, "intact", size) for _ in range(counts["intact"])]
    told = evaluate.evaluate_captions(model, processor, broken[: counts["captioned"]])
    rows = _caption_rows(name, "scenes that break the prior", told, seed, bars)
    rows += _caption_rows(
        name, "scenes that keep the prior", evaluate.evaluate_captions(model, processor, intact), seed, {}
    )

    asked = [world.questions(scene, rng, 4) for scene in broken]
    answers = evaluate.answer_questions(model, processor, broken, asked)
    right: dict[str, list[bool]] = {"present": [], "random": [], "co-occurring": []}
    for several, said in zip(asked, answers):
        for question, answer in zip(several, said):
            right[question.kind].append(question.answer == answer)
    floor = bars["question_accuracy"]
    for kind, words in (("random", "random absent"), ("present", "present")):
        rows.append(share(name, f"questions about {words} objects", sum(right[kind]), len(right[kind]), low=floor))
    rows.append(
        share(
            name, "questions about co-occurring absent objects", sum(right["co-occurring"]), len(right["co-occurring"])
        )
    )
    gap, low, high = evaluate.paired_difference(right["random"], right["co-occurring"], RESAMPLES, seed)
    drop = row(name, "drop from random to co-occurring absent objects", gap, len(broken), (low, high))
    rows.append(drop | {"bar": "interval above 0", "ok": low > 0})
    return rows


def _caption_rows(
    name: str, where: str, told: Sequence[evaluate.CaptionRow], seed: int, bars: dict[str, Any]
) -> list[dict[str, Any]]:
    figures, intervals = evaluate.summarise(told), evaluate.bootstrap_summary(told, RESAMPLES, seed)
    low, high = bars.get("chair_s", (None, None))
    words = {
        "chair_s": ("captions that name an absent object (CHAIR_s)", len(told), {"low": low, "high": high}),
        "chair_i": ("named objects that are absent (CHAIR_i)", sum(len(r.named) for r in told), {}),
        "recall": (
            "present objects that are named (recall)",
            sum(len(r.present) for r in told),
            {"low": bars.get("recall")},
        ),
        "bait": ("captions that name the missing group member", sum(bool(r.bait) for r in told), {}),
    }
    return [
        row(name, f"{figure}, {where}", figures[key], n, intervals[key], **bar)
        for key, (figure, n, bar) in words.items()
        if n
    ]
