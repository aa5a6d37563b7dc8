"""FAN-Swin: Swin whose MLPs are FAN's channel processing, in the stages that say so.

Paper: "Understanding The Robustness in Vision Transformers", Zhou et al., ICML 2022 - https://arxiv.org/abs/2204.12451.
Code: https://github.com/NVlabs/FAN @ee1b7df (models/swin_utils.py), NVIDIA source code licence (non-commercial); no
weights are published. The host is timm's own SwinTransformer; the layers are those of blocks/fan.py.

As in the authors' code, the MLP inside this channel processing lacks the residual that FAN-ViT's has, and the last
stage has plain MLPs.

Differences from the authors' code: what timm's Swin does: any image size by `set_input_size` or
`dynamic_img_size=True`, downsampling at the start of a stage (checkpoint_filter_fn renames), no absolute position code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import checkpoint_filter_fn as swin_filter_fn
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import CheckedImages, StageFeatures
from attnzoo.backbones.blocks.fan import ChannelProcessing
from attnzoo.backbones.blocks.neighborhood import init_weights, unwrap_checkpoint
from attnzoo.errors import check_choice

__all__ = ["FANSwin", "checkpoint_filter_fn"]


class _FANSwinBlock(SwinTransformerBlock):
    """timm's block with `mlp` on the map instead of on tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class FANSwin(CheckedImages, SwinTransformer):
    """timm's SwinTransformer (all its arguments) with channel processing.

    mlp_type: per stage "FAN" (channel processing) or "Mlp".
    """

    def __init__(self, *args: Any, mlp_type: Sequence[str] = ("FAN", "FAN", "FAN", "Mlp"), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        if len(mlp_type) != len(self.layers):
            raise ValueError(f"mlp_type must have one entry per stage ({len(self.layers)}), got {list(mlp_type)}")
        for i, kind in enumerate(mlp_type):
            check_choice("mlp_type", kind, ("FAN", "Mlp"))
            blocks: Any = self.layers[i].blocks
            for block in blocks if kind == "FAN" else ():
                fc1 = block.mlp.fc1
                block.mlp = ChannelProcessing(
                    fc1.in_features,
                    block.attn.num_heads,
                    fc1.out_features,
                    qkv_bias=block.attn.qkv.bias is not None,
                    attn_drop=kwargs.get("attn_drop_rate", 0.0),
                    residual=False,
                    **dd,
                ).apply(init_weights)
                block.__class__ = _FANSwinBlock

    def _check_image(self, x: Tensor) -> None:
        super()._check_image(x)
        wanted: Any = self.patch_embed.img_size
        if not self.dynamic_img_size and tuple(x.shape[-2:]) != tuple(wanted):
            raise ValueError(
                f"x must be of img_size {wanted[0]} x {wanted[1]}, got {x.shape[-2]} x {x.shape[-1]}; build with "
                "img_size=, call set_input_size, or build with dynamic_img_size=True"
            )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint for `model`: timm's renaming of Swin's names, position tables resampled where needed."""
    return swin_filter_fn(unwrap_checkpoint(state_dict), model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "nvidia-source-code-non-commercial",
        "paper_ids": "arXiv:2204.12451",
        "paper_name": "Understanding The Robustness in Vision Transformers",
        "origin_url": "https://github.com/NVlabs/FAN",
        "notes": ("no weights published",),
        **kwargs,
    }


_MODELS = {
    "fan_swin_tiny_patch4_window7_224": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "fan_swin_small_patch4_window7_224": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "fan_swin_base_patch4_window7_224": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "fan_swin_large_patch4_window7_224": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in _MODELS})


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> FANSwin:
    args = {**_MODELS[variant], "window_size": 7, **kwargs}
    return build_model_with_cfg(
        FANSwin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"feature_cls": StageFeatures, "out_indices": tuple(range(len(args["depths"])))},
        **args,
    )


@register_model
def fan_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> FANSwin:
    """FAN-Swin-T."""
    return _create("fan_swin_tiny_patch4_window7_224", pretrained, kwargs)


@register_model
def fan_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> FANSwin:
    """FAN-Swin-S."""
    return _create("fan_swin_small_patch4_window7_224", pretrained, kwargs)


@register_model
def fan_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> FANSwin:
    """FAN-Swin-B."""
    return _create("fan_swin_base_patch4_window7_224", pretrained, kwargs)


@register_model
def fan_swin_large_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> FANSwin:
    """FAN-Swin-L."""
    return _create("fan_swin_large_patch4_window7_224", pretrained, kwargs)
