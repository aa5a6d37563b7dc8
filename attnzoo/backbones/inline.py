"""InLine attention in DeiT, PVT, Swin and CSwin.

Paper: "Bridging the Divide: Reconsidering Softmax and Linear Attention", Han et al., NeurIPS 2024,
https://arxiv.org/abs/2412.06590
Code: https://github.com/LeapLabTHU/InLine (models/), licence not verified (Swin's and CSwin's parts are Microsoft's,
MIT); written here from the formulas. The mathematics is in blocks/inline.py, the hosts in hosts/.

Differences from the authors' code:
- InLine attention ties no size: InLinePVT, InLineSwin and InLineCSwin take images of any size and shape (windows and
  maps zero-padded where they do not fit, see the hosts). Only InLineDeiT's position embedding ties it: `img_size=`,
  `set_input_size`.
- InLinePVT: a position embedding is resampled wherever the map differs (see hosts/pvt.py); la_sr_ratios above 1 in a
  stage I is a ValueError (there it fails at the first call, with the class's own default).
- InLineSwin: window_size None means the first stage's whole map, as every published model has it. InLine blocks ignore
  the mask of shifted windows, as there.
- InLineCSwin: InLine blocks span the map, which are the only ones that work there; other stripes are a ValueError.
- No attention dropout. The kernels "relu", "leakyrelu" and "exp", unreachable there, are `kernel_func`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from attnzoo.backbones.blocks.contract import StageFeatures
from attnzoo.backbones.blocks.inline import inline_mixer
from attnzoo.backbones.hosts.cswin import CSwin
from attnzoo.backbones.hosts.mixers import Size, host_checkpoint
from attnzoo.backbones.hosts.pvt import PVT, stage_digits
from attnzoo.backbones.hosts.swin import Swin
from attnzoo.backbones.hosts.vit import HostViT

__all__ = ["InLineCSwin", "InLineDeiT", "InLinePVT", "InLineSwin", "checkpoint_filter_fn"]


class InLineDeiT(HostViT):
    """DeiT with InLine attention in every block; arguments as for timm's VisionTransformer, and

    kernel_func: "identity", "relu", "leakyrelu" or "exp".
    """

    def __init__(self, *args: Any, kernel_func: str = "identity", **kwargs: Any) -> None:
        super().__init__(*args, attn_type="I", mixers={"I": inline_mixer(kernel_func), "S": "softmax"}, **kwargs)


class InLinePVT(PVT):
    """PVT with InLine attention in stages I, softmax in stages S; arguments as for `PVT`, and

    la_sr_ratios, sr_ratios: reduction of keys and values in stages I (must be 1) and in stages S.
    kernel_func: as for InLineDeiT.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        *args: Any,
        num_heads: Sequence[int] = (2, 4, 10, 16),
        attn_type: str = "IIII",
        la_sr_ratios: str | Sequence[int] = "1111",
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        kernel_func: str = "identity",
        **kwargs: Any,
    ) -> None:
        super().__init__(  # type: ignore[misc]
            img_size,
            *args,
            num_heads=num_heads,
            attn_type=attn_type,
            mixers={"I": inline_mixer(kernel_func), "S": "softmax"},
            sr_ratios={
                "I": stage_digits("la_sr_ratios", la_sr_ratios, len(sr_ratios)),
                "S": stage_digits("sr_ratios", sr_ratios, len(sr_ratios)),
            },
            **kwargs,
        )


