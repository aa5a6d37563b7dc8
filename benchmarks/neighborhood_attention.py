"""neighborhood_attention: windows of DiNAT's sizes on a CPU, of image and video generators on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels import Plan, neighborhood_attention, plan_neighborhood_attention

SHAPE = ("batch", "grid", "heads", "head_dim", "bias", "published", "note")


def _case(
    grid: tuple[int, ...], kernel_size: Any, batch: int = 1, heads: int = 4, head_dim: int = 32, **more: Any
) -> dict[str, Any]:
    return {"batch": batch, "grid": grid, "heads": heads, "head_dim": head_dim, "kernel_size": kernel_size, **more}


# "bias" asks for an offset bias and its gradient; the rest are the operation's own arguments.
CASES: dict[str, dict[str, Any]] = {
    "56x56 k7": _case((56, 56), 7),
    "56x56 k7 d8": _case((56, 56), 7, dilation=8),
    "56x56 k7 batch 8": _case((56, 56), 7, batch=8),
    "56x56 k7 d8 batch 8": _case((56, 56), 7, batch=8, dilation=8),
    "28x28 k7": _case((28, 28), 7),
    "28x28 k7 d4": _case((28, 28), 7, dilation=4),
    "28x28 k7 batch 8": _case((28, 28), 7, batch=8),
    "28x28 k7 d4 batch 8": _case((28, 28), 7, batch=8, dilation=4),
    "56x56 k7 bias": _case((56, 56), 7, bias=True),
    "8x28x28 k3x7x7": _case((8, 28, 28), (3, 7, 7)),
    "4096 k257 causal": _case((4096,), 257, head_dim=64, is_causal=True),
}

# NATTEN's own figures on an H100, forward, in milliseconds (docs/profiler.md at 3864f11, float16): dense attention by
# cuDNN, its Hopper kernel alone, and with the token permutation that this kernel needs around it.
_THEIRS = "NATTEN docs/profiler.md, H100"
GPU_CASES: dict[str, dict[str, Any]] = {
    "FLUX 4K k80 s16": _case(
        (256, 256), 80, heads=24, head_dim=128, stride=16,
        published={"by": _THEIRS, "dense": 97.435, "kernel": 7.914, "with permutation": 10.601},
    ),
    "FLUX 4K k80": _case(
        (256, 256), 80, heads=24, head_dim=128,
        published={"by": _THEIRS, "dense": 97.435, "kernel": 16.201, "with permutation": 18.603},
    ),
    "HunyuanVideo k18x24x24 s16x8x8": _case(
        (30, 48, 80), (18, 24, 24), heads=24, head_dim=128, stride=(16, 8, 8),
        published={"by": _THEIRS, "dense": 283.327, "kernel": 23.359, "with permutation": 29.109},
    ),
    "HunyuanVideo k18x24x24": _case(
        (30, 48, 80), (18, 24, 24), heads=24, head_dim=128,
        published={"by": _THEIRS, "dense": 283.327, "kernel": 79.043, "with permutation": 84.417},
    ),
    "DiNAT 56x56 k7 batch 64": _case((56, 56), 7, batch=64, heads=2),
    "DiNAT 56x56 k7 d8 batch 64": _case((56, 56), 7, batch=64, heads=2, dilation=8),
    "DiNAT 28x28 k7 batch 64": _case((28, 28), 7, batch=64, heads=4),
    "DiNAT 28x28 k7 d4 batch 64": _case((28, 28), 7, batch=64, heads=4, dilation=4),
    "DiNAT 56x56 k7 bias batch 64": _case((56, 56), 7, batch=64, heads=2, bias=True),
}  # fmt: skip


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """The operation's own arguments of a case."""
    return {name: value for name, value in case.items() if name not in SHAPE}


def tensors(case: dict[str, Any], device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """query, key, value; the bias or None; and the output's gradient, from one seed of the device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case["batch"], *case["grid"], case["heads"], case["head_dim"])
    made = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4)]
    bias = None
    if case.get("bias"):
        kernel = case["kernel_size"]
        kernel = (kernel,) * len(case["grid"]) if isinstance(kernel, int) else kernel
        shape = (case["heads"], *(2 * k - 1 for k in kernel))
        bias = torch.randn(shape, generator=generator, device=device).requires_grad_()
    return [t.requires_grad_() for t in made[:3]], bias, made[3]


def contenders(
    case: dict[str, Any], device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """See `benchmarks`. Peers: dense attention without mask and bias, flex (compiled), NATTEN where it is installed."""
    qkv, bias, grad = tensors(case, device, dtype)
    options = options_of(case)
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in qkv)

    def attend(backend: str) -> Callable[[], Tensor]:
        return lambda: neighborhood_attention(*qkv, **options, bias=bias, backend=backend)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(grad.shape)

    def flex() -> Tensor:  # on a CPU it refuses tensors that require a gradient even where none is recorded
        taken = [t if t is None or torch.is_grad_enabled() else t.detach() for t in (*qkv, bias)]
        return neighborhood_attention(*taken[:3], **options, bias=taken[3], backend="flex")

    found = {"ours": attend("auto"), "reference": attend("reference"), "dense": dense, "flex": flex}
    if bias is None and importlib.util.find_spec("natten") is not None:
        import natten

        natten_function = getattr(natten, f"na{len(case['grid'])}d")
        found["natten"] = lambda: natten_function(*qkv, **options)
    return found, [*qkv, *([] if bias is None else [bias])], grad


def plan(case: dict[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> Plan:
    """What the case costs, before it runs; more: `maker` and `tiles` of `plan_neighborhood_attention`."""
    shape = {name: case[name] for name in ("batch", "heads", "head_dim")}
    options = options_of(case)
    return plan_neighborhood_attention(
        case["grid"], **options, **shape, dtype=dtype, biased=bool(case.get("bias")), **more
    )


def useful_flops(case: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of the pairs that are seen, forward and forward + backward."""
    told = plan(case)
    return told.forward.useful_flops, told.forward.useful_flops + told.backward.useful_flops
