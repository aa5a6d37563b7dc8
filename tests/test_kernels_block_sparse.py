"""block_sparse_attention against a dense float64 formula written here, pair by pair where the rule is at stake."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.kernels import BlockSparsity, block_sparse_attention, dispatch
from attnzoo.kernels.block_sparse_attention import tiled

INTERPRETING = dispatch.interpreting()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1"))
BACKENDS = ["reference", "tiled", TRITON]


@dataclass(frozen=True)
class Given:
    """A call: the tensors, the sparsity, the mask that it stands for [B, H, Nq, Nk] of tokens, and the options."""

    q: Tensor
    k: Tensor
    v: Tensor
    sparsity: BlockSparsity
    mask: Tensor
    options: dict


def order_of(order: Tensor | None, head: int, heads: int, num_tokens: int) -> Tensor:
    """The order of one query head, of heads."""
    if order is None:
        return torch.arange(num_tokens)
    rows = order.view(-1, num_tokens)
    return rows[head * len(rows) // heads].long()


def make(
    B=1, H=2, Hkv=1, Nq=20, Nk=30, D=8, Dv=8, block=(8, 8), lists=(1, 1), density=0.5, partial=0.0,
    orders=(0, 0), key_mask=False, causal=False, scale=None, dtype=torch.float32,
) -> Given:  # fmt: skip
    """A random call; lists: batch and heads of the lists; orders: heads of each order, 0 for none."""
    rows, columns = -(-Nq // block[0]), -(-Nk // block[1])
    listed = torch.rand(*lists, rows, columns) < density
    width = max(1, int(listed.sum(-1).max()))
    counts = listed.sum(-1, dtype=torch.int32)
    indices = torch.full((*lists, rows, width), columns + 7)  # what lies beyond counts must not be read
    tile_ids = torch.full((*lists, rows, width), 99)
    tiles = torch.rand(3, *block) < 0.6
    pairs = torch.zeros(*lists, rows * block[0], columns * block[1], dtype=torch.bool)
    for b in range(lists[0]):
        for h in range(lists[1]):
            for r in range(rows):
                found = listed[b, h, r].nonzero()[:, 0]
                found = found[torch.randperm(len(found))]
                indices[b, h, r, : len(found)] = found
                for at, c in enumerate(found.tolist()):
                    tile = int(torch.randint(3, ())) if torch.rand(()) < partial else -1
                    tile_ids[b, h, r, at] = tile
                    where = slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
                    pairs[b, h][where] = True if tile < 0 else tiles[tile]
    pairs = pairs[..., :Nq, :Nk].expand(B, H, Nq, Nk)
    query_order, key_order = (
        torch.stack([torch.randperm(n) for _ in range(count)]) if count else None for n, count in zip((Nq, Nk), orders)
    )
    mask = torch.zeros(B, H, Nq, Nk, dtype=torch.bool)
    for h in range(H):
        i, j = order_of(query_order, h, H, Nq), order_of(key_order, h, H, Nk)
        mask[:, h, i[:, None], j[None, :]] = pairs[:, h]
    sparsity = BlockSparsity.from_indices(
        indices, counts, Nq, Nk, block,
        **({"tile_ids": tile_ids, "tiles": tiles} if partial else {}),
        query_order=query_order, key_order=key_order,
    )  # fmt: skip
    options: dict = {"scale": scale, "is_causal": causal}
    if key_mask:
        options["key_mask"] = torch.rand(B, Nk) < 0.7
        mask = mask & options["key_mask"][:, None, None]
    if causal:
        mask = mask & (torch.arange(Nk)[None] <= torch.arange(Nq)[:, None] + Nk - Nq)
    q, k, v = (torch.randn(B, n, h, d, dtype=dtype) for n, h, d in ((Nq, H, D), (Nk, Hkv, D), (Nk, Hkv, Dv)))
    return Given(q, k, v, sparsity, mask, options)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 under an explicit mask [B, H, Nq, Nk]."""
    repeats = q.shape[2] // k.shape[2]
    s = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(repeats, 2))
    s = (s * (q.shape[3] ** -0.5 if scale is None else scale)).masked_fill(~mask, -math.inf)
    empty = ~mask.any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", p, v.double().repeat_interleave(repeats, 2))
    lse = s.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    return out, lse.transpose(1, 2)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Equal infinities, and elsewhere an error below tolerance relative to the largest wanted value (at least 1)."""
    assert got.shape == want.shape
    infinite = torch.isinf(want)
    assert torch.equal(infinite, torch.isinf(got))
    if got.numel():
        error = (got.double() - want.double()).masked_fill(infinite, 0.0).abs().max().item()
        assert error <= tolerance * max(1.0, want.double().masked_fill(infinite, 0.0).abs().max().item())


def check_given(case: Given, backend: str, tolerance: float = 1e-5) -> None:
    """Output, lse and every gradient, the one of lse included."""
    inputs = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    doubles = [t.detach().double().requires_grad_() for t in (case.q, case.k, case.v)]
    want = dense(*doubles, case.mask, case.options["scale"])
    got = block_sparse_attention(*inputs, case.sparsity, **case.options, return_lse=True, backend=backend)
    assert got[0].is_contiguous() and got[1].is_contiguous() and got[1].dtype == torch.float32
    for a, b in zip(got, want):
        close(a, b, tolerance)
    weights = torch.randn_like(got[0]), torch.randn_like(got[1]).masked_fill(torch.isinf(got[1]), 0.0)
    ours = torch.autograd.grad(got, inputs, weights)
    theirs = torch.autograd.grad(want, doubles, [w.double() for w in weights])
    for a, b in zip(ours, theirs):
        close(a, b, tolerance)


@st.composite
def calls(draw):
    """Everything at once: sizes that do not divide, ragged blocks, lists per batch and head, orders, masks."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, Hkv, repeats = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    H = Hkv * repeats
    return make(
        B,
        H,
        Hkv,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([8, 13, 24, 64])),
        draw(st.sampled_from([8, 5, 40])),
        (draw(st.sampled_from([1, 4, 7, 16])), draw(st.sampled_from([1, 4, 9, 32]))),
        (draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H]))),
        draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        draw(st.sampled_from([0.0, 0.5])),
        (draw(st.sampled_from([0, 1, H])), draw(st.sampled_from([0, 1, Hkv]))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([None, 0.0, 0.7])),
    )


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=calls())
def test_any_call(backend, case):
    check_given(case, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "tiled"])
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=calls())
def test_any_call_long(backend, case):
    check_given(case, backend)


