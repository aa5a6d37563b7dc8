"""Object detectors on any backbone here or of timm's: torchvision's Faster R-CNN and RetinaNet on a feature pyramid.

    model = attnzoo.backbones.detector("dinat_tiny", kind="faster_rcnn", num_classes=91)
    losses = model(images, targets)                      # training: a dict of losses
    found = model.eval()(images)                         # boxes, labels, scores per image

Papers: Faster R-CNN, Ren et al., arXiv:1506.01497; RetinaNet, Lin et al., arXiv:1708.02002; feature pyramids,
Lin et al., arXiv:1612.03144. Everything but the glue is torchvision's: heads, losses,
anchors, resizing (`min_size`, `max_size`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from attnzoo.errors import check_choice, check_range, check_tensor

__all__ = ["PyramidBackbone", "detector"]

KINDS = ("faster_rcnn", "retinanet")
SMALLEST, LARGEST = 64, 1333  # pixels of a side that these detectors are made and tested for
_RATIOS = (0.5, 1.0, 2.0)


class PyramidBackbone(nn.Module):
    """Maps of a timm `features_only` model under torchvision's feature pyramid, as torchvision's detectors want them.

    features: the model. channels: of every map of the pyramid. extra: the coarser levels, as in torchvision.
    """

    def __init__(self, features: Any, channels: int = 256, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.body = features
        self.fpn = FeaturePyramidNetwork(features.feature_info.channels(), channels, extra)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, in_chans, H, W] -> maps by the names "0", "1", ... from fine to coarse, then the extra ones."""
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(x))))


