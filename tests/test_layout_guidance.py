"""Bounded Attention and Attention Regulation beyond their goldens: masks, losses, clusters, and inside a pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("diffusers")

import diffusers
from generator_models import UNetLoop, build, is_clean

from attnzoo import generators
from attnzoo.errors import UnsupportedError
from attnzoo.generators.attention_regulation import gaussians, regulate, regulation_loss
from attnzoo.generators.bounded_attention import (
    BoundedAttention,
    box_masks,
    fix_empty,
    hide_from_subjects,
    hide_from_words,
    subject_losses,
)
from attnzoo.generators.clusters import cluster_masks, kmeans

BOXES = [[0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 1.0]]
BOUNDED: dict[str, Any] = {
    "boxes": BOXES,
    "subject_token_indices": [[1], [2]],
    "eos_token_index": 4,
    "filter_token_indices": [3],
    "resolution": (8, 12),
    "max_steps": 1,
    "moves_per_step": 2,
    "min_clustering_step": 2,
}
REGULATION: dict[str, Any] = {"target_ids": [1, 2], "eos_id": 4, "num_edit_steps": 2, "max_iter": 5}


def loop(guided: bool = False) -> tuple[UNetLoop, Tensor, Tensor]:
    pipe = UNetLoop(build("unet").model, diffusers.DDIMScheduler())
    pipe.guided = guided
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, pipe.unet.config.in_channels, 16, 24, generator=generator)
    return pipe, latents, torch.randn(1, 5, pipe.unet.config.cross_attention_dim, generator=generator)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("name", "options"), [("bounded_attention", BOUNDED), ("attention_regulation", REGULATION)])
def test_on_off_and_an_exception_in_the_middle(name: str, options: dict[str, Any], guided: bool) -> None:
    pipe, latents, text = loop(guided)
    plain = pipe(latents, text, steps=4)
    with generators.enable(pipe, name, **options) as handle:
        first = pipe(latents, text, steps=4)
        assert torch.equal(pipe(latents, text, steps=4), first)  # a second run starts anew
        assert handle.report()["denoisers"][0]["state_bytes"] > 0
        with pytest.raises(RuntimeError):
            pipe(latents[:, :2], text, steps=4)
        assert torch.equal(pipe(latents, text, steps=4), first)
    assert (first - plain).abs().max() > 1e-3 and bool(first.isfinite().all())
    assert torch.equal(pipe(latents, text, steps=4), plain) and is_clean(pipe.unet)
    assert "step" not in vars(pipe.scheduler)


def test_no_edit_steps_are_the_plain_model() -> None:
    pipe, latents, text = loop()
    plain = pipe(latents, text)
    with generators.enable(pipe, "attention_regulation", **{**REGULATION, "num_edit_steps": 0}):
        assert torch.equal(pipe(latents, text), plain)


def test_regulation_acts_on_the_conditional_rows_only() -> None:
    pipe, latents, text = loop()
    model, t = pipe.unet, torch.tensor(500)
    both, texts = torch.cat([latents] * 2), torch.cat([text] * 2)
    dense = model(both, t, encoder_hidden_states=texts, return_dict=False)[0]
    with generators.enable(model, "attention_regulation", guidance=True, **REGULATION) as handle:
        handle.new_run(4)
        out = model(both, t, encoder_hidden_states=texts, return_dict=False)[0]
    assert torch.allclose(out[:1], dense[:1], atol=1e-5) and (out[1:] - dense[1:]).abs().max() > 1e-3


def test_a_bounded_subject_does_not_hear_of_another() -> None:
    """Self-attention: values of one box change nothing in the other."""
    method = BoundedAttention(2, **BOUNDED)
    layer, layout = generators.interception.Layer("self", 0, role="image"), generators.TokenLayout((8, 12))
    ctx = generators.StepContext(5, 10)
    query, key, value = torch.randn(3, 1, 2, 96, 8)
    boxes = box_masks(BOXES, (8, 12))

    def out(value: Tensor) -> Tensor:
        return method.attend(query, key, value, None, layout, ctx, layer, F.scaled_dot_product_attention)

    changed = value.clone()
    changed[:, :, boxes[0]] += 1
    before, after = out(value), out(changed)
    assert torch.equal(before[:, :, boxes[1]], after[:, :, boxes[1]])
    background = ~boxes.any(0)
    assert (before - after)[:, :, background].abs().max() > 1e-2


def test_groups_of_queries_are_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    method = BoundedAttention(2, **{**BOUNDED, "boxes": [[0.0, 0.0, 0.6, 0.6], [0.4, 0.25, 1.0, 1.0]]})
    layer, layout = generators.interception.Layer("self", 0, role="image"), generators.TokenLayout((8, 12))
    given = torch.randn(3, 2, 2, 96, 8, dtype=torch.float64)
    call = (None, layout, generators.StepContext(5, 10), layer, F.scaled_dot_product_attention)
    masked = method.attend(*given, *call)
    monkeypatch.setattr(generators.bounded_attention, "MOST", 10)
    torch.testing.assert_close(method.attend(*given, *call), masked, rtol=1e-9, atol=1e-9)


def test_masks_by_their_words() -> None:
    subjects = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0]]]).bool()
    pairs = hide_from_subjects(subjects)[0]
    wanted = [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    assert pairs.int().tolist() == wanted
    words = hide_from_words(subjects, [[1], [2]], [3], 4, 6)[0]
    assert words.int().tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1]]
    assert hide_from_words(subjects, [[1], [2]], [3], 4, 6, from_background=True)[0, 3].tolist() == [
        True, True, True, False, True, True,
    ]  # fmt: skip


def test_losses_end_points_and_gradient() -> None:
    boxes = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    inside = torch.zeros(1, 5, 3, dtype=torch.float64)
    inside[0, :2, 0] = inside[0, 2, 1] = 1
    assert torch.equal(subject_losses([inside], [[0], [1]], boxes), torch.zeros(1, 2, dtype=torch.float64))
    outside = 1 - inside
    outside[0, :3] = 0
    assert torch.equal(subject_losses([outside], [[0], [1]], boxes), torch.ones(1, 2, dtype=torch.float64))
    maps = torch.rand(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: subject_losses([m, m * 2], [[0, 2], [1]], boxes).sum(), maps)


def test_guidance_lowers_the_loss() -> None:
    pipe, latents, text = loop()
    seen: list[float] = []

    class Watched(BoundedAttention):
        def loss(self, *args: Any) -> Tensor:
            found = super().loss(*args)
            seen.append(float(found))
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(generators.handles.METHODS, "bounded_attention", Watched)
        options = {**BOUNDED, "moves_per_step": 6, "start_step_size": 2.0, "loss_stopping_value": 0.0}
        with generators.enable(pipe, "bounded_attention", **options):
            pipe(latents, text, steps=2)
    assert len(seen) == 6 and seen[-1] < seen[0]


def test_clusters_find_what_is_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(30) // 10
    points = torch.randn(30, 3, generator=generator) * 0.1 + torch.eye(3)[truth] * 5
    labels = kmeans(points[None].repeat(2, 1, 1), 3)
    for row in labels:
        assert all(len(set(row[truth == c].tolist())) == 1 for c in range(3)) and len(set(row.tolist())) == 3
    with pytest.raises(ValueError, match="count"):
        kmeans(points[None], 31)
    cross = torch.zeros(1, 30, 2)
    cross[0, :10, 0] = cross[0, 10:20, 1] = 1
    found = cluster_masks(truth[None], 3, cross, torch.ones(1, 2, 30, dtype=torch.bool))
    assert torch.equal(found[0, 0], truth == 0) and torch.equal(found[0, 1], truth == 1)


def test_an_empty_subject_gets_its_box() -> None:
    boxes = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]]).bool()
    subjects = torch.tensor([[[0, 0, 0, 0], [0, 1, 1, 1]]]).bool()
    assert fix_empty(subjects, boxes).int().tolist() == [[[1, 1, 0, 0], [0, 0, 1, 1]]] and not subjects[0, 0].any()


def test_regulation_is_the_same_as_by_the_whole_softmax() -> None:
    """The loss of what `regulate` gives, by the plain softmax over all tokens, is below that of the first candidate."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 16, 16, 7, generator=generator, dtype=torch.float64)
    bumps = gaussians((16, 16), torch.float64)
    weights = torch.rand(3, len(bumps), 2, generator=generator, dtype=torch.float64)

    def loss(added: Tensor, weights: Tensor) -> Tensor:
        lifted = logits.clone()
        lifted[..., [2, 4]] += added
        return regulation_loss(lifted.softmax(-1)[..., [2, 4]], weights, 0.4)

    first = torch.einsum("khw,nkt->nhwt", bumps, weights)
    best = regulate(logits, [2, 4], weights)
    assert bool((loss(best, weights * 0) < loss(first, weights)).all())
    alone = regulate(logits[1:2], [2, 4], weights[1:2])
    torch.testing.assert_close(best[1:2], alone, rtol=1e-9, atol=1e-9)  # heads don't meet


