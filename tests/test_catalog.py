"""The catalogue says what is true: every row's method, kernel, models and goldens are there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import goldens as adapter
import pytest
import timm

import attnzoo
from attnzoo import catalog, configs, generators, kernels, vlm

METHODS = catalog.list_methods()
BY_ROOM = {"generators": generators.METHODS, "vlm": vlm.METHODS | vlm.DECODINGS}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_row_is_true(method, goldens_root):
    stock = method.operation == "scaled_dot_product_attention"  # torch's own, where none of ours is needed
    assert stock or callable(getattr(kernels, method.operation))
    folder, system = method.test.split("/")
    if folder == "tests":  # no numbers of the authors': properties
        assert Path(__file__).with_name(system).is_file() and method.status == "adapted"
    else:
        assert (goldens_root / folder / system).is_dir() and system in adapter.SYSTEMS
    if method.room == "backbones":
        assert set(method.models) <= set(timm.list_models())
    elif method.name in BY_ROOM[method.room]:  # a switch; without a neutral setting its tests hold an end point
        assert set(method.neutral) <= set(inspect.signature(BY_ROOM[method.room][method.name]).parameters)
    elif hasattr(vlm, method.name) and method.room == "vlm":  # what asks several times is a function of the room
        assert set(method.neutral) <= set(inspect.signature(getattr(vlm, method.name)).parameters)
    else:  # modules, by their public names
        room = {"generators": generators, "vlm": vlm}[method.room]
        assert method.models and not method.neutral and all(hasattr(room, name) for name in method.models)
    assert catalog.get(method.name) is method


def test_no_method_is_without_a_row():
    named = {m.name for m in METHODS}
    assert named >= {*generators.METHODS, *vlm.METHODS, *vlm.DECODINGS} - {"dola"}  # transformers' recipe, not ours
    ours = {n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith("attnzoo.")}
    named = {model for m in METHODS for model in m.models if m.room == "backbones"}
    assert ours <= named and named <= set(timm.list_models())  # some rows name models that timm owns


def test_narrowing_and_mistakes():
    assert {m.room for m in catalog.list_methods("vlm")} == {"vlm"}
    assert catalog.list_methods(status="adapted") == [m for m in METHODS if m.status == "adapted"]
    with pytest.raises(ValueError, match="did you mean dinat"):
        catalog.get("dinatt")
    with pytest.raises(ValueError, match="room must be one of"):
        catalog.list_methods("attic")


@pytest.mark.parametrize(
    "row, said",
    [
        ({"room": "attic"}, "room must be one of"),
        ({"status": "perfect"}, "status must be one of"),
        ({"status": "adapted"}, "says why"),
        ({"colour": "red"}, "unknown fields ['colour']"),
        ({"paper": None}, "missing fields ['paper']"),
    ],
)
def test_a_bad_row_is_named(row, said, monkeypatch):
    good = configs.read_toml("methods.toml")["gna"]
    changed = {k: v for k, v in {**good, **row}.items() if v is not None}
    monkeypatch.setattr("attnzoo.configs.schema.read_toml", lambda name: {"gna": changed})
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        configs.read_methods()
    assert "[gna]" in str(caught.value)


def test_the_version_is_the_projects():
    assert attnzoo.__version__ == "0.1.0"
