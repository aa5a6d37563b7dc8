"""The four-stage body that NAT, DiNAT and DiNAT_s share, with timm's model contract.

A family subclasses `StagedTransformer` and says how images become tokens, how one stage leads to the next, and under
which name its published checkpoints keep the stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import (
    NeighborhoodAttention2D,
    NeighborhoodBlock,
    drop_path_rates,
    init_weights,
)
from attnzoo.errors import check_choice, check_range, check_tensor


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

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_blocks(x)
        return x if self.downsample is None else self.downsample(x)


class TimmHead(nn.Module, ABC):
    """What timm expects of every classifier here: pooling, `head`, and the ways to change them.

    Subclasses set num_features and call `_init_head`; their `forward_features` returns [B, H, W, num_features].
    """

    output_fmt = "NHWC"
    num_features: int
    feature_info: list[dict[str, Any]]

    def _init_head(self, num_classes: int, in_chans: int, global_pool: str, drop_rate: float, dd: dict) -> None:
        check_range("num_classes", num_classes, low=0)
        check_range("drop_rate", drop_rate, 0.0, 1.0)
        check_choice("global_pool", global_pool, ("avg", ""))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.head_hidden_size = self.num_features
        self.global_pool = global_pool
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative position biases, as in the authors' training."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last Linear (Identity where num_classes is 0)."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of `num_classes` outputs (0: none), and another pooling ("avg", "" for the map) if given."""
        check_range("num_classes", num_classes, low=0)
        if global_pool is not None:
            check_choice("global_pool", global_pool, ("avg", ""))
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            parameter = next(self.parameters())
            self.head = nn.Linear(self.num_features, num_classes, device=parameter.device, dtype=parameter.dtype)
            init_weights(self.head)
        self.head.train(self.training)

    def _check_image(self, x: Tensor) -> None:
        check_tensor("x", x, ndim=4)
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x must be [batch, in_chans={self.in_chans}, height, width], got {tuple(x.shape)}")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, H, W, num_features] -> logits [B, num_classes]; with pre_logits the pooled features."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> normalised map [B, h, w, num_features]."""

    @abstractmethod
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Images -> (normalised map, list of maps), or the list; see the subclasses."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def intermediate(x: Tensor, output_fmt: str) -> Tensor:
    """A channels-last map in timm's requested layout."""
    return x.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x


class StagedTransformer(TimmHead):
    """Tokens, stages of neighborhood attention blocks, norm, mean over tokens, Linear.

    Args:
        embed_dim: channels of the first stage; each further stage has twice as many.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratio: hidden width of the MLPs over the channels.
        kernel_size: attention window, one int or (height, width).
        dilations: per stage, the dilation of each block; None is 1 everywhere (and so is a None in it).
        num_classes: 0 for no head.
        in_chans: image channels.
        global_pool: "avg", or "" to keep the map.
        rel_pos_bias, qkv_bias, scale: see NeighborhoodAttention2D.
        layer_scale: initial layer scale, None for none.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the patch embedding.
        proj_drop_rate: dropout of attention outputs and in the MLPs. (The authors' single drop_rate, 0 in every
            published model, is these last two.)
        attn_drop_rate: must be 0.0.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        norm_layer: called with a channel count.
        pad_small: pad maps smaller than kernel_size * dilation instead of refusing them; see NeighborhoodAttention2D.
            `features_only=True` turns it on by default.

    Raises ValueError for an input too small for a window, unless pad_small.
    """

    stages_name: ClassVar[str]
    patch_size: int = 4

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        kernel_size: int | tuple[int, int] = 7,
        dilations: Sequence[Sequence[int | None] | None] | None = None,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        pad_small: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        schedule = _dilation_schedule(depths, dilations)
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry per stage ({len(depths)}), got {list(num_heads)}")
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.embed_dim = embed_dim
        self.patch_embed = self._patch_embed(in_chans, embed_dim, norm_layer, dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages, self.feature_info = [], []
        for i, (heads, stage_dilations) in enumerate(zip(num_heads, schedule)):
            dim = embed_dim * 2**i
            blocks = [
                NeighborhoodBlock(
                    dim,
                    NeighborhoodAttention2D(
                        dim,
                        heads,
                        kernel_size,
                        dilation,
                        rel_pos_bias=rel_pos_bias,
                        qkv_bias=qkv_bias,
                        scale=scale,
                        attn_drop=attn_drop_rate,
                        proj_drop=proj_drop_rate,
                        pad_small=pad_small,
                        **dd,
                    ),
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=next(rates),
                    layer_scale=layer_scale,
                    norm_layer=norm_layer,
                    **dd,
                )
                for dilation in stage_dilations
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

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The final features and each stage's output.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n stages if int, all if None, else these stages.
            norm: apply the final norm to the last stage's output (no other stage has one of its width).
            stop_early: skip the stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.

        Returns (final features [B, h, w, C], list of maps), or the list.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        self._check_size(x, len(stages))
        last = len(self.stages) - 1
        intermediates = []
        x = self.pos_drop(self.patch_embed(x))
        for i, stage in enumerate(stages):
            x = stage.forward_blocks(x)
            if i in take_indices:
                intermediates.append(intermediate(self.norm(x) if norm and i == last else x, output_fmt))
            if stage.downsample is not None and i < len(stages) - 1:
                x = stage.downsample(x)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(stages) == len(self.stages) else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages `indices` do not need; returns them counted from the first."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        cut = max_index < len(self.stages) - 1
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            setattr(self, self.stages_name, self.stages[: max_index + 1])
            self.stages[-1].downsample = None
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> normalised map [B, h, w, num_features]."""
        self._check_size(x, len(self.stages))
        return self.norm(self.stages(self.pos_drop(self.patch_embed(x))))


def _dilation_schedule(
    depths: Sequence[int], dilations: Sequence[Sequence[int | None] | None] | None
) -> list[list[int]]:
    """The dilation of every block, per stage; ValueError where the lengths disagree with `depths`."""
    if not depths or min(depths) < 1:
        raise ValueError(f"depths must hold at least one stage of at least one block, got {list(depths)}")
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
