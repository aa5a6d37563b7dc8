"""Training and measuring classifiers: data, weights to start from, the command line, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from training_common import (
    MODEL,
    RANDOM,
    Squares,
    arguments,
    config,
    data,
    folder,
    run_command,
    whole_run,
)

from attnzoo.backbones import training
from attnzoo.backbones.training import data as data_module
from attnzoo.backbones.training import processes as processes_module
from attnzoo.backbones.training import trainer
from attnzoo.errors import ReachError


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch):
    """Drawing takes longer than the tiny runs; the module's `whole` run comes before this and draws."""
    monkeypatch.setattr(trainer.curves, "draw", lambda *args: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return whole_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return run_command(monkeypatch, capsys)


# --------------------------------------------------------------------------------------------------- data and weights


def test_folders_are_read_as_timm_reads_them(tmp_path):
    found = training.folder_data(folder(tmp_path, 9, 4))
    assert found.classes == ("blue", "green", "red") and len(found.train) == 9 and len(found.validation) == 4
    reader = timm.data.create_dataset("", tmp_path, split="train").reader
    assert [found.train[i][1] for i in range(9)] == [target for _, target in reader.samples]
    models = training.folder_data(tmp_path, train=False, classes=("0", "1", "2"))  # as many, other names: by order
    assert [models.validation[i][1] for i in range(4)] == [found.validation[i][1] for i in range(4)]
    for picture in (tmp_path / "val" / "green").iterdir():
        picture.unlink()
    (tmp_path / "val" / "green").rmdir()  # a validation half without one of the classes keeps the labels
    found = training.folder_data(tmp_path)
    assert {found.validation[i][1] for i in range(len(found.validation))} == {0, 2}
    models = training.folder_data(tmp_path, train=False, classes=("red", "violet", "green", "blue"))
    assert {models.validation[i][1] for i in range(len(models.validation))} == {0, 3} and models.train is None
    (tmp_path / "numbers").mkdir()
    for name in ("10", "2", "1"):
        (tmp_path / "numbers" / name).mkdir()
        for i in range(5):
            Squares(1)[0][0].save(tmp_path / "numbers" / name / f"{i}.png")
    halves = training.folder_data(tmp_path / "numbers", split=0.4)
    assert halves.classes == ("1", "2", "10") and len(halves.train) == 9 and len(halves.validation) == 6
    assert halves.fingerprint == training.folder_data(tmp_path / "numbers", split=0.4).fingerprint
    assert halves.fingerprint != training.folder_data(tmp_path / "numbers", split=0.4, seed=1).fingerprint
    few = halves.limited(4, 2)
    assert len(few.train) == 4 and len(few.validation) == 2 and few.fingerprint != halves.fingerprint


def test_hub_data_goes_through_timms_reader(monkeypatch, tmp_path):
    """timm's own reader on a stand-in for the package datasets."""
    Squares(1)[0][0].save(tmp_path / "a.png")
    rows = [{"image": {"bytes": (tmp_path / "a.png").read_bytes()}, "label": 1}]

    class Table(list):
        info = SimpleNamespace(features={"label": SimpleNamespace(names=["no", "yes"])}, splits=None)

        def cast_column(self, *args):
            return self

    def load_dataset(name, split=None, cache_dir=None):
        if name == "org/away":
            raise ConnectionError("no route to the hub")
        return Table(rows * (3 if split == "train" else 2))

    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReachError, match="pip install datasets"):
        training.hub_data("org/name")
    stand_in = SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: None)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: True)
    found = training.hub_data("org/name")
    assert found.classes == ("no", "yes") and (len(found.train), len(found.validation)) == (3, 2)
    picture, label = found.train[2]
    assert picture.size == (48, 48) and label == 1
    with pytest.raises(ReachError, match="hf:org/away.*no route"):
        training.hub_data("org/away")


