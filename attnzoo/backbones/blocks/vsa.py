"""Varied-size window attention: each head of each window reads keys and values from a window of its own size and place.

Paper: "VSA: Learning Varied-Size Window Attention in Vision Transformers", Zhang et al., ECCV 2022, arXiv:2204.08446,
section 3.2. Parameter names are those of the authors' published checkpoints.

    z       = LeakyReLU_0.01(mean of the tokens of a window)
    o, s    = W_o z + b_o, W_s z + b_s                           per head, along x and y
    keys at = window's centre + (1 + s) (token - centre) + o (n - 1) / (2 windows)    in pixels, per axis of length n
    out     = softmax(scale q k(keys at)^T + B) v(keys at),      B Swin's relative position bias

read by `attnzoo.kernels.sampled_window_attention`: bilinear over the whole map, zeros beyond it. Maps that windows do
not divide are padded after the projections: the padding is zero tokens (no bias), and they are keys like any other.

Differences from the authors' code (75dc986), which `compat="official"` keeps:
- A map smaller than a window: there the offset is divided by 0 windows, and everything is NaN. Here it counts as one
  window; with compat="official" it is a ValueError that says so.
- pad="both", the detection code's module: there the offset along x is divided by the windows along y and the other way
  round, which matters for maps that are not square. Here each axis has its own.
Kept in both: windows are counted without the padding; scale is the INPUT's width over the heads ** -0.5 even where
out_dim differs; the bias is always there. Attention dropout, an argument there that does nothing, is none here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads, init_normal
from attnzoo.backbones.hosts.mixers import MIXERS, Mixer, Site, Size
from attnzoo.errors import check_choice, check_range
from attnzoo.kernels import sampled_window_attention

COMPAT = ("corrected", "official")


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """A channels-first layer on a channels-last map."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def window_bias(table: Tensor, window: int) -> Tensor:
    """Swin's table [(2 window - 1) ** 2, heads] as [heads, queries, keys] of one window, by query minus key."""
    at = torch.arange(window, device=table.device)
    apart = at[:, None] - at[None, :] + window - 1
    index = apart[:, None, :, None] * (2 * window - 1) + apart[None, :, None, :]
    return table[index.reshape(window**2, window**2)].permute(2, 0, 1)


