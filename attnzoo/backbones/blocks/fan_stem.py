"""FAN's stems: convolutions, or the first stages of a ConvNeXt; parameter names are the published checkpoints'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXtStage
from timm.models.xcit import conv3x3
from torch import Tensor, nn

from attnzoo.errors import check_choice

__all__ = ["ConvStem", "HybridStem"]


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 with BatchNorm, GELU between them: [B, C, H, W] -> [B, H', W', dim]."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_choice("patch_size", patch_size, (4, 8, 16))
        shares = {16: (8, 4, 2, 1), 8: (4, 2, 1), 4: (4, 1)}[patch_size]
        widths = [in_chans, *(dim // share for share in shares)]
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths, widths[1:]):
            layers += [conv3x3(narrow, wide, 2, device=device, dtype=dtype), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class _StageNorm(LayerNorm2d):
    """LayerNorm over the channels of [B, C, H, W] with the unbiased variance (divided by C - 1)."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(wide, 1, keepdim=True)
        wide = (wide - mean) * torch.rsqrt(variance + self.eps)
        return (wide * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _ConvNeXt(nn.Module):
    """ConvNeXt's stem and first stages, without a head."""

    def __init__(
        self, in_chans: int, depths: Sequence[int], dims: Sequence[int], device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4, **dd), LayerNorm2d(dims[0], **dd))
        stages, narrow = [], dims[0]
        for i, (depth, wide) in enumerate(zip(depths, dims)):
            stages.append(
                ConvNeXtStage(
                    narrow,
                    wide,
                    stride=1 if i == 0 else 2,
                    depth=depth,
                    ls_init_value=1e-6,
                    conv_mlp=True,
                    norm_layer=_StageNorm,
                    **dd,
                )
            )
            narrow = wide
        self.stages = nn.Sequential(*stages)
        self.num_features = narrow

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


class HybridStem(nn.Module):
    """ConvNeXt's first stages, then patches of their map: [B, C, H, W] -> [B, H', W', dim], images padded to fit."""

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        patch_size: int,
        in_chans: int,
        dim: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = 4 * 2 ** (len(depths) - 1) * patch_size
        self.backbone = _ConvNeXt(in_chans, depths, dims, **dd)
        self.proj = nn.Conv2d(self.backbone.num_features, dim, patch_size, patch_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        below, right = -x.shape[2] % self.reduction, -x.shape[3] % self.reduction
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return self.proj(self.backbone(x)).permute(0, 2, 3, 1)
