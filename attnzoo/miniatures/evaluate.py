"""How the miniatures are measured: captions against what is in the picture, yes/no questions, and honest intervals.

CHAIR (Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv:1809.02156): CHAIR_s is the share
of captions that name an absent object, CHAIR_i the share of named objects that are absent. Questions about random and
co-occurring absent objects follow POPE (Li et al., EMNLP 2023, arXiv:2305.10355; "adversarial" there).

All but `evaluate_captions` and `answer_questions` are pure functions of what those return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from attnzoo.miniatures import world
from attnzoo.miniatures.world import Question, Scene


@dataclass(frozen=True)
class CaptionRow:
    """One caption held against its scene. Nouns in order of mention, each once.

    named: all that the caption names; absent: those of them that are not in the scene; recalled: those that are;
    present: what the scene holds; bait: the scene's group's absent members; baited: those of `bait` that are named.
    """

    caption: str
    named: tuple[str, ...]
    absent: tuple[str, ...]
    recalled: tuple[str, ...]
    present: tuple[str, ...]
    bait: tuple[str, ...]
    baited: tuple[str, ...]


def score_caption(caption: str, scene: Scene) -> CaptionRow:
    """Hold a caption against the scene that it is about."""
    named = tuple(world.named_nouns(caption))
    return CaptionRow(
        caption=caption,
        named=named,
        absent=tuple(n for n in named if n not in scene.nouns),
        recalled=tuple(n for n in named if n in scene.nouns),
        present=scene.nouns,
        bait=scene.bait,
        baited=tuple(n for n in named if n in scene.bait),
    )


def summarise(rows: Sequence[CaptionRow]) -> dict[str, float]:
    """The figures of several captions.

    chair_s, chair_i (see above); recall, the share of present objects that are named; bait, the share of captions of
    scenes with bait that name it; named, the mean number of objects named. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one scored caption, got none")
    named = sum(len(r.named) for r in rows)
    return {
        "chair_s": sum(bool(r.absent) for r in rows) / len(rows),
        "chair_i": sum(len(r.absent) for r in rows) / max(1, named),
        "recall": sum(len(r.recalled) for r in rows) / sum(len(r.present) for r in rows),
        "bait": sum(bool(r.baited) for r in rows) / max(1, sum(bool(r.bait) for r in rows)),
        "named": named / len(rows),
    }


def drop_last_control(rows: Sequence[CaptionRow], probability: float) -> dict[str, float]:
    """What dropping the last-named object of each caption with this probability does, in expectation and closed form.

    The control for any edit that lowers CHAIR: saying less lowers it too. Returns `summarise`'s figures; chair_i is the
    ratio of the expected counts. Raises ValueError for a probability outside 0..1 or no rows.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be from 0 to 1, got {probability!r}")
    whole, cut = summarise(rows), summarise([_without_last(r) for r in rows])
    mixed = {key: (1 - probability) * whole[key] + probability * cut[key] for key in whole}
    absent = [f["chair_i"] * f["named"] for f in (whole, cut)]  # mean number of absent objects named
    expected = (1 - probability) * absent[0] + probability * absent[1]
    return mixed | {"chair_i": expected / mixed["named"] if mixed["named"] else 0.0}


def matched_control(rows: Sequence[CaptionRow], chair_s: float) -> tuple[float, dict[str, float]]:
    """(probability, figures) of the `drop_last_control` closest to `chair_s`: an edit must beat its recall."""
    most, least = drop_last_control(rows, 0.0)["chair_s"], drop_last_control(rows, 1.0)["chair_s"]
    probability = 0.0 if most == least else min(1.0, max(0.0, (most - chair_s) / (most - least)))
    return probability, drop_last_control(rows, probability)


def _without_last(row: CaptionRow) -> CaptionRow:
    kept = row.named[:-1]
    return CaptionRow(
        caption=row.caption,
        named=kept,
        absent=tuple(n for n in row.absent if n in kept),
        recalled=tuple(n for n in row.recalled if n in kept),
        present=row.present,
        bait=row.bait,
        baited=tuple(n for n in row.baited if n in kept),
    )


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (JASA 22, 1927). Raises ValueError unless 0 <= successes <= n, n >= 1."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n with n at least 1, got successes={successes}, n={n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(
    items: Sequence[Any],
    figure: Callable[[Sequence[Any]], float],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `figure(items)`, resampling items; pairs as items keep a difference paired.

    Raises ValueError for no items.
    """
    if not items:
        raise ValueError("items must hold at least one entry, got none")
    rng = np.random.default_rng(seed)
    values = [figure([items[i] for i in rng.integers(0, len(items), len(items))]) for _ in range(resamples)]
    return _edges(values, confidence)


