"""Large images tile by tile: seams, memory, what is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from test_restoration import tiny
from torch import nn

from attnzoo.backbones import restoration
from attnzoo.backbones.restoration import Restorer, restore


class Probe(Restorer):
    """An identity that notes what it gets, or the mean of what it gets."""

    def __init__(self, upscale=1, multiple=1, mean=False, white=1.0):
        super().__init__()
        self.in_chans, self.upscale, self.multiple, self.mean, self.seen = 3, upscale, multiple, mean, []
        self.value_range = white
        self.inner = nn.Dropout(0.5)

    def reach(self):
        return None if self.mean else 0

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        self.last = x
        x = x.mean(dim=(1, 2, 3), keepdim=True).expand_as(x) if self.mean else self.inner(x)
        return x.repeat_interleave(self.upscale, 2).repeat_interleave(self.upscale, 3)


def local(kind, **kwargs):
    """A model whose outputs depend on their surroundings alone."""
    if kind == "hat":
        return tiny("hat", torch.float64, conv_scale=0.0, depths=(2,), num_heads=(2,), **kwargs)
    model = tiny("a2n", torch.float64, **kwargs)
    for block in model.AAB_trunk:
        nn.init.zeros_(block.ADM[-1].weight)
    return model


@pytest.mark.parametrize(
    "kind, kwargs, size, tile, overlap",
    [
        ("hat", {}, (83, 66), (48, 44), 32),
        ("hat", {"upscale": 3}, (44, 61), (64, 40), 32),
        ("hat", {"upscale": 4, "resi_connection": "identity"}, (60, 41), 40, 28),
        ("a2n", {}, (37, 50), (23, 30), 18),
        ("a2n", {"upscale": 3}, (31, 20), (29, 24), 17),
    ],
)
def test_tiles_are_the_whole_image_where_the_overlap_holds_the_reach(kind, kwargs, size, tile, overlap):
    model = local(kind, **kwargs)
    assert 2 * model.reach() <= overlap
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    whole = restore(model, image, progress=False)
    assert whole.shape[2:] == tuple(model.upscale * n for n in size)
    torch.testing.assert_close(restore(model, image, tile, overlap, progress=False), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["hat", "a2n"])
def test_the_reach_is_one(kind):
    """No output pixel changes farther than `reach` from a changed input pixel; a pooled mean has none."""
    model = local(kind)
    reach, scale = model.reach(), model.upscale
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    changed = image.clone()
    changed[..., 30, 33] += 1.0
    with torch.no_grad():
        rows, columns = (model(image) - model(changed)).abs().sum((0, 1)).nonzero().T // scale
    assert max((rows - 30).abs().max(), (columns - 33).abs().max()) <= reach
    assert tiny("hat").reach() is None and tiny("a2n").reach() is None


def test_weights_add_up_for_every_tiling():
    image = torch.rand(2, 3, 53, 38)
    for upscale, multiple, tile, overlap, margin in [
        (1, 1, 10, 3, None),
        (2, 4, (16, 20), (12, 0), 0),
        (3, 4, 12, 4, 2),
        (1, 1, (100, 7), (30, 6), 3),
        (2, 1, 9, 8, 1),
    ]:
        got = restore(Probe(upscale, multiple).eval(), image, tile, overlap, margin=margin, progress=False)
        want = image.repeat_interleave(upscale, 2).repeat_interleave(upscale, 3)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_seams_fade_where_a_model_sees_the_whole_tile():
    """Each tile comes out as its mean: steps between them are spread over the overlap."""
    image = torch.linspace(0, 1, 100).expand(3, 40, 100).contiguous()
    out = restore(Probe(mean=True), image, (40, 40), (0, 20), margin=0, progress=False)[0, 0]
    step = 0.2  # between the means of neighbouring tiles
    assert out.diff().abs().max() < step / 20 * 1.2 and out[-1] > 0.75 and out[0] < 0.25
    hard = restore(Probe(mean=True), image, 40, 20, margin=10, progress=False)[0, 0]
    assert hard.diff().abs().max() > 0.19


@pytest.mark.parametrize("kind", ["hat", "a2n"])
def test_pooled_models_tile_with_a_small_difference(kind):
    model, image = tiny(kind), torch.rand(3, 60, 60)
    whole = restore(model, image, progress=False)
    tiled = restore(model, image, tile=48, overlap=16, progress=False)
    assert 0 < (tiled - whole).abs().max() < 0.05


def test_memory_is_a_tiles(capsys):
    model, image = Probe(2, 4).eval(), torch.rand(2, 3, 61, 90)
    restore(model, image, tile=(16, 24), overlap=8)
    assert set(model.seen) == {(1, 3, 16, 24)}
    rows, columns = 7, 6  # ceil((64 - 16) / 8) + 1, ceil((92 - 24) / 16) + 1
    assert len(model.seen) == 2 * rows * columns
    told = capsys.readouterr().err
    assert "restore" in told and f"{len(model.seen)}/{len(model.seen)}" in told
    restore(model, image, tile=32, progress=False)
    assert capsys.readouterr().err == ""


def test_kinds_of_images_and_ranges():
    model = Probe(2, white=255.0)
    picture = Image.fromarray(torch.randint(0, 256, (9, 7, 3), dtype=torch.uint8).numpy())
    large = restore(model, picture, tile=5, overlap=2, progress=False)
    assert large.size == (14, 18) and large.resize((7, 9), Image.Resampling.NEAREST).tobytes() == picture.tobytes()
    assert model.last.max() > 2
    grey = restore(tiny("hat", in_chans=1), picture.convert("L"), progress=False)
    assert grey.mode == "L" and grey.size == (14, 18)
    half = restore(tiny("hat"), torch.rand(3, 8, 8, dtype=torch.bfloat16), tile=4, overlap=0, progress=False)
    assert half.dtype == torch.bfloat16 and half.shape == (3, 16, 16)
    assert not restore(tiny("hat"), torch.rand(3, 8, 8, requires_grad=True), progress=False).requires_grad
    assert restoration.A2N.value_range == 255.0 and restoration.HAT.value_range == 1.0


def test_the_model_is_as_it_was():
    model, image = Probe().train(), torch.rand(3, 8, 8)
    model.inner.eval()
    torch.testing.assert_close(restore(model, image, tile=4, progress=False), image)
    assert model.training and not model.inner.training
    model.inner.train()
    torch.testing.assert_close(restore(model, image, tile=4, progress=False), image)  # no dropout
    model.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        restore(model, image, progress=False)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ({"tile": 30}, ValueError, r"tile must be a multiple of the model's window, 4, got \(30, 30\)"),
        ({"tile": 0}, ValueError, "tile must be at least 1"),
        ({"tile": 8.0}, TypeError, "tile must hold int"),
        ({"tile": (8, 8, 8)}, ValueError, "tile must be one value or one per axis"),
        ({"tile": 16, "overlap": 6}, ValueError, "overlap must be a multiple of the model's window, 4"),
        ({"tile": (16, 8), "overlap": 8}, ValueError, "overlap must be below tile=8 in width, got 8"),
        ({"tile": 16, "overlap": -4}, ValueError, "overlap must be at least 0"),
        ({"tile": 16, "overlap": 8, "margin": 5}, ValueError, "margin must be from 0 to 4, got 5"),
        ({"tile": 16, "overlap": 8, "margin": 1.5}, TypeError, "margin must be an int"),
        ({"overlap": 8}, ValueError, "overlap must come with a tile"),
        ({"image": torch.rand(8, 8)}, ValueError, r"image must be \[3, H, W\]"),
        ({"image": torch.rand(1, 8, 8)}, ValueError, r"image must be \[3, H, W\]"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, TypeError, "image must be floating point"),
        ({"image": "cat.png"}, TypeError, "image must be a tensor"),
        ({"model": nn.Identity()}, TypeError, "model must be a Restorer"),
    ],
)
def test_bad_input_is_named(arguments, error, said):
    model = Probe(2, 4)
    with pytest.raises(error, match=said):
        restore(**{"model": model, "image": torch.rand(3, 32, 32), "progress": False, **arguments})
    assert not model.seen
