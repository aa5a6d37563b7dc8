"""attnzoo: attention methods as timm models, diffusers switches and transformers edits.

Importing registers the backbones' names with timm, where timm is installed, and those of CLIP models with open_clip,
if and when open_clip is imported; it does nothing else.
`attnzoo.generators` and `attnzoo.vlm` load when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = ("backbones", "catalog", "configs", "errors", "generators", "kernels", "miniatures", "vlm")

try:
    from attnzoo import backbones  # noqa: F401  registers names with timm
except ModuleNotFoundError as missing:  # the other rooms do without timm and what it needs
    if (missing.name or "").split(".")[0] not in ("timm", "torchvision"):
        raise


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"attnzoo.{name}")
    raise AttributeError(f"module 'attnzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
