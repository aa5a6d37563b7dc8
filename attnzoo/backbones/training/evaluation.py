"""Top-1, top-5 and throughput of a classifier, each picture counted once, over any number of processes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import create_transform
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm.auto import tqdm

from attnzoo.backbones.inference import data_config
from attnzoo.backbones.training.config import check_amp
from attnzoo.backbones.training.data import ClassificationData, Pictures, Transformed, checked, collate
from attnzoo.backbones.training.processes import accelerated, check_extras
from attnzoo.errors import check_choice, check_range

__all__ = ["evaluate"]


def evaluate(
    net: nn.Module,
    data: ClassificationData,
    *,
    batch_size: int = 128,
    workers: int = 4,
    amp: str = "no",
    img_size: int | None = None,
    crop_pct: float | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure `net` on `data.validation`; under `accelerate launch` or torchrun each process takes its share.

    Args:
        net: a timm classifier; it is moved to the device, and back in the mode it had.
        batch_size: pictures per process and call. workers: reading processes per process. amp: "no" or "bf16".
        img_size, crop_pct: the input's side and the share of the picture that it shows, None for the model's own.
        device: "auto" (accelerate's choice) or "cpu".

    Returns {"top1", "top5" (shares from 0 to 1), "loss" (mean cross entropy), "images", "images_per_second" (reading
    included), "seconds", "img_size", "crop_pct", "interpolation", "batch_size", "processes", "device", "amp",
    "classes", "parameters", "data"}. With fewer than 5 classes "top5" counts all of them.
    Raises ValueError where the number of classes differs or a picture can't be read (named).
    """
    check_extras()
    check_range("batch_size", batch_size, 1)
    check_range("workers", workers, 0)
    check_choice("amp", amp, ("no", "bf16"))
    if (count := getattr(net, "num_classes", None)) != len(data.classes):
        raise ValueError(f"the model has {count} classes, the data {len(data.classes)} ({data.source})")
    names = getattr(net, "pretrained_cfg", {}).get("label_names") or data.classes
    if list(names) != list(data.classes) and set(names) == set(data.classes):
        raise ValueError(
            f"the model has the data's classes in another order: {names[0]!r} first, not {data.classes[0]!r}"
        )
    config = data_config(net, img_size=img_size, crop_pct=crop_pct)
    with accelerated(device, amp) as accelerator:
        check_amp(amp, accelerator.device)
        training = net.training
        net.to(accelerator.device).eval()
        try:
            loader = validation_loader(accelerator, data.validation, config, batch_size, workers)
            figures = measure(accelerator, net, loader, len(data.classes), progress)
        finally:
            net.train(training)
        return figures | {
            "img_size": config["input_size"][-1],
            "crop_pct": config["crop_pct"],
            "interpolation": config["interpolation"],
            "batch_size": batch_size,
            "processes": accelerator.num_processes,
            "device": str(accelerator.device),
            "amp": amp,
            "classes": len(data.classes),
            "parameters": sum(p.numel() for p in net.parameters()),
            "data": data.source,
        }


def validation_loader(
    accelerator: Accelerator, pictures: Pictures, config: dict[str, Any], batch_size: int, workers: int
) -> Any:
    """A loader of `pictures` in order, this process's share of each batch."""
    transform: Any = create_transform(**config, is_training=False)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    loader = DataLoader(
        Transformed(pictures, transform, mode),
        batch_size,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),  # its own: iterating draws a seed, which must not move the run's generator
        pin_memory=accelerator.device.type == "cuda",
    )
    return accelerator.prepare_data_loader(loader)


@torch.inference_mode()
def measure(
    accelerator: Accelerator, net: nn.Module, loader: Iterable[Any], num_classes: int, progress: bool = False
) -> dict[str, Any]:
    """{"top1", "top5", "loss", "images", "images_per_second", "seconds"} of `net`, in eval mode, the same on every
    process."""
    device = accelerator.device
    # Predictions are gathered already, so the metrics must not sum over processes again.
    whole: Any = {"sync_on_compute": False}
    top1 = MulticlassAccuracy(num_classes, average="micro", **whole).to(device)
    top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro", **whole).to(device)
    loss = MeanMetric(**whole).to(device)
    images, start = 0, time.perf_counter()
    shown = progress and accelerator.is_main_process
    for batch in tqdm(loader, desc="evaluate", disable=not shown, leave=False, mininterval=1.0):
        inputs, target = checked(batch)
        with accelerator.autocast():
            logits = net(inputs)
        logits, target = accelerator.gather_for_metrics((logits.float(), target))
        top1.update(logits, target)
        top5.update(logits, target)
        loss.update(F.cross_entropy(logits, target), weight=len(target))
        images += len(target)
    seconds = time.perf_counter() - start
    return {
        "top1": round(float(top1.compute()), 6),
        "top5": round(float(top5.compute()), 6),
        "loss": float(loss.compute()),
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
    }
