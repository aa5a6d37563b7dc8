"""FreeCus, DiTCtrl and RF-Solver beyond their goldens: passes, halves of a batch, order of convergence, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from generator_models import build, is_clean, run

from attnzoo import generators
from attnzoo.errors import UnsupportedError
from attnzoo.generators import aligned_gen
from attnzoo.generators.rf_solver import integrate


def test_freecus_records_and_uses() -> None:
    case = build("flux")
    dense = run(case)
    mask = torch.zeros(case.grid, dtype=torch.bool)
    mask[2:4, 1:3] = True
    with generators.enable(case.model, "freecus", subject=mask, layers="single*") as handle:
        handle.new_run(2)
        method = handle.methods("freecus")[0]
        with pytest.raises(UnsupportedError, match="recorded"):
            run(case)
        with method.recording():
            assert torch.equal(run(case), dense)  # the reference itself is drawn as ever
        assert method.state_bytes() == 2 * 2 * 2 * 2 * 4 * 16 * 4  # layers, kv, batch, heads, tokens, width, bytes
        handle.new_run(2)
        used = run(case)
        assert (used - dense).abs().max() > 1e-3
        with pytest.raises(RuntimeError, match="in the middle"), method.recording():
            raise RuntimeError("in the middle")
        assert method.state_bytes() == 0
    assert torch.equal(run(case), dense) and is_clean(case.model)


def test_freecus_without_scale_and_with_its_own_tokens_weighs_them_twice() -> None:
    """Keys and values of a picture's own tokens before it: softmax mass of those tokens doubles, exactly."""
    method = generators.METHODS["freecus"](1, subject=[1, 3], scale=1.0)
    layout = generators.TokenLayout((5,), 2, "first")
    query, key, value = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    layer, stock = generators.interception.Layer("layer", 0), torch.nn.functional.scaled_dot_product_attention
    call = (None, layout, generators.StepContext(), layer, stock)
    with method.recording():
        method.attend(query, key, value, *call)
    bias = torch.zeros(7, dtype=torch.float64)
    bias[[3, 5]] = math.log(2)
    wanted = stock(query, key, value, bias[None, None, None])
    torch.testing.assert_close(method.attend(query, key, value, *call), wanted, rtol=1e-9, atol=1e-9)


def pair() -> Any:
    """A source and a target, of different latents."""
    case = build("cogvideox")
    inputs = {
        name: torch.cat([given, given.roll(1, -1)]) if isinstance(given, Tensor) and len(given) == 1 else given
        for name, given in case.inputs.items()
    }
    return case._replace(inputs=inputs)


def test_ditctrl_shares_with_the_source() -> None:
    case = pair()
    dense = run(case)
    with generators.enable(case.model, "ditctrl", start_step=0) as handle:
        handle.new_run(2)
        shared = run(case)
    assert torch.equal(run(case), dense) and is_clean(case.model)
    assert torch.allclose(shared[0], dense[0], atol=1e-5) and (shared[1] - dense[1]).abs().max() > 1e-3
    words = {"ref_token_idx": [1], "cur_token_idx": [2], "thres": 0.5}
    with generators.enable(case.model, "ditctrl", start_step=0, **words) as handle:
        handle.new_run(2)
        guided = run(case)
        assert handle.report()["denoisers"][0]["state_bytes"] > 0
    assert torch.allclose(guided[0], dense[0], atol=1e-5) and not torch.allclose(guided[1], shared[1], atol=1e-3)
    with generators.enable(case.model, "ditctrl", start_step=1) as handle:  # not yet
        handle.new_run(2)
        assert torch.equal(run(case), dense)


def test_midpoint_is_of_second_order_and_nearly_its_own_inverse() -> None:
    x = torch.rand(5, dtype=torch.float64)

    def velocity(x: Tensor, t: float) -> Tensor:
        return torch.sin(x) + t

    def times(n: int) -> list[float]:
        return [1 - i / n for i in range(n + 1)]

    exact = integrate(velocity, x, times(4096))
    errors = [float((integrate(velocity, x, times(n)) - exact).norm()) for n in (8, 16, 32)]
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5
    back = integrate(velocity, integrate(velocity, x, times(32)), times(32)[::-1])
    assert float((back - x).norm()) < 1e-3


