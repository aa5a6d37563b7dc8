"""Parameters and multiply-additions of a model, counted and not taken from a paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnzoo.errors import check_range, per_axis
from attnzoo.kernels.flops import flop_formulas

__all__ = ["Complexity", "complexity"]


@dataclass(frozen=True)
class Complexity:
    """What one image costs.

    parameters: all of the model's, buffers not. macs: multiply-additions of one forward pass. image_size: (height,
    width). by_operator: `macs` by the operator's name, attnzoo's kernels among them.
    """

    parameters: int
    macs: int
    image_size: tuple[int, int]
    by_operator: dict[str, int]


def complexity(model: str | nn.Module, image_size: int | tuple[int, int] | None = None, **kwargs: Any) -> Complexity:
    """Count the parameters and multiply-additions (MACs) of `model` on one image of `image_size`.

    model: a timm name, which is built without weights on the meta device (`kwargs` go to timm.create_model), or a
        module in eval mode, on any device, whose `pretrained_cfg` is only read for the size and the channels.
    image_size: pixels, one number or (height, width); None for the size of the published weights.

    MACs are half the FLOPs that `torch.utils.flop_counter` counts: convolutions, Linears and matrix products, torch's
    fused attention, and attnzoo's kernels by `attnzoo.kernels.flops` (a neighborhood as the pairs that its queries
    see). Norms, softmaxes, activations, biases, pooling and other elementwise work count nothing, as is usual for
    published figures; attention written elementwise counts nothing either.

    Raises ValueError for an unknown name, a module in training mode or a size that the model refuses.
    """
    if isinstance(model, str):
        if not timm.is_model(model):
            raise ValueError(f"model {model!r} is no name that timm knows: see timm.list_models()")
        net = timm.create_model(model, device="meta", **kwargs).eval()
    else:
        if kwargs:
            raise ValueError(
                f"kwargs build a model from its name; with a module there must be none, got {list(kwargs)}"
            )
        if model.training:
            raise ValueError("model must be in eval mode, got one in training mode: call model.eval() first")
        net = model
    cfg: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    channels = getattr(net, "in_chans", None) or (cfg.get("input_size") or (3,))[0]
    if image_size is None:
        if not cfg.get("input_size"):
            raise ValueError("image_size must be given for a model without a pretrained_cfg that names one, got None")
        size = (int(cfg["input_size"][1]), int(cfg["input_size"][2]))
    else:
        size = per_axis("image_size", image_size, 2, int, low=1)  # type: ignore[assignment]
    check_range("channels", channels, low=1)
    parameters = list(net.parameters())
    like = parameters[0] if parameters else torch.empty(0)
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    with torch.no_grad(), counter:
        net(torch.zeros(1, channels, *size, device=like.device, dtype=like.dtype))
    counts = counter.get_flop_counts().get("Global", {})
    by_operator = {str(operator).replace("aten.", ""): int(flops) // 2 for operator, flops in counts.items()}
    return Complexity(sum(p.numel() for p in parameters), counter.get_total_flops() // 2, size, by_operator)
