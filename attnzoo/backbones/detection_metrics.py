"""How good a detector is, in COCO's figures: a thin layer over torchmetrics and pycocotools, which do the arithmetic.

    scenes = attnzoo.backbones.CocoFolder("val2017", "instances_val2017.json")
    figures = attnzoo.backbones.evaluate_detector(model, scenes, class_names=scenes.class_names)
    figures["map"], figures["map_50"], figures["per_class"]

COCO's metric: Lin et al., arXiv:1405.0312. torchmetrics and pycocotools come with attnzoo[train].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from attnzoo.errors import ReachError, check_range

__all__ = ["CocoFolder", "detection_metrics", "evaluate_detector"]

_FIGURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")
_TRUTH = ("boxes", "labels", "iscrowd", "area")


def detection_metrics(
    found: Sequence[dict[str, Tensor]],
    targets: Sequence[dict[str, Tensor]],
    class_names: Sequence[str] | dict[int, str] | None = None,
) -> dict[str, Any]:
    """COCO's figures of what a detector found, one dict per image in both lists.

    Args:
        found: what a detector returns: "boxes" [n, 4] (x1, y1, x2, y2 in pixels), "labels" [n], "scores" [n].
        targets: "boxes" [m, 4] and "labels" [m]; "iscrowd" [m] and "area" [m] as COCO means them where they are given.
        class_names: names of the labels, by label; None leaves the numbers.

    Returns map (mean over IoU 0.5 to 0.95), map_50, map_75, map_small, map_medium, map_large, mar_1, mar_10, mar_100
    as floats (-1 where COCO leaves them out: no such object), and per_class: name -> {"map", "map_50"} of every label
    that `targets` hold.

    Raises ValueError for lists of different lengths, no images, or a dict without its entries.
    """
    from torchmetrics.detection import MeanAveragePrecision

    if len(found) != len(targets) or not len(found):
        raise ValueError(f"found and targets must be of one length, at least 1, got {len(found)} and {len(targets)}")
    for name, rows, wanted in (
        ("found", found, {"boxes", "labels", "scores"}),
        ("targets", targets, {"boxes", "labels"}),
    ):
        for i, one in enumerate(rows):
            if missing := wanted - set(one):
                raise ValueError(f"{name}[{i}] must have {sorted(wanted)}, got no {sorted(missing)}")
    truth: list[dict[str, Tensor]] = [{key: one[key].cpu() for key in _TRUTH if key in one} for one in targets]
    said = [{key: one[key].detach().cpu() for key in ("boxes", "scores", "labels")} for one in found]
    # The classes' figures are means over the IoUs asked for: a second metric is how torchmetrics gives those at 0.5.
    # COCO's thresholds are float64; torchmetrics' own are float32, and recalls of exactly 0.2 fall on their other side.
    options: dict[str, Any] = {"backend": "pycocotools", "class_metrics": True}
    options["rec_thresholds"] = np.linspace(0.0, 1.0, 101).tolist()
    whole = MeanAveragePrecision(iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(), **options)
    loose = MeanAveragePrecision(iou_thresholds=[0.5], **options)
    for metric in (whole, loose):
        metric.warn_on_many_detections = False
        metric.update(said, truth)
    figures, at_50 = whole.compute(), loose.compute()
    here = set(torch.cat([one["labels"] for one in truth]).tolist())
    names = _names(here, class_names)
    columns = (figures["classes"], figures["map_per_class"], at_50["map_per_class"])
    table = zip(*(column.reshape(-1).tolist() for column in columns), strict=True)
    per_class = {names[label]: {"map": mean, "map_50": loosely} for label, mean, loosely in table if label in here}
    return {key: float(figures[key]) for key in _FIGURES} | {"per_class": per_class}


def _names(labels: set[int], class_names: Sequence[str] | dict[int, str] | None) -> dict[int, Any]:
    """Label -> name; ValueError for a label without one."""
    if class_names is None:
        return {label: label for label in labels}
    known = class_names if isinstance(class_names, dict) else dict(enumerate(class_names))
    if unnamed := labels - set(known):
        raise ValueError(f"class_names must name every label of the targets, got none for {sorted(unnamed)}")
    return {label: known[label] for label in labels}


@torch.inference_mode()
def evaluate_detector(
    model: nn.Module,
    scenes: Iterable[tuple[Tensor, dict[str, Tensor]]],
    batch_size: int = 8,
    class_names: Sequence[str] | dict[int, str] | None = None,
) -> dict[str, Any]:
    """`detection_metrics` of a torchvision detector on (image [3, H, W] in 0 .. 1, target) pairs, such as `CocoFolder`.

    The model runs in eval mode on its own device and is in the mode it was in afterwards.
    """
    check_range("batch_size", batch_size, low=1)
    device, training = next(model.parameters()).device, model.training
    found: list[dict[str, Tensor]] = []
    targets: list[dict[str, Tensor]] = []
    waiting: list[Tensor] = []

    def run() -> None:
        found.extend({key: value.cpu() for key, value in one.items()} for one in model(waiting))
        waiting.clear()

    model.eval()
    try:
        for image, target in scenes:
            waiting.append(image.to(device))
            targets.append(target)
            if len(waiting) == batch_size:
                run()
        if waiting:
            run()
    finally:
        model.train(training)
    return detection_metrics(found, targets, class_names)


class CocoFolder(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """A folder of pictures with COCO's annotations, as pairs that a detector trains on and `evaluate_detector` takes.

    Args:
        images: the folder of the pictures.
        annotations: COCO's instances_*.json. Labels are its category ids (`num_classes` of a detector is one more than
            the largest); `class_names` maps them to names.
        crowds: keep crowd annotations, which the metric needs to know of; a training leaves them out.

    An item is (image float32 [3, H, W] in 0 .. 1, {"boxes" [n, 4], "labels" [n], "iscrowd" [n], "area" [n],
    "image_id" []}). Raises ReachError where a path is not there.
    """

    def __init__(self, images: str | Path, annotations: str | Path, crowds: bool = True) -> None:
        from torchvision.datasets import CocoDetection

        if not Path(images).is_dir():
            raise ReachError(f"images {str(images)!r} is no folder; give the one that holds the pictures")
        if not Path(annotations).is_file():
            raise ReachError(f"annotations {str(annotations)!r} is no file; give COCO's instances_*.json")
        self._data = CocoDetection(str(images), str(annotations))
        self._crowds = crowds
        self.class_names: dict[int, str] = {i: row["name"] for i, row in self._data.coco.cats.items()}

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        from torchvision.transforms.v2.functional import pil_to_tensor

        picture, rows = self._data[index]
        rows = [row for row in rows if self._crowds or not row.get("iscrowd", 0)]
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([row["category_id"] for row in rows], dtype=torch.int64),
            "iscrowd": torch.tensor([row.get("iscrowd", 0) for row in rows], dtype=torch.int64),
            "area": torch.tensor([row["area"] for row in rows], dtype=torch.float32),
            "image_id": torch.tensor(self._data.ids[index]),
        }
        return pil_to_tensor(picture.convert("RGB")).float() / 255, target
