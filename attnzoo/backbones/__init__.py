"""Vision backbones as timm models: importing this registers their names with timm and does nothing else.

    import attnzoo, timm
    model = timm.create_model("dinat_tiny")

Families: NAT and DiNAT (nat.py), DiNAT_s (dinat_s.py), isotropic NAT, DiNAT and
ViT-RPB (nat_isotropic.py), CARE Transformer (care.py), Flowformer for vision
(flowformer.py). Layers for models of one's own, sigmoid attention and FLARE among them, are in blocks/.
"""

from attnzoo.backbones.blocks import (
    CAREBlock,
    CARETokenMixer,
    FlareAttention,
    FlareBlock,
    FlareModel,
    FlowAttention,
    FlowSelfAttention,
    NeighborhoodAttention2D,
    NeighborhoodBlock,
    RootMeanSquareNorm,
    SigmoidAttention,
    SigmoidCrossAttention,
    as_attn_layer,
    sigmoid_attention,
    sigmoid_block,
)
from attnzoo.backbones.care import CARETransformer
from attnzoo.backbones.dinat_s import DiNAT_s
from attnzoo.backbones.flowformer import Flowformer
from attnzoo.backbones.inference import classify, load_model, preprocess
from attnzoo.backbones.nat import NAT, DiNAT
from attnzoo.backbones.nat_isotropic import NATIsotropic
from attnzoo.backbones.saliency import attention_saliency, feature_norms
from attnzoo.backbones.weights import LoadReport, convert, load_published

__all__ = [
    "NAT",
    "CAREBlock",
    "CARETokenMixer",
    "CARETransformer",
    "LoadReport",
    "DiNAT",
    "DiNAT_s",
    "FlareAttention",
    "FlareBlock",
    "FlareModel",
    "FlowAttention",
    "FlowSelfAttention",
    "Flowformer",
    "NATIsotropic",
    "NeighborhoodAttention2D",
    "NeighborhoodBlock",
    "RootMeanSquareNorm",
    "SigmoidAttention",
    "SigmoidCrossAttention",
    "as_attn_layer",
    "attention_saliency",
    "classify",
    "convert",
    "feature_norms",
    "load_model",
    "load_published",
    "preprocess",
    "sigmoid_attention",
    "sigmoid_block",
]
