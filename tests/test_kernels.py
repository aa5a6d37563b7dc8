"""neighborhood_attention, merge_attentions and the dispatcher, against a dense attention under an explicit mask."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading

import goldens_kernels
import pytest
import torch
from goldens import root
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.kernels import (
    merge_attentions,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
    neighborhood_logits,
    not_supported_reasons,
    use_backend,
)
from attnzoo.kernels.neighborhood_attention import _problem, flex, reference, tiled, tiling

CPU = ("reference", "tiled")


def axis_pairs(size: int, kernel: int, stride: int, dilation: int, causal: bool, border: str) -> dict:
    """{(query, key or None for a zero key): [(slot, offset index)]} of one axis, by the definition."""
    pairs: dict = {}
    for c in range(size):
        group, p = c % dilation, c // dilation
        length = math.ceil((size - group) / dilation)
        leader = min(p // stride * stride + (stride - 1 if causal else stride // 2), length - 1)
        if causal:
            slots = list(range(leader - kernel + 1, leader + 1))
        else:
            centre = leader
            if border == "shift":
                centre = min(max(leader, kernel // 2), length - 1 - (kernel - 1) // 2)
            slots = list(range(centre - kernel // 2, centre + (kernel - 1) // 2 + 1))
        for slot, j in enumerate(slots):
            inside = 0 <= j < length
            if causal and not (inside and j <= p):
                continue
            if not inside and border != "zero":
                continue
            key = group + dilation * j if inside else None
            pairs.setdefault((c, key), []).append((slot, j - p + kernel - 1))
    return pairs


def dense(q, k, v, kernel, stride, dilation, causal, scale, border, bias, more_k, more_v):
    """Attention under an explicit mask, every key's logit built by loops; zero keys appear as extra columns."""
    grid, heads = tuple(q.shape[1:-2]), q.shape[-2]
    group = heads // k.shape[-2]
    axes = [axis_pairs(*a, border) for a in zip(grid, kernel, stride, dilation, causal)]
    n = math.prod(grid)
    strides = [math.prod(grid[i + 1 :]) for i in range(len(grid))]
    slot_strides = [math.prod(kernel[i + 1 :]) for i in range(len(grid))]
    entries: dict[int, list] = {i: [] for i in range(n)}
    for combo in itertools.product(*(a.items() for a in axes)):
        query = sum(c[0][0] * s for c, s in zip(combo, strides))
        outside = any(c[0][1] is None for c in combo)
        for places in itertools.product(*(c[1] for c in combo)):
            key = n if outside else sum(c[0][1] * s for c, s in zip(combo, strides))
            entries[query].append(
                (key, sum(p[0] * s for p, s in zip(places, slot_strides)), tuple(p[1] for p in places))
            )
    flat = [t.flatten(1, len(grid)) for t in (q, k, v)]
    keys = torch.cat([flat[1], torch.zeros_like(flat[1][:, :1])], 1).repeat_interleave(group, 2)
    values = torch.cat([flat[2], torch.zeros_like(flat[2][:, :1])], 1).repeat_interleave(group, 2)
    outs, lses = [], []
    for i in range(n):
        index = [key for key, _, _ in entries[i]]
        logits = torch.einsum("bhd,bkhd->bhk", flat[0][:, i], keys[:, index]) * scale
        if bias is not None and bias.ndim == len(grid) + 1:
            logits = logits + torch.stack([bias[(slice(None), *offset)] for _, _, offset in entries[i]], -1)
        elif bias is not None:
            logits = logits + bias.flatten(1, len(grid))[:, i][..., [slot for _, slot, _ in entries[i]]]
        seen = values[:, index]
        if more_k is not None:
            far = torch.einsum("bhd,bkhd->bhk", flat[0][:, i], more_k.repeat_interleave(group, 2)) * scale
            logits, seen = torch.cat([logits, far], -1), torch.cat([seen, more_v.repeat_interleave(group, 2)], 1)
        outs.append(torch.einsum("bhk,bkhd->bhd", logits.softmax(-1), seen))
        lses.append(logits.logsumexp(-1))
    return torch.stack(outs, 1).unflatten(1, grid), torch.stack(lses, 1).unflatten(1, grid)


