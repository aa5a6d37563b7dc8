"""`attnzoo train classify` and `attnzoo eval classify`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.commands.options import pairs_as_dict

_DATA = "A folder (train/ and val/, a folder per class in each), hf:ORG/NAME, or miniature (the synthetic world)."
Data = Annotated[str, typer.Option(help=_DATA)]
Split = Annotated[float | None, typer.Option(help="Hold this share of each class back, of one folder of classes.")]
Workers = Annotated[int, typer.Option(help="Reading processes per process.")]
Amp = Annotated[str, typer.Option(help="no, or bf16 for autocast.")]
Device = Annotated[str, typer.Option(help="auto, or cpu.")]
ImgSize = Annotated[int | None, typer.Option(help="Side of the input in pixels; the model's own without it.")]
CropPct = Annotated[float | None, typer.Option(help="Share of a validation picture that is seen.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="An argument of the model, KEY=VALUE; VALUE is read as JSON, else as text."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def find_data(name: str, split: float | None, train: bool, classes: Any = None, seed: int = 0, **splits: str) -> Any:
    """The data that --data names."""
    from attnzoo.backbones import training

    if name == "miniature" or name.startswith("hf:"):
        if split is not None:
            raise ValueError(f"--split is for folders, --data {name} has its own validation pictures")
        if name == "miniature":
            from attnzoo.miniatures.pictures import world_data

            return world_data()
        return training.hub_data(name.removeprefix("hf:"), train=train, **splits)
    return training.folder_data(name, split, train=train, classes=classes, seed=seed)


def _several(option: str, text: str | None) -> tuple[float, ...] | None:
    """`0.5,1` as numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise ValueError(f"{option} takes numbers such as 0.5,1; got {text!r}") from error


