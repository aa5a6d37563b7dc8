"""FAN: fully attentional networks (token mixing, then channel processing), and FAN with token-aware pooling (TAP-FAN).

Papers:
* "Understanding The Robustness in Vision Transformers", Zhou, Yu, Xie, Xiao, Anandkumar, Feng, Alvarez, ICML 2022 -
  https://arxiv.org/abs/2204.12451. Code: https://github.com/NVlabs/FAN @ee1b7df, NVIDIA source code licence
  (non-commercial).
* "Robustifying Token Attention for Vision Transformers", Guo, Stutz, Schiele, ICCV 2023 -
  https://arxiv.org/abs/2303.11126. Code: https://github.com/guoyongcs/TAPADL @6e4dbff, no licence file.

Written here from the formulas; the convolutional stem, the Fourier position code and the class attention block are
timm's (XCiT's), the hybrid's first two stages timm's ConvNeXt stages. Parameter names are the authors', so their
checkpoint files load as they are. FAN-Swin is in fan_swin.py, RVT with TAP in tap_rvt.py.

A stem to tokens of 16 pixels, `depth` blocks, two blocks in which a class token attends to all tokens, head on the
class token.

Kept from the authors' code, on purpose (weights depend on it): the MLP has no activation between its Linears but the
one inside its local branch; a class block replaces all tokens by their second norm (`tokens_norm`) and then doubles the
patch tokens; the stochastic depth rate is the same in all blocks; the norm inside channel processing has eps 1e-5, all
others 1e-6; the position code is computed in float32; in the hybrid's stages LayerNorm divides the variance by C - 1
(the authors' LayerNorm2d does for channels-last tensors, as all are after the stem; timm's ConvNeXt divides by C).

Differences from the authors' code:
* any image size: TAP and the MLPs act on maps (TAP-FAN is square only), and the hybrid stem zero-pads images at the
  right and bottom to multiples of 16 (theirs drops those pixels);
* `drop_rate` drops before the head (timm's meaning), `proj_drop_rate` is what theirs did;
* `forward_attentions` returns every block's attention (FAN's own crashes, TAP-FAN always keeps them);
* no squeeze-excite variant (theirs can't run), no sr_ratio, sharpen_attn, linear (theirs ignores them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.xcit import ClassAttentionBlock, PositionalEncodingFourier
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import LeveledModel
from attnzoo.backbones.blocks.fan import FANBlock
from attnzoo.backbones.blocks.fan_stem import ConvStem, HybridStem
from attnzoo.backbones.blocks.neighborhood import init_normal, init_weights, unwrap_checkpoint
from attnzoo.errors import check_range

__all__ = ["FAN", "checkpoint_filter_fn"]

_LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class _Downsample(nn.Module):
    """Between blocks of different widths: a 3x3 convolution of stride 2, then a norm (eps 1e-5)."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, 2, 1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class FAN(LeveledModel):
    """Fully attentional network.

    Args:
        patch_size: stride of the convolutional stem: 4, 8 or 16.
        embed_dim: channels. depth: blocks.
        num_heads: heads, one number or one per block.
        mlp_ratio: hidden width of the MLPs over the channels.
        channel_dims: channels of each block instead of embed_dim; where they change, a convolution of stride 2 lies
            between.
        channel_heads: heads of each block's channel processing; None for num_heads.
        cls_attn_layers: blocks of class attention. tokens_norm: see the class block in this module's docstring.
        use_pos_embed: Fourier position code. eta: initial layer scale.
        hybrid_depths, hybrid_dims: ConvNeXt stages as the stem instead of convolutions; None for none.
        hybrid_patch_size: patches of that stem's map.
        num_scales: token-aware pooling over so many scales before each block's token mixing; None for none.
        num_classes: 0 for no head. in_chans: image channels.
        global_pool: "token" (the class token), or "" to keep all tokens, class token first.
        qkv_bias: bias of the query, key and value projections.
        drop_rate: dropout before the head. pos_drop_rate, proj_drop_rate, attn_drop_rate: inside (theirs: one rate).
        drop_path_rate: stochastic depth of every block.
        head_init_scale: of a new head's weights.
        norm_layer: called with a channel count.

    `forward_features` returns tokens [B, 1 + N, num_features] after the class blocks and the final norm; the maps of
    `forward_intermediates` are the blocks' outputs.
    """

    pool_choices = ("token", "")

    def __init__(
        self,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int | Sequence[int] = 4,
        mlp_ratio: float = 4.0,
        *,
        channel_dims: Sequence[int] | None = None,
        channel_heads: Sequence[int] | None = None,
        cls_attn_layers: int = 2,
        tokens_norm: bool = True,
        use_pos_embed: bool = True,
        eta: float = 1.0,
        hybrid_depths: Sequence[int] | None = None,
        hybrid_dims: Sequence[int] = (128, 256),
        hybrid_patch_size: int = 2,
        num_scales: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        norm_layer: Callable[..., nn.Module] = _LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        check_range("depth", depth, low=1)
        dims = [embed_dim] * depth if channel_dims is None else list(channel_dims)
        heads = [num_heads] * depth if isinstance(num_heads, int) else list(num_heads)
        gates = [None] * depth if channel_heads is None else list(channel_heads)
        for name, given in (("channel_dims", dims), ("num_heads", heads), ("channel_heads", gates)):
            if len(given) != depth:
                raise ValueError(f"{name} must have one entry per block (depth {depth}), got {given}")
        if dims[0] != embed_dim:
            raise ValueError(f"channel_dims must begin with embed_dim {embed_dim}, got {dims}")
        self.embed_dim = embed_dim
        self.num_features = dims[-1]
        self.patch_embed: nn.Module
        if hybrid_depths is None:
            self.patch_embed, reduction = ConvStem(patch_size, in_chans, embed_dim, **dd), patch_size
        else:
            stages = len(hybrid_depths)
            if len(hybrid_dims) < stages:
                raise ValueError(f"hybrid_dims must have an entry for each of {stages} stages, got {list(hybrid_dims)}")
            self.patch_embed = HybridStem(
                hybrid_depths, hybrid_dims[:stages], hybrid_patch_size, in_chans, embed_dim, **dd
            )
            reduction = self.patch_embed.reduction
        self.pos_embed = PositionalEncodingFourier(dim=embed_dim, **dd) if use_pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.feature_info = []
        blocks = []
        for i, dim in enumerate(dims):
            block = FANBlock(
                dim,
                heads[i],
                mlp_ratio,
                channel_heads=gates[i],
                qkv_bias=qkv_bias,
                drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate,
                eta=eta,
                num_scales=num_scales,
                norm_layer=norm_layer,
                **dd,
            )
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"blocks.{i}"})
            if i < depth - 1 and dims[i + 1] != dim:
                block.downsample = _Downsample(dim, dims[i + 1], **dd)
                reduction *= 2
            blocks.append(block)
        self.blocks: Any = nn.ModuleList(blocks)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1], **dd))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(
                dims[-1],
                heads[-1],
                mlp_ratio,
                qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                norm_layer=norm_layer,  # type: ignore[arg-type]
                eta=eta,
                tokens_norm=tokens_norm,
                **dd,
            )
            for _ in range(cls_attn_layers)
        )
        self.norm = norm_layer(dims[-1], **dd)
        self.grad_checkpointing = False
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.apply(init_weights)
        init_normal(self.cls_token)
        if num_classes > 0 and head_init_scale != 1.0:
            with torch.no_grad():
                for parameter in self.get_classifier().parameters():
                    parameter.mul_(head_init_scale)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The class token, temperatures and layer scales' relatives that the authors train without decay."""
        return {n for n, _ in self.named_parameters() if n == "cls_token" or n.endswith(".temperature")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, one group per block, the class blocks."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^cls_attn_blocks\.(\d+)", (99998,)), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @property
    def num_levels(self) -> int:
        return len(self.blocks)

    def _enter(self, i: int, x: Tensor) -> Tensor:
        if i > 0:
            between = self.blocks[i - 1].downsample
            return x if between is None else between(x)
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed(1, *x.shape[1:3]).permute(0, 2, 3, 1)
        return self.pos_drop(x)

    def _level(self, i: int, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self.blocks[i], x)
        return self.blocks[i](x)

    def _finish(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], 1)
        for block in self.cls_attn_blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def _normed(self, i: int, x: Tensor) -> Tensor:
        return self.norm(x) if x.shape[-1] == self.num_features else x

    def _keep_levels(self, count: int) -> None:
        self.blocks = self.blocks[:count]
        self.blocks[-1].downsample = None
        if self.cls_token.shape[-1] != self.feature_info[count - 1]["num_chs"]:
            self.cls_token = nn.Parameter(self.cls_token.new_zeros(1, 1, self.feature_info[count - 1]["num_chs"]))

    def _drop_final_norm(self) -> None:
        self.norm = nn.Identity()
        self.cls_attn_blocks = nn.ModuleList()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> logits [B, num_classes] of the class token (of every token where global_pool
        is ""); with pre_logits the features."""
        x = self.head_drop(x[:, 0] if self.global_pool == "token" else x)
        return x if pre_logits else self.get_classifier()(x)

    def forward_attentions(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images -> (logits, every block's attention weights [B, heads, N, N]), for `attention_diversification_loss`.

        The matrices are formed here and only here; blocks are not checkpointed.
        """
        self._check_size(x, self.num_levels)
        attentions: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(self._enter(i, x), attentions)
        return self.forward_head(self._finish(x)), attentions


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: taken out of its entry, without "module.", the position
    code's older name and XCiT-style joint qkv of the class blocks as they are called now."""
    fitted = {}
    own = model.state_dict()
    for key, value in unwrap_checkpoint(state_dict).items():
        key = key.removeprefix("module.").replace("pos_embeder.", "pos_embed.")
        if key.startswith("cls_attn_blocks.") and ".attn.qkv." in key and key not in own:
            for name, part in zip("qkv", value.chunk(3)):
                fitted[key.replace(".qkv.", f".{name}.")] = part
        else:
            fitted[key] = value
    return fitted


