"""sampled_window_attention against a dense float64 formula written here, F.grid_sample, and the authors' numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from attnzoo.kernels import dispatch, positions_from_normalized, sampled_window_attention
from attnzoo.kernels.sampled_window_attention import reference, tiled

INTERPRETING = dispatch.interpreting()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1"))
BACKENDS = ["reference", "tiled", TRITON]
FEW = {"windows": (1, 2), "heads": 2, "heads_kv": 1}  # what the interpreter runs in seconds
NAMES = ("out", "lse", "grad query", "grad key", "grad value", "grad positions", "grad bias")


def to_windows(tensor: Tensor, window) -> Tensor:
    """[B, H, W, heads, dim] as [B, down, across, heads, area, dim]."""
    B, H, W, heads, dim = tensor.shape
    cut = tensor.reshape(B, H // window[0], window[0], W // window[1], window[1], heads, dim)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def from_windows(tensor: Tensor, window) -> Tensor:
    B, down, across, heads, _, dim = tensor.shape
    cut = tensor.reshape(B, down, across, heads, *window, dim).permute(0, 1, 4, 2, 5, 3, 6)
    return cut.reshape(B, down * window[0], across * window[1], heads, dim)


def attend(query, keys, values, window, scale, bias):
    """(out, lse) of the windows' queries over keys and values [B, down, across, heads, K, dim]."""
    logits = to_windows(query, window) @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    out = from_windows(logits.softmax(-1) @ values, window)
    return out, from_windows(logits.logsumexp(-1, keepdim=True), window).squeeze(-1)


def dense(query, key, value, positions, bias, window, scale=None):
    """The definition: every pixel of the map, weighted by (1 - |y - i|)+ (1 - |x - j|)+, for every key."""
    group, (height, width) = query.shape[3] // key.shape[3], key.shape[1:3]
    down = F.relu(1 - (positions[..., 0, None] - torch.arange(height).to(positions)).abs())
    across = F.relu(1 - (positions[..., 1, None] - torch.arange(width).to(positions)).abs())
    weights = down[..., :, None] * across[..., None, :]
    keys, values = (torch.einsum("bmnhkyx,byxhd->bmnhkd", weights, t.repeat_interleave(group, 3)) for t in (key, value))
    return attend(query, keys, values, window, scale, bias)


def sampled_by_torch(query, key, value, positions, bias, window, scale=None):
    """The same through F.grid_sample, whose gradient at whole-numbered positions is the one to match."""
    (B, down, across, heads, K, _), (height, width) = positions.shape, key.shape[1:3]
    grid = torch.stack([positions[..., 1] * 2 / (width - 1) - 1, positions[..., 0] * 2 / (height - 1) - 1], -1)
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(B * heads, down * across, K, 2)

    def read(tensor: Tensor) -> Tensor:
        maps = tensor.repeat_interleave(heads // tensor.shape[3], 3).permute(0, 3, 4, 1, 2).flatten(0, 1)
        made = F.grid_sample(maps, grid, align_corners=True)
        return made.view(B, heads, -1, down, across, K).permute(0, 3, 4, 1, 5, 2)

    return attend(query, read(key), read(value), window, scale, bias)


def make(
    windows=(2, 2), window=(3, 4), keys=(5, 6), heads=4, heads_kv=2, dim=8, dim_v=8, samples=9, batch=2, bias=True,
    dtype=torch.float32, layout="plain", reach=2.5,
):  # fmt: skip
    """query, key, value, positions (beyond the map by up to `reach` pixels), bias or None."""

    def rows(height, width, count, size):
        if layout == "channels first":
            return torch.randn(batch, count * size, height, width).unflatten(1, (count, size)).permute(0, 3, 4, 1, 2)
        if layout == "packed":
            return torch.randn(batch, height, width, 2, count + 1, size + 3)[..., 1, 1:, 3:]
        return torch.randn(batch, height, width, count, size)

    query = rows(windows[0] * window[0], windows[1] * window[1], heads, dim)
    key, value = rows(*keys, heads_kv, dim), rows(*keys, heads_kv, dim_v)
    size = torch.tensor(keys) - 1 + 2 * reach
    if layout == "channels first":
        positions = torch.rand(batch, heads, 2, *windows, samples).permute(0, 3, 4, 1, 5, 2) * size - reach
    else:
        positions = torch.rand(batch, *windows, heads, samples, 2) * size - reach
    added = torch.randn(heads, math.prod(window), samples) if bias else None
    return [t if t is None else t.to(dtype) for t in (query, key, value, positions, added)]


def call(tensors, window, scale=None, backend="auto"):
    *given, bias = tensors
    return sampled_window_attention(*given, window, scale, bias=bias, return_lse=True, backend=backend)


def results(function, tensors, weights=None):
    """out, lse and the gradients of a fixed sum of both, None for a missing bias; `weights` for out and lse."""
    given = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out, lse = function(given)
    if weights is None:
        made = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=made).bfloat16().to(t.dtype) for t in (out, lse)]
    found = iter(torch.autograd.grad([out, lse], [t for t in given if t is not None], weights))
    return [out.detach(), lse.detach(), *(None if t is None else next(found) for t in given)]


