"""Vision backbones as timm models: importing this registers their names with timm and does nothing else.

    import attnzoo, timm
    model = timm.create_model("dinat_tiny")

Families: NAT and DiNAT (nat.py), DiNAT_s (dinat_s.py), isotropic NAT, DiNAT and
ViT-RPB (nat_isotropic.py), Sparsifiner (sparsifiner.py), DependencyViT (dependencyvit.py), ResNets with triplet
attention (resnet_triplet.py).
"""

from attnzoo.backbones.blocks import NeighborhoodAttention2D, NeighborhoodBlock
from attnzoo.backbones.dependencyvit import DependencyViT
from attnzoo.backbones.dinat_s import DiNAT_s
from attnzoo.backbones.inference import classify, load_model, preprocess
from attnzoo.backbones.nat import NAT, DiNAT
from attnzoo.backbones.nat_isotropic import NATIsotropic
from attnzoo.backbones.resnet_triplet import TripletResNet
from attnzoo.backbones.saliency import attention_saliency, feature_norms
from attnzoo.backbones.sparsifiner import Sparsifiner
from attnzoo.backbones.weights import LoadReport, convert, load_published

__all__ = [
    "NAT",
    "LoadReport",
    "DependencyViT",
    "DiNAT",
    "DiNAT_s",
    "NATIsotropic",
    "NeighborhoodAttention2D",
    "NeighborhoodBlock",
    "Sparsifiner",
    "TripletResNet",
    "attention_saliency",
    "classify",
    "convert",
    "feature_norms",
    "load_model",
    "load_published",
    "preprocess",
]
