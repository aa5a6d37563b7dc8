"""CARE Transformer: linear attention on a third of the mixed channels, convolutions on the rest, a memory beside them.

Paper: "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction", Zhou et al.,
CVPR 2025 - https://arxiv.org/abs/2411.16170
Code: https://github.com/zhouyuan888888/CARE-Transformer (models/CARETrans.py), licence not verified; written here from
the formulas (shared/specs/backbones.md). Parameter names are the authors', so their checkpoint files load as they are.

A stage is feat_dims[i] + mem_dims[i] channels wide, in the order [memory | attention | 3x3 | 7x7]. `mem_dims` is, in
spite of its name, the width of each of the three groups that are mixed; what is left over in front is the memory, which
a block's token mixer does not touch. The attention group of stages 2 and 3 is linear attention whose queries and keys
are a 1x1 convolution of the group and whose values are the group itself; in stages 0 and 1 it is a sum of 11x1 and 1x11
convolutions. Two convolutional MLPs then mix the three groups, and the groups with the memory. The last block of
stage 3 widens its channels to cls_dim, without a residual.

Images of any size from 32 x 32 on: as in the authors' code, convolutions of stride 2 and 4 leave out the rows and
columns that do not fill a patch.

Differences from the authors' code:
* The two heads' logits are averaged in training too; `set_distilled_training(True)` returns the pair while training, as
  theirs always does and as timm's distilled models do.
* `forward_head(pre_logits=True)` and `num_classes=0` give the pooled map before both heads.
* `cls_dim` follows from the last block and may be left out; another value than the block's is an error at once.
* Stochastic depth is the model's argument and rises linearly over the blocks.
Their outputs are reproduced as they are; there is no `compat` switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from attnzoo.backbones.blocks.care import CAREBlock
from attnzoo.backbones.blocks.contract import LeveledModel, StageFeatures
from attnzoo.backbones.blocks.neighborhood import drop_path_rates, init_weights, unwrap_checkpoint
from attnzoo.errors import check_range

__all__ = ["CARETransformer", "checkpoint_filter_fn"]


class _Head(nn.Module):
    """GELU, LayerNorm, Linear on pooled features [B, ..., dim]."""

    def __init__(self, dim: int, num_classes: int, dd: dict) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.fc = nn.Linear(dim, num_classes, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(F.gelu(x)))


class _Stage(nn.Module):
    """Blocks at one resolution, after the layer that leads to it (none in the first stage)."""

    downsample: nn.Module | None

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)


class CARETransformer(LeveledModel):
    """Stem, stages of `CAREBlock`, mean over the map, two heads whose logits are averaged; maps are [B, dim, H, W].

    Args:
        depths: blocks per stage.
        feat_dims, mem_dims: per stage; the stage is feat_dims + mem_dims wide and mixes three groups of mem_dims.
        ratios: per stage, the hidden widths of both MLPs over the widths they mix.
        att_head_dim: per stage, the channels of one head; used from stage 2 on.
        cls_dim: width of the last map. None computes it; another value than the computed one is a ValueError.
        num_classes: 0 for no heads.
        in_chans: image channels.
        global_pool: "avg", or "" to keep the map.
        ls_init_value: initial layer scale of the blocks.
        drop_rate: dropout before the heads.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
    """

    output_fmt = "NCHW"
    stages: Any
    head: Any
    dist_head: Any

    def __init__(
        self,
        depths: Sequence[int] = (2, 4, 8, 4),
        feat_dims: Sequence[int] = (24, 48, 96, 192),
        mem_dims: Sequence[int] = (8, 16, 32, 64),
        ratios: Sequence[Sequence[float]] = ((2, 2), (2, 4), (4, 4), (4, 4)),
        att_head_dim: Sequence[int] = (1, 1, 16, 32),
        cls_dim: int | None = None,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        ls_init_value: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not depths or min(depths) < 1:
            raise ValueError(f"depths must hold at least one stage of at least one block, got {list(depths)}")
        for name, given in (("feat_dims", feat_dims), ("mem_dims", mem_dims), ("ratios", ratios)):
            if len(given) != len(depths):
                raise ValueError(f"{name} must have one entry per stage ({len(depths)}), got {list(given)}")
        if len(att_head_dim) < len(depths):
            raise ValueError(f"att_head_dim must have one entry per stage ({len(depths)}), got {list(att_head_dim)}")
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        dims = [feat + mem for feat, mem in zip(feat_dims, mem_dims)]
        self.grad_checkpointing = False
        self.distilled_training = False
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4, **dd), nn.BatchNorm2d(dims[0], **dd))

        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages, self.feature_info = [], []
        for i, dim in enumerate(dims):
            blocks = [
                CAREBlock(
                    dim,
                    mem_dims[i],
                    ratios[i],
                    att_head_dim=att_head_dim[i] if i >= 2 else None,
                    last=i == 3 and j == depths[i] - 1,
                    ls_init_value=ls_init_value,
                    drop_path=DropPath(rate) if (rate := next(rates)) else None,
                    **dd,
                )
                for j in range(depths[i])
            ]
            lead = None
            if i:
                lead = nn.Sequential(nn.BatchNorm2d(dims[i - 1], **dd), nn.Conv2d(dims[i - 1], dim, 2, 2, **dd))
            stages.append(_Stage(lead, blocks))
            width = blocks[-1].out_dim
            self.feature_info.append({"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = self.feature_info[-1]["num_chs"]
        if cls_dim not in (None, self.num_features):
            raise ValueError(
                f"cls_dim must be {self.num_features}, the width of the last block's output, got {cls_dim}"
            )
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.dist_head = self._classifier(num_classes, dd)
        self.apply(init_weights)

    def _classifier(self, num_classes: int, dd: dict) -> nn.Module:
        return _Head(self.num_features, num_classes, dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]
        """Both heads' last layers (Identity where num_classes is 0), as timm's distilled models return theirs."""
        return getattr(self.head, "fc", self.head), getattr(self.dist_head, "fc", self.dist_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Two new heads of `num_classes` outputs (0: none), and another pooling ("avg", "" for the map) if given."""
        super().reset_classifier(num_classes, global_pool)
        parameter = next(self.parameters())
        dist_head = self._classifier(num_classes, {"device": parameter.device, "dtype": parameter.dtype})
        dist_head.apply(init_weights)
        self.dist_head = dist_head.train(self.training)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """While training return (head's, distillation head's) logits, for a distillation loss, and not their mean."""
        self.distilled_training = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """The map of `forward_features` -> logits [B, num_classes]; with pre_logits the pooled features.

        Without pooling the heads act on every token of a channels-last map; without heads the map stays as it is.
        """
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        x = self.head_drop(x)
        if pre_logits or self.num_classes == 0:
            return x
        if x.ndim == 4:
            x = x.permute(0, 2, 3, 1)
        both = self.head(x), self.dist_head(x)
        return both if self.distilled_training and self.training else (both[0] + both[1]) / 2

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one group per block (coarse: per stage)."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def _check_size(self, x: Tensor, num_levels: int) -> None:
        self._check_image(x)
        need = 4 * 2 ** (num_levels - 1)
        if min(x.shape[2:]) < need:
            raise ValueError(
                f"x of {x.shape[2]} x {x.shape[3]} is too small: {num_levels} stages need at least {need} x {need}"
            )

    @property
    def num_levels(self) -> int:
        return len(self.stages)

    def _enter(self, i: int, x: Tensor) -> Tensor:
        return self.stem(x) if i == 0 else self.stages[i].downsample(x)

    def _level(self, i: int, x: Tensor) -> Tensor:
        blocks = self.stages[i].blocks
        return checkpoint_seq(blocks, x) if self.grad_checkpointing else blocks(x)

    def _finish(self, x: Tensor) -> Tensor:
        return x

    def _keep_levels(self, count: int) -> None:
        self.stages = self.stages[:count]

    def _drop_final_norm(self) -> None:
        """There is none: each head has its own."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`, taken out of the entry that it lies in; nothing else."""
    return dict(unwrap_checkpoint(state_dict))


