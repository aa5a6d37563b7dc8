"""The path of every device, out of stock torch operations: PyTorch's fused attention, and `stage` where it can't serve.

Forward, each stage by one call of PyTorch's fused attention. On the CPU that is its flash kernel, which also gives lse;
`stage` takes over where the kernel asks for more than a call has (head dims that differ, query heads that share key
heads) and for so few agents that its tiles stay empty (second stage below FEW_AGENTS). Elsewhere it is
F.scaled_dot_product_attention, and lse, which that does not give, is summed in pieces where it is wanted.
Backward: the same flash kernel's own, on the CPU, for a stage without bias and mask whose lse has no gradient; else
`stage`, in pieces, because PyTorch's fused kernels give no gradient of a bias there and none of lse anywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels.pooled_attention.problem import Problem
from attnzoo.kernels.pooled_attention.stage import (
    INF,
    Gradients,
    Stage,
    collect,
    collect_gradients,
    spread,
    spread_gradients,
)

FEW_AGENTS = 16


def reasons(problem: Problem) -> list[str]:
    """It serves every call."""
    return []


def stages(problem: Problem) -> tuple[Stage, Stage]:
    """The agents' softmax over the keys, and the queries' over the agents."""
    agents = problem.agents.expand(problem.query.shape[0], -1, -1, -1)
    over_queries = None if problem.query_bias is None else problem.query_bias.transpose(2, 3)
    return (
        Stage(agents, problem.key, problem.agent_bias, problem.key_mask, problem.scale),
        Stage(agents, problem.query, over_queries, None, problem.query_scale),
    )


def _mask(stage: Stage, bias: Tensor | None) -> Tensor | None:
    """Bias and mask as what PyTorch adds to the logits, float32 or the query's dtype, broadcast to batch and heads."""
    added = bias
    if bias is not None and bias.dtype not in (stage.agents.dtype, stage.dtype):
        added = bias.to(stage.dtype)
    if stage.mask is not None:
        hidden = ~stage.mask[:, None, None, :]
        nothing = torch.zeros((), dtype=stage.agents.dtype, device=hidden.device) if added is None else added
        added = torch.where(hidden, -INF, nothing)
    return None if added is None else added.expand(stage.tokens.shape[0], stage.agents.shape[2], -1, -1)


def _fits_cpu(stage: Stage, value: Tensor, over_tokens: bool) -> bool:
    """Whether PyTorch's flash kernel for CPUs takes this stage, and is the faster one."""
    many = over_tokens or stage.agents.shape[1] >= FEW_AGENTS
    alike = stage.agents.shape[2:] == (stage.tokens.shape[2], value.shape[3])
    return value.device.type == "cpu" and alike and many and value.shape[0] > 0


def _cpu(stage: Stage, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """out and lse of PyTorch's flash kernel for CPUs; q, k, v [B, N, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # The kernel behind F.scaled_dot_product_attention, called by name for its lse.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=stage.scale)
    if mask is not None and bool((lse == 0).any()):  # its lse of a row that sees nothing
        lse = lse.masked_fill((mask == -INF).all(-1), -INF)
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def _elsewhere(stage: Stage, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """out of F.scaled_dot_product_attention; q, k, v [B, N, H, D]."""
    shared = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=stage.scale, enable_gqa=shared)
    if mask is not None:  # what a row that sees nothing holds differs between its kernels
        out = out.masked_fill((mask == -INF).all(-1, keepdim=True), 0.0)
    return out.transpose(1, 2).contiguous()


def _run(stage: Stage, value: Tensor, over_tokens: bool, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """One stage's out and, where wanted, lse."""
    own = collect if over_tokens else spread
    q, k = (stage.agents, stage.tokens) if over_tokens else (stage.tokens, stage.agents)
    bias = stage.bias if over_tokens or stage.bias is None else stage.bias.transpose(2, 3)
    if _fits_cpu(stage, value, over_tokens):
        return _cpu(stage, q, k, value, _mask(stage, bias))
    # A bias of another dtype would be rounded, or sent to a dense kernel.
    if value.device.type != "cpu" and (bias is None or bias.dtype == q.dtype):
        return _elsewhere(stage, q, k, value, _mask(stage, bias)), own(stage, None)[1] if want_lse else None
    out, lse = own(stage, value)
    assert out is not None
    return out, lse


def _cpu_gradients(
    stage: Stage, value: Tensor, results: tuple[Tensor, Tensor], grad_out: Tensor, over_tokens: bool
) -> Gradients:
    """Gradients of a stage without bias and mask, by PyTorch's flash kernel for CPUs."""
    q, k = (stage.agents, stage.tokens) if over_tokens else (stage.tokens, stage.agents)
    given = (t.transpose(1, 2) for t in (grad_out.to(value.dtype), q, k, value, *results))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False, scale=stage.scale)
    d_q, d_k, d_value = (t.transpose(1, 2).contiguous() for t in found)
    return Gradients(d_q, d_k, d_value, None) if over_tokens else Gradients(d_k, d_q, d_value, None)


