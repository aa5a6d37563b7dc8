"""AdaSpa's search and PAROAttention's tables: no public code, so their properties (and both papers' statements)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from generator_models import build, draw, flux_pipeline, is_clean, run
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.errors import UnsupportedError
from attnzoo.generators import block_mass as masses
from attnzoo.generators import enable
from attnzoo.generators.adaspa import AdaSpa, head_sparsities
from attnzoo.generators.block_mass import block_mass, enough, largest, recall
from attnzoo.generators.paro import ParoLayer, ParoTables, calibrate_paro, permutation_scores, permutations, static_mask
from attnzoo.kernels import axis_order


def qk(tokens: int = 22, extra: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, tokens, 8, dtype=torch.float64) * 1.5
    return q, torch.randn(2, 2, tokens + extra, 8, dtype=torch.float64) * 1.5


def test_block_mass_is_exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk()
    seen = torch.ones(2, 25, dtype=torch.bool)
    seen[0, 23:] = False
    for hidden in (None, seen):
        logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.4
        if hidden is not None:
            logits = logits.masked_fill(~hidden[:, None, None, :], -torch.inf)
        p = logits.softmax(-1)
        found = block_mass(q, k, 22, (5, 4), 0.4, seen=hidden)
        torch.testing.assert_close(found.lse, logits.logsumexp(-1))
        for i in range(5):
            for j in range(6):
                block = p[:, :, 5 * i : 5 * i + 5, 4 * j : min(4 * j + 4, 22)]
                torch.testing.assert_close(found.mass[:, :, i, j], block.sum(-1).mean(-1))
                torch.testing.assert_close(found.peak[:, :, i, j], block.amax((-1, -2)))
        monkeypatch.setattr(masses, "_CHUNK", 1)
        pieces = block_mass(q, k, 22, (5, 4), 0.4, seen=hidden)
        monkeypatch.undo()
        cached = block_mass(q, k, 22, (5, 4), 0.4, seen=hidden, lse=found.lse)
        for other in (pieces, cached):
            torch.testing.assert_close(other.mass, found.mass)
    whole = block_mass(q, k[:, :, :22], 22, (5, 4))
    torch.testing.assert_close(whole.mass.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))


def test_recall_grows_with_the_budget_and_ends_at_all() -> None:
    q, k = qk(extra=0)
    mass = block_mass(q, k, 22, (5, 4)).mass
    for choose in (largest, enough):
        last, before = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.bool)
        for budget in (0.0, 0.2, 0.5, 0.8, 0.95, 1.0):
            mask = choose(mass, budget)
            now = recall(mass, mask)
            assert bool((now >= last - 1e-12).all()) and not bool((before & ~mask).any())
            assert bool(mask.any(-1).all())
            if choose is enough:
                assert bool(((mass * mask).sum(-1) >= budget * mass.sum(-1) - 1e-12).all())
                smaller = mask & (mass > torch.where(mask, mass, torch.inf).amin(-1, keepdim=True))
                assert bool(((mass * smaller).sum(-1) < max(budget, 1e-9) * mass.sum(-1) + 1e-12).all())
            else:
                assert bool((mask.sum(-1) == max(1, round(budget * 6))).all())
            last, before = now, mask
        assert bool(before.all()) and torch.allclose(last, torch.ones_like(last))
    share = torch.tensor([0.2, 0.4, 0.6, 1.0])
    assert largest(mass, share).sum(-1)[0, :, 0].tolist() == [1, 2, 4, 6]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 1), st.floats(0, 0.5))
@settings(max_examples=60, deadline=None)
def test_heads_go_up_and_down_around_the_mean(recalls: list[float], sparsity: float, step: float) -> None:
    values = torch.tensor(recalls, dtype=torch.float64)
    found = head_sparsities(values, sparsity, step)
    assert float(found.mean()) == pytest.approx(sparsity, abs=1e-9)
    assert bool((found >= -1e-12).all()) and bool((found <= 1 + 1e-12).all())
    mean = values.mean()
    assert bool((values[found > sparsity + 1e-12] >= mean - 1e-12).all())
    assert bool((values[found < sparsity - 1e-12] <= mean + 1e-12).all())


def steps(case: Any, count: int = 5) -> list[Tensor]:
    return [run(case, timestep=case.inputs["timestep"] - 0.01 * i) for i in range(count)]


def test_adaspa_searches_when_it_says() -> None:
    case = build("flux")
    dense = steps(case)
    options = {"sparsity": 0.6, "block_size": 4, "search_steps": (1, 3)}
    with enable(case.model, "adaspa", **options) as handle:
        with pytest.raises(UnsupportedError, match="new_run"):
            run(case)
        handle.new_run(5)
        (method,) = handle.methods("adaspa")
        outs, found, lses = [], [], []
        for i in range(5):
            outs.append(run(case, timestep=case.inputs["timestep"] - 0.01 * i))
            found.append({name: f.mask.clone() for name, f in method._found.items()})
            lses.append({name: f.lse for name, f in method._found.items()})
        row = handle.report()["denoisers"][0]
        assert row["state_bytes"] > 0 and row["density"] == pytest.approx(1 - 0.6 * 900 / 37**2, abs=0.06)
        handle.new_run(5)
        run(case)
        assert not method._found  # what another run left is gone
    assert [torch.equal(a, b) for a, b in zip(outs, dense)] == [True, True, False, False, False]
    assert not found[0] and len(found[1]) == 3
    assert all(torch.equal(found[1][n], found[2][n]) and torch.equal(found[3][n], found[4][n]) for n in found[1])
    assert any(not torch.equal(found[2][n], found[3][n]) for n in found[1])
    assert all(torch.equal(lses[4][n], lses[1][n]) for n in lses[1])  # the second search has the first one's
    for options in ({"sparsity": 0.0}, {"recall": 1.0}):
        with enable(case.model, "adaspa", **options):
            assert torch.equal(run(case), dense[0])
    errors = []
    for budget in (0.3, 0.6, 0.9, 0.99):
        with enable(case.model, "adaspa", recall=budget, block_size=4, search_steps=(0,)) as handle:
            handle.new_run(2)
            run(case)
            out = run(case, timestep=case.inputs["timestep"] - 0.01)
            errors.append(float((out - dense[1]).norm() / dense[1].norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]
    assert torch.equal(run(case), dense[0]) and is_clean(case.model)


def test_adaspa_in_a_pipeline_of_two_calls() -> None:
    pipe = flux_pipeline()
    negative = {
        "negative_prompt_embeds": torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(5)),
        "negative_pooled_prompt_embeds": torch.randn(1, 32, generator=torch.Generator().manual_seed(6)),
        "true_cfg_scale": 3.0,
    }
    dense = draw(pipe, **negative)
    with enable(pipe, "adaspa", sparsity=0.6, block_size=4, search_steps=(1,)) as handle:
        on = draw(pipe, handle, **negative)
        (method,) = handle.methods("adaspa")
        assert {branch for _, branch in method._found} == {"cond", "uncond"}
        assert all(torch.equal(a, b) for a, b in zip(draw(pipe, handle, **negative).latents, on.latents))
    assert [torch.equal(a, b) for a, b in zip(on.latents, dense.latents)] == [True, True, False, False]
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe, **negative).latents, dense.latents))


def test_adaspa_refuses_by_name() -> None:
    model = build("dit").model
    for options, error, words in (
        ({"sparsity": 0.5, "recall": 0.5}, ValueError, "one of sparsity"),
        ({"sparsity": 1.5}, ValueError, "sparsity"),
        ({"recall": "most"}, TypeError, "recall"),
        ({"search_steps": ()}, TypeError, "search_steps"),
        ({"search_steps": (1.5,)}, ValueError, "search_steps"),
        ({"head_step": -1.0}, ValueError, "head_step"),
    ):
        with pytest.raises(error, match=words):
            enable(model, "adaspa", **options)
    assert AdaSpa(2).settings()["sparsity"] == 0.8


def striped(grid: tuple[int, ...], axis: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of one head that attend to the tokens with the same places on all axes but `axis`."""
    torch.manual_seed(1)
    places = torch.stack(torch.unravel_index(torch.arange(grid[0] * grid[1] * grid[2]), grid), -1)
    others = [a for a in range(3) if a != axis]
    number = places[:, others[0]] * grid[others[1]] + places[:, others[1]]
    table = torch.randn(int(number.max()) + 1, 32, dtype=torch.float64)
    rows = table[number][None, None] * 1.5
    return rows, rows.clone()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_best_order_puts_what_belongs_together_side_by_side(axis: int) -> None:
    grid = (4, 4, 4)
    q, k = striped(grid, axis)
    scores = []
    for axes in permutations(3):
        order = axis_order(grid, axes)
        found = block_mass(q[:, :, order], k[:, :, order], 64, (4, 4))
        scores.append(torch.stack(permutation_scores(found, 0.1, (4, 4))))
    lost, uneven = torch.stack(scores)[..., 0].unbind(1)
    for score in (lost, uneven):
        assert permutations(3)[int(score.argmin())][-1] == axis
    assert permutations(3)[0] == (0, 1, 2)