def make(
    grid, kernel, *, batch=2, heads=2, heads_kv=2, dim=8, dim_v=8, bias=None, extra=0, seed=0, dtype=torch.float64
):
    """query, key, value, bias, additional keys and values; None where not asked for."""
    torch.manual_seed(seed)
    shapes = [(batch, *grid, heads, dim), (batch, *grid, heads_kv, dim), (batch, *grid, heads_kv, dim_v)]
    shapes.append({"offset": (heads, *(2 * k - 1 for k in kernel)), "query": (batch, *grid, heads, math.prod(kernel)),
                   "shared": (1, *grid, heads, math.prod(kernel)), None: None}[bias])  # fmt: skip
    shapes += [(batch, extra, heads_kv, dim), (batch, extra, heads_kv, dim_v)] if extra else [None, None]
    return [None if s is None else torch.randn(s, dtype=dtype) for s in shapes]


def call(tensors, *geometry, backend, border="shift", scale=None):
    q, k, v, bias, more_k, more_v = tensors
    return neighborhood_attention(
        q, k, v, *geometry, scale=scale, border=border, bias=bias, additional_keys=more_k, additional_values=more_v,
        return_lse=True, backend=backend,
    )  # fmt: skip


def gradients(function, tensors):
    """out, lse, and the gradient of a fixed random sum of both by every tensor."""
    given = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out, lse = function(given)
    torch.manual_seed(1)
    # weights that every dtype holds exactly
    by_out, by_lse = (torch.randn(t.shape).bfloat16().to(t.dtype) for t in (out, lse))
    loss = (out * by_out).sum() + (lse * by_lse).sum()
    return [out, lse, *torch.autograd.grad(loss, [t for t in given if t is not None])]


CASES = [
    # grid, kernel, stride, dilation, causal, border, options
    ((13,), (5,), (1,), (1,), (False,), "shift", {}),
    ((11,), (4,), (3,), (2,), (True,), "shift", {"bias": "offset", "extra": 2}),
    ((9,), (5,), (2,), (3,), (False,), "zero", {"bias": "query"}),
    ((7, 9), (3, 5), (1, 1), (2, 1), (False, False), "shift", {"bias": "offset", "heads": 4}),
    ((6, 7), (4, 3), (4, 2), (1, 2), (False, True), "shift", {"bias": "offset", "dim_v": 5}),
    ((5, 3), (3, 7), (1, 1), (2, 2), (False, False), "mask", {"bias": "shared", "extra": 1}),
    ((5, 6), (5, 4), (2, 3), (1, 2), (False, False), "zero", {"bias": "offset", "extra": 3, "heads": 4}),
    ((4, 6), (2, 3), (1, 1), (2, 2), (False, False), "mask", {"bias": "offset", "batch": 1}),
    ((3, 4, 5), (3, 2, 3), (1, 2, 1), (1, 2, 1), (True, False, False), "shift", {"bias": "query", "extra": 1}),
    ((2, 3, 4), (3, 3, 3), (1, 1, 2), (1, 1, 2), (False, False, True), "zero", {"bias": "offset"}),
    ((1,), (1,), (1,), (1,), (False,), "shift", {"dim": 3}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[5]}")
@pytest.mark.parametrize("backend", CPU)
def test_agrees_with_the_definition(case, backend):
    *geometry, border, options = case
    tensors = make(*geometry[:2], **options)
    scale = 0.3

    def definition(t):
        return dense(*t[:3], *geometry[1:], scale, border, *t[3:])

    want = gradients(definition, tensors)
    got = gradients(lambda t: call(t, *geometry[1:], backend=backend, border=border, scale=scale), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1 << 6, 1 << 11])
@pytest.mark.parametrize("border", ["shift", "zero"])
def test_tiled_in_small_pieces(monkeypatch, chunk, border):
    """Parts of strips, single heads, flushed bias sums and a small reference chunk change nothing."""
    tensors = make((9, 10), (3, 4), heads=4, bias="offset", extra=2)
    geometry = ((3, 4), (1, 2), (3, 2), (False, True))
    want = gradients(lambda t: call(t, *geometry, backend="tiled", border=border), tensors)
    monkeypatch.setattr(tiling, "CHUNK", chunk)
    monkeypatch.setattr(tiled, "_BIAS", 100)
    monkeypatch.setattr(reference, "_CHUNK", 1 << 10)
    for backend in CPU:
        got = gradients(lambda t, b=backend: call(t, *geometry, backend=b, border=border), tensors)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype,bar", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["plain", "huge logits"])
