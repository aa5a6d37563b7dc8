"""The generator room over whole denoising runs: steps, runs, branches, and torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
from generator_models import Case, UNetLoop, build, draw, flux_pipeline, is_clean, run

from attnzoo import generators
from attnzoo.errors import UnsupportedError


def test_steps_and_runs_come_from_the_scheduler() -> None:
    pipe = flux_pipeline()
    dense = draw(pipe)
    with generators.enable(pipe, "gna", kernel_size=3, steps=range(1, 3)) as handle:
        some = draw(pipe, handle)
        assert [(r["step"], r["total"], r["run"]) for r in some.rows] == [(i, 4, 0) for i in range(4)]
        assert some.rows[0]["grid"] == (6, 5) and some.rows[0]["component"] == "transformer"
        again = draw(pipe, handle)
        assert {r["run"] for r in again.rows} == {1}
        assert all(torch.equal(a, b) for a, b in zip(some.latents, again.latents))
        draw(pipe, handle, steps=1)
        assert [r["run"] for r in draw(pipe, handle, steps=1).rows] == [3]
    assert torch.equal(some.latents[0], dense.latents[0])
    assert (some.latents[1] - dense.latents[1]).abs().max() > 1e-4
    with generators.enable(pipe, "gna", kernel_size=3):
        every = draw(pipe)
    assert (every.latents[0] - dense.latents[0]).abs().max() > 1e-4
    with generators.enable(pipe, "gna", kernel_size=3, steps=[0, 1, -2, -1]):
        assert all(torch.equal(a, b) for a, b in zip(draw(pipe).latents, every.latents))
    with generators.enable(pipe, "gna", kernel_size=3, steps=slice(4, None)):
        assert all(torch.equal(a, b) for a, b in zip(draw(pipe).latents, dense.latents))
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe).latents, dense.latents))


def test_an_exception_in_mid_denoising_leaves_pipeline_and_count_clean() -> None:
    pipe = flux_pipeline()
    dense = draw(pipe)
    with generators.enable(pipe, "gna", kernel_size=3, steps=slice(1, 3)) as handle:
        wanted = draw(pipe, handle)

        class Stop(Exception):
            pass

        def stop(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 2:
                raise Stop
            return given

        with pytest.raises(Stop):
            pipe(
                prompt_embeds=torch.zeros(1, 7, 32),
                pooled_prompt_embeds=torch.zeros(1, 32),
                num_inference_steps=4,
                height=96,
                width=80,
                output_type="latent",
                callback_on_step_end=stop,
            )
        after = draw(pipe, handle)
        assert [r["step"] for r in after.rows] == [0, 1, 2, 3]
        assert all(torch.equal(a, b) for a, b in zip(wanted.latents, after.latents))
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe).latents, dense.latents))


def test_branches_are_the_names_that_the_pipeline_gives() -> None:
    pipe = flux_pipeline()
    negative = {
        "negative_prompt_embeds": torch.randn(1, 7, 32),
        "negative_pooled_prompt_embeds": torch.randn(1, 32),
        "true_cfg_scale": 3.0,
    }
    dense = draw(pipe, **negative)
    ends = {}
    for branches in ("cond", "uncond", ["cond", "uncond"], None):
        with generators.enable(pipe, "gna", kernel_size=3, branches=branches) as handle:
            trace = draw(pipe, handle, **negative)
            assert {r["branch"] for r in trace.rows} == {"uncond"}  # the call that comes last in a step
            assert [r["step"] for r in trace.rows] == [0, 1, 2, 3]
            ends[str(branches)] = trace.latents[-1]
    assert torch.equal(ends["None"], ends["['cond', 'uncond']"])
    different = [dense.latents[-1], ends["cond"], ends["uncond"], ends["None"]]
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(different) for b in different[:i])
    case = build("flux")
    for name in (None, "cond_uncond"):  # no name; both branches in one batch (CogVideoX, LTX)
        scope = contextlib.nullcontext() if name is None else case.model.cache_context(name)
        with (
            scope,
            generators.enable(case.model, "gna", kernel_size=3, branches="cond"),
            pytest.raises(UnsupportedError, match="cache_context"),
        ):
            run(case)
    with generators.enable(case.model, "gna", kernel_size=3):
        on = run(case)
    with generators.enable(case.model, "gna", kernel_size=3, branches=["cond", "uncond"]):
        assert torch.equal(run(case), on)


def test_image_to_image_begins_later_in_the_schedule_and_shares_the_denoiser() -> None:
    pipe = flux_pipeline()
    with generators.enable(pipe, "gna", kernel_size=3) as handle:
        sibling = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
        with pytest.raises(ValueError, match="from_pipe"):
            generators.enable(sibling, "gna", kernel_size=3)
        sibling.scheduler.set_timesteps(4, mu=1.0)
        sibling.scheduler.set_begin_index(2)
        run(build("flux")._replace(model=pipe.transformer))
        row = handle.report()["denoisers"][0]
        assert (row["step"], row["total"]) == (2, 4)


def test_a_scheduler_exchanged_after_enable_is_followed() -> None:
    pipe = flux_pipeline()
    with generators.enable(pipe, "gna", kernel_size=3, steps=[1]) as handle:
        pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(3)
        case = build("flux")._replace(model=pipe.transformer)
        run(case)
        row = handle.report()["denoisers"][0]
        assert (row["step"], row["total"]) == (0, len(pipe.scheduler.timesteps))


def test_bare_models_and_schedulers_without_step_index_need_new_run() -> None:
    case = build("dit")
    dense = [run(case, timestep=torch.tensor([t, t])) for t in (9, 6, 3)]

    class Bare:
        components: ClassVar[dict[str, Any]] = {"transformer": case.model}
        scheduler = diffusers.DDIMScheduler()

    for target in (case.model, Bare()):
        with generators.enable(target, "gna", kernel_size=3, steps=[1]) as handle:
            with pytest.raises(UnsupportedError, match="new_run"):
                run(case)
            for number in range(2):
                handle.new_run(3)
                outs = []
                for t in (9, 6, 3):
                    run(case, timestep=torch.tensor([t, t]))  # guidance by two calls repeats the timestep
                    outs.append(run(case, timestep=torch.tensor([t, t])))
                assert [torch.equal(a, b) for a, b in zip(outs, dense)] == [True, False, True]
                assert handle.report()["denoisers"][0]["run"] == number
            with pytest.raises(UnsupportedError, match="run of 3"):
                run(case, timestep=torch.tensor([1, 1]))


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("guided", [False, True])
def test_steps_of_schedulers_with_and_without_a_count(name: str, guided: bool) -> None:
    """PNDM takes one timestep twice; two runs, the second after one that was cancelled at its first step."""
    unet = build("unet").model
    pipe = UNetLoop(unet, getattr(diffusers, name)())
    pipe.guided = guided
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, unet.config.cross_attention_dim)
    with generators.enable(pipe, "gna", kernel_size=3) as handle:
        seen: list[tuple[Any, ...]] = []

        def note(*_: Any) -> None:
            row = handle.report()["denoisers"][0]
            seen.append((row["run"], row["step"], row["total"]))

        hook = unet.register_forward_hook(note)
        pipe(latents, text, steps=4)
        count = len(pipe.scheduler.timesteps)
        with pytest.raises(RuntimeError):
            pipe(latents[:, :2], text, steps=4)
        pipe(latents, text, steps=4)
        hook.remove()
    runs = sorted({run for run, _, _ in seen})
    assert len(runs) == 2 and runs[0] < runs[1]
    for number in runs:
        assert [(step, total) for run, step, total in seen if run == number] == [(i, count) for i in range(count)]


def test_two_denoisers_of_one_pipeline_share_their_steps() -> None:
    case = build("wan")
    with torch.no_grad():
        second = diffusers.WanTransformer3DModel.from_config(case.model.config).eval().requires_grad_(False)
        second.load_state_dict(case.model.state_dict())
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        transformer=case.model,
        transformer_2=second,
        boundary_ratio=0.5,
    )
    pipe.set_progress_bar_config(disable=True)

    def draw_video() -> Tensor:
        torch.manual_seed(1)
        return pipe(
            prompt_embeds=torch.randn(1, 6, 16),
            negative_prompt_embeds=torch.randn(1, 6, 16),
            height=64,
            width=96,
            num_frames=9,
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    dense = draw_video()
    with generators.enable(pipe, "gna", kernel_size=(2, 3, 3)) as handle:
        on = draw_video()
        rows = handle.report()["denoisers"]
        assert [r["component"] for r in rows] == ["transformer", "transformer_2"]
        assert [r["run"] for r in rows] == [0, 0] and rows[1]["step"] == 3 and 0 <= rows[0]["step"] < 3
        assert rows[0]["grid"] == (3, 4, 6)
    assert (on - dense).abs().max() > 1e-4
    with generators.enable(pipe.transformer_2, "gna", kernel_size=(2, 3, 3)):
        half = draw_video()
    assert (half - dense).abs().max() > 1e-4 and (half - on).abs().max() > 1e-4
    assert torch.equal(draw_video(), dense) and is_clean(case.model) and is_clean(second)


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Number of graphs that Dynamo has made since the test began."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    yield lambda: counters["unique_graphs"] - before
    torch._dynamo.reset()


def schedule_of(case: Case, call: Callable[..., Any], steps: int = 4) -> list[Tensor]:
    """The outputs of `steps` timesteps."""
    with torch.no_grad():
        return [
            call(**{**case.inputs, "timestep": case.inputs["timestep"] * 0 + (steps - i)}, return_dict=False)[0]
            for i in range(steps)
        ]


@pytest.mark.parametrize(
    ("name", "backend"),
    [("dit", "aot_eager"), ("flux", "eager"), pytest.param("flux", "aot_eager", marks=pytest.mark.slow)],
)
def test_compiled_whole_model_equals_eager_over_a_schedule(name: str, backend: str, graphs: Callable[[], int]) -> None:
    case = build(name)
    dense = schedule_of(case, case.model)
    options = {"kernel_size": 3, "steps": slice(1, 3)}
    with generators.enable(case.model, "gna", **options) as handle:
        handle.new_run(4)
        wanted = schedule_of(case, case.model)
    compiled = torch.compile(case.model, fullgraph=True, backend=backend)
    forward = compiled.forward
    assert all(torch.equal(a, b) for a, b in zip(schedule_of(case, compiled), dense))
    with generators.enable(compiled, "gna", **options) as handle:
        handle.new_run(4)
        got = schedule_of(case, compiled)
        assert handle.report()["denoisers"][0]["step"] == 3
        made = graphs()
        handle.new_run(4)
        schedule_of(case, compiled)
        assert graphs() == made  # a graph per phase, not per step
        with pytest.raises(Exception, match="timestep|NoneType|str"):
            compiled(**{**case.inputs, "timestep": "none"})
        handle.new_run(4)
        assert all(torch.equal(a, b) for a, b in zip(schedule_of(case, compiled), got))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [torch.equal(a, b) for a, b in zip(got, dense)] == [True, False, False, True]
    assert all(torch.equal(a, b) for a, b in zip(schedule_of(case, compiled), dense))
    assert compiled.forward is forward


@pytest.mark.parametrize("name", ["flux", pytest.param("hunyuan_video", marks=pytest.mark.slow)])
def test_compiled_blocks_equal_eager_over_a_schedule(name: str, graphs: Callable[[], int]) -> None:
    case = build(name)
    dense = schedule_of(case, case.model)
    options = {"kernel_size": 3, "steps": slice(1, 3)}
    with generators.enable(case.model, "gna", **options) as handle:
        handle.new_run(4)
        wanted = schedule_of(case, case.model)
    case.model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for a, b in zip(schedule_of(case, case.model), dense):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with generators.enable(case.model, "gna", **options) as handle:
        handle.new_run(4)
        got = schedule_of(case, case.model)
        made = graphs()
        handle.new_run(4)
        schedule_of(case, case.model)
        assert graphs() == made
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [(a - b).abs().max() > 1e-3 for a, b in zip(got, dense)] == [False, True, True, False]
    for a, b in zip(schedule_of(case, case.model), dense):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiling_after_enable_needs_the_grid_and_no_schedule(graphs: Callable[[], int]) -> None:
    case = build("flux")
    with generators.enable(case.model, "gna", kernel_size=3, grid=(6, 5)):
        wanted = run(case)
        compiled = torch.compile(case.model, fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**case.inputs, return_dict=False)[0], wanted, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    for options, words in (({}, "img_ids"), ({"steps": [0], "grid": (6, 5)}, "steps= and branches=")):
        with generators.enable(case.model, "gna", kernel_size=3, **options):
            compiled = torch.compile(case.model, fullgraph=True, backend="eager")
            with torch.no_grad(), pytest.raises(Exception, match=words):
                compiled(**case.inputs)
        torch._dynamo.reset()
