"""NAT and DiNAT: hierarchical transformers of neighborhood attention, local and dilated.

Papers:
* "Neighborhood Attention Transformer", Hassani, Walton, Li, Li, Shi, CVPR 2023 - https://arxiv.org/abs/2204.07143
* "Dilated Neighborhood Attention Transformer", Hassani, Shi, 2022 - https://arxiv.org/abs/2209.15001

Code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (classification/nat.py, dinat.py), MIT licence;
written here from the formulas. Parameter names are the authors', so their checkpoint files load as they are.

An overlapping convolutional stem (two 3x3 convolutions of stride 2), four stages of neighborhood attention with
relative position bias, 3x3 convolutions of stride 2 between them. DiNAT is NAT in which every other block is dilated.
Images may have any size: odd maps are rounded up at each stride.

Differences from the authors' code: `drop_rate` drops before the head (timm's meaning) and `pos_drop_rate`,
`proj_drop_rate` are what theirs did; maps smaller than a window raise an error that names the remedy or, with
`pad_small`, are padded as the authors' detection code does. Their outputs are reproduced as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import StageFeatures
from attnzoo.backbones.blocks.neighborhood import adapt_checkpoint
from attnzoo.backbones.blocks.staged import NeighborhoodTransformer, alternating

__all__ = ["NAT", "ConvDownsampler", "ConvTokenizer", "DiNAT", "checkpoint_filter_fn"]


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between them, then a norm.

    [B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), dim].
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"embed_dim must be even (the first convolution makes half of it), got {dim}")
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
            nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
        )
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # so that the convolutions write what the norm reads, which no copy has to reorder
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """A 3x3 convolution of stride 2 without bias, then a norm: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), 2 * dim]."""

    def __init__(
        self,
        dim: int,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False, **dd)
        self.norm = norm_layer(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(NeighborhoodTransformer):
    """Neighborhood Attention Transformer; arguments as for `NeighborhoodTransformer`."""

    stages_name = "levels"

    def _patch_embed(self, in_chans: int, embed_dim: int, norm_layer: Callable[..., nn.Module], dd: dict) -> nn.Module:
        return ConvTokenizer(in_chans, embed_dim, norm_layer, **dd)

    def _downsample(self, dim: int, norm_layer: Callable[..., nn.Module], dd: dict) -> nn.Module:
        return ConvDownsampler(dim, norm_layer, **dd)


class DiNAT(NAT):
    """NAT with `dilations`."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: see `adapt_checkpoint`."""
    return adapt_checkpoint(state_dict, model)


_NAT = "https://shi-labs.com/projects/nat/checkpoints/CLS/"
_DINAT = "https://shi-labs.com/projects/dinat/checkpoints/"


def _cfg(url: str, published: str, **kwargs: Any) -> dict[str, Any]:
    dilated = url.startswith(_DINAT)
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2209.15001" if dilated else "arXiv:2204.07143",
        "paper_name": ("Dilated " if dilated else "") + "Neighborhood Attention Transformer",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "notes": (published,),
        **kwargs,
    }


_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg(_NAT + "nat_mini.pth", "20M parameters, 2.7 GFLOPs, top-1 81.8 % in the authors' table"),
        "nat_tiny.in1k": _cfg(_NAT + "nat_tiny.pth", "28M parameters, 4.3 GFLOPs, top-1 83.2 % in the authors' table"),
        "nat_small.in1k": _cfg(
            _NAT + "nat_small.pth", "51M parameters, 7.8 GFLOPs, top-1 83.7 % in the authors' table"
        ),
        "nat_base.in1k": _cfg(_NAT + "nat_base.pth", "90M parameters, 13.7 GFLOPs, top-1 84.3 % in the authors' table"),
        "dinat_mini.in1k": _cfg(
            _DINAT + "imagenet1k/dinat_mini_in1k_224.pth",
            "20M parameters, 2.7 GFLOPs, top-1 81.8 % in the authors' table",
        ),
        "dinat_tiny.in1k": _cfg(
            _DINAT + "imagenet1k/dinat_tiny_in1k_224.pth",
            "28M parameters, 4.3 GFLOPs, top-1 82.7 % in the authors' table",
        ),
        "dinat_small.in1k": _cfg(
            _DINAT + "imagenet1k/dinat_small_in1k_224.pth",
            "51M parameters, 7.8 GFLOPs, top-1 83.8 % in the authors' table",
        ),
        "dinat_base.in1k": _cfg(
            _DINAT + "imagenet1k/dinat_base_in1k_224.pth",
            "90M parameters, 13.7 GFLOPs, top-1 84.4 % in the authors' table",
        ),
        "dinat_large.in22k_ft_in1k": _cfg(
            _DINAT + "imagenet1k/dinat_large_in22k_in1k_224.pth",
            "200M parameters, 30.6 GFLOPs, top-1 86.6 % in the authors' table",
        ),
        "dinat_large_384.in22k_ft_in1k": _cfg(
            _DINAT + "imagenet1k/dinat_large_in22k_in1k_384.pth",
            "200M parameters, 89.7 GFLOPs, top-1 87.4 % in the authors' table",
            **_384,
        ),
        "dinat_large_384_11x11.in22k_ft_in1k": _cfg(
            _DINAT + "imagenet1k/dinat_large_in22k_in1k_384_11x11.pth",
            "200M parameters, 92.4 GFLOPs, top-1 87.5 % in the authors' table",
            **_384,
        ),
        "dinat_large_21k.in22k": _cfg(
            _DINAT + "imagenet22k/dinat_large_in22k_224.pth", "pre-training of dinat_large", num_classes=21841
        ),
        # Trained at 224 with 7x7 windows, then interpolated: its own windows need images of at least 349 x 349.
        "dinat_large_21k_11x11.in22k": _cfg(
            _DINAT + "imagenet22k/dinat_large_in22k_224_11x11interp.pth",
            "dinat_large_21k with its relative position biases interpolated from 13 x 13 to 21 x 21",
            num_classes=21841,
            **_384,
        ),
        "dinat_world": _cfg(
            "",
            "attnzoo's own size, 0.26M parameters; attnzoo.miniatures has weights",
            num_classes=24,
            input_size=(3, 48, 48),
            pool_size=(3, 3),
            crop_pct=1.0,
            interpolation="bilinear",
            mean=(0.45,) * 3,
            std=(0.25,) * 3,
            license="apache-2.0",
            paper_ids="arXiv:2209.15001",
            paper_name="Dilated Neighborhood Attention Transformer",
        ),
    }
)


