"""ResNets with triplet attention in every residual block.

Paper: "Rotate to Attend: Convolutional Triplet Attention Module", Misra, Nalamada, Arasanipalai, Hou, WACV 2021 -
https://arxiv.org/abs/2010.03045
Code: https://github.com/LandskapeAI/triplet-attention (MODELS/resnet.py), MIT licence; written here from the formulas.

The host is timm's ResNet; the attention stands in its blocks' slot for such layers, after the last norm and before the
addition, which is where the authors put it. `checkpoint_filter_fn` gives their names (`triplet_attention.ChannelGateH`,
`ChannelGateW`, `SpatialGate`) timm's and the block's (`se.cw`, `se.hc`, `se.hw`).

Published weights (Google Drive, no file names): ResNet-50 with kernels of 7 (the default) and of 3
(`triplet_kernel_size=3`). The authors' MobileNet v2 is not here.

Differences from the authors' code: the last pooling is over the whole map (theirs is over 7 x 7, so that images must be
of 224), and initial weights are timm's.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from attnzoo.backbones.blocks.contract import CheckedImages
from attnzoo.backbones.blocks.neighborhood import unwrap_checkpoint
from attnzoo.backbones.blocks.triplet import TripletAttention

__all__ = ["TripletResNet", "checkpoint_filter_fn"]


class TripletResNet(CheckedImages, ResNet):
    """timm's ResNet with `TripletAttention` in its blocks.

    Args:
        triplet_kernel_size: side of the gates' convolutions.
        no_spatial: without the (height, width) gate.
        further arguments: timm's ResNet's.
    """

    def __init__(
        self,
        *args: Any,
        triplet_kernel_size: int = 7,
        no_spatial: bool = False,
        block_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        layer = partial(TripletAttention, kernel_size=triplet_kernel_size, no_spatial=no_spatial)
        super().__init__(*args, **{**kwargs, "block_args": {"attn_layer": layer, **(block_args or {})}})


_GATES = {"ChannelGateH": "cw", "ChannelGateW": "hc", "SpatialGate": "hw"}
_NAME = re.compile(r"\.triplet_attention\.(ChannelGateH|ChannelGateW|SpatialGate)\.spatial\.")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: unwrapped, their names translated."""
    return {
        _NAME.sub(lambda found: f".se.{_GATES[found[1]]}.conv.", name).removeprefix("module."): value
        for name, value in unwrap_checkpoint(state_dict).items()
    }


def _cfg(notes: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "mit",
        "paper_ids": "arXiv:2010.03045",
        "paper_name": "Rotate to Attend: Convolutional Triplet Attention Module",
        "origin_url": "https://github.com/LandskapeAI/triplet-attention",
        "notes": (notes,),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet18_triplet.untrained": _cfg(
            "11.69M parameters, 1.825 GFLOPs, top-1 error 28.91 % in the authors' table; no weights in it"
        ),
        "resnet34_triplet.untrained": _cfg("no weights published"),
        "resnet50_triplet.in1k": _cfg("25.56M parameters, 4.169 GFLOPs, top-1 error 22.52 % in the authors' table"),
        "resnet101_triplet.untrained": _cfg("no weights published"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> TripletResNet:
    return build_model_with_cfg(TripletResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def resnet18_triplet(pretrained: bool = False, **kwargs: Any) -> TripletResNet:
    """ResNet-18 with triplet attention."""
    return _create("resnet18_triplet", pretrained, **{"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs})


@register_model
def resnet34_triplet(pretrained: bool = False, **kwargs: Any) -> TripletResNet:
    """ResNet-34 with triplet attention."""
    return _create("resnet34_triplet", pretrained, **{"block": BasicBlock, "layers": (3, 4, 6, 3), **kwargs})


@register_model
def resnet50_triplet(pretrained: bool = False, **kwargs: Any) -> TripletResNet:
    """ResNet-50 with triplet attention."""
    return _create("resnet50_triplet", pretrained, **{"block": Bottleneck, "layers": (3, 4, 6, 3), **kwargs})


@register_model
def resnet101_triplet(pretrained: bool = False, **kwargs: Any) -> TripletResNet:
    """ResNet-101 with triplet attention."""
    return _create("resnet101_triplet", pretrained, **{"block": Bottleneck, "layers": (3, 4, 23, 3), **kwargs})