def test_fine_tuning_starts_from_a_file(tmp_path):
    source = timm.create_model("dinat_mini", num_classes=5, **MODEL)
    save_file(source.state_dict(), tmp_path / "five.safetensors")
    tuned = training.build(config(initial_checkpoint=str(tmp_path / "five.safetensors"), drop_path=0.1), 3)
    assert tuned.num_classes == 3
    same = [name for name, value in tuned.state_dict().items() if not name.startswith("head")]
    assert all(torch.equal(tuned.state_dict()[name], source.state_dict()[name]) for name in same)
    first, second = training.build(config(), 3).state_dict(), training.build(config(seed=1), 3).state_dict()
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_a_part_of_imagenet_is_matched_by_synset(tmp_path):
    from attnzoo.backbones.inference import class_names

    net = timm.create_model("test_resnet", num_classes=1000)
    names = class_names(net)
    assert len(names) == 1000 and names[0] == "n01440764"
    for name in (names[217], names[0]):
        (tmp_path / name).mkdir()
        Squares(1)[0][0].save(tmp_path / name / "a.png")
    found = training.folder_data(tmp_path, train=False, classes=names)
    assert [found.validation[i][1] for i in range(2)] == [0, 217]
    assert training.evaluate(net, found, img_size=48, workers=0, progress=False)["classes"] == 1000
    assert class_names(training.build(config(), 3)) is None


