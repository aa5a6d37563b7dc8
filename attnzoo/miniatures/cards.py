"""Model cards, written by code: every number in them comes from figures.json or training.json in the same folder.

The words that are no numbers (title, description, use, limits) are the [card] table of the recipe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attnzoo.errors import ReachError
from attnzoo.miniatures import NAMES, figures, training


def write_card(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Measure the miniature in `folder` on test data, write figures.json and README.md there, return the card's path.

    Raises ReachError where the folder holds no training.json (it is not one that `train` wrote).
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    place = Path(folder)
    if not (place / "training.json").is_file():
        raise ReachError(f"folder {str(place)!r} holds no training.json; `attnzoo train miniature {name}` makes one")
    report = json.loads((place / "training.json").read_text())
    rows = figures.measure(name, place, seed=seed)
    training.write_json(place / "figures.json", {"command": _command(name), "test_seed": seed, "rows": rows})
    path = place / "README.md"
    path.write_text(render(name, rows, report, seed, weights_size(place)))
    return path


def weights_size(folder: Path) -> int:
    """Bytes of all safetensors files below `folder`."""
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors"))


def render(name: str, rows: list[dict[str, Any]], report: dict[str, Any], seed: int, size: int) -> str:
    """The card's Markdown from the figures' rows, what training.json says, the test seed and the weights' bytes."""
    card = training.read_recipe(name)["card"]
    table = ["| figure | value | 95 % interval | n | bar |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        interval = "" if row["interval"] is None else "{:.3f} to {:.3f}".format(*row["interval"])
        bar = row["bar"] + {True: " (met)", False: " (missed)", None: ""}[row["ok"]]
        table.append(f"| {row['figure']} | {row['value']:.3f} | {interval} | {row['n']} | {bar} |")
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in report.get("cpu_seconds_by_stage", {}).items())
    return "\n".join(
        [
            f"# {card['title']}",
            "",
            card["description"].strip(),
            "",
            f"{report['parameters']:,} parameters, {size / 1e6:.2f} MB of float16 weights, run in float32. Apache-2.0.",
            "",
            "```python",
            card["use"].strip(),
            "```",
            "",
            "## Figures",
            "",
            *table,
            "",
            f"Measured from the half-precision files in this folder by `{_command(name)}`, on data that nothing was "
            f"chosen on (test stream, seed {seed}). {card['method'].strip()}",
            "",
            "## Training",
            "",
            f"`attnzoo train miniature {name} --seed {report['seed']}`: {report['cpu_seconds']:.0f} CPU seconds"
            + (f" ({stages})" if stages else "")
            + f", {report['threads']} thread(s), {report['machine']}, torch {report['torch']}. Recipe: "
            f"attnzoo/configs/recipes/{name}.toml; settings were chosen on validation data only. One training seed: "
            "the intervals are over test data, not over trainings.",
            "",
            "## Limits",
            "",
            card["limits"].strip(),
            "",
        ]
    )


def _command(name: str) -> str:
    return f"attnzoo check miniatures --name {name}"
