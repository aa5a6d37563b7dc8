"""SpargeAttn: which blocks of keys a block of queries needs, told from the blocks' means.

Paper: Zhang et al., "SpargeAttention", ICML 2025, arXiv:2502.18137. Code: thu-ml/SpargeAttn bfd980b (Apache-2.0),
spas_sage_attn/utils.py; written here from the formulas.

    pool   = mean of a block's queries (keys)
    similar = mean cosine similarity of all pairs of the block's tokens > simthreshd1
    p      = softmax over similar key blocks of pool_q . pool_k * scale
    chosen = the first blocks of descending p: as many as have cumulated mass <= cdfthreshd, or int(topk * nk);
             at least one; and every block of a row or column that is not similar

The similarity of n unit rows u is |sum u|^2 / n^2: the Gram matrix of a block is never formed. The second stage skips
the values of a chosen block all of whose logits lie more than pvthreshd below the row's running maximum
(`block_sparse_attention`'s skip_threshold).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.errors import check_choice, check_flag, check_number, check_range, check_same, check_tensor, per_axis
from attnzoo.generators.blocks import BlockMethod, Choice, grid_of, num_blocks
from attnzoo.generators.chain import Layer, Next
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.tables import HeadTable
from attnzoo.kernels import BlockSparsity, block_sparse_attention

COMPAT = ("default", "official")
Numbers = float | Sequence[float] | Mapping[str, float | Sequence[float]]


class Selection(NamedTuple):
    """What `select_blocks` found.

    mask: bool [B, H, nq, nk], True for chosen blocks. query_pool, key_pool: [B, H, n, head_dim], means of the blocks;
    query_similar, key_similar: bool [B, H, n]; key heads as they came, not repeated. key_mean: [B, Hkv, 1, head_dim]
    that was taken off the keys, None without smooth_k.
    """

    mask: Tensor
    query_pool: Tensor
    key_pool: Tensor
    query_similar: Tensor
    key_similar: Tensor
    key_mean: Tensor | None


def _halves(tensor: Tensor) -> Tensor:
    """As the authors' kernels take it: half precision, float32 and float64 rounded to float16."""
    return tensor if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.half()


def _pool(rows: Tensor, block: int, seen: Tensor | None, compat: str) -> tuple[Tensor, Tensor, Tensor]:
    """(means [B, H, n, D], mean cosine similarities [B, H, n], whether a block has a token [B or 1, 1, n]).

    rows: [B, H, N, D]; seen: bool [B or 1, N] or None.
    """
    exact = torch.promote_types(rows.dtype, torch.float32)
    tokens, wide = rows.shape[2], rows.to(exact)
    if compat == "official":
        unit = (wide / wide.square().sum(-1, keepdim=True).sqrt()).to(torch.float16).to(exact)
    else:
        unit = F.normalize(wide, dim=-1)
    real = torch.ones(1, tokens, dtype=torch.bool, device=rows.device) if seen is None else seen
    if seen is not None:
        wide, unit = (t.masked_fill(~seen[:, None, :, None], 0.0) for t in (wide, unit))
    rest = -tokens % block
    wide, unit = (F.pad(t, (0, 0, 0, rest)).unflatten(2, (-1, block)).sum(3) for t in (wide, unit))
    count = F.pad(real, (0, rest)).unflatten(1, (-1, block)).sum(-1)[:, None].to(exact)
    similar = unit.square().sum(-1) / count.square().clamp(min=1)
    if compat == "official" and rest:  # padded rows have norm 0 there: 0 / 0
        similar[..., -1] = torch.nan
    return (wide / count.clamp(min=1)[..., None]).to(rows.dtype), similar, count > 0


