"""Agent Attention in DeiT, PVT, Swin and CSwin.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", Han et al., ECCV 2024,
https://arxiv.org/abs/2312.08874
Code: https://github.com/LeapLabTHU/Agent-Attention (agent_transformer/), licence not verified (Swin's and CSwin's
parts are Microsoft's, MIT); written here from the formulas. The mathematics is in blocks/agent.py, the hosts in hosts/.

Differences from the authors' code:
- `set_input_size` and `img_size=` take other and non-square sizes; biases and position embeddings are resampled, on
  load too. At a call the size is the one built for, as in the authors' code, because the biases tie it.
- AgentDeiT: agent blocks beyond the twelfth take agent_num's last entry (a KeyError there).
- AgentPVT: a position embedding is resampled wherever the map differs (see hosts/pvt.py).
- AgentSwin: window_size None means the first stage's whole map, which is what every published model has; windows larger
  than a map shrink axis by axis. Agent blocks ignore the mask of shifted windows, as there (no published model has
  shifted agent windows).
- No attention dropout. qk_scale, which agent blocks ignore there, is not an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_model_deprecations
from torch import nn

from attnzoo.backbones.blocks.agent import agent_mixer
from attnzoo.backbones.blocks.contract import StageFeatures
from attnzoo.backbones.hosts.cswin import CSwin
from attnzoo.backbones.hosts.mixers import Size, host_checkpoint
from attnzoo.backbones.hosts.pvt import PVT, stage_digits
from attnzoo.backbones.hosts.swin import Swin
from attnzoo.backbones.hosts.vit import HostViT

__all__ = ["AgentCSwin", "AgentDeiT", "AgentPVT", "AgentSwin", "checkpoint_filter_fn"]

# Published DeiTs name the number of agents by four stages of 2, 2, 6 and 2 blocks.
_DEIT_STAGES = (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)


class AgentDeiT(HostViT):
    """DeiT with agent attention; arguments as for timm's VisionTransformer, and

    agent_num: agents of blocks 0-1, 2-3, 4-9 and the later ones; each a square number.
    agent_layer: the number of leading blocks that have it, -1 for all; the others are plain.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int | Size = 16,
        *args: Any,
        depth: int = 12,
        agent_num: Sequence[int | str] = (49, 49, 49, 49),
        agent_layer: int = -1,
        **kwargs: Any,
    ) -> None:
        stages = [_DEIT_STAGES[min(i, len(_DEIT_STAGES) - 1)] for i in range(depth)]
        super().__init__(
            img_size,
            patch_size,
            *args,
            depth=depth,
            attn_type="A" if agent_layer < 0 else f"M{agent_layer}",
            mixers={"A": agent_mixer(agent_num, stages), "B": "softmax"},
            **kwargs,
        )


class AgentPVT(PVT):
    """PVT with agent attention in stages A, softmax in stages B; arguments as for `PVT`, and

    agent_num: agents per stage. agent_sr_ratios, sr_ratios: reduction of keys and values in stages A, and in stages B.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        *args: Any,
        attn_type: str = "AAAA",
        agent_num: Sequence[int | str] = (9, 16, 49, 49),
        agent_sr_ratios: str | Sequence[int] = "1111",
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            img_size,
            *args,
            attn_type=attn_type,
            mixers={"A": agent_mixer(agent_num), "B": "softmax"},
            sr_ratios={
                "A": stage_digits("agent_sr_ratios", agent_sr_ratios, len(sr_ratios)),
                "B": stage_digits("sr_ratios", sr_ratios, len(sr_ratios)),
            },
            **kwargs,
        )


class AgentSwin(Swin):
    """Swin with agent attention in stages A, softmax in stages B, both in stages M; arguments as for `Swin`, and

    agent_num: agents per stage.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        *args: Any,
        attn_type: str = "AAAB",
        agent_num: Sequence[int | str] = (9, 16, 49, 49),
        **kwargs: Any,
    ) -> None:
        mixers: dict[str, Any] = {"A": agent_mixer(agent_num), "B": "softmax"}
        super().__init__(img_size, *args, attn_type=attn_type, mixers=mixers, **kwargs)


