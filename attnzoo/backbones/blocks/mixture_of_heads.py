"""Mixture of heads: every token weighs the outputs of its attention heads, and drops those that it did not choose.

Paper: "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin et al., 2024, arXiv:2410.11842, section 3.
Code: https://github.com/SkyworkAI/MoH, Apache-2.0 (its DiT part after Meta's, CC BY-NC 4.0); written here from the
formulas. Parameter names are those of the authors' published checkpoints.

    shared   the first `shared_head` heads: weight softmax(wg_1 x) shared_head; 1 for a single one
    routed   the others: softmax(wg x), the largest `routed_head` of a token kept, divided by their sum, times
    routed_head both     each part times its entry of 2 softmax(wg_0 x)

The weights multiply head outputs before the output projection. All heads are computed, so it saves no time by itself.
Differences from the authors' code: the balancing loss is not kept in a list of the class, see `balance_losses`; a
single shared head beside routed ones works in MoHAttention too (there only in the TransNeXt models); settings that
fail at the first call there are a ValueError at construction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads, refuse_attn_drop
from attnzoo.errors import check_range


class HeadRouter:
    """The gates, for an attention module to inherit beside nn.Module; its forward's first argument is their input."""

    shared_head: int
    routed_head: int

    def _init_router(self, dim: int, num_heads: int, shared_head: int, routed_head: int, dd: dict[str, Any]) -> None:
        check_range("shared_head", shared_head, 0, num_heads)
        check_range("routed_head", routed_head, 0, num_heads - shared_head)
        if not routed_head and shared_head != num_heads:
            raise ValueError(
                f"shared_head must be num_heads={num_heads} where routed_head is 0 (the others would never be chosen), "
                f"got {shared_head}"
            )
        self.shared_head, self.routed_head = shared_head, routed_head
        if routed_head > 0:
            self.wg = nn.Linear(dim, num_heads - shared_head, bias=False, **dd)
            if shared_head > 0:
                self.wg_0 = nn.Linear(dim, 2, bias=False, **dd)
        if shared_head > 1:
            self.wg_1 = nn.Linear(dim, shared_head, bias=False, **dd)

    def _routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(wg x) [B, N, routed heads], and 1 where a head is among the token's routed_head largest."""
        gates = self.wg(x).softmax(dim=-1)
        chosen = gates.topk(self.routed_head, dim=-1).indices
        return gates, torch.zeros_like(gates).scatter(-1, chosen, 1.0)

    def head_gates(self, x: Tensor) -> Tensor:
        """Tokens [B, N, dim] -> the weight of every head, [B, N, heads]."""
        shared = x.new_ones(*x.shape[:-1], self.shared_head)
        if self.shared_head > 1:
            shared = self.wg_1(x).softmax(dim=-1) * self.shared_head
        if not self.routed_head:
            return shared
        gates, mask = self._routed(x)
        kept = gates * mask
        kept = kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).eps) * self.routed_head
        if not self.shared_head:
            return kept
        part = 2 * self.wg_0(x).softmax(dim=-1)
        return torch.cat([part[..., :1] * shared, part[..., 1:] * kept], dim=-1)

    def balance_loss(self, x: Tensor) -> Tensor:
        """mean(share of the gates x share of the choices) experts ** 2 over all tokens: 1 is balanced per chosen
        head."""
        gates, mask = self._routed(x)
        gates, mask = gates.flatten(0, -2), mask.flatten(0, -2)
        return (gates.mean(0) * mask.mean(0)).mean() * gates.shape[-1] ** 2


@contextmanager
def balance_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """The load balancing losses of `model`'s calls inside the block, one per layer with routed heads:

        with balance_losses(model) as losses:
            out = model(x)
        loss = task_loss(out) + 0.01 * sum(losses) / len(losses)

    Calls from other threads and of other models are not counted. Not for compiled models (hooks are used).
    """
    losses: list[Tensor] = []
    thread = threading.get_ident()

    def hook(module: Any, inputs: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread:
            losses.append(module.balance_loss(inputs[0]))

    routers = [m for m in model.modules() if isinstance(m, HeadRouter) and m.routed_head]
    handles = [m.register_forward_pre_hook(hook) for m in routers]  # type: ignore[attr-defined]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()


class MoHAttention(nn.Module, HeadRouter):
    """Multi-head softmax attention whose heads are mixed per token: [B, N, dim] -> [B, N, dim].

    Args:
        dim: channels.
        num_heads: heads.
        shared_head: heads that every token uses.
        routed_head: heads that a token chooses of the others; 0 where all are shared.
        head_dim: width of a head, None for dim // num_heads; num_heads * head_dim need not be dim.
        qkv_bias: bias of the query, key and value projection.
        qk_norm: norm_layer(head_dim) on queries and keys.
        attn_drop: must be 0.0. proj_drop: dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        shared_head: int = 0,
        routed_head: int = 0,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        refuse_attn_drop(attn_drop)
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads) if head_dim is None else head_dim
        inner = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.proj = nn.Linear(inner, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self._init_router(dim, num_heads, shared_head, routed_head, dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2)
        out = out * self.head_gates(x)[..., None].to(out.dtype)
        return self.proj_drop(self.proj(out.flatten(2)))


class MixedHeads(nn.Module, HeadRouter):
    """Mixture of heads around any attention that ends in `proj` and `proj_drop`, timm's own among them.

    attn: called with the tokens alone, [..., dim] -> [..., dim]; its output projection is taken over.
    dim, num_heads, shared_head, routed_head: as for MoHAttention.
    """

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        num_heads: int,
        shared_head: int = 0,
        routed_head: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj: Any = attn.proj
        self.proj_drop: Any = attn.proj_drop
        attn.proj = attn.proj_drop = nn.Identity()
        self.inner = attn
        self._init_router(dim, num_heads, shared_head, routed_head, {"device": device, "dtype": dtype})

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x).unflatten(-1, (self.num_heads, -1))
        return self.proj_drop(self.proj((out * self.head_gates(x)[..., None].to(out.dtype)).flatten(-2)))
