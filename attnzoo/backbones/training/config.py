"""The settings of a training run, in timm's words."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import list_optimizers

from attnzoo.errors import ReachError, check_choice, check_flag, check_number, check_range

SCHEDULES = ("cosine", "tanh", "step", "constant", "poly", "none")
#: Settings that change how long a run takes or what it says, not its weights.
NEUTRAL = frozenset({"workers", "log_interval", "checkpoint_interval"})


@dataclass(frozen=True)
class TrainConfig:
    """What a run does; frozen, checked when made, written to the output folder.

    The names are those of timm's train.py. The weights depend on the global batch, batch_size x processes x grad_accum.

    Args:
        model, model_kwargs: timm's name, further arguments of the model.
        pretrained: start from published weights. initial_checkpoint: start from a local file (authors' or ours). Their
            head is replaced where the number of classes differs.
        img_size: side of the input in pixels, None for the model's own.
        epochs; batch_size: images per process and backward pass; grad_accum: backward passes per step.
        opt, lr, weight_decay, momentum, opt_betas, opt_eps, layer_decay: see timm.optim.create_optimizer_v2. No weight
            decay on biases and norms.
        sched, warmup_epochs, warmup_lr, min_lr, decay_epochs, decay_rate: see timm.scheduler.create_scheduler_v2; the
            rate moves every step.
        clip_grad: largest gradient norm, None for no limit.
        drop, drop_path: dropout and stochastic depth, None for the model's own.
        mixup, cutmix, mixup_prob, mixup_switch_prob, mixup_mode, mixup_off_epoch, smoothing: see timm.data.Mixup.
            mixup_mode "batch" draws one mix per step, for all processes; "pair" and "elem" draw per backward pass.
        model_ema, model_ema_decay, model_ema_warmup: see timm.utils.ModelEmaV3. With it the averaged weights are what
            is chosen and exported.
        amp: "no", or "bf16" for autocast.
        no_aug, scale, ratio, hflip, color_jitter, aa, reprob, train_interpolation, crop_pct: see
            timm.data.create_transform.
        sync_bn: batch statistics over all processes. grad_checkpointing: less memory, more time.
        aux_loss: name -> weight, see attnzoo.backbones.training.losses.
        seed: of weights, order, augmentation, mixes and drops.
        workers: reading processes; log_interval: steps per line of metrics; checkpoint_interval: steps between
            checkpoints, 0 for one per epoch (there is one at each epoch's end anyway). They don't change the weights.

    Raises ValueError or TypeError naming the setting.
    """

    model: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    initial_checkpoint: str | None = None
    img_size: int | None = None
    epochs: int = 300
    batch_size: int = 128
    grad_accum: int = 1
    opt: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    momentum: float = 0.9
    opt_betas: tuple[float, ...] | None = None
    opt_eps: float | None = None
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    decay_epochs: float | None = None
    decay_rate: float = 0.1
    clip_grad: float | None = None
    drop: float | None = None
    drop_path: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0
    smoothing: float = 0.1
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    amp: str = "no"
    no_aug: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.4
    aa: str | None = None
    reprob: float = 0.0
    train_interpolation: str = "random"
    crop_pct: float | None = None
    sync_bn: bool = False
    grad_checkpointing: bool = False
    aux_loss: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    workers: int = 4
    log_interval: int = 50
    checkpoint_interval: int = 0

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "opt_betas"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(float(v) for v in value))
        check_model(self.model)
        for name in ("epochs", "batch_size", "grad_accum", "log_interval"):
            _check_int(name, getattr(self, name), 1)
        for name in ("warmup_epochs", "mixup_off_epoch", "seed", "workers", "checkpoint_interval"):
            _check_int(name, getattr(self, name), 0)
        if self.img_size is not None:
            _check_int("img_size", self.img_size, 1)
        for name in (f.name for f in fields(self) if f.type == "bool"):
            check_flag(name, getattr(self, name))
        for name in ("lr", "opt_eps", "layer_decay", "clip_grad", "decay_epochs", "crop_pct"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value)
                if value <= 0:
                    raise ValueError(f"{name} must be above 0, got {value!r}")
        for name in ("weight_decay", "momentum", "warmup_lr", "min_lr", "decay_rate", "mixup", "cutmix"):
            check_number(name, getattr(self, name))
            check_range(name, getattr(self, name), 0.0)
        unit = ("drop", "drop_path", "mixup_prob", "mixup_switch_prob", "smoothing", "model_ema_decay", "hflip")
        for name in (*unit, "reprob"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value)
                check_range(name, value, 0.0, 1.0)
        check_choice("opt", self.opt, list_optimizers())
        check_choice("sched", self.sched, SCHEDULES)
        check_choice("amp", self.amp, ("no", "bf16"))
        check_choice("mixup_mode", self.mixup_mode, ("batch", "pair", "elem"))
        for name, low in (("scale", 0.0), ("ratio", 0.0)):
            pair = getattr(self, name)
            if len(pair) != 2 or not low < pair[0] <= pair[1]:
                raise ValueError(f"{name} must be two numbers, 0 < low <= high, got {pair}")
        if self.mixes and self.batch_size % 2:
            raise ValueError(
                f"batch_size must be even with mixup or cutmix (images are mixed in pairs), got {self.batch_size}"
            )
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ValueError(f"warmup_epochs must be below epochs={self.epochs}, got {self.warmup_epochs}")
        if self.pretrained and self.initial_checkpoint:
            raise ValueError("give pretrained or initial_checkpoint, not both")
        if self.initial_checkpoint and not Path(self.initial_checkpoint).is_file():
            raise ReachError(f"initial_checkpoint {self.initial_checkpoint!r} is not a file")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return json.loads(json.dumps(asdict(self)))

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Settings that would change the mathematics where `other` (a stored `to_dict`) has another value, as "lr: 0.1
        here, 0.2 there"."""
        own = self.to_dict()
        return [
            f"{name}: {own.get(name)!r} here, {other.get(name)!r} there"
            for name in sorted(set(own) | set(other))
            if name not in NEUTRAL and own.get(name) != other.get(name)
        ]


def check_model(name: str) -> None:
    """Raise ValueError, with close names, unless timm knows `name`."""
    if not isinstance(name, str) or not timm.is_model(name):
        close = difflib.get_close_matches(str(name), timm.list_models(), n=4, cutoff=0.5)
        raise ValueError(f"model {name!r} is not a timm model" + (f"; close: {', '.join(close)}" if close else ""))


def check_amp(amp: str, device: torch.device) -> None:
    """Raise ValueError where `device` can't compute in bfloat16 itself."""
    if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"amp 'bf16' needs a GPU that computes in bfloat16 (Ampere or newer), {name} does not; use 'no'"
        )


def _check_int(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    check_range(name, value, low)
