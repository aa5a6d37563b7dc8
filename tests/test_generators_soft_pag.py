"""Soft perturbed-attention guidance and HeadHunter: ends, linearity, guidance in all its forms, selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generator_models import FAMILIES, build, draw, flux_pipeline, is_clean, run
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo.errors import UnsupportedError
from attnzoo.generators import enable, head_hunter
from attnzoo.generators.chain import Layer
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.soft_pag import SoftPAG


class OwnValues(TorchFunctionMode):
    """Every self-attention gives each token its own value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3] if args else (kwargs[n] for n in ("query", "key", "value"))
            if query.shape[-2] == key.shape[-2]:
                return value
        return func(*args, **(kwargs or {}))


def stacked(output: Any) -> Tensor:
    return torch.stack(output) if isinstance(output, list) else output


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_on_every_family(name: str) -> None:
    torch.manual_seed(0)
    case = build(name)
    dense = stacked(run(case))
    with enable(case.model, "soft_pag", scale=0.0):
        assert torch.equal(stacked(run(case)), dense)
    with enable(case.model, "soft_pag", strength=0.0):
        assert torch.equal(stacked(run(case)), dense)
    with enable(case.model, "soft_pag", scale=1.0) as handle:
        guided = stacked(run(case))
        assert handle.report()["denoisers"][0]["state_bytes"] == 0
    with OwnValues():
        perturbed = stacked(run(case))
    if name == "pixart" or name == "dit":  # the learned variance is left alone
        guided, dense, perturbed = (t[:, : t.shape[1] // 2] for t in (guided, dense, perturbed))
    assert torch.allclose(guided, 2 * dense - perturbed, atol=1e-4 * float(dense.abs().max()))
    assert not torch.allclose(guided, dense, atol=1e-3 * float(dense.abs().max()))
    assert torch.equal(stacked(run(case))[:, : dense.shape[1]], dense) and is_clean(case.model)


def test_both_branches_of_one_batch_get_the_conditional_shift() -> None:
    torch.manual_seed(0)
    case = build("pixart")
    dense = run(case)
    with OwnValues():
        perturbed = run(case)
    half = len(dense) // 2
    shift = 2.5 * (dense[half:] - perturbed[half:])
    shift[:, 4:] = 0
    with enable(case.model, "soft_pag", scale=2.5, guidance=True):
        out = run(case)
    assert torch.allclose(out, dense + torch.cat([shift, shift]), atol=1e-5)
    assert torch.equal(run(case), dense)


def test_two_calls_per_step() -> None:
    torch.manual_seed(0)
    case = build("flux")
    other = {**case.inputs, "encoder_hidden_states": torch.randn_like(case.inputs["encoder_hidden_states"])}
    negative = case._replace(inputs=other)
    cond, uncond = run(case), run(negative)
    with OwnValues():
        shift = 3.0 * (cond - run(case))
    with enable(case.model, "soft_pag") as handle:
        with case.model.cache_context("cond"):
            assert torch.allclose(run(case), cond + shift, atol=1e-4)
        assert handle.report()["denoisers"][0]["state_bytes"] == cond.nbytes
        with case.model.cache_context("uncond"):
            assert torch.allclose(run(negative), uncond + shift, atol=1e-4)
            with pytest.raises(UnsupportedError, match="before the step's conditional"):
                run(negative)
        assert torch.allclose(run(case), cond + shift, atol=1e-4)  # guidance-distilled: no name
        (method,) = handle.methods("soft_pag")
    assert method.state_bytes() == 0 and torch.equal(run(case), cond)


def test_a_flux_pipeline_with_true_guidance_runs_and_comes_back() -> None:
    pipe = flux_pipeline()
    negative = {
        "negative_prompt_embeds": torch.randn(1, 7, 32),
        "negative_pooled_prompt_embeds": torch.randn(1, 32),
        "true_cfg_scale": 3.0,
    }
    dense, distilled = draw(pipe, **negative), draw(pipe)
    with enable(pipe, "soft_pag", steps=slice(1, 3), branches=["cond", "uncond"]):
        guided = draw(pipe, **negative)
    with enable(pipe, [("soft_pag", {"strength": 0.5, "variant": "masked"}), ("gna", {"kernel_size": 3})]):
        assert (draw(pipe).latents[-1] - distilled.latents[-1]).abs().max() > 1e-3
    assert torch.equal(guided.latents[0], dense.latents[0])
    assert (guided.latents[1] - dense.latents[1]).abs().max() > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe, **negative).latents, dense.latents))


