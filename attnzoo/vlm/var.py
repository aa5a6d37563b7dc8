"""VAR, "See What You Are Told" (ICLR 2025, arXiv 2503.03321; code seilk/VisAttnSink): attention sinks feed the image.

A few tokens, visual ones among them, draw attention without being looked at. They show in the residual stream: phi of
a token is its largest |rmsnorm(h)| over a few dimensions that every checkpoint has for itself; a token with phi > tau
is a sink. Heads that do look at the image give 1 - p of what their row spends on sinks to the image's other tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice, check_range, check_tensor
from attnzoo.vlm.attention import group_sizes, group_sums, regroup_probs
from attnzoo.vlm.checkpoints import published
from attnzoo.vlm.checks import as_layers, as_number
from attnzoo.vlm.edits import Edit, Regroup

OTHER, VISUAL, VISUAL_SINK, TEXT_SINK = range(4)
DETECTED_DIMS = 2
_EPS = 1e-6


def sink_scores(hidden_states: Tensor, dim_sink: Tensor) -> Tensor:
    """phi [B, N]: the largest |rmsnorm(h)| over dim_sink, int64 [D] or per sequence [B, D]; h [B, N, C], no weight."""
    h = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
    scale = torch.rsqrt(h.square().mean(-1) + _EPS)
    dims = dim_sink.to(h.device)
    picked = h[..., dims] if dims.ndim == 1 else h.gather(-1, dims[:, None, :].expand(-1, h.shape[1], -1))
    return picked.abs().amax(-1) * scale


def var_sinks(hidden_states: Tensor, dim_sink: Tensor | list[int] | tuple[int, ...], tau: float = 20.0) -> Tensor:
    """bool [B, N]: which tokens are attention sinks (logic.py, DimProspector).

    hidden_states [B, N, C]: the residual stream that enters a layer. Raises ValueError for a dimension that it has not.
    """
    check_tensor("hidden_states", hidden_states, 3)
    dims = torch.as_tensor(dim_sink, dtype=torch.int64)
    if dims.numel() == 0:
        raise ValueError("dim_sink must name at least one dimension, got none")
    check_range("dim_sink", int(dims.min()), 0)
    check_range("dim_sink", int(dims.max()), None, hidden_states.shape[-1] - 1)
    return sink_scores(hidden_states, dims) > tau


def detect_dim_sink(hidden_states: Tensor, real: Tensor | None = None, count: int = DETECTED_DIMS) -> Tensor:
    """int64 [B, count]: the dimensions with the largest |h| at each sequence's first real token (BOS, a sink).

    hidden_states [B, N, C]; real [B, N] bool, False at padding.
    """
    check_tensor("hidden_states", hidden_states, 3)
    first = torch.zeros(len(hidden_states), dtype=torch.int64, device=hidden_states.device)
    if real is not None:
        first = real.int().argmax(1)
    bos = hidden_states[torch.arange(len(first), device=first.device), first]
    return bos.abs().topk(min(count, bos.shape[-1]), dim=-1).indices


def var_groups(sinks: Tensor, image: Tensor) -> Tensor:
    """uint8 [B, N]: 0 other tokens, 1 visual, 2 visual sinks, 3 text sinks, from two bool masks [B, N]."""
    visual = torch.where(sinks, VISUAL_SINK, VISUAL)
    return torch.where(image, visual, torch.where(sinks, TEXT_SINK, OTHER)).to(torch.uint8)


@dataclass(frozen=True)
class VarRule:
    """Which rows give, and how much: masses of the four groups -> factors (HeadFork, VARProcessor)."""

    p: float = 0.6
    rho: float = 0.5
    summ: float = 0.2
    eps: float = 0.0

    def selected(self, masses: Tensor, sizes: Tensor) -> Tensor:
        """bool [B, R, H]: heads that look at the image, little of it at sinks. masses [B, R, H, 4], sizes [B, 4]."""
        sink, visual = masses[..., VISUAL_SINK], masses[..., VISUAL] + masses[..., VISUAL_SINK]
        visual_keys = (sizes[:, VISUAL] + sizes[:, VISUAL_SINK])[:, None, None]
        portion = sink / (visual + self.eps * visual_keys).clamp_min(torch.finfo(masses.dtype).tiny)
        gives = (portion <= self.rho) & (visual >= self.summ) & (masses[..., VISUAL] > 0)
        return gives & (sizes[:, VISUAL_SINK] > 0)[:, None, None]

    def __call__(self, masses: Tensor, sizes: Tensor) -> Tensor:
        """Factors [B, R, H, 4]: p for sinks, what they lose in proportion for visual tokens; 1 where not selected."""
        budget = (1 - self.p) * (masses[..., VISUAL_SINK] + masses[..., TEXT_SINK])
        up = 1 + budget / masses[..., VISUAL].clamp_min(torch.finfo(masses.dtype).tiny)
        sink = torch.full_like(up, self.p)
        factors = torch.stack([torch.ones_like(up), up, sink, sink], -1)
        return torch.where(self.selected(masses, sizes)[..., None], factors, torch.ones_like(factors))


def var_redistribute(
    attn: Tensor, groups: Tensor, rule: VarRule | None = None, edited: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """VAR on softmax probabilities that exist already.

    attn [B, H, Q, K]; groups [B, K0] uint8 from `var_groups`, K0 <= K: keys behind are generated text; edited [Q] or
    [B, Q] bool: rows that may give (None: all). Returns the new probabilities and which rows the rule selected, before
    `edited` was asked, bool [B, H, Q].
    """
    check_tensor("attn", attn, 4)
    check_tensor("groups", groups, 2, [torch.uint8])
    rule = VarRule() if rule is None else rule
    sizes = group_sizes(groups, 4)
    groups = torch.nn.functional.pad(groups, (0, attn.shape[3] - groups.shape[1]), value=OTHER)
    chosen = rule.selected(group_sums(attn, groups, 4), sizes)

    def factors(masses: Tensor) -> Tensor:
        own = rule(masses, sizes)
        return own if edited is None else torch.where(edited.expand(len(attn), -1)[:, :, None, None], own, 1.0)

    return regroup_probs(attn, groups, 4, factors), chosen.transpose(1, 2)


@dataclass(frozen=True)
class VarGroups:
    """Sinks of one layer, from the residual stream that enters it."""

    tau: float
    dim_sink: tuple[int, ...] | None
    mix_batch: bool = False

    def __call__(self, hidden_states: Tensor, image: Tensor, real: Tensor, memory: dict[str, Any]) -> Tensor:
        if self.dim_sink is not None:
            dims = torch.tensor(self.dim_sink, device=hidden_states.device)
        else:
            dims = self._detected(hidden_states, real, memory)
        sinks = sink_scores(hidden_states, dims) > self.tau
        if self.mix_batch:
            sinks = sinks.any(0, keepdim=True).expand_as(sinks)
        return var_groups(sinks & real, image)

    @staticmethod
    def _detected(hidden_states: Tensor, real: Tensor, memory: dict[str, Any]) -> Tensor:
        """Dimensions [B, D] of each sequence's first real token, which may come in a later chunk than the padding."""
        here, begun = detect_dim_sink(hidden_states, real), real.any(1)
        if "dim_sink" in memory:
            here = torch.where(memory["begun"][:, None], memory["dim_sink"], here)
            begun = begun | memory["begun"]
        memory["dim_sink"], memory["begun"] = here, begun
        return here


