"""linear_attention's inputs for `benchmarks.ops`, as data, and what runs on them.

"authors": the method as its module writes it, in plain PyTorch. "dense": F.scaled_dot_product_attention of all queries
over all keys, another result for the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels import linear_attention

CASES: dict[str, dict[str, Any]] = {
    "inline 56x56": {"method": "inline", "batch": 1, "grid": (56, 56), "heads": 3, "head_dim": 32},
    "inline 28x28 batch 8": {"method": "inline", "batch": 8, "grid": (28, 28), "heads": 6, "head_dim": 32},
    "inline windows 7x7": {"method": "inline", "batch": 64, "grid": (7, 7), "heads": 4, "head_dim": 32},
    "care 14x14 batch 8": {"method": "care", "batch": 8, "grid": (14, 14), "heads": 8, "head_dim": 16},
    "care 56x56": {"method": "care", "batch": 1, "grid": (56, 56), "heads": 4, "head_dim": 32},
    "efficient 56x56": {"method": "efficient", "batch": 1, "grid": (56, 56), "heads": 4, "head_dim": 32},
    "flow 56x56": {"method": "flow", "batch": 1, "grid": (56, 56), "heads": 12, "head_dim": 8},
    "flow 28x28 batch 4": {"method": "flow", "batch": 4, "grid": (28, 28), "heads": 12, "head_dim": 16},
    "flow causal 1024": {"method": "flow causal", "batch": 1, "grid": (1024,), "heads": 8, "head_dim": 64},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "inline": {"normaliser": "subtract"},
    "care": {"normaliser": "sum", "feature_map": "elu"},
    "efficient": {"feature_map": "softmax", "scale": 1.0},
    "flow": {"normaliser": "flow", "feature_map": "sigmoid", "outer_eps": 1e-6},
    "flow causal": {"normaliser": "flow", "feature_map": "sigmoid", "is_causal": True},
}


def _inline(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, scale = q.shape[2], q.shape[3] ** -0.5
    rest = 1 - (q * scale) @ k.mean(2, keepdim=True).transpose(2, 3)
    root = (scale / n) ** 0.5
    return q @ ((k.transpose(2, 3) * root) @ (v * root)) + rest * v.mean(2, keepdim=True)


def _care(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    inverse = 1 / (q @ k.mean(2, keepdim=True).transpose(2, 3) + 1e-6)
    return (q @ ((k.transpose(2, 3) * k.shape[2] ** -0.5) @ (v * k.shape[2] ** -0.5))) * inverse


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(2).transpose(2, 3) @ v)


def _flow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e, n, q, k = 1e-6, k.shape[2], q.sigmoid(), k.sigmoid()
    incoming = 1 / (((q + e) * (k.sum(2, keepdim=True) + e)).sum(3, keepdim=True) + e)
    outgoing = 1 / (((k + e) * (q.sum(2, keepdim=True) + e)).sum(3, keepdim=True) + e)
    sink = ((q + e) * ((k * outgoing).sum(2, keepdim=True) + e)).sum(3, keepdim=True) + e
    source = ((k + e) * ((q * incoming).sum(2, keepdim=True) + e)).sum(3, keepdim=True) + e
    given = v * source.clamp(-1.0, 1.0).softmax(2) * n
    return (q @ (k.transpose(2, 3) @ given)) * incoming * sink.sigmoid()


def _flow_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e, q, k = 1e-6, q.sigmoid(), k.sigmoid()
    n = torch.arange(1, q.shape[2] + 1, dtype=q.dtype, device=q.device)[:, None]
    incoming = n / ((q + e) * (k.cumsum(2) + e)).sum(3, keepdim=True)
    outgoing = n / ((k + e) * (q.cumsum(2) + e)).sum(3, keepdim=True)
    sink = ((q + e) * ((k * outgoing).cumsum(2) + e)).sum(3, keepdim=True) / n
    source = ((k + e) * ((q * incoming).cumsum(2) + e)).sum(3, keepdim=True) / n
    mass = source.clamp(-1.0, 1.0).exp()
    given = v * (mass / mass.cumsum(2) * n)
    # their causal product sums outer products over all tokens before
    past = (k[..., None] * given[..., None, :]).cumsum(2)
    return (q * incoming / n)[..., None, :].matmul(past).squeeze(3) * sink.sigmoid()


_AUTHORS = {"inline": _inline, "care": _care, "efficient": _efficient, "flow": _flow, "flow causal": _flow_causal}


def contenders(
    case: dict[str, Any], device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """What runs on one case, by name; the tensors that need gradients; the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (case["batch"], *case["grid"], case["heads"], case["head_dim"])
    made = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    qkv = [t.requires_grad_() for t in made[:3]]
    options = dict(OPTIONS[case["method"]])
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in qkv)
    if case["method"] == "care":
        options["scale"] = 1 / q.shape[2]

    def ours(backend: str = "auto") -> Tensor:
        return linear_attention(qkv[0], qkv[1], qkv[2], **options, backend=backend)

    def authors() -> Tensor:
        return _AUTHORS[case["method"]](q, k, v).transpose(1, 2).reshape(shape)

    def dense() -> Tensor:
        causal = bool(options.get("is_causal"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(shape)

    runs = {"ours": ours, "reference": lambda: ours("reference"), "authors": authors, "dense": dense}
    return runs, qkv, made[3]
