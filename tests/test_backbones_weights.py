"""Published files into models: what is changed is told, what does not fit is refused, and a refusal changes nothing."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from backbones_common import ISO, TINY, tiny
from safetensors.torch import save_file

from attnzoo.backbones import convert, load_published
from attnzoo.cli import app
from attnzoo.errors import ReachError


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("entry", [None, "model", "state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_wrapped_files_load(tmp_path, entry, prefix):
    source, target = tiny(), tiny(num_classes=5)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    state = {prefix + name: value for name, value in state_of(source).items()}
    torch.save(state if entry is None else {entry: state, "epoch": 7}, tmp_path / "w.pth")
    report = load_published(target, tmp_path / "w.pth")
    x = torch.randn(1, 3, 50, 70)
    assert torch.equal(target(x), source(x))
    assert report.loaded == len(state) and not (report.renamed or report.resampled or report.dropped or report.made)


def test_what_was_changed_is_told(tmp_path):
    source = tiny("vitrpb")
    index = torch.zeros(25, 25, dtype=torch.long)
    torch.save(
        {**source.state_dict(), **{f"layers.{i}.attn.relative_position_index": index for i in range(3)}},
        tmp_path / "w.pth",
    )
    larger = timm.create_model("vitrpb_small", **{**ISO, "img_size": 64})
    report = load_published(larger, tmp_path / "w.pth")
    assert set(report.resampled) == {f"layers.{i}.attn.rpb" for i in range(3)}
    assert report.resampled["layers.0.attn.rpb"] == ((2, 9, 9), (2, 15, 15))
    assert report.dropped == tuple(f"layers.{i}.attn.relative_position_index" for i in range(3))
    told = str(report)
    assert "3 resampled (layers.0.attn.rpb" in told and "tensors loaded" in told


class Command:
    def __reduce__(self):
        return (print, ("code in a checkpoint was run",))


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda s, p: torch.save({**s, "head.weight": torch.zeros(9, 64), "head.bias": torch.zeros(9)}, p), ValueError,
         r"head.weight is \(9, 64\) and must be \(5, 64\).*num_classes=9"),
        (lambda s, p: torch.save({k: v for k, v in s.items() if "mlp" not in k}, p), ValueError,
         "levels.0.blocks.0.mlp.fc1.weight is missing.*and .* more"),
        (lambda s, p: torch.save({**s, "extra.weight": torch.zeros(2)}, p), ValueError, "extra.weight has no place"),
        (lambda s, p: p.write_bytes(pickle.dumps(Command())), ValueError, "neither safetensors nor a torch file"),
        (lambda s, p: (torch.save(s, p), p.write_bytes(p.read_bytes()[:2000])), ValueError, "neither safetensors nor"),
        (lambda s, p: torch.save([1, 2], p), ValueError, "must hold a dict of tensors, got list"),
        (lambda s, p: torch.save({"epoch": 3}, p), ValueError, "holds no tensors"),
        (lambda s, p: None, ReachError, "can't be read"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, spoil, error, message, capsys):
    model = tiny()
    before = state_of(model)
    spoil(state_of(model), tmp_path / "w.pth")
    with pytest.raises(error, match=message):
        load_published(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "was run" not in capsys.readouterr().out


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    model = tiny()
    save_file(state_of(model), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="neither safetensors"):
        load_published(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize("target", ["out", "out/model.safetensors", "out/dinat.safetensors"])
def test_convert_writes_what_timm_loads(tmp_path, target):
    source = tiny()
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    small = {name: value for name, value in TINY.items() if name != "num_classes"}
    report = convert(tmp_path / "w.pth", tmp_path / target, "dinat_mini", num_classes=5, **small)
    assert report.loaded == len(source.state_dict())
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(1, 3, 50, 70)
    assert torch.equal(again(x), source(x))
    with pytest.raises(ValueError, match="holds another model"):
        convert(tmp_path / "w.pth", tmp_path / "out" / "second.safetensors", "dinat_mini", num_classes=5, **small)


def test_convert_by_command(tmp_path, capsys):
    torch.manual_seed(0)
    source = timm.create_model("nat_mini", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    app(["convert", str(tmp_path / "w.pth"), str(tmp_path / "o"), "--model", "nat_mini"], standalone_mode=False)
    assert "tensors loaded" in capsys.readouterr().out
    again = timm.create_model(f"local-dir:{tmp_path / 'o'}", pretrained=True)
    assert again.num_classes == 3 and torch.equal(again.head.weight, source.head.weight)
    with pytest.raises(ValueError, match="a folder or a .safetensors file"):
        convert(tmp_path / "w.pth", tmp_path / "x.pth", "nat_mini")
    with pytest.raises(ValueError, match="not a timm model"):
        convert(tmp_path / "w.pth", tmp_path / "x", "nat_minni")
    assert not (tmp_path / "x").exists()
