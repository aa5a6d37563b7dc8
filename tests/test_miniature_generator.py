"""The generator miniature: the shipped pipeline's calling convention, what it draws, its errors, and its training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from attnzoo import miniatures
from attnzoo.errors import ReachError
from attnzoo.miniatures import generator, training, world

pytest.importorskip("diffusers")

FOLDER = training.WEIGHTS / "generator"
QUICK = {"num_inference_steps": 3, "output_type": "np"}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.fixture(scope="module")
def pipe():
    pipeline = generator.load()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder trained for two steps a stage, and what train() returned."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, generator.train(folder, seed=3, steps=2, progress=False)


# ------------------------------------------------------------------------------------------------------ what is shipped


def test_the_folder_is_half_precision_small_and_loads_as_float32(pipe):
    files = sorted(FOLDER.rglob("*.safetensors"))
    assert {t.dtype for f in files for t in load_file(f).values() if t.is_floating_point()} == {torch.float16}
    assert sum(f.stat().st_size for f in files) <= 5_600_000
    assert {p.dtype for m in (pipe.transformer, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    assert not pipe.transformer.training and not pipe.text_encoder.training


def test_the_parts_are_the_upstream_classes(pipe):
    import diffusers
    import transformers

    assert type(pipe.transformer) is diffusers.SD3Transformer2DModel
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(pipe.text_encoder) is transformers.CLIPTextModel
    assert isinstance(pipe, diffusers.DiffusionPipeline) and type(pipe) is generator.MiniatureGeneratorPipeline
    stock = type(next(iter(pipe.transformer.attn_processors.values())))
    assert stock.__module__.startswith("diffusers.")


def test_image_tokens_are_256_at_32_pixels(pipe):
    found = []
    block = pipe.transformer.transformer_blocks[0]
    hook = block.register_forward_pre_hook(lambda _, __, given: found.append(given), with_kwargs=True)
    pipe("a red circle", num_inference_steps=1)
    hook.remove()
    assert found[0]["hidden_states"].shape[1] == 256
    assert found[0]["encoder_hidden_states"].shape[1] == pipe.tokenizer.model_max_length


def test_single_objects_are_recognised(pipe):
    result = generator.evaluate(pipe, per_class=1, pairs=8, seed=11, num_inference_steps=12)
    assert len(result["single"]) == 24
    assert result["single"].mean() >= 0.7 and result["single_colour"].mean() >= 0.9
    assert result["pair_colours"].mean() >= 0.5


@pytest.mark.slow
def test_the_full_figures_meet_the_bar():
    rows = generator.measure()
    first = rows[0]
    assert first["n"] >= 480 and first["ok"], rows


def test_the_card_is_that_of_the_figures():
    figures = json.loads((FOLDER / "figures.json").read_text())["rows"]
    card = (FOLDER / "README.md").read_text()
    assert figures[0]["value"] >= 0.8 and figures[0]["n"] >= 480
    for row in figures:
        assert f"| {row['figure']} | {row['value']:.3f} |" in card


# --------------------------------------------------------------------------------------------------- calling convention


def test_same_seed_same_image_and_other_seed_another(pipe):
    first, again, other = (pipe("a blue ring", generator=seeds(s)[0], **QUICK).images for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.allclose(first, other)


def test_batch_equals_single_calls(pipe):
    prompts = ["a red circle", "a green cross above a yellow ring"]
    together = pipe(prompts, generator=seeds(5, 6), **QUICK).images
    for image, prompt, seed in zip(together, prompts, (5, 6)):
        alone = pipe(prompt, generator=seeds(seed)[0], **QUICK).images[0]
        np.testing.assert_allclose(image, alone, atol=1e-5)


def test_images_per_prompt_follow_the_prompts(pipe):
    noise = torch.randn(4, 3, 32, 32, generator=seeds(0)[0])
    prompts = ["a red circle", "a blue square"]
    several = pipe(prompts, num_images_per_prompt=2, latents=noise, **QUICK).images
    plain = pipe([prompts[0]] * 2 + [prompts[1]] * 2, latents=noise, **QUICK).images
    np.testing.assert_allclose(several, plain, atol=1e-6)


@pytest.mark.parametrize(
    "kind, check",
    [
        ("pil", lambda x: isinstance(x[0], Image.Image) and x[0].size == (32, 32)),
        ("np", lambda x: x.shape == (1, 32, 32, 3) and x.min() >= 0 and x.max() <= 1),
        ("pt", lambda x: x.shape == (1, 3, 32, 32) and x.min() >= 0 and x.max() <= 1),
        ("latent", lambda x: x.shape == (1, 3, 32, 32) and x.dtype == torch.float32),
    ],
)
def test_output_types(pipe, kind, check):
    assert check(pipe("a red circle", num_inference_steps=1, output_type=kind).images)
    (images,) = pipe("a red circle", num_inference_steps=1, output_type=kind, return_dict=False)
    assert check(images)


def test_guidance_is_one_doubled_call_a_step_and_none_at_one(pipe):
    batches = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, __, given: batches.append(len(given["hidden_states"])), with_kwargs=True
    )
    pipe(["a red circle"] * 2, guidance_scale=3.0, **QUICK)
    pipe(["a red circle"] * 2, guidance_scale=1.0, **QUICK)
    hook.remove()
    assert batches == [4, 4, 4, 2, 2, 2]


def test_negative_prompt(pipe):
    noise = torch.randn(1, 3, 32, 32, generator=seeds(0)[0])
    none, empty, other = (
        pipe("a red circle", negative_prompt=text, latents=noise, **QUICK).images for text in (None, "", "a red ring")
    )
    assert np.array_equal(none, empty) and not np.allclose(none, other)
    listed = pipe(["a red circle"], negative_prompt=["a red ring"], latents=noise, **QUICK).images
    assert np.array_equal(listed, other)


def test_callback_sees_the_schedulers_steps_and_can_change_latents(pipe):
    seen = []

    def watch(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), pipeline.scheduler.step_index, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    images = pipe(
        "a red circle",
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        **QUICK,
    ).images
    assert [s[0] for s in seen] == [0, 1, 2] and [s[2] for s in seen] == [1, 2, 3]
    assert [s[1] for s in seen] == pipe.scheduler.timesteps.tolist() and pipe.num_timesteps == 3
    assert all(s[3] == ["latents", "prompt_embeds"] for s in seen)
    assert np.allclose(images, 0.5)


def test_interrupt_leaves_the_rest_out(pipe):
    steps = []

    def stop(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = True
        return tensors

    pipe("a red circle", callback_on_step_end=stop, **QUICK)
    assert steps == [0]
    pipe("a red circle", **QUICK)
    assert not pipe.interrupt


@pytest.mark.parametrize("height, width", [(24, 32), (40, 36)])
def test_other_sizes(pipe, height, width):
    image = pipe("a red circle", height=height, width=width, num_inference_steps=1).images[0]
    assert image.size == (width, height)


def test_round_trip_through_a_folder(pipe, tmp_path):
    want = pipe("a yellow cross", generator=seeds(4)[0], **QUICK).images
    pipe.save_pretrained(tmp_path / "single")
    generator.save(pipe, tmp_path / "half")
    for name in ("single", "half"):
        again = type(pipe).from_pretrained(tmp_path / name)
        again.set_progress_bar_config(disable=True)
        assert np.array_equal(again("a yellow cross", generator=seeds(4)[0], **QUICK).images, want)
    assert next(pipe.transformer.parameters()).dtype == torch.float32


def test_case_stops_and_commas_do_not_matter(pipe):
    from attnzoo.miniatures.generator_pipeline import tokenize

    plain, dressed = tokenize(
        pipe.tokenizer, ["a red circle left of a blue square", "A red circle, left of a BLUE square."]
    )
    assert torch.equal(plain, dressed) and len(plain) == pipe.tokenizer.model_max_length
    assert pipe.tokenizer.unk_token_id not in plain


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, error, named",
    [
        ({"prompt": "a purple giraffe"}, ValueError, "'purple', 'giraffe'; it knows a, above, blue"),
        ({"prompt": ""}, ValueError, "prompt must name one or two objects"),
        ({"prompt": ["a red circle", "  "]}, ValueError, "prompt must name one or two objects"),
        ({"prompt": []}, TypeError, "prompt"),
        ({"prompt": 3}, TypeError, "prompt must be a string"),
        ({"prompt": "a red circle above " * 4}, ValueError, "10 words at most"),
        ({"negative_prompt": ["a red ring"] * 2}, ValueError, "negative_prompt must hold one text per prompt"),
        ({"negative_prompt": "a grey ring"}, ValueError, "'grey'"),
        ({"negative_prompt": 1}, TypeError, "negative_prompt"),
        ({"height": 33}, ValueError, "height must be a multiple of 2"),
        ({"width": 66}, ValueError, "width must be a multiple of 2 .* to 64"),
        ({"width": 0}, ValueError, "width"),
        ({"height": 32.0}, ValueError, "height"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be from 1"),
        ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps must be a whole number"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale"),
        ({"output_type": "jpeg"}, ValueError, "output_type must be one of 'pil'"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, ValueError, r"latents must have shape \(1, 3, 32, 32\)"),
        ({"generator": seeds(1, 2)}, ValueError, "generator must be one, or one per image"),
        ({"callback_on_step_end_tensor_inputs": ["velocity"]}, ValueError, "callback_on_step_end_tensor_inputs"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(pipe, arguments, error, named):
    with pytest.raises(error, match=named):
        pipe(**{"prompt": "a red circle", "num_inference_steps": 1, **arguments})


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(ReachError, match="model_index.json"):
        generator.load(tmp_path)


@pytest.mark.parametrize("arguments, named", [({"per_class": 0}, "per_class"), ({"pairs": 0}, "pairs")])
def test_evaluate_names_a_bad_count(pipe, arguments, named):
    with pytest.raises(ValueError, match=named):
        generator.evaluate(pipe, judge=object(), **arguments)


# --------------------------------------------------------------------------------------------------- judging


def test_the_halves_rule_accepts_the_worlds_scenes_and_rejects_swapped_prompts():
    rng = np.random.default_rng(0)
    accepted, rejected, n = 0, 0, 60
    for i in range(n):
        first, second = rng.permutation(24)[:2].tolist()
        while first // 6 == second // 6:
            second = int(rng.integers(24))
        prompt, swapped = (
            world.write_prompt(pair, world.RELATIONS[i % 2]) for pair in ([first, second], [second, first])
        )
        image = world.placed_scene(rng, 32, prompt=prompt)[0].image
        accepted += generator.halves_match(image, prompt)
        rejected += not generator.halves_match(image, swapped)
    assert accepted >= 0.95 * n and rejected == n
    assert not generator.halves_match(np.zeros((32, 32, 3), np.uint8), "a red circle above a blue ring")


# --------------------------------------------------------------------------------------------------- training


def test_a_short_training_writes_a_folder_that_draws(trained):
    folder, report = trained
    assert (folder / "model_index.json").is_file() and not (folder / "checkpoint.pt").exists()
    assert json.loads((folder / "training.json").read_text()) == report
    assert report["seed"] == 3 and report["parameters"] > 2_000_000
    assert set(report["cpu_seconds_by_stage"]) == {"coarse", "fine"}
    drawn = miniatures.load("generator", folder)("a red circle", **QUICK).images
    assert drawn.shape == (1, 32, 32, 3) and np.isfinite(drawn).all()


def test_an_interrupted_training_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch):
    from attnzoo.miniatures.generator_recipe import Run

    advance, before = Run.advance, torch.random.get_rng_state()

    def cut(run: Run, *rest):
        if run.stage["patch_size"] == 2:
            raise KeyboardInterrupt
        return advance(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", cut)
        with pytest.raises(KeyboardInterrupt):
            generator.train(tmp_path, seed=3, steps=2, progress=False)
    assert (tmp_path / "checkpoint.pt").is_file()
    with pytest.raises(ValueError, match="checkpoint of another recipe or seed"):
        generator.train(tmp_path, seed=4, steps=2, progress=False)
    generator.train(tmp_path, seed=3, steps=2, progress=False)
    for file in sorted(trained[0].rglob("*.safetensors")):
        there = load_file(tmp_path / file.relative_to(trained[0]))
        assert all(torch.equal(value, there[name]) for name, value in load_file(file).items()), file
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_steps_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        generator.train(tmp_path, steps=0)


@pytest.fixture(scope="module")
def networks():
    from attnzoo.miniatures.generator_pipeline import build_tokenizer
    from attnzoo.miniatures.generator_recipe import Network

    recipe = training.read_recipe("generator")
    tokenizer = build_tokenizer(recipe["text"]["max_length"])
    with training.seeded(0, "cpu"):
        both = {size: Network(recipe, size, tokenizer) for size in (4, 2)}
        for network in both.values():
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
    return both, tokenizer


def test_training_attention_equals_diffusers_own(networks):
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    from attnzoo.miniatures.generator_pipeline import tokenize
    from attnzoo.miniatures.generator_recipe import TrainingAttention

    network = networks[0][2]
    given = (torch.randn(2, 3, 16, 16), torch.rand(2), tokenize(networks[1], ["a red circle", ""]))
    with torch.no_grad():
        network.transformer.set_attn_processor(TrainingAttention())
        written_out = network(*given)
        network.transformer.set_attn_processor(JointAttnProcessor2_0())
        torch.testing.assert_close(written_out, network(*given), rtol=1e-4, atol=1e-4)


def test_refine_carries_embedding_output_and_positions_over(networks):
    from attnzoo.miniatures.generator_recipe import copy_positions, refine

    coarse, fine = networks[0][4], networks[0][2]
    fine.load_state_dict(refine(coarse.state_dict(), fine))
    small = torch.randn(1, 3, 2, 2)
    patch = small.tile(1, 1, 2, 2)  # a coarse patch of four copies
    torch.testing.assert_close(
        coarse.transformer.pos_embed.proj(patch), fine.transformer.pos_embed.proj(small), rtol=1e-4, atol=1e-4
    )
    state = torch.randn(1, coarse.transformer.inner_dim)
    whole = coarse.transformer.proj_out(state).view(2, 2, 2, 2, 3).mean((0, 2))
    torch.testing.assert_close(whole, fine.transformer.proj_out(state).view(2, 2, 3), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        copy_positions(coarse, fine)
    small_table, table = (n.transformer.pos_embed.cropped_pos_embed(32, 32) for n in (coarse, fine))
    quarter = table.view(8, 2, 8, 2, -1).mean((1, 3)).view(1, 64, -1)
    torch.testing.assert_close(small_table, quarter)
