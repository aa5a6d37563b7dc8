"""The backbones' part of the goldens adapter: names translated, the models are attnzoo's."""

from __future__ import annotations

import importlib
from typing import Any

import timm
import torch
from torch import Tensor, nn

from attnzoo.kernels.dispatch import use_backend

_OURS = {"qk_scale": "scale", "drop_rate": "proj_drop_rate"}


def _dinat(meta: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from attnzoo.backbones import NAT, DiNAT, DiNAT_s, NATIsotropic

    config = {_OURS.get(k, k): v for k, v in meta["config"].items() if k not in ("class", "layer")}
    if meta["config"].get("layer") == "VisionTransformerLayer":
        config["attn"] = "global"
    classes = {"NAT": NAT, "DiNAT": DiNAT, "DiNAT_s": DiNAT_s, "NATIsotropic": NATIsotropic}
    return classes[meta["config"]["class"]](**config).to(dtype)


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """The logits of one case, and the outputs of the modules that it names as intermediates."""
    model = _dinat(meta, tensors["input"].dtype).eval()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    model.load_state_dict(state, strict=True)
    got: dict[str, Any] = {}
    for name, path in (meta.get("intermediates_meaning") or {}).items():
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, name=name: got.update({name: out}))
    with torch.no_grad(), use_backend(backend or "auto"):
        got["output"] = model(tensors["input"])
    return got


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """`entrypoint` by timm, with a published checkpoint's tensors in it, by timm's own strict path."""
    import attnzoo  # noqa: F401  registers the names

    num_classes = state["head.weight"].shape[0]
    model = timm.create_model(entrypoint, num_classes=num_classes, device="meta").to_empty(device="cpu")
    family = importlib.import_module(type(model).__module__)
    cfg = {**model.pretrained_cfg, "state_dict": state, "num_classes": num_classes}
    timm.models.load_pretrained(model, cfg, num_classes=num_classes, filter_fn=family.checkpoint_filter_fn)
    return model
