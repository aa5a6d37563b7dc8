"""Every case of every system that the adapter knows, through the yardstick itself (shared/tools/check_goldens.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import goldens as adapter
import pytest
import torch


@pytest.fixture(scope="module")
def yardstick(goldens_root: Path) -> ModuleType:
    path = goldens_root.parent / "tools" / "check_goldens.py"
    if not path.is_file():
        pytest.skip(f"no yardstick at {path}: it lies beside the goldens")
    spec = importlib.util.spec_from_file_location("check_goldens", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("float64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("system", sorted(adapter.SYSTEMS))
def test_cases(yardstick: ModuleType, goldens_root: Path, system: str, float64: bool) -> None:
    (folder,) = [f for f in goldens_root.glob(f"*/{system}") if f.is_dir()]
    arguments = SimpleNamespace(float64=float64, backend=None)
    problems, ran = [], 0
    for path in sorted(folder.glob("*.json")):
        names = {path.stem.rsplit("_", 1)[0], f"{folder.name}/{path.stem}"}
        if path.name == "official_keys.json" or (float64 and names & set(adapter.FLOAT32_ONLY)):
            continue
        problem, official = yardstick.check_case(adapter, str(folder.relative_to(goldens_root)), str(path), arguments)
        ran += 1
        if problem and official:
            problems.append(f"{path.stem}: {problem}")
    assert not problems, "\n".join(problems)
    assert ran or float64


@pytest.mark.slow
@pytest.mark.parametrize("system", sorted(adapter.SYSTEMS))
def test_published_checkpoints(yardstick: ModuleType, goldens_root: Path, system: str) -> None:
    """Every published checkpoint's names and shapes load, the count is the published one, every tensor is in the model.

    The yardstick's own `--keys` draws elements with replacement and loses the second of two equal draws, so the search
    is done here; what is a rebuilt buffer and no weight (`BUFFERS`) is the yardstick's.
    """
    paths = list(goldens_root.glob(f"*/{system}/official_keys.json"))
    if not paths:
        pytest.skip(f"{system} has published no checkpoint")
    entries = json.loads(paths[0].read_text())
    keys_of = {entry["entrypoint"]: entry["keys"] for entry in entries}
    for entry in entries:
        keys = entry["keys"]
        while isinstance(keys, str):  # "same as NAME"
            keys = keys_of[keys.split()[-1]]
        generator = torch.Generator().manual_seed(0)
        state = {
            key: torch.zeros(shape, dtype=torch.long)
            if key.endswith("num_batches_tracked")
            else torch.randn(shape, generator=generator)
            for key, shape in keys.items()
        }
        model = adapter.load_published(system, entry["entrypoint"], dict(state))
        if entry.get("params"):
            assert sum(p.numel() for p in model.parameters()) == entry["params"], entry["entrypoint"]
        own = model.state_dict()
        renamed = {
            key: tensor.flatten()[[0, tensor.numel() // 2, -1]]
            for key, tensor in state.items()
            if tensor.is_floating_point() and tensor.numel() and not yardstick.BUFFERS.search(key)
            if key not in own or not torch.equal(own[key], tensor)
        }
        lost = []
        if renamed:
            held = (
                torch.cat([v.detach().flatten().float() for v in own.values() if v.is_floating_point()]).sort().values
            )
            at = {key: torch.searchsorted(held, sample).clamp_(max=len(held) - 1) for key, sample in renamed.items()}
            lost = [key for key, sample in renamed.items() if not torch.equal(held[at[key]], sample)]
        assert not lost, f"{entry['entrypoint']}: {len(lost)} tensors are not in the model, first {lost[:3]}"
