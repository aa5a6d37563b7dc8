"""Agent attention inside Stable Diffusion: tokens are merged, and the more strongly merged ones are the agents.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", Han et al., ECCV 2024, arXiv:2312.08874,
section 5.3; the merging is ToMe for Stable Diffusion, Bolya and Hoffman, arXiv:2303.17604.
Code: https://github.com/LeapLabTHU/Agent-Attention (agentsd/), licence not verified; written here from the formulas.

    out = softmax(s ** k2 q A^T) softmax(s A k^T) v + shortcut v,  s = head_dim ** -0.5, A = to_q(agent tokens)

Only where the agents are fewer than half of the tokens, else plain attention. Differences from the authors' code
(`compat="official"` brings back what is marked *):
- * token order: there an unstable sort decides the order of the destination and the source tokens, here it is
  ascending; what comes back from `unmerge` is the same.
- ratio 0 merges nothing (there the block fails, or takes a batch of two apart).
- Nothing is patched: the layers are modules that take their agents as an argument.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.errors import check_choice, check_range, check_tensor
from attnzoo.kernels import pooled_attention


class TokenMerge:
    """Which tokens of a map merge into which, by their cosine similarity; computed once, then used both ways.

    Of each sy x sx cell one token is a destination; of the others (sources) the int(ratio * N) most similar to their
    nearest destination are averaged into it. `agents` are what a second, stronger merge of agent_ratio leaves.

    Args:
        metric: [B, N, C], N = height * width, row by row.
        height, width: of the map.
        ratio, agent_ratio: merged shares of all tokens, 0 to 1; no more than the sources can merge.
        sy, sx: cell; rows and columns that no cell covers are sources.
        generator: chooses the destination in each cell, None for its top left token.
        compat: "official" for the authors' token order.
    """

    def __init__(
        self,
        metric: Tensor,
        height: int,
        width: int,
        ratio: float,
        agent_ratio: float,
        sy: int = 2,
        sx: int = 2,
        *,
        generator: torch.Generator | None = None,
        compat: str = "default",
    ) -> None:
        check_tensor("metric", metric, 3)
        check_choice("compat", compat, ("default", "official"))
        check_range("ratio", ratio, 0.0, 1.0)
        check_range("agent_ratio", agent_ratio, 0.0, 1.0)
        count = metric.shape[1]
        if height * width != count or not 1 <= sy <= height or not 1 <= sx <= width:
            raise ValueError(
                f"height * width must be metric's {count} tokens and a cell of sy x sx fit into the map, got "
                f"{height} x {width} and {sy} x {sx}"
            )
        with torch.no_grad():
            rows, columns, device = height // sy, width // sx, metric.device
            if generator is None:
                inside = torch.zeros(rows, columns, dtype=torch.long, device=device)
            else:
                inside = torch.randint(sy * sx, (rows, columns), generator=generator, device=generator.device).to(
                    device
                )
            down = torch.arange(rows, device=device)[:, None] * sy + inside // sx
            along = torch.arange(columns, device=device) * sx + inside % sx
            is_source = torch.ones(count, dtype=torch.long, device=device)
            is_source[(down * width + along).flatten()] = 0
            order = is_source[None, :, None].argsort(dim=1, stable=compat == "default")[0, :, 0]
            self.dst_index, self.src_index = order[: rows * columns], order[rows * columns :]
            unit = F.normalize(metric, dim=-1)
            similarity = unit[:, self.src_index] @ unit[:, self.dst_index].transpose(1, 2)
            best, nearest = similarity.max(dim=-1)
            # Positions among the sources, the most similar first, and the destination of each.
            self.edge_idx = best.argsort(dim=-1, descending=True)
            self.nearest = nearest.gather(1, self.edge_idx)
        sources = len(self.src_index)
        self.count = count
        self.merged = min(sources, int(count * ratio))
        self.agent_merged = min(sources, int(count * agent_ratio))
        self.has_agents = 2 * (count - self.agent_merged) < count - self.merged

    def _merge(self, x: Tensor, merged: int) -> Tensor:
        source, target = x[:, self.src_index], x[:, self.dst_index]
        at = self.edge_idx[..., None].expand(-1, -1, x.shape[-1])
        source = source.gather(1, at)
        to = self.nearest[:, :merged, None].expand(-1, -1, x.shape[-1])
        target = target.scatter_reduce(1, to, source[:, :merged], reduce="mean")
        return torch.cat([source[:, merged:], target], dim=1)

    def merge(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, N, C] -> (tokens [B, N - merged, C], agents [B, N - agent_merged, C], or None where they would be
        too many)."""
        return self._merge(x, self.merged), self._merge(x, self.agent_merged) if self.has_agents else None

    def unmerge(self, x: Tensor) -> Tensor:
        """[B, N - merged, C] -> [B, N, C]: merged tokens get their destination's value."""
        alone = len(self.src_index) - self.merged
        to = self.nearest[:, : self.merged, None].expand(-1, -1, x.shape[-1])
        target = x[:, alone:]
        sources = torch.cat([target.gather(1, to), x[:, :alone]], dim=1)
        out = x.new_empty(x.shape[0], self.count, x.shape[-1])
        out[:, self.dst_index] = target
        at = self.src_index[self.edge_idx][..., None].expand_as(sources)
        return out.scatter(1, at, sources)


