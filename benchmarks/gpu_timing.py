"""Contenders on a GPU: checked against float64, timed by CUDA events, set against the plan and published figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels import neighborhood_attention
from benchmarks import checking, measuring
from benchmarks import neighborhood_attention as cases_of

DENSE = {"dense cuDNN": "CUDNN_ATTENTION", "dense flash": "FLASH_ATTENTION", "dense efficient": "EFFICIENT_ATTENTION"}
PEERS = (*DENSE, "flex", "natten")
SAMPLES = 64  # queries that are checked per batch entry
MOST = 30  # runs of one contender

Timer = Callable[[Callable[[], Any]], float]


class CudaTimer:
    """Median milliseconds of a function on the current GPU, by CUDA events, the L2 cache cleared before each run."""

    def __init__(self, repeats: int = MOST, seconds: float = 1.0) -> None:
        self.repeats, self.seconds = repeats, seconds
        self.cache = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    def once(self, run: Callable[[], Any]) -> float:
        """One run."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def __call__(self, run: Callable[[], Any]) -> float:
        """The median; at least three runs after one that warms up and compiles, one of what takes longer than 2 s."""
        run()
        torch.cuda.synchronize()
        first = self.once(run)
        count = 0 if first > 2000 else max(2, min(self.repeats, int(1e3 * self.seconds / max(first, 1e-3))))
        times = sorted([first, *(self.once(run) for _ in range(count))])
        return times[len(times) // 2]


def contenders(
    case: dict[str, Any], device: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable, list[Tensor], Tensor]]:
    """(name, function, its inputs that need gradients, the output's gradient), one at a time to spare memory.

    Dense peers get contiguous [B, heads, tokens, head_dim] and neither window nor bias, the others the case's layout.
    """
    qkv, bias, grad = cases_of.tensors(case, device, dtype)
    options = cases_of.options_of(case)
    inputs = [*qkv, *([] if bias is None else [bias])]
    ours = "triton" if device == "cuda" else "auto"
    yield "ours", lambda: neighborhood_attention(*qkv, **options, bias=bias, backend=ours), inputs, grad
    flat = [t.detach().flatten(1, -3).transpose(1, 2).contiguous().requires_grad_() for t in qkv]
    flat_grad = grad.flatten(1, -3).transpose(1, 2).contiguous()
    for name, backend in DENSE.items():
        yield name, lambda backend=backend: dense(flat, backend), flat, flat_grad
    if dtype == torch.bfloat16:
        yield "flex", lambda: neighborhood_attention(*qkv, **options, bias=bias, backend="flex"), inputs, grad
    if bias is None:
        yield "natten", lambda: natten(qkv, options), qkv, grad


def dense(qkv: list[Tensor], backend: str) -> Tensor:
    """torch's attention by one of its own back ends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(*qkv)


def natten(qkv: list[Tensor], options: dict[str, Any]) -> Tensor:
    """NATTEN's own choice of kernel. Raises ModuleNotFoundError where it is not installed."""
    import natten as theirs

    return getattr(theirs, f"na{qkv[0].ndim - 3}d")(*qkv, **options)


def check(case: dict[str, Any], device: str, dtype: torch.dtype, samples: int = SAMPLES) -> dict[str, Any]:
    """One case's results against float64; see `checking.check`."""
    qkv, bias, grad = cases_of.tensors(case, device, dtype)
    options = cases_of.options_of(case)
    problem = cases_of.plan({**case, "batch": 1}, dtype).problem

    def ours(query: Tensor, key: Tensor, value: Tensor, table_of_bias: Tensor | None) -> Tensor:
        return neighborhood_attention(
            query, key, value, **options, bias=table_of_bias, backend="triton" if device == "cuda" else "auto"
        )

    return checking.check(ours, [t.detach() for t in qkv], bias, grad, problem, samples)


def times(
    case: dict[str, Any], device: str, dtype: torch.dtype, what: str, timer: Timer, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Milliseconds of every contender in one pass, and what they say: speed-up, share of the bound, published peers.

    known: a result of the same shape, dtype and pass, whose dense peers need no second measurement.
    """
    taken: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name, function, inputs, grad in contenders(case, device, dtype):
        if known is not None and name in DENSE:
            for results, old in ((taken, known["ms"]), (absent, known["absent"])):
                results |= {name: old[name]} if name in old else {}
            continue
        try:
            if name == "flex":
                torch.compiler.reset()  # beyond a few shapes torch would stop compiling and form the whole matrix
            if what == "forward":
                with torch.no_grad():
                    taken[name] = timer(function)
            else:
                out = function()
                taken[name] = timer(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))  # noqa: B023
                del out
        except Exception as error:
            absent[name] = measuring.reason(error)
            if name == "ours":
                return {"ms": taken, "absent": absent}
    return {"ms": taken, "absent": absent, **judged(case, dtype, what, taken)}


def judged(case: dict[str, Any], dtype: torch.dtype, what: str, taken: dict[str, float]) -> dict[str, Any]:
    """What times in milliseconds amount to, beside the plan and the published figures."""
    told = cases_of.plan(case, dtype)
    part = told.forward if what == "forward" else told.backward
    found: dict[str, Any] = {
        "useful_tflops": part.useful_flops / taken["ours"] / 1e9,
        "executed_tflops": part.executed_flops / taken["ours"] / 1e9,
        "bound": part.bound,
        "ideal": part.ideal,
    }
    fastest = min((name for name in DENSE if name in taken), key=taken.__getitem__, default=None)
    if fastest is not None:
        speedup = taken[fastest] / taken["ours"]
        found |= {"dense": fastest, "speedup": speedup, "share_of_bound": speedup / part.bound}
    if what == "forward" and "published" in case and dtype.itemsize == 2:
        theirs = {k: v for k, v in case["published"].items() if k != "by"}
        found["published"] = {
            **case["published"],
            "speedup": {name: theirs["dense"] / ms for name, ms in theirs.items() if name != "dense"},
        }
    return found


def told(name: str, dtype: str, what: str, result: dict[str, Any]) -> Iterator[str]:
    """A timing as text."""
    ms = ", ".join(f"{peer} {taken:.3f}" for peer, taken in result["ms"].items())
    yield f"{name}, {dtype}, {what}: ms: {ms or 'none'}"
    for peer, why in result["absent"].items():
        yield f"    {peer}: {why}"
    if "speedup" in result:
        yield (
            f"    {result['speedup']:.2f} x {result['dense']}; the plan's bound is {result['bound']:.2f} x, "
            f"{100 * result['share_of_bound']:.0f} % of it reached; {result['useful_tflops']:.0f} useful TFLOP/s, "
            f"{result['executed_tflops']:.0f} executed"
        )
    if "published" in result:
        theirs = result["published"]
        yield (
            f"    published by {theirs['by']} (theirs, not measured here): dense {theirs['dense']} ms, kernel "
            f"{theirs['kernel']} ms ({theirs['speedup']['kernel']:.1f} x), with permutation "
            f"{theirs['with permutation']} ms ({theirs['speedup']['with permutation']:.1f} x)"
        )
