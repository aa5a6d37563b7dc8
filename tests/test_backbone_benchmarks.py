"""Benchmarks of whole backbones without a stopwatch: what is counted, refused and kept, and the docs' table."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import attnzoo.kernels as kernels  # noqa: E402
from attnzoo.backbones import complexity  # noqa: E402
from attnzoo.kernels.flops import flop_formulas  # noqa: E402
from benchmarks import backbone_cases, backbone_table, backbones, gpu, gpu_backbones, measuring, plotting  # noqa: E402

# -- what is counted ---------------------------------------------------------------------------------------------------


def flops(function: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        function()
    return counter.get_total_flops()


def sdpa(tokens: int, keys: int, heads: int, dim: int) -> int:
    """FLOPs that torch counts for dense attention."""
    q, k = torch.randn(2, heads, tokens, dim), torch.randn(2, heads, keys, dim)
    return flops(lambda: torch.softmax(q @ k.mT, -1) @ k)


def test_a_window_over_the_whole_map_counts_as_dense_attention() -> None:
    x = torch.randn(2, 5, 7, 3, 8)
    assert flops(lambda: kernels.neighborhood_attention(x, x, x, (5, 7))) == sdpa(35, 35, 3, 8)
    more = torch.randn(2, 4, 3, 8)
    made = flops(lambda: kernels.neighborhood_attention(x, x, x, (5, 7), additional_keys=more, additional_values=more))
    assert made == sdpa(35, 39, 3, 8)


@pytest.mark.parametrize("border", ["shift", "mask", "zero"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_counts_the_pairs_that_are_seen(border: str, causal: bool) -> None:
    """Seen by the logits: finite, and of border "zero" only where a real key stands."""
    x = torch.rand(1, 9, 6, 2, 8) + 1.0
    options: dict[str, Any] = {
        "kernel_size": (3, 2),
        "dilation": (2, 1),
        "is_causal": (causal, False),
        "border": border,
    }
    logits = kernels.neighborhood_logits(x, x, **options)
    pairs = int((torch.isfinite(logits) & (logits != 0)).sum())
    assert flops(lambda: kernels.neighborhood_attention(x, x, x, **options)) == 2 * pairs * 16


def test_the_other_operators_count_as_what_they_stand_for() -> None:
    x, agents = torch.randn(2, 30, 3, 8), torch.randn(2, 5, 3, 8)
    assert flops(lambda: kernels.pooled_attention(x, x, x, agents)) == 2 * sdpa(30, 5, 3, 8)
    q = x.transpose(1, 2)
    assert flops(lambda: kernels.linear_attention(x, x, x)) == flops(lambda: q @ (q.mT @ q))
    image = torch.randn(1, 6, 4, 2, 8)
    positions = torch.rand(1, 3, 2, 2, 5, 2)
    read = 2 * 4 * (3 * 2 * 2 * 5) * 16  # four pixels of a key and of a value, a window's position and head
    made = flops(lambda: kernels.sampled_window_attention(image, image, image, positions, 2))
    assert made == 2 * 24 * 2 * 5 * 16 + read


def test_the_count_is_the_same_on_the_meta_device_and_of_a_plain_model_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(2), nn.Linear(9, 5)).eval()
    found = complexity(model, 8)
    assert (found.parameters, found.macs) == (4 * 27 + 4 + 50, 4 * 27 * 9 + 4 * 45)
    small = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "kernel_size": 3, "num_classes": 5}
    there = complexity(timm.create_model("nat_mini", **small).eval(), (32, 40))
    assert there == complexity("nat_mini", (32, 40), **small)
    assert there.by_operator["attnzoo.neighborhood_attention"] == 9 * (2 * 16 * 80 * 2 + 2 * 32 * 20)
    assert sum(there.by_operator.values()) == there.macs


def test_what_complexity_refuses() -> None:
    with pytest.raises(ValueError, match="no name that timm knows"):
        complexity("dinat_huge")
    with pytest.raises(ValueError, match="eval"):
        complexity(nn.Linear(1, 1), 8)
    with pytest.raises(ValueError, match="image_size"):
        complexity(nn.Linear(1, 1).eval())
    with pytest.raises(ValueError, match="kwargs"):
        complexity(nn.Linear(1, 1).eval(), 8, depth=2)
    with pytest.raises(ValueError, match="too small"):
        complexity("dinat_tiny", 64)


# -- the table ---------------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "backbones_table.md"


def page() -> dict[str, list[str]]:
    """The cells by model."""
    return backbone_table.cells_of(PAGE.read_text())


def test_the_page_has_every_model() -> None:
    ours = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("attnzoo")}
    assert ours <= set(page()) == {name for name, _ in backbone_table.models()}


def test_new_times_into_a_counted_page(tmp_path: Path) -> None:
    results = json.loads(backbones.RESULTS.read_text())
    results["times"]["dinat_tiny@224"]["ratio"] = 123.45
    changed = tmp_path / "results.json"
    changed.write_text(json.dumps(results))
    counted = PAGE.read_text()
    again = backbone_table.table(changed, counted)
    assert "123.45 x swin_tiny" in again and "123.45" not in counted
    assert backbone_table.table(backbones.RESULTS, counted) == backbone_table.table(backbones.RESULTS, again) == counted
    with pytest.raises(ValueError, match="dinat_tiny"):
        backbone_table.table(changed, counted.replace("| dinat_tiny |", "| dinat_teeny |"))


def test_the_pages_times_are_those_of_the_results() -> None:
    times = json.loads(backbones.RESULTS.read_text())["times"]
    for name, row in page().items():
        assert row[-1] == backbone_table.time_cell(name, times), name
    told = PAGE.read_text()
    for found in times.values():
        assert found["revision"] in told and found["machine"] in told
        assert found["low"] <= found["ratio"] <= found["high"]


def first_of_each() -> list[str]:
    """A model of every method."""
    found: dict[str, str] = {}
    for name, method in backbone_table.models():
        found.setdefault(method.name, name)
    return list(found.values())


@pytest.mark.parametrize("name", first_of_each())
def test_the_page_says_what_is_counted(name: str) -> None:
    method = dict(backbone_table.models())[name]
    assert page()[name][:-1] == backbone_table.row(name, method)


@pytest.mark.slow
def test_the_page_says_what_is_counted_of_every_model() -> None:
    assert PAGE.read_text() == backbone_table.table(backbones.RESULTS)


def test_top1_of_notes() -> None:
    assert backbone_table.top1(("28M parameters, 4.3 GFLOPs, top-1 82.7 % in the authors' table",)) == "82.7"
    assert backbone_table.top1(("top-1 error 22.52 % in the authors' table",)) == "77.48"
    assert backbone_table.top1(("no weights published",)) == "-"


# -- times -------------------------------------------------------------------------------------------------------------


def test_ratios_are_of_runs_in_turns() -> None:
    now, order = [0.0], []

    def takes(name: str, *seconds: float) -> Any:
        costs = itertools.cycle(seconds)

        def run() -> None:
            order.append(name)
            now[0] += next(costs)

        return run

    found = measuring.paired_ratio(takes("a", 9.0, 1.0, 2.0, 3.0), takes("b", 9.0, 2.0, 2.0, 2.0), 3, lambda: now[0])
    assert found == pytest.approx((0.75, 1.0, 1.25)) and order == ["a", "b"] * 4
    order.clear()
    medians = measuring.turns({"a": takes("a", 1.0), "b": takes("b", 4.0)}, 2, lambda: now[0])
    assert medians == pytest.approx({"a": 1.0, "b": 4.0}) and order == ["a", "b"] * 3


SMALL = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "kernel_size": 3, "num_classes": 3}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Miniatures in the places of the models."""

    def build(name: str, size: int, **_: Any) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("nat_mini", **SMALL).eval()

    monkeypatch.setattr(backbone_cases, "build", build)


