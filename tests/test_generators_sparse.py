"""Methods that choose blocks: SpargeAttn and what it shares with the others (attnzoo/generators/blocks.py)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("diffusers")

from generator_models import Case, as_double, build, draw, flux_pipeline, is_clean, run

from attnzoo.errors import UnsupportedError
from attnzoo.generators import enable
from attnzoo.generators.blocks import Choice
from attnzoo.generators.chain import Layer
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.paro import calibrate_paro
from attnzoo.generators.seer import SeerGate, SeerGates, choose_by_ratio, distillation_loss, pooled_target
from attnzoo.generators.sparge import Sparge, select_blocks
from attnzoo.generators.tables import HeadTable, load_table, save_table

LAYOUTS = {
    "image": TokenLayout((5, 6)),
    "text first": TokenLayout((4, 6), 5, "first"),
    "text last": TokenLayout((3, 2, 4), 7, "last"),
    "references": TokenLayout((4, 4), 3, "first", (6,)),
}


def tensors(layout: TokenLayout, batch: int = 2, heads: int = 3, dim: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, heads, layout.length, dim, dtype=torch.float64) * 1.5 for _ in range(3)]


def shown(choice: Choice, layout: TokenLayout, block_size: tuple[int, int], heads: int) -> Tensor:
    """[B or 1, heads, N, N], True where a query sees a key: one token at a time, from the definition."""
    mask, start = choice.mask.expand(-1, heads, -1, -1), layout.grid_start
    made = torch.ones(len(mask), heads, layout.length, layout.length, dtype=torch.bool)
    for head in range(heads):
        order = list(range(layout.num_grid))
        if choice.order is not None:
            order = choice.order[head if len(choice.order) > 1 else 0].tolist()
        others = [i for i in range(layout.length) if not start <= i < start + layout.num_grid]
        along = [start + i for i in order] + others
        whole = layout.num_grid // block_size[1]
        for at, token in enumerate(order):
            for place, key in enumerate(along):
                block = place // block_size[1]
                if place < layout.num_grid and (block < whole or not others):
                    made[:, head, start + token, key] = mask[:, head, at // block_size[0], block]
    return made


class Told(Sparge):
    """Sees the blocks that it is told."""

    told: Choice

    def choose(self, *given: Any) -> Choice:
        return self.told


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("kind", [None, "padding", "bool", "float"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_is_dense_attention_under_the_mask(name: str, kind: str | None, reordered: bool) -> None:
    layout, heads = LAYOUTS[name], 3
    q, k, v = tensors(layout)
    method = Told(len(layout.grid), block_size=(5, 4))
    chosen = torch.rand(2, heads, -(-layout.num_grid // 5), -(-layout.num_grid // 4)) > 0.5
    chosen[..., 0] = True
    orders = torch.stack([torch.randperm(layout.num_grid) for _ in range(heads)])
    method.told = Choice(chosen, orders if reordered else None)
    wanted_mask = shown(method.told, layout, (5, 4), heads)
    mask = None
    if kind == "padding":
        mask = torch.ones(2, 1, 1, layout.length, dtype=torch.bool)
        mask[0, ..., -2:] = False
    elif kind == "bool":
        mask = torch.rand(2, 1, layout.length, layout.length) > 0.2
        mask[..., 1::3] = True
    elif kind == "float":
        mask = torch.randn(layout.length, layout.length, dtype=torch.float64)
    given = [t.clone().requires_grad_() for t in (q, k, v)]
    layer = Layer("blocks.0", 0, scale=0.3)

    def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)

    got = method.attend(*given, mask, layout, StepContext(), layer, stock)
    bias = torch.zeros(2, heads, layout.length, layout.length, dtype=torch.float64)
    bias = bias.masked_fill(~wanted_mask, -math.inf)
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
    other = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted = ((other[0] @ other[1].transpose(-1, -2)) * 0.3 + bias).softmax(-1) @ other[2]
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    push = torch.randn_like(got)
    for mine, its in zip(torch.autograd.grad(got, given, push), torch.autograd.grad(wanted, other, push)):
        torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-9)


def recall(mask: Tensor, query: Tensor, key: Tensor, block_size: tuple[int, int]) -> float:
    """Share of exact attention's mass that lies in the chosen blocks."""
    probability = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    rows = mask.repeat_interleave(block_size[0], 2)[:, :, : query.shape[2]]
    return float((probability * rows.repeat_interleave(block_size[1], 3)[..., : key.shape[2]]).sum(-1).mean())


