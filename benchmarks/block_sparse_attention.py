"""block_sparse_attention's inputs for `benchmarks.ops`, as data, and what runs on them.

"dense": scaled_dot_product_attention of all queries over all keys, another result for the same tokens. "dense, masked":
the same result, with the mask of all pairs. "flex", on a GPU: this library's flex back end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels import BlockSparsity, block_sparse_attention, tile_order

# "random": every query block lists this share of all key blocks, drawn per head. "window": tokens of a grid that are at
# most so far apart on every axis, "text" global tokens after it; "tile": blocks are tiles of the grid, by an order.
CASES: dict[str, dict[str, Any]] = {
    "4096 random 1/4 block 64": {"tokens": 4096, "heads": 4, "head_dim": 64, "block": 64, "random": 0.25},
    "4096 random 1/4 block 128": {"tokens": 4096, "heads": 4, "head_dim": 64, "block": 128, "random": 0.25},
    "4096 random 1/8 block 64": {"tokens": 4096, "heads": 4, "head_dim": 64, "block": 64, "random": 0.125},
    "64x64 window 6 in tiles": {
        "tokens": 4096, "heads": 4, "head_dim": 64, "block": 64, "grid": (64, 64), "window": 6, "tile": 8,
    },
    "16x16x16 window 3 text 100": {
        "tokens": 4196, "heads": 4, "head_dim": 64, "block": 64, "grid": (16, 16, 16), "window": 3, "tile": 4,
        "text": 100,
    },
}  # fmt: skip


def sparsity_of(case: dict[str, Any]) -> BlockSparsity:
    """The case's blocks."""
    tokens, block = case["tokens"], case["block"]
    if "random" in case:
        count = -(-tokens // block)
        drawn = torch.rand(1, case["heads"], count, count, generator=torch.Generator().manual_seed(1))
        listed = drawn.argsort(-1).argsort(-1) < round(case["random"] * count)
        return BlockSparsity.from_mask(listed, tokens, tokens, block)
    far, text = case["window"], case.get("text", 0)

    def near(query: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
        seen = (query[0] - key[0]).abs() <= far
        for q, k in zip(query[1:], key[1:]):
            seen = seen & ((q - k).abs() <= far)
        return seen

    order = tile_order(case["grid"], case["tile"], num_after=text)
    dense = [(tokens - text, tokens)] if text else []
    return BlockSparsity.from_function(near, case["grid"], block_size=block, dense_queries=dense, query_order=order)


def contenders(
    case: dict[str, Any], device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """What runs on one case, by name; the tensors that need gradients; the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.get("batch", 1), case["tokens"], case["heads"], case["head_dim"])
    made = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    inputs, grad = [t.requires_grad_() for t in made[:3]], made[3]
    q, k, v = (t.transpose(1, 2) for t in inputs)
    sparsity = sparsity_of(case).to(device)
    mask = sparsity.element_mask()
    if sparsity.query_order is not None and sparsity.key_order is not None:
        back = [order[0].argsort() for order in (sparsity.query_order, sparsity.key_order)]
        mask = mask[:, :, back[0]][..., back[1]]

    def ours(backend: str = "auto") -> Tensor:
        query, key, value = inputs
        out = block_sparse_attention(query, key, value, sparsity, backend=backend)
        assert isinstance(out, Tensor)
        return out

    def dense(mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    found: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "reference": lambda: ours("reference"),
        "dense": dense,
        "dense, masked": lambda: dense(mask),
    }
    if torch.device(device).type == "cuda":
        found["flex"] = lambda: ours("flex")
    return found, inputs, grad


def useful_flops(case: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of the listed blocks' two products forward, and with the gradient's five."""
    pairs = sparsity_of(case).density * case["tokens"] ** 2
    forward = 4 * pairs * case.get("batch", 1) * case["heads"] * case["head_dim"]
    return int(forward), int(3.5 * forward)