def _create(
    cls: type[NAT],
    variant: str,
    pretrained: bool,
    model_args: dict[str, Any],
    kwargs: dict[str, Any],
    dilations: tuple[int, ...] = (1, 1, 1, 1),
) -> NAT:
    """Build `variant`: the caller's arguments win; every other block of stage i is dilated by dilations[i]."""
    args = {**model_args, **kwargs}
    args.setdefault("dilations", alternating(args["depths"], dilations))
    if args.get("features_only"):
        args.setdefault("pad_small", True)
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": StageFeatures},
        **args,
    )


_MINI = {"depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "embed_dim": 64, "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_TINY = {**_MINI, "depths": (3, 4, 18, 5)}
_SMALL = {**_TINY, "num_heads": (3, 6, 12, 24), "embed_dim": 96, "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_BASE = {**_SMALL, "num_heads": (4, 8, 16, 32), "embed_dim": 128, "drop_path_rate": 0.5, "layer_scale": 1e-5}
_LARGE = {**_SMALL, "num_heads": (6, 12, 24, 48), "embed_dim": 192, "drop_path_rate": 0.35}
_LARGE_21K = {**_LARGE, "drop_path_rate": 0.2}
_WORLD = {"depths": (2, 2, 2), "num_heads": (2, 4, 8), "embed_dim": 24, "mlp_ratio": 2.0, "drop_path_rate": 0.0}
_WORLD |= {"kernel_size": 3}
_AT_224 = (8, 4, 2, 1)
_AT_384 = (13, 6, 3, 1)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini, ImageNet-1K."""
    return _create(NAT, "nat_mini", pretrained, _MINI, kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny, ImageNet-1K."""
    return _create(NAT, "nat_tiny", pretrained, _TINY, kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small, ImageNet-1K; with layer scale, unlike DiNAT-Small."""
    return _create(NAT, "nat_small", pretrained, {**_SMALL, "layer_scale": 1e-5}, kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base, ImageNet-1K."""
    return _create(NAT, "nat_base", pretrained, _BASE, kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini, ImageNet-1K."""
    return _create(DiNAT, "dinat_mini", pretrained, _MINI, kwargs, _AT_224)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny, ImageNet-1K."""
    return _create(DiNAT, "dinat_tiny", pretrained, _TINY, kwargs, _AT_224)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small, ImageNet-1K."""
    return _create(DiNAT, "dinat_small", pretrained, _SMALL, kwargs, _AT_224)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base, ImageNet-1K."""
    return _create(DiNAT, "dinat_base", pretrained, _BASE, kwargs, _AT_224)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large, ImageNet-22K then 1K at 224."""
    return _create(DiNAT, "dinat_large", pretrained, _LARGE, kwargs, _AT_224)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large, ImageNet-22K then 1K at 384, dilations widened to fill the larger maps."""
    return _create(DiNAT, "dinat_large_384", pretrained, _LARGE, kwargs, _AT_384)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large with 11 x 11 windows, ImageNet-22K then 1K at 384."""
    return _create(DiNAT, "dinat_large_384_11x11", pretrained, {**_LARGE, "kernel_size": 11}, kwargs, _AT_224)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large, ImageNet-22K (21,841 classes)."""
    return _create(DiNAT, "dinat_large_21k", pretrained, _LARGE_21K, kwargs, _AT_224)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large, ImageNet-22K, biases interpolated for 11 x 11 windows: the start of fine-tuning at 384."""
    return _create(DiNAT, "dinat_large_21k_11x11", pretrained, {**_LARGE_21K, "kernel_size": 11}, kwargs, _AT_224)


@register_model
def dinat_world(pretrained: bool = False, **kwargs: Any) -> NAT:
    """The miniatures' size, made for 48 x 48 pixels: three stages of width 24 to 96, windows of 3 x 3."""
    return _create(DiNAT, "dinat_world", pretrained, _WORLD, kwargs, (4, 2, 1))
