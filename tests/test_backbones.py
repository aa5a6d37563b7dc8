"""The backbones as models: the authors' numbers, timm's contract, gradients, sizes, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import goldens as adapter
import pytest
import timm
import torch
import torch.nn.functional as F
from backbones_common import ENTRY, ISO, NAMES, STAGED, TINY, randomise, tiny

import attnzoo
from attnzoo.backbones import NAT, DiNAT, NATIsotropic, NeighborhoodAttention2D
from attnzoo.backbones.nat_isotropic import RelPosAttention2D
from attnzoo.errors import UnsupportedError
from attnzoo.kernels import use_backend


def published_keys(root) -> dict[str, dict]:
    entries = json.loads((root / "backbones/dinat/official_keys.json").read_text())
    by_name = {e["entrypoint"]: e for e in entries}
    for entry in entries:
        while isinstance(entry["keys"], str):
            entry["keys"] = by_name[entry["keys"].split()[-1]]["keys"]
    return by_name


# ---- the authors' numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_goldens(goldens_root, dtype):
    from safetensors.torch import load_file

    ran = 0
    for path in sorted((goldens_root / "backbones/dinat").glob("*_*.json")):
        if path.name == "official_keys.json":
            continue
        meta = {**json.loads(path.read_text()), "system": "dinat"}
        tensors = load_file(path.with_suffix(".safetensors"))
        expected = {k: tensors.pop(k) for k in list(tensors) if k == "output" or k in meta["intermediates"]}
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        got = adapter.run(meta, given)
        for name, want in expected.items():
            error = (got[name].double() - want.double()).norm() / want.double().norm()
            assert error < (1e-4 if dtype == torch.float32 else 5e-6), f"{path.stem} {name}: {error:.1e}"
        ran += 1
    assert ran


def check_published(name: str, entry: dict) -> None:
    generator = torch.Generator().manual_seed(7)
    state = {
        key: torch.zeros(shape, dtype=torch.long) if key.endswith("_index") else torch.rand(shape, generator=generator)
        for key, shape in entry["keys"].items()
    }
    model = adapter.load_published("dinat", name, dict(state))
    assert sum(p.numel() for p in model.parameters()) == entry["params"]
    own = model.state_dict()
    for key, tensor in state.items():
        assert key.endswith("relative_position_index") or torch.equal(own[key], tensor), key


@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny", "vitrpb_small"])
def test_published_keys(goldens_root, name):
    check_published(name, published_keys(goldens_root)[name])


@pytest.mark.slow
def test_every_published_key(goldens_root):
    entries = published_keys(goldens_root)
    assert set(entries) <= set(NAMES)
    for name, entry in entries.items():
        check_published(name, entry)


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_build_and_run_at_their_size(name):
    """Shapes only (meta device): the dilations of each entry point fit its input size."""
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    height, width = cfg["input_size"][1:]
    assert all(need <= have for need, have in zip(model.smallest_input(), (height, width)))
    assert model.get_classifier().out_features == cfg["num_classes"] == model.num_classes
    assert cfg["license"] == "mit" and cfg["origin_url"] and cfg["url"].endswith(".pth")


def test_names_are_new_to_timm():
    """In a fresh process: importing attnzoo adds exactly the published names, from modules that timm does not have."""
    script = (
        "import json, warnings, timm; warnings.simplefilter('error');"
        "names = lambda: (set(timm.list_models()), set(timm.list_modules()), set(timm.list_models(pretrained=True)));"
        "before = names(); import attnzoo; after = names();"
        "print(json.dumps([sorted(after[0] - before[0]), sorted(before[0] - after[0]), sorted(after[1] - before[1]),"
        "sorted(before[2] - after[2])]))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    added, lost, modules, lost_cfgs = json.loads(out.splitlines()[-1])
    assert set(NAMES) <= set(added) and not lost and not lost_cfgs
    assert {"nat", "dinat_s", "nat_isotropic"} <= set(modules)


# ---- timm's contract


@pytest.mark.parametrize("family", STAGED)
def test_features_only(family):
    model = timm.create_model(ENTRY[family], features_only=True, **TINY)
    assert model.feature_info.channels() == [16, 32, 64]
    assert model.feature_info.reduction() == [4, 8, 16]
    maps = model(torch.randn(2, 3, 50, 70))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 13, 18), (2, 32, 7, 9), (2, 64, 4, 5)]
    picked = timm.create_model(ENTRY[family], features_only=True, out_indices=(0, -2), **TINY)
    assert picked.feature_info.channels() == [16, 32]
    assert [m.shape[1] for m in picked(torch.randn(1, 3, 64, 64))] == [16, 32]
    assert sum(p.numel() for p in picked.parameters()) < sum(p.numel() for p in model.parameters())
    for p in picked.parameters():
        p.grad = None
    sum(m.sum() for m in picked(torch.randn(1, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in picked.parameters()), "pruning left a parameter without use"


def test_features_by_hooks_agree_with_the_getter():
    x = torch.randn(1, 3, 50, 70)
    torch.manual_seed(3)
    getter = timm.create_model("dinat_mini", features_only=True, **TINY).eval()
    torch.manual_seed(3)
    hooks = timm.create_model("dinat_mini", features_only=True, feature_cls="hook", **TINY).eval()
    for a, b in zip(getter(x), hooks(x)):
        torch.testing.assert_close(a, b.permute(0, 3, 1, 2))


@pytest.mark.parametrize("family", [*STAGED, "nat_isotropic", "vitrpb"])
def test_forward_intermediates(family):
    model = tiny(family)
    x = torch.randn(2, 3, 40, 40) if family in ("nat_isotropic", "vitrpb") else torch.randn(2, 3, 61, 70)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert len(maps) == len(model.feature_info) == 3
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    for a, b in zip(maps, nhwc):
        torch.testing.assert_close(a, b.permute(0, 3, 1, 2))
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[0], final.permute(0, 3, 1, 2))
    first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first[0], maps[0])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    pruned = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    torch.testing.assert_close(pruned[0], maps[1])
    assert model(x).shape[-1] == model.num_features == maps[1].shape[1]


@pytest.mark.parametrize("family", [*STAGED, "vitrpb"])
def test_head(family):
    model = tiny(family, drop_rate=0.5)
    x = torch.randn(2, 3, 40, 40) if family == "vitrpb" else torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(9)
    assert model(x).shape == (2, 9) and model.get_classifier().out_features == 9 and not model.head.training
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features.mean((1, 2)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    assert model.no_weight_decay() and all(name.endswith("attn.rpb") for name in model.no_weight_decay())
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
    assert next(iter(groups.values()))[0].startswith("patch_embed")


@pytest.mark.parametrize("family", ["dinat", "dinat_s", "nat_isotropic"])
def test_gradient_checkpointing_changes_no_gradient(family):
    model = tiny(family)
    x = torch.randn(1, 3, 40, 40) if family == "nat_isotropic" else torch.randn(1, 3, 50, 70)

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.set_grad_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_compiles_whole():
    for family, size in (("dinat", (50, 70)), ("vitrpb", (40, 40))):
        model = tiny(family)
        x = torch.randn(1, 3, *size)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_training_options():
    model = tiny(drop_path_rate=0.5, drop_rate=0.1, proj_drop_rate=0.1, pos_drop_rate=0.1, layer_scale=0.1, in_chans=1)
    x = torch.randn(2, 1, 48, 64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    assert "levels.0.blocks.1.gamma2" in model.state_dict()
    plain = DiNAT(**{**TINY, "depths": (2, 2, 2), "dilations": (None, (None, 1), None)})
    assert [b.attn.dilation[0] for stage in plain.stages for b in stage.blocks] == [1] * 6
    del_dilations = {k: v for k, v in TINY.items() if k != "dilations"}
    default = timm.create_model("dinat_mini", **del_dilations)
    assert [b.attn.dilation[0] for stage in default.stages for b in stage.blocks] == [1, 8, 1, 4, 1]


def test_autocast_and_double():
    model = tiny()
    x = torch.randn(1, 3, 48, 64)
    want = model.double()(x.double())
    got = model.float()(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    assert (mixed.double() - want).norm() < 0.05 * want.norm()


# ---- gradients


@pytest.mark.parametrize("family", STAGED)
def test_gradients_are_the_reference_formula_s(family):
    model = tiny(family, pad_small=True)
    x = torch.randn(2, 3, 47, 58, requires_grad=True)
    results = {}
    for backend in ("auto", "reference"):
        model.zero_grad()
        x.grad = None
        exact = model.double() if backend == "reference" else model.float()
        inputs = x.detach().to(next(exact.parameters()).dtype).requires_grad_()
        with use_backend(backend):
            exact(inputs).square().sum().backward()
        results[backend] = {"x": inputs.grad, **{n: p.grad.clone() for n, p in exact.named_parameters()}}
    for name, want in results["reference"].items():
        error = (results["auto"][name].double() - want).norm() / want.norm().clamp_min(1e-9)
        assert error < 1e-4, f"{name}: {error:.1e}"


# ---- sizes


def test_full_window_is_full_attention():
    """A window as large as the map: neighborhood attention and ViT-RPB's attention are the same function."""
    near = NeighborhoodAttention2D(16, 2, kernel_size=7).double()
    full = RelPosAttention2D(16, 2, side=7).double()
    randomise(near)
    full.load_state_dict(near.state_dict())
    x = torch.randn(2, 7, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(near(x), full(x))
    torch.testing.assert_close(near.attention_received(x), full.attention_received(x))


@pytest.mark.parametrize("size", [(5, 9), (4, 3), (1, 1), (13, 2)])
def test_small_maps_are_padded_as_in_the_detection_code(size):
    """Zeros below and to the right up to one window, before the projections; the output cropped."""
    attn = randomise(NeighborhoodAttention2D(8, 2, kernel_size=3, dilation=2, pad_small=True))
    x = torch.randn(2, *size, 8)
    below, right = max(0, 6 - size[0]), max(0, 6 - size[1])
    padded = attn(F.pad(x, (0, 0, 0, right, 0, below)))
    torch.testing.assert_close(attn(x), padded[:, : size[0], : size[1]])
    attn.pad_small = False
    with pytest.raises(ValueError, match=r"kernel_size \(3, 3\).*dilation \(2, 2\).*pad_small=True"):
        attn(x)


@pytest.mark.parametrize("family", STAGED)
def test_small_inputs(family):
    model = tiny(family)
    assert model.smallest_input() == (45, 45)
    assert model(torch.randn(1, 3, 45, 45)).shape == (1, 5)
    with pytest.raises(ValueError, match="44 x 60 is too small: stage 0 sees a 11 x 15 map.*45 x 45.*pad_small=True"):
        model(torch.randn(1, 3, 44, 60))
    with pytest.raises(ValueError, match="too small"):
        model.forward_intermediates(torch.randn(1, 3, 20, 20))
    features = timm.create_model(ENTRY[family], features_only=True, **TINY)
    assert [tuple(m.shape[2:]) for m in features(torch.randn(1, 3, 9, 21))] == [(3, 6), (2, 3), (1, 2)]
    strict = timm.create_model(ENTRY[family], features_only=True, pad_small=False, **TINY)
    with pytest.raises(ValueError, match="too small"):
        strict(torch.randn(1, 3, 9, 21))


def test_isotropic_sizes():
    for family in ("nat_isotropic", "vitrpb"):
        model = tiny(family)
        with pytest.raises(ValueError, match="img_size 40 x 40, got 48 x 40"):
            model(torch.randn(1, 3, 48, 40))
        with pytest.raises(ValueError, match="img_size must be square"):
            tiny(family, img_size=(40, 48))
        with pytest.raises(ValueError, match="img_size must be a multiple of patch_size=8"):
            tiny(family, img_size=44)
        free = tiny(family, dynamic_img_size=True)
        free.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, 40, 40)
        torch.testing.assert_close(free(x), model(x))
        assert free(torch.randn(1, 3, 43, 77)).shape == (1, 5)
    with pytest.raises(ValueError, match="at least 17 x 17"):
        tiny("nat_isotropic", dynamic_img_size=True)(torch.randn(1, 3, 16, 30))
    wide = timm.create_model("dinat_isotropic_small", **{**ISO, "kernel_size": 3})
    assert [layer.attn.dilation[0] for layer in wide.layers] == [1, 2, 1]


