"""Attention blocks put into a timm model that is there already, and taken out again.

    handle = insert(model, "triplet", where="residual")
    ...
    handle.remove()          # the model is what it was, to the bit

Parameters of the host keep their names, so its checkpoints load before and after; the blocks' own are added beneath
the modules that they follow, and train, move and save with the model.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backbones.blocks.efficient import EfficientAttention
from attnzoo.backbones.blocks.large_kernel import LargeKernelConvBlock
from attnzoo.backbones.blocks.msa_conv import MSAConv2d
from attnzoo.backbones.blocks.polarized import PolarizedParallel, PolarizedSequential
from attnzoo.backbones.blocks.triplet import TripletAttention
from attnzoo.backbones.blocks.ulsam import ULSAM

__all__ = ["BLOCKS", "Insertion", "insert"]

BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "triplet": TripletAttention,
    "ulsam": ULSAM,
    "polarized": PolarizedParallel,
    "polarized_sequential": PolarizedSequential,
    "efficient": EfficientAttention,
    "msa_conv": MSAConv2d,
    "lkca": LargeKernelConvBlock,
}


class _After:
    """A forward hook that passes a module's output through `block`, which the model holds as well (so that a deep copy
    of the model copies both, and keeps them one)."""

    def __init__(
        self, block: nn.Module, path: str, channels: int, nhwc: bool, prefix: int, grid: tuple[int, int] | None
    ) -> None:
        self.block, self.path, self.channels = block, path, channels
        self.nhwc, self.prefix, self.grid = nhwc, prefix, grid

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Tensor:
        if not isinstance(out, Tensor) or out.ndim not in (3, 4):
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.path} must give a map or tokens for an inserted block, got {found}")
        axis = 1 if out.ndim == 4 and not self.nhwc else -1
        if out.shape[axis] != self.channels:
            raise ValueError(f"{self.path} must give {self.channels} channels on axis {axis}, got {tuple(out.shape)}")
        if out.ndim == 4:
            return self.block(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.nhwc else self.block(out)
        patches = 0 if self.grid is None else self.grid[0] * self.grid[1]
        prefix = out.shape[1] - patches
        if self.grid is None or prefix not in (0, self.prefix):  # some ViTs add their class token late
            raise ValueError(
                f"{self.path} gives {out.shape[1]} tokens, which are no map of {self.grid} and {self.prefix} tokens "
                "before it: images of the size that the model is built for are needed, without dropped patches"
            )
        tokens = self.block(out[:, prefix:].mT.unflatten(-1, self.grid)).flatten(2).mT
        return torch.cat([out[:, :prefix], tokens], 1) if prefix else tokens


class Insertion:
    """What `insert` put in: `blocks` by the path they follow. `remove()`, or leaving a `with`, takes all out."""

    def __init__(self) -> None:
        self.blocks: dict[str, nn.Module] = {}
        self._undo: list[Callable[[], None]] = []

    def remove(self) -> None:
        """The model as it was; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Insertion:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def insert(
    model: nn.Module,
    block: str,
    where: str | Sequence[int] | Sequence[str] = "stages",
    *,
    channels: int | None = None,
    **kwargs: Any,
) -> Insertion:
    """Put attention blocks into `model`, in place; compile, wrap or checkpoint it afterwards.

    model: a timm model: a CNN, a pyramid, or a ViT on images of its own size (tokens are seen as a map, class and
        register tokens passed by).
    block: "triplet", "ulsam", "polarized", "polarized_sequential", "efficient", "msa_conv" or "lkca".
    where: "stages" after each level of `model.feature_info` (a stem that is a lone layer left out; a ViT's levels are
        its blocks); "residual" inside each residual block of a ResNet-like model, before the addition, in timm's slot
        for such layers; level numbers; or module names, with wildcards within a part ("layer[34].*").
    channels: of named modules that are no level of feature_info.
    kwargs: of the block (kernel_size, num_splits, num_heads, compat, ...).

    Returns an `Insertion`. Raises ValueError for names that are not there, a slot that is taken, a block that is in
    already, and, in the forward pass, for an output that is no map; then nothing was changed.
    """
    if block not in BLOCKS:
        near = difflib.get_close_matches(str(block), BLOCKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {block!r}{hint}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    places = _slots(model) if where == "residual" else _modules(model, where, channels)
    owners = {} if where == "residual" else {path: _owner(model, path, block) for path, _, _ in places}
    if taken := [path for path, (owner, name) in owners.items() if hasattr(owner, name)]:
        raise ValueError(f"block {block!r} is in already, after {', '.join(taken)}: remove it first")
    made = []
    for _, module, width in places:
        like = next(module.parameters(), None)
        like = next(model.parameters()) if like is None else like
        made.append(BLOCKS[block](width, device=like.device, dtype=like.dtype, **kwargs).train(module.training))
    handle = Insertion()
    for (path, module, width), layer in zip(places, made):
        handle.blocks[path] = layer
        undo = (
            _fill(module, layer) if where == "residual" else _follow(model, module, *owners[path], layer, path, width)
        )
        handle._undo.append(undo)
    return handle


def _owner(model: nn.Module, path: str, block: str) -> tuple[nn.Module, str]:
    """(module, name) that an inserted block is kept under: the module that it follows, or the nearest above that does
    not run all of its children."""
    parts = path.split(".")
    for count in range(len(parts), -1, -1):
        owner = _get(model, ".".join(parts[:count]))
        if not isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            below = parts[count:]
            return owner, "_".join([f"attnzoo_{block}", *below])
    raise ValueError(
        f"where names {path!r}, which lies in containers alone: insert before features_only=True wraps the model"
    )


def _follow(
    model: nn.Module, module: nn.Module, owner: nn.Module, name: str, layer: nn.Module, path: str, width: int
) -> Callable[[], None]:
    inner: Any = getattr(model, "model", model)
    embed = getattr(inner, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    after = _After(
        layer,
        path,
        width,
        getattr(inner, "output_fmt", "NCHW") == "NHWC",
        getattr(inner, "num_prefix_tokens", 0),
        None if grid is None else (int(grid[0]), int(grid[1])),
    )
    owner.add_module(name, layer)
    hook = module.register_forward_hook(after, prepend=True)  # before timm's hooks that read features

    def undo() -> None:
        hook.remove()
        delattr(owner, name)

    return undo


def _fill(module: nn.Module, layer: nn.Module) -> Callable[[], None]:
    before = module.se
    registered = "se" in module._modules
    if not registered:
        del module.se
    module.se = layer

    def undo() -> None:
        if registered:
            module.se = before
        else:
            del module.se
            module.__dict__["se"] = before

    return undo


def _slots(model: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """(path, block, channels) of each residual block with timm's slot `se` for attention."""
    found, taken = [], []
    for path, module in model.named_modules():
        if not hasattr(module, "se") or not hasattr(module, "conv2"):
            continue
        if module.se is not None and not isinstance(module.se, nn.Identity):
            taken.append(path)
            continue
        norm = getattr(module, "bn3", None) or getattr(module, "bn2", None)
        if isinstance(width := getattr(norm, "num_features", None), int):
            found.append((path, module, width))
    if taken:
        raise ValueError(
            f"where='residual' needs free slots, but {taken[0]} has {type(_get(model, taken[0]).se).__name__}"
        )
    if not found:
        raise ValueError(
            f"where='residual' needs a ResNet-like timm model (blocks with a slot `se`), got {type(model).__name__}: "
            "give 'stages', level numbers or module names"
        )
    return found


def _get(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def _levels(model: nn.Module, strict: bool = True) -> list[tuple[str, int]]:
    """(module path, channels) of each level that timm's feature_info names; not `strict`: of those that are modules."""
    info: Any = getattr(model, "feature_info", None)
    if not info:
        raise ValueError(f"where needs model.feature_info, which {type(model).__name__} lacks: give module names")
    entries = info.get_dicts() if hasattr(info, "get_dicts") else info
    names = dict(model.named_modules())
    levels = []
    for entry in entries:
        path = entry["module"]
        options = (path, path.replace(".", "_"), f"model.{path}")
        found = next((option for option in options if option in names), None)
        if found is None and not strict:
            continue
        if found is None:
            raise ValueError(f"feature_info names {path!r}, which is no module of {type(model).__name__}")
        levels.append((found, int(entry["num_chs"])))
    return levels


def _modules(
    model: nn.Module, where: str | Sequence[int] | Sequence[str], channels: int | None
) -> list[tuple[str, nn.Module, int]]:
    """(path, module that is called, channels) of each place that `where` names."""
    if isinstance(where, str) and where != "stages":
        raise ValueError(f"where must be 'stages', 'residual', or a list of levels or module names, got {where!r}")
    if where != "stages" and not where:
        raise ValueError("where must name a place, got none")
    if where == "stages":
        chosen = _levels(model, strict=False)
        lone = [not list(_get(model, path).children()) for path, _ in chosen]
        if lone and lone[0] and not all(lone):
            chosen = chosen[1:]  # a stem's activation, before the first stage
        if not chosen:
            raise ValueError(f"where='stages' finds none in feature_info of {type(model).__name__}: give module names")
    elif all(type(w) is int for w in where):
        levels = _levels(model)
        if bad := [w for w in where if not -len(levels) <= int(w) < len(levels)]:
            raise ValueError(f"where must hold levels from 0 to {len(levels) - 1}, got {bad}")
        chosen = [levels[int(w)] for w in where]
    else:
        chosen = _named(model, [str(w) for w in where], channels)
    called: dict[str, tuple[str, nn.Module, int]] = {}
    for path, width in chosen:
        module = _get(model, path)
        while type(module) is nn.Sequential and len(module):  # timm may walk over its children without calling it
            path, module = f"{path}.{list(module._modules)[-1]}", module[-1]
        called[path] = (path, module, width)
    return list(called.values())


def _matches(name: str, pattern: str) -> bool:
    """Part by part: a wildcard stands for no dot."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _named(model: nn.Module, patterns: list[str], channels: int | None) -> list[tuple[str, int]]:
    names = [name for name, _ in model.named_modules() if name]
    known = dict(_levels(model, strict=False)) if getattr(model, "feature_info", None) else {}
    chosen: list[tuple[str, int]] = []
    for pattern in patterns:
        matched = [name for name in names if _matches(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"where names {pattern!r}, which is no module of {type(model).__name__}{hint}")
        for name in matched:
            width = known.get(name, channels)
            if width is None:
                raise ValueError(f"channels must be given for {name!r}, which is no level of feature_info")
            chosen.append((name, width))
    return chosen
