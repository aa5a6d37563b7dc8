"""FLARE: attention through a few learned latents, which collect from all tokens and are read by all tokens.

Paper: "FLARE: Fast Low-rank Attention Routing Engine", Puri et al., 2025, arXiv:2508.12594
Code: https://github.com/vpuri3/FLARE.py (pdebench/models/flare.py), licence not verified; written here from the
formulas (shared/specs/backbones.md, section 10), with their defaults looked up. Parameter names are the authors'. The
mathematics is `attnzoo.kernels.pooled_attention` with the keys as queries:

    z = softmax(s latents . keys) values,    out = softmax(s keys . latents) z,    s = attn_scale, 1.0 by default

There is no query projection, and keys and values come from residual MLPs. `FlareAttention` is the layer, also for
timm's VisionTransformer, `FlareBlock` the pre-norm block and `FlareModel` the authors' model of functions on point
clouds.

`latent_q` is a parameter [dim, num_latents] whose memory is read as [heads, num_latents, head_dim], without a
transpose, as the authors' checkpoints have it.

Differences from the authors' code: the scores can't be asked for (theirs ignore attn_scale on that path), and a
`key_mask` leaves padding out of what the latents collect. Outputs are reproduced as they are; there is no `compat`
switch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads, refuse_attn_drop
from attnzoo.errors import UnsupportedError, check_choice, check_range
from attnzoo.kernels import pooled_attention

__all__ = ["FlareAttention", "FlareBlock", "FlareModel", "ResidualMLP"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": lambda: nn.GELU(approximate="tanh"), "silu": nn.SiLU}


class ResidualMLP(nn.Module):
    """Linear and activation, num_layers of x + activation(Linear(x)), Linear; first and last with a residual if asked.

    Args:
        in_dim, hidden_dim, out_dim: channels.
        num_layers: hidden layers between the first and the last; -1 for one Linear alone.
        input_residual: x + activation(first(x)), where in_dim is hidden_dim.
        output_residual: x + last(x), where hidden_dim is out_dim. One Linear alone takes both to have a residual.
        act: "gelu" (tanh's approximation) or "silu".
        bias: of every Linear.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        num_layers: int = 2,
        *,
        input_residual: bool = False,
        output_residual: bool = False,
        act: str = "gelu",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_range("num_layers", num_layers, -1)
        check_choice("act", act, _ACTIVATIONS)
        dd = {"bias": bias, "device": device, "dtype": dtype}
        self.num_layers = num_layers
        if num_layers == -1:
            self.fc = nn.Linear(in_dim, out_dim, **dd)
            self.residual = input_residual and output_residual and in_dim == out_dim
            return
        self.act = _ACTIVATIONS[act]()
        self.fc1 = nn.Linear(in_dim, hidden_dim, **dd)
        self.fcs = nn.ModuleList([nn.Linear(hidden_dim, hidden_dim, **dd) for _ in range(num_layers)])
        self.fc2 = nn.Linear(hidden_dim, out_dim, **dd)
        self.input_residual = input_residual and in_dim == hidden_dim
        self.output_residual = output_residual and hidden_dim == out_dim

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        if self.num_layers == -1:
            return x + self.fc(x) if self.residual else self.fc(x)
        hidden = self.act(self.fc1(x))
        x = x + hidden if self.input_residual else hidden
        for fc in self.fcs:
            x = x + self.act(fc(x))
        return x + self.fc2(x) if self.output_residual else self.fc2(x)


class FlareAttention(nn.Module):
    """FLARE's token mixer on [B, *grid, dim]; also an `attn_layer` for timm's VisionTransformer, whose class token then
    is a token like any other:

        timm.create_model("vit_small_patch16_224", attn_layer=as_attn_layer(FlareAttention, num_latents=49))

    Args:
        dim, num_heads: channels and heads.
        qkv_bias: bias of the layers of both MLPs. proj_bias: of the output projection.
        qk_norm: a `norm_layer` over each head's latents and keys.
        scale_norm: must be False, attn_drop 0.0 (UnsupportedError otherwise).
        proj_drop: dropout after the output projection.
        norm_layer: called with head_dim; None for LayerNorm with eps 1e-5.
        num_latents: latents of every head.
        attn_scale: scale of both softmaxes' products.
        num_layers_k_proj, num_layers_v_proj: of the MLPs of keys and values, see ResidualMLP.
        k_proj_mlp_ratio, v_proj_mlp_ratio: their hidden widths over dim.
        act: see ResidualMLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        num_latents: int = 32,
        attn_scale: float = 1.0,
        num_layers_k_proj: int = 3,
        num_layers_v_proj: int = 3,
        k_proj_mlp_ratio: float = 1.0,
        v_proj_mlp_ratio: float = 1.0,
        act: str = "gelu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        refuse_attn_drop(attn_drop)
        if scale_norm:
            raise UnsupportedError(f"scale_norm must be False, got {scale_norm!r}: FLARE has no such norm")
        check_range("num_latents", num_latents, 1)
        if not attn_scale > 0:
            raise ValueError(f"attn_scale must be above 0, got {attn_scale!r}")
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.num_latents = num_latents
        self.attn_scale = attn_scale
        self.latent_q = nn.Parameter(torch.empty(dim, num_latents, **dd))
        if not self.latent_q.is_meta:
            nn.init.normal_(self.latent_q, std=0.1)
        norm = norm_layer or nn.LayerNorm
        self.q_norm = norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        residual = {"input_residual": True, "output_residual": True, "act": act, "bias": qkv_bias, **dd}
        self.k_proj = ResidualMLP(dim, int(dim * k_proj_mlp_ratio), dim, num_layers_k_proj, **residual)
        self.v_proj = ResidualMLP(dim, int(dim * v_proj_mlp_ratio), dim, num_layers_v_proj, **residual)
        self.out_proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, *grid, dim] -> [B, *grid, dim]. key_mask: [B or 1, tokens] bool, False for tokens that are padding.

        attn_mask and is_causal are what timm passes, and refused: latents mix all tokens.
        """
        if attn_mask is not None or is_causal:
            raise UnsupportedError("attn_mask must be None and is_causal False: latents mix all tokens (use key_mask)")
        key = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_heads, self.head_dim)))
        value = self.v_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        latents = self.q_norm(self.latent_q.view(self.num_heads, self.num_latents, self.head_dim))
        out = pooled_attention(
            key, key, value, latents.transpose(0, 1)[None].to(key.dtype), self.attn_scale, key_mask=key_mask
        )
        return self.proj_drop(self.out_proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_latents={self.num_latents}, attn_scale={self.attn_scale}"


class FlareBlock(nn.Module):
    """x + att(norm1(x)), then x + mlp(norm2(x)), on [B, *grid, dim]; the MLP is a ResidualMLP.

    Args:
        dim, num_heads: as for FlareAttention.
        num_layers_ffn, ffn_mlp_ratio: of the MLP.
        norm_layer: of both norms, and of the latents and keys where attention has them.
        act: of all MLPs.
        attn_options: further arguments of FlareAttention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_layers_ffn: int = 3,
        ffn_mlp_ratio: float = 1.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act: str = "gelu",
        attn_options: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.att = FlareAttention(dim, num_heads, norm_layer=norm_layer, act=act, **(attn_options or {}), **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = ResidualMLP(
            dim,
            int(dim * ffn_mlp_ratio),
            dim,
            num_layers_ffn,
            input_residual=True,
            output_residual=True,
            act=act,
            **dd,
        )

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = x + self.att(self.norm1(x), key_mask=key_mask)
        return x + self.mlp(self.norm2(x))


class FlareModel(nn.Module):
    """The authors' model of functions on point clouds and meshes: an MLP in, blocks, norm and an MLP out.

    Args:
        in_dim, out_dim: channels of a point as it comes in and goes out.
        dim, num_heads, num_blocks: of the blocks; num_heads None is dim // 8.
        num_layers_in_out_proj: hidden layers of the MLPs in and out.
        out_proj_norm: a norm before the MLP out.
        norm_layer: of every norm, called with a channel count.
        act, num_layers_ffn, ffn_mlp_ratio, attn_options: see FlareBlock.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dim: int = 64,
        num_blocks: int = 8,
        num_heads: int | None = None,
        *,
        num_layers_in_out_proj: int = 2,
        out_proj_norm: bool = True,
        num_layers_ffn: int = 3,
        ffn_mlp_ratio: float = 1.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act: str = "gelu",
        attn_options: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_range("num_blocks", num_blocks, 0)
        self.in_proj = ResidualMLP(in_dim, dim, dim, num_layers_in_out_proj, output_residual=True, act=act, **dd)
        self.blocks = nn.ModuleList(
            [
                FlareBlock(
                    dim,
                    dim // 8 if num_heads is None else num_heads,
                    num_layers_ffn=num_layers_ffn,
                    ffn_mlp_ratio=ffn_mlp_ratio,
                    norm_layer=norm_layer,
                    act=act,
                    attn_options=attn_options,
                    **dd,
                )
                for _ in range(num_blocks)
            ]
        )
        self.out_proj = nn.Sequential(
            norm_layer(dim, **dd) if out_proj_norm else nn.Identity(),
            ResidualMLP(dim, dim, out_dim, num_layers_in_out_proj, input_residual=True, act=act, **dd),
        )
        self.apply(_init_weights)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Points [B, N, in_dim] -> [B, N, out_dim]. key_mask: [B or 1, N] bool, False for points that are padding."""
        x = self.in_proj(x)
        for block in self.blocks:
            x = block(x, key_mask)
        return self.out_proj(x)


def _init_weights(module: nn.Module) -> None:
    """The authors' initialisation: Linear weights ~ normal (std 0.02), biases 0."""
    if isinstance(module, nn.Linear) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
