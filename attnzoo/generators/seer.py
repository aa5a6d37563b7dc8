"""SeerAttention's learned gate: small projections of pooled queries and keys say which blocks matter.

Paper: Gao et al., "SeerAttention", NeurIPS 2025, arXiv:2410.13276. Code: microsoft/SeerAttention aba03e3 (MIT),
seer_attn/prefill_sparse/attn_gate.py; shared/specs/more.md section 6. Written here from the formulas.

    q', k' = rope_of_blocks(pooled tokens of a block . W per head)
    score  = softmax(q' . k' * hidden ** -0.5)
    chosen = score > threshold, or the largest of a row

Trained by distillation: `pooled_target` is the largest exact probability of each block, a row divided by its sum.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.errors import UnsupportedError, check_flag, check_range, check_tensor
from attnzoo.generators.blocks import BlockMethod, Choice, grid_of, num_blocks
from attnzoo.generators.chain import Layer, Next
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.tables import load_table, save_table

_POOLS = ("max", "min", "avg")
_CHUNK = 1 << 24  # entries of a block row's probabilities that the target holds at once


def _pools(pooling: str) -> tuple[list[str], list[str]]:
    found = re.fullmatch(r"Q((?:max)?(?:min)?(?:avg)?)_K((?:max)?(?:min)?(?:avg)?)", pooling)
    if not found or not all(found.groups()):
        raise ValueError(
            f"pooling must be Q.._K.. with max, min and avg in this order (Qavg_Kmaxminavg, say), got {pooling!r}"
        )
    query, key = (re.findall("max|min|avg", part) for part in found.groups())
    return query, key


class HeadLinear(nn.Module):
    """A projection per head without bias, weight [heads, in_features, out_features]."""

    def __init__(self, heads: int, in_features: int, out_features: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        bound = in_features**-0.5
        weight = torch.empty(heads, in_features, out_features, device=device, dtype=dtype).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)

    def forward(self, rows: Tensor) -> Tensor:
        """[B, heads or a divisor, n, in_features] to [B, heads, n, out_features]."""
        repeats = self.weight.shape[0] // rows.shape[1]
        return rows.repeat_interleave(repeats, 1) @ self.weight


class SeerGate(nn.Module):
    """The gate of one attention layer, with the authors' parameters (mask_linear_q.weight, mask_linear_k.weight).

    block_size: tokens of a block. pooling: which pools of queries (Q) and keys (K) are put side by side, by the
    authors' class names. hidden_size: of the gate, None: head_dim. force_double: a projection of the queries also where
    one pool of head_dim channels needs none.
    Raises TypeError, ValueError for arguments that don't fit.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        *,
        block_size: int = 64,
        pooling: str = "Qavg_Kmaxminavg",
        hidden_size: int | None = None,
        force_double: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        hidden_size = head_dim if hidden_size is None else hidden_size
        sizes = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_kv_heads": num_kv_heads,
            "block_size": block_size,
            "hidden_size": hidden_size,
        }
        for name, size in sizes.items():
            if type(size) is not int:
                raise TypeError(f"{name} must be int, got {type(size).__name__}")
            check_range(name, size, 1)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        check_flag("force_double", force_double)
        self.query_pools, self.key_pools = _pools(pooling)
        self.pooling, self.num_heads, self.block_size, self.hidden_size = pooling, num_heads, block_size, hidden_size
        dd = {"device": device, "dtype": dtype}
        key_features = len(self.key_pools) * head_dim
        if len(self.query_pools) > 1 or hidden_size != head_dim or force_double:
            features = len(self.query_pools) * head_dim
            self.mask_linear_q: HeadLinear | None = HeadLinear(num_heads, features, hidden_size, **dd)
            self.mask_linear_k = HeadLinear(num_kv_heads, key_features, hidden_size, **dd)
        else:
            self.mask_linear_q = None
            self.mask_linear_k = HeadLinear(num_heads, key_features, hidden_size, **dd)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """The gate's logits [B, heads, nq, nk].

        query [B, heads, Nq, head_dim], key [B, heads_kv, Nk, head_dim].
        mask: bool (False: -inf) or additive, such that it broadcasts to the logits.
        rotary: (cos, sin) [B or 1, n, hidden_size], see `block_rotary`.
        seen: bool [B or 1, Nk], False for keys that are left out of the pools; a block without any has logits of -inf.
        """
        q = _pooled(query, self.block_size, self.query_pools, None)
        k = _pooled(key, self.block_size, self.key_pools, seen)
        q = q if self.mask_linear_q is None else self.mask_linear_q(q)
        k = self.mask_linear_k(k)
        if rotary is not None:
            q, k = (_rotate(t, rotary[0], rotary[1]) for t in (q, k))
        logits = q @ k.repeat_interleave(self.num_heads // k.shape[1], 1).transpose(-1, -2) * self.hidden_size**-0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        if seen is not None:
            empty = ~F.pad(seen, (0, -seen.shape[1] % self.block_size)).unflatten(1, (-1, self.block_size)).any(-1)
            logits = logits.masked_fill(empty[:, None, None, :], -math.inf)
        return logits


def _pooled(rows: Tensor, block: int, pools: list[str], seen: Tensor | None) -> Tensor:
    """[B, H, n, len(pools) * D]: pools of a block's tokens side by side; those of a block without tokens are 0."""
    tokens, rest = rows.shape[2], -rows.shape[2] % block
    real = torch.ones(1, tokens, dtype=torch.bool, device=rows.device) if seen is None else seen
    if seen is None and not rest:
        blocks = rows.unflatten(2, (-1, block))
        found = {"max": lambda: blocks.amax(3), "min": lambda: blocks.amin(3), "avg": lambda: blocks.mean(3)}
        return torch.cat([found[pool]() for pool in pools], -1)
    blocks = F.pad(rows, (0, 0, 0, rest)).unflatten(2, (-1, block))
    there = F.pad(real, (0, rest)).unflatten(1, (-1, block))
    hidden, count = ~there[:, None, :, :, None], there.sum(-1)[:, None, :, None]
    found = {
        "max": lambda: blocks.masked_fill(hidden, -math.inf).amax(3).masked_fill(count == 0, 0.0),
        "min": lambda: blocks.masked_fill(hidden, math.inf).amin(3).masked_fill(count == 0, 0.0),
        "avg": lambda: blocks.masked_fill(hidden, 0.0).sum(3) / count.clamp(min=1),
    }
    return torch.cat([found[pool]() for pool in pools], -1)


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of the channels turned against each other; cos, sin [B or 1, n, D]."""
    first, second = rows.chunk(2, -1)
    return rows * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def block_rotary(
    num_blocks: int, block_size: int, dim: int, theta: float = 10000.0, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [1, num_blocks, dim] at positions 0, block_size, 2 block_size, ...; dim even, on `like`'s device."""
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    device = None if like is None else like.device
    dtype = torch.float64 if like is None else torch.promote_types(like.dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)
    angle = torch.arange(num_blocks, device=device, dtype=dtype)[:, None] * block_size * frequency
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def choose_by_threshold(scores: Tensor, threshold: float, *, causal: bool = False, last_dense: bool = False) -> Tensor:
    """bool like scores [B, H, nq, nk]: scores (after softmax) above `threshold`.

    causal: no block beyond the diagonal. last_dense: the last two block rows see all (authors: last_block_dense).
    """
    return _finished(scores > threshold, causal, last_dense)


def choose_by_ratio(logits: Tensor, nz_ratio: float, *, causal: bool = False, last_dense: bool = False) -> Tensor:
    """bool like logits [B, H, nq, nk]: the same number of the largest logits of every row, at least one.

    nz_ratio: share of the blocks, of those below the diagonal with `causal`, where int((1 - sqrt(1 - nz_ratio)) nk) of
    a row come near to it; else int(nz_ratio nk).
    """
    check_range("nz_ratio", nz_ratio, 0.0, 1.0)
    share = 1.0 - math.sqrt(1.0 - nz_ratio) if causal else nz_ratio
    count = max(1, int(share * logits.shape[-1]))
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(count, -1).indices, True)
    return _finished(chosen, causal, last_dense)


