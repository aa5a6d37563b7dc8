"""Sparsifiner: a ViT whose queries attend to predicted keys, and whose patches can be dropped on the way.

Paper: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", Wei, Duke, Jiang,
Aarabi, Taylor, Shkurti, CVPR 2023 - https://arxiv.org/abs/2303.13755
Code: https://github.com/lim142857/Sparsifiner, MIT licence; written here from the formulas. Parameter names are the
authors', which are timm's ViT's but for `mask_predictor`. No weights are published; a ViT's or DeiT's are the start of
the authors' training.

The host is timm's VisionTransformer. Images are of the `img_size` that the model is built for: the predictor's
parameters have a row per token. The LV-ViT variant is not here.

Training is three losses' work (`sparsifiner_loss`), on what `forward_details` returns; a plain forward in training mode
gives the predictor no gradient, because the mask has none (`unused_parameters`). What the authors' code switches by
configuration and by training mode, `forward_details(images, reconstruct=True)` says in words: full attention, while the
scores learn to equal a teacher's.

Differences from the authors' code: see attnzoo/backbones/blocks/sparse.py; `compat="official"` is passed on to it. The
unfinished losses (maximum budget, least k, cross entropy of scores) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from attnzoo.backbones.blocks.sparse import SparseAttention, SparseDetails, SparseSettings, TokenMask
from attnzoo.backbones.blocks.stateful import StatefulViT, build_stateful, vit_checkpoint
from attnzoo.errors import UnsupportedError, check_choice, check_range

__all__ = ["Sparsifiner", "SparsifinerDetails", "checkpoint_filter_fn", "sparsifiner_loss", "teacher_outputs"]


class _NoAttention(nn.Module):
    """Stands in timm's block until the real attention, which needs more arguments, takes its place."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class SparseBlock(Block):
    """timm's block around `SparseAttention`; dropped patches are zeros after it."""

    attn: Any

    def __init__(self, dim: int, num_heads: int, num_tokens: int, settings: SparseSettings, **kwargs: Any) -> None:
        if kwargs.get("qk_norm") or kwargs.get("scale_attn_norm"):
            raise UnsupportedError("qk_norm and scale_attn_norm must be False: the method has neither")
        super().__init__(dim, num_heads, **{**kwargs, "attn_layer": _NoAttention})
        own = ("qkv_bias", "proj_bias", "attn_drop", "proj_drop", "device", "dtype")
        self.attn = SparseAttention(dim, num_heads, num_tokens, settings, **{k: kwargs[k] for k in own if k in kwargs})

    def _rest(self, x: Tensor, attended: Tensor, tokens: TokenMask | None) -> Tensor:
        x = x + self.drop_path1(self.ls1(attended))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if tokens is not None:
            x = x * F.pad(tokens.mask, (1, 0), value=True)[..., None].to(x.dtype)
        return x

    def forward(self, x: Tensor, tokens: TokenMask | None = None) -> tuple[Tensor, TokenMask | None]:  # type: ignore[override]
        """(tokens [B, N, dim], which are left) -> the same."""
        attended, tokens = self.attn(self.norm1(x), tokens)
        return self._rest(x, attended, tokens), tokens

    def detailed(self, x: Tensor, tokens: TokenMask | None, reconstruct: bool) -> tuple[Tensor, SparseDetails]:
        attended, details = self.attn.detailed(self.norm1(x), tokens, reconstruct)
        return self._rest(x, attended, None if reconstruct else details.token_mask), details


@dataclass(frozen=True)
class SparsifinerDetails:
    """One forward pass: logits [B, classes], patches [B, N - 1, dim] after the final norm, and every layer's parts."""

    logits: Tensor
    features: Tensor
    layers: tuple[SparseDetails, ...]


