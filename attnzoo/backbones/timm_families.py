"""Families that timm has itself (SHViT, DaViT, MaxViT, HaloNet, MambaOut): the authors' files into timm's own models.

Nothing of these models is copied here. What timm's `checkpoint_filter_fn` can't read is renamed: SHViT's published
names (github.com/ysj9909/SHViT @6a729cc, MIT licence; arXiv:2401.16456). DaViT's published files need nothing of ours:
timm reads them (`timm.create_model("davit_tiny", checkpoint_path=...)`).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from attnzoo.backbones.blocks.neighborhood import unwrap_checkpoint

__all__ = ["load_official_shvit", "rename_official_shvit"]

_SHVIT = re.compile(r"^blocks([123])\.(\d+)\.(.*)$")


def rename_official_shvit(state_dict: dict[str, Any]) -> dict[str, Any]:
    """SHViT's published checkpoint (or the entry that holds it) under timm's names; timm's own names stay.

    The authors count each later stage's downsampling among its blocks: entries 0 to 2 of `blocks2` and `blocks3` are
    two residual layers, the patch merging, and two residual layers more; the blocks follow.
    """
    renamed = {}
    for key, value in unwrap_checkpoint(state_dict).items():
        if found := _SHVIT.match(key):
            stage, index, rest = int(found[1]) - 1, int(found[2]), found[3]
            if stage == 0:
                key = f"stages.0.blocks.{index}.{rest}"
            elif index >= 3:
                key = f"stages.{stage}.blocks.{index - 3}.{rest}"
            elif index == 1:
                key = f"stages.{stage}.downsample.2.{rest}"
            else:
                which, rest = rest.split(".", 1)
                key = f"stages.{stage}.downsample.{int(which) + (3 if index == 2 else 0)}.{rest}"
        renamed[key] = value
    return renamed


def load_official_shvit(model: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> nn.Module:
    """Put the authors' SHViT checkpoint into `model`, timm's `shvit_s1` ... `shvit_s4`; returns the model.

        model = timm.create_model("shvit_s1")
        load_official_shvit(model, torch.load("shvit_s1.pth", weights_only=True))

    Raises RuntimeError, naming them, for tensors that are missing, unknown or of another shape. (timm leaves out the
    downsampling between two stages of equal width, where the authors do not; no published size has such stages.)
    """
    model.load_state_dict(rename_official_shvit(state_dict), strict=strict)
    return model
