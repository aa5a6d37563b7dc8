"""Detectors over our backbones: a training step, boxes, any size, bad input by name; and transformers' DETR."""

from __future__ import annotations

import pytest
import torch
from backbone_families import FAMILIES
from torch import nn

from attnzoo.backbones import detector

SMALL = {"min_size": 64, "max_size": 160, "box_detections_per_img": 5}
RETINA = {"min_size": 64, "max_size": 160, "detections_per_img": 5}


def build(kind: str = "faster_rcnn", family: str = "dinat", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    entry, small, _, _ = FAMILIES[family]
    options = {"detector_kwargs": SMALL if kind == "faster_rcnn" else RETINA, "pyramid_channels": 16}
    return detector(entry, kind, **{"num_classes": 4, **options, **small, **kwargs})


def scene(*sizes: tuple[int, int]) -> tuple[list, list]:
    images = [torch.rand(3, *size) for size in sizes]
    box = torch.tensor([[8.0, 10.0, 40.0, 44.0], [20.0, 5.0, 60.0, 50.0]])
    return images, [{"boxes": box, "labels": torch.tensor([1, 3])} for _ in sizes]


@pytest.mark.parametrize("family", ["dinat", "vitae_vsa"])
@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_one_training_step_and_boxes(kind, family):
    model = build(kind, family)
    images, targets = scene((64, 96), (83, 71))
    losses = model(images, targets)
    assert losses and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    before = next(model.parameters()).detach().clone()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert not torch.equal(before, next(model.parameters()))
    with torch.no_grad():
        found = model.eval()(images)
    for image, one in zip(images, found, strict=True):
        boxes = one["boxes"]
        assert len(boxes) == len(one["labels"]) == len(one["scores"]) <= 5
        assert (boxes >= 0).all() and (boxes[:, 2] <= image.shape[2]).all() and (boxes[:, 3] <= image.shape[1]).all()


def test_sizes_from_64_to_1333():
    model = build(detector_kwargs={**SMALL, "max_size": 1333}).eval()
    with torch.no_grad():
        for size in ((64, 64), (64, 1333), (65, 333)):
            assert model([torch.rand(3, *size)])[0]["boxes"].shape[1] == 4


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_batch_of_mixed_sizes_from_64_to_1333(kind):
    """Odd, wide, high and square in one batch, the longest side unresized: trains, and each image has its own frame."""
    options = {**(SMALL if kind == "faster_rcnn" else RETINA), "min_size": 200, "max_size": 1333}
    model = build(kind, detector_kwargs=options)
    images, targets = scene((1333, 64), (65, 333), (201, 201))
    for target in targets:
        target["boxes"] = target["boxes"].clamp(max=60)
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        found = model.eval()(images)
    for image, one in zip(images, found, strict=True):
        boxes = one["boxes"]
        assert (boxes >= 0).all() and (boxes[:, 2] <= image.shape[2]).all() and (boxes[:, 3] <= image.shape[1]).all()


def test_a_head_of_ones_own_sets_the_classes():
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    own = {"box_head": TwoMLPHead(16 * 49, 32), "box_predictor": FastRCNNPredictor(32, 6)}
    model = build(detector_kwargs={**SMALL, **own}).train()
    images, targets = scene((64, 96))
    assert model.roi_heads.box_predictor.cls_score.out_features == 6
    sum(model(images, targets).values()).backward()


def test_published_names_take_their_own_mean_and_anchors():
    model = detector("dinat_mini", "retinanet", 4)
    assert model.transform.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert model.backbone.body.feature_info.reduction() == [8, 16, 32]
    assert [sizes[0] for sizes in model.anchor_generator.sizes] == [32, 64, 128, 256, 512]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "yolo"}, "kind must be one of 'faster_rcnn', 'retinanet'"),
        ({"num_classes": 1}, "num_classes must be from 2"),
        ({"backbone": "dinat_tinny"}, "backbone must be the name of a timm model, got 'dinat_tinny'"),
        ({"in_chans": 4}, "in_chans must be 3"),
        ({"out_indices": (0, 2)}, r"each halve the one before it, got strides \[4, 16\]"),
        ({"backbone": "agent_pvt_tiny"}, "is tied to"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        detector(**{"backbone": "dinat_mini", **change})


def test_bad_images_and_targets_are_named():
    model = build()
    images, targets = scene((64, 64))
    for given, error, words in (
        ((torch.rand(1, 3, 64, 64), targets), TypeError, "images must be a list"),
        (([torch.rand(1, 64, 64)], targets), ValueError, r"images\[0\] must be \[3, H, W\]"),
        (([torch.rand(3, 32, 64)], targets), ValueError, "from 64 to 1333"),
        (([torch.zeros(3, 64, 64, dtype=torch.uint8)], targets), TypeError, "divide by 255"),
        ((images,), ValueError, "targets must be a list of one dict per image"),
        ((images, [{"boxes": targets[0]["boxes"]}]), ValueError, "boxes and labels"),
        ((images, [{**targets[0], "labels": torch.tensor([1])}]), ValueError, r"boxes \[n, 4\] and labels \[n\]"),
    ):
        with pytest.raises(error, match=words):
            model(*given)