def _finished(mask: Tensor, causal: bool, last_dense: bool) -> Tensor:
    if last_dense:
        mask = mask.clone()
        mask[..., -2:, :] = True
    return mask.tril() if causal else mask


def pooled_target(
    query: Tensor, key: Tensor, block_size: int, scale: float | None = None, *, causal: bool = False
) -> Tensor:
    """What the gate is taught: [B, H, nq, nk], the largest exact probability of each block, rows divided by their sum.

    query [B, H, N, head_dim], key [B, Hkv, N, head_dim]. One block row is computed at a time, so that no matrix of all
    pairs is held. No gradient. Raises TypeError, ValueError for arguments that don't fit.
    """
    check_tensor("query", query, 4)
    check_tensor("key", key, 4)
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query's heads must be a multiple of key's, got {query.shape[1]} and {key.shape[1]}")
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(f"with causal as many queries as keys are wanted, got {query.shape[2]} and {key.shape[2]}")
    check_range("block_size", block_size, 1)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad():
        keys = key.to(exact).repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
        size = keys.shape[-1]
        step = max(1, _CHUNK // (size * query.shape[0] * query.shape[1] * block_size)) * block_size
        rows = []
        for first in range(0, query.shape[2], step):
            logits = query[:, :, first : first + step].to(exact) @ keys * scale
            if causal:
                late = torch.arange(size, device=query.device) > torch.arange(
                    first, first + logits.shape[2], device=query.device
                ).unsqueeze(1)
                logits = logits.masked_fill(late, -math.inf)
            probability = logits.softmax(-1)
            pad = (0, -size % block_size, 0, -logits.shape[2] % block_size)
            blocks = F.pad(probability, pad).unflatten(3, (-1, block_size)).amax(-1)
            rows.append(blocks.unflatten(2, (-1, block_size)).amax(3))
        target = torch.cat(rows, 2)
    return target / target.sum(-1, keepdim=True)


def distillation_loss(logits: Tensor, target: Tensor, *, skip_first: float = 0.0) -> Tensor:
    """KL divergence of the gate's softmax from `target`, mean over ALL elements (torch's KLDivLoss()).

    skip_first: share of the first block rows that are left out (the authors', causal: 0.25).
    """
    check_range("skip_first", skip_first, 0.0, 1.0)
    start = int(logits.shape[2] * skip_first)
    target = target[:, :, start:].to(logits.dtype)
    return F.kl_div(logits[:, :, start:].log_softmax(-1), target, reduction="none").mean()


class SeerGates(nn.ModuleDict):
    """The gates of a denoiser's layers, keyed by the layers' names ("." written as "/").

    Saved with `save`, loaded with `load`; built for a model by `SeerGates.for_model`.
    """

    @staticmethod
    def key(layer: str) -> str:
        """The key of a layer's gate."""
        return layer.replace(".", "/")

    @classmethod
    def for_model(cls, pipe_or_model: Any, layers: Any = None, **options: Any) -> SeerGates:
        """New gates for the (first) denoiser's self-attentions. layers: as for `enable`; options: of `SeerGate`."""
        from attnzoo.generators.handles import find_targets  # it names all methods, this one too
        from attnzoo.generators.interception import self_attentions
        from attnzoo.generators.schedule import choose_layers

        target = find_targets(pipe_or_model)[0]
        modules = {name: module for name, (module, _) in self_attentions(target.model, target.family).items()}
        chosen = choose_layers(layers, list(modules))
        gates = {}
        for name, module in modules.items():
            if name in chosen:
                heads = int(module.heads)  # type: ignore[arg-type]
                width = int(getattr(module, "inner_dim", 0)) or int(module.to_q.out_features)  # type: ignore
                gates[cls.key(name)] = SeerGate(heads, width // heads, **options)
        return cls(gates)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configurations to a safetensors file."""
        about = {
            name: repr((gate.num_heads, gate.pooling, gate.block_size, gate.mask_linear_q is not None))
            for name, gate in self.items()
            if isinstance(gate, SeerGate)
        }
        save_table(path, dict(self.state_dict()), **about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SeerGates:
        """The gates of a file that `save` wrote. Raises as `load_table`."""
        import ast

        state, about = load_table(path)
        gates = {}
        for name, text in about.items():
            heads, pooling, block_size, double = ast.literal_eval(text)
            weight = state[f"{name}.mask_linear_k.weight"]
            head_dim = weight.shape[1] // len(_pools(pooling)[1])
            gates[name] = SeerGate(
                heads,
                head_dim,
                weight.shape[0] if double else None,
                block_size=block_size,
                pooling=pooling,
                hidden_size=weight.shape[2],
                force_double=double,
                dtype=weight.dtype,
            )
        made = cls(gates)
        made.load_state_dict(state)
        return made


class Seer(BlockMethod):
    """The blocks that a learned gate chooses, for the tokens of the grid; text and references are always kept.

    gates: a `SeerGates`, or the path of its file; one gate per layer, all layers that the method acts on need one.
    threshold: blocks whose score is above it (the authors' default 2e-3), or nz_ratio: share of the blocks of a row.
    nz_ratio=1.0 is neutral. rotary: turn pooled queries and keys by their block's place in the sequence, theta as for
    the model (the authors'; 10000.0), None: no (an image's blocks have no one place). qk_int8, backend, skip_threshold:
    of `attnzoo.kernels.block_sparse_attention`.
    distil: nothing is chosen: attention is dense, and the distillation loss of every call is put into `losses`, with a
    gradient for the gates alone; take them with `take_losses()`.

    Adapted: the authors' gate is causal and reads queries and keys before the rotary embedding; here it is without
    mask, as a DiT wants, and reads them as the attention gets them.
    """

    name: ClassVar[str] = "seer"

    def __init__(
        self,
        rank: int,
        *,
        gates: Any,
        threshold: float | None = None,
        nz_ratio: float | None = None,
        rotary: float | None = None,
        distil: bool = False,
        skip_threshold: float | None = None,
        qk_int8: bool = False,
        backend: str = "auto",
    ) -> None:
        """rank: axes of the model's grid. Raises TypeError or ValueError, naming the argument."""
        if isinstance(gates, str | os.PathLike):
            gates = SeerGates.load(gates)
        if not isinstance(gates, Mapping | nn.ModuleDict) or not all(isinstance(g, SeerGate) for g in gates.values()):
            raise TypeError(f"gates must be a SeerGates or a path, got {type(gates).__name__}")
        sizes = {gate.block_size for gate in gates.values() if isinstance(gate, SeerGate)}
        if len(sizes) != 1:
            raise ValueError(f"gates must be of one block_size, got {sorted(sizes)}")
        super().__init__(rank, block_size=sizes.pop(), qk_int8=qk_int8, skip_threshold=skip_threshold, backend=backend)
        if threshold is not None and nz_ratio is not None:
            raise ValueError(f"give one of threshold and nz_ratio, got {threshold!r} and {nz_ratio!r}")
        self.threshold = 2e-3 if threshold is None and nz_ratio is None else threshold
        self.nz_ratio = nz_ratio
        for label, number in (("threshold", self.threshold), ("nz_ratio", nz_ratio)):
            if number is not None:
                check_range(label, number, 0.0, 1.0)
        if rotary is not None:
            check_range("rotary", rotary, 1.0)
        check_flag("distil", distil)
        self.gates, self.rotary, self.distil = gates, rotary, distil
        self.losses: dict[str, list[Tensor]] = {}

    def settings(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "nz_ratio": self.nz_ratio,
            "rotary": self.rotary,
            "distil": self.distil,
            **self.block_settings(),
        }

    def expected(self, layout: TokenLayout) -> float | None:
        if self.nz_ratio is None:
            return None
        blocks = num_blocks(layout.num_grid, self.block_size[1])
        return max(1, int(self.nz_ratio * blocks)) / blocks

    def forget(self) -> None:
        super().forget()
        self.losses = {}

    def state_bytes(self) -> int:
        losses = (loss.nbytes for kept in self.losses.values() for loss in kept)
        return super().state_bytes() + sum(losses)

    def take_losses(self) -> dict[str, Tensor]:
        """The mean distillation loss per layer since the last call; they are let go of."""
        taken, self.losses = self.losses, {}
        return {name: torch.stack(kept).mean() for name, kept in taken.items()}

    def gate(self, layer: str) -> SeerGate:
        """The layer's gate. Raises UnsupportedError where it has none."""
        name = SeerGates.key(layer)
        if name not in self.gates:
            raise UnsupportedError(f"gates holds no gate for {layer}: leave the layer out with layers=, or make one")
        gate = self.gates[name]
        assert isinstance(gate, SeerGate)
        return gate

    def logits(self, query: Tensor, key: Tensor, seen: Tensor | None, layer: str) -> Tensor:
        """[B, heads, nq, nk] of the layer's gate, which follows the query's device and computes in its own dtype."""
        gate = self.gate(layer)
        weight = gate.mask_linear_k.weight
        if weight.device != query.device:
            gate.to(query.device)
            weight = gate.mask_linear_k.weight
        rotary = None
        if self.rotary is not None:
            blocks = num_blocks(query.shape[2], gate.block_size)
            cos, sin = block_rotary(blocks, gate.block_size, gate.hidden_size, self.rotary, weight)
            rotary = cos.to(weight.dtype), sin.to(weight.dtype)
        return gate(query.to(weight.dtype), key.to(weight.dtype), None, rotary, seen)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: TokenLayout,
        ctx: StepContext,
        layer: Layer,
        next: Next,
    ) -> Tensor:
        if self.distil:
            start, stop = layout.grid_start, layout.grid_start + layout.num_grid
            q, k = (t[:, :, start:stop].detach() for t in (query, key))
            target = pooled_target(q, k, self.block_size[0], layer.scale)
            with torch.enable_grad():
                loss = distillation_loss(self.logits(q, k, None, layer.name), target)
            self.losses.setdefault(layer.name, []).append(loss)
            return next(query, key, value, mask)
        if self.nz_ratio == 1.0:
            return next(query, key, value, mask)
        return super().attend(query, key, value, mask, layout, ctx, layer, next)

    def choose(
        self, query: Tensor, key: Tensor, seen: Tensor | None, layout: TokenLayout, ctx: StepContext, layer: Layer
    ) -> Choice | None:
        key, seen = grid_of(layout, key), None if seen is None else grid_of(layout, seen, 1)
        logits = self.logits(query, key, seen, layer.name)
        if self.nz_ratio is not None:
            return Choice(choose_by_ratio(logits, self.nz_ratio))
        assert self.threshold is not None
        scores = logits.softmax(-1)
        best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argmax(-1, keepdim=True), True)
        return Choice(choose_by_threshold(scores, self.threshold) | best)  # a row of no block at all would be 0
