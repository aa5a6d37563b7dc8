"""The backbones in use: loading weights, classifying pictures, saliency, the page in docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from backbones_common import ISO, TINY, randomise, tiny
from PIL import Image
from torch import nn

from attnzoo.backbones import (
    NeighborhoodAttention2D,
    attention_saliency,
    classify,
    feature_norms,
    load_model,
    preprocess,
)
from attnzoo.errors import ReachError

# ---- loading


def test_local_dir_round_trip(tmp_path):
    model = tiny()
    timm.models.save_for_hf(model, tmp_path, model_args=TINY)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 50, 70)
    torch.testing.assert_close(loaded(x), model(x))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    torch.testing.assert_close(features(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    summed = model.patch_embed.proj[0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.patch_embed.proj[0].weight, summed)


@pytest.mark.parametrize("nest", [None, "model", "state_dict"])
def test_authors_file_loads_by_timm(tmp_path, nest):
    source = tiny("vitrpb")
    index = torch.zeros(25, 25, dtype=torch.long)
    state = {**source.state_dict(), **{f"layers.{i}.attn.relative_position_index": index for i in range(3)}}
    path = tmp_path / "vitrpb_small_in1k_224.pth"
    torch.save(state if nest is None else {nest: state, "epoch": 3}, path)
    x = torch.randn(1, 3, 40, 40)
    by_path = timm.create_model("vitrpb_small", checkpoint_path=str(path), **ISO).eval()
    torch.testing.assert_close(by_path(x), source(x))
    overlay = {"file": str(path), "num_classes": 5}
    by_cfg = timm.create_model("vitrpb_small", pretrained=True, pretrained_cfg_overlay=overlay, **ISO).eval()
    torch.testing.assert_close(by_cfg(x), source(x))


def test_biases_are_resampled_on_load():
    """7x7 -> 11x11 windows as the authors did it: each head's 13 x 13 bias to 21 x 21, bicubically."""
    source = tiny(kernel_size=7, pad_small=True)
    overlay = {"state_dict": source.state_dict(), "num_classes": 5}
    target = timm.create_model(
        "dinat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **{**TINY, "kernel_size": 11}
    )
    old = source.levels[0].blocks[1].attn.rpb
    want = F.interpolate(old[None], size=(21, 21), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(target.levels[0].blocks[1].attn.rpb, want)
    torch.testing.assert_close(target.levels[1].blocks[0].attn.qkv.weight, source.levels[1].blocks[0].attn.qkv.weight)
    larger = timm.create_model(
        "vitrpb_small",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": tiny("vitrpb").state_dict(), "num_classes": 5},
        **{**ISO, "img_size": 64},
    )
    assert larger(torch.randn(1, 3, 64, 64)).shape == (1, 5)


# ---- classification


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for i, colour in enumerate(["red", "green"]):
        paths.append(tmp_path / f"{colour}.png")
        Image.new("RGB", (80 + 9 * i, 70), colour).save(paths[-1])
    return paths


def test_classify_from_folder(tmp_path, pictures):
    model = tiny()
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    timm.models.save_for_hf(model, tmp_path / "m", model_args=TINY, model_config={"label_names": list("abcde")})
    results = classify([pictures[0], Image.open(pictures[1])], checkpoint=tmp_path / "m", topk=9)
    assert len(results) == 2 and len(results[0]) == 5
    net = load_model("dinat_mini", checkpoint=tmp_path / "m")
    with Image.open(pictures[0]) as picture:
        x = preprocess(net, picture)
    assert x.shape == (3, 64, 64)
    want = model(x[None]).softmax(-1)[0]
    for label, probability in results[0]:
        assert probability == pytest.approx(want["abcde".index(label)].item(), rel=1e-4)
    assert [p for _, p in results[0]] == sorted((p for _, p in results[0]), reverse=True)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match="holds 'dinat_mini', not model='nat_mini'"):
        load_model("nat_mini", checkpoint=tmp_path / "m")


def test_classify_from_files(tmp_path, pictures):
    """Class count and image channels come from the weights; the authors' nested files are read too."""
    from safetensors.torch import save_file

    torch.manual_seed(5)
    source = timm.create_model("nat_mini", num_classes=3, in_chans=1)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    first = classify(pictures[0], model="nat_mini", checkpoint=tmp_path / "w.safetensors")
    assert [sorted(label for label, _ in row) for row in first] == [[0, 1, 2]]
    assert classify(str(pictures[0]), "nat_mini", checkpoint=tmp_path / "w.pth") == first
    with pytest.raises(ValueError, match="w.pth' does not fit 'nat_tiny'.*levels.2.blocks.6.norm1.weight is missing"):
        load_model("nat_tiny", checkpoint=tmp_path / "w.pth")


