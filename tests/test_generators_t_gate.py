"""T-GATE over whole runs: what is computed when, both forms of guidance, and that nothing stays behind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from generator_models import FAMILIES, Case, build, draw, flux_pipeline, is_clean, run
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.generators import enable
from attnzoo.generators.t_gate import gate_step_at

NEGATIVE = {
    "negative_prompt_embeds": torch.ones(1, 7, 32),
    "negative_pooled_prompt_embeds": torch.ones(1, 32),
    "true_cfg_scale": 3.0,
}


def at(case: Case, time: int) -> Any:
    """A forward at `time` of 1000."""
    name = "t" if "t" in case.inputs else "timestep"
    given = case.inputs[name]
    scaled = time / 1000 if float(given.reshape(-1)[0]) < 1 else time
    found = run(case, **{name: torch.full_like(given, scaled)})
    return torch.stack(found) if isinstance(found, list) else found


class Counting:
    """How often each attention module of a model runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls: Counter[str] = Counter()
        self.handles = [
            module.to_q.register_forward_hook(lambda *_, name=name: self.calls.update([name]))
            for name, module in model.named_modules()
            if hasattr(module, "to_q") and isinstance(module.to_q, torch.nn.Module)
        ]

    def read(self) -> Counter[str]:
        found, self.calls = self.calls, Counter()
        return found

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_is_dense_and_off_is_exact(name: str) -> None:
    torch.manual_seed(0)
    case = build(name)
    times = (900, 600, 300)
    dense = [at(case, t) for t in times]
    with enable(case.model, "t_gate", gate_step=100, sp_interval=1) as handle:
        handle.new_run(3)
        assert all(torch.equal(at(case, t), d) for t, d in zip(times, dense))
        assert handle.report()["denoisers"][0]["state_bytes"] == 0
    with enable(case.model, "t_gate", gate_step=2) as handle:
        handle.new_run(3)
        gated = [at(case, t) for t in times]
        (method,) = handle.methods("t_gate")
        has_cross = bool(handle.report()["denoisers"][0]["layers"]) and method.state_bytes() > 0
    assert all(torch.equal(g, d) for g, d in zip(gated[:2], dense))
    assert torch.equal(gated[2], dense[2]) != has_cross  # without cross-attention only guidance would end
    assert method.state_bytes() == 0 and is_clean(case.model)
    assert torch.equal(at(case, 900), dense[0])


def test_what_is_computed_in_each_step() -> None:
    torch.manual_seed(0)
    case = build("pixart")
    case.inputs.pop("encoder_attention_mask")
    count = Counting(case.model)
    schedule = {"gate_step": 6, "sp_interval": 2, "fi_interval": 2, "warm_up": 1}
    with enable(case.model, "t_gate", guidance=True, **schedule) as handle:
        handle.new_run(10)
        for step in range(10):
            out = at(case, 900 - 50 * step)
            seen = count.read()
            now = gate_step_at(step, **schedule)
            for kind, todo in (("attn1", now.own), ("attn2", now.cross)):
                assert sum(n for name, n in seen.items() if kind in name) == (0 if todo == "reuse" else 2), (step, kind)
            assert torch.equal(out[0], out[1]) == now.gated
    count.remove()


def test_the_mean_of_both_branches_is_what_cross_attention_answers() -> None:
    torch.manual_seed(0)
    case = build("pixart")
    seen: list[Tensor] = []
    hook = case.model.transformer_blocks[1].attn2.register_forward_hook(lambda m, i, out: seen.append(out.clone()))
    with enable(case.model, "t_gate", gate_step=1, guidance=True) as handle:
        handle.new_run(2)
        at(case, 900)
        at(case, 800)
    hook.remove()
    computed, answered = seen
    assert torch.equal(answered, computed.mean(0, keepdim=True))


