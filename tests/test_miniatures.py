"""The synthetic world, how captions are scored, the recipes, and the shipped miniatures against their bars."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attnzoo import miniatures
from attnzoo.errors import ReachError
from attnzoo.miniatures import cards, classifiers, evaluate, figures, training, world

seeds = st.integers(0, 2**32 - 1)


# ---------------------------------------------------------------------------------------------------------------- world


def test_the_world_needs_no_torch():
    code = """
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("world", sys.argv[1])
world = sys.modules["world"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(world)
import numpy
print(world.sample_scene(numpy.random.default_rng(3)).image.sum())
"""
    ran = subprocess.run([sys.executable, "-c", code, world.__file__], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == world.sample_scene(np.random.default_rng(3)).image.sum()


def test_every_noun_has_its_own_glyph_and_a_trio_shares_nothing():
    assert sorted(world.CLASS_OF.values()) == list(range(24))
    for trio in world.GROUPS.values():
        colours, shapes = zip(*(world.CLASSES[world.CLASS_OF[noun]].split() for noun in trio))
        assert len(set(colours)) == len(set(shapes)) == 3


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(world.KINDS), st.sampled_from([24, 32, 41, 48]), st.sampled_from(world.DIFFICULTIES))
def test_a_scene_is_determined_and_agrees_with_itself(seed, kind, size, difficulty):
    scene = world.sample_scene(np.random.default_rng(seed), kind, size, difficulty)
    again = world.sample_scene(np.random.default_rng(seed), kind, size, difficulty)
    assert scene.image.dtype == np.uint8 and scene.image.shape == (size, size, 3)
    assert np.array_equal(scene.image, again.image) and scene.objects == again.objects
    assert len(set(scene.nouns)) == len(scene.objects) and scene.masks.shape == (len(scene.objects), size, size)
    assert scene.masks.sum(0).max() == 1, "objects overlap"
    for thing, mask in zip(scene.objects, scene.masks):
        x0, y0, x1, y1 = thing.box
        ys, xs = np.nonzero(mask)
        assert (x0, y0, x1, y1) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert max(x1 - x0, y1 - y0) <= thing.size + 2
        assert world.CLASSES[thing.label] == f"{thing.colour} {thing.shape}"


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_kinds_hold_what_they_say(seed):
    rng = np.random.default_rng(seed)
    assert len(world.sample_scene(rng, "single").objects) == 1
    broken = world.sample_scene(rng, "broken")
    assert len(broken.bait) == 1 and 3 <= len(broken.objects) <= 4
    assert sum(world.GROUP_OF[n] == broken.group for n in broken.nouns) == 2
    intact = world.sample_scene(rng, "intact")
    assert intact.bait == () and 3 <= len(intact.objects) <= 4
    assert 2 <= len(world.sample_scene(rng, "balanced").objects) <= 5
    others = [world.GROUP_OF[n] for n in broken.nouns if world.GROUP_OF[n] != broken.group]
    assert len(set(others)) == len(others)


def test_masks_lie_on_the_pixels_that_were_painted():
    """In plain scenes the pixels of a mask are nearer to the object's colour than the ground's are."""
    rng = np.random.default_rng(5)
    for _ in range(40):
        scene = world.sample_scene(rng, "prior", 48, "plain")
        ground = ~scene.masks.any(0)
        for thing, mask in zip(scene.objects, scene.masks):
            distance = np.abs(scene.image.astype(float) - world.COLOURS[thing.colour]).mean(-1)
            assert distance[mask].mean() < 0.5 * distance[ground].mean()


def test_groups_are_skewed_and_trios_complete_as_often_as_documented():
    rng = np.random.default_rng(0)
    casts = [set(world.sample_nouns(rng)) for _ in range(4000)]
    complete = {group: sum(set(trio) <= cast for cast in casts) for group, trio in world.GROUPS.items()}
    assert complete["kitchen"] > 1.6 * complete["street"] > 2 * complete["pitch"]
    assert sum(complete.values()) / len(casts) == pytest.approx(world.COMPLETE, abs=0.015)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 12))
def test_questions_are_balanced_true_and_of_their_kind(seed, n):
    rng = np.random.default_rng(seed)
    scene = world.sample_scene(rng, "broken", 32)
    asked = world.questions(scene, rng, n)
    assert len(asked) == n and sum(q.answer for q in asked) == (n + 1) // 2
    here = {world.GROUP_OF[noun] for noun in scene.nouns}
    for question in asked:
        assert question.answer == (question.noun in scene.nouns) == (question.kind == "present")
        if not question.answer:
            assert (question.kind == "co-occurring") == (world.GROUP_OF[question.noun] in here)
    if n >= 4:
        assert {q.noun for q in asked if q.kind == "co-occurring"} >= set(scene.bait)


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(["prior", "broken", "balanced"]))
def test_a_caption_names_what_is_there(seed, kind):
    rng = np.random.default_rng(seed)
    scene = world.sample_scene(rng, kind, 32)
    text = world.caption(scene, rng)
    assert text.startswith("a photo of a ") and text.endswith(".")
    assert set(world.named_nouns(text)) == set(scene.nouns)


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([1, 2]), st.sampled_from([32, 48]))
def test_placed_scenes_are_where_their_prompt_says(seed, num_objects, size):
    scene, prompt = world.placed_scene(np.random.default_rng(seed), size, num_objects)
    labels, relation = world.read_prompt(prompt)
    assert labels == [o.label for o in scene.objects] and world.write_prompt(labels, relation) == prompt
    if num_objects == 2:
        (x0, y0, x1, y1), (u0, v0, _, _) = (o.box for o in scene.objects)
        assert x1 <= u0 + 1 if relation == "left of" else y1 <= v0 + 1
    again, _ = world.placed_scene(np.random.default_rng(seed), size, prompt=prompt)
    assert [o.label for o in again.objects] == labels


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda rng: world.sample_scene(rng, "funny"), "kind"),
        (lambda rng: world.sample_scene(rng, difficulty="easy"), "difficulty"),
        (lambda rng: world.sample_scene(rng, size=8), "size"),
        (lambda rng: world.sample_scene(rng, label=24), "label"),
        (lambda rng: world.sample_scene(rng, "prior", label=3), "label"),
        (lambda rng: world.placed_scene(rng, num_objects=3), "num_objects"),
        (lambda rng: world.placed_scene(rng, prompt="a pink circle"), "prompt"),
        (lambda rng: world.read_prompt("a red circle left of a blue square left of a red ring"), "prompt"),
        (lambda rng: world.write_prompt([1, 2]), "labels"),
        (lambda rng: world.write_caption([]), "nouns"),
        (lambda rng: world.questions(world.sample_scene(rng), rng, 2, absent=("rare",)), "absent"),
        (lambda rng: world.patch_labels(world.sample_scene(rng), 7), "patch_size"),
    ],
)
def test_the_world_names_what_is_wrong(call, named):
    with pytest.raises(ValueError, match=named):
        call(np.random.default_rng(0))


def test_patch_labels_follow_the_masks():
    scene = world.sample_scene(np.random.default_rng(1), "balanced")
    labels = world.patch_labels(scene)
    assert labels.shape == (6, 6)
    assert set(np.unique(labels)) == {o.label for o in scene.objects} | {24}


# -------------------------------------------------------------------------------------------------------------- scoring

texts = st.lists(st.sampled_from(world.NOUNS), min_size=1, max_size=6, unique=True).map(world.write_caption)


def _rows(n: int, seed: int = 0) -> list[evaluate.CaptionRow]:
    """Captions of broken scenes that forget some objects and make some up."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        scene = world.sample_scene(rng, "broken", 24)
        said = [noun for noun in scene.nouns if rng.random() < 0.8] + [world.NOUNS[rng.integers(24)]]
        rows.append(evaluate.score_caption(world.write_caption(said), scene))
    return rows


def test_a_caption_is_scored_by_hand():
    scene = world.sample_scene(np.random.default_rng(2), "broken")
    told = evaluate.score_caption(f"A photo of a {scene.bait[0]}, a {scene.nouns[1]} and a {scene.nouns[1]}.", scene)
    assert told.named == (scene.bait[0], scene.nouns[1])
    assert told.absent == told.baited == scene.bait and told.recalled == (scene.nouns[1],)
    other = evaluate.score_caption(f"a photo of a {scene.nouns[0]}.", scene)
    figures_ = evaluate.summarise([told, other])
    assert figures_ == {
        "chair_s": 0.5,
        "chair_i": 1 / 3,
        "recall": 2 / (2 * len(scene.nouns)),
        "bait": 0.5,
        "named": 1.5,
    }


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 1), seeds)
def test_the_control_is_the_expectation_of_dropping(probability, seed):
    """The closed form against the average of all draws: each caption whole or cut, weighted."""
    rows = _rows(40, seed)
    closed = evaluate.drop_last_control(rows, probability)
    rng = np.random.default_rng(seed)
    cut = [evaluate._without_last(r) for r in rows]
    drawn = [
        evaluate.summarise([c if rng.random() < probability else r for r, c in zip(rows, cut)]) for _ in range(300)
    ]
    for key in ("chair_s", "chair_i", "recall", "bait", "named"):
        assert closed[key] == pytest.approx(np.mean([d[key] for d in drawn]), abs=0.02 + 0.01 * (key == "named"))


