"""Flowformer for vision: a pyramid of flow attention, linear in the number of tokens at every stage.

Paper: "Flowformer: Linearizing Transformers with Conservation Flows", Wu et al., ICML 2022 -
https://arxiv.org/abs/2202.06258
Code: https://github.com/thuml/Flowformer (Flowformer_CV/flowformer.py), licence not verified; written here from the
formulas (shared/specs/backbones.md). Parameter names are the authors', so a checkpoint of theirs loads as it is.

Four stages behind patch convolutions (4x4, then 2x2), 12 heads in every block of every stage, a learned position
embedding on the first map only, layer scale on the MLP branch only, mean over tokens of the final norm, Linear.

Images have the size that the model was built for, because of the position embedding: `img_size` builds it for another
(a published embedding is resampled on load), `set_input_size` changes it, and `dynamic_img_size=True` lets each call
have its own; height and width may differ, and are zero-padded right and bottom to fill the patches of every stage.

Differences from the authors' code: any image size (theirs: square, a multiple of 32); every stage's width must be
divisible by num_heads, named as an argument (theirs crash, with their class's default widths too: the widths here are
their training script's). Their outputs are reproduced as they are; there is no `compat` switch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, resample_abs_pos_embed, to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import LeveledModel, StageFeatures
from attnzoo.backbones.blocks.flow import FlowSelfAttention
from attnzoo.backbones.blocks.neighborhood import drop_path_rates, init_normal, init_weights, unwrap_checkpoint
from attnzoo.backbones.blocks.staged import PatchEmbed
from attnzoo.errors import check_range

__all__ = ["Flowformer", "checkpoint_filter_fn"]

_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class _Block(nn.Module):
    """x + attn(norm1(x)), then x + gamma * mlp(norm2(x)), on [B, H, W, dim]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        init_values: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        dd: dict,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = FlowSelfAttention(dim, num_heads, qkv_bias, proj_drop=proj_drop, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values), **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma * self.mlp(self.norm2(x)))


