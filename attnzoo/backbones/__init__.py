"""Vision backbones as timm models: importing this registers their names with timm and does nothing else.

    import attnzoo, timm
    model = timm.create_model("dinat_tiny")

Families: NAT and DiNAT (nat.py), DiNAT_s (dinat_s.py), isotropic NAT, DiNAT and
ViT-RPB (nat_isotropic.py), TransNeXt (transnext.py), FAN and TAP-FAN (fan.py),
FAN-Swin (fan_swin.py), TAP-RVT (tap_rvt.py), MaxViT on our kernel
(maxvit_cells.py). timm_families.py: authors' files for timm's own models.
"""

from attnzoo.backbones.blocks import NeighborhoodAttention2D, NeighborhoodBlock
from attnzoo.backbones.blocks.aggregated import AggregatedAttention, CosineAttention
from attnzoo.backbones.blocks.fan import ChannelProcessing
from attnzoo.backbones.blocks.tap import TokenAwarePooling, attention_diversification_loss
from attnzoo.backbones.dinat_s import DiNAT_s
from attnzoo.backbones.fan import FAN
from attnzoo.backbones.fan_swin import FANSwin
from attnzoo.backbones.inference import classify, load_model, preprocess
from attnzoo.backbones.maxvit_cells import MaxxVitCells, use_cell_attention
from attnzoo.backbones.nat import NAT, DiNAT
from attnzoo.backbones.nat_isotropic import NATIsotropic
from attnzoo.backbones.saliency import attention_saliency, feature_norms
from attnzoo.backbones.tap_rvt import TAPRVT, RVTAttention
from attnzoo.backbones.timm_families import load_official_shvit
from attnzoo.backbones.transnext import TransNeXt

__all__ = [
    "ChannelProcessing",
    "FAN",
    "FANSwin",
    "RVTAttention",
    "TAPRVT",
    "TokenAwarePooling",
    "attention_diversification_loss",
    "AggregatedAttention",
    "CosineAttention",
    "TransNeXt",
    "NAT",
    "DiNAT",
    "DiNAT_s",
    "MaxxVitCells",
    "NATIsotropic",
    "NeighborhoodAttention2D",
    "NeighborhoodBlock",
    "attention_saliency",
    "classify",
    "feature_norms",
    "load_model",
    "load_official_shvit",
    "preprocess",
    "use_cell_attention",
]
