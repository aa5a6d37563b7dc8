"""CHAIR and POPE: the published definitions, this library's own words, COCO-format files, and what is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from attnzoo.errors import ReachError, UnsupportedError
from attnzoo.vlm.evaluation import (
    PARSERS,
    SPLITS,
    chair,
    chair_truth,
    load_words,
    parse_answer,
    pope,
    pope_questions,
    read_coco,
)
from attnzoo.vlm.evaluation import chair as chair_module


def spaced(text: str) -> list[str]:
    return text.replace(".", " .").split()


PLAIN: dict[str, Any] = {"tokenize": spaced, "base_forms": list}


def test_words_merge_and_name_objects() -> None:
    words = load_words()
    assert len({*words.objects.values()}) == 80
    tokens = spaced("the baby bird and a hot dog on a train track beside a passenger train")
    merged, places = words.merge(tokens)
    assert merged == ["the", "bird", "and", "a", "hot dog", "on", "a", "train track", "beside", "a", "train"]
    assert [tokens[p] for p in places][1] == "baby"
    scores = chair([(1, " ".join(tokens))], {1: {"bird"}}, **PLAIN)
    assert scores.captions[0].mentioned == ["bird", "hot dog", "train"]
    assert scores.captions[0].hallucinated == [("hot dog", "hot dog"), ("train", "train")]


def test_rates_over_a_corpus() -> None:
    captions = [(1, "a dog and a dog and a cat"), (1, "a dog"), (2, "nothing here"), (2, "a car and a bus")]
    scores = chair(captions, {1: {"dog"}, 2: {"car", "person"}}, **PLAIN)
    assert scores.chair_s == 2 / 4 and scores.chair_i == 2 / 6
    assert scores.recall == 3 / 6 and scores.length == 17 / 4
    assert math.isnan(chair([], {}, **PLAIN).chair_s) and math.isnan(chair([(1, "x")], {1: ()}, **PLAIN).recall)


def test_real_captions_through_simplemma() -> None:
    truth = chair_truth(
        [(7, "dining table"), (7, "bottle")], [(7, "Two women and their puppies share a sofa."), (7, "A man cooks.")]
    )
    assert truth[7] == {"dining table", "bottle", "person", "dog", "couch"}
    text = "Three men with wine glasses, two buses and knives; children's bicycles stand near the sofas."
    found = chair([(7, text)], truth).captions[0]
    assert found.mentioned == ["person", "wine glass", "bus", "knife", "person", "bicycle", "couch"]
    assert [name for _, name in found.hallucinated] == ["wine glass", "bus", "knife", "bicycle"]
    assert chair([(7, text)], truth).captions == chair([(7, text)], truth).captions


def test_official_places_are_off_where_a_seat_was_dropped() -> None:
    caption = [(1, "the seat of a toilet beside a dog")]
    own = chair(caption, {1: {"toilet"}}, **PLAIN).captions[0]
    theirs = chair(caption, {1: {"toilet"}}, **PLAIN, compat="official").captions[0]
    assert own.places == [7] and theirs.places == [6] and own.hallucinated == theirs.hallucinated
    with pytest.raises(ValueError, match="image id 9"):
        chair([(9, "a dog")], {1: {"dog"}}, **PLAIN)
    assert chair([(9, "a dog")], {}, **PLAIN, compat="official").chair_s == 1.0


def test_a_file_of_words(tmp_path: Path) -> None:
    file = tmp_path / "synonyms.txt"
    file.write_text("person, man,  woman\ndog, puppy, man\n")
    own, theirs = load_words(file), load_words(file, compat="official")
    assert own.objects == {"person": "person", "man": "dog", "woman": "person", "dog": "dog", "puppy": "dog"}
    assert " woman" in theirs.objects and "woman" not in theirs.objects
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="one object a line"):
        load_words(tmp_path / "empty.txt")
    with pytest.raises(ReachError, match="nowhere"):
        load_words(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="category 'unicorn'"):
        chair_truth([(1, "unicorn")])


def test_simplemma_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "simplemma", None)
    with pytest.raises(UnsupportedError, match=r"attnzoo\[train\]"):
        chair([(1, "a dog")], {1: {"dog"}})
    assert chair_module  # with functions of one's own it is not needed
    assert chair([(1, "a dog")], {1: {"dog"}}, **PLAIN).chair_s == 0.0


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A small COCO-format file: 12 images, 8 categories, some always together."""
    names = ["person", "dog", "cat", "car", "bus", "cup", "fork", "chair"]
    sets = [["person", "dog", "cup"], ["person", "car", "bus"], ["cup", "fork", "chair", "person"]]
    rows = [
        {"image_id": i, "category_id": names.index(name) + 1} for i in range(12) for name in (*sets[i % 3], "person")
    ]
    rows.append({"image_id": 0, "caption": "a person"})
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(12)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
        "annotations": rows,
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    return file