class AgentCSwin(CSwin):
    """CSwin with agent attention in stages A, softmax in stages B, both in stages M; arguments as for `CSwin`, and

    agent_num: agents per stage.
    la_split_size: stripes of agent blocks per stage, None for the whole map; the authors' "56-28-14-7" is taken, too.
    split_size: stripes of softmax blocks per stage.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        *args: Any,
        attn_type: str = "AABB",
        agent_num: Sequence[int | str] = (9, 16, 49, 49),
        la_split_size: str | Sequence[int | None] = (None, None, None, None),
        split_size: Sequence[int] = (1, 2, 7, 7),
        **kwargs: Any,
    ) -> None:
        split = la_split_size.split("-") if isinstance(la_split_size, str) else la_split_size
        super().__init__(
            img_size,
            *args,
            attn_type=attn_type,
            mixers={"A": agent_mixer(agent_num), "B": "softmax"},
            split_sizes={"A": split, "B": split_size},
            **kwargs,
        )


_TABLES = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias", "ac_bias", "ca_bias")
_RENAMES = [
    *((name, f".mixer.{name}") for name in _TABLES),
    ("dwc.", ".mixer.dwc."),
    ("relative_position_bias_table", ".mixer.rel_pos.relative_position_bias_table"),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: see `host_checkpoint`."""
    return host_checkpoint(state_dict, model, _RENAMES)


def _cfg(published: str, stem: str, size: int = 224, crop_pct: float = 0.875) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": stem,
        "classifier": "head",
        "license": "",
        "paper_ids": "arXiv:2312.08874",
        "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
        "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
        "notes": (f"{published} in the authors' table",),
    }


_VIT, _PVT, _SWIN, _CSWIN = "patch_embed.proj", "patch_embed1.proj", "patch_embed.proj", "stage1_conv_embed.0"

default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": _cfg("6.0M parameters, 1.2 GFLOPs, top-1 74.9 %", _VIT),
        "agent_deit_small.in1k": _cfg("22.7M parameters, 4.4 GFLOPs, top-1 80.5 %", _VIT),
        "agent_deit_small_448.in1k": _cfg("23.1M parameters, 17.7 GFLOPs, top-1 83.1 %", _VIT, 448),
        "agent_deit_base.in1k": _cfg("87.2M parameters, 17.6 GFLOPs, top-1 82.0 %", _VIT),
        "agent_pvt_tiny.in1k": _cfg("11.6M parameters, 2.0 GFLOPs, top-1 78.4 %", _PVT),
        "agent_pvt_small.in1k": _cfg("20.6M parameters, 4.0 GFLOPs, top-1 82.2 %", _PVT),
        "agent_pvt_medium.in1k": _cfg("35.9M parameters, 7.0 GFLOPs, top-1 83.4 %", _PVT),
        "agent_pvt_medium_256.in1k": _cfg("36.1M parameters, 9.2 GFLOPs, top-1 83.8 %", _PVT, 256),
        "agent_pvt_large.in1k": _cfg("48.7M parameters, 10.4 GFLOPs, top-1 83.7 %", _PVT),
        "agent_swin_tiny.in1k": _cfg("29M parameters, 4.5 GFLOPs, top-1 82.6 %", _SWIN),
        "agent_swin_small.in1k": _cfg("50M parameters, 8.7 GFLOPs, top-1 83.7 %", _SWIN),
        "agent_swin_small_288.in1k": _cfg("50M parameters, 14.6 GFLOPs, top-1 84.1 %", _SWIN, 288, 1.0),
        "agent_swin_base.in1k": _cfg("88M parameters, 15.4 GFLOPs, top-1 84.0 %", _SWIN),
        "agent_swin_base_384.in1k": _cfg("88M parameters, 46.3 GFLOPs, top-1 84.9 %", _SWIN, 384, 1.0),
        "agent_cswin_tiny.in1k": _cfg("21M parameters, 4.3 GFLOPs, top-1 83.1 %", _CSWIN, crop_pct=0.9),
        "agent_cswin_small.in1k": _cfg("33M parameters, 6.8 GFLOPs, top-1 83.9 %", _CSWIN, crop_pct=0.9),
        "agent_cswin_base.in1k": _cfg("73M parameters, 14.9 GFLOPs, top-1 84.7 %", _CSWIN, crop_pct=0.9),
        "agent_cswin_base_384.in1k": _cfg("73M parameters, 46.3 GFLOPs, top-1 85.8 %", _CSWIN, 384, 1.0),
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