def _cfg(published: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": ("head.fc", "dist_head.fc"),
        "license": "unknown",
        "paper_ids": "arXiv:2411.16170",
        "paper_name": "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction",
        "origin_url": "https://github.com/zhouyuan888888/CARE-Transformer",
        "notes": (published,),
    }


default_cfgs = generate_default_cfgs(
    {
        "caretrans_s0.in1k": _cfg("7.3M parameters, 0.7 GMACs, top-1 78.4 % in the authors' table"),
        "caretrans_s1.in1k": _cfg("9.6M parameters, 1.0 GMACs, top-1 80.1 % in the authors' table"),
        "caretrans_s2.in1k": _cfg("19.5M parameters, 1.9 GMACs, top-1 82.1 % in the authors' table"),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> CARETransformer:
    args = {**model_args, **kwargs}
    return build_model_with_cfg(
        CARETransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": StageFeatures},
        **args,
    )


_S0 = {
    "depths": (2, 4, 8, 4),
    "feat_dims": (24, 48, 96, 192),
    "mem_dims": (8, 16, 32, 64),
    "ratios": ((2, 2), (2, 4), (4, 4), (4, 4)),
}
_S1 = {**_S0, "depths": (3, 6, 10, 6), "ratios": ((2, 4), (2, 4), (4, 4), (4, 4))}
_S2 = {
    "depths": (3, 6, 10, 6),
    "feat_dims": (24, 48, 144, 288),
    "mem_dims": (8, 16, 48, 96),
    "ratios": ((4, 4), (4, 4), (4, 4), (4, 4)),
}


@register_model
def caretrans_s0(pretrained: bool = False, **kwargs: Any) -> CARETransformer:
    """CARE Transformer S0 (the authors' CARETrans_S0)."""
    return _create("caretrans_s0", pretrained, _S0, kwargs)


@register_model
def caretrans_s1(pretrained: bool = False, **kwargs: Any) -> CARETransformer:
    """CARE Transformer S1 (the authors' CARETrans_S1)."""
    return _create("caretrans_s1", pretrained, _S1, kwargs)


@register_model
def caretrans_s2(pretrained: bool = False, **kwargs: Any) -> CARETransformer:
    """CARE Transformer S2 (the authors' CARETrans_S2)."""
    return _create("caretrans_s2", pretrained, _S2, kwargs)
