"""Attention methods as switches inside diffusers: `enable(pipe, "gna", kernel_size=...)` and `handle.disable()`.

The only room that imports diffusers. See docs/generators.md.
"""

from attnzoo.generators.adapters import FAMILIES
from attnzoo.generators.generation import generate, load_pipeline
from attnzoo.generators.handles import METHODS, Handle, enable
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.paro import ParoTables, calibrate_paro
from attnzoo.generators.planning import plan
from attnzoo.generators.seer import SeerGate, SeerGates
from attnzoo.generators.window import density, window_mask

__all__ = [
    "FAMILIES",
    "METHODS",
    "Handle",
    "ParoTables",
    "SeerGate",
    "SeerGates",
    "StepContext",
    "TokenLayout",
    "calibrate_paro",
    "density",
    "enable",
    "generate",
    "load_pipeline",
    "plan",
    "window_mask",
]
