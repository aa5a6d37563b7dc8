"""linear_attention against its sums row by row in float64, written here, and against the authors' numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels_common import errors, gradients, nan_memory
from safetensors.torch import load_file
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.kernels import dispatch, linear_attention, not_supported_reasons, pieces, use_backend
from attnzoo.kernels.linear_attention import scan

BACKENDS = ("reference", "tiled")
POSITIVE = ("relu", "elu", "sigmoid", "exp")


def phi(x: Tensor, name: str, axis: int) -> Tensor:
    """A feature map by its definition, of one head's [N, D]."""
    if name == "softmax":
        e = (x - x.max(axis, keepdim=True).values).exp()
        return e / e.sum(axis, keepdim=True)
    maps = {
        "identity": x,
        "relu": x.clamp(min=0),
        "elu": torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
        "sigmoid": 1 / (1 + (-x).exp()),
        "exp": x.exp(),
    }
    return maps[name]


def flow_rows(q, k, v, causal, e, f):
    """Flowformer of one head, every sum over its own tokens written out."""
    n, m = len(q), len(k)
    past_k = [range(i + 1) if causal else range(m) for i in range(n)]  # the keys a query sums over
    past_q = [range(j + 1) if causal else range(n) for j in range(m)]
    count = [float(i + 1) if causal else 1.0 for i in range(max(n, m))]

    def dot(a, b):
        return ((a + e) * (b + e)).sum()

    incoming = [count[i] / (dot(q[i], sum(k[j] for j in past_k[i])) + f) for i in range(n)]
    outgoing = [count[j] / (dot(k[j], sum(q[i] for i in past_q[j])) + f) for j in range(m)]
    sink = [dot(q[i], sum(k[j] * outgoing[j] for j in past_k[i])) / count[i] + f for i in range(n)]
    source = [dot(k[j], sum(q[i] * incoming[i] for i in past_q[j])) / count[j] + f for j in range(m)]
    mass = [s.clamp(-1, 1).exp() for s in source]
    if causal:
        competition = [mass[j] / sum(mass[l] for l in range(j + 1)) * count[j] for j in range(m)]
    else:
        competition = [mass[j] / sum(mass) * m for j in range(m)]
    rows = []
    for i in range(n):
        row = sum((q[i] @ k[j]) * competition[j] * v[j] for j in past_k[i])
        rows.append(row * incoming[i] / count[i] * torch.sigmoid(sink[i] * (1.0 if causal else n / m)))
    return torch.stack(rows)


def formula(
    q,
    k,
    v,
    *,
    scale=None,
    is_causal=False,
    feature_map="identity",
    normaliser="none",
    eps=None,
    outer_eps=None,
    count=None,
):
    """(out,) or (out, norm), head by head and row by row, as the contract has them."""
    grid, H, D = q.shape[1:-2], q.shape[-2], q.shape[-1]
    q, k, v = (t.double().flatten(1, -3) for t in (q, k, v))
    maps = (feature_map,) * 2 if isinstance(feature_map, str) else feature_map
    scale = D**-0.5 if scale is None else scale
    eps = 1e-6 if eps is None else eps
    outs, norms = [], []
    for b in range(len(q)):
        for h in range(H):
            kv = h // (H // k.shape[2])
            qs, ks, vs = phi(q[b, :, h], maps[0], 1), phi(k[b, :, kv], maps[1], 0), v[b, :, kv]
            if normaliser == "flow":
                outs.append(flow_rows(qs, ks, vs, is_causal, eps, outer_eps or 0.0))
                continue
            rows, divisors = [], []
            for i in range(len(qs)):
                last = i + 1 if is_causal else len(ks)
                w = scale * ks[:last] @ qs[i]
                divisors.append(w.sum() + eps)
                if normaliser == "sum":
                    w = w * 0 if divisors[-1] == 0 else w / divisors[-1]
                elif normaliser == "subtract":
                    w = w / (count or last) + (1 - w.mean()) / last
                rows.append(w @ vs[:last])
            outs.append(torch.stack(rows)), norms.append(torch.stack(divisors))
    out = torch.stack(outs).unflatten(0, (len(q), H)).transpose(1, 2).unflatten(1, grid)
    if normaliser != "sum":
        return (out,)
    return out, torch.stack(norms).unflatten(0, (len(q), H)).transpose(1, 2).unflatten(1, grid)


def make(B=2, grid=(5, 3), key_grid=(13,), H=4, Hkv=2, D=8, Dv=6, dtype=torch.float32):
    shapes = (B, *grid, H, D), (B, *key_grid, Hkv, D), (B, *key_grid, Hkv, Dv)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def call(*tensors, **options):
    found = linear_attention(*tensors, **options, return_normaliser=options.get("normaliser") == "sum")
    return found if isinstance(found, tuple) else (found,)


