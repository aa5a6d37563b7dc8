"""Attention layers and blocks as nn.Modules, for building models of one's own."""

from attnzoo.backbones.blocks.care import CAREBlock, CARETokenMixer
from attnzoo.backbones.blocks.flow import FlowAttention, FlowSelfAttention
from attnzoo.backbones.blocks.neighborhood import NeighborhoodAttention2D, NeighborhoodBlock

__all__ = [
    "CAREBlock",
    "CARETokenMixer",
    "FlowAttention",
    "FlowSelfAttention",
    "NeighborhoodAttention2D",
    "NeighborhoodBlock",
]