def test_classify_bad_input(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    with pytest.raises(ValueError, match="model 'dinat_tini' is not a timm model; close: .*dinat_tiny"):
        classify(pictures[0], "dinat_tini")
    with pytest.raises(ReachError, match="checkpoint '.*none.pth' does not exist"):
        classify(pictures[0], "dinat_tiny", checkpoint=tmp_path / "none.pth")
    with pytest.raises(ReachError, match="image '.*none.png' can't be read"):
        classify(tmp_path / "none.png", "dinat_tiny")
    with pytest.raises(ValueError, match="text.png' is not a picture that Pillow can read"):
        classify(text, "dinat_tiny")
    with pytest.raises(ReachError, match="model 'nobody/nothing' on the hub can't be reached"):
        classify(pictures[0], hub="nobody/nothing")
    with pytest.raises(ValueError, match="neither safetensors nor a torch file"):
        classify(pictures[0], "dinat_tiny", checkpoint=text)
    with pytest.raises(ValueError, match="not both"):
        classify(pictures[0], "dinat_tiny", checkpoint=text, hub="a/b")
    with pytest.raises(ValueError, match="give a model name"):
        classify(pictures[0])
    with pytest.raises(ValueError, match="must be named for a checkpoint file"):
        classify(pictures[0], checkpoint=text)
    with pytest.raises(ReachError, match="config.json"):
        classify(pictures[0], checkpoint=tmp_path)
    with pytest.raises(ValueError, match="images must hold at least one picture"):
        classify([], "dinat_tiny")
    with pytest.raises(ValueError, match="topk"):
        classify(pictures[0], "dinat_tiny", topk=0)
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="torch file of plain tensors"):
        classify(pictures[0], "dinat_tiny", checkpoint=tmp_path / "code.pth")

    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", unreachable)
    with pytest.raises(ReachError, match="published weights of 'nat_mini' can't be reached.*give checkpoint"):
        classify(pictures[0], "nat_mini")


# ---- saliency


def test_attention_received_is_the_column_sum_of_the_attention_matrix():
    """Against the matrix, formed row by row by asking for one-hot values."""
    attn = randomise(NeighborhoodAttention2D(8, 2, kernel_size=3, dilation=2)).double()
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    query, key, value = attn._project(x)
    received, even = attn.attention_received(x)
    for row, column in [(0, 0), (3, 4), (6, 7), (2, 1)]:
        one = torch.zeros_like(value)
        one[0, row, column] = 1.0
        weights = attn._attend(query, key, one, attn.rpb)[..., 0]
        torch.testing.assert_close(received[0, row, column], weights.sum((0, 1, 2)))
    torch.testing.assert_close(received.sum((1, 2)), torch.full((1, 2), 56.0, dtype=torch.float64))
    torch.testing.assert_close(even.sum((1, 2)), torch.full((1, 2), 56.0, dtype=torch.float64))
    assert even.std() > 0.1, "windows that move inward at the border cover some tokens more often"


@pytest.mark.parametrize("family", ["dinat", "dinat_s", "nat_isotropic", "vitrpb"])
def test_saliency(family):
    model = tiny(family)
    size = (40, 40) if family in ("nat_isotropic", "vitrpb") else (50, 70)
    image = torch.randn(3, *size)
    before = model(image[None])
    maps = attention_saliency(model, image, relative=False)
    shapes = [tuple(m.shape[2:]) for m in model.forward_intermediates(image[None], intermediates_only=True)]
    assert [tuple(m.shape) for m in maps] == shapes
    for m in maps:
        assert m.mean().item() == pytest.approx(1.0, abs=1e-5) and m.min() >= 0 and m.std() > 0.01
    with torch.inference_mode():
        again = attention_saliency(model, image, relative=False)
    assert all(torch.equal(a, b) for a, b in zip(again, maps, strict=True))
    norms = feature_norms(model, image)
    assert [tuple(n.shape) for n in norms] == shapes
    assert torch.equal(model(image[None]), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


def test_saliency_of_even_attention_is_one_everywhere():
    model = tiny()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".qkv." in name or name.endswith("rpb"):
                p.zero_()
    for m in attention_saliency(model, torch.randn(3, 50, 70)):
        torch.testing.assert_close(m, torch.ones_like(m))


def test_saliency_leaves_no_hook_behind_an_error():
    model = tiny()
    with pytest.raises(ValueError, match="too small"):
        attention_saliency(model, torch.randn(3, 8, 8))
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(TypeError, match="model must be NAT"):
        attention_saliency(nn.Identity(), torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="eval mode"):
        attention_saliency(model.train(), torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="one image"):
        feature_norms(model.eval(), torch.randn(2, 3, 64, 64))


# ---- docs


def test_the_docs_run_and_their_table_is_what_they_print(capsys):
    page = (Path(__file__).parents[1] / "docs/backbones.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(snippets) >= 4
    for snippet in snippets:
        capsys.readouterr()
        exec(snippet, {})
        if "list_models" in snippet:
            assert capsys.readouterr().out in page
