"""Pyramid attention broadcast over whole runs: what is computed when, per branch, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generator_models import FAMILIES, build, draw, flux_pipeline, is_clean
from test_generators_t_gate import NEGATIVE, Counting, at

from attnzoo.errors import UnsupportedError
from attnzoo.generators import enable
from attnzoo.generators.pab import broadcast_schedule

NEUTRAL = {"spatial_range": 1, "temporal_range": 1, "cross_range": 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_is_dense_and_off_is_exact(name: str) -> None:
    torch.manual_seed(0)
    case = build(name)
    times = (900, 700, 600, 500)
    dense = [at(case, t) for t in times]
    with enable(case.model, "pab", **NEUTRAL) as handle:
        handle.new_run(4)
        assert all(torch.equal(at(case, t), d) for t, d in zip(times, dense))
        assert handle.report()["denoisers"][0]["state_bytes"] == 0
    with enable(case.model, "pab", cross_range=2) as handle:
        (method,) = handle.methods("pab")
        for _ in range(2):
            handle.new_run(4)
            found = [at(case, t) for t in times]
            assert [torch.equal(f, d) for f, d in zip(found, dense)] == [True, False, True, False]
        assert method.state_bytes() > 0
    assert method.state_bytes() == 0 and is_clean(case.model) and torch.equal(at(case, 900), dense[0])


def test_layers_are_computed_when_the_schedule_says_so_and_branches_stay_apart() -> None:
    torch.manual_seed(0)
    case = build("wan")
    other = case._replace(inputs={**case.inputs, "hidden_states": torch.randn_like(case.inputs["hidden_states"])})
    times = [1000 - 100 * i for i in range(10)]
    options = {"spatial_range": 2, "cross_range": 3, "threshold": (150, 850), "cross_threshold": (350, 950)}
    alone = {}
    for name, one in (("cond", case), ("uncond", other)):
        with enable(case.model, "pab", **options) as handle, case.model.cache_context(name):
            handle.new_run(10)
            alone[name] = [at(one, t) for t in times]
    count = Counting(case.model)
    reuse = [broadcast_schedule(times, n, bounds).tolist() for n, bounds in ((2, (150, 850)), (3, (350, 950)))]
    with enable(case.model, "pab", **options) as handle:
        handle.new_run(10)
        for step, time in enumerate(times):
            for name, one in (("cond", case), ("uncond", other)):
                with case.model.cache_context(name):
                    assert torch.equal(at(one, time), alone[name][step])
            seen = count.read()
            for kind, pattern in zip(("attn1", "attn2"), reuse):
                assert sum(n for layer, n in seen.items() if kind in layer) == (0 if pattern[step] else 4)
        assert handle.report()["denoisers"][0]["state_bytes"] == 0  # the thresholds are passed
    count.remove()


def test_feed_forward_layers_of_some_blocks() -> None:
    torch.manual_seed(0)
    case = build("wan")
    calls: list[str] = []
    hooks = [
        block.ffn.net[0].register_forward_hook(lambda m, i, o, n=n: calls.append(n))
        for n, block in enumerate(case.model.blocks)
    ]
    times = (900, 800, 700, 600, 500, 400)
    dense = [at(case, t) for t in times]
    calls.clear()
    mlp = {800: {"block": [1], "skip_count": 2}, 600: {"block": [1], "skip_count": 1}}
    with enable(case.model, "pab", mlp=mlp, **NEUTRAL) as handle:
        handle.new_run(6)
        found = []
        for step, time in enumerate(times):
            found.append(at(case, time))
            assert calls == ([0] if step in (2, 4) else [0, 1]), step
            calls.clear()
    assert [torch.equal(f, d) for f, d in zip(found, dense)] == [step not in (2, 4) for step in range(6)]
    for hook in hooks:
        hook.remove()


def test_tables_by_family_and_what_is_given_wins() -> None:
    for name, expected in (("cogvideox", ("cogvideox", 1, (100, 850))), ("wan", ("latte", 6, (100, 800)))):
        with enable(build(name).model, "pab") as handle:
            settings = handle.report()["denoisers"][0]["settings"]
            assert (settings["preset"], settings["cross_range"], settings["spatial_threshold"]) == expected
    with enable(build("wan").model, "pab", preset="open_sora", spatial_range=5) as handle:
        settings = handle.report()["denoisers"][0]["settings"]
        assert settings["spatial_range"] == 5 and settings["cross_threshold"] == (450, 930)


def test_a_pipeline_with_two_calls_runs_twice_the_same_and_stacks() -> None:
    pipe = flux_pipeline()
    dense = draw(pipe, steps=8, **NEGATIVE)
    with enable(pipe, [("pab", {"threshold": (0, 1001)}), ("gna", {"kernel_size": 3}), ("soft_pag", {})]) as handle:
        first = draw(pipe, handle, steps=8, **NEGATIVE)
        again = draw(pipe, handle, steps=8, **NEGATIVE)
    assert all(torch.equal(a, b) for a, b in zip(first.latents, again.latents))
    assert not torch.allclose(first.latents[-1], dense.latents[-1], atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe, steps=8, **NEGATIVE).latents, dense.latents))


def test_refusals() -> None:
    case = build("dit")
    with enable(case.model, "pab"), pytest.raises(UnsupportedError, match="new_run"):
        at(case, 500)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"preset": "sora"}, ValueError, "preset"),
        ({"spatial_range": 0}, ValueError, "spatial_range"),
        ({"threshold": (900, 100)}, ValueError, "threshold"),
        ({"cross_threshold": 5}, TypeError, "cross_threshold"),
        ({"mlp": {1: {"block": [0]}}}, TypeError, "mlp"),
        ({"mlp": {1: {"block": [0], "skip_count": 0}}}, ValueError, "skip_count"),
    ]
    for options, error, said in bad:
        with pytest.raises(error, match=said):
            enable(case.model, "pab", **options)
    assert is_clean(case.model)
