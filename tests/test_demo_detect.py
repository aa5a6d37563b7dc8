"""demos/detect.py: transformers' DETR and RT-DETR on our backbones."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1]))
from demos import detect  # noqa: E402


@pytest.mark.parametrize("kind", detect.KINDS)
def test_one_step_and_boxes(kind):
    torch.manual_seed(0)
    model = detect.build("dinat_mini", kind)
    images, labels = detect.scene(64)
    losses = detect.step(model, images, labels)
    assert "loss" in losses and all(math.isfinite(value) for value in losses.values())
    body = [p for n, p in model.named_parameters() if "backbone" in n and "levels.1" in n and p.requires_grad]
    assert body and all(p.grad is not None and p.grad.isfinite().all() for p in body)
    with torch.no_grad():
        found = model.eval()(pixel_values=images)
    assert found.pred_boxes.shape == (1, 10, 4) and found.logits.shape[:2] == (1, 10)
    assert (found.pred_boxes >= 0).all() and (found.pred_boxes <= 1).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="kind must be one of detr, rt_detr, got 'yolo'"):
        detect.build(kind="yolo")
    with pytest.raises(ValueError, match="backbone must be the name of a timm model, got 'dinat_tinny'"):
        detect.build("dinat_tinny")
