"""MedViTV2's part of the goldens adapter: names translated, the models are attnzoo's."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import load_pretrained
from torch import Tensor, nn, no_grad

from attnzoo.backbones import MedViTV2, NeighborhoodAttention2D
from attnzoo.backbones.blocks.fasterkan import FasterKAN
from attnzoo.backbones.blocks.medvit import GlobalBlock, LocalBlock
from attnzoo.backbones.medvitv2 import checkpoint_filter_fn
from attnzoo.kernels.dispatch import use_backend

_OURS = {"path_dropout": "drop_path_rate", "drop": "proj_drop_rate", "attn_drop": "attn_drop_rate"}


def _build(variant: str, config: dict[str, Any], names: set[str]) -> nn.Module:
    if variant == "model":
        given = {_OURS.get(k, k): v for k, v in {"dims": (64, 128, 320, 512), **config}.items()}
        return MedViTV2(**given, compat="official")
    if variant == "fasterkan":
        return FasterKAN(**config)
    if variant == "dina_bruteforce":
        given = {k: v for k, v in config.items() if k not in ("bias", "qkv_bias")}
        return NeighborhoodAttention2D(**given, rel_pos_bias="rpb" in names, qkv_bias="qkv.bias" in names)
    block = LocalBlock if variant == "lfp_dina_block" else GlobalBlock
    return block(**config, compat="official")


def _paths(variant: str, model: nn.Module) -> dict[str, str]:
    """Intermediates -> the modules whose outputs they are."""
    if isinstance(model, MedViTV2):
        return {"stem": "stem", "block0": "features.0", "feat_last": f"features.{len(model.features) - 1}"}
    blocks = ("patch_embed", "attn", "conv") if variant == "lfp_dina_block" else ("e_mhsa", "mhca", "kan")
    named = {"fasterkan": {"rbf0": "layers.0.rbf"}, "dina_bruteforce": {"qkv": "qkv"}}
    return named.get(variant) or {name: name for name in blocks}


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """One case: the output, and what the modules that it names compute on the way."""
    x = tensors["input"]
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    model = _build(meta["variant"], meta["config"], set(state)).to(x.dtype).eval()
    model.load_state_dict(state, strict=True)
    got: dict[str, Any] = {}
    shapes = meta.get("intermediates") or {}
    for name, path in _paths(meta["variant"], model).items():
        if name in shapes:
            model.get_submodule(path).register_forward_hook(
                lambda _m, _i, out, name=name: got.update({name: out.reshape(shapes[name])})
            )
    with no_grad(), use_backend(backend or "auto"):
        got["output"] = model(x)
    return got


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """`entrypoint` (the authors' MedViT_tiny is our medvitv2_tiny) with a published checkpoint's tensors, strictly."""
    name = entrypoint.lower().replace("medvit", "medvitv2")
    model = timm.create_model(name, num_classes=len(state["proj_head.0.weight"]), device="meta").to_empty(device="cpu")
    cfg = {**model.pretrained_cfg, "state_dict": state, "num_classes": model.num_classes}
    load_pretrained(model, cfg, num_classes=model.num_classes, filter_fn=checkpoint_filter_fn)
    return model
