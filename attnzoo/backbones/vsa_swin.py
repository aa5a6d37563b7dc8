"""Swin with varied-size window attention (VSA).

Paper: "VSA: Learning Varied-Size Window Attention in Vision Transformers", Zhang et al., ECCV 2022,
https://arxiv.org/abs/2204.08446, which reports Swin-T+VSA and Swin-S+VSA.
Code: https://github.com/ViTAE-Transformer/ViTAE-VSA has none of it ("Coming Soon" in the README), and no checkpoint:
here is the released attention (blocks/vsa.py) in the Swin host (hosts/swin.py), by these choices of ours:
- every block has it, and no windows are shifted: varied windows are what lets windows exchange;
- the 7 x 7 depthwise position embedding stands before the norm and outside the residual stream, as in the released
  ViTAEv2 cells (`cpe=False` leaves it out).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import StageFeatures
from attnzoo.backbones.blocks.vsa import VSAMixer, channels_first, fit_bias_tables
from attnzoo.backbones.hosts.mixers import Size, host_checkpoint
from attnzoo.backbones.hosts.swin import Swin
from attnzoo.errors import check_range

__all__ = ["VSASwin", "checkpoint_filter_fn"]


class PositionedNorm(nn.Module):
    """norm(x + pos(x)) on [B, H, W, dim], pos a 7 x 7 depthwise convolution."""

    def __init__(self, dim: int, norm: nn.Module, dd: dict) -> None:
        super().__init__()
        self.norm = norm
        self.pos = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + channels_first(self.pos, x))


class VSASwin(Swin):
    """Swin with VSA in stages V, shifted windows of softmax attention in stages S, both in stages M; arguments as for
    `Swin`, and

    attn_type: see hosts/mixers.py; None for V everywhere.
    window_size: windows of both kinds of blocks. Images of any size.
    cpe: the position embedding before VSA, as the released cells have it.
    compat: "corrected" or "official", see blocks/vsa.py.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        *args: Any,
        depths: Sequence[int] = (2, 2, 6, 2),
        window_size: int = 7,
        attn_type: str | None = None,
        cpe: bool = True,
        compat: str = "corrected",
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(  # type: ignore[misc]
            img_size,
            *args,
            depths=depths,
            window_size=window_size,
            attn_type="V" * len(depths) if attn_type is None else attn_type,
            mixers={"V": partial(VSAMixer, window=window_size, compat=compat), "S": "softmax"},
            **dd,
            **kwargs,
        )
        for stage in self.stages if cpe else ():
            for block in stage.blocks:
                if isinstance(block.attn.mixer, VSAMixer):
                    block.norm1 = PositionedNorm(block.attn.qkv.in_features, block.norm1, dd)

    def _windows(self, window_size: int | None) -> tuple[int, int]:
        window = 7 if window_size is None else window_size
        check_range("window_size", window, low=1)
        return window, window

    def set_input_size(self, img_size: int | Size, window_size: int | None = None) -> None:
        """Say for which image size softmax windows are cut; VSA takes any without being told, in its own windows."""
        if window_size not in (None, self._window_size):
            raise ValueError(f"window_size must stay {self._window_size}, got {window_size}: build another model")
        super().set_input_size(img_size, self._window_size)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A checkpoint of ours for `model`: bias tables of other windows resampled."""
    return fit_bias_tables(host_checkpoint(state_dict, model, ()), model)


def _cfg(published: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "",
        "paper_ids": "arXiv:2204.08446",
        "paper_name": "VSA: Learning Varied-Size Window Attention in Vision Transformers",
        "origin_url": "https://github.com/ViTAE-Transformer/ViTAE-VSA",
        "notes": (f"{published} in the authors' table; neither code nor checkpoint was published",),
    }


default_cfgs = generate_default_cfgs(
    {
        "vsa_swin_tiny.untrained": _cfg("top-1 82.3 %"),
        "vsa_swin_small.untrained": _cfg("top-1 83.8 %"),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> VSASwin:
    """Build `variant`: the caller's arguments win."""
    args = {**model_args, **kwargs}
    return build_model_with_cfg(
        VSASwin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": StageFeatures},
        **args,
    )


@register_model
def vsa_swin_tiny(pretrained: bool = False, **kwargs: Any) -> VSASwin:
    """Swin-T+VSA."""
    args = {"depths": (2, 2, 6, 2), "drop_path_rate": 0.2}
    return _create("vsa_swin_tiny", pretrained, args, kwargs)


@register_model
def vsa_swin_small(pretrained: bool = False, **kwargs: Any) -> VSASwin:
    """Swin-S+VSA."""
    args = {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
    return _create("vsa_swin_small", pretrained, args, kwargs)
