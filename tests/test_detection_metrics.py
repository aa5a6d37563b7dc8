"""COCO's figures: against pycocotools run by hand on the same files, known answers, bad input by name."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attnzoo.backbones import CocoFolder, detection_metrics, evaluate_detector
from attnzoo.errors import ReachError

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

BOXES = torch.tensor([[10.0, 10.0, 50.0, 40.0], [60.0, 20.0, 90.0, 80.0], [5.0, 50.0, 45.0, 90.0]])


def test_a_perfect_detector_and_one_that_misses_a_class():
    target = {"boxes": BOXES, "labels": torch.tensor([1, 2, 2])}
    perfect = {**target, "scores": torch.tensor([0.9, 0.8, 0.7])}
    figures = detection_metrics([perfect], [target], ["background", "cat", "dog"])
    assert figures["map"] == figures["map_50"] == figures["mar_100"] == 1.0 and figures["map_large"] == -1.0
    assert figures["per_class"] == {"cat": {"map": 1.0, "map_50": 1.0}, "dog": {"map": 1.0, "map_50": 1.0}}
    blind = {key: value[:1] for key, value in perfect.items()}
    figures = detection_metrics([blind], [target])
    assert figures["map_50"] == 0.5 and figures["per_class"][2]["map_50"] == 0.0


def test_a_box_counts_up_to_the_overlap_that_it_has():
    """IoU 0.8: right at the thresholds 0.5 to 0.8 (7 of 10), so map 0.7 and map_50 1."""
    target = {"boxes": torch.tensor([[0.0, 0.0, 100.0, 10.0]]), "labels": torch.tensor([1])}
    found = {"boxes": torch.tensor([[0.0, 0.0, 80.5, 10.0]]), "labels": target["labels"], "scores": torch.tensor([0.9])}
    figures = detection_metrics([found], [target])
    assert figures["map_50"] == 1.0 and figures["map"] == pytest.approx(0.7)
    assert figures["per_class"][1] == {"map": pytest.approx(0.7), "map_50": 1.0}


def test_nothing_found_and_nothing_there():
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    target = {"boxes": BOXES, "labels": torch.tensor([1, 2, 3])}
    empty = {**none, "scores": torch.zeros(0)}
    assert detection_metrics([empty, empty], [target, none])["map_50"] == 0.0
    assert detection_metrics([empty], [none])["map"] == -1.0


class Saying(nn.Module):
    """A detector that says what it was given, image after image."""

    def __init__(self, found: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.found, self.asked, self.parameter = list(found), [], nn.Parameter(torch.zeros(1))

    def forward(self, images):
        assert not self.training
        start = sum(self.asked)
        self.asked.append(len(images))
        return self.found[start : start + len(images)]


@pytest.fixture
def coco(tmp_path):
    """Seven pictures with objects of three categories, some of them crowds, one picture empty; COCO's own format."""
    rng = np.random.default_rng(0)
    images, rows = [], []
    (tmp_path / "pictures").mkdir()
    for i in range(7):
        width, height = int(rng.integers(64, 200)), int(rng.integers(64, 200))
        mode = "L" if i == 3 else "RGB"
        Image.new(mode, (width, height)).save(tmp_path / "pictures" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
        for _ in range(0 if i == 2 else int(rng.integers(1, 6))):
            x, y = rng.uniform(0, width - 20), rng.uniform(0, height - 20)
            w, h = rng.uniform(10, width - x), rng.uniform(10, height - y)
            row = {"id": len(rows) + 1, "image_id": 100 + i, "category_id": int(rng.choice([1, 7, 90]))}
            rows.append(row | {"bbox": [x, y, w, h], "area": 0.6 * w * h, "iscrowd": int(rng.random() < 0.2)})
    names = [{"id": 1, "name": "cup"}, {"id": 7, "name": "bus"}, {"id": 90, "name": "brush"}]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": names}))
    return tmp_path / "pictures", path


def test_the_figures_are_pycocotools_own_on_the_same_files(coco):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data, rng = CocoFolder(*coco), np.random.default_rng(1)
    found, results = [], []
    for image, target in data:
        assert image.shape[0] == 3 and image.dtype == torch.float32
        boxes = target["boxes"] + torch.from_numpy(rng.normal(0, 6, target["boxes"].shape)).float()
        boxes = torch.cat([boxes, boxes[:1] + 15])
        labels = torch.cat([target["labels"], target["labels"][:1]])
        scores = torch.from_numpy(rng.uniform(0.1, 1, len(boxes))).float()
        found.append({"boxes": boxes, "labels": labels, "scores": scores})
        results += [
            {
                "image_id": int(target["image_id"]),
                "category_id": int(label),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(score),
            }
            for (x0, y0, x1, y1), label, score in zip(boxes.double().tolist(), labels, scores)
        ]
    model = Saying(found).train()
    figures = evaluate_detector(model, data, 3, data.class_names)
    assert model.asked == [3, 3, 1] and model.training and set(figures["per_class"]) == {"cup", "bus", "brush"}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(coco[1]))
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate(), run.accumulate(), run.summarize()
        precision = run.eval["precision"]  # [IoU, recall, class, area, detections]
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")
    for name, value in zip(names, run.stats[:9]):
        assert figures[name] == pytest.approx(value, abs=1e-6), name
    for i, name in enumerate(("cup", "bus", "brush")):
        assert figures["per_class"][name]["map_50"] == pytest.approx(precision[0, :, i, 0, 2].mean(), abs=1e-6)
        assert figures["per_class"][name]["map"] == pytest.approx(precision[:, :, i, 0, 2].mean(), abs=1e-6)
    assert 0.05 < figures["map"] < 0.95


def test_a_coco_folder_trains_without_its_crowds(coco):
    whole, few = CocoFolder(*coco), CocoFolder(*coco, crowds=False)
    assert len(whole) == len(few) == 7 and whole.class_names == {1: "cup", 7: "bus", 90: "brush"}
    crowds = sum(int(target["iscrowd"].sum()) for _, target in whole)
    assert crowds > 0 and sum(len(t["boxes"]) for _, t in whole) - sum(len(t["boxes"]) for _, t in few) == crowds
    assert few[2][1]["boxes"].shape == (0, 4) and few[3][0].shape[0] == 3


def test_a_failing_model_is_left_in_its_mode():
    model = nn.Linear(2, 2).train()
    with pytest.raises(TypeError):
        evaluate_detector(model, [(torch.rand(3, 64, 64), {})])
    assert model.training


def test_bad_input_is_named(tmp_path, coco):
    target = {"boxes": BOXES, "labels": torch.tensor([1, 2, 2])}
    found = {**target, "scores": torch.ones(3)}
    for call, error, words in (
        (lambda: detection_metrics([], []), ValueError, "at least 1, got 0 and 0"),
        (lambda: detection_metrics([found], []), ValueError, "one length"),
        (lambda: detection_metrics([target], [target]), ValueError, r"found\[0\] must have .* got no \['scores'\]"),
        (lambda: detection_metrics([found], [{"boxes": BOXES}]), ValueError, r"targets\[0\]"),
        (lambda: detection_metrics([found], [target], ["background", "cat"]), ValueError, r"class_names .*\[2\]"),
        (lambda: evaluate_detector(Saying([found]), [], 0), ValueError, "batch_size"),
        (lambda: CocoFolder(tmp_path / "none", coco[1]), ReachError, "images .*none"),
        (lambda: CocoFolder(coco[0], tmp_path / "none.json"), ReachError, "annotations .*none.json"),
    ):
        with pytest.raises(error, match=words):
            call()
