"""The floor: one function per attention operation, on CPU and GPU, with one meaning whichever back end serves it.

    neighborhood_attention   1-D, 2-D, 3-D sliding windows (na1d, na2d, na3d: NATTEN's names); neighborhood_logits
    edited_attention         attention whose softmax is edited for some rows
    merge_attentions         partial results joined by their lse
    BACKENDS, use_backend, not_supported_reasons   which back end serves a call, and why another can't

torch is needed, triton only by the back end of that name.
"""

from __future__ import annotations

import importlib
from typing import Any

from attnzoo.kernels.dispatch import BACKENDS, not_supported_reasons, use_backend
from attnzoo.kernels.merge import merge_attentions
from attnzoo.kernels.neighborhood_attention import na1d, na2d, na3d, neighborhood_attention, neighborhood_logits

_LAZY = {"edited_attention": "edited_attention", "grouped_attention": "edited_attention"}

__all__ = [
    "BACKENDS",
    "edited_attention",
    "grouped_attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_logits",
    "not_supported_reasons",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"attnzoo.kernels.{_LAZY[name]}"), name)
        globals()[name] = value  # importing the package of the same name bound the module here
        return value
    raise AttributeError(f"module 'attnzoo.kernels' has no attribute {name!r}")
