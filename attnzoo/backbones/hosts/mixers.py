"""What a host asks of an attention: the mixer, the place where it stands, and which block gets which.

A host projects its tokens and cuts its windows; the mixer turns the projected query, key and value tokens of one
window (or of a whole map) into output tokens. It is chosen per block by the letters of `attn_type`:

    "AAAB"    one letter a stage
    "AAMB2"   a stage M is mixed: its first 2 blocks take the method (the first letter of `mixers`), the others the
              plain one (the second)

and each letter stands for a name in MIXERS or for a callable `Site -> Mixer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias, resize_rel_pos_bias_table
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import StageFeatures
from attnzoo.backbones.blocks.neighborhood import check_heads, unwrap_checkpoint
from attnzoo.errors import UnsupportedError, check_choice

Size = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """Where a mixer stands.

    dim, num_heads: channels and heads of the tokens it gets.
    size, key_size: (height, width) of the map or window that its queries and its keys are laid out on, at the model's
        img_size.
    stage, block: indices, the block counted within its stage.
    num_prefix: tokens before those of the map (a class token), both queries and keys.
    local_conv: whether the mixer is to add its own local convolution of the values (CSwin adds one of its own).
    rel_pos_bias: whether softmax attention has a relative position bias there (Swin).
    dd: device and dtype of parameters.
    """

    dim: int
    num_heads: int
    size: Size
    key_size: Size
    stage: int
    block: int
    num_prefix: int = 0
    local_conv: bool = True
    rel_pos_bias: bool = False
    dd: dict[str, Any] = field(default_factory=dict)


class Mixer(nn.Module):
    """Base of mixers. `forward(query, key, value, size, key_size, context, mask=None)`:

    query [B, P + h w, dim] on a map of `size` = (h, w) after P prefix tokens, key and value [B, P + hk wk, dim] on
    `key_size`; context [B, N, dim], the tokens that the projections came from; mask [windows, N, N] to be added to the
    logits (Swin's shifted windows; B counts the windows of an image fastest). Returns [B, P + h w, dim].

    pinned: the size that its parameters tie the map to, None where it takes any.
    uses_mask: False for methods that cannot honour a mask; the host does not build one for them.
    whole_map: True for methods that cut their own windows; a host of windows gives them the map.
    """

    uses_mask = False
    whole_map = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.num_heads = site.num_heads
        self.head_dim = check_heads(site.dim, site.num_heads)
        self.num_prefix = site.num_prefix

    @property
    def pinned(self) -> Size | None:
        return None

    def set_size(self, size: Size, key_size: Size) -> None:
        """Resample what is tied to a size."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, size: Size, key_size: Size, mask: Tensor | None = None
    ) -> Tensor:
        """The part of `forward` that is a weighted sum of the values with weights that sum to one, without local
        convolutions; shapes as there. UnsupportedError for mixers whose weights are no such thing."""
        raise UnsupportedError(f"{type(self).__name__} has no attention weights that sum to one")

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, heads, head_dim]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))


class SoftmaxMixer(Mixer):
    """Plain softmax attention, scale head_dim ** -0.5, with Swin's relative position bias where the site has one."""

    uses_mask = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.rel_pos: Any = RelPosBias(site.size, site.num_heads, **site.dd) if site.rel_pos_bias else None

    @property
    def window(self) -> Size | None:
        """The window that the bias is made for."""
        return None if self.rel_pos is None else tuple(self.rel_pos.window_size)  # type: ignore[return-value]

    def set_size(self, size: Size, key_size: Size) -> None:
        if self.rel_pos is not None:
            self.rel_pos.set_window_size(size)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        size: Size,
        key_size: Size,
        context: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self.attend(query, key, value, size, key_size, mask)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, size: Size, key_size: Size, mask: Tensor | None = None
    ) -> Tensor:
        bias = None if self.rel_pos is None else self.rel_pos.get_bias()
        if mask is not None:
            bias = mask[:, None] if bias is None else bias + mask[:, None]
        q, k, v = (self.heads(t).transpose(1, 2) for t in (query, key, value))
        if bias is not None:
            bias = bias.to(q.dtype)
            if len(bias) > 1:  # one mask per window of an image
                bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


Factory = Callable[[Site], nn.Module]
MIXERS: dict[str, Factory] = {"softmax": SoftmaxMixer}


def make_mixer(mixers: Mapping[str, str | Factory], letter: str, site: Site) -> Any:
    """The mixer that `letter` stands for, at `site`."""
    check_choice("attn_type's letter", letter, mixers)
    chosen = mixers[letter]
    if isinstance(chosen, str):
        check_choice(f"the mixer of {letter!r}", chosen, MIXERS)
        chosen = MIXERS[chosen]
    return chosen(site)


