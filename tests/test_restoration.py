"""HAT and A2N: the plain formulas, sizes, published files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnzoo import catalog
from attnzoo.backbones import load_published, restoration
from attnzoo.backbones.restoration.hat import checkpoint_filter_fn
from attnzoo.backbones.restoration.hat_blocks import overlap_index, overlap_roll, self_index, window_masks

TINY_HAT = {
    "img_size": 16,
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (2, 3),
    "window_size": 4,
    "compress_ratio": 3,
    "squeeze_factor": 4,
    "num_feat": 6,
    "drop_path_rate": 0.0,
}
TINY = {
    "hat": ("hat_x2", TINY_HAT),
    "a2n": ("a2n_x4", {"embed_dim": 8, "up_dim": 6, "depth": 2}),
}


def tiny(kind="hat", dtype=torch.float32, **kwargs):
    name, arguments = TINY[kind]
    model = restoration.create(name, dtype=dtype, **{**arguments, **kwargs}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table"):
                parameter.normal_()
    return model


# ---- names


@pytest.mark.parametrize("name", restoration.list_models())
def test_published_sizes(name):
    entry = restoration.ENTRIES[name]
    model = restoration.create(name, device="meta")
    assert model.upscale == int(name[-1]) and model.pretrained_cfg["architecture"] == name
    assert entry.params in (None, sum(p.numel() for p in model.parameters()))
    row = catalog.get(entry.method)
    assert row.room == "backbones" and row.models == () and row.test == f"backbones/{entry.method}"


def test_names_and_arguments():
    assert {"hat_s_x2", "hat_x3", "hat_l_x4", "a2n_x4"} <= set(restoration.list_models())
    assert restoration.list_models("a2n*") == ["a2n_x2", "a2n_x3", "a2n_x4"]
    assert tiny(in_chans=1, upscale=3, dtype=torch.float64)(torch.rand(1, 1, 4, 4).double()).shape == (1, 1, 12, 12)
    with pytest.raises(ValueError, match=r"name must be one of.*'hat_x5'.*hat_x4"):
        restoration.create("hat_x5")
    with pytest.raises(ValueError, match="registered already"):
        restoration.register("hat_x4", restoration.ENTRIES["hat_x4"])


# ---- the formulas


def plain_attention(block, x, index_of, keys_of):
    """Attention pixel by pixel: keys_of(y, x) gives the key pixels of a query, index_of(query, key) the row of the
    bias table."""
    heads = block.num_heads
    query, key, value = block.qkv(x).unflatten(-1, (3, heads, -1)).unbind(-3)
    out = torch.zeros_like(query)
    for top in range(x.shape[0]):
        for left in range(x.shape[1]):
            rows = [index_of((top, left), at) for at in keys_of(top, left)]
            inside = [at if 0 <= at[0] < x.shape[0] and 0 <= at[1] < x.shape[1] else None for at in keys_of(top, left)]
            zero = torch.zeros_like(key[0, 0])
            k = torch.stack([zero if at is None else key[at] for at in inside], 1)
            v = torch.stack([zero if at is None else value[at] for at in inside], 1)
            bias = block.relative_position_bias_table[torch.tensor(rows)].T
            logits = (query[top, left][:, None] * k).sum(-1) * block.scale + bias
            out[top, left] = (logits.softmax(-1)[..., None] * v).sum(1)
    return block.proj(out.flatten(-2))


@pytest.mark.parametrize("size", [(8, 12), (4, 8), (4, 4)])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_hab_is_its_formula(size, shift):
    window, side = 4, 7
    block = restoration.HAB(6, 2, window, shift, squeeze_factor=2, conv_scale=0.3).double()
    block.attn.relative_position_bias_table.data.normal_()
    x = torch.randn(1, *size, 6, dtype=torch.float64, requires_grad=True)

    def cell(at, length):  # which window, cut where the moved map wraps around
        return (at - shift) // window if at >= shift else -1

    def keys_of(top, left):
        pixels = [(i, j) for i in range(size[0]) for j in range(size[1])]
        here = (cell(top, size[0]), cell(left, size[1]))
        return [p for p in pixels if (cell(p[0], size[0]), cell(p[1], size[1])) == here]

    def index_of(query, key):
        return (query[0] - key[0] + window - 1) * side + query[1] - key[1] + window - 1

    normed = block.norm1(x)
    want = x + plain_attention(block.attn, normed[0], index_of, keys_of)[None]
    want = want + 0.3 * block.conv_block(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    want = want + block.mlp(block.norm2(want))
    got = block(x, self_index(window))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    parameters = [x, block.attn.relative_position_bias_table, block.attn.qkv.weight]
    seed = torch.randn_like(want)
    for ours, plain in zip(torch.autograd.grad(got, parameters, seed), torch.autograd.grad(want, parameters, seed)):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    shared = window_masks(window, shift, x) if shift else None
    assert torch.equal(block(x, self_index(window), shared), got)


@pytest.mark.parametrize("size", [(8, 4), (4, 4)])
def test_ocab_is_its_formula(size):
    window, overlap, side = 4, 2, 9
    block = restoration.OCAB(6, 2, window, overlap).double()
    block.relative_position_bias_table.data.normal_()
    x = torch.randn(1, *size, 6, dtype=torch.float64, requires_grad=True)

    def corner(at):
        return at // window * window - overlap // 2

    def keys_of(top, left):
        outer = range(window + overlap)
        return [(corner(top) + i, corner(left) + j) for i in outer for j in outer]

    def index_of(query, key):  # distances inside the windows, not the image; negative rows count from the end
        (down, across) = (key[a] - corner(query[a]) - query[a] % window - overlap + 1 for a in (0, 1))
        return down * side + across

    # qkv before the padding, as there: padded keys are zeros and not the bias
    want = x + plain_attention(block, block.norm1(x)[0], index_of, keys_of)[None]
    want = want + block.mlp(block.norm2(want))
    got = block(x, overlap_index(window, overlap))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    parameters, seed = [x, block.relative_position_bias_table], torch.randn_like(want)
    for ours, plain in zip(torch.autograd.grad(got, parameters, seed), torch.autograd.grad(want, parameters, seed)):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_the_published_indices():
    index, rows = overlap_index(16, 8), 39 * 39
    assert index.min() == -880 and index.max() == 640 and index.unique().numel() == rows
    from_zero = (index % rows + overlap_roll(16, 8)) % rows
    query, key = (torch.cartesian_prod(torch.arange(n), torch.arange(n)) for n in (16, 24))
    apart = key[None] - query[:, None] + 15
    assert torch.equal(from_zero, apart[..., 0] * 39 + apart[..., 1])
    model = restoration.create("hat_x4", device="meta")
    assert model.state_dict()["relative_position_index_OCA"].shape == (256, 576)


# ---- sizes, and what a size decides


@pytest.mark.parametrize("size", [(13, 22), (3, 5), (1, 2)])
def test_any_size_is_padding_and_cropping(size):
    model, x = tiny(), torch.rand(2, 3, *size)
    below, right = (-(-n // 4) * 4 - n for n in size)
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, below), (0, right)), mode="reflect"))
    assert torch.equal(restoration.pad_reflect(x, 4), padded)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(padded)[..., : 2 * size[0], : 2 * size[1]])
        assert tiny("a2n")(x).shape == (2, 3, 4 * size[0], 4 * size[1])


def test_what_a_size_decides():
    moved = [block.shift for layer in tiny().layers for block in layer.residual_group.blocks]
    assert moved == [0, 2, 0]
    assert not any(b.shift for layer in tiny(img_size=(4, 16)).layers for b in layer.residual_group.blocks)
    with pytest.raises(ValueError, match="img_size must be at least window_size=4"):
        tiny(img_size=(3, 16))
    with pytest.raises(ValueError, match="overlap must be even"):
        tiny(overlap_ratio=0.75)
    with pytest.raises(ValueError, match="upsampler must be 'pixelshuffle'.*compat='official'"):
        tiny(upsampler="")
    identity = tiny(upsampler=None, compat="official")
    x = torch.rand(1, 3, 5, 7)
    torch.testing.assert_close(identity(x), x)
    assert identity.unused_parameters() == set(dict(identity.named_parameters())) and not tiny().unused_parameters()
    for wrong, said in (({"upscale": 6}, "scale must be"), ({"resi_connection": "3conv"}, "resi_connection must be")):
        with pytest.raises(ValueError, match=said):
            tiny(**wrong)
    with pytest.raises(ValueError, match="upscale must be one of 2, 3, 4"):
        tiny("a2n", upscale=8)
    with pytest.raises(ValueError, match="in_chans=3"):
        tiny()(torch.rand(1, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(TINY))
def test_compiles(kind):
    model, x = tiny(kind), torch.rand(1, 3, 8, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    whole = restoration.restore(model, x, progress=False)
    torch.testing.assert_close(restoration.restore(compiled, x, progress=False), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(TINY))
def test_autocast_and_bfloat16(kind):
    model, x = tiny(kind), torch.rand(1, 3, 8, 12)
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(x)
        assert (low.float() - want).abs().max() < 0.05
        assert (model.bfloat16()(x.bfloat16()) - want).abs().max() < 0.05


@pytest.mark.parametrize("kind", sorted(TINY))
def test_training_with_and_without_checkpointing(kind):
    model = tiny(kind, **({"drop_path_rate": 0.5, "attn_drop_rate": 0.2} if kind == "hat" else {})).train()
    x, gradients = torch.rand(4, 3, 8, 12), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert sum(bool(g.any()) for g in gradients[0]) > 0.8 * len(gradients[0])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


# ---- published files


@pytest.mark.parametrize("kind", sorted(TINY))
@pytest.mark.parametrize("entry", ["params_ema", "params", None])
def test_files_load(tmp_path, kind, entry):
    source, target, x = tiny(kind), tiny(kind), torch.rand(1, 3, 8, 8)
    state = source.state_dict()
    torch.save(state if entry is None else {"params": {}, entry: state}, tmp_path / "w.pth")
    report = load_published(target, tmp_path / "w.pth")
    assert torch.equal(target(x), source(x))
    assert report.loaded == len(state) and not (report.renamed or report.resampled or report.dropped or report.made)
    name, arguments = TINY[kind]
    assert torch.equal(restoration.create(name, tmp_path / "w.pth", **arguments).eval()(x), source(x))
    wider = tiny(kind, embed_dim=24)
    with pytest.raises(ValueError, match="conv_first.weight is"):
        load_published(wider, tmp_path / "w.pth")


def test_early_files_and_foreign_indices(tmp_path):
    source = tiny()
    early = {k: v for k, v in source.state_dict().items() if not k.startswith("relative_position_index")}
    early["layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    torch.save(early, tmp_path / "w.pth")
    report = load_published(tiny(), tmp_path / "w.pth")
    assert report.dropped == ("layers.0.residual_group.blocks.1.attn_mask",) and len(report.made) == 2
    foreign = source.state_dict()
    foreign["relative_position_index_OCA"] = foreign["relative_position_index_OCA"] + 1
    with pytest.raises(ValueError, match="trained with other positions"):
        checkpoint_filter_fn(foreign, tiny())


def test_another_window_resamples_by_distance():
    """A table that is linear in the distance stays so (bicubic: nearly), also where OCAB's indices wrap."""
    old, new = tiny(), tiny(window_size=8)
    state = old.state_dict()
    tables = [k for k in state if k.endswith("bias_table")]
    for key in tables:
        overlapping = "overlap_attn" in key
        side = 9 if overlapping else 7
        plane = torch.arange(side, dtype=torch.float32) - side // 2
        table = (plane[:, None] * 10 + plane[None]).flatten()[:, None].expand(-1, state[key].shape[1]) / side
        state[key] = table.roll(-overlap_roll(4, 2), 0) if overlapping else table
    fitted = checkpoint_filter_fn(state, new)
    new.load_state_dict(fitted, strict=True)
    for key in tables:
        overlapping = "overlap_attn" in key
        side = 19 if overlapping else 15
        table = fitted[key].roll(overlap_roll(8, 4), 0) if overlapping else fitted[key]
        plane = torch.arange(side, dtype=torch.float32) - side // 2
        want = (plane[:, None] * 10 + plane[None]) / side
        inner = slice(side // 4, -(side // 4))
        got = table[:, 0].unflatten(0, (side, side))
        torch.testing.assert_close(got[inner, inner], want[inner, inner], rtol=0, atol=0.1)
    unchanged = checkpoint_filter_fn(old.state_dict(), old)
    assert all(torch.equal(unchanged[k], v) for k, v in old.state_dict().items())


def test_a_position_embedding_goes_with_its_map():
    model = tiny(ape=True, img_size=8)
    assert model(torch.rand(1, 3, 12, 8)).shape == (1, 3, 24, 16)
    larger = tiny(ape=True, img_size=(12, 16))
    larger.load_state_dict(checkpoint_filter_fn(model.state_dict(), larger), strict=True)
    assert larger.absolute_pos_embed.shape == (1, 192, 12)
    assert any(n.endswith("absolute_pos_embed") for n in larger.no_weight_decay())