def test_static_masks_grow_with_the_density() -> None:
    torch.manual_seed(2)
    mass = torch.rand(3, 5, 6)
    before = torch.zeros(1, dtype=torch.bool)
    for density in (0.0, 0.3, 0.6, 1.0):
        mask = static_mask(mass, density)
        assert bool(mask.any(-1).all()) and not bool((before & ~mask).any())
        assert int(mask[0].sum()) >= round(density * 30)
        before = mask
    assert bool(before.all())


def test_paro_tables_are_kept_and_used(tmp_path: Path) -> None:
    case = build("wan")
    dense = run(case)
    inputs = case.inputs["timestep"]

    def both() -> None:
        for t in (0, 1):
            run(case, timestep=inputs - t)

    tables = calibrate_paro(case.model, both, density=0.3, block_size=4, new_run=2)
    assert is_clean(case.model) and list(tables) == ["blocks.0.attn1", "blocks.1.attn1"]
    own = tables["blocks.0.attn1"]
    assert own.axes.shape == (2, 3) and own.early.shape == (2, 18, 18) and not torch.equal(own.early, own.late)
    with enable(case.model, "paro", tables=tables) as handle:
        with pytest.raises(UnsupportedError, match="half of the steps"):
            run(case)
        handle.new_run(2)
        on = [run(case, timestep=inputs - t) for t in (0, 1)]
        report = handle.report()["denoisers"][0]
    assert not torch.allclose(on[0], dense, atol=1e-4) and 0.25 < report["density"] < 0.45
    tables.save(tmp_path / "paro.safetensors", checkpoint="tiny")
    with enable(case.model, "paro", tables=tmp_path / "paro.safetensors") as handle:
        handle.new_run(2)
        assert [torch.equal(run(case, timestep=inputs - t), on[t]) for t in (0, 1)] == [True, True]
    full = ParoTables(
        {n: ParoLayer(t.grid, t.block_size, t.axes, t.early | True, t.late | True) for n, t in tables.items()}
    )
    with enable(case.model, "paro", tables=full):  # one mask for all steps: the step does not matter
        torch.testing.assert_close(run(case), dense, rtol=1e-4, atol=1e-4)
    with enable(case.model, "paro", tables=tables, qk_int8=True) as handle:
        handle.new_run(2)
        close = run(case)
    assert 0 < (close - on[0]).norm() / on[0].norm() < 0.1
    other = {**case.inputs, "hidden_states": case.inputs["hidden_states"][:, :, :2]}
    with enable(case.model, "paro", tables=full), pytest.raises(UnsupportedError, match="calibrate for this size"):
        run(case._replace(inputs=other))
    some = ParoTables({"blocks.0.attn1": full["blocks.0.attn1"]})
    with enable(case.model, "paro", tables=some), pytest.raises(UnsupportedError, match="hold nothing"):
        run(case)
    assert torch.equal(run(case), dense) and is_clean(case.model)


