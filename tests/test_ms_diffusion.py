"""MS-Diffusion beyond its goldens: inside a UNet, boxes, branches, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from generator_models import Case, build, is_clean, run

from attnzoo import generators
from attnzoo.errors import UnsupportedError
from attnzoo.generators.ms_diffusion import inside_boxes, layout_bias, pseudo_inside


def settings(case: Case, **changes: Any) -> dict[str, Any]:
    """Two references of three tokens behind one dummy, in two boxes."""
    generator = torch.Generator().manual_seed(3)
    cross = case.model.config.cross_attention_dim
    names = [n for n, m in case.model.named_modules() if n.endswith("attn2")]
    weights = {}
    for name in names:
        inner = case.model.get_submodule(name).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{name}.{part}.weight"] = torch.randn(inner, cross, generator=generator) * 0.2
    given = {
        "image_tokens": torch.randn(1, 7, cross, generator=generator),
        "boxes": torch.tensor([[[0.0, 0.0, 0.4, 0.5], [0.5, 0.5, 1.0, 1.0]]]),
        "weights": weights,
        "num_tokens": 3,
        "num_dummy": 1,
    }
    return {**given, **changes}


def test_zero_scale_is_the_plain_model_and_off_is_exact() -> None:
    case = build("unet")
    dense = run(case)
    with generators.enable(case.model, "ms_diffusion", **settings(case, scale=0.0)):
        assert torch.equal(run(case), dense)
    with generators.enable(case.model, "ms_diffusion", **settings(case)):
        assert (run(case) - dense).abs().max() > 1e-3
    assert torch.equal(run(case), dense) and is_clean(case.model)


def test_a_reference_acts_inside_its_box_only() -> None:
    """One cross-attention by itself: rows outside all boxes are the plain layer's."""
    case = build("unet")
    layer = generators.interception.Layer("attn", 0, role="cross")
    options = settings(case)
    options["weights"] = {"attn.to_k_ip.weight": torch.randn(16, 16), "attn.to_v_ip.weight": torch.randn(16, 16)}
    options["image_tokens"] = torch.randn(1, 7, 16)
    method = generators.METHODS["ms_diffusion"](2, **options)
    query, key = torch.randn(2, 2, 80, 8), torch.randn(2, 2, 5, 8)
    out = method.references(query, key, generators.TokenLayout((10, 8), num_context=5), generators.StepContext(), layer)
    inside = inside_boxes(options["boxes"], (10, 8))[0].any(0)
    assert torch.equal(out[:, :, ~inside], torch.zeros_like(out[:, :, ~inside]))
    assert bool((out[:, :, inside].abs().sum(-1) > 0).all())


def test_the_unconditional_half_gets_nothing() -> None:
    case = build("unet")
    dense = run(case)
    with generators.enable(case.model, "ms_diffusion", guidance=True, **settings(case)):
        out = run(case)
    half = len(dense) // 2
    assert torch.equal(out[:half], dense[:half]) and not torch.allclose(out[half:], dense[half:], atol=1e-4)


def test_boxes_give_way_to_what_the_text_finds() -> None:
    case = build("unet")
    phrases = {"phrase_idxes": torch.tensor([[[0, 1], [2, 4]]]), "mask_threshold": 0.5, "start_step": 2}
    with generators.enable(case.model, "ms_diffusion", **settings(case, **phrases)) as handle:
        first, second = run(case), run(case)
        (method,) = handle.methods("ms_diffusion")
        assert not torch.allclose(first, second, atol=1e-4) and method.state_bytes() > 0
        state = method
    assert state.state_bytes() == 0


def test_boxes_on_the_grid() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.55, 1.0], [0.5, 0.25, 0.5, 0.75], [0.0, 0.0, 0.0, 0.0]]])
    inside = inside_boxes(boxes, (4, 10)).unflatten(-1, (4, 10))
    assert inside[0, 0].sum() == 4 * 6 and not inside[0, 1].any() and not inside[0, 2].any()
    bias = layout_bias(inside.flatten(-2), 2, 1)
    assert bias.shape == (1, 40, 7) and torch.equal(bias[0, :, 0] == 0, ~inside.flatten(-2)[0].any(0))
    maps = torch.tensor([[[0.0, 0.2, 1.0], [0.0, 0.0, 0.0]]])
    assert pseudo_inside(maps, 0.5).tolist() == [[[False, False, True], [False, False, False]]]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"boxes": torch.zeros(1, 2, 3)}, ValueError, "x0, y0, x1, y1"),
        ({"boxes": torch.zeros(1, 3, 4)}, ValueError, "image_tokens must hold"),
        ({"subject_scales": [1.0]}, ValueError, "subject_scales"),
        ({"mask_threshold": 0.5}, ValueError, "phrase_idxes"),
        ({"weights": {}}, KeyError, "to_k_ip"),
        ({"compat": "old"}, ValueError, "compat"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    case = build("unet")
    dense = run(case)
    with pytest.raises(error, match=words), generators.enable(case.model, "ms_diffusion", **settings(case, **changes)):
        run(case)
    assert torch.equal(run(case), dense) and is_clean(case.model)


def test_boxes_need_an_image() -> None:
    case = build("wan")
    with pytest.raises(UnsupportedError, match="grid of 2 axes"):
        generators.enable(
            case.model, "ms_diffusion", image_tokens=torch.zeros(1, 7, 16), boxes=torch.zeros(1, 2, 4), weights={}
        )


def test_gradients_reach_the_references() -> None:
    layer = generators.interception.Layer("attn", 0, role="cross")
    weights = {f"attn.{part}.weight": torch.randn(6, 5, dtype=torch.float64) for part in ("to_k_ip", "to_v_ip")}
    query, key = torch.randn(1, 2, 12, 3, dtype=torch.float64), torch.randn(1, 2, 4, 3, dtype=torch.float64)
    boxes = torch.tensor([[[0.0, 0.0, 0.6, 1.0]]])

    def out(query: Tensor, tokens: Tensor) -> Tensor:
        method = generators.METHODS["ms_diffusion"](
            2, image_tokens=tokens, boxes=boxes, weights=weights, num_tokens=2, num_dummy=1
        )
        layout = generators.TokenLayout((3, 4), num_context=4)
        return method.references(query, key, layout, generators.StepContext(), layer)

    tokens = torch.randn(1, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(out, (query.requires_grad_(), tokens.requires_grad_()))
