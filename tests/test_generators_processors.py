"""Methods as diffusers' processors: set, exchanged, gone, refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from generator_models import FAMILIES, build, flux_pipeline, is_clean, run

from attnzoo import generators
from attnzoo.errors import UnsupportedError
from attnzoo.generators.hooks import denoiser_of


@pytest.mark.parametrize("name", FAMILIES)
def test_set_and_put_back_is_what_enable_does(name: str) -> None:
    case = build(name)
    dense = run(case)
    options: dict[str, Any] = {"kernel_size": case.kernel_size}
    with generators.enable(case.model, "gna", **options):
        wanted = run(case)
    if not hasattr(case.model, "set_attn_processor"):
        with pytest.raises(UnsupportedError, match="set_attn_processor"):
            generators.processor(case.model, "gna", **options)
        return
    plain = case.model.attn_processors
    made = generators.processor(case.model, "gna", **options)
    assert torch.equal(run(case), dense)  # not set yet
    case.model.set_attn_processor(made)
    assert torch.equal(run(case), wanted)
    case.model.set_attn_processor(dict(plain))
    del made
    gc.collect()
    assert torch.equal(run(case), dense) and denoiser_of(case.model) is None and is_clean(case.model)


def test_one_layer_may_carry_it_alone() -> None:
    case = build("flux")
    made = generators.processor(case.model, "gna", kernel_size=case.kernel_size)
    layer = "single_transformer_blocks.0.attn"
    case.model.get_submodule(layer).set_processor(made[f"{layer}.processor"])
    got = run(case)
    del made
    case.model.get_submodule(layer).set_processor(type(case.model.get_submodule(layer).processor)())
    gc.collect()
    with generators.enable(case.model, "gna", kernel_size=case.kernel_size, layers=layer):
        assert torch.equal(run(case), got)


def test_types_of_the_processors_stay() -> None:
    case = build("sd3")
    plain = case.model.attn_processors
    made = generators.processor(case.model, "gna", kernel_size=3)
    assert {n: type(p) for n, p in made.items()} == {n: type(p) for n, p in plain.items()}


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="transformer"):
        generators.processor(flux_pipeline(), "gna", kernel_size=3)
    case = build("flux")
    with pytest.raises(TypeError, match="needs"):
        generators.processor(case.model, "gna")
    with generators.enable(case.model, "gna", kernel_size=3), pytest.raises(ValueError, match="already"):
        generators.processor(case.model, "gna", kernel_size=3)
    assert is_clean(case.model)
