"""Training and measuring classifiers: what a run leaves, exact resume, several processes, auxiliary losses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from torch import nn
from training_common import (
    RANDOM,
    Squares,
    arguments,
    assert_same_run,
    config,
    data,
    figures,
    folder,
    lines,
    run_command,
    whole_run,
)

from attnzoo.backbones import training
from attnzoo.backbones.inference import data_config
from attnzoo.backbones.training import checkpoints, trainer
from attnzoo.backbones.training.data import StepSampler


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


class Killed(BaseException):
    """As sudden as a kill: nothing in the trainer catches it."""


# ------------------------------------------------------------------------------------------------------- a run


def test_a_run_leaves_what_it_promises(whole):
    output, summary = whole
    kinds = [line["kind"] for line in lines(output)]
    assert kinds == ["step", "step", "epoch"] * 2 and summary["steps"] == 4 and summary["global_batch"] == 8
    assert json.loads((output / "summary.json").read_text()) == summary
    stored = json.loads((output / "config.json").read_text())
    assert stored["settings"]["mixup"] == 0.4 and stored["data"]["classes"] == ["red", "green", "blue"]
    with Image.open(output / "curves.png") as plot:
        assert plot.size[0] > 500
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-00000004"]
    assert not list(output.rglob(".*"))
    best = max((x for x in lines(output) if x["kind"] == "epoch"), key=lambda x: x["ema_top1"])
    assert summary["best"]["top1"] == best["ema_top1"]


def test_the_export_is_a_timm_folder(whole):
    output, _ = whole
    net = timm.create_model(f"local-dir:{output / 'last'}", pretrained=True).eval()
    state = load_file(checkpoints.find_checkpoints(output)[0] / "ema.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    cfg = net.pretrained_cfg
    assert list(cfg["label_names"]) == ["red", "green", "blue"] and tuple(cfg["input_size"]) == (3, 48, 48)
    assert "squares" in cfg["notes"][0] and not cfg.get("license")


def test_evaluation_counts_each_picture_and_agrees_with_the_run(whole):
    output, _ = whole
    net = timm.create_model(f"local-dir:{output / 'last'}", pretrained=True)
    told = training.evaluate(net, data(), batch_size=3, workers=0, progress=False)
    last = lines(output)[-1]
    assert told["images"] == 7 and told["top1"] == last["ema_top1"]
    assert told["loss"] == pytest.approx(last["ema_loss"], rel=1e-5) and told["top5"] == 1.0
    transform = create_transform(**data_config(net), is_training=False)
    logits = net.eval()(torch.stack([transform(Squares(7, 1000)[i][0]) for i in range(7)]))
    truth = torch.tensor([i % 3 for i in range(7)])
    assert told["top1"] == pytest.approx(float((logits.argmax(-1) == truth).double().mean()), abs=1e-6)
    assert told["loss"] == pytest.approx(nn.functional.cross_entropy(logits, truth).item(), rel=1e-5)


def test_a_run_changes_nothing_global(tmp_path):
    def look():
        return random.random(), float(np.random.rand()), float(torch.rand(())), dict(PartialState._shared_state)

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before, env = look(), dict(os.environ)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    training.train(config(epochs=1, warmup_epochs=0, amp="bf16"), data(4, 2), tmp_path / "a", progress=False)
    with pytest.raises(FloatingPointError, match="loss"):
        training.train(config(lr=1e30, opt="sgd", warmup_epochs=0), data(), tmp_path / "b", progress=False)
    assert look() == before and dict(os.environ) == env


# ------------------------------------------------------------------------------------------------------- resume


def killed(monkeypatch: pytest.MonkeyPatch, where: str, count: int, run) -> None:
    """Call `run`, and kill it at the `count`-th call of trainer._Run's or a module's function `where`."""
    owner = {"_step": trainer._Run, "save_checkpoint": checkpoints, "export": checkpoints, "replace": os}[where]
    real, calls = getattr(owner, where), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, dying)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize(
    "where, count, interval, workers",
    [
        ("_step", 1, 0, 0),  # before anything: starts anew
        ("_step", 2, 1, 0),  # in the middle of an epoch
        ("_step", 4, 1, 2),  # the same, with reading processes
        ("_step", 4, 0, 0),  # a step whose loss was logged is done again
        ("export", 3, 0, 0),  # between the metrics' line of an epoch and its checkpoint
        ("save_checkpoint", 2, 1, 0),
        ("replace", 9, 1, 0),  # while files are moved into place
        ("replace", 12, 1, 0),
    ],
)
def test_killed_and_resumed_is_never_killed(monkeypatch, tmp_path, whole, where, count, interval, workers):
    output = tmp_path / "run"
    changed = config(grad_accum=2, checkpoint_interval=interval, workers=workers, **RANDOM)

    def run():
        return training.train(changed, data(), output, resume="auto", progress=False)

    killed(monkeypatch, where, count, run)
    with (output / "metrics.jsonl").open("a") as cut:
        cut.write('{"kind": "step", "st')  # a line that the kill cut off
    run()
    assert_same_run(output, whole[0])


def test_killed_twice_and_continued_elsewhere(monkeypatch, tmp_path, whole):
    first, second = tmp_path / "first", tmp_path / "second"
    changed = config(grad_accum=2, checkpoint_interval=1, **RANDOM)
    killed(monkeypatch, "_step", 2, lambda: training.train(changed, data(), first, progress=False))
    (stopped,) = checkpoints.find_checkpoints(first)
    killed(monkeypatch, "_step", 2, lambda: training.train(changed, data(), second, resume=stopped, progress=False))
    training.train(changed, data(), second, resume=second, progress=False)
    assert_same_run(second, whole[0])
    again = training.train(changed, data(), second, resume="auto", progress=False)  # nothing left to do
    assert again["steps"] == 4 and figures(second) == figures(whole[0])


def test_batch_norm_and_any_schedule_resume(monkeypatch, tmp_path):
    """A model that counts its batches and takes no img_size; each of timm's schedules moves the rate every step."""
    rates = {}
    for sched in training.SCHEDULES:
        changed = config(
            model="test_resnet",
            model_kwargs={},
            img_size=32,
            sched=sched,
            decay_epochs=1,
            checkpoint_interval=1,
            batch_size=8,
            drop_path=0.1,
            model_ema=True,
            model_ema_decay=0.5,
            epochs=3,
        )
        output = tmp_path / sched
        if sched == "cosine":
            training.train(changed, data(16, 2), tmp_path / "whole", progress=False)
            again = partial(training.train, changed, data(16, 2), output, progress=False)
            killed(monkeypatch, "_step", 4, again)
            again(resume="auto")
            assert_same_run(output, tmp_path / "whole")
        else:
            training.train(changed, data(16, 2), output, progress=False)
        rates[sched] = [line["lr"] for line in lines(output) if line["kind"] == "step"]
    assert rates.pop("none") == [2e-3] * 6
    for sched, rate in rates.items():
        assert rate[0] == 1e-6 and rate[1] == pytest.approx(1e-3, rel=0.01), sched
    assert rates["constant"][2:] == [2e-3] * 4 and rates["step"][2:] == pytest.approx([2e-4] * 2 + [2e-5] * 2)
    half = [1e-6 + (2e-3 - 1e-6) * 0.5 * (1 + np.cos(np.pi * t / 6)) for t in range(2, 6)]
    assert rates["cosine"][2:] == pytest.approx(half)


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_sigkill_and_resume_from_the_command_line(tmp_path, run):
    pictures = folder(tmp_path / "data", 60, 3)
    given = ("--data", pictures, "--mixup", 0.4, "--model-ema", "--drop-path", 0.2, "--checkpoint-interval", 2)
    killed_run, whole_run = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-m", "attnzoo", *arguments(killed_run, *given)], env=ONE_THREAD)
    metrics, deadline = killed_run / "metrics.jsonl", time.monotonic() + 240
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed_run / "summary.json").exists()
    status, said = run(*arguments(killed_run, *given, "--resume", "auto"))
    assert status == 0 and "best: epoch" in said, said
    assert run(*arguments(whole_run, *given))[0] == 0
    assert_same_run(killed_run, whole_run)


