"""Sigmoid attention: every weight is a sigmoid of its own logit, so that rows do not compete for a sum of 1.

Paper: "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", Ramapuram et al., ICLR 2025, arXiv:2409.04431
Code: https://github.com/apple/ml-sigmoid-attention (attention_simulator), Apple's own licence (use, change and
redistribution; no patent rights); written here from the formulas (shared/specs/backbones.md, section 10), with the
order of norm and rotary embedding looked up. Parameter and buffer names are the authors'.

    weights = sigmoid(exp(attn_temp) (q . k / sqrt(head_dim) [+ ALiBi]) + attn_bias),  0 where masked;  out = weights v

`attn_bias` is a constant that the caller supplies: the paper's -log(number of keys), at which a row of zero logits sums
to about 1. It is not computed from the input.

No operation of `attnzoo.kernels` serves this: all of them have a softmax or no weights at all. `sigmoid_attention`
therefore forms the weights, in chunks of rows: never more than `max_weights` of them at a time (one row of every head
and image where even that is more), in the forward pass and, by recomputing each chunk, in the backward pass. That
bounds memory; it is not a fused kernel (the authors' FlashSigmoid is one, for CUDA), and its speed was not compared
with one. torch.compile unrolls the chunks: give a larger `max_weights` where that takes long.

Differences from the authors' code:
* `RootMeanSquareNorm` divides by the root of the mean square over the channels. Theirs scales by numel ** (-1 / ndim)
  of the whole input, so that the result depends on batch and length: `compat="official"`.
* A masked weight is exactly 0. Theirs fills the logit with -finfo.max before temperature and bias, which is 0 too.
* Cross attention takes keys of another width (theirs crash unless both are equal).
* ALiBi is theirs: slope * (key - query) with its sign, so that without a causal mask later keys are favoured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnzoo.backbones.blocks.attn_layer import as_attn_layer
from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.errors import UnsupportedError, check_choice, check_range, check_tensor

__all__ = [
    "RootMeanSquareNorm",
    "SigmoidAttention",
    "SigmoidCrossAttention",
    "alibi_slopes",
    "rotate_pairs",
    "sigmoid_attention",
    "sigmoid_block",
]

MAX_WEIGHTS = 2**22


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes: 2 ** (-8 i / n) for n heads, n a power of 2; else those of the power below and then every other
    one of twice as many heads."""
    check_range("num_heads", num_heads, 1)
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    return slopes + [2.0 ** (-4.0 * i / below) for i in range(1, 2 * (num_heads - below), 2)]


def rotate_pairs(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding of [B, N, heads, head_dim]: channels 2 i and 2 i + 1 turn by n * base ** (-2 i / head_dim)."""
    if x.shape[-1] % 2:
        raise ValueError(f"head_dim must be even for a rotary embedding, got {x.shape[-1]}")
    wide = torch.promote_types(x.dtype, torch.float32)
    powers = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=wide) / x.shape[-1]
    angles = torch.arange(x.shape[1], device=x.device, dtype=wide)[:, None] * base**-powers
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def _weights(
    query: Tensor,
    key: Tensor,
    first: int,
    bias: Tensor,
    temperature: Tensor,
    slopes: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Weights [B, H, n, Nk] of the scaled queries [B, H, n, D], rows `first` to first + n, for keys [B, H, Nk, D]."""
    logits = (query @ key.transpose(-2, -1)).to(bias.dtype)
    offset = None
    if slopes is not None or is_causal:
        rows = torch.arange(first, first + query.shape[2], device=query.device)
        offset = torch.arange(key.shape[2], device=query.device) - rows[:, None]
    if slopes is not None and offset is not None:
        logits = logits + slopes[:, None, None].to(logits.dtype) * offset
    weights = torch.sigmoid(logits * temperature.exp() + bias)
    if is_causal and offset is not None:
        weights = weights.masked_fill(offset > 0, 0.0)
    return weights if mask is None else weights.masked_fill(~mask, 0.0)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, 4)
    if key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "query, key and value must be [B, Nq, H, D], [B, Nk, H, D] and [B, Nk, H, Dv], got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
        raise ValueError(f"query and key must share batch and heads, got {tuple(query.shape)} and {tuple(key.shape)}")
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,))
        full = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        wanted = zip(mask.shape[::-1], full[::-1])
        if mask.ndim not in (2, 4) or any(got not in (1, want) for got, want in wanted):
            raise ValueError(f"mask must broadcast to [B, H, Nq, Nk] = {full} or be [Nq, Nk], got {tuple(mask.shape)}")


def sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: float | Tensor,
    scale: float | None = None,
    *,
    temperature: float | Tensor = 0.0,
    slopes: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    max_weights: int = MAX_WEIGHTS,
    return_weights: bool = False,
) -> Any:
    """sum_j sigmoid(exp(temperature) (scale q_i . k_j + slope (j - i)) + bias) v_j; see the module's text.

    query [B, Nq, H, D], key [B, Nk, H, D], value [B, Nk, H, Dv].
    bias: added to every logit, -log(Nk) in the paper; a number or a tensor that broadcasts to [B, H, 1, 1].
    scale: of the products, None for D ** -0.5.
    temperature: the logits are multiplied by its exponential; as bias.
    slopes: [H], ALiBi's, or None.
    mask: bool, [Nq, Nk] or broadcastable to [B, H, Nq, Nk], False for weights of 0.
    is_causal: query i sees keys 0 to i.
    dropout: of the weights (pass 0.0 outside training).
    max_weights: weights formed at a time, in both passes; 1 row of every image and head at least.
    return_weights: also return all weights [B, H, Nq, Nk], to look at them: that forms the matrix.

    Returns [B, Nq, H, Dv] in query's dtype, or (that, weights).
    Raises TypeError or ValueError for arguments that don't fit. All tensors get gradients, also second ones.
    """
    _check(query, key, value, mask)
    check_range("dropout", dropout, 0.0, 1.0)
    check_range("max_weights", max_weights, 1)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    q = q * (query.shape[3] ** -0.5 if scale is None else scale)
    wide = torch.promote_types(q.dtype, torch.float32)  # -log(N) needs more digits than bfloat16 has
    bias, temperature = (torch.as_tensor(t, device=q.device).to(wide) for t in (bias, temperature))

    def rows(q: Tensor, k: Tensor, v: Tensor, first: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = _weights(q, k, first, bias, temperature, slopes, mask, is_causal).to(v.dtype)
        return F.dropout(weights, dropout) @ v if dropout else weights @ v, weights

    def out_of(q: Tensor, k: Tensor, v: Tensor, first: int, mask: Tensor | None) -> Tensor:
        return rows(q, k, v, first, mask)[0]

    count, per_row = q.shape[2], q.shape[0] * q.shape[1] * k.shape[2]
    step = count if return_weights else max(1, max_weights // max(1, per_row))
    if step >= count:
        out, weights = rows(q, k, v, 0, mask)
        out = out.transpose(1, 2).contiguous()
        return (out, weights) if return_weights else out
    again = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, bias, temperature))
    parts = []
    for first in range(0, count, step):
        cut = mask if mask is None or mask.shape[-2] == 1 else mask[..., first : first + step, :]
        given = (q[:, :, first : first + step], k, v, first, cut)
        if again:  # each chunk's weights are formed once more in the backward pass, and none are kept
            parts.append(checkpoint(out_of, *given, use_reentrant=False, preserve_rng_state=dropout > 0))
        else:
            parts.append(out_of(*given))
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


