"""Vision backbones as timm models: importing this registers their names with timm and does nothing else.

    import attnzoo, timm
    model = timm.create_model("dinat_tiny")

Families: NAT and DiNAT (nat.py), DiNAT_s (dinat_s.py), isotropic NAT, DiNAT and
ViT-RPB (nat_isotropic.py), Agent Attention (agent.py) and InLine attention (inline.py) in DeiT, PVT, Swin and CSwin,
varied-size windows in ViTAEv2 (vitae_vsa.py) and Swin (vsa_swin.py).
"""

from attnzoo.backbones.agent import AgentCSwin, AgentDeiT, AgentPVT, AgentSwin
from attnzoo.backbones.blocks import NeighborhoodAttention2D, NeighborhoodBlock
from attnzoo.backbones.detection import detector
from attnzoo.backbones.dinat_s import DiNAT_s
from attnzoo.backbones.inference import classify, load_model, preprocess
from attnzoo.backbones.inline import InLineCSwin, InLineDeiT, InLinePVT, InLineSwin
from attnzoo.backbones.moh_dit import MOH_DIT, MoHDiT, moh_dit
from attnzoo.backbones.nat import NAT, DiNAT
from attnzoo.backbones.nat_isotropic import NATIsotropic
from attnzoo.backbones.saliency import attention_saliency, feature_norms
from attnzoo.backbones.vitae_vsa import ViTAEVSA
from attnzoo.backbones.vsa_swin import VSASwin
from attnzoo.backbones.weights import LoadReport, convert, load_published

__all__ = [
    "AgentCSwin",
    "AgentDeiT",
    "AgentPVT",
    "AgentSwin",
    "InLineCSwin",
    "InLineDeiT",
    "InLinePVT",
    "InLineSwin",
    "MOH_DIT",
    "MoHDiT",
    "NAT",
    "LoadReport",
    "DiNAT",
    "DiNAT_s",
    "NATIsotropic",
    "VSASwin",
    "ViTAEVSA",
    "NeighborhoodAttention2D",
    "NeighborhoodBlock",
    "attention_saliency",
    "classify",
    "convert",
    "detector",
    "feature_norms",
    "load_model",
    "load_published",
    "moh_dit",
    "preprocess",
]
