"""The families of backbones as data for the model matrix: one small configuration each, built through timm.

FAMILIES[name] = (entry point, keyword arguments that make it small, image size (height, width), other sizes).
Other sizes: a list of (height, width) that the same model takes as well, or a string: the words of the error that says
which sizes work. The entry point stands for all of its family; `test_backbones_matrix.py` does the rest.
"""

from __future__ import annotations

from typing import Any

Family = tuple[str, dict[str, Any], tuple[int, int], "list[tuple[int, int]] | str"]

_NAT = {
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "kernel_size": 3,
    "mlp_ratio": 2.0,
    "dilations": ((1, 2), (1,)),
}
_ISO = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 40, "patch_size": 8}
_CARE = {
    "depths": (1, 1, 2, 1),
    "feat_dims": (6, 9, 12, 12),
    "mem_dims": (2, 3, 4, 4),
    "ratios": ((2, 2),) * 4,
    "att_head_dim": (1, 1, 2, 4),
}
_FLOW = {"img_size": 32, "embed_dim": (8, 16), "depth": (1, 2), "mlp_ratio": (2, 2), "num_heads": 2}

FAMILIES: dict[str, Family] = {
    "nat": ("nat_mini", _NAT, (32, 32), [(45, 61), (27, 25)]),
    "dinat": ("dinat_mini", _NAT, (32, 32), [(45, 61), (27, 25)]),
    "dinat_s": ("dinat_s_tiny", _NAT, (32, 32), [(45, 61), (27, 25)]),
    "nat_isotropic": ("nat_isotropic_small", {**_ISO, "kernel_size": 3}, (40, 40), "img_size 40 x 40"),
    "vitrpb": ("vitrpb_small", _ISO, (40, 40), "img_size 40 x 40"),
    "care": ("caretrans_s0", _CARE, (64, 64), [(45, 61), (32, 99)]),
    "flowformer": ("flowformer_cv", _FLOW, (32, 32), "img_size 32 x 32"),
}
