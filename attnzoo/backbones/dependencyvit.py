"""DependencyViT: attention turned around, so that tokens send messages and a tree of dependencies emerges.

Paper: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", Ding, Shen, Fan, Chen, Chen,
Luo, Tenenbaum, Gan, CVPR 2023 - https://arxiv.org/abs/2304.03282
Code: the authors' repository (https://github.com/dingmyu/DependencyViT) holds a licence and no code. The numbers that
this is held to come from a community fork of timm (fffffgggg54/pytorch-image-models, branch dependencyvit, Apache-2.0),
whose author marks open questions: UNOFFICIAL, and `adapted` in the catalogue. Written here from the formulas; parameter
names are the fork's.

What follows which statement:

- A = softmax(q k^T / sqrt(d))^T (paper, section 3.2, reversed attention): each query spreads one unit over those it
  sends to, so columns sum to one. out = (A * p * m) v, both factors on the sender.
- p = softmax over heads of (W x / 0.1), the head selector (section 3.2; the temperature is the fork's reading of the
  appendix). m = product over the layers so far of sigmoid(MLP(x)), the message controller.
- The final tokens are multiplied by m, then averaged. The fork leaves open whether before or after the final norm;
  here after, as its published state does.
- Dynamic pooling (section 3.3): blocks that prune keep the tokens with the largest m; the fork has another revision
  with the sum of |A|. Published pruning ratios: 0.16 after layers 2, 5, 8 and 11 for the "lite" model.
- No biases in the head selector, the controller and qkv: the fork's reading.

The matrix A is formed: the softmax runs over receivers and the product over senders, which a fused softmax kernel
does not do in one pass.

The host is timm's VisionTransformer without class token. Patches that are gone are zeros in intermediate maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import Mlp
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.backbones.blocks.stateful import StatefulViT, build_stateful, vit_checkpoint
from attnzoo.errors import UnsupportedError, check_range

__all__ = ["DependencyViT", "ReversedAttention", "checkpoint_filter_fn"]


class Messages(NamedTuple):
    """What goes from block to block: m [B or 1, 1, 1, N], and which of the `total` patches are left, [B, N] or None."""

    weight: Tensor
    left: Tensor | None
    total: int


class ReversedAttention(nn.Module):
    """Attention whose softmax runs over the receivers, weighed per sender by head and by message.

    Args:
        dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer: timm's.
        temperature: of the head selector.

    x [B, N, dim], m [B or 1, 1, 1, N or 1] -> (the same shape as x, this layer's m [B, 1, 1, N]).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Any = None,
        temperature: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if scale_norm:
            raise UnsupportedError("scale_norm must be False: the method has no norm after its attention")
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.temperature = temperature
        self.head_selector = nn.Linear(dim, num_heads, bias=False, **dd)
        self.message_controller = Mlp(dim, dim // 2, 1, bias=False, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def dependencies(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(A * p * m [B, heads, receivers, senders], values [B, heads, N, head_dim], m of this layer)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query) * self.head_dim**-0.5, self.k_norm(key)
        heads = (self.head_selector(x) / self.temperature).softmax(-1).mT[:, :, None]
        m = m * self.message_controller(x).sigmoid().mT[:, None]
        return self.attn_drop((query @ key.mT).softmax(-1)).mT * heads * m, value, m

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        weights, value, m = self.dependencies(x, m)
        out = (weights @ value).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out)), m


class DependencyBlock(Block):
    """timm's block around `ReversedAttention`; `keep` is the share of its tokens that it leaves, 1.0 for all."""

    def __init__(self, *args: Any, keep: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "attn_layer": ReversedAttention})
        self.keep = keep

    def forward(self, x: Tensor, state: Messages) -> tuple[Tensor, Messages]:  # type: ignore[override]
        """(tokens [B, N, dim], state) -> (tokens [B, N', dim], state), N' = floor(keep * N)."""
        attended, m = self.attn(self.norm1(x), state.weight)
        x = x + self.drop_path1(self.ls1(attended))
        state = Messages(m, state.left, state.total)
        if self.keep < 1.0:
            best = m[:, 0, 0].topk(max(1, int(self.keep * x.shape[1])), sorted=False).indices
            x = x.gather(1, best[..., None].expand(-1, -1, x.shape[2]))
            left = best if state.left is None else state.left.gather(1, best)
            state = Messages(m.gather(3, best[:, None, None]), left, state.total)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), state