def compare(got, want, tolerance=1e-5):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is None:
            continue
        assert a.shape == b.shape and a.is_contiguous(), name
        error = (a.double() - b).norm().item()
        size = max(b.norm().item(), 1.0)  # what cancels exactly (with a single key, say) leaves rounding errors
        assert error <= tolerance * size, f"{name}: {error / size:.1e}"


def check(tensors, window, scale, backend, tolerance=1e-5):
    exact = [None if t is None else t.double() for t in tensors]
    want = results(lambda t: dense(*t, window, scale), exact)
    got = results(lambda t: call(t, window, scale, backend), tensors)
    # A logit's rounding error grows with it, and is the relative error of its weight.
    compare(got, want, tolerance * max(1.0, want[1].abs().max().item() / 10))


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    heads_kv = draw(st.integers(1, 3))
    tensors = make(
        windows=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        window=(window := (draw(st.integers(1, 4)), draw(st.integers(1, 5)))),
        keys=(draw(st.integers(1, 7)), draw(st.integers(1, 7))),
        heads_kv=heads_kv,
        heads=heads_kv * draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([1, 5, 8, 13, 16, 32, 65, 256])),
        dim_v=draw(st.sampled_from([1, 7, 8, 16, 31, 128])),
        samples=draw(st.sampled_from([1, 2, 9, 20, 49])),
        batch=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["plain", "channels first", "packed"])),
        reach=draw(st.sampled_from([0.3, 1.5, 8.0])),
    )
    if draw(st.booleans()):
        tensors[0] = tensors[0] * 20  # logits that need their maximum subtracted
    return tensors, window, draw(st.sampled_from([None, 0.0, 0.3, -0.5]))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems())
def test_any_problem(backend, problem):
    check(*problem, backend)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_any_problem_long(problem):
    check(*problem, "tiled")
    tensors, window, scale = problem
    exact = [None if t is None else t.double() for t in tensors]
    compare(
        results(lambda t: call(t, window, scale, "tiled"), exact),
        results(lambda t: call(t, window, scale, "reference"), exact),
        1e-11,
    )


