"""Attention layers and blocks as nn.Modules, for building models of one's own."""

from attnzoo.backbones.blocks.efficient import EfficientAttention, EfficientTokenAttention
from attnzoo.backbones.blocks.insertion import BLOCKS, Insertion, insert
from attnzoo.backbones.blocks.msa_conv import MSAConv2d, window_attention
from attnzoo.backbones.blocks.neighborhood import NeighborhoodAttention2D, NeighborhoodBlock
from attnzoo.backbones.blocks.polarized import PolarizedParallel, PolarizedSequential
from attnzoo.backbones.blocks.probing import EfficientProbing, Probe, SimPool, attach_probe, probe_head
from attnzoo.backbones.blocks.triplet import TripletAttention
from attnzoo.backbones.blocks.ulsam import ULSAM

__all__ = [
    "BLOCKS",
    "EfficientAttention",
    "EfficientProbing",
    "EfficientTokenAttention",
    "Insertion",
    "MSAConv2d",
    "NeighborhoodAttention2D",
    "NeighborhoodBlock",
    "PolarizedParallel",
    "PolarizedSequential",
    "Probe",
    "SimPool",
    "TripletAttention",
    "ULSAM",
    "attach_probe",
    "insert",
    "probe_head",
    "window_attention",
]
