"""The CSwin host: stripes in two directions on two halves of the channels, with a mixer in each stripe.

Paper: "CSWin Transformer", Dong et al., CVPR 2022, arXiv:2107.00652. A block projects once; half of the channels is cut
into full-height stripes, the other half into full-width ones, and a depthwise 3 x 3 convolution of the values (`get_v`)
is added inside each stripe. A block whose stripes span the map has one branch of all channels. Differences from the
authors' code: maps that stripes do not divide are zero-padded at the right and bottom after the norm, as in CSWin's
segmentation code, so that images need not be square or multiples of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from timm.models import checkpoint_seq
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import LeveledModel
from attnzoo.backbones.blocks.neighborhood import Mlp, drop_path_rates, init_weights, refuse_attn_drop
from attnzoo.backbones.blocks.staged import check_depths
from attnzoo.backbones.hosts.mixers import Factory, Site, Size, attn_schedule, check_pinned, make_mixer
from attnzoo.backbones.hosts.swin import from_windows, to_windows
from attnzoo.errors import check_range


class StripeAttention(nn.Module):
    """One branch: query, key, value maps [B, H, W, dim] in stripes, a mixer in each, plus the local convolution.

    extent: (height, width) of a stripe, None along the axes that it spans.
    """

    def __init__(self, site: Site, mixer: nn.Module, extent: tuple[int | None, int | None]) -> None:
        super().__init__()
        self.extent = extent
        self.get_v = nn.Conv2d(site.dim, site.dim, 3, padding=1, groups=site.dim, **site.dd)
        self.mixer: Any = mixer

    def window(self, size: Size) -> Size:
        """The stripe on a map of `size`."""
        return self.extent[0] or size[0], self.extent[1] or size[1]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: Tensor) -> Tensor:
        size: Size = tuple(query.shape[1:3])  # type: ignore[assignment]
        window = self.window(size)
        q, k, v = (to_windows(t, window) for t in (query, key, value))
        local = self.get_v(v.transpose(1, 2).unflatten(2, window)).flatten(2).transpose(1, 2)
        return from_windows(self.mixer(q, k, v, window, window, context) + local, window, size)


class CSwinBlock(nn.Module):
    """Pre-norm block on maps [B, H, W, dim]: qkv, one or two branches of stripes, proj; then the MLP.

    split: stripes' width, None for the whole map. single: one branch of all channels.
    """

    def __init__(
        self,
        dim: int,
        size: Size,
        num_heads: int,
        make: Callable[[Site], nn.Module],
        split: int | None,
        single: bool,
        *,
        stage: int = 0,
        block: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.split = None if single else split
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.norm1 = norm_layer(dim, **dd)
        extents: list[tuple[int | None, int | None]] = [(None, None)] if single else [(None, split), (split, None)]
        self.attns = nn.ModuleList()
        for extent in extents:
            window = (extent[0] or size[0], extent[1] or size[1])
            branch = len(extents)
            site = Site(dim // branch, num_heads // branch, window, window, stage, block, local_conv=False, dd=dd)
            self.attns.append(StripeAttention(site, make(site), extent))
        self.proj = nn.Linear(dim, dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)

    def _branches(self) -> Any:
        return self.attns

    def set_size(self, size: Size, split: int | None) -> None:
        """Resample what is tied to a size, for maps of `size` and stripes of `split`."""
        if len(self.attns) == 2:
            self.split = split
        for attn in self._branches():
            attn.extent = tuple(split if extent else None for extent in attn.extent)
            attn.mixer.set_size(attn.window(size), attn.window(size))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        normed = self.norm1(x)
        below, right = (0, 0) if self.split is None else (-height % self.split, -width % self.split)
        if below or right:
            normed = F.pad(normed, (0, 0, 0, right, 0, below))
        branches = self.qkv(normed).unflatten(-1, (3, len(self.attns), -1)).unbind(4)
        contexts = x.flatten(1, 2).chunk(len(self.attns), dim=-1)
        out = [attn(*b.unbind(3), context) for attn, b, context in zip(self.attns, branches, contexts)]
        mixed = torch.cat(out, dim=-1)[:, :height, :width]
        x = x + self.drop_path(self.proj(mixed))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ChannelsLast(nn.Module):
    """[B, C, H, W] -> [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class MergeBlock(nn.Module):
    """3 x 3 convolution of stride 2, norm: [B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), dim_out]."""

    def __init__(self, dim: int, dim_out: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 3, 2, 1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim_out, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class CSwin(LeveledModel):
    """CSwin Transformer.

    Args:
        img_size: what windows are cut for at construction; one int or (height, width).
        embed_dim: channels of the first stage, doubled by each further one.
        depths, num_heads: per stage; two-branch blocks give half of the heads to each branch.
        split_sizes: per letter of attn_type, the width of stripes per stage; None for the whole map. The last stage
            always has one branch that spans the map.
        attn_type, mixers: which block has which mixer, see hosts/mixers.py.
        mlp_ratio, qkv_bias, num_classes, in_chans, global_pool, drop_rate, proj_drop_rate (in the MLPs),
            drop_path_rate, norm_layer: as for StagedTransformer. attn_drop_rate must be 0.0.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        *,
        split_sizes: Mapping[str, Sequence[int | str | None]],
        attn_type: str,
        mixers: Mapping[str, str | Factory],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_depths(depths)
        refuse_attn_drop(attn_drop_rate)
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry per stage ({len(depths)}), got {list(num_heads)}")
        self._schedule = attn_schedule(attn_type, depths, mixers)
        self._splits = {letter: [None if s is None else int(s) for s in given] for letter, given in split_sizes.items()}
        self.img_size: Size = to_2tuple(img_size)
        self.depths = tuple(depths)
        self.embed_dim = embed_dim
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.grad_checkpointing = False
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, 4, 2, **dd), ChannelsLast(), nn.LayerNorm(embed_dim, **dd)
        )
        self.feature_info = []
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, depth in enumerate(depths):
            dim, size = embed_dim * 2**i, self.grid(i)
            blocks = []
            for j in range(depth):
                letter = self._schedule[i][j]
                split = self._splits[letter][i]
                single = i == len(depths) - 1 or split is None or split >= max(size)
                make = _maker(mixers, letter)
                blocks.append(
                    CSwinBlock(
                        dim,
                        size,
                        num_heads[i],
                        make,
                        split,
                        single,
                        stage=i,
                        block=j,
                        mlp_ratio=mlp_ratio,
                        qkv_bias=qkv_bias,
                        proj_drop=proj_drop_rate,
                        drop_path=next(rates),
                        norm_layer=norm_layer,
                        **dd,
                    )
                )
            setattr(self, f"stage{i + 1}", nn.Sequential(*blocks))
            if i < len(depths) - 1:
                setattr(self, f"merge{i + 1}", MergeBlock(dim, 2 * dim, **dd))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stage{i + 1}"})
        self.norm = norm_layer(self.num_features, **dd)
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.apply(init_weights)

    def grid(self, i: int) -> Size:
        """The map of stage i at img_size."""
        height, width = ((side - 3) // 4 + 1 for side in self.img_size)
        for _ in range(i):
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    def position_tables(self) -> dict[str, tuple[Size, int]]:
        """Position embeddings: none."""
        return {}

    def _stage(self, i: int) -> Any:
        return getattr(self, f"stage{i + 1}")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Bias tables."""
        return {n for n, _ in self.named_parameters() if n.endswith("_bias")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one group per block (coarse: per stage)."""
        blocks = [(r"^stage(\d+)\.(\d+)", None), (r"^merge(\d+)", (99999,))]
        return {"stem": r"^stage1_conv_embed", "blocks": r"^(?:stage|merge)(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def set_input_size(
        self, img_size: int | Size, split_sizes: Mapping[str, Sequence[int | None]] | None = None
    ) -> None:
        """Take images of another size: biases are resampled. Blocks of one branch keep spanning the map.

        split_sizes: new stripes per letter and stage for the blocks of two branches; None keeps them.
        """
        self.img_size = to_2tuple(img_size)
        if split_sizes is not None:
            self._splits = {letter: list(given) for letter, given in split_sizes.items()}
        for i in range(self.num_levels):
            for letter, block in zip(self._schedule[i], self._stage(i)):
                block.set_size(self.grid(i), self._splits[letter][i])

    def _check_size(self, x: Tensor, num_levels: int) -> None:
        self._check_image(x)
        if min(x.shape[2:]) < 3:
            raise ValueError(f"x must be at least 3 x 3, got {x.shape[2]} x {x.shape[3]}")
        check_pinned(x, self.img_size, self)

    @property
    def num_levels(self) -> int:
        return len(self.depths)

    def _enter(self, i: int, x: Tensor) -> Tensor:
        return self.stage1_conv_embed(x) if i == 0 else getattr(self, f"merge{i}")(x)

    def _level(self, i: int, x: Tensor) -> Tensor:
        return checkpoint_seq(self._stage(i), x) if self.grad_checkpointing else self._stage(i)(x)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _keep_levels(self, count: int) -> None:
        for i in range(count, self.num_levels):
            delattr(self, f"stage{i + 1}")
            delattr(self, f"merge{i}")
        self.depths = self.depths[:count]


def _maker(mixers: Mapping[str, str | Factory], letter: str) -> Callable[[Site], nn.Module]:
    return lambda site: make_mixer(mixers, letter, site)
