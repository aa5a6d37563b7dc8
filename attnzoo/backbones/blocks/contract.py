"""timm's contract for a classifier, written once: the head, and models whose maps can be asked for.

`TimmHead` is pooling, classifier and the ways to change them. `LeveledModel` adds what walks over levels (the stages
of a pyramid, the blocks of an isotropic model): `forward_features`, `forward_intermediates`,
`prune_intermediate_layers`. A family says how level i is entered and what it computes, and inherits the rest. Plain
ViTs use timm's own `VisionTransformer` instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import init_weights
from attnzoo.errors import check_choice, check_range, check_tensor

__all__ = ["CheckedImages", "LeveledModel", "StageFeatures", "TimmHead", "check_images", "intermediate"]


def check_images(x: Any, in_chans: int) -> None:
    """Raise TypeError or ValueError unless x is a floating-point [batch, in_chans, height, width] with pixels in it."""
    check_tensor("x", x, ndim=4)
    if x.shape[1] != in_chans or not x.shape[2] or not x.shape[3]:
        raise ValueError(f"x must be [batch, in_chans={in_chans}, height, width], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}: scale and normalise the pixels first")


class CheckedImages:
    """Put before a timm model among the bases: its images are checked by name before anything runs."""

    in_chans: int

    def _check_image(self, x: Tensor) -> None:
        check_images(x, self.in_chans)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's."""
        self._check_image(x)
        return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's."""
        self._check_image(x)
        return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]


class StageFeatures(FeatureGetterNet):
    """timm's `features_only` model for backbones of stages.

    `out_indices` count stages from 0, as in timm. Indices from 1 to the number of stages that hold the latter, such as
    (1, 2, 3, 4) of a model with four, count the stem as 0, as timm's ResNets have it and as transformers' DETR models
    ask for by default (DetrConfig(backbone="dinat_tiny", use_timm_backbone=True)): the same stages, told by
    `feature_info`.
    """

    def __init__(self, model: Any, out_indices: Any = 4, *args: Any, **kwargs: Any) -> None:
        stages = len(model.feature_info)
        if not isinstance(out_indices, int) and max(out_indices, default=-1) == stages and min(out_indices) >= 1:
            out_indices = tuple(index - 1 for index in out_indices)
        super().__init__(model, out_indices, *args, **kwargs)


class TimmHead(nn.Module, ABC):
    """What timm expects of every classifier here: pooling, the last Linear, and the ways to change them.

    Subclasses set num_features and call `_init_head`; their `forward_features` returns a map in `output_fmt`,
    [B, H, W, num_features] or [B, num_features, H, W]. `head_name` is the published checkpoints' name of the Linear,
    `pool_choices` those of global_pool.
    """

    output_fmt: ClassVar[str] = "NHWC"
    head_name: ClassVar[str] = "head"
    pool_choices: ClassVar[tuple[str, ...]] = ("avg", "")
    num_features: int
    feature_info: list[dict[str, Any]]

    def _init_head(self, num_classes: int, in_chans: int, global_pool: str, drop_rate: float, dd: dict) -> None:
        check_range("num_classes", num_classes, low=0)
        check_range("drop_rate", drop_rate, 0.0, 1.0)
        check_choice("global_pool", global_pool, self.pool_choices)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.head_hidden_size = self.num_features
        self.global_pool = global_pool
        self.head_drop = nn.Dropout(drop_rate)
        setattr(self, self.head_name, self._classifier(num_classes, dd))

    def _classifier(self, num_classes: int, dd: dict) -> nn.Module:
        """The last layer for `num_classes`, nothing for 0."""
        return nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative position biases and position embeddings, as in the authors' training."""
        ends = (".rpb", "relative_position_bias_table", "pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last Linear (Identity where num_classes is 0)."""
        return getattr(self, self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of `num_classes` outputs (0: none), and another pooling ("avg", "" for the map) if given."""
        check_range("num_classes", num_classes, low=0)
        if global_pool is not None:
            check_choice("global_pool", global_pool, self.pool_choices)
            self.global_pool = global_pool
        self.num_classes = num_classes
        parameter = next(self.parameters())
        head = self._classifier(num_classes, {"device": parameter.device, "dtype": parameter.dtype})
        head.apply(init_weights)
        setattr(self, self.head_name, head.train(self.training))

    def _check_image(self, x: Tensor) -> None:
        check_images(x, self.in_chans)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` -> logits [B, num_classes]; with pre_logits the pooled features.

        Without pooling the Linear acts on every token of a channels-last map.
        """
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2) if self.output_fmt == "NHWC" else (2, 3))
        elif self.output_fmt == "NCHW" and not pre_logits:
            x = x.permute(0, 2, 3, 1)
        x = self.head_drop(x)
        return x if pre_logits else self.get_classifier()(x)

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> normalised map in output_fmt."""

    @abstractmethod
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Images -> (normalised map, list of maps), or the list; see the subclasses."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def intermediate(x: Tensor, output_fmt: str, given_fmt: str = "NHWC") -> Tensor:
    """A map in timm's requested layout."""
    if output_fmt == given_fmt:
        return x
    return x.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x.permute(0, 2, 3, 1).contiguous()


