"""The adapter's part for families that timm has itself: the models and layers are timm's, the authors' files go in."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from timm.models.shvit import SHSA
from torch import Tensor, nn

from attnzoo.backbones.timm_families import load_official_shvit
from attnzoo.kernels.dispatch import use_backend

_MODELS = {
    ("davit", "model"): "davit_tiny",
    ("davit", "official_model"): "davit_tiny",
    ("shvit", "model"): "shvit_s1",
    ("shvit", "official_model"): "shvit_s1",
    ("mambaout", "model"): "mambaout_femto",
    ("mambaout", "model_rw_small"): "mambaout_small_rw",
    ("maxvit", "maxvit_tf"): "maxvit_tiny_tf_224",
    ("maxvit", "maxvit_rw"): "maxvit_tiny_rw_224",
    ("maxvit", "maxvit_rmlp"): "maxvit_rmlp_pico_rw_256",
}
_LAYERS = {"halo_attn": HaloAttn, "channel_attention": ChannelAttention, "shsa": SHSA}


def _halonet(config: dict[str, Any]) -> nn.Module:
    def block(entry: Any) -> Any:
        return [block(e) for e in entry] if isinstance(entry, list) else ByoBlockCfg(**entry)

    names = {field.name for field in dataclasses.fields(ByoModelCfg)}
    model_cfg = {k: v for k, v in config.items() if k in names and k != "blocks"}
    rest = {k: v for k, v in config.items() if k not in names}
    return ByobNet(ByoModelCfg(blocks=tuple(block(b) for b in config["blocks"]), **model_cfg), **rest)


def _build(meta: dict[str, Any]) -> nn.Module:
    system, variant, config = meta["system"], meta["variant"], meta["config"]
    if variant == "channel_attention_v2":
        return ChannelAttentionV2(**config)
    if variant in _LAYERS:
        return _LAYERS[variant](**config)
    if system == "halonet":
        return _halonet(config)
    entry = re.search(r"create_model\('(\w+)'", meta.get("source", ""))
    name = entry[1] if entry else _MODELS[system, variant]
    return timm.create_model(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})


def _load(model: nn.Module, state: dict[str, Tensor], system: str) -> None:
    if system == "shvit":
        load_official_shvit(model, state)
    elif system == "davit" and "patch_embeds.0.proj.weight" in state:
        model.load_state_dict(importlib.import_module("timm.models.davit").checkpoint_filter_fn(state, model))
    else:
        model.load_state_dict(state)


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """The output of one case, by timm's own model or layer in the input's dtype."""
    model = _build(meta).to(tensors["input"].dtype).eval()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    _load(model, state, meta["system"])
    with torch.no_grad(), use_backend(backend or "auto"):
        return {"output": model(tensors["input"])}


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """timm's model of that name ("DaViT-T (official)" is davit_tiny), the published tensors in it, strictly."""
    name, _, layout = entrypoint.partition(" (")
    if layout.startswith("official") and system == "davit":
        name = "davit_" + {"T": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge", "G": "giant"}[name[-1]]
    model = timm.create_model(name)
    _load(model, state, system)
    return model
