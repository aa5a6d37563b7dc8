"""CLIP models with our towers in open_clip: by name in either import order, trained by its loss, zero-shot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import attnzoo
from attnzoo.backbones import clip_configs
from attnzoo.errors import SeamError
from attnzoo.miniatures import classifiers, training, world

open_clip = pytest.importorskip("open_clip")

FOLDER = Path(attnzoo.__file__).parent / "configs" / "open_clip"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
TINY = "attnzoo_world_clip"
TEMPLATES = ("a photo of a {}.", "a {}", "a picture of a {}")


def python(code: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning:attnzoo", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


# ---------------------------------------------------------------------------------------------------------------- names


# What an import of attnzoo alone leaves: open_clip not imported, one finder that answers as the others do.
ALONE = """
import importlib, importlib.util, sys
import attnzoo
importlib.reload(attnzoo.backbones)
assert "open_clip" not in sys.modules
assert sum(type(f).__module__.startswith("attnzoo") for f in sys.meta_path) == 1
assert importlib.util.find_spec("open_clip").origin.endswith("__init__.py") and "open_clip" not in sys.modules
sys.modules["open_clip"] = None  # as if it were not installed
importlib.reload(attnzoo.backbones)
try:
    attnzoo.backbones.register_open_clip()
    raise SystemExit("no error")
except ModuleNotFoundError as missing:
    assert missing.name == "open_clip"
del sys.modules["open_clip"]
"""
# torch can't be imported by two threads at once; what is ours begins after it.
THREADS = """
import importlib, threading, torch, torchvision, timm
start = threading.Barrier(2)
def run(name):
    start.wait()
    importlib.import_module(name)
threads = [threading.Thread(target=run, args=(name,)) for name in ("attnzoo", "open_clip")]
[t.start() for t in threads], [t.join() for t in threads]
"""


@pytest.mark.parametrize(
    "before", [ALONE + "import attnzoo, open_clip", "import open_clip, attnzoo", THREADS + "import attnzoo, open_clip"]
)
def test_the_names_are_there_in_either_order(before):
    """And nothing but names: open_clip's own configurations and its loader are what they were."""
    said = python(f"""{before}
import json
from importlib.machinery import SourceFileLoader
names = [n for n in open_clip.list_models() if n.startswith("attnzoo")]
model = open_clip.create_model("{TINY}")
print(json.dumps({{
    "names": names, "again": attnzoo.backbones.register_open_clip(), "tower": type(model.visual.trunk).__module__,
    "loader": type(open_clip.__spec__.loader) is SourceFileLoader and open_clip.__loader__ is open_clip.__spec__.loader,
    "others": len(open_clip.list_models()) - len(names), "paths": len(open_clip.factory._MODEL_CONFIG_PATHS),
}}))
""")
    seen = json.loads(said.splitlines()[-1])
    assert seen["names"] == seen["again"] == NAMES and seen["tower"] == "attnzoo.backbones.nat"
    assert seen["loader"] and seen["paths"] == 2 and seen["others"] > 100


def test_an_open_clip_that_takes_nothing_still_imports():
    """The import of a library whose table has changed warns; asking for the names says what is wrong."""
    loaded = []
    own = SimpleNamespace(create_module=lambda spec: None, exec_module=loaded.append, get_filename=lambda: "here")
    changed = ModuleType("open_clip")
    changed.__version__, changed.list_models, changed.add_model_config = "9", list, lambda path: None
    loader = clip_configs._Loader(own)
    changed.__spec__ = ModuleSpec("open_clip", loader)
    with pytest.warns(RuntimeWarning, match="not in open_clip: SeamError: open_clip 9 took no configurations"):
        loader.exec_module(changed)
    assert loaded == [changed] and changed.__spec__.loader is changed.__loader__ is own
    assert loader.get_filename() == "here"
    with pytest.raises(SeamError, match="took no configurations"):
        clip_configs._add(changed)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_builds_with_our_tower(name):
    config = json.loads((FOLDER / f"{name}.json").read_text())
    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta")
    assert type(model.visual.trunk).__module__.startswith("attnzoo.")
    assert model.visual.head.proj.out_features == config["embed_dim"] == model.text_projection.shape[1]
    assert model.visual.image_size == (config["vision_cfg"]["image_size"],) * 2
    assert open_clip.get_tokenizer(name).context_length == config["text_cfg"]["context_length"]


