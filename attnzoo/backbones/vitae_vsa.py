"""ViTAEv2 with varied-size window attention (VSA).

Paper: "VSA: Learning Varied-Size Window Attention in Vision Transformers", Zhang et al., ECCV 2022,
https://arxiv.org/abs/2204.08446
Code: https://github.com/ViTAE-Transformer/ViTAE-VSA at 75dc986, "for research purpose only" in its README; written here
from the formulas. The attention is in blocks/vsa.py (with its own list of differences), the cells in blocks/vitae.py.

Differences from the authors' code; those marked (*) are kept by `compat="official"`:
- drop_path_rate rises over all normal cells; there the stages from the third on start again at the depth of the stage
  before them (*). It matters in training only.
- Maps smaller than a window work; there the result is NaN, as it is of ViTAEv2_VSA_widePCM_B_ws12 at 224 (* refused).
- Images of any size: maps that a stage's stride does not divide are zero-padded at the bottom and right. There img_size
  must be divisible and square, and is an argument; here nothing is tied to it.
- window_size may differ from the checkpoint's: the bias tables are resampled on load.
- Tokens of other kinds ("performer", "window", "stem", ...), which no published model has, are not here; relative_pos,
  which does nothing there, is no argument. attn_drop, which does nothing there, must be 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
)
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import LeveledModel, StageFeatures
from attnzoo.backbones.blocks.neighborhood import drop_path_rates, init_weights, refuse_attn_drop, unwrap_checkpoint
from attnzoo.backbones.blocks.staged import check_depths
from attnzoo.backbones.blocks.vitae import NormalCell, ReductionCell, VSAStage
from attnzoo.backbones.blocks.vsa import COMPAT, fit_bias_tables
from attnzoo.errors import check_choice, check_range

__all__ = ["ViTAEVSA", "checkpoint_filter_fn"]


_NORM = partial(nn.LayerNorm, eps=1e-6)


class ViTAEVSA(LeveledModel):
    """ViTAEv2 with VSA in every cell: stages of a reduction cell and normal cells, mean over tokens, Linear.

    There is no last norm. One value stands for all stages where a sequence has one per stage.

    Args:
        dims: channels per stage; one int is the first stage's, doubling.
        stem_dims: channels of each convolution of a stage's pyramid reduction.
        depths: normal cells per stage; their number is the number of stages.
        num_heads, reduction_heads: heads of normal and of reduction cells.
        strides: reduction per stage, 2, 4 or 8.
        kernel_size, dilations, reduction_op: of the pyramid reduction; "cat" or "sum".
        groups, reduction_groups: of the parallel convolutions in normal and in reduction cells.
        wide_pcm: parallel convolutions of reduction cells are twice dims wide instead of stem_dims.
        mlp_ratio: hidden width of MLPs and parallel convolutions in normal cells over the channels.
        window_size: side of the windows.
        cpe: a 7 x 7 depthwise convolution before each attention as position embedding.
        qkv_bias, scale: of the attention in normal cells, see `VSA`.
        num_classes, in_chans, global_pool: as in timm.
        drop_rate: dropout before the head. proj_drop_rate: in normal cells. attn_drop_rate: must be 0.0.
        drop_path_rate: of the last normal cell, rising linearly from 0; reduction cells have none.
        norm_layer: of normal cells, called with a channel count.
        pad: where maps are padded to windows, "end", or "both" as in the authors' detection code.
        compat: "corrected" or "official", see the module's docstring.
    """

    def __init__(
        self,
        dims: int | Sequence[int] = 64,
        stem_dims: int | Sequence[int] = (64, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: int | Sequence[int] = (2, 4, 8, 16),
        reduction_heads: int | Sequence[int] = (2, 2, 4, 8),
        *,
        strides: int | Sequence[int] = (4, 2, 2, 2),
        kernel_size: int | Sequence[int] = (7, 3, 3, 3),
        dilations: Sequence[Any] = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2)),
        reduction_op: str | Sequence[str] = "cat",
        groups: int | Sequence[int] = (1, 32, 64, 128),
        reduction_groups: int | Sequence[int] = (1, 16, 32, 64),
        wide_pcm: bool | Sequence[bool] = False,
        mlp_ratio: float | Sequence[float] = 4.0,
        window_size: int = 7,
        cpe: bool = True,
        qkv_bias: bool | Sequence[bool] = True,
        scale: float | None | Sequence[float | None] = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float | Sequence[float] = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = _NORM,
        pad: str = "end",
        compat: str = "corrected",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_depths(depths)
        refuse_attn_drop(attn_drop_rate)
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        check_choice("compat", compat, COMPAT)
        count = len(depths)
        widths = [dims * 2**i for i in range(count)] if isinstance(dims, int) else _per_stage("dims", dims, count)
        stem_dims = _per_stage("stem_dims", stem_dims, count)
        num_heads = _per_stage("num_heads", num_heads, count)
        reduction_heads = _per_stage("reduction_heads", reduction_heads, count)
        strides = _per_stage("strides", strides, count)
        kernel_size = _per_stage("kernel_size", kernel_size, count)
        if dilations and isinstance(dilations[0], int):
            dilations = [dilations] * count
        dilations = _per_stage("dilations", dilations, count)
        reduction_op = _per_stage("reduction_op", reduction_op, count)
        groups = _per_stage("groups", groups, count)
        reduction_groups = _per_stage("reduction_groups", reduction_groups, count)
        wide_pcm = _per_stage("wide_pcm", wide_pcm, count)
        mlp_ratio = _per_stage("mlp_ratio", mlp_ratio, count)
        qkv_bias = _per_stage("qkv_bias", qkv_bias, count)
        scale = _per_stage("scale", scale, count)
        proj_drop_rate = _per_stage("proj_drop_rate", proj_drop_rate, count)
        windows: dict[str, Any] = {"window_size": window_size, "cpe": cpe, "pad": pad, "compat": compat, "dd": dd}

        rates = drop_path_rates(drop_path_rate, sum(depths))
        stages, self.feature_info = [], []
        given, reduction = in_chans, 1
        for i, dim in enumerate(widths):
            start = sum(depths[:i]) if compat == "corrected" else (depths[i - 1] if i else 0)
            cells = [
                NormalCell(
                    dim,
                    num_heads[i],
                    mlp_ratio=mlp_ratio[i],
                    groups=groups[i],
                    qkv_bias=qkv_bias[i],
                    scale=scale[i],
                    proj_drop=proj_drop_rate[i],
                    drop_path=rates[start + j],
                    norm_layer=norm_layer,
                    **windows,
                )
                for j in range(depths[i])
            ]
            entry = ReductionCell(
                given,
                stem_dims[i],
                dim,
                reduction_heads[i],
                stride=strides[i],
                kernel_size=kernel_size[i],
                dilations=dilations[i],
                op=reduction_op[i],
                groups=reduction_groups[i],
                wide_pcm=wide_pcm[i],
                **windows,
            )
            stages.append(VSAStage(entry, cells))
            given, reduction = dim, reduction * strides[i]
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"layers.{i}"})
        self.layers = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.num_features = self.embed_dim = widths[-1]
        self.grad_checkpointing = False
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.apply(init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the first reduction cell, then one group per cell (coarse: per stage)."""
        cells = [(r"^layers\.(\d+)\.NC\.(\d+)", None), (r"^layers\.(\d+)\.RC", (-1,))]
        return {"stem": r"^layers\.0\.RC", "blocks": r"^layers\.(\d+)" if coarse else cells}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each normal cell's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @property
    def num_levels(self) -> int:
        return len(self.layers)

    def _stage(self, i: int) -> Any:
        return self.layers[i]

    def _enter(self, i: int, x: Tensor) -> Tensor:
        return self._stage(i).RC(x if i == 0 else x.permute(0, 3, 1, 2))

    def _level(self, i: int, x: Tensor) -> Tensor:
        cells = self._stage(i).NC
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(cells, x)
        return cells(x)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _keep_levels(self, count: int) -> None:
        self.layers = self.layers[:count]


