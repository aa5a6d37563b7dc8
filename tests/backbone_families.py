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
_VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": (32, 40), "patch_size": 8, "mlp_ratio": 2.0}
_PVT = {"embed_dims": (8, 16), "depths": (2, 1), "num_heads": (2, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "mlp_ratio": 2.0}
_CSWIN = {**_SWIN, "split_size": (2, 2)}
_AGENT = {"img_size": (48, 32), "agent_num": (4, 9)}
# Two stages: each random KAN multiplies rounding errors several times over (float32 against float64 too).
_MEDVIT = {"stem_chs": (8, 4, 8), "depths": (1, 1, 0, 0), "dims": (8, 36, 36, 36), "head_dim": 4, "pad_small": True}
_SHIFTADD = {"embed_dims": (8, 16), "depths": (2, 1), "num_heads": (2, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}

FAMILIES: dict[str, Family] = {
    "nat": ("nat_mini", _NAT, (32, 32), [(45, 61), (27, 25)]),
    "dinat": ("dinat_mini", _NAT, (32, 32), [(45, 61), (27, 25)]),
    "dinat_s": ("dinat_s_tiny", _NAT, (32, 32), [(45, 61), (27, 25)]),
    "nat_isotropic": ("nat_isotropic_small", {**_ISO, "kernel_size": 3}, (40, 40), "img_size 40 x 40"),
    "vitrpb": ("vitrpb_small", _ISO, (40, 40), "img_size 40 x 40"),
    "agent_deit": ("agent_deit_tiny", {**_VIT, "agent_num": (4, 4, 4, 4)}, (32, 40), "set_input_size"),
    "agent_pvt": (
        "agent_pvt_tiny",
        {**_PVT, **_AGENT, "attn_type": "AB", "agent_sr_ratios": "21"},
        (48, 32),
        "set_input",
    ),
    "agent_swin": ("agent_swin_tiny", {**_SWIN, **_AGENT, "attn_type": "AM1"}, (48, 32), "set_input_size"),
    "agent_cswin": (
        "agent_cswin_tiny",
        {**_CSWIN, **_AGENT, "attn_type": "MA1", "la_split_size": (2, None)},
        (48, 32),
        "set_input_size",
    ),
    "inline_deit": ("inline_deit_tiny", _VIT, (32, 40), "set_input_size"),
    "inline_pvt": (
        "inline_pvt_tiny",
        {**_PVT, "img_size": 32, "attn_type": "IS", "la_sr_ratios": "11"},
        (48, 32),
        [(45, 61)],
    ),
    "inline_swin": ("inline_swin_tiny", {**_SWIN, "img_size": 32, "attn_type": "IM1"}, (48, 32), [(45, 61), (96, 64)]),
    "inline_cswin": (
        "inline_cswin_tiny",
        {**_CSWIN, "img_size": 32, "attn_type": "MI1", "la_split_size": (None, None)},
        (48, 32),
        [(45, 61), (27, 25)],
    ),
    "medvitv2": ("medvitv2_tiny", {**_MEDVIT, "compat": "official"}, (64, 64), [(45, 61), (96, 64)]),
    "medvitv2_default": ("medvitv2_tiny", {**_MEDVIT, "compat": "default"}, (64, 64), [(45, 61), (96, 64)]),
    "shiftadd_hash": ("shiftadd_pvt_v2_b0", _SHIFTADD, (64, 64), [(45, 61), (96, 64)]),
    # Hash and mixture apart: in bfloat16 a few tokens go to the other expert, and untrained experts differ entirely.
    "shiftadd_moe": ("shiftadd_pvt_v2_b0_moe", {**_SHIFTADD, "attn_type": "sra"}, (64, 64), [(45, 61), (96, 64)]),
    "shiftadd_binary": (
        "shiftadd_pvt_v2_b0",
        {**_SHIFTADD, "attn_type": "LinAngular_binary", "sparse_reg": True},
        (64, 64),
        [(45, 61), (96, 64)],
    ),
}
