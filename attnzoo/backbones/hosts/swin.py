"""The Swin host: a pyramid of windows, every other block's shifted, with a mixer in each window.

Paper: "Swin Transformer", Liu et al., ICCV 2021, arXiv:2103.14030. The body is blocks/staged.py's. Differences from the
authors' Swin (and from the code of the families that live here): images and maps of any size are zero-padded at the
right and bottom, as in Swin's detection code; windows that reach over the map shrink to it axis by axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import init_normal, refuse_attn_drop
from attnzoo.backbones.blocks.staged import PatchEmbed, PatchMerging, StagedTransformer
from attnzoo.backbones.hosts.mixers import (
    Factory,
    Mixer,
    Site,
    Size,
    SoftmaxMixer,
    attn_schedule,
    check_pinned,
    make_mixer,
    resample_map,
)
from attnzoo.errors import check_range


def to_windows(x: Tensor, window: Size) -> Tensor:
    """[B, H, W, C] -> [B * windows, h * w, C]; the windows of an image are consecutive."""
    h, w = window
    x = x.unflatten(1, (-1, h)).unflatten(3, (-1, w))
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h * w, x.shape[-1])


def from_windows(x: Tensor, window: Size, size: Size) -> Tensor:
    """The inverse of `to_windows` for a map of `size`."""
    (h, w), (rows, columns) = window, size
    x = x.reshape(-1, rows // h, columns // w, h, w, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows, columns, x.shape[-1])


def shift_mask(size: Size, window: Size, shift: Size, like: Tensor) -> Tensor:
    """-100 between tokens of a shifted map's windows that are no neighbours in the image: [windows, N, N]."""
    regions = []
    for length, extent, step in zip(size, window, shift):
        at = torch.arange(length, device=like.device)
        regions.append((at >= length - extent).long() + (at >= length - step).long() if step else torch.zeros_like(at))
    region = (3 * regions[0][:, None] + regions[1])[None, ..., None]
    region = to_windows(region, window)[..., 0]
    return ((region[:, None] != region[:, :, None]).to(like.dtype)) * -100.0


