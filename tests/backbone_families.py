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

_VITAE = {
    "dims": (8, 16),
    "stem_dims": 8,
    "depths": (1, 2),
    "num_heads": 2,
    "reduction_heads": (2, 4),
    "strides": (4, 2),
    "kernel_size": (7, 3),
    "dilations": ((1, 2), (1,)),
    "groups": (1, 4),
    "reduction_groups": (1, 4),
    "mlp_ratio": 2.0,
    "window_size": 3,
}

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
    "vitae_vsa": ("vitaev2_vsa_small", _VITAE, (48, 64), [(45, 61), (27, 17), (8, 8)]),
    "vsa_swin": (
        "vsa_swin_tiny",
        {**_SWIN, "img_size": 32, "window_size": 3, "attn_type": "VM1"},
        (48, 32),
        [(45, 61), (7, 96)],
    ),
}
