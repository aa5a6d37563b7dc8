"""What the kernels' operators cost, in torch's words: formulas for `torch.utils.flop_counter.FlopCounterMode`.

    with FlopCounterMode(custom_mapping=flop_formulas()) as counter: ...

A fused operator is one call to the counter, which knows nothing of what is inside: without formulas it counts as zero.
Counted are the products that the formula needs, two FLOPs each, forward, whatever back end runs and whatever tiles it
cuts: masked pairs of a tile are not counted. Softmaxes, biases and masks are not counted, as torch does not count them.
Nothing is registered with torch; the mapping is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnzoo.kernels.neighborhood_attention.problem import axis_windows

__all__ = ["flop_formulas"]

Shape = Sequence[int]


def _neighborhood(
    query: Shape,
    key: Shape,
    value: Shape,
    bias: Shape | None,
    additional_keys: Shape | None,
    additional_values: Shape | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    border: str,
    *_: Any,
    **__: Any,
) -> int:
    batch, *grid, heads, dim = query
    pairs = 1
    for size, kernel, step, spread, causal in zip(grid, kernel_size, stride, dilation, is_causal, strict=True):
        windows = axis_windows(size, kernel, step, spread, causal, border)
        # the zero vectors of border "zero" need no product
        high, low = torch.minimum(windows.high, windows.length - 1), windows.low.clamp(min=0)
        pairs *= int((high - low + 1).clamp(min=0).sum())
    pairs += math.prod(grid) * (0 if additional_keys is None else additional_keys[1])
    return 2 * batch * heads * pairs * (dim + value[-1])


def _pooled(query: Shape, key: Shape, value: Shape, agents: Shape, *_: Any, **__: Any) -> int:
    batch, heads, dim = query[0], query[-2], query[-1]
    tokens = math.prod(query[1:-2]) + math.prod(key[1:-2])
    return 2 * batch * heads * agents[1] * tokens * (dim + value[-1])


def _linear(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    batch, heads, dim = query[0], query[-2], query[-1]
    tokens = math.prod(query[1:-2]) + math.prod(key[1:-2])
    return 2 * batch * heads * tokens * dim * value[-1]


def _sampled(query: Shape, key: Shape, value: Shape, positions: Shape, *_: Any, **__: Any) -> int:
    batch, height, width, heads, dim = query
    rows, columns, samples = positions[1], positions[2], positions[4]
    read = 4 * rows * columns * samples  # four pixels a position
    return 2 * batch * heads * (height * width * samples + read) * (dim + value[-1])


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """The forward operators' formulas, for FlopCounterMode's `custom_mapping`.

    neighborhood_attention   pairs of a query and a key that it sees, times head_dim + head_dim_v
    pooled_attention         agents times (queries + keys), times head_dim + head_dim_v
    linear_attention         (queries + keys) times head_dim times head_dim_v; normalisers are not counted
    sampled_window_attention pairs as above, and four products a value that is read between pixels
    """
    return {
        torch.ops.attnzoo.neighborhood_attention: _neighborhood,
        torch.ops.attnzoo.pooled_attention: _pooled,
        torch.ops.attnzoo.linear_attention: _linear,
        torch.ops.attnzoo.sampled_window_attention: _sampled,
    }