class VariedWindows(nn.Module):
    """Where the windows go, their bias, and the attention; projections are the subclass's or the host's.

    Args:
        dim: channels of the tokens that decide where the windows go.
        num_heads: heads.
        window_size: side of the windows.
        pad: "end" pads maps at the bottom and right, "both" on all sides (the detection code).
        compat: "corrected" or "official", see above.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        *,
        pad: str = "end",
        compat: str = "corrected",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_range("window_size", window_size, low=1)
        check_choice("pad", pad, ("end", "both"))
        check_choice("compat", compat, COMPAT)
        self.num_heads = num_heads
        self.window_size = window_size
        self.pad = pad
        self.compat = compat
        self.sampling_offsets, self.sampling_scales = (
            nn.Sequential(nn.AvgPool2d(window_size), nn.LeakyReLU(0.01), nn.Conv2d(dim, 2 * num_heads, 1, **dd))
            for _ in range(2)
        )
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads, **dd))
        init_normal(self.relative_position_bias_table)

    def padding(self, size: Size) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) that make a map of `size` divisible by windows."""
        more = [-n % self.window_size for n in size]
        before = [n // 2 if self.pad == "both" else 0 for n in more]
        return before[1], more[1] - before[1], before[0], more[0] - before[0]

    def _counts(self, size: Size) -> Size:
        """The windows (down, across) that offsets are divided by."""
        down, across = (n // self.window_size for n in size)
        if self.compat == "official":
            if not (down and across):
                raise ValueError(
                    f"x is a map of {size[0]} x {size[1]}, smaller than window_size {self.window_size}: with "
                    'compat="official" the result is NaN; use compat="corrected", a larger image or smaller windows'
                )
            if self.pad == "both":
                return across, down
        return max(down, 1), max(across, 1)

    def positions(self, x: Tensor) -> Tensor:
        """Where each window and head of the map x [B, H, W, dim] reads: [B, down, across, heads, window ** 2, 2], y
        and x in pixels of the padded map, in float32 or better."""
        size = (x.shape[1], x.shape[2])
        window, counts = self.window_size, self._counts(size)
        padded = F.pad(x.permute(0, 3, 1, 2), self.padding(size))
        pooled = F.leaky_relu(F.avg_pool2d(padded, window), 0.01)  # once for both networks
        # [B, heads * (x, y), down, across] -> [B, down, across, heads, 1, (y, x)]
        offsets, scales = (
            net(pooled).unflatten(1, (self.num_heads, 2)).permute(0, 3, 4, 1, 2).flip(-1)[..., None, :]
            for net in (self.sampling_offsets[2], self.sampling_scales[2])
        )
        dtype = torch.promote_types(offsets.dtype, torch.float32)
        inner = torch.arange(window, device=x.device, dtype=dtype) - (window - 1) / 2
        inside = torch.stack(torch.meshgrid(inner, inner, indexing="ij"), -1).flatten(0, 1)
        middles = [
            torch.arange(n, device=x.device, dtype=dtype) * window + (window - 1) / 2 for n in offsets.shape[1:3]
        ]
        middle = torch.stack(torch.meshgrid(*middles, indexing="ij"), -1)[:, :, None, None]
        # An offset of 1 is half the map over the windows, as in coordinates of -1 .. 1 over the map.
        # Products of tensors and whole numbers only: a compiled graph can't hold every fraction of dynamic sizes.
        lengths = padded.shape[2:]
        offset = torch.stack(
            [o * (n - 1) / (2 * count) for o, n, count in zip(offsets.to(dtype).unbind(-1), lengths, counts)], -1
        )
        return middle + inside * (1 + scales.to(dtype)) + offset

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, scale: float) -> Tensor:
        """Attention of maps [B, H, W, heads, head_dim] in windows placed by x [B, H, W, dim]: [B, H, W, heads * hd]."""
        height, width = x.shape[1:3]
        left, right, top, bottom = self.padding((height, width))
        if left or right or top or bottom:
            query, key, value = (F.pad(t, (0, 0, 0, 0, left, right, top, bottom)) for t in (query, key, value))
        bias = window_bias(self.relative_position_bias_table, self.window_size)
        out = sampled_window_attention(query, key, value, self.positions(x), self.window_size, scale, bias=bias)
        return out[:, top : top + height, left : left + width].flatten(3)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, pad={self.pad!r}, compat={self.compat!r}"


class VSA(VariedWindows):
    """Varied-size window attention with its projections, on maps [B, H, W, dim] -> [B, H, W, out_dim].

    Args, beyond those of `VariedWindows`:
        out_dim: channels of queries, keys, values and the output; None for dim.
        qkv_bias: bias of the projections.
        scale: of the logits, None for (dim // num_heads) ** -0.5.
        proj_drop: dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        *,
        out_dim: int | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        pad: str = "end",
        compat: str = "corrected",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        out_dim = dim if out_dim is None else out_dim
        head_dim = check_heads(out_dim, num_heads)
        super().__init__(dim, num_heads, window_size, pad=pad, compat=compat, **dd)
        self.head_dim = head_dim
        self.scale = max(dim // num_heads, 1) ** -0.5 if scale is None else scale
        self.qkv = nn.Conv2d(dim, 3 * out_dim, 1, bias=qkv_bias, **dd)
        self.proj = nn.Conv2d(out_dim, out_dim, 1, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, out_dim]."""
        query, key, value = channels_first(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        out = self.attend(query, key, value, x, self.scale)
        return self.proj_drop(channels_first(self.proj, out))


class VSAMixer(Mixer):
    """VSA between a host's projections. It cuts the windows itself and needs the whole map; masks do not apply.

    window: side of the windows. The other arguments are `VariedWindows`'s.
    """

    whole_map = True

    def __init__(self, site: Site, window: int = 7, pad: str = "end", compat: str = "corrected") -> None:
        super().__init__(site)
        if site.num_prefix:
            raise ValueError(f"VSA needs tokens of a map only, got {site.num_prefix} before them (a class token)")
        self.windows = VariedWindows(site.dim, site.num_heads, window, pad=pad, compat=compat, **site.dd)

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
        if size != key_size:
            raise ValueError(f"VSA needs keys on the queries' map, got queries on {size} and keys on {key_size}")
        query, key, value = (self.heads(t).unflatten(1, size) for t in (query, key, value))
        return self.windows.attend(query, key, value, context.unflatten(1, size), self.head_dim**-0.5).flatten(1, 2)


def fit_bias_tables(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """`state` with the bias tables of other windows resampled to those of `model`."""
    fitted = dict(state)
    for prefix, module in model.named_modules():
        if not isinstance(module, VariedWindows):
            continue
        name, own = f"{prefix}.relative_position_bias_table", module.relative_position_bias_table
        table = fitted.get(name)
        if isinstance(table, Tensor) and table.shape != own.shape and table.shape[1:] == own.shape[1:]:
            window = (module.window_size, module.window_size)
            fitted[name] = resize_rel_pos_bias_table(table, window, own.shape)
    return fitted


MIXERS["vsa"] = VSAMixer
