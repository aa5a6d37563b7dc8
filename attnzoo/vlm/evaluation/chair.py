"""CHAIR, "Object Hallucination in Image Captioning" (EMNLP 2018, arXiv 1809.02156): which named objects are not there.

Two variants are published and both are here: "original" (LisaAnne/Hallucination utils/chair.py: nouns to singular) and
"lvlm_standalone" (the one-file version that OPERA's repository carries: part of speech, then lemma; adds recall and
length). They share everything but how a token becomes its base form. Neither carries a licence: written from their
definition.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from attnzoo.errors import ReachError, UnsupportedError, check_choice

VARIANTS = ("original", "lvlm_standalone")
Tokens = Callable[[str], Sequence[str]]
BaseForms = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class ObjectWords:
    """objects: word (or two) -> the object that it names. phrases: two words in a row -> what they become."""

    objects: Mapping[str, str]
    phrases: Mapping[str, str]

    def merge(self, tokens: Sequence[str]) -> tuple[list[str], list[int]]:
        """Tokens with phrases as one word, and where each of them began."""
        words, places, i = [], [], 0
        while i < len(tokens):
            pair = " ".join(tokens[i : i + 2])
            places.append(i)
            words.append(self.phrases.get(pair, tokens[i]))
            i += 2 if pair in self.phrases else 1
        return words, places


def load_words(path: str | os.PathLike | None = None, compat: str | None = None) -> ObjectWords:
    """The words for COCO's objects.

    path: a file with one object a line, its name first, then synonyms, all separated by commas (the authors'
    data/synonyms.txt has this form); None: the list of this library (configs/vlm_chair.toml), which is its own, so that
    published figures are compared with the authors' file only. A word that stands in several lines belongs to the last.
    compat: "official" keeps stray spaces around words, as the authors' code does: such entries never match.

    Raises ReachError for a file that can't be read, ValueError for one that names no object.
    """
    check_choice("compat", compat, (None, "official"))
    table = tomllib.loads(resources.files("attnzoo.configs").joinpath("vlm_chair.toml").read_text(encoding="utf-8"))
    if path is None:
        rows = [[name, *others] for name, others in table["objects"].items()]
    else:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ReachError(f"the synonyms file {os.fspath(path)!r} can't be read: {error}") from error
        rows = [line.strip().split(", ") if compat else line.split(",") for line in lines if line.strip()]
        rows = rows if compat else [[word.strip() for word in row if word.strip()] for row in rows]
        if not any(rows):
            raise ValueError(f"path must be a file with one object a line, got an empty one: {os.fspath(path)!r}")
    phrases = {phrase: phrase for phrase in table["phrases"]} | table["rewrites"]
    phrases |= {f"{first} {word}": word for first, seconds in table["modifiers"].items() for word in seconds}
    return ObjectWords({word: row[0] for row in rows for word in row}, phrases)


@dataclass(frozen=True)
class CaptionScore:
    """One caption. mentioned: objects in order, repeats included; hallucinated: (word, object) of those not there."""

    image_id: Hashable
    caption: str
    words: list[str]
    mentioned: list[str]
    hallucinated: list[tuple[str, str]]
    places: list[int]  # of the hallucinated ones among the caption's tokens
    truth: list[str]

    @property
    def chair_s(self) -> int:
        return int(bool(self.hallucinated))

    @property
    def chair_i(self) -> float:
        return len(self.hallucinated) / len(self.mentioned) if self.mentioned else 0.0

    @property
    def found(self) -> int:
        return len(set(self.mentioned) & set(self.truth))

    @property
    def recall(self) -> float:
        return self.found / len(self.truth) if self.truth else 0.0


@dataclass(frozen=True)
class ChairScores:
    """chair_s: share of captions that name an absent object. chair_i: share of mentions that are of absent objects.

    recall: named objects that are there, of all that are there, over all captions together. length: mean words of a
    caption. Shorter captions hallucinate less: read the first two beside the last two. Rates without a denominator are
    nan.
    """

    captions: list[CaptionScore] = field(repr=False)

    @property
    def chair_s(self) -> float:
        return _ratio(sum(c.chair_s for c in self.captions), len(self.captions))

    @property
    def chair_i(self) -> float:
        return _ratio(sum(len(c.hallucinated) for c in self.captions), sum(len(c.mentioned) for c in self.captions))

    @property
    def recall(self) -> float:
        return _ratio(sum(c.found for c in self.captions), sum(len(c.truth) for c in self.captions))

    @property
    def length(self) -> float:
        return _ratio(sum(len(c.words) for c in self.captions), len(self.captions))

    def official(self, variant: str) -> dict[str, Any]:
        """The same under the names, and in the units, that the variant's script writes (its Len is words / 100)."""
        check_choice("variant", variant, VARIANTS)
        standalone = variant == "lvlm_standalone"
        sentences = []
        for c in self.captions:
            row: dict[str, Any] = {
                "image_id": c.image_id,
                "caption": c.caption,
                "mscoco_hallucinated_words": [list(pair) for pair in c.hallucinated],
                "mscoco_gt_words": list(c.truth),
                "mscoco_generated_words": list(c.mentioned),
                "hallucination_idxs": list(c.places),
                "words": list(c.words),
                "CHAIRs": c.chair_s,
                "CHAIRi": c.chair_i,
            }
            sentences.append(row | ({"Recall": c.recall} if standalone else {}))
        whole = {"sentences": sentences, "CHAIRs": self.chair_s, "CHAIRi": self.chair_i}
        return whole | ({"Recall": self.recall, "Len": 0.01 * self.length} if standalone else {})