@pytest.mark.parametrize("mode", ["topk", "cdfthreshd"])
def test_recall_grows_with_the_budget(mode: str) -> None:
    torch.manual_seed(1)
    base = torch.randn(2, 3, 12, 16, dtype=torch.float64).repeat_interleave(8, 2) * 2
    q, k = (base + 0.3 * torch.randn_like(base) for _ in range(2))
    q = q[:, :, :91]  # blocks in part
    last, before = 0.0, torch.zeros(1, dtype=torch.bool)
    other = "cdfthreshd" if mode == "topk" else "topk"
    for budget in (0.0, 0.2, 0.5, 0.8, 0.95, 1.0):
        found = select_blocks(q, k, block_size=8, simthreshd1=-1.0, **{mode: budget, other: None})
        now = recall(found.mask, q, k, (8, 8))
        assert now >= last and not bool((before & ~found.mask).any())
        assert bool(found.mask.any(-1).all())
        last, before = now, found.mask
    assert last == pytest.approx(1.0) and bool(before.all())


def test_selection_says_what_it_says() -> None:
    """Against the definition, one block at a time, in float64: similarity by the whole Gram matrix."""
    torch.manual_seed(2)
    q, k = torch.randn(1, 2, 50, 8, dtype=torch.float64) + 0.7, torch.randn(1, 2, 45, 8, dtype=torch.float64) + 0.7
    seen = torch.rand(1, 45) > 0.2
    thresholds, shares = torch.tensor([0.3, 0.55]), torch.tensor([0.4, 0.8])
    found = select_blocks(
        q, k, block_size=(16, 8), simthreshd1=thresholds, cdfthreshd=shares, scale=0.9, smooth_k=False, seen=seen
    )
    for head in range(2):
        rows = [q[0, head, i : i + 16] for i in range(0, 50, 16)]
        columns = [k[0, head, i : i + 8][seen[0, i : i + 8]] for i in range(0, 45, 8)]
        similar = []
        for block in (*rows, *columns):
            unit = F.normalize(block, dim=-1)
            similar.append(bool((unit @ unit.T).mean() > thresholds[head]))
        like_q, like_k = similar[: len(rows)], similar[len(rows) :]
        for i, row in enumerate(rows):
            score = torch.stack([row.mean(0) @ c.mean(0) * 0.9 for c in columns])
            score[[not s for s in like_k]] = -math.inf
            p, order = score.softmax(-1).sort(descending=True)
            count = max(1, int((p.cumsum(0) <= shares[head]).sum()))
            wanted = [not like_q[i] or not like_k[j] or j in order[:count].tolist() for j in range(len(columns))]
            assert found.mask[0, head, i].tolist() == wanted
    hidden = k.masked_fill(~seen[:, None, :, None], 1e3)
    again = select_blocks(q, hidden, block_size=(16, 8), seen=seen, scale=0.9, smooth_k=True)
    assert torch.equal(again.mask, select_blocks(q, k, block_size=(16, 8), seen=seen, scale=0.9, smooth_k=True).mask)
    causal = select_blocks(q, k, block_size=(16, 8), is_causal=True, simthreshd1=-1.0, cdfthreshd=1.0)
    for i in range(4):
        for j in range(6):
            seen_by = any(key <= query - 5 for query in range(16 * i, min(16 * i + 16, 50)) for key in [8 * j])
            assert bool(causal.mask[0, 0, i, j]) == seen_by


OPTIONS: dict[str, dict[str, Any]] = {
    "sparge": {"topk": 0.4, "block_size": (4, 4)},
    "seer": {"nz_ratio": 0.4},
    "adaspa": {"sparsity": 0.6, "block_size": 4, "search_steps": (0, 2)},
    "paro": {},
}


def options_of(name: str, case: Case) -> dict[str, Any]:
    """The method's options for this model."""
    model = case.model
    if name == "seer":
        torch.manual_seed(3)
        dtype = next(model.parameters()).dtype
        return {**OPTIONS[name], "gates": SeerGates.for_model(model, block_size=4).to(dtype)}
    if name == "paro":
        return {"tables": calibrate_paro(model, lambda: run(case), new_run=1, **PARO)}
    return OPTIONS[name]


PARO = {"block_size": 4, "density": 0.4}


NEUTRAL: dict[str, dict[str, Any]] = {
    "sparge": {"topk": 1.0},
    "adaspa": {"sparsity": 0.0},
    "paro": {"record": "order"},
}
LATER = ["flux", "hunyuan_video", "unet", "pixart", "sd3", "wan", "cogvideox", "ltx", "qwen_image", "dit"]


