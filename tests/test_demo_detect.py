"""demos/detect.py and transformers' own words: DETR, Deformable DETR, RT-DETR on our backbones, at any size."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1]))
from demos import detect  # noqa: E402

TINY = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
TINY |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 10}


def all_learn(model, out) -> None:
    """A finite loss whose gradient reaches every block of the backbone."""
    assert out.loss.isfinite()
    out.loss.backward()
    body = {n: p for n, p in model.named_parameters() if ".levels." in n and p.requires_grad}
    assert body and all(p.grad is not None and p.grad.isfinite().all() for p in body.values())
    assert all(p.grad.abs().max() > 0 for n, p in body.items() if n.endswith(".qkv.weight"))


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


# RT-DETR's own pyramid upsamples by 2 and needs multiples of 32 on any backbone; its image processor gives 640 x 640.
@pytest.mark.parametrize("kind, size", [("detr", (64, 160)), ("detr", (97, 75)), ("rt_detr", (64, 160))])
def test_any_size(kind, size):
    torch.manual_seed(0)
    model = detect.build("dinat_mini", kind)
    _, labels = detect.scene(64, batch=2)
    images = torch.randn(2, 3, *size)
    all_learn(model.train(), model(pixel_values=images, labels=labels))
    with torch.no_grad():
        assert model.eval()(pixel_values=images).pred_boxes.shape == (2, 10, 4)


def test_the_short_form_of_transformers_names_our_backbone(tmp_path):
    """DetrConfig counts levels from the stem and asks for 1 to 4: the four stages; what was built can be saved."""
    from transformers import DetrConfig, DetrForObjectDetection

    torch.manual_seed(0)
    config = DetrConfig(backbone="dinat_tiny", use_timm_backbone=True, num_labels=3, **TINY)
    model = DetrForObjectDetection(config)
    ours = [m for m in model.modules() if type(m).__name__ == "DiNAT"]
    assert len(ours) == 1 and type(ours[0]).__module__ == "attnzoo.backbones.nat"
    assert model.model.backbone.intermediate_channel_sizes == [64, 128, 256, 512]
    # Two images of different sizes, padded to one as DETR's image processor does it.
    images, mask = torch.zeros(2, 3, 96, 120), torch.zeros(2, 96, 120, dtype=torch.long)
    for i, (height, width) in enumerate(((64, 120), (96, 75))):
        images[i, :, :height, :width] = torch.randn(3, height, width)
        mask[i, :height, :width] = 1
    labels = detect.scene(64, batch=2)[1]
    all_learn(model.train(), model(pixel_values=images, pixel_mask=mask, labels=labels))
    model.eval().save_pretrained(tmp_path)
    again = DetrForObjectDetection.from_pretrained(tmp_path)
    with torch.no_grad():
        one, two = (m(pixel_values=images, pixel_mask=mask).pred_boxes for m in (model, again))
    torch.testing.assert_close(one, two)


def test_deformable_detr_takes_three_stages_in_its_short_form():
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    torch.manual_seed(0)
    small = {**TINY, "decoder_layers": 2, "encoder_n_points": 2, "decoder_n_points": 2}
    config = DeformableDetrConfig(backbone="dinat_mini", use_timm_backbone=True, num_labels=3, **small)
    model = DeformableDetrForObjectDetection(config)
    assert model.model.backbone.intermediate_channel_sizes == [128, 256, 512]
    images, labels = detect.scene(64, batch=2)
    all_learn(model.train(), model(pixel_values=images, labels=labels))


@pytest.mark.parametrize("asked, got", [((1, 2, 3, 4), [4, 8, 16, 32]), ((2, 4), [8, 32]), ((1, 2, 3), [8, 16, 32])])
def test_stages_are_counted_from_the_stem_only_where_nothing_else_fits(asked, got):
    body = timm.create_model("dinat_mini", features_only=True, out_indices=asked)
    assert body.feature_info.reduction() == got
    assert [64 // m.shape[-1] for m in body(torch.randn(1, 3, 64, 64))] == got


@pytest.mark.parametrize("asked", [(0, 4), (1, 5)])
def test_stages_that_are_not_there_are_refused(asked):
    with pytest.raises(AssertionError, match="out of range"):
        timm.create_model("dinat_mini", features_only=True, out_indices=asked)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="kind must be one of detr, rt_detr, got 'yolo'"):
        detect.build(kind="yolo")
    with pytest.raises(ValueError, match="backbone must be the name of a timm model, got 'dinat_tinny'"):
        detect.build("dinat_tinny")