def test_precision_against_float64(dtype, bar, size):
    exact = make((15, 14), (7, 5), heads=4, dim=32, dim_v=32, bias="offset", extra=3)
    exact[0] = exact[0] * size
    rounded = [t.to(dtype) for t in exact]
    want = gradients(lambda t: call(t, (7, 5), 1, (2, 1), False, backend="reference"), [t.double() for t in rounded])
    got = gradients(lambda t: call(t, (7, 5), 1, (2, 1), False, backend="tiled"), rounded)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert [g.dtype for g in got[2:]] == [dtype] * 6
    for a, b in zip(got, want, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < bar * (20 if size > 1 else 1)


@pytest.mark.parametrize("backend", CPU)
def test_gradcheck(backend):
    options = {"batch": 1, "heads": 2, "heads_kv": 1, "dim": 2, "dim_v": 1, "bias": "offset", "extra": 1}
    tensors = [t.requires_grad_() for t in make((3, 4), (3, 3), **options)]
    assert torch.autograd.gradcheck(lambda *t: call(t, (3, 3), (2, 1), 1, (False, True), backend=backend), tensors)


@pytest.mark.parametrize("backend", CPU)
def test_rows_without_keys(backend):
    q, k, v, *_ = make((6,), (3,), heads=1, heads_kv=1)
    bias = torch.zeros(1, 6, 1, 3, dtype=torch.float64)
    bias[0, 2] = -math.inf
    got = gradients(lambda t: call([*t[:3], bias, None, None], 3, backend=backend), [q, k, v])
    assert (got[0][:, 2] == 0).all() and (got[1][:, 2] == -math.inf).all()
    assert (got[2][:, 2] == 0).all() and all(g.isfinite().all() for g in (got[0], *got[2:]))


def test_half_precision_sums_and_scale_zero():
    q, k, v, *_ = make((8, 8), (8, 8), dtype=torch.float32)
    out = neighborhood_attention(q, k, v, 8, scale=0.0)
    torch.testing.assert_close(out, v.mean((1, 2), keepdim=True).expand_as(out))


def test_strided_inputs_and_fresh_contiguous_outputs():
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 9, 3, 2, 8, dtype=torch.float64)
    q, k, v = qkv.unbind(3)
    odd = torch.randn(2, 2, 8, 9, 9, dtype=torch.float64).permute(0, 3, 4, 1, 2)
    for backend in CPU:
        for query in (q, odd):
            out, lse = neighborhood_attention(query, k, v, 3, dilation=(3, 2), return_lse=True, backend=backend)
            same = neighborhood_attention(query.contiguous(), k.contiguous(), v.contiguous(), 3, dilation=(3, 2))
            torch.testing.assert_close(out, same)
            assert out.is_contiguous() and lse.is_contiguous()
    one = v.contiguous()
    alone = neighborhood_attention(one, one, one, 1)
    assert alone.data_ptr() != one.data_ptr()
    torch.testing.assert_close(alone, one)


@pytest.mark.parametrize("backend", CPU)
def test_empty_batch(backend):
    q, k, v, *_ = make((5, 5), (3, 3), batch=0)
    got = gradients(lambda t: call([*t, None, None, None], 3, backend=backend), [q, k, v])
    assert [tuple(g.shape) for g in got] == [(0, 5, 5, 2, 8), (0, 5, 5, 2), *[(0, 5, 5, 2, 8)] * 3]


def test_operator_is_sound_for_pytorch():
    q, k, v, bias, more_k, more_v = make((5, 6), (3, 3), bias="offset", extra=2, dtype=torch.float32)
    operator = torch.ops.attnzoo.neighborhood_attention.default
    for backend in CPU:
        for extra in ((bias, more_k, more_v), (None, None, None)):
            tensors = [None if t is None else t.detach().requires_grad_() for t in (q, k, v, *extra)]
            options = ([3, 3], [1, 1], [1, 1], [False, True], 0.3, "shift", backend)
            torch.library.opcheck(operator, (*tensors, *options))


def test_compiles_whole_and_follows_the_back_end():
    def layer(q, k, v, bias):
        return neighborhood_attention(q * 2, k, v, (3, 3), dilation=2, bias=bias, return_lse=True)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for grid in ((7, 8), (9, 6)):
        q, k, v, bias, *_ = make(grid, (3, 3), bias="offset", dtype=torch.float32)
        want = gradients(lambda t: layer(*t), [q, k, v, bias])
        for a, b in zip(gradients(lambda t: compiled(*t), [q, k, v, bias]), want, strict=True):
            torch.testing.assert_close(a, b)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(q, k, v, bias), layer(q, k, v, bias))


