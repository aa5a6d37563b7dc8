"""The staged body that NAT, DiNAT, DiNAT_s and the Swin host share, with timm's model contract.

A family subclasses `StagedTransformer` and says how images become tokens, how one stage leads to the next, what the
attention of each block is, and under which name its published checkpoints keep the stages.
`NeighborhoodTransformer` has neighborhood attention.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from torch import Tensor, nn

from attnzoo.backbones.blocks.contract import LeveledModel
from attnzoo.backbones.blocks.neighborhood import (
    NeighborhoodAttention2D,
    NeighborhoodBlock,
    drop_path_rates,
    init_weights,
)
from attnzoo.errors import check_range


class Stage(nn.Module):
    """Blocks at one resolution, then the layer that leads to the next one (None in the last stage)."""

    downsample: nn.Module | None

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward_blocks(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim], at this stage's resolution."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class StagedTransformer(LeveledModel):
    """Tokens, stages of pre-norm blocks, norm, mean over tokens, Linear.

    Args:
        embed_dim: channels of the first stage; each further stage has twice as many.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratio: hidden width of the MLPs over the channels.
        attention: called with stage, block, dim, heads; returns that block's attention, [B, H, W, dim] to the same.
        num_classes: 0 for no head.
        in_chans: image channels.
        global_pool: "avg", or "" to keep the map.
        layer_scale: initial layer scale, None for none.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the patch embedding.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        norm_layer: called with a channel count.
    """

    stages_name: ClassVar[str]
    patch_size: int = 4

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        *,
        attention: Callable[[int, int, int, int], nn.Module],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_depths(depths)
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry per stage ({len(depths)}), got {list(num_heads)}")
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.embed_dim = embed_dim
        self.patch_embed = self._patch_embed(in_chans, embed_dim, norm_layer, dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages, self.feature_info = [], []
        for i, (depth, heads) in enumerate(zip(depths, num_heads)):
            dim = embed_dim * 2**i
            blocks = [
                NeighborhoodBlock(
                    dim,
                    attention(i, j, dim, heads),
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=next(rates),
                    layer_scale=layer_scale,
                    norm_layer=norm_layer,
                    **dd,
                )
                for j in range(depth)
            ]
            stages.append(Stage(blocks, self._downsample(dim, norm_layer, dd) if i < len(depths) - 1 else None))
            reduction = self.patch_size * 2**i
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"{self.stages_name}.{i}.blocks"}
            )
        setattr(self, self.stages_name, nn.Sequential(*stages))
        self.norm = norm_layer(self.num_features, **dd)
        self._init_head(num_classes, in_chans, global_pool, drop_rate, dd)
        self.apply(init_weights)

    @abstractmethod
    def _patch_embed(self, in_chans: int, embed_dim: int, norm_layer: Callable[..., nn.Module], dd: dict) -> nn.Module:
        """[B, in_chans, H, W] -> [B, ceil(H / patch_size), ceil(W / patch_size), embed_dim]."""

    @abstractmethod
    def _downsample(self, dim: int, norm_layer: Callable[..., nn.Module], dd: dict) -> nn.Module:
        """[B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), 2 * dim]."""

    @property
    def stages(self) -> Any:
        """The stages (nn.Sequential), whatever name the published checkpoints give them."""
        return getattr(self, self.stages_name)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then one group per block (coarse: per stage)."""
        name = self.stages_name
        blocks = [(rf"^{name}\.(\d+)\.blocks\.(\d+)", None), (rf"^{name}\.(\d+)\.downsample", (99999,))]
        return {"stem": r"^patch_embed", "blocks": rf"^{name}\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @property
    def num_levels(self) -> int:
        return len(self.stages)

    def _enter(self, i: int, x: Tensor) -> Tensor:
        return self.pos_drop(self.patch_embed(x)) if i == 0 else self.stages[i - 1].downsample(x)

    def _level(self, i: int, x: Tensor) -> Tensor:
        return self.stages[i].forward_blocks(x)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _keep_levels(self, count: int) -> None:
        setattr(self, self.stages_name, self.stages[:count])
        self.stages[-1].downsample = None


class NeighborhoodTransformer(StagedTransformer):
    """`StagedTransformer` (all of its arguments) with neighborhood attention, and

    kernel_size: attention window, one int or (height, width).
    dilations: per stage, the dilation of each block; None is 1 everywhere (and so is a None in it).
    rel_pos_bias, qkv_bias, scale: see NeighborhoodAttention2D.
    proj_drop_rate: dropout of attention outputs and in the MLPs. (The authors' single drop_rate, 0 in every published
        model, is this and pos_drop_rate.)
    attn_drop_rate: must be 0.0.
    pad_small: pad maps smaller than kernel_size * dilation instead of refusing them; see NeighborhoodAttention2D.
        `features_only=True` turns it on by default.

    Raises ValueError for an input too small for a window, unless pad_small.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        kernel_size: int | tuple[int, int] = 7,
        dilations: Sequence[Sequence[int | None] | None] | None = None,
        *,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        pad_small: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        schedule = _dilation_schedule(depths, dilations)

        def attention(stage: int, block: int, dim: int, heads: int) -> nn.Module:
            return NeighborhoodAttention2D(
                dim,
                heads,
                kernel_size,
                schedule[stage][block],
                rel_pos_bias=rel_pos_bias,
                qkv_bias=qkv_bias,
                scale=scale,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                pad_small=pad_small,
                device=device,
                dtype=dtype,
            )

        super().__init__(
            embed_dim,
            depths,
            num_heads,
            mlp_ratio,
            attention=attention,
            proj_drop_rate=proj_drop_rate,
            device=device,
            dtype=dtype,
            **kwargs,
        )

    def smallest_input(self) -> tuple[int, int]:
        """The smallest (height, width) of an image whose maps hold every window without padding."""
        needs = [need for i in range(len(self.stages)) for need in self._needs(i)]
        return max(h for h, _ in needs), max(w for _, w in needs)

    def _needs(self, i: int) -> list[tuple[int, int]]:
        reduction = self.patch_size * 2**i
        windows = [block.attn.window for block in self.stages[i].blocks]
        return [((h - 1) * reduction + 1, (w - 1) * reduction + 1) for h, w in windows]

    def _check_size(self, x: Tensor, num_stages: int) -> None:
        self._check_image(x)
        height, width = x.shape[2:]
        for i in range(num_stages):
            reduction = self.patch_size * 2**i
            for block, (need_h, need_w) in zip(self.stages[i].blocks, self._needs(i)):
                if (height < need_h or width < need_w) and not block.attn.pad_small:
                    rows, columns = -(-height // reduction), -(-width // reduction)
                    wanted = self.smallest_input()
                    raise ValueError(
                        f"x of {height} x {width} is too small: stage {i} sees a {rows} x {columns} map, and "
                        f"kernel_size {block.attn.kernel_size} with dilation {block.attn.dilation} needs "
                        f"{block.attn.window[0]} x {block.attn.window[1]}. Use at least {wanted[0]} x {wanted[1]}, or "
                        "build the model with pad_small=True"
                    )


def check_depths(depths: Sequence[int]) -> None:
    """ValueError unless there is a stage and each has a block."""
    if not depths or min(depths) < 1:
        raise ValueError(f"depths must hold at least one stage of at least one block, got {list(depths)}")


def _dilation_schedule(
    depths: Sequence[int], dilations: Sequence[Sequence[int | None] | None] | None
) -> list[list[int]]:
    """The dilation of every block, per stage; ValueError where the lengths disagree with `depths`."""
    check_depths(depths)
    rows = [None] * len(depths) if dilations is None else list(dilations)
    if len(rows) != len(depths):
        raise ValueError(f"dilations must have one entry per stage ({len(depths)}), got {len(rows)}: {dilations}")
    schedule = []
    for i, (depth, row) in enumerate(zip(depths, rows)):
        entries = [1] * depth if row is None else [1 if d is None else d for d in row]
        if len(entries) != depth:
            raise ValueError(f"dilations[{i}] must have one entry per block ({depth}), got {entries}")
        schedule.append(entries)
    return schedule


def alternating(depths: Sequence[int], dilations: Sequence[int]) -> list[list[int]]:
    """The published schedule: in stage i, blocks alternate between dilation 1 and dilations[i]."""
    return [[1 if j % 2 == 0 else d for j in range(depth)] for depth, d in zip(depths, dilations)]


class PatchEmbed(nn.Module):
    """One convolution of patch_size at stride patch_size, then a norm; images are zero-padded right and bottom to fit.

    [B, in_chans, H, W] -> [B, ceil(H / patch_size), ceil(W / patch_size), dim].
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        dim: int,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        below, right = -x.shape[2] % self.patch_size, -x.shape[3] % self.patch_size
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2 x 2 neighbours concatenated, norm, Linear without bias: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), 2 dim]."""

    def __init__(
        self,
        dim: int,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)
        self.norm = norm_layer(4 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        below, right = x.shape[1] % 2, x.shape[2] % 2
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        # Columns are the slower axis of the concatenation: (row, column) = (0, 0), (1, 0), (0, 1), (1, 1).
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))
