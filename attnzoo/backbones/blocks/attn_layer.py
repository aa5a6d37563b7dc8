"""Attention layers of ours as the `attn_layer` of timm's VisionTransformer, with options that timm doesn't pass on."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["as_attn_layer"]


def as_attn_layer(layer: type[nn.Module], **options: Any) -> type[nn.Module]:
    """`layer` with `options` set, as a class: timm asks `issubclass` of an attn_layer, so functools.partial won't do.

        timm.create_model("vit_small_patch16_224", attn_layer=as_attn_layer(FlareAttention, num_latents=49))

    options: keyword arguments of `layer`; they win over what timm passes (qkv_bias, qk_norm, norm_layer ...).
    A model with such a layer copies and saves its state dict as any, but can't be pickled whole: the class has no name
    in a module.
    """

    class Configured(layer):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, **options})

    Configured.__name__ = Configured.__qualname__ = layer.__name__
    Configured.__doc__ = layer.__doc__
    return Configured
