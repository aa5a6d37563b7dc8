"""The generator miniature: load it, train it, measure it.

A text-conditional joint-attention transformer (diffusers' own SD3Transformer2DModel, 4 layers of width 128, 256 image
tokens at 32 x 32 pixels) with a two-layer CLIP text encoder, in a pipeline of diffusers' calling convention:
`attnzoo.miniatures.generator_pipeline`. How it was trained: `attnzoo.miniatures.generator_recipe` and
configs/recipes/generator.toml.

    pipe = attnzoo.miniatures.load("generator")
    pipe("a red circle left of a blue square", generator=torch.Generator().manual_seed(0)).images[0]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnzoo.errors import ReachError, check_range
from attnzoo.miniatures import training, world

#: Pictures that `evaluate` draws of each class, and of two objects; and how many it draws at a time.
PER_CLASS, PAIRS, BATCH = 20, 240, 24
_PAIRS, _SEEDS, _DRAWN, _SHEET = 1, 2, 3, 4  # purposes of random streams


def load(path: str | Path | None = None) -> Any:
    """The pipeline in the folder `path` (the shipped one if None), in float32 and eval mode on the CPU.

    Raises ReachError where the folder holds no pipeline.
    """
    from attnzoo.miniatures.generator_pipeline import pipeline_class

    folder = training.WEIGHTS / "generator" if path is None else Path(path)
    if not (folder / "model_index.json").is_file():
        raise ReachError(
            f"folder {str(folder)!r} holds no model_index.json; `attnzoo train miniature generator` makes it"
        )
    pipe = pipeline_class().from_pretrained(str(folder), local_files_only=True)
    pipe.transformer.eval()
    pipe.text_encoder.eval()
    return pipe


def save(pipe: Any, folder: str | Path) -> None:
    """Write `pipe` in half precision (safetensors) to `folder`, for `load` or its class's `from_pretrained`."""
    import copy

    half = type(pipe)(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    for part in (half.transformer, half.text_encoder):
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.half() if tensor.is_floating_point() else tensor.data
    half.save_pretrained(str(folder))


def train(
    out: str | Path, seed: int = 0, device: str = "cpu", steps: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Train by configs/recipes/generator.toml and write the pipeline to the folder `out`; what training.json says.

    Goes on from `out`/checkpoint.pt where an interrupted training of the same recipe and seed left one.
    steps: cuts both stages to this many steps, for a trial. Raises ValueError for fewer than one.
    """
    from attnzoo.miniatures import generator_recipe

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pipe, report = generator_recipe.train(folder, seed, device, steps, progress)
    save(pipe.to("cpu"), folder)
    training.write_json(folder / "training.json", report)
    (folder / generator_recipe.CHECKPOINT).unlink(missing_ok=True)
    return report


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> np.ndarray:
    """uint8 [len(prompts), 32, 32, 3]: a picture of each prompt from its own seed; `options` go to the pipeline."""
    made = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        noise = [torch.Generator().manual_seed(s) for s in seeds[part]]
        made.append(pipe(list(prompts[part]), generator=noise, output_type="np", **options).images)
    return np.round(255 * np.concatenate(made)).astype(np.uint8)


def evaluate(
    pipe: Any,
    judge: Any = None,
    per_class: int = PER_CLASS,
    pairs: int = PAIRS,
    seed: int = 0,
    split: str = "test",
    **options: Any,
) -> dict[str, Any]:
    """What the pipeline draws, judged: arrays of bool under "single", "single_colour", "pair_colours", "pair_control".

    single [24 * per_class]: the classifier `judge` (the shipped "dinat_world" if None) names the one object as asked;
    single_colour: at least its colour. pair_colours [pairs]: of two objects, each half of the picture (left and right,
    or upper and lower) holds more pixels of the colour asked for there than of any other (`halves_match`; where both
    objects have one colour, both halves must hold it). pair_control: the same rule on scenes that the world drew.
    split, seed: the stream of noise and of pairs, "test" for figures that are reported. options: to the pipeline.
    Raises ValueError for counts below 1.
    """
    from attnzoo.miniatures import classifiers

    check_range("per_class", per_class, 1)
    check_range("pairs", pairs, 1)
    judge = classifiers.load("dinat_world") if judge is None else judge
    asked = np.repeat(np.arange(len(world.CLASSES)), per_class)
    seeds = training.generator(split, seed, _SEEDS).integers(0, 2**62, len(asked) + pairs).tolist()
    pictures = draw(pipe, [world.write_prompt([label]) for label in asked.tolist()], seeds[: len(asked)], **options)
    said = classifiers.predict(judge, pictures).argmax(-1).numpy()
    shapes = len(world.SHAPES)

    rng = training.generator(split, seed, _PAIRS)
    prompts = [
        world.write_prompt(rng.permutation(len(world.CLASSES))[:2].tolist(), world.RELATIONS[i % 2])
        for i in range(pairs)
    ]
    two = draw(pipe, prompts, seeds[len(asked) :], **options)
    scenes = training.generator(split, seed, _DRAWN)
    control = [world.placed_scene(scenes, two.shape[1], prompt=prompt)[0].image for prompt in prompts]
    return {
        "asked": asked,
        "said": said,
        "single": said == asked,
        "single_colour": said // shapes == asked // shapes,
        "pair_colours": np.array([halves_match(image, prompt) for image, prompt in zip(two, prompts)]),
        "pair_control": np.array([halves_match(image, prompt) for image, prompt in zip(control, prompts)]),
    }


def halves_match(image: np.ndarray, prompt: str, distance: float = 40.0, least: int = 20) -> bool:
    """Whether each half of `image` (uint8 [S, S, 3]) holds mostly the colour that `prompt` puts there.

    A pixel has the world's colour that it is nearest to, if nearer than `distance` (Euclidean, grey levels); a half
    needs `least` such pixels.
    """
    labels, relation = world.read_prompt(prompt)
    half = image.shape[0] // 2
    parts = (image[:, :half], image[:, half:]) if relation == "left of" else (image[:half], image[half:])
    palette = np.array(list(world.COLOURS.values()), np.float64)
    for part, label in zip(parts, labels):
        gaps = np.linalg.norm(part.reshape(-1, 1, 3) - palette, axis=-1)
        counts = np.bincount(gaps.argmin(-1)[gaps.min(-1) < distance], minlength=len(palette))
        if counts.max() < least or counts.argmax() != label // len(world.SHAPES):
            return False
    return True


def measure(folder: str | Path | None = None, seed: int = 0, scale: float = 1.0) -> list[dict[str, Any]]:
    """The figures' rows (see `attnzoo.miniatures.figures`) of the pipeline in `folder`, on test noise of `seed`."""
    from attnzoo.miniatures.figures import share

    pipe = load(folder)
    pipe.set_progress_bar_config(disable=True)
    result = evaluate(pipe, None, max(1, round(scale * PER_CLASS)), max(2, round(scale * PAIRS)), seed)
    bar = training.read_recipe("generator")["bars"]["recognised"]
    figures = (
        ("single", "one object: recognised as what was asked for", bar),
        ("single_colour", "one object: its colour recognised", None),
        ("pair_colours", "two objects: the asked colours in the right halves", None),
        ("pair_control", "two objects: the same rule on scenes that the world drew", None),
    )
    rows = [share("generator", words, int(result[key].sum()), len(result[key]), low=low) for key, words, low in figures]
    for number, shape in enumerate(world.SHAPES):
        right = result["single"][result["asked"] % len(world.SHAPES) == number]
        rows.append(share("generator", f"one object, a {shape}: recognised", int(right.sum()), len(right)))
    return rows


def contact_sheet(pipe: Any, seed: int = 0, cell: int = 64) -> Image.Image:
    """Twelve pictures a row, each from the next seed: every class once (two rows), then 24 random pairs of objects.

    cell: pixels a picture is enlarged to, without smoothing.
    """
    rng = training.generator("test", seed, _SHEET)
    prompts = [world.write_prompt([label]) for label in range(len(world.CLASSES))]
    for i in range(24):
        prompts.append(world.write_prompt(rng.permutation(len(world.CLASSES))[:2].tolist(), world.RELATIONS[i // 12]))
    pictures = draw(pipe, prompts, range(len(prompts)))
    rows = [np.concatenate(list(pictures[start : start + 12]), axis=1) for start in range(0, len(prompts), 12)]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((12 * cell, len(rows) * cell), Image.Resampling.NEAREST)


def __getattr__(name: str) -> Any:
    if name == "MiniatureGeneratorPipeline":
        from attnzoo.miniatures.generator_pipeline import pipeline_class

        return pipeline_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
