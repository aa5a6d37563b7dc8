"""The generator room's side of the goldens adapter: names are translated here, the library computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.backbones.blocks.mixture_of_heads import MoHAttention
from attnzoo.generators import window_mask
from attnzoo.generators.stya2k import AllToKeyAttention, StyleTransform
from attnzoo.kernels import edited_attention, neighborhood_attention
from attnzoo.kernels.edited_attention import Visibility


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """See tests/goldens.py."""
    return {"gna": _gna, "moh_dit": _moh_dit, "stya2k": _stya2k}[meta["system"]](meta, tensors, backend or "auto")


def _moh_dit(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    config, x = meta["config"], tensors["in.x"]
    sizes = {name: config[name] for name in ("dim", "num_heads", "shared_head", "routed_head", "head_dim", "qk_norm")}
    layer = MoHAttention(**sizes, qkv_bias="w.qkv.bias" in tensors).to(x.dtype)
    layer.load_state_dict({n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")}, strict=True)
    return {"out.out": layer(x), "out.load_balance_loss": layer.balance_loss(x)}


def _stya2k(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    config = meta["config"]
    state = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    if meta["variant"] == "transform":
        whole = StyleTransform(config["in_planes"])
        names = ("content4", "style4", "content5", "style5")
    else:
        whole = AllToKeyAttention(config["in_planes"], config["region"], config["head"])
        names = ("content", "style")
    whole.to(tensors[names[0]].dtype).load_state_dict(state, strict=True)
    inputs = [tensors[name] for name in names]
    got: dict[str, Any] = {}
    if meta["variant"] == "transform":
        for level in ("4", "5"):
            layer = getattr(whole, f"attn_adain_{level}_1")
            layer.register_forward_hook(lambda _m, _i, out, level=level: got.update({f"inter.feats{level}": out}))
    else:
        for name, layer in (("distributed", whole.fusion1), ("progressive", whole.fusion2)):
            layer.register_forward_pre_hook(lambda _m, given, name=name: got.update({f"inter.{name}": given[0]}))
    return {**got, "output": whole(*inputs)}


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
