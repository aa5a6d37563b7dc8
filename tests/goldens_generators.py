"""The generator room's side of the goldens adapter: names are translated here, the library computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.backbones.blocks.mixture_of_heads import MoHAttention
from attnzoo.generators import window_mask
from attnzoo.kernels import edited_attention, neighborhood_attention
from attnzoo.kernels.edited_attention import Visibility


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """See tests/goldens.py."""
    return {"gna": _gna, "moh_dit": _moh_dit}[meta["system"]](meta, tensors, backend or "auto")


def _moh_dit(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    config, x = meta["config"], tensors["in.x"]
    sizes = {name: config[name] for name in ("dim", "num_heads", "shared_head", "routed_head", "head_dim", "qk_norm")}
    layer = MoHAttention(**sizes, qkv_bias="w.qkv.bias" in tensors).to(x.dtype)
    layer.load_state_dict({n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")}, strict=True)
    return {"out.out": layer(x), "out.load_balance_loss": layer.balance_loss(x)}


def _gna(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    config = meta["config"]
    names = ("kernel_size", "stride", "dilation", "is_causal")
    window = {name: tuple(config[name]) for name in names if name in config}
    scale = config.get("scale")
    scale = scale if isinstance(scale, (int, float)) else None  # "head_dim**-0.5" is the default
    query, key, value = (tensors[f"in.{name}"] for name in ("query", "key", "value"))
    out, lse = neighborhood_attention(query, key, value, **window, scale=scale, return_lse=True, backend=backend)
    found = {"out.mask": window_mask(config["token_layout"], **window), "out.na_out": out, "out.na_lse": lse}
    if "in.additional_keys" not in tensors:
        return found
    extra_key, extra_value = tensors["in.additional_keys"], tensors["in.additional_values"]
    found["out.merged_out"], found["out.merged_lse"] = neighborhood_attention(
        query,
        key,
        value,
        **window,
        scale=scale,
        additional_keys=extra_key,
        additional_values=extra_value,
        return_lse=True,
        backend=backend,
    )
    found["out.additional_out"], found["out.additional_lse"] = edited_attention(
        query.flatten(1, -3), extra_key, extra_value, Visibility(is_causal=False), scale, return_lse=True
    )
    return found
