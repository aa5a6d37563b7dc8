"""pooled_attention against two dense softmaxes in float64 written here, and against the authors' numbers."""

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
from attnzoo.kernels import dispatch, not_supported_reasons, pieces, pooled_attention, use_backend
from attnzoo.kernels.pooled_attention import tiled
from attnzoo.kernels.pooled_attention.problem import check

BACKENDS = ("reference", "tiled")
NAMES = ("query", "key", "value", "agents", "agent_bias", "query_bias")


def softmax_rows(s: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of softmax and their log normaliser; a row of -inf gives 0 and -inf."""
    dead = (s == -math.inf).all(-1, keepdim=True)
    alive = s.masked_fill(dead, 0.0)
    p, lse = alive.softmax(-1), alive.logsumexp(-1)
    return p.masked_fill(dead, 0.0), lse.masked_fill(dead.squeeze(-1), -math.inf)


def formula(q, k, v, a, b1, b2, *, scale=None, query_scale=None, mask=None):
    """(out, lse, agent_lse), head by head in float64, as the contract has them."""
    q, k, v, a = (t.double() for t in (q, k, v, a))
    grid, D, H = q.shape[1:-2], q.shape[-1], q.shape[-2]
    scale = D**-0.5 if scale is None else scale
    query_scale = scale if query_scale is None else query_scale
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    outs, lses, agent_lses = [], [], []
    for b in range(len(q)):
        for h in range(H):
            kv = h // (H // k.shape[2])
            own = a[b % len(a), :, h]
            s = scale * own @ k[b, :, kv].T
            if b1 is not None:
                s = s + b1.double()[b % len(b1), h % b1.shape[1]]
            if mask is not None:
                s = s.masked_fill(~mask[b % len(mask)], -math.inf)
            p, agent_lse = softmax_rows(s)
            s = query_scale * q[b, :, h] @ own.T
            if b2 is not None:
                s = s + b2.double()[b % len(b2), h % b2.shape[1]]
            r, lse = softmax_rows(s)
            outs.append(r @ (p @ v[b, :, kv])), lses.append(lse), agent_lses.append(agent_lse)
    out, lse, agent_lse = (torch.stack(t).unflatten(0, (len(q), H)).transpose(1, 2) for t in (outs, lses, agent_lses))
    return out.unflatten(1, grid), lse.unflatten(1, grid), agent_lse


def make(
    B=2, grid=(5, 3), key_grid=(13,), A=4, H=4, Hkv=2, D=8, Dv=8, agents_b=None, b1=None, b2=None, dtype=torch.float32
):
    """query .. query_bias; b1 and b2 are (batch, heads) of the biases, None for none."""
    nq, nk = math.prod(grid), math.prod(key_grid)
    made = [torch.randn(B, *grid, H, D), torch.randn(B, *key_grid, Hkv, D), torch.randn(B, *key_grid, Hkv, Dv)]
    made.append(torch.randn(B if agents_b is None else agents_b, A, H, D))
    made.append(None if b1 is None else torch.randn(*b1, A, nk))
    made.append(None if b2 is None else torch.randn(*b2, nq, A))
    return [t if t is None else t.to(dtype) for t in made]


def call(*tensors, backend="auto", **options):
    q, k, v, a, b1, b2 = tensors
    mask = options.pop("mask", None)
    return pooled_attention(
        q, k, v, a, agent_bias=b1, query_bias=b2, key_mask=mask, return_lse=True, backend=backend, **options
    )


@st.composite
def problems(draw):
    """Everything at once: sizes, shared agents, biases, masks, scales, and how small the pieces are."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, Hkv, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2]))
    H, D = Hkv * repeats, draw(st.sampled_from([8, 9, 16, 33, 256]))
    grids = st.sampled_from([(1,), (7,), (37,), (5, 4), (3, 2, 3)])

    def bias():
        return draw(st.sampled_from([None, (1, H), (B, H), (B, 1), (1, 1)]))

    key_grid = draw(grids)
    A, Dv = draw(st.sampled_from([1, 5, 17, 40])), draw(st.sampled_from([D, D, 8, 11]))
    tensors = make(B, draw(grids), key_grid, A, H, Hkv, D, Dv, draw(st.sampled_from([1, B])), bias(), bias())
    options = {
        "scale": draw(st.sampled_from([None, 0.0, 0.3])),
        "query_scale": draw(st.sampled_from([None, 0.5])),
        "mask": draw(st.sampled_from([None, B, 1])),
    }
    if options["mask"] is not None:
        options["mask"] = torch.rand(options["mask"], math.prod(key_grid)) > draw(st.sampled_from([0.2, 0.9]))
    return tensors, options, draw(st.sampled_from([1, 300, 1 << 12, 1 << 19]))


def check_problem(problem, backend):
    tensors, options, elements = problem
    want = gradients(lambda *t: formula(*t, **options), [t if t is None else t.double() for t in tensors])
    with pytest.MonkeyPatch.context() as patch, nan_memory():
        patch.setitem(pieces.ELEMENTS, "cpu", elements)
        got = gradients(lambda *t: call(*t, backend=backend, **options), tensors)
    assert max(errors(got, want)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems())
def test_any_problem(backend, problem):
    check_problem(problem, backend)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_any_problem_long(problem):
    check_problem(problem, "tiled")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("A", [3, 20])
def test_agents_and_queries_that_see_nothing(backend, A):
    """They collect or read 0, with lse -inf and gradient 0, beside rows whose lse is exactly 0."""
    tensors = make(A=A, Hkv=4, b1=(1, 4), b2=(2, 4), dtype=torch.float64)
    with torch.no_grad():
        tensors[4][0, 1, 2] = -math.inf
        tensors[5][1, :, 3] = -math.inf
        tensors[3][:, 0] = 0.0
        tensors[4][0, :, 0] = -math.log(13.0)  # lse 0 where the agent is 0
    want, got = (gradients(run, tensors) for run in (formula, lambda *t: call(*t, backend=backend)))
    assert max(errors(got, want)) < 1e-10
    assert torch.isinf(got[2][:, 2, 1]).all() and torch.isfinite(got[2][:, 0]).all()
    assert not got[0].flatten(1, 2)[1, 3].any() and all(torch.isfinite(g).all() for g in got[3:])
    assert not got[3].flatten(1, 2)[1, 3].any()
    blind = torch.ones(2, 13, dtype=torch.bool)
    blind[0] = False
    out, lse, agent_lse = call(*tensors, mask=blind, backend=backend)
    assert not out[0].any() and torch.isinf(agent_lse[0]).all() and torch.isfinite(lse[0]).all() and out[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("A", [9, 49])
def test_half_precision_is_as_good_as_two_calls_of_sdpa(dtype, A):
    exact = make(2, (14, 14), (14, 14), A, 4, 4, 32, 32, b1=(1, 4), b2=(1, 4))
    rounded = [t.to(dtype) for t in exact]

    def stock(q, k, v, a, b1, b2):
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
        a = a.transpose(1, 2)
        collected = F.scaled_dot_product_attention(a, k, v, attn_mask=b1)
        out = F.scaled_dot_product_attention(q, a, collected, attn_mask=b2)
        return (out.transpose(1, 2).reshape(2, 14, 14, 4, 32),)

    want = gradients(lambda *t: formula(*t)[:1], [t.double() for t in rounded])
    theirs = errors(gradients(stock, rounded), want)
    got = gradients(lambda *t: call(*t)[:1], rounded)
    assert [g.dtype for g in got] == [dtype] * 7
    for ours, peer in zip(errors(got, want), theirs, strict=True):
        assert ours <= 1.5 * peer
    out, lse, agent_lse = call(*rounded)
    assert lse.dtype == agent_lse.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("A", "repeats", "Dv"), [(2, 1, 3), (17, 1, 3), (2, 2, 2)])
def test_gradcheck(backend, A, repeats, Dv):
    tensors = make(2, (3,), (4,), A, 2, 2 // repeats, 3, Dv, 1, (1, 2), (2, 1), dtype=torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: call(*t, scale=0.7, query_scale=0.4, backend=backend), tensors)


@pytest.mark.parametrize("asked", range(6))
def test_one_gradient_at_a_time(asked):
    tensors = make(b1=(1, 4), b2=(2, 4), dtype=torch.float64)
    want = gradients(formula, tensors)[3 + asked]
    tensors[asked].requires_grad_()
    generator = torch.Generator().manual_seed(1)
    results = call(*tensors)
    loss = sum((r * torch.randn(r.shape, generator=generator).bfloat16().double()).sum() for r in results)
    (got,) = torch.autograd.grad(loss, tensors[asked])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradient_of_lse_alone_and_of_nothing_else():
    q, k, v, a, b1, b2 = make(dtype=torch.float64)
    for which in (1, 2):
        tensors = [t.requires_grad_() for t in (q, k, v, a)]
        want = torch.autograd.grad(formula(*tensors, None, None)[which].sum(), tensors, allow_unused=True)
        got = torch.autograd.grad(call(*tensors, None, None)[which].sum(), tensors, allow_unused=True)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(torch.zeros(()) if x is None else x.sum(), torch.zeros_like(x).sum()
                                       if y is None else y.sum(), check_dtype=False)  # fmt: skip
            if y is not None:
                torch.testing.assert_close(x, y)


def test_nothing_of_agents_times_tokens_is_kept():
    tensors = [t.requires_grad_() for t in make(1, (40,), (40,), 20, 2, 2, 8, 8)[:4]]
    kept: list[int] = []

    def pack(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pooled_attention(*tensors)
    assert kept and max(kept) < 2 * 20 * 40


def test_the_path_of_other_devices():
    """F.scaled_dot_product_attention with lse summed beside it, as a GPU gets it, run here on the CPU."""
    tensors = make(A=5, b1=(1, 4), b2=(2, 4))
    with torch.no_grad():
        tensors[4][0, 1, 2] = -math.inf
    mask = torch.rand(2, 13) > 0.3
    q, k, v, a, b1, b2 = tensors
    problem = check(q, k, v, a, agent_bias=b1, query_bias=b2, key_mask=mask)
    first, second = tiled.stages(problem)
    collected = tiled._elsewhere(first, first.agents, first.tokens, problem.value, tiled._mask(first, b1))
    out = tiled._elsewhere(second, second.tokens, second.agents, collected, tiled._mask(second, b2))
    want = formula(*tensors, mask=mask)
    found = (
        out.unflatten(1, (5, 3)),
        tiled.spread(second, None)[1].unflatten(1, (5, 3)),
        tiled.collect(first, None)[1],
    )
    assert max(errors(found, want)) < 1e-5


def test_a_backward_pass_without_lse_sums_it_again():
    tensors = [t.requires_grad_() for t in make(dtype=torch.float64, b1=(1, 4), b2=(1, 4))]
    q, k, v, a, b1, b2 = tensors
    want = torch.autograd.grad(formula(*tensors)[0].sum(), tensors)
    options = (8**-0.5, 8**-0.5, False, "tiled")
    out = torch.ops.attnzoo.pooled_attention(q.flatten(1, 2), k, v, a, b1, b2, None, *options)[0]
    for x, y in zip(torch.autograd.grad(out.sum(), tensors), want, strict=True):
        torch.testing.assert_close(x, y)


def test_strided_inputs_and_fresh_contiguous_outputs():
    qkv = torch.randn(2, 15, 3, 4, 8, dtype=torch.float64)
    q, k, v = qkv.unbind(2)
    a = torch.randn(2, 8, 4, 5, dtype=torch.float64).permute(0, 3, 2, 1)
    for backend in BACKENDS:
        out, lse, agent_lse = pooled_attention(q, k, v, a, return_lse=True, backend=backend)
        same = pooled_attention(*(t.contiguous() for t in (q, k, v, a)), backend=backend)
        torch.testing.assert_close(out, same)
        assert out.is_contiguous() and lse.is_contiguous() and agent_lse.is_contiguous()
    one = torch.randn(1, 1, 1, 8)
    alone = pooled_attention(one, one, one, one)
    assert alone.data_ptr() != one.data_ptr()
    torch.testing.assert_close(alone, one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    tensors = make(B=0, agents_b=1, b1=(1, 4), b2=(1, 4))
    got = gradients(lambda *t: call(*t, backend=backend), tensors)
    assert [tuple(g.shape) for g in got[3:]] == [tuple(t.shape) for t in tensors]
    assert not got[6].any() and not got[7].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_is_sound_for_pytorch(backend):
    operator = torch.ops.attnzoo.pooled_attention.default
    q, k, v, a, b1, b2 = make(grid=(6,), b1=(1, 4), b2=(2, 1))
    mask = torch.rand(2, 13) > 0.3
    for extra in ((b1, b2, mask), (None, None, None)):
        for want_lse in (True, False):
            given = [
                None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in (q, k, v, a, *extra)
            ]
            tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
            torch.library.opcheck(operator, (*given, 0.3, 0.4, want_lse, backend), test_utils=tests)


def layer(q, k, v, a, b1, b2):
    return pooled_attention(q * 2, k, v, a, query_scale=0.3, agent_bias=b1, query_bias=b2, return_lse=True)


def compiles(backend):
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for grid in ((3, 4), (5, 2)):
        tensors = make(grid=grid, b1=(1, 4), b2=(1, 4))
        for a, b in zip(gradients(compiled, tensors), gradients(layer, tensors), strict=True):
            torch.testing.assert_close(a, b)
    with use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), layer(*tensors))


def test_compiles_whole():
    compiles("aot_eager")


@pytest.mark.slow
def test_compiles_whole_with_inductor():
    compiles("inductor")


def test_autocast_casts_query_key_value_and_agents_only():
    tensors = make(b1=(1, 4), b2=(1, 4))
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(call, tensors)
    half = [t.bfloat16() for t in tensors[:4]]
    want = call(*half, *tensors[4:])
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    torch.testing.assert_close(got[:3], list(want), rtol=0, atol=0)
    assert all(g.dtype == torch.float32 for g in got[3:])


def test_double_backward_is_refused_by_name():
    q, k, v, a = make()[:4]
    q.requires_grad_()
    (grad,) = torch.autograd.grad(pooled_attention(q, k, v, a).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="pooled_attention.*double backward"):
        grad.sum().backward()


def test_reasons_are_told():
    q, k, v, a = make()[:4]
    assert not_supported_reasons("pooled_attention", "tiled", q, k, v, a, query_scale=1.0, return_lse=True) == []
    assert not_supported_reasons("pooled_attention", "triton", q, k, v, a) == [
        "pooled_attention has no triton back end"
    ]
    with pytest.raises(ValueError, match="backend"):
        pooled_attention(q, k, v, a, backend="triton")
    assert dispatch.device_reasons("pooled_attention", "tiled", torch.device("cuda")) == []


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": [1]}, TypeError, "query must be a tensor, got list"),
        ({"query": torch.zeros(2, 4, 8)}, ValueError, "query must be .*one to three grid axes"),
        ({"query": torch.zeros(2, 5, 0, 4, 8)}, ValueError, "query must have no empty axis"),
        ({"query": torch.zeros(2, 5, 3, 3, 8)}, ValueError, "heads must be a multiple of key's, got 3 and 2"),
        ({"query": torch.zeros(2, 5, 3, 4, 8).int()}, TypeError, "query must be one of"),
        ({"query": torch.zeros(2, 5, 3, 4, 300)}, ValueError, "head_dim"),
        ({"key": torch.zeros(2, 13, 2, 7)}, ValueError, "key must be"),
        ({"key": torch.zeros(3, 13, 2, 8)}, ValueError, "key must be"),
        ({"key": torch.zeros(2, 13, 2, 8).half()}, ValueError, "share one dtype"),
        ({"value": torch.zeros(2, 12, 2, 8)}, ValueError, "value must be"),
        ({"agents": torch.zeros(2, 4, 2, 8)}, ValueError, r"agents must have the shape \[B=2 or 1, A=4, H=4, D=8\]"),
        ({"agents": torch.zeros(3, 4, 4, 8)}, ValueError, "agents must have the shape"),
        ({"agents": torch.zeros(2, 2, 2, 4, 8)}, ValueError, "agents must have 4 dimensions"),
        ({"agents": torch.zeros(2, 0, 4, 8)}, ValueError, "agents must have no empty axis"),
        ({"agent_bias": torch.zeros(1, 4, 4, 12)}, ValueError, r"agent_bias must have the shape .*Nk=13\]"),
        ({"agent_bias": torch.zeros(4, 4, 13)}, ValueError, "agent_bias must have 4 dimensions"),
        ({"agent_bias": torch.zeros(1, 4, 4, 13).int()}, TypeError, "agent_bias must be one of"),
        ({"query_bias": torch.zeros(1, 4, 4, 15)}, ValueError, r"query_bias must have the shape .*Nq=15, A=4\]"),
        ({"key_mask": torch.ones(2, 13)}, TypeError, "key_mask must be one of bool"),
        ({"key_mask": torch.ones(2, 15).bool()}, ValueError, "key_mask must have the shape"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"query_scale": math.inf}, ValueError, "query_scale must be finite"),
        ({"agents": torch.zeros(2, 4, 4, 8, device="meta")}, ValueError, "share one device"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input_is_named(change, error, words):
    q, k, v, a = make()[:4]
    with pytest.raises(error, match=words):
        pooled_attention(**({"query": q, "key": k, "value": v, "agents": a} | change))


# -- the authors' numbers ----------------------------------------------------------------------------------------------


def load(folder, name):
    meta = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    return meta["config"], tensors, {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["flare_mixer_1", "flare_mixer_2"])
def test_flare(goldens_root, case, backend):
    config, tensors, state = load(goldens_root / "backbones/flare", case)
    heads = config["num_heads"]
    k, v = (tensors[f"inter.{n}_proj"].unflatten(-1, (heads, -1)) for n in "kv")
    latents = state["latent_q"].view(heads, config["num_latents"], -1)
    if config.get("qk_norm"):
        width = (k.shape[-1],)
        latents = F.layer_norm(latents, width, state["q_norm.weight"], state["q_norm.bias"])
        k = F.layer_norm(k, width, state["k_norm.weight"], state["k_norm.bias"])
    agents = latents.transpose(0, 1).unsqueeze(0)
    out = pooled_attention(k, k, v, agents, config.get("attn_scale", 1.0), backend=backend)
    assert errors([linear(out.flatten(2), state, "out_proj")], [tensors["output"]])[0] < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_agent_attention_for_stable_diffusion(goldens_root, backend):
    config, tensors, state = load(goldens_root / "backbones/agent_attention", "agentsd_attn_0")
    x, size = tensors["input"], (config["heads"], config["dim_head"])
    q, k, v = (linear(x, state, f"to_{n}").unflatten(-1, size) for n in "qkv")
    agents = linear(tensors["agent"], state, "to_q").unflatten(-1, size)
    scale = config["dim_head"] ** -0.5
    out = pooled_attention(q, k, v, agents, scale, query_scale=scale ** config["k_scale2"], backend=backend)
    out = out + config["k_shortcut"] * v
    assert errors([linear(out.flatten(2), state, "to_out.0")], [tensors["output"]])[0] < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_attention_of_agent_swin_with_its_biases(goldens_root, backend):
    """The first block's attention, from the image: patch embedding and norm, pooled queries, both three-part biases."""
    config, tensors, state = load(goldens_root / "backbones/agent_attention", "agent_swin_0")
    patch, heads, agents = config["patch_size"], config["num_heads"][0], config["agent_num"][0]
    x = F.conv2d(tensors["input"], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    side, width = x.shape[-1], x.shape[1]
    x = x.flatten(2).transpose(1, 2)
    for name in ("patch_embed.norm", "layers.0.blocks.0.norm1"):
        if f"{name}.weight" in state:
            x = F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"])
    own = {k.removeprefix("layers.0.blocks.0.attn."): v for k, v in state.items() if "layers.0.blocks.0.attn." in k}
    q, k, v = linear(x, own, "qkv").chunk(3, -1)
    pool = int(agents**0.5)
    pooled = F.adaptive_avg_pool2d(q.transpose(1, 2).unflatten(2, (side, side)), pool).flatten(2).transpose(1, 2)
    q, k, v4, pooled = (t.unflatten(-1, (heads, -1)) for t in (q, k, v, pooled))
    spread = {n: F.interpolate(own[f"{n}_bias"], (side, side), mode="bilinear") for n in ("an", "na")}
    agent_bias = (spread["an"] + own["ah_bias"] + own["aw_bias"]).flatten(3)
    query_bias = spread["na"].permute(0, 2, 3, 1) + own["ha_bias"] + own["wa_bias"]
    out = pooled_attention(
        q, k, v4, pooled, agent_bias=agent_bias, query_bias=query_bias.flatten(2, 3), backend=backend
    )
    image = v.transpose(1, 2).unflatten(2, (side, side))
    local = F.conv2d(image, own["dwc.weight"], own["dwc.bias"], padding=1, groups=width)
    out = linear(out.flatten(2) + local.flatten(2).transpose(1, 2), own, "proj")
    assert errors([out], [tensors["attn0"]])[0] < 2e-6
