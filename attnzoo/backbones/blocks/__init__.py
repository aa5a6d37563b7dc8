"""Attention layers and blocks as nn.Modules, for building models of one's own."""

from attnzoo.backbones.blocks.attn_layer import as_attn_layer
from attnzoo.backbones.blocks.care import CAREBlock, CARETokenMixer
from attnzoo.backbones.blocks.flare import FlareAttention, FlareBlock, FlareModel
from attnzoo.backbones.blocks.flow import FlowAttention, FlowSelfAttention
from attnzoo.backbones.blocks.neighborhood import NeighborhoodAttention2D, NeighborhoodBlock
from attnzoo.backbones.blocks.sigmoid import (
    RootMeanSquareNorm,
    SigmoidAttention,
    SigmoidCrossAttention,
    sigmoid_attention,
    sigmoid_block,
)

__all__ = [
    "CAREBlock",
    "CARETokenMixer",
    "FlareAttention",
    "FlareBlock",
    "FlareModel",
    "FlowAttention",
    "FlowSelfAttention",
    "NeighborhoodAttention2D",
    "NeighborhoodBlock",
    "RootMeanSquareNorm",
    "SigmoidAttention",
    "SigmoidCrossAttention",
    "as_attn_layer",
    "sigmoid_attention",
    "sigmoid_block",
]
