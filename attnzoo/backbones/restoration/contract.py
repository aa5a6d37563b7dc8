"""What an image-to-image model is here, and the padding that windows need.

These models are no classifiers, so they are not timm's: `create` and `list_models` stand in for `timm.create_model`,
`Restorer` for its contract. `restore` relies on nothing but the attributes of `Restorer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import check_images


class Restorer(nn.Module, ABC):
    """Images [B, in_chans, H, W] -> [B, in_chans, upscale * H, upscale * W].

    multiple: a tile must start and end at multiples of it, for its windows to be the whole image's.
    value_range: the white of the images that the published weights were trained on (1.0 or 255.0); `forward` takes and
        gives such images.
    """

    value_range: ClassVar[float] = 1.0
    in_chans: int
    upscale: int
    multiple: int = 1
    grad_checkpointing: bool = False
    pretrained_cfg: dict[str, Any]

    @abstractmethod
    def reach(self) -> int | None:
        """Pixels of the input around its place that an output pixel depends on at most; None where it is all of them
        (a pooled mean of the image)."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def unused_parameters(self) -> set[str]:
        """Names of parameters of the published model that the forward pass does not use."""
        return set()

    def _check_image(self, x: Tensor) -> None:
        check_images(x, self.in_chans)


def pad_reflect(x: Tensor, multiple: int) -> Tensor:
    """Images [..., H, W] mirrored at the bottom and right up to multiples of `multiple`, as often as it takes."""
    for axis in (-2, -1):
        length = x.shape[axis]
        if length % multiple:
            at = torch.arange(length + -length % multiple, device=x.device) % max(1, 2 * (length - 1))
            x = x.index_select(axis, torch.minimum(at, 2 * (length - 1) - at))
    return x