def _gradients(
    stage: Stage,
    value: Tensor,
    results: tuple[Tensor, Tensor],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    over_tokens: bool,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """One stage's gradients of (agents, tokens, value, bias), by the path that served it; see `stage`."""
    plain = stage.bias is None and stage.mask is None and grad_lse is None and grad_out is not None
    if plain and grad_out is not None and _fits_cpu(stage, value, over_tokens) and all(needs[:3]):
        return _cpu_gradients(stage, value, results, grad_out, over_tokens)
    if over_tokens:
        assert grad_out is not None
        return collect_gradients(stage, value, *results, grad_out, grad_lse, needs)
    return spread_gradients(stage, value, *results, grad_out, grad_lse, needs)


def forward(problem: Problem, want_lse: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """out [B, Nq, H, Dv], lse [B, Nq, H], agent_value [B, A, H, Dv], agent_lse [B, A, H]; lse None if not wanted."""
    first, second = stages(problem)
    agent_value, agent_lse = _run(first, problem.value, True, want_lse)
    out, lse = _run(second, agent_value, False, want_lse)
    return out, lse, agent_value, agent_lse


def backward(
    problem: Problem,
    grads: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> list[Tensor | None]:
    """Gradients of query, key, value, agents, agent_bias, query_bias, None where `needs` is False.

    grads, results: of and from `forward`, in its order; grads None for zero.
    """
    first, second = stages(problem)
    out, lse, agent_value, agent_lse = results
    query, key, value, agents, agent_bias, query_bias = needs
    past = key or value or agents or agent_bias
    lse = lse if lse.numel() == out.shape[:3].numel() else spread(second, None)[1]
    over = _gradients(second, agent_value, (out, lse), grads[0], grads[1], False, (agents, query, past, query_bias))
    if not past:
        under = Gradients(None, None, None, None)
    else:
        assert over.value is not None
        arriving = over.value if grads[2] is None else over.value + grads[2].to(over.value.dtype)
        agent_lse = agent_lse if agent_lse.numel() == agent_value.shape[:3].numel() else collect(first, None)[1]
        wanted = (agents, key, value, agent_bias)
        under = _gradients(first, problem.value, (agent_value, agent_lse), arriving, grads[3], True, wanted)
    d_agents = None
    if over.agents is not None and under.agents is not None:
        d_agents = (over.agents + under.agents).sum_to_size(problem.agents.shape).to(problem.agents.dtype)
    biases = (under.bias, problem.agent_bias), (over.bias, problem.query_bias)
    d_agent_bias, d_query_bias = (d if d is None or b is None else d.to(b.dtype) for d, b in biases)
    if d_query_bias is not None:
        d_query_bias = d_query_bias.transpose(2, 3).contiguous()
    return [over.tokens, under.tokens, under.value, d_agents, d_agent_bias, d_query_bias]