_DEIT_T = {"embed_dim": 192, "depth": 12, "num_heads": 3, "drop_path_rate": 0.0}
_DEIT_S = {"embed_dim": 384, "depth": 12, "num_heads": 6, "drop_path_rate": 0.1}
_DEIT_B = {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "agent_num": (81, 81, 81, 81),
    "agent_layer": 4,
    "drop_path_rate": 0.3,
}
_PVT_T = {"depths": (2, 2, 2, 2), "drop_path_rate": 0.1}
_PVT_S = {"depths": (3, 4, 6, 3), "drop_path_rate": 0.2}
_PVT_M = {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3}
_PVT_L = {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3}
_SWIN_T = {"depths": (2, 2, 6, 2), "window_size": None, "drop_path_rate": 0.2}
_SWIN_S = {"depths": (2, 2, 18, 2), "window_size": None, "attn_type": "AABB", "drop_path_rate": 0.3}
_SWIN_B = {**_SWIN_S, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "attn_type": "AAMB2", "drop_path_rate": 0.5}
_CSWIN_T = {"depths": (2, 4, 18, 1), "drop_path_rate": 0.2}
_CSWIN_S = {"depths": (3, 6, 29, 2), "drop_path_rate": 0.4}
_CSWIN_B = {"depths": (3, 6, 29, 2), "embed_dim": 96, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """Agent-DeiT-T."""
    return _create(AgentDeiT, "agent_deit_tiny", pretrained, _DEIT_T, kwargs)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """Agent-DeiT-S."""
    return _create(AgentDeiT, "agent_deit_small", pretrained, _DEIT_S, kwargs)


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """Agent-DeiT-S at 448 x 448."""
    return _create(AgentDeiT, "agent_deit_small_448", pretrained, {**_DEIT_S, "img_size": 448}, kwargs)


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """Agent-DeiT-B: agents in its first four blocks."""
    return _create(AgentDeiT, "agent_deit_base", pretrained, _DEIT_B, kwargs)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-T."""
    return _create(AgentPVT, "agent_pvt_tiny", pretrained, _PVT_T, kwargs)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-S."""
    return _create(AgentPVT, "agent_pvt_small", pretrained, _PVT_S, kwargs)


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-M."""
    return _create(AgentPVT, "agent_pvt_medium", pretrained, _PVT_M, kwargs)


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-M at 256 x 256."""
    return _create(AgentPVT, "agent_pvt_medium_256", pretrained, {**_PVT_M, "img_size": 256}, kwargs)


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-L."""
    return _create(AgentPVT, "agent_pvt_large", pretrained, _PVT_L, kwargs)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-T."""
    return _create(AgentSwin, "agent_swin_tiny", pretrained, _SWIN_T, kwargs)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-S."""
    return _create(AgentSwin, "agent_swin_small", pretrained, _SWIN_S, kwargs)


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-S at 288 x 288."""
    return _create(AgentSwin, "agent_swin_small_288", pretrained, {**_SWIN_S, "img_size": 288}, kwargs)


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-B."""
    return _create(AgentSwin, "agent_swin_base", pretrained, _SWIN_B, kwargs)


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-B at 384 x 384."""
    return _create(AgentSwin, "agent_swin_base_384", pretrained, {**_SWIN_B, "img_size": 384}, kwargs)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """Agent-CSwin-T."""
    return _create(AgentCSwin, "agent_cswin_tiny", pretrained, _CSWIN_T, kwargs)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """Agent-CSwin-S."""
    return _create(AgentCSwin, "agent_cswin_small", pretrained, _CSWIN_S, kwargs)


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """Agent-CSwin-B."""
    return _create(AgentCSwin, "agent_cswin_base", pretrained, _CSWIN_B, kwargs)


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """Agent-CSwin-B at 384 x 384."""
    args = {**_CSWIN_B, "img_size": 384, "split_size": (1, 2, 12, 12), "drop_path_rate": 0.7}
    return _create(AgentCSwin, "agent_cswin_base_384", pretrained, args, kwargs)


register_model_deprecations(  # the authors' entry points
    __name__,
    {
        "Agent_CSWin_64_24181_tiny_224": "agent_cswin_tiny",
        "Agent_CSWin_64_36292_small_224": "agent_cswin_small",
        "Agent_CSWin_96_36292_base_224": "agent_cswin_base",
        "Agent_CSWin_96_36292_base_384": "agent_cswin_base_384",
    },
)