class DependencyViT(StatefulViT):
    """timm's VisionTransformer with `ReversedAttention`: no class token, average pooling, layer scale.

    Args:
        prune_blocks: the blocks, counted from 1 as in the paper, after whose attention tokens are dropped.
        prune_ratio: the share of the first block's tokens that each of them drops.
        init_values: of the layer scale.
        further arguments: timm's.
    """

    def __init__(
        self,
        *,
        depth: int = 12,
        prune_blocks: Sequence[int] = (),
        prune_ratio: float = 0.0,
        init_values: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        steps = sorted(set(prune_blocks))
        if steps and not 1 <= steps[0] <= steps[-1] <= depth:
            raise ValueError(f"prune_blocks must be from 1 to depth={depth}, got {list(prune_blocks)}")
        check_range("prune_ratio", prune_ratio, 0.0, 1.0)
        if steps and not 0.0 < prune_ratio * len(steps) < 1.0:
            raise ValueError(
                f"prune_ratio times {len(steps)} prune_blocks must be between 0 and 1, got prune_ratio={prune_ratio}"
            )
        if kwargs.get("class_token") or kwargs.get("reg_tokens"):
            raise UnsupportedError("class_token and reg_tokens must be off: messages weigh patches")
        left = {block: 1.0 - i * prune_ratio for i, block in enumerate(steps, 1)}
        before = {block: 1.0 - i * prune_ratio for i, block in enumerate(steps)}

        def block(depth: int, attn_layer: Any = None, **arguments: Any) -> DependencyBlock:
            keep = left[depth + 1] / before[depth + 1] if depth + 1 in left else 1.0
            return DependencyBlock(depth=depth, keep=keep, **arguments)

        super().__init__(
            depth=depth,
            **{
                "qkv_bias": False,
                "global_pool": "avg",
                "fc_norm": False,
                **kwargs,
                "init_values": init_values,
                "class_token": False,
                "block_fn": block,
            },
        )

    def _start(self, x: Tensor, grid: tuple[int, int]) -> Messages:
        return Messages(x.new_ones(1, 1, 1, 1), None, x.shape[1])

    def _finish(self, x: Tensor, state: Messages) -> Tensor:
        return self.norm(x) * state.weight[:, 0].mT

    def _place(self, x: Tensor, state: Messages) -> Tensor:
        if state.left is None:
            return x
        at = state.left[..., None].expand(-1, -1, x.shape[2])
        return x.new_zeros(x.shape[0], state.total, x.shape[2]).scatter(1, at, x)

    @torch.no_grad()
    def dependency_masks(self, x: Tensor) -> list[Tensor]:
        """Images -> what each token receives from each in every block, summed over heads: [B, receivers, senders].

        Where blocks prune, a block's matrix is over the tokens that it still sees.
        """
        self._check_image(x)
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        state, masks = self._start(tokens, self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))), []
        block: Any
        for block in self.blocks:
            masks.append(block.attn.dependencies(block.norm1(tokens), state.weight)[0].sum(1))
            tokens, state = block(tokens, state)
        return masks


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
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2304.03282",
        "paper_name": "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
        "origin_url": "https://github.com/dingmyu/DependencyViT",
        "notes": (notes,),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "dependencyvit_tiny_patch16_224.untrained": _cfg("unofficial shape; no weights are published"),
        "dependencyvit_small_patch16_224.untrained": _cfg("unofficial shape; no weights are published"),
        "dependencyvit_lite_tiny_patch16_224.untrained": _cfg("tiny, pruned; no weights are published"),
    }
)


_create = partial(build_stateful, DependencyViT, num_heads=12)


@register_model
def dependencyvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-T."""
    return _create("dependencyvit_tiny_patch16_224", pretrained, **{"embed_dim": 192, **kwargs})


@register_model
def dependencyvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-S."""
    return _create("dependencyvit_small_patch16_224", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def dependencyvit_lite_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-Lite-T: after blocks 2, 5, 8 and 11, 16 % of the tokens are dropped."""
    pruned = {"prune_blocks": (2, 5, 8, 11), "prune_ratio": 0.16}
    return _create("dependencyvit_lite_tiny_patch16_224", pretrained, **{"embed_dim": 192, **pruned, **kwargs})
