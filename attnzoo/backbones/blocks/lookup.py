"""LookupViT: many tokens are looked up, few are worked on, and each tells the other what it needs to know.

Paper: "LookupViT: Compressing visual information to a limited number of tokens", Koner, Jain, Jain, Tresp, Paul, ECCV
2024 - https://arxiv.org/abs/2407.12753
Code: none published, nor weights; written here from the description, `adapted`.

What follows which statement (of the abstract, and of the paper's parts as they are told in public summaries):

- "Compressing information from higher resolution tokens to a fixed number of tokens": compressed tokens start as the
  bilinearly resized map of the embedded patches, positions included (resizing is linear: positions resized apart give
  the same).
- "Information sharing between these two token sets is enabled through a bidirectional cross-attention mechanism"
  (MHBC): compressed tokens gather from lookup tokens, A = softmax(q k^T / sqrt(d)) [compressed, lookup], and the way
  back uses A transposed, on new values, without another softmax. That A is used again, as it is, is how both public
  reproductions read the paper (lucidrains/vit-pytorch look_vit.py; lokiwizard/LookupViT_Reproduction).
- "These few compressed tokens undergo meticulous processing, while the higher-resolution tokens are passed through
  computationally cheaper layers": a ViT block for the compressed ones between the two directions, a narrower MLP for
  the lookup ones after them.
- "Flexibility for the compressed tokens, enabling performance-computation trade-offs in a single trained model": no
  parameter has the number of compressed tokens in it; `set_compressed_size`.

Ours: layer norms before every part; compressed_size and lookup_mlp_ratio's defaults; the classifier reads the mean of
the compressed tokens under the final norm.

No N x N matrix: A is compressed x lookup, formed once, because it is used twice. `pooled_attention` does not serve: its
way back is a softmax over the latents, and reads what they collected before anything was done to them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.backbones.blocks.stateful import StatefulViT
from attnzoo.errors import UnsupportedError, check_range, per_axis

__all__ = ["BidirectionalCrossAttention", "LookupBlock", "LookupViT"]


class BidirectionalCrossAttention(nn.Module):
    """MHBC: `gather` from lookup to compressed tokens, `infuse` back by the same weights, transposed.

    Args:
        dim, num_heads: channels and heads, of both token sets.
        qkv_bias, proj_bias: of the projections in and out.
        proj_drop: dropout after either output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.v_back = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.proj_back = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    def gather(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, dim], [B, N, dim] -> (what compressed tokens gather [B, M, dim], weights [B, heads, M, N])."""
        key, value = map(self._heads, self.kv(lookup).chunk(2, -1))
        weights = (self._heads(self.q(compressed)) * self.head_dim**-0.5 @ key.mT).softmax(-1)
        out = weights.to(value.dtype) @ value
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))), weights

    def infuse(self, compressed: Tensor, weights: Tensor) -> Tensor:
        """[B, M, dim] and the weights of `gather` -> what lookup tokens are told, [B, N, dim]."""
        value = self._heads(self.v_back(compressed))
        out = weights.to(value.dtype).mT @ value
        return self.proj_drop(self.proj_back(out.transpose(1, 2).flatten(2)))


class LookupBlock(Block):
    """Gather, timm's block on the compressed tokens, infuse, MLP on the lookup tokens: all pre-norm and residual.

    Args:
        dim, num_heads, and the rest: timm's, for the block on the compressed tokens.
        lookup_mlp_ratio: hidden width of the lookup tokens' MLP over dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        lookup_mlp_ratio: float = 0.5,
        norm_layer: Any = nn.LayerNorm,
        act_layer: Any = nn.GELU,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, norm_layer=norm_layer, act_layer=act_layer, **kwargs)
        if lookup_mlp_ratio <= 0:
            raise ValueError(f"lookup_mlp_ratio must be above 0, got {lookup_mlp_ratio!r}")
        dd: dict[str, Any] = {k: kwargs.get(k) for k in ("device", "dtype")}
        own = {k: kwargs[k] for k in ("qkv_bias", "proj_bias", "proj_drop") if k in kwargs}
        drop = kwargs.get("proj_drop", 0.0)
        self.norm_compressed = norm_layer(dim, **dd)
        self.norm_lookup = norm_layer(dim, **dd)
        self.cross = BidirectionalCrossAttention(dim, num_heads, **own, **dd)
        self.norm_back = norm_layer(dim, **dd)
        self.norm_lookup_mlp = norm_layer(dim, **dd)
        self.lookup_mlp = Mlp(dim, max(1, int(dim * lookup_mlp_ratio)), act_layer=act_layer, drop=drop, **dd)

    def forward(self, lookup: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(lookup [B, N, dim], compressed [B, M, dim]) -> the same."""
        gathered, weights = self.cross.gather(self.norm_compressed(compressed), self.norm_lookup(lookup))
        compressed = super().forward(compressed + self.drop_path1(gathered))
        lookup = lookup + self.drop_path2(self.cross.infuse(self.norm_back(compressed), weights))
        return lookup + self.drop_path2(self.lookup_mlp(self.norm_lookup_mlp(lookup))), compressed


class LookupViT(StatefulViT):
    """timm's VisionTransformer with `LookupBlock`: no class token; the compressed tokens are the features.

    Args:
        compressed_size: the map of compressed tokens, one int or (height, width); `set_compressed_size` changes it.
        lookup_mlp_ratio: see LookupBlock.
        further arguments: timm's.

    forward_features gives the compressed tokens [B, M, dim] under the final norm; forward_intermediates the lookup
    tokens' maps. No names are registered with timm: no model was published.
    """

    def __init__(
        self,
        *,
        compressed_size: int | tuple[int, int] = 7,
        lookup_mlp_ratio: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("class_token") or kwargs.get("reg_tokens"):
            raise UnsupportedError("class_token and reg_tokens must be off: compressed tokens are made from patches")
        if kwargs.get("patch_drop_rate"):
            raise UnsupportedError("patch_drop_rate must be 0.0: compressed tokens are made from the whole map")
        size = per_axis("compressed_size", compressed_size, 2, low=1)

        def block(depth: int, **arguments: Any) -> LookupBlock:
            return LookupBlock(lookup_mlp_ratio=lookup_mlp_ratio, depth=depth, **arguments)

        super().__init__(**{"global_pool": "avg", "fc_norm": False, **kwargs, "class_token": False, "block_fn": block})
        check_range("depth", len(self.blocks), low=1)
        self.compressed_size = size

    def set_compressed_size(self, compressed_size: int | tuple[int, int]) -> None:
        """Another number of compressed tokens from the next image on; the parameters stay."""
        self.compressed_size = per_axis("compressed_size", compressed_size, 2, low=1)

    def unused_parameters(self) -> set[str]:
        """What the last block does to lookup tokens: no logit depends on it, forward_intermediates does."""
        last = f"blocks.{len(self.blocks) - 1}."
        late = ("cross.v_back", "cross.proj_back", "norm_back", "norm_lookup_mlp", "lookup_mlp")
        return {n for n, _ in self.named_parameters() if n.startswith(tuple(last + part for part in late))}

    def _start(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        maps = x.mT.unflatten(-1, grid)
        return F.interpolate(maps, self.compressed_size, mode="bilinear").flatten(2).mT

    def _finish(self, x: Tensor, state: Tensor) -> Tensor:
        return self.norm(state)
