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
_FAN = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
_TOKENS = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 40, "patch_size": 8}
_SPARSE = {"coef_topk": 2, "reduce_n_factor": 4}
_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)}
_CARE = {
    "depths": (1, 1, 2, 1),
    "feat_dims": (6, 9, 12, 12),
    "mem_dims": (2, 3, 4, 4),
    "ratios": ((2, 2),) * 4,
    "att_head_dim": (1, 1, 2, 4),
}
_FLOW = {"img_size": 32, "embed_dim": (8, 16), "depth": (1, 2), "mlp_ratio": (2, 2), "num_heads": 2}
# Two stages: each random KAN multiplies rounding errors several times over (float32 against float64 too).
_MEDVIT = {"stem_chs": (8, 4, 8), "depths": (1, 1, 0, 0), "dims": (8, 36, 36, 36), "head_dim": 4, "pad_small": True}
_SHIFTADD = {"embed_dims": (8, 16), "depths": (2, 1), "num_heads": (2, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}

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
    "maxvit_cells": (
        "maxvit_tiny_tf_512_attnzoo",
        {
            "img_size": 64,
            "embed_dim": (8, 16),
            "depths": (1, 1),
            "stem_width": 8,
            "head_hidden_size": 16,
            "transformer_dim_head": 4,
        },
        (64, 64),
        "windows of 2 x 2 do not divide",
    ),
    "transnext": (
        "transnext_micro",
        {"img_size": 64, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 2, 1)},
        (64, 64),
        [(45, 61), (27, 25), (96, 64)],
    ),
    "fan": ("fan_tiny_12_p16_224", _FAN, (32, 32), [(45, 61), (27, 25)]),
    "fan_hybrid": (
        "fan_tiny_8_p4_hybrid",
        {**_FAN, "hybrid_depths": (1, 1), "hybrid_dims": (8, 12)},
        (48, 32),
        [(45, 61), (27, 25)],
    ),
    "tap_fan": ("tap_fan_tiny_12_p16_224", {**_FAN, "num_scales": 3}, (32, 48), [(45, 61), (27, 25)]),
    "fan_swin": (
        "fan_swin_tiny_patch4_window7_224",
        {"img_size": 64, "embed_dim": 8, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4},
        (64, 64),
        "img_size 64 x 64",
    ),
    "tap_rvt": (
        "tap_rvt_base_plus",
        {"base_dims": (8, 8), "heads": (1, 2), "depths": (2, 1), "masked_blocks": 1, "mask_grid": (4, 4)},
        (64, 64),
        [(45, 61), (27, 25), (96, 64)],
    ),
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
    "moh_transnext": (
        "moh_transnext_small_75",
        {
            "embed_dims": (8, 16),
            "depths": (1, 2),
            "num_heads": (2, 4),
            "mlp_ratios": (2, 2),
            "sr_ratios": (2, 1),
            "window_size": (3, None),
            "img_size": 32,
            "shared_head": (2, 1),
            "routed_head": (0, 2),
        },
        (32, 40),
        [(45, 61)],
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
    "sparsifiner": (
        "sparsifiner_tiny_patch16_224",
        {**_TOKENS, "prune_blocks": (1,), "token_keep_rate": 0.6, "settings": _SPARSE},
        (40, 40),
        "img_size 40 x 40",
    ),
    "dependencyvit": (
        "dependencyvit_lite_tiny_patch16_224",
        {**_TOKENS, "prune_blocks": (2,), "prune_ratio": 0.3, "dynamic_img_size": True, "dynamic_img_pad": True},
        (40, 40),
        [(45, 61), (27, 25)],
    ),
    "resnet_triplet": ("resnet18_triplet", _RESNET, (64, 64), [(45, 61), (33, 70)]),
    "care": ("caretrans_s0", _CARE, (64, 64), [(45, 61), (32, 99)]),
    "flowformer": ("flowformer_cv", _FLOW, (32, 32), "img_size 32 x 32"),
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
    "vitae_vsa": ("vitaev2_vsa_small", _VITAE, (48, 64), [(45, 61), (27, 17), (8, 8)]),
    "vsa_swin": (
        "vsa_swin_tiny",
        {**_SWIN, "img_size": 32, "window_size": 3, "attn_type": "VM1"},
        (48, 32),
        [(45, 61), (7, 96)],
    ),
}