def attn_schedule(attn_type: str, depths: Sequence[int], mixers: Mapping[str, Any]) -> list[list[str]]:
    """The letter of every block, per stage; see the module's docstring.

    mixers: the letters that exist; the first is the method's, the second the plain one's.
    """
    method, plain = [*mixers, *mixers][:2]
    stages, rest = attn_type[: len(depths)], attn_type[len(depths) :]
    if (
        len(stages) != len(depths)
        or set(stages) - {*mixers, "M"}
        or ("M" in stages) != bool(rest)
        or rest.strip("0123456789")
    ):
        raise ValueError(
            f"attn_type must have one letter of {', '.join(mixers)} or M per stage ({len(depths)}), and after them, "
            f"where there is an M, the number of its blocks that are {method}; got {attn_type!r}"
        )
    return [
        [(method if j < int(rest) else plain) if letter == "M" else letter for j in range(depth)]
        for letter, depth in zip(stages, depths)
    ]


def check_pinned(x: Tensor, img_size: Size, modules: nn.Module) -> None:
    """ValueError where a mixer of `modules` is tied to img_size and x has another size."""
    if tuple(x.shape[2:]) != img_size and any(m.pinned for m in modules.modules() if isinstance(m, Mixer)):
        raise ValueError(
            f"x must be of img_size {img_size[0]} x {img_size[1]}, which this attention's biases are made for, got "
            f"{x.shape[2]} x {x.shape[3]}: resize the images, build the model with img_size={tuple(x.shape[2:])}, or "
            f"call set_input_size({tuple(x.shape[2:])}), which resamples the biases"
        )


def resample_map(table: Tensor, old: Size, new: Size, num_prefix: int = 0) -> Tensor:
    """A position embedding [1, P + h w, dim] brought to another map, bilinearly, as the authors do."""
    if old == new:
        return table
    prefix, grid = table[:, :num_prefix], table[:, num_prefix:]
    grid = F.interpolate(grid.transpose(1, 2).unflatten(2, old), size=new, mode="bilinear").flatten(2).transpose(1, 2)
    return torch.cat([prefix, grid], dim=1)


def square_side(count: int) -> Size:
    """(side, side) of a square map of `count` tokens; ValueError where it is none."""
    side = math.isqrt(max(count, 0))
    if side * side != count:
        raise ValueError(f"a position table of {count} tokens is of no square map, and the file does not say of which")
    return side, side


def build_hosted(
    filter_fn: Callable[..., Any],
    cls: type,
    variant: str,
    pretrained: bool,
    model_args: dict[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """timm's build of `variant` of a host; the caller's kwargs win over the variant's model_args."""
    args = {**model_args, **kwargs}
    depths = args.get("depths")
    indices = min(3, args.get("depth", 12)) if depths is None else tuple(range(len(depths)))
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": indices, "feature_cls": StageFeatures if depths is not None else "getter"},
        **args,
    )


def host_checkpoint(
    state_dict: dict[str, Any], model: Any, renames: Sequence[tuple[str, str]], drop: Sequence[str] = ()
) -> dict[str, Any]:
    """A published checkpoint for a hosted model: parameters of mixers found, position tables of other sizes resampled.

    renames: (last part of a published name under attn or attns.i, where it lies in ours).
    drop: endings of stored buffers that are rebuilt here.
    """
    fitted = {}
    own = model.state_dict()
    for name, value in unwrap_checkpoint(state_dict).items():
        if name.endswith(("relative_position_index", "attn_mask", *drop)):
            continue
        if name not in own:
            for published, ours in renames:
                head, found, tail = name.rpartition("." + published)
                if found and head + ours + tail in own:
                    name = head + ours + tail
                    break
        fitted[name] = value
    for name, (grid, num_prefix) in model.position_tables().items():
        table = fitted.get(name)
        if isinstance(table, Tensor) and table.ndim == 3 and table.shape[1] != num_prefix + grid[0] * grid[1]:
            fitted[name] = resample_map(table, square_side(table.shape[1] - num_prefix), grid, num_prefix)
    for prefix, module in model.named_modules():
        if isinstance(module, Mixer):
            _fit_mixer(fitted, prefix, module)
    return fitted


def _fit_mixer(state: dict[str, Any], prefix: str, module: Any) -> None:
    """Bring each table of one mixer in `state` to the size that it has in the model."""
    for name, parameter in module.named_parameters():
        given = state.get(f"{prefix}.{name}")
        if not isinstance(given, Tensor) or given.shape == parameter.shape:
            continue
        if name == "rel_pos.relative_position_bias_table" and given.shape[1] == parameter.shape[1]:
            state[f"{prefix}.{name}"] = resize_rel_pos_bias_table(given, module.rel_pos.window_size, parameter.shape)
        elif name.endswith("_bias") and given.ndim == parameter.ndim == 5:
            state[f"{prefix}.{name}"] = resample_axes(given, parameter.shape)


def resample_axes(table: Tensor, shape: Sequence[int]) -> Tensor:
    """`table` brought to `shape`, linearly along the axes that differ."""
    for axis, (old, new) in enumerate(zip(table.shape, shape)):
        if old != new:
            moved = table.movedim(axis, -1)
            flat = F.interpolate(moved.reshape(1, -1, old), size=new, mode="linear")
            table = flat.reshape(*moved.shape[:-1], new).movedim(-1, axis)
    return table
