"""What several commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Params = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A method's setting, KEY=VALUE; VALUE is read as JSON, else as text."),
]


def pairs_as_dict(pairs: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """`KEY=VALUE` pairs as keyword arguments; `kernel_size=[3,5]` is a list, `layers=1` an int."""
    settings: dict[str, Any] = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign or not key.isidentifier():
            raise ValueError(f"{option} takes KEY=VALUE, got {pair!r}")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings
