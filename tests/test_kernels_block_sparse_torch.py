"""block_sparse_attention as PyTorch and its user meet it: gradients, operator checks, compile, autocast, refusals."""

from __future__ import annotations

import pytest
import torch
from test_kernels_block_sparse import INTERPRETING, close, dense, make
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.kernels import (
    BlockSparsity,
    axis_order,
    block_sparse_attention,
    dispatch,
    merge_attentions,
    not_supported_reasons,
    tile_order,
    use_backend,
)
from attnzoo.kernels.block_sparse_attention import flex
from attnzoo.kernels.block_sparse_attention.problem import NAME, check


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("orders", [(0, 0), (2, 1)])
def test_gradcheck(backend, orders):
    """Output and lse, for query, key and value, with rows that see nothing, ragged blocks and mask tiles."""
    case = make(
        H=2, Hkv=1, Nq=7, Nk=5, D=2, Dv=3, block=(2, 4), lists=(1, 2), partial=0.5, orders=orders, key_mask=True,
        causal=True, dtype=torch.float64,
    )  # fmt: skip

    def run(q, k, v):
        out, lse = block_sparse_attention(q, k, v, case.sparsity, **case.options, return_lse=True, backend=backend)
        assert lse.dtype == torch.float64 and bool(torch.isinf(lse).any())
        return out, lse.masked_fill(torch.isinf(lse), 0.0)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (case.q, case.k, case.v)])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_queries_without_keys(backend):
    """Output 0, lse -inf, gradient 0: an empty list, hidden keys, a sequence without any listed block."""
    q, k, v = (torch.randn(1, 12, 2, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 2] = True
    sparsity = BlockSparsity.from_mask(mask, 12, 12, 4)
    out, lse = block_sparse_attention(q, k, v, sparsity, return_lse=True, backend=backend)
    seen = torch.zeros(1, 12, 2, dtype=torch.bool)
    seen[0, 4:8, 0] = True
    assert torch.equal(torch.isfinite(lse), seen) and not out[~seen].any()
    for gradient in torch.autograd.grad((out.square().sum() + lse.sum()), (q, k, v)):
        assert torch.isfinite(gradient).all() and not gradient[:, :, 1].any() and gradient[:, :, 0].any()
    hidden = torch.zeros(1, 12, dtype=torch.bool)
    out, lse = block_sparse_attention(q, k, v, sparsity, key_mask=hidden, return_lse=True, backend=backend)
    assert not out.any() and bool((lse == -torch.inf).all())
    nothing = [t[:0] for t in (q, k, v)]
    assert block_sparse_attention(*nothing, sparsity, backend=backend).shape == (0, 12, 2, 8)


def test_only_what_is_needed():
    """A gradient that nobody asked for is not computed, and asking for one alone gives the same."""
    case = make(Nq=16, Nk=16, density=0.8)
    full = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
    whole = torch.autograd.grad(block_sparse_attention(*full, case.sparsity).square().sum(), full)
    for backend in ("reference", "tiled"):
        for at in range(3):
            inputs = [t.clone() for t in (case.q, case.k, case.v)]
            inputs[at].requires_grad_()
            out = block_sparse_attention(*inputs, case.sparsity, backend=backend)
            close(torch.autograd.grad(out.square().sum(), inputs[at])[0], whole[at])


def test_partial_results_merge():
    """The keys split into two sparsities, joined by lse, are the union."""
    case = make(Nq=24, Nk=32, density=1.0)
    first = torch.rand(1, 1, 3, 4) < 0.5
    parts = [BlockSparsity.from_mask(m, 24, 32, 8) for m in (first, ~first)]
    results = [block_sparse_attention(case.q, case.k, case.v, part, return_lse=True) for part in parts]
    merged = merge_attentions([r[0] for r in results], [r[1] for r in results])
    for a, b in zip(merged, dense(case.q, case.k, case.v, case.mask, None), strict=True):
        close(a, b)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"skip_threshold": 1.0}, {"qk_int8": True}])
@pytest.mark.parametrize("partial", [0.0, 0.5])
def test_back_ends_agree(options, partial):
    case = make(
        H=4, Hkv=2, Nq=40, Nk=50, D=16, block=(16, 16), lists=(1, 4), orders=(4, 2), partial=partial, key_mask=True
    )
    options = options | {"key_mask": case.options["key_mask"], "return_lse": True}
    ours, theirs = (
        block_sparse_attention(case.q, case.k, case.v, case.sparsity, **options, backend=backend)
        for backend in ("tiled", "reference")
    )
    for a, b in zip(ours, theirs):
        close(a, b)


