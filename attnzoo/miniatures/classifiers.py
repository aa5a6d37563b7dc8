"""Two DiNAT classifiers at tiny widths: the world's single objects, and scikit-learn's handwritten digits.

The class is `attnzoo.backbones`' own, made by ``timm.create_model``; a trained folder is timm's local-dir format, so
``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it once attnzoo is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from attnzoo.errors import ReachError, check_choice
from attnzoo.miniatures import training, world

NAMES = ("dinat_world", "dinat_digits")


def class_names(name: str) -> tuple[str, ...]:
    """The names of a classifier's outputs, in order: "red circle" and the like, or "0" to "9"."""
    check_choice("name", name, NAMES)
    return world.CLASSES if name == "dinat_world" else tuple("0123456789")


def build(name: str, recipe: dict[str, Any]) -> Any:
    """The untrained model of a recipe; draws from torch's global generator."""
    import timm

    import attnzoo.backbones  # noqa: F401  registers the names

    wanted = recipe["model"]
    size, channels = wanted["image_size"], wanted["in_chans"]
    config = {
        "tag": name,
        "input_size": (channels, size, size),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": (wanted["mean"],) * channels,
        "std": (wanted["std"],) * channels,
        "label_names": list(class_names(name)),
        "license": "apache-2.0",
    }
    return timm.create_model(
        wanted["name"],
        num_classes=wanted["num_classes"],
        in_chans=channels,
        pretrained_cfg_overlay=config,
        **wanted["arguments"],
    )


