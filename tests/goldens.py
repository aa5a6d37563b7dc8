"""The one adapter between the authors' numbers and this library (shared/DESIGN.md, section 6).

Names are translated here and in the `goldens_<room>.py` beside it; the mathematics is the library's.
`shared/tools/check_goldens.py` loads this file, and so do our tests.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.kernels import dispatch

_MODULES = {
    "goldens_kernels": ("natten",),
    "goldens_backbones": ("dinat",),
    "goldens_hosts": (
        "agent_attention",
        "inline_attention",
        "moh",
    ),
    "goldens_vsa": ("vsa",),
    "goldens_transnext": ("transnext",),
    "goldens_timm": (
        "maxvit",
        "davit",
        "halonet",
        "shvit",
        "mambaout",
    ),
    "goldens_fan": (
        "fan",
        "tapadl",
    ),
    "goldens_linear": (
        "care",
        "flowformer",
    ),
    "goldens_sigmoid": (
        "sigmoid_attention",
        "flare",
    ),
    "goldens_shiftadd": ("shiftadd",),
    "goldens_medvit": ("medvitv2",),
    "goldens_blocks": (
        "triplet_attention",
        "ulsam",
        "psa",
        "efficient_attention",
        "efficient_probing",
        "sparsifiner",
        "dependencyvit_thirdparty",
        "msa_conv",
    ),
    "goldens_restoration": (
        "hat",
        "a2n",
    ),
    "goldens_generators": (
        "gna",
        "moh_dit",
        "stya2k",
    ),
    "goldens_layout": (
        "ms_diffusion",
        "conform",
        "attention_regulation",
        "bounded_attention",
    ),
    "goldens_editing": (
        "aligned_gen",
        "freecus",
        "ditctrl",
        "rf_solver",
    ),
    "goldens_sharing": (
        "pag",
        "tgate",
        "pab_schedule",
        "style_aligned",
    ),
    "goldens_sparse": (
        "sparge_block_select",
        "seer_attention",
        "freeswim",
        "agent_attention_sd",
        "video_infinity",
    ),
    "goldens_vlm": (
        "var",
        "pai",
        "gift",
        "paint",
        "pasta",
        "zerotuning",
        "act",
        "vif",
        "mma",
        "carve",
    ),
    "goldens_vlm_loops": (
        "opera",
        "vcd",
    ),
    "goldens_vlm_scorers": (
        "chair",
        "pope",
    ),
}
# Variants (file stems without number) or files (system/stem) that are not run in float64, and why.
FLOAT32_ONLY: dict[str, str] = {
    "rf_solver/case2": "diffusers' Flux embeds the timestep in float32 whatever is asked, and the authors' numbers are "
    "1.1e-5 off both our float32 and our float64 ones; which rounding it is was not found",
    "moh_vit": "the authors' float32 output of moh_vit_1 is 8.7e-6 (max_abs_vs_fp64) off their own float64 one",
}
_HERE = Path(__file__).resolve().parent
SYSTEMS = {
    system: module for module, systems in _MODULES.items() if (_HERE / f"{module}.py").exists() for system in systems
}


def root() -> Path | None:
    """Where the goldens lie: $ATTNZOO_GOLDENS, else ../shared/goldens beside the checkout, else None."""
    named = os.environ.get("ATTNZOO_GOLDENS")
    places = [Path(named)] if named else [Path(__file__).resolve().parents[2] / "shared" / "goldens"]
    return next((p for p in places if p.is_dir()), None)


def _room(system: str) -> Any:
    if system not in SYSTEMS:
        raise KeyError(f"no adapter for the system {system!r}; there are {sorted(SYSTEMS)}")
    return importlib.import_module(SYSTEMS[system])


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """The expected values of one case, computed by attnzoo's public functions.

    meta: the case's json plus "system" and "variant". tensors: every tensor that is not an expected value; their
    dtype is the computation's. backend: a kernel back end, None for the default; "triton" computes on the GPU where
    there is one, and else needs TRITON_INTERPRET=1.
    """
    if backend == "triton" and torch.cuda.is_available() and not dispatch.interpreting():
        tensors = {name: tensor.cuda() for name, tensor in tensors.items()}
    return _room(meta["system"]).run(meta, tensors, backend)


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """The timm model that `entrypoint` published, with the authors' parameters in it, loaded strictly."""
    return _room(system).load_published(system, entrypoint, state)
