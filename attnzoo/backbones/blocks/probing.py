"""Probing heads: attention that pools a frozen model's tokens for a classifier.

Papers: "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling", Psomas et al., 2025 -
https://arxiv.org/abs/2506.10178 (efficient probing); "Keep It SimPool: Who Said Supervised Transformers Suffer from
Attention Deficit?", Psomas et al., ICCV 2023 - https://arxiv.org/abs/2309.06891 (SimPool).
Code: https://github.com/billpsomas/efficient-probing; written here from the formulas. Parameter names are the authors'.

Differences from the authors' code: SimPool keeps the batch axis of a single image, which the code drops
(`compat="official"` does so too); efficient probing's num_heads, of which only 1 works there, is gone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.errors import check_choice, check_range, check_tensor

__all__ = ["EfficientProbing", "Probe", "SimPool", "attach_probe", "probe_head"]


class EfficientProbing(nn.Module):
    """Learned queries, each pooling its own slice of the values; keys are the tokens as they are.

    Args:
        dim: width of the tokens.
        num_queries: must divide dim // d_out.
        d_out: the output is dim // d_out wide.
        qkv_bias: bias of the value projection.

    [B, N, dim] -> [B, dim // d_out]: query j attends with softmax(dim ** -0.5 * q_j . x) to slice j of the values.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int = 32,
        d_out: int = 1,
        qkv_bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if d_out < 1 or dim % d_out:
            raise ValueError(f"d_out must divide dim={dim}, got {d_out!r}")
        if num_queries < 1 or (dim // d_out) % num_queries:
            raise ValueError(f"num_queries must divide dim // d_out = {dim // d_out}, got {num_queries!r}")
        self.num_queries = num_queries
        self.out_features = dim // d_out
        self.cls_token = nn.Parameter(torch.zeros(1, num_queries, dim, **dd))
        self.v = nn.Linear(dim, dim // d_out, bias=qkv_bias, **dd)
        if not self.cls_token.is_meta:
            trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, dim // d_out]."""
        check_tensor("x", x, ndim=3)
        weights = (self.cls_token * x.shape[-1] ** -0.5 @ x.transpose(1, 2)).softmax(-1)
        value = self.v(x).unflatten(-1, (self.num_queries, -1))
        return torch.einsum("bqn,bnqd->bqd", weights, value).flatten(1)


class SimPool(nn.Module):
    """One query, the mean of the tokens, pools the normalised tokens.

    Args:
        dim: width of the tokens.
        num_heads: must divide dim.
        qkv_bias: bias of the query and key projections; there is no value and no output projection.
        compat: None, or "official", where a batch of one image gives [dim].

    [B, N, dim] -> [B, dim].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        qkv_bias: bool = False,
        *,
        compat: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_heads(dim, num_heads)
        check_choice("compat", compat, (None, "official"))
        self.compat = compat
        self.num_heads = num_heads
        self.out_features = dim
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.wq = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, dim]."""
        check_tensor("x", x, ndim=3)
        tokens = self.norm_patches(x)
        query, key, value = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.wq(x.mean(1, keepdim=True)), self.wk(tokens), tokens)
        )
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1)
        return out[0] if self.compat and len(out) == 1 else out


POOLINGS: dict[str, type[nn.Module]] = {"efficient": EfficientProbing, "simpool": SimPool}


def probe_head(dim: int, num_classes: int, pooling: str = "efficient", **kwargs: Any) -> nn.Sequential:
    """The authors' full probe: pooling, batch norm without parameters (eps 1e-6), Linear.

    dim: width of the tokens. pooling: "efficient" or "simpool", built with kwargs. [B, N, dim] -> [B, num_classes].
    """
    check_choice("pooling", pooling, POOLINGS)
    check_range("num_classes", num_classes, low=1)
    pool = POOLINGS[pooling](dim, **kwargs)
    dd = {k: kwargs[k] for k in ("device", "dtype") if k in kwargs}
    width: int = pool.out_features  # type: ignore[assignment]
    return nn.Sequential(pool, nn.BatchNorm1d(width, affine=False, eps=1e-6, **dd), nn.Linear(width, num_classes, **dd))


class Probe(nn.Module):
    """A frozen timm model under a head that learns: what `attach_probe` and `attach_aggregation` return.

    `model` is the frozen model (always in eval mode, never with a gradient), `head` what learns; save
    `probe.head.state_dict()`. forward: images -> the head's output; `tokens(images)`: what the head reads, [B, N, dim].
    """

    def __init__(self, model: nn.Module, head: nn.Module, prefix_tokens: bool) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.head = head
        self.prefix_tokens = prefix_tokens

    def train(self, mode: bool = True) -> Probe:
        super().train(mode)
        self.model.eval()
        return self

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tensor:
        """Images -> the frozen model's last tokens, [B, N, dim]."""
        out = self.model.forward_features(x)  # type: ignore[operator]
        if out.ndim == 4:
            return out.flatten(1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else out.flatten(2).mT
        if out.ndim != 3:
            raise ValueError(f"model must give tokens or maps from forward_features, got {tuple(out.shape)}")
        return out if self.prefix_tokens else out[:, getattr(self.model, "num_prefix_tokens", 0) :]

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> the head's output: logits [B, num_classes], or descriptors."""
        return self.head(self.tokens(x))


def attach_probe(
    model: nn.Module, num_classes: int, pooling: str = "efficient", *, prefix_tokens: bool = True, **kwargs: Any
) -> Probe:
    """A probe on `model`, any timm model: its last tokens (or map), pooled by attention, classified.

    model: frozen in place (requires_grad off, eval mode). num_classes: of the probe. pooling: "efficient" or
    "simpool". prefix_tokens: let class and register tokens be pooled too, as the authors do; False for patches only.
    kwargs: of the pooling (num_queries, d_out, ... / num_heads). The head has the model's device and dtype.

    Only `probe.head` has parameters that learn: `optimizer = AdamW(probe.head.parameters())`.
    """
    width, options = frozen_host(model)
    return Probe(model, probe_head(width, num_classes, pooling, **{**options, **kwargs}), prefix_tokens)


def frozen_host(model: nn.Module) -> tuple[int, dict[str, Any]]:
    """(width of the tokens of `model`, its device and dtype as keyword arguments); TypeError if it gives no tokens."""
    if not hasattr(model, "forward_features") or not hasattr(model, "num_features"):
        raise TypeError(f"model must be a timm classifier (forward_features, num_features), got {type(model).__name__}")
    like = next(model.parameters())
    return int(model.num_features), {"device": like.device, "dtype": like.dtype}  # type: ignore[arg-type]