def test_gaussians_on_a_map_that_is_not_square() -> None:
    bumps = gaussians((32, 48))
    assert bumps.shape == (7 * 11, 32, 48) and float(bumps[0, 4, 4]) == 1.0 and float(bumps[1, 8, 4]) == 1.0


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bounded_attention", {"boxes": [[0.5, 0.0, 0.4, 1.0], BOXES[1]]}, "boxes"),
        ("bounded_attention", {"subject_token_indices": [[1]]}, "subject_token_indices"),
        ("bounded_attention", {"leading_token_indices": [1]}, "leading_token_indices"),
        ("bounded_attention", {"moves_per_step": 0}, "moves_per_step"),
        ("attention_regulation", {"target_ids": []}, "target_ids"),
        ("attention_regulation", {"target_ids": [4]}, "target_ids"),
        ("attention_regulation", {"decay": 1.5}, "decay"),
    ],
)
def test_bad_settings_are_named(name: str, changes: dict[str, Any], words: str) -> None:
    pipe, _, _ = loop()
    given = BOUNDED if name == "bounded_attention" else REGULATION
    with pytest.raises(ValueError, match=words):
        generators.enable(pipe, name, **{**given, **changes})
    assert is_clean(pipe.unet) and "step" not in vars(pipe.scheduler)


def test_what_they_cannot_do_is_refused() -> None:
    case = build("unet")
    handle = generators.enable(case.model, "attention_regulation", **REGULATION)
    with handle, pytest.raises(UnsupportedError, match="step"):
        case.model(**case.inputs)
    with pytest.raises(UnsupportedError, match="axes"):
        generators.enable(build("wan").model, "attention_regulation", **REGULATION)
    pipe, latents, text = loop()
    beyond = {**REGULATION, "eos_id": 9}
    with generators.enable(pipe, "attention_regulation", **beyond), pytest.raises(ValueError, match="eos_id"):
        pipe(latents, text)
