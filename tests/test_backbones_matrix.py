"""timm's contract for every family of `backbone_families.py`: the same questions, asked of all."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from backbone_families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import attnzoo  # noqa: F401  registers the names
from attnzoo import catalog
from attnzoo.errors import UnsupportedError

NAMES = sorted(FAMILIES)


def build(name: str, **kwargs) -> nn.Module:
    """The family's small model in eval mode, its weights perturbed so that no part is switched off."""
    entry, small, _, _ = FAMILIES[name]
    model = timm.create_model(entry, **{"num_classes": 5, **small, **kwargs})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms:  # as in a trained model they normalise; untrained ones leave the signal to shrink from block to block
            for norm in norms:
                norm.momentum = None
            model.train()(images(name, 8))
            for norm in norms:
                norm.momentum = 0.1
    return model.eval()


def images(name: str, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    return torch.randn(batch, 3, *(size or FAMILIES[name][2]), generator=torch.Generator().manual_seed(2))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got.double() - want.double()).norm() <= tolerance * want.double().norm().clamp_min(1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_and_determinism(name):
    model, x = build(name), images(name)
    out = model(x)
    assert out.shape == (2, 5) and out.isfinite().all()
    assert torch.equal(out, model(x))
    close(model(x[:1]), out[:1], 1e-4)  # an image's logits do not depend on its neighbours in the batch
    out.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    unused = getattr(model, "unused_parameters", lambda: set())()
    assert set(without) <= set(unused), without


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    _, small, size, _ = FAMILIES[name]
    model = timm.create_model(FAMILIES[name][0], features_only=True, **small).eval()
    maps = model(images(name, 1))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    for m, reduction in zip(maps, model.feature_info.reduction()):
        for got, pixels in zip(m.shape[2:], size):
            assert abs(got - pixels / reduction) < 1, (tuple(m.shape), reduction)
    last = timm.create_model(FAMILIES[name][0], features_only=True, out_indices=(-1,), **small).eval()
    assert [m.shape[1] for m in last(images(name, 1))] == model.feature_info.channels()[-1:]


@pytest.mark.parametrize("name", NAMES)
def test_forward_intermediates(name):
    model, x = build(name), images(name)
    final, maps = model.forward_intermediates(x)
    close(final, model.forward_features(x))
    close(model.forward_head(final), model(x))
    assert len(maps) == len(model.feature_info)
    channels = [info["num_chs"] for info in model.feature_info]
    assert [m.shape[1] for m in maps] == channels
    last = model.forward_intermediates(x, indices=1, intermediates_only=True)
    close(last[0], maps[-1])
    first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    close(first[0], maps[0])


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier(name):
    model, x = build(name), images(name)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    close(model(x), model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("name", NAMES)
def test_other_sizes(name):
    other = FAMILIES[name][3]
    if isinstance(other, str):
        height, width = FAMILIES[name][2]
        with pytest.raises(ValueError, match=other):
            build(name)(images(name, 1, (height + 8, width)))
        return
    for size in other:
        assert build(name)(images(name, 1, size)).shape == (1, 5)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast(name):
    model, x = build(name), images(name)
    want = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
    assert (got.float() - want).norm() <= 0.1 * want.norm()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name):
    model, x = build(name), images(name)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, want in gradients[0].items():
        close(gradients[1][key], want, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_depth(name):
    model, x = build(name, drop_path_rate=0.9), images(name, 8)
    eval_out = model(x)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(x), eval_out)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    model, x = build(name), images(name)
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    entry, small, _, _ = FAMILIES[name]
    again = timm.create_model(
        entry, **{"num_classes": 5, **small, "checkpoint_path": str(tmp_path / "model.safetensors")}
    )
    assert torch.equal(again.eval()(x), model(x))
    assert load_file(tmp_path / "model.safetensors").keys() == again.state_dict().keys()


@pytest.mark.parametrize("name", NAMES)
def test_wrong_images_are_named_and_change_nothing(name):
    """Channels, rank, dtype, no pixels, no image; buffers (a norm's statistics) are as before, training too."""
    model, x = build(name).train(), images(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for wrong, error, said in (
        (x[:, :2], ValueError, "in_chans=3"),
        (torch.cat([x, x], 1), ValueError, "in_chans=3"),
        (x[0], ValueError, "x must have 4 dimensions"),
        (x[:, :, :0], ValueError, "height, width"),
        ((255 * x).to(torch.uint8), TypeError, "floating point"),
        (None, TypeError, "x must be a tensor"),
    ):
        for call in (model, model.forward_intermediates):
            with pytest.raises(error, match=said):
                call(wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_image_is_taken_or_refused_by_size(name):
    """3 x 5 pixels: finite logits, or an error that says which sizes work."""
    model, x = build(name), images(name, 1, (3, 5))
    try:
        out = model(x)
    except (ValueError, UnsupportedError) as error:
        assert re.search("img_size|at least|multiples of|larger|too small", str(error)), str(error)
    else:
        assert out.shape == (1, 5) and out.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles(name):
    torch.compiler.reset()  # models share a forward, and dynamo counts recompilations by its code
    model, x = build(name), images(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x), 1e-4)
    compiled(x).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_group_matcher_covers_every_parameter(name):
    model = build(name)
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))


def test_every_registered_model_belongs_to_a_family():
    """Each module of models is in the matrix by at least one of its entry points."""
    modules = {timm.models.model_entrypoint(FAMILIES[name][0]).__module__ for name in NAMES}
    ours = {m for method in catalog.list_methods("backbones") for m in method.models}
    entries = {timm.models.model_entrypoint(m).__module__ for m in ours}
    assert {module for module in entries if module.startswith("attnzoo.")} <= modules