class LeveledModel(TimmHead):
    """A model that goes through levels, each with a map that can be asked for.

    Subclasses implement the methods marked abstract, and set `feature_info` with one entry per level.
    """

    norm: nn.Module

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """Stages of a pyramid, or blocks of an isotropic model."""

    @abstractmethod
    def _enter(self, i: int, x: Tensor) -> Tensor:
        """What leads to level i: the stem on images for i = 0, else the layer between levels i - 1 and i."""

    @abstractmethod
    def _level(self, i: int, x: Tensor) -> Tensor:
        """Level i itself; gradient checkpointing happens here."""

    @abstractmethod
    def _finish(self, x: Tensor) -> Tensor:
        """The final norm, on the last level's map."""

    @abstractmethod
    def _keep_levels(self, count: int) -> None:
        """Drop all levels from `count` on."""

    def _check_size(self, x: Tensor, num_levels: int) -> None:
        """Raise ValueError for an image that the first `num_levels` levels can't take; called before anything runs."""
        self._check_image(x)

    def _normed(self, i: int, x: Tensor) -> Tensor:
        """The map of level i under the final norm, where it has the width for it: the last level's."""
        return self._finish(x) if i == self.num_levels - 1 else x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> normalised map in output_fmt."""
        self._check_size(x, self.num_levels)
        for i in range(self.num_levels):
            x = self._level(i, self._enter(i, x))
        return self._finish(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The final features and each level's output.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n levels if int, all if None, else these levels.
            norm: apply the final norm to the maps that have its width (a pyramid's last, every one of an isotropic
                model).
            stop_early: skip the levels after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.

        Returns (final features as of forward_features, list of maps), or the list.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        take_indices, max_index = feature_take_indices(self.num_levels, indices)
        count = max_index + 1 if stop_early else self.num_levels
        self._check_size(x, count)
        intermediates = []
        for i in range(count):
            x = self._level(i, self._enter(i, x))
            if i in take_indices:
                taken = self._normed(i, x) if norm else x
                intermediates.append(intermediate(taken, output_fmt, self.output_fmt))
        if intermediates_only:
            return intermediates
        return (self._finish(x) if count == self.num_levels else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the levels `indices` do not need; returns them counted from the first."""
        take_indices, max_index = feature_take_indices(self.num_levels, indices)
        width = self.feature_info[max_index]["num_chs"]
        cut, narrower = max_index < self.num_levels - 1, width != self.feature_info[-1]["num_chs"]
        if cut:
            self._keep_levels(max_index + 1)
            self.num_features = self.head_hidden_size = width
        if prune_norm or narrower:
            self._drop_final_norm()
        if prune_head or narrower:
            self.reset_classifier(0, "")
        return take_indices

    def _drop_final_norm(self) -> None:
        self.norm = nn.Identity()
