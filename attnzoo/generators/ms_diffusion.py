"""MS-Diffusion's layout-masked cross-attention to reference images, and its grounding resampler.

Paper: Wang et al., "MS-Diffusion: Multi-subject Zero-shot Image Personalization with Layout Guidance",
arXiv:2406.07209. Code: MS-Diffusion/MS-Diffusion, msdiffusion/models (MIT).

Beside the text's cross-attention every layer attends the tokens of the reference images, with projections of its own
and a bias that lets each token of the grid see the references whose box holds it:

    out = softmax(q k_text^T) v_text + scale * softmax(q k_ip^T + bias) v_ip,    0 in the second term outside all boxes.

Sequence of reference tokens: [num_dummy dummies | num_tokens of reference 0 | of reference 1 | ...].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.errors import UnsupportedError, check_choice, check_range, check_tensor
from attnzoo.generators.chain import CROSS, Layer, Method, Next, Stage
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.maps import attention_logits

__all__ = ["GroundingResampler", "MSDiffusion", "inside_boxes", "layout_bias", "phrase_bias", "pseudo_inside"]

_OUTSIDE = -10000.0  # the authors' value; a row without any key stays finite


def inside_boxes(boxes: Tensor, grid: Sequence[int]) -> Tensor:
    """Which tokens of a grid each box covers: bool [B, references, height * width].

    boxes: [B, references, 4], x0 y0 x1 y1 in [0, 1]; an empty one (start >= end) covers nothing. A box covers columns
    floor(x0 * width) to ceil(x1 * width) - 1, and rows likewise, in the boxes' own precision. Raises ValueError for
    another shape.
    """
    check_tensor("boxes", boxes, ndim=3)
    if boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be [B, references, 4] (x0, y0, x1, y1), got {tuple(boxes.shape)}")
    height, width = grid
    axes = []
    for low, size in ((1, height), (0, width)):
        place = torch.arange(size, device=boxes.device)
        start, stop = (boxes[..., low] * size).floor(), (boxes[..., low + 2] * size).ceil()
        axes.append((place >= start[..., None]) & (place < stop[..., None]))
    return (axes[0][..., :, None] & axes[1][..., None, :]).flatten(-2)


def layout_bias(inside: Tensor, num_tokens: int, num_dummy: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The bias over reference tokens, [B, N, num_dummy + references * num_tokens]: 0 where seen, -10000 elsewhere.

    inside: bool [B, references, N]. The dummies are seen by what is in no box.
    """
    seen = inside.transpose(1, 2).repeat_interleave(num_tokens, dim=2)
    background = ~inside.any(1)
    seen = torch.cat([background[..., None].expand(-1, -1, num_dummy), seen], dim=2)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, _OUTSIDE)


