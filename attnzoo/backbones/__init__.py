"""Vision backbones as timm models: importing this registers their names with timm, and with open_clip where that is
imported (see `clip_configs`), and does nothing else.

    import attnzoo, timm
    model = timm.create_model("dinat_tiny")

One file a family; `attnzoo list backbones` and docs/backbones.md name them all.
"""

from attnzoo.backbones import restoration
from attnzoo.backbones.agent import AgentCSwin, AgentDeiT, AgentPVT, AgentSwin
from attnzoo.backbones.attention_maps import AttentionMap, attention_maps, attention_rollout, rollout
from attnzoo.backbones.blocks import (
    CAREBlock,
    CARETokenMixer,
    FlareAttention,
    FlareBlock,
    FlareModel,
    FlowAttention,
    FlowSelfAttention,
    LookupViT,
    NeighborhoodAttention2D,
    NeighborhoodBlock,
    RootMeanSquareNorm,
    SigmoidAttention,
    SigmoidCrossAttention,
    as_attn_layer,
    sigmoid_attention,
    sigmoid_block,
)
from attnzoo.backbones.blocks.aggregated import AggregatedAttention, CosineAttention
from attnzoo.backbones.blocks.fan import ChannelProcessing
from attnzoo.backbones.blocks.tap import TokenAwarePooling, attention_diversification_loss
from attnzoo.backbones.care import CARETransformer
from attnzoo.backbones.clip_configs import _when_imported, register_open_clip
from attnzoo.backbones.complexity import Complexity, complexity
from attnzoo.backbones.dependencyvit import DependencyViT
from attnzoo.backbones.detection import detector
from attnzoo.backbones.detection_metrics import CocoFolder, detection_metrics, evaluate_detector
from attnzoo.backbones.dinat_s import DiNAT_s
from attnzoo.backbones.fan import FAN
from attnzoo.backbones.fan_swin import FANSwin
from attnzoo.backbones.flowformer import Flowformer
from attnzoo.backbones.inference import classify, load_model, preprocess
from attnzoo.backbones.inline import InLineCSwin, InLineDeiT, InLinePVT, InLineSwin
from attnzoo.backbones.maxvit_cells import MaxxVitCells, use_cell_attention
from attnzoo.backbones.medvitv2 import MedViTV2
from attnzoo.backbones.moh_dit import MOH_DIT, MoHDiT, moh_dit
from attnzoo.backbones.moh_transnext import MoHTransNeXt
from attnzoo.backbones.nat import NAT, DiNAT
from attnzoo.backbones.nat_isotropic import NATIsotropic
from attnzoo.backbones.resnet_triplet import TripletResNet
from attnzoo.backbones.saliency import attention_saliency, feature_norms
from attnzoo.backbones.shiftadd import ShiftAddPVT
from attnzoo.backbones.sparsifiner import Sparsifiner
from attnzoo.backbones.tap_rvt import TAPRVT, RVTAttention
from attnzoo.backbones.timm_families import load_official_shvit
from attnzoo.backbones.transnext import TransNeXt
from attnzoo.backbones.vitae_vsa import ViTAEVSA
from attnzoo.backbones.vsa_swin import VSASwin
from attnzoo.backbones.weights import LoadReport, convert, load_published

__all__ = [
    "AgentCSwin",
    "AgentDeiT",
    "AgentPVT",
    "AgentSwin",
    "AggregatedAttention",
    "AttentionMap",
    "CAREBlock",
    "CARETokenMixer",
    "CARETransformer",
    "ChannelProcessing",
    "Complexity",
    "CocoFolder",
    "CosineAttention",
    "DependencyViT",
    "DiNAT",
    "DiNAT_s",
    "FAN",
    "FANSwin",
    "FlareAttention",
    "FlareBlock",
    "FlareModel",
    "FlowAttention",
    "FlowSelfAttention",
    "Flowformer",
    "InLineCSwin",
    "InLineDeiT",
    "InLinePVT",
    "InLineSwin",
    "LoadReport",
    "LookupViT",
    "MOH_DIT",
    "MaxxVitCells",
    "MedViTV2",
    "MoHDiT",
    "MoHTransNeXt",
    "NAT",
    "NATIsotropic",
    "NeighborhoodAttention2D",
    "NeighborhoodBlock",
    "RVTAttention",
    "RootMeanSquareNorm",
    "ShiftAddPVT",
    "SigmoidAttention",
    "SigmoidCrossAttention",
    "Sparsifiner",
    "TAPRVT",
    "TokenAwarePooling",
    "TransNeXt",
    "TripletResNet",
    "VSASwin",
    "ViTAEVSA",
    "as_attn_layer",
    "attention_diversification_loss",
    "attention_maps",
    "attention_rollout",
    "attention_saliency",
    "classify",
    "complexity",
    "convert",
    "detection_metrics",
    "detector",
    "evaluate_detector",
    "feature_norms",
    "load_model",
    "load_official_shvit",
    "load_published",
    "moh_dit",
    "preprocess",
    "register_open_clip",
    "restoration",
    "rollout",
    "sigmoid_attention",
    "sigmoid_block",
    "use_cell_attention",
]

_when_imported()
