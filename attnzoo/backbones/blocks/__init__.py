"""Attention layers and blocks as nn.Modules, for building models of one's own."""

from attnzoo.backbones.blocks.aggregation import QueryAggregation, attach_aggregation
from attnzoo.backbones.blocks.attn_layer import as_attn_layer
from attnzoo.backbones.blocks.broadcasting import BroadcastingMlp, ContextBroadcasting
from attnzoo.backbones.blocks.care import CAREBlock, CARETokenMixer
from attnzoo.backbones.blocks.efficient import EfficientAttention, EfficientTokenAttention
from attnzoo.backbones.blocks.flare import FlareAttention, FlareBlock, FlareModel
from attnzoo.backbones.blocks.flow import FlowAttention, FlowSelfAttention
from attnzoo.backbones.blocks.insertion import BLOCKS, Insertion, insert
from attnzoo.backbones.blocks.large_kernel import LargeKernelConvAttention, LargeKernelConvBlock
from attnzoo.backbones.blocks.lookup import BidirectionalCrossAttention, LookupBlock, LookupViT
from attnzoo.backbones.blocks.msa_conv import MSAConv2d, window_attention
from attnzoo.backbones.blocks.neighborhood import NeighborhoodAttention2D, NeighborhoodBlock
from attnzoo.backbones.blocks.polarized import PolarizedParallel, PolarizedSequential
from attnzoo.backbones.blocks.probing import EfficientProbing, Probe, SimPool, attach_probe, probe_head
from attnzoo.backbones.blocks.sigmoid import (
    RootMeanSquareNorm,
    SigmoidAttention,
    SigmoidCrossAttention,
    sigmoid_attention,
    sigmoid_block,
)
from attnzoo.backbones.blocks.sparse import MaskPredictor, SparseAttention, SparseSettings
from attnzoo.backbones.blocks.subsampled import LocallySubsampledAttention, SubsampledAttention, local_shuffle
from attnzoo.backbones.blocks.triplet import TripletAttention
from attnzoo.backbones.blocks.ulsam import ULSAM

__all__ = [
    "BLOCKS",
    "BidirectionalCrossAttention",
    "BroadcastingMlp",
    "CAREBlock",
    "CARETokenMixer",
    "ContextBroadcasting",
    "EfficientAttention",
    "EfficientProbing",
    "EfficientTokenAttention",
    "FlareAttention",
    "FlareBlock",
    "FlareModel",
    "FlowAttention",
    "FlowSelfAttention",
    "Insertion",
    "LargeKernelConvAttention",
    "LargeKernelConvBlock",
    "LocallySubsampledAttention",
    "LookupBlock",
    "LookupViT",
    "MSAConv2d",
    "MaskPredictor",
    "NeighborhoodAttention2D",
    "NeighborhoodBlock",
    "PolarizedParallel",
    "PolarizedSequential",
    "Probe",
    "QueryAggregation",
    "RootMeanSquareNorm",
    "SigmoidAttention",
    "SigmoidCrossAttention",
    "SimPool",
    "SparseAttention",
    "SparseSettings",
    "SubsampledAttention",
    "TripletAttention",
    "ULSAM",
    "as_attn_layer",
    "attach_aggregation",
    "attach_probe",
    "insert",
    "local_shuffle",
    "probe_head",
    "sigmoid_attention",
    "sigmoid_block",
    "window_attention",
]
