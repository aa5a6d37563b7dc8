"""DiNAT_s: Swin Transformer's skeleton with dilated neighborhood attention in place of shifted windows.

Paper: "Dilated Neighborhood Attention Transformer", Hassani, Shi, 2022 - https://arxiv.org/abs/2209.15001
Code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (classification/dinats.py), MIT licence; written
here from the formulas. Parameter names are the authors', so their checkpoint files load as they are.

A 4x4 patch embedding, four stages, Swin's patch merging between them. Images and odd maps are zero-padded at the right
and bottom; the zeros go through patch merging's norm together with real values, as in the authors' code.
Differences from it: as for NAT and DiNAT (attnzoo/backbones/nat.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from attnzoo.backbones.blocks.contract import StageFeatures
from attnzoo.backbones.blocks.neighborhood import adapt_checkpoint
from attnzoo.backbones.blocks.staged import NeighborhoodTransformer, PatchEmbed, PatchMerging, alternating
from attnzoo.errors import check_range

__all__ = ["DiNAT_s", "PatchMerging", "checkpoint_filter_fn"]


class DiNAT_s(NeighborhoodTransformer):
    """DiNAT_s; arguments as for `NeighborhoodTransformer`, and

    patch_size: side of the square patches.
    patch_norm: norm after the patch embedding.
    """

    stages_name = "layers"

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *args: Any,
        patch_size: int = 4,
        patch_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        check_range("patch_size", patch_size, low=1)
        self.patch_size = patch_size
        self.patch_norm = patch_norm
        super().__init__(embed_dim, depths, num_heads, *args, **kwargs)

    def _patch_embed(self, in_chans: int, embed_dim: int, norm_layer: Callable[..., nn.Module], dd: dict) -> nn.Module:
        return PatchEmbed(self.patch_size, in_chans, embed_dim, norm_layer if self.patch_norm else None, **dd)

    def _downsample(self, dim: int, norm_layer: Callable[..., nn.Module], dd: dict) -> nn.Module:
        return PatchMerging(dim, norm_layer, **dd)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: see `adapt_checkpoint`."""
    return adapt_checkpoint(state_dict, model)


_URL = "https://shi-labs.com/projects/dinat/checkpoints/"


def _cfg(url: str, published: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": _URL + url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2209.15001",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "notes": (published,),
        **kwargs,
    }


# The files are named as in the authors' code; their README says "1k" where the code says "in1k".
default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg(
            "imagenet1k/dinat_s_tiny_in1k_224.pth", "28M parameters, 4.5 GFLOPs, top-1 81.8 % in the authors' table"
        ),
        "dinat_s_small.in1k": _cfg(
            "imagenet1k/dinat_s_small_in1k_224.pth", "50M parameters, 8.7 GFLOPs, top-1 83.5 % in the authors' table"
        ),
        "dinat_s_base.in1k": _cfg(
            "imagenet1k/dinat_s_base_in1k_224.pth", "88M parameters, 15.4 GFLOPs, top-1 83.8 % in the authors' table"
        ),
        "dinat_s_large.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_224.pth", "197M parameters, 34.5 GFLOPs, top-1 86.5 % in the authors' table"
        ),
        "dinat_s_large_384.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_384.pth",
            "197M parameters, 101.5 GFLOPs, top-1 87.4 % in the authors' table",
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
        ),
        "dinat_s_large_21k.in22k": _cfg(
            "imagenet22k/dinat_s_large_in22k_224.pth", "pre-training of dinat_s_large", num_classes=21841
        ),
    }
)


def _create(
    variant: str,
    pretrained: bool,
    model_args: dict[str, Any],
    kwargs: dict[str, Any],
    dilations: tuple[int, ...] = (8, 4, 2, 1),
) -> DiNAT_s:
    """Build `variant`: the caller's arguments win; every other block of stage i is dilated by dilations[i]."""
    args = {**model_args, **kwargs}
    args.setdefault("dilations", alternating(args["depths"], dilations))
    if args.get("features_only"):
        args.setdefault("pad_small", True)
    return build_model_with_cfg(
        DiNAT_s,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": StageFeatures},
        **args,
    )


_TINY = {"depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "embed_dim": 96, "drop_path_rate": 0.2}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE = {**_SMALL, "num_heads": (4, 8, 16, 32), "embed_dim": 128, "drop_path_rate": 0.5}
_LARGE = {**_SMALL, "num_heads": (6, 12, 24, 48), "embed_dim": 192, "drop_path_rate": 0.35}


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Tiny, ImageNet-1K."""
    return _create("dinat_s_tiny", pretrained, _TINY, kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Small, ImageNet-1K."""
    return _create("dinat_s_small", pretrained, _SMALL, kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Base, ImageNet-1K."""
    return _create("dinat_s_base", pretrained, _BASE, kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Large, ImageNet-22K then 1K at 224."""
    return _create("dinat_s_large", pretrained, _LARGE, kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Large, ImageNet-22K then 1K at 384, dilations widened to fill the larger maps."""
    return _create("dinat_s_large_384", pretrained, _LARGE, kwargs, (13, 6, 3, 1))


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Large, ImageNet-22K (21,841 classes)."""
    return _create("dinat_s_large_21k", pretrained, {**_LARGE, "drop_path_rate": 0.2}, kwargs)
