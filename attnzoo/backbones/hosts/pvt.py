"""The PVT host: a pyramid of whole maps, keys and values at a reduced resolution, with a mixer in every block.

Paper: "Pyramid Vision Transformer", Wang et al., ICCV 2021, arXiv:2102.12122. No final norm: mean over the last map.
Strides that do not divide a map drop its last rows and columns, as in the authors' code. Difference from it: a position
embedding is resampled wherever the map is not the one that it was made for. (The authors compare the map with the first
stage's at every stage, so that at twice the size the second stage's stays unresampled and the model fails.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Format, to_2tuple
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.models import checkpoint_seq
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import LeveledModel
from attnzoo.backbones.blocks.neighborhood import (
    NeighborhoodBlock,
    drop_path_rates,
    init_normal,
    init_weights,
    refuse_attn_drop,
)
from attnzoo.backbones.blocks.staged import check_depths
from attnzoo.backbones.hosts.mixers import Factory, Site, Size, attn_schedule, check_pinned, make_mixer, resample_map
from attnzoo.errors import check_range

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class ReducedAttention(nn.Module):
    """Queries of a map [B, H, W, dim], keys and values of its sr_ratio times smaller convolution, a mixer, proj."""

    def __init__(
        self, site: Site, mixer: nn.Module, sr_ratio: int = 1, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.sr_ratio = sr_ratio
        dim, dd = site.dim, site.dd
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, **dd) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, **dd) if sr_ratio > 1 else None
        self.mixer: Any = mixer
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def key_size(self, size: Size) -> Size:
        """The keys' map for queries on `size`."""
        return size[0] // self.sr_ratio, size[1] // self.sr_ratio

    def set_size(self, size: Size) -> None:
        """Resample what is tied to a size."""
        self.mixer.set_size(size, self.key_size(size))

    def forward(self, x: Tensor) -> Tensor:
        size: Size = tuple(x.shape[1:3])  # type: ignore[assignment]
        reduced = x
        if self.sr is not None and self.norm is not None:
            reduced = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        k, v = self.kv(reduced).flatten(1, 2).chunk(2, dim=-1)
        tokens = x.flatten(1, 2)
        out = self.mixer(self.q(tokens), k, v, size, self.key_size(size), tokens)
        return self.proj_drop(self.proj(out)).unflatten(1, size)


