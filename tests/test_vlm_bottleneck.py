"""TAB's map as a hook on open_clip's vision transformer, against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("open_clip")

from open_clip.transformer import VisionTransformer

from attnzoo import vlm
from attnzoo.errors import UnsupportedError
from attnzoo.vlm.bottleneck import gated_map


def tower(**more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(16, 4, 32, 3, 4, 4.0, output_dim=8, **more).eval()


PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [0, -1])
def test_reading_alone_changes_nothing(layer: int) -> None:
    model = tower()
    with torch.no_grad():
        stock = model(PICTURES)
        with vlm.bottleneck(model, layer=layer, gate=False, residual=True) as tab:
            assert (model(PICTURES) - stock).abs().max() < 1e-5
        assert torch.equal(model(PICTURES), stock)
    (found,) = tab.maps
    block = model.transformer.resblocks[layer]
    seen: list[torch.Tensor] = []
    handle = block.attn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(PICTURES)
    handle.remove()
    expected = block.attn(*[seen[0]] * 3, average_attn_weights=False)[1][:, :, 0, 1:]
    assert found.shape == (2, 4, 16) and (found - expected).abs().max() < 1e-6


def test_the_map_is_all_that_goes_on() -> None:
    model = tower()
    block = model.transformer.resblocks[-1]
    with torch.no_grad():
        with vlm.bottleneck(model) as tab:
            plain = model(PICTURES)
        with vlm.bottleneck(model, torch.zeros_like):
            blind = model(PICTURES)
        with vlm.bottleneck(model, lambda found: found):
            assert torch.equal(model(PICTURES), plain)
        with vlm.bottleneck(model, gate=False, residual=True) as raw:
            model(PICTURES)
    assert (blind[0] - blind[1]).abs().max() < 1e-6, "without a map both pictures look alike"
    assert (plain[0] - plain[1]).abs().max() > 1e-3
    assert (tab.maps[0] - gated_map(raw.maps[0])).abs().max() < 1e-7 and float(tab.maps[0].sum(-1).max()) <= 1
    seen: list[torch.Tensor] = []
    handle = block.attn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(PICTURES)
    handle.remove()
    weight, bias = block.attn.in_proj_weight[64:], block.attn.in_proj_bias[64:]
    values = torch.nn.functional.linear(seen[0], weight, bias).view(2, 17, 4, 8)
    cls = block.attn.out_proj((tab.maps[0][..., None] * values[:, 1:].transpose(1, 2)).sum(2).flatten(1))
    cls = cls + block.mlp(block.ln_2(cls))
    assert (model.ln_post(cls) @ model.proj - plain).abs().max() < 1e-5


def test_an_edit_points_and_an_exception_leaves_no_trace() -> None:
    model = tower()
    with torch.no_grad():
        stock = model(PICTURES)
        where = torch.zeros(16)
        where[5] = 1.0
        with vlm.bottleneck(model, lambda found: where.expand(found.shape)):
            one = model(PICTURES)
        with vlm.bottleneck(model, lambda found: where.flip(0).expand(found.shape)):
            assert (model(PICTURES) - one).abs().max() > 1e-3
        with (
            pytest.raises(ValueError, match="edit_map must return"),
            vlm.bottleneck(model, lambda found: found[..., 1:]),
        ):
            model(PICTURES)
        assert torch.equal(model(PICTURES), stock)


def test_what_can_not_be_served() -> None:
    model = tower()
    with pytest.raises(UnsupportedError, match="CLIP-style"):
        vlm.bottleneck(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layer must be from -3 to 2"):
        vlm.bottleneck(model, layer=3)
    with pytest.raises(TypeError, match="edit_map must be a function"):
        vlm.bottleneck(model, 3)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="LayerScale"):
        vlm.bottleneck(tower(ls_init_value=0.1))
    with vlm.bottleneck(model) as tab, pytest.raises(RuntimeError, match="open already"):
        tab.__enter__()