@pytest.mark.parametrize("family", LATER)
@pytest.mark.parametrize("name", OPTIONS)
def test_on_every_family(name: str, family: str) -> None:
    case = build(family)
    dense = run(case)
    if name in NEUTRAL:
        with enable(case.model, name, **NEUTRAL[name]):
            assert torch.equal(run(case), dense)
    with enable(case.model, name, **options_of(name, case)) as handle:
        handle.new_run(4)
        out = run(case)
        if name == "adaspa":  # the first search is dense
            assert torch.equal(out, dense)
            out = run(case, timestep=case.inputs["timestep"] - 1)
        row = handle.report()["denoisers"][0]
        assert row["layers"] and 0 < row["density"] < 1 and row["state_bytes"] > 0 and out.isfinite().all()
        (method,) = handle.methods(name)
        wide = as_double(build(family))
    dense = run(case, timestep=case.inputs["timestep"] - 1) if name == "adaspa" else dense
    assert (out - dense).abs().max() > 1e-4 and is_clean(case.model)
    assert method.state_bytes() == 0
    with enable(wide.model, name, **options_of(name, wide)) as handle:
        handle.new_run(4)
        assert run(wide).dtype == torch.float64


def test_tables_speak_per_layer_and_head() -> None:
    case = build("flux")
    heads = case.model.config.num_attention_heads
    dense = run(case)
    options = {"block_size": 4}
    with enable(case.model, "sparge", topk={"single*": 1.0, "*": 1.0}, **options):
        assert torch.equal(run(case), dense)
    with enable(case.model, "sparge", topk={"single*": [0.2] * heads, "*": 1.0}, layers="single*", **options):
        one = run(case)
    with enable(case.model, "sparge", topk=0.2, layers="single*", **options):
        assert torch.equal(run(case), one)
    with enable(case.model, "sparge", topk=[1.0, 0.2], layers="single*", **options):
        both = run(case)
    with enable(case.model, "sparge", topk=0.2, layers="single*", heads=[1], **options):
        torch.testing.assert_close(run(case), both, rtol=1e-5, atol=1e-5)
    with enable(case.model, "sparge", topk=[0.2] * 3, **options), pytest.raises(ValueError, match="topk"):
        run(case)
    with enable(case.model, "sparge", topk={"nothing": 0.2}, **options), pytest.raises(ValueError, match="no entry"):
        run(case)
    assert torch.equal(run(case), dense) and is_clean(case.model)


def test_bad_input_is_refused_by_name() -> None:
    case = build("flux")
    for options, error, words in (
        ({"topk": 0.5, "cdfthreshd": 0.9}, ValueError, "one of topk and cdfthreshd"),
        ({"topk": 1.5}, ValueError, "topk"),
        ({"topk": "half"}, TypeError, "topk"),
        ({"topk": {}}, ValueError, "topk"),
        ({"cdfthreshd": -0.1}, ValueError, "cdfthreshd"),
        ({"pvthreshd": 0.0}, ValueError, "pvthreshd"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"qk_int8": 1}, TypeError, "qk_int8"),
        ({"compat": "authors"}, ValueError, "compat"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ):
        with pytest.raises(error, match=words):
            enable(case.model, "sparge", **options)
    q = torch.randn(1, 3, 8, 4)
    for given, words in (
        ((q, q[:, :2]), "divisor"),
        ((q[0], q), "query"),
    ):
        with pytest.raises(ValueError, match=words):
            select_blocks(*given)
    with pytest.raises(ValueError, match="must be None"):
        select_blocks(q, q, topk=0.5)
    assert is_clean(case.model)


