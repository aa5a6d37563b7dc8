"""FreeSwim: windows of the trained size, the full branch beside them, the cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
from generator_models import as_double, build, is_clean, run

from attnzoo.errors import UnsupportedError
from attnzoo.generators import enable, window_mask
from attnzoo.generators.freeswim import entropy_scale, inward_window

NEUTRAL = {"base_grid": (4096, 4096), "scale": "model", "dual": False}


@pytest.mark.parametrize("family", ["wan", "ltx", "pixart", "cogvideox", "hunyuan_video", "flux"])
def test_neutral_is_dense_and_off_is_exact(family: str) -> None:
    case = build(family)
    dense = run(case)
    with enable(case.model, "freeswim", **NEUTRAL):
        assert torch.equal(run(case), dense)
    with enable(case.model, "freeswim", base_grid=(3, 3), dual=False):
        on = run(case)
    assert not torch.allclose(on, dense, atol=1e-4) and torch.equal(run(case), dense) and is_clean(case.model)
    if case.num_text:
        with enable(case.model, "freeswim"), pytest.raises(UnsupportedError, match="dual=False"):
            run(case)


def twin(case: Any, scale: float) -> Tensor:
    """The dual branch by hand, with forward hooks and dense masks: no code of the method."""
    model, inputs = case.model, case.inputs
    grid = case.grid
    seen = window_mask(grid, inward_window(grid, (3, 3)))
    stock = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
        half = len(query) // 2
        if key.shape[-2] == math.prod(grid):
            first = stock(query[:half], key[:half], value[:half], seen, scale=scale)
            return torch.cat([first, stock(query[half:], key[half:], value[half:], scale=scale)])
        return torch.cat([stock(query[half:], key[half:], value[half:])] * 2)

    doubled = {k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        return run(case._replace(inputs=doubled))[: len(inputs["hidden_states"])], model


def test_dual_branch_is_what_it_says() -> None:
    case = as_double(build("wan"))
    scale = entropy_scale(12, 18, 9)
    wanted, _ = twin(case, scale)
    with enable(case.model, "freeswim", base_grid=(3, 3)) as handle:
        got = run(case)
        report = handle.report()["denoisers"][0]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert report["state_bytes"] == 0 and report["density"] == pytest.approx(1 + 9 / 24)


def test_scale_and_window_by_hand() -> None:
    assert entropy_scale(16) == pytest.approx(math.sqrt(math.log(3120) / math.log(1560) / 16))
    assert inward_window((5, 7, 9), (4, 30)) == (5, 5, 9) and inward_window((7, 9), (1, 2)) == (1, 3)
    for call, words in (
        (lambda: entropy_scale(0), "head_dim"),
        (lambda: inward_window((4,), (2, 2)), "grid"),
        (lambda: inward_window((4, 4), (0, 2)), "base_grid"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    case = build("wan")
    for options, error, words in (
        ({"base_grid": 0}, ValueError, "base_grid"),
        ({"scale": "mine"}, ValueError, "scale"),
        ({"scale": True}, TypeError, "scale"),
        ({"cache_steps": 0}, ValueError, "cache_steps"),
        ({"cache_steps": 2, "dual": False}, ValueError, "dual"),
        ({"dual": 1}, TypeError, "dual"),
    ):
        with pytest.raises(error, match=words):
            enable(case.model, "freeswim", **options)
    assert is_clean(case.model)


def wan_pipeline(model: Any) -> Any:
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        transformer=model,
    )


def film(pipe: Any, steps: int = 4) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt_embeds=torch.randn(1, 6, 16, generator=generator),
        negative_prompt_embeds=torch.randn(1, 6, 16, generator=generator),
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=steps,
        output_type="latent",
        generator=generator,
    ).frames


def test_a_whole_pipeline_with_the_cache() -> None:
    case = build("wan")
    pipe = wan_pipeline(case.model)
    plain = film(pipe)
    sizes: list[tuple[str, int, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append((handle.report()["denoisers"][0]["branch"], len(kwargs["hidden_states"]), len(sizes)))

    with enable(pipe, "freeswim", base_grid=(3, 3)) as handle:
        both = film(pipe)
    with enable(pipe, "freeswim", base_grid=(3, 3), cache_steps=1) as handle:
        cached = film(pipe)
    with enable(pipe, "freeswim", base_grid=(3, 3), cache_steps=3) as handle:
        block = case.model.blocks[0].attn1
        batches: list[int] = []
        watch = block.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
        sparse = film(pipe)
        assert batches == [2, 1] + [1, 1] * 2 + [2, 1]  # cond, uncond
        row = handle.report()["denoisers"][0]
        assert row["state_bytes"] == 2 * 72 * 24 * 4  # cross-attention of two layers, conditional branch
        batches.clear()
        assert torch.equal(film(pipe), sparse) and batches[0] == 2
        watch.remove()
        (method,) = handle.methods("freeswim")
    assert method.state_bytes() == 0
    outs = [plain, both, cached, sparse]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(outs) for b in outs[:i])
    assert torch.equal(film(pipe), plain) and is_clean(case.model)


def test_cache_needs_the_step_and_takes_batches_apart() -> None:
    case = build("wan")
    with enable(case.model, "freeswim", base_grid=(3, 3), cache_steps=2), pytest.raises(UnsupportedError, match="step"):
        run(case)
    inputs = {k: torch.cat([v[:1], v[:1]]) if isinstance(v, Tensor) else v for k, v in case.inputs.items()}
    case = case._replace(inputs=inputs)
    with enable(case.model, "freeswim", base_grid=(3, 3), cache_steps=2, guidance=True) as handle:
        handle.new_run(2)
        out = [run(case, timestep=torch.full((2,), t)) for t in (9, 3)]
    one = case._replace(inputs={k: v[:1] for k, v in inputs.items()})
    with enable(case.model, "freeswim", base_grid=(3, 3), cache_steps=2) as handle:
        handle.new_run(2)
        for t, both in zip((9, 3), out):
            for row, branch in enumerate(("uncond", "cond")):
                with case.model.cache_context(branch):
                    alone = run(one, timestep=torch.full((1,), t))
                torch.testing.assert_close(alone[0], both[row], rtol=1e-5, atol=1e-5)


def test_an_exception_in_the_middle() -> None:
    case = build("wan")
    dense = run(case)
    with enable(case.model, "freeswim", base_grid=(3, 3)):
        on = run(case)
        hook = case.model.blocks[1].register_forward_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(case)
        hook.remove()
        assert torch.equal(run(case), on)
    assert torch.equal(run(case), dense) and is_clean(case.model)
