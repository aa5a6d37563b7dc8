"""MoH-DiT: a diffusion transformer whose attention heads are mixed per token. No classifier, so no timm model.

Paper: "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin et al., 2024, https://arxiv.org/abs/2410.11842;
DiT: Peebles and Xie, ICCV 2023, arXiv:2212.09748.
Code: https://github.com/SkyworkAI/MoH (MoH-DiT/models.py), Apache-2.0, after facebookresearch/DiT, CC BY-NC 4.0;
written here from the formulas. Parameter names are the authors'.

    model = moh_dit("moh_dit_xl_2_90"); model.load_state_dict(published)

Differences from the authors' code (`compat="official"` brings back what is marked *):
- * head_dim counts where num_heads is one number (ignored there).
- shared_head None is plain attention in every block (the class's default crashes there); a single shared head works.
- latents need not be square; their size is `input_size`.
- the load balancing loss: blocks/mixture_of_heads.py, `balance_losses`.
The sinusoids of the timesteps are computed in float32 as there, in every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, GELUTanh, Mlp, PatchEmbed, to_2tuple
from torch import Tensor, nn

from attnzoo.backbones.blocks.mixture_of_heads import MoHAttention
from attnzoo.errors import check_choice, check_range, check_tensor

__all__ = ["MOH_DIT", "MoHDiT", "moh_dit"]


class TimestepEmbedder(nn.Module):
    """Timesteps [B] -> cosines and sines of `frequencies` / 2 geometric frequencies -> two Linears: [B, dim]."""

    def __init__(self, dim: int, frequencies: int = 256, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim, **dd), nn.SiLU(), nn.Linear(dim, dim, **dd))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.dtype))


class LabelEmbedder(nn.Module):
    """Class labels [B] -> [B, dim]; with dropout > 0 there is one row more, the unconditional class num_classes."""

    def __init__(self, num_classes: int, dim: int, dropout: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), dim, device=device, dtype=dtype)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, both [B, dim], for every token."""
    return x * (1 + scale[:, None]) + shift[:, None]


