"""The catalogue: what there is, where it comes from, how far it agrees with its authors' code."""

from __future__ import annotations

import difflib
from functools import cache

from attnzoo.configs import Method, read_methods
from attnzoo.configs.schema import ROOMS
from attnzoo.errors import check_choice

__all__ = ["Method", "get", "list_methods"]


@cache
def _methods() -> dict[str, Method]:
    return read_methods()


def list_methods(room: str | None = None, status: str | None = None) -> list[Method]:
    """Catalogued methods, in the file's order; `room` and `status` ("exact", "adapted") narrow it."""
    if room is not None:
        check_choice("room", room, ROOMS)
    return [m for m in _methods().values() if room in (None, m.room) and status in (None, m.status)]


def get(name: str) -> Method:
    """The method called `name`. Raises ValueError, with the nearest names, where there is none."""
    methods = _methods()
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(methods)}"
        raise ValueError(f"name {name!r} is not in the catalogue{hint}")
    return methods[name]
