"""Agent attention in diffusers models: phases, merged tokens, agents, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("timm")

import diffusers
from generator_models import as_double, build, is_clean, run

from attnzoo.errors import UnsupportedError
from attnzoo.generators import enable, plan
from attnzoo.generators.agent import Agent
from attnzoo.generators.layout import TokenLayout

NEUTRAL = {"ratio": 0.0, "agent_ratio": 0.0, "late_agent_ratio": 0.0, "early_steps": 1.0}


def untouched(model: torch.nn.Module) -> bool:
    return is_clean(model) and not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["unet", "pixart", "dit"])
def test_neutral_is_dense_and_off_is_exact(family: str) -> None:
    case = build(family)
    dense = run(case)
    with enable(case.model, "agent", **NEUTRAL):
        assert torch.equal(run(case), dense)
    outs = []
    for options in ({}, {"cell": 2, "agent_ratio": 0.8}, {"seed": 1}, {"max_downsample": 8}, {"ratio": 0.0}):
        with enable(case.model, "agent", early_steps=1.0, **options) as handle:
            outs.append(run(case))
            assert 0 < handle.report()["denoisers"][0]["density"] < 1
            assert torch.equal(run(case), outs[-1])
    assert all(not torch.allclose(out, dense, atol=1e-4) and out.isfinite().all() for out in outs)
    assert torch.equal(run(case), dense) and untouched(case.model)


def test_agents_alone_are_the_formula() -> None:
    """ratio 0: no token is merged, the agents are ToMe's; by hand on one layer in float64."""
    case = as_double(build("dit"))
    seen: dict[str, Tensor] = {}
    blocks = case.model.transformer_blocks
    got: list[Tensor] = []
    hook = blocks[0].attn1.register_forward_hook(lambda m, i, o: got.append(o))
    with enable(
        case.model, "agent", ratio=0.0, early_steps=1.0, cell=2, agent_ratio=0.75, layers=[0], watch=seen.setdefault
    ):
        run(case)
    hook.remove()
    attention, x = blocks[0].attn1, seen["normed"]
    assert seen["agent"].shape[1] == 16
    with torch.no_grad():
        q, k, v, a = (
            layer(t).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for layer, t in (
                (attention.to_q, x),
                (attention.to_k, x),
                (attention.to_v, x),
                (attention.to_q, seen["agent"]),
            )
        )
        scale = q.shape[-1] ** -0.5
        collected = (a @ k.transpose(-1, -2) * scale).softmax(-1) @ v
        out = (q @ a.transpose(-1, -2) * scale**0.3).softmax(-1) @ collected + 0.075 * v
        wanted = attention.to_out[0](out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["unmerged"], wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[0], wanted, rtol=1e-9, atol=1e-9)


def test_what_it_can_not_know_is_refused() -> None:
    case = build("unet")
    with enable(case.model, "agent"), pytest.raises(UnsupportedError, match="new_run"):
        run(case)
    with pytest.raises(UnsupportedError, match="3 axes"):
        enable(build("wan").model, "agent")
    flux = build("flux")
    with enable(flux.model, "agent", early_steps=1.0), pytest.raises(UnsupportedError, match="rotary"):
        run(flux)
    with (
        enable(case.model, "agent", early_steps=1.0, layers="down_blocks.1*"),
        pytest.raises(UnsupportedError, match="max_downsample to 2"),
    ):
        run(case)
    with enable(case.model, "agent", early_steps=1.0, layers="down_blocks.1*", max_downsample=2):
        assert run(case).isfinite().all()
    for options, error, words in (
        ({"ratio": 1.5}, ValueError, "ratio"),
        ({"early_steps": "all"}, TypeError, "early_steps"),
        ({"cell": 0}, ValueError, "cell"),
        ({"seed": 1.0}, TypeError, "seed"),
        ({"max_downsample": 0}, ValueError, "max_downsample"),
        ({"watch": 3}, TypeError, "watch"),
        ({"compat": "ours"}, ValueError, "compat"),
    ):
        with pytest.raises(error, match=words):
            enable(case.model, "agent", **options)
    assert untouched(case.model) and untouched(flux.model)


def test_an_exception_in_the_middle_leaves_nothing() -> None:
    case = build("unet")
    dense = run(case)
    with enable(case.model, "agent", early_steps=1.0) as handle:
        on = run(case)
        hook = case.model.mid_block.register_forward_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(case)
        hook.remove()
        (method,) = handle.methods("agent")
        assert not method._inputs and method._agents is None and torch.equal(run(case), on)
    assert torch.equal(run(case), dense) and untouched(case.model)


def stable_diffusion() -> Any:
    unet = build("unet").model
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(pipe: Any, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt_embeds=torch.randn(1, 5, 8, generator=generator),
        negative_prompt_embeds=torch.randn(1, 5, 8, generator=generator),
        num_inference_steps=5,
        height=32,
        width=32,
        output_type="latent",
        generator=generator,
        **options,
    ).images


def test_two_phases_in_a_whole_pipeline() -> None:
    pipe = stable_diffusion()
    dense = draw(pipe)
    counts: list[bool] = []
    with enable(pipe, "agent", watch=lambda name, tensor: counts.append(name == "agent")):
        both = draw(pipe)
    names = len(counts)
    agents = sum(counts)
    layers = 3  # of the highest level: down 1, up 2
    assert agents == 2 * layers and names == 5 * layers * 4 + agents  # the first 2 of 5 steps have agents
    with enable(pipe, "agent", steps=slice(0, 2), early_steps=1.0):
        early = draw(pipe)
    with enable(pipe, "agent", early_steps=0.0):
        late = draw(pipe)
    outs = [dense, both, early, late]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(outs) for b in outs[:i])
    assert torch.equal(draw(pipe), dense) and untouched(pipe.unet)


def test_density_counts_what_is_computed() -> None:
    method = Agent(2, ratio=0.4, agent_ratio=0.95, early_steps=1.0)
    tokens, agents = 64 - 25, 64 - 60
    assert method.density(TokenLayout((8, 8))) == pytest.approx(2 * agents * tokens / 64**2)
    assert Agent(2, **NEUTRAL).density(TokenLayout((8, 8))) == 1.0
    unet = build("unet").model
    found = plan(unet, "agent", height=16, width=16, early_steps=1.0)
    share = Agent(2, early_steps=1.0).density(TokenLayout((16, 16)))
    upper, lower = 3 * 256**2 * 8, 4 * 64**2 * 16  # layers, pairs, width: down 1, up 2; down 1, up 2, middle 1
    assert found["attention_flops"] / found["attention_flops_dense"] == pytest.approx(
        (share * upper + lower) / (upper + lower)
    )


def test_two_models_and_another_method_beside_it() -> None:
    first, second = build("unet"), build("unet")
    dense = run(second)
    with enable(first.model, "agent", early_steps=1.0):
        alone = run(first)
        assert torch.equal(run(second), dense)
        with enable(first.model, "sparge", topk=0.5, block_size=4, layers="mid_block*"):
            assert not torch.equal(run(first), alone)
        assert torch.equal(run(first), alone)
    assert untouched(first.model)