def test_nothing_is_timed_before_its_outputs_are_right(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    assert backbones.main(["times", "nat_mini@32", "--runs", "2", "--out", str(out)]) == 0
    kept = json.loads(out.read_text())["times"]["nat_mini@32"]
    assert kept["peer"] == backbone_cases.PEERS["nat_mini"] and kept["ratio"] > 0 and kept["revision"]
    assert "x the time of" in capsys.readouterr().out
    plain = backbones._plain
    monkeypatch.setattr(backbones, "_plain", lambda model, x: plain(model, x) * 1.001)
    assert backbones.main(["times", "nat_mini@32", "--runs", "2", "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "outputs are wrong" in said and "x the time" not in said


def test_agreement_falls_back_to_float64() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)

    def rounded(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) * (1 + 1e-3 * (x.dtype == torch.float32))

    assert backbones.agree(rounded, lambda m, x: m(x), model, x)
    assert not backbones.agree(lambda m, x: m(x) * 1.001, lambda m, x: m(x), model, x)
    assert model.weight.dtype == torch.float32


def test_cares_softmax_host_is_softmax_attention() -> None:
    mixer = backbone_cases.SoftmaxCARE(12, 3, 1).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    query, key = mixer.qk(x).flatten(2).chunk(2, 1)
    made = mixer._attend(x).flatten(2)
    for head in range(3):
        weights = torch.softmax(query[:, head, :, None] * key[:, head, None], -1)
        torch.testing.assert_close(made[:, head], (weights @ x.flatten(2)[:, head, :, None])[..., 0])


def test_curves_are_drawn(tmp_path: Path) -> None:
    found = {"sizes": [224, 512], "times": {"ours": [1.0, 2.0], "theirs": [1.0, 4.0]}}
    assert plotting.plot_curves({"A": found, "B": found}, tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, word",
    [(["times", "resnet99"], "NAME"), (["times", "--runs", "0"], "--runs"), (["curves", "dinat_tiny"], "NAME")],
)
def test_arguments_that_cannot_be(arguments: list[str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        backbones.main(arguments)


# -- the GPU's rows ----------------------------------------------------------------------------------------------------


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"models": ["nat_mini"], "sizes": [224], "passes": ["forward", "training"], "minutes": 5.0, **given}
    )


def test_the_dry_run_lists_every_row(capsys: pytest.CaptureFixture) -> None:
    assert gpu_backbones.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu_backbones.MODELS) * 3 * 2
    assert lines[0] == "dinat_tiny/224/forward: batch 64; ours, ours, flex, swin_tiny_patch4_window7_224"
    assert not any("flex" in line for line in lines if line.startswith("agent"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a GPU"):
            gpu_backbones.main([])
    with pytest.raises(ValueError, match="--sizes"):
        gpu_backbones.main(["--sizes", "333", "--dry-run"])


def test_rows_are_checked_timed_and_kept(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_backbones, "BATCHES", {224: 2})
    monkeypatch.setattr(gpu_backbones, "FLEX", ())  # it compiles for minutes on a CPU
    runs = []

    def timer(run: Any) -> float:
        runs.append(run())
        return 4.0

    def memory(run: Any) -> int:
        run()
        return 3 << 20

    def go() -> bool:
        kept = gpu.Kept(tmp_path, {"gpu": "none"})
        return gpu_backbones.run_rows(options(), kept, "cpu", timer, memory, lambda: 0.0)

    assert go()
    said = capsys.readouterr().out
    assert "ours: 500 images/s, 3 MiB" in said and "swin_tiny_patch4_window7_224: 500" in said
    forward, training = runs[0], runs[-1]
    assert forward.dtype == torch.bfloat16 and not forward.requires_grad and training.requires_grad
    assert math.isfinite(training.item())
    count = len(runs)
    assert go() and len(runs) == count  # all of it was kept
    assert "ours: 500 images/s" in capsys.readouterr().out

    monkeypatch.setattr(gpu_backbones, "right", lambda *_: False)
    kept = gpu.Kept(tmp_path / "wrong", {"gpu": "none"})
    assert not gpu_backbones.run_rows(options(), kept, "cpu", timer, memory, lambda: 0.0)
    said = capsys.readouterr().out
    assert "no speed" in said and "images/s" not in said and len(runs) == count


def test_a_contender_that_fails_is_named(small: None) -> None:
    def timer(run: Any) -> float:
        raise RuntimeError("out of memory")

    row = gpu_backbones.measure("nat_mini", 32, "forward", 1, "cpu", timer, lambda run: 1)
    assert not row["images"] and not row["mib"] and set(row["absent"].values()) == {"out of memory"}