# ------------------------------------------------------------------------------------------- the same global batch


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in lines(output)]


def test_accumulation_sees_the_same_global_batch(tmp_path):
    calm = {"drop_path": 0.0, "mixup": 0.4, "cutmix": 1.0, "reprob": 0.5, "clip_grad": 0.5}
    for name, sizes in (("one", (8, 1)), ("two", (4, 2)), ("four", (2, 4))):
        changed = config(batch_size=sizes[0], grad_accum=sizes[1], **calm)
        training.train(changed, data(), tmp_path / name, progress=False)
    for name in ("two", "four"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_two_processes_give_the_loss_of_one(tmp_path, run):
    """Under torchrun with gloo: each step's loss, and validation of 7 pictures in batches of 2 x 4, each once."""
    pictures = folder(tmp_path / "data", 19, 7)
    given = ("--data", pictures, "--mixup", 0.4, "--cutmix", 1, "--clip-grad", 0.5, "--drop-path", 0.3, "--model-ema")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "attnzoo", *arguments(tmp_path / "two", *given)],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best: epoch") == 1
    assert run(*arguments(tmp_path / "one", *given, "--grad-accum", 2))[0] == 0
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [x["step"] for x in one] == [x["step"] for x in two] == [1, 2, 2, 3, 4, 4]
    for mine, theirs in zip(one, two):
        for key in {"loss", "grad_norm", "top1", "ema_top1", "ema_loss", "images"} & set(mine):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5), key
    assert two[-1]["images"] == 7
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    mine, theirs = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-5) for key in mine)
    (tmp_path / "two" / "metrics.jsonl").unlink()
    status, said = run(*arguments(tmp_path / "two", *given, "--resume", "auto"))
    assert status == 2 and "processes: 1 here, 2 there" in said


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 40), st.integers(0, 3), st.integers(0, 9)
)
def test_chunks_make_up_the_global_batch(batch_size, accumulate, processes, more, epoch, seed):
    count = batch_size * accumulate * processes + more
    ranks = [StepSampler(count, batch_size, accumulate, rank, processes, seed) for rank in range(processes)]
    single = StepSampler(count, batch_size * accumulate * processes, 1, 0, 1, seed)
    single.epoch = epoch
    for sampler in ranks:
        sampler.epoch = epoch
    parts = [list(sampler) for sampler in ranks]
    for step, whole_batch in enumerate(single):
        mirror = dict(zip(whole_batch, reversed(whole_batch)))
        taken = [key for part in parts for own in part[step * accumulate : (step + 1) * accumulate] for key in own]
        assert sorted(taken) == sorted(whole_batch)
        if batch_size % 2 == 0:
            for part in parts:
                for own in part[step * accumulate : (step + 1) * accumulate]:
                    assert all(mirror[key] == other for key, other in zip(own, reversed(own)))
    later = StepSampler(count, batch_size, accumulate, 0, processes, seed)
    later.epoch, later.first = epoch, later.steps - 1
    assert list(later) == parts[0][-accumulate:] and len(later) == accumulate


