"""One of the two softmaxes, between few agents and many tokens, in pieces of tokens; the agents are always whole.

A piece's logits are x [batch * heads, agents, tokens] in both stages (`heads` are key/value heads, and the query heads
that share one are folded into the agents). The agents collect by a softmax over tokens, the tokens by one over agents:

    collect   out_a = sum_n p_an value_n     lse_a over the tokens: kept up to date piece by piece
    spread    out_n = sum_a p_an value_a     lse_n over the agents: a piece has all of them

The gradients recompute p = exp(x - lse), piece by piece; nothing agents x tokens is kept between the passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.pieces import Piece, pieces

INF = float("inf")
ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Stage:
    """What makes the logits: agents . tokens * scale + bias, where the mask lets a token be seen.

    agents: [B, A, H, D]; tokens: [B, N, Hkv, D]; bias: [B or 1, H or 1, A, N] or None; mask: [B or 1, N] bool or None.
    """

    agents: Tensor
    tokens: Tensor
    bias: Tensor | None
    mask: Tensor | None
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in: float32, or float64 for float64."""
        return torch.promote_types(self.agents.dtype, torch.float32)

    def pieces(self, *widths: int) -> Iterator[Piece]:
        """Pieces of the tokens."""
        batch, num_tokens, num_heads, head_dim = self.tokens.shape
        repeats = self.agents.shape[2] // num_heads
        width = max(repeats * self.agents.shape[1], head_dim, *widths)
        return pieces(batch, num_heads, num_tokens, width, self.tokens.device, repeats)

    def scaled_agents(self, piece: Piece) -> Tensor:
        """[batch * heads, repeats * A, D], times scale."""
        return piece.fold(self.agents, ALL, self.dtype) * self.scale

    def apart(self, x: Tensor, piece: Piece) -> Tensor:
        """View of x [batch * heads, repeats * A, n] as [batch, query heads, A, n]."""
        batch, heads = piece.counts
        return x.view(batch, heads * piece.repeats, self.agents.shape[1], -1)

    def bias_of(self, bias: Tensor, piece: Piece, some: slice) -> Tensor:
        """The piece's part of a tensor like the bias, broadcast axes left at 1."""
        b = piece.batch if bias.shape[0] > 1 else ALL
        h = piece.query_heads if bias.shape[1] > 1 else ALL
        return bias[b, h, :, some]

    def add(self, part: Tensor, summand: Tensor, piece: Piece) -> None:
        """Add to a part of the bias's gradient, which holds nothing yet where this piece is the first to come by."""
        assert self.bias is not None
        first_entry = piece.batch.start == 0 or self.bias.shape[0] > 1
        if first_entry and (piece.heads.start == 0 or self.bias.shape[1] > 1):
            part.copy_(summand)
        else:
            part.add_(summand)

    def logits(self, agents: Tensor, tokens: Tensor, piece: Piece, some: slice) -> Tensor:
        """x [batch * heads, repeats * A, n] of `scaled_agents` and tokens [batch * heads, n, D]."""
        x = torch.bmm(agents, tokens.transpose(1, 2))
        if self.bias is not None:
            self.apart(x, piece).add_(self.bias_of(self.bias, piece, some))
        if self.mask is not None:
            seen = self.mask[piece.batch if self.mask.shape[0] > 1 else ALL, None, None, some]
            self.apart(x, piece).masked_fill_(~seen, -INF)
        return x


def _finite(top: Tensor) -> Tensor:
    """Row maxima that can be subtracted: 0 where a row has nothing but -inf."""
    return top.masked_fill(top == -INF, 0.0)