def test_autocast_casts_query_key_and_value_only():
    q, k, v, bias, *_ = make((7, 7), (3, 3), bias="offset", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = neighborhood_attention(q, k, v, 3, bias=bias, return_lse=True)
        exact = neighborhood_attention(q.double(), k.double(), v.double(), 3, bias=bias)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and exact.dtype == torch.float64
    half = [t.bfloat16() for t in (q, k, v)]
    torch.testing.assert_close(out, neighborhood_attention(*half, 3, bias=bias), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(lambda t: neighborhood_attention(*t[:3], 3, bias=t[3], return_lse=True), [q, k, v, bias])
    assert all(g.dtype == torch.float32 for g in got[2:])


def test_double_backward_is_refused_by_name():
    q, k, v, *_ = make((5,), (3,))
    q.requires_grad_()
    (grad,) = torch.autograd.grad(neighborhood_attention(q, k, v, 3).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="neighborhood_attention.*double backward"):
        grad.sum().backward()


def test_bias_gradient_is_deterministic():
    tensors = make((14, 14), (7, 7), bias="offset", dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(lambda t: call(t, 7, backend="tiled"), tensors) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_natten_names():
    for function, grid in ((na1d, (9,)), (na2d, (7, 6)), (na3d, (4, 5, 3))):
        q, k, v, _, more_k, more_v = make(grid, (3,) * len(grid), extra=2)
        out, lse = function(
            q, k, v, 3, 2, 1, is_causal=True, additional_keys=more_k, additional_values=more_v, return_lse=True
        )
        want = call([q, k, v, None, more_k, more_v], 3, 2, 1, True, backend="reference")
        torch.testing.assert_close((out, lse), want)
        assert isinstance(function(q, k, v, 3, q_tile_shape=(8,) * len(grid)), Tensor)
    with pytest.raises(ValueError, match="query must have 5 dimensions"):
        na2d(*make((9,), (3,))[:3], 3)
    with pytest.raises(ValueError, match="cutlass-fna"):
        na1d(*make((9,), (3,))[:3], 3, backend="cutlass-fna")
    with pytest.raises(ValueError, match="attention_kwargs"):
        na1d(*make((9,), (3,))[:3], 3, attention_kwargs={"backend": "x"})


def test_logits_are_the_softmax_s():
    q, k, v, bias, *_ = make((6, 7), (3, 4), bias="offset")
    logits = neighborhood_logits(q, k, (3, 4), 2, 1, (True, False), bias=bias, border="mask")
    _, lse = neighborhood_attention(q, k, v, (3, 4), 2, 1, (True, False), bias=bias, border="mask", return_lse=True)
    assert logits.shape == (2, 6, 7, 2, 12)
    torch.testing.assert_close(logits.logsumexp(-1), lse)


def test_merge_attentions():
    q, k, v, _, more_k, more_v = make((6, 7), (3, 3), extra=3)
    geometry = (3, 1, 1, False)

    def merged(t):
        near = call([*t[:3], None, None, None], *geometry, backend="reference")
        q, more_k, more_v = t[0].flatten(1, 2), t[3], t[4]
        logits = torch.einsum("bnhd,bmhd->bnhm", q, more_k) * q.shape[-1] ** -0.5
        far = torch.einsum("bnhm,bmhd->bnhd", logits.softmax(-1), more_v).unflatten(1, (6, 7))
        return merge_attentions([near[0], far], [near[1], logits.logsumexp(-1).unflatten(1, (6, 7))])

    want = gradients(lambda t: call([*t[:3], None, *t[3:]], *geometry, backend="tiled"), [q, k, v, more_k, more_v])
    for a, b in zip(gradients(merged, [q, k, v, more_k, more_v]), want, strict=True):
        torch.testing.assert_close(a, b)
    nothing = torch.full((2, 2), -math.inf)
    out, lse = merge_attentions([torch.ones(2, 2, 4), torch.ones(2, 2, 4)], [nothing, nothing])
    assert (out == 0).all() and (lse == -math.inf).all()
    with pytest.raises(ValueError, match="one length"):
        merge_attentions([out], [])
    with pytest.raises(ValueError, match=r"lses\[0\]"):
        merge_attentions([out], [lse[:1]])


def test_back_ends_by_thread():
    q, k, v, *_ = make((5,), (3,), dtype=torch.float32)
    seen = {}

    def other():
        seen["other"] = not_supported_reasons("neighborhood_attention", "flex", q, k, v, 3, bias=None)
        neighborhood_attention(q, k, v, 3, return_lse=True)

    with use_backend("flex"):
        with pytest.raises(UnsupportedError, match="flex.*no lse on a CPU"):
            neighborhood_attention(q, k, v, 3, return_lse=True)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with use_backend("reference"):
            neighborhood_attention(q, k, v, 3, return_lse=True)
    neighborhood_attention(q, k, v, 3, return_lse=True)
    assert seen["other"] == []


def test_reasons_come_all_at_once():
    q, k, v, bias, *_ = make((5,), (3,), bias="query")
    q.requires_grad_()
    why = not_supported_reasons("neighborhood_attention", "flex", q, k, v, 3, border="zero", bias=bias, return_lse=True)
    assert len(why) == 5 and any("float64" in w for w in why)
    with pytest.raises(UnsupportedError) as caught:
        neighborhood_attention(q, k, v, 3, border="zero", bias=bias, return_lse=True, backend="flex")
    assert all(w in str(caught.value) for w in why)
    for backend in CPU:
        assert not_supported_reasons("neighborhood_attention", backend, q, k, v, 3, border="zero", bias=bias) == []
    with pytest.raises(ValueError, match="operation"):
        not_supported_reasons("attention", "flex", q, k, v, 3)
    with pytest.raises(ValueError, match="backend"):
        not_supported_reasons("neighborhood_attention", "fast", q, k, v, 3)


def flex_case():
    tensors = make((7, 9), (3, 4), heads=4, dim=16, dim_v=16, bias="offset", extra=3, dtype=torch.float32)
    options = ([3, 4], [2, 1], [2, 1], [True, False], 0.25, "mask")
    return tensors, options, _problem(tensors, options, return_lse=True)


def test_flex_says_the_same_eagerly():
    tensors, options, problem = flex_case()
    want = call(tensors, *options[:4], backend="reference", border="mask", scale=0.25)
    torch.testing.assert_close(flex.attend(*tensors, problem, compiled=False), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_flex_compiled():
    tensors, options, _ = flex_case()
    q, k, v, bias, more_k, more_v = tensors
    more = {"border": "mask", "bias": bias, "additional_keys": more_k, "additional_values": more_v}
    with torch.no_grad():
        got = neighborhood_attention(q, k, v, *options[:5], **more, backend="flex")
    torch.testing.assert_close(got, neighborhood_attention(q, k, v, *options[:5], **more, backend="reference"))


@pytest.mark.parametrize("backend", [None, *CPU])
def test_goldens(backend):
    folder = root() and root() / "backbones" / "natten"
    if not folder or not folder.is_dir():
        assert os.environ.get("CI") != "true", "the goldens must be there in CI: set ATTNZOO_GOLDENS"
        pytest.skip("the authors' numbers are not beside this checkout (ATTNZOO_GOLDENS, or ../shared/goldens)")
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.json")):
        tensors = load_file(path.with_suffix(".safetensors"))
        wanted = {k: t for k, t in tensors.items() if k.split(".")[-1] in ("out", "lse", "logits")}
        got = goldens_kernels.run(
            json.loads(path.read_text()), {k: t for k, t in tensors.items() if k not in wanted}, backend
        )
        assert got.keys() == wanted.keys()
        for name, want in wanted.items():
            assert ((got[name] - want).norm() / want.norm()).item() < 1e-5, name


@pytest.mark.parametrize("kernel_size", [(3, 5), (4, 4)])
def test_a_call_in_inference_mode_leaves_nothing_behind(kernel_size):
    """Buffers and tables that are kept from call to call can be written after a first call in inference mode."""
    query = torch.randn(2, 8, 12, 4, 24)
    with torch.inference_mode():
        first = neighborhood_attention(query, query, query, kernel_size, stride=kernel_size)
    given = query.clone().requires_grad_()
    out = neighborhood_attention(given, given, given, kernel_size, stride=kernel_size)
    assert torch.equal(out, first)
    out.square().sum().backward()
    assert given.grad is not None and given.grad.isfinite().all()