def test_questions_from_coco(coco: Path) -> None:
    instances, captions, images = read_coco(coco)
    assert captions == [(0, "a person")] and images[3] == "3.png"
    there: dict[Any, set[str]] = {}
    for image, name in instances:
        there.setdefault(image, set()).add(name)
    asked = {split: pope_questions(instances, split, images=6, per_image=2, seed=4) for split in SPLITS}
    for split, questions in asked.items():
        assert questions == pope_questions(instances, split, images=6, per_image=2, seed=4)
        assert Counter(q.label for q in questions) == {"yes": 12, "no": 12}
        assert all((q.object in there[q.image_id]) == (q.label == "yes") for q in questions)
        assert len({(q.image_id, q.object) for q in questions}) == 24
    same = [[(q.image_id, q.object) for q in asked[split] if q.label == "yes"] for split in SPLITS]
    assert same[0] == same[1] == same[2]
    frequency = Counter(name for own in there.values() for name in own)
    for place in range(0, 24, 4):  # the two most frequent ones that are not there
        own = there[asked["popular"][place].image_id]
        absent = sorted((frequency[name] for name in frequency if name not in own), reverse=True)
        assert [frequency[q.object] for q in asked["popular"][place + 1 : place + 4 : 2]] == absent[:2]
    for yes, no in zip(asked["adversarial"][::2], asked["adversarial"][1::2]):
        beside = Counter(other for own in there.values() if yes.object in own for other in own)
        free = {n for n in frequency if n not in there[yes.image_id]}
        earlier = {q.object for q in asked["adversarial"] if q.image_id == yes.image_id and q.label == "no"} - {
            no.object
        }
        assert beside[no.object] >= max(beside[n] for n in free - earlier)
    assert pope_questions([(1, "apple"), (2, "dog")], images=None, per_image=1)[0].question.startswith(
        "Is there an apple"
    )
    with pytest.raises(ValueError, match="images must be at most 12"):
        pope_questions(instances, images=500)
    with pytest.raises(ValueError, match="split must be one of"):
        pope_questions(instances, "hard")


def test_broken_files_are_named(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"annotations": [{"category_id": 3}]}'):
        file = tmp_path / "broken.json"
        file.write_text(content)
        with pytest.raises(ReachError, match=r"broken\.json"):
            read_coco(file)


def test_parsers_disagree_where_they_are_known_to() -> None:
    answers = ["NO", "There isn't one", "not sure", "Yes. No doubt", "nothing"]
    read = {name: [parse_answer(a, name, "no") for a in answers] for name in PARSERS}
    assert read["pope"] == ["yes", "yes", "no", "yes", "yes"]
    assert read["opera"] == ["no", "no", "no", "no", "yes"]
    assert read["vcd"] == ["no", "yes", "no", "no", "no"]
    with pytest.raises(ValueError, match="parser must be one of"):
        parse_answer("yes", "mine")
    with pytest.raises(ValueError, match="label must be one of"):
        parse_answer("yes", "vcd")
    with pytest.raises(ValueError, match="as many, got 1 and 2"):
        pope(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="labels must be one of"):
        pope(["yes"], ["maybe"])


@given(st.lists(st.tuples(st.sampled_from(["Yes", "No.", "no", "well"]), st.sampled_from(["yes", "no"])), max_size=30))
def test_counts_add_up(rows: list[tuple[str, str]]) -> None:
    for parser in PARSERS:
        scores = pope([a for a, _ in rows], [label for _, label in rows], parser)
        assert scores.total == len(rows)
        assert scores.tp + scores.fn == sum(label == "yes" for _, label in rows)
        assert math.isnan(scores.accuracy) == (not rows)
        if scores.tp:
            assert scores.f1 == pytest.approx(scores.tp / (scores.tp + (scores.fp + scores.fn) / 2))