def test_second_stage_eight_bits_and_official(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("flux")
    with enable(case.model, "sparge", topk=0.5, block_size=4):
        plain = run(case)
    with enable(case.model, "sparge", topk=0.5, block_size=4, pvthreshd=50.0):
        assert torch.allclose(run(case), plain, atol=1e-5)
    with enable(case.model, "sparge", topk=0.5, block_size=4, pvthreshd=0.5):
        skipped = run(case)
    assert not torch.allclose(skipped, plain, atol=1e-3)
    with enable(case.model, "sparge", topk=0.5, block_size=4, qk_int8=True):
        close = run(case)
    assert 0 < (close - plain).norm() / plain.norm() < 0.05
    with enable(case.model, "sparge", topk=0.5, block_size=4, compat="official"):
        official = run(case)
    assert official.isfinite().all() and not torch.allclose(official, plain, atol=1e-3)


def test_an_exception_and_two_models() -> None:
    first, second = build("flux"), build("flux")
    dense = run(first), run(second)
    with enable(first.model, "sparge", topk=0.3, block_size=4):
        on = run(first)
        assert torch.equal(run(second), dense[1])
        with enable(second.model, "sparge", topk=0.3, block_size=4, layers=[0]), pytest.raises(ZeroDivisionError):
            handle = second.model.transformer_blocks[-1].register_forward_hook(lambda *_: 1 // 0)
            try:
                run(second)
            finally:
                handle.remove()
        assert torch.equal(run(second), dense[1]) and torch.equal(run(first), on)
    assert torch.equal(run(first), dense[0]) and is_clean(first.model) and is_clean(second.model)


def test_a_whole_pipeline_and_its_report() -> None:
    pipe = flux_pipeline()
    dense = draw(pipe)
    with enable(pipe, "sparge", topk=0.3, block_size=4, steps=slice(1, None)) as handle:
        on = draw(pipe, handle)
    assert torch.equal(on.latents[0], dense.latents[0]) and not torch.equal(on.latents[1], dense.latents[1])
    assert on.rows[0]["density"] == pytest.approx(1 - (1 - 2 / 8) * 30**2 / 37**2)  # what the settings tell
    assert 0 < on.rows[2]["density"] < 1
    again = draw(pipe)
    assert all(torch.equal(a, b) for a, b in zip(again.latents, dense.latents))


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_blocks_equal_eager_over_a_schedule(name: str) -> None:
    torch._dynamo.reset()
    case = build("flux")
    options = options_of(name, case)

    def outs() -> list[Tensor]:
        with enable(case.model, name, **options) as handle:
            handle.new_run(4)
            return [run(case, timestep=case.inputs["timestep"] - 0.01 * i) for i in range(4)]

    dense = run(case)
    wanted = outs()
    case.model.compile_repeated_blocks(fullgraph=True, backend="eager")
    counters = torch._dynamo.utils.counters["stats"]
    got = outs()
    made = counters["unique_graphs"]
    for a, b in zip(outs(), got):
        assert torch.equal(a, b)
    assert counters["unique_graphs"] - made <= made
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[-1], dense, atol=1e-3)
    torch._dynamo.reset()


def test_compiled_whole_model_equals_eager() -> None:
    torch._dynamo.reset()
    case = build("dit")
    with enable(case.model, "sparge", topk=0.4, block_size=8):
        wanted = run(case)
    compiled = torch.compile(case.model, fullgraph=True, backend="eager")
    with enable(compiled, "sparge", topk=0.4, block_size=8), torch.no_grad():
        got = compiled(**case.inputs, return_dict=False)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_tables_and_their_files(tmp_path: Path) -> None:
    table = HeadTable("topk", {"a": [0.1, 0.2], "b*": torch.tensor(0.5)}, 0.0, 1.0)
    like = torch.zeros(1, dtype=torch.float64)
    assert table.at("a", 2, like).tolist() == [0.1, 0.2] and table.at("b.c", 3, like).tolist() == [0.5] * 3
    assert table.mean() == pytest.approx(0.325)
    path = tmp_path / "table.safetensors"
    save_table(path, {"x": torch.arange(3)}, model="tiny")
    tensors, about = load_table(path)
    assert tensors["x"].tolist() == [0, 1, 2] and about == {"model": "tiny"}
    with pytest.raises(FileNotFoundError):
        load_table(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="table"):
        load_table(tmp_path / "other.safetensors")
    with pytest.raises(TypeError):
        save_table(path, {"x": [1]})  # type: ignore[dict-item]


def test_long_general_masks_are_refused() -> None:
    layout = TokenLayout((65, 64))
    method = Told(2, block_size=64)
    method.told = Choice(torch.ones(1, 1, 65, 65, dtype=torch.bool))
    q = torch.zeros(1, 1, layout.length, 4)
    mask = torch.zeros(1, 1, 1, layout.length)
    with pytest.raises(UnsupportedError, match="all pairs"):
        method.attend(q, q, q, mask, layout, StepContext(), Layer("x", 0), lambda *a: a[0])


def test_seer_pools_only_what_is_there() -> None:
    torch.manual_seed(4)
    gate = SeerGate(4, 8, 2, block_size=4, pooling="Qmaxavg_Kmaxminavg", hidden_size=6, dtype=torch.float64)
    q, k = torch.randn(2, 4, 10, 8, dtype=torch.float64), torch.randn(2, 2, 10, 8, dtype=torch.float64)
    seen = torch.ones(2, 10, dtype=torch.bool)
    seen[0, 4:8] = False
    seen[1, 9] = False
    got = gate(q, k, None, None, seen)
    assert gate.mask_linear_q is not None
    for b in range(2):
        for head in range(4):
            for i in range(3):
                for j in range(3):
                    rows = q[b, head, 4 * i : 4 * i + 4]
                    columns = k[b, head // 2, 4 * j : 4 * j + 4][seen[b, 4 * j : 4 * j + 4]]
                    if not len(columns):
                        assert got[b, head, i, j] == -math.inf
                        continue
                    one = torch.cat([rows.amax(0), rows.mean(0)]) @ gate.mask_linear_q.weight[head]
                    two = torch.cat([columns.amax(0), columns.amin(0), columns.mean(0)])
                    two = two @ gate.mask_linear_k.weight[head // 2]
                    assert torch.allclose(got[b, head, i, j], one @ two * 6**-0.5, atol=1e-12)


def test_seer_target_in_pieces_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnzoo.generators import seer

    torch.manual_seed(5)
    q, k = torch.randn(1, 4, 22, 8, dtype=torch.float64), torch.randn(1, 2, 22, 8, dtype=torch.float64)
    for causal in (False, True):
        whole = pooled_target(q, k, 4, 0.5, causal=causal)
        logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.5
        if causal:
            logits = logits.masked_fill(torch.ones(22, 22, dtype=torch.bool).triu(1), -math.inf)
        p = F.pad(logits.softmax(-1), (0, 2, 0, 2)).unflatten(3, (6, 4)).amax(4).unflatten(2, (6, 4)).amax(3)
        torch.testing.assert_close(whole, p / p.sum(-1, keepdim=True))
        monkeypatch.setattr(seer, "_CHUNK", 1)
        torch.testing.assert_close(pooled_target(q, k, 4, 0.5, causal=causal), whole)
        monkeypatch.undo()
    before = torch.zeros(1, dtype=torch.bool)
    score = torch.randn(1, 2, 8, 8)
    for ratio in (0.0, 0.3, 0.6, 1.0):
        chosen = choose_by_ratio(score, ratio)
        assert int(chosen.sum()) == 16 * max(1, int(8 * ratio)) and not bool((before & ~chosen).any())
        before = chosen
    assert not bool(choose_by_ratio(score, 1.0, causal=True).triu(1).any())


def test_seer_learns_which_blocks_matter_and_is_saved(tmp_path: Path) -> None:
    case = build("flux")
    torch.manual_seed(6)
    gates = SeerGates.for_model(case.model, block_size=4)
    dense = run(case)
    optimiser = torch.optim.Adam(gates.parameters(), lr=0.02)
    trace = []
    with enable(case.model, "seer", gates=gates, distil=True) as handle:
        (method,) = handle.methods("seer")
        for _ in range(25):
            assert torch.equal(run(case), dense)
            losses = method.take_losses()
            assert len(losses) == 3
            loss = sum(losses.values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            trace.append(float(loss.detach()))
    assert trace[-1] < 0.7 * trace[0]
    gates.save(tmp_path / "gates.safetensors")
    with enable(case.model, "seer", gates=gates, threshold=0.1):
        wanted = run(case)
    with enable(case.model, "seer", gates=str(tmp_path / "gates.safetensors"), threshold=0.1):
        assert torch.equal(run(case), wanted)
    assert not torch.equal(wanted, dense) and torch.equal(run(case), dense)
    with enable(case.model, "seer", gates=gates, nz_ratio=1.0):
        assert torch.equal(run(case), dense)
    some = SeerGates.for_model(case.model, layers="single*", block_size=4)
    with enable(case.model, "seer", gates=some), pytest.raises(UnsupportedError, match="no gate"):
        run(case)
    for options, error, words in (
        ({"gates": 3}, TypeError, "gates"),
        ({"gates": gates, "threshold": 0.1, "nz_ratio": 0.1}, ValueError, "one of threshold"),
        ({"gates": gates, "threshold": 1.1}, ValueError, "threshold"),
        ({}, TypeError, "needs gates"),
    ):
        with pytest.raises(error, match=words):
            enable(case.model, "seer", **options)
    for options, words in (({"pooling": "Qavg"}, "pooling"), ({"block_size": 0}, "block_size")):
        with pytest.raises(ValueError, match=words):
            SeerGate(2, 8, **options)
    target = torch.full((1, 1, 4, 4), 0.25)
    assert float(distillation_loss(torch.zeros(1, 1, 4, 4), target)) == pytest.approx(0.0, abs=1e-7)
