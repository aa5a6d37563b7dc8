"""TAP-RVT: the Robust Vision Transformer with token-aware pooling.

Papers:
* "Robustifying Token Attention for Vision Transformers", Guo, Stutz, Schiele, ICCV 2023 -
  https://arxiv.org/abs/2303.11126. Code: https://github.com/guoyongcs/TAPADL @6e4dbff (TAPADL_RVT), no licence file.
* "Towards Robust Vision Transformer" (RVT), Mao et al., CVPR 2022 - https://arxiv.org/abs/2105.07926.

Written here from the formulas; parameter names are the authors', so their checkpoint files load as they are.

A convolutional stem to patches of 16 pixels without position embedding; stages of attention and a convolutional MLP
(1x1, depthwise 3x3, 1x1, each with BatchNorm), grouped convolutions of stride 2 between them; norm after the mean over
tokens. In the "plus" models the first blocks scale each head's logits by a learned table, sigmoid(att_mask).

Differences from the authors' code:
* any image size (theirs: squares). A learned table stands for the `mask_grid` of tokens it was trained on; other grids
  get it resampled bilinearly. compat="official" takes its corner [:tokens, :tokens] instead, whatever the grid;
* `drop_rate` drops before the head (timm's meaning), `proj_drop_rate` is what theirs did;
* `forward_attentions` returns every block's attention (theirs always keeps them).

`tap_rvt_base_plus` has 89,396,872 parameters; the authors' table says 92.1M, which nothing in their code explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import LeveledModel, StageFeatures
from attnzoo.backbones.blocks.fan import attend
from attnzoo.backbones.blocks.neighborhood import check_heads, init_normal, unwrap_checkpoint
from attnzoo.backbones.blocks.tap import TokenAwarePooling
from attnzoo.errors import check_choice, check_range

__all__ = ["RVTAttention", "TAPRVT", "checkpoint_filter_fn"]


class RVTAttention(nn.Module):
    """Multi-head self-attention on [B, H, W, dim]; with a mask, logits are scale * q.k * sigmoid(att_mask).

    Args:
        dim: channels. num_heads: heads. qkv_bias: bias of the projections.
        attn_drop, proj_drop: dropout of the weights and the output.
        mask_grid: (height, width) of the map that the learned table `att_mask` [heads, tokens, tokens] stands for; None
            for no table. With a table the weights' matrix has to be formed.
        compat: None resamples the table for other maps; "official" takes its corner.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mask_grid: tuple[int, int] | None = None,
        compat: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_choice("compat", compat, (None, "official"))
        self.num_heads, self.head_dim = num_heads, check_heads(dim, num_heads)
        self.mask_grid, self.compat = mask_grid, compat
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.att_mask: nn.Parameter | None = None
        if mask_grid is not None:
            tokens = mask_grid[0] * mask_grid[1]
            self.att_mask = nn.Parameter(torch.empty(num_heads, tokens, tokens, **dd))
            init_normal(self.att_mask)

    def _mask(self, height: int, width: int) -> Tensor:
        """The table for a map: [heads, tokens, tokens]."""
        mask, tokens = self.att_mask, height * width
        assert mask is not None and self.mask_grid is not None
        if self.compat == "official":
            if tokens > mask.shape[1]:
                raise ValueError(
                    f"x must have at most {mask.shape[1]} tokens with compat='official', got {height} x {width}; "
                    "without it the table is resampled"
                )
            return mask[:, :tokens, :tokens]
        if (height, width) == tuple(self.mask_grid):
            return mask
        resize = partial(F.interpolate, size=(height, width), mode="bilinear", align_corners=False)
        keys = resize(mask.unflatten(2, self.mask_grid)).flatten(2).transpose(1, 2)
        return resize(keys.unflatten(2, self.mask_grid)).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        if self.att_mask is None:
            out = attend(query, key, value, self.head_dim**-0.5, dropout, attentions)
        else:
            logits = query @ key.transpose(-2, -1) * self.head_dim**-0.5
            weights = (logits * self._mask(height, width).sigmoid()).softmax(-1)
            if attentions is not None:
                attentions.append(weights)
            out = F.dropout(weights, dropout).to(value.dtype) @ value
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2).unflatten(1, (height, width))))


