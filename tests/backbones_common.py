"""Small backbones that the backbone tests share."""

from __future__ import annotations

import timm
import torch
from torch import nn

import attnzoo  # noqa: F401  registers the names

TINY = {
    "embed_dim": 16,
    "depths": (2, 2, 1),
    "num_heads": (2, 2, 4),
    "kernel_size": 3,
    "mlp_ratio": 2.0,
    "dilations": ((1, 4), (1, 2), (1,)),
    "num_classes": 5,
}
ISO = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 40, "patch_size": 8, "num_classes": 5}
STAGED = ("nat", "dinat", "dinat_s")
ENTRY = {"nat": "nat_mini", "dinat": "dinat_mini", "dinat_s": "dinat_s_tiny"}
PUBLISHED = {
    "nat": "mini tiny small base",
    "dinat": "mini tiny small base large large_384 large_384_11x11 large_21k large_21k_11x11",
    "dinat_s": "tiny small base large large_384 large_21k",
    "nat_isotropic": "small base",
    "dinat_isotropic": "small base",
    "vitrpb": "small base",
}
NAMES = [f"{family}_{size}" for family, sizes in PUBLISHED.items() for size in sizes.split()]


def tiny(family: str = "dinat", **kwargs) -> nn.Module:
    """A small model by timm with weights that make every part matter."""
    if family in ("nat_isotropic", "vitrpb"):
        model = timm.create_model(
            f"{family}_small", **{**ISO, **({"kernel_size": 3} if family[0] == "n" else {}), **kwargs}
        )
    else:
        model = timm.create_model(ENTRY[family], **{**TINY, **kwargs})
    return randomise(model).eval()


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model