def known_dim_sink(text_config: Any) -> tuple[int, ...] | None:
    """The authors' sink dimensions for the checkpoints that they give them for, else None (configs/vlm_var.toml)."""
    row = published(text_config, "vlm_var.toml")
    return tuple(row["dim_sink"]) if row else None


def var(
    text_config: Any,
    p: float = 0.6,
    rho: float = 0.5,
    summ: float = 0.2,
    tau: float | None = None,
    dim_sink: object = None,
    layers: object = None,
    compat: str | None = None,
) -> tuple[Edit, ...]:
    """The edit of VAR: in rows behind the image, sinks keep p of their attention, visual tokens get the rest.

    p: share that sinks keep; 1 changes nothing. (The README calls it beta, the code reads p.)
    rho: a head's row gives where at most this share of its image attention lies on visual sinks. This is the CODE's
        meaning; the paper's rho is the complement (1 - rho), so its 0.8 is 0.2 here.
    summ: ... and where at least this share of all its attention lies on the image.
    tau: a token is a sink where phi > tau. None: the authors' 20, and 20 sqrt(width / 4096) for text towers narrower
        than 4096, as phi can't pass sqrt(width) (20 at 4096 means that one dimension holds a tenth of the energy).
    dim_sink: dimensions that phi looks at. None: the authors' for LLaMA-2 7B (2533, 1415) and 13B (2100, 4743) text
        towers, otherwise found in each prompt and layer: the two largest of the first real token (its BOS).
    layers: an iterable of layer indices; None means 2 .. last but one.
    compat: "official" repeats the released code: the last layer is edited too (its switch is shadowed), sinks of all
        sequences in a batch are pooled, and 1e-6 per image key stands in the denominator of the share. The default
        edits no last layer, keeps sequences apart and has no such term.

    Other differences from the authors' code, in both modes: with several images the edited prompt rows are those behind
    the last one; duplicates of sink positions, which the released code sums twice in a batch, don't arise; padding is
    never a sink; a row whose image attention lies on sinks alone is left as it is (theirs divides by zero); masses are
    summed in float32; no layer's matrix is ever formed.

    Raises TypeError or ValueError for p, rho or summ outside 0..1, tau below 0, a dimension or layer that does not
    exist, another compat.
    """
    check_choice("compat", compat, (None, "official"))
    official = compat == "official"
    rule = VarRule(
        as_number("p", p, 0.0, 1.0),
        as_number("rho", rho, 0.0, 1.0),
        as_number("summ", summ, 0.0, 1.0),
        _EPS if official else 0.0,
    )
    depth = text_config.num_hidden_layers
    edited = as_layers(layers, depth, 2, depth if official else depth - 1)
    dims = known_dim_sink(text_config) if dim_sink is None else _as_dims(dim_sink, text_config.hidden_size)
    width = text_config.hidden_size
    tau = 20.0 * min(1.0, math.sqrt(width / 4096)) if tau is None else as_number("tau", tau, 0.0)
    if tau >= math.sqrt(width):
        raise ValueError(
            f"tau must be below sqrt(hidden_size) = {math.sqrt(width):.2f}, which phi can't pass; got {tau!r}"
        )
    groups = VarGroups(tau, dims, mix_batch=official)
    return (Regroup(edited, assign=groups, rule=rule, num_groups=4),)


def _as_dims(value: Any, width: int) -> tuple[int, ...]:
    try:
        dims = tuple(value)
    except TypeError:
        raise TypeError(
            f"dim_sink must be an iterable of integers or None, got {type(value).__name__}: {value!r}"
        ) from None
    if not dims or any(type(d) is not int or not 0 <= d < width for d in dims):
        raise ValueError(f"dim_sink must hold integers from 0 to {width - 1}, at least one, got {value!r}")
    return dims
