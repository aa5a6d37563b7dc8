"""Training-free edits of attention for transformers' vision-language models; see docs/vlm.md.

with attnzoo.vlm.edit(model, "var"):
    model.generate(**inputs)
"""

from __future__ import annotations

from attnzoo.vlm.asking import ask
from attnzoo.vlm.bottleneck import bottleneck
from attnzoo.vlm.carving import carve
from attnzoo.vlm.contrast import ICD_INSTRUCTION, Icd, PaiGuidance, Vcd
from attnzoo.vlm.decoding import DECODINGS, Dola, Opera
from attnzoo.vlm.edits import Edit, HeadScale, KeyBias, LogitMap, Mask, Probe, Reading, Regroup, Spread
from attnzoo.vlm.image_tokens import FAMILIES, image_positions
from attnzoo.vlm.methods import METHODS
from attnzoo.vlm.session import Session, edit

__all__ = [
    "DECODINGS",
    "FAMILIES",
    "ICD_INSTRUCTION",
    "METHODS",
    "Dola",
    "Edit",
    "HeadScale",
    "Icd",
    "KeyBias",
    "LogitMap",
    "Opera",
    "PaiGuidance",
    "Mask",
    "Probe",
    "Reading",
    "Regroup",
    "Session",
    "Vcd",
    "Spread",
    "ask",
    "bottleneck",
    "carve",
    "edit",
    "image_positions",
]
