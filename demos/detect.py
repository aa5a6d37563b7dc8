"""Object detection with transformers: DETR or RT-DETR on a backbone of attnzoo, which they know as a timm model.

    python demos/detect.py --backbone dinat_mini --kind rt_detr

Builds the detector with random weights from a small configuration, takes one training step on a made-up scene and
prints the losses and the shape of what it finds. Real use: the same with the sizes of the published detectors.
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from transformers import DetrConfig, DetrForObjectDetection, RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

import attnzoo  # noqa: F401  registers the names with timm, where transformers looks for them

KINDS = ("detr", "rt_detr")


def build(backbone: str = "dinat_mini", kind: str = "detr", num_labels: int = 3, **sizes: Any) -> torch.nn.Module:
    """A small detector with random weights. sizes: further fields of DetrConfig or RTDetrConfig.

    The backbone goes in as a TimmBackboneConfig. The short form, `backbone="dinat_tiny", use_timm_backbone=True`, works
    for DetrConfig as it stands; with RTDetrConfig, or with `backbone_kwargs`, transformers first asks the hub for a
    repository of that name. DETR takes images of any size, RT-DETR (on any backbone) sides that are multiples of 32.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not timm.is_model(backbone):
        raise ValueError(f"backbone must be the name of a timm model, got {backbone!r}")
    levels = TimmBackboneConfig(backbone=backbone, out_indices=[1, 2, 3])
    if kind == "detr":
        small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 10}
        return DetrForObjectDetection(DetrConfig(backbone_config=levels, num_labels=num_labels, **{**small, **sizes}))
    channels = timm.create_model(
        backbone, features_only=True, out_indices=(1, 2, 3), device="meta"
    ).feature_info.channels()
    small = {"d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": channels, "decoder_in_channels": [32] * 3}
    small |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    small |= {"decoder_layers": 1, "num_queries": 10, "num_denoising": 4, "hidden_expansion": 0.5}
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=levels, num_labels=num_labels, **{**small, **sizes}))


def step(model: torch.nn.Module, images: torch.Tensor, labels: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """One training step; the losses before it."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    out = model.train()(pixel_values=images, labels=labels)
    out.loss.backward()
    optimizer.step()
    return {
        "loss": out.loss.item(),
        **{name: float(torch.as_tensor(value).detach()) for name, value in out.loss_dict.items()},
    }


def scene(size: int = 64, batch: int = 1) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Noise with two boxes (centre and size over the image's) of classes 0 and 2."""
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.2, 0.7, 0.2, 0.3]])
    labels = [{"class_labels": torch.tensor([0, 2]), "boxes": boxes} for _ in range(batch)]
    return torch.randn(batch, 3, size, size), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="dinat_mini", help="a timm name whose model has four stages")
    parser.add_argument("--kind", default="detr", choices=KINDS)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build(options.backbone, options.kind)
    images, labels = scene(options.size)
    print({name: round(value, 3) for name, value in step(model, images, labels).items()})
    with torch.no_grad():
        found = model.eval()(pixel_values=images)
    print("logits", tuple(found.logits.shape), "boxes", tuple(found.pred_boxes.shape))


if __name__ == "__main__":
    main()
