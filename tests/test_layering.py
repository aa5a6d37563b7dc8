"""The walls of the house: who may import whom, what an import may change, and which upstream a room may need."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "attnzoo"
# From the ground up; a file may import its own room and those before it. The doors may import everything.
ORDER = ("errors", "configs", "catalog", "kernels", "backbones", "generators", "vlm", "miniatures")
DOORS = {"__init__", "__main__", "cli", "commands"}
# Upstream libraries with one room that may import them; miniatures reach them lazily, inside a function.
OWNERS = {"timm": {"backbones"}, "open_clip": {"backbones"}, "diffusers": {"generators"}, "transformers": {"vlm"}}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute module name, at the module's top level?) of every import in `path`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for n in ast.walk(block)
    }
    found = []
    here = ("attnzoo", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(tree):
        top = id(node) not in inner and id(node) not in typing_only
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found.append((module, top))
            if module == "attnzoo":
                found += [(f"attnzoo.{alias.name}", top) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_up_only(path: Path):
    room = room_of(path)
    if room in DOORS:
        return
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] == "attnzoo" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= ORDER.index(room), f"{path} imports {module}, below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_upstream_has_one_room(path: Path):
    room = room_of(path)
    for module, top in imports(path):
        owners = OWNERS.get(module.split(".")[0])
        if owners is None or room in owners or room in DOORS:
            continue
        lazily = room == "miniatures" or (room == "generators" and module.startswith("transformers"))
        assert lazily and not top, f"{path.relative_to(PACKAGE)} imports {module} {'at its top' if top else ''}"


def test_triton_stays_inside_the_kernels():
    for path in MODULES:
        if any(module.split(".")[0] == "triton" for module, _ in imports(path)):
            assert room_of(path) == "kernels" and (path.stem.startswith("triton") or path.stem == "aot"), path


def test_files_stay_small():
    too_long = {
        str(p.relative_to(PACKAGE)): n
        for p in MODULES
        if (n := len(p.read_text().splitlines())) > (700 if room_of(p) == "kernels" else 500)
    }
    assert not too_long


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# As if it were not installed: importing raises ModuleNotFoundError, find_spec says None.
BLOCK = "import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"


@pytest.mark.parametrize(
    "room, allowed",
    [
        ("kernels", set()),
        ("configs", set()),
        ("catalog", set()),
        ("backbones", {"timm"}),
        ("generators", {"diffusers", "transformers", "accelerate"}),
        ("vlm", {"transformers", "accelerate"}),
        ("miniatures", set()),
    ],
)
def test_a_room_needs_no_other_rooms_upstream(room: str, allowed: set[str]):
    blocked = {
        "timm",
        "diffusers",
        "transformers",
        "accelerate",
        "open_clip",
        "gradio",
        "matplotlib",
        "sklearn",
    } - allowed
    run_python(BLOCK.format(blocked=blocked) + f"import attnzoo, importlib; importlib.import_module('attnzoo.{room}')")


def test_importing_changes_nothing_but_timms_names():
    code = """
import json, logging, os, random, sys, threading, warnings
import numpy, torch, timm, transformers, diffusers
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
def look():
    return {
        "sdpa": id(F.scaled_dot_product_attention),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "torch rng": torch.get_rng_state().sum().item(),
        "random": random.getstate()[1][:5],
        "numpy": numpy.random.get_state()[1][:5].tolist(),
        "filters": len(warnings.filters),
        "handlers": len(logging.getLogger().handlers),
        "level": logging.getLogger().level,
        "env": dict(os.environ),
        "attention": sorted(AttentionInterface().valid_keys()),
        "masks": sorted(AttentionMaskInterface().valid_keys()),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "active": threading.active_count(),
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
        "cwd": os.getcwd(),
    }
before, names = look(), set(timm.list_models())
import attnzoo, attnzoo.backbones, attnzoo.generators, attnzoo.vlm, attnzoo.miniatures, attnzoo.kernels
after, now = look(), set(timm.list_models())
changed = {k: [before[k], after[k]] for k in before if before[k] != after[k]}
print(json.dumps({"changed": changed, "new": len(now - names), "lost": sorted(names - now)}))
"""
    seen = json.loads(run_python(code, PYTHONHASHSEED="0").splitlines()[-1])
    assert seen["changed"] == {} and seen["lost"] == [] and seen["new"] > 0


def test_rooms_load_when_first_used():
    code = (
        "import sys, attnzoo; loaded = {m.split('.')[1] for m in sys.modules if m.startswith('attnzoo.')}\n"
        "assert not loaded & {'generators', 'vlm', 'miniatures'}, loaded\n"
        "assert not {'diffusers', 'transformers', 'gradio'} & set(sys.modules)"
    )
    run_python(code)


def test_no_kernel_body_stands_twice():
    """Every Triton function of the tree is another: what two kernels share is a function that both call."""
    bodies: dict[str, str] = {}
    for path in MODULES:
        if not path.stem.startswith("triton"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or "triton.jit" not in " ".join(
                map(ast.unparse, node.decorator_list)
            ):
                continue
            said = ast.get_docstring(node) is not None
            body = "\n".join(ast.unparse(statement) for statement in node.body[said:])
            where = f"{path.relative_to(PACKAGE)}:{node.name}"
            assert bodies.setdefault(body, where) == where, f"{where} is {bodies[body]} again"
    assert bodies