def select_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int | Sequence[int] = (128, 64),
    simthreshd1: float | Tensor = 0.6,
    cdfthreshd: float | Tensor | None = 0.98,
    topk: float | Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    attention_sink: bool = False,
    smooth_k: bool = False,
    seen: Tensor | None = None,
    compat: str = "default",
) -> Selection:
    """The blocks of keys that SpargeAttn computes for every block of queries.

    query [B, H, Nq, head_dim], key [B, Hkv, Nk, head_dim], H a multiple of Hkv. block_size: (queries, keys) tokens of a
        block (128, 64; the authors' sm90 kernel 64, 128).
    simthreshd1, cdfthreshd, topk: a number or [H]; one of cdfthreshd (cumulated mass) and topk (share of the key
        blocks) is None.
    scale: of the dot products, None means head_dim ** -0.5.
    is_causal: blocks beyond the diagonal are left out. attention_sink: the first block of keys is always kept.
    smooth_k: take the mean of the keys off before they are pooled, as the authors' kernels do.
    seen: bool [B or 1, Nk], False for keys that nobody sees; a block of such keys is never chosen.

    compat="official" computes as the authors' code, whose differences are: statistics in the input's half precision
    (float32 and float64 are rounded to float16); a last block in part has similarity NaN and is kept dense; a
    cdfthreshd of 1 may lose blocks to rounding; `scale` and `seen` are ignored.

    Raises TypeError, ValueError for arguments that don't fit.
    """
    check_tensor("query", query, 4)
    check_tensor("key", key, 4)
    check_same("device", query=query, key=key)
    sizes = per_axis("block_size", block_size, 2, low=1)
    check_choice("compat", compat, COMPAT)
    for name, flag in (("is_causal", is_causal), ("attention_sink", attention_sink), ("smooth_k", smooth_k)):
        check_flag(name, flag)
    if (cdfthreshd is None) == (topk is None):
        raise ValueError(f"one of cdfthreshd and topk must be None, got cdfthreshd={cdfthreshd!r} and topk={topk!r}")
    heads, heads_kv = query.shape[1], key.shape[1]
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or heads % heads_kv:
        raise ValueError(
            f"key must be [B={query.shape[0]}, a divisor of {heads}, Nk, {query.shape[3]}], got {tuple(key.shape)}"
        )
    official = compat == "official"
    if official:
        query, key, seen = _halves(query), _halves(key), None
        scale = None
    key_mean = None
    if smooth_k:
        key_mean = _mean(key, seen)
        key = key - key_mean
    query_pool, query_similarity, _ = _pool(query, sizes[0], None, compat)
    key_pool, key_similarity, has_keys = _pool(key, sizes[1], seen, compat)
    dtype = query_pool.dtype if official else torch.promote_types(query_pool.dtype, torch.float32)

    def per_head(name: str, number: float | Tensor, low: float | None, high: float | None) -> Tensor:
        if isinstance(number, Tensor):
            if number.ndim > 1 or number.numel() not in (1, heads):
                raise ValueError(f"{name} must be a number or [{heads}], got {tuple(number.shape)}")
            own = number.to(query.device, torch.promote_types(dtype, torch.float32))
        else:
            check_range(name, number, low, high)
            own = torch.tensor(float(number), dtype=torch.promote_types(dtype, torch.float32), device=query.device)
        return own.expand(heads)

    threshold = per_head("simthreshd1", simthreshd1, -1.0, None)
    repeats = heads // heads_kv
    query_similar = query_similarity > threshold[:, None]
    key_similar_heads = key_similarity.repeat_interleave(repeats, 1) > threshold[:, None]
    score = query_pool.to(dtype) @ key_pool.to(dtype).repeat_interleave(repeats, 1).transpose(-1, -2)
    score = score * (query.shape[3] ** -0.5 if scale is None else scale)
    num_keys = score.shape[-1]
    allowed = (
        has_keys[:, :, None, :].expand(*score.shape) if seen is not None else torch.ones_like(score, dtype=torch.bool)
    )
    if is_causal:
        rows = torch.arange(score.shape[2], device=score.device)[:, None]
        columns = torch.arange(num_keys, device=score.device)
        if official:
            causal = columns < (rows + 1) * (sizes[0] / sizes[1])
        else:  # query i is key i + Nk - Nq
            last = torch.clamp((rows + 1) * sizes[0], max=query.shape[2]) - 1 + key.shape[2] - query.shape[2]
            causal = columns * sizes[1] <= last
        allowed = allowed & causal
    probability = score.masked_fill(~(allowed & key_similar_heads[:, :, None, :]), -torch.inf).softmax(-1)
    ordered = probability.sort(dim=-1, descending=True)
    if cdfthreshd is not None:
        share = per_head("cdfthreshd", cdfthreshd, 0.0, 1.0)
        mass = ordered.values.cumsum(-1)
        count = torch.searchsorted(mass, share[None, :, None, None].expand(*mass.shape[:3], 1).contiguous(), right=True)
        if not official:
            count = torch.where(share[:, None, None] >= 1.0, num_keys, count)
    else:
        assert topk is not None
        share = per_head("topk", topk, 0.0, 1.0)
        count = (share * num_keys).long()[:, None, None]
    chosen = torch.arange(num_keys, device=score.device) < count.clamp(min=1)
    mask = torch.zeros_like(allowed).scatter(-1, ordered.indices, chosen.expand(*score.shape))
    mask = mask | ~key_similar_heads[:, :, None, :] | ~query_similar[..., None]
    mask = mask & allowed
    if attention_sink:
        mask[..., 0] = True
    key_similar = key_similarity > threshold[::repeats, None]
    return Selection(mask, query_pool, key_pool, query_similar, key_similar, key_mean)


