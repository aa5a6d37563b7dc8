"""Layers that multiply by powers of two only (DeepShift), and the mixture of a plain and such a layer (ShiftAddViT).

Papers: "DeepShift", Elhoushi et al., 2021, arXiv:1905.13298; "ShiftAddViT", You et al., NeurIPS 2023, arXiv:2306.06446.
Names are those of the authors' checkpoints; definitions and differences: see attnzoo/backbones/shiftadd.py.

Weights are w = sign * 2^shift. On hardware with shifters that saves multiplications; here they are ordinary products,
and so no faster than a Linear's. What the layers have learned, `weight()`, is exact in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import Mlp
from attnzoo.errors import check_choice, check_range

COMPAT = ("default", "official")
_LOG_EPS = torch.finfo(torch.float64).eps  # what the authors add before their logarithm


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Computing in x's own dtype, also under autocast; on the meta device, which has no autocast, nothing to do."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `source`."""
    return value.detach() + (source - source.detach())


def fixed_point(x: Tensor, integer_bits: int = 16, fraction_bits: int = 16) -> Tensor:
    """x rounded down to fraction_bits binary places, from -2^(integer_bits-1) to 2^(integer_bits-1) - 1.

    The gradient passes unchanged.
    """
    x = x if x.dtype == torch.float64 else x.float()
    step, bound = 2.0**fraction_bits, 2.0 ** (integer_bits - 1)
    return straight_through(((x * step).floor() / step).clamp(-bound, bound - 1), x)


def _rounded(x: Tensor, rounding: str) -> Tensor:
    if rounding == "stochastic":
        low = x.floor()
        return low + torch.bernoulli(x - low)
    return x.round()


class _Shift(nn.Module):
    """What the shift layers share: bits, bias and fixed-point inputs."""

    def __init__(self, weight_bits: int, act_integer_bits: int, act_fraction_bits: int, rounding: str) -> None:
        super().__init__()
        check_range("weight_bits", weight_bits, low=2)
        check_range("act_integer_bits", act_integer_bits, low=2)
        check_range("act_fraction_bits", act_fraction_bits, low=0)
        check_choice("rounding", rounding, ("deterministic", "stochastic"))
        self.weight_bits = weight_bits
        self.act_bits = (act_integer_bits, act_fraction_bits)
        self.rounding = rounding
        self.bias: nn.Parameter | None = None

    def _make_bias(self, bias: bool, out_features: int, fan_in: int, dd: dict[str, Any]) -> None:
        if bias:
            bound = 1 / math.sqrt(fan_in)
            self.bias = nn.Parameter(torch.empty(out_features, **dd).uniform_(-bound, bound))

    def _fixed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input and bias in fixed point."""
        return fixed_point(x, *self.act_bits), None if self.bias is None else fixed_point(self.bias, *self.act_bits)


class _ShiftAndSign(_Shift):
    """Weights of two parameters, `shift` and `sign`, each rounded ("PS" in the papers)."""

    def _make_weights(self, shape: Sequence[int], shift_range: tuple[float, float], dd: dict[str, Any]) -> None:
        self.shift = nn.Parameter(torch.empty(*shape, **dd).uniform_(*shift_range))
        self.sign = nn.Parameter(torch.empty(*shape, **dd).uniform_(-1, 1))

    @property
    def shift_range(self) -> tuple[int, int]:
        """Exponents that weight_bits can hold beside a sign of -1, 0 or 1."""
        return -(2 ** (self.weight_bits - 1) - 2), 0

    def weight(self) -> Tensor:
        """2^round(shift) * sign(round(sign)), shift clamped to its range; halves are rounded to even.

        Gradients: rounding and clamping pass them unchanged, and `sign` gets that of the weight itself, not scaled.
        """
        exponent = straight_through(_rounded(self.shift.clamp(*self.shift_range), self.rounding), self.shift)
        sign = straight_through(_rounded(self.sign, self.rounding).sign(), self.sign)
        return torch.exp2(exponent) * sign.detach() + (sign - sign.detach())

    @torch.no_grad()
    def clip_(self) -> None:
        """Bring `shift` into its range, as the authors' layer does at every call; for after an optimiser's step."""
        self.shift.clamp_(*self.shift_range)


class LinearShift(_ShiftAndSign):
    """Linear layer whose weights are powers of two by two parameters, [..., in_features] -> [..., out_features].

    Args:
        in_features, out_features, bias: a Linear's.
        weight_bits: of a weight; 5 gives exponents from -14 to 0.
        act_integer_bits, act_fraction_bits: of the fixed-point input and bias.
        rounding: "deterministic" or "stochastic", of shift and sign.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_bits: int = 5,
        act_integer_bits: int = 16,
        act_fraction_bits: int = 16,
        rounding: str = "deterministic",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(weight_bits, act_integer_bits, act_fraction_bits, rounding)
        dd = {"device": device, "dtype": dtype}
        self._make_weights((out_features, in_features), self.shift_range, dd)
        self._make_bias(bias, out_features, in_features, dd)

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self._fixed(x)
        return F.linear(x, self.weight(), bias)