def test_what_create_model_and_transforms_gives_works_together():
    torch.manual_seed(0)
    model, train, look = open_clip.create_model_and_transforms(TINY)
    from PIL import Image

    picture = Image.fromarray(world.sample_scene(np.random.default_rng(0)).image)
    tokens = open_clip.get_tokenizer(TINY)(["a red circle", "a photo of a blue ring."])
    images = torch.stack([look(picture), train(picture)])
    seen, said, scale = model(images, tokens)
    assert seen.shape == said.shape == (2, 64) and scale > 1
    torch.testing.assert_close(seen.norm(dim=-1), torch.ones(2))
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model.train()(images, tokens)[0], seen, rtol=1e-4, atol=1e-5)


def test_a_saved_clip_loads_from_a_local_folder(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(TINY).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(TINY)}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    again = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(images), model.encode_image(images), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------- training


def pictures(scenes) -> torch.Tensor:
    """Scenes as the tower takes them: 48 x 48, open_clip's own mean and standard deviation."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float() / 255 - mean) / std


def batch(rng: np.random.Generator, tokenizer, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """One scene and one sentence of every class in `labels`, so that no two pairs of a batch say the same."""
    scenes = [world.sample_scene(rng, "single", 48, label=int(label)) for label in labels]
    return pictures(scenes), tokenizer([TEMPLATES[rng.integers(3)].format(world.CLASSES[i]) for i in labels])


def fit(model, tokenizer, steps: int, labels, learning_rate: float = 2e-3) -> list[float]:
    """Train by open_clip's ClipLoss and the recipes' loop on the stream "train"."""
    rng, loss = training.generator("train", 0, 30), open_clip.ClipLoss()
    optimizer = {"betas": [0.9, 0.98], "weight_decay": 0.02, "warmup": 50, "final_fraction": 0.01, "clip": 1.0}

    def value(_: int) -> torch.Tensor:
        return loss(*model(*batch(rng, tokenizer, rng.permutation(labels))))

    stage = {"steps": steps, "learning_rate": learning_rate}
    return training.fit(model.parameters(), value, stage, optimizer, "clip", progress=False)


@torch.no_grad()
def zero_shot(model, tokenizer, n: int, labels) -> torch.Tensor:
    """bool [n]: whether the class whose sentences are nearest, among all 24, is the right one; held-out scenes."""
    weights = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, world.CLASSES, TEMPLATES)
    rng = training.generator("test", 0, 30)
    truth = torch.tensor([labels[i % len(labels)] for i in range(n)])
    scenes = [world.sample_scene(rng, "single", 48, label=int(label)) for label in truth]
    seen = model.encode_image(pictures(scenes), normalize=True)
    return (seen @ weights).argmax(-1) == truth


def test_a_training_step_of_clip_lowers_the_loss_and_reaches_both_towers():
    torch.manual_seed(0)
    model, tokenizer = open_clip.create_model(TINY), open_clip.get_tokenizer(TINY)
    images, tokens = batch(np.random.default_rng(0), tokenizer, range(12))
    loss, steps = open_clip.ClipLoss(), []
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4)
    for _ in range(6):
        value = loss(*model(images, tokens))
        optimizer.zero_grad()
        value.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing
        optimizer.step()
        steps.append(value.item())
    assert steps[1] < steps[0] and steps[-1] < 0.8 * steps[0]


def test_zero_shot_runs_on_the_worlds_names():
    torch.manual_seed(0)
    model, tokenizer = open_clip.create_model(TINY), open_clip.get_tokenizer(TINY)
    fit(model.train(), tokenizer, 4, np.arange(24))
    right = zero_shot(model, tokenizer, 24, list(range(24)))
    assert right.shape == (24,) and right.dtype == torch.bool


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three minutes of one free core
def test_a_trained_clip_names_objects_zero_shot():
    """Four of the 24 classes are never shown: their colours and shapes are known, their pairs are not."""
    torch.manual_seed(0)
    model, tokenizer = open_clip.create_model(TINY), open_clip.get_tokenizer(TINY)
    hidden = [world.CLASSES.index(name) for name in ("red square", "blue triangle", "green cross", "yellow circle")]
    shown = [i for i in range(24) if i not in hidden]
    losses = fit(model.train(), tokenizer, 1500, np.array(shown))
    seen, unseen = zero_shot(model, tokenizer, 960, shown), zero_shot(model, tokenizer, 480, hidden)
    print(f"loss {np.mean(losses[-50:]):.3f}; shown {seen.float().mean():.3f}, never shown {unseen.float().mean():.3f}")
    assert seen.float().mean() > 0.5 and unseen.float().mean() > 2 / 24


def test_the_small_tower_is_the_miniature_classifiers():
    import timm

    tower = timm.create_model("dinat_world")
    tower.load_state_dict(classifiers.load("dinat_world").state_dict())
    assert tower.pretrained_cfg["input_size"] == (3, 48, 48) and tower.num_classes == 24