def train_classify(
    model: Annotated[str, typer.Option(help="The timm name of the model, such as dinat_mini.")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for metrics, checkpoints, weights and the plot.")],
    resume: Annotated[
        str | None, typer.Option(help="auto: continue what --output holds, or start; or a checkpoint's folder.")
    ] = None,
    settings: Settings = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the published weights.")] = False,
    initial_checkpoint: Annotated[str | None, typer.Option(help="Start from this file of weights.")] = None,
    split: Split = None,
    train_split: Annotated[str, typer.Option(help="Of hf: data.")] = "train",
    val_split: Annotated[str, typer.Option(help="Of hf: data.")] = "validation",
    max_train_images: Annotated[int | None, typer.Option(help="Only so many, drawn by the seed.")] = None,
    max_val_images: Annotated[int | None, typer.Option(help="Only so many, drawn by the seed.")] = None,
    img_size: ImgSize = None,
    epochs: Annotated[int, typer.Option(help="Walks through the training pictures.")] = 300,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Per process and backward pass.")] = 128,
    grad_accum: Annotated[int, typer.Option(help="Backward passes per step.")] = 1,
    opt: Annotated[str, typer.Option(help="One of timm's optimisers.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate, of the whole batch: it is not scaled.")] = 5e-4,
    weight_decay: Annotated[float, typer.Option(help="Not for biases and norms.")] = 0.05,
    momentum: Annotated[float, typer.Option(help="Of optimisers that have one.")] = 0.9,
    opt_betas: Annotated[str | None, typer.Option(help="Such as 0.9,0.99.")] = None,
    opt_eps: Annotated[float | None, typer.Option(help="The optimiser's epsilon.")] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Learning rate factor per layer, from the head down.")
    ] = None,
    sched: Annotated[str, typer.Option(help="cosine, tanh, step, constant, poly or none.")] = "cosine",
    warmup_epochs: Annotated[int, typer.Option(help="Epochs of linear warm-up.")] = 5,
    warmup_lr: Annotated[float, typer.Option(help="Where the warm-up starts.")] = 1e-6,
    min_lr: Annotated[float, typer.Option(help="Where the schedule ends.")] = 1e-6,
    decay_epochs: Annotated[float | None, typer.Option(help="Of sched step.")] = None,
    decay_rate: Annotated[float, typer.Option(help="Of sched step; the power of poly.")] = 0.1,
    clip_grad: Annotated[float | None, typer.Option(help="Largest gradient norm.")] = None,
    drop: Annotated[float | None, typer.Option(help="Dropout.")] = None,
    drop_path: Annotated[float | None, typer.Option(help="Stochastic depth.")] = None,
    mixup: Annotated[float, typer.Option(help="Alpha; 0 is off.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Alpha; 0 is off.")] = 0.0,
    mixup_prob: Annotated[float, typer.Option(help="Share of mixed batches.")] = 1.0,
    mixup_switch_prob: Annotated[float, typer.Option(help="Share of cutmix where both are on.")] = 0.5,
    mixup_mode: Annotated[str, typer.Option(help="batch, pair or elem.")] = "batch",
    mixup_off_epoch: Annotated[int, typer.Option(help="No mixes from this epoch on; 0 is never.")] = 0,
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.1,
    model_ema: Annotated[bool, typer.Option("--model-ema", help="Average the weights, and export these.")] = False,
    model_ema_decay: Annotated[float, typer.Option(help="Of the average.")] = 0.9998,
    model_ema_warmup: Annotated[bool, typer.Option("--model-ema-warmup", help="A smaller decay at first.")] = False,
    amp: Amp = "no",
    no_aug: Annotated[bool, typer.Option("--no-aug", help="Training pictures are only resized and cropped.")] = False,
    scale: Annotated[str, typer.Option(help="Area of random crops, LOW,HIGH.")] = "0.08,1",
    ratio: Annotated[str, typer.Option(help="Aspect ratio of random crops, LOW,HIGH.")] = "0.75,1.3333333333333333",
    hflip: Annotated[float, typer.Option(help="Chance of a mirror image.")] = 0.5,
    color_jitter: Annotated[float, typer.Option(help="Brightness, contrast and saturation.")] = 0.4,
    aa: Annotated[str | None, typer.Option(help="timm's auto-augment, such as rand-m9-mstd0.5-inc1.")] = None,
    reprob: Annotated[float, typer.Option(help="Chance of an erased patch.")] = 0.0,
    train_interpolation: Annotated[str, typer.Option(help="random, bilinear or bicubic.")] = "random",
    crop_pct: CropPct = None,
    sync_bn: Annotated[bool, typer.Option("--sync-bn", help="Batch statistics over all processes.")] = False,
    grad_checkpointing: Annotated[bool, typer.Option("--grad-checkpointing", help="Less memory, more time.")] = False,
    aux_loss: Annotated[
        list[str] | None, typer.Option(help="NAME=WEIGHT: balance (mixture of heads), attention_diversity (ADL).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order, augmentation, mixes and drops.")] = 0,
    workers: Workers = 4,
    log_interval: Annotated[int, typer.Option(help="Steps per line of metrics.jsonl.")] = 50,
    checkpoint_interval: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0 for one at each epoch's end.")
    ] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a classifier; the options are those of timm's train.py.

    Several processes: accelerate launch --multi_gpu -m attnzoo train classify ..., or torchrun.
    """
    given = dict(locals())  # what the settings are called there
    from attnzoo.backbones import training

    given |= {
        "model_kwargs": pairs_as_dict(settings),
        "aux_loss": pairs_as_dict(aux_loss, "--aux-loss"),
        "scale": _several("--scale", scale),
        "ratio": _several("--ratio", ratio),
        "opt_betas": _several("--opt-betas", opt_betas),
    }
    config = training.TrainConfig(**{f.name: given[f.name] for f in fields(training.TrainConfig)})
    found = find_data(data, split, True, seed=seed, train_split=train_split, val_split=val_split)
    found = found.limited(max_train_images, max_val_images, seed)
    summary = training.train(config, found, output, resume=resume, device=device, progress=not quiet)
    if _first_process():
        best = summary["best"]
        typer.echo(f"best: epoch {best['epoch']}, top-1 {100 * best['top1']:.2f} %, top-5 {100 * best['top5']:.2f} %")
        typer.echo(str(output))


def eval_classify(
    data: Data,
    model: Annotated[
        str | None, typer.Option(help="A timm name, or miniature; may be left out with a folder as --checkpoint.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The authors' file, safetensors, or a folder that training or timm wrote.")
    ] = None,
    hub: Annotated[str | None, typer.Option(help="Weights on the Hugging Face hub, ORG/NAME.")] = None,
    split: Split = None,
    val_split: Annotated[str, typer.Option(help="Of hf: data.")] = "validation",
    max_val_images: Annotated[int | None, typer.Option(help="Only so many, drawn by the seed.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Per process.")] = 128,
    img_size: ImgSize = None,
    crop_pct: CropPct = None,
    amp: Amp = "no",
    seed: Annotated[int, typer.Option(help="Of --split and --max-val-images.")] = 0,
    workers: Workers = 4,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure a classifier: top-1, top-5, pictures per second. Prints JSON."""
    from attnzoo.backbones import load_model, training
    from attnzoo.backbones.inference import class_names

    if model == "miniature":
        if checkpoint or hub:
            raise ValueError("--model miniature has its own weights: name a timm model for --checkpoint or --hub")
        from attnzoo import miniatures

        net: Any = miniatures.load("dinat_world")
    else:
        net = load_model(model, checkpoint, hub)
    classes = class_names(net)
    found = find_data(data, split, False, classes, seed, val_split=val_split).limited(None, max_val_images, seed)
    figures = training.evaluate(
        net,
        found,
        batch_size=batch_size,
        workers=workers,
        amp=amp,
        img_size=img_size,
        crop_pct=crop_pct,
        device=device,
        progress=not quiet,
    )
    told = {
        "model": model or net.pretrained_cfg.get("architecture"),
        "checkpoint": str(checkpoint or hub or "") or None,
    }
    if _first_process():
        text = json.dumps(told | figures, indent=1)
        typer.echo(text)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text + "\n")


def _first_process() -> bool:
    """Whether this process speaks, by the variable that launchers set."""
    import os

    return os.environ.get("RANK", "0") == "0"