@pytest.mark.parametrize("head_dim", [8, 72, 129, 256])
def test_head_dims(head_dim):
    for backend in ("reference", "tiled"):
        check_given(make(D=head_dim, Dv=head_dim, lists=(1, 2), partial=0.3), backend)


@pytest.fixture
def nan_memory(monkeypatch):
    """Memory that is not yet written begins as NaN: what a path leaves out shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def filled(made: Tensor) -> Tensor:
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", lambda *a, **o: filled(empty(*a, **o)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **o: filled(new_empty(*a, **o)))


TRITON_CASES = {
    "ragged, lists per head": {"Nq": 70, "Nk": 100, "D": 24, "Dv": 16, "block": (32, 48), "lists": (1, 2)},
    "empty rows, lists per batch": {
        "B": 2, "H": 1, "Nq": 64, "Nk": 64, "block": (32, 32), "lists": (2, 1), "density": 0.3,
    },
    "partial, padding, causal": {
        "B": 2, "Nq": 50, "Nk": 70, "block": (32, 32), "partial": 0.5, "key_mask": True, "causal": True,
    },
    "orders by head, gqa": {
        "H": 4, "Hkv": 2, "Nq": 60, "Nk": 64, "block": (64, 32), "lists": (1, 4), "orders": (4, 2), "causal": True,
        "partial": 0.5, "D": 16,
    },
    "one order for all": {"Nq": 33, "Nk": 33, "block": (33, 33), "density": 1.0, "orders": (1, 1), "scale": 0.5},
    "parts of a block": {"H": 1, "Nq": 300, "Nk": 140, "block": (300, 140), "density": 1.0, "partial": 1.0},
    "head dim 129": {"H": 1, "Nq": 20, "Nk": 20, "D": 129, "Dv": 40, "block": (16, 16)},
}  # fmt: skip


@pytest.mark.parametrize("name", TRITON_CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_calls(name, backend, nan_memory):
    check_given(make(**TRITON_CASES[name]), backend)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    """No worse than 1.5 times dense attention in that dtype, both against float64, forward and gradients.

    Triton's interpreter truncates to bfloat16 where hardware rounds, at up to twice the error: there 2 x 1.5 (as in
    test_kernels_edited.py).
    """
    case = make(H=2, Hkv=2, Nq=64, Nk=64, D=16, Dv=16, block=(32, 32), density=1.0, dtype=dtype)
    inputs = [t.requires_grad_() for t in (case.q, case.k, case.v)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    want = dense(*doubles, case.mask, None)[0]
    stock = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in inputs)).transpose(1, 2)
    got = block_sparse_attention(*inputs, case.sparsity, backend=backend)
    assert got.dtype == dtype
    weight = torch.randn(want.shape).to(dtype)
    results = [
        (out, *torch.autograd.grad(out, tensors, weight.to(out.dtype)))
        for out, tensors in ((want, doubles), (stock, inputs), (got, inputs))
    ]
    times = 3.0 if backend == "triton" and dtype == torch.bfloat16 else 1.5
    for exact, theirs, ours in zip(*results):
        assert (ours.double() - exact).abs().max() <= times * (theirs.double() - exact).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_leaks_out_of_padding(backend):
    """Keys and values that key_mask hides may hold anything."""
    case = make(B=2, Nq=20, Nk=30, block=(16, 16), density=1.0, key_mask=True, orders=(0, 1))
    hidden = ~case.options["key_mask"][:, :, None, None]
    dirty = replace(case, k=case.k.masked_fill(hidden, math.nan), v=case.v.masked_fill(hidden, math.inf))
    results = []
    for each in (case, dirty):
        inputs = [t.clone().requires_grad_() for t in (each.q, each.k, each.v)]
        out = block_sparse_attention(*inputs, each.sparsity, **each.options, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        if each is dirty:
            options = each.options | {"skip_threshold": 1.0, "qk_int8": True, "backend": backend}
            with torch.no_grad():
                assert torch.isfinite(block_sparse_attention(*inputs, each.sparsity, **options)).all()
    for clean, got in zip(*results):
        assert torch.equal(clean, got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend):
    """Logits far apart, so that weights underflow, and of hundreds, which need their maximum taken off."""
    case = make(Nq=20, Nk=30, block=(16, 16), density=1.0, scale=40.0)
    check_given(case, backend, 3e-4)


# ---------------------------------------------------------------------------------------- skip_threshold and qk_int8


def skipped(case: Given, s: Tensor, threshold: float) -> Tensor:
    """bool [B, H, Nq, Nk]: pairs whose values count, block by block in the lists' order, row by row."""
    sparsity = case.sparsity
    (block_q, block_k), (B, H, Nq, Nk) = sparsity.block_size, s.shape
    kept = torch.zeros(s.shape, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            i, j = order_of(sparsity.query_order, h, H, Nq), order_of(sparsity.key_order, h, H, Nk)
            own = [b % sparsity.counts.shape[0], h % sparsity.counts.shape[1]]
            for r in range(sparsity.counts.shape[2]):
                rows = i[r * block_q : (r + 1) * block_q].tolist()
                running = dict.fromkeys(rows, -math.inf)
                for step in range(int(sparsity.counts[own[0], own[1], r])):
                    c = int(sparsity.indices[own[0], own[1], r, step])
                    columns = j[c * block_k : (c + 1) * block_k]
                    needed = False
                    for row in rows:
                        top = s[b, h, row, columns].max().item()
                        running[row] = max(running[row], top)
                        needed = needed or (top > -math.inf and top + threshold >= running[row])
                    if needed:
                        kept[b, h, torch.tensor(rows)[:, None], columns[None]] = True
    return kept


SKIP_CASES = {
    "plain": {"Nq": 40, "Nk": 60, "block": (16, 16), "density": 0.8},
    "all kinds": {
        "B": 2, "H": 4, "Hkv": 2, "Nq": 30, "Nk": 50, "block": (16, 32), "lists": (2, 4), "orders": (4, 2),
        "partial": 0.4, "key_mask": True, "causal": True,
    },
}  # fmt: skip


def with_faint_blocks(case: Given) -> Given:
    """Every other block of keys along the order with logits near 0."""
    k, block = case.k.clone(), case.sparsity.block_size[1]
    for h in range(k.shape[2]):
        along = order_of(case.sparsity.key_order, h, k.shape[2], k.shape[1])
        for start in range(block, k.shape[1], 2 * block):
            k[:, along[start : start + block], h] *= 0.01
    return replace(case, k=k)


@pytest.mark.parametrize("name", SKIP_CASES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [0.1, 2.0, 100.0])
def test_skipped_blocks_lose_values_and_keep_mass(name, backend, threshold, nan_memory):
    case = with_faint_blocks(make(**SKIP_CASES[name]))
    repeats = case.q.shape[2] // case.k.shape[2]
    s = torch.einsum("bihd,bjhd->bhij", case.q.double(), case.k.double().repeat_interleave(repeats, 2))
    s = (s * case.q.shape[3] ** -0.5).masked_fill(~case.mask, -math.inf)
    kept = skipped(case, s, threshold)
    if threshold != 2.0:
        assert bool((case.mask & ~kept).any()) == (threshold == 0.1) and bool((case.mask & kept).any())
    p = torch.softmax(s, -1).nan_to_num(0.0) * kept
    want = torch.einsum("bhij,bjhd->bihd", p, case.v.double().repeat_interleave(repeats, 2))
    options = case.options | {"skip_threshold": threshold, "return_lse": True, "backend": backend}
    out, lse = block_sparse_attention(case.q, case.k, case.v, case.sparsity, **options)
    close(out, want)
    close(lse, dense(case.q, case.k, case.v, case.mask, None)[1])


def eight_bits(case: Given) -> tuple[Tensor, Tensor]:
    """(logits [B, H, Nq, Nk] of 8-bit rows, without the part that keys share; that part [B, Nq, H]), unscaled."""
    H, sparsity = case.q.shape[2], case.sparsity
    q, k = case.q.double(), case.k.double().repeat_interleave(H // case.k.shape[2], 2)
    real = case.options.get("key_mask")
    real = torch.ones(k.shape[:2], dtype=torch.bool) if real is None else real
    mean = (k * real[..., None, None]).sum(1) / real.sum(1).clamp(min=1)[:, None, None]
    shift = torch.einsum("bihd,bhd->bih", q, mean)
    k = (k - mean[:, None]) * real[..., None, None]

    def rounded(x: Tensor, order: Tensor | None, block: int) -> Tensor:
        made = torch.zeros_like(x)
        for h in range(H):
            along = order_of(order, h, H, x.shape[1])
            for start in range(0, x.shape[1], block):
                own = x[:, along[start : start + block], h]
                scale = own.abs().amax((1, 2), keepdim=True) / 127
                scale = torch.where(scale == 0, 1.0, scale)
                made[:, along[start : start + block], h] = torch.round(own / scale) * scale
        return made

    q, k = (
        rounded(q, sparsity.query_order, sparsity.block_size[0]),
        rounded(k, sparsity.key_order, sparsity.block_size[1]),
    )
    return torch.einsum("bihd,bjhd->bhij", q, k), shift


@pytest.mark.parametrize("name", SKIP_CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_bits_are_what_they_say(name, backend, nan_memory):
    case = make(**SKIP_CASES[name], D=32)
    case = replace(case, k=case.k + 5 * torch.randn(1, 1, *case.k.shape[2:]))  # outliers common to all tokens
    s, shift = eight_bits(case)
    scale = case.q.shape[3] ** -0.5
    s = (s * scale).masked_fill(~case.mask, -math.inf)
    v = case.v.double().repeat_interleave(case.q.shape[2] // case.k.shape[2], 2)
    want = torch.einsum("bhij,bjhd->bihd", torch.softmax(s, -1).nan_to_num(0.0), v)
    options = case.options | {"qk_int8": True, "return_lse": True, "backend": backend}
    out, lse = block_sparse_attention(case.q, case.k, case.v, case.sparsity, **options)
    # A value half way between two integers may round either way: allow a few to, and no more than that.
    error = (out.double() - want).abs()
    assert error.max() < 5e-3 and (error > 1e-5).double().mean() < 0.05
    close(lse, torch.logsumexp(s, -1).transpose(1, 2) + shift * scale, 1e-3)


def test_eight_bits_lose_little():
    """The error against exact attention, relative to the output's norm: below 2 % (1.2 % here), outliers or not."""
    for outliers in (0.0, 20.0):
        case = make(H=2, Hkv=2, Nq=256, Nk=256, D=64, Dv=64, block=(64, 64), density=0.5)
        k = case.k + outliers * torch.randn(1, 1, 2, 64)
        want, wanted_lse = dense(case.q, k, case.v, case.mask, None)
        out, lse = block_sparse_attention(case.q, k, case.v, case.sparsity, qk_int8=True, return_lse=True)
        assert (out.double() - want).norm() < 0.02 * want.norm()
        finite = torch.isfinite(wanted_lse)
        assert (lse.double() - wanted_lse)[finite].abs().max() < 0.02


def test_memory_follows_the_lists():
    """2048 tokens, density 1/8: less than a twentieth of the matrix is held, in the forward pass."""
    n, heads = 2048, 2
    q, k, v = (torch.randn(1, n, heads, 16) for _ in range(3))
    blocks = torch.zeros(1, 1, n // 64, n // 64, dtype=torch.bool)
    blocks[..., ::8] = True
    sparsity = BlockSparsity.from_mask(blocks, n, n, 64)
    sizes: list[int] = []

    class Seen(tiled._Buffers):
        def get(self, name, *shape):
            sizes.append(math.prod(shape))
            return super().get(name, *shape)

    patch = pytest.MonkeyPatch()
    patch.setattr(tiled, "_Buffers", Seen)
    with patch.context():
        block_sparse_attention(q, k, v, sparsity)
    patch.undo()
    assert 0 < max(sizes) <= max(tiled.SCORE_ELEMENTS, n * 16) < n * n / 20
