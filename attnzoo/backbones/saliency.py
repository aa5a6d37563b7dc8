"""Where the stages of a neighborhood attention model look, read from the model's own queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import TimmHead
from attnzoo.errors import check_tensor


def attention_saliency(model: nn.Module, image: Tensor, relative: bool = True) -> list[Tensor]:
    """How much attention each token receives in the last block of each stage, averaged over heads.

    What is drawn: for token j, the sum over all queries i of the attention weight that i gives to j, computed from the
    queries and keys of that block's attention for this image (not a gradient, not a class score, and not what reaches
    the logits: values, the output projection, the MLPs and the residual stream are left out). Early stages see single
    patches, late ones see mixtures of a wide field. Isotropic models have one block, and one map, per layer.

    Args:
        model: a model of this room (NAT, DiNAT, DiNAT_s, NATIsotropic), in eval mode. It is not changed.
        image: one preprocessed image, [in_chans, H, W] or [1, in_chans, H, W].
        relative: divide by what each token would receive if every query spread its attention evenly over its window, so
            that 1.0 means "no preference" everywhere. Undivided maps show the window geometry too: near the border
            windows move inward and cover some tokens more often.

    Returns one float32 [h, w] map per entry of model.feature_info, at that stage's resolution.
    Raises TypeError for another kind of model, ValueError for one in training mode or for more than one image.
    """
    net, image = _checked(model, image)
    inputs: dict[int, Tensor] = {}
    layers = _attention_layers(net)
    handles = [
        layer.register_forward_pre_hook(lambda _module, args, i=i: inputs.__setitem__(i, args[0].detach()))
        for i, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            net.forward_features(image)
    finally:
        for handle in handles:
            handle.remove()
    maps = []
    for i, layer in enumerate(layers):
        received, even = layer.attention_received(inputs[i])
        maps.append(((received / even) if relative else received)[0].float().mean(dim=-1))
    return maps


def feature_norms(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The Euclidean length of each token's features at the end of each stage, before any norm layer.

    A plain picture of where a stage's output is large. Arguments, result and errors as for `attention_saliency`.
    """
    net, image = _checked(model, image)
    with torch.no_grad():
        features = net.forward_intermediates(image, output_fmt="NHWC", intermediates_only=True)
    return [x[0].float().norm(dim=-1) for x in features]


def _checked(model: nn.Module, image: Tensor) -> tuple[TimmHead, Tensor]:
    if not isinstance(model, TimmHead):
        raise TypeError(f"model must be NAT, DiNAT, DiNAT_s or NATIsotropic, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in eval mode, got one in training mode: call model.eval() first")
    check_tensor("image", image)
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"image must be one image, [in_chans, H, W] or [1, in_chans, H, W], got {tuple(image.shape)}")
    return model, image


def _attention_layers(model: TimmHead) -> list[Any]:
    """The attention of the last block of each stage."""
    layers = []
    for info in model.feature_info:
        block: Any = model.get_submodule(info["module"])
        layers.append((block[-1] if isinstance(block, nn.Sequential) else block).attn)
    return layers