class MoHDiTBlock(nn.Module):
    """DiT's block (adaLN-zero) around `attn`: tokens [B, N, dim] and condition [B, dim] -> tokens."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float = 4.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=GELUTanh, **dd)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, **dd))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Norm, modulation, Linear to patches."""

    def __init__(self, dim: int, out_features: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_features, **dd)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, **dd))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class MoHDiT(nn.Module):
    """DiT with mixed heads: latents [B, C, H, W], timesteps [B], labels [B] -> [B, C or 2 C, H, W].

    Args:
        input_size: of the latents, one int or (height, width), multiples of patch_size.
        patch_size, in_channels: of the latents.
        hidden_size, depth, mlp_ratio: width, blocks, hidden width of the MLPs over it.
        num_heads, shared_head, routed_head, head_dim: one value, or one per block; see MoHAttention.
            shared_head None: plain attention.
        class_dropout_prob: how often labels are dropped in training; above 0 there is an unconditional class.
        num_classes: of the labels.
        learn_sigma: predict the variance, too.
        compat: "default" or "official", see the module.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int | Sequence[int] = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        shared_head: int | Sequence[int] | None = None,
        routed_head: int | Sequence[int] = 0,
        head_dim: int | None | Sequence[int | None] = None,
        *,
        compat: str = "default",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_choice("compat", compat, ("default", "official"))
        check_range("class_dropout_prob", class_dropout_prob, 0.0, 1.0)
        check_range("depth", depth, low=1)
        self.input_size: tuple[int, int] = to_2tuple(input_size)
        if any(side % patch_size for side in self.input_size):
            raise ValueError(f"input_size must be a multiple of patch_size={patch_size}, got {input_size}")
        if compat == "official" and isinstance(num_heads, int):
            head_dim = None
        self.patch_size, self.in_channels = patch_size, in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size, **dd)
        self.t_embedder = TimestepEmbedder(hidden_size, **dd)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob, **dd)
        table = torch.empty(1, self.x_embedder.num_patches, hidden_size, **dd)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        heads = _per_block("num_heads", num_heads, depth)
        widths = _per_block("head_dim", head_dim, depth)
        routed = _per_block("routed_head", routed_head, depth)
        shared = None if shared_head is None else _per_block("shared_head", shared_head, depth)
        blocks = []
        for i in range(depth):
            attn: nn.Module
            if shared is None:
                attn = Attention(hidden_size, heads[i], widths[i], qkv_bias=True, **dd)
            else:
                attn = MoHAttention(hidden_size, heads[i], shared[i], routed[i], widths[i], qkv_bias=True, **dd)
            blocks.append(MoHDiTBlock(hidden_size, attn, mlp_ratio, **dd))
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * self.out_channels, **dd)
        if not table.is_meta:
            self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        rows, columns = self.x_embedder.grid_size
        with torch.no_grad():
            self.pos_embed.copy_(sincos_position(self.pos_embed.shape[-1], rows, columns)[None])
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        for name, parameter in self.named_parameters():
            if name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer") or name == "x_embedder.proj.bias":
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_tensor("x", x, 4)
        if tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            raise ValueError(f"x must be [batch, {self.in_channels}, {self.input_size}], got {tuple(x.shape)}")
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self._unpatchify(self.final_layer(x, c))

    def _unpatchify(self, x: Tensor) -> Tensor:
        """[B, N, p * p * channels] -> [B, channels, H, W]."""
        rows, columns = self.x_embedder.grid_size
        p = self.patch_size
        x = x.reshape(-1, rows, columns, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, self.out_channels, rows * p, columns * p)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, channels: int = 3) -> Tensor:
        """Classifier-free guidance: the first half of the batch is conditional, the second (same latents)
        unconditional. Only the first `channels` channels are guided, as published."""
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        conditional, unconditional = out[:, :channels].chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)


def _per_block(name: str, value: Any, depth: int) -> list[Any]:
    if not isinstance(value, Sequence):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"{name} must be one value or one per block ({depth}), got {len(value)}")
    return list(value)


def sincos_position(dim: int, rows: int, columns: int) -> Tensor:
    """Sines and cosines of the column in the first half of the channels, of the row in the second: [tokens, dim]."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [at.flatten().double()[:, None] * omega for at in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


def _stages(*runs: tuple[int, int, int, int]) -> dict[str, list[int]]:
    """(blocks, heads, shared, routed) runs as one list each."""
    columns = {"num_heads": 1, "shared_head": 2, "routed_head": 3}
    return {name: [run[at] for run in runs for _ in range(run[0])] for name, at in columns.items()}


MOH_DIT: dict[str, dict[str, Any]] = {
    "moh_dit_xl_2_90": {
        "hidden_size": 1152,
        "depth": 28,
        "head_dim": 72,
        **_stages((9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3)),
    },
    "moh_dit_xl_2_75": {
        "hidden_size": 1152,
        "depth": 28,
        "head_dim": 72,
        **_stages((9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2)),
    },
    "moh_dit_l_2_90": {
        "hidden_size": 1024,
        "depth": 24,
        "head_dim": 64,
        **_stages((8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3)),
    },
    "moh_dit_l_2_75": {
        "hidden_size": 1024,
        "depth": 24,
        "head_dim": 64,
        **_stages((8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4)),
    },
    "moh_dit_b_2_90": {
        "hidden_size": 768,
        "depth": 12,
        **_stages((5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0)),
    },
    "moh_dit_b_2_75": {
        "hidden_size": 768,
        "depth": 12,
        **_stages((2, 12, 4, 2), (8, 12, 6, 3), (2, 12, 12, 0)),
    },
    "moh_dit_s_2_90": {"hidden_size": 384, "depth": 12, **_stages((8, 6, 3, 2), (4, 6, 6, 0))},
    "moh_dit_s_2_75": {
        "hidden_size": 384,
        "depth": 12,
        **_stages((2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0)),
    },
}


def moh_dit(name: str, **kwargs: Any) -> MoHDiT:
    """The published model `name`, one of MOH_DIT; the caller's arguments win."""
    check_choice("name", name, MOH_DIT)
    return MoHDiT(**{**MOH_DIT[name], **kwargs})