def test_eval_from_the_command_line(run, whole, tmp_path):
    pictures = folder(tmp_path / "data")
    told = tmp_path / "deep" / "figures.json"
    given = ("--data", pictures, "--workers", 0, "--device", "cpu", "--quiet", "-b", 2)
    status, said = run("eval", "classify", "--checkpoint", whole[0] / "best", *given, "--out", told)
    assert status == 0 and json.loads(said) == json.loads(told.read_text())
    by_folder = json.loads(said)
    assert by_folder["images"] == 3 and by_folder["classes"] == 3 and by_folder["images_per_second"] > 0
    status, said = run("eval", "classify", "--model", "resnet18", "--checkpoint", whole[0] / "best", *given)
    assert status == 2 and "resnet18" in said
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=3).state_dict()}, tmp_path / "three.pth")
    status, said = run("eval", "classify", "--model", "test_resnet", "--checkpoint", tmp_path / "three.pth", *given)
    assert status == 0 and json.loads(said)["checkpoint"].endswith("three.pth")
    status, said = run("eval", "classify", "--model", "test_resnt", *given)
    assert status == 2 and "close: " in said and "test_resnet" in said
    status, said = run(
        "eval", "classify", "--model", "miniature", "--data", "miniature", "--max-val-images", 48, *given[2:]
    )
    assert status == 0 and json.loads(said)["top1"] > 0.85


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": "dinat_minni"}, "dinat_minni.*close: dinat_mini"),
        ({"batch_size": 3, "mixup": 0.2}, "batch_size must be even with mixup or cutmix.*got 3"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 2.5}, "epochs must be an int, got float"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"opt": "adamww"}, "opt must be one of"),
        ({"sched": "plateau"}, "sched must be one of"),
        ({"amp": "fp8"}, "amp must be one of 'no', 'bf16'"),
        ({"smoothing": 1.5}, "smoothing"),
        ({"scale": (0.5,)}, "scale must be two numbers"),
        ({"warmup_epochs": 2}, "warmup_epochs must be below epochs=2"),
        ({"model_ema": 1}, "model_ema must be a bool"),
        ({"initial_checkpoint": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_settings_are_refused_by_name(changes, said):
    with pytest.raises((ValueError, TypeError, OSError), match=said):
        config(**changes)


def test_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ReachError, match="nowhere"):
        training.folder_data(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold the folders train and val"):
        training.folder_data(tmp_path / "empty")
    with pytest.raises(ReachError, match="empty.*holds no pictures"):
        training.folder_data(tmp_path / "empty", train=False)
    root = folder(tmp_path / "data")
    with pytest.raises(ValueError, match="train and val already"):
        training.folder_data(root, split=0.1)
    (root / "train" / "violet").mkdir()
    (root / "train" / "violet" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="classes without pictures: violet"):
        training.folder_data(root)
    (root / "train" / "violet").rename(root / "val" / "violet")
    Squares(1)[0][0].save(root / "val" / "violet" / "0.png")
    with pytest.raises(ValueError, match="has 4, train/ has 3; 1 of them.*violet"):
        training.folder_data(root)
    with pytest.raises(ValueError, match="has 4, the model has 3.*blue, green, red"):
        training.folder_data(root, train=False, classes=("a", "b", "c"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_no_picture_is_named(tmp_path, workers):
    root = folder(tmp_path / "data")
    (root / "train" / "red" / "0.png").write_text("not a picture")
    with pytest.raises(ValueError, match="red/0.png' can't be read as a picture") as refused:
        training.train(config(workers=workers), training.folder_data(root), tmp_path / "out", progress=False)
    assert "\n" not in str(refused.value)
    (root / "val" / "red" / "0.png").write_bytes((root / "val" / "green" / "1.png").read_bytes()[:200])
    net = training.build(config(), 3)
    with pytest.raises(ValueError, match="red/0.png' can't be read as a picture"):
        training.evaluate(net, training.folder_data(root, train=False), workers=workers, progress=False)


def test_runs_are_refused_before_anything_is_lost(tmp_path, whole, run, monkeypatch):
    output, _ = whole
    with pytest.raises(ValueError, match="is there already"):
        training.train(config(), data(), output, progress=False)
    other = config(grad_accum=2, **{**RANDOM, "mixup": 0.5})
    with pytest.raises(ValueError, match="other settings: mixup: 0.5 here, 0.4 there$"):
        training.train(other, data(), output, resume="auto", progress=False)
    with pytest.raises(ValueError, match="data train_images: 20 here, 18 there"):
        training.train(config(grad_accum=2, **RANDOM), data(20), output, resume="auto", progress=False)
    with pytest.raises(ReachError, match="holds no checkpoint"):
        training.train(config(), data(), tmp_path / "new", resume=tmp_path, progress=False)
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="full.* is there already"):
        training.train(config(grad_accum=2, **RANDOM), data(), full, resume=output, progress=False)
    with pytest.raises(ValueError, match="full.* holds no run"):
        training.train(config(), data(), full, resume="auto", progress=False)
    with pytest.raises(ValueError, match="last.* holds no run"):
        training.train(config(), data(), output / "last", resume="auto", progress=False)
    with pytest.raises(ValueError, match="18 training pictures don't fill one global batch of 64"):
        training.train(config(batch_size=64), data(), tmp_path / "new", progress=False)
    with pytest.raises(ValueError, match="does not take these arguments.*no_such"):
        training.train(config(model_kwargs={"no_such": 1}), data(), tmp_path / "new", progress=False)
    with pytest.raises(ValueError, match="the model has 5 classes, the data 3"):
        training.evaluate(training.build(config(), 5), data(), workers=0)
    assert not (tmp_path / "new").exists() and [p.name for p in full.iterdir()] == ["precious.txt"]
    monkeypatch.setattr(processes_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"attnzoo\[train\]"):
        training.train(config(), data(), tmp_path / "new", progress=False)


def test_one_run_writes_a_folder_at_a_time(tmp_path):
    calm = config(epochs=1, warmup_epochs=0)
    training.train(calm, data(4, 2), tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    holding = [sys.executable, "-c", hold, str(tmp_path / "run" / "metrics.jsonl")]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="is being written by another run"):
            training.train(calm, data(4, 2), tmp_path / "run", resume="auto", progress=False)
        other.stdin.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    training.train(calm, data(4, 2), tmp_path / "run", resume="auto", progress=False)


def test_bf16_is_refused_where_a_gpu_lacks_it(monkeypatch):
    from attnzoo.backbones.training.config import check_amp

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match="amp 'bf16'.*Tesla T4 does not; use 'no'"):
        check_amp("bf16", torch.device("cuda", 0))
    check_amp("bf16", torch.device("cpu"))
    check_amp("no", torch.device("cuda", 0))


@pytest.mark.parametrize(
    "given, said",
    [
        (("--data", "nowhere"), "nowhere"),
        (("--data", "hf:org/name"), "datasets"),
        (("--data", "miniature", "--split", 0.1), "--split"),
        (("--data", "miniature", "--scale", "a,b"), "--scale"),
        (("--data", "miniature", "--aux-loss", "balance"), "--aux-loss"),
        (("--data", "miniature", "--aux-loss", "balanced=1"), "aux_loss"),
        (("--data", "miniature", "-b", 7, "--cutmix", 1), "batch_size"),
    ],
)
def test_the_command_line_names_what_is_wrong(run, tmp_path, monkeypatch, given, said):
    monkeypatch.setitem(sys.modules, "datasets", None)
    status, told = run(*arguments(tmp_path / "out"), *given)
    assert status == 2 and told.startswith("error: ") and said in told and len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()