def test_the_matched_control_reaches_the_chair_it_is_matched_to():
    rows = _rows(200)
    most, least = (evaluate.drop_last_control(rows, p)["chair_s"] for p in (0.0, 1.0))
    middle = (most + least) / 2
    probability, control = evaluate.matched_control(rows, middle)
    assert control["chair_s"] == pytest.approx(middle) and probability == pytest.approx(0.5)
    assert evaluate.matched_control(rows, 1.0)[0] == 0.0 and evaluate.matched_control(rows, -1.0)[0] == 1.0


def test_paired_bootstrap_knows_when_nothing_changed_and_when_something_did():
    rows = _rows(150)
    same = evaluate.paired_bootstrap(rows, rows, resamples=200)
    assert all(value == (0.0, 0.0, 0.0) for value in same.values())
    better = [evaluate._without_last(r) for r in rows]
    change = evaluate.paired_bootstrap(rows, better, resamples=200)
    assert change["named"][0] == pytest.approx(-1.0)
    difference, low, high = change["chair_s"]
    assert low < difference < high < 0
    with pytest.raises(ValueError, match="same scenes"):
        evaluate.paired_bootstrap(rows, better[::-1])


def test_intervals_cover_and_refuse():
    assert evaluate.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # a textbook value
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(100):
        sample = (rng.random(60) < 0.3).tolist()
        low, high = evaluate.bootstrap_interval(sample, lambda x: sum(x) / len(x), resamples=200, seed=i)
        covered += low <= 0.3 <= high
    assert covered >= 88
    rows = _rows(100)
    edges, figures_ = evaluate.bootstrap_summary(rows, 200), evaluate.summarise(rows)
    assert all(low <= figures_[key] <= high for key, (low, high) in edges.items())
    for bad in (
        lambda: evaluate.wilson_interval(3, 2),
        lambda: evaluate.bootstrap_interval([], sum),
        lambda: evaluate.paired_difference([1.0], []),
        lambda: evaluate.summarise([]),
        lambda: evaluate.drop_last_control(rows, 1.5),
    ):
        with pytest.raises(ValueError):
            bad()


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", ["llava", "dinat_world", "dinat_digits", "detector"])
def test_a_recipe_trains_and_its_folder_loads(name, tmp_path):
    before, grad = torch.random.get_rng_state(), torch.is_grad_enabled()
    report = miniatures.train(name, tmp_path, steps=2, progress=False)
    assert torch.equal(before, torch.random.get_rng_state()) and torch.is_grad_enabled() == grad
    assert report == json.loads((tmp_path / "training.json").read_text()) and report["steps"] == 2
    loaded = miniatures.load(name, tmp_path)
    model = loaded[0] if name == "llava" else loaded
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert not (tmp_path / "README.md").exists()


