"""TransNeXt's part of the goldens adapter: names translated, layers and models are attnzoo's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from goldens_backbones import load_published as load_backbone
from torch import Tensor, nn

from attnzoo.backbones import AggregatedAttention, CosineAttention, TransNeXt
from attnzoo.kernels.dispatch import use_backend

_MODEL = (
    "img_size", "pretrain_size", "window_size", "patch_size", "in_chans", "num_classes", "embed_dims", "num_heads",
    "mlp_ratios", "qkv_bias", "depths", "sr_ratios", "fixed_pool_size",
)  # fmt: skip


def _model(config: dict[str, Any]) -> nn.Module:
    given = {k: config[k] for k in _MODEL if k in config}
    norm = str(config.get("norm_layer", "LayerNorm"))
    eps = float(norm.partition("eps=")[2].rstrip(")") or 1e-5)
    return TransNeXt(**given, norm_layer=partial(nn.LayerNorm, eps=eps))


def _layer(config: dict[str, Any], variant: str) -> nn.Module:
    size = (config["H"], config["W"])
    pretrain = (config.get("cpb_args") or {}).get("pretrain_size")
    shared = {"qkv_bias": config.get("qkv_bias", True), "pretrain_size": tuple(pretrain) if pretrain else size}
    if variant == "cosine_attn":
        return CosineAttention(config["dim"], config["num_heads"], **shared)
    pooled = config.get("fixed_pool_size")
    names = [name for name in ("window_size", "sr_ratio") if name in config]
    own = {name: config[name] for name in names}
    return AggregatedAttention(config["dim"], config["num_heads"], **own, fixed_pool_size=pooled, **shared)


def _keep(got: dict[str, Any], name: str, _module: nn.Module, _inputs: Any, out: Tensor) -> None:
    got[name] = out.flatten(1, 2) if out.ndim == 4 else out


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """The output of one case, and the modules that it names as intermediates where they are tokens."""
    x, config = tensors["input"], meta["config"]
    is_model = meta["variant"] == "transnext"
    model = (_model(config) if is_model else _layer(config, meta["variant"])).to(x.dtype).eval()
    model.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    got: dict[str, Any] = {}
    for name, path in (meta.get("intermediates_meaning") or {}).items():
        if path != "kv":  # also called on the pooled view
            model.get_submodule(path).register_forward_hook(partial(_keep, got, name))
    with torch.no_grad(), use_backend(backend or "auto"):
        if is_model:
            got["output"] = model(x)
        else:
            for module in model.modules():
                if isinstance(module, AggregatedAttention) and backend is not None:
                    module.fused = True
            got["output"] = model(x.unflatten(1, (config["H"], config["W"]))).flatten(1, 2)
    return got


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """`entrypoint` by timm, "NAME@384" being the model fine-tuned at 384."""
    return load_backbone(system, entrypoint.replace("@", "_"), state)
