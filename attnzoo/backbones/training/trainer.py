"""The training loop: timm's parts on accelerate.

Every random number is a function of (seed, place in the run), see `rng`; so a run that was killed and resumed has, on a
CPU, the weights of one that was not, to the bit, and the same global batch over several processes or backward passes
gives the same loss but for rounding (models with batch norm see smaller batches: sync_bn).
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import Mixup, create_transform
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from attnzoo.backbones.inference import _is_reach, _sentence, data_config
from attnzoo.backbones.training import checkpoints, curves, rng
from attnzoo.backbones.training.config import TrainConfig, check_amp
from attnzoo.backbones.training.data import ClassificationData, StepSampler, Transformed, checked, collate
from attnzoo.backbones.training.evaluation import measure, validation_loader
from attnzoo.backbones.training.losses import AuxiliaryLoss, Task, named_losses
from attnzoo.backbones.training.processes import accelerated, check_extras
from attnzoo.backbones.weights import build_for, checkpoint_state, load_published
from attnzoo.errors import ReachError

__all__ = ["build", "train"]


def build(config: TrainConfig, num_classes: int) -> nn.Module:
    """The model of `config` with `num_classes` outputs, its weights drawn by the seed or loaded.

    Raises ValueError for arguments that the model does not take and weights that do not fit, ReachError for published
    weights that can't be reached.
    """
    given = {"img_size": config.img_size, "drop_rate": config.drop, "drop_path_rate": config.drop_path}
    arguments = {key: value for key, value in given.items() if value is not None} | config.model_kwargs
    try:
        net = _create(config, num_classes, arguments)
    except TypeError as error:
        if "'img_size'" not in str(error) or "img_size" in config.model_kwargs:
            raise ValueError(f"model {config.model!r} does not take these arguments: {error}") from error
        # A model of any size, such as a ResNet: only the pictures get the size.
        return build(replace(config, img_size=None), num_classes)
    if config.grad_checkpointing:
        net.set_grad_checkpointing(True)  # type: ignore[operator]
    return net


def _create(config: TrainConfig, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    with rng.isolated(config.seed, rng.WEIGHTS):
        return _create_or_load(config, num_classes, arguments)


def _create_or_load(config: TrainConfig, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    if config.initial_checkpoint:
        state = checkpoint_state(config.initial_checkpoint)
        cfg = timm.models.get_pretrained_cfg(config.model)
        net = build_for(config.model, state, cfg.to_dict() if cfg else {}, **arguments)
        load_published(net, config.initial_checkpoint)
        if net.num_classes != num_classes:
            net.reset_classifier(num_classes)  # type: ignore[operator]
        return net
    try:
        return timm.create_model(config.model, pretrained=config.pretrained, num_classes=num_classes, **arguments)
    except Exception as error:
        if config.pretrained and _is_reach(error):
            why = f"the published weights of {config.model!r} can't be reached ({_sentence(error)})"
            raise ReachError(f"{why}: give initial_checkpoint, a file that you downloaded") from error
        raise


def train(
    config: TrainConfig,
    data: ClassificationData,
    output: str | Path,
    *,
    resume: str | Path | None = None,
    auxiliary: Sequence[AuxiliaryLoss] = (),
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Train a classifier into the folder `output`; returns what its summary.json says.

    Args:
        config: the settings. data: pictures to train on and to validate with after each epoch.
        output: see `checkpoints` for what is written; must be empty or not there unless `resume` is given.
        resume: "auto" continues the newest checkpoint of `output`, or starts where there is none; a path continues a
            checkpoint from elsewhere in `output`. Settings and data must be those it was made with, except `NEUTRAL`.
        auxiliary: losses besides those that config.aux_loss names; see `losses`.
        device: "auto" (accelerate's choice) or "cpu".

    Under `accelerate launch` or torchrun every process calls it; the first writes.
    Raises ValueError (settings, data or a checkpoint that don't fit), ReachError (files), FloatingPointError at a loss
    that is not finite; the checkpoints before it stay.
    """
    check_extras()
    output = Path(output)
    if data.train is None:
        raise ValueError(f"data ({data.source}) has no training pictures")
    if resume is None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"output {str(output)!r} is there already: give another folder, or resume 'auto' to continue it"
        )
    with rng.restored(), accelerated(device, config.amp, config.grad_accum) as accelerator:
        check_amp(config.amp, accelerator.device)
        run = _Run(accelerator, config, data, output, [*named_losses(config.aux_loss), *auxiliary])
        run.begin(resume)
        try:
            run.loop(progress and accelerator.is_main_process)
        finally:
            run.metrics.close()
        return run.finish()