def test_a_recipe_gives_the_same_weights_twice(tmp_path):
    for run in ("one", "two"):
        miniatures.train("dinat_digits", tmp_path / run, seed=3, steps=3, progress=False)
    one, two = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "two"))
    assert one == two


def test_a_loss_that_is_not_finite_stops_the_training():
    weight = torch.nn.Parameter(torch.ones(1))
    recipe = training.read_recipe("dinat_digits")
    with pytest.raises(FloatingPointError, match="step 0"):
        training.fit([weight], lambda _: weight.sum() * float("nan"), recipe["train"], recipe["optimizer"], "x", False)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda tmp: miniatures.load("gpt"), ValueError, "name"),
        (lambda tmp: miniatures.train("gpt", tmp), ValueError, "name"),
        (lambda tmp: miniatures.train("dinat_world", tmp, steps=0), ValueError, "steps"),
        (lambda tmp: miniatures.measure("gpt"), ValueError, "name"),
        (lambda tmp: miniatures.measure("llava", scale=0.0), ValueError, "scale"),
        (lambda tmp: miniatures.check(["gpt"]), ValueError, "names"),
        (lambda tmp: miniatures.load("dinat_world", tmp), ReachError, "model.safetensors"),
        (lambda tmp: miniatures.load("llava", tmp), ReachError, "model.safetensors"),
        (lambda tmp: cards.write_card("llava", tmp), ReachError, "training.json"),
        (lambda tmp: miniatures.classify([tmp / "none.png"]), ReachError, "none.png"),
    ],
)
def test_wrong_calls_are_named(call, error, named, tmp_path):
    with pytest.raises(error, match=named):
        call(tmp_path)


# ------------------------------------------------------------------------------------------------------ shipped weights


@pytest.fixture(scope="module")
def judge():
    return miniatures.load("dinat_world")


@pytest.fixture(scope="module")
def llava():
    return miniatures.load("llava")


def _values(rows):
    assert all(row["ok"] is not False for row in rows), [row for row in rows if row["ok"] is False]
    return {row["figure"]: row["value"] for row in rows}


def test_shipped_classifiers_reach_their_bars():
    _values(figures.measure("dinat_world", scale=0.1))
    digits = figures.measure("dinat_digits")
    assert digits[0]["n"] == 599
    _values(digits)