class WindowAttention(nn.Module):
    """qkv, a mixer in every window, proj, on maps [B, H, W, dim].

    window: the extent asked for; the map's where that is smaller.
    shifted: whether the windows are moved by half of `window` (along axes that they do not span).
    """

    def __init__(
        self, site: Site, mixer: nn.Module, window: int, shifted: bool, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias, **site.dd)
        self.mixer: Any = mixer
        self.proj = nn.Linear(site.dim, site.dim, **site.dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _window(self, size: Size) -> Size:
        if getattr(self.mixer, "whole_map", False):
            return size
        fixed = self.mixer.window if isinstance(self.mixer, SoftmaxMixer) else self.mixer.pinned
        return fixed or (min(self.window, size[0]), min(self.window, size[1]))

    def set_size(self, size: Size, window: int) -> None:
        """Resample what is tied to a size, for maps of `size` and windows of `window`."""
        self.window, self.shift = window, window // 2 if self.shift else 0
        inside = (min(window, size[0]), min(window, size[1]))
        self.mixer.set_size(inside, inside)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window = self._window((height, width))
        below, right = -height % window[0], -width % window[1]
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        size = (height + below, width + right)
        shift = tuple(self.shift if extent < length else 0 for extent, length in zip(window, size))
        mask = None
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
            if self.mixer.uses_mask:
                mask = shift_mask(size, window, shift, x)  # type: ignore[arg-type]
        tokens = to_windows(x, window)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        x = from_windows(self.proj(self.mixer(q, k, v, window, window, tokens, mask)), window, size)
        if any(shift):
            x = torch.roll(x, shift, (1, 2))
        return self.proj_drop(x[:, :height, :width])


class Swin(StagedTransformer):
    """Arguments as for `StagedTransformer`, and

    img_size: what the windows are cut for at construction; one int or (height, width).
    patch_size: side of the square patches.
    window_size: windows of blocks with the method's letter; None for the first stage's whole map. Blocks of other
        letters have max(7, window_size // 8), as published.
    attn_type, mixers: which block has which mixer, see hosts/mixers.py.
    qkv_bias: bias of the projections.
    ape: add a learned absolute position embedding.
    patch_norm: norm after the patch embedding.
    attn_drop_rate: must be 0.0.
    """

    stages_name = "layers"

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | None = 7,
        mlp_ratio: float = 4.0,
        *,
        attn_type: str,
        mixers: Mapping[str, str | Factory],
        qkv_bias: bool = True,
        ape: bool = False,
        patch_norm: bool = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        refuse_attn_drop(attn_drop_rate)
        check_range("patch_size", patch_size, low=1)
        self.patch_size = patch_size
        self.patch_norm = patch_norm
        schedule = attn_schedule(attn_type, depths, mixers)
        method = next(iter(mixers))
        self.img_size: Size = to_2tuple(img_size)
        windows = self._windows(window_size)

        def attention(stage: int, block: int, dim: int, heads: int) -> nn.Module:
            letter = schedule[stage][block]
            window = windows[letter == method]
            inside = tuple(min(window, extent) for extent in self._grid(stage))
            site = Site(dim, heads, inside, inside, stage, block, rel_pos_bias=True, dd=dd)  # type: ignore[arg-type]
            mixer = make_mixer(mixers, letter, site)
            return WindowAttention(site, mixer, window, block % 2 == 1, qkv_bias, proj_drop_rate)

        super().__init__(
            embed_dim,
            depths,
            num_heads,
            mlp_ratio,
            attention=attention,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
            **kwargs,
        )
        self._letters = [[letter == method for letter in row] for row in schedule]
        self._window_size = window_size
        self.absolute_pos_embed: nn.Parameter | None = None
        if ape:
            rows, columns = self._grid(0)
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, rows * columns, embed_dim, **dd))
            init_normal(self.absolute_pos_embed)

    def _grid(self, stage: int, img_size: Size | None = None) -> Size:
        """The map of a stage."""
        height, width = img_size or self.img_size
        reduction = self.patch_size * 2**stage
        return -(-height // reduction), -(-width // reduction)

    def _windows(self, window_size: int | None) -> tuple[int, int]:
        """Windows of (the plain letter, the method's letter)."""
        window = max(self._grid(0)) if window_size is None else window_size
        check_range("window_size", window, low=1)
        return max(7, window // 8), window

    def position_tables(self) -> dict[str, tuple[Size, int]]:
        """Position embeddings: name -> (map, prefix tokens)."""
        return {} if self.absolute_pos_embed is None else {"absolute_pos_embed": (self._grid(0), 0)}

    def _patch_embed(self, in_chans: int, embed_dim: int, norm_layer: Callable[..., nn.Module], dd: dict) -> nn.Module:
        return PatchEmbed(self.patch_size, in_chans, embed_dim, norm_layer if self.patch_norm else None, **dd)

    def _downsample(self, dim: int, norm_layer: Callable[..., nn.Module], dd: dict) -> nn.Module:
        return PatchMerging(dim, norm_layer, **dd)

    def _check_size(self, x: Tensor, num_levels: int) -> None:
        super()._check_size(x, num_levels)
        check_pinned(x, self.img_size, self.stages[:num_levels])

    def _enter(self, i: int, x: Tensor) -> Tensor:
        if i > 0 or self.absolute_pos_embed is None:
            return super()._enter(i, x)
        x = self.patch_embed(x)
        table = resample_map(self.absolute_pos_embed, self._grid(0), tuple(x.shape[1:3]))  # type: ignore[arg-type]
        return self.pos_drop(x + table.unflatten(1, x.shape[1:3]))

    def set_input_size(self, img_size: int | Size, window_size: int | None = None) -> None:
        """Take images of another size: position embedding and biases are resampled.

        window_size: windows of the method's blocks; None keeps them, or keeps them at the first stage's whole map where
        they are that now.
        """
        old, spans = self._grid(0), self._windows(self._window_size)[1] >= max(self._grid(0))
        self.img_size = to_2tuple(img_size)
        self._window_size = window_size or (None if spans else self._window_size)
        windows = self._windows(self._window_size)
        for i, (stage, row) in enumerate(zip(self.stages, self._letters)):
            for block, is_method in zip(stage.blocks, row):
                block.attn.set_size(self._grid(i), windows[is_method])
        if self.absolute_pos_embed is not None:
            table = resample_map(self.absolute_pos_embed.detach(), old, self._grid(0))
            self.absolute_pos_embed = nn.Parameter(table, requires_grad=self.absolute_pos_embed.requires_grad)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Position embedding and bias tables."""
        tables = {n for n, _ in self.named_parameters() if n.endswith(("_bias", "pos_embed")) and ".proj" not in n}
        return {*super().no_weight_decay(), *tables}


__all__ = ["Mixer", "Swin", "WindowAttention", "from_windows", "to_windows"]
