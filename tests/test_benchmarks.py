"""The benchmarks without a stopwatch: what is refused, what is kept, how tiles are searched; timers are made up."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from attnzoo.kernels import neighborhood_attention  # noqa: E402
from attnzoo.kernels.neighborhood_attention import table  # noqa: E402
from benchmarks import checking, gpu, gpu_timing, gpu_tuning, measuring, ops, plotting, tuning  # noqa: E402
from benchmarks import neighborhood_attention as cases_of  # noqa: E402

SMALL = {"batch": 2, "grid": (9, 8), "heads": 2, "head_dim": 8, "kernel_size": 3}


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_relative_error_sees_what_is_wrong() -> None:
    a = torch.ones(4)
    assert measuring.relative_error([a, None], [a, None]) == 0.0
    assert measuring.relative_error([a * 1.5], [a]) == pytest.approx(0.5)
    assert measuring.relative_error([a * torch.nan], [a]) == float("inf")
    assert measuring.relative_error([torch.ones(3)], [a]) == float("inf")
    assert measuring.relative_error([None], [a]) == 1.0 and measuring.relative_error([a], [None]) == 2.0
    assert measuring.relative_error([None], [torch.zeros(3)]) == 0.0


def test_medians_share_the_time_and_name_what_cannot_run() -> None:
    now, order = [0.0], []

    def takes(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    def broken() -> None:
        raise RuntimeError("no backward on this device\nsecond line")

    runs = {"ours": takes("ours", 0.1), "slow": takes("slow", 2.0), "fast": takes("fast", 0.01), "broken": broken}
    taken, absent = measuring.medians(runs, 5, 4.0, clock=lambda: now[0], wall=lambda: now[0])
    assert taken == pytest.approx({"ours": 100.0, "slow": 2000.0, "fast": 10.0})
    assert absent == {"broken": "no backward on this device"}
    assert order.count("slow") == 1 and order.count("ours") == 6 and order.count("fast") == 6
    assert order[3:7] == ["ours", "fast", "ours", "fast"]  # interleaved, after one run each
    order.clear()
    measuring.medians({"ours": takes("ours", 1.0)}, 5, 0.1, clock=lambda: now[0], wall=lambda: now[0])
    assert order.count("ours") == 3


def test_extra_memory_is_what_is_let_go_again() -> None:
    def run() -> Tensor:
        wasted = torch.zeros(1 << 20)
        return wasted[:1] + 1.0

    kept = measuring.extra_memory(run)
    assert 4 << 20 <= kept < 5 << 20
    assert measuring.extra_memory(lambda: torch.zeros(1 << 20)) == 0


def test_matmul_rate_is_of_the_clock() -> None:
    ticks = itertools.count()
    assert measuring.matmul_rate(lambda: next(ticks) * 0.5, size=64) == 2 * 64**3 / 0.5


# -- the runner on a CPU -----------------------------------------------------------------------------------------------


def module(wrong: float = 0.0, cases: tuple[str, ...] = ("one", "two"), **more: Any) -> SimpleNamespace:
    """An operation: softmax of a matrix, whose "ours" is off by `wrong`."""

    def contenders(case: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
        x = torch.randn(16, 16, requires_grad=True)

        def no_backward() -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("forward only")
            return torch.softmax(x, 0) * 2

        functions = {
            "ours": lambda: torch.softmax(x, 0) * (1 + wrong),
            "reference": lambda: torch.softmax(x, 0),
            "dense": lambda: x * 1.0,
            "authors": lambda: torch.softmax(x, 0) + 0,
            "another": no_backward,
            "flex": lambda: pytest.fail("flex must not run on a CPU"),
        }
        return functions, [x], torch.randn(16, 16)

    return SimpleNamespace(CASES={name: {} for name in cases}, contenders=contenders, **more)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `benchmarks.ops` over made-up operations; returns (status, what it printed)."""

    def run(found: dict[str, Any], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(ops, "discover", lambda: found)
        status = ops.main([*arguments, "--repeats", "2"])
        return status, capsys.readouterr().out

    return run


def test_operations_are_found_by_their_modules() -> None:
    found = ops.discover()
    assert found["neighborhood_attention"] is cases_of
    assert not {"ops", "gpu", "tuning", "measuring", "checking", "plotting"} & set(found)
    for name, operation in found.items():
        assert operation.CASES and all(isinstance(case, dict) for case in operation.CASES.values()), name
        json.dumps(operation.CASES, default=str)


def test_every_operation_is_timed_and_kept(runner, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    found = {"first": module(useful_flops=lambda case: (10, 30)), "second": module(cases=("three",))}
    status, said = runner(found, "--json", str(out))
    assert status == 0 and all(word in said for word in ("first", "second", "one", "two", "three", "authors"))
    assert "another (another result)" in said and "another: forward only" in said
    kept = json.loads(out.read_text())["operations"]
    assert set(kept["first"]) == {"one", "two"} and set(kept["second"]) == {"three"}
    report = kept["first"]["one"]
    assert report["error"] == 0.0 and report["other_result"] == ["another"]
    assert set(report["ms"]["forward"]) == {"ours", "dense", "authors", "another"}
    assert set(report["ms"]["forward + backward"]) == {"ours", "dense", "authors"}
    assert set(report["wall_ms_2_threads"]["forward"]) == {"ours", "dense"}
    forward, both = report["of_sgemm"].values()
    assert forward == pytest.approx(10 / (report["ms"]["forward"]["ours"] * 1e6 * report["sgemm_gflops"]))
    assert both > 0 and "of_sgemm" in kept["second"]["three"] and kept["second"]["three"]["of_sgemm"] == {}


def test_no_speed_for_a_wrong_result(runner, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    status, said = runner({"first": module(wrong=1e-3)}, "first", "--only", "two", "--json", str(out))
    assert status == 1 and "two: no speed: relative error 1.0e-03" in said and "one" not in said.split("sgemm")[1]
    assert set(json.loads(out.read_text())["operations"]["first"]["two"]) == {"error"}
    status, said = runner({"first": module(wrong=float("nan"))})
    assert status == 1 and said.count("no speed") == 2


def test_what_the_time_did_not_reach_is_named(runner) -> None:
    status, said = runner({"first": module()}, "--minutes", "1e-9")
    assert status == 1 and said.count("not measured") == 2


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["convolution"], "neighborhood_attention"),
        (["--only", "nothing"], "56x56 k7"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--threads", "0"], "threads"),
        (["--repeats", "0"], "repeats"),
        (["--minutes", "0"], "minutes"),
    ],
)
def test_bad_arguments_of_the_runner(arguments: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ops.main(arguments)


def test_a_real_case(runner) -> None:
    small = SimpleNamespace(CASES={"small": SMALL}, contenders=cases_of.contenders, useful_flops=cases_of.useful_flops)
    status, said = runner({"neighborhood_attention": small})
    assert status == 0 and "forward + backward" in said


def test_neighborhood_cases_are_what_they_say() -> None:
    for name, case in {**cases_of.CASES, **cases_of.GPU_CASES}.items():
        told = cases_of.plan(case)
        assert told.problem.grid == case["grid"] and told.problem.batch == case["batch"], name
        if "batch" in name:
            assert name.endswith(f"batch {case['batch']}")
    wanted = [((56, 56), batch, d) for batch in (1, 8) for d in (1, 8)] + [
        ((28, 28), batch, d) for batch in (1, 8) for d in (1, 4)
    ]
    there = [(case["grid"], case["batch"], case.get("dilation", 1)) for case in cases_of.CASES.values()]
    assert set(wanted) <= set(there)
    forward, both = cases_of.useful_flops(cases_of.CASES["56x56 k7"])
    assert forward == 4 * 56 * 56 * 49 * 4 * 32 and both == 3.5 * forward


# -- checks by sampled queries -----------------------------------------------------------------------------------------

CHECKED = {
    "2-D": SMALL,
    "stride and dilation": {**SMALL, "kernel_size": (3, 4), "stride": (1, 2), "dilation": (3, 1), "head_dim": 16},
    "causal": {**SMALL, "grid": (30,), "kernel_size": 9, "is_causal": True, "batch": 1},
    "mask, 3-D": {**SMALL, "grid": (3, 5, 4), "kernel_size": 4, "border": "mask"},
    "bias": {**SMALL, "bias": True},
}


@pytest.mark.parametrize("name", CHECKED)
def test_sampled_results_are_the_references(name: str) -> None:
    case = CHECKED[name]
    qkv, bias, grad = cases_of.tensors({**case, "batch": 1}, "cpu", torch.float64)
    bias = None if bias is None else bias.double()
    problem = cases_of.plan({**case, "batch": 1}).problem
    rows = checking.sampled_rows(problem, problem.num_tokens + 2)  # all of them: the whole gradients
    assert rows.tolist() == list(range(problem.num_tokens))

    def reference(*tensors: Tensor | None) -> Tensor:
        return neighborhood_attention(*tensors[:3], **cases_of.options_of(case), bias=tensors[3], backend="reference")

    got = checking.got(reference, qkv, bias, grad, rows)
    wanted = checking.wanted(qkv, bias, grad, problem, rows)
    assert len(got) == len(wanted) == 4 + bool(case.get("bias"))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=1e-9, atol=1e-11)
    sdpa = checking.got(checking.sdpa(problem, rows), qkv, bias, grad, rows)
    for a, b in zip(sdpa, wanted):
        torch.testing.assert_close(a.double(), b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["2-D", "bias"])
def test_a_case_is_held_to_its_bars(name: str, dtype: torch.dtype) -> None:
    found = gpu_timing.check(CHECKED[name], "cpu", dtype, samples=12)
    assert found["ok"], found
    assert found["bars"]["out"] == 1e-5 if dtype == torch.float32 else 1e-4 < found["bars"]["out"] < 1e-1


def test_a_wrong_gradient_is_seen() -> None:
    qkv, _, grad = cases_of.tensors(SMALL, "cpu", torch.float32)
    problem = cases_of.plan({**SMALL, "batch": 1}).problem

    def wrong(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        stale = key.detach() + 0.999 * (key - key.detach())  # the value is right, the gradient of key is not
        return neighborhood_attention(query, stale, value, 3)

    found = checking.check(wrong, [t.detach() for t in qkv], None, grad, problem, 10)
    assert not found["ok"] and found["errors"]["grad_key"] > 1e-4 and found["errors"]["out"] < 1e-5


def test_samples_hold_the_corners() -> None:
    problem = cases_of.plan(SMALL).problem
    rows = checking.sampled_rows(problem, 10)
    assert rows[0] == 0 and rows[-1] == 71 and len(rows) <= 10 and len(set(rows.tolist())) == len(rows)


# -- the search --------------------------------------------------------------------------------------------------------

HALF = tuning.Group("forward", 2, 128, 2, ("FLUX 4K k80 s16", "FLUX 4K k80"))


def test_groups_follow_the_cases() -> None:
    made = tuning.groups(cases_of.GPU_CASES, [torch.float32, torch.bfloat16, torch.float16], tuning.KERNELS)
    assert len(made) == 18 and len(set(made)) == 18
    assert [group.itemsize for group in made] == [2] * 9 + [4] * 9
    assert made[0] == HALF and made[0].cases == HALF.cases
    assert not any("bias" in name for group in made for name in group.cases)


@pytest.mark.parametrize(
    "group", tuning.groups(cases_of.GPU_CASES, [torch.float32, torch.float16], tuning.KERNELS), ids=str
)
def test_candidates_begin_with_todays_and_may_all_fit(group: tuning.Group) -> None:
    contents = table.packaged()
    entries = gpu_tuning.entries_of(group, contents, 0)
    today = table.config(group.kernel, group.rank, group.dims, group.dims, group.itemsize, False, "cuda")
    configs = [tuning.config_of(entry, group, contents) for entry in entries]
    assert configs[0] == today and len(set(configs)) == len(configs) > 20
    for cfg in configs[1:]:
        assert tuning.shared_floor(cfg, group) <= tuning.SHARED_LIMIT
        assert tuning.floats_per_thread(cfg, group) <= max(high for _, high in tuning.FLOATS.values())
    assert gpu_tuning.entries_of(group, contents, 5) == entries[:5]


def entry(number: int) -> dict[str, Any]:
    return {"queries": 64, "keys": 64, "warps": 4, "stages": number}


def test_the_search_takes_the_fastest_that_fits() -> None:
    costs = {0: 10.0, 1: 8.0, 2: 1.0, 3: 5.0, 4: 6.0}
    measured: list[int] = []

    def cost(candidate: dict[str, Any]) -> float:
        measured.append(candidate["stages"])
        if candidate["stages"] == 4:
            raise ArithmeticError("results differ")
        return costs[candidate["stages"]]

    found = tuning.search(
        [entry(n) for n in range(5)], lambda e: "spills 8 B" if e["stages"] == 2 else None, cost, seconds=60
    )
    assert found.entry == entry(3) and found.cost == 5.0 and found.baseline == 10.0
    assert [note.get("cost") for note in found.tried] == [10.0, 8.0, None, 5.0, None]
    assert found.tried[2]["reason"] == "spills 8 B" and "results differ" in found.tried[4]["reason"]
    assert measured == [0, 1, 3, 4, 0, 3, 1]  # the best are measured again beside today's


def test_the_search_keeps_todays_unless_another_is_clearly_better() -> None:
    found = tuning.search([entry(0), entry(1)], lambda e: None, lambda e: 10.0 - 0.1 * e["stages"], seconds=60)
    assert found.entry == entry(0) and found.cost == found.baseline


def test_the_search_stops_in_time() -> None:
    now = [0.0]

    def cost(candidate: dict[str, Any]) -> float:
        now[0] += 1.0
        return 10.0 - candidate["stages"]

    found = tuning.search([entry(n) for n in range(9)], lambda e: None, cost, seconds=3.5, clock=lambda: now[0])
    assert [note.get("reason") for note in found.tried] == [None] * 4 + ["no time left"] * 5
    assert found.entry == entry(3)


def test_todays_entry_must_be_measurable() -> None:
    def cost(candidate: dict[str, Any]) -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        tuning.search([entry(0)], lambda e: None, cost, seconds=1)


def every_config(contents: dict[str, Any]) -> dict[tuple, table.Config]:
    table.use_table(contents)
    try:
        keys = itertools.product(table.KERNELS, (1, 2, 3), (32, 64, 128, 256), (2, 4), (False, True), ("cuda", "hip"))
        return {(k, r, d, i, b, m): table.config(k, r, d, d, i, b, m) for k, r, d, i, b, m in keys}
    finally:
        table.use_table(None)


def test_a_merged_table_changes_one_kind_of_call() -> None:
    packaged = json.dumps(table.packaged())
    before = every_config(table.packaged())
    best = {"queries": [8, 16], "keys": 128, "warps": 8, "stages": 3}
    made = tuning.merged(table.packaged(), HALF, best)
    after = every_config(made)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {("forward", 2, 128, 2, False, "cuda")}
    assert after[changed.pop()] == table.Config((1, 8, 16), (1, 16, 8), 8, 3)
    assert tuning.current(HALF, made) == best and json.dumps(table.packaged()) == packaged
    assert tuning.with_choice(made, HALF, best) is made


def test_a_table_is_written_as_the_packaged_one_is(tmp_path: Path) -> None:
    assert tuning.dumps(table.packaged()) + "\n" == tuning.packaged_path().read_text()
    path = tmp_path / "new" / "table.json"
    assert tuning.read_table(path) == table.packaged()
    made = tuning.merged(tuning.read_table(path), HALF, entry(3))
    tuning.write_table(path, made)
    assert tuning.read_table(path) == made and [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_tuning_goes_group_by_group_and_survives_one_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    other = tuning.Group("grad_query", 2, 32, 2, ("DiNAT 56x56 k7 batch 64",))
    broken = tuning.Group("forward", 2, 128, 3, ("HunyuanVideo k18x24x24",))
    kept: list[tuple[str, tuning.Choice]] = []

    def bench_of(group: tuning.Group, contents: dict[str, Any]) -> Any:
        if group == broken:
            raise RuntimeError("CUDA out of memory")
        return lambda e: 1.0 if e["stages"] == 2 and e["warps"] == 8 else 2.0

    made = gpu_tuning.tune(
        [HALF, broken, other],
        table.packaged(),
        seconds=60,
        most=6,
        bench_of=bench_of,
        fits_of=lambda group, entries: lambda e: None,
        keep=lambda group, choice: kept.append((str(group), choice)),
    )
    said = capsys.readouterr().out
    assert [name for name, _ in kept] == [str(HALF), str(other)]
    assert "not searched: CUDA out of memory" in said
    assert tuning.current(HALF, made) == tuning.current(HALF, table.packaged())  # it had stages 2, warps 8 already
    assert tuning.current(other, made)["warps"] == 8
    assert tuning.current(broken, made) == tuning.current(broken, table.packaged())


def test_tuning_without_time_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def never(*arguments: Any) -> Any:
        pytest.fail("there was no time")

    made = gpu_tuning.tune([HALF], table.packaged(), 0.0, 6, never, never, never)
    assert made == table.packaged() and "no time left" in capsys.readouterr().out


def test_large_cases_are_tuned_with_few_heads() -> None:
    assert gpu_tuning.tuning_case(cases_of.GPU_CASES["FLUX 4K k80"])["heads"] == gpu_tuning.TUNE_HEADS
    dinat = cases_of.GPU_CASES["DiNAT 28x28 k7 batch 64"]
    assert gpu_tuning.tuning_case(dinat) == dinat


@pytest.mark.slow
def test_a_candidate_is_compiled_ahead() -> None:
    from attnzoo.kernels.aot import TARGETS

    pytest.importorskip("triton")
    group = tuning.Group("forward", 2, 32, 2, ("DiNAT 56x56 k7 batch 64",))
    case, contents = cases_of.GPU_CASES[group.cases[0]], table.packaged()
    small = {"queries": 16, "keys": 16, "warps": 4, "stages": 2}
    found = tuning.resources_of(group, case, small, contents, TARGETS["sm_90"])
    assert found["faults"] == [] and found["shared"] >= tuning.shared_floor(
        tuning.config_of(small, group, contents), group
    )


# -- the command for a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line() -> None:
    with pytest.raises(ValueError, match="needs a GPU") as refused:
        gpu.main([])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--parts", "check,polish"], "--parts"),
        (["--cases", "FLUX"], "FLUX 4K k80"),
        (["--dtypes", "float64"], "--dtypes"),
        (["--passes", ""], "--passes"),
        (["--minutes", "0"], "--minutes"),
        (["--most", "-1"], "--most"),
        (["--table", "nowhere.json"], "nowhere.json"),
        (["--tune-out", str(tuning.packaged_path())], "--tune-out"),
        (["--compile", "sm_90"], "--dry-run"),
        (["--dry-run", "--compile", "gfx942"], "sm_80"),
    ],
)
def test_bad_arguments_of_the_gpu_command(arguments: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        gpu.main(arguments)


def test_a_dry_run_lists_cases_peers_and_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    for name in cases_of.GPU_CASES:
        for dtype in gpu.DTYPES:
            assert f"check/{name}/{dtype}" in said
            assert f"time/{name}/{dtype}/forward" in said and f"time/{name}/{dtype}/backward" in said
    for peer in (*gpu_timing.PEERS, "97.435", "283.327", "7.914", "10.601", "23.359", "29.109", "79.043", "84.417"):
        assert peer in said
    assert said.count("\ntune/") == 18 and '"stages": 3' in said
    lines = said.splitlines()
    assert not any("flex" in line for line in lines if "float32" in line or "/float16" in line)
    assert gpu.main(["--dry-run", "--parts", "time", "--cases", "FLUX 4K k80", "--dtypes", "float16"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "] == [
        "check/FLUX 4K k80/float16",
        "time/FLUX 4K k80/float16/forward",
        "time/FLUX 4K k80/float16/backward",
    ]


@pytest.fixture
def small_gpu_cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    published = {"by": "somebody", "dense": 100.0, "kernel": 10.0, "with permutation": 20.0}
    made = {
        "near k3": {**SMALL, "published": published},
        "far k3": {**SMALL, "dilation": 2},
        "bias k3": CHECKED["bias"],
    }
    monkeypatch.setattr(cases_of, "GPU_CASES", made)
    return made


def run_steps(folder: Path, timer: Any, *arguments: str) -> tuple[bool, gpu.Kept]:
    options = gpu._arguments(["--parts", "time", "--dtypes", "float32,float16", "--out", str(folder), *arguments])
    kept = gpu.Kept(folder, {"gpu": "none"})
    ticks = itertools.count()
    return gpu.run_steps(options, kept, "cpu", timer, 1e6, lambda: float(next(ticks))), kept


def test_steps_are_checked_timed_kept_and_not_repeated(small_gpu_cases, tmp_path: Path, capsys) -> None:
    timed = []

    def timer(run: Any) -> float:
        run()
        timed.append(run)
        return float(len(timed))

    good, kept = run_steps(tmp_path, timer)
    said = capsys.readouterr().out
    assert good and "right; nearest to its bar" in said and "theirs, not measured here" in said
    assert len(kept.contents["steps"]) == 3 * 2 + 3 * 2 * 2
    first = kept.get("time/near k3/float16/forward")
    assert {"ours", "dense flash"} <= set(first["ms"]) and "dense cuDNN" in first["absent"]
    assert first["speedup"] == first["ms"][first["dense"]] / first["ms"]["ours"]
    assert first["share_of_bound"] == pytest.approx(first["speedup"] / first["bound"])
    assert first["published"]["speedup"] == {"kernel": 10.0, "with permutation": 5.0}
    assert "published" not in kept.get("time/near k3/float32/forward")
    other = kept.get("time/far k3/float16/forward")  # the same tensors: dense peers are not timed again
    assert other["ms"]["dense flash"] == first["ms"]["dense flash"] and other["absent"].keys() == first["absent"].keys()
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert on_disk["steps"].keys() == kept.contents["steps"].keys()
    before = len(timed)
    good, _ = run_steps(tmp_path, timer)
    assert good and len(timed) == before
    with pytest.raises(ValueError, match="another"):
        gpu.Kept(tmp_path, {"gpu": "another"})


def test_a_case_that_is_wrong_gets_no_speed(small_gpu_cases, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "check", lambda *a: {"ok": False, "errors": {"out": 1.0}, "bars": {"out": 1e-5}})
    good, kept = run_steps(tmp_path, lambda run: pytest.fail("timed"), "--cases", "near k3")
    said = capsys.readouterr().out
    assert not good and "WRONG" in said and "not known to be right" in said
    assert not any(key.startswith("time") for key in kept.contents["steps"])


def test_what_the_gpu_time_did_not_reach_is_named(small_gpu_cases, tmp_path: Path, capsys) -> None:
    options = gpu._arguments(["--parts", "time", "--dtypes", "float32", "--out", str(tmp_path)])
    good = gpu.run_steps(options, gpu.Kept(tmp_path, {}), "cpu", lambda run: 1.0, 0.0, lambda: 1.0)
    assert not good and capsys.readouterr().out.count("not run, the 25 minutes are over") == 9


def test_the_plot_is_drawn_from_what_was_kept(small_gpu_cases, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="time"):
        plotting.plot(tmp_path / "results.json", tmp_path / "times.png")
    run_steps(tmp_path, lambda run: 2.0)
    assert gpu.main(["--parts", "plot", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "times.png").stat().st_size > 10_000
    assert set(plotting.panels(json.loads((tmp_path / "results.json").read_text()))) == {
        (dtype, what) for dtype in ("float32", "float16") for what in gpu.PASSES
    }