class AgentCrossAttention(nn.Module):
    """Stable Diffusion's attention layer (to_q, to_k, to_v without bias, to_out) with agents.

    k_scale2: power of the second softmax's scale. k_shortcut: share of the values added to the output.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        k_scale2: float = 0.3,
        k_shortcut: float = 0.075,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner, context_dim = heads * dim_head, context_dim or query_dim
        self.heads, self.k_scale2, self.k_shortcut = heads, k_scale2, k_shortcut
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False, **dd)
        self.to_k = nn.Linear(context_dim, inner, bias=False, **dd)
        self.to_v = nn.Linear(context_dim, inner, bias=False, **dd)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim, **dd), nn.Dropout(dropout))

    def forward(self, x: Tensor, agent: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """x [B, N, query_dim]; agent [B, M, query_dim], used for self-attention where 2 M < N; context [B, K,
        context_dim] or None for x."""
        uses_agents = agent is not None and 2 * agent.shape[1] < x.shape[1]
        if uses_agents and context is not None and context.shape[1] != x.shape[1]:
            raise ValueError(
                f"agent must be None in cross-attention, where the shortcut has no value per token: x has {x.shape[1]} "
                f"tokens, context {context.shape[1]}"
            )
        context = x if context is None else context
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if uses_agents and agent is not None:
            agents = self.to_q(agent).unflatten(-1, (self.heads, -1))
            out = pooled_attention(q, k, v, agents, self.scale, query_scale=self.scale**self.k_scale2)
            out = out + self.k_shortcut * v
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)
        return self.to_out(out.flatten(2))


class AgentSDBlock(nn.Module):
    """Stable Diffusion's transformer block with its self-attention on merged tokens and agents.

    ratio, agent_ratio, sy, sx: see TokenMerge. max_downsample: maps that are further reduced from the latent stay
    whole.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        context_dim: int,
        ff: nn.Module,
        *,
        ratio: float = 0.4,
        agent_ratio: float = 0.95,
        sy: int = 4,
        sx: int = 4,
        max_downsample: int = 1,
        k_scale2: float = 0.3,
        k_shortcut: float = 0.075,
        compat: str = "default",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        agent = {"k_scale2": k_scale2, "k_shortcut": k_shortcut, **dd}
        self.attn1 = AgentCrossAttention(dim, None, heads, dim_head, **agent)
        self.attn2 = AgentCrossAttention(dim, context_dim, heads, dim_head, **agent)
        self.ff = ff
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, **dd) for _ in range(3))
        self.max_downsample = max_downsample
        merging = {"ratio": ratio, "agent_ratio": agent_ratio, "sy": sy, "sx": sx, "compat": compat}
        self.merging: dict[str, Any] = merging

    def forward(
        self, x: Tensor, context: Tensor, size: tuple[int, int], generator: torch.Generator | None = None
    ) -> Tensor:
        """x [B, N, dim], context [B, K, context_dim], size (height, width) of the latent; generator as for TokenMerge
        (None where the batch is odd)."""
        downsample = math.ceil(math.sqrt(size[0] * size[1] // x.shape[1]))
        normed = self.norm1(x)
        if downsample <= self.max_downsample:
            height, width = (-(-side // downsample) for side in size)
            merge = TokenMerge(x, height, width, **self.merging, generator=generator if len(x) % 2 == 0 else None)
            tokens, agents = merge.merge(normed)
            x = merge.unmerge(self.attn1(tokens, agents)) + x
        else:
            x = self.attn1(normed) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x
