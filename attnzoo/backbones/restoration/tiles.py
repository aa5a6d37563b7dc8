"""Images of any size through an image-to-image model, tile by tile, in memory that the tile bounds.

Tiles of one size overlap; the last of an axis is moved inward. At an edge inside the image a tile's outer `margin`
pixels are left out, and over what remains of the overlap one tile fades into the next. So where `margin` is at least
what an output pixel can see (`model.reach()`), the result is that of the whole image but for rounding; where it is
less, seams are blended. Models that take means over the image (HAT's channel attention, A2N's weights of branches)
see all of it: in a tile they see the tile, as in the authors' own tile modes, and results differ a little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from attnzoo.backbones.restoration.contract import pad_reflect
from attnzoo.errors import check_range, check_tensor, per_axis

Picture = TypeVar("Picture", Tensor, Image.Image)
_AXES = ("height", "width")


def restore(
    model: nn.Module,
    image: Picture,
    tile: int | tuple[int, int] | None = None,
    overlap: int | tuple[int, int] | None = None,
    *,
    margin: int | None = None,
    progress: bool = True,
) -> Picture:
    """The enlarged (or cleaned) image.

    Args:
        model: a `Restorer`, compiled or not. It runs in eval mode and is as it was afterwards.
        image: a float tensor [C, H, W] or [B, C, H, W] with values 0 to 1, whatever range the model was trained on, or
            a PIL image. Tiles alone are moved to the model's device and dtype: an image may stay on the CPU.
        tile: input pixels that the model sees at once, one int or (height, width): multiples of `model.multiple`. None:
            the whole image. With tiles, images of a batch go one after the other.
        overlap: input pixels that neighbouring tiles share: multiples of `model.multiple` below `tile`. None: 64, or
            half a tile where that is less.
        margin: input pixels at a tile's inner edges that are left out, at most half the overlap. None: the model's
            reach where the overlap holds it twice, else a quarter of the overlap.
        progress: show a bar.

    Returns the kind of image that was given, on its device, `model.upscale` times its size. Tensors keep their dtype
    and are not clamped to 0 to 1; PIL images are.
    Raises TypeError or ValueError naming the argument, before the model runs.
    """
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "upscale", None), int):
        raise TypeError(f"model must be a Restorer (a module with upscale and multiple), got {type(model).__name__}")
    if not isinstance(image, Image.Image):
        return _restore(model, image, tile, overlap, margin, progress)
    channels = getattr(model, "in_chans", 3)
    if channels not in (1, 3):
        raise ValueError(f"image must be a tensor for a model of {channels} channels, got a PIL image")
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    given = torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)
    out = _restore(model, given, tile, overlap, margin, progress)
    array = (out.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if channels == 1 else array)


@torch.no_grad()
def _restore(model: Any, image: Tensor, tile: Any, overlap: Any, margin: int | None, progress: bool) -> Tensor:
    """`restore` of a tensor."""
    upscale, multiple, channels = model.upscale, getattr(model, "multiple", 1), getattr(model, "in_chans", 3)
    check_tensor("image", image)
    if image.ndim not in (3, 4) or image.shape[-3] != channels or not all(image.shape):
        raise ValueError(f"image must be [{channels}, H, W] or [B, {channels}, H, W], got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point with values 0 to 1, got {image.dtype}")
    plans = _plans(model, image.shape[-2:], tile, overlap, margin)
    images = image if image.ndim == 4 else image[None]
    like = next(model.parameters(), images)
    white = float(getattr(model, "value_range", 1.0))
    dtype = torch.promote_types(image.dtype, torch.float32)

    def run(part: Tensor) -> Tensor:
        part = part.to(device=like.device, dtype=like.dtype) * white
        return (model(part) / white).to(device=image.device, dtype=dtype)

    height, width = (length * upscale for length in image.shape[-2:])
    with _evaluating(model):
        if plans is None:
            with _bar(1, progress) as bar:
                out = run(images)
                bar.update()
        else:
            padded = pad_reflect(images, multiple)
            out = torch.zeros(len(images), channels, height, width, dtype=dtype, device=image.device)
            (rows, row_tile), (columns, column_tile) = plans
            with _bar(len(images) * len(rows) * len(columns), progress) as bar:
                for i, (top, down), (left, across) in product(range(len(images)), rows, columns):
                    part = run(padded[i : i + 1, :, top : top + row_tile, left : left + column_tile])
                    place = out[i, :, top * upscale :, left * upscale :][:, : len(down), : len(across)]
                    weight = down[: place.shape[1], None] * across[None, : place.shape[2]]
                    place += part[0, :, : place.shape[1], : place.shape[2]] * weight.to(device=out.device, dtype=dtype)
                    bar.update()
    out = out.to(image.dtype)
    return out if image.ndim == 4 else out[0]


Plan = tuple[list[tuple[int, Tensor]], int]


def _plans(model: Any, size: Any, tile: Any, overlap: Any, margin: int | None) -> tuple[Plan, Plan] | None:
    """Per axis the tiles' first pixels and weights, and their length; None for the whole image at once."""
    multiple = getattr(model, "multiple", 1)
    if tile is None:
        for name, value in (("overlap", overlap), ("margin", margin)):
            if value is not None:
                raise ValueError(f"{name} must come with a tile, got {name}={value!r} and tile=None")
        return None
    tiles = per_axis("tile", tile, 2, low=1)
    if overlap is None:
        overlap = tuple(min(64, t // 2) // multiple * multiple for t in tiles)
    overlaps = per_axis("overlap", overlap, 2, low=0)
    for name, values in (("tile", tiles), ("overlap", overlaps)):
        if any(value % multiple for value in values):
            raise ValueError(f"{name} must be a multiple of the model's window, {multiple}, got {values}")
    for axis, extent, shared in zip(_AXES, tiles, overlaps):
        if shared >= extent:
            raise ValueError(f"overlap must be below tile={extent} in {axis}, got {shared}")
    if margin is not None:
        if type(margin) is not int:
            raise TypeError(f"margin must be an int, got {type(margin).__name__}")
        check_range("margin", margin, 0, min(overlaps) // 2)
    reach = model.reach() if margin is None and hasattr(model, "reach") else None
    plans = []
    for length, extent, shared in zip(size, tiles, overlaps):
        left_out = margin if margin is not None else shared // 4 if reach is None or 2 * reach > shared else reach
        plans.append(_plan(length + -length % multiple, extent, shared, left_out, model.upscale))
    return plans[0], plans[1]


def _plan(length: int, tile: int, overlap: int, margin: int, upscale: int) -> Plan:
    """Tiles of one axis: (first pixel, weight of each output pixel), the weights of a pixel adding up to one."""
    if tile >= length:
        return [(0, torch.ones(length * upscale, dtype=torch.float64))], length
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    at = torch.arange(tile * upscale, dtype=torch.float64) + 0.5
    fade = (overlap - 2 * margin) * upscale
    total = torch.zeros(length * upscale, dtype=torch.float64)
    tiles = []
    for start in starts:
        inside = torch.full_like(at, torch.inf)  # output pixels from the nearest inner edge's margin
        if start > 0:
            inside = torch.minimum(inside, at - margin * upscale)
        if start < length - tile:
            inside = torch.minimum(inside, at.flip(0) - margin * upscale)
        weight = (inside / fade).clamp(0, 1) if fade else (inside > 0).double()
        total[start * upscale : (start + tile) * upscale] += weight
        tiles.append((start, weight))
    return [(s, w / total[s * upscale : (s + tile) * upscale]) for s, w in tiles], tile


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, desc="restore", unit="tile", disable=not progress)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again outside."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