def load(name: str, folder: Path | None = None) -> Any:
    """A trained classifier in float32 and eval mode from `folder`; the shipped one if None."""
    import timm

    import attnzoo.backbones  # noqa: F401

    check_choice("name", name, NAMES)
    folder = training.trained_folder(name, folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def save(model: Any, recipe: dict[str, Any], folder: Path) -> None:
    """Write the model in half precision as timm's local-dir: config.json and model.safetensors."""
    import copy

    from timm.models import save_for_hf

    kept = ("tag", "input_size", "interpolation", "crop_pct", "mean", "std", "label_names", "license")
    config = {
        "architecture": recipe["model"]["name"],
        "num_classes": recipe["model"]["num_classes"],
        "num_features": model.num_features,
        "pretrained_cfg": {key: model.pretrained_cfg[key] for key in kept},
    }
    arguments = {**recipe["model"]["arguments"], "in_chans": recipe["model"]["in_chans"]}
    save_for_hf(
        copy.deepcopy(model).half(), str(folder), model_config=config, model_args=arguments, safe_serialization=True
    )


# --------------------------------------------------------------------------------------------------------------- inputs


def to_tensor(model: Any, pictures: np.ndarray | Tensor, size: int | None = None) -> Tensor:
    """Pictures of one size as a classifier takes them: float32 [N, channels, H, W], normalised.

    pictures: uint8, [N, H, W, 3], one colour picture [H, W, 3], or grey ones [N, H, W]. Colours are averaged for a
    model of one channel, grey is repeated for one of three. size: resizes to size x size, bilinearly; None leaves them.
    Raises TypeError for pictures of another dtype and ValueError for another shape.
    """
    batch = torch.from_numpy(np.array(pictures)) if isinstance(pictures, np.ndarray) else pictures
    if batch.dtype != torch.uint8:
        raise TypeError(f"pictures must be uint8, got {str(batch.dtype).removeprefix('torch.')}")
    if batch.ndim == 3:
        batch = batch[None] if batch.shape[-1] == 3 else batch[..., None]
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3):
        raise ValueError(f"pictures must be [N, H, W, 3], [H, W, 3] or [N, H, W], got {tuple(pictures.shape)}")
    config = model.pretrained_cfg
    scaled = batch.permute(0, 3, 1, 2).float() / 255
    scaled = scaled.mean(1, keepdim=True) if config["input_size"][0] == 1 else scaled.expand(-1, 3, -1, -1)
    if size is not None and scaled.shape[-2:] != (size, size):
        scaled = F.interpolate(scaled, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (scaled - mean) / std


@torch.inference_mode()
def predict(model: Any, pictures: np.ndarray | Tensor | Sequence[Any], batch_size: int = 250) -> Tensor:
    """Probabilities, float32 [N, classes], of pictures resized to the model's input size.

    pictures: as `to_tensor` takes them, or a list of PIL images or uint8 arrays [H, W, 3] or [H, W] of any sizes.
    dinat_digits reads light strokes on dark ground. Raises ValueError for an empty list; see `to_tensor` for the rest.
    """
    size, device = model.pretrained_cfg["input_size"][-1], next(model.parameters()).device
    if isinstance(pictures, (np.ndarray, Tensor)):
        inputs = to_tensor(model, pictures, size)
    elif len(pictures):
        arrays = [np.asarray(p.convert("RGB") if isinstance(p, Image.Image) else p) for p in pictures]
        inputs = torch.cat([to_tensor(model, a if a.ndim == 3 else a[None], size) for a in arrays])
    else:
        raise ValueError("pictures must hold at least one picture, got none")
    parts = [model(part.to(device)).float().softmax(-1).cpu() for part in inputs.split(batch_size)]
    return torch.cat(parts)


def classify(
    images: Sequence[Any], topk: int = 5, name: str = "dinat_world", model: Any = None
) -> list[list[tuple[str, float]]]:
    """For each image its `topk` (class name, probability), likeliest first.

    images: paths, PIL images or uint8 arrays. name: which classifier; model: it, already loaded.
    Raises ReachError for a path that is no picture.
    """
    opened = [_open(image) if isinstance(image, (str, Path)) else image for image in images]
    model = load(name) if model is None else model
    names = class_names(name)
    values, indices = predict(model, opened).topk(min(topk, len(names)))
    return [[(names[i], p) for i, p in zip(row_i, row_p)] for row_i, row_p in zip(indices.tolist(), values.tolist())]


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ReachError(f"image {str(path)!r} can't be opened as a picture: {error}") from error


# ----------------------------------------------------------------------------------------------------------------- data


def world_batch(rng: np.random.Generator, n: int, data: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, S, S, 3], labels int64 [n]) of single-object scenes of one size S, drawn at random."""
    if rng.random() < data["placed"]:
        difficulty = "plain" if rng.random() < 0.5 else "mixed"
        scenes = [world.placed_scene(rng, 32, 1, difficulty)[0] for _ in range(n)]
    else:
        size = int(rng.choice(data["sizes"]))
        scenes = [world.sample_scene(rng, "single", size) for _ in range(n)]
    return np.stack([s.image for s in scenes]), np.array([s.objects[0].label for s in scenes])


def held_out_world(split: str, n: int, seed: int, kind: str = "single") -> tuple[list[np.ndarray], np.ndarray]:
    """(pictures, labels) of `n` held-out single-object scenes, the classes in equal numbers.

    kind: "single", the recipe's sizes in turn; "hard", the same at that difficulty; "placed", as the generator's, 32
    pixels.
    """
    kinds = ("single", "hard", "placed")
    check_choice("kind", kind, kinds)
    sizes = training.read_recipe("dinat_world")["data"]["sizes"]
    rng = training.generator(split, seed, 10 + kinds.index(kind))
    labels = [i % len(world.CLASSES) for i in range(n)]
    if kind == "placed":
        scenes = [world.placed_scene(rng, 32, prompt=world.write_prompt([label]))[0] for label in labels]
    else:
        difficulty = "hard" if kind == "hard" else "mixed"
        scenes = [world.sample_scene(rng, "single", sizes[i % len(sizes)], difficulty, k) for i, k in enumerate(labels)]
    return [s.image for s in scenes], np.array(labels)


def digits_split(data: dict[str, Any] | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "validation", "test"} -> (uint8 [n, 8, 8], labels) of scikit-learn's digits, stratified.

    data: the recipe's [data]; the shipped recipe's if None. "test" is the held-out third; "validation" is empty unless
    the recipe sets part of the rest aside.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = training.read_recipe("dinat_digits")["data"] if data is None else data
    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
    indices = np.arange(len(pixels))
    options = {"random_state": data["split_seed"]}
    kept, test = train_test_split(indices, test_size=data["held_out"], stratify=digits.target, **options)
    valid = kept[:0]
    if data["validation_share"]:
        kept, valid = train_test_split(
            kept, test_size=data["validation_share"], stratify=digits.target[kept], **options
        )
    parts = {"train": kept, "validation": valid, "test": test}
    return {part: (pixels[chosen], digits.target[chosen].astype(np.int64)) for part, chosen in parts.items()}


def held_out_digits() -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, 8, 8], labels [n]) of the third of scikit-learn's digits that the shipped classifier never saw."""
    return digits_split()["test"]


