"""The GPU timings as a picture: time by case, the plan's bound as a line over each case's bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Fixed by contender, so that a missing one changes no other's colour; distinct for colour-blind readers too.
COLOURS = {
    "ours": "#0072b2",
    "dense cuDNN": "#999999",
    "dense flash": "#bbbbbb",
    "dense efficient": "#dddddd",
    "flex": "#e69f00",
    "natten": "#009e73",
}


def panels(contents: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """{(dtype, pass): {case: timing}} of a results file."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for key, result in contents["steps"].items():
        part, _, rest = key.partition("/")
        if part == "time":
            case, dtype, what = rest.rsplit("/", 2)
            found.setdefault((dtype, what), {})[case] = result
    return found


def plot(results: Path, picture: Path) -> Path:
    """Draw results.json into a PNG; returns its path.

    Bars: median milliseconds, logarithmic. Line: the fastest dense peer's time over the plan's bound. Diamonds: what
    NATTEN published for its kernel on an H100. Raises ValueError where there is nothing to draw.
    """
    found = panels(json.loads(results.read_text())) if results.is_file() else {}
    if not found:
        raise ValueError(f"plot needs timings in {results}, and there are none: run the part `time` first")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 1, figsize=(11, 3.6 * len(found)), squeeze=False, layout="constrained")
    for axis, ((dtype, what), timings) in zip(axes[:, 0], found.items()):
        width = 0.8 / len(COLOURS)
        for place, (name, colour) in enumerate(COLOURS.items()):
            at = [n for n, result in enumerate(timings.values()) if name in result["ms"]]
            heights = [result["ms"][name] for result in timings.values() if name in result["ms"]]
            if at:
                axis.bar([n - 0.4 + (place + 0.5) * width for n in at], heights, width, color=colour, label=name)
        named: set[str] = set()

        def once(label: str, named: set[str] = named) -> str | None:
            new = label not in named
            named.add(label)
            return label if new else None

        for n, result in enumerate(timings.values()):
            if "speedup" in result:
                bound = result["ms"][result["dense"]] / result["bound"]
                axis.hlines(bound, n - 0.45, n + 0.45, colors="black", linewidth=1.5, label=once("bound"))
            if "published" in result:
                kernel = result["published"]["kernel"]
                axis.plot(n, kernel, "D", color="#cc79a7", label=once("NATTEN, published, H100"))
        axis.set_yscale("log")
        axis.set_ylabel("milliseconds")
        axis.set_title(f"{what}, {dtype}", loc="left")
        axis.set_xticks(range(len(timings)), [name.replace(" k", "\nk", 1) for name in timings], fontsize=8)
        axis.legend(fontsize=7, ncols=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)
    return picture


def plot_curves(curves: dict[str, dict[str, Any]], picture: Path) -> Path:
    """Draw `benchmarks.backbones curves` into a PNG, a panel a group: time against resolution; returns its path."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = ("#0072b2", "#d55e00", "#009e73", "#999999")
    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(3.6 * len(curves), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (title, found) in zip(axes[0], curves.items()):
        last = len(found["times"]) - 1
        for number, (label, values) in enumerate(found["times"].items()):
            colour = colours[-1] if number == last else colours[number]
            axis.plot(found["sizes"], values, "o-" if number < last else "s--", color=colour, label=label)
        axis.set_yscale("log")
        axis.set_xticks(found["sizes"], [str(size) for size in found["sizes"]])
        axis.set_title(title, loc="left")
        axis.set_xlabel("image side, pixels")
        axis.legend(fontsize=7, frameon=False)
        axis.grid(axis="y", color="#eeeeee")
    axes[0, 0].set_ylabel("time, in units of the dashed line's at the left")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return picture
