"""Backbones to time, as data: each beside the timm model that is nearest to it, and hosts with another attention.

PEERS[name] = timm's nearest: the family's skeleton where timm has it, else parameters and GMACs of the same size.
CURVES[title] = ((label, builder's name, keyword arguments), ...): the first is ours, the last the peer, which all are
set against.
"""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnzoo.backbones  # noqa: F401  (registers the names)
from attnzoo.backbones import AgentPVT, CARETokenMixer

_SWIN, _DEIT_T, _DEIT_S = "swin_tiny_patch4_window7_224", "deit_tiny_patch16_224", "deit_small_patch16_224"

PEERS = {
    "nat_mini": _SWIN,
    "nat_tiny": _SWIN,
    "dinat_mini": _SWIN,
    "dinat_tiny": _SWIN,
    "dinat_s_tiny": _SWIN,
    "nat_isotropic_small": _DEIT_S,
    "dinat_isotropic_small": _DEIT_S,
    "vitrpb_small": _DEIT_S,
    "agent_deit_tiny": _DEIT_T,
    "agent_deit_small": _DEIT_S,
    "agent_pvt_tiny": "pvt_v2_b1",
    "agent_pvt_small": "pvt_v2_b2",
    "agent_swin_tiny": _SWIN,
    "agent_cswin_tiny": _SWIN,
    "inline_deit_tiny": _DEIT_T,
    "inline_pvt_tiny": "pvt_v2_b1",
    "inline_pvt_small": "pvt_v2_b2",
    "inline_swin_tiny": _SWIN,
    "inline_cswin_tiny": _SWIN,
    "moh_transnext_small_75": "pvt_v2_b4",
    "maxvit_tiny_tf_512_attnzoo": "maxvit_tiny_tf_512",
    "maxvit_small_tf_512_attnzoo": "maxvit_small_tf_512",
    "maxvit_base_tf_512_attnzoo": "maxvit_base_tf_512",
    "transnext_micro": "pvt_v2_b1",
    "transnext_tiny": "pvt_v2_b2",
    "fan_tiny_12_p16_224": "xcit_tiny_12_p16_224",
    "fan_small_12_p16_224": "xcit_small_12_p16_224",
    "fan_tiny_8_p4_hybrid": "convnext_nano",
    "fan_swin_tiny_patch4_window7_224": _SWIN,
    "tap_fan_tiny_12_p16_224": "xcit_tiny_12_p16_224",
    "tap_rvt_tiny": _DEIT_T,
    "resnet18_triplet": "resnet18",
    "resnet50_triplet": "resnet50",
    "sparsifiner_tiny_patch16_224": _DEIT_T,
    "sparsifiner_small_patch16_224": _DEIT_S,
    "dependencyvit_tiny_patch16_224": _DEIT_T,
    "dependencyvit_lite_tiny_patch16_224": _DEIT_T,
    "caretrans_s0": "efficientformerv2_s1",
    "caretrans_s1": "efficientformerv2_s1",
    "flowformer_cv": "pvt_v2_b3",
    "medvitv2_tiny": "nextvit_small",
    "medvitv2_small": "nextvit_small",
    "shiftadd_pvt_v2_b0": "pvt_v2_b0",
    "shiftadd_pvt_v2_b1": "pvt_v2_b1",
    "vitaev2_vsa_small": _SWIN,
    "vsa_swin_tiny": _SWIN,
}

Curve = tuple[tuple[str, str, dict[str, Any]], ...]
CURVES: dict[str, Curve] = {
    "DiNAT": (
        ("dinat_tiny", "dinat_tiny", {}),
        ("deit_small (a ViT of its FLOPs at 224)", _DEIT_S, {}),
        ("swin_tiny", _SWIN, {}),
    ),
    "DeiT-T": (
        ("agent", "agent_deit_tiny", {}),
        ("inline", "inline_deit_tiny", {}),
        ("softmax (timm)", _DEIT_T, {}),
    ),
    "PVT-T": (
        ("agent", "agent_pvt_tiny", {}),
        ("inline", "inline_pvt_tiny", {}),
        ("softmax, keys reduced", "softmax_pvt", {}),
    ),
    "Swin-T": (
        ("agent", "agent_swin_tiny", {}),
        ("inline", "inline_swin_tiny", {}),
        ("softmax (timm)", _SWIN, {}),
    ),
    "CARE-S0": (("care", "caretrans_s0", {}), ("softmax in its place", "softmax_care", {})),
}
SIZES = (224, 384, 512, 768)


class SoftmaxCARE(CARETokenMixer):
    """CARE's mixer with softmax attention in the linear one's place: the host that its figures are set against."""

    def _attend(self, x: Tensor) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)

        query, key = self.qk(x).chunk(2, 1)
        out = F.scaled_dot_product_attention(heads(query), heads(key), heads(x))
        return out.transpose(2, 3).reshape(x.shape)


def _softmax_care(size: int) -> nn.Module:
    model = timm.create_model("caretrans_s0")
    for module in model.modules():
        if type(module) is CARETokenMixer and module.num_heads:
            module.__class__ = SoftmaxCARE
    return model


def _cfg(name: str) -> Any:
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        raise ValueError(f"timm has no default cfg of {name!r}: give a registered model")
    return cfg


def native_size(name: str) -> int:
    """The side of the images that a model's published weights take."""
    return _cfg(name).input_size[-1]


def build(name: str, size: int, **kwargs: Any) -> nn.Module:
    """A timm model by name, or one of the softmax hosts, in eval mode and for square images of `size`."""
    if name == "softmax_care":
        return _softmax_care(size).eval()
    if name == "softmax_pvt":
        return AgentPVT(size, depths=(2, 2, 2, 2), attn_type="BBBB", **kwargs).eval()
    cfg = _cfg(name)
    if size != cfg.input_size[-1] and cfg.fixed_input_size:  # pyramids take any size as they are
        kwargs["img_size"] = size
    return timm.create_model(name, **kwargs).eval()


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """A little noise on every parameter, in place, of ours and of peers.

    Fresh models have zeros that would hide what a branch does, and values that change a product's time: timm's Swin at
    512 takes half as long again when fresh.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator))
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same weights."""
    return copy.deepcopy(model)
