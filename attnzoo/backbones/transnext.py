"""TransNeXt: aggregated attention (a window, a pooled view of the map and learned weights) and convolutional GLU.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", Shi, CVPR 2024 -
https://arxiv.org/abs/2311.17132. Code: https://github.com/DaiShiResearch/TransNeXt @c8a9974 (classification/),
Apache-2.0 licence; written here from the formulas. Parameter names are the authors', so their files load as they are.

Four stages: an overlapping convolution of stride 4, then 2; blocks of attention and ConvGLU; a norm after every stage.
Stages with sr_ratio 1 use plain length-scaled cosine attention.

Differences from the authors' code (their outputs are reproduced as they are; no quirk is switched):
* any image size, not only squares of `img_size` in multiples of 32: lengths, pooled sizes and relative positions follow
  the map; `img_size` is only the default of `pretrain_size`, the unit of relative positions;
* a pretrain_size that leaves a stage a single row or column raises ValueError (theirs divides by zero: NaN);
* `drop_rate` drops before the head (timm's meaning), `proj_drop_rate` is what theirs did; no attention dropout;
* pixel-wise parts follow one layout, channels-last; their CUDA extension is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from attnzoo.backbones.blocks.aggregated import AggregatedAttention, CosineAttention
from attnzoo.backbones.blocks.contract import LeveledModel, StageFeatures
from attnzoo.backbones.blocks.neighborhood import drop_path_rates, init_weights, unwrap_checkpoint
from attnzoo.errors import check_range, per_axis

__all__ = ["ConvGLU", "TransNeXt", "checkpoint_filter_fn"]


class _DepthwiseConv(nn.Module):
    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvGLU(nn.Module):
    """Convolutional gated linear unit on [B, H, W, dim]: fc2(GELU(depthwise 3x3(a)) * b), [a, b] = fc1(x).

    hidden_dim: of a plain MLP of the same cost; the gate makes it int(2 * hidden_dim / 3).
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden_dim = int(2 * hidden_dim / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, **dd)
        self.dwconv = _DepthwiseConv(hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.fc1(x).chunk(2, -1)
        return self.drop(self.fc2(self.drop(F.gelu(self.dwconv(x)) * gate)))


class _Block(nn.Module):
    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, norm_layer: Callable) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.norm2 = norm_layer(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _PatchEmbed(nn.Module):
    """An overlapping convolution, then a norm: [B, C, H, W] -> [B, ceil(H / stride), ceil(W / stride), dim]."""

    def __init__(self, kernel_size: int, stride: int, in_chans: int, dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


_LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class TransNeXt(LeveledModel):
    """TransNeXt.

    Args:
        img_size: side, or (height, width), of the images that the weights are for; any other size works as well.
        pretrain_size: side, or (height, width), of the images that the position biases were trained at; None for
            img_size. Weights fine-tuned from 224 keep 224.
        window_size: odd window side per stage (unused, None, where sr_ratio is 1).
        patch_size: stride of the first convolution (kernel 2 * patch_size - 1); later stages halve.
        embed_dims, num_heads, mlp_ratios, depths, sr_ratios: per stage; sr_ratio 1 is plain cosine attention.
        fixed_pool_size: side of every pooled view, instead of map // sr_ratio.
        num_classes: 0 for no head. in_chans: image channels. global_pool: "avg", or "" to keep the map.
        qkv_bias: see AggregatedAttention.
        drop_rate: dropout before the head. proj_drop_rate: after attention and in the ConvGLU.
        attn_drop_rate: must be 0.0. drop_path_rate: of the last block, rising linearly from 0.
        norm_layer: called with a channel count.

    Maps of `forward_intermediates` are after their stage's norm, as the authors' detection backbone gives them; its
    `norm` argument changes nothing.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        pretrain_size: int | tuple[int, int] | None = None,
        window_size: Sequence[int | None] = (3, 3, 3, None),
        patch_size: int = 4,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 15, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        *,
        fixed_pool_size: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = _LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        count = len(depths)
        per_stage = {
            "window_size": window_size,
            "embed_dims": embed_dims,
            "num_heads": num_heads,
            "mlp_ratios": mlp_ratios,
            "sr_ratios": sr_ratios,
        }
        for name, given in per_stage.items():
            if len(given) != count:
                raise ValueError(f"{name} must have one entry per stage ({count}, as depths), got {list(given)}")
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        trained_at = per_axis("pretrain_size", img_size if pretrain_size is None else pretrain_size, 2, int, low=1)
        reductions = [patch_size * 2**i for i in range(count)]
        if min(trained_at) // reductions[-1] < 2:
            raise ValueError(
                f"pretrain_size must be at least {2 * reductions[-1]} on both sides, got {trained_at}: stage "
                f"{count} sees one token per {reductions[-1]} pixels, and relative positions are divided by the tokens "
                "of a side less one"
            )
        norm_layer = partial(norm_layer, **dd)
        self.num_stages = count
        self.num_features = embed_dims[-1]
        self.feature_info = []
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, (dim, heads, ratio, sr_ratio) in enumerate(zip(embed_dims, num_heads, mlp_ratios, sr_ratios)):
            shared = {
                "qkv_bias": qkv_bias,
                "pretrain_size": tuple(side // reductions[i] for side in trained_at),
                "attn_drop": attn_drop_rate,
                "proj_drop": proj_drop_rate,
                **dd,
            }
            window = window_size[i]
            blocks = []
            for _ in range(depths[i]):
                attn: nn.Module
                if sr_ratio == 1:
                    attn = CosineAttention(dim, heads, **shared)
                elif window is None:
                    raise ValueError(f"window_size[{i}] must be an odd number where sr_ratios[{i}] is not 1, got None")
                else:
                    attn = AggregatedAttention(dim, heads, window, sr_ratio, fixed_pool_size=fixed_pool_size, **shared)
                mlp = ConvGLU(dim, int(dim * ratio), proj_drop_rate, **dd)
                blocks.append(_Block(dim, attn, mlp, next(rates), norm_layer))
            entry = (2 * patch_size - 1, patch_size, in_chans) if i == 0 else (3, 2, embed_dims[i - 1])
            setattr(self, f"patch_embed{i + 1}", _PatchEmbed(*entry, dim, **dd))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            setattr(self, f"norm{i + 1}", norm_layer(dim))
            self.feature_info.append({"num_chs": dim, "reduction": reductions[i], "module": f"norm{i + 1}"})
        self.grad_checkpointing = False
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.apply(_init)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Embeddings, temperatures and everything of the position biases, as in the authors' training."""
        parts = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {name for name, _ in self.named_parameters() if any(part in name for part in parts)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one group per block (coarse: per stage)."""
        blocks = [(r"^block(\d+)\.(\d+)", None), (r"^(?:patch_embed|norm)(\d+)", (0,))]
        return {"stem": r"^patch_embed1", "blocks": r"^(?:patch_embed|block|norm)(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @property
    def num_levels(self) -> int:
        return self.num_stages

    def _enter(self, i: int, x: Tensor) -> Tensor:
        return getattr(self, f"patch_embed{i + 1}")(x if i == 0 else x.permute(0, 3, 1, 2))

    def _level(self, i: int, x: Tensor) -> Tensor:
        for block in getattr(self, f"block{i + 1}"):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return getattr(self, f"norm{i + 1}")(x)

    def _finish(self, x: Tensor) -> Tensor:
        return x  # each stage ends with its norm

    def _keep_levels(self, count: int) -> None:
        for i in range(count, self.num_stages):
            for name in ("patch_embed", "block", "norm"):
                delattr(self, f"{name}{i + 1}")
        self.num_stages = count

    def _drop_final_norm(self) -> None:
        setattr(self, f"norm{self.num_stages}", nn.Identity())


def _init(module: nn.Module) -> None:
    init_weights(module)
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: taken out of its entry, names and tensors as they are.

    Position tables of other sizes need nothing: the biases come from an MLP. Buffers that some of the authors' versions
    saved (relative_pos_index*, relative_coords_table*, seq_length_scale, padding_mask) are dropped.
    """
    rebuilt = ("relative_pos_index", "relative_coords_table", "seq_length_scale", "padding_mask")
    return {k: v for k, v in unwrap_checkpoint(state_dict).items() if not k.split(".")[-1].startswith(rebuilt)}


def _cfg(size: str, file: str, published: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://huggingface.co/DaiShiResearch/{size}/resolve/main/{file}",
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
        "paper_ids": "arXiv:2311.17132",
        "paper_name": "TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        "origin_url": "https://github.com/DaiShiResearch/TransNeXt",
        "notes": (published,),
        **kwargs,
    }


_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_TABLE = "{} parameters, {} FLOPs, top-1 {} % in the authors' table"

default_cfgs = generate_default_cfgs(
    {
        "transnext_micro.in1k": _cfg(
            "transnext-micro-224-1k", "transnext_micro_224_1k.pth", _TABLE.format("12.8M", "2.7G", 82.5)
        ),
        "transnext_tiny.in1k": _cfg(
            "transnext-tiny-224-1k", "transnext_tiny_224_1k.pth", _TABLE.format("28.2M", "5.7G", 84.0)
        ),
        "transnext_small.in1k": _cfg(
            "transnext-small-224-1k", "transnext_small_224_1k.pth", _TABLE.format("49.7M", "10.3G", 84.7)
        ),
        "transnext_base.in1k": _cfg(
            "transnext-base-224-1k", "transnext_base_224_1k.pth", _TABLE.format("89.7M", "18.4G", 84.8)
        ),
        "transnext_micro_AAAA.in1k": _cfg(
            "transnext-micro-AAAA-256-1k",
            "transnext_micro_AAAA_256_1k.pth",
            _TABLE.format("13.1M", "3.3G", 82.6),
            input_size=(3, 256, 256),
            pool_size=(8, 8),
        ),
        "transnext_small_384.in1k": _cfg(
            "transnext-small-384-1k-ft-1k",
            "transnext_small_384_1k_ft_1k.pth",
            _TABLE.format("49.7M", "32.1G", 86.0),
            **_384,
        ),
        "transnext_base_384.in1k": _cfg(
            "transnext-base-384-1k-ft-1k",
            "transnext_base_384_1k_ft_1k.pth",
            _TABLE.format("89.7M", "56.3G", 86.2),
            **_384,
        ),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> TransNeXt:
    args = {**model_args, **kwargs}
    return build_model_with_cfg(
        TransNeXt,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": StageFeatures},
        **args,
    )


_MICRO = {"depths": (2, 2, 15, 2)}
_TINY = {**_MICRO, "embed_dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24)}
_SMALL = {**_TINY, "depths": (5, 5, 22, 5)}
_BASE = {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}
_FROM_224 = {"img_size": 384, "pretrain_size": 224}


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Micro, ImageNet-1K."""
    return _create("transnext_micro", pretrained, _MICRO, kwargs)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Tiny, ImageNet-1K."""
    return _create("transnext_tiny", pretrained, _TINY, kwargs)


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Small, ImageNet-1K."""
    return _create("transnext_small", pretrained, _SMALL, kwargs)


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Base, ImageNet-1K."""
    return _create("transnext_base", pretrained, _BASE, kwargs)


@register_model
def transnext_micro_AAAA(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Micro with aggregated attention in all four stages, ImageNet-1K at 256."""
    args = {**_MICRO, "img_size": 256, "window_size": (3, 3, 3, 3), "sr_ratios": (16, 8, 4, 2)}
    return _create("transnext_micro_AAAA", pretrained, args, kwargs)


@register_model
def transnext_small_384(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Small, fine-tuned at 384 on ImageNet-1K."""
    return _create("transnext_small_384", pretrained, {**_SMALL, **_FROM_224}, kwargs)


@register_model
def transnext_base_384(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Base, fine-tuned at 384 on ImageNet-1K."""
    return _create("transnext_base_384", pretrained, {**_BASE, **_FROM_224}, kwargs)