@pytest.mark.parametrize("orders", [(0, 0), (1, 1), (4, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_flex_agrees(orders, causal, masked):
    case = make(
        B=2, H=4, Hkv=2, Nq=40, Nk=50, D=16, Dv=16, block=(16, 16), lists=(2, 4), orders=orders, partial=0.5,
        causal=causal, key_mask=masked,
    )  # fmt: skip
    arguments = check(case.q, case.k, case.v, case.sparsity, **case.options, return_lse=True)
    got = flex.attend(arguments, compiled=False)
    for a, b in zip(got, dense(case.q, case.k, case.v, case.mask, None)):
        close(a, b)


@pytest.mark.slow
def test_flex_compiled_agrees():
    case = make(H=2, Hkv=1, Nq=128, Nk=128, D=16, Dv=16, block=(32, 32), lists=(1, 2), partial=0.5)
    close(
        block_sparse_attention(case.q, case.k, case.v, case.sparsity, backend="flex"),
        dense(case.q, case.k, case.v, case.mask, None)[0],
    )


def operands(case, backend: str, **options) -> tuple:
    """The operator's arguments of a case."""
    s = case.sparsity
    turned = s.by_key()
    return (
        case.q, case.k, case.v, s.counts, s.indices, s.tile_ids, s.tiles,
        turned.counts, turned.indices, turned.tile_ids, case.options.get("key_mask"), s.query_order, s.key_order,
        None, None, None, None,
        *s.block_size, case.options["is_causal"], 0.5, options.get("skip_threshold"), backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_opcheck(backend):
    for options in ({"partial": 0.5, "key_mask": True, "orders": (2, 1)}, {"causal": True}):
        case = make(H=2, Hkv=1, **options)
        for needs in (True, False):
            for tensor in (case.q, case.k, case.v):
                tensor.requires_grad_(needs)
            torch.library.opcheck(torch.ops.attnzoo.block_sparse_attention.default, operands(case, backend))


def compiled_agrees(backend: str) -> None:
    case = make(B=2, H=4, Hkv=2, Nq=24, Nk=24, lists=(1, 4), partial=0.5, key_mask=True)
    order = torch.randperm(24)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, order: Tensor) -> Tensor:
        out, lse = block_sparse_attention(q, k, v, case.sparsity, **case.options, return_lse=True)
        made = BlockSparsity.from_mask(mask, 24, 24, 8)  # a selection inside the graph
        plain = block_sparse_attention(q, k, v, made, query_order=order, key_order=order)
        return out.square().sum() + lse.masked_fill(torch.isinf(lse), 0.0).sum() + (plain * 2).sum()

    mask = torch.rand(1, 4, 3, 3) < 0.7
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        inputs = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
        value = function(*inputs, mask, order)
        results.append((value, *torch.autograd.grad(value, inputs)))
    for a, b in zip(*results):
        close(a, b)


def test_compiles_in_one_graph():
    compiled_agrees("aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor():
    compiled_agrees("inductor")


def test_lists_by_key_are_made_in_a_graph_too():
    """Inside torch.compile nothing is kept, and the lists are as wide as they can be."""
    case = make(Nq=40, Nk=56, lists=(1, 2), partial=0.5)
    made = torch.compile(lambda s: s.by_key().indices, fullgraph=True, backend="aot_eager")(case.sparsity)
    kept = case.sparsity.by_key()
    assert made.shape[-1] == 5 and torch.equal(made[..., : kept.indices.shape[-1]], kept.indices)


def test_autocast_casts_query_key_value():
    case = make(Nq=16, Nk=16, density=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = block_sparse_attention(case.q, case.k.bfloat16(), case.v, case.sparsity, return_lse=True)
    halves = [t.bfloat16() for t in (case.q, case.k, case.v)]
    want = block_sparse_attention(*halves, case.sparsity, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_what_has_no_gradient_says_so():
    case = make(Nq=16, Nk=16, density=1.0)
    inputs = [t.requires_grad_() for t in (case.q, case.k, case.v)]
    out = block_sparse_attention(*inputs, case.sparsity)
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        grad.sum().backward()
    for options in ({"skip_threshold": 1.0}, {"qk_int8": True}):
        with pytest.raises(UnsupportedError, match=f"{next(iter(options))}.* no gradient"):
            block_sparse_attention(*inputs, case.sparsity, **options)
        with torch.no_grad():
            assert not block_sparse_attention(*inputs, case.sparsity, **options).requires_grad
    with pytest.raises(UnsupportedError, match="no gradient"):  # nor through the operator itself
        torch.ops.attnzoo.block_sparse_attention(*operands(case, "tiled", skip_threshold=1.0))[0].sum().backward()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_strided_inputs_and_fresh_outputs(backend):
    case = make(B=2, H=2, Hkv=2, Nq=24, Nk=24, lists=(1, 2), key_mask=True)
    want = dense(case.q, case.k, case.v, case.mask, None)[0]
    packed = torch.stack([case.q, case.k, case.v], 2)
    for q, k, v in (
        packed.unbind(2),
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.q, case.k, case.v)],
        [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (case.q, case.k, case.v)],
    ):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        out = block_sparse_attention(*inputs, case.sparsity, **case.options, backend=backend)
        close(out, want)
        assert out.is_contiguous() and out.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out).transpose(0, 1).contiguous().transpose(0, 1))
        assert all(g.is_contiguous() for g in grads)


def test_the_order_may_lie_in_the_sparsity_or_in_the_call():
    case = make(Nq=16, Nk=16, Hkv=2)
    order = axis_order((4, 4), (1, 0))
    plain = block_sparse_attention(case.q, case.k, case.v, case.sparsity, query_order=order, key_order=order)
    held = case.sparsity.with_orders(order, order)
    assert torch.equal(block_sparse_attention(case.q, case.k, case.v, held), plain)
    with pytest.raises(ValueError, match="key_order is given twice"):
        block_sparse_attention(case.q, case.k, case.v, held, key_order=order)


BAD_CALLS = [
    ({"query": torch.zeros(2, 20, 8)}, ValueError, "query must have 4 dimensions"),
    ({"query": "q"}, TypeError, "query must be a tensor"),
    ({"query": torch.zeros(1, 20, 3, 8)}, ValueError, "multiple of key's, got 3 and 2"),
    ({"query": torch.zeros(1, 21, 4, 8)}, ValueError, "sparsity.num_queries is 20, but the tensors have 21"),
    ({"key": torch.zeros(1, 29, 2, 8), "value": torch.zeros(1, 29, 2, 8)}, ValueError, "sparsity.num_keys is 30"),
    ({"key": torch.zeros(1, 30, 2, 8).half()}, ValueError, "share one dtype"),
    ({"value": torch.zeros(1, 29, 2, 8)}, ValueError, "value must be"),
    ({"sparsity": torch.ones(3, 4).bool()}, TypeError, "sparsity must be a BlockSparsity"),
    (
        {"sparsity": BlockSparsity.from_mask(torch.ones(1, 3, 3, 4).bool(), 20, 30, 8)},
        ValueError,
        "sparsity must have heads 1 or 4",
    ),
    (
        {"sparsity": BlockSparsity.from_mask(torch.ones(2, 1, 3, 4).bool(), 20, 30, 8)},
        ValueError,
        "sparsity must have batch 1 or 1",
    ),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"scale": "1"}, TypeError, "scale must be a number"),
    ({"key_mask": torch.ones(1, 30)}, TypeError, "key_mask must be one of bool"),
    ({"key_mask": torch.ones(1, 29).bool()}, ValueError, "key_mask must be"),
    ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
    ({"qk_int8": None}, TypeError, "qk_int8 must be True or False"),
    ({"skip_threshold": 0.0}, ValueError, "skip_threshold must be above 0"),
    ({"skip_threshold": float("inf")}, ValueError, "skip_threshold must be finite"),
    ({"query_order": torch.arange(30)}, ValueError, "query_order must be"),
    ({"query_order": torch.zeros(20).long()}, ValueError, "query_order must hold every number"),
    ({"key_order": torch.arange(30).float()}, TypeError, "key_order must be one of"),
    ({"key_order": torch.arange(30).repeat(4, 1)}, ValueError, "key_order must be for 1 or 2 heads, got 4"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD_CALLS)
def test_bad_calls_are_named(change, error, words):
    case = make(H=4, Hkv=2)
    with pytest.raises(error, match=words):
        block_sparse_attention(
            **({"query": case.q, "key": case.k, "value": case.v, "sparsity": case.sparsity} | change)
        )


ONES = torch.ones(1, 1, 3, 4, dtype=torch.bool)
LISTS = torch.zeros(1, 1, 3, 2, dtype=torch.int32), torch.ones(1, 1, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: BlockSparsity.from_mask(ONES.int(), 20, 30, 8), TypeError, "mask must be one of bool"),
        (lambda: BlockSparsity.from_mask(ONES, 20, 33, 8), ValueError, r"mask must be \[.*nq=3, nk=5\]"),
        (lambda: BlockSparsity.from_mask(ONES, 0, 30, 8), ValueError, "num_queries must be from 1"),
        (lambda: BlockSparsity.from_mask(ONES, 20, 30, 0), ValueError, "block_size must be at least 1"),
        (lambda: BlockSparsity.from_mask(ONES, 20, 30, 8.0), TypeError, "block_size must hold int"),
        (lambda: BlockSparsity.from_indices(LISTS[0][:, :, :2], LISTS[1], 20, 30, 8), ValueError, "indices must be"),
        (lambda: BlockSparsity.from_indices(LISTS[0], LISTS[1][..., :2], 20, 30, 8), ValueError, "counts must be"),
        (
            lambda: BlockSparsity.from_indices(LISTS[0] + 4, LISTS[1], 20, 30, 8),
            ValueError,
            "indices must hold numbers",
        ),
        (
            lambda: BlockSparsity.from_indices(LISTS[0] - 1, LISTS[1], 20, 30, 8),
            ValueError,
            "indices must hold numbers",
        ),
        (lambda: BlockSparsity.from_indices(LISTS[0], LISTS[1] + 2, 20, 30, 8), ValueError, "counts must hold numbers"),
        (lambda: BlockSparsity.from_indices(LISTS[0], LISTS[1] + 1, 20, 30, 8), ValueError, "at most once"),
        (
            lambda: BlockSparsity.from_indices(*LISTS, 20, 30, 8, tiles=torch.ones(1, 8, 8).bool()),
            ValueError,
            "go together",
        ),
        (
            lambda: BlockSparsity.from_indices(*LISTS, 20, 30, 8, tiles=torch.ones(1, 8, 4).bool(), tile_ids=LISTS[0]),
            ValueError,
            "tiles must be",
        ),
        (
            lambda: BlockSparsity.from_indices(
                *LISTS, 20, 30, 8, tiles=torch.ones(1, 8, 8).bool(), tile_ids=LISTS[0] + 1
            ),
            ValueError,
            "tile_ids must hold numbers from -1 to 0",
        ),
        (lambda: BlockSparsity.from_function(lambda q, k: 1.0, (4,)), TypeError, "function must return a bool tensor"),
        (lambda: BlockSparsity.from_function(lambda q, k: q[0] - k[0], (4,)), TypeError, "bool tensor, got int32"),
        (
            lambda: BlockSparsity.from_function(lambda q, k: torch.ones(2, 1, 1).bool(), (4,)),
            ValueError,
            "function must return what broadcasts",
        ),
        (lambda: BlockSparsity.from_function(lambda q, k: q[0] > 0, 4), TypeError, "query_grid must be a sequence"),
        (lambda: BlockSparsity.from_function(lambda q, k: q[0] > 0, (0,)), ValueError, "query_grid must be at least 1"),
        (
            lambda: BlockSparsity.from_function(lambda q, k: q[0] > 0, (4,), dense_queries=[(5, 7)]),
            ValueError,
            "dense_queries must lie within 0 to 6",
        ),
        (
            lambda: BlockSparsity.from_function(lambda q, k: q[0] > 0, (4,), dense_queries=[(0, 2), (1, 3)]),
            ValueError,
            "must not overlap",
        ),
        (lambda: BlockSparsity.from_function(lambda q, k: q[0] > 0, (4,), dense_queries=[3]), TypeError, "pairs"),
        (
            lambda: BlockSparsity.from_mask(ONES, 20, 30, 8).with_dense(keys=[(0, 31)]),
            ValueError,
            "keys must lie within",
        ),
        (lambda: axis_order((2, 3), (0, 0)), ValueError, "axes must be a permutation"),
        (lambda: axis_order((2, 3), (0,)), ValueError, "axes must be one value"),
        (lambda: tile_order((2, 3), 0), ValueError, "tile must be at least 1"),
        (lambda: tile_order(6, 2), TypeError, "grid must be a sequence"),
    ],
)
def test_bad_sparsities_are_named(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_reasons_are_told():
    case = make(block=(200, 8), Nq=20)
    call = case.q, case.k, case.v, case.sparsity
    assert not_supported_reasons(NAME, "tiled", *call) == [] == not_supported_reasons(NAME, "reference", *call)
    assert not_supported_reasons(NAME, "flex", *call) == []
    told = not_supported_reasons(NAME, "flex", *call, skip_threshold=1.0, qk_int8=True, return_lse=True)
    assert [word in " ".join(told) for word in ("skip_threshold", "qk_int8", "lse")] == [True] * 3
    told = " ".join(not_supported_reasons(NAME, "triton", *call, skip_threshold=1.0))
    assert "up to 128 tokens, got (200, 8)" in told and (INTERPRETING or "needs a CUDA" in told)
    doubles = [t.double() for t in call[:3]]
    assert any("float64" in reason for reason in not_supported_reasons(NAME, "triton", *doubles, case.sparsity))
    with use_backend("flex"), pytest.raises(UnsupportedError, match="skip_threshold"):
        block_sparse_attention(*call, skip_threshold=1.0)
    if not INTERPRETING:
        with pytest.raises(UnsupportedError, match="triton needs a CUDA"):
            block_sparse_attention(*call, backend="triton")
    assert dispatch.BACKENDS
