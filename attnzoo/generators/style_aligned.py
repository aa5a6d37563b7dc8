"""StyleAligned: the pictures of one batch share the first one's attention keys and values, and so its style.

Paper: Hertz et al., "Style Aligned Image Generation via Shared Attention" (arXiv:2312.02133).
Code: google/style-aligned 2faf0af, sa_handler.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo.errors import UnsupportedError, check_flag, check_number, check_range
from attnzoo.generators.chain import Layer, Method, Next, Stage
from attnzoo.generators.forward import Forward
from attnzoo.generators.layout import StepContext, TokenLayout


def adain(x: Tensor, groups: int = 1, eps: float = 1e-5) -> Tensor:
    """Every sample with the mean and deviation over tokens of its group's first sample.

    x: [B, ..., N, D], groups: equal parts of the batch (its branches); mean and unbiased variance over N.
    """
    mean, deviation = x.mean(-2, keepdim=True), (x.var(-2, keepdim=True) + eps).sqrt()
    normal = (x - mean) / deviation
    return normal * of_first(deviation, groups) + of_first(mean, groups)


def of_first(x: Tensor, groups: int = 1) -> Tensor:
    """`x` [B, ...] with each sample replaced by the first of its group."""
    size = x.shape[0] // groups
    return x[::size].repeat_interleave(size, 0)


def own_layers(total: int, level: float) -> Tensor:
    """bool [total], True for the layers that share nothing at `level` 0 to 1, spread evenly (get_switch_vec)."""
    if level in (0, 1):
        return torch.full((total,), bool(level))
    flip = level > 0.5
    count = int((1 - level if flip else level) * total)
    if not count:
        return torch.full((total,), flip)
    chosen = torch.arange(total) % (total // count) == 0
    return ~chosen if flip else chosen


def shared_group_norm(call: Any, x: Tensor, groups: int = 1) -> Tensor:
    """`call(x)` of a normalisation whose statistics count the first sample of the group, too.

    x: [B, C, ..., W]: the first sample is appended along the second to last axis, and taken off the result.
    """
    rows = x.shape[-2]
    normed: Tensor = call(torch.cat([x, of_first(x, groups)], -2))
    return normed[..., :rows, :]


class StyleAligned(Method):
    """Every picture of the batch attends to the first one of its branch, with queries and keys moved to its statistics.

    Generate the reference and the pictures in one call: `pipe([reference, *prompts])`. In a sequence with text, text
    tokens keep their statistics; what is appended are the tokens of the grid, and the first picture does not see them.

    adain_queries, adain_keys, adain_values: mean and deviation over the grid's tokens, per head, become the first
    picture's. share_attention: its keys and values are appended. full_attention_share: all pictures of a branch attend
    to all instead, without any statistics moved.
    shared_score_scale: factor on the appended keys of the other pictures; shared_score_shift: added to the logits of
    the appended keys. only_self_level: share of the layers that are left alone, spread evenly over those chosen.
    share_group_norm: group normalisations count the first picture, too (the authors also wrap layer normalisations,
    which work token by token, so that nothing changes). Neutral: all six flags off.
    """

    name: ClassVar[str] = "style_aligned"
    stage: ClassVar[Stage] = Stage.KEYS_VALUES

    def __init__(
        self,
        rank: int,
        *,
        share_attention: bool = True,
        adain_queries: bool = True,
        adain_keys: bool = True,
        adain_values: bool = False,
        full_attention_share: bool = False,
        share_group_norm: bool = True,
        shared_score_scale: float = 1.0,
        shared_score_shift: float = 0.0,
        only_self_level: float = 0.0,
    ) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        self._settings = {
            "share_attention": share_attention,
            "adain_queries": adain_queries,
            "adain_keys": adain_keys,
            "adain_values": adain_values,
            "full_attention_share": full_attention_share,
            "share_group_norm": share_group_norm,
            "shared_score_scale": shared_score_scale,
            "shared_score_shift": shared_score_shift,
            "only_self_level": only_self_level,
        }
        for name, value in self._settings.items():
            (check_number if name.startswith(("shared_score", "only_self")) else check_flag)(name, value)
        check_range("only_self_level", only_self_level, 0, 1)
        self.share_attention, self.full_attention_share = share_attention, full_attention_share
        self.adain = (adain_queries, adain_keys, adain_values)
        self.share_group_norm = share_group_norm
        self.scale, self.shift = shared_score_scale, shared_score_shift
        self._alone: frozenset[str] = frozenset()

    def check_layers(self, names: Any) -> None:
        names = list(names)
        alone = own_layers(len(names), self._settings["only_self_level"]).tolist()
        self._alone = frozenset(name for name, own in zip(names, alone) if own)

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        if not self.share_group_norm:
            return forward()
        with _SharedNorms(forward.running_parts):
            return forward()

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
        if layer.name in self._alone or not (self.share_attention or self.full_attention_share or any(self.adain)):
            return next(query, key, value, mask)
        if layout.masks == "compact":
            raise UnsupportedError(f"{layer.name}: this model attends sample by sample, so that none sees another")
        groups = len(ctx.parts)
        if query.shape[0] % groups:
            raise UnsupportedError(f"{layer.name}: a batch of {query.shape[0]} holds no {groups} equal parts")
        start, stop = layout.grid_start, layout.grid_start + layout.num_grid
        if self.full_attention_share:
            return _to_all(query, key, value, mask, slice(start, stop), groups, next)
        moved = []
        for tensor, wanted in zip((query, key, value), self.adain):
            if wanted:
                own = adain(tensor[..., start:stop, :], groups)
                tensor = torch.cat([tensor[..., :start, :], own, tensor[..., stop:, :]], -2)
            moved.append(tensor)
        query, key, value = moved
        if not self.share_attention:
            return next(query, key, value, mask)
        shared_key, shared_value = (of_first(t[..., start:stop, :], groups) for t in (key, value))
        if self.scale != 1:
            factor = torch.full((key.shape[0], 1, 1, 1), self.scale, dtype=key.dtype, device=key.device)
            factor[:: key.shape[0] // groups] = 1
            shared_key = shared_key * factor
        blind = None
        if key.shape[-2] > stop - start:  # beside text, a copy of its own keys would take weight from the text
            blind = torch.arange(key.shape[0], device=key.device) % (key.shape[0] // groups) == 0
        mask = widened(mask, query, key.shape[-2], stop - start, self.shift, blind)
        return next(query, torch.cat([key, shared_key], -2), torch.cat([value, shared_value], -2), mask)


def widened(
    mask: Tensor | None, query: Tensor, keys: int, more: int, shift: float = 0.0, blind: Tensor | None = None
) -> Tensor | None:
    """`mask` of an attention over `keys` keys for `more` keys behind them, `shift` added to the logits of these.

    blind: bool [B], the samples that don't see the appended keys. Broadcast over what all queries and heads share.
    """
    if blind is None and not shift:
        if mask is None:
            return None
        return F.pad(mask.expand(*mask.shape[:-1], keys), (0, more), value=True if mask.dtype == torch.bool else 0.0)
    extra = torch.full((1, 1, 1, more), shift, dtype=query.dtype, device=query.device)
    if blind is not None:
        extra = extra.masked_fill(blind[:, None, None, None], -torch.inf)
    if mask is None:
        mask = extra.new_zeros(1, 1, 1, keys)
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    shape = torch.broadcast_shapes(mask.shape[:-1], extra.shape[:-1])
    whole = torch.cat([mask.to(query.dtype).expand(*shape, keys), extra.expand(*shape, more)], -1)
    return whole.expand(-1, -1, query.shape[-2], -1)


def _to_all(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grid: slice, groups: int, next: Next
) -> Tensor:
    """Every picture attends to its own tokens and the grids of all others of its branch."""
    size = query.shape[0] // groups
    keys, values, tokens = [key], [value], grid.stop - grid.start
    for turn in range(1, size):  # each picture's keys beside those that follow it in a circle: the order doesn't matter
        index = (torch.arange(size, device=key.device) + turn) % size
        rows = (torch.arange(groups, device=key.device)[:, None] * size + index).flatten()
        keys.append(key[rows][..., grid, :])
        values.append(value[rows][..., grid, :])
    mask = widened(mask, query, key.shape[-2], (size - 1) * tokens)
    return next(query, torch.cat(keys, -2), torch.cat(values, -2), mask)


class _SharedNorms(TorchFunctionMode):
    """Group normalisations within count the first picture of each branch, too."""

    def __init__(self, parts: Callable[[], tuple[str, ...]]) -> None:
        """parts: the branches of the forward that is running, which another method may have cut to one."""
        super().__init__()
        self.parts = parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.group_norm:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs.pop("input")
        rest, groups = args[1:], len(self.parts())
        if x.ndim < 4:  # [B, C, N]: the same over one more axis
            return shared_group_norm(lambda t: func(t, *rest, **kwargs), x[..., None], groups)[..., 0]
        return shared_group_norm(lambda t: func(t, *rest, **kwargs), x, groups)
