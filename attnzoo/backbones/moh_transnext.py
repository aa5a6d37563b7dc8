"""MoH-ViT: TransNeXt whose attention heads are mixed per token.

Paper: "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin et al., 2024, https://arxiv.org/abs/2410.11842
Code: https://github.com/SkyworkAI/MoH (MoH-ViT/), Apache-2.0; written here from the formulas. The gates are in
blocks/mixture_of_heads.py, the model around them is transnext.py's.

Differences from the authors' code: those of TransNeXt; the load balancing loss is `balance_losses(model)`; shared_head
and routed_head of a setting that crashes there (the class's own default) are a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from attnzoo.backbones.blocks.contract import StageFeatures
from attnzoo.backbones.blocks.mixture_of_heads import MixedHeads
from attnzoo.backbones.blocks.neighborhood import init_weights
from attnzoo.backbones.transnext import TransNeXt
from attnzoo.backbones.transnext import checkpoint_filter_fn as transnext_checkpoint

__all__ = ["MoHTransNeXt", "checkpoint_filter_fn"]


class MoHTransNeXt(TransNeXt):
    """TransNeXt with mixed heads; arguments as for `TransNeXt`, and

    shared_head, routed_head: per stage, heads that every token uses, and heads that it chooses of the others (0 where
        all are shared).
    """

    def __init__(
        self, *args: Any, shared_head: Sequence[int], routed_head: Sequence[int], device: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, device=device, **kwargs)
        for name, given in (("shared_head", shared_head), ("routed_head", routed_head)):
            if len(given) != self.num_levels:
                raise ValueError(f"{name} must have one entry per stage ({self.num_levels}), got {list(given)}")
        dd = {"device": device, "dtype": kwargs.get("dtype")}
        for i, (shared, routed) in enumerate(zip(shared_head, routed_head)):
            for block in getattr(self, f"block{i + 1}"):
                heads = block.attn.num_heads
                block.attn = MixedHeads(block.attn, block.attn.proj.in_features, heads, shared, routed, **dd)
                for name in ("wg", "wg_0", "wg_1"):
                    if hasattr(block.attn, name):
                        init_weights(getattr(block.attn, name))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: TransNeXt's parameters lie under attn.inner."""
    own = model.state_dict()
    fitted = {}
    for name, value in transnext_checkpoint(state_dict, model).items():
        inner = name.replace(".attn.", ".attn.inner.")
        fitted[inner if name not in own and inner in own else name] = value
    return fitted


def _cfg(file: str, note: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2410.11842",
        "paper_name": "MoH: Multi-Head Attention as Mixture-of-Head Attention",
        "origin_url": "https://github.com/SkyworkAI/MoH",
        "notes": (f"{note}; weights: huggingface.co/Chat-UniVi/{file}; top-1 is in a figure of the authors only",),
    }


default_cfgs = generate_default_cfgs(
    {
        "moh_transnext_base_75.in1k": _cfg("MoH-ViT-B-75", "90.0M parameters, 75 % of heads active"),
        "moh_transnext_base_50.in1k": _cfg("MoH-ViT-B-50", "90.0M parameters, 50 % of heads active"),
        "moh_transnext_small_80.in1k": _cfg("MoH-ViT-S-80", "49.9M parameters, 80 % of heads active"),
        "moh_transnext_small_75.in1k": _cfg("MoH-ViT-S-75", "49.9M parameters, 75 % of heads active"),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> MoHTransNeXt:
    """Build `variant`: the caller's arguments win."""
    args = {**model_args, **kwargs}
    return build_model_with_cfg(
        MoHTransNeXt,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": StageFeatures},
        **args,
    )


_SMALL = {
    "embed_dims": (72, 144, 288, 576),
    "num_heads": (3, 6, 12, 24),
    "depths": (5, 5, 22, 5),
    "drop_path_rate": 0.45,
}
_BASE = {
    "embed_dims": (96, 192, 384, 768),
    "num_heads": (4, 8, 16, 32),
    "depths": (5, 5, 23, 5),
    "drop_path_rate": 0.6,
}


@register_model
def moh_transnext_base_75(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """MoH-ViT-B, 75 % of heads."""
    args = {**_BASE, "shared_head": (4, 8, 4, 5), "routed_head": (0, 0, 8, 16)}
    return _create("moh_transnext_base_75", pretrained, args, kwargs)


@register_model
def moh_transnext_base_50(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """MoH-ViT-B, 50 % of heads."""
    args = {**_BASE, "shared_head": (2, 2, 2, 4), "routed_head": (2, 4, 6, 8)}
    return _create("moh_transnext_base_50", pretrained, args, kwargs)


@register_model
def moh_transnext_small_80(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """MoH-ViT-S, 80 % of heads."""
    args = {**_SMALL, "shared_head": (3, 6, 3, 8), "routed_head": (0, 0, 6, 12)}
    return _create("moh_transnext_small_80", pretrained, args, kwargs)


@register_model
def moh_transnext_small_75(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """MoH-ViT-S, 75 % of heads."""
    args = {**_SMALL, "shared_head": (3, 6, 3, 4), "routed_head": (0, 0, 6, 12)}
    return _create("moh_transnext_small_75", pretrained, args, kwargs)