def test_paro_in_a_pipeline_and_bad_input(tmp_path: Path) -> None:
    pipe = flux_pipeline()
    dense = draw(pipe)
    tables = calibrate_paro(pipe, lambda: draw(pipe), density=0.4, block_size=4)
    with enable(pipe, "paro", tables=tables) as handle:
        on = draw(pipe, handle)
    assert not torch.allclose(on.latents[0], dense.latents[0], atol=1e-4) and 0 < on.rows[0]["density"] < 1
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe).latents, dense.latents))
    from attnzoo.generators.tables import save_table

    save_table(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    for options, error, words in (
        ({}, TypeError, "calibrate_paro"),
        ({"tables": 3}, TypeError, "tables"),
        ({"tables": str(tmp_path / "other.safetensors")}, ValueError, "paro"),
        ({"tables": str(tmp_path / "none")}, FileNotFoundError, "none"),
        ({"record": "all"}, ValueError, "record"),
        ({"tables": tables, "density": 2.0}, ValueError, "density"),
    ):
        with pytest.raises(error, match=words):
            enable(pipe, "paro", **options)
    with enable(pipe, "paro", record="order") as handle:
        (method,) = handle.methods("paro")
        with pytest.raises(ValueError, match="recorded"):
            method.orders()
        with pytest.raises(ValueError, match="recorded"):
            method.masks()
    assert is_clean(pipe.transformer)
