"""The model matrix over every registered name, at its published size; `test_backbones_matrix.py` asks the same of a
small configuration per family.

Shapes are asked of all of them on the meta device, where nothing is computed; values of those below a ceiling of
parameters (millions; ATTNZOO_MATRIX_PARAMS raises it).
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import attnzoo  # noqa: F401  registers the names
from attnzoo.errors import UnsupportedError

NAMES = [n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith("attnzoo.")]
CEILING = float(os.environ.get("ATTNZOO_MATRIX_PARAMS", "13"))
# What the meta device can't run: `test_values` and the matrix of families are left for them.
NOT_ON_META = {
    "shiftadd_pvt_v2_b0_moe": "which rows an expert gets depends on values",
    **dict.fromkeys(
        ("shiftadd_pvt_v2_b0", "shiftadd_pvt_v2_b1", "shiftadd_pvt_v2_b2"),
        "the hashes turn autocast off, which torch does not know on this device",
    ),
}
# Untrained, these are no smooth functions at bfloat16's precision; of theirs only finite logits are asked there.
ROUGH = {
    "shiftadd_pvt_v2_b0_moe": "a few tokens go to the other expert",
    "dependencyvit_lite_tiny_patch16_224": "other tokens are pruned (the model without pruning is held to the bar)",
    "medvitv2_tiny": "noise of 2 ** -9 of each pixel moves the float32 logits by 0.4 of their norm",
}
# Sizes that nothing divides, beyond the published one (a DiNAT's windows need some room): taken, or refused with an
# error that says which sizes work.
BEYOND = ((37, 71), (109, 13))
SAYS_WHICH = "img_size|set_input_size|do not divide|must be|at least"


@pytest.fixture(scope="module")
def timms_own() -> set[str]:
    code = "import timm; print(*timm.list_models(), *timm.list_modules())"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def parameters(name: str) -> float:
    return sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) / 1e6


def gradients_reach(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= set(getattr(model, "unused_parameters", lambda: set())()), without


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, timms_own):
    entry = timm.models.model_entrypoint(name)
    assert name not in timms_own and entry.__module__.rpartition(".")[2] not in timms_own and entry.__doc__
    if name in NOT_ON_META:
        pytest.skip(NOT_ON_META[name])
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    x = torch.empty(2, channels, height, width, device="meta")
    out = model.train()(x)
    assert out.shape == (2, cfg["num_classes"])
    gradients_reach(model, out.sum())
    with torch.no_grad():
        model.eval()
        final, maps = model.forward_intermediates(x)
        assert model.forward_head(final).shape == out.shape
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        for below, right in BEYOND:
            odd = torch.empty(1, channels, height + below, width + right, device="meta")
            if cfg.get("fixed_input_size") and not getattr(model, "dynamic_img_size", False):
                with pytest.raises((ValueError, UnsupportedError, AssertionError), match=SAYS_WHICH):
                    model(odd)
            else:
                assert model(odd).shape == (1, cfg["num_classes"])
        model.reset_classifier(7)
        assert model(x).shape == (2, 7) and model.num_classes == 7
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
        features = timm.create_model(name, features_only=True, device="meta").eval()
        levels = features(x)
        assert [m.shape[1] for m in levels] == features.feature_info.channels()
        for level, reduction in zip(levels, features.feature_info.reduction()):
            assert all(abs(got - size / reduction) < 1 for got, size in zip(level.shape[2:], (height, width)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_values(name, tmp_path):
    if (millions := parameters(name)) > CEILING:
        pytest.skip(f"{millions:.0f}M parameters are more than ATTNZOO_MATRIX_PARAMS={CEILING:.0f}M")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    channels, height, width = model.pretrained_cfg["input_size"]
    x = torch.randn(1, channels, height, width)
    out = model(x)
    assert out.isfinite().all() and torch.equal(out, model(x))
    gradients_reach(model, out.square().sum())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    assert mixed.isfinite().all()
    assert name in ROUGH or (mixed.float() - out).norm() <= 0.1 * out.norm()
    path = tmp_path / "model.safetensors"
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    assert load_file(path).keys() == model.state_dict().keys()
    again = timm.create_model(name, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(again(x), out)
    del model, again
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_traces_whole(name):
    """torch.compile sees one graph, at the published size and without computing it."""
    if name in NOT_ON_META:
        pytest.skip(NOT_ON_META[name])
    if "transnext" in name:
        pytest.skip("dynamo takes its tensor of positions for no fake one on this device; on a CPU the family compiles")
    torch.compiler.reset()
    model = timm.create_model(name, device="meta").eval()
    x = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    with torch.no_grad():
        assert torch.compile(model, fullgraph=True, backend="eager")(x).shape == model(x).shape
