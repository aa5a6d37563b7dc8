"""Attention layers and blocks as nn.Modules, for building models of one's own."""

from attnzoo.backbones.blocks.neighborhood import NeighborhoodAttention2D, NeighborhoodBlock

__all__ = ["NeighborhoodAttention2D", "NeighborhoodBlock"]
