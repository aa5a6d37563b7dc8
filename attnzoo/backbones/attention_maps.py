"""Attention of a model on one image, looked at: per-head weights of a layer, and their rollout through all layers.

Rollout: "Quantifying Attention Flow in Transformers", Abnar and Zuidema, 2020, https://arxiv.org/abs/2005.00928,
section 3: with A_l the weights of layer l averaged over heads, R is the product over layers of r I + (1 - r) A_l, where
r = 0.5 stands for the residual stream. Between the stages of a pyramid, which that paper does not have, a token is the
mean of the 2 x 2 tokens that it covers (the overlap of 3 x 3 convolutions is left out).

Both say where weights point, not why the model decides as it does: values, MLPs and output projections are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import NeighborhoodAttention2D
from attnzoo.backbones.blocks.staged import StagedTransformer
from attnzoo.backbones.hosts.mixers import Size
from attnzoo.backbones.hosts.swin import WindowAttention, shift_mask, to_windows
from attnzoo.backbones.hosts.vit import TokenAttention
from attnzoo.backbones.nat_isotropic import NATIsotropic, RelPosAttention2D
from attnzoo.errors import UnsupportedError, check_choice, check_range, check_tensor

__all__ = ["AttentionMap", "attention_maps", "attention_rollout", "rollout"]

FUSIONS = ("mean", "max", "min")


@dataclass(frozen=True)
class AttentionMap:
    """Weights between the tokens of two maps.

    weights: [heads, queries, keys], rows sum to one; tokens are num_prefix others (a class token) and then the map's,
    row by row. query_grid, key_grid: (height, width) of the maps.
    """

    weights: Tensor
    query_grid: Size
    key_grid: Size
    num_prefix: int = 0

    def from_token(self, row: int, column: int) -> Tensor:
        """What the token at (row, column) of the queries' map reads where: [heads, key height, key width]."""
        check_range("row", row, 0, self.query_grid[0] - 1)
        check_range("column", column, 0, self.query_grid[1] - 1)
        return self._map(self.weights[:, self.num_prefix + row * self.query_grid[1] + column])

    def from_prefix(self, index: int = 0) -> Tensor:
        """What a prefix token reads where: [heads, key height, key width]. ValueError where the model has none."""
        if not 0 <= index < self.num_prefix:
            raise ValueError(f"index must be of the {self.num_prefix} prefix tokens, got {index}")
        return self._map(self.weights[:, index])

    def mean(self) -> Tensor:
        """What the queries' map reads where, the mean over its tokens: [heads, key height, key width]."""
        return self._map(self.weights[:, self.num_prefix :].mean(1))

    def _map(self, rows: Tensor) -> Tensor:
        return rows[:, self.num_prefix :].unflatten(1, self.key_grid)


def attention_maps(model: nn.Module, image: Tensor, layer: int = -1, head: int | None = None) -> AttentionMap:
    """The attention weights of one layer for one image, as the model computes them.

    Args:
        model: in eval mode, not changed: timm's VisionTransformer (DeiT and the like, `agent_deit_*` too), NAT, DiNAT,
            DiNAT_s, the isotropic models, and the Swin host (`agent_swin_*`). Windowed attention gives 0 outside of a
            window; of agent attention it is the product of its two softmaxes (its convolution of the values is no
            attention and left out).
        image: one preprocessed image, [in_chans, H, W] or [1, in_chans, H, W].
        layer: counted over all blocks of all stages; negative from the last.
        head: only this head; None for all.

    The matrix is formed: heads times tokens squared numbers, of one layer at a time.
    Raises TypeError for another kind of model, UnsupportedError (naming it) for a layer that has no weights which sum
    to one or that pads its map, ValueError for a layer or head that is not there, more than one image, training mode.
    """
    layers = _layers(model)
    check_range("layer", layer, -len(layers), len(layers) - 1)
    chosen = layers[layer]
    x, grid = _inputs(model, image, [chosen])
    found = _weights(chosen, x[0], grid)
    if head is None:
        return found
    check_range("head", head, 0, len(found.weights) - 1)
    return replace(found, weights=found.weights[head : head + 1])


