"""CARVE (arXiv 2509.06461; code YuyaoGe/CARVE, no licence): look at what the question adds, cut it out, ask again.

The model is asked twice, with the question and with a general instruction; where its last row looks more for the
question than for the instruction is kept of the picture, the rest is blackened and cut away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice, check_range, check_tensor
from attnzoo.vlm.asking import open_picture, prepare
from attnzoo.vlm.checkpoints import carried, published
from attnzoo.vlm.checks import as_layers, as_number
from attnzoo.vlm.edits import Probe, Reading
from attnzoo.vlm.session import edit

GENERAL = "Write a general description of the image."
SUFFIX = "Answer the question using a single word or phrase."
STEPS = ("all", "first", "even")
STRATEGIES = ("attention_sum", "size", "remove_small")


def contrast_map(
    query_maps: Tensor, general_maps: Tensor, grid: tuple[int, int], size: tuple[int, int], lam: float = 1e-8,
    steps: str = "all",
) -> np.ndarray:  # fmt: skip
    """Where the question looks more than the general instruction: float64 [height, width].

    query_maps, general_maps: [steps, layers, P], the head mean of each answer token's row over P image tokens, which
    lie on `grid` (rows, columns). size: the picture's (width, height). Per step and layer A_q / (A_g + lam), resized
    bilinearly; summed over layers, and over steps with weight t + 1 ("all"), 1 ("even") or of the first alone.
    """
    check_choice("steps", steps, STEPS)
    check_tensor("query_maps", query_maps, 3)
    check_tensor("general_maps", general_maps, 3)
    count = 1 if steps == "first" else min(len(query_maps), len(general_maps))
    if query_maps.shape[1:] != general_maps.shape[1:] or query_maps.shape[2] != grid[0] * grid[1]:
        raise ValueError(
            f"query_maps and general_maps must be [steps, layers, {grid[0] * grid[1]}] of the same layers, got "
            f"{tuple(query_maps.shape)} and {tuple(general_maps.shape)}"
        )
    total = np.zeros((size[1], size[0]), dtype=np.float64)
    for step in range(count):
        contrast = query_maps[step] / (general_maps[step] + lam)
        for layer in contrast.reshape(-1, *grid).cpu().numpy().astype(np.float32):
            resized = np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
            total += resized * (step + 1 if steps == "all" else 1)
    return total


def attention_regions(
    attention: np.ndarray,
    top_percent: float = 0.2,
    min_keep_regions: int = 3,
    strategy: str = "attention_sum",
    outlier_percent: float = 0.1,
) -> np.ndarray:
    """uint8 [height, width], 1 where the picture is kept.

    Pixels from the (1 - top_percent) percentile on fall into connected regions (4 neighbours); kept are the
    max(min_keep_regions, int(top_percent * regions)) with the largest sum of attention ("attention_sum") or size
    ("size"), or all that are no smaller than outlier_percent percent of the kept pixels ("remove_small").
    """
    from scipy import ndimage

    check_choice("strategy", strategy, STRATEGIES)
    check_range("top_percent", top_percent, 0.0, 1.0)
    check_range("min_keep_regions", min_keep_regions, 1)
    kept = (attention >= np.percentile(attention, (1.0 - top_percent) * 100)).astype(np.uint8)
    regions, count = ndimage.label(kept)
    labels = np.arange(1, count + 1)
    sizes = np.asarray(ndimage.sum(kept, regions, labels))
    if strategy == "remove_small":
        chosen = labels[sizes >= int(int(kept.sum()) * outlier_percent / 100)]
    else:
        scores = sizes if strategy == "size" else np.asarray(ndimage.sum(attention, regions, labels))
        chosen = labels[np.argsort(-scores, kind="stable")][: max(min_keep_regions, int(count * top_percent))]
    return np.isin(regions, chosen).astype(np.uint8)


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what a mask [height, width] keeps, ends exclusive; everything where it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cut_out(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with all else black, cut to the mask's box and enlarged until one side is the picture's again."""
    box = bounding_box(mask)
    cut = Image.fromarray(np.asarray(image) * mask[..., None]).crop(box)
    scale = max(image.width / cut.width, image.height / cut.height)
    return cut.resize((int(cut.width * scale), int(cut.height * scale)), Image.Resampling.LANCZOS)


@dataclass(frozen=True, eq=False)
class Carved:
    """What `carve` found: both answers, the contrast over the picture, what was kept of it and the picture cut out."""

    answer: str
    first_answer: str
    attention: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]
    image: Image.Image


