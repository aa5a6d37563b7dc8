"""pooled_attention's inputs for `benchmarks.ops`, as data, and what runs on them.

"authors": the two softmaxes as their modules write them, matrices and all. "dense": F.scaled_dot_product_attention of
all queries over all keys, another result for the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels import pooled_attention

# "bias": both biases of Agent Attention, shared by the batch, with their gradients; "latents": one set of agents
CASES: dict[str, dict[str, Any]] = {
    "agent 56x56 a49": {"batch": 1, "grid": (56, 56), "heads": 4, "head_dim": 32, "agents": 49, "bias": True},
    "agent 56x56 a9 batch 8": {"batch": 8, "grid": (56, 56), "heads": 3, "head_dim": 32, "agents": 9, "bias": True},
    "agent 28x28 a49 batch 4": {"batch": 4, "grid": (28, 28), "heads": 6, "head_dim": 32, "agents": 49, "bias": True},
    "agent 14x14 a49 batch 8": {"batch": 8, "grid": (14, 14), "heads": 12, "head_dim": 64, "agents": 49, "bias": True},
    "agent windows 7x7 a9": {"batch": 64, "grid": (7, 7), "heads": 4, "head_dim": 32, "agents": 9, "bias": True},
    "sd 64x64 a128": {"batch": 1, "grid": (64, 64), "heads": 8, "head_dim": 40, "agents": 128},
    "flare 16384 m64": {"batch": 1, "grid": (16384,), "heads": 8, "head_dim": 16, "agents": 64, "latents": True},
}


def contenders(
    case: dict[str, Any], device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """What runs on one case, by name; the tensors that need gradients; the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch, grid, heads, head_dim = (case[name] for name in ("batch", "grid", "heads", "head_dim"))
    qkv = [random(batch, *grid, heads, head_dim).requires_grad_() for _ in range(3)]
    agents = random(1 if case.get("latents") else batch, case["agents"], heads, head_dim).requires_grad_()
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in qkv)
    a, num_tokens, scale = agents.transpose(1, 2), q.shape[2], head_dim**-0.5
    biases: list[Tensor] = []
    if case.get("bias"):
        shapes = (1, heads, case["agents"], num_tokens), (1, heads, num_tokens, case["agents"])
        biases = [random(*shape).requires_grad_() for shape in shapes]
    named = dict(zip(("agent_bias", "query_bias"), biases))

    def ours(backend: str = "auto") -> Tensor:
        return pooled_attention(*qkv, agents, **named, backend=backend)

    def authors() -> Tensor:
        first, second = (a * scale) @ k.transpose(2, 3), (q * scale) @ a.transpose(2, 3)
        if biases:
            first, second = first + biases[0], second + biases[1]
        out = second.softmax(-1) @ (first.softmax(-1) @ v)
        return out.transpose(1, 2).reshape(qkv[0].shape)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(qkv[0].shape)

    runs = {"ours": ours, "reference": lambda: ours("reference"), "authors": authors, "dense": dense}
    return runs, [*qkv, agents, *biases], random(*qkv[0].shape)
