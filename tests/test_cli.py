"""The command line's doors: each runs its public function on the embedded models and says where the result is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnzoo import catalog, cli
from attnzoo.miniatures import world


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `attnzoo ARGS` in this process; returns (exit status, what it printed)."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["attnzoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out + printed.err

    return call


@pytest.fixture(scope="module")
def scene_png(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, world.Scene]:
    """A single-object scene and a broken one, as files."""
    folder = tmp_path_factory.mktemp("scenes")
    scene = world.sample_scene(np.random.default_rng(3), "single", difficulty="plain")
    Image.fromarray(scene.image).save(folder / "single.png")
    return folder / "single.png", scene


def test_help_names_every_command(run):
    status, said = run("--help")
    assert status == 0
    for command in ("demo", "list", "info", "check", "bench", "classify", "generate", "ask", "serve", "train", "eval"):
        assert command in said


def test_list_and_info_read_the_catalogue(run):
    status, said = run("list")
    assert status == 0 and all(method.name in said for method in catalog.list_methods())
    status, said = run("list", "vlm")
    assert status == 0 and "var" in said and "gna" not in said
    status, said = run("info", "gna")
    assert status == 0 and catalog.get("gna").licence in said
    status, said = run("info")
    assert status == 0 and "torch" in said and "tiled" in said


def test_classify_names_what_is_there(run, scene_png):
    path, scene = scene_png
    status, said = run("classify", path, "--top-k", 1)
    assert status == 0 and world.CLASSES[scene.objects[0].label] in said


def test_classify_with_a_timm_model_and_a_checkpoint(run, scene_png, tmp_path):
    import timm
    from safetensors.torch import save_file

    path, _ = scene_png
    save_file(timm.create_model("nat_mini").state_dict(), tmp_path / "nat_mini.safetensors")
    status, said = run("classify", path, "--model", "nat_mini", "--checkpoint", tmp_path / "nat_mini.safetensors")
    assert status == 0, said


def test_generate_plain_and_with_a_window(run, tmp_path):
    plain, edited, neutral = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "deep" / "c.png"
    common = ("generate", "a red circle", "--steps", 3, "--seed", 5)
    assert run(*common, "--out", plain)[0] == 0
    status, said = run(*common, "--out", edited, "--method", "gna", "--set", "kernel_size=[4,6]", "-s", "stride=2")
    assert status == 0 and str(edited) in said
    assert run(*common, "--out", neutral, "--method", "gna", "--set", "kernel_size=16")[0] == 0
    pixels = [np.asarray(Image.open(p)) for p in (plain, edited, neutral)]
    assert not np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])


def test_ask_plain_and_with_a_method(run, scene_png):
    path, _ = scene_png
    status, said = run("ask", path, "Describe the image.")
    assert status == 0 and "a photo of" in said
    again = run("ask", path, "<image>Describe the image.")[1]
    assert again.splitlines()[0] == said.splitlines()[0]
    status, said = run("ask", path, "<image>Describe the image.", "--method", "pai", "--set", "alpha=0.5")
    assert status == 0 and "a photo of" in said


def test_train_writes_a_model(run, tmp_path):
    status, said = run("train", "miniature", "dinat_digits", "--steps", 1, "--out", tmp_path)
    assert status == 0 and str(tmp_path / "dinat_digits") in said
    assert (tmp_path / "dinat_digits" / "model.safetensors").is_file()


def test_demo_writes_one_page_and_the_same_numbers(run, tmp_path):
    status, said = run("demo", "--out", tmp_path / "outputs", "--quick", "--seed", 1)
    assert status == 0 and said.splitlines()[0] == str(tmp_path / "outputs" / "index.html")
    page = (tmp_path / "outputs" / "index.html").read_text()
    results = json.loads((tmp_path / "outputs" / "results.json").read_text())
    assert "src=" in page and all(part.startswith('"data:image/png') for part in page.split("src=")[1:])
    assert results["generators"]["restored_exactly"] is True
    runs = results["generators"]["runs"]
    assert runs["dense"]["pixel_distance"] == 0 < runs["12 x 12"]["pixel_distance"] < runs["4 x 4"]["pixel_distance"]
    assert runs["4 x 4"]["density"] < runs["8 x 8"]["density"] < runs["12 x 12"]["density"] < 1
    for figures in results["backbones"].values():
        assert figures["interval"][0] <= figures["top1"] <= figures["interval"][1]
    captions = results["vlm"]["runs"]
    assert set(captions) == {"plain", "PAI, alpha 0.2", "PAI, alpha 0.5", "VAR"}
    for name, figures in captions.items():
        assert 0 <= figures["chair_s"] <= 1 and (name == "plain" or len(figures["recall_over_control"]) == 3)


HUNYUAN = ("--grid", "30x48x80", "--kernel-size", "18x24x24", "--stride", "16x8x8", "--head-dim", 128, "--heads", 24)


def test_bench_plan_tells_before_anything_runs(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, said = run("bench", "plan", *HUNYUAN, "--tile", "2x8x8:2x4x8")
    assert status == 0 and "9 % of all query-key pairs" in said and "163,074.540 GFLOP" in said
    assert "11.11 x" in said and "2x8x8" in said and "CPU path" in said and "grad_key_value" in said
    assert said.count("estimate") == 2 and "H100" in said


def test_bench_plan_as_json_is_what_the_function_says(run):
    import torch

    from attnzoo.kernels import plan_neighborhood_attention

    status, said = run("bench", "plan", *HUNYUAN, "--json")
    told = json.loads(said)
    plan = plan_neighborhood_attention((30, 48, 80), (18, 24, 24), (16, 8, 8), head_dim=128, heads=24)
    assert status == 0 and {k: told[k] for k in plan.to_dict()} == json.loads(json.dumps(plan.to_dict()))
    options = ("--dilation", "2x1", "--causal", "0x1", "--border", "mask", "--batch", 3, "--additional-keys", 5)
    status, said = run("bench", "plan", "--grid", "9x8", "--kernel-size", 3, *options, "--dtype", "float32", "--json")
    plan = plan_neighborhood_attention(
        (9, 8), 3, 1, (2, 1), (False, True), border="mask", batch=3, additional_keys=5, dtype=torch.float32
    )
    assert status == 0 and json.loads(said)["forward"]["executed_flops"] == plan.forward.executed_flops
    status, said = run("bench", "plan", "--grid", 64, "--kernel-size", 9, "--causal", 1, "--gpu", "MI300X", "--json")
    assert status == 0 and json.loads(said)["problem"]["is_causal"] == [True]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--grid", "8xx", "--kernel-size", 3), "--grid"),
        (("--grid", "8x8", "--kernel-size", "three"), "--kernel-size"),
        (("--grid", "8x8", "--kernel-size", 9), "kernel_size"),
        (("--grid", "8x8", "--kernel-size", "3x3x3"), "kernel_size"),
        (("--grid", "8x8", "--kernel-size", 3, "--causal", "yes"), "--causal"),
        (("--grid", "8x8", "--kernel-size", 3, "--dtype", "int8"), "--dtype"),
        (("--grid", "8x8", "--kernel-size", 3, "--gpu", "H1000"), "--gpu"),
        (("--grid", "8x8", "--kernel-size", 3, "--tile", "8x8"), "tiles"),
        (("--grid", "8x8", "--kernel-size", 3, "--heads", 0), "heads"),
    ],
)
def test_bench_plan_names_what_is_wrong(run, arguments, named):
    status, said = run("bench", "plan", *arguments)
    assert status == 2 and said.startswith("error: ") and named in said and len(said.splitlines()) == 1


def test_bench_runs_one_operation_or_all_of_them(run, monkeypatch, tmp_path):
    calls = []

    class Runner:
        @staticmethod
        def main(arguments):
            calls.append(arguments)
            return 0

    monkeypatch.setattr(cli, "_beside", lambda name: Runner)
    assert run("bench")[0] == 0
    assert run("bench", "neighborhood_attention", "--device", "cuda")[0] == 0
    assert run("bench", "--threads", 2, "--out", tmp_path / "a.json")[0] == 0
    assert run("bench", "run", "linear_attention", "--flex", "--only", "one case")[0] == 0
    assert calls[0] == ["--device", "cpu", "--threads", "1", "--minutes", "9.0"]
    assert calls[1][:3] == ["neighborhood_attention", "--device", "cuda"]
    assert calls[2][-2:] == ["--json", str(tmp_path / "a.json")] and "2" in calls[2]
    assert calls[3][0] == "linear_attention" and calls[3][-3:] == ["--only", "one case", "--flex"]
    status, said = run("bench", "--help")
    assert status == 0 and "plan" in said and "run" in said


def test_a_missing_extra_is_named(monkeypatch, run):
    def missing(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(cli, "app", missing)
    status, said = run("generate")
    assert status == 2 and "attnzoo[generators]" in said


def test_a_real_process_says_it_on_stderr():
    done = subprocess.run(
        [sys.executable, "-m", "attnzoo", "classify", "missing.png"],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "missing.png" in done.stderr and len(done.stderr.splitlines()) == 1
