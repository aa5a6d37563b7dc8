"""edited_attention as PyTorch and its user meet it: gradients, operator checks, compile, autocast, refusals."""

from __future__ import annotations

import pytest
import torch
from test_kernels_edited import INTERPRETING, close, dense_probs, qkv

from attnzoo.errors import UnsupportedError
from attnzoo.kernels import dispatch
from attnzoo.kernels.edited_attention import (
    Visibility,
    attention_column_sums,
    attention_probs,
    edited_attention,
    grouped_attention,
)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients(backend, shape, softcap):
    """gradcheck of output and lse for query, key, value, key_bias, boost, float mask, with rows that see nothing."""
    q, k, v = (t.requires_grad_() for t in qkv(2, 3, 5, 2, 1, 3, 2, dtype=torch.float64))
    rest = [torch.randn(*shape, *size, dtype=torch.float64, requires_grad=True) for size in ((5,), (5,), (3, 5))]
    groups = torch.randint(0, 3, (2, 1, 5), dtype=torch.uint8)
    real = torch.ones(2, 5, dtype=torch.bool)
    real[0, :3] = False

    def run(q, k, v, key_bias, boost, mask):
        out, lse = grouped_attention(
            q,
            k,
            v,
            groups,
            3,
            Visibility(key_mask=real, mask=mask),
            softcap=softcap,
            temperature=0.7,
            key_bias=key_bias,
            boost=boost,
            backend=backend,
        )
        return out, lse.masked_fill(torch.isinf(lse), 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, *rest))


def test_gradients_through_rows_and_rule():
    """Stock rows, edited rows and the rule together, against the dense formula's autograd."""
    q, k, v = (t.requires_grad_() for t in qkv(Nq=12, dtype=torch.float64))
    groups = torch.randint(0, 2, (2, 1, 12), dtype=torch.uint8)
    out = edited_attention(q, k, v, groups=groups, num_groups=2, rule=lambda m: 1 + m, rows=(6, None))
    _, p = dense_probs(q, k, Visibility())
    mass = torch.stack([(p * (groups == g).unsqueeze(2)).sum(-1) for g in (0, 1)], -1)
    factors = (1 + mass).gather(-1, groups.long().expand(2, 4, 12)[:, :, :].unsqueeze(2).expand(2, 4, 12, 12))
    p = torch.where(torch.arange(12)[:, None] >= 6, p * factors, p)
    want = (p @ v.repeat_interleave(2, 2).transpose(1, 2)).transpose(1, 2)
    weight = torch.randn_like(want)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((want * weight).sum(), (q, k, v))):
        close(a, b, 1e-9)


def test_a_row_without_keys_has_gradient_zero():
    q, k, v = (t.requires_grad_() for t in qkv())
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0] = False
    groups = torch.randint(0, 2, (2, 1, 12), dtype=torch.uint8)
    out, lse = edited_attention(
        q,
        k,
        v,
        Visibility(key_mask=real),
        groups=groups,
        num_groups=2,
        rule=lambda m: 1 + m,
        renormalise=True,
        return_lse=True,
    )
    assert not out[0].any() and torch.isinf(lse[0]).all()
    for gradient in torch.autograd.grad((out.square().sum() + lse.sum()), (q, k, v)):
        assert not gradient[0].any() and torch.isfinite(gradient).all() and gradient[1].any()


def test_double_backward_and_column_sum_gradients_are_refused():
    q, k, v = (t.requires_grad_() for t in qkv())
    out = edited_attention(q, k, v, temperature=0.5)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        grad.sum().backward()
    with pytest.raises(UnsupportedError, match="attention_column_sums"):
        attention_column_sums(q, k)


def test_opcheck():
    q, k, v = qkv()
    groups = torch.randint(0, 3, (2, 1, 12), dtype=torch.uint8)
    real = torch.rand(2, 12) > 0.3
    bias = torch.randn(1, 4, 12, requires_grad=True)
    for query, key_bias, ids, count in ((q.requires_grad_(), bias, groups, 3), (q.detach(), None, None, 1)):
        options = (True, 3, None, 0.5, None, 0.8, count, "tiled")
        operands = (query, k, v, real, None, None, key_bias, None, ids)
        torch.library.opcheck(torch.ops.attnzoo.edited_attention.default, (*operands, *options))


