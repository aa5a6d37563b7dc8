"""The adapter's part for sigmoid attention and FLARE: names translated, the layers are attnzoo's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backbones import (
    FlareAttention,
    FlareModel,
    RootMeanSquareNorm,
    SigmoidAttention,
    SigmoidCrossAttention,
    sigmoid_block,
)
from attnzoo.kernels.dispatch import use_backend

_NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": partial(RootMeanSquareNorm, compat="official")}


def _attention_options(config: dict[str, Any]) -> dict[str, Any]:
    """The authors' keywords as ours."""
    if config.pop("attn_activ_fn", "torch.sigmoid") != "torch.sigmoid":
        raise KeyError("attn_activ_fn: only torch.sigmoid is sigmoid attention")
    config.pop("masking_fn", None)
    logits, qk, bias = (
        config.pop("attn_logits_transform", None),
        config.pop("qk_transform", None),
        config.pop("bias", False),
    )
    config["positions"] = "alibi" if logits else "rope" if qk else None
    config["attn_temp"] = config.get("attn_temp") or 0.0
    config["attn_bias"] = config.get("attn_bias") or 0.0
    return {**config, "qkv_bias": bias, "proj_bias": bias}


def _sigmoid(variant: str, config: dict[str, Any]) -> nn.Module:
    if variant == "rmsnorm_bug":
        return RootMeanSquareNorm(config["normalized_shape"], config["eps"], compat="official")
    if variant != "transformer_block":
        options = _attention_options(config)
        return (SigmoidCrossAttention if "kv_dim" in options else SigmoidAttention)(**options)
    block = {k: config.pop(k) for k in ("mlp_hidden", "mlp_bias") if k in config}
    norm, scaled = _NORMS[config.pop("norm", "LayerNorm")], config.pop("layer_scale", False)
    dim, num_heads = config.pop("dim"), config.pop("num_heads")
    options = {"norm_layer": nn.LayerNorm, **_attention_options(config)}
    bias = options.pop("attn_bias")
    return sigmoid_block(
        dim, num_heads, attn_bias=bias, attn_options=options, norm_layer=norm, init_values=scaled and 1e-4, **block
    )


def _flare(variant: str, config: dict[str, Any]) -> nn.Module:
    config = {"dim" if k == "channel_dim" else k: v for k, v in config.items()}
    norm = nn.RMSNorm if config.pop("rmsnorm", False) else nn.LayerNorm
    config["act"] = config.get("act") or "gelu"
    if variant == "flare_mixer":
        if config.get("num_heads", 0) is None:
            config["num_heads"] = config["dim"] // 8
        return FlareAttention(**config, norm_layer=norm)
    options = {k: config.pop(k) for k in _OF_ATTENTION if k in config}
    return FlareModel(**config, norm_layer=norm, attn_options=options)


_OF_ATTENTION = (
    "attn_scale",
    "num_latents",
    "qk_norm",
    "num_layers_k_proj",
    "num_layers_v_proj",
    "k_proj_mlp_ratio",
    "v_proj_mlp_ratio",
)
_TAPS = {"block0": "blocks.0"}


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """The outputs of one case, the weights it looks at, and the outputs of the modules it names as intermediates."""
    build: Callable[..., nn.Module] = {"sigmoid_attention": _sigmoid, "flare": _flare}[meta["system"]]
    given = [tensors[name] for name in meta["inputs"]]
    model = build(meta["variant"], dict(meta["config"])).to(given[0].dtype).eval()
    model.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    got: dict[str, Any] = {}
    named = dict(model.named_modules())
    taps = {f"inter.{name}": _TAPS.get(name, name) for name in meta.get("intermediates") or {}}
    if "mlp_output" in meta["outputs"]:
        taps["mlp_output"] = "mlp"
    for name, path in taps.items():
        if path in named:
            named[path].register_forward_hook(lambda _m, _i, out, name=name: got.update({name: out}))
    if "attn_times_v" in meta["outputs"]:
        named["proj"].register_forward_pre_hook(lambda _m, inputs: got.update({"attn_times_v": inputs[0]}))
    with torch.no_grad(), use_backend(backend or "auto"):
        if "attn_matrix" in meta["outputs"]:
            got["attn_matrix"] = model.attention_weights(*given)
        got["output"] = model(*given)
    return got