def attention_rollout(
    model: nn.Module, image: Tensor, residual: float = 0.5, head_fusion: str = "mean"
) -> AttentionMap:
    """How the tokens of the last layer reach those of the first through all layers' weights; see the module's text.

    Args:
        model, image: as for `attention_maps`.
        residual: r, the share of the residual stream, 0 to 1.
        head_fusion: "mean" over heads, or "max" or "min", whose rows are brought back to a sum of one.

    Returns an AttentionMap of one head, from the last layer's map to the first's; rows sum to one.
    Raises as `attention_maps`.
    """
    check_range("residual", residual, 0.0, 1.0)
    check_choice("head_fusion", head_fusion, FUSIONS)
    layers = _layers(model)
    made: Tensor | None = None
    last: AttentionMap | None = None
    later: AttentionMap | None = None
    inputs, grid = _inputs(model, image, layers)
    for layer, x in zip(reversed(layers), reversed(inputs)):
        found = _weights(layer, x, grid)
        matrix = _step(_fused(found.weights, head_fusion), residual)
        if made is None or later is None:
            made, last = matrix, found
        else:
            if later.key_grid != found.query_grid:
                made = made @ _merging(later.key_grid, found.query_grid, made)
            made = made @ matrix
        later = found
    assert made is not None and last is not None and later is not None
    return AttentionMap(made[None], last.query_grid, later.key_grid, last.num_prefix)


def rollout(matrices: Sequence[Tensor], residual: float = 0.5) -> Tensor:
    """The product of r I + (1 - r) A over layers, first to last, each [tokens, tokens]; the last layer's rows."""
    check_range("residual", residual, 0.0, 1.0)
    if not matrices:
        raise ValueError("matrices must hold at least one layer's weights, got none")
    made = _step(matrices[0], residual)
    for matrix in matrices[1:]:
        made = _step(matrix, residual) @ made
    return made


def _step(matrix: Tensor, residual: float) -> Tensor:
    made = (1.0 - residual) * matrix
    made.diagonal().add_(residual)
    return made


def _fused(weights: Tensor, head_fusion: str) -> Tensor:
    if head_fusion == "mean":
        return weights.mean(0)
    made = weights.amax(0) if head_fusion == "max" else weights.amin(0)
    # where no key is seen by all heads nothing is left of a row: it then reads itself
    total = made.sum(-1, keepdim=True)
    return torch.where(total > 0, made / total.clamp_min(torch.finfo(made.dtype).tiny), torch.eye(len(made)).to(made))


def _merging(coarse: Size, fine: Size, like: Tensor) -> Tensor:
    """[coarse tokens, fine tokens]: every coarse token the mean of the 2 x 2 fine ones it covers (fewer at the end)."""
    axes = []
    for few, many in zip(coarse, fine):
        covered = torch.arange(many, device=like.device) // 2 == torch.arange(few, device=like.device)[:, None]
        axes.append(covered.to(like.dtype) / covered.sum(1, keepdim=True))
    return torch.einsum("rh,cw->rchw", *axes).flatten(2).flatten(0, 1)


# -- where the weights come from ---------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> list[Any]:
    """The attention modules in the order in which the model calls them."""
    if isinstance(model, VisionTransformer):
        return [block.attn for block in model.blocks]
    if isinstance(model, NATIsotropic):
        return [block.attn for block in model.layers]
    if isinstance(model, StagedTransformer):
        return [block.attn for stage in model.stages for block in stage.blocks]
    raise TypeError(
        "model must be timm's VisionTransformer, NAT, DiNAT, DiNAT_s, NATIsotropic or of the Swin host, got "
        f"{type(model).__name__}"
    )


Tokens = tuple[Size, int]  # a plain ViT's map and the number of tokens before it


