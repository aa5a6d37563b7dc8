"""TransNeXt's attention layers: length-scaled cosine attention, alone and aggregated with a pooled view of the map.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", Shi, CVPR 2024, arXiv:2311.17132. Parameter
names are those of the authors' published checkpoints. Maps are channels-last, [batch, height, width, dim].

With q^ and k^ of length 1: logits = (q^ + query_embedding) * softplus(temperature) * log(number of keys) . k^ + bias,
without head_dim ** -0.5. Biases by position come from a small MLP on log-spaced relative coordinates, so that any map
size is served; the coordinates' unit is the size that the model was trained at (`pretrain_size`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads, refuse_attn_drop
from attnzoo.errors import check_range, per_axis
from attnzoo.kernels import merge_attentions, neighborhood_attention

__all__ = ["AggregatedAttention", "CosineAttention", "relative_log_coordinates"]

Size = tuple[int, int]


def _axis(queries: int, keys: int) -> tuple[list[int], int, int, int]:
    """Twice the keys' centres (queries averaged into `keys` bins), and low, high, step of 2 * (query - key)."""
    centres = [i * queries // keys - (-(i + 1) * queries // keys) - 1 for i in range(keys)]
    step = 2 if len({c % 2 for c in centres}) == 1 else 1
    return centres, -max(centres), 2 * (queries - 1) - min(centres), step


def relative_log_coordinates(
    query_size: Size, key_size: Size, pretrain_size: Size, device: Any = None, dtype: Any = None
) -> tuple[Tensor, Tensor]:
    """Every relative position that occurs between queries and (pooled) keys, and which of them each pair has.

    Per axis: sign(r) log2(1 + |r|) / log2(8) with r = 8 (query - key) / (pretrain_size - 1); a key lies at the mean
    position of the bin that adaptive average pooling gives it. Returns the table [T, 2] (height, width), rows in
    lexicographic order, and index [query_h * query_w, key_h * key_w]. (A row may go unused where bins are uneven.)

    Raises ValueError for a pretrain_size of 1, where the unit would be 0.
    """
    if min(pretrain_size) < 2:
        raise ValueError(
            f"pretrain_size must be at least 2 x 2 tokens, got {pretrain_size[0]} x {pretrain_size[1]}: relative "
            "positions are divided by pretrain_size - 1"
        )
    tables, indices = [], []
    for queries, keys, unit in zip(query_size, key_size, pretrain_size):
        centres, low, high, step = _axis(queries, keys)
        r = torch.arange(low, high + 1, step, device=device, dtype=torch.float64) * (4.0 / (unit - 1))
        tables.append((r.sign() * (r.abs() + 1).log2() / 3.0).to(dtype or torch.get_default_dtype()))
        place = 2 * torch.arange(queries, device=device)[:, None] - torch.tensor(centres, device=device) - low
        indices.append(place // step)
    rows, columns = len(tables[0]), len(tables[1])
    table = torch.stack([tables[0][:, None].expand(rows, columns), tables[1].expand(rows, columns)], -1).flatten(0, 1)
    index = indices[0][:, None, :, None] * columns + indices[1][:, None, :]
    return table, index.flatten(2).flatten(0, 1)


class _LengthScaledCosine(nn.Module):
    """What both layers share: temperature, query embedding, output projection and the MLP of the position bias."""

    def __init__(
        self, dim: int, num_heads: int, pretrain_size: Size | None, attn_drop: float, proj_drop: float, dd: dict
    ) -> None:
        super().__init__()
        refuse_attn_drop(attn_drop)
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.pretrain_size = None if pretrain_size is None else per_axis("pretrain_size", pretrain_size, 2, int, low=1)
        # softplus(temperature) = 1 / 0.24 at the start
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24)), **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.cpb_fc1 = nn.Linear(2, 512, **dd)
        self.cpb_fc2 = nn.Linear(512, num_heads, **dd)
        if not self.query_embedding.is_meta:
            trunc_normal_(self.query_embedding, std=0.02)

    def _bias(self, query_size: Size, key_size: Size) -> Tensor:
        """The logits' bias by position, [heads, queries, keys]."""
        weight = self.cpb_fc1.weight
        table, index = relative_log_coordinates(
            query_size, key_size, self.pretrain_size or query_size, weight.device, weight.dtype
        )
        made = self.cpb_fc2(F.relu(self.cpb_fc1(table)))
        return made.t()[:, index.flatten()].unflatten(1, index.shape)

    def _scaled(self, query: Tensor, log_keys: Tensor | float) -> Tensor:
        """Unit queries [B, H, W, heads, head_dim] with embedding, temperature and length scale in them."""
        factor = F.softplus(self.temperature).view(-1, 1) * log_keys
        return (query + self.query_embedding.view(self.num_heads, self.head_dim)) * factor

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, pretrain_size={self.pretrain_size}"