def _edges(values: Sequence[float], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_difference(
    first: Sequence[float], second: Sequence[float], resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean of first - second, low, high), percentile bootstrap over pairs.

    Raises ValueError for unequal lengths or no entries.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"first and second must be of one length, at least 1, got {len(first)} and {len(second)}")
    differences = np.asarray(first, float) - np.asarray(second, float)
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(resamples)]
    return (float(differences.mean()), *_edges(means, confidence))


def bootstrap_summary(
    rows: Sequence[CaptionRow], resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Figure of `summarise` -> (low, high), percentile bootstrap over scenes."""
    summarise(rows)  # refuses an empty list
    counts = np.array([_counts(r) for r in rows], float)
    rng = np.random.default_rng(seed)
    drawn = [_from_counts(counts[rng.integers(0, len(rows), len(rows))].sum(0)) for _ in range(resamples)]
    return {key: _edges([d[key] for d in drawn], confidence) for key in drawn[0]}


def paired_bootstrap(
    baseline: Sequence[CaptionRow],
    edited: Sequence[CaptionRow],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, tuple[float, float, float]]:
    """Figure -> (difference edited - baseline, low, high), resampling scenes and keeping each one's two captions
    together.

    Raises ValueError unless both lists are about the same scenes in the same order.
    """
    if len(baseline) != len(edited) or any(a.present != b.present for a, b in zip(baseline, edited)):
        raise ValueError("baseline and edited must score the same scenes in the same order")
    before, after = summarise(baseline), summarise(edited)
    counts = [np.array([_counts(r) for r in rows], float) for rows in (baseline, edited)]
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, float]] = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(baseline), len(baseline))
        a, b = (_from_counts(c[chosen].sum(0)) for c in counts)
        drawn.append({key: b[key] - a[key] for key in a})
    return {key: (after[key] - before[key], *_edges([d[key] for d in drawn], confidence)) for key in before}


def _counts(row: CaptionRow) -> tuple[int, ...]:
    return (
        1,
        bool(row.absent),
        len(row.absent),
        len(row.named),
        len(row.recalled),
        len(row.present),
        bool(row.baited),
        bool(row.bait),
    )


def _from_counts(total: np.ndarray) -> dict[str, float]:
    n, false, absent, named, recalled, present, baited, bait = total
    return {
        "chair_s": false / n,
        "chair_i": absent / max(1, named),
        "recall": recalled / present,
        "bait": baited / max(1, bait),
        "named": named / n,
    }


# ---------------------------------------------------------------------------------------------------- asking the model


@torch.inference_mode()
def evaluate_captions(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    edit: AbstractContextManager | None = None,
    batch_size: int = 125,
    **generate: Any,
) -> list[CaptionRow]:
    """Caption every scene greedily and hold the captions against what is there.

    edit: a context manager that is entered around the generation, such as ``attnzoo.vlm.edit(model, "pai")``.
    generate: further arguments of ``model.generate``.
    """
    from attnzoo.miniatures.llava import CAPTION_PROMPT

    rows: list[CaptionRow] = []
    with edit if edit is not None else nullcontext():
        for start in range(0, len(scenes), batch_size):
            part = scenes[start : start + batch_size]
            inputs = processor(
                images=[s.image for s in part], text=[CAPTION_PROMPT] * len(part), return_tensors="pt", padding=True
            ).to(model.device)
            made = model.generate(**inputs, **generate)[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(made, skip_special_tokens=True)
            rows += [score_caption(text, scene) for text, scene in zip(texts, part)]
    return rows


@torch.inference_mode()
def answer_questions(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    questions: Sequence[Sequence[Question]],
    edit: AbstractContextManager | None = None,
    batch_size: int = 250,
) -> list[list[bool]]:
    """The model's answers to each scene's questions, each asked on its own: is "yes" likelier than "no" after it?"""
    from attnzoo.miniatures.llava import question_prompt

    asked = [(s, q.noun) for s, several in zip(scenes, questions, strict=True) for q in several]
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    answers: list[bool] = []
    with edit if edit is not None else nullcontext():
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            inputs = processor(
                images=[s.image for s, _ in part],
                text=[question_prompt(noun) for _, noun in part],
                return_tensors="pt",
                padding=True,
            ).to(model.device)
            logits = model(**inputs, logits_to_keep=1).logits[:, -1]
            answers += (logits[:, yes] > logits[:, no]).tolist()
    several_answers, position = [], 0
    for several in questions:
        several_answers.append(answers[position : position + len(several)])
        position += len(several)
    return several_answers


def question_figures(questions: Sequence[Sequence[Question]], answers: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Share of right answers by the questions' kind (nan where none was asked) and over all."""
    right: dict[str, list[bool]] = {"present": [], "random": [], "co-occurring": []}
    for several, said in zip(questions, answers, strict=True):
        for question, answer in zip(several, said, strict=True):
            right[question.kind].append(answer == question.answer)
    share = {kind: sum(r) / len(r) if r else float("nan") for kind, r in right.items()}
    everything = [x for r in right.values() for x in r]
    return share | {"all": sum(everything) / len(everything)}