def test_the_held_out_third_is_held_out_and_stratified():
    parts = classifiers.digits_split()
    sizes = {part: len(labels) for part, (_, labels) in parts.items()}
    assert sizes == {"train": 1198, "validation": 0, "test": 599}
    assert np.bincount(parts["test"][1]).min() >= 57


def test_timm_loads_a_shipped_folder_and_its_own_transform_agrees(judge):
    import timm

    folder = training.WEIGHTS / "dinat_world"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    scene = world.sample_scene(np.random.default_rng(11), "single", 48)
    picture = Image.fromarray(scene.image)
    with torch.no_grad():
        theirs = model(transform(picture)[None]).softmax(-1)
    torch.testing.assert_close(theirs, classifiers.predict(judge, [picture]), rtol=1e-4, atol=1e-5)


def test_pictures_of_every_form_are_classified_alike(judge, tmp_path):
    scene = world.sample_scene(np.random.default_rng(12), "single", 40, "plain")
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    from_file = miniatures.classify([tmp_path / "scene.png", Image.fromarray(scene.image), scene.image], 3, model=judge)
    assert from_file[0] == from_file[1] == from_file[2] and len(from_file[0]) == 3
    assert from_file[0][0][0] == world.CLASSES[scene.objects[0].label]
    assert classifiers.to_tensor(judge, scene.image).shape == (1, 3, 40, 40)
    assert classifiers.predict(judge, np.zeros((2, 8, 8), np.uint8)).shape == (2, 24)
    for bad, error in ((np.zeros((2, 8, 8, 3)), TypeError), (np.zeros((8, 8), np.uint8), ValueError), ([], ValueError)):
        with pytest.raises(error, match="pictures"):
            classifiers.predict(judge, bad)


def test_the_shipped_llava_loads_by_transformers_alone():
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = training.WEIGHTS / "llava"
    processor, model = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float32
    scene = world.sample_scene(np.random.default_rng(0), "intact", difficulty="plain")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    inputs = processor(images=[scene.image], text=[prompt], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 36
    text = processor.decode(model.generate(**inputs)[0], skip_special_tokens=True)
    assert text.removeprefix("describe the image.").strip().startswith("a photo of a ")


def test_the_processor_makes_what_the_recipe_trained_on(llava):
    from attnzoo.miniatures.llava import normalise

    scene = world.sample_scene(np.random.default_rng(4), "prior")
    made = llava[1](images=[scene.image], text=["<image>"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, normalise(scene.image[None], "cpu"), rtol=0, atol=1e-5)


def test_the_tokenizer_keeps_captions(llava):
    tokenizer = llava[1].tokenizer
    for noun in world.NOUNS:
        text = world.write_caption([noun, "cup", "bus"])
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(tokenizer("Is there a cup?")["input_ids"]) == 5  # with <bos>; the noun comes last


def test_the_shipped_llava_hallucinates_as_its_card_says(llava):
    """A fifth of the card's scenes, with margins of about four standard errors."""
    figures_ = {row["figure"]: row for row in figures.measure("llava", scale=0.2)}
    card = json.loads((training.WEIGHTS / "llava" / "figures.json").read_text())
    assert all(row["ok"] is not False for row in card["rows"])
    for row in card["rows"]:
        assert figures_[row["figure"]]["value"] == pytest.approx(row["value"], abs=0.13), row["figure"]


def test_captions_run_inside_the_edit_that_is_handed_in(llava):
    from contextlib import contextmanager

    entered = []

    @contextmanager
    def edit():
        entered.append("in")
        yield
        entered.append("out")

    scenes = [world.sample_scene(np.random.default_rng(i), "broken") for i in range(5)]
    plain = evaluate.evaluate_captions(*llava, scenes)
    assert evaluate.evaluate_captions(*llava, scenes, edit(), batch_size=2) == plain and entered == ["in", "out"]


@pytest.mark.parametrize("name", ["llava", "dinat_world", "dinat_digits", "detector"])
def test_cards_say_what_was_measured(name):
    folder = training.WEIGHTS / name
    rows = json.loads((folder / "figures.json").read_text())["rows"]
    report = json.loads((folder / "training.json").read_text())
    assert (folder / "README.md").read_text() == cards.render(name, rows, report, 0, cards.weights_size(folder))
    assert report["steps"] is None and cards.weights_size(folder) <= {"llava": 3.2e6, "detector": 1.4e6}.get(name, 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "dinat_world", "dinat_digits", "detector"])
def test_the_card_is_what_the_check_command_measures(name):
    card = json.loads((training.WEIGHTS / name / "figures.json").read_text())
    for measured, written in zip(figures.measure(name), card["rows"], strict=True):
        assert measured["figure"] == written["figure"]
        assert measured["value"] == pytest.approx(written["value"], abs=2e-3)