def test_rf_edit_keeps_values_of_the_same_stretch_of_time() -> None:
    case = build("flux")
    inputs = dict(case.inputs)
    start = inputs.pop("hidden_states")
    dense = run(case)

    def velocity(x: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            given = {**inputs, "timestep": torch.full((2,), t)}
            return 0.1 * case.model(hidden_states=x, **given, return_dict=False)[0]

    times = [1.0, 0.6, 0.3, 0.0]
    plain = integrate(velocity, start, times[::-1])
    with generators.enable(case.model, "rf_edit", inject_step=2, layers="single*") as handle:
        edit = handle.methods("rf_edit")[0]
        assert torch.equal(edit.integrate(velocity, start, times[::-1], "record"), plain)
        assert sorted({key[1] for key in edit._kept}) == [0, 1] and len(edit._kept) == 2 * 2 * 2
        drawn = edit.integrate(velocity, plain, times, "inject")
        assert not torch.equal(drawn, integrate(velocity, plain, times)) and torch.equal(run(case), dense)
        edit.forget()
        with pytest.raises(UnsupportedError, match="invert"):
            edit.integrate(velocity, plain, times, "inject")
    with generators.enable(case.model, "rf_edit", inject_step=0) as handle:
        edit = handle.methods("rf_edit")[0]
        edit.integrate(velocity, start, times[::-1], "record")
        assert torch.equal(edit.integrate(velocity, plain, times, "inject"), integrate(velocity, plain, times))


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_aligned_gen_moves_the_second_picture_towards_the_first(name: str) -> None:
    case = build(name)
    dense = run(case)
    seen: list[Tensor] = []
    with generators.enable(case.model, "aligned_gen") as handle:
        method = handle.methods("aligned_gen")[0]
        plain = method.attend

        def watch(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
            def last(q: Tensor, k: Tensor, v: Tensor, m: Any) -> Tensor:
                seen.append(k)
                return rest[-1](q, k, v, m)

            seen.append(key)
            return plain(query, key, *rest[:-1], last)

        method.attend = watch
        out = run(case)
    assert torch.allclose(out[0], dense[0], atol=1e-4) and (out[1] - dense[1]).abs().max() > 1e-3
    grid = case.grid[0] * case.grid[1]
    assert all(after.shape[2] == before.shape[2] + grid for before, after in zip(seen[::2], seen[1::2]))
    assert torch.equal(run(case), dense) and is_clean(case.model)
    with generators.enable(case.model, "aligned_gen", style_lambda="decrease") as handle:
        assert handle.methods("aligned_gen")[0].factor(generators.StepContext(timestep=0.5)) == 0.25
        run(case)


def test_a_rotary_turn_is_undone_and_adds_up() -> None:
    model = build("flux").model
    ids = torch.zeros(4, 3)
    ids[:, 2] = torch.arange(4)
    table, moved = model.pos_embed(ids), model.pos_embed(aligned_gen.shifted_ids(ids, 3))
    x = torch.randn(1, 2, 4, 16)
    turned = aligned_gen.rotated(x, table)
    assert torch.allclose(aligned_gen.rotated(turned, table, back=True), x, atol=1e-6)
    assert torch.allclose(aligned_gen.rotated(x[:, :, 3:], tuple(t[3:] for t in table)),
                          aligned_gen.rotated(x[:, :, 3:], tuple(t[:1] for t in moved)), atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name", "options", "words"),
    [
        ("flux", "aligned_gen", {"style_lambda": "rise"}, "style_lambda"),
        ("flux", "freecus", {"subject": []}, "subject"),
        ("flux", "freecus", {"subject": [-1]}, "subject"),
        ("flux", "freecus", {"subject": [1], "scale": -1.0}, "scale"),
        ("cogvideox", "ditctrl", {"ref_token_idx": [1]}, "cur_token_idx"),
        ("cogvideox", "ditctrl", {"thres": 2.0}, "thres"),
        ("flux", "rf_edit", {"inject_step": -1}, "inject_step"),
    ],
)
def test_bad_settings_are_named(family: str, name: str, options: dict[str, Any], words: str) -> None:
    case = build(family)
    with pytest.raises((TypeError, ValueError), match=words):
        generators.enable(case.model, name, **options)
    assert is_clean(case.model)


def test_what_they_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="times"):
        integrate(lambda x, t: x, torch.zeros(1), [1.0])
    sd3 = build("sd3")
    with generators.enable(sd3.model, "aligned_gen"), pytest.raises(UnsupportedError, match="style_aligned"):
        run(sd3)
    case = build("flux")
    with generators.enable(case.model, "freecus", subject=[99]), pytest.raises(ValueError, match="outside"):
        run(case)
    cog = pair()
    with generators.enable(cog.model, "ditctrl", start_step=0, guidance=True) as handle:
        handle.new_run(1)
        with pytest.raises(UnsupportedError, match="source"):
            run(cog)
