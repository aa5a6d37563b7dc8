"""The miniature detector: its recipe, its scenes, what it finds, and the shipped weights against their bar."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection import FasterRCNN
from torchvision.ops import box_iou

from attnzoo import miniatures
from attnzoo.errors import ReachError
from attnzoo.miniatures import classifiers, detector, training, world

pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def model():
    return miniatures.load("detector")


def test_the_backbone_starts_from_the_classifier():
    torch.manual_seed(0)
    model = detector.build(training.read_recipe("detector")["model"])
    known = classifiers.load("dinat_world").state_dict()
    body = model.backbone.body.model
    assert not torch.equal(body.state_dict()["patch_embed.proj.0.weight"], known["patch_embed.proj.0.weight"])
    detector.start_backbone(model, "dinat_world")
    own = body.state_dict()
    assert set(own) <= set(known) and all(torch.equal(value, known[key]) for key, value in own.items())


def test_a_trial_gives_the_same_weights_twice(tmp_path):
    for run in ("one", "two"):
        miniatures.train("detector", tmp_path / run, seed=3, steps=2, progress=False)
    one, two = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("kind", detector.SCENES)
def test_held_out_scenes_are_determined_and_of_no_other_stream(kind):
    scenes = detector.held_out("test", 6, 0, kind)
    for one, two in zip(scenes, detector.held_out("test", 6, 0, kind)):
        assert np.array_equal(one.image, two.image) and one.objects == two.objects
    for split, seed in (("validation", 0), ("test", 1)):
        assert not np.array_equal(scenes[0].image, detector.held_out(split, 1, seed, kind)[0].image)
    assert [len(scene.image) for scene in scenes] == [64, 96, 128] * 2
    for scene in scenes:
        image, target = detector.as_pair(scene)
        height, width = image.shape[1:]
        assert width == height * (2 if kind == "wide" else 1) and image.min() >= 0 and image.max() <= 1
        assert len(target["boxes"]) == len(scene.objects) and target["labels"].min() >= 1
        assert (target["boxes"] >= 0).all() and (target["boxes"][:, 2] <= width).all()
        for (x0, y0, x1, y1), mask in zip(target["boxes"].int().tolist(), scene.masks, strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0


def test_the_shipped_detector_is_torchvisions_on_our_backbone(model):
    assert type(model) is FasterRCNN and not model.training
    assert type(model.backbone.body.model).__module__ == "attnzoo.backbones.nat"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_shipped_detector_reaches_its_bar():
    """A tenth of the card's scenes; the bar is the recipe's."""
    rows = miniatures.measure("detector", scale=0.1)
    assert rows[0]["bar"] == ">= 0.8" and rows[0]["ok"] and rows[0]["n"] == 90
    assert all(row["value"] > 0.5 for row in rows)


def test_what_is_there_is_found_by_name_whatever_form_a_picture_has(model, tmp_path):
    scene = world.sample_scene(np.random.default_rng(3), "balanced", 96, "plain")
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    forms = [tmp_path / "scene.png", str(tmp_path / "scene.png"), Image.fromarray(scene.image), scene.image]
    from_file, *others = miniatures.detect(forms, model=model)
    assert all(found == from_file for found in others)
    assert sorted(name for name, _, _ in from_file) == sorted(world.CLASSES[o.label] for o in scene.objects)
    for thing in scene.objects:
        (box,) = (box for name, _, box in from_file if name == world.CLASSES[thing.label])
        assert box_iou(torch.tensor([box]), torch.tensor([thing.box], dtype=torch.float32)).item() > 0.6
    scores = [score for _, score, _ in from_file]
    assert scores == sorted(scores, reverse=True) and min(scores) >= 0.5
    assert miniatures.detect([scene.image], threshold=1.0, model=model) == [[]]


@pytest.mark.parametrize("size", [(64, 64), (101, 75), (80, 333), (1333, 64)])
def test_a_scene_is_found_on_a_canvas_of_any_size(model, size):
    """The scene in the corner of a grey canvas: torchvision resizes by the shorter side, so here by at most 96 / 64."""
    scene = world.sample_scene(np.random.default_rng(5), "balanced", 64, "plain")
    canvas = np.full((*size, 3), 100, np.uint8)
    canvas[:64, :64] = scene.image
    (found,) = miniatures.detect([canvas], model=model)
    assert {name for name, _, _ in found} >= {world.CLASSES[o.label] for o in scene.objects}
    assert all(0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0] for _, _, (x0, y0, x1, y1) in found)


def test_pictures_of_what_was_found(model):
    scene = world.sample_scene(np.random.default_rng(3), "balanced", 64)
    drawn = detector.draw(scene.image, [("red circle", 0.9, (1.0, 1.0, 20.0, 20.0))], 2)
    assert drawn.size == (128, 128) and not np.array_equal(
        np.asarray(drawn), np.asarray(drawn.resize((64, 64)).resize((128, 128)))
    )
    sheet = detector.contact_sheet(model)
    assert sheet.size[0] > 3 * 288 and sheet.size[1] > 4 * 288


def test_bad_input_is_named(model, tmp_path):
    for call, error, words in (
        (lambda: miniatures.detect([tmp_path / "none.png"], model=model), ReachError, "none.png"),
        (lambda: miniatures.detect([np.zeros((96, 96, 3))], model=model), TypeError, "uint8"),
        (lambda: miniatures.detect([np.zeros((96, 96), np.uint8)], model=model), ValueError, r"\[H, W, 3\]"),
        (lambda: miniatures.detect([np.zeros((48, 48, 3), np.uint8)], model=model), ValueError, "from 64 to 1333"),
        (lambda: miniatures.detect([], threshold=1.5, model=model), ValueError, "threshold"),
        (lambda: detector.held_out("test", 1, 0, "funny"), ValueError, "kind"),
        (lambda: miniatures.load("detector", tmp_path), ReachError, "model.safetensors"),
    ):
        with pytest.raises(error, match=words):
            call()