class Sparsifiner(StatefulViT):
    """timm's VisionTransformer with `SparseAttention`.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, the rates and
            further arguments: timm's; a class token is needed.
        attn_keep_rate, token_keep_rate: one value, or one per block.
        prune_blocks: the blocks, counted from 0, that drop patches; token_keep_rate is what they leave of all patches.
        representation_size: width of a tanh layer before the classifier, None for none.
        settings: further fields of SparseSettings, by name (reduce_n_factor, coef_topk, score_threshold, ...).
        compat: None or "official".
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        attn_keep_rate: float | Sequence[float] = 0.25,
        token_keep_rate: float | Sequence[float] = 1.0,
        prune_blocks: Sequence[int] = (),
        representation_size: int | None = None,
        settings: dict[str, Any] | None = None,
        compat: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("dynamic_img_size", "dynamic_img_pad", "patch_drop_rate", "reg_tokens"):
            if kwargs.get(name):
                raise UnsupportedError(f"{name} must be off: the predictor has a parameter per token")
        if not kwargs.get("class_token", True):
            raise UnsupportedError("class_token must be True: its attention is never pruned, and ranks the patches")
        base = SparseSettings(**{**(settings or {}), "compat": compat})
        rates = [
            _per_block(n, v, depth)
            for n, v in (("attn_keep_rate", attn_keep_rate), ("token_keep_rate", token_keep_rate))
        ]
        if bad := [i for i in prune_blocks if not 0 <= i < depth]:
            raise ValueError(f"prune_blocks must be from 0 to {depth - 1}, got {bad}")
        height, width = (s if isinstance(s, (tuple, list)) else (s, s) for s in (img_size, patch_size))
        num_tokens = 1 + (height[0] // width[0]) * (height[1] // width[1])

        def block(depth: int, attn_layer: Any = None, **arguments: Any) -> SparseBlock:
            own = replace(
                base,
                attn_keep_rate=rates[0][depth],
                token_keep_rate=rates[1][depth],
                prune_tokens=depth in set(prune_blocks),
            )
            return SparseBlock(num_tokens=num_tokens, settings=own, depth=depth, **arguments)

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            **{**kwargs, "block_fn": block, "class_token": True},
        )
        self.pre_logits: nn.Module = nn.Identity()
        if representation_size is not None:
            check_range("representation_size", representation_size, low=1)
            dd: dict[str, Any] = {k: kwargs.get(k) for k in ("device", "dtype")}
            self.pre_logits = nn.Sequential()
            self.pre_logits.add_module("fc", nn.Linear(embed_dim, representation_size, **dd))
            self.pre_logits.add_module("act", nn.Tanh())
            self.head_hidden_size = representation_size
            classes = self.num_classes
            self.head = nn.Linear(representation_size, classes, **dd) if classes > 0 else nn.Identity()

    @torch.jit.ignore
    def unused_parameters(self) -> set[str]:
        """The predictors': a plain forward gives them no gradient, `sparsifiner_loss` does."""
        return {name for name, _ in self.named_parameters() if ".mask_predictor." in name}

    def set_input_size(self, *_: Any, **__: Any) -> None:
        """Refused: build the model with another img_size (the predictor has a parameter per token)."""
        raise UnsupportedError("set_input_size is not supported: build the model with img_size=; predictors start anew")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's, on the width of the representation."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0 and self.head_hidden_size != self.embed_dim:
            like = self.head.weight
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens [B, N, dim] -> logits [B, num_classes]."""
        x = self.pre_logits(self.fc_norm(self.pool(x)))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_details(self, x: Tensor, reconstruct: bool = False) -> SparsifinerDetails:
        """Images -> logits, features and every layer's parts; forms all attention matrices.

        reconstruct: full attention and no dropped patches, while the scores (approx_attn) learn to equal an attention.
        """
        self._check_image(x)
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        layers: list[SparseDetails] = []
        block: Any
        for block in self.blocks:
            x, details = block.detailed(x, layers[-1].token_mask if layers else None, reconstruct)
            layers.append(details)
        x = self.norm(x)
        return SparsifinerDetails(self.forward_head(x), x[:, 1:], tuple(layers))


def _per_block(name: str, value: float | Sequence[float], depth: int) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value] * depth
    if len(values) != depth:
        raise ValueError(f"{name} must be one value or one per block ({depth}), got {len(values)}")
    return values


@torch.no_grad()
def teacher_outputs(model: VisionTransformer, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What a plain ViT teaches: (logits, patch tokens after the final norm, each block's attention [B, heads, N, N]).

    model: a timm VisionTransformer with timm's own attention and a class token.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    attentions = []
    block: Any
    for block in model.blocks:
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        query, key = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
        attentions.append((query @ key.mT * attn.scale).softmax(-1))
        x = block(x)
    x = model.norm(x)
    return model.forward_head(x), x[:, model.num_prefix_tokens :], attentions


DEFAULT_WEIGHTS = {
    "cls": 1.0,
    "cls_distill": 0.5,
    "token_distill": 0.5,
    "attn_recon": 0.01,
    "attn_self_distill": 0.05,
    "ratio": 2.0,
}


def sparsifiner_loss(
    details: SparsifinerDetails,
    labels: Tensor | None = None,
    teacher: tuple[Tensor, Tensor, list[Tensor]] | None = None,
    *,
    use: Sequence[str] = ("cls", "cls_distill", "token_distill"),
    weights: dict[str, float] | None = None,
    token_criterion: str = "mse",
    recon_criterion: str = "mse",
    ratio: float = 0.25,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The authors' losses: (total, each of `use` by name, already weighted).

    details: of `forward_details`; with reconstruct=True where "attn_recon" is used. labels: [B], for "cls". teacher: of
    `teacher_outputs`, for the distillations and the reconstruction. weights: over `DEFAULT_WEIGHTS`.

    cls: cross entropy. cls_distill: KL to the teacher's logits. token_distill: of the last layer's patches, those
    left, by "mse" or "kl". attn_recon: scores to the teacher's attention, by "mse" (a SUM over entries) or "kl" (scores
    as logits). attn_self_distill: scores to the layer's own full attention, squared errors summed. ratio: of the masks'
    density to `ratio`; masks have no gradient, so that it is a constant for every parameter, as in the authors' code.
    """
    check_choice("token_criterion", token_criterion, ("mse", "kl"))
    check_choice("recon_criterion", recon_criterion, ("mse", "kl"))
    if unknown := [name for name in use if name not in DEFAULT_WEIGHTS]:
        raise ValueError(f"use must be of {', '.join(DEFAULT_WEIGHTS)}, got {unknown}")
    if "cls" in use and labels is None:
        raise ValueError("labels must be given for 'cls', got None")
    if teacher is None and (needs := {"cls_distill", "token_distill", "attn_recon"} & set(use)):
        raise ValueError(f"teacher must be given for {sorted(needs)}, got None")
    scale = {**DEFAULT_WEIGHTS, **(weights or {})}
    layers = details.layers
    parts: dict[str, Tensor] = {}
    if "cls" in use:
        parts["cls"] = F.cross_entropy(details.logits, labels)  # type: ignore[arg-type]
    if teacher is not None:
        logits, tokens, attentions = teacher
        if "cls_distill" in use:
            parts["cls_distill"] = _kl(details.logits, logits)
        if "token_distill" in use:
            mine, left = details.features.flatten(0, 1), layers[-1].token_mask
            theirs = tokens.flatten(0, 1)
            if left is not None:
                mine, theirs = mine[left.mask.flatten()], theirs[left.mask.flatten()]
            parts["token_distill"] = F.mse_loss(mine, theirs) if token_criterion == "mse" else _kl(mine, theirs)
        if "attn_recon" in use:
            pairs = [(layer.approx_attn, wanted[:, :, 1:]) for layer, wanted in zip(layers, attentions)]
            parts["attn_recon"] = _mean(
                F.mse_loss(got, wanted, reduction="sum")
                if recon_criterion == "mse"
                else F.kl_div(got.log_softmax(-1), wanted, reduction="batchmean")
                for got, wanted in pairs
            )
    if "attn_self_distill" in use:
        parts["attn_self_distill"] = _mean(
            F.mse_loss(layer.approx_attn, layer.unmasked_attn[:, :, 1:], reduction="sum") for layer in layers
        )
    if "ratio" in use:
        dtype = details.logits.dtype
        parts["ratio"] = _mean((layer.attn_mask.to(dtype).mean(-1) - ratio).square().mean() for layer in layers)
    parts = {name: parts[name] * scale[name] for name in use}
    return torch.stack(list(parts.values())).sum(), parts


