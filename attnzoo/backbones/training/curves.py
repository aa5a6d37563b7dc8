"""The picture of a run: losses, accuracy and learning rate over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(lines: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draw the lines of a metrics.jsonl, each a dict, into `path`, a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line for line in lines if line["kind"] == "step"]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracy, rate = figure.subplots(1, 3)
    losses.plot([x["step"] for x in steps], [x["loss"] for x in steps], label="training", color="0.55", lw=1)
    for prefix, name, colour in (("", "validation", "C0"), ("ema_", "validation, averaged weights", "C1")):
        points = [x for x in epochs if f"{prefix}top1" in x]
        if points:
            at = [x["step"] for x in points]
            losses.plot(at, [x[f"{prefix}loss"] for x in points], ".-", label=name, color=colour)
            for key, style in (("top1", "-"), ("top5", ":")):
                label = f"top-{key[-1]}" + (", averaged weights" if prefix else "")
                values = [100 * x[prefix + key] for x in points]
                accuracy.plot(at, values, style, marker=".", color=colour, label=label)
    rate.plot([x["step"] for x in steps], [x["lr"] for x in steps], color="0.3")
    for axes, name in ((losses, "loss"), (accuracy, "validation accuracy, %"), (rate, "learning rate")):
        axes.set_xlabel("step")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(fontsize=7, frameon=False)
    if epochs:
        accuracy.legend(fontsize=7, frameon=False, loc="lower right")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, format="png")