class InLineSwin(Swin):
    """Swin with InLine attention in stages I, softmax in stages S, both in stages M; arguments as for `Swin`, and

    kernel_func: as for InLineDeiT.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        *args: Any,
        attn_type: str = "IIIS",
        kernel_func: str = "identity",
        **kwargs: Any,
    ) -> None:
        mixers: dict[str, Any] = {"I": inline_mixer(kernel_func), "S": "softmax"}
        super().__init__(img_size, *args, attn_type=attn_type, mixers=mixers, **kwargs)


class InLineCSwin(CSwin):
    """CSwin with InLine attention in stages I, softmax in stages S, both in stages M; arguments as for `CSwin`, and

    la_split_size: of InLine blocks, None or the side of the whole map; the authors' "56-28-14-7" is taken, too.
    split_size: stripes of softmax blocks per stage.
    kernel_func: as for InLineDeiT.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        *args: Any,
        attn_type: str = "IISS",
        la_split_size: str | Sequence[int | None] = (None, None, None, None),
        split_size: Sequence[int] = (1, 2, 7, 7),
        kernel_func: str = "identity",
        **kwargs: Any,
    ) -> None:
        split = la_split_size.split("-") if isinstance(la_split_size, str) else la_split_size
        super().__init__(
            img_size,
            *args,
            attn_type=attn_type,
            mixers={"I": inline_mixer(kernel_func), "S": "softmax"},
            split_sizes={"I": split, "S": split_size},
            **kwargs,
        )
        for i, letters in enumerate(self._schedule):
            for letter, block in zip(letters, self._stage(i)):
                if letter == "I" and len(block.attns) > 1:
                    raise ValueError(
                        f"la_split_size must be the side of the map, {max(self.grid(i))}, or None where attn_type is I "
                        f"(stage {i}): the local filter is made for a whole image; got {la_split_size!r}"
                    )


_RENAMES = [
    ("residual.", ".mixer.residual."),
    ("relative_position_bias_table", ".mixer.rel_pos.relative_position_bias_table"),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: see `host_checkpoint`."""
    return host_checkpoint(state_dict, model, _RENAMES)


def _cfg(published: str, stem: str, size: int = 224, fixed: bool = False, crop_pct: float = 0.875) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "fixed_input_size": fixed,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": stem,
        "classifier": "head",
        "license": "",
        "paper_ids": "arXiv:2412.06590",
        "paper_name": "Bridging the Divide: Reconsidering Softmax and Linear Attention",
        "origin_url": "https://github.com/LeapLabTHU/InLine",
        "notes": (f"{published} in the authors' table",),
    }


_VIT, _PVT, _CSWIN = "patch_embed.proj", "patch_embed1.proj", "stage1_conv_embed.0"

default_cfgs = generate_default_cfgs(
    {
        "inline_deit_tiny.in1k": _cfg("6.5M parameters, 1.1 GFLOPs, top-1 74.5 %", _VIT, 224, True),
        "inline_deit_small.in1k": _cfg("16.7M parameters, 5.0 GFLOPs, top-1 80.2 %", _VIT, 288, True),
        "inline_deit_base.in1k": _cfg("23.8M parameters, 17.2 GFLOPs, top-1 82.3 %", _VIT, 448, True),
        "inline_pvt_tiny.in1k": _cfg("12.0M parameters, 2.0 GFLOPs, top-1 78.2 %", _PVT),
        "inline_pvt_small.in1k": _cfg("21.6M parameters, 3.9 GFLOPs, top-1 82.0 %", _PVT),
        "inline_pvt_medium.in1k": _cfg("37.6M parameters, 6.9 GFLOPs, top-1 83.2 %", _PVT),
        "inline_pvt_large.in1k": _cfg("50.2M parameters, 10.2 GFLOPs, top-1 83.6 %", _PVT),
        "inline_swin_tiny.in1k": _cfg("30M parameters, 4.5 GFLOPs, top-1 82.4 %", _VIT),
        "inline_swin_small.in1k": _cfg("50M parameters, 8.7 GFLOPs, top-1 83.6 %", _VIT),
        "inline_swin_base.in1k": _cfg("88M parameters, 15.4 GFLOPs, top-1 84.1 %", _VIT),
        "inline_cswin_tiny.in1k": _cfg("25M parameters, 4.3 GFLOPs, top-1 83.2 %", _CSWIN, crop_pct=0.9),
        "inline_cswin_small.in1k": _cfg("43M parameters, 6.8 GFLOPs, top-1 83.8 %", _CSWIN, crop_pct=0.9),
        "inline_cswin_base.in1k": _cfg("96M parameters, 14.9 GFLOPs, top-1 84.5 %", _CSWIN, crop_pct=0.9),
    }
)


def _create(cls: type, variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """Build `variant` of a host: the caller's arguments win."""
    args = {**model_args, **kwargs}
    depths = args.get("depths")
    indices = min(3, args.get("depth", 12)) if depths is None else tuple(range(len(depths)))
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": indices, "feature_cls": StageFeatures if depths is not None else "getter"},
        **args,
    )