def _jitter(x: Tensor, stage: dict[str, Any]) -> Tensor:
    """Random rotation, zoom, shear, shift and noise of each image; draws from torch's global generator."""
    n = len(x)
    angle = (torch.rand(n) * 2 - 1) * math.radians(stage["rotation"])
    zoom = 1 + (torch.rand(n) * 2 - 1) * stage["zoom"]
    shear = (torch.rand(n) * 2 - 1) * stage["shear"]
    shift = (torch.rand(n, 2) * 2 - 1) * 2 * stage["shift"]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack([cos, shear - sin, shift[:, 0], sin, cos, shift[:, 1]], -1).view(n, 2, 3).to(x.device)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return moved + stage["noise"] * torch.randn_like(moved)


# ---------------------------------------------------------------------------------------------------- recipes


def train(
    name: str,
    out: str | Path,
    seed: int = 0,
    device: str = "cpu",
    steps: int | None = None,
    progress: bool = True,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train "dinat_world" or "dinat_digits" by its recipe and write it to the folder `out`; returns what training.json
    says.

    steps: cuts the training to this many steps, for a trial. recipe: replaces configs/recipes/`name`.toml.
    """
    check_choice("name", name, NAMES)
    recipe = training.capped(training.read_recipe(name) if recipe is None else recipe, steps)
    folder, clock = Path(out), training.Clock()
    folder.mkdir(parents=True, exist_ok=True)
    stage, size, rng = recipe["train"], recipe["model"]["image_size"], training.generator("train", seed)
    if name == "dinat_world":
        held: Any
        held, truth = held_out_world("validation", recipe["validation"]["scenes"], seed)
    else:
        parts = digits_split(recipe["data"])
        held, truth = parts["validation"]
        pixels, labels = (torch.from_numpy(x) for x in parts["train"])
    validated: dict[int, float] = {}

    def batch() -> tuple[Tensor, Tensor]:
        if name == "dinat_world":
            drawn, target = world_batch(rng, stage["batch"], recipe["data"])
            if rng.random() < 0.5:
                drawn = drawn[:, :, ::-1]
            return to_tensor(model, drawn, size), torch.from_numpy(target)
        chosen = torch.from_numpy(rng.integers(0, len(pixels), stage["batch"]))
        return _jitter(to_tensor(model, pixels[chosen], size), stage), labels[chosen]

    with training.seeded(seed, device):
        model = build(name, recipe).to(device).train()

        def loss(_: int) -> Tensor:
            inputs, target = batch()
            return F.cross_entropy(
                model(inputs.to(device)), target.to(device), label_smoothing=stage["label_smoothing"]
            )

        def every(step: int) -> None:
            if not len(held) or (step % recipe["validation"]["every"] and step != stage["steps"]):
                return
            model.eval()
            validated[step] = float(correct(model, held, truth).mean())
            model.train()
            if progress:
                training.say(f"validation after {step} steps: top-1 {validated[step]:.4f} of {len(truth)}")

        training.fit(model.parameters(), loss, stage, recipe["optimizer"], name, progress, every)
    model.eval()
    save(model.cpu(), recipe, folder)
    report = clock.report(seed, steps, device) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": {str(step): value for step, value in validated.items()},
    }
    training.write_json(folder / "training.json", report)
    return report


def correct(model: Any, pictures: Any, labels: np.ndarray) -> np.ndarray:
    """bool [N]: where the likeliest class is the right one."""
    return predict(model, pictures).argmax(-1).numpy() == labels