def chair(
    captions: Iterable[tuple[Hashable, str]],
    truth: Mapping[Any, Iterable[str]],
    *,
    words: ObjectWords | None = None,
    tokenize: Tokens | None = None,
    base_forms: BaseForms | None = None,
    compat: str | None = None,
) -> ChairScores:
    """CHAIR of captions against the objects of their images.

    captions: (image id, text) pairs. truth: image id -> names of its objects, from `chair_truth`.
    words: from `load_words`; None: this library's own list.
    tokenize: lower-case text -> tokens; base_forms: tokens -> base forms, one each. None: simplemma's (extra "train").
        The two variants differ in base_forms alone: singular nouns ("original", pattern.en) or lemmas by part of speech
        ("lvlm_standalone", nltk with WordNet).
    compat: "official" repeats the published scripts: `places` are off where "seat" was dropped beside a toilet, and an
        image without a truth has no objects. The default gives right places and refuses an image that is not known.

    Raises ValueError for an image id without truth, UnsupportedError where simplemma is needed and missing.
    """
    check_choice("compat", compat, (None, "official"))
    words = load_words() if words is None else words
    read = _reader(words, tokenize, base_forms, official=compat == "official")
    scores = []
    for image_id, caption in captions:
        if image_id not in truth and compat is None:
            raise ValueError(f"captions must be of images in truth, got image id {image_id!r}, which is not")
        there = sorted(set(truth.get(image_id, ())))
        merged, named = read(caption)
        absent = [(word, name, place) for word, name, place in named if name not in there]
        scores.append(
            CaptionScore(
                image_id,
                caption,
                merged,
                [name for _, name, _ in named],
                [(word, name) for word, name, _ in absent],
                [place for _, _, place in absent],
                there,
            )
        )
    return ChairScores(scores)


def chair_truth(
    instances: Iterable[tuple[Hashable, str]],
    reference_captions: Iterable[tuple[Hashable, str]] = (),
    *,
    words: ObjectWords | None = None,
    tokenize: Tokens | None = None,
    base_forms: BaseForms | None = None,
) -> dict[Hashable, set[str]]:
    """image id -> its objects: annotated instances, and whatever the reference captions name.

    instances: (image id, category name). reference_captions: (image id, text); COCO has five for an image.
    Raises ValueError for a category that no word names.
    """
    words = load_words() if words is None else words
    truth: dict[Hashable, set[str]] = {}
    for image_id, category in instances:
        if category not in words.objects:
            raise ValueError(f"instances must name objects of the words list, got category {category!r}")
        truth.setdefault(image_id, set()).add(words.objects[category])
    read: Callable[..., Any] | None = None
    for image_id, caption in reference_captions:
        read = read or _reader(words, tokenize, base_forms, official=False)
        truth.setdefault(image_id, set()).update(name for _, name, _ in read(caption)[1])
    return truth


def read_coco(path: str | os.PathLike) -> tuple[list[tuple[int, str]], list[tuple[int, str]], dict[int, str]]:
    """A COCO-format annotation file as (instances, captions, images): (image id, category name) and (image id, text)
    pairs in the file's order, and image id -> file name.

    Raises ReachError for a file that can't be read or is no such file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {row["id"]: row["name"] for row in content.get("categories", ())}
        rows = content["annotations"]
        instances = [(row["image_id"], names[row["category_id"]]) for row in rows if "category_id" in row]
        captions = [(row["image_id"], row["caption"]) for row in rows if "caption" in row]
        images = {row["id"]: row.get("file_name", "") for row in content.get("images", ())}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReachError(f"{os.fspath(path)!r} can't be read as COCO annotations: {error!r}") from error
    return instances, captions, images


def _reader(
    words: ObjectWords, tokenize: Tokens | None, base_forms: BaseForms | None, official: bool
) -> Callable[[str], tuple[list[str], list[tuple[str, str, int]]]]:
    """caption -> (its words, phrases as one; its objects as (word, object, place of the token))."""
    if tokenize is None or base_forms is None:
        own_tokens, own_forms = _simplemma()
        tokenize, base_forms = tokenize or own_tokens, base_forms or own_forms
    split, forms = tokenize, base_forms

    def read(caption: str) -> tuple[list[str], list[tuple[str, str, int]]]:
        merged, places = words.merge(list(forms(split(caption.lower()))))
        kept = list(zip(merged, places))
        if "toilet" in merged and "seat" in merged:  # the seat is the toilet's
            rest = [(word, place) for word, place in kept if word != "seat"]
            kept = [(word, place) for (word, _), place in zip(rest, places)] if official else rest
        return merged, [(word, words.objects[word], place) for word, place in kept if word in words.objects]

    return read


def _simplemma() -> tuple[Tokens, BaseForms]:
    try:
        import simplemma
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "captions are split and lemmatised by simplemma, which is not installed: pip install 'attnzoo[train]', or "
            "pass tokenize= and base_forms="
        ) from error
    return simplemma.simple_tokenizer, lambda tokens: [simplemma.lemmatize(token, lang="en") for token in tokens]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
