"""timm's VisionTransformer for blocks that hand something on to the next block beside the tokens.

`StatefulViT` is timm's model with blocks (tokens, state) -> (tokens, state): which tokens are still there, what weight
they carry. Everything that walks over the blocks is written here once; the rest is timm's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.models._builder import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import check_images
from attnzoo.backbones.blocks.neighborhood import unwrap_checkpoint
from attnzoo.errors import UnsupportedError, check_choice

__all__ = ["StatefulViT", "build_stateful", "vit_checkpoint"]


class StatefulViT(VisionTransformer):
    """timm's VisionTransformer whose blocks take and return (tokens [B, N, dim], state).

    Subclasses may change `_start` (the first block's state, from the tokens of a grid of patches), `_finish` (the final
    norm) and `_place` (the tokens of a level as [B, number of patches, dim], where some are gone).
    """

    def _start(self, x: Tensor, grid: tuple[int, int]) -> Any:
        return None

    def _finish(self, x: Tensor, state: Any) -> Tensor:
        return self.norm(x)

    def _place(self, x: Tensor, state: Any) -> Tensor:
        return x[:, self.num_prefix_tokens :]

    def _check_image(self, x: Tensor) -> None:
        check_images(x, self.in_chans)
        size = self.patch_embed.img_size
        if not self.dynamic_img_size and size is not None and tuple(x.shape[2:]) != tuple(size):
            raise ValueError(
                f"x must be of img_size {size[0]} x {size[1]}, got {x.shape[2]} x {x.shape[3]}: resize the images, or "
                "build the model with another img_size"
            )

    def _walk(self, x: Tensor, count: int | None = None) -> Iterator[tuple[Tensor, Any, Any]]:
        """(tokens, state, the block's module) after each of the first `count` blocks, of images x."""
        self._check_image(x)
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        state = self._start(x, grid)
        for block in self.blocks[:count]:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, state = checkpoint(block, x, state)
            else:
                x, state = block(x, state)
            yield x, state, block

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, in_chans, H, W] -> normalised tokens [B, N, dim]."""
        _refuse_masks(attn_mask, is_causal)
        tokens, state = x, None
        for step in self._walk(x):
            tokens, state, _ = step
        return self._finish(tokens, state)

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's method; patches that are gone at a level are zeros in its map."""
        _refuse_masks(attn_mask, is_causal)
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        self._check_image(x)
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        maps, prefixes = [], []
        tokens, state = x, None
        for i, (tokens, state, _) in enumerate(self._walk(x, last + 1 if stop_early else None)):
            if i in take:
                level = self.norm(tokens) if norm else tokens
                prefixes.append(level[:, : self.num_prefix_tokens])
                placed = self._place(level, state)
                maps.append(placed.mT.unflatten(-1, grid).contiguous() if output_fmt == "NCHW" else placed)
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            out: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                out["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                out["image_features"] = self._finish(tokens, state)
            return out
        levels: list[Any] = list(zip(maps, prefixes)) if with_prefix else maps
        return levels if intermediates_only else (self._finish(tokens, state), levels)


def vit_checkpoint(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A checkpoint of a ViT's names for `model`: unwrapped, the position embedding resampled."""
    return vit_filter_fn(unwrap_checkpoint(state_dict), model)  # type: ignore[arg-type]


def build_stateful(cls: type, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's build of `variant`, a StatefulViT."""
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=vit_checkpoint,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise UnsupportedError("attn_mask and is_causal are not supported: the method makes its own masks")