class Conv2dShift(_ShiftAndSign):
    """2-d convolution whose weights are powers of two by two parameters; arguments as for Conv2d and LinearShift."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        weight_bits: int = 5,
        act_integer_bits: int = 16,
        act_fraction_bits: int = 16,
        rounding: str = "deterministic",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(weight_bits, act_integer_bits, act_fraction_bits, rounding)
        dd = {"device": device, "dtype": dtype}
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels={in_channels} and out_channels={out_channels}, got {groups}"
            )
        self.geometry = (stride, padding, dilation, groups)
        self._make_weights((out_channels, in_channels // groups, kernel_size, kernel_size), (-10.0, -1.0), dd)
        self._make_bias(bias, out_channels, in_channels // groups * kernel_size**2, dd)

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self._fixed(x)
        return F.conv2d(x, self.weight(), bias, *self.geometry)


class LinearShiftQ(_Shift):
    """Linear layer whose weights are rounded to powers of two at every call ("Q"); arguments as for LinearShift."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_bits: int = 5,
        act_integer_bits: int = 16,
        act_fraction_bits: int = 16,
        rounding: str = "deterministic",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(weight_bits, act_integer_bits, act_fraction_bits, rounding)
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **dd))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self._make_bias(bias, out_features, in_features, dd)

    @property
    def shift_range(self) -> tuple[int, int]:
        """Exponents that weight_bits can hold beside a sign of -1 or 1."""
        return -(2 ** (self.weight_bits - 1) - 1), 0

    def quantised(self) -> Tensor:
        """sign(w) * 2^round(log2 |w|), |w| brought between 2^shift_range first; 0 stays 0. Gradients pass unchanged."""
        low, high = self.shift_range
        size = self.weight.abs().clamp(2.0**low, 2.0**high)
        return straight_through(self.weight.sign() * torch.exp2(_rounded(size.log2(), self.rounding)), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self._fixed(x)
        return F.linear(x, self.quantised(), bias)


class Gate(nn.Module):
    """Which experts a token uses: [..., dim] -> gates [..., num_experts], zero but for its top_k.

    The one of top_k=1 is the constant 1, so that `gate` gets no gradient; of more, the softmax over them. Computed in
    float32 under autocast, where half precision would send some tokens elsewhere.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_range("top_k", top_k, 1, num_experts)
        self.top_k = top_k
        self.gate = nn.Linear(dim, num_experts, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x):
            logits = self.gate(x.to(self.gate.weight.dtype))
        best, chosen = logits.topk(self.top_k, dim=-1)
        weights = torch.ones_like(best) if self.top_k == 1 else best.softmax(-1)
        return torch.zeros_like(logits).scatter(-1, chosen, weights.to(logits.dtype))


class MixtureOfExperts(nn.Module):
    """sum_i gates_i(x) * experts_i(x) over tokens [..., dim].

    All experts compute all tokens (shapes then do not depend on the data): by itself the mixture saves no time.

    compat="official": log(g_e exp(y_e) + 2.2e-16) for the last expert e that the token uses, as in the authors' code:
    below about -36 outputs are clipped, above 88 they are infinite in float32, and of two experts the first is lost.
    """

    def __init__(self, gate: Gate, experts: Sequence[nn.Module], compat: str = "default") -> None:
        super().__init__()
        check_choice("compat", compat, COMPAT)
        self.compat = compat
        self.gate = gate
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x)
        outputs = [expert(x) for expert in self.experts]
        if self.compat == "official":
            combined = torch.zeros_like(outputs[0], dtype=torch.promote_types(outputs[0].dtype, torch.float32))
            for gate, out in zip(gates.unbind(-1), outputs):
                gate = gate[..., None].to(combined.dtype)
                combined = torch.where(gate != 0, gate * out.to(combined.dtype).exp(), combined)
            return (combined + _LOG_EPS).log()
        if self.gate.top_k == 1:  # selected, not multiplied: an infinite output of the other expert does no harm
            out = outputs[0]
            for gate, other in zip(gates.unbind(-1)[1:], outputs[1:]):
                out = torch.where(gate[..., None] != 0, other.to(out.dtype), out)
            return out
        return torch.stack([gate[..., None] * out for gate, out in zip(gates.unbind(-1), outputs)]).sum(0)


class MixtureLinear(MixtureOfExperts):
    """A Linear and a LinearShift, [..., d_model] -> [..., d_hidden]; every token uses top_k of them."""

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        bias: bool = True,
        top_k: int = 1,
        compat: str = "default",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        experts = [nn.Linear(d_model, d_hidden, bias, **dd), LinearShift(d_model, d_hidden, bias, **dd)]
        super().__init__(Gate(d_model, 2, top_k, **dd), experts, compat)


class MixtureMlp(MixtureOfExperts):
    """An MLP and one of LinearShift, [..., d_model] -> [..., d_model]; every token uses top_k of them."""

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        top_k: int = 1,
        compat: str = "default",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        shifting = Mlp(d_model, d_hidden, **dd)
        shifting.fc1 = LinearShift(d_model, d_hidden, **dd)  # type: ignore[assignment]
        shifting.fc2 = LinearShift(d_hidden, d_model, **dd)  # type: ignore[assignment]
        super().__init__(Gate(d_model, 2, top_k, **dd), [Mlp(d_model, d_hidden, **dd), shifting], compat)
