"""A detector of the world's objects: torchvision's Faster R-CNN on a feature pyramid over a DiNAT of tiny width.

The model is what ``attnzoo.backbones.detector`` makes, the figures are ``attnzoo.backbones.detection_metrics``'. A
trained folder holds config.json (the recipe's [model] table, the label names) and model.safetensors, half precision.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from attnzoo.errors import ReachError, check_choice, check_range
from attnzoo.miniatures import classifiers, report, training, world

#: Kinds of held-out scenes.
SCENES = ("several", "single", "hard", "wide")

Found = list[tuple[str, float, tuple[float, float, float, float]]]


def build(wanted: dict[str, Any]) -> Any:
    """The untrained detector of a recipe's [model] table; draws from torch's global generator."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    from attnzoo import backbones

    levels, channels, cells = wanted["anchors"], wanted["pyramid_channels"], wanted["roi_size"]
    classes = len(world.CLASSES) + 1
    parts = {
        "min_size": wanted["image_size"],
        "image_mean": [wanted["mean"]] * 3,
        "image_std": [wanted["std"]] * 3,
        "rpn_anchor_generator": AnchorGenerator(tuple(map(tuple, levels)), ((1.0,),) * len(levels)),
        "rpn_post_nms_top_n_train": wanted["proposals"],
        "rpn_post_nms_top_n_test": wanted["proposals"],
        "rpn_pre_nms_top_n_train": 4 * wanted["proposals"],
        "rpn_pre_nms_top_n_test": 4 * wanted["proposals"],
        "box_roi_pool": MultiScaleRoIAlign([str(i) for i in range(len(levels) - 1)], cells, 2),
        "box_head": TwoMLPHead(channels * cells**2, wanted["head_width"]),
        "box_predictor": FastRCNNPredictor(wanted["head_width"], classes),
        "box_detections_per_img": wanted["detections"],
    }
    name, kind = wanted["name"], wanted["kind"]
    return backbones.detector(
        name, kind, classes, pyramid_channels=channels, detector_kwargs=parts, **wanted["arguments"]
    )


def load(folder: Path | None = None) -> Any:
    """A trained detector in float32 and eval mode from `folder`; the shipped one if None.

    It is torchvision's FasterRCNN: a list of float images [3, H, W] in 0 .. 1 in, a list of dicts out with "boxes"
    [n, 4] (x1, y1, x2, y2 in pixels), "labels" [n] (1 to 24: ``world.CLASSES[label - 1]``) and "scores" [n].
    """
    from safetensors.torch import load_file

    folder = training.trained_folder("detector", folder)
    model = build(json.loads((folder / "config.json").read_text())["model"])
    model.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
    return model.eval()