class RootMeanSquareNorm(nn.Module):
    """weight * x / root mean square of x over its last axis.

    Args:
        dim: channels.
        eps: added to the root.
        compat: "official" scales by numel ** (-1 / ndim) of the whole input in place of dim ** -0.5, as the authors'
            code does.
    """

    def __init__(
        self, dim: int, eps: float = 1e-8, compat: str | None = None, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check_choice("compat", compat, (None, "official"))
        self.eps = eps
        self.compat = compat
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        factor = x.numel() ** (-1.0 / x.ndim) if self.compat == "official" else x.shape[-1] ** -0.5
        return x / (x.norm(dim=-1, keepdim=True) * factor + self.eps) * self.weight


class _Sigmoid(nn.Module):
    """What both layers share: the two constants, positions, and the call."""

    attn_bias: Tensor
    attn_temp: Tensor

    def _constants(
        self, num_heads: int, attn_bias: float, attn_temp: float, positions: str | None, attn_drop: float, dd: dict
    ) -> None:
        check_choice("positions", positions, (None, "alibi", "rope"))
        check_range("attn_drop", attn_drop, 0.0, 1.0)
        self.num_heads = num_heads
        self.positions = positions
        self.attn_drop = attn_drop
        self.register_buffer("attn_bias", torch.full((1,), float(attn_bias), **dd))
        self.register_buffer("attn_temp", torch.full((1,), float(attn_temp), **dd))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if self.positions == "rope":
            query, key = rotate_pairs(query), rotate_pairs(key)
        slopes = None
        if self.positions == "alibi":
            slopes = torch.tensor(alibi_slopes(self.num_heads), device=query.device, dtype=torch.float64)
        return sigmoid_attention(
            query,
            key,
            value,
            self.attn_bias,
            temperature=self.attn_temp,
            slopes=slopes,
            mask=mask,
            dropout=self.attn_drop if self.training else 0.0,
            **options,
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, positions={self.positions!r}"


class SigmoidAttention(_Sigmoid):
    """Self-attention with sigmoid weights on [B, N, dim]; also an `attn_layer` for timm's VisionTransformer:

        layer = as_attn_layer(SigmoidAttention, attn_bias=-math.log(197))
        timm.create_model("vit_small_patch16_224", attn_layer=layer)

    Args:
        dim, num_heads: channels and heads.
        qkv_bias, proj_bias: of the projections.
        qk_norm: a `norm_layer` over each head's queries and keys, before a rotary embedding.
        scale_norm: must be False (UnsupportedError otherwise).
        attn_drop, proj_drop: dropout of the weights and after the output projection.
        norm_layer: called with head_dim; None for LayerNorm with eps 1e-5.
        attn_bias: constant added to the logits; give -log(number of tokens). A buffer: checkpoints have it.
        attn_temp: log of the factor of the logits. A buffer too.
        positions: None, "alibi" or "rope", along the sequence.
        max_weights: see sigmoid_attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        attn_bias: float,
        attn_temp: float = 0.0,
        positions: str | None = None,
        max_weights: int = MAX_WEIGHTS,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if scale_norm:
            raise UnsupportedError(f"scale_norm must be False, got {scale_norm!r}: sigmoid attention has no such norm")
        self.head_dim = check_heads(dim, num_heads)
        self.max_weights = max_weights
        self._constants(num_heads, attn_bias, attn_temp, positions, attn_drop, dd)
        norm = norm_layer or nn.LayerNorm
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return self.q_norm(query), self.k_norm(key), value

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, dim] -> [B, N, dim]. attn_mask: bool, False for tokens not seen; see sigmoid_attention's `mask`."""
        out = self._attend(*self._project(x), attn_mask, is_causal=is_causal, max_weights=self.max_weights)
        return self.proj_drop(self.proj(out.flatten(2)))

    def attention_weights(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """All weights [B, heads, N, N] of x, to look at them: this forms the matrix."""
        return self._attend(*self._project(x), attn_mask, is_causal=is_causal, return_weights=True)[1]


class SigmoidCrossAttention(_Sigmoid):
    """Queries of one sequence, keys and values of another; values always pass a norm over each head.

    Args:
        q_dim: channels of the queries, inside, and of the output.
        kv_dim: channels of the sequence that gives keys and values, None for q_dim.
        norm_layer: called with head_dim; None for LayerNorm with eps 1e-5. The values' norm is one too.
        The others: see SigmoidAttention; qkv_bias is of both input projections.
    """

    def __init__(
        self,
        q_dim: int,
        kv_dim: int | None = None,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        attn_bias: float,
        attn_temp: float = 0.0,
        positions: str | None = None,
        max_weights: int = MAX_WEIGHTS,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.head_dim = check_heads(q_dim, num_heads)
        self.max_weights = max_weights
        self._constants(num_heads, attn_bias, attn_temp, positions, attn_drop, dd)
        norm = norm_layer or nn.LayerNorm
        self.q_proj = nn.Linear(q_dim, q_dim, bias=qkv_bias, **dd)
        self.kv_proj = nn.Linear(q_dim if kv_dim is None else kv_dim, 2 * q_dim, bias=qkv_bias, **dd)
        self.q_norm = norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.v_norm = norm(self.head_dim, **dd)
        self.proj = nn.Linear(q_dim, q_dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _project(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = self.q_proj(q).unflatten(-1, (self.num_heads, self.head_dim))
        key, value = self.kv_proj(kv).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        return self.q_norm(query), self.k_norm(key), self.v_norm(value)

    def forward(self, q: Tensor, kv: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """q [B, Nq, q_dim], kv [B, Nk, kv_dim] -> [B, Nq, q_dim]."""
        out = self._attend(*self._project(q, kv), attn_mask, max_weights=self.max_weights)
        return self.proj_drop(self.proj(out.flatten(2)))

    def attention_weights(self, q: Tensor, kv: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """All weights [B, heads, Nq, Nk], to look at them: this forms the matrix."""
        return self._attend(*self._project(q, kv), attn_mask, return_weights=True)[1]


def sigmoid_block(
    dim: int,
    num_heads: int,
    *,
    attn_bias: float,
    mlp_hidden: int | None = None,
    mlp_bias: bool = True,
    attn_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Block:
    """timm's pre-norm Block as the authors' transformer block has it: sigmoid attention, an MLP whose first layer has
    no bias.

    mlp_hidden: hidden width of the MLP, None for 4 * dim. mlp_bias: of the MLP's second layer. attn_options: further
    arguments of SigmoidAttention. kwargs: of timm's Block (init_values, drop_path, norm_layer ...).
    """

    def mlp(**given: Any) -> Mlp:
        return Mlp(
            **{**given, "hidden_features": 4 * dim if mlp_hidden is None else mlp_hidden, "bias": (False, mlp_bias)}
        )

    layer = as_attn_layer(SigmoidAttention, attn_bias=attn_bias, **(attn_options or {}))
    return Block(dim, num_heads, **{"norm_layer": nn.LayerNorm, **kwargs, "attn_layer": layer, "mlp_layer": mlp})
