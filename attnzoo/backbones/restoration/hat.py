"""HAT, the hybrid attention transformer, for super-resolution.

Papers: "Activating More Pixels in Image Super-Resolution Transformer", Chen et al., CVPR 2023, arXiv:2205.04437, and
"HAT: Hybrid Attention Transformer for Image Restoration", Chen et al., arXiv:2309.05239
Code: https://github.com/XPixelGroup/HAT (hat/archs/hat_arch.py), Apache-2.0; written here from the formulas.

Differences from the authors' code (`compat="official"` brings back what is marked *):
- Images of any size: mirrored at the bottom and right up to multiples of the window, and cropped, inside `forward`. The
  authors' network takes multiples alone, and their test script pads so.
- Attention through scaled_dot_product_attention; the -100 of moved windows is added to the windows that need it.
- * An `upsampler` other than "pixelshuffle" is refused. There such a network computes nothing: it returns its input.
- A window whose overlap int(window_size * overlap_ratio) is odd is refused (there it fails at the first call, or
  with one image drops windows), and so is an `img_size` smaller than the window (there an index is out of range).
- `img_size` equal to the window moves no window, as there. It ties no size otherwise, but for `ape`, whose table is
  resampled for other maps (there it fails).
- `resi_connection` "3conv", which the authors' text names, does not exist there either.
- The relative position indices are buffers in the state dict, so that files go both ways. Half of OCAB's are negative
  and count from the table's end: see hat_blocks.py. Files of another window are resampled with that in mind.
- Gradient checkpointing, which the authors' flag does not do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import (
    drop_path_rates,
    init_normal,
    init_weights,
    resample_rel_pos_bias,
    unwrap_checkpoint,
)
from attnzoo.backbones.hosts.mixers import resample_map, square_side
from attnzoo.backbones.restoration.contract import Restorer, pad_reflect
from attnzoo.backbones.restoration.hat_blocks import (
    HAB,
    OCAB,
    RHAG,
    AttentionBlocks,
    Upsample,
    fit_window,
    overlap_index,
    overlap_roll,
    self_index,
    window_masks,
)
from attnzoo.backbones.restoration.registry import Entry, register
from attnzoo.errors import check_choice, check_range

RGB_MEAN = (0.4488, 0.4371, 0.4040)
_TABLE = "relative_position_bias_table"


class PatchEmbed(nn.Module):
    """The norm before the first group; the authors' name for it."""

    def __init__(self, dim: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class HAT(Restorer):
    """Images [B, in_chans, H, W] with values 0 to 1 -> [B, in_chans, upscale * H, upscale * W].

    Args:
        img_size: size of the maps trained on: one int or (height, width); see the module's text for what it does.
        in_chans: image channels; with 3 the mean colour of DIV2K is taken off.
        embed_dim: channels of the blocks.
        depths, num_heads: HABs and heads of each group.
        window_size: side of the windows.
        compress_ratio, squeeze_factor: bottlenecks of the channel attention block.
        conv_scale: weight of the channel attention block.
        overlap_ratio: by how much OCAB's key windows are larger, as a part of window_size.
        mlp_ratio, qkv_bias, scale: width of MLPs, bias of projections, scale of logits (None: head_dim ** -0.5).
        proj_drop_rate, attn_drop_rate, drop_path_rate: rates of dropout, attention dropout and stochastic depth.
        ape: add a learned absolute position embedding.
        patch_norm: norm before the first group.
        upscale: 3 or a power of two; 1 for denoising.
        img_range: what the image is multiplied with inside.
        upsampler: "pixelshuffle"; anything else with compat="official", for the identity.
        resi_connection: "1conv" or "identity", at the end of groups and of the body.
        num_feat: channels before the last convolution.
        compat: "default" or "official", see the module's text.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 64,
        in_chans: int = 3,
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window_size: int = 16,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        overlap_ratio: float = 0.5,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
        upscale: int = 2,
        img_range: float = 1.0,
        upsampler: str | None = "pixelshuffle",
        resi_connection: str = "1conv",
        num_feat: int = 64,
        compat: str = "default",
    ) -> None:
        super().__init__()
        check_choice("compat", compat, ("default", "official"))
        check_choice("resi_connection", resi_connection, ("1conv", "identity"))
        check_range("in_chans", in_chans, low=1)
        check_range("window_size", window_size, low=2)
        if upsampler != "pixelshuffle" and compat != "official":
            raise ValueError(
                f"upsampler must be 'pixelshuffle', got {upsampler!r}: the authors' network is the identity then "
                "(compat='official' brings that back)"
            )
        if len(depths) != len(num_heads):
            raise ValueError(f"num_heads must hold one entry per group ({len(depths)}), got {num_heads!r}")
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        if min(self.img_size) < window_size:
            raise ValueError(f"img_size must be at least window_size={window_size} on both axes, got {img_size!r}")
        self.in_chans, self.window_size, self.img_range = in_chans, window_size, img_range
        self.mean = RGB_MEAN if in_chans == 3 else (0.0,)
        self.identity = upsampler != "pixelshuffle"
        self.upscale = 1 if self.identity else upscale
        self.multiple = 1 if self.identity else window_size
        self.overlap = int(window_size * overlap_ratio)
        self.register_buffer("relative_position_index_SA", self_index(window_size))
        self.register_buffer("relative_position_index_OCA", overlap_index(window_size, self.overlap))

        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim, patch_norm)
        self.absolute_pos_embed: nn.Parameter | None = None
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, self.img_size[0] * self.img_size[1], embed_dim))
            init_normal(self.absolute_pos_embed)
        self.pos_drop = nn.Dropout(proj_drop_rate)

        def conv() -> nn.Module:
            return nn.Conv2d(embed_dim, embed_dim, 3, padding=1) if resi_connection == "1conv" else nn.Identity()

        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        groups = []
        for depth, heads in zip(depths, num_heads):
            blocks = []
            for i in range(depth):
                window, shift = fit_window(window_size, window_size // 2 if i % 2 else 0, self.img_size)
                blocks.append(
                    HAB(
                        embed_dim,
                        heads,
                        window,
                        shift,
                        compress_ratio,
                        squeeze_factor,
                        conv_scale,
                        mlp_ratio,
                        qkv_bias,
                        scale,
                        proj_drop_rate,
                        attn_drop_rate,
                        next(rates),
                    )
                )
            crossing = OCAB(embed_dim, heads, window_size, self.overlap, mlp_ratio, qkv_bias, scale)
            groups.append(RHAG(AttentionBlocks(blocks, crossing), conv()))
        self.layers = nn.ModuleList(groups)
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = conv()
        if not self.identity:
            self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, num_feat, 3, padding=1), nn.LeakyReLU())
            self.upsample = Upsample(upscale, num_feat)
            self.conv_last = nn.Conv2d(num_feat, in_chans, 3, padding=1)
        self.apply(init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every HAB in the backward pass instead of keeping its activations."""
        super().set_grad_checkpointing(enable)
        for group in self._groups():
            group.grad_checkpointing = enable

    def _groups(self) -> list[AttentionBlocks]:
        return [layer.residual_group for layer in self.layers]  # type: ignore[misc]

    def no_weight_decay(self) -> set[str]:
        """Position embedding and bias tables."""
        return {n for n, _ in self.named_parameters() if n.endswith((_TABLE, "absolute_pos_embed"))}

    def unused_parameters(self) -> set[str]:
        """All of them where the network is the identity, else none."""
        return {n for n, _ in self.named_parameters()} if self.identity else set()

    def reach(self) -> int | None:
        """See `Restorer`: all of the image, by CAB's means, unless conv_scale is 0."""
        if self.identity:
            return 0
        if any(block.conv_scale for group in self._groups() for block in group.blocks):  # type: ignore[union-attr]
            return None
        convs = [m for m in (self.conv_after_body, *(layer.conv for layer in self.layers)) if isinstance(m, nn.Conv2d)]
        windows = sum((len(group.blocks) + 1) * (self.window_size - 1) for group in self._groups())
        pixels = 2.0 + len(convs) + windows + len(self.layers) * (self.overlap // 2) + 1 / self.upscale
        steps = [m.upscale_factor for m in self.upsample if isinstance(m, nn.PixelShuffle)]
        return math.ceil(pixels + sum(1 / math.prod(steps[:i]) for i in range(len(steps))))

    def forward_features(self, x: Tensor) -> Tensor:
        """The body: maps [B, embed_dim, H, W] of `conv_first`, H and W multiples of the window -> the same, normed."""
        x = self.patch_embed(x.permute(0, 2, 3, 1))
        if self.absolute_pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + resample_map(self.absolute_pos_embed, self.img_size, size).unflatten(1, size)
        x = self.pos_drop(x)
        shift = self.window_size // 2 if min(self.img_size) > self.window_size else 0
        masks = window_masks(self.window_size, shift, x) if shift else None
        for layer in self.layers:
            x = layer(x, self.relative_position_index_SA, self.relative_position_index_OCA, masks)
        return self.norm(x).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] of any size -> [B, in_chans, upscale * H, upscale * W]."""
        self._check_image(x)
        height, width = x.shape[2] * self.upscale, x.shape[3] * self.upscale
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
        x = (pad_reflect(x, self.multiple) - mean) * self.img_range
        if not self.identity:
            x = self.conv_first(x)
            x = self.conv_after_body(self.forward_features(x)) + x
            x = self.conv_last(self.upsample(self.conv_before_upsample(x)))
        return x[..., :height, :width] / self.img_range + mean


def checkpoint_filter_fn(state_dict: dict[str, Any], model: HAT) -> dict[str, Any]:
    """The authors' checkpoint for `model`: bias tables of another window resampled, indices and masks made anew.

    A stored index of the model's own size with other content is another model's: ValueError.
    """
    state = unwrap_checkpoint(state_dict)
    sides = {math.isqrt(len(v)) for k, v in state.items() if k.endswith(f".attn.{_TABLE}") and isinstance(v, Tensor)}
    window = (min(sides) + 1) // 2 if sides else model.window_size
    own = {
        "relative_position_index_SA": self_index(model.window_size),
        "relative_position_index_OCA": overlap_index(model.window_size, model.overlap),
    }
    for name, index in own.items():
        stored = state.get(name)
        if not isinstance(stored, Tensor) or stored.is_floating_point() or stored.shape != index.shape:
            continue
        if not stored.is_meta and not torch.equal(stored.cpu(), index):
            raise ValueError(f"{name} of the checkpoint is not this model's: it was trained with other positions")
    fitted: dict[str, Any] = {}
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        if name in own or name.endswith((".attn_mask", ".relative_position_index")):
            continue
        wanted = parameters.get(name)
        if wanted is not None and isinstance(value, Tensor) and value.shape != wanted.shape:
            if name.endswith(_TABLE) and value.ndim == 2 and value.shape[1] == wanted.shape[1]:
                value = _resampled(value, wanted, window, model, overlapping="overlap_attn" in name)
            elif name == "absolute_pos_embed" and value.ndim == 3 and value.shape[2] == wanted.shape[2]:
                value = resample_map(value, square_side(value.shape[1]), model.img_size)
        fitted[name] = value
    return {**own, **fitted}


def _resampled(table: Tensor, wanted: Tensor, window: int, model: HAT, overlapping: bool) -> Tensor:
    """A bias table [rows, heads] of windows of `window` for the model's; OCAB's is rolled to start from 0 between."""
    old, new = math.isqrt(len(table)), math.isqrt(len(wanted))
    if old * old != len(table):
        return table  # the loader names what does not fit
    if overlapping:
        table = table.roll(overlap_roll(window, old + 1 - 2 * window), 0)
    table = resample_rel_pos_bias(table.T.unflatten(1, (old, old)), (new, new)).flatten(1).T
    return table.roll(-overlap_roll(model.window_size, model.overlap), 0) if overlapping else table


_SMALL = {"embed_dim": 144, "compress_ratio": 24, "squeeze_factor": 24}
_LARGE = {"depths": (6,) * 12, "num_heads": (6,) * 12}
_CFG = {
    "license": "apache-2.0",
    "paper_ids": ("arXiv:2205.04437", "arXiv:2309.05239"),
    "origin_url": "https://github.com/XPixelGroup/HAT",
}
_REPORT = "in the authors' table without ImageNet pre-training, multiply-adds for a 64 x 64 input"
_SIZES: dict[str, tuple[dict[str, Any], dict[int, tuple[str, ...]]]] = {
    "hat_s": (_SMALL, {s: (f"HAT-S_SRx{s}.pth",) for s in (2, 3, 4)}),
    "hat": (
        {},
        {
            2: ("HAT_SRx2.pth", "HAT_SRx2_ImageNet-pretrain.pth"),
            3: ("HAT_SRx3.pth", "HAT_SRx3_ImageNet-pretrain.pth"),
            4: (
                "HAT_SRx4.pth",
                "HAT_SRx4_ImageNet-pretrain.pth",
                "Real_HAT_GAN_SRx4.pth",
                "Real_HAT_GAN_SRx4_sharper.pth",
            ),
        },
    ),
    "hat_l": (_LARGE, {s: (f"HAT-L_SRx{s}_ImageNet-pretrain.pth",) for s in (2, 3, 4)}),
}
_PUBLISHED = {
    "hat_s_x4": (9_621_183, (f"9.6M parameters, 54.9 G, Set5 32.92 dB, Urban100 27.87 dB {_REPORT}",)),
    "hat_x4": (20_772_507, (f"20.8M parameters, 102.4 G, Set5 33.04 dB, Urban100 27.97 dB {_REPORT}",)),
}
for _size, (_arguments, _files) in _SIZES.items():
    for _scale, _names in _files.items():
        _name = f"{_size}_x{_scale}"
        _params, _notes = _PUBLISHED.get(_name, (None, ()))
        register(_name, Entry(HAT, {**_arguments, "upscale": _scale}, "hat", _names, _params, _notes, _CFG))
