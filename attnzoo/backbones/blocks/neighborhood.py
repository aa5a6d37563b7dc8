"""Neighborhood attention as nn.Modules: the attention layer and the transformer block around it.

Papers: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv:2204.07143, section 3; Hassani and Shi,
"Dilated Neighborhood Attention Transformer", arXiv:2209.15001, section 3. Parameter names are those of the authors'
published checkpoints (`rpb`, `qkv`, `proj`, `gamma1`, `gamma2`).

Maps are channels-last, [batch, height, width, dim], throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from attnzoo.errors import UnsupportedError, check_range, per_axis
from attnzoo.kernels import neighborhood_attention


def check_heads(dim: int, num_heads: int) -> int:
    """The width of one head; ValueError unless `num_heads` divides `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}")
    return dim // num_heads


def refuse_attn_drop(attn_drop: float) -> None:
    """UnsupportedError for attention dropout: a fused kernel never forms the weights that would be dropped."""
    if attn_drop:
        raise UnsupportedError(
            f"attn_drop must be 0.0, got {attn_drop!r}: the fused kernels have no attention dropout, and no published "
            "model of this family was trained with it; use proj_drop or drop_path instead"
        )


def attention_received(attend: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """How much attention each token receives, summed over all queries.

    The output is linear in the values, so the gradient of its sum with respect to one value channel is the column sum
    of the attention matrix; the matrix is never formed.

    attend: value [B, *grid, heads, head_dim] -> output of the same shape, for fixed queries and keys.
    Returns [B, *grid, heads]; each head's entries sum to the number of queries.
    """
    with torch.inference_mode(False), torch.enable_grad():
        probe = torch.zeros_like(value).requires_grad_()
        (gradient,) = torch.autograd.grad(attend(probe)[..., 0].sum(), probe)
    return gradient[..., 0]


class NeighborhoodAttention2D(nn.Module):
    """Multi-head attention of every token to the `kernel_size` window around it, at `dilation`.

    At the border the window moves inward instead of shrinking. Logits are scale * q.k + rpb[head, key - query].

    Args:
        dim: channels.
        num_heads: heads; each is dim // num_heads wide.
        kernel_size: window extent, one int or (height, width).
        dilation: step between window members, one int or (height, width).
        rel_pos_bias: learn a bias by relative position, `rpb` [num_heads, 2 * height - 1, 2 * width - 1], indexed by
            key - query in dilated units (Swin's table, transposed).
        qkv_bias: bias of the query, key and value projections.
        scale: logit scale, None for head_dim ** -0.5.
        attn_drop: must be 0.0 (UnsupportedError otherwise).
        proj_drop: dropout after the output projection.
        pad_small: zero-pad a map smaller than kernel_size * dilation at its bottom and right before the projections and
            crop the output, as the authors' detection code does (the padded tokens are keys like any other);
            False raises ValueError for such a map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        *,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad_small: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        refuse_attn_drop(attn_drop)
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.kernel_size = per_axis("kernel_size", kernel_size, 2, int, low=1)
        self.dilation = per_axis("dilation", dilation, 2, int, low=1)
        self.scale = scale
        self.pad_small = pad_small
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size), **dd))
            init_normal(self.rpb)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def window(self) -> tuple[int, int]:
        """kernel_size * dilation per axis: the smallest map that holds one window."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return kh * dh, kw * dw

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, H', W', heads, head_dim] of the map x, padded where it is too small."""
        height, width = x.shape[1:3]
        below, right = max(0, self.window[0] - height), max(0, self.window[1] - width)
        if below or right:
            if not self.pad_small:
                raise ValueError(
                    f"x is a map of {height} x {width}, smaller than kernel_size {self.kernel_size} times dilation "
                    f"{self.dilation} = {self.window}: give a larger map, or build with pad_small=True"
                )
            x = F.pad(x, (0, 0, 0, right, 0, below))
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        return query, key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return neighborhood_attention(
            query, key, value, self.kernel_size, dilation=self.dilation, scale=self.scale, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        height, width = x.shape[1:3]
        x = self._attend(*self._project(x), self.rpb)
        x = x[:, :height, :width].flatten(-2)
        return self.proj_drop(self.proj(x))

    def attention_received(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention that each token of x [B, H, W, dim] receives from all queries, and what it would receive if every
        query spread its attention evenly over its window: both [B, H, W, heads], without gradient.

        The second is not 1 everywhere: windows are moved inward at the border, so tokens near it are in more of them.
        Where the map was padded, queries of the padding are counted too, as they are in the model.
        """
        height, width = x.shape[1:3]
        with torch.inference_mode(False), torch.no_grad():  # clone: what inference mode made can't be differentiated
            query, key, value = self._project(x.clone())
            bias = None if self.rpb is None else self.rpb.detach().clone()
            blank = torch.zeros_like(query)
        received = attention_received(lambda v: self._attend(query, key, v, bias), value)
        even = attention_received(lambda v: self._attend(blank, blank, v, None), value)
        return received[:, :height, :width], even[:, :height, :width]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class Mlp(nn.Module):
    """Linear, GELU, Linear, with dropout after each Linear's output."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class NeighborhoodBlock(nn.Module):
    """Pre-norm block: x + gamma1 * attn(norm1(x)), then x + gamma2 * mlp(norm2(x)), on [B, H, W, dim].

    Args:
        dim: channels.
        attn: the attention module.
        mlp_ratio: hidden width of the MLP over dim.
        proj_drop: dropout in the MLP.
        drop_path: stochastic depth rate of both branches.
        layer_scale: initial value of gamma1 and gamma2, None for a block without them.
        norm_layer: called with dim.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_range("drop_path", drop_path, 0.0, 1.0)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.gamma1: nn.Parameter | None = None
        self.gamma2: nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale), **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale), **dd))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attn(self.norm1(x))
        x = x + self.drop_path(branch if self.gamma1 is None else self.gamma1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma2 is None else self.gamma2 * branch)


def init_normal(parameter: Tensor) -> None:
    """Fill with the authors' truncated normal, std 0.02; nothing to do, and slow to trace, on the meta device."""
    if not parameter.is_meta:
        trunc_normal_(parameter, std=0.02)


def init_weights(module: nn.Module) -> None:
    """The authors' initialisation of one module: Linear weights ~ truncated normal (std 0.02), biases 0."""
    if isinstance(module, nn.Linear):
        init_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth rising linearly from 0 at the first block to `rate` at the last."""
    return [rate * i / max(1, depth - 1) for i in range(depth)]


def resample_rel_pos_bias(bias: Tensor, size: Sequence[int]) -> Tensor:
    """A relative position bias [heads, h, w] brought to [heads, *size] by bicubic interpolation.

    This is how the authors made their 11x11 checkpoints from the 7x7 ones (13 x 13 -> 21 x 21).
    """
    if tuple(bias.shape[1:]) == tuple(size):
        return bias
    resampled = F.interpolate(bias[None].float(), size=tuple(size), mode="bicubic", align_corners=False)
    return resampled[0].to(bias.dtype)


def unwrap_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a training checkpoint: its averaged weights where it has them, else its weights."""
    for entry in ("state_dict_ema", "model_ema", "params_ema", "state_dict", "model", "params"):
        if isinstance(content.get(entry), dict):
            return content[entry]
    return content


def adapt_checkpoint(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A published checkpoint made to fit `model`: taken out of the entry that it lies in (see unwrap_checkpoint), and
    every `rpb` of another window or image size resampled (see resample_rel_pos_bias).

    Nothing else is changed or dropped, so that a strict load names whatever does not fit.
    """
    fitted = dict(unwrap_checkpoint(state_dict))
    for name, parameter in model.named_parameters():
        bias = fitted.get(name)
        if name.endswith(".rpb") and isinstance(bias, Tensor) and bias.ndim == 3 and len(bias) == len(parameter):
            fitted[name] = resample_rel_pos_bias(bias, parameter.shape[1:])
    return fitted
