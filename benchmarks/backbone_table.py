"""The table of docs/backbones_table.md: the catalogue, what is counted of each model, and what `times` measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import timm

from attnzoo import catalog
from attnzoo.backbones import complexity
from attnzoo.configs import Method

OURS = "attnzoo."
HEAD = """\
# All backbones

Written by the command at the end; tests/test_backbone_benchmarks.py compares it with what the command counts today.

- **params** and **GMACs** are counted here (`attnzoo.backbones.complexity`), GMACs for one image of the size beside
  them: convolutions, Linears, matrix products, and fused kernels by the pairs of query and key that they attend to
  (`attnzoo.kernels.flops`); norms, softmaxes and other elementwise work count nothing.
- **top-1** is the authors' figure on ImageNet-1K, in per cent, not measured here; a dash where they published none.
- **status**: `exact`, our outputs agree with the authors' code to float32 rounding; `adapted`, the catalogue says why
  they may not (`attnzoo info NAME`).
- **licence** is that of the authors' code, then of their weights, which a user brings; ours is Apache-2.0.
- **kernel**: the operations of attnzoo that the model calls, or torch's own attention and products. (TransNeXt's
  windows run as shifted products on the CPU, by the kernel elsewhere.)
- **time**: that of the named model of timm is 1, below 1 ours is faster; medians of one thread's CPU time, in turns;
  empty where none was measured, with (size) where it is not 224.
"""
COLUMNS = ("model", "paper", "params", "size", "GMACs", "top-1", "status", "licence", "kernel", "time")


def models() -> list[tuple[str, Method]]:
    """Every catalogued model that timm builds, with its method, in the catalogue's order."""
    found = []
    for method in catalog.list_methods("backbones"):
        found += [(name, method) for name in method.models if timm.is_model(name)]
    return found


def top1(notes: tuple[str, ...]) -> str:
    """The accuracy that a default cfg's notes name, "-" where they name none."""
    text = " ".join(notes)
    if found := re.search(r"top-1 error (\d+(?:\.\d+)?) %", text):
        return "-" if "no weights" in text else f"{100 - float(found[1]):.2f}"
    found = re.search(r"top-1 (\d+(?:\.\d+)?) %", text)
    return found[1] if found else "-"


def row(name: str, method: Method) -> list[str]:
    """A model's cells, all but the time."""
    counted = complexity(name)
    cfg = timm.get_pretrained_cfg(name)
    notes: Any = (cfg.notes or ()) if cfg is not None else ()
    height, width = counted.image_size
    return [
        name,
        _paper(method.paper),
        f"{counted.parameters:,}",
        str(height) if height == width else f"{height} x {width}",
        f"{counted.macs / 1e9:.2f}",
        top1((notes,) if isinstance(notes, str) else tuple(notes)),
        method.status,
        " / ".join(filter(None, (method.licence, method.weights_licence))),
        ", ".join(sorted(o.removeprefix(OURS) for o in counted.by_operator if o.startswith(OURS))) or "torch's own",
    ]


def _paper(paper: str) -> str:
    found = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", paper)
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else paper


def time_cell(name: str, times: dict[str, dict[str, Any]]) -> str:
    """What was measured of a model, at every size that was."""
    cells = []
    for found in times.values():
        if found["model"] == name:
            peer = re.sub(r"_patch\d+(_window\d+)?_\d+$", "", found["peer"])
            cells.append(f"{found['ratio']:.2f} x {peer}" + ("" if found["size"] == 224 else f" ({found['size']})"))
    return ", ".join(cells)


def line(cells: list[str]) -> str:
    """A row of Markdown."""
    return "| " + " | ".join(cells) + " |"


def cells_of(page: str) -> dict[str, list[str]]:
    """The cells of a page by model. Raises ValueError where its columns are not those of today."""
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    cells = [[cell.strip() for cell in row[2:-1].split(" | ")] for row in rows]
    if not cells or cells[0] != list(COLUMNS):
        raise ValueError("the page has no table with today's columns: write it anew, without --times-only")
    return {row[0]: row for row in cells[1:]}


def table(results: Path, page: str | None = None) -> str:
    """The page, from the catalogue and the results of `python -m benchmarks.backbones times`.

    page: take what was counted from this text of the page instead of counting anew (a minute or two). Raises ValueError
    where it lacks a model.
    """
    contents: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    times = contents.get("times", {})
    aligned = ["---:" if column in ("params", "size", "GMACs", "top-1") else "---" for column in COLUMNS]
    lines = [line(list(COLUMNS)), line(aligned)]
    known = {} if page is None else cells_of(page)
    for name, method in models():
        if page is not None and name not in known:
            raise ValueError(f"the page has no row of {name}: write it anew, without --times-only")
        counted = row(name, method) if page is None else known[name][:-1]
        lines.append(line([*counted, time_cell(name, times)]))
    where: dict[tuple[str, str], int] = {}
    for found in times.values():
        place = found["revision"], found["machine"]
        where[place] = where.get(place, 0) + 1
    measured = [f"- {count} rows at revision {at} on {machine}" for (at, machine), count in sorted(where.items())]
    end = "```sh\npython -m benchmarks.backbones times   # writes benchmarks/backbones.json\n"
    end += "python -m benchmarks.backbones table   # writes this page\n```\n"
    said = "Times, of one thread and batch 1:\n\n" + "\n".join(measured) + "\n\n" if measured else ""
    return HEAD + "\n" + "\n".join(lines) + "\n\n" + said + end