def save(model: Any, recipe: dict[str, Any], folder: Path) -> None:
    """Write the model's weights in half precision, and what `load` needs to build it."""
    from safetensors.torch import save_file

    save_file(
        {key: value.half().contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    training.write_json(
        folder / "config.json",
        {"model": recipe["model"], "label_names": ["background", *world.CLASSES], "license": "apache-2.0"},
    )


# ---------------------------------------------------------------------------------------------------------------- using


def to_tensor(picture: Any) -> Tensor:
    """A path, PIL image or uint8 array [H, W, 3] as the detector takes it: float32 [3, H, W] in 0 .. 1.

    Raises ReachError for a path that is no picture, TypeError or ValueError for an array of another dtype or shape.
    """
    if isinstance(picture, (str, Path)):
        try:
            with Image.open(picture) as image:
                picture = image.convert("RGB")
        except OSError as error:
            raise ReachError(f"image {str(picture)!r} can't be opened as a picture: {error}") from error
    pixels = np.array(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if pixels.dtype != np.uint8:
        raise TypeError(f"pictures must be uint8, got {pixels.dtype}")
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pictures must be [H, W, 3], got {pixels.shape}")
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@torch.inference_mode()
def detect(images: Sequence[Any], threshold: float = 0.5, model: Any = None) -> list[Found]:
    """For each image what is in it: (class name, score, (x1, y1, x2, y2) in its pixels), likeliest first.

    images: paths, PIL images or uint8 arrays, 64 to 1333 pixels a side. threshold: the least score. model: the
    detector, already loaded.
    Raises ReachError for a path that is no picture, ValueError for a threshold outside 0..1 or another size.
    """
    check_range("threshold", threshold, 0, 1)
    model = load() if model is None else model
    device = next(model.parameters()).device
    seen: list[Found] = []
    for image in images:  # one at a time: a batch is padded to its largest
        one = {key: value.tolist() for key, value in model([to_tensor(image).to(device)])[0].items()}
        rows = zip(one["labels"], one["scores"], one["boxes"], strict=True)
        seen.append([(world.CLASSES[label - 1], score, tuple(box)) for label, score, box in rows if score >= threshold])
    return seen


def draw(picture: Any, found: Found, scale: int = 3) -> Image.Image:
    """The picture enlarged `scale` times, with a box and a name around everything found in it."""
    image = Image.fromarray((to_tensor(picture).permute(1, 2, 0) * 255).round().byte().numpy())
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=11)
    for name, score, box in found:
        x0, y0, x1, y1 = (scale * edge for edge in box)
        pen.rectangle([x0, y0, x1, y1], outline="white", width=2)
        text = f"{name} {score:.2f}"
        wide = font.getlength(text)
        left, top = max(0, min(x0, image.width - wide)), y0 - 13 if y0 >= 13 else min(y1, image.height - 13)
        pen.rectangle([left, top, left + wide, top + 13], fill="black")
        pen.text((left, top), text, fill="white", font=font)
    return image


def contact_sheet(model: Any = None, seed: int = 0) -> Image.Image:
    """Held-out scenes, the first of each kind, nothing picked, with what the detector finds in them."""
    model = load() if model is None else model
    rows = []
    for kind in ("several", "hard"):
        scenes = held_out("test", 6, seed, kind)
        pictures = [scene.image for scene in scenes]
        rows.append([draw(p, f, 288 // len(p)) for p, f in zip(pictures, detect(pictures, model=model))])
    return report.grid([row[i : i + 3] for row in rows for i in (0, 3)], ["mixed", "", "hard", ""], [], 288)


# ----------------------------------------------------------------------------------------------------------------- data


def held_out(split: str, n: int, seed: int, kind: str = "several") -> list[world.Scene]:
    """`n` held-out scenes of the recipe's sizes in turn.

    kind: "several", 2 to 5 objects of mixed difficulty; "single", one of any size; "hard", several, faint on a noisy
    ground; "wide", two scenes of "several" side by side, so twice as wide as high.
    """
    check_choice("kind", kind, SCENES)
    sizes = training.read_recipe("detector")["data"]["sizes"]
    rng = training.generator(split, seed, 20 + SCENES.index(kind))
    what = "single" if kind == "single" else "balanced"
    difficulty = "hard" if kind == "hard" else "mixed"
    drawn = [
        [world.sample_scene(rng, what, sizes[i % len(sizes)], difficulty) for _ in range(1 + (kind == "wide"))]
        for i in range(n)
    ]
    return [beside(*pair) if len(pair) == 2 else pair[0] for pair in drawn]


def beside(left: world.Scene, right: world.Scene) -> world.Scene:
    """Two scenes of one size as one picture, twice as wide."""
    from dataclasses import replace

    size = left.image.shape[1]
    moved = [replace(o, box=(o.box[0] + size, o.box[1], o.box[2] + size, o.box[3])) for o in right.objects]
    masks = np.concatenate(
        [np.pad(left.masks, ((0, 0), (0, 0), (0, size))), np.pad(right.masks, ((0, 0), (0, 0), (size, 0)))]
    )
    return world.Scene(np.concatenate([left.image, right.image], 1), (*left.objects, *moved), None, masks)


def as_pair(scene: world.Scene) -> tuple[Tensor, dict[str, Tensor]]:
    """A scene as detectors learn from it: image [3, H, W], {"boxes" [n, 4], "labels" [n] from 1}."""
    boxes = torch.tensor([o.box for o in scene.objects], dtype=torch.float32)
    return to_tensor(scene.image), {"boxes": boxes, "labels": torch.tensor([o.label + 1 for o in scene.objects])}


# -------------------------------------------------------------------------------------------------------------- recipes


def evaluate(model: Any, scenes: Sequence[world.Scene]) -> dict[str, Any]:
    """`attnzoo.backbones.evaluate_detector`'s figures of the detector on scenes."""
    from attnzoo.backbones import evaluate_detector

    return evaluate_detector(model, map(as_pair, scenes), 16, ("background", *world.CLASSES))


def train(
    out: str | Path,
    seed: int = 0,
    device: str = "cpu",
    steps: int | None = None,
    progress: bool = True,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the detector by its recipe and write it to the folder `out`; returns what training.json says.

    steps: cuts the training to this many steps, for a trial. recipe: replaces configs/recipes/detector.toml.
    """
    recipe = training.capped(training.read_recipe("detector") if recipe is None else recipe, steps)
    folder, clock = Path(out), training.Clock()
    folder.mkdir(parents=True, exist_ok=True)
    stage, data, rng = recipe["train"], recipe["data"], training.generator("train", seed, 20)
    held = held_out("validation", recipe["validation"]["scenes"], seed)
    validated: dict[int, float] = {}

    def scene() -> world.Scene:
        kind = "single" if rng.random() < data["single"] else "balanced"
        return world.sample_scene(rng, kind, int(rng.choice(data["sizes"])))

    with training.seeded(seed, device):
        model = build(recipe["model"])
        start_backbone(model, recipe["model"]["initial"])
        model.roi_heads.fg_bg_sampler.batch_size_per_image = stage["proposals"]
        model.to(device).train()

        def loss(_: int) -> Tensor:
            pairs = [as_pair(scene()) for _ in range(stage["batch"])]
            images = [image.to(device) for image, _ in pairs]
            targets = [{key: value.to(device) for key, value in target.items()} for _, target in pairs]
            return torch.stack(list(model(images, targets).values())).sum()

        def every(step: int) -> None:
            if step % recipe["validation"]["every"] and step != stage["steps"]:
                return
            validated[step] = evaluate(model, held)["map_50"]
            if progress:
                training.say(f"validation after {step} steps: mAP@50 {validated[step]:.4f} of {len(held)} scenes")

        training.fit(model.parameters(), loss, stage, recipe["optimizer"], "detector", progress, every)
    save(model.eval().cpu(), recipe, folder)
    facts = clock.report(seed, steps, device) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": {str(step): value for step, value in validated.items()},
    }
    training.write_json(folder / "training.json", facts)
    return facts


def start_backbone(model: Any, name: str) -> None:
    """Give the detector's backbone the weights of a shipped classifier; every one of its own is taken from there."""
    body, known = model.backbone.body.model, classifiers.load(name).state_dict()
    body.load_state_dict({key: known[key] for key in body.state_dict()})


def measure(folder: Path | None, seed: int = 0, scale: float = 1.0) -> list[dict[str, Any]]:
    """The figures' rows, on test scenes; see `attnzoo.miniatures.figures`."""
    from attnzoo.miniatures import figures

    model, recipe = load(folder), training.read_recipe("detector")
    sizes, bar = recipe["data"]["sizes"], recipe["bars"]["map_50"]
    n = max(24, round(scale * figures.SCENES["detector"]))

    def row(figure: str, value: float, count: int, low: float | None = None) -> dict[str, Any]:
        return figures.row("detector", figure, value, count, low=low)

    scenes = held_out("test", n, seed)
    whole = evaluate(model, scenes)
    rows = [
        row(f"mAP@50, held-out scenes of {sizes[0]} to {sizes[-1]} pixels", whole["map_50"], n, bar),
        row("mAP (IoU 0.5 to 0.95), the same", whole["map"], n),
        row("AP@50 of the worst class, the same", min(c["map_50"] for c in whole["per_class"].values()), n),
    ]
    for size in (sizes[0], sizes[-1]):
        of_size = [scene for scene in scenes if len(scene.image) == size]
        rows.append(row(f"mAP@50, those of {size} pixels", evaluate(model, of_size)["map_50"], len(of_size)))
    for kind, words in (
        ("single", "one object of any size"),
        ("wide", "two scenes side by side"),
        ("hard", "hard scenes only"),
    ):
        others = held_out("test", n // 2, seed, kind)
        rows.append(row(f"mAP@50, {words}", evaluate(model, others)["map_50"], len(others)))
    return rows