def collect(stage: Stage, value: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """out [B, A, H, Dv] in value's dtype and lse [B, A, H]; only lse where value [B, N, Hkv, Dv] is None."""
    batch, num_agents, num_heads, _ = stage.agents.shape
    lse = stage.agents.new_empty((batch, num_agents, num_heads), dtype=stage.dtype)
    out = None if value is None else value.new_empty((*lse.shape, value.shape[3]))
    for piece in stage.pieces():
        agents = stage.scaled_agents(piece)
        top = agents.new_full((*agents.shape[:2], 1), -INF)
        total = torch.zeros_like(top)
        summed = None if value is None else agents.new_zeros((*agents.shape[:2], value.shape[3]))
        for some in piece.steps(stage.tokens.shape[1]):
            x = stage.logits(agents, piece.take(stage.tokens, some, stage.dtype), piece, some)
            new = torch.maximum(top, x.amax(-1, keepdim=True))
            shift = _finite(new)
            x.sub_(shift).exp_()
            fade = top.sub_(shift).exp_()
            total = total.mul_(fade).add_(x.sum(-1, keepdim=True))
            if summed is not None and value is not None:
                summed = torch.baddbmm(summed.mul_(fade), x, piece.take(value, some, stage.dtype))
            top = new
        if summed is not None and out is not None:
            piece.unfold(out, ALL, summed.div_(total.masked_fill(total == 0, 1.0)))
        piece.unfold(lse, ALL, total.log_().add_(_finite(top)).squeeze(-1))
    return out, lse


def spread(stage: Stage, value: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """out [B, N, H, Dv] in value's dtype and lse [B, N, H]; only lse where value [B, A, H, Dv] is None."""
    lse = stage.tokens.new_empty(stage.tokens.shape[:3], dtype=stage.dtype)
    out = None if value is None else value.new_empty((*lse.shape, value.shape[3]))
    for piece in stage.pieces(1 if value is None else value.shape[3]):
        agents = stage.scaled_agents(piece)
        own = None if value is None else piece.take(value, ALL, stage.dtype)
        for some in piece.steps(stage.tokens.shape[1]):
            x = stage.logits(agents, piece.take(stage.tokens, some, stage.dtype), piece, some)
            top = _finite(x.amax(1, keepdim=True))
            x.sub_(top).exp_()
            total = x.sum(1, keepdim=True)
            if own is not None and out is not None:
                summed = torch.bmm(x.transpose(1, 2), own)
                piece.put(out, some, summed.div_(total.masked_fill(total == 0, 1.0).transpose(1, 2)))
            piece.put(lse, some, total.log_().add_(top).squeeze(1))
    return out, lse


@dataclass(frozen=True)
class Gradients:
    """What one stage's backward pass found; None where it was not asked for. agents and bias are in stage.dtype."""

    agents: Tensor | None
    tokens: Tensor | None
    value: Tensor | None
    bias: Tensor | None


def _totals(stage: Stage, needs: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where the gradients of agents (zeros), tokens and bias (not filled) go."""
    agents, tokens, _, bias = needs
    return (
        torch.zeros(stage.agents.shape, dtype=stage.dtype, device=stage.agents.device) if agents else None,
        stage.tokens.new_empty(stage.tokens.shape) if tokens else None,
        torch.empty_like(stage.bias, dtype=stage.dtype) if bias and stage.bias is not None else None,
    )


def collect_gradients(
    stage: Stage,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """Gradients of (agents, tokens, value, bias), those that `needs` names; grad_out and grad_lse for `collect`.

    dx = p (dout . value - dout . out + dlse);  dvalue = p dout;  dagents = scale dx tokens;  dtokens = scale dx agents
    """
    dtype = stage.dtype
    d_agents, d_tokens, d_bias = _totals(stage, needs)
    d_value = value.new_empty(value.shape) if needs[2] else None
    grad_out = grad_out.to(dtype)
    delta = (grad_out * out.to(dtype)).sum(-1, keepdim=True).neg_()
    if grad_lse is not None:
        delta += grad_lse.to(dtype).masked_fill(lse == -INF, 0.0).unsqueeze(-1)
    safe_lse = _finite(lse).unsqueeze(-1)
    for piece in stage.pieces(value.shape[3]):
        agents, grad = stage.scaled_agents(piece), piece.fold(grad_out, ALL, dtype)
        own_lse, own_delta = (piece.fold(t, ALL, dtype) for t in (safe_lse, delta))
        summed = torch.zeros_like(agents) if d_agents is not None else None
        for some in piece.steps(stage.tokens.shape[1]):
            tokens = piece.take(stage.tokens, some, dtype)
            p = stage.logits(agents, tokens, piece, some).sub_(own_lse).exp_()
            if d_value is not None:
                piece.put_product(d_value, some, p.transpose(1, 2), grad)
            if not (needs[0] or needs[1] or needs[3]):
                continue
            dp = torch.bmm(grad, piece.take(value, some, dtype).transpose(1, 2))
            dx = dp.add_(own_delta).mul_(p)
            if d_bias is not None:
                part = stage.bias_of(d_bias, piece, some)
                stage.add(part, stage.apart(dx, piece).sum_to_size(part.shape), piece)
            if d_tokens is not None:
                piece.put_product(d_tokens, some, dx.transpose(1, 2), agents)
            if summed is not None:
                summed.baddbmm_(dx, tokens)
        if summed is not None and d_agents is not None:
            piece.unfold(d_agents, ALL, summed.mul_(stage.scale))
    return Gradients(d_agents, d_tokens, d_value, d_bias)


def spread_gradients(
    stage: Stage,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """The same for `spread`; the gradient of value too is in stage.dtype.

    Here p is [batch * heads, tokens, agents], as a bias of the queries lies.
    """
    dtype = stage.dtype
    d_agents, d_tokens, d_bias = _totals(stage, needs)
    d_value = torch.zeros(value.shape, dtype=dtype, device=value.device) if needs[2] else None
    for piece in stage.pieces(value.shape[3]):
        agents, values = stage.scaled_agents(piece), piece.take(value, ALL, dtype)
        summed = torch.zeros_like(agents) if d_agents is not None else None
        summed_value = None if d_value is None else torch.zeros_like(values)
        for some in piece.steps(stage.tokens.shape[1]):
            tokens = piece.take(stage.tokens, some, dtype)
            own_lse = piece.take(lse.unsqueeze(-1), some, dtype)
            p = torch.bmm(tokens, agents.transpose(1, 2))
            if stage.bias is not None:
                part = stage.bias_of(stage.bias, piece, some).transpose(2, 3)
                p.unflatten(0, piece.counts).add_(part)
            p.sub_(_finite(own_lse)).exp_()
            grad = None if grad_out is None else piece.take(grad_out, some, dtype)
            if summed_value is not None and grad is not None:
                summed_value.baddbmm_(p.transpose(1, 2), grad)
            if not (needs[0] or needs[1] or needs[3]):
                continue
            delta = torch.zeros_like(own_lse)
            if grad_lse is not None:
                delta = piece.take(grad_lse.unsqueeze(-1), some, dtype).masked_fill(own_lse == -INF, 0.0)
            if grad is None:
                dx = p.mul_(delta)
            else:
                delta = delta - (grad * piece.take(out, some, dtype)).sum(-1, keepdim=True)
                dx = torch.bmm(grad, values.transpose(1, 2)).add_(delta).mul_(p)
            if d_bias is not None:
                part = stage.bias_of(d_bias, piece, some).transpose(2, 3)
                stage.add(part, dx.unflatten(0, piece.counts).sum_to_size(part.shape), piece)
            if d_tokens is not None:
                piece.put_product(d_tokens, some, dx, agents)
            if summed is not None:
                summed.baddbmm_(dx.transpose(1, 2), tokens)
        if summed is not None and d_agents is not None:
            piece.put(d_agents, ALL, summed.mul_(stage.scale))
        if summed_value is not None and d_value is not None:
            piece.put(d_value, ALL, summed_value)
    return Gradients(d_agents, d_tokens, d_value, d_bias)
