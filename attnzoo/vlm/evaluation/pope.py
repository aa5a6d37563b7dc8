"""POPE, "Evaluating Object Hallucination in Large Vision-Language Models" (EMNLP 2023, arXiv 2305.10355).

Yes/no questions about objects; half of them about absent ones, drawn at random, by how common an object is, or by how
often it stands beside those that are there. Three parsers of the answers circulate and disagree; all are here by name.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from attnzoo.errors import check_choice, check_range

SPLITS = ("random", "popular", "adversarial")


def _pope(answer: str, label: str) -> str:
    """AoiDragon/POPE evaluate.py: the first sentence, no commas; a word that is exactly No, not or no."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _opera(answer: str, label: str) -> str:
    """shikiw/OPERA pope_eval.py: the whole answer without points and commas; NO and words on n't count too."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    negative = {"No", "not", "no", "NO"} & set(words) or any(word.endswith("n't") for word in words)
    return "no" if negative else "yes"


def _vcd(answer: str, label: str) -> str:
    """DAMO-NLP-SG/VCD eval_pope.py: does the label stand anywhere in the answer? It asks for the label only, so the
    other answer is whatever does not hold it ("nothing" and "not sure" hold "no", "" holds neither)."""
    other = {"yes": "no", "no": "yes"}[label]
    return label if label in answer.lower().strip() else other


PARSERS: dict[str, Callable[[str, str], str]] = {"pope": _pope, "opera": _opera, "vcd": _vcd}


def parse_answer(answer: str, parser: str = "pope", label: str | None = None) -> str:
    """ "yes" or "no".

    parser: "pope", "opera" or "vcd"; the last one needs the label ("yes" or "no"), as its reading depends on it.
    Raises ValueError for another parser or label.
    """
    check_choice("parser", parser, PARSERS)
    if parser == "vcd":
        check_choice("label", label, ("yes", "no"))
    return PARSERS[parser](answer, label or "")


@dataclass(frozen=True)
class PopeScores:
    """Counts with "yes" as the positive class. Rates without a denominator are nan."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def total(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    @property
    def accuracy(self) -> float:
        return _ratio(self.tp + self.tn, self.total)

    @property
    def precision(self) -> float:
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        if not self.tp:  # as the harmonic mean's limit; nan where nothing was positive at all
            return 0.0 if self.fp + self.fn else math.nan
        return 2 * self.precision * self.recall / (self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.tp + self.fp, self.total)

    def report(self) -> str:
        """The lines that POPE's own script prints."""
        return (
            f"TP\tFP\tTN\tFN\t\n{self.tp}\t{self.fp}\t{self.tn}\t{self.fn}\nAccuracy: {self.accuracy}\n"
            f"Precision: {self.precision}\nRecall: {self.recall}\nF1 score: {self.f1}\nYes ratio: {self.yes_ratio}\n"
        )


def pope(answers: Sequence[str], labels: Sequence[str], parser: str = "pope") -> PopeScores:
    """Scores of free-text answers against labels ("yes" or "no", any case).

    Raises ValueError for counts that differ, another label or another parser.
    """
    if len(answers) != len(labels):
        raise ValueError(f"answers and labels must be as many, got {len(answers)} and {len(labels)}")
    counts: Counter[tuple[str, str]] = Counter()
    for answer, label in zip(answers, labels):
        label = label.lower().strip()
        check_choice("labels", label, ("yes", "no"))
        counts[label, parse_answer(answer, parser, label)] += 1
    return PopeScores(counts["yes", "yes"], counts["no", "yes"], counts["no", "no"], counts["yes", "no"])


@dataclass(frozen=True)
class PopeQuestion:
    image_id: Hashable
    object: str
    label: str
    question: str


def pope_questions(
    instances: Iterable[tuple[Hashable, str]],
    split: str = "random",
    *,
    images: int | None = 500,
    per_image: int = 3,
    objects: Sequence[str] | None = None,
    template: str = "Is there {article} {object} in the image?",
    seed: int = 0,
) -> list[PopeQuestion]:
    """Questions about `per_image` objects that are there and as many that are not, in turn, for each image.

    instances: (image id, category name) of a COCO-format file (`read_coco`). split: where absent objects come from:
    "random" any, "popular" the most frequent in the file, "adversarial" those that most often stand in one image with
    the object that was just asked about. images: how many, drawn among those with at least per_image objects and as
    many absent ones; None: all. objects: the vocabulary; None: the categories in `instances`.
    template: {object} and {article} are filled in ("a", "an" before a vowel).

    Deterministic in seed and in the order of instances. Images and present objects are the same for all splits.
    Raises ValueError for another split, or where fewer than `images` images qualify.
    """
    check_choice("split", split, SPLITS)
    check_range("per_image", per_image, 1)
    there: dict[Hashable, dict[str, None]] = {}
    for image_id, category in instances:
        there.setdefault(image_id, {})[category] = None
    frequency = Counter(name for names in there.values() for name in names)
    vocabulary = sorted(frequency) if objects is None else list(dict.fromkeys(objects))
    beside = _cooccurrence(there)
    able = [i for i, own in there.items() if len(own) >= per_image and _absent(vocabulary, own) >= per_image]
    if images is not None:
        if len(able) < images:
            raise ValueError(
                f"images must be at most {len(able)}, the images with {per_image} objects that are there and "
                f"{per_image} that are not, got {images}"
            )
        kept = set(random.Random(f"{seed} images").sample(range(len(able)), images))
        able = [image_id for place, image_id in enumerate(able) if place in kept]
    questions = []
    for place, image_id in enumerate(able):
        own = there[image_id]
        dice = random.Random(f"{seed} {place}")
        asked = dice.sample(sorted(own), per_image)
        absent = [name for name in vocabulary if name not in own]
        dice.shuffle(absent)  # breaks ties of the counts below, and is the random split
        for name in asked:
            if split == "popular":
                absent.sort(key=lambda other: -frequency[other])
            elif split == "adversarial":
                absent.sort(key=lambda other: -beside[name, other])
            questions.append(_question(image_id, name, "yes", template))
            questions.append(_question(image_id, absent.pop(0), "no", template))
    return questions


def _absent(vocabulary: Sequence[str], own: Mapping[str, None]) -> int:
    return sum(name not in own for name in vocabulary)


def _cooccurrence(there: Mapping[Hashable, Mapping[str, None]]) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for names in there.values():
        counts.update((a, b) for a in names for b in names if a != b)
    return counts


def _question(image_id: Hashable, name: str, label: str, template: str) -> PopeQuestion:
    article = "an" if name[0].lower() in "aeiou" else "a"
    return PopeQuestion(image_id, name, label, template.format(object=name, article=article))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