def detector(
    backbone: str,
    kind: str = "faster_rcnn",
    num_classes: int = 91,
    *,
    pretrained: bool = False,
    pyramid_channels: int = 256,
    out_indices: Sequence[int] | None = None,
    detector_kwargs: dict[str, Any] | None = None,
    **backbone_kwargs: Any,
) -> nn.Module:
    """A torchvision detector whose features are a timm model's.

    Args:
        backbone: a name for timm.create_model whose model takes images of any size.
        kind: "faster_rcnn" or "retinanet".
        num_classes: as torchvision counts them, with the background as class 0 (COCO: 91).
        pretrained: take the backbone's published weights; the detector's own parts start at random.
        pyramid_channels: channels of the feature pyramid.
        out_indices: levels of the backbone; None for all (RetinaNet: those from stride 8 on). Each must halve the one
            before it.
        detector_kwargs: further arguments of torchvision's class: min_size (800), max_size (1333), anchors, ...;
            a `box_predictor` of one's own sets the number of classes itself.
        backbone_kwargs: further arguments of timm.create_model.

    Returns torchvision's FasterRCNN or RetinaNet: images are a list of float tensors [3, H, W] in 0 .. 1, H and W from
    64 to 1333; targets a list of dicts with "boxes" [n, 4] (x1, y1, x2, y2 in pixels) and "labels" [n] (1 and up).

    Raises ValueError for arguments that don't fit, among them backbones that are tied to one image size.
    """
    check_choice("kind", kind, KINDS)
    check_range("num_classes", num_classes, low=2)
    check_range("pyramid_channels", pyramid_channels, low=1)
    if not timm.is_model(backbone):
        raise ValueError(f"backbone must be the name of a timm model, got {backbone!r}: see timm.list_models()")
    if backbone_kwargs.get("in_chans", 3) != 3:
        raise ValueError(f"in_chans must be 3 as torchvision's detectors have it, got {backbone_kwargs['in_chans']}")
    if out_indices is not None:
        backbone_kwargs["out_indices"] = tuple(out_indices)

    def build() -> Any:
        return timm.create_model(backbone, pretrained=pretrained, features_only=True, **backbone_kwargs)

    features = build()
    strides = features.feature_info.reduction()
    if kind == "retinanet" and out_indices is None and strides[0] < 8 <= strides[-1]:
        first = next(i for i, stride in enumerate(strides) if stride >= 8)
        backbone_kwargs["out_indices"] = tuple(features.feature_info.out_indices)[first:]
        features = build()
        strides = features.feature_info.reduction()
    if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:])):
        raise ValueError(f"out_indices must give levels that each halve the one before it, got strides {list(strides)}")
    cfg = timm.get_pretrained_cfg(backbone)
    if cfg is not None and cfg.fixed_input_size:
        raise ValueError(
            f"backbone must take images of any size, and {backbone!r} is tied to {tuple(cfg.input_size[1:])} by its "
            "position biases; take dinat_tiny, inline_pvt_small, vitaev2_vsa_small or another that is not"
        )
    options: dict[str, Any] = {} if cfg is None else {"image_mean": list(cfg.mean), "image_std": list(cfg.std)}
    options |= {"min_size": 800, "max_size": LARGEST, **(detector_kwargs or {})}
    model: nn.Module
    if kind == "faster_rcnn":
        body = PyramidBackbone(features, pyramid_channels, LastLevelMaxPool())
        sizes = tuple((8 * stride,) for stride in (*strides, 2 * strides[-1]))
        names = [str(i) for i in range(len(strides))]
        parts = {
            "rpn_anchor_generator": AnchorGenerator(sizes, (_RATIOS,) * len(sizes)),
            "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        }
        classes = (
            None if options.get("box_predictor") is not None else num_classes
        )  # torchvision takes one or the other
        model = FasterRCNN(body, classes, **{**parts, **options})
    else:
        body = PyramidBackbone(features, pyramid_channels, LastLevelP6P7(pyramid_channels, pyramid_channels))
        levels = (*strides, 2 * strides[-1], 4 * strides[-1])
        sizes = tuple(tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in levels)  # type: ignore[misc]
        anchors = AnchorGenerator(sizes, (_RATIOS,) * len(sizes))
        model = RetinaNet(body, num_classes, **{"anchor_generator": anchors, **options})
    model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
    return model


def _check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """TypeError or ValueError, by name, for images and targets that no detector takes."""
    given = dict(zip(("images", "targets"), args), **kwargs)
    images, targets = given.get("images"), given.get("targets")
    if not isinstance(images, list | tuple) or not images:
        raise TypeError(f"images must be a list of tensors [3, H, W], got {type(images).__name__}")
    for i, image in enumerate(images):
        check_tensor(f"images[{i}]", image, ndim=3)
        if not image.is_floating_point():
            raise TypeError(f"images[{i}] must be floating point in 0 .. 1, got {image.dtype}: divide by 255")
        height, width = image.shape[1:]
        if image.shape[0] != 3 or min(height, width) < SMALLEST or max(height, width) > LARGEST:
            raise ValueError(
                f"images[{i}] must be [3, H, W] with H and W from {SMALLEST} to {LARGEST}, got {tuple(image.shape)}"
            )
    if targets is None and not model.training:
        return
    if not isinstance(targets, list | tuple) or len(targets) != len(images):
        got = type(targets).__name__ if not isinstance(targets, list | tuple) else len(targets)
        raise ValueError(f"targets must be a list of one dict per image ({len(images)}) in training, got {got}")
    for i, target in enumerate(targets):
        if not isinstance(target, dict) or not {"boxes", "labels"} <= set(target):
            raise ValueError(f"targets[{i}] must be a dict with boxes and labels, got {target!r:.80}")
        boxes, labels = target["boxes"], target["labels"]
        check_tensor(f"targets[{i}]['boxes']", boxes, ndim=2)
        check_tensor(f"targets[{i}]['labels']", labels, ndim=1, dtypes=(torch.int64,))
        if boxes.shape[1] != 4 or len(boxes) != len(labels):
            raise ValueError(
                f"targets[{i}] must have boxes [n, 4] and labels [n], got {tuple(boxes.shape)}, {tuple(labels.shape)}"
            )