_FAN = "https://github.com/zhoudaquan/fully_attentional_network_ckpt/releases/download/v1.0.0/"


def _cfg(file: str, published: str, **kwargs: Any) -> dict[str, Any]:
    tap = file.startswith("tap")
    return {
        "url": _FAN + file if file and not tap else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0.0",
        "classifier": "head",
        "license": "other" if tap else "nvidia-source-code-non-commercial",
        "paper_ids": "arXiv:2303.11126" if tap else "arXiv:2204.12451",
        "paper_name": "Robustifying Token Attention for Vision Transformers"
        if tap
        else "Understanding The Robustness in Vision Transformers",
        "origin_url": "https://github.com/guoyongcs/TAPADL" if tap else "https://github.com/NVlabs/FAN",
        "notes": (published,),
        **kwargs,
    }


_TABLE = "{} parameters, top-1 {} % in the authors' table"
_HYBRID = {"first_conv": "patch_embed.backbone.stem.0"}
_HYBRID_384 = {**_HYBRID, "input_size": (3, 384, 384)}

default_cfgs = generate_default_cfgs(
    {
        "fan_tiny_12_p16_224.in1k": _cfg("fan_vit_tiny.pth.tar", _TABLE.format("7.3M", 79.2)),
        "fan_small_12_p16_224.in1k": _cfg("fan_vit_small.pth.tar", _TABLE.format("28.0M", 82.5)),
        "fan_base_18_p16_224.in1k": _cfg("fan_vit_base.pth.tar", _TABLE.format("54.0M", 83.6)),
        "fan_tiny_8_p4_hybrid.in1k": _cfg("fan_hybrid_tiny.pth.tar", _TABLE.format("7.4M", 80.1), **_HYBRID),
        "fan_small_12_p4_hybrid.in1k": _cfg("fan_hybrid_small.pth.tar", _TABLE.format("26.3M", 83.5), **_HYBRID),
        "fan_base_16_p4_hybrid.in1k": _cfg("fan_hybrid_base.pth.tar", _TABLE.format("50.4M", 83.9), **_HYBRID),
        "fan_base_16_p4_hybrid.in22k_ft_in1k": _cfg(
            "fan_hybrid_base_in22k_1k.pth.tar", _TABLE.format("50.4M", 85.3), **_HYBRID
        ),
        "fan_base_16_p4_hybrid.in22k_ft_in1k_384": _cfg(
            "fan_hybrid_base_in22k_1k_384.pth.tar", _TABLE.format("50.4M", 85.6), **_HYBRID_384
        ),
        "fan_large_16_p4_hybrid.in22k_ft_in1k": _cfg(
            "fan_hybrid_large_in22k_1k.pth.tar", _TABLE.format("76.8M", 86.5), **_HYBRID
        ),
        "fan_large_16_p4_hybrid.in22k_ft_in1k_384": _cfg(
            "fan_hybrid_large_in22k_1k_384.pth.tar", _TABLE.format("76.8M", 87.1), **_HYBRID_384
        ),
        # no file of these is named by the authors
        "fan_large_16_p4_hybrid.in1k": _cfg("", _TABLE.format("76.8M", 84.3), **_HYBRID),
        "tap_fan_tiny_12_p16_224.in1k": _cfg("tap", "FAN-T-ViT with TAP; no accuracy in the authors' table"),
        "tap_fan_base_16_p4_hybrid.in1k": _cfg("tap", _TABLE.format("50.7M", 84.3), **_HYBRID),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> FAN:
    args = {**model_args, **kwargs}
    args.pop("img_size", None)  # any size is taken as it comes
    return build_model_with_cfg(
        FAN,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(args["depth"])), "feature_cls": "getter"},
        **args,
    )