_DEIT_T = {"embed_dim": 192, "depth": 12, "num_heads": 6}
_DEIT_S = {"embed_dim": 320, "depth": 12, "num_heads": 10, "img_size": 288}
_DEIT_B = {"embed_dim": 384, "depth": 12, "num_heads": 12, "img_size": 448}
_PVT_T = {"depths": (2, 2, 2, 2)}
_PVT_S = {"depths": (3, 4, 6, 3)}
_PVT_M = {"depths": (3, 4, 18, 3)}
_PVT_L = {"depths": (3, 8, 27, 3)}
_SWIN_T = {"depths": (2, 2, 6, 2), "window_size": None}
_SWIN_S = {"depths": (2, 2, 18, 2), "window_size": None, "attn_type": "IISS"}
_SWIN_B = {**_SWIN_S, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "attn_type": "IIMS2"}
_CSWIN_T = {"depths": (2, 4, 18, 1)}
_CSWIN_S = {"depths": (3, 6, 29, 2)}
_CSWIN_B = {"depths": (3, 6, 29, 2), "embed_dim": 96, "num_heads": (4, 8, 16, 32)}


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """InLine-DeiT-T."""
    return _create(InLineDeiT, "inline_deit_tiny", pretrained, _DEIT_T, kwargs)


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """InLine-DeiT-S, 288 x 288."""
    return _create(InLineDeiT, "inline_deit_small", pretrained, _DEIT_S, kwargs)


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """InLine-DeiT-B, 448 x 448."""
    return _create(InLineDeiT, "inline_deit_base", pretrained, _DEIT_B, kwargs)


@register_model
def inline_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-T."""
    return _create(InLinePVT, "inline_pvt_tiny", pretrained, _PVT_T, kwargs)


@register_model
def inline_pvt_small(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-S."""
    return _create(InLinePVT, "inline_pvt_small", pretrained, _PVT_S, kwargs)


@register_model
def inline_pvt_medium(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-M."""
    return _create(InLinePVT, "inline_pvt_medium", pretrained, _PVT_M, kwargs)


@register_model
def inline_pvt_large(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-L: 51.2M parameters are in the checkpoint, the authors' table says 50.2M."""
    return _create(InLinePVT, "inline_pvt_large", pretrained, _PVT_L, kwargs)


@register_model
def inline_swin_tiny(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-T."""
    return _create(InLineSwin, "inline_swin_tiny", pretrained, _SWIN_T, kwargs)


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-S."""
    return _create(InLineSwin, "inline_swin_small", pretrained, _SWIN_S, kwargs)


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-B."""
    return _create(InLineSwin, "inline_swin_base", pretrained, _SWIN_B, kwargs)


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-T: 20.6M parameters are in the code's model, the authors' table says 25M."""
    return _create(InLineCSwin, "inline_cswin_tiny", pretrained, _CSWIN_T, kwargs)


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-S: 33.0M parameters are in the code's model, the authors' table says 43M."""
    return _create(InLineCSwin, "inline_cswin_small", pretrained, _CSWIN_S, kwargs)


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-B: 73.4M parameters are in the code's model, the authors' table says 96M."""
    return _create(InLineCSwin, "inline_cswin_base", pretrained, _CSWIN_B, kwargs)
