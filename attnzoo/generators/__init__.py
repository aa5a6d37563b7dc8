"""Attention methods as switches inside diffusers: `enable(pipe, "gna", kernel_size=...)` and `handle.disable()`.

The only room that imports diffusers. See docs/generators.md.
"""

from attnzoo.generators.adapters import FAMILIES
from attnzoo.generators.generation import generate, load_pipeline
from attnzoo.generators.handles import METHODS, Handle, enable
from attnzoo.generators.head_hunter import Hunt, head_hunter
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.ms_diffusion import GroundingResampler
from attnzoo.generators.paro import ParoTables, calibrate_paro
from attnzoo.generators.planning import plan
from attnzoo.generators.processors import processor
from attnzoo.generators.seer import SeerGate, SeerGates
from attnzoo.generators.stya2k import AllToKeyAttention, StyleTransform
from attnzoo.generators.window import density, window_mask

__all__ = [
    "FAMILIES",
    "AllToKeyAttention",
    "GroundingResampler",
    "StyleTransform",
    "METHODS",
    "Handle",
    "Hunt",
    "ParoTables",
    "SeerGate",
    "SeerGates",
    "StepContext",
    "TokenLayout",
    "calibrate_paro",
    "density",
    "enable",
    "generate",
    "head_hunter",
    "load_pipeline",
    "plan",
    "processor",
    "window_mask",
]