class Flowformer(LeveledModel):
    """Patch convolutions and stages of flow attention, norm, mean over tokens, Linear; maps are [B, H, W, dim].

    Args:
        img_size: height and width of the images, one int or a pair.
        patch_size: side of the first patch convolution.
        in_chans: image channels.
        num_classes: 0 for no head.
        global_pool: "avg", or "" to keep the map.
        embed_dim, depth, mlp_ratio: per stage.
        num_heads: heads of every block.
        qkv_bias: bias of the query, key and value projections.
        init_values: initial layer scale of the MLP branch.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the position embedding.
        proj_drop_rate: dropout of attention outputs and in the MLPs.
        attn_drop_rate: must be 0.0.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        norm_layer: called with a channel count; LayerNorm with eps 1e-6 by default.
        dynamic_img_size: take images of any size; the position embedding is then resampled where the size differs.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: Sequence[int] = (96, 192, 384, 768),
        depth: Sequence[int] = (3, 3, 10, 3),
        mlp_ratio: Sequence[float] = (4, 4, 4, 4),
        num_heads: int = 12,
        *,
        qkv_bias: bool = True,
        init_values: float = 1e-6,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = _LAYER_NORM,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not depth or min(depth) < 1:
            raise ValueError(f"depth must hold at least one stage of at least one block, got {list(depth)}")
        for name, given in (("embed_dim", embed_dim), ("mlp_ratio", mlp_ratio)):
            if len(given) < len(depth):
                raise ValueError(f"{name} must have one entry per stage ({len(depth)}), got {list(given)}")
        for dim in embed_dim:
            if num_heads < 1 or dim % num_heads:
                raise ValueError(f"num_heads must divide every embed_dim {list(embed_dim)}, got {num_heads}")
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        if attn_drop_rate:
            FlowSelfAttention(embed_dim[0], num_heads, attn_drop=attn_drop_rate, **dd)  # says why not
        self.patch_size = patch_size
        self.img_size = _pair(img_size)
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.num_features = embed_dim[len(depth) - 1]

        widths = [in_chans, *embed_dim]
        self.patch_embed = nn.ModuleList(
            [PatchEmbed(2 if i else patch_size, widths[i], widths[i + 1], None, **dd) for i in range(len(depth))]
        )
        height, width = self._grid(self.img_size)
        self.pos_embed = nn.Parameter(torch.empty(1, height * width, embed_dim[0], **dd))
        init_normal(self.pos_embed)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = iter(drop_path_rates(drop_path_rate, sum(depth)))
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    *[
                        _Block(
                            embed_dim[i],
                            num_heads,
                            mlp_ratio[i],
                            qkv_bias,
                            init_values,
                            proj_drop_rate,
                            next(rates),
                            norm_layer,
                            dd,
                        )
                        for _ in range(depth[i])
                    ]
                )
                for i in range(len(depth))
            ]
        )
        self.feature_info = [
            {"num_chs": embed_dim[i], "reduction": patch_size * 2**i, "module": f"blocks.{i}"}
            for i in range(len(depth))
        ]
        self.norm = norm_layer(self.num_features, **dd)
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.apply(init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one group per block (coarse: per stage)."""
        blocks = [(r"^patch_embed\.(\d+)", (0,)), (r"^blocks\.(\d+)\.(\d+)", None)]
        return {
            "stem": r"^pos_embed|^patch_embed\.0",
            "blocks": r"^(?:blocks|patch_embed)\.(\d+)" if coarse else blocks,
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of img_size; the position embedding is resampled bicubically."""
        old, self.img_size = self._grid(self.img_size), _pair(img_size)
        resampled = resample_abs_pos_embed(self.pos_embed.data, self._grid(self.img_size), old, num_prefix_tokens=0)
        self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def _grid(self, size: Sequence[int]) -> list[int]:
        """The first map's height and width for images of `size`."""
        return [-(-pixels // self.patch_size) for pixels in size]

    def _check_size(self, x: Tensor, num_levels: int) -> None:
        self._check_image(x)
        if not self.dynamic_img_size and tuple(x.shape[2:]) != self.img_size:
            (height, width), (rows, columns) = x.shape[2:], self.img_size
            raise ValueError(
                f"x must be of img_size {rows} x {columns}, got {height} x {width}: resize the images, build the model "
                f"with img_size=({height}, {width}), call set_input_size, or build it with dynamic_img_size=True"
            )

    @property
    def num_levels(self) -> int:
        return len(self.blocks)

    def _enter(self, i: int, x: Tensor) -> Tensor:
        if i:
            return self.patch_embed[i](x.permute(0, 3, 1, 2))
        x = self.patch_embed[0](x)
        place = self.pos_embed
        if self.dynamic_img_size:
            place = resample_abs_pos_embed(place, list(x.shape[1:3]), self._grid(self.img_size), num_prefix_tokens=0)
        return self.pos_drop(x + place.unflatten(1, x.shape[1:3]))

    def _level(self, i: int, x: Tensor) -> Tensor:
        return checkpoint_seq(self.blocks[i], x) if self.grad_checkpointing else self.blocks[i](x)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _keep_levels(self, count: int) -> None:
        self.blocks, self.patch_embed = self.blocks[:count], self.patch_embed[:count]


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = to_2tuple(img_size)
    if height < 1 or width < 1:
        raise ValueError(f"img_size must be at least 1 on every side, got {img_size}")
    return height, width


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`, out of the entry that it lies in; a position embedding of
    another size (a square one) is resampled, nothing else is changed."""
    fitted = dict(unwrap_checkpoint(state_dict))
    place, own = fitted.get("pos_embed"), getattr(model, "pos_embed", None)
    if isinstance(place, Tensor) and isinstance(own, Tensor) and place.ndim == 3 and place.shape[1] != own.shape[1]:
        fitted["pos_embed"] = resample_abs_pos_embed(place, model._grid(model.img_size), num_prefix_tokens=0)  # type: ignore[operator]
    return fitted


default_cfgs = generate_default_cfgs(
    {
        "flowformer_cv.in1k": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "fixed_input_size": True,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.0.proj",
            "classifier": "head",
            "license": "unknown",
            "paper_ids": "arXiv:2202.06258",
            "paper_name": "Flowformer: Linearizing Transformers with Conservation Flows",
            "origin_url": "https://github.com/thuml/Flowformer",
            "notes": ("43.3M parameters counted; the repository has no table of accuracies and no checkpoint",),
        }
    }
)


@register_model
def flowformer_cv(pretrained: bool = False, **kwargs: Any) -> Flowformer:
    """Flowformer for vision, as the authors' training script builds it."""
    args = {"depth": (3, 3, 10, 3), "embed_dim": (96, 192, 384, 768), **kwargs}
    return build_model_with_cfg(
        Flowformer,
        "flowformer_cv",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depth"]))), "feature_cls": StageFeatures},
        **args,
    )
