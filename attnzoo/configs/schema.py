"""What a row of `methods.toml` holds, and how it is read: every mistake in the file is named with its row."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

ROOMS = ("kernels", "backbones", "generators", "vlm")
STATUSES = ("exact", "adapted")


@dataclass(frozen=True)
class Method:
    """One catalogued method.

    name: the word that `enable`, `edit` or `timm.create_model` takes. room: where it lives. operation: the kernel it
    runs on. paper, code: what it comes from. licence: of the authors' code; weights_licence: of weights a user
    brings. status: "exact" (goldens agree to float32 rounding) or "adapted" (then `why` says what differs).
    test: the golden system, or the test file where there is no golden. neutral: keyword values that reproduce the
    plain model.
    """

    name: str
    room: str
    title: str
    operation: str
    paper: str
    code: str
    licence: str
    status: str
    test: str
    why: str = ""
    weights_licence: str = ""
    models: tuple[str, ...] = ()
    neutral: dict[str, Any] = field(default_factory=dict)


def read_toml(name: str) -> dict[str, Any]:
    """The TOML file `name` (a path below attnzoo/configs, such as "recipes/llava.toml") as a dict."""
    return tomllib.loads((files("attnzoo.configs") / name).read_text(encoding="utf-8"))


def read_methods() -> dict[str, Method]:
    """Every row of methods.toml by name. Raises ValueError, naming row and field, where a row is not a `Method`."""
    known = {f.name for f in fields(Method)}
    required = {"room", "title", "operation", "paper", "code", "licence", "status", "test"}
    methods = {}
    for name, row in read_toml("methods.toml").items():
        if unknown := set(row) - known:
            raise ValueError(f"methods.toml [{name}]: unknown fields {sorted(unknown)}; there are {sorted(known)}")
        if missing := required - set(row):
            raise ValueError(f"methods.toml [{name}]: missing fields {sorted(missing)}")
        if row["room"] not in ROOMS:
            raise ValueError(f"methods.toml [{name}]: room must be one of {ROOMS}, got {row['room']!r}")
        if row["status"] not in STATUSES:
            raise ValueError(f"methods.toml [{name}]: status must be one of {STATUSES}, got {row['status']!r}")
        if row["status"] == "adapted" and not row.get("why"):
            raise ValueError(f"methods.toml [{name}]: an adapted method says why")
        methods[name] = Method(name=name, **{**row, "models": tuple(row.get("models", ()))})
    return methods