def test_two_calls_are_answered_by_one() -> None:
    pipe = flux_pipeline()
    dense, count = draw(pipe, **NEGATIVE), Counting(pipe.transformer)
    with enable(pipe, "t_gate", gate_step=2, sp_interval=1, fi_interval=2) as handle:
        gated = draw(pipe, handle, **NEGATIVE)
        assert sum(count.read().values()) == 2 * 6 + 3  # two steps of two calls; step 2 one call; step 3 reuses
        again = draw(pipe, handle, **NEGATIVE)
        (method,) = handle.methods("t_gate")
        assert method.state_bytes() > 0
    count.remove()
    assert method.state_bytes() == 0
    assert all(torch.equal(a, b) for a, b in zip(gated.latents, again.latents))
    assert all(torch.equal(a, b) for a, b in zip(gated.latents[:2], dense.latents))
    assert not torch.allclose(gated.latents[2], dense.latents[2], atol=1e-4)
    with enable(pipe, "t_gate", gate_step=2, compat="official"), pytest.raises(UnsupportedError, match="second"):
        draw(pipe, **NEGATIVE)
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe, **NEGATIVE).latents, dense.latents))


def test_two_calls_store_the_mean_of_both() -> None:
    """The gate at step 1 and a reuse at step 1: the answer of two calls is the one of a batch that holds both."""
    torch.manual_seed(0)
    case = build("flux")
    halves = [
        case._replace(inputs={n: t[i : i + 1] if len(t) == 2 else t for n, t in case.inputs.items()}) for i in range(2)
    ]
    with enable(case.model, "t_gate", gate_step=1, fi_interval=5, guidance=True) as handle:
        handle.new_run(2)
        at(case, 900)
        together = at(case, 800)
    with enable(case.model, "t_gate", gate_step=1, fi_interval=5) as handle:
        handle.new_run(2)
        for time in (900, 800):
            for name, half in zip(("cond", "uncond"), halves[::-1]):
                with case.model.cache_context(name):
                    apart = at(half, time)
    assert torch.allclose(together[1:], apart, atol=1e-5)


def test_the_corrected_default_follows_the_prompt() -> None:
    torch.manual_seed(0)
    case = build("sd3")  # the text stands in the joint sequence, so that after the gate it still matters whose it is
    ends = {}
    for compat in (None, "official"):
        with enable(case.model, "t_gate", gate_step=1, guidance=True, compat=compat) as handle:
            handle.new_run(2)
            at(case, 900)
            ends[compat] = at(case, 800)
    dense = at(case, 800)
    assert torch.allclose(ends["official"][:1], dense[:1], atol=1e-5)
    assert torch.allclose(ends[None][:1], dense[1:], atol=1e-5)


def test_an_exception_in_the_middle_and_a_second_model() -> None:
    pipe, other = flux_pipeline(), flux_pipeline()
    with enable(pipe, "t_gate", gate_step=2) as handle, enable(other, "t_gate", gate_step=3):
        wanted = draw(pipe, handle)
        elsewhere = draw(other)

        def stop(*given: Any) -> dict[str, Any]:
            raise KeyboardInterrupt

        for last in (0, 2):
            with pytest.raises(KeyboardInterrupt):
                pipe(
                    prompt_embeds=torch.zeros(1, 7, 32),
                    pooled_prompt_embeds=torch.zeros(1, 32),
                    num_inference_steps=4,
                    height=96,
                    width=80,
                    output_type="latent",
                    callback_on_step_end=lambda p, i, t, g, last=last: stop() if i == last else g,
                )
            assert all(torch.equal(a, b) for a, b in zip(draw(pipe, handle).latents, wanted.latents))
        assert all(torch.equal(a, b) for a, b in zip(draw(other).latents, elsewhere.latents))
    assert is_clean(pipe.transformer)


def test_the_step_must_be_known_and_bad_input_is_named() -> None:
    case = build("dit")
    with enable(case.model, "t_gate"), pytest.raises(UnsupportedError, match="new_run"):
        run(case)
    for options, error, said in (
        ({"gate_step": 0}, ValueError, "gate_step"),
        ({"sp_interval": 1.5}, TypeError, "sp_interval"),
        ({"warm_up": -1}, ValueError, "warm_up"),
        ({"compat": "old"}, ValueError, "compat"),
        ({"heads": [0]}, UnsupportedError, "heads"),
    ):
        with pytest.raises(error, match=said):
            enable(case.model, "t_gate", **options)
    assert is_clean(case.model)