def test_compiles_in_one_graph():
    def run(q, k, v, groups):
        return edited_attention(
            q, k, v, groups=groups, num_groups=2, rule=lambda m: 2 - m, rows=(-2, None), return_lse=True
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 15):
        q, k, v = qkv(Nq=n, Nk=n)
        groups = torch.randint(0, 2, (2, 1, n), dtype=torch.uint8)
        for got, want in zip(compiled(q, k, v, groups), run(q, k, v, groups)):
            close(got, want, 1e-6)


def test_autocast_casts_query_key_value_only():
    q, k, v = qkv()
    bias = torch.randn(1, 1, 12)
    groups = torch.randint(0, 2, (2, 1, 12), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        out = edited_attention(
            q, k, v, key_bias=bias, groups=groups, num_groups=2, rule=torch.ones_like, rows=(3, None)
        )
        mixed = edited_attention(q, k.bfloat16(), v, key_bias=bias, rows=(3, None))
        probs = attention_probs(q, k)
    halves = [t.bfloat16() for t in (q, k, v)]
    want = edited_attention(*halves, key_bias=bias, rows=(3, None))
    assert out.dtype == mixed.dtype == torch.bfloat16 and probs.dtype == torch.float32
    close(mixed, want, 1e-6)
    close(out, want, 1e-2)
    close(probs, attention_probs(*halves[:2]), 1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(2, 9, 8)}, ValueError, "query must have 4 dimensions"),
        ({"query": torch.zeros(2, 9, 3, 8)}, ValueError, "multiple of key's, got 3 and 2"),
        ({"key": torch.zeros(2, 12, 2, 7)}, ValueError, "key must be"),
        ({"key": torch.zeros(2, 12, 2, 8).half()}, ValueError, "share one dtype"),
        ({"value": torch.zeros(2, 11, 2, 8)}, ValueError, "value must be"),
        ({"query": torch.zeros(2, 9, 4, 8).int()}, TypeError, "query must be one of"),
        ({"key_bias": torch.zeros(2, 12)}, ValueError, "key_bias must have 3 dimensions"),
        (
            {"key_bias": torch.zeros(2, 3, 12)},
            ValueError,
            r"key_bias must have the shape \[B=2 or 1, H=4 or 1, Nk=12\]",
        ),
        ({"boost": torch.zeros(2, 4, 12).int()}, TypeError, "boost must be one of"),
        ({"groups": torch.zeros(2, 1, 12, dtype=torch.uint8)}, ValueError, "groups and num_groups"),
        ({"groups": torch.zeros(2, 1, 12), "num_groups": 2}, TypeError, "groups must be one of uint8"),
        (
            {"groups": torch.zeros(2, 1, 12, dtype=torch.uint8), "num_groups": 9},
            ValueError,
            "num_groups must be from 1 to 8",
        ),
        ({"groups": torch.zeros(2, 1, 12, dtype=torch.uint8), "num_groups": 2}, ValueError, "rule and groups"),
        ({"rule": torch.ones_like}, ValueError, "rule and groups"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be above 0"),
        ({"rows": 3}, TypeError, "rows must be None or a pair"),
        ({"rows": (5, 2)}, ValueError, "rows must lie"),
        ({"rows": (-10, None)}, ValueError, "rows must lie"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"visibility": "causal"}, TypeError, "visibility must be a Visibility"),
        ({"visibility": Visibility(window_size=0)}, ValueError, "window_size must be"),
        ({"visibility": Visibility(key_mask=torch.ones(2, 12))}, TypeError, "key_mask must be one of bool"),
        (
            {"visibility": Visibility(key_mask=torch.ones(2, 9).bool())},
            ValueError,
            r"key_mask .* Nk=12\], got \(2, 9\)",
        ),
        ({"visibility": Visibility(mask=torch.zeros(2, 1, 9, 11))}, ValueError, "mask must have the shape"),
        ({"visibility": Visibility(span_ids=torch.zeros(2, 12))}, TypeError, "span_ids must be one of"),
    ],
)
def test_bad_input_is_named(change, error, words):
    q, k, v = qkv()
    with pytest.raises(error, match=words):
        edited_attention(**({"query": q, "key": k, "value": v} | change))


def test_reasons_are_told():
    q, k, v = qkv()
    assert dispatch.not_supported_reasons("edited_attention", "tiled", q, k, v, key_bias=torch.zeros(1, 1, 12)) == []
    assert dispatch.not_supported_reasons("edited_attention", "flex", q, k, v)
    if not INTERPRETING:
        with pytest.raises(UnsupportedError, match="triton needs a CUDA"):
            edited_attention(q, k, v, temperature=0.5, backend="triton")
