"""The ViT host: timm's VisionTransformer, its blocks' attention made of a mixer. Used for the DeiT families."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import check_images
from attnzoo.backbones.blocks.neighborhood import refuse_attn_drop
from attnzoo.backbones.hosts.mixers import Factory, Mixer, Site, Size, attn_schedule, make_mixer
from attnzoo.errors import UnsupportedError


class TokenAttention(nn.Module):
    """qkv, a mixer, proj, on [B, P + h w, dim] tokens of a map of `size`."""

    def __init__(self, site: Site, mixer: nn.Module, qkv_bias: bool = True, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.size = site.size
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias, **site.dd)
        self.mixer: Any = mixer
        self.proj = nn.Linear(site.dim, site.dim, **site.dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def set_size(self, size: Size) -> None:
        """Resample what is tied to a size."""
        self.size = size
        self.mixer.set_size(size, size)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UnsupportedError(f"attn_mask and is_causal can't be honoured by {type(self.mixer).__name__}")
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj_drop(self.proj(self.mixer(q, k, v, self.size, self.size, x)))


class _Unbuilt(nn.Module):
    """Stands where timm's block would build its own attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


class HostBlock(Block):
    """timm's block with a mixer in its attention; blocks of the plain letter keep timm's own attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        letters: list[str],
        mixers: Mapping[str, str | Factory],
        size: Size,
        num_prefix: int,
        depth: int = 0,
        attn_layer: Any = Attention,
        **kwargs: Any,
    ) -> None:
        hosted = mixers[letters[depth]] != "softmax"
        super().__init__(dim, num_heads, depth=depth, attn_layer=_Unbuilt if hosted else attn_layer, **kwargs)
        if hosted:
            refuse_attn_drop(kwargs.get("attn_drop", 0.0))
            dd = {k: kwargs.get(k) for k in ("device", "dtype")}
            site = Site(dim, num_heads, size, size, 0, depth, num_prefix, dd=dd)
            mixer = make_mixer(mixers, letters[depth], site)
            self.attn = TokenAttention(site, mixer, kwargs.get("qkv_bias", True), kwargs.get("proj_drop", 0.0))


class HostViT(VisionTransformer):
    """timm's VisionTransformer (all of its arguments), and

    attn_type: one letter, or "M" and the number of leading blocks that have the method's letter.
    mixers: what the letters stand for, see hosts/mixers.py; timm's own attention where that is "softmax".

    The map is needed to lay tokens out, so dynamic_img_size and patch_drop_rate are refused; `img_size=` and
    `set_input_size` take any size, not only square ones.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *args: Any,
        attn_type: str,
        mixers: Mapping[str, str | Factory],
        depth: int = 12,
        class_token: bool = True,
        reg_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        for name in ("dynamic_img_size", "dynamic_img_pad", "patch_drop_rate", "qk_norm", "scale_attn_norm"):
            if kwargs.get(name):
                raise UnsupportedError(f"{name} must be off, got {kwargs[name]!r}: use img_size= or set_input_size")
        image, patch = ((v, v) if isinstance(v, int) else tuple(v) for v in (img_size, patch_size))
        block: Any = partial(
            HostBlock,
            letters=attn_schedule(attn_type, (depth,), mixers)[0],
            mixers=mixers,
            size=(image[0] // patch[0], image[1] // patch[1]),
            num_prefix=int(class_token) + reg_tokens,
        )
        super().__init__(  # type: ignore[misc]
            img_size,
            patch_size,
            *args,
            depth=depth,
            class_token=class_token,
            reg_tokens=reg_tokens,
            block_fn=block,
            **kwargs,
        )

    def position_tables(self) -> dict[str, tuple[Size, int]]:
        """Position embeddings: name -> (map, prefix tokens)."""
        return {"pos_embed": (self.patch_embed.grid_size, self.num_prefix_tokens)}

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Take images of another size: position embedding and biases are resampled."""
        super().set_input_size(img_size, patch_size)
        for block in self.blocks:
            if isinstance(block.attn, TokenAttention):
                block.attn.set_size(self.patch_embed.grid_size)

    def _check_image(self, x: Tensor) -> None:
        check_images(x, self.in_chans)
        height, width = self.patch_embed.img_size
        if tuple(x.shape[2:]) != (height, width):
            raise ValueError(
                f"x must be of img_size {height} x {width}, got {x.shape[2]} x {x.shape[3]}: resize the images, "
                f"build the model with img_size={tuple(x.shape[2:])}, or call set_input_size({tuple(x.shape[2:])})"
            )

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, in_chans, H, W] -> normalised tokens [B, P + h w, embed_dim]."""
        self._check_image(x)
        return super().forward_features(x, attn_mask, is_causal)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's, for images of the size built for."""
        self._check_image(x)
        return super().forward_intermediates(x, *args, **kwargs)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Position embedding, class token and the mixers' bias tables."""
        tables = {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, Mixer)
            for name, parameter in module.named_parameters(recurse=False)
        }
        return {*super().no_weight_decay(), *tables}