# ------------------------------------------------------------------------------------------------ auxiliary losses


def test_named_losses_reach_the_models_that_have_them(tmp_path):
    heads = {
        "embed_dims": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_heads": [4, 4, 4, 4],
        "shared_head": [4, 4, 1, 1],
        "routed_head": [0, 0, 2, 2],
    }
    moh = config(
        model="moh_transnext_small_75",
        model_kwargs=heads,
        img_size=64,
        aux_loss={"balance": 0.5},
        epochs=1,
        warmup_epochs=0,
    )
    training.train(moh, data(4, 2), tmp_path / "moh", progress=False)
    assert lines(tmp_path / "moh")[0]["balance"] > 0
    tap = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    adl = config(
        model="tap_fan_tiny_12_p16_224",
        model_kwargs=tap,
        aux_loss={"attention_diversity": 1.0},
        epochs=1,
        warmup_epochs=0,
    )
    training.train(adl, data(4, 2), tmp_path / "adl", progress=False)
    assert "attention_diversity" in lines(tmp_path / "adl")[0]
    for name, why in (("balance", "mixture of heads"), ("attention_diversity", "forward_attentions")):
        with pytest.raises(ValueError, match=f"{name}.*DiNAT.*{why}"):
            training.train(config(aux_loss={name: 1.0}), data(), tmp_path / name, progress=False)
        assert not (tmp_path / name).exists()


