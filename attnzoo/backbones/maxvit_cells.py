"""MaxViT with its block and grid attention on attnzoo's kernel: timm's models, faster at large windows.

Paper: "MaxViT: Multi-Axis Vision Transformer", Tu, Talebi, Zhang, Yang, Milanfar, Bovik, Li, ECCV 2022 -
https://arxiv.org/abs/2204.01697. Code: timm's `models/maxxvit.py` (Apache-2.0), used and not copied. Weights are
timm's (converted from https://github.com/google-research/maxvit, Apache-2.0) and go both ways, names unchanged.

Block attention is neighborhood attention with stride = kernel size, grid attention the same with the widest dilation:
the map is never cut into windows and put together again, and the bias stays a table by offset. Worth it for the 16 x 16
windows of the 512 models; at 12 x 12 the gain is within a few percent, and at 7 x 7 timm's own is faster, so those have
no variant (docs/backbones.md has the numbers; `use_cell_attention` converts any MaxViT of timm's).

Differences from timm: another image size than the windows divide raises ValueError (timm: AssertionError).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.maxxvit import MaxxVit, PartitionAttentionCl, checkpoint_filter_fn, model_cfgs
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import CheckedImages
from attnzoo.kernels import neighborhood_attention

__all__ = ["CellAttention", "MaxxVitCells", "checkpoint_filter_fn", "use_cell_attention"]


class CellAttention(PartitionAttentionCl):
    """timm's block or grid attention with its MLP, on [B, H, W, dim] maps, attention by `neighborhood_attention`."""

    def _bias(self) -> Tensor | None:
        """The relative position bias by offset key - query, [heads, 2 * height - 1, 2 * width - 1]."""
        rel_pos = self.attn.rel_pos
        if rel_pos is None:
            return None
        height, width = self.partition_size
        if hasattr(rel_pos, "height_lookup"):  # TensorFlow's table is by key - query already
            return rel_pos.relative_position_bias_table
        if hasattr(rel_pos, "relative_position_bias_table"):  # Swin's is by query - key
            table = rel_pos.relative_position_bias_table.unflatten(0, (2 * height - 1, 2 * width - 1))
            return table.permute(2, 0, 1).flip(1, 2)
        # a table made by an MLP: read back from what timm expands it to, at the two corner queries of each axis
        pairs = rel_pos.get_bias()[0].unflatten(1, (height, width)).unflatten(3, (height, width))
        rows = torch.cat([pairs[:, -1, :, :-1], pairs[:, 0]], 2)  # key row - query row, -(height - 1) to height - 1
        return torch.cat([rows[:, -1, :, :-1], rows[:, 0]], -1)

    def _partition_attn(self, x: Tensor) -> Tensor:
        attn, (height, width), (rows, columns) = self.attn, self.partition_size, x.shape[1:3]
        if rows % height or columns % width:
            raise ValueError(
                f"x leads to a map of {rows} x {columns}, which windows of {height} x {width} do not divide: give an "
                f"image whose sides are multiples of the windows at every stage (img_size does), or call set_input_size"
            )
        if self.training and attn.attn_drop.p:
            return super()._partition_attn(x)  # the kernel has no attention dropout
        qkv = attn.qkv(x)
        if attn.head_first:
            query, key, value = qkv.unflatten(-1, (attn.num_heads, 3 * attn.dim_head)).chunk(3, -1)
        else:
            query, key, value = qkv.unflatten(-1, (3, attn.num_heads, attn.dim_head)).unbind(3)
        dilation = 1 if self.partition_block else (rows // height, columns // width)
        out = neighborhood_attention(
            query, key, value, (height, width), (height, width), dilation, scale=attn.scale, bias=self._bias()
        )
        return attn.proj_drop(attn.proj(out.flatten(-2)))


def use_cell_attention(model: nn.Module) -> int:
    """Put attnzoo's kernel into every block and grid attention of `model`, a MaxViT of timm's, in place.

    Parameters, their names and the outputs (up to rounding) stay. Returns how many layers changed. Raises ValueError
    where there is none.
    """
    layers = [m for m in model.modules() if type(m) is PartitionAttentionCl]
    if not layers and not any(isinstance(m, CellAttention) for m in model.modules()):
        raise ValueError(f"model must have timm's PartitionAttentionCl layers (a maxvit_*), got {type(model).__name__}")
    for layer in layers:
        layer.__class__ = CellAttention
    return len(layers)


class MaxxVitCells(CheckedImages, MaxxVit):
    """timm's MaxxVit whose block and grid attention are `CellAttention`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_cell_attention(self)


_NAMES = ("maxvit_tiny_tf_512", "maxvit_small_tf_512", "maxvit_base_tf_512")
default_cfgs = generate_default_cfgs(
    {f"{name}_attnzoo.{cfg.tag}": cfg.to_dict() for name in _NAMES if (cfg := get_pretrained_cfg(name)) is not None}
)


def _create(size: str, pretrained: bool, kwargs: dict[str, Any]) -> MaxxVitCells:
    model_cfg = model_cfgs[f"maxvit_{size}_tf"]
    levels = len(kwargs.get("depths", model_cfg.depths)) + 1
    return build_model_with_cfg(
        MaxxVitCells,
        f"maxvit_{size}_tf_512_attnzoo",
        pretrained,
        model_cfg=model_cfg,
        feature_cfg={"flatten_sequential": True, "out_indices": tuple(range(levels))},
        pretrained_filter_fn=checkpoint_filter_fn,
        **{"img_size": 512, **kwargs},
    )


@register_model
def maxvit_tiny_tf_512_attnzoo(pretrained: bool = False, **kwargs: Any) -> MaxxVitCells:
    """timm's maxvit_tiny_tf_512 on attnzoo's kernel."""
    return _create("tiny", pretrained, kwargs)


@register_model
def maxvit_small_tf_512_attnzoo(pretrained: bool = False, **kwargs: Any) -> MaxxVitCells:
    """timm's maxvit_small_tf_512 on attnzoo's kernel."""
    return _create("small", pretrained, kwargs)


@register_model
def maxvit_base_tf_512_attnzoo(pretrained: bool = False, **kwargs: Any) -> MaxxVitCells:
    """timm's maxvit_base_tf_512 on attnzoo's kernel."""
    return _create("base", pretrained, kwargs)