def _per_stage(name: str, value: Any, count: int) -> list[Any]:
    """One entry per stage: one that is no sequence stands for all of them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one value or one per stage ({count}), got {len(value)}: {value!r}")
    return list(value)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: computed buffers dropped, bias tables of other windows
    resampled."""
    given = unwrap_checkpoint(state_dict)
    return fit_bias_tables({k: v for k, v in given.items() if not k.endswith("relative_position_index")}, model)


def _cfg(notes: str, size: int = 224) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": (*(f"layers.0.RC.PRM.convs.{i}.0" for i in range(4)), "layers.0.RC.PCM.0"),
        "classifier": "head",
        "license": "",
        "paper_ids": "arXiv:2204.08446",
        "paper_name": "VSA: Learning Varied-Size Window Attention in Vision Transformers",
        "origin_url": "https://github.com/ViTAE-Transformer/ViTAE-VSA",
        "notes": (notes,),
    }


_COMING = "no checkpoint was published"

default_cfgs = generate_default_cfgs(
    {
        "vitaev2_vsa_small.in1k": _cfg("19.8M parameters, top-1 82.7 % in the authors' table"),
        "vitaev2_vsa_widepcm_small.untrained": _cfg(f"20.3M parameters; {_COMING}"),
        "vitaev2_vsa_widepcm_48m.in1k": _cfg("51.1M parameters, top-1 83.9 % in the authors' table"),
        "vitaev2_vsa_widepcm_base.in22k_ft_in1k": _cfg(
            f"93.7M parameters, top-1 86.2 % in the authors' table; {_COMING}"
        ),
        "vitaev2_vsa_widepcm_base_ws12.untrained": _cfg(f"93.8M parameters; {_COMING}", 384),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> ViTAEVSA:
    """Build `variant`: the caller's arguments win."""
    args = {**model_args, **kwargs}
    return build_model_with_cfg(
        ViTAEVSA,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": StageFeatures},
        **args,
    )


_S = {"dims": (64, 128, 256, 512), "depths": (2, 2, 8, 2)}
_WIDE_S = {**_S, "reduction_heads": (2, 4, 8, 16), "wide_pcm": True}
_48M = {
    "dims": (96, 192, 384, 768),
    "stem_dims": (96, 96, 192, 384),
    "depths": (2, 2, 11, 2),
    "num_heads": (3, 6, 12, 24),
    "reduction_heads": (3, 6, 12, 24),
    "wide_pcm": True,
}
_B = {
    "dims": (128, 256, 512, 1024),
    "stem_dims": (128, 128, 256, 512),
    "depths": (2, 2, 12, 2),
    "num_heads": (4, 8, 16, 32),
    "reduction_heads": (4, 8, 16, 32),
    "wide_pcm": True,
}


@register_model
def vitaev2_vsa_small(pretrained: bool = False, **kwargs: Any) -> ViTAEVSA:
    """ViTAEv2-S+VSA."""
    return _create("vitaev2_vsa_small", pretrained, _S, kwargs)


@register_model
def vitaev2_vsa_widepcm_small(pretrained: bool = False, **kwargs: Any) -> ViTAEVSA:
    """ViTAEv2-S+VSA with wide parallel convolutions."""
    return _create("vitaev2_vsa_widepcm_small", pretrained, _WIDE_S, kwargs)


@register_model
def vitaev2_vsa_widepcm_48m(pretrained: bool = False, **kwargs: Any) -> ViTAEVSA:
    """ViTAEv2-48M+VSA."""
    return _create("vitaev2_vsa_widepcm_48m", pretrained, _48M, kwargs)


@register_model
def vitaev2_vsa_widepcm_base(pretrained: bool = False, **kwargs: Any) -> ViTAEVSA:
    """ViTAEv2-B+VSA."""
    return _create("vitaev2_vsa_widepcm_base", pretrained, _B, kwargs)


@register_model
def vitaev2_vsa_widepcm_base_ws12(pretrained: bool = False, **kwargs: Any) -> ViTAEVSA:
    """ViTAEv2-B+VSA with windows of 12, for 384 x 384."""
    return _create("vitaev2_vsa_widepcm_base_ws12", pretrained, {**_B, "window_size": 12}, kwargs)


register_model_deprecations(  # the authors' entry points
    __name__,
    {
        "ViTAEv2_VSA_S": "vitaev2_vsa_small",
        "ViTAEv2_VSA_widePCM_S": "vitaev2_vsa_widepcm_small",
        "ViTAEv2_VSA_widePCM_48M": "vitaev2_vsa_widepcm_48m",
        "ViTAEv2_VSA_widePCM_B": "vitaev2_vsa_widepcm_base",
        "ViTAEv2_VSA_widePCM_B_ws12": "vitaev2_vsa_widepcm_base_ws12",
    },
)
