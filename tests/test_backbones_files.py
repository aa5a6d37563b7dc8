"""Every family's model and every kind of file: what fits is loaded and told, what does not is refused to the bit."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from backbone_families import FAMILIES
from safetensors.torch import save_file
from test_backbones_matrix import NAMES, build, close, images
from torch import Tensor, nn

from attnzoo.backbones import convert, load_published
from attnzoo.cli import app
from attnzoo.errors import ReachError

WRAPS = ("", "model", "state_dict", "state_dict_ema", "model_ema")
PREFIXES = ("", "module.", "backbone.", "encoder.", "module.model.")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}


def blank(name: str, **kwargs) -> nn.Module:
    """The family's small model, other weights than `build` gives."""
    torch.manual_seed(3)
    entry, small, _, _ = FAMILIES[name]
    return timm.create_model(entry, **{"num_classes": 5, **small, **kwargs}).eval()


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_wrapped_files_load(name, tmp_path):
    """A family's file, nested and prefixed: another way for every family, all ways over the families."""
    at = NAMES.index(name)
    wrap, prefix = WRAPS[at % len(WRAPS)], PREFIXES[(at // len(WRAPS) + at) % len(PREFIXES)]
    source, target = build(name), blank(name)
    state = {prefix + key: value for key, value in state_of(source).items()}
    torch.save({wrap: state, "epoch": 3, "args": {"lr": 0.1}} if wrap else state, tmp_path / "w.pth")
    report = load_published(target, tmp_path / "w.pth")
    assert same(target, state_of(source)), (wrap, prefix)
    assert report.loaded == len(state) and not (report.renamed or report.resampled or report.made), str(report)
    assert not report.dropped
    assert torch.equal(target(images(name)), source(images(name)))


class Command:
    def __reduce__(self):
        return (print, ("code in a checkpoint was run",))


def spoil(kind: str, state: dict[str, Tensor], folder: Path) -> tuple[Path, type[Exception], str]:
    """A bad file, the error that it must give, a word of its message."""
    path, error, said = folder / "w.pth", ValueError, "neither safetensors nor a torch file"
    weight = next(key for key, value in state.items() if value.is_floating_point() and value.ndim > 1)
    if kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif kind == "truncated safetensors":
        path = folder / "w.safetensors"
        save_file(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif kind == "code":
        path.write_bytes(pickle.dumps({"model": Command()}))
    elif kind == "code in a torch file":
        torch.save({"model": state, "args": Command()}, path)
    elif kind == "text":
        path.write_text("<html>404: not found</html>")
    elif kind == "nothing":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
        error, said = ReachError, "can't be read"
    elif kind == "folder safetensors":
        path = folder / "w.safetensors"
        path.mkdir()
        error, said = ReachError, "can't be read"
    elif kind == "gone":
        path, error, said = folder / "gone.safetensors", ReachError, "can't be read"
    elif kind == "empty safetensors":
        path, said = folder / "w.safetensors", "holds no tensors"
        save_file({}, path)
    elif kind == "missing":
        torch.save({key: value for key, value in state.items() if key != weight}, path)
        said = f"{weight} is missing"
    elif kind == "foreign":
        torch.save({**state, "decoder.weight": torch.zeros(3)}, path)
        said = "decoder.weight has no place"
    elif kind == "NaN":
        save_file({**state, weight: torch.full_like(state[weight], float("nan"))}, path := folder / "w.safetensors")
        said = "holds NaN in"
    elif kind == "numbers":
        torch.save({"model": dict.fromkeys(state, 1.0)}, path)
        said = "holds no tensors"
    return path, error, said


KINDS = (
    "truncated",
    "truncated safetensors",
    "code",
    "code in a torch file",
    "text",
    "nothing",
    "folder",
    "folder safetensors",
    "gone",
    "empty safetensors",
    "missing",
    "foreign",
    "NaN",
    "numbers",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_file_changes_nothing(name, tmp_path, capsys):
    model = blank(name)
    before, state = state_of(model), state_of(build(name))
    for kind in KINDS:
        folder = tmp_path / kind.replace(" ", "_")
        folder.mkdir()
        path, error, said = spoil(kind, dict(state), folder)
        with pytest.raises(error) as caught:
            load_published(model, path)
        assert said in str(caught.value), (kind, str(caught.value))
        assert path.name in str(caught.value), (kind, str(caught.value))
        assert same(model, before), kind
    assert "was run" not in capsys.readouterr().out


def refuses_or_fits(name: str, other: str, path: Path) -> bool:
    """Whether `name` takes the file of `other`, which it may where nothing is lost; a refusal must change nothing."""
    model = blank(name)
    before = state_of(model)
    try:
        report = load_published(model, path)
    except ValueError as error:
        assert "does not fit" in str(error) and path.name in str(error), (name, other, str(error))
        assert same(model, before), (name, other)
        return False
    kept = {key for key, value in torch.load(path).items() if value.is_floating_point()}
    assert not kept & set(report.dropped), (name, other, str(report))
    return True


@pytest.mark.parametrize("name", NAMES)
def test_another_model_s_file_is_refused(name, tmp_path):
    """The file of the next family in the list that is not one with the same parameters under the same names."""
    names = NAMES[NAMES.index(name) + 1 :] + NAMES[: NAMES.index(name)]
    mine = {key: value.shape for key, value in state_of(blank(name)).items()}
    for other in names:
        state = state_of(blank(other))
        if {key: value.shape for key, value in state.items()} != mine:
            torch.save(state, tmp_path / "other.pth")
            assert not refuses_or_fits(name, other, tmp_path / "other.pth"), other
            return
    raise AssertionError("every family has the same parameters")


@pytest.mark.slow
@pytest.mark.parametrize("other", NAMES)
def test_no_pair_of_models_is_confused(other, tmp_path):
    torch.save(state_of(build(other)), tmp_path / "other.pth")
    fits = {name for name in NAMES if refuses_or_fits(name, other, tmp_path / "other.pth")}
    assert other in fits

    def shapes(name: str) -> dict[str, int | torch.Size]:
        """Of a relative position bias the heads alone: a table of another window is resampled, and that is told."""
        state = state_of(blank(name)).items()
        return {key: len(value) if key.endswith(".rpb") else value.shape for key, value in state}

    alike = {name for name in NAMES if shapes(name) == shapes(other)}
    assert fits == alike, fits ^ alike


# Another image or window size than the file's, and (part of) the names of the tables that are resampled for it.
LARGER = {
    "nat": ({"kernel_size": 5, "pad_small": True}, "rpb"),
    "dinat_s": ({"kernel_size": 5, "pad_small": True}, "rpb"),
    "nat_isotropic": ({"kernel_size": 5}, "rpb"),
    "vitrpb": ({"img_size": 48}, "rpb"),
    "agent_deit": ({"img_size": (48, 40)}, "(pos_embed|[ahw]{2}_bias)"),
    "agent_pvt": ({"img_size": (64, 48)}, "(pos_embed\\d|[ahw]{2}_bias)"),
    "agent_swin": ({"img_size": (64, 48)}, "([ahw]{2}_bias|relative_position_bias_table)"),
    "agent_cswin": ({"img_size": (64, 48)}, "[ahw]{2}_bias"),
    "inline_deit": ({"img_size": (48, 40)}, "pos_embed"),
    "dependencyvit": ({"img_size": 64}, "pos_embed"),
    "flowformer": ({"img_size": 64}, "pos_embed"),
    "fan_swin": ({"window_size": 8}, "relative_position_bias_table"),
    "maxvit_cells": ({"img_size": 128}, "relative_position_bias_table"),
    "vsa_swin": ({"window_size": 4}, "relative_position_bias_table"),
    "vitae_vsa": ({"window_size": 4}, "relative_position_bias_table"),
}


@pytest.mark.parametrize("name", sorted(LARGER))
def test_tables_of_another_size_are_resampled_and_told(name, tmp_path):
    kwargs, table = LARGER[name]
    entry, small, size, _ = FAMILIES[name]
    square = max(size)  # a file of a square map, as all published ones are: of another it doesn't say which
    source = blank(name, **({"img_size": square} if "img_size" in kwargs else {}))
    state = state_of(source)
    save_file(state, tmp_path / "w.safetensors")
    model = blank(name, **kwargs)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    changed = {key for key, shape in own.items() if key in state and tuple(state[key].shape) != shape}
    assert changed and all(re.search(table + "$", key) for key in changed), changed
    report = load_published(model, tmp_path / "w.safetensors")
    assert set(report.resampled) == changed
    assert all(shapes == (tuple(state[key].shape), own[key]) for key, shapes in report.resampled.items())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key not in changed)
    assert f"{len(changed)} resampled" in str(report) and not report.renamed
    wanted = kwargs.get("img_size", size)
    size = (wanted, wanted) if isinstance(wanted, int) else wanted
    assert model(images(name, 1, size)).isfinite().all()


@pytest.mark.parametrize("name", ["agent_swin", "fan", "medvitv2", "sparsifiner", "vitae_vsa"])
def test_convert_at_the_command_line(name, tmp_path, capsys, monkeypatch):
    """convert writes a folder that timm loads by itself; what it was asked for with a wrong model is not written."""
    entry, small, _, _ = FAMILIES[name]
    source = build(name)
    torch.save({"state_dict": {"module." + k: v for k, v in state_of(source).items()}}, tmp_path / "w.pth")
    report = convert(tmp_path / "w.pth", tmp_path / "out", entry, **{**small, "num_classes": 5})
    assert report.loaded == len(source.state_dict())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == entry and config["num_classes"] == 5
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    close(again(images(name)), source(images(name)), 1e-6)
    with pytest.raises(ValueError, match="does not fit"):
        app(["convert", str(tmp_path / "w.pth"), str(tmp_path / "x"), "--model", "nat_mini"], standalone_mode=False)
    assert not (tmp_path / "x").exists()