def _inputs(model: Any, image: Tensor, layers: Sequence[nn.Module]) -> tuple[list[Tensor], Tokens | None]:
    """What each of `layers` is called with on `image`; the hooks are gone again, whatever happens."""
    if model.training:
        raise ValueError("model must be in eval mode, got one in training mode: call model.eval() first")
    check_tensor("image", image)
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"image must be one image, [in_chans, H, W] or [1, in_chans, H, W], got {tuple(image.shape)}")
    for layer in layers:
        if type(layer) not in _READERS:
            raise UnsupportedError(f"{type(layer).__name__} of {type(model).__name__} has no weights to show")
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[nn.Module, tuple], None]:
        return lambda _, args: seen.__setitem__(number, args[0].detach())

    handles = [layer.register_forward_pre_hook(keep(number)) for number, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            model.forward_features(image)
    finally:
        for handle in handles:
            handle.remove()
    tokens = None
    if isinstance(model, VisionTransformer):
        tokens = model.patch_embed.dynamic_feat_size(tuple(image.shape[2:])), model.num_prefix_tokens
    return [seen[number] for number in range(len(layers))], tokens


def _weights(layer: Any, x: Tensor, tokens: Tokens | None) -> AttentionMap:
    with torch.no_grad():
        found: AttentionMap = _READERS[type(layer)](layer, x)
    if tokens is None:
        return found
    grid, num_prefix = tokens
    if x.shape[1] != num_prefix + grid[0] * grid[1]:
        raise UnsupportedError(f"the layer sees {x.shape[1]} tokens, not all of the map of {grid}: it has dropped some")
    return AttentionMap(found.weights, grid, grid, num_prefix)


def _columns(attend: Callable[[Tensor], Tensor], x: Tensor, tokens: int, heads: int, dim: int) -> Tensor:
    """[B, heads, tokens, tokens] of an attention that is linear in its values: what it makes of unit values.

    attend: [B, tokens, heads, dim] -> the same; as many columns at a time as a head is wide. x: for batch and dtype.
    """
    batch = len(x)
    weights = x.new_empty(batch, heads, tokens, tokens)
    for start in range(0, tokens, dim):
        count = min(dim, tokens - start)
        unit = x.new_zeros(tokens, dim)
        unit[start : start + count, :count] = torch.eye(count).to(x)
        made = attend(unit[None, :, None].expand(batch, tokens, heads, dim).contiguous())
        weights[..., start : start + count] = made[..., :count].transpose(1, 2)
    return weights


def _neighborhood(layer: NeighborhoodAttention2D, x: Tensor) -> AttentionMap:
    query, key, _ = layer._project(x)
    grid = (x.shape[1], x.shape[2])
    if query.shape[1:3] != x.shape[1:3]:
        raise UnsupportedError(
            f"the map of {grid} is padded to {tuple(query.shape[1:3])} for its windows: use a larger image"
        )
    if isinstance(layer, RelPosAttention2D):
        bias: Any = layer.relative_position_bias(*grid).to(query.dtype)
    else:
        bias = layer.rpb

    def attend(value: Tensor) -> Tensor:
        return layer._attend(query, key, value.unflatten(1, grid), bias).reshape(value.shape)

    weights = _columns(attend, query, grid[0] * grid[1], layer.num_heads, layer.head_dim)
    return AttentionMap(weights[0], grid, grid)


def _plain(layer: Attention, x: Tensor) -> AttentionMap:
    query, key, _ = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (layer.q_norm(query) * layer.scale @ layer.k_norm(key).mT).softmax(-1)[0]
    return AttentionMap(weights, (1, x.shape[1]), (1, x.shape[1]))  # `_weights` knows the map


def _tokens(layer: TokenAttention, x: Tensor) -> AttentionMap:
    query, key, _ = layer.qkv(x).chunk(3, dim=-1)
    mixer, size = layer.mixer, layer.size

    def attend(value: Tensor) -> Tensor:
        return mixer.heads(mixer.attend(query, key, value.flatten(2), size, size))

    weights = _columns(attend, query, x.shape[1], mixer.num_heads, mixer.head_dim)
    return AttentionMap(weights[0], size, size, mixer.num_prefix)


def _windows(layer: WindowAttention, x: Tensor) -> AttentionMap:
    size = (x.shape[1], x.shape[2])
    window = layer._window(size)
    if size[0] % window[0] or size[1] % window[1]:
        raise UnsupportedError(
            f"windows of {window} do not divide the map of {size}, which is padded: use another size"
        )
    shift = tuple(layer.shift if extent < length else 0 for extent, length in zip(window, size))
    number = torch.arange(size[0] * size[1], device=x.device).view(1, *size, 1)
    x, number = (torch.roll(t, (-shift[0], -shift[1]), (1, 2)) for t in (x, number))
    mixer = layer.mixer
    mask = shift_mask(size, window, shift, x) if any(shift) and mixer.uses_mask else None  # type: ignore[arg-type]
    tokens, places = to_windows(x, window), to_windows(number, window)[..., 0]
    query, key, _ = layer.qkv(tokens).chunk(3, dim=-1)

    def attend(value: Tensor) -> Tensor:
        return mixer.heads(mixer.attend(query, key, value.flatten(2), window, window, mask))

    inside = _columns(attend, query, tokens.shape[1], mixer.num_heads, mixer.head_dim)
    whole = inside.new_zeros(mixer.num_heads, size[0] * size[1], size[0] * size[1])
    for at, weights in zip(places, inside):
        whole[:, at[:, None], at[None, :]] = weights
    return AttentionMap(whole, size, size)


_READERS: dict[type, Callable[[Any, Tensor], AttentionMap]] = {
    NeighborhoodAttention2D: _neighborhood,
    RelPosAttention2D: _neighborhood,
    Attention: _plain,
    TokenAttention: _tokens,
    WindowAttention: _windows,
}