def test_a_hook_of_the_users_own_is_added_with_its_weight(tmp_path):
    def spread(net, images, forward):
        logits = forward(images)
        return logits, logits.square().mean()

    few = config(
        drop_path=0.0, epochs=1, warmup_epochs=0, opt="sgd", lr=0.1, smoothing=0.0, weight_decay=0.0, no_aug=True
    )
    hook = training.AuxiliaryLoss("spread", 3.0, spread)
    training.train(few, data(4, 2), tmp_path / "run", auxiliary=[hook], progress=False)
    torch.manual_seed(0)
    net = training.build(few, 3).train()
    transform = create_transform(
        (3, 48, 48),
        is_training=True,
        no_aug=True,
        interpolation="random",
        mean=data_config(net)["mean"],
        std=data_config(net)["std"],
    )
    sampler = StepSampler(4, 4, 1, 0, 1, 0)
    chosen = [Squares(4)[index] for _, index in next(iter(sampler))]
    logits = net(torch.stack([transform(picture) for picture, _ in chosen]))
    extra = logits.square().mean()
    loss = nn.functional.cross_entropy(logits, torch.tensor([label for _, label in chosen]))
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert lines(tmp_path / "run")[0]["spread"] == pytest.approx(extra.item(), rel=1e-6)
    (loss + 3 * extra).backward()
    state = load_file(checkpoints.find_checkpoints(tmp_path / "run")[0] / "model.safetensors")
    rate = lines(tmp_path / "run")[0]["lr"]
    momentum = torch.optim.SGD(net.parameters(), rate, momentum=0.9, nesterov=True)
    momentum.step()
    for name, value in net.state_dict().items():
        assert torch.allclose(state[f"net.{name}"], value, atol=1e-7), name
    with pytest.raises(ValueError, match="different names, got spread, spread"):
        training.train(few, data(4, 2), tmp_path / "two", auxiliary=[hook, hook], progress=False)
    with pytest.raises(ValueError, match="auxiliary: .* here, .*spread.* there"):
        training.train(few, data(4, 2), tmp_path / "run", resume="auto", progress=False)


# -------------------------------------------------------------------------------------------------------- convergence

#: The command of docs/backbones.md, "Training and evaluation".
DOCUMENTED = """
--model dinat_mini -s embed_dim=24 -s depths=[2,2,2] -s num_heads=[2,4,8] -s mlp_ratio=2.0 -s kernel_size=3
-s dilations=[[1,4],[1,2],[1,1]] --data miniature --img-size 48 --crop-pct 1 --scale 1,1 --ratio 1,1 --color-jitter 0
--epochs 8 --warmup-epochs 1 -b 64 --lr 3e-3 --opt-betas 0.9,0.99 --clip-grad 1 --smoothing 0.05 --drop-path 0
--model-ema --model-ema-decay 0.99 --log-interval 20 --workers 1
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_documented_run_learns_the_world(run, tmp_path):
    """8 walks through 12,000 pictures of 24 classes; 1,200 others decide (0.94 when the bar was set)."""
    status, said = run("train", "classify", *DOCUMENTED.split(), "--output", tmp_path / "dinat", "--device", "cpu")
    assert status == 0, said
    status, said = run(
        "eval", "classify", "--checkpoint", tmp_path / "dinat" / "best", "--data", "miniature", "--quiet"
    )
    told = json.loads(said)
    assert told["images"] == 1200 and told["top1"] >= 0.9
