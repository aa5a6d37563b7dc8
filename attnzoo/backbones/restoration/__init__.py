"""Image-to-image models with attention: HAT and A2N, by a registry of their own, and large images tile by tile.

from attnzoo.backbones import restoration
model = restoration.create("hat_x4", checkpoint="HAT_SRx4.pth")
large = restoration.restore(model, image, tile=256, overlap=64)
"""

from attnzoo.backbones.restoration.a2n import A2N, AAB
from attnzoo.backbones.restoration.contract import Restorer, pad_reflect
from attnzoo.backbones.restoration.hat import HAT
from attnzoo.backbones.restoration.hat_blocks import HAB, OCAB, Upsample
from attnzoo.backbones.restoration.registry import ENTRIES, Entry, create, list_models, register
from attnzoo.backbones.restoration.tiles import restore

__all__ = [
    "A2N",
    "AAB",
    "ENTRIES",
    "HAB",
    "HAT",
    "OCAB",
    "Entry",
    "Restorer",
    "Upsample",
    "create",
    "list_models",
    "pad_reflect",
    "register",
    "restore",
]