class _Run:
    """One run: what it is made of, where it stands (`done` steps), what it has measured."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        data: ClassificationData,
        output: Path,
        auxiliary: Sequence[AuxiliaryLoss],
    ) -> None:
        assert data.train is not None
        self.accelerator, self.config, self.data, self.output = accelerator, config, data, output
        self.weights = {loss.name: loss.weight for loss in auxiliary}
        processes, rank = accelerator.num_processes, accelerator.process_index
        self.sampler = StepSampler(len(data.train), config.batch_size, config.grad_accum, rank, processes, config.seed)
        net = build(config, len(data.classes))
        if config.sync_bn and processes > 1:
            net = convert_sync_batchnorm(net)
        self.input = data_config(net, img_size=config.img_size, crop_pct=config.crop_pct)
        task = Task(net, auxiliary)
        optimizer = create_optimizer_v2(net, **self._optimizer_arguments())
        self.scheduler, epochs = create_scheduler_v2(
            optimizer,
            config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            decay_epochs=config.decay_epochs,
            decay_rate=config.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=self.sampler.steps,
        )
        assert epochs == config.epochs
        self.task, self.optimizer = accelerator.prepare(task, optimizer)
        self.net: nn.Module = accelerator.unwrap_model(self.task).net
        self.ema = None
        if config.model_ema:
            self.ema = ModelEmaV3(self.net, config.model_ema_decay, use_warmup=config.model_ema_warmup)
        self.mix, self.criterion = self._mix_and_criterion()
        self.batches = self._training_loader()
        self.held = validation_loader(accelerator, data.validation, self.input, config.batch_size, config.workers)
        self.steps = config.epochs * self.sampler.steps
        self.done = 0
        self.best: dict[str, Any] = {}
        self.window, self.epoch_loss = _Mean(accelerator), _Mean(accelerator)
        self.seconds = 0.0

    def _optimizer_arguments(self) -> dict[str, Any]:
        config = self.config
        given = {"betas": config.opt_betas, "eps": config.opt_eps, "layer_decay": config.layer_decay}
        return {
            "opt": config.opt,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "momentum": config.momentum,
            **{key: value for key, value in given.items() if value is not None},
        }

    def _mix_and_criterion(self) -> tuple[Mixup | None, nn.Module]:
        config = self.config
        if config.mixes:
            mix = Mixup(
                config.mixup,
                config.cutmix,
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                mode=config.mixup_mode,
                label_smoothing=config.smoothing,
                num_classes=len(self.data.classes),
            )
            return mix, SoftTargetCrossEntropy()
        if config.smoothing:
            return None, LabelSmoothingCrossEntropy(config.smoothing)
        return None, nn.CrossEntropyLoss()

    def _training_loader(self) -> DataLoader:
        config = self.config
        transform: Any = create_transform(
            input_size=self.input["input_size"],
            is_training=True,
            no_aug=config.no_aug,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.aa,
            re_prob=config.reprob,
            re_mode="pixel",
            interpolation=config.train_interpolation,
            mean=self.input["mean"],
            std=self.input["std"],
        )
        assert self.data.train is not None
        mode = "L" if self.input["input_size"][0] == 1 else "RGB"
        return DataLoader(
            Transformed(self.data.train, transform, mode, config.seed),
            batch_sampler=self.sampler,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            collate_fn=collate,
            generator=torch.Generator(),
            pin_memory=self.accelerator.device.type == "cuda",
        )

    # ----------------------------------------------------------------------------------------------- begin and resume

    def description(self) -> dict[str, Any]:
        """What a resumed run must agree with."""
        assert self.data.train is not None
        return {
            "settings": self.config.to_dict() | {"auxiliary": self.weights},
            "processes": self.accelerator.num_processes,
            "data": {
                "source": self.data.source,
                "train_images": len(self.data.train),
                "validation_images": len(self.data.validation),
                "classes": list(self.data.classes),
                "fingerprint": self.data.fingerprint,
            },
        }

    def begin(self, resume: str | Path | None) -> None:
        """Start, or put back the checkpoint that `resume` means; refuse one of another run before anything is lost."""
        checkpoint = None if resume is None else checkpoints.find_resume(resume, self.output)
        origin = self.output
        if checkpoint is not None:
            inside = checkpoint.parent.name == checkpoints.FOLDER
            origin = checkpoint.parent.parent if inside else checkpoint
        elsewhere = origin.resolve() != self.output.resolve()
        if elsewhere and self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"output {str(self.output)!r} is there already, and resume means a run in {str(origin)!r}")
        own = self.description()
        stored = None
        if checkpoint is not None:
            stored = checkpoints.stored_config(checkpoint)
        elif resume is not None and self.output.exists():
            stored = checkpoints.begun(self.output)
        if stored is not None:
            self._refuse_another(stored, own, checkpoint or self.output)
        source = None
        if checkpoint is not None:
            progress = checkpoints.load_checkpoint(self.accelerator, checkpoint, self.ema)
            self.done, self.best, self.seconds = progress["step"], progress["best"], progress["seconds"]
            self.window.load(progress["window"])
            self.epoch_loss.load(progress["epoch_loss"])
            source = origin / checkpoints.METRICS if elsewhere else None
        main = self.accelerator.is_main_process
        self.accelerator.wait_for_everyone()  # no process looks at the folder any more: now it may be written to
        if main:
            self.output.mkdir(parents=True, exist_ok=True)
            for name in ("last", "best"):
                if elsewhere and (origin / name).is_dir():
                    shutil.copytree(origin / name, self.output / name)
        self.metrics = checkpoints.Metrics(self.output / checkpoints.METRICS, self.done, main, source)
        self.metrics.lines = broadcast_object_list([self.metrics.lines])[0]
        if main:
            checkpoints.write_json(self.output / checkpoints.CONFIG, own)
        self.accelerator.wait_for_everyone()

    def _refuse_another(self, stored: dict[str, Any], own: dict[str, Any], where: Path) -> None:
        different = self.config.differences(
            {key: value for key, value in stored["settings"].items() if key != "auxiliary"}
        )
        if stored["settings"]["auxiliary"] != self.weights:
            different.append(f"auxiliary: {self.weights} here, {stored['settings']['auxiliary']} there")
        if stored["processes"] != own["processes"]:
            different.append(f"processes: {own['processes']} here, {stored['processes']} there")
        for key in ("train_images", "validation_images", "classes", "fingerprint"):
            if stored["data"][key] != own["data"][key]:
                told = (f"{own['data'][key]} here, {stored['data'][key]} there") if key != "classes" else "other names"
                different.append(f"data {key}: {told}")
                break
        if different:
            raise ValueError(f"resume {str(where)!r} was made with other settings: {'; '.join(different)}")

    # ------------------------------------------------------------------------------------------------------- the loop

    def loop(self, progress: bool) -> None:
        config, per_epoch = self.config, self.sampler.steps
        with tqdm(total=self.steps, initial=self.done, desc=config.model, disable=not progress, mininterval=1.0) as bar:
            while self.done < self.steps:
                epoch, self.sampler.first = divmod(self.done, per_epoch)
                self.sampler.epoch = epoch
                if self.mix is not None and config.mixup_off_epoch:
                    self.mix.mixup_enabled = epoch < config.mixup_off_epoch
                batches = iter(self.batches)
                for _ in range(self.sampler.first, per_epoch):
                    start = time.perf_counter()
                    figures = self._step(batches)
                    self.seconds += time.perf_counter() - start
                    self.done += 1
                    bar.update()
                    self._log(epoch, figures, bar)
                    last = self.done % per_epoch == 0
                    if not last and config.checkpoint_interval and self.done % config.checkpoint_interval == 0:
                        self._checkpoint()
                self._end_epoch(epoch, bar)
                self._checkpoint()

    def _step(self, batches: Any) -> dict[str, Any]:
        """One optimiser step; its loss goes into the running means."""
        config, accelerator = self.config, self.accelerator
        if self.scheduler is not None:
            self.scheduler.step_update(self.done)
        self.task.train()
        losses: dict[str, Tensor] = {}
        norm: Tensor | None = None
        for micro in range(config.grad_accum):
            images, target = (t.to(accelerator.device, non_blocking=True) for t in checked(next(batches)))
            chunk = self.sampler.chunk(micro)
            if self.mix is not None:
                place = (self.done,) if config.mixup_mode == "batch" else (self.done, chunk)
                np.random.seed(rng.derive(config.seed, rng.MIX, *place) % 2**32)  # timm's Mixup draws from numpy's
                images, target = self.mix(images, target)
            rng.reseed(config.seed, rng.STEP, self.done, chunk)
            with accelerator.accumulate(self.task):
                logits, extra = self.task(images)
                parts = {"loss": self.criterion(logits, target), **extra}
                total = parts["loss"] + sum(self.weights[name] * value for name, value in extra.items())
                accelerator.backward(total)
                if accelerator.sync_gradients and config.clip_grad is not None:
                    norm = accelerator.clip_grad_norm_(self.net.parameters(), config.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in parts.items():
                losses[name] = losses.get(name, 0.0) + value.detach().float() / config.grad_accum
        if self.ema is not None:
            self.ema.update(self.net, step=self.done + 1)
        self.window.add(losses)
        self.epoch_loss.add(losses)
        return {"lr": max(group["lr"] for group in self.optimizer.param_groups), "grad_norm": norm}

    def _log(self, epoch: int, figures: dict[str, Any], bar: Any) -> None:
        if self.done % self.config.log_interval and self.done % self.sampler.steps:
            return
        count, means = self.window.take()
        self._check_finite(means)
        line = {"kind": "step", "epoch": epoch, "step": self.done, **means, "lr": figures["lr"]}
        if figures["grad_norm"] is not None:
            line["grad_norm"] = float(figures["grad_norm"])
        line["images_per_second"] = round(self.done * self.sampler.global_batch / self.seconds, 1)
        self.metrics.add(line)
        bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)

    def _check_finite(self, means: dict[str, float]) -> None:
        for name, value in means.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {self.done}: try a lower lr, clip_grad or a longer warm-up"
                )

    def _end_epoch(self, epoch: int, bar: Any) -> None:
        """Validate, note, export."""
        _, means = self.epoch_loss.take()
        line: dict[str, Any] = {"kind": "epoch", "epoch": epoch + 1, "step": self.done, "train_loss": means["loss"]}
        nets = {"": self.net} | ({"ema_": self.ema.module} if self.ema is not None else {})
        for prefix, net in nets.items():
            if self.accelerator.num_processes > 1:
                distribute_bn(net, self.accelerator.num_processes, reduce=True)
            net.eval()
            figures = measure(self.accelerator, net, self.held, len(self.data.classes))
            line |= {prefix + key: figures[key] for key in ("loss", "top1", "top5")}
        line["images"] = figures["images"]
        self.metrics.add(line)
        prefix, net = list(nets.items())[-1]
        chosen = {key: line[prefix + key] for key in ("top1", "top5", "loss")} | {"epoch": epoch + 1, "step": self.done}
        better = not self.best or chosen["top1"] > self.best["top1"]
        if better:
            self.best = chosen
        if self.accelerator.is_main_process:
            for name in ("last", "best") if better else ("last",):
                self._export(net, self.output / name)
        if not bar.disable:
            said = f"epoch {epoch + 1}: loss {chosen['loss']:.4f}, top-1 {100 * chosen['top1']:.2f} %"
            bar.write(f"{said}, top-5 {100 * chosen['top5']:.2f} % of {figures['images']}", file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def _export(self, net: nn.Module, folder: Path) -> None:
        about: dict[str, Any] = {"notes": [f"trained by attnzoo on {self.data.source}"]}
        if not (self.config.pretrained or self.config.initial_checkpoint):
            about["license"] = None  # the published weights' licence is not that of weights trained from scratch
        checkpoints.export(net, folder, self.config.model_kwargs, self.input, self.data.classes, about)

    def _checkpoint(self) -> None:
        state = {"window": self.window.state(), "epoch_loss": self.epoch_loss.state()}
        for part in state.values():
            self._check_finite(part["sums"])
        self.metrics.sync()
        progress = {"step": self.done, "best": self.best, "seconds": self.seconds, **state}
        checkpoints.save_checkpoint(self.accelerator, self.output, self.ema, progress, self.description())

    def finish(self) -> dict[str, Any]:
        """Write summary.json and curves.png."""
        epochs = [line for line in self.metrics.lines if line["kind"] == "epoch"]
        summary = {
            "model": self.config.model,
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "data": self.data.source,
            "epochs": self.config.epochs,
            "steps": self.done,
            "global_batch": self.sampler.global_batch,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "best": self.best,
            "last": epochs[-1],
            "averaged_weights": self.config.model_ema,
            "training_seconds": round(self.seconds, 1),
            "images_per_second": round(self.done * self.sampler.global_batch / self.seconds, 1),
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        if self.accelerator.is_main_process:
            checkpoints.write_json(self.output / "summary.json", summary)
            curves.draw(self.metrics.lines, self.output / "curves.png", f"{self.config.model} on {self.data.source}")
            for stale in self.output.glob(".*.tmp"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        self.accelerator.wait_for_everyone()
        return summary


class _Mean:
    """Means of named losses over steps, and over processes when taken. Tensors until then: no waiting for a GPU."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no float64
        self.count = 0
        self.sums: dict[str, Any] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        self.count += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.to(self.dtype)

    def take(self) -> tuple[int, dict[str, float]]:
        state = self.state()
        self.count, self.sums = 0, {}
        return state["count"], {name: value / state["count"] for name, value in state["sums"].items()}

    def state(self) -> dict[str, Any]:
        """{"count", "sums"}, the mean over processes."""
        if not self.sums:
            return {"count": self.count, "sums": {}}
        device = self.accelerator.device
        stacked = torch.stack([torch.as_tensor(v, dtype=self.dtype, device=device) for v in self.sums.values()])
        whole = self.accelerator.reduce(stacked, "mean")
        return {"count": self.count, "sums": dict(zip(self.sums, whole.tolist()))}

    def load(self, state: dict[str, Any]) -> None:
        self.count, self.sums = state["count"], dict(state["sums"])
