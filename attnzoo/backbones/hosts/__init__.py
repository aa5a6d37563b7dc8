"""Hosts: a ViT, a PVT, a Swin and a CSwin that take their attention block by block, by name or as a callable.

The projections, windows, strides and position embeddings are the host's; what stands between the projections is a
mixer (mixers.py): softmax, agent, inline, or one's own.
"""

from attnzoo.backbones.hosts.cswin import CSwin
from attnzoo.backbones.hosts.mixers import MIXERS, Mixer, Site, SoftmaxMixer, attn_schedule
from attnzoo.backbones.hosts.pvt import PVT
from attnzoo.backbones.hosts.swin import Swin
from attnzoo.backbones.hosts.vit import HostViT

__all__ = ["CSwin", "HostViT", "MIXERS", "Mixer", "PVT", "Site", "SoftmaxMixer", "Swin", "attn_schedule"]
