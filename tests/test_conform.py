"""CONFORM beyond its goldens: the losses written out, and the guidance inside a pipeline's loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
from generator_models import UNetLoop, build, is_clean

from attnzoo import generators
from attnzoo.errors import UnsupportedError
from attnzoo.generators.conform import Conform, conform_loss, ntxent_loss, pair_loss, smooth

GROUPS = [[1, 2], [3]]
SETTINGS = {"token_groups": GROUPS, "resolution": (8, 12)}


def loop(guided: bool = False) -> tuple[UNetLoop, Tensor, Tensor]:
    unet = build("unet").model
    pipe = UNetLoop(unet, diffusers.EulerDiscreteScheduler())
    pipe.guided = guided
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, unet.config.in_channels, 16, 24, generator=generator)
    return pipe, latents, torch.randn(1, 5, unet.config.cross_attention_dim, generator=generator)


def test_losses_by_their_sums() -> None:
    embeddings, classes = torch.rand(5, 7, dtype=torch.float64), [0, 0, 1, 1, 0]
    unit = [e / e.norm() for e in embeddings]
    terms, pulled, pushed = [], [], []
    for a in range(5):
        others = sum(torch.exp(unit[a] @ unit[n] / 0.5) for n in range(5) if classes[n] != classes[a])
        for p in range(5):
            if p == a:
                continue
            near = unit[a] @ unit[p]
            if classes[p] == classes[a]:
                terms.append(-torch.log(torch.exp(near / 0.5) / (torch.exp(near / 0.5) + others)))
                pulled.append(1 - near)
            else:
                pushed.append(near)
    labels = torch.tensor(classes)
    assert torch.allclose(ntxent_loss(embeddings, labels, 0.5), sum(terms) / len(terms))
    assert torch.allclose(pair_loss(embeddings, labels), sum(pulled) / len(pulled) + sum(pushed) / len(pushed))


def test_smoothing_keeps_constants_and_mirrors() -> None:
    assert torch.allclose(smooth(torch.full((2, 4, 5), 0.3)), torch.full((2, 4, 5), 0.3))
    x = torch.rand(1, 6, 4)
    assert torch.allclose(smooth(x.flip(1)), smooth(x).flip(1))


def test_the_maps_that_were_handed_in_stay() -> None:
    maps = torch.rand(4, 4, 6).softmax(-1)
    before = maps.clone()
    first = conform_loss(maps, GROUPS, before)
    assert torch.equal(maps, before) and torch.equal(first, conform_loss(maps, GROUPS, before))


@pytest.mark.parametrize("guided", [False, True])
def test_no_step_is_the_plain_run_and_off_is_exact(guided: bool) -> None:
    pipe, latents, text = loop(guided)
    plain = pipe(latents, text)
    with generators.enable(pipe, "conform", **SETTINGS, scale_factor=0.0):
        assert torch.equal(pipe(latents, text), plain)
    options: dict[str, Any] = {"refinement_moves": 2, "refinement_steps": [0]}
    with generators.enable(pipe, "conform", **SETTINGS, **options) as handle:
        moved = pipe(latents, text)
        assert handle.report()["denoisers"][0]["state_bytes"] > 0 and "step" in vars(pipe.scheduler)
    assert (moved - plain).abs().max() > 1e-3
    assert torch.equal(pipe(latents, text), plain) and is_clean(pipe.unet) and "step" not in vars(pipe.scheduler)


def test_the_loss_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, latents, text = loop()
    seen: list[float] = []
    plain = Conform.loss

    def watched(self: Any, *args: Any) -> Tensor:
        found = plain(self, *args)
        seen.append(float(found))
        return found

    monkeypatch.setattr(Conform, "loss", watched)
    options: dict[str, Any] = {"refinement_moves": 8, "refinement_steps": [0], "scale_factor": 0.5}
    with generators.enable(pipe, "conform", **SETTINGS, max_steps=1, **options):
        pipe(latents, text, steps=2)
    assert len(seen) == 8 and seen[-1] < seen[0]


def test_an_exception_in_the_middle_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, latents, text = loop()
    plain = pipe(latents, text)

    def broken(self: Any, *args: Any) -> Tensor:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Conform, "loss", broken)
        with (
            pytest.raises(RuntimeError, match="broken"),
            generators.enable(pipe, "conform", **SETTINGS),
        ):
            pipe(latents, text)
    assert torch.equal(pipe(latents, text), plain) and is_clean(pipe.unet)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token_groups": []}, "token_groups"),
        ({"token_groups": [[1], []]}, "token_groups"),
        ({"token_groups": GROUPS, "loss_type": "l2"}, "loss_type"),
        ({"token_groups": GROUPS, "refinement_moves": 0}, "refinement_moves"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], words: str) -> None:
    pipe, _, _ = loop()
    with pytest.raises((TypeError, ValueError), match=words):
        generators.enable(pipe, "conform", **options)
    assert is_clean(pipe.unet) and "step" not in vars(pipe.scheduler)


def test_what_it_cannot_do_is_refused() -> None:
    pipe, latents, text = loop()
    nowhere = {"token_groups": GROUPS, "resolution": (5, 5)}
    with pytest.raises(UnsupportedError, match="on the grid"), generators.enable(pipe, "conform", **nowhere):
        pipe(latents, text)
    with pytest.raises(UnsupportedError, match="pipeline"):
        generators.enable(pipe.unet, "conform", **SETTINGS)
    with pytest.raises(UnsupportedError, match="axes"):
        generators.enable(build("wan").model, "conform", **SETTINGS)
    with (
        pytest.raises(ValueError, match="token_groups"),
        generators.enable(pipe, "conform", resolution=(8, 12), token_groups=[[4], [1]]),
    ):
        pipe(latents, text)
