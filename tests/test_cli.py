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
    for command in ("demo", "list", "info", "check", "bench", "classify", "generate", "ask", "serve", "train"):
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