def draw_options(draw, normaliser, grid, key_grid):
    """Keyword arguments, and the keys' grid that they allow."""
    options = {"normaliser": normaliser, "is_causal": draw(st.booleans())}
    positive = normaliser in ("sum", "flow")  # a divisor of mixed signs comes near 0
    maps = st.sampled_from(POSITIVE[1:] if positive else (*POSITIVE, "identity"))
    pair = [draw(maps), draw(maps)]
    if normaliser != "flow" and draw(st.booleans()):
        pair[0] = "softmax"
    if normaliser != "flow" and not options["is_causal"] and draw(st.booleans()):
        pair[1] = "softmax"
    options["feature_map"] = pair[0] if pair[0] == pair[1] else tuple(pair)
    if normaliser in ("sum", "flow"):
        options["eps"] = draw(st.sampled_from([None, 1e-3]))
    else:
        options["scale"] = draw(st.sampled_from([None, 0.0, 0.3]))
    if normaliser == "flow" and not options["is_causal"]:
        options["outer_eps"] = draw(st.sampled_from([None, 1e-2]))
    if normaliser == "subtract" and not options["is_causal"]:
        options["count"] = draw(st.sampled_from([None, 5]))
    return options, grid if options["is_causal"] else key_grid


@st.composite
def problems(draw, longest=37):
    """Everything at once: sizes, maps, normalisers, causality, and how small the pieces and chunks are."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    normaliser = draw(st.sampled_from(["none", "sum", "subtract", "flow"]))
    grids = st.sampled_from([(1,), (7,), (5, 4), (3, 2, 3)] + ([] if normaliser == "flow" else [(longest,)]))
    options, key_grid = draw_options(draw, normaliser, grid := draw(grids), draw(grids))
    B, Hkv, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2]))
    D = draw(st.sampled_from([8, 9, 16, 33, 256]))
    tensors = make(B, grid, key_grid, Hkv * repeats, Hkv, D, draw(st.sampled_from([D, 8, 11])))
    return tensors, options, draw(st.sampled_from([1, 300, 1 << 19])), draw(st.sampled_from([1, 6, 64]))


def check_problem(problem, backend):
    tensors, options, elements, chunk = problem
    want = gradients(lambda *t: formula(*t, **options), [t.double() for t in tensors])
    with pytest.MonkeyPatch.context() as patch, nan_memory():
        patch.setitem(pieces.ELEMENTS, "cpu", elements)
        patch.setattr(scan, "CHUNK", chunk)
        patch.setattr(scan, "TRIANGLE", max(2, chunk // 2))
        got = gradients(lambda *t: call(*t, **options, backend=backend), tensors)
    assert max(errors(got, want)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems())
def test_any_problem(backend, problem):
    check_problem(problem, backend)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(150))
def test_any_problem_long(problem):
    check_problem(problem, "tiled")


KINDS = [
    {"normaliser": "none", "feature_map": ("softmax", "softmax"), "scale": 1.0},
    {"normaliser": "none", "feature_map": ("relu", "exp"), "is_causal": True},
    {"normaliser": "sum", "feature_map": ("exp", "elu"), "eps": 0.1},
    {"normaliser": "sum", "feature_map": ("sigmoid", "softmax")},
    {"normaliser": "sum", "feature_map": "elu", "is_causal": True},
    {"normaliser": "subtract", "count": 3},
    {"normaliser": "subtract", "is_causal": True},
    {"normaliser": "flow", "feature_map": "sigmoid", "outer_eps": 1e-2, "eps": 1e-2},
    {"normaliser": "flow", "feature_map": "sigmoid", "is_causal": True},
]


def of_kind(options, **sizes):
    return make(**sizes, **({"key_grid": (15,)} if options.get("is_causal") else {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_gradcheck(options, backend):
    """Clamped sources of "flow" lie inside and outside -1 .. 1, none on the border."""
    sizes = {"B": 2, "grid": (4,), "H": 2, "Hkv": 1, "D": 3, "Dv": 2, "dtype": torch.float64}
    tensors = make(**sizes, key_grid=(4,) if options.get("is_causal") else (5,))
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: call(*t, **options, backend=backend), tensors)


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("asked", range(3))
def test_one_gradient_at_a_time(options, asked):
    tensors = of_kind(options, dtype=torch.float64)
    want = gradients(lambda *t: formula(*t, **options), tensors)[-3 + asked]
    tensors[asked].requires_grad_()
    generator = torch.Generator().manual_seed(1)
    results = call(*tensors, **options)
    loss = sum((r * torch.randn(r.shape, generator=generator).bfloat16().double()).sum() for r in results)
    (got,) = torch.autograd.grad(loss, tensors[asked])
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_of_the_normaliser_alone(causal):
    q, k, v = (t.requires_grad_() for t in make(key_grid=(15,), dtype=torch.float64))
    options = {"normaliser": "sum", "feature_map": "elu", "is_causal": causal}
    want = torch.autograd.grad(formula(q, k, v, **options)[1].sum(), (q, k))
    got = torch.autograd.grad(call(q, k, v, **options)[1].sum(), (q, k, v))
    torch.testing.assert_close(got[:2], want)
    assert not got[2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_weight(backend, causal):
    """Where norm is 0 out is 0, and so are its gradients."""
    q, k, v = make(key_grid=(15,), dtype=torch.float64)
    q[:, 2] = -1.0
    options = {"normaliser": "sum", "feature_map": "relu", "eps": 0.0, "is_causal": causal}
    q, k, v = (t.requires_grad_() for t in (q, k.abs(), v))
    out, norm = linear_attention(q, k, v, **options, return_normaliser=True, backend=backend)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not norm[:, 2].any() and not out[:, 2].any() and not found[0][:, 2].any()
    assert all(torch.isfinite(t).all() for t in (out, *found)) and out[:, 3].any()
    torch.testing.assert_close(out, formula(q, k, v, **options)[0])


def test_partial_results_join_by_their_normalisers():
    q, k, v = make()
    options = {"normaliser": "sum", "feature_map": "elu", "eps": 0.0, "return_normaliser": True}
    parts = [linear_attention(q, k[:, s], v[:, s], **options) for s in (slice(0, 4), slice(4, 13))]
    joined = sum(out * norm[..., None] for out, norm in parts) / sum(norm[..., None] for _, norm in parts)
    torch.testing.assert_close(joined, linear_attention(q, k, v, **options)[0])


def test_weights_of_subtract_sum_to_one():
    q, k, _ = make()
    for causal in (False, True):
        key = k if not causal else torch.randn(2, 15, 2, 8)
        out = linear_attention(q, key, torch.ones_like(key), normaliser="subtract", is_causal=causal)
        torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_half_precision_is_as_good_as_sdpa(dtype, options):
    """Against float64, no more than 1.5 x the error of dense attention in that dtype, or of the rounding of out."""
    exact = make(2, (196,), (196,), 4, 4, 32, 32)
    rounded = [t.to(dtype) for t in exact]
    want = linear_attention(*(t.double() for t in rounded), **options)
    got = linear_attention(*rounded, **options)
    heads = [t.transpose(1, 2) for t in rounded]
    stock = F.scaled_dot_product_attention(*heads)
    peer = errors([stock], [F.scaled_dot_product_attention(*(t.double() for t in heads))])[0]
    assert got.dtype == dtype and errors([got], [want])[0] <= 1.5 * peer
    found = gradients(lambda *t: (linear_attention(*t, **options),), rounded)[1:]
    exactly = gradients(lambda *t: (linear_attention(*t, **options),), [t.double() for t in rounded])[1:]
    assert all(g.dtype == dtype for g in found) and max(errors(found, exactly)) <= 1.5 * peer


def test_nothing_of_tokens_times_tokens_or_states_is_kept():
    tensors = [t.requires_grad_() for t in make(1, (300,), (300,), 1, 1, 16, 16)]
    kept: list[int] = []

    def pack(t):
        kept.append(t.numel())
        return t

    for options in KINDS:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            linear_attention(*tensors, **options)
    assert kept and max(kept) <= 300 * 16


def test_strided_inputs_and_fresh_contiguous_outputs():
    q, k, v = torch.randn(2, 15, 3, 4, 8, dtype=torch.float64).unbind(2)
    odd = torch.randn(2, 8, 4, 15, dtype=torch.float64).permute(0, 3, 2, 1)
    for options in KINDS:
        for query in (q, odd):
            out = linear_attention(query, k, v, **options)
            torch.testing.assert_close(out, linear_attention(*(t.contiguous() for t in (query, k, v)), **options))
            assert out.is_contiguous()
    one = torch.ones(1, 1, 1, 8)
    alone = linear_attention(one, one, one, 1 / 8)
    assert alone.data_ptr() != one.data_ptr()
    torch.testing.assert_close(alone, one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    for options in KINDS:
        tensors = of_kind(options, B=0)
        got = gradients(lambda *t, o=options: call(*t, **o, backend=backend), tensors)
        assert [tuple(g.shape) for g in got[-3:]] == [tuple(t.shape) for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [KINDS[2], KINDS[5], KINDS[8]], ids=["sum", "subtract", "flow causal"])
def test_operator_is_sound_for_pytorch(options, backend):
    tensors = [t.requires_grad_() for t in make(grid=(15,), key_grid=(15,))]
    maps = options.get("feature_map", "identity")
    maps = (maps, maps) if isinstance(maps, str) else maps
    rest = (0.3, bool(options.get("is_causal")), *maps, options["normaliser"], 1e-6, 0.0, 15, backend)
    torch.library.opcheck(torch.ops.attnzoo.linear_attention.default, (*tensors, *rest))


def layer(q, k, v):
    one = linear_attention(q * 2, k, v, normaliser="sum", feature_map="elu", return_normaliser=True)
    return (*one, linear_attention(q, k, v, normaliser="subtract"))


def compiles(backend):
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for grid in ((3, 4), (5, 2)):
        tensors = make(grid=grid, key_grid=(13 + grid[0],))
        for a, b in zip(gradients(compiled, tensors), gradients(layer, tensors), strict=True):
            torch.testing.assert_close(a, b)
    with use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), layer(*tensors))


def test_compiles_whole():
    compiles("aot_eager")


@pytest.mark.slow
def test_compiles_whole_with_inductor():
    compiles("inductor")


def test_autocast_casts_query_key_and_value():
    tensors = make()
    options = {"normaliser": "sum", "feature_map": "elu"}
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(lambda *t: call(*t, **options), tensors)
    want = call(*(t.bfloat16() for t in tensors), **options)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    torch.testing.assert_close(got[:2], list(want), rtol=0, atol=0)
    assert all(g.dtype == torch.float32 for g in got[2:])


def test_double_backward_is_refused_by_name():
    q, k, v = make()
    q.requires_grad_()
    (grad,) = torch.autograd.grad(linear_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="linear_attention.*double backward"):
        grad.sum().backward()


def test_reasons_are_told():
    q, k, v = make()
    assert not_supported_reasons("linear_attention", "tiled", q, k, v, normaliser="sum", return_normaliser=True) == []
    assert not_supported_reasons("linear_attention", "flex", q, k, v) == ["linear_attention has no flex back end"]
    assert dispatch.device_reasons("linear_attention", "tiled", torch.device("cuda")) == []


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        ({"query": torch.zeros(2, 4, 8)}, ValueError, "query must be .*one to three grid axes"),
        ({"query": torch.zeros(2, 0, 4, 8)}, ValueError, "query must have no empty axis"),
        ({"query": torch.zeros(2, 15, 3, 8)}, ValueError, "heads must be a multiple of key's, got 3 and 2"),
        ({"query": torch.zeros(2, 15, 4, 8).long()}, TypeError, "query must be one of"),
        ({"key": torch.zeros(2, 13, 2, 7)}, ValueError, "key must be"),
        ({"key": torch.zeros(2, 13, 2, 8).double()}, ValueError, "share one dtype"),
        ({"value": torch.zeros(2, 12, 2, 8)}, ValueError, "value must be"),
        ({"value": torch.zeros(2, 13, 2, 300)}, ValueError, "head_dim"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"scale": True}, TypeError, "scale must be a number"),
        ({"is_causal": True}, ValueError, "is_causal needs as many queries as keys, got 15 and 13"),
        ({"is_causal": 2}, ValueError, "is_causal must be one of"),
        ({"feature_map": "gelu"}, ValueError, "feature_map must be one of"),
        ({"feature_map": ("elu",)}, TypeError, "feature_map must be a name or a pair"),
        ({"feature_map": 3}, TypeError, "feature_map must be a name or a pair"),
        ({"feature_map": "softmax", "normaliser": "flow"}, ValueError, "elementwise feature maps"),
        (
            {"feature_map": "softmax", "is_causal": True, "query": torch.zeros(2, 13, 4, 8)},
            ValueError,
            "is_causal and a key feature_map of 'softmax'",
        ),
        ({"normaliser": "mean"}, ValueError, "normaliser must be one of"),
        ({"scale": 1.0, "normaliser": "flow"}, ValueError, "scale belongs to"),
        ({"eps": 1e-6}, ValueError, "eps belongs to"),
        ({"eps": -1.0, "normaliser": "sum"}, ValueError, "eps must be at least 0"),
        ({"outer_eps": 1e-6, "normaliser": "sum"}, ValueError, "outer_eps belongs to"),
        ({"count": 3}, ValueError, "count belongs to"),
        ({"count": 0, "normaliser": "subtract"}, ValueError, "count must be at least 1"),
        ({"count": 2.0, "normaliser": "subtract"}, TypeError, "count must be an integer"),
        ({"return_normaliser": True}, ValueError, "return_normaliser needs the normaliser 'sum'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input_is_named(change, error, words):
    q, k, v = make()
    with pytest.raises(error, match=words):
        linear_attention(**({"query": q, "key": k, "value": v} | change))


# -- the authors' numbers ----------------------------------------------------------------------------------------------


def load(folder, name):
    meta = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    return meta["config"], tensors, {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def channels(x, heads):
    """[B, C, *grid] as [B, *grid, heads, C / heads]."""
    return x.movedim(1, -1).unflatten(-1, (heads, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["general", "causal"])
@pytest.mark.parametrize("number", [1, 2])
def test_flow_attention(goldens_root, kind, number, backend):
    config, tensors, state = load(goldens_root / "backbones/flowformer", f"flow_attention_{kind}_{number}")
    names = ("query", "key", "value")
    given = (tensors[n] for n in ("queries", "keys", "values"))
    q, k, v = (linear(x, state, f"{n}_projection").unflatten(-1, (config["n_heads"], -1)) for x, n in zip(given, names))
    options = {"normaliser": "flow", "feature_map": "sigmoid", "is_causal": kind == "causal"}
    out = linear_attention(q, k, v, **options, backend=backend)
    assert errors([linear(out.flatten(2), state, "out_projection")], [tensors["output"]])[0] < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [1, 2])
def test_flow_attention_for_vision(goldens_root, number, backend):
    config, tensors, state = load(goldens_root / "backbones/flowformer", f"flow_attention_cv_{number}")
    x, heads = tensors["input"], config["num_heads"]
    q, k, v = linear(x, state, "qkv").unflatten(-1, (3, heads, -1)).unbind(2)
    out = linear_attention(q, k, v, normaliser="flow", feature_map="sigmoid", outer_eps=1e-6, backend=backend)
    assert errors([linear(out.flatten(2), state, "proj")], [tensors["output"]])[0] < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [1, 2])
def test_efficient_attention(goldens_root, number, backend):
    config, tensors, state = load(goldens_root / "backbones/efficient_attention", f"efficient_attention_{number}")
    x, heads = tensors["input"], config["head_count"]
    names = ("queries", "keys", "values")
    q, k, v = (channels(F.conv2d(x, state[f"{n}.weight"], state[f"{n}.bias"]), heads) for n in names)
    out = linear_attention(q, k, v, 1.0, feature_map="softmax", backend=backend)
    out = F.conv2d(out.flatten(-2).movedim(-1, 1), state["reprojection.weight"], state["reprojection.bias"]) + x
    assert errors([out], [tensors["output"]])[0] < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [1, 2])
def test_attention_group_of_care(goldens_root, number, backend):
    config, tensors, state = load(goldens_root / "backbones/care", f"token_mixer_att_{number}")
    width = config["mem_dim"]
    heads, first = width // config["att_head_dim"], config["in_channels"] - 3 * width
    group = tensors["input"][:, first : first + width]
    q, k = F.conv2d(group, state["qk.weight"], state["qk.bias"]).chunk(2, 1)
    q, k, v = (channels(t, heads) for t in (q, k, group))
    tokens = group.shape[2] * group.shape[3]
    out = linear_attention(q, k, v, 1 / tokens, normaliser="sum", feature_map="elu", backend=backend)
    assert errors([out.flatten(-2).movedim(-1, 1)], [tensors["output"][:, :width]])[0] < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [0, 1])
def test_inline_attention(goldens_root, number, backend):
    config, tensors, state = load(goldens_root / "backbones/inline_attention", f"inline_attn_kernel_{number}")
    heads, (height, width) = config["num_heads"], config["window_size"]
    q, k, v = linear(tensors["input"], state, "qkv").unflatten(-1, (3, heads, -1)).unbind(2)
    kernel = {"exp": lambda t: (0.2 * t).exp(), "leakyrelu": F.leaky_relu}[config["kernel_func"]]
    out = linear_attention(kernel(q), kernel(k), v, normaliser="subtract", backend=backend).flatten(2)
    image = v.flatten(2).transpose(1, 2).reshape(1, -1, height, width)
    weights = tensors["residual"].reshape(image.shape[1], 1, 3, 3)
    local = F.conv2d(image, weights, padding=1, groups=image.shape[1]).reshape(len(v), -1, height * width)
    out = linear(out + local.transpose(1, 2), state, "proj")
    assert errors([out], [tensors["output"]])[0] < 2e-6
