"""ShiftAddViT's attentions: linear ones on binary queries and keys, and the plain ones beside them.

Papers: "ShiftAddViT", arXiv:2306.06446; "EcoFormer" (the kernel-based hash), Liu et al., NeurIPS 2022,
arXiv:2209.09004; "Castling-ViT" (linear angular attention), You et al., CVPR 2023, arXiv:2211.10526. Definitions and
differences from the authors' code: see attnzoo/backbones/shiftadd.py.

Each is called as `attn(x, feat_size)` with tokens x [B, N, dim] of a map feat_size = (height, width), as timm's PVT v2
calls its attention; most have no use for the size. With binary queries and keys a product needs no multiplication on
hardware made for it; here `linear_attention` multiplies.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.pvt_v2 import Attention as ReducedAttention
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.backbones.blocks.shiftadd import COMPAT, no_autocast, straight_through
from attnzoo.errors import check_choice, check_range
from attnzoo.kernels import linear_attention

MakeLinear = Callable[..., nn.Module]


def _wide(x: Tensor) -> Tensor:
    """Where a threshold decides, half precision would decide otherwise: float32 (float64 stays)."""
    return x if x.dtype == torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    """x over its length; 0 where it is 0."""
    return F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)


def random_features(count: int, dim: int, device: Any = None, dtype: Any = None) -> Tensor:
    """[count, dim]: rows of random orthogonal matrices, with the lengths of normal vectors."""
    blocks = torch.randn(-(-count // dim), dim, dim, device=device)
    rows = blocks if blocks.is_meta else torch.linalg.qr(blocks).Q
    return (rows.flatten(0, 1)[:count] * torch.randn(count, dim, device=device).norm(dim=1, keepdim=True)).to(dtype)


class KernelHash(nn.Module):
    """Binary codes of unit vectors x [B, H, N, D] -> [B, H, N, nbits] of 0 and 1, by a Gaussian kernel to m anchors.

    bits = 1[A (exp(-|x - anchor|^2 / (2 sigma)) - mvec) > 0], sigma the mean squared distance over an image's tokens
    and the anchors, per head. A, mvec and anchor are buffers: `fit` makes them, gradients do not. The gradient of a bit
    is passed where the value before it is between 0 and 1.
    """

    A: Tensor
    mvec: Tensor
    anchor: Tensor

    def __init__(
        self, num_heads: int, head_dim: int, nbits: int = 16, m: int = 25, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_range("nbits", nbits, low=1)
        check_range("m", m, low=1)
        self.register_buffer("A", torch.randn(num_heads, nbits, m, **dd))
        self.register_buffer("mvec", torch.zeros(1, num_heads, 1, m, **dd))
        self.register_buffer("anchor", F.normalize(torch.randn(1, num_heads, m, head_dim, **dd), dim=-1))

    def _kernel(self, x: Tensor, anchor: Tensor) -> Tensor:
        squares = x.square().sum(-1, keepdim=True) + anchor.square().sum(-1)[..., None, :]
        distance = (squares - 2 * x @ anchor.mT).clamp_min(0)
        return torch.exp(-distance / (2 * distance.mean((-2, -1), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x):
            x = _wide(x)
            a, mvec, anchor = (t.to(x.dtype) for t in (self.A, self.mvec, self.anchor))
            y = (self._kernel(x, anchor) - mvec) @ a.mT
            return straight_through((y > 0).to(y.dtype), y.clamp(0, 1))

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        neighbours: int = 10,
        steps: int = 100,
        lr: float = 5e-4,
        momentum: float = 0.9,
        generator: torch.Generator | None = None,
    ) -> None:
        """Learn the codes from unit vectors x [B, H, N, D]: alike for each one's nearest `neighbours`, unlike for its
        farthest, bit after bit, each by `steps` of gradient descent and kept only if it serves better than before.

        Anchors are random tokens of the first image. Needs N x N numbers per head of every image.
        """
        tokens, m = x.shape[2], self.anchor.shape[2]
        if tokens < max(m, 2 * neighbours):
            raise ValueError(
                f"x must have at least m={m} and 2 * neighbours={2 * neighbours} tokens to fit a hash, got {tokens}: "
                "give larger images"
            )
        x = _wide(x)
        chosen = torch.randperm(tokens, generator=generator)[:m].to(x.device)
        anchor = x[:1, :, chosen]
        kernel = self._kernel(x, anchor)
        mvec = kernel.mean((0, 2), keepdim=True)
        kernel = kernel - mvec
        likeness = x @ x.mT
        wanted = torch.zeros_like(likeness)
        wanted.scatter_(-1, likeness.topk(neighbours).indices, 1.0)
        wanted.scatter_(-1, likeness.topk(neighbours, largest=False).indices, -1.0)
        nbits = self.A.shape[1]
        wanted *= nbits
        codes = self.A.to(x.dtype)

        def loss(code: Tensor) -> Tensor:  # code [B, H, N]
            return -(code.unsqueeze(-2) @ wanted @ code.unsqueeze(-1)).mean() / (tokens * nbits)

        for bit in range(nbits):
            old = codes[:, bit]
            with torch.enable_grad():
                new = old.clone().requires_grad_()
                optimiser = torch.optim.SGD([new], lr=lr, momentum=momentum, nesterov=momentum > 0)
                for _ in range(steps):
                    optimiser.zero_grad()
                    loss(2 * (kernel @ new[..., None]).squeeze(-1).sigmoid() - 1).backward()
                    optimiser.step()
            before, after = (
                torch.where((kernel @ a[..., None]).squeeze(-1) > 0, 1.0, -1.0) for a in (old, new.detach())
            )
            before, after = before.to(x.dtype), after.to(x.dtype)
            if loss(after) < loss(before):
                codes = torch.cat([codes[:, :bit], new.detach()[:, None], codes[:, bit + 1 :]], dim=1)
                before = after
            wanted = wanted - before[..., None] * before[..., None, :]
        for buffer, value in ((self.A, codes), (self.mvec, mvec), (self.anchor, anchor)):
            buffer.copy_(value)


class HashedKeys(nn.Module):
    """A `KernelHash` under the authors' names, with the random matrix that their checkpoints hold and nobody uses."""

    def __init__(
        self, num_heads: int, head_dim: int, nbits: int, m: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        count = max(1, int(head_dim * math.log(head_dim)))
        self.register_buffer("projection_matrix", random_features(count, head_dim, device, dtype))
        self.ksh = KernelHash(num_heads, head_dim, nbits, m, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.ksh(_unit(_wide(x)))


@torch.no_grad()
def fit_hashes(model: nn.Module, images: Tensor, **options: Any) -> None:
    """Fit every `KernelHash` of `model` on what it sees of `images`, in the order in which they are reached.

    The authors' code does this by itself in the first forward pass of every process, also after loading a checkpoint.
    options: those of `KernelHash.fit`. Changes the model's buffers: not for use beside other threads that run it.
    """
    hashes = [module for module in model.modules() if isinstance(module, KernelHash)]
    if not hashes:
        raise ValueError(f"model must hold a KernelHash, got a {type(model).__name__} without one")
    handles = [h.register_forward_pre_hook(lambda module, inputs: module.fit(inputs[0], **options)) for h in hashes]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


class ShiftAddAttention(nn.Module, ABC):
    """Base of the attentions: heads, proj. `linear` makes their projections (nn.Linear or a mixture)."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        *,
        linear: MakeLinear = nn.Linear,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.dd = {"device": device, "dtype": dtype}
        self._projections(dim, qkv_bias, linear)
        self.proj = linear(dim, dim, **self.dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _projections(self, dim: int, bias: bool, linear: MakeLinear) -> None:
        """Shared queries and keys, and values; others override it."""
        self.to_qk = linear(dim, dim, bias=bias, **self.dd)
        self.to_v = linear(dim, dim, bias=bias, **self.dd)

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, heads, head_dim]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    @abstractmethod
    def _mix(self, x: Tensor) -> Tensor:
        """Tokens -> mixed values [B, N, heads, head_dim]."""

    def forward(self, x: Tensor, feat_size: Any = None) -> Tensor:
        return self.proj_drop(self.proj(self._mix(x).flatten(2)))


class FullAttention(ShiftAddAttention):
    """ "msa": softmax attention."""

    def _projections(self, dim: int, bias: bool, linear: MakeLinear) -> None:
        self.qkv = linear(dim, 3 * dim, bias=bias, **self.dd)

    def _mix(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class SharedAttention(ShiftAddAttention):
    """ "msa_share_qk": softmax attention whose keys are the queries."""

    def _mix(self, x: Tensor) -> Tensor:
        qk, v = (self._split(t).transpose(1, 2) for t in (self.to_qk(x), self.to_v(x)))
        return F.scaled_dot_product_attention(qk, qk, v).transpose(1, 2)


class PlainLinearAttention(ShiftAddAttention):
    """ "linear": head_dim^-0.5 q (k^T v), without any normaliser."""

    def _projections(self, dim: int, bias: bool, linear: MakeLinear) -> None:
        self.q = linear(dim, dim, bias=bias, **self.dd)
        self.kv = linear(dim, 2 * dim, bias=bias, **self.dd)

    def _mix(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        return linear_attention(self._split(self.q(x)), k, v)


def biased_attention(qk: Tensor, v: Tensor, bias: float) -> Tensor:
    """(qk (qk^T v) + bias v) / (qk . sum qk + N bias), over [B, N, heads, ...].

    A weighted mean of values with weights qk_i . qk_j, but for the bias: it is added to every weight in the
    denominator, and in the numerator to a token's own value only.
    """
    qk, v = _wide(qk), _wide(v)
    with no_autocast(v):
        total = (qk * qk.sum(1, keepdim=True)).sum(-1, keepdim=True) + qk.shape[1] * bias
        return (linear_attention(qk, qk, v, scale=1.0) + bias * v) / total


class EcoformerAttention(ShiftAddAttention):
    """ "ecoformer": hashed keys, which are the queries too, and `biased_attention` with bias nbits + 1."""

    def __init__(self, *args: Any, nbits: int = 16, m: int = 25, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nbits = nbits
        self.fast_attention = HashedKeys(self.num_heads, self.head_dim, nbits, m, **self.dd)

    def _mix(self, x: Tensor) -> Tensor:
        bits = self.fast_attention(self._split(self.to_qk(x)).transpose(1, 2)).transpose(1, 2)
        return biased_attention(bits, self._split(self.to_v(x)), self.nbits + 1)


class BinaryFeatures(nn.Module):
    """sign(f - mean f) of softmax kernel features f (Performer's), [B, N, H, D] -> [B, N, H, num_features].

    The mean is an image's own; over the whole batch with compat="official".
    """

    projection_matrix: Tensor

    def __init__(self, head_dim: int, num_features: int, compat: str, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.compat = compat
        self.register_buffer("projection_matrix", random_features(num_features, head_dim, device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        over = (0, 1, 2, 3) if self.compat == "official" else (1, 2, 3)
        with no_autocast(x):
            x = _wide(x) * x.shape[-1] ** -0.25
            matrix = self.projection_matrix.to(x.dtype)
            logits = x @ matrix.mT
            shifted = logits - logits.amax(over, keepdim=True) - x.square().sum(-1, keepdim=True) / 2
            features = len(matrix) ** -0.5 * (shifted.exp() + 1e-4)
            return straight_through((features - features.mean(over, keepdim=True)).sign(), features.clamp(-1, 1))


class BinaryPerformerAttention(ShiftAddAttention):
    """ "performer_binary": `BinaryFeatures` and `biased_attention` with bias num_features + 1."""

    def __init__(self, *args: Any, num_features: int = 256, compat: str = "default", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_choice("compat", compat, COMPAT)
        self.num_features = num_features
        self.fast_attention = BinaryFeatures(self.head_dim, num_features, compat, **self.dd)

    def _mix(self, x: Tensor) -> Tensor:
        bits = self.fast_attention(self._split(self.to_qk(x)))
        return biased_attention(bits, self._split(self.to_v(x)), self.num_features + 1)


class AngularAttention(ShiftAddAttention):
    """ "LinAngular": unit(v / 2 + b (b^T v) / pi) + dconv(v), with hashed keys b, which are the queries too.

    unit divides by the length per token and head; dconv is a filter of 9 tokens in row-major order, per head. There is
    no normaliser: with N tokens the second term grows, and unit removes its size.
    """

    def __init__(self, *args: Any, nbits: int = 16, m: int = 25, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.qk_quant = HashedKeys(self.num_heads, self.head_dim, nbits, m, **self.dd)
        self._make_filter()

    def _make_filter(self, length: int = 9) -> None:
        heads = self.num_heads
        self.dconv = nn.Conv2d(heads, heads, (length, 1), padding=(length // 2, 0), groups=heads, bias=False, **self.dd)

    def _angular(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None) -> Tensor:
        x = 0.5 * v + linear_attention(q.to(v.dtype), k.to(v.dtype), v, scale=1 / math.pi)
        x = _unit(_wide(x if extra is None else x + extra))
        return x + self.dconv(v.transpose(1, 2)).transpose(1, 2)

    def _mix(self, x: Tensor) -> Tensor:
        bits = self.qk_quant(self._split(self.to_qk(x)).transpose(1, 2)).transpose(1, 2)
        return self._angular(bits, bits, self._split(self.to_v(x)))


class BinaryAngularAttention(AngularAttention):
    """ "LinAngular_binary": `AngularAttention` on 1[unit(q) > mean unit(q)] and 1[unit(k) > mean unit(k)].

    The means are an image's own; over the whole batch with compat="official", so that an image's output depends on its
    neighbours in the batch. sparse_reg adds the entries above 0.02 of the softmax attention (not normalised again)
    times v inside unit; this needs the N x N matrix.
    """

    def __init__(self, *args: Any, sparse_reg: bool = False, compat: str = "default", **kwargs: Any) -> None:
        ShiftAddAttention.__init__(self, *args, **kwargs)
        check_choice("compat", compat, COMPAT)
        self.sparse_reg, self.compat = sparse_reg, compat
        self._make_filter()

    def _projections(self, dim: int, bias: bool, linear: MakeLinear) -> None:
        self.qkv = linear(dim, 3 * dim, bias=bias, **self.dd)

    def _bits(self, x: Tensor) -> Tensor:
        over = (0, 1, 2, 3) if self.compat == "official" else (1, 2, 3)
        x = _unit(_wide(x))
        return straight_through((x > x.mean(over, keepdim=True)).to(x.dtype), x.clamp(0, 1))

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        weights = _wide(q * self.head_dim**-0.5 @ k.mT).softmax(-1)
        return (torch.where(weights > 0.02, weights, 0.0).to(v.dtype) @ v).transpose(1, 2)

    def _mix(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        extra = self._sparse(q, k, v) if self.sparse_reg else None
        return self._angular(self._bits(q), self._bits(k), v, extra)


class SpatialReductionAttention(ReducedAttention):
    """ "sra": timm's PVT v2 attention, with projections by `linear`."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        *,
        sr_ratio: int = 1,
        linear_attn: bool = False,
        linear: MakeLinear = nn.Linear,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_heads(dim, num_heads)
        super().__init__(dim, num_heads, sr_ratio, linear_attn, qkv_bias, proj_drop=proj_drop, **dd)
        if linear is not nn.Linear:
            self.q = linear(dim, dim, bias=qkv_bias, **dd)  # type: ignore[assignment]
            self.kv = linear(dim, 2 * dim, bias=qkv_bias, **dd)  # type: ignore[assignment]
            self.proj = linear(dim, dim, **dd)  # type: ignore[assignment]

    def forward(self, x: Tensor, feat_size: Any) -> Tensor:
        side = 1 if self.sr is None else self.sr.kernel_size[0]
        if min(feat_size) < side:
            raise ValueError(
                f"feat_size must be at least {side} x {side} for sr_ratio={side}, got {tuple(feat_size)}: "
                "give larger images"
            )
        return super().forward(x, feat_size)


ATTENTIONS: dict[str, Callable[..., nn.Module]] = {
    "msa": FullAttention,
    "msa_share_qk": SharedAttention,
    "sra": SpatialReductionAttention,
    "linear": PlainLinearAttention,
    "ecoformer": EcoformerAttention,
    "performer_binary": BinaryPerformerAttention,
    "LinAngular": AngularAttention,
    "LinAngular_binary": BinaryAngularAttention,
}
