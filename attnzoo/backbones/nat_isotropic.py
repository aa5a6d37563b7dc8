"""Isotropic NAT and DiNAT, and ViT with relative position bias: one resolution from the first block to the last.

Paper: "Dilated Neighborhood Attention Transformer", Hassani, Shi, 2022 - https://arxiv.org/abs/2209.15001
(section 4, the isotropic variants)
Code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (classification/isotropic.py), MIT licence; written
here from the formulas. Parameter names are the authors', so their checkpoint files load as they are.

A 16x16 patch embedding and twelve blocks: neighborhood attention (NAT-ISO), the same with every other block dilated
(DiNAT-ISO), or full self-attention with the same kind of bias (ViT-RPB, the yardstick). There is no class token and no
position embedding.

Images are square and of the size that the model was built for; `img_size` builds it for another one (published biases
of ViT-RPB are resampled on load), and `dynamic_img_size=True` lets each call have its own.
Differences from the authors' code: as for NAT and DiNAT (attnzoo/backbones/nat.py); ViT-RPB's index of relative
positions is computed, not stored, and ignored where a checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import LeveledModel
from attnzoo.backbones.blocks.neighborhood import (
    NeighborhoodAttention2D,
    NeighborhoodBlock,
    adapt_checkpoint,
    attention_received,
    check_heads,
    drop_path_rates,
    init_normal,
    init_weights,
    refuse_attn_drop,
    resample_rel_pos_bias,
)
from attnzoo.backbones.blocks.staged import PatchEmbed
from attnzoo.errors import check_choice, check_range

__all__ = ["NATIsotropic", "RelPosAttention2D", "checkpoint_filter_fn"]


class RelPosAttention2D(nn.Module):
    """Full self-attention of a [B, H, W, dim] map with a bias by relative position.

    Logits are scale * q.k + rpb[head, key - query]; `rpb` is [num_heads, 2 * side - 1, 2 * side - 1]. On a map of
    another size than side x side the bias is resampled bicubically, in this call only.

    Args:
        dim: channels.
        num_heads: heads; each is dim // num_heads wide.
        side: height and width of the map that the bias is made for.
        qkv_bias, scale, attn_drop, proj_drop: see NeighborhoodAttention2D.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        side: int,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        refuse_attn_drop(attn_drop)
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.side = side
        self.scale = scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * side - 1, 2 * side - 1, **dd))
        init_normal(self.rpb)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_load_state_dict_pre_hook(_drop_stored_index)

    def relative_position_bias(self, height: int, width: int) -> Tensor:
        """[num_heads, height * width, height * width], queries first; both row-major."""
        table = resample_rel_pos_bias(self.rpb, (2 * height - 1, 2 * width - 1))
        rows = torch.arange(height, device=table.device)
        columns = torch.arange(width, device=table.device)
        rows = rows[None, :] - rows[:, None] + height - 1
        columns = columns[None, :] - columns[:, None] + width - 1
        # [query row, query column, key row, key column]
        bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]
        return bias.flatten(3, 4).flatten(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """All [B, H, W, heads, head_dim]."""
        query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        return out.transpose(1, 2)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        query, key, value = self._project(x)
        bias = self.relative_position_bias(*x.shape[1:3]).to(query.dtype)
        out = self._attend(query, key, value, bias).reshape(x.shape[:3] + (-1,))
        return self.proj_drop(self.proj(out))

    def attention_received(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention that each token of x receives from all queries, and the even share, 1: [B, H, W, heads]."""
        with torch.inference_mode(False), torch.no_grad():  # clone: what inference mode made can't be differentiated
            query, key, value = self._project(x.clone())
            bias = self.relative_position_bias(*x.shape[1:3]).to(query.dtype).clone()
        received = attention_received(lambda v: self._attend(query, key, v, bias), value)
        return received, torch.ones_like(received)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, side={self.side}"


def _drop_stored_index(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.pop(prefix + "relative_position_index", None)


class NATIsotropic(LeveledModel):
    """Patch embedding, blocks, norm, mean over tokens, Linear.

    Args:
        img_size: side of the square images, or (side, side).
        patch_size: side of the square patches.
        in_chans, num_classes, global_pool: as for NeighborhoodTransformer.
        embed_dim: channels.
        depth: blocks.
        num_heads: heads of every block.
        mlp_ratio: hidden width of the MLPs over embed_dim.
        attn: "neighborhood", or "global" for ViT-RPB.
        kernel_size, dilation: of neighborhood attention; odd-numbered blocks (the second, the fourth ...) are dilated.
            None is 1; both unused where attn is "global".
        patch_norm: norm after the patch embedding.
        qkv_bias, rel_pos_bias, scale, layer_scale, norm_layer, pad_small and the rates: as for NeighborhoodTransformer
            (ViT-RPB always has its bias).
        dynamic_img_size: take images of any size; the bias of ViT-RPB is then resampled where the size differs.

    Raises ValueError for an img_size that is not square or not a multiple of patch_size, and at a call with images of
    another size, unless dynamic_img_size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        attn: str = "neighborhood",
        kernel_size: int | tuple[int, int] | None = 7,
        dilation: int | None = 2,
        patch_norm: bool = True,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        scale: float | None = None,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        pad_small: bool = False,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_choice("attn", attn, ("neighborhood", "global"))
        check_range("depth", depth, low=1)
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        self.patch_size = patch_size
        self.img_size = _square(img_size, patch_size)
        self.dynamic_img_size = dynamic_img_size
        self.pad_small = pad_small
        self.embed_dim = self.num_features = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm_layer if patch_norm else None, **dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        shared = {
            "qkv_bias": qkv_bias,
            "scale": scale,
            "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
            **dd,
        }

        def attention(i: int) -> nn.Module:
            if attn == "global":
                return RelPosAttention2D(embed_dim, num_heads, self.img_size // patch_size, **shared)
            return NeighborhoodAttention2D(
                embed_dim,
                num_heads,
                7 if kernel_size is None else kernel_size,
                (dilation or 1) if i % 2 else 1,
                rel_pos_bias=rel_pos_bias,
                pad_small=pad_small,
                **shared,
            )

        self.layers = nn.Sequential(
            *[
                NeighborhoodBlock(
                    embed_dim,
                    attention(i),
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    layer_scale=layer_scale,
                    norm_layer=norm_layer,
                    **dd,
                )
                for i, rate in enumerate(drop_path_rates(drop_path_rate, depth))
            ]
        )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"layers.{i}"} for i in range(depth)
        ]
        self.norm = norm_layer(embed_dim, **dd)
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.apply(init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one group per block."""
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def smallest_input(self) -> tuple[int, int]:
        """The smallest (height, width) of an image whose map holds every window without padding."""
        windows = [getattr(layer.attn, "window", (1, 1)) for layer in self.layers]
        return tuple((max(w[axis] for w in windows) - 1) * self.patch_size + 1 for axis in (0, 1))  # type: ignore[return-value]

    def _check_size(self, x: Tensor, num_levels: int) -> None:
        self._check_image(x)
        height, width = x.shape[2:]
        if not self.dynamic_img_size and (height, width) != (self.img_size, self.img_size):
            raise ValueError(
                f"x must be of img_size {self.img_size} x {self.img_size}, got {height} x {width}: resize the images, "
                f"build the model with img_size={max(height, width)}, or with dynamic_img_size=True for any size"
            )
        need = self.smallest_input()
        if not self.pad_small and (height < need[0] or width < need[1]):
            raise ValueError(
                f"x of {height} x {width} is too small: its {-(-height // self.patch_size)} x "
                f"{-(-width // self.patch_size)} map does not hold kernel_size times dilation. Use at least "
                f"{need[0]} x {need[1]}, or build the model with pad_small=True"
            )

    @property
    def num_levels(self) -> int:
        return len(self.layers)

    def _enter(self, i: int, x: Tensor) -> Tensor:
        return self.pos_drop(self.patch_embed(x)) if i == 0 else x

    def _level(self, i: int, x: Tensor) -> Tensor:
        return checkpoint_seq([self.layers[i]], x) if self.grad_checkpointing else self.layers[i](x)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _normed(self, i: int, x: Tensor) -> Tensor:
        return self.norm(x)

    def _keep_levels(self, count: int) -> None:
        self.layers = self.layers[:count]


def _square(img_size: int | tuple[int, int], patch_size: int) -> int:
    sides = set(img_size) if isinstance(img_size, (tuple, list)) else {img_size}
    if len(sides) != 1:
        raise ValueError(f"img_size must be square, got {img_size}")
    side = sides.pop()
    if side < patch_size or side % patch_size:
        raise ValueError(f"img_size must be a multiple of patch_size={patch_size}, got {img_size}")
    return side


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: see `adapt_checkpoint`."""
    return adapt_checkpoint(state_dict, model)


def _cfg(url: str, published: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "https://shi-labs.com/projects/dinat/checkpoints/isotropic/" + url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "fixed_input_size": True,
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


default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.in1k": _cfg(
            "nat_isotropic_small_in1k_224.pth", "22M parameters, 4.3 GFLOPs, top-1 80.0 % in the authors' table"
        ),
        "nat_isotropic_base.in1k": _cfg(
            "nat_isotropic_base_in1k_224.pth", "86M parameters, 16.9 GFLOPs, top-1 81.6 % in the authors' table"
        ),
        "dinat_isotropic_small.in1k": _cfg(
            "dinat_isotropic_small_in1k_224.pth", "22M parameters, 4.3 GFLOPs, top-1 80.8 % in the authors' table"
        ),
        "dinat_isotropic_base.in1k": _cfg(
            "dinat_isotropic_base_in1k_224.pth", "86M parameters, 16.9 GFLOPs, top-1 82.1 % in the authors' table"
        ),
        "vitrpb_small.in1k": _cfg(
            "vitrpb_small_in1k_224.pth", "22M parameters, 4.6 GFLOPs, top-1 81.2 % in the authors' table"
        ),
        "vitrpb_base.in1k": _cfg(
            "vitrpb_base_in1k_224.pth", "86M parameters, 17.5 GFLOPs, top-1 82.5 % in the authors' table"
        ),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> NATIsotropic:
    """Build `variant`: the caller's arguments win."""
    args = {**model_args, **kwargs}
    if args.get("features_only"):
        args.setdefault("pad_small", True)
    return build_model_with_cfg(
        NATIsotropic,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": min(3, args["depth"]), "feature_cls": "getter"},
        **args,
    )


_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 12, "drop_path_rate": 0.1}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 24, "drop_path_rate": 0.4}


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    """NAT-ISO-Small, ImageNet-1K."""
    return _create("nat_isotropic_small", pretrained, {**_SMALL, "dilation": 1}, kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    """NAT-ISO-Base, ImageNet-1K."""
    return _create("nat_isotropic_base", pretrained, {**_BASE, "dilation": 1}, kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    """DiNAT-ISO-Small, ImageNet-1K."""
    return _create("dinat_isotropic_small", pretrained, {**_SMALL, "dilation": 2}, kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    """DiNAT-ISO-Base, ImageNet-1K."""
    return _create("dinat_isotropic_base", pretrained, {**_BASE, "dilation": 2}, kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    """ViT-RPB-Small, ImageNet-1K."""
    return _create("vitrpb_small", pretrained, {**_SMALL, "attn": "global"}, kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    """ViT-RPB-Base, ImageNet-1K."""
    return _create("vitrpb_base", pretrained, {**_BASE, "attn": "global"}, kwargs)
