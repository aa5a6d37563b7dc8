"""The generator room's block-sparse methods: the goldens' names translated here, the library computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.generators.sparge import block_scales, delta_lists, select_blocks


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """See tests/goldens.py."""
    return {"sparge_block_select": _sparge}[meta["system"]](meta, tensors, backend or "auto")


def _sparge(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    config = meta["config"]
    query, key = tensors["in.q"], tensors["in.k"]
    options: dict[str, Any] = {
        name: torch.tensor(config[name]) if isinstance(config[name], list) else config[name]
        for name in ("simthreshd1", "cdfthreshd", "topk", "is_causal", "attention_sink")
    }
    options |= {"block_size": (config["BLKQ"], config["BLKK"]), "compat": "official"}
    found = select_blocks(query, key, **options)
    fused = select_blocks(query, key, smooth_k=True, **options)
    lut, counts = delta_lists(found.mask)
    return {
        "out.block_map": found.mask,
        "out.lut": lut,
        "out.valid_block_num": counts,
        "out.q_pool": found.query_pool,
        "out.k_pool": found.key_pool,
        "out.q_selfsim": found.query_similar,
        "out.k_selfsim": found.key_similar,
        "out.fused_block_map": fused.mask,
        "out.k_mean": fused.key_mean,
        "out.q_scale": block_scales(query, config["BLKQ"]),
        "out.k_scale": block_scales(key, config["BLKK"], fused.key_mean),
    }