def _kl(mine: Tensor, theirs: Tensor) -> Tensor:
    return F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)


def _mean(values: Any) -> Tensor:
    return torch.stack(list(values)).mean()


checkpoint_filter_fn = vit_checkpoint


def _cfg(notes: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2303.13755",
        "paper_name": "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        "origin_url": "https://github.com/lim142857/Sparsifiner",
        "notes": (notes,),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "sparsifiner_tiny_patch16_224.untrained": _cfg("DeiT-T's shape; no published weights"),
        "sparsifiner_small_patch16_224.untrained": _cfg("DeiT-S's shape; no published weights"),
        "sparsifiner_base_patch16_224.untrained": _cfg("DeiT-B's shape; no published weights"),
    }
)


_create = partial(build_stateful, Sparsifiner)


@register_model
def sparsifiner_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """Sparsifiner on DeiT-T's shape."""
    return _create("sparsifiner_tiny_patch16_224", pretrained, **{"embed_dim": 192, "num_heads": 3, **kwargs})


@register_model
def sparsifiner_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """Sparsifiner on DeiT-S's shape."""
    return _create("sparsifiner_small_patch16_224", pretrained, **{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def sparsifiner_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """Sparsifiner on DeiT-B's shape."""
    return _create("sparsifiner_base_patch16_224", pretrained, **{"embed_dim": 768, "num_heads": 12, **kwargs})
