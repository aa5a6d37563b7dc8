"""What is asked of pooled attention, as one value that every back end reads, and the checks of the arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_same, check_tensor
from attnzoo.kernels.layout import FLOATS, cast_and_check, check_axes, check_number


@dataclass(frozen=True, eq=False)
class Problem:
    """One call, grids flattened: query [B, Nq, H, D], key [B, Nk, Hkv, D], value [B, Nk, Hkv, Dv],
    agents [B or 1, A, H, D], agent_bias [B or 1, H or 1, A, Nk], query_bias [B or 1, H or 1, Nq, A],
    key_mask [B or 1, Nk].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    agents: Tensor
    agent_bias: Tensor | None
    query_bias: Tensor | None
    key_mask: Tensor | None
    scale: float
    query_scale: float


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scale: float | None = None,
    *,
    query_scale: float | None = None,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: Any = False,
) -> Problem:
    """The public function's arguments, checked; raises TypeError or ValueError that names the argument."""
    check_tensor("agents", agents, 4)
    query, key, value, agents = cast_and_check(query, key, value, agents=agents)
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_agents = key.shape[1], agents.shape[1]
    check_axes(
        "agents",
        agents,
        [("B", batch, True), ("A", num_agents, False), ("H", num_heads, False), ("D", head_dim, False)],
    )
    around = [("B", batch, True), ("H", num_heads, True)]
    for name, bias, last in (
        ("agent_bias", agent_bias, [("A", num_agents, False), ("Nk", num_keys, False)]),
        ("query_bias", query_bias, [("Nq", num_queries, False), ("A", num_agents, False)]),
    ):
        if bias is not None:
            check_tensor(name, bias, 4, FLOATS)
            check_axes(name, bias, around + last)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, 2, [torch.bool])
        check_axes("key_mask", key_mask, [("B", batch, True), ("Nk", num_keys, False)])
    check_same("device", query=query, agent_bias=agent_bias, query_bias=query_bias, key_mask=key_mask)
    scale = check_number("scale", scale, head_dim**-0.5)
    query_scale = check_number("query_scale", query_scale, scale)
    return Problem(query, key, value, agents, agent_bias, query_bias, key_mask, scale, query_scale)
