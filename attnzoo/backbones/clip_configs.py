"""CLIP models with towers of attnzoo in open_clip, by name: configs/open_clip/*.json.

    import attnzoo, open_clip
    model = open_clip.create_model("attnzoo_dinat_tiny_clip")

open_clip builds them from its own parts (its timm image tower, its text transformer, its losses and transforms); only
the configurations are attnzoo's. None of them has published weights.

open_clip keeps its configurations in one table of the process, as timm keeps its models. Importing attnzoo adds these
names to it, as it adds names to timm's: at once where open_clip is imported already, else when it is. open_clip itself
is never imported for that: a finder on `sys.meta_path` lets the import of the module "open_clip", and of no other, go
its way and adds the names at its end. Nothing of open_clip's is replaced.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from attnzoo.errors import SeamError

__all__ = ["register_open_clip"]

_FOLDER = Path(__file__).parents[1] / "configs" / "open_clip"
_LOCK = threading.Lock()


def register_open_clip() -> list[str]:
    """Add attnzoo's configurations to open_clip's table, if they aren't there; returns their names.

    `import attnzoo` has done it already, whichever of the two was imported first. Imports open_clip.
    Raises ModuleNotFoundError where open_clip is not installed, SeamError where it doesn't take the configurations.
    """
    return _add(importlib.import_module("open_clip"))


def _add(open_clip: Any) -> list[str]:
    names = sorted(path.stem for path in _FOLDER.glob("*.json"))
    with _LOCK:
        if not set(names) <= set(open_clip.list_models()):
            open_clip.add_model_config(_FOLDER)
        if missing := sorted(set(names) - set(open_clip.list_models())):
            raise SeamError(f"open_clip {open_clip.__version__} took no configurations from {_FOLDER}: {missing}")
    return names


class _Finder(MetaPathFinder):
    """Finds "open_clip" as the other finders do, and has `_add` run after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "open_clip":
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Runs a module's own loader, gives it back its place, and adds the names."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        self._own.exec_module(module)
        try:
            _add(module)
        except Exception as error:  # whoever imports open_clip may want nothing of ours
            warnings.warn(
                f"attnzoo's configurations are not in open_clip: {type(error).__name__}: {error}", RuntimeWarning
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _when_imported() -> None:
    """Add the names now if open_clip is imported, else have it done when it is."""
    with _LOCK:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    if sys.modules.get("open_clip") is not None:
        register_open_clip()  # waits for the import's end where another thread is at it