# ---- bad input, threads


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"num_heads": (3, 2, 4)}, ValueError, "num_heads must divide dim=16, got 3"),
        ({"num_heads": (2, 2)}, ValueError, "num_heads must have one entry per stage"),
        ({"depths": (2, 0, 1)}, ValueError, "depths must hold"),
        ({"dilations": ((1, 2), (1,), (1,))}, ValueError, r"dilations\[1\] must have one entry per block"),
        ({"dilations": ((1, 0), (1, 1), (1,))}, ValueError, "dilation must be at least 1"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must hold int"),
        ({"attn_drop_rate": 0.1}, UnsupportedError, "attn_drop must be 0.0, got 0.1"),
        ({"drop_path_rate": 1.5}, ValueError, "drop_path_rate must be from 0.0 to 1.0"),
        ({"global_pool": "max"}, ValueError, "global_pool must be one of 'avg', ''"),
        ({"num_classes": -1}, ValueError, "num_classes"),
        ({"embed_dim": 15, "num_heads": (3, 3, 3)}, ValueError, "embed_dim must be even"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        NAT(**{**TINY, **kwargs})


def test_bad_images():
    model = tiny()
    with pytest.raises(ValueError, match="in_chans=3"):
        model(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match="x must have 4 dimensions, got 3"):
        model(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="attn must be one of"):
        NATIsotropic(attn="window")


def test_two_models_in_two_threads():
    """Different back ends in different threads, each with its own model: the results of running alone."""
    models = {"auto": tiny("nat"), "reference": tiny("dinat")}
    x = torch.randn(1, 3, 50, 70)
    alone = {name: model(x).detach() for name, model in models.items()}
    got: dict[str, list[torch.Tensor]] = {name: [] for name in models}

    def work(name):
        with torch.no_grad(), use_backend(name):
            got[name].extend(models[name](x) for _ in range(4))

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, outputs in got.items():
        assert len(outputs) == 4
        for output in outputs:
            torch.testing.assert_close(output, alone[name])


def test_importing_is_enough():
    assert attnzoo.backbones.NAT is NAT and set(NAMES) <= set(timm.list_models())
