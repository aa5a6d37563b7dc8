"""The image-to-image models by name: `create("hat_x4")`, `list_models("a2n*")`."""

from __future__ import annotations

import difflib
import fnmatch
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnzoo.backbones.restoration.contract import Restorer
from attnzoo.backbones.weights import load_published


@dataclass(frozen=True)
class Entry:
    """One published model.

    cls, arguments: how it is built. method: its row in the catalogue. files: the authors' checkpoint files that fit.
    params: the published count, where there is one. notes: what the authors report of it, not measured here.
    """

    cls: type[Restorer]
    arguments: dict[str, Any]
    method: str
    files: tuple[str, ...] = ()
    params: int | None = None
    notes: tuple[str, ...] = ()
    cfg: dict[str, Any] = field(default_factory=dict)


ENTRIES: dict[str, Entry] = {}


def register(name: str, entry: Entry) -> None:
    """Add a name; one that is there is a ValueError."""
    if name in ENTRIES:
        raise ValueError(f"name {name!r} is registered already")
    ENTRIES[name] = entry


def list_models(pattern: str = "*") -> list[str]:
    """Names of the image-to-image models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(ENTRIES, pattern))


def create(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Restorer:
    """The model `name`, in training mode as timm's come.

    Args:
        name: one of `list_models()`.
        checkpoint: a file of the authors' with its weights, see `attnzoo.backbones.load_published`.
        device, dtype: of its parameters.
        kwargs: arguments of its class in place of the published ones.

    Raises ValueError for another name (with the nearest), and what the class and `load_published` raise.
    """
    if name not in ENTRIES:
        near = difflib.get_close_matches(str(name), ENTRIES, n=3, cutoff=0.4) or sorted(ENTRIES)
        raise ValueError(f"name must be one of restoration.list_models(), got {name!r}; close: {', '.join(near)}")
    entry = ENTRIES[name]
    with torch.device(device) if device is not None else nullcontext():
        model = entry.cls(**{**entry.arguments, **kwargs})
    model = model.to(dtype=dtype)
    model.pretrained_cfg = {"architecture": name, "files": entry.files, "notes": entry.notes, **entry.cfg}
    if checkpoint is not None:
        load_published(model, checkpoint)
    return model
