"""Attention through a few agents: they collect from the keys, and the queries read what they collected.

    agent_value = softmax(scale agents . key + agent_bias) value             over the keys
    out         = softmax(query_scale query . agents + query_bias) agent_value    over the agents

Layout: query [B, *grid, H, D], key [B, *grid, Hkv, D], value [B, *grid, Hkv, Dv], H a multiple of Hkv; agents
[B or 1, A, H, D]. With A agents it costs 4 A (Nq + Nk) D multiplications a head instead of 2 Nq Nk (D + Dv) / 2.

    Agent Attention   agents = pooled queries; the biases are sums of an interpolated table, a row and a column part
    AgentSD           agents = projected merged tokens; query_scale = scale ** 0.3; value times 0.075 is added outside
    FLARE             agents = learned latents [1, A, H, D]; query = key, scale = query_scale = 1.0

Memory: no agents x tokens matrix outlives a piece of tokens, in either pass. Kept for the backward pass are the inputs,
out, what the agents collected [B, A, H, Dv] and both lse.

There is no Triton kernel. That is a decision by arithmetic, not a measurement: the second softmax needs the whole
result of the first, so that a kernel of our own needs two launches as two calls of PyTorch's fused attention do; both
read query, key and value once and write out once, (2 D + 2 Dv) elements a token and head, and do 8 A D operations for
them: with A = 49 and D = 32 in bfloat16 49 operations per byte, far below the 300 at which an H100's matrix units are
the limit, so that both wait for the same bytes. What two calls do not do well: the first stage has few rows, so that
its parallel parts are batch x heads, unless PyTorch's kernel splits the keys; and training also reads query and key
once more for the lse that F.scaled_dot_product_attention does not give on a GPU, and recomputes in float32 in the
backward pass. Whether that costs more than the 1.2 x at which a kernel is owed is for a GPU to say.

Sources: Agent Attention (Han et al., ECCV 2024), code LeapLabTHU/Agent-Attention 207ce3e; FLARE (Puri et al., 2025),
code vpuri3/FLARE.py 4e05378; shared/specs/backbones.md sections 2 and 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice
from attnzoo.kernels import dispatch, library
from attnzoo.kernels.pooled_attention.problem import Problem, check

__all__ = ["pooled_attention"]

NAME = "pooled_attention"
_REASONS: dict[str, dispatch.Reasons] = {b: dispatch.module_reasons(NAME, b) for b in ("tiled", "reference")}


def _run(tensors: tuple, options: tuple) -> tuple[Any, Problem]:
    scale, query_scale, _, backend = options
    query, key, value, agents, agent_bias, query_bias, key_mask = tensors
    problem = Problem(query, key, value, agents, agent_bias, query_bias, key_mask, scale, query_scale)
    chosen = dispatch.choose(NAME, backend, problem, problem.query.device, _REASONS)
    return dispatch.backend_module(NAME, chosen), problem


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    module, problem = _run(arguments[:7], arguments[7:])
    want_lse = arguments[9]
    with torch.autocast(problem.query.device.type, enabled=False):
        out, lse, agent_value, agent_lse = module.forward(problem, want_lse)
    if not want_lse:
        lse = agent_lse = out.new_empty(0, dtype=torch.promote_types(out.dtype, torch.float32))
        agent_lse = lse.clone()
    return out, lse, agent_value, agent_lse


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, _, value, agents = arguments[:4]
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse, agent_lse = (0,), (0,)
    if arguments[9]:
        lse, agent_lse = query.shape[:3], (query.shape[0], *agents.shape[1:3])
    return (
        query.new_empty((*query.shape[:3], value.shape[3])),
        query.new_empty(lse, dtype=dtype),
        query.new_empty((query.shape[0], *agents.shape[1:3], value.shape[3])),
        query.new_empty(agent_lse, dtype=dtype),
    )


def _backward(grads: tuple, tensors: tuple, results: tuple, options: tuple, needs: tuple) -> list[Tensor | None]:
    module, problem = _run(tensors, options)
    if not options[2]:  # nobody can have used the empty lse
        grads = (grads[0], None, grads[2], None)
    with torch.autocast(problem.query.device.type, enabled=False):
        return [*module.backward(problem, grads, results, needs[:6]), None]


_operator = library.register(
    NAME,
    tensors="Tensor query, Tensor key, Tensor value, Tensor agents, Tensor? agent_bias, Tensor? query_bias, "
    "Tensor? key_mask",
    options="float scale, float query_scale, bool want_lse, str backend",
    outputs=("out", "lse", "agent_value", "agent_lse"),
    forward=_forward,
    fake=_fake,
    backward=_backward,
)


def _describe(*args: Any, **kwargs: Any) -> tuple[Problem, torch.device]:
    problem = check(*args, **kwargs)
    return problem, problem.query.device


dispatch.register(NAME, _REASONS, _describe, portable=True)


def pooled_attention(
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
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Softmax attention of `agents` over the keys, then of the queries over the agents; see the module's formulas.

    query: [B, *grid, H, D], one to three grid axes; float32, bfloat16, float16 or float64. key: [B, *grid, Hkv, D] and
        value: [B, *grid, Hkv, Dv], a grid of their own (its tokens number Nk), H a multiple of Hkv.
    agents: [B or 1, A, H, D]; 1 shares them over the batch. They ask in the first stage and are the keys of the second.
    scale: of the first stage's dot products; None means D ** -0.5, and 0.0 is 0.0. query_scale: of the second's; None
        means `scale`.
    agent_bias: [B or 1, H or 1, A, Nk], query_bias: [B or 1, H or 1, Nq, A], added to the logits, in any floating-point
        dtype, differentiable. A bias that is a sum of parts is added up by the caller; without a batch axis of its own
        it is 1 / B of one stage's logits.
    key_mask: [B or 1, Nk] bool, False for keys that no agent sees (padding).
    return_lse: also return the natural log of both softmaxes' denominators.
    backend: "auto", "tiled" (stock torch operations, every device) or "reference"; it changes speed, not meaning.

    Returns out [B, *grid, H, Dv] in query's dtype, contiguous; with return_lse (out, lse, agent_lse), lse [B, *grid, H]
    and agent_lse [B, A, H] in float32 (float64 for float64), differentiable too. An agent that sees no key collects 0,
    and a query that sees no agent (a query_bias of -inf) has out 0; their lse is -inf and their gradients are 0.
    Under autocast query, key, value and agents are cast, the biases are not. No attention dropout, no double backward
    (UnsupportedError).

    Raises TypeError, ValueError for arguments that don't fit, UnsupportedError where the asked back end can't serve.
    """
    problem = check(
        query,
        key,
        value,
        agents,
        scale,
        query_scale=query_scale,
        agent_bias=agent_bias,
        query_bias=query_bias,
        key_mask=key_mask,
    )
    check_choice("backend", backend, ("auto", *dispatch.BACKENDS))
    if not torch.compiler.is_compiling():  # a compiled graph must not freeze the choice: there the operator chooses
        backend = dispatch.choose(NAME, backend, problem, query.device, _REASONS)
    tensors = (
        *(library.last_dim_contiguous(t) for t in (problem.query, problem.key, problem.value, problem.agents)),
        problem.agent_bias,
        problem.query_bias,
        problem.key_mask,
    )
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    want_lse = bool(return_lse) or trains
    out, lse, _, agent_lse = _operator(*tensors, problem.scale, problem.query_scale, want_lse, backend)
    out = out.unflatten(1, query.shape[1:-2])
    return (out, lse.unflatten(1, query.shape[1:-2]), agent_lse) if return_lse else out