@pytest.mark.parametrize(
    "text, masked", [("first", False), ("first", True), ("last", False), ("last", True), ("none", False)]
)
def test_the_masked_variant_is_dense_attention_under_its_mask(text: str, masked: bool) -> None:
    torch.manual_seed(0)
    words = 0 if text == "none" else 4
    layout = TokenLayout((2, 3), words, text, references=(3,))
    total = layout.length
    query, key, value = (torch.randn(2, h, total, 8, dtype=torch.float64) for h in (4, 2, 2))
    place = torch.arange(total)
    is_text = place < words if text == "first" else place >= total - words
    seen = (place[:, None] == place) | is_text[None, :] | is_text[:, None]
    mask = None
    if masked:
        padding = ~is_text.expand(2, 1, 1, total).clone()
        padding[..., is_text] = torch.tensor([[True, False, True, False], [True] * 4])[:, None, None]
        mask = padding
        seen = seen & (padding | (place[:, None] == place))
    method = SoftPAG(2, variant="masked")

    def stock(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True)

    layer = Layer("layer", 0, phase="perturbed")
    out = method.attend(query, key, value, mask, layout, StepContext(), layer, stock)
    want = stock(query, key, value, seen)
    real = ~is_text if masked else torch.ones(total, dtype=torch.bool)
    assert torch.allclose(out[:, :, real], want[:, :, real], atol=1e-12)
    if words and masked:
        assert torch.allclose(out[:, :, is_text], stock(query[:, :, is_text], key, value, mask), atol=1e-12)


@pytest.mark.parametrize("variant", ["identity", "masked"])
def test_a_layer_is_linear_in_strength_and_keeps_other_heads(variant: str) -> None:
    torch.manual_seed(0)
    layout = TokenLayout((2, 3), 4, "first")
    tensors = [torch.randn(2, 3, layout.length, 8, dtype=torch.float64) for _ in range(3)]

    def at(strength: float, **options: Any) -> Tensor:
        method = SoftPAG(2, strength=strength, variant=variant, **options)
        layer = Layer("layer", 0, phase="perturbed")
        return method.attend(
            *tensors, None, layout, StepContext(), layer, lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m)
        )

    ends = at(0.0), at(1.0)
    for u in (0.25, 0.7):
        assert torch.allclose(at(u), (1 - u) * ends[0] + u * ends[1], atol=1e-12)
    some = at(0.7, selection={"layer": [0, 2]})
    assert torch.equal(some[:, 1], ends[0][:, 1]) and torch.equal(some[:, [0, 2]], at(0.7)[:, [0, 2]])
    assert torch.equal(at(0.7, selection={"another": [0]}), ends[0])
    with pytest.raises(UnsupportedError, match="3 heads"):
        at(1.0, selection={"layer": [3]})


def test_the_best_heads_are_found_and_the_pipeline_comes_back() -> None:
    torch.manual_seed(0)
    case = build("flux")
    dense = run(case)
    wanted = {"single_transformer_blocks.1.attn": [1], "transformer_blocks.0.attn": [0]}
    with enable(case.model, "soft_pag", selection=wanted, scale=4.0):
        target = run(case)
    calls = []

    def objective(model: Any) -> float:
        calls.append(1)
        return -float((run(case) - target).square().mean())

    hunt = head_hunter(case.model, objective, rounds=2, progress=False, scale=4.0)
    assert {name: list(heads) for name, heads in hunt.selection.items()} == wanted
    assert hunt.scores[1] == pytest.approx(0, abs=1e-9)
    assert hunt.scores[1] > hunt.scores[0] > hunt.baseline
    assert len(calls) == 1 + 6 + 5 and [len(t) for t in hunt.tried] == [6, 5]
    pair = head_hunter(case.model, objective, top_k=2, progress=False, scale=4.0)
    assert len(pair.heads) == 2 and len(pair.scores) == 1 and len(calls) == 12 + 1 + 6 + 1
    assert torch.equal(run(case), dense) and is_clean(case.model)

    def broken(model: Any) -> float:
        if len(calls) > 24:
            raise RuntimeError("stop")
        calls.append(1)
        return 0.0

    with pytest.raises(RuntimeError, match="stop"):
        head_hunter(case.model, broken, progress=False)
    assert torch.equal(run(case), dense) and is_clean(case.model)
    with pytest.raises(ValueError, match="finite"):
        head_hunter(case.model, lambda model: float("nan"), progress=False)


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"scale": "3"}, TypeError, "scale"),
        ({"strength": 1.5}, ValueError, "strength"),
        ({"variant": "both"}, ValueError, "variant"),
        ({"selection": [0]}, TypeError, "selection"),
        ({"selection": {"layer": [-1]}}, ValueError, "selection"),
        ({"selection": {"layer": ["0"]}}, TypeError, "selection"),
        ({"selection": {"nowhere": [0]}}, ValueError, "nowhere"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], error: type[Exception], said: str) -> None:
    case = build("dit")
    with pytest.raises(error, match=said):
        enable(case.model, "soft_pag", **options)
    assert is_clean(case.model)


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"rounds": 0}, ValueError, "rounds"),
        ({"top_k": 100}, ValueError, "top_k"),
        ({"heads": [0]}, TypeError, "heads"),
        ({"candidates": [("nowhere", 0)]}, ValueError, "nowhere"),
        ({"candidates": [("x", 0)], "layers": [0]}, TypeError, "not both"),
    ],
)
def test_head_hunter_refuses(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        head_hunter(build("dit").model, lambda model: 0.0, progress=False, **options)
