"""Numbers of a method per layer and head, and their files.

A number may be given as one value, as one per head, or as a mapping from layer names or patterns (`single*`) to either.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnzoo.errors import check_number, check_range, check_tensor

FORMAT = "attnzoo-generators-table-1"


class HeadTable:
    """One number per layer and head, checked when it is made. low, high: the range of every number, None: open."""

    def __init__(self, name: str, value: Any, low: float | None = None, high: float | None = None) -> None:
        """name: the argument, for messages. Raises TypeError or ValueError for anything that is no such table."""
        self.name = name
        self.value = value
        rows = value if isinstance(value, Mapping) else {"*": value}
        if not rows:
            raise ValueError(f"{name} must hold at least one layer's numbers, got none")
        self._rows: list[tuple[str, tuple[float, ...], bool]] = []
        for pattern, row in rows.items():
            if not isinstance(pattern, str):
                raise TypeError(f"{name} must be keyed by layer names or patterns, got {pattern!r}")
            if isinstance(row, Tensor):
                check_tensor(f"{name}[{pattern!r}]", row, ndim=min(row.ndim, 1))
                row = row.tolist()
            several = isinstance(row, Sequence) and not isinstance(row, str)
            numbers = tuple(row) if several else (row,)
            if not numbers:
                raise ValueError(f"{name}[{pattern!r}] must hold at least one number, got none")
            for number in numbers:
                check_number(name, number)
                check_range(name, number, low, high)
            self._rows.append((pattern, tuple(float(n) for n in numbers), several))

    def at(self, layer: str, heads: int, like: Tensor) -> Tensor:
        """[heads], on `like`'s device, in float32 or float64 as `like`: the first entry that the layer's name matches.

        Raises ValueError where none does, or the entry has another number of heads.
        """
        for pattern, numbers, several in self._rows:
            if pattern == "*" or fnmatchcase(layer, pattern) or fnmatchcase(layer, f"{pattern}.*"):
                if several and len(numbers) != heads:
                    raise ValueError(f"{self.name}: {layer} has {heads} heads, its entry {pattern!r} {len(numbers)}")
                dtype = torch.promote_types(like.dtype, torch.float32)
                return torch.tensor(numbers, dtype=dtype, device=like.device).expand(heads)
        raise ValueError(f"{self.name} has no entry for {layer}; it has {', '.join(p for p, _, _ in self._rows)}")

    def all_at_least(self, bound: float) -> bool:
        """Whether every number is at least `bound`."""
        return all(number >= bound for _, numbers, _ in self._rows for number in numbers)

    def mean(self) -> float:
        """Mean over the entries, each the mean of its heads."""
        return sum(sum(numbers) / len(numbers) for _, numbers, _ in self._rows) / len(self._rows)


def save_table(path: str | os.PathLike[str], table: Mapping[str, Tensor], **about: str) -> None:
    """Write tensors by name to a safetensors file; about: strings that `load_table` gives back.

    Raises TypeError for anything else.
    """
    for name, tensor in table.items():
        check_tensor(f"table[{name!r}]", tensor)
    if wrong := [name for name, text in about.items() if not isinstance(text, str)]:
        raise TypeError(f"{', '.join(wrong)} must be a string")
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in table.items()}
    save_file(kept, os.fspath(path), metadata={"format": FORMAT, **about})


def load_table(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, the strings) of a file that `save_table` wrote.

    Raises FileNotFoundError, and ValueError for another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file that save_table wrote; there is none at {path}")
    with safe_open(path, framework="pt") as opened:
        about = dict(opened.metadata() or {})
        if about.pop("format", None) != FORMAT:
            raise ValueError(f"path must be a table of attnzoo's generators, {path} is none")
        return {name: opened.get_tensor(name) for name in opened.keys()}, about  # noqa: SIM118  no mapping