@pytest.mark.parametrize("limits", [(30, 1 << 30), (1 << 30, 1), (200, 1), (1000, 1 << 30)])
@pytest.mark.parametrize("bias", [True, False])
def test_cpu_path_in_small_pieces(monkeypatch, limits, bias):
    """Parts of a window, single windows, rows of them, single items, and the reference window by window."""
    tensors = make(batch=3, windows=(2, 3), dtype=torch.float64, bias=bias)
    want = results(lambda t: call(t, (3, 4), backend="tiled"), tensors)
    monkeypatch.setattr(tiled, "_LOGITS", limits[0])
    monkeypatch.setattr(tiled, "_MAPS", limits[1])
    monkeypatch.setattr(reference, "_CHUNK", 1)
    for backend in ("tiled", "reference"):
        compare(results(lambda t, b=backend: call(t, (3, 4), backend=b), tensors), want, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_numbered_positions_and_borders_are_grid_samples(backend):
    """Values and gradients at pixels, on the map's edges, one pixel and more beyond: F.grid_sample's."""
    places = torch.tensor([-7.0, -2.0, -1.0, -0.5, 0.0, 1.0, 2.25, 3.0, 4.0, 4.5, 5.0, 11.0])
    y, x = torch.meshgrid(places, places, indexing="ij")
    positions = torch.stack([y, x], -1).view(1, 1, 1, 1, -1, 2).expand(1, 2, 1, 2, -1, 2)
    query, key, value, _, _ = make((2, 1), (2, 2), (5, 5), heads=2, heads_kv=2, batch=1, bias=False)
    tensors = [query, key, value, positions, None]
    want = results(lambda t: sampled_by_torch(*t, (2, 2)), [t if t is None else t.double() for t in tensors])
    compare(results(lambda t: call(t, (2, 2), backend=backend), tensors), want, 2e-6)


@pytest.mark.parametrize("align_corners", [True, False])
def test_positions_from_normalized(align_corners):
    coordinates = torch.rand(2, 3, 4, 2, dtype=torch.float64) * 3 - 1.5
    maps = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    want = F.grid_sample(maps, coordinates, align_corners=align_corners)
    positions = positions_from_normalized(coordinates, (5, 7), align_corners)
    pixels = [torch.arange(n, dtype=torch.float64) for n in (5, 7)]
    down, across = (F.relu(1 - (positions[..., i, None] - pixels[i]).abs()) for i in range(2))
    torch.testing.assert_close(torch.einsum("bmny,byx,bmnx->bmn", down, maps[:, 0], across), want[:, 0])
    assert positions_from_normalized(coordinates.half(), 9).dtype == torch.float16


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_outside_take_softmax_mass(backend):
    """A key beyond the map, at infinity too, has logit bias and value 0, and no gradient."""
    tensors = make(**FEW, dtype=torch.float64 if backend != "triton" else torch.float32)
    far = torch.tensor([[math.inf, 0.0], [1.0, -math.inf], [1e30, -1e30], [-1.5, 2.0], [5.0, 2.0]]).to(tensors[3])
    tensors[3] = torch.cat([tensors[3][..., 5:, :], far.expand(2, 1, 2, 2, 5, 2)], -2)
    inside = tensors[3][..., :4, :]
    exact = [t.double() for t in tensors]
    keys, values = (
        torch.cat([part, part.new_zeros(2, 1, 2, 2, 5, 8)], -2)
        for part in (
            torch.einsum(
                "bmnhky,bmnhkx,byxhd->bmnhkd",
                F.relu(1 - (inside[..., 0, None].double() - torch.arange(5)).abs()),
                F.relu(1 - (inside[..., 1, None].double() - torch.arange(6)).abs()),
                t.repeat_interleave(2, 3),
            )
            for t in exact[1:3]
        )
    )
    out, lse = attend(exact[0], keys, values, (3, 4), None, exact[4])
    got = results(lambda t: call(t, (3, 4), backend=backend), tensors)
    compare(got[:2] + [None] * 5, [out, lse] + [None] * 5, 1e-6)
    assert all(g.isfinite().all() for g in got) and not got[5][..., 4:, :].any() and got[5][..., :4, :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_that_is_not_a_number(backend):
    """It makes its own window and head not a number, in all the other results nothing."""
    tensors = make(**FEW)
    clean = [t.clone() for t in tensors]
    tensors[3][0, 0, 1, 1, 4, 1] = math.nan
    bad = torch.zeros(2, 3, 8, 2, dtype=torch.bool)
    bad[0, :, 4:, 1] = True
    got, want = (results(lambda t: call(t, (3, 4), backend=backend), t) for t in (tensors, clean))
    for place in range(3):  # out, lse, gradient of query
        assert got[place][bad].isnan().all()
        torch.testing.assert_close(got[place][~bad], want[place][~bad])
    torch.testing.assert_close(got[3][1], want[3][1])
    assert got[5][1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_value_stays_where_it_is_read(backend):
    """What lies outside is zero, not zero times whatever lies at the edge."""
    tensors = make(**FEW, bias=False)
    tensors[3] = torch.cat([tensors[3][..., :3, :].clamp(1.1, 2.9), torch.full((2, 1, 2, 2, 2, 2), -9.0)], -2)
    clean = results(lambda t: call(t, (3, 4), backend=backend), tensors)
    for edge in ((0, 0), (0, 5), (4, 0), (4, 5)):
        tensors[1][:, edge[0], edge[1]] = math.inf
        tensors[2][:, edge[0], edge[1]] = math.nan
    got = results(lambda t: call(t, (3, 4), backend=backend), tensors)
    for a, b in zip(got, clean):
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_keys(backend):
    tensors = make(**FEW)
    tensors[4][1, 5] = -math.inf
    tensors[4][0, 2, 3] = -math.inf
    got = results(lambda t: call(t, (3, 4), backend=backend), tensors)
    # Query 5 of a window of 3 x 4 is its row 1, column 1.
    rows = (slice(None), slice(1, None, 3), slice(1, None, 4), 1)
    assert not got[0][rows].any() and (got[1][rows] == -math.inf).all() and not got[2][rows].any()
    assert not got[6][1, 5].any() and all(g.isfinite().all() for g in (got[0], *got[2:]))
    assert got[1].isinf().sum() == got[1][rows].numel()
    exact = [t.double() for t in tensors]
    exact[4][1, 5] = 0.0
    want = results(lambda t: dense(*t, (3, 4)), exact)
    rest = torch.ones(2, 3, 8, 2, dtype=torch.bool)
    rest[rows] = False
    for place in range(2):
        torch.testing.assert_close(got[place][rest].double(), want[place][rest], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    """Not worse than 1.5 times stock attention over the sampled keys, sampled exactly and rounded to that dtype.

    Under the interpreter bfloat16 alone may err twice as much: it truncates where it converts, see
    test_kernels_edited.py.
    """
    tensors = make((1, 2), (8, 8), (16, 16), heads=2, heads_kv=2, dim=32, dim_v=32, samples=64, batch=1, bias=False)
    rounded = [t if t is None else t.to(dtype) for t in tensors]
    rounded[3] = tensors[3]
    exact = [t if t is None else t.double() for t in rounded]
    want = results(lambda t: dense(*t, (8, 8)), exact)
    got = results(lambda t: call(t, (8, 8), backend=backend), rounded)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert [g.dtype for g in got[2:6]] == [dtype] * 3 + [torch.float32]
    eye = exact[3]
    keys, values = (
        torch.einsum(
            "bmnhky,bmnhkx,byxhd->bmnhkd",
            F.relu(1 - (eye[..., 0, None] - torch.arange(16)).abs()),
            F.relu(1 - (eye[..., 1, None] - torch.arange(16)).abs()),
            t,
        ).to(dtype)
        for t in exact[1:3]
    )
    stock = F.scaled_dot_product_attention(to_windows(rounded[0], (8, 8)), keys, values)
    times = 3.0 if backend == "triton" and dtype == torch.bfloat16 else 1.5
    budget = (from_windows(stock, (8, 8)).double() - want[0]).norm()
    assert (got[0].double() - want[0]).norm() <= times * budget
    # Gradients: one rounding of the result and, on a GPU, those of p and dlogits before their products.
    bar = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for a, b in zip(got[2:6], want[2:6]):
        assert (a.double() - b).norm() <= bar * b.norm()


# ------------------------------------------------------------------------------------------ the authors' numbers


def vsa(meta: dict, t: dict[str, Tensor]) -> Tensor:
    """VSA's attention module around the operation, as shared/specs/backbones.md section 3 states it."""
    config, x = meta["config"], t["input"]
    detection = meta["variant"] == "vsa_attn_det"
    heads, ws, (C, h, w) = config["num_heads"], config["window_size"], x.shape[1:]
    more = [-n % ws for n in (h, w)]
    before = [n // 2 for n in more] if detection else [0, 0]
    pad = (before[1], more[1] - before[1], before[0], more[0] - before[0])
    padded, size = F.pad(x, pad), (h + more[0], w + more[1])

    def conv(name: str, inputs: Tensor) -> Tensor:
        return F.conv2d(inputs, t[f"state.{name}.weight"], t[f"state.{name}.bias"])

    pooled = F.leaky_relu(F.avg_pool2d(padded, ws), 0.01)
    offsets, scales = (conv(f"sampling_{n}.2", pooled) for n in ("offsets", "scales"))
    torch.testing.assert_close(offsets, t["raw_offsets"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scales, t["raw_scales"], rtol=1e-5, atol=1e-5)
    # [B, heads * (x, y), down, across] -> [B, down, across, heads, (x, y)]
    offsets, scales = (n.unflatten(1, (heads, 2)).permute(0, 3, 4, 1, 2) for n in (offsets, scales))
    steps = (h // ws, w // ws) if detection else (w // ws, h // ws)
    offsets = offsets / torch.tensor(steps)
    centre, inner = [], []
    for n in (size[1], size[0]):
        centre.append(torch.linspace(-1, 1, n).view(-1, ws).mean(1))
        inner.append((torch.arange(ws) - (ws - 1) / 2) * 2 / (n - 1))
    middle = torch.stack(torch.meshgrid(centre[1], centre[0], indexing="ij")[::-1], -1)[:, :, None, None]
    within = torch.stack(torch.meshgrid(inner[1], inner[0], indexing="ij")[::-1], -1).flatten(0, 1)
    coordinates = middle + within * (1 + scales[..., None, :]) + offsets[..., None, :]
    positions = positions_from_normalized(coordinates, size, align_corners=True)

    qkv = F.pad(conv("qkv", x), pad).unflatten(1, (3, heads, -1)).permute(1, 0, 4, 5, 2, 3)
    index = t["state.relative_position_index"].long()
    bias = t["state.relative_position_bias_table"][index].permute(2, 0, 1)
    out = sampled_window_attention(*qkv, positions, ws, (C // heads) ** -0.5, bias=bias)
    out = out[:, before[0] : before[0] + h, before[1] : before[1] + w].flatten(3).permute(0, 3, 1, 2)
    return conv("proj", out)


@pytest.mark.parametrize("case", ["vsa_attn_0", "vsa_attn_1", "vsa_attn_det_0", "vsa_attn_det_1"])
def test_vsa_is_this_operation(goldens_root, case):
    meta = json.loads((goldens_root / f"backbones/vsa/{case}.json").read_text())
    tensors = load_file(goldens_root / f"backbones/vsa/{case}.safetensors")
    got, want = vsa(meta, tensors), tensors["output"]
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


# ------------------------------------------------------------------------------------------ under Triton's interpreter


@contextmanager
def watched():
    """torch.empty gives NaN, and a launch that touches memory outside its tensors raises."""
    import numpy as np
    from triton.runtime import interpreter

    from attnzoo.kernels.sampled_window_attention import triton as forward_module
    from attnzoo.kernels.sampled_window_attention import triton_backward as backward_module

    allowed: list[tuple[int, int]] = []
    native, empty, launch = interpreter._interpreter, torch.empty, forward_module.launch

    def inside(pointers, mask, itemsize):
        touched = pointers[mask].astype(np.int64)
        found = np.zeros(touched.shape, dtype=bool)
        for first, end in allowed:
            found |= (touched >= first) & (touched + itemsize <= end)
        assert found.all(), f"{(~found).sum()} of {found.size} accesses lie outside the launch's tensors"

    class Watched:
        def __getattr__(self, name):
            return getattr(native, name)

        def load(self, pointers, mask, other, dtype):
            inside(pointers, mask, np.dtype(dtype).itemsize)
            return native.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            inside(pointers, mask, value.dtype.itemsize)
            return native.store(pointers, value, mask)

        def atomic_rmw(self, op, pointers, value, mask, sem):
            inside(pointers, mask, value.dtype.itemsize)
            return native.atomic_rmw(op, pointers, value, mask, sem)

    def filled(*arguments, **options):
        made = empty(*arguments, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    def launch_watched(kernel, programs, **arguments):
        allowed.clear()
        for tensor in (a for a in arguments.values() if isinstance(a, Tensor)):
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            allowed.append((tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()))
        launch(kernel, programs, **arguments)

    try:
        interpreter._interpreter, torch.empty = Watched(), filled
        forward_module.launch = backward_module.launch = launch_watched
        yield
    finally:
        interpreter._interpreter, torch.empty = native, empty
        forward_module.launch = backward_module.launch = launch


TRITON_CASES = {
    "vsa": ({"windows": (2, 1), "window": (7, 7), "keys": (9, 8), "heads": 2, "heads_kv": 2, "dim": 32, "dim_v": 32,
             "samples": 49, "batch": 1}, None),
    "no bias, odd head dims": ({"windows": (1, 2), "dim": 5, "dim_v": 40, "bias": False, "batch": 1}, None),
    "gqa, several tiles": ({"windows": (1, 1), "window": (9, 11), "samples": 70, "heads": 2, "heads_kv": 1,
                            "batch": 1}, 0.3),
    "one key": ({"windows": (2, 1), "samples": 1, "heads": 1, "heads_kv": 1, "window": (1, 1)}, None),
    "head dim 256": ({"windows": (1, 1), "dim": 256, "dim_v": 200, "heads": 1, "heads_kv": 1, "batch": 1}, None),
    "channels first": ({"windows": (1, 2), "layout": "channels first", "batch": 1}, None),
    "packed": ({"windows": (1, 2), "layout": "packed", "batch": 1}, -0.5),
    "scale 0": ({"windows": (1, 1), "heads": 1, "heads_kv": 1}, 0.0),
}  # fmt: skip


@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_against_the_formula(case):
    options, scale = TRITON_CASES[case]
    window = options.get("window", (3, 4))
    with watched():
        check(make(**options), window, scale, "triton")


@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
def test_triton_deterministic_wide_and_partial(monkeypatch):
    """The deterministic route, 64-bit offsets and fewer gradients agree with the plain call."""
    from attnzoo.kernels.sampled_window_attention import triton, triton_backward

    tensors = make(**FEW | {"batch": 1})
    want = results(lambda t: call(t, (3, 4), backend="triton"), tensors)
    torch.use_deterministic_algorithms(True)
    try:
        with watched():
            again = results(lambda t: call(t, (3, 4), backend="triton"), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    compare(again, [t.double() for t in want], 1e-6)
    query, key, value, positions, bias = (t.detach().requires_grad_(i in (1, 4)) for i, t in enumerate(tensors))
    monkeypatch.setattr(triton, "wide", lambda *_: True)
    monkeypatch.setattr(triton_backward, "BIAS_PROGRAMS", 1)
    with watched():
        out, lse = call((query, key, value, positions, bias), (3, 4), backend="triton")
        made = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=made).bfloat16().to(t.dtype) for t in (out, lse)]
        some = torch.autograd.grad([out, lse], [key, bias], weights)
    for a, b in zip((out, lse, *some), (want[0], want[1], want[3], want[6])):
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETING, reason="is the outer process")
def test_triton_in_the_interpreter():
    """Runs this file's triton tests in a process of their own: the variable must not reach other tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