class CosineAttention(_LengthScaledCosine):
    """Length-scaled cosine attention over the whole map.

    Args:
        dim: channels.
        num_heads: heads; each is dim // num_heads wide.
        qkv_bias: bias of the query, key and value projections.
        pretrain_size: (height, width) in tokens that relative positions are measured by; None for the map's own.
        attn_drop: must be 0.0 (UnsupportedError otherwise).
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        pretrain_size: Size | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, pretrain_size, attn_drop, proj_drop, dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        height, width = x.shape[1:3]
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        query = self._scaled(F.normalize(query, dim=-1), math.log(height * width))
        key = F.normalize(key, dim=-1)
        query, key, value = (t.flatten(1, 2).transpose(1, 2).to(value.dtype) for t in (query, key, value))
        bias = self._bias((height, width), (height, width)).to(value.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2).unflatten(1, (height, width))))


class AggregatedAttention(_LengthScaledCosine):
    """Cosine attention to the window around each token and to a pooled view of the map, in one softmax, plus a window
    of learned weights.

    The pooled keys and values are those of LayerNorm(average pooling(GELU(1x1 convolution(x)))). To the window's part
    of the softmax are added the weights q^ . learnable_tokens + learnable_bias, one per window slot, which no softmax
    normalises. Slots outside the map take no part.

    Args:
        dim: channels.
        num_heads: heads; each is dim // num_heads wide.
        window_size: odd side of the window.
        sr_ratio: the pooled map has height // sr_ratio x width // sr_ratio tokens, at least 1 x 1.
        fixed_pool_size: side of the pooled map whatever the map's size, instead of sr_ratio; None for none.
        qkv_bias: bias of the query and the key/value projections.
        pretrain_size: (height, width) in tokens that relative positions are measured by; None for the map's own.
        attn_drop: must be 0.0 (UnsupportedError otherwise).
        proj_drop: dropout after the output projection.

    `fused`: None, True or False; whether the window's softmax is computed by `neighborhood_attention` and merged with
    the pooled part by lse, or by shifted products. None: fused but on the CPU, where shifts of small windows are
    faster. It changes speed and memory, not the result.
    """

    fused: bool | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int = 3,
        sr_ratio: int = 8,
        *,
        fixed_pool_size: int | None = None,
        qkv_bias: bool = True,
        pretrain_size: Size | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, pretrain_size, attn_drop, proj_drop, dd)
        check_range("sr_ratio", sr_ratio, low=1)
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f"window_size must be odd and positive, got {window_size}")
        self.window_size, self.sr_ratio = window_size, sr_ratio
        self.fixed_pool_size = None if fixed_pool_size is None else per_axis("fixed_pool_size", fixed_pool_size, 2)
        slots = window_size**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, slots, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, slots, **dd))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, slots, **dd))
        if not self.learnable_tokens.is_meta:
            trunc_normal_(self.relative_pos_bias_local, std=0.0004)
            trunc_normal_(self.learnable_tokens, std=0.02)

    def pooled_size(self, height: int, width: int) -> Size:
        """(height, width) of the pooled view of a map."""
        if self.fixed_pool_size is not None:
            return self.fixed_pool_size
        return max(1, height // self.sr_ratio), max(1, width // self.sr_ratio)

    def _in_map(self, height: int, width: int, device: Any) -> Tensor:
        """Which slots of each token's window lie in the map, [H, W, window_size ** 2]."""
        offsets = torch.arange(self.window_size, device=device) - self.window_size // 2
        inside = []
        for size in (height, width):
            places = torch.arange(size, device=device)[:, None] + offsets
            inside.append((places >= 0) & (places < size))
        return (inside[0][:, None, :, None] & inside[1][:, None, :]).flatten(2)

    def _shifted(self, tensor: Tensor) -> list[Tensor]:
        """A map [B, H, W, ...] seen from each window slot: views of one copy with zeros around it."""
        height, width, edge = *tensor.shape[1:3], self.window_size // 2
        padded = F.pad(tensor, (0, 0, 0, 0, edge, edge, edge, edge))
        steps = range(self.window_size)
        return [padded[:, y : y + height, x : x + width] for y in steps for x in steps]

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit keys, and values, of the pooled view: [B, heads, tokens, head_dim]."""
        size = self.pooled_size(*x.shape[1:3])
        pooled = F.adaptive_avg_pool2d(F.gelu(self.sr(x.permute(0, 3, 1, 2))), size)
        both = self.kv(self.norm(pooled.flatten(2).transpose(1, 2)))
        key, value = both.unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return F.normalize(key, dim=-1), value

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor, pooled: Tensor) -> Tensor:
        """The softmax part by `neighborhood_attention`, merged with the pooled part by lse."""
        height, width = query.shape[1:3]
        edge = self.window_size // 2
        table = self.relative_pos_bias_local.unflatten(1, (self.window_size, self.window_size))
        near, near_lse = neighborhood_attention(
            query,
            key,
            value,
            self.window_size,
            scale=1.0,
            border="mask",
            bias=F.pad(table, (edge, edge, edge, edge)),
            return_lse=True,
        )
        logits = logits.to(near_lse.dtype)
        lse = logits.logsumexp(-1, keepdim=True)
        far = (logits - lse).exp().to(pooled.dtype) @ pooled
        far, lse = (t.transpose(1, 2).unflatten(1, (height, width)) for t in (far, lse))
        return merge_attentions([near, far.to(near.dtype)], [near_lse, lse[..., 0]])[0]

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        height, width = x.shape[1:3]
        query = F.normalize(self.q(x).unflatten(-1, (self.num_heads, self.head_dim)), dim=-1)
        key, value = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(3)
        key = F.normalize(key, dim=-1)
        pooled_key, pooled = self._pool(x)
        inside = self._in_map(height, width, x.device)
        counts = (inside.sum(-1) + pooled.shape[2]).to(query.dtype).log()
        scaled = self._scaled(query, counts[..., None, None]).to(value.dtype)
        heads_first = scaled.flatten(1, 2).transpose(1, 2)
        logits = heads_first @ pooled_key.to(value.dtype).transpose(-1, -2)
        logits = logits + self._bias((height, width), self.pooled_size(height, width))

        learned = query.flatten(1, 2).transpose(1, 2) @ self.learnable_tokens + self.learnable_bias
        fused = x.device.type != "cpu" if self.fused is None else self.fused
        if fused:
            out = self._kernel(scaled, key.to(value.dtype), value, logits, pooled)
        else:
            near = torch.stack([(scaled * k).sum(-1) for k in self._shifted(key)], -1) + self.relative_pos_bias_local
            near = near.masked_fill(~inside[:, :, None], -torch.inf).flatten(1, 2).transpose(1, 2)
            weights = torch.cat([near, logits], -1).softmax(-1).split([near.shape[-1], logits.shape[-1]], -1)
            learned = learned + weights[0]
            out = (weights[1].to(pooled.dtype) @ pooled).transpose(1, 2).unflatten(1, (height, width))
        slots = learned.to(value.dtype).transpose(1, 2).unflatten(1, (height, width)).split(1, -1)
        for weight, seen in zip(slots, self._shifted(value)):
            out = torch.addcmul(out, weight, seen)
        return self.proj_drop(self.proj(out.flatten(-2)))
