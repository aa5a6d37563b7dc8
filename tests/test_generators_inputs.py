"""The generator room's arguments: layers, and bad input by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
from generator_models import build, is_clean, run

from attnzoo import generators
from attnzoo.errors import SeamError, UnsupportedError
from attnzoo.generators.chain import Method, Stage


def test_layers_are_chosen_by_name_pattern_index_and_slice() -> None:
    case = build("flux")
    names = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
    for layers, wanted in (
        (None, names),
        ("single*", names[1:]),
        ("transformer_blocks.0", names[:1]),
        (["*.1.attn", 0], [names[0], names[2]]),
        (-1, names[2:]),
        (slice(1, None), names[1:]),
        (range(2), names[:2]),
    ):
        with generators.enable(case.model, "gna", kernel_size=3, layers=layers) as handle:
            assert handle.report()["denoisers"][0]["layers"] == wanted
            chosen = run(case)
    with generators.enable(case.model, "gna", kernel_size=3):
        assert (run(case) - chosen).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "kernel_size must be one value or one per axis", {"kernel_size": (3, 3, 3)}),
        (ValueError, "kernel_size must be at least 1", {"kernel_size": 0}),
        (TypeError, "kernel_size must hold int", {"kernel_size": 3.0}),
        (TypeError, "kernel_size must hold int", {"kernel_size": True}),
        (TypeError, "kernel_size", {}),
        (ValueError, "stride must be at most kernel_size", {"kernel_size": 3, "stride": (1, 4)}),
        (ValueError, "stride must be at least 1", {"kernel_size": 3, "stride": 0}),
        (ValueError, "dilation must be at least 1", {"kernel_size": 3, "dilation": -1}),
        (TypeError, "is_causal must hold bool", {"kernel_size": 3, "is_causal": 1}),
        (ValueError, "backend must be one of", {"kernel_size": 3, "backend": "cuda"}),
        (ValueError, "layers='nothing.*' matches none", {"kernel_size": 3, "layers": "nothing.*"}),
        (ValueError, "layers=7 matches none", {"kernel_size": 3, "layers": [0, 7]}),
        (ValueError, "chooses none", {"kernel_size": 3, "layers": []}),
        (TypeError, "layers must", {"kernel_size": 3, "layers": 1.5}),
        (TypeError, "steps must", {"kernel_size": 3, "steps": "first"}),
        (TypeError, "steps must", {"kernel_size": 3, "steps": [0.5]}),
        (ValueError, "steps must name", {"kernel_size": 3, "steps": []}),
        (ValueError, "heads must hold indices", {"kernel_size": 3, "heads": [-1]}),
        (TypeError, "heads must be", {"kernel_size": 3, "heads": "all"}),
        (TypeError, "branches must be names", {"kernel_size": 3, "branches": [0]}),
        (ValueError, "branches must name", {"kernel_size": 3, "branches": []}),
        (ValueError, "grid must be one value or one per axis", {"kernel_size": 3, "grid": (1, 6, 5)}),
        (TypeError, "windows", {"kernel_size": 3, "windows": 3}),
    ],
)
def test_bad_options_are_named_before_anything_changes(error: type, words: str, options: dict[str, Any]) -> None:
    case = build("flux")
    with pytest.raises(error, match=re.escape(words)):
        generators.enable(case.model, "gna", **options)
    assert is_clean(case.model)


def test_bad_targets_and_methods_are_named() -> None:
    case = build("flux")
    with pytest.raises(ValueError, match=r"method must be one of .*'gna'.*'natten'"):
        generators.enable(case.model, "natten", kernel_size=3)
    with pytest.raises(TypeError, match="diffusers pipeline or model, got str"):
        generators.enable("flux", "gna", kernel_size=3)
    with pytest.raises(UnsupportedError, match=r"known family in Linear; known are .*FluxTransformer2DModel"):
        generators.enable(nn.Linear(2, 2), "gna", kernel_size=3)
    with pytest.raises(TypeError, match="belong in the list"):
        generators.enable(case.model, [("gna", {"kernel_size": 3})], steps=[1])
    for methods in ([], [("gna",)], 3, ["gna"]):
        with pytest.raises(TypeError, match="method must"):
            generators.enable(case.model, methods)
    handle = generators.enable(case.model, "gna", kernel_size=3)
    for total, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="total must"):
            handle.new_run(total)
    handle.disable()
    assert is_clean(case.model)


def test_linear_attention_is_refused_with_the_reason() -> None:
    sana = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="linear"):
        generators.enable(sana, "gna", kernel_size=3)
    assert is_clean(sana)


def test_token_orders_that_are_not_known_are_refused() -> None:
    z_image, flux2 = build("z_image"), build("flux2")
    with generators.enable(z_image.model, "gna", kernel_size=3):
        with pytest.raises(UnsupportedError, match="omni"):
            z_image.model(**{**z_image.inputs, "x": [z_image.inputs["x"]]})
        uneven = [z_image.inputs["x"][0], z_image.inputs["x"][1][..., :8]]
        with pytest.raises(UnsupportedError, match="one size"):
            z_image.model(**{**z_image.inputs, "x": uneven})
    with generators.enable(flux2.model, "gna", kernel_size=3), pytest.raises(UnsupportedError, match="kv_cache"):
        flux2.model(**flux2.inputs, num_ref_tokens=3)


def test_references_of_flux2_follow_the_image() -> None:
    case = build("flux2")
    ids, states = case.inputs["img_ids"], case.inputs["hidden_states"]
    reference = ids[:12].clone()
    reference[:, 0] = 10
    changes = {"img_ids": torch.cat([ids, reference]), "hidden_states": torch.cat([states, states[:, :12]], 1)}
    dense = run(case, **changes)
    with generators.enable(case.model, "gna", kernel_size=case.grid) as handle:
        assert torch.equal(run(case, **changes), dense)
        assert handle.report()["denoisers"][0]["grid"] == case.grid


def test_bad_inputs_of_a_forward_are_named() -> None:
    case = build("flux")
    with (
        generators.enable(case.model, "gna", kernel_size=3, heads=[2]),
        pytest.raises(UnsupportedError, match="heads="),
    ):
        run(case)
    with generators.enable(case.model, "gna", kernel_size=3, dilation=6), pytest.raises(ValueError, match="dilation="):
        run(case)
    ids = case.inputs["img_ids"]
    with generators.enable(case.model, "gna", kernel_size=3), pytest.raises(UnsupportedError, match="img_ids of 30"):
        run(case, img_ids=ids[torch.randperm(30)])
    with generators.enable(case.model, "gna", kernel_size=3, grid=(4, 5)) as handle:
        run(case)  # a smaller grid leaves the rest as references
        assert handle.report()["denoisers"][0]["grid"] == (4, 5)
    with generators.enable(case.model, "gna", kernel_size=3, grid=(7, 5)), pytest.raises(ValueError, match="grid"):
        run(case)
    video = build("ltx")
    with generators.enable(video.model, "gna", kernel_size=3), pytest.raises((UnsupportedError, TypeError)):
        run(video, num_frames=None)
    unet = build("unet")
    with generators.enable(unet.model, "gna", kernel_size=3, grid=(9, 9)), pytest.raises(SeamError, match="halving"):
        run(unet)
    with generators.enable(unet.model, "gna", kernel_size=3, dilation=6), pytest.raises(ValueError, match="layers="):
        run(unet)
    edit = build("qwen_image")
    with generators.enable(edit.model, "gna", kernel_size=3), pytest.raises(UnsupportedError, match="img_shapes"):
        run(edit, img_shapes=[[(1, 4, 6)], [(1, 6, 4)]])


class Toy(Method):
    """Adds its number to the end of a note, and scales what the rest of the chain returns."""

    def __init__(self, rank: int, *, note: list[str], factor: float = 1.0) -> None:
        super().__init__(rank)
        self.note, self.factor = note, factor

    def settings(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, layout: Any, ctx: Any, layer: Any, next: Any
    ) -> Tensor:
        self.note.append(f"{self.name} {layer.index}")
        return self.factor * next(query, key, value, mask)


def toy(name: str, stage: Stage) -> type[Toy]:
    return type(name, (Toy,), {"name": name, "stage": stage})


def test_methods_stack_by_precedence_whatever_the_order_of_enabling(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stage in (("mixes", Stage.POST_MIX), ("reuses", Stage.REUSE), ("masks", Stage.MASK)):
        monkeypatch.setitem(generators.METHODS, name, toy(name, stage))
    case = build("dit")
    dense = run(case)
    with generators.enable(case.model, "gna", kernel_size=3):
        window = run(case)
    note: list[str] = []
    first = generators.enable(case.model, "gna", kernel_size=3)
    second = generators.enable(case.model, [("mixes", {"note": note}), ("masks", {"note": note, "layers": 1})])
    third = generators.enable(case.model, "reuses", note=note, factor=1.0)
    assert torch.equal(run(case), window)
    assert note == ["reuses 0", "mixes 0", "reuses 1", "masks 1", "mixes 1"]
    note.clear()
    first.disable()
    assert torch.equal(run(case), dense) and len(note) == 5
    with pytest.raises(ValueError, match="'masks' is already on"):
        generators.enable(case.model, [("gna", {"kernel_size": 3}), ("masks", {"note": note})])
    fourth = generators.enable(case.model, "gna", kernel_size=3)
    assert [r["method"] for r in second.report()["denoisers"]] == ["mixes", "masks"]
    second.disable()
    third.disable()
    note.clear()
    assert torch.equal(run(case), window) and not note
    fourth.disable()
    assert is_clean(case.model)
    with generators.enable(case.model, [("gna", {"kernel_size": 3}), ("mixes", {"note": note, "factor": 0.5})]):
        half = run(case)
    with generators.enable(case.model, [("mixes", {"note": note, "factor": 0.5}), ("gna", {"kernel_size": 3})]):
        assert torch.equal(run(case), half)
    assert (half - window).abs().max() > 1e-3


def test_a_failing_enable_of_several_changes_nothing() -> None:
    case = build("dit")
    with pytest.raises(ValueError, match="method must be one of"):
        generators.enable(case.model, [("gna", {"kernel_size": 3}), ("unknown", {})])
    assert is_clean(case.model)