def _mean(key: Tensor, seen: Tensor | None) -> Tensor:
    """[B, H, 1, D]: the mean of the keys that are seen."""
    if seen is None:
        return key.mean(2, keepdim=True)
    real = seen[:, None, :, None]
    return key.masked_fill(~real, 0.0).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)


def block_scales(rows: Tensor, block: int, mean: Tensor | None = None) -> Tensor:
    """Scales of the authors' int8 rows, float32 [B, H, ceil(N / block)].

    The largest magnitude of a block / 127 + 1e-7, of rows [B, H, N, D] in half precision (see `select_blocks`) minus
    `mean` [B, H, 1, D]. Ours (`block_sparse_attention(qk_int8=True)`) has no 1e-7, and scale 1 for a block of zeros.
    """
    check_tensor("rows", rows, 4)
    rows = _halves(rows)
    if mean is not None:
        rows = rows - mean.to(rows.dtype)
    largest = rows.abs().amax(-1).float()
    return F.pad(largest, (0, -rows.shape[2] % block)).unflatten(2, (-1, block)).amax(-1) / 127 + 1e-7


def delta_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A block mask as the authors' lists: (lut int32 like mask, counts int32 [B, H, nq]).

    An entry is the distance to the last chosen block, the first one from block 0; the entry behind the last one counts
    to block 9999999, all others are 0.
    """
    check_tensor("mask", mask, 4, [torch.bool])
    places = torch.arange(mask.shape[-1], device=mask.device).masked_fill(~mask, 9_999_999).sort(-1).values
    return places.diff(dim=-1, prepend=torch.zeros_like(places[..., :1])).int(), mask.sum(-1, dtype=torch.int32)


class Sparge(BlockMethod):
    """SpargeAttn for the tokens of the grid; text and reference tokens are always kept, and their queries dense.

    topk: share of the key blocks that a block of queries keeps (0.5), or cdfthreshd: the cumulated mass of pooled
        probability that it keeps. Give one of them.
    simthreshd1: blocks whose tokens are less similar than this stay dense; None: -0.1 with topk (nearly none), 0.6 with
        cdfthreshd, the authors' defaults.
    pvthreshd: the second stage's skip; None: none (the authors' 50 skips weights below 2e-22).
    topk, cdfthreshd and simthreshd1 may be one number, one per head, or tables {layer name or pattern: either}.
    block_size: (queries, keys) tokens of a block. smooth_k: the keys' mean is taken off before they are pooled.
    attention_sink: the grid's first block of keys is always kept.
    qk_int8: 8-bit queries and keys. backend: of `attnzoo.kernels.block_sparse_attention`.

    topk=1.0 and cdfthreshd=1.0 are neutral: the model's own attention call runs.

    compat="official": the selection as the authors' code (see `select_blocks`) over the whole sequence, text included
    without being kept, and masks ignored. The default honours scale and mask, and blocks in part.
    """

    name: ClassVar[str] = "sparge"

    def __init__(
        self,
        rank: int,
        *,
        topk: Numbers | None = None,
        cdfthreshd: Numbers | None = None,
        simthreshd1: Numbers | None = None,
        pvthreshd: float | None = None,
        block_size: int | Sequence[int] = (128, 64),
        smooth_k: bool = True,
        attention_sink: bool = False,
        qk_int8: bool = False,
        compat: str = "default",
        backend: str = "auto",
    ) -> None:
        """rank: axes of the model's grid. Raises TypeError or ValueError, naming the argument."""
        if pvthreshd is not None:
            check_number("pvthreshd", pvthreshd)
            if pvthreshd <= 0:
                raise ValueError(f"pvthreshd must be above 0, got {pvthreshd!r}")
        super().__init__(rank, block_size=block_size, qk_int8=qk_int8, skip_threshold=pvthreshd, backend=backend)
        if topk is not None and cdfthreshd is not None:
            raise ValueError(f"give one of topk and cdfthreshd, got topk={topk!r} and cdfthreshd={cdfthreshd!r}")
        if topk is None and cdfthreshd is None:
            topk = 0.5
        self.topk = None if topk is None else HeadTable("topk", topk, 0.0, 1.0)
        self.cdfthreshd = None if cdfthreshd is None else HeadTable("cdfthreshd", cdfthreshd, 0.0, 1.0)
        similar = (-0.1 if topk is not None else 0.6) if simthreshd1 is None else simthreshd1
        self.simthreshd1 = HeadTable("simthreshd1", similar, -1.0)
        check_flag("smooth_k", smooth_k)
        check_flag("attention_sink", attention_sink)
        check_choice("compat", compat, COMPAT)
        self.smooth_k, self.attention_sink, self.compat = smooth_k, attention_sink, compat
        kept = self.topk or self.cdfthreshd
        assert kept is not None
        self._neutral = kept.all_at_least(1.0)

    def settings(self) -> dict[str, Any]:
        return {
            "topk": None if self.topk is None else self.topk.value,
            "cdfthreshd": None if self.cdfthreshd is None else self.cdfthreshd.value,
            "simthreshd1": self.simthreshd1.value,
            "smooth_k": self.smooth_k,
            "attention_sink": self.attention_sink,
            "compat": self.compat,
            **{("pvthreshd" if k == "skip_threshold" else k): v for k, v in self.block_settings().items()},
        }

    def expected(self, layout: TokenLayout) -> float | None:
        if self._neutral:
            return 1.0
        if self.topk is None:
            return None
        blocks = num_blocks(layout.num_grid, self.block_size[1])
        return max(1, int(self.topk.mean() * blocks)) / blocks

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
        if self._neutral:
            return next(query, key, value, mask)
        if self.compat != "official":
            return super().attend(query, key, value, mask, layout, ctx, layer, next)
        with torch.no_grad():
            chosen = self._select(query, key, None, layer)
        sparsity = BlockSparsity.from_mask(
            chosen, query.shape[2], key.shape[2], self.block_size, trim=query.device.type == "cpu"
        )
        out = block_sparse_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            sparsity,
            layer.scale,
            skip_threshold=self.skip_threshold,
            qk_int8=self.qk_int8,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    def _select(self, query: Tensor, key: Tensor, seen: Tensor | None, layer: Layer) -> Tensor:
        heads = query.shape[1]

        def own(table: HeadTable | None) -> Tensor | None:
            return None if table is None else table.at(layer.name, heads, query)

        similar = own(self.simthreshd1)
        assert similar is not None
        return select_blocks(
            query,
            key,
            block_size=self.block_size,
            simthreshd1=similar,
            cdfthreshd=own(self.cdfthreshd),
            topk=own(self.topk),
            scale=layer.scale,
            attention_sink=self.attention_sink,
            smooth_k=self.smooth_k,
            seen=seen,
            compat=self.compat,
        ).mask

    def choose(
        self, query: Tensor, key: Tensor, seen: Tensor | None, layout: TokenLayout, ctx: StepContext, layer: Layer
    ) -> Choice | None:
        key, seen = grid_of(layout, key), None if seen is None else grid_of(layout, seen, 1)
        if layout.num_grid <= self.block_size[1]:  # one block of keys: nothing to choose
            return None
        return Choice(self._select(query, key, seen, layer))
