"""Training-free edits of attention for transformers' vision-language models; see docs/vlm.md.

with attnzoo.vlm.edit(model, "var"):
    model.generate(**inputs)
"""

from __future__ import annotations

from attnzoo.vlm.asking import ask
from attnzoo.vlm.bottleneck import bottleneck
from attnzoo.vlm.carving import carve
from attnzoo.vlm.edits import Edit, HeadScale, KeyBias, LogitMap, Mask, Probe, Reading, Regroup, Spread
from attnzoo.vlm.image_tokens import FAMILIES, image_positions
from attnzoo.vlm.session import METHODS, Session, edit

__all__ = [
    "FAMILIES",
    "METHODS",
    "Edit",
    "HeadScale",
    "KeyBias",
    "LogitMap",
    "Mask",
    "Probe",
    "Reading",
    "Regroup",
    "Session",
    "Spread",
    "ask",
    "bottleneck",
    "carve",
    "edit",
    "image_positions",
]