class _ConvMlp(nn.Module):
    """1x1 convolution, depthwise 3x3, 1x1, each with BatchNorm and all but the last with GELU, on [B, H, W, dim]."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.bn1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.bn3 = nn.BatchNorm2d(dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.bn1(self.fc1(x.permute(0, 3, 1, 2)))))
        x = F.gelu(self.bn2(self.dwconv(x)))
        return self.drop(self.bn3(self.fc2(x))).permute(0, 2, 3, 1)


class _Block(nn.Module):
    """x + attn(norm1(TAP(x))), then x + mlp(norm2(x)), on [B, H, W, dim]."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp: nn.Module, num_scales: int | None, drop_path: float, dd: dict
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.dilation_predictor = None if num_scales is None else TokenAwarePooling(dim, num_scales, **dd)

    def forward(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        seen = x if self.dilation_predictor is None else self.dilation_predictor(x)
        x = x + self.drop_path(self.attn(self.norm1(seen), attentions))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Stage(nn.Module):
    blocks: nn.ModuleList

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class _Pool(nn.Module):
    """A grouped 3x3 convolution of stride 2 on [B, H, W, dim]: each input channel makes its own outputs."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if out_dim % dim:
            raise ValueError(f"each stage's width must be a multiple of the one before, got {dim} and {out_dim}")
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, 1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _Stem(nn.Module):
    """7x7 convolution of stride 2 (padding 2), BatchNorm, max pooling, patches: [B, C, H, W] -> [B, H', W', dim]."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_choice("patch_size", patch_size, (4, 16))
        self.patch_size, last = patch_size, patch_size // 4
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, 32, 7, 2, 2, **dd),
            nn.BatchNorm2d(32, **dd),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(32, dim, last, last, **dd),
        )

    @property
    def smallest(self) -> int:
        """The smallest side of an image that leaves a token."""
        return self.patch_size - 1

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class TAPRVT(LeveledModel):
    """RVT with token-aware pooling.

    Args:
        patch_size: 16 or 4.
        base_dims, heads, depths: per stage; a stage is base_dim * heads wide.
        mlp_ratio: hidden width of the MLPs over the channels.
        num_scales: scales of the token-aware pooling; None for plain RVT blocks.
        masked_blocks: so many blocks of the first stage have a learned table over their logits.
        mask_grid: (height, width) in tokens that the tables stand for.
        compat: None, or "official"; see RVTAttention.
        num_classes: 0 for no head. in_chans: image channels. global_pool: "avg", or "" to keep the map.
        drop_rate: dropout before the head. proj_drop_rate, attn_drop_rate, pos_drop_rate: inside.
        drop_path_rate: rising linearly from 0, by a step of drop_path_rate / number of blocks (the last stays below).
    """

    def __init__(
        self,
        patch_size: int = 16,
        base_dims: Sequence[int] = (32, 32),
        heads: Sequence[int] = (6, 12),
        depths: Sequence[int] = (10, 2),
        mlp_ratio: float = 4.0,
        *,
        num_scales: int | None = 4,
        masked_blocks: int = 0,
        mask_grid: tuple[int, int] = (14, 14),
        compat: str | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        if not len(base_dims) == len(heads) == len(depths):
            raise ValueError(
                f"base_dims, heads and depths must have one entry per stage each, got {len(base_dims)}, {len(heads)} "
                f"and {len(depths)}"
            )
        dims = [base * count for base, count in zip(base_dims, heads)]
        self.num_features = dims[-1]
        self.patch_embed = _Stem(patch_size, in_chans, dims[0], **dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.feature_info = []
        stages, pools, done = [], [], 0
        for i, dim in enumerate(dims):
            blocks = []
            for j in range(depths[i]):
                attn = RVTAttention(
                    dim,
                    heads[i],
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    mask_grid=mask_grid if i == 0 and j < masked_blocks else None,
                    compat=compat,
                    **dd,
                )
                mlp = _ConvMlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                blocks.append(_Block(dim, attn, mlp, num_scales, drop_path_rate * done / sum(depths), dd))
                done += 1
            stages.append(_Stage(blocks))
            if i + 1 < len(dims):
                pools.append(_Pool(dim, dims[i + 1], **dd))
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**i, "module": f"transformers.{i}"})
        self.transformers: Any = nn.ModuleList(stages)
        self.pools = nn.ModuleList(pools)
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6, **dd)
        self.grad_checkpointing = False
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one group per block (coarse: per stage)."""
        blocks = [(r"^transformers\.(\d+)\.blocks\.(\d+)", None), (r"^pools\.(\d+)", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^(?:transformers|pools)\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def _check_size(self, x: Tensor, num_levels: int) -> None:
        self._check_image(x)
        if min(x.shape[2:]) < self.patch_embed.smallest:
            height, width, smallest = *x.shape[2:], self.patch_embed.smallest
            raise ValueError(f"x must be at least {smallest} pixels high and wide, got {height} x {width}")

    @property
    def num_levels(self) -> int:
        return len(self.transformers)

    def _enter(self, i: int, x: Tensor) -> Tensor:
        return self.pos_drop(self.patch_embed(x)) if i == 0 else self.pools[i - 1](x)

    def _level(self, i: int, x: Tensor) -> Tensor:
        for block in self.transformers[i].blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x

    def _finish(self, x: Tensor) -> Tensor:
        return x  # the norm comes after the mean: forward_head

    def _normed(self, i: int, x: Tensor) -> Tensor:
        return self.norm(x) if i == self.num_levels - 1 else x

    def _keep_levels(self, count: int) -> None:
        self.transformers = self.transformers[:count]
        self.pools = self.pools[: count - 1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` -> logits [B, num_classes] of its normed mean; with pre_logits that mean."""
        x = self.head_drop(self.norm(x.mean((1, 2)) if self.global_pool == "avg" else x))
        return x if pre_logits else self.get_classifier()(x)

    def forward_attentions(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images -> (logits, every block's attention weights [B, heads, N, N]), for `attention_diversification_loss`.

        The matrices are formed here and only here; blocks are not checkpointed.
        """
        self._check_size(x, self.num_levels)
        attentions: list[Tensor] = []
        for i, stage in enumerate(self.transformers):
            x = self._enter(i, x)
            for block in stage.blocks:
                x = block(x, attentions)
        return self.forward_head(x), attentions


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: taken out of its entry, without "module."."""
    return {key.removeprefix("module."): value for key, value in unwrap_checkpoint(state_dict).items()}


def _cfg(published: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "other",
        "paper_ids": "arXiv:2303.11126",
        "paper_name": "Robustifying Token Attention for Vision Transformers",
        "origin_url": "https://github.com/guoyongcs/TAPADL",
        "notes": (published,),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "tap_rvt_tiny.in1k": _cfg("RVT-Ti with TAP; no accuracy in the authors' table"),
        "tap_rvt_base_plus.in1k": _cfg("92.1M parameters (counted: 89.4M), top-1 83.1 % in the authors' table"),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> TAPRVT:
    args = {**model_args, **kwargs}
    args.pop("img_size", None)  # any size is taken as it comes
    return build_model_with_cfg(
        TAPRVT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": StageFeatures},
        **args,
    )


@register_model
def tap_rvt_tiny(pretrained: bool = False, **kwargs: Any) -> TAPRVT:
    """RVT-Ti with token-aware pooling over 4 scales."""
    return _create("tap_rvt_tiny", pretrained, {"base_dims": (32, 32), "heads": (6, 12), "depths": (10, 2)}, kwargs)


@register_model
def tap_rvt_base_plus(pretrained: bool = False, **kwargs: Any) -> TAPRVT:
    """RVT-B* (5 blocks with a learned table) with token-aware pooling over 4 scales."""
    args = {"base_dims": (64,), "heads": (12,), "depths": (12,), "masked_blocks": 5}
    return _create("tap_rvt_base_plus", pretrained, args, kwargs)