def carve(
    model: Any,
    processor: Any,
    image: Any,
    question: str,
    layers: object = None,
    lam: float = 1e-8,
    top_percent: float = 0.2,
    min_keep_regions: int = 3,
    steps: str = "all",
    strategy: str = "attention_sum",
    max_new_tokens: int = 32,
    general: str = GENERAL,
    suffix: str = SUFFIX,
    grid: tuple[int, int] | None = None,
    compat: str | None = None,
) -> Carved:
    """Ask about a picture, find what the question looks at, and ask again about that part alone.

    model, processor: loaded. image: a PIL image or a path. layers: None: the authors' 20 .. 25 of 32, elsewhere at the
    same share of the depth. steps and strategy: "all" and "attention_sum" are the code's version v4 ("first" with
    "remove_small", "size", "attention_sum": v1 to v3). suffix stands behind question and instruction, as in the code;
    "" leaves it out. grid: (rows, columns) of the image tokens; None: from the processor's image_grid_thw, else square.
    top_percent: 1 keeps the whole picture, which changes nothing in the default mode.
    compat: "official" shows the original and the cut-out picture in the last question, as the code does; the default
    shows the cut-out one alone, as the paper's algorithm says.

    Other differences from the authors' code: attention is read while decoding with a cache, one row per layer and step
    (theirs recomputes everything with all matrices for each token); image tokens are found by the model's own id
    (theirs: LLaVA's 576, fixed). One picture at a time. Needs scipy (the extra "vlm").

    Raises TypeError or ValueError for wrong arguments; UnsupportedError where the image tokens lie on no known grid, or
    a sliding layer has let go of them.
    """
    check_choice("compat", compat, (None, "official"))
    lam = as_number("lam", lam, 0.0)
    text = model.config.get_text_config()
    depth = text.num_hidden_layers
    first, last = published(text).get("carve", {}).get("layers", (carried(20, depth), carried(25, depth)))
    chosen = as_layers(layers, depth, first, last + 1)
    picture = open_picture(image)

    def asked(pictures: Sequence[Image.Image], words: str, probe: bool) -> tuple[str, Tensor | None, Any]:
        inputs = prepare(processor, list(pictures), f"{words} {suffix}".strip()).to(model.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(model.dtype)
        arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        readings: list[Reading] = []
        with torch.inference_mode():
            if probe:
                with edit(model, Probe(chosen, readings.append, what="head_mean")) as session:
                    tokens = session.generate(**inputs, **arguments)
            else:
                tokens = model.generate(**inputs, **arguments)
        answer = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        maps = _maps(readings, len(chosen)) if probe else None
        return answer.strip(), maps, inputs

    first_answer, query_maps, inputs = asked([picture], question, True)
    _, general_maps, _ = asked([picture], general, True)
    assert query_maps is not None and general_maps is not None
    grid = _grid(model, inputs, query_maps.shape[2]) if grid is None else grid
    attention = contrast_map(query_maps, general_maps, grid, picture.size, lam, steps)
    mask = attention_regions(attention, top_percent, min_keep_regions, strategy)
    cut = cut_out(picture, mask)
    shown = [picture, cut] if compat == "official" else [cut]
    answer, _, _ = asked(shown, question, False)
    return Carved(answer, first_answer, attention, mask, bounding_box(mask), cut)


def _maps(readings: list[Reading], layers: int) -> Tensor:
    """[steps, layers, P] from the readings of one answer, layer by layer and step by step."""
    rows = []
    for reading in readings:
        places = reading.image[0].nonzero().squeeze(1) - reading.first_key
        if not len(places) or int(places.min()) < 0:
            raise UnsupportedError(
                f"layer {reading.layer} no longer holds all image tokens: choose layers= without a sliding window"
            )
        rows.append(reading.value[0, -1, places.to(reading.value.device)].float())
    return torch.stack(rows).unflatten(0, (-1, layers))


def _grid(model: Any, inputs: Any, count: int) -> tuple[int, int]:
    if "image_grid_thw" in inputs:
        merge = getattr(model.config.vision_config, "spatial_merge_size", 1)
        _, rows, columns = (int(n) for n in inputs["image_grid_thw"][0])
        return rows // merge, columns // merge
    side = math.isqrt(count)
    if side * side != count:
        raise UnsupportedError(f"{count} image tokens lie on no square: give grid=(rows, columns)")
    return side, side