def phrase_bias(inside: Tensor, phrase_idxes: Tensor, num_text: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bias over text tokens, [B, N, num_text], that keeps each reference's phrase inside its box.

    phrase_idxes: int [B, references, 2], first token of the phrase and the one behind its last; (0, 0): no phrase. Not
    used by the authors' sampling, which masks the references only.
    """
    spans = _spans(phrase_idxes, num_text)
    hidden = (spans[:, :, None] & ~inside[..., None]).any(1)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, _OUTSIDE)


def _spans(phrase_idxes: Tensor, num_text: int) -> Tensor:
    """bool [B, references, num_text]: the tokens of each phrase."""
    place = torch.arange(num_text, device=phrase_idxes.device)
    return (place >= phrase_idxes[..., :1]) & (place < phrase_idxes[..., 1:])


def phrase_maps(query: Tensor, key: Tensor, phrase_idxes: Tensor, scale: float | None = None) -> Tensor:
    """How much each token looks at each phrase, mean over its words and over heads: [B, references, N].

    query [B, heads, N, head_dim], key [B, heads, num_text, head_dim]; zeros for a phrase (0, 0).
    """
    probabilities = attention_logits(query, key, None, scale).softmax(-1).mean(1)
    spans = _spans(phrase_idxes, key.shape[2]).to(query.dtype)
    return torch.einsum("bnt,brt->brn", probabilities, spans) / spans.sum(-1, keepdim=True).clamp(min=1)


def pseudo_inside(maps: Tensor, threshold: float) -> Tensor:
    """The tokens that `maps` [B, references, N], scaled to 0..1 each, put above `threshold`: bool, the same shape."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low + 1e-5) > threshold


class MSDiffusion(Method):
    """Cross-attention to reference images, each inside its box.

    image_tokens: [1 or B, num_dummy + references * num_tokens, cross_dim], what `GroundingResampler` made (the dummies
    in front). boxes: [1 or B, references, 4], see `inside_boxes`. weights: the checkpoint's projections: of every
    cross-attention by module name, "<layer>.to_k_ip.weight" and "<layer>.to_v_ip.weight", or in the authors' numbering
    "<i>.to_k_ip.weight", i counting the layers in the checkpoint's order. scale: of the second term.
    subject_scales: one factor per reference. phrase_idxes: [1 or B, references, 2] with mask_threshold: from the
    start_step-th call of a layer on, boxes give way to where the layer's text attention finds the phrases
    (None: boxes stay). zero_background: tokens in no box get no second term; False lets them see the dummies.

    In a batch of both branches, and in a branch named "uncond", the unconditional rows get no second term (the authors
    hand them zero boxes). compat="official" keeps one quirk: `subject_scales` replace `scale` (they should multiply).
    """

    name: ClassVar[str] = "ms_diffusion"
    stage: ClassVar[Stage] = Stage.POST_MIX
    roles: ClassVar[frozenset[str]] = CROSS

    def __init__(
        self,
        rank: int,
        *,
        image_tokens: Tensor,
        boxes: Tensor,
        weights: Mapping[str, Tensor],
        num_tokens: int = 16,
        num_dummy: int = 4,
        scale: float = 0.6,
        subject_scales: Sequence[float] | None = None,
        phrase_idxes: Tensor | None = None,
        mask_threshold: float | None = None,
        start_step: int = 5,
        zero_background: bool = True,
        compat: str | None = None,
    ) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        if rank != 2:
            raise UnsupportedError(f"boxes lie on an image: ms_diffusion wants a grid of 2 axes, this model has {rank}")
        check_tensor("image_tokens", image_tokens, ndim=3)
        check_tensor("boxes", boxes, ndim=3)
        check_choice("compat", compat, (None, "official"))
        check_range("num_tokens", num_tokens, low=1)
        check_range("num_dummy", num_dummy, low=0)
        count = boxes.shape[1]
        if image_tokens.shape[1] != num_dummy + count * num_tokens:
            raise ValueError(
                f"image_tokens must hold num_dummy + references * num_tokens = {num_dummy + count * num_tokens} tokens "
                f"for {count} boxes, got {tuple(image_tokens.shape)}"
            )
        if subject_scales is not None and len(subject_scales) != count:
            raise ValueError(f"subject_scales must hold one factor per box ({count}), got {len(subject_scales)}")
        if (mask_threshold is None) != (phrase_idxes is None):
            raise ValueError("mask_threshold and phrase_idxes go together: give both, or neither")
        self.image_tokens, self.boxes, self.weights = image_tokens, boxes, dict(weights)
        self.num_tokens, self.num_dummy, self.scale = num_tokens, num_dummy, scale
        self.subject_scales = None if subject_scales is None else tuple(subject_scales)
        self.phrase_idxes, self.mask_threshold, self.start_step = phrase_idxes, mask_threshold, start_step
        self.zero_background, self.compat = zero_background, compat
        self._maps: dict[tuple[str, str], tuple[Tensor, int, int]] = {}  # (layer, branch) -> sum, count, run

    def settings(self) -> dict[str, Any]:
        names = ("num_tokens", "num_dummy", "scale", "subject_scales", "mask_threshold", "start_step", "compat")
        return {"boxes": self.boxes.tolist(), **{name: getattr(self, name) for name in names}}

    def state_bytes(self) -> int:
        return sum(total.numel() * total.element_size() for total, _, _ in self._maps.values())

    def forget(self) -> None:
        self._maps.clear()

    def projections(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The layer's to_k_ip and to_v_ip weights, [inner_dim, cross_dim]. Raises KeyError where there are none."""
        for prefix in (layer.name, f"{layer.name}.processor", str(layer.index)):
            found = tuple(self.weights.get(f"{prefix}.{part}.weight") for part in ("to_k_ip", "to_v_ip"))
            if found[0] is not None and found[1] is not None:
                return found[0], found[1]
        raise KeyError(
            f"weights hold no {layer.name}.to_k_ip.weight and .to_v_ip.weight (nor {layer.index}.to_k_ip.weight): they "
            f"begin with {sorted(self.weights)[:3]}"
        )

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
        out = next(query, key, value, mask)
        return out + self.references(query, key, layout, ctx, layer)

    def references(self, query: Tensor, key: Tensor, layout: TokenLayout, ctx: StepContext, layer: Layer) -> Tensor:
        """The second term, [B, heads, N, head_dim]."""
        batch, heads = query.shape[:2]
        tokens = self._rows(self.image_tokens.to(query), batch, ctx)
        wanted = self._rows(self.boxes.to(query.device), batch, ctx)
        inside = self._learned(query, key, ctx, layer, batch) if self.mask_threshold is not None else None
        if inside is None:
            inside = inside_boxes(wanted, layout.grid)
        keys, values = (
            F.linear(tokens, weight.to(query)).unflatten(2, (heads, -1)).transpose(1, 2)
            for weight in self.projections(layer)
        )
        scale = self.scale
        if self.subject_scales is not None:
            factors = torch.tensor(self.subject_scales, dtype=query.dtype, device=query.device)
            factors = F.pad(factors.repeat_interleave(self.num_tokens), (self.num_dummy, 0), value=1.0)
            values = values * factors[:, None]  # (p * s) v = p (s v)
            scale = 1.0 if self.compat == "official" else scale
        bias = layout_bias(inside, self.num_tokens, self.num_dummy, query.dtype)
        out = F.scaled_dot_product_attention(query, keys, values, bias[:, None], scale=layer.scale)
        if self.zero_background:
            out = out.masked_fill(~inside.any(1)[:, None, :, None], 0.0)
        return scale * out

    def _rows(self, given: Tensor, batch: int, ctx: StepContext) -> Tensor:
        """`given` for every row of the batch, zeros for the unconditional ones."""
        if len(given) == batch:
            return given
        parts = ctx.parts
        size = batch // len(parts)
        if batch % len(parts) or len(given) not in (1, size):
            raise ValueError(
                f"image_tokens and boxes must have a batch of 1 or {size}, got {len(given)} in a batch of {batch} "
                f"that holds {parts}"
            )
        rows = given.expand(size, *given.shape[1:])
        return torch.cat([torch.zeros_like(rows) if part == "uncond" else rows for part in parts])

    def _learned(self, query: Tensor, key: Tensor, ctx: StepContext, layer: Layer, batch: int) -> Tensor | None:
        """The boxes that the text's attention makes, once start_step calls were seen; None before."""
        assert self.phrase_idxes is not None and self.mask_threshold is not None
        phrases = self._rows(self.phrase_idxes.to(query.device), batch, ctx)
        maps, place = phrase_maps(query, key, phrases, layer.scale), (layer.name, ctx.branch)
        total, count, run = self._maps.get(place, (None, 0, ctx.run))
        if total is None or run != ctx.run or total.shape != maps.shape:
            total, count = torch.zeros_like(maps), 0
        self._maps[place] = (total + maps.detach(), count + 1, ctx.run)
        if count + 1 < self.start_step:
            return None
        return pseudo_inside(self._maps[place][0] / (count + 1), self.mask_threshold)


class _Perceiver(nn.Module):
    """Latents [B, Q, dim] read x [B, L, dim] and themselves."""

    def __init__(self, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * heads * 2, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        key, value = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(latents), key, value))
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class GroundingResampler(nn.Module):
    """Image features of references to tokens, starting from where each reference is and what it is called.

    x [B * references, L, embedding_dim], boxes [B * references, 4], phrase_embeds [B * references, phrase_dim] ->
    [B * references, num_latents_mean_pooled + num_queries, output_dim]. drop_grounding_tokens: bool [B], samples whose
    references start from the learned latents instead. shortcut_scale: with `shortcut`, the start is added to the
    result, which is multiplied by it (needs dim == output_dim). Parameter names are the authors'. Their
    latent_init_mode="random" crashes in their code and is not offered.
    """

    def __init__(
        self,
        dim: int = 1024,
        depth: int = 8,
        dim_head: int = 64,
        heads: int = 16,
        num_queries: int = 8,
        embedding_dim: int = 768,
        output_dim: int = 1024,
        ff_mult: int = 4,
        *,
        phrase_dim: int = 1024,
        fourier_freqs: int = 8,
        max_seq_len: int = 257,
        apply_pos_emb: bool = False,
        num_latents_mean_pooled: int = 0,
        shortcut: bool = False,
        shortcut_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if shortcut and dim != output_dim:
            raise ValueError(f"shortcut adds the start to the result: dim={dim} must equal output_dim={output_dim}")
        self.num_queries, self.shortcut, self.shortcut_scale = num_queries, shortcut, shortcut_scale
        self.fourier_freqs = fourier_freqs
        self.grounding_latents = nn.Parameter(torch.randn(1, num_queries, dim) / dim**0.5)
        width = phrase_dim + 8 * fourier_freqs
        wide = 2 * width
        self.latent_proj = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, dim * num_queries))
        self.latent_norm = nn.LayerNorm(dim)
        self.pos_emb = nn.Embedding(max_seq_len, embedding_dim) if apply_pos_emb else None
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        pooled = num_latents_mean_pooled
        self.to_latents_from_mean_pooled_seq = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim * pooled), nn.Unflatten(1, (pooled, dim)))
            if pooled
            else None
        )
        inner = dim * ff_mult

        def feed_forward() -> nn.Module:
            widen, narrow = nn.Linear(dim, inner, bias=False), nn.Linear(inner, dim, bias=False)
            return nn.Sequential(nn.LayerNorm(dim), widen, nn.GELU(), narrow)

        self.layers = nn.ModuleList(
            nn.ModuleList([_Perceiver(dim, dim_head, heads), feed_forward()]) for _ in range(depth)
        )

    def fourier(self, boxes: Tensor) -> Tensor:
        """[b, 4] -> [b, 8 * fourier_freqs], per frequency 100^(i / F) the sines and then the cosines of x0 y0 x1 y1."""
        steps = torch.arange(self.fourier_freqs, dtype=boxes.dtype, device=boxes.device) / self.fourier_freqs
        angles = 100.0 ** steps[:, None] * boxes[:, None]
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)

    def start(self, boxes: Tensor, phrase_embeds: Tensor, drop_grounding_tokens: Tensor | None = None) -> Tensor:
        """The latents before the image is read, [b, num_queries, dim]."""
        latents = self.latent_proj(torch.cat([phrase_embeds, self.fourier(boxes)], dim=-1))
        latents = self.latent_norm(latents.unflatten(1, (self.num_queries, -1)))
        if drop_grounding_tokens is None:
            return latents
        drop = drop_grounding_tokens.bool().to(latents.device)
        if len(latents) % len(drop):
            raise ValueError(f"drop_grounding_tokens has {len(drop)} samples, for {len(latents)} references")
        drop = drop.repeat_interleave(len(latents) // len(drop))
        return torch.where(drop[:, None, None], self.grounding_latents, latents)

    def forward(
        self, x: Tensor, boxes: Tensor, phrase_embeds: Tensor, drop_grounding_tokens: Tensor | None = None
    ) -> Tensor:
        if self.pos_emb is not None:
            x = x + self.pos_emb(torch.arange(x.shape[1], device=x.device))
        first = latents = self.start(boxes, phrase_embeds, drop_grounding_tokens)
        x = self.proj_in(x)
        if self.to_latents_from_mean_pooled_seq is not None:
            latents = torch.cat([self.to_latents_from_mean_pooled_seq(x.mean(1)), latents], dim=1)
        pairs: Any = self.layers
        for attention, feed_forward in pairs:
            latents = attention(x, latents) + latents
            latents = feed_forward(latents) + latents
        latents = self.proj_out(self.attention_norm(latents))
        if self.shortcut:
            latents = first + self.shortcut_scale * latents
        return self.norm_out(latents)
