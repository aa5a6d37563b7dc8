"""Sparsifiner's attention: each query attends to the keys that a cheap predictor names.

Paper: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", Wei, Duke, Jiang,
Aarabi, Taylor, Shkurti, CVPR 2023 - https://arxiv.org/abs/2303.13755
Code: https://github.com/lim142857/Sparsifiner (src/models/sparsifiner.py), MIT licence; written here from the formulas.
Parameter names are the authors'.

The predicted mask is a matrix of [tokens, tokens] per head, and so are the scores that it is cut from: the method
needs them, as the authors' code does, and no memory is saved over full attention. What the mask leaves out of the
softmax would be saved by a kernel for unstructured masks, which the authors' code has not either.

`compat="official"` follows the authors' code where the default does not:

- the scale of the predictor's logits is num_heads ** -0.5 in the code; the default is head_dim ** -0.5, the scale of
  the attention that they approximate.
- with pruned tokens the code lowers the predictor's budget for good, by what is left of the first image, so that a
  later call without pruning keeps fewer keys; by default a call changes nothing, and the budget follows the image with
  the fewest tokens left.
- attn_drop, which the code takes and never applies, is refused here in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.errors import UnsupportedError, check_choice, check_range

__all__ = ["MaskPredictor", "SparseAttention", "SparseDetails", "SparseSettings", "TokenMask"]


@dataclass(frozen=True)
class TokenMask:
    """Which patches are still there: mask [B, N - 1] (bool, without the class token), and how many per image."""

    mask: Tensor
    kept: int


@dataclass(frozen=True)
class SparseSettings:
    """How sparse an attention layer is, and how its mask is predicted.

    attn_keep_rate: keys that a query keeps, ceil(rate * tokens). token_keep_rate: patches that are left where
    prune_tokens, ceil(rate * patches). prune_tokens: this layer drops patches by the class token's attention.
    reduce_n_factor, reduce_c_factor: tokens and head_dim over the predictor's rank and width. share_inout_proj: one
    parameter for both token projections. basis_threshold: entries of the basis up to it become 0. coef_topk: so many
    coefficients are kept; None for those above coef_threshold (0.0: all). score_threshold: instead of the
    attn_keep_rate best keys, those with a score above it; None for the best keys. prune_rows: pruned patches attend to
    nothing (False: their queries are zero, and attend all the same). compat: None or "official"; see the module's text.
    """

    attn_keep_rate: float = 0.25
    token_keep_rate: float = 1.0
    prune_tokens: bool = False
    reduce_n_factor: float = 6
    reduce_c_factor: int = 2
    share_inout_proj: bool = False
    basis_threshold: float = 0.02
    coef_topk: int | None = 8
    coef_threshold: float = 0.0
    score_threshold: float | None = None
    prune_rows: bool = False
    compat: str | None = None

    def __post_init__(self) -> None:
        check_range("attn_keep_rate", self.attn_keep_rate, 0.0, 1.0)
        check_range("token_keep_rate", self.token_keep_rate, 0.0, 1.0)
        check_range("reduce_n_factor", self.reduce_n_factor, low=1)
        check_range("reduce_c_factor", self.reduce_c_factor, low=1)
        if self.coef_topk is not None:
            check_range("coef_topk", self.coef_topk, low=1)
        if self.score_threshold is not None and not self.score_threshold > 0:
            raise ValueError(f"score_threshold must be above 0 (None for the best keys), got {self.score_threshold!r}")
        check_choice("compat", self.compat, (None, "official"))


@dataclass(frozen=True)
class SparseDetails:
    """What one layer computed on its way: all [B, heads, ...].

    basis_coef [N - 1, rank] and approx_attn [N - 1, N] are the predictor's coefficients and scores, attn_mask [N, N]
    (bool) what they were cut to, masked_attn and unmasked_attn [N, N] the attention with and without it. token_mask:
    the patches left after this layer, None where none were ever dropped.
    """

    basis_coef: Tensor
    approx_attn: Tensor
    attn_mask: Tensor
    masked_attn: Tensor
    unmasked_attn: Tensor
    token_mask: TokenMask | None


def _zero_pruned(x: Tensor, tokens: TokenMask) -> Tensor:
    """x [B, heads, N, c] with the dropped patches' rows 0; the class token's stays."""
    keep = F.pad(tokens.mask, (1, 0), value=True)
    return x * keep[:, None, :, None].to(x.dtype)


class MaskPredictor(nn.Module):
    """Which keys each query attends to, from queries and keys [B, heads, N, head_dim].

    scores = coef @ basis: coef = softmax(scale * narrow(q) . (narrow(k) down-projected over tokens)), basis a learned
    [rank, N] matrix. The class token's row is all ones and has no score.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        settings: SparseSettings | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.settings = settings = settings or SparseSettings()
        head_dim = check_heads(dim, num_heads)
        rank, width = int(num_tokens // settings.reduce_n_factor), head_dim // settings.reduce_c_factor
        if rank < 1 or width < 1:
            raise ValueError(
                f"reduce_n_factor={settings.reduce_n_factor} and reduce_c_factor={settings.reduce_c_factor} must leave "
                f"something of {num_tokens} tokens and head_dim {head_dim}"
            )
        if settings.coef_topk is not None and settings.coef_topk > rank:
            raise ValueError(f"coef_topk must be at most the rank, {rank}, got {settings.coef_topk}")
        self.num_tokens = num_tokens
        self.scale = (num_heads if settings.compat else head_dim) ** -0.5
        self.attn_budget = math.ceil(settings.attn_keep_rate * num_tokens)
        self.proj_c_q = nn.Linear(head_dim, width, **dd)
        self.proj_c_k = nn.Linear(head_dim, width, **dd)
        self.proj_n = nn.Parameter(torch.empty(num_tokens, rank, **dd))
        self.proj_back_n = self.proj_n if settings.share_inout_proj else nn.Parameter(torch.empty_like(self.proj_n))
        for parameter in (self.proj_n, self.proj_back_n):
            if not parameter.is_meta:
                trunc_normal_(parameter, std=0.02)

    def _budget(self, tokens: TokenMask | None) -> int:
        if tokens is None:
            return self.attn_budget
        budget = min(self.attn_budget, tokens.kept)
        if self.settings.compat:
            self.attn_budget = budget
        return budget

    def forward(
        self, query: Tensor, key: Tensor, tokens: TokenMask | None = None, reconstruct: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(coefficients [B, heads, N - 1, rank], scores [B, heads, N - 1, N], mask [B, heads, N, N], bool).

        reconstruct: the scores as they are trained to equal a full attention: signed basis, all coefficients. The mask
        has no gradient; only losses on the scores train the predictor.
        """
        if query.shape[2] != self.num_tokens:
            raise ValueError(f"query must have num_tokens={self.num_tokens} tokens, got {query.shape[2]}")
        settings = self.settings
        query, key = self.proj_c_q(query), self.proj_c_k(key)
        if tokens is not None:
            query, key = _zero_pruned(query, tokens), _zero_pruned(key, tokens)
        coef = (query[:, :, 1:] @ (key.mT @ self.proj_n) * self.scale).softmax(-1)
        basis = self.proj_back_n.mT
        if not reconstruct:
            basis = F.threshold(basis.abs(), settings.basis_threshold, 0.0)
            if settings.coef_topk is not None:
                best = coef.topk(settings.coef_topk, sorted=False)
                coef = torch.zeros_like(coef).scatter(-1, best.indices, best.values)
            elif settings.coef_threshold > 0:
                coef = F.threshold(coef, settings.coef_threshold, 0.0)
        scores = coef @ basis
        with torch.no_grad():
            mask = self._cut(scores.detach(), tokens)
            mask = F.pad(mask, (0, 0, 1, 0), value=True)
        return coef, scores, mask

    def _cut(self, scores: Tensor, tokens: TokenMask | None) -> Tensor:
        if tokens is not None:
            gone = F.pad(~tokens.mask, (1, 0), value=False)
            scores = scores.masked_fill(gone[:, None, None, :], float("-inf"))
        if self.settings.score_threshold is None:
            best = scores.topk(self._budget(tokens), sorted=False).indices
            mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        else:
            mask = scores > self.settings.score_threshold
        return mask & tokens.mask[:, None, :, None] if tokens is not None and self.settings.prune_rows else mask


class SparseAttention(nn.Module):
    """Multi-head attention under the mask of a `MaskPredictor`.

    Args:
        dim, num_heads, qkv_bias, proj_bias, proj_drop: as for timm's attention, with its parameter names.
        num_tokens: class token and patches; pinned by the predictor's parameters.
        settings: how sparse.
        attn_drop: must be 0.0.

    x [B, num_tokens, dim], TokenMask or None -> (the same shape, TokenMask or None).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        settings: SparseSettings | None = None,
        *,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if attn_drop:
            raise UnsupportedError(f"attn_drop must be 0.0, got {attn_drop!r}: the authors' code never applies it")
        self.settings = settings = settings or SparseSettings()
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.token_budget = math.ceil(settings.token_keep_rate * (num_tokens - 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.mask_predictor = MaskPredictor(dim, num_heads, num_tokens, settings, **dd)

    def _project(self, x: Tensor, tokens: TokenMask | None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0) if tokens is None else (_zero_pruned(t, tokens) for t in qkv.unbind(0))
        return query, key, value

    def _out(self, attended: Tensor) -> Tensor:
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))

    def _prune(self, class_attention: Tensor, tokens: TokenMask | None) -> TokenMask:
        """class_attention: [B, heads, N - 1], what the class token gives each patch."""
        score = class_attention.detach().mean(1)
        if tokens is not None:
            score = score.masked_fill(~tokens.mask, float("-inf"))
        best = score.topk(self.token_budget, sorted=False).indices
        return TokenMask(torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True), self.token_budget)

    def forward(self, x: Tensor, tokens: TokenMask | None = None) -> tuple[Tensor, TokenMask | None]:
        """See the class; the class token attends to every token, dropped ones included (logit 0, value 0)."""
        query, key, value = self._project(x, tokens)
        _, _, mask = self.mask_predictor(query, key, tokens)
        empty = ~mask.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | empty).masked_fill(empty, 0.0)
        if self.settings.prune_tokens:
            logits = query[:, :, :1] @ key.mT * self.head_dim**-0.5
            tokens = self._prune(logits.softmax(-1)[:, :, 0, 1:], tokens)
        return self._out(out), tokens

    def detailed(
        self, x: Tensor, tokens: TokenMask | None = None, reconstruct: bool = False
    ) -> tuple[Tensor, SparseDetails]:
        """As forward, with everything that losses and pictures need.

        reconstruct: attention is full and no patch is dropped, while the scores are trained to equal it.
        """
        query, key, value = self._project(x, None if reconstruct else tokens)
        coef, scores, mask = self.mask_predictor(query, key, None if reconstruct else tokens, reconstruct)
        logits = query @ key.mT * self.head_dim**-0.5
        unmasked = attn = logits.softmax(-1)
        if not reconstruct:
            empty = ~mask.any(-1, keepdim=True)
            attn = logits.masked_fill(~(mask | empty), float("-inf")).softmax(-1).masked_fill(empty, 0.0)
            if self.settings.prune_tokens:
                tokens = self._prune(attn[:, :, 0, 1:], tokens)
        return self._out(attn @ value), SparseDetails(coef, scores, mask, attn, unmasked, tokens)