_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 4}
_TINY_HYBRID = {"embed_dim": 192, "depth": 8, "num_heads": 8, "hybrid_depths": (3, 3)}
_BASE_HYBRID = {**_TINY_HYBRID, "embed_dim": 448, "depth": 16}
_LARGE_HYBRID = {"embed_dim": 480, "depth": 22, "num_heads": 10, "hybrid_depths": (3, 5), "head_init_scale": 0.001}


@register_model
def fan_tiny_12_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-T-ViT, ImageNet-1K."""
    return _create("fan_tiny_12_p16_224", pretrained, _TINY, kwargs)


@register_model
def fan_small_12_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-S-ViT, ImageNet-1K."""
    return _create("fan_small_12_p16_224", pretrained, {**_TINY, "embed_dim": 384, "num_heads": 8}, kwargs)


@register_model
def fan_base_18_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-B-ViT, ImageNet-1K."""
    return _create("fan_base_18_p16_224", pretrained, {"embed_dim": 448, "depth": 18, "num_heads": 8}, kwargs)


@register_model
def fan_tiny_8_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-T-Hybrid, ImageNet-1K."""
    return _create("fan_tiny_8_p4_hybrid", pretrained, _TINY_HYBRID, kwargs)


@register_model
def fan_small_12_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-S-Hybrid (10 blocks, whatever the name says), ImageNet-1K."""
    return _create("fan_small_12_p4_hybrid", pretrained, {**_TINY_HYBRID, "embed_dim": 384, "depth": 10}, kwargs)


@register_model
def fan_base_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-B-Hybrid, ImageNet-1K, and ImageNet-22K then 1K at 224 and 384."""
    return _create("fan_base_16_p4_hybrid", pretrained, _BASE_HYBRID, kwargs)


@register_model
def fan_large_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-L-Hybrid (22 blocks, whatever the name says), ImageNet-22K then 1K at 224 and 384."""
    return _create("fan_large_16_p4_hybrid", pretrained, _LARGE_HYBRID, kwargs)


@register_model
def tap_fan_tiny_12_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-T-ViT with token-aware pooling over 4 scales."""
    return _create("tap_fan_tiny_12_p16_224", pretrained, {**_TINY, "num_scales": 4}, kwargs)


@register_model
def tap_fan_base_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-B-Hybrid with token-aware pooling over 4 scales."""
    return _create("tap_fan_base_16_p4_hybrid", pretrained, {**_BASE_HYBRID, "num_scales": 4}, kwargs)
