"""MedViTV2: a pyramid for medical images, of neighborhood attention, pooled attention and KANs.

Paper: "Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood Attention", Manzari et
al., 2025, https://arxiv.org/abs/2502.13693
Code: https://github.com/Omid-Nejati/MedViTV2 (8d54f66), MIT licence; written here from the formulas. Parameter names
are the authors'. Their entry points are called as those of the first MedViT (MedViT_tiny, ...), so that ours say V2.

A stem of four 3x3 convolutions; stage 1 of local blocks, stage 2 of local blocks and a global one, stage 3 of the group
(local, local, global) repeated, stage 4 of global blocks (blocks/medvit.py); batch norm, mean, Linear.

What the authors' code does, and these models therefore do:
* "Dilated" attention is called without a dilation: it is 1. (`dilation=` of this class changes it.)
* The feed-forward of a local block has a residual of its own, so that norm2(x) is added twice over: x + n + conv(n).
* Global blocks hold a convolution (`conv`) that they do not use; local blocks hold no KAN.
* Keys of the global attention are means of runs of consecutive tokens of the flattened map, not of squares.

Differences from the authors' code (compat="official" brings back what is marked *):
* * Attention and KAN get the map with its axes moved, [B, H, W, C]. The authors' code only reshapes it: each "token"
  then holds C neighbours in memory, pixels of one channel. Their weights are trained so, and the entry points therefore
  default to compat="official"; the class, and compat="default", do what the paper says.
* Maps need not be square: the authors' KAN branch makes its map of height x height. Both modes take any size.
* `drop_rate` drops before the head; `proj_drop_rate` after the global attention is what theirs was. Attention dropout
  must be 0, as in the published models.
* `pad_small` pads maps below the 7 x 7 window (the default with features_only); otherwise they are refused.
* Widths that leave the convolution of a global block no channels are a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import LeveledModel, StageFeatures
from attnzoo.backbones.blocks.medvit import COMPAT, ConvNormReLU, GlobalBlock, LocalBlock
from attnzoo.backbones.blocks.neighborhood import (
    adapt_checkpoint,
    drop_path_rates,
    init_normal,
    init_weights,
    refuse_attn_drop,
)
from attnzoo.errors import check_choice, check_range

__all__ = ["MedViTV2", "checkpoint_filter_fn"]


def block_types(depths: Sequence[int]) -> list[list[type[nn.Module]]]:
    """Local or global, for every block of the four stages."""
    if len(depths) != 4 or min(depths) < 0 or not sum(depths) or depths[2] % 3:
        raise ValueError(
            f"depths must hold four stages (0 for an absent one), the third a multiple of 3, got {list(depths)}"
        )
    return [
        [LocalBlock] * depths[0],
        [LocalBlock] * (depths[1] - 1) + [GlobalBlock] * (depths[1] > 0),
        [LocalBlock, LocalBlock, GlobalBlock] * (depths[2] // 3),
        [GlobalBlock] * depths[3],
    ]


class MedViTV2(LeveledModel):
    """MedViTV2; see the module's text.

    Args:
        stem_chs: channels of the stem's first three convolutions; the fourth has the third's.
        depths: blocks of the four stages; 0 leaves a stage out, the third's must be a multiple of 3.
        dims: channels per stage.
        sr_ratios: per stage, pooling of keys and values in global blocks.
        head_dim: channels of a head, in all blocks.
        mix_block_ratio: the attention's share of the channels in a global block.
        kernel_size, dilation: of the neighborhood attention.
        num_classes, in_chans, global_pool, drop_rate, proj_drop_rate, drop_path_rate: timm's. attn_drop_rate must be 0.
        pad_small: see NeighborhoodAttention2D.
        compat: "default" or "official".
    """

    output_fmt = "NCHW"
    head_name = "proj_head"

    def __init__(
        self,
        stem_chs: Sequence[int] = (64, 32, 64),
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        head_dim: int = 32,
        mix_block_ratio: float = 0.75,
        kernel_size: int = 7,
        dilation: int = 1,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        pad_small: bool = False,
        compat: str = "default",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_choice("compat", compat, COMPAT)
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        refuse_attn_drop(attn_drop_rate)
        types = block_types(depths)
        for name, given, count in (("dims", dims, 4), ("sr_ratios", sr_ratios, 4), ("stem_chs", stem_chs, 3)):
            if len(given) != count:
                raise ValueError(f"{name} must have {count} entries, got {list(given)}")
        first, second, third = stem_chs
        self.stem = nn.Sequential(
            ConvNormReLU(in_chans, first, 2, **dd),
            ConvNormReLU(first, second, 1, **dd),
            ConvNormReLU(second, third, 1, **dd),
            ConvNormReLU(third, third, 2, **dd),
        )
        self.grad_checkpointing = False
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        blocks: list[nn.Module] = []
        self.ends: list[int] = []  # where each level's blocks end
        self.feature_info = []
        width, reduction = third, 4
        for i, stage in enumerate(types):
            for j, block_type in enumerate(stage):
                stride = 2 if i > 0 and j == 0 else 1
                reduction *= stride
                shared: dict[str, Any] = {"stride": stride, "head_dim": head_dim, "compat": compat, **dd}
                shared["path_dropout"] = next(rates)
                if block_type is LocalBlock:
                    shared |= {"kernel_size": 7 if i == 0 else 3, "window": kernel_size, "dilation": dilation}
                    shared["pad_small"] = pad_small
                else:
                    shared |= {"sr_ratio": sr_ratios[i], "mix_block_ratio": mix_block_ratio}
                    shared["proj_drop"] = proj_drop_rate
                blocks.append(block_type(width, dims[i], **shared))
                width = dims[i]
            if stage:
                self.ends.append(len(blocks))
                module = f"features.{len(blocks) - 1}"
                self.feature_info.append({"num_chs": width, "reduction": reduction, "module": module})
        self.features = nn.Sequential(*blocks)
        self.num_features = width
        self.norm = nn.BatchNorm2d(width, **dd)
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        init_weights(module)
        if isinstance(module, nn.Conv2d):
            init_normal(module.weight)

    def _classifier(self, num_classes: int, dd: dict) -> nn.Module:
        return nn.Sequential(nn.Linear(self.num_features, num_classes, **dd)) if num_classes > 0 else nn.Identity()

    def unused_parameters(self) -> set[str]:
        """Parameters that the published models hold and do not use: the convolutions of the global blocks."""
        unused = [f"features.{i}.conv." for i, block in enumerate(self.features) if isinstance(block, GlobalBlock)]
        return {name for name, _ in self.named_parameters() if name.startswith(tuple(unused))} if unused else set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one group per block (coarse too: blocks know no stage by name)."""
        return {"stem": r"^stem", "blocks": [(r"^features\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def smallest_input(self) -> tuple[int, int]:
        """The smallest (height, width) of an image that every block takes without padding."""
        side = 1
        for i, start in enumerate([0, *self.ends[:-1]]):
            reduction = self.feature_info[i]["reduction"]
            for block in self._blocks(start, self.ends[i]):
                if isinstance(block, LocalBlock):
                    side = max(side, (max(block.attn.window) - 1) * reduction + 1)
                else:
                    root = next(r for r in range(1, block.e_mhsa.group + 1) if r * r >= block.e_mhsa.group)
                    side = max(side, (root - 1) * reduction + 1)
        return side, side

    def _blocks(self, start: int, end: int) -> list[Any]:
        return [self.features[i] for i in range(start, end)]

    def _check_size(self, x: Tensor, num_levels: int) -> None:
        self._check_image(x)
        for i, start in enumerate([0, *self.ends][:num_levels]):
            reduction = self.feature_info[i]["reduction"]
            height, width = (-(-side // reduction) for side in x.shape[2:])
            for block in self._blocks(start, self.ends[i]):
                if isinstance(block, LocalBlock):
                    window = block.attn.window
                    if block.attn.pad_small or (height >= window[0] and width >= window[1]):
                        continue
                    need, remedy = f"windows of {window[0]} x {window[1]}", ", or build the model with pad_small=True"
                else:
                    if height * width >= block.e_mhsa.group:
                        continue
                    need, remedy = f"at least {block.e_mhsa.group} tokens", ""
                side = self.smallest_input()[0]
                raise ValueError(
                    f"x of {x.shape[2]} x {x.shape[3]} is too small: stage {i} sees a {height} x {width} map and needs "
                    f"{need}. Use at least {side} x {side}{remedy}"
                )

    @property
    def num_levels(self) -> int:
        """Stages that have blocks."""
        return len(self.ends)

    def _enter(self, i: int, x: Tensor) -> Tensor:
        return self.stem(x) if i == 0 else x  # the first block of a stage halves the map itself

    def _level(self, i: int, x: Tensor) -> Tensor:
        blocks = self._blocks(self.ends[i - 1] if i else 0, self.ends[i])
        if self.grad_checkpointing:
            return checkpoint_seq(blocks, x)
        for block in blocks:
            x = block(x)
        return x

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _keep_levels(self, count: int) -> None:
        self.ends = self.ends[:count]
        self.features = self.features[: self.ends[-1]]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: biases of another window resampled."""
    return adapt_checkpoint(state_dict, model)


def _cfg(published: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.0.conv",
        "classifier": "proj_head.0",
        "license": "mit",
        "paper_ids": "arXiv:2502.13693",
        "paper_name": "Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood "
        "Attention",
        "origin_url": "https://github.com/Omid-Nejati/MedViTV2",
        "notes": (published, "no weights published when this was written; one model per data set, none for ImageNet"),
    }


default_cfgs = generate_default_cfgs(
    {
        "medvitv2_tiny.untrained": _cfg("11.7M parameters"),
        "medvitv2_small.untrained": _cfg("30.1M parameters"),
        "medvitv2_base.untrained": _cfg("67.0M parameters"),
        "medvitv2_large.untrained": _cfg("118.3M parameters"),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> MedViTV2:
    """Build `variant`: the caller's arguments win."""
    args = {"compat": "official", **model_args, **kwargs}
    if args.get("features_only"):
        args.setdefault("pad_small", True)
    levels = sum(depth > 0 for depth in args["depths"])
    return build_model_with_cfg(
        MedViTV2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(levels)), "feature_cls": StageFeatures},
        **args,
    )


@register_model
def medvitv2_tiny(pretrained: bool = False, **kwargs: Any) -> MedViTV2:
    """MedViTV2-T (the authors' MedViT_tiny)."""
    args = {"depths": (2, 2, 6, 1), "dims": (64, 128, 192, 384), "drop_path_rate": 0.1}
    return _create("medvitv2_tiny", pretrained, args, kwargs)


@register_model
def medvitv2_small(pretrained: bool = False, **kwargs: Any) -> MedViTV2:
    """MedViTV2-S (the authors' MedViT_small)."""
    args = {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512), "drop_path_rate": 0.1}
    return _create("medvitv2_small", pretrained, args, kwargs)


@register_model
def medvitv2_base(pretrained: bool = False, **kwargs: Any) -> MedViTV2:
    """MedViTV2-B (the authors' MedViT_base)."""
    args = {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "drop_path_rate": 0.2}
    return _create("medvitv2_base", pretrained, args, kwargs)


@register_model
def medvitv2_large(pretrained: bool = False, **kwargs: Any) -> MedViTV2:
    """MedViTV2-L (the authors' MedViT_large)."""
    args = {"depths": (2, 2, 6, 2), "dims": (96, 256, 512, 1024), "drop_path_rate": 0.2}
    return _create("medvitv2_large", pretrained, args, kwargs)