class PVT(LeveledModel):
    """Pyramid Vision Transformer.

    Args:
        img_size: what the position embeddings are made for; one int or (height, width).
        patch_size: side of the first patches; further stages halve the map.
        embed_dims, depths, num_heads, mlp_ratios: per stage.
        sr_ratios: per letter of attn_type, the reduction of keys and values per stage.
        attn_type, mixers: which block has which mixer, see hosts/mixers.py.
        qkv_bias: bias of the projections.
        num_classes, in_chans, global_pool, drop_rate, proj_drop_rate, pos_drop_rate, drop_path_rate: as for
            StagedTransformer. attn_drop_rate must be 0.0.
        norm_layer: the blocks' norm, called with a channel count.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        *,
        sr_ratios: Mapping[str, Sequence[int | str]],
        attn_type: str,
        mixers: Mapping[str, str | Factory],
        qkv_bias: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_depths(depths)
        refuse_attn_drop(attn_drop_rate)
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        stages = len(depths)
        for name, given in (("embed_dims", embed_dims), ("num_heads", num_heads), ("mlp_ratios", mlp_ratios)):
            if len(given) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), got {list(given)}")
        schedule = attn_schedule(attn_type, depths, mixers)
        self.patch_size, self.img_size = patch_size, to_2tuple(img_size)
        self.depths = tuple(depths)
        self.embed_dims = tuple(embed_dims)
        self.num_features = embed_dims[-1]
        self.grad_checkpointing = False
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.feature_info = []
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for i, dim in enumerate(embed_dims):
            size = self.grid(i)
            if min(size) < 1:
                raise ValueError(f"img_size must be at least {patch_size * 2 ** (stages - 1)}, got {img_size}")
            embed = TimmPatchEmbed(
                None,
                patch_size if i == 0 else 2,
                in_chans if i == 0 else embed_dims[i - 1],
                dim,
                norm_layer=nn.LayerNorm,
                output_fmt=Format.NHWC,
                strict_img_size=False,
                **dd,
            )
            blocks = []
            for j, letter in enumerate(schedule[i]):
                ratio = int(sr_ratios[letter][i])
                key_size = (size[0] // ratio, size[1] // ratio)
                site = Site(dim, num_heads[i], size, key_size, i, j, dd=dd)
                attn = ReducedAttention(site, make_mixer(mixers, letter, site), ratio, qkv_bias, proj_drop_rate)
                blocks.append(
                    NeighborhoodBlock(
                        dim,
                        attn,
                        mlp_ratio=mlp_ratios[i],
                        proj_drop=proj_drop_rate,
                        drop_path=next(rates),
                        norm_layer=norm_layer,
                        **dd,
                    )
                )
            table = nn.Parameter(torch.empty(1, size[0] * size[1], dim, **dd))
            init_normal(table)
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"pos_embed{i + 1}", table)
            setattr(self, f"block{i + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**i, "module": f"block{i + 1}"})
        self.norm = nn.Identity()
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.apply(init_weights)

    def grid(self, i: int, img_size: Size | None = None) -> Size:
        """The map of stage i."""
        height, width = img_size or self.img_size
        return height // self.patch_size // 2**i, width // self.patch_size // 2**i

    def position_tables(self) -> dict[str, tuple[Size, int]]:
        """Position embeddings: name -> (map, prefix tokens)."""
        return {f"pos_embed{i + 1}": (self.grid(i), 0) for i in range(self.num_levels)}

    def smallest_input(self) -> tuple[int, int]:
        """The smallest (height, width) of an image whose maps, and their keys, are not empty."""
        side = max(
            self.patch_size * 2**i * block.attn.sr_ratio for i in range(self.num_levels) for block in self._blocks(i)
        )
        return side, side

    def _blocks(self, i: int) -> Any:
        return getattr(self, f"block{i + 1}")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Position embeddings and bias tables."""
        return {n for n, _ in self.named_parameters() if n.endswith("_bias") or n.startswith("pos_embed")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one group per block (coarse: per stage)."""
        between = (r"^(?:patch_embed|pos_embed)(\d+)", (0,))
        blocks = [between, (r"^block(\d+)\.(\d+)", None)]
        return {
            "stem": r"^(?:patch_embed1|pos_embed1)",
            "blocks": r"^(?:block|patch_embed|pos_embed)(\d+)" if coarse else blocks,
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Size) -> None:
        """Take images of another size: position embeddings and biases are resampled."""
        old = [self.grid(i) for i in range(self.num_levels)]
        self.img_size = to_2tuple(img_size)
        for i in range(self.num_levels):
            table = getattr(self, f"pos_embed{i + 1}")
            resampled = resample_map(table.detach(), old[i], self.grid(i))
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(resampled, requires_grad=table.requires_grad))
            for block in self._blocks(i):
                block.attn.set_size(self.grid(i))

    def _check_size(self, x: Tensor, num_levels: int) -> None:
        self._check_image(x)
        need = self.smallest_input()[0]
        if min(x.shape[2:]) < need:
            raise ValueError(f"x must be at least {need} x {need} for the strides, got {x.shape[2]} x {x.shape[3]}")
        check_pinned(x, self.img_size, self)

    @property
    def num_levels(self) -> int:
        return len(self.depths)

    def _enter(self, i: int, x: Tensor) -> Tensor:
        x = getattr(self, f"patch_embed{i + 1}")(x if i == 0 else x.permute(0, 3, 1, 2))
        size: Size = tuple(x.shape[1:3])  # type: ignore[assignment]
        table = resample_map(getattr(self, f"pos_embed{i + 1}"), self.grid(i), size)
        return self.pos_drop(x + table.unflatten(1, size))

    def _level(self, i: int, x: Tensor) -> Tensor:
        return checkpoint_seq(self._blocks(i), x) if self.grad_checkpointing else self._blocks(i)(x)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _keep_levels(self, count: int) -> None:
        for i in range(count, self.num_levels):
            for name in ("patch_embed", "pos_embed", "block"):
                delattr(self, f"{name}{i + 1}")
        self.depths = self.depths[:count]


def stage_digits(name: str, value: str | Sequence[int], stages: int) -> list[int]:
    """'8421' or (8, 4, 2, 1) as one number per stage."""
    numbers = [int(v) for v in value]
    if len(numbers) != stages or min(numbers) < 1:
        raise ValueError(f"{name} must have one number of at least 1 per stage ({stages}), got {value!r}")
    return numbers
