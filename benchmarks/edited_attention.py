"""Inputs and peers of edited attention: decoding steps and prefill rows, as data for `benchmarks.ops`.

Peers on the same input: "dense" is scaled_dot_product_attention without any edit (what an unedited model pays),
"authors" the full matrix of attention weights as the methods' own code forms it (eager attention), edited in place.

    python -m benchmarks.edited_attention [--repeats 21] [--only NAME]

prints, for the CPU with one thread, ours / dense and authors / ours from medians of interleaved runs of the thread's
CPU time, after ours was compared with the reference; where they disagree it prints no number and exits 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels import Visibility, edited_attention

# rows: query rows, the last of `keys`. edit: "boost" (PAI), "bias" (PASTA), "groups" (VAR: 4 groups, of which sinks lie
# scattered), "last row" (a whole prefill whose last row is boosted). backward: whether gradients are timed.
CASES: dict[str, dict[str, Any]] = {
    "decode 2000 boost": {"rows": 1, "keys": 2000, "heads": 32, "heads_kv": 32, "head_dim": 128, "edit": "boost"},
    "decode 2000 bias": {"rows": 1, "keys": 2000, "heads": 32, "heads_kv": 32, "head_dim": 128, "edit": "bias"},
    "decode 2000 groups": {"rows": 1, "keys": 2000, "heads": 32, "heads_kv": 32, "head_dim": 128, "edit": "groups"},
    "decode 2000 gqa boost": {"rows": 1, "keys": 2000, "heads": 32, "heads_kv": 8, "head_dim": 128, "edit": "boost"},
    "decode 2000 gqa groups": {"rows": 1, "keys": 2000, "heads": 32, "heads_kv": 8, "head_dim": 128, "edit": "groups"},
    "decode 8000 gqa groups": {"rows": 1, "keys": 8000, "heads": 32, "heads_kv": 8, "head_dim": 128, "edit": "groups"},
    "decode 32000 gqa groups": {
        "rows": 1, "keys": 32000, "heads": 32, "heads_kv": 8, "head_dim": 128, "edit": "groups",
    },
    "prefill 1024 last row": {
        "rows": 1024, "keys": 1024, "heads": 8, "heads_kv": 8, "head_dim": 64, "edit": "last row",
    },
    "prefill 1024 groups": {
        "rows": 448, "keys": 1024, "heads": 8, "heads_kv": 8, "head_dim": 64, "edit": "groups", "backward": True,
    },
}  # fmt: skip
IMAGE = (35, 611)  # LLaVA-1.5's image tokens
TOLERANCE = 1e-5

Contender = Callable[[], Tensor]


def contenders(
    case: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Contender], list[Tensor], Tensor]:
    """(name -> a function that returns the output [B, R, H, D], tensors that need gradients, the output's gradient)."""
    generator = torch.Generator().manual_seed(0)
    rows, keys, heads, heads_kv, dim = (case[n] for n in ("rows", "keys", "heads", "heads_kv", "head_dim"))

    def make(count: int, length: int) -> Tensor:
        return torch.randn(1, count, length, dim, generator=generator).to(device, dtype).transpose(1, 2)

    query, key, value, grad_out = make(heads, rows), make(heads_kv, keys), make(heads_kv, keys), make(heads, rows)
    image = torch.zeros(keys, dtype=torch.bool)
    image[IMAGE[0] : IMAGE[1]] = True
    sink = torch.zeros(keys, dtype=torch.bool)
    sink[::97] = True
    boost = torch.where(image, 0.5, 0.0).reshape(1, 1, keys).to(device)
    groups = (image * 1 + sink * 2).to(torch.uint8).reshape(1, 1, keys).to(device)
    factors = torch.tensor([1.0, 1.4, 0.6, 0.6], device=device)
    edit = case["edit"]
    choices: dict[str, dict[str, Any]] = {
        "boost": {"boost": boost},
        "bias": {"key_bias": -boost},
        "groups": {"groups": groups, "num_groups": 4, "rule": factors},
        "last row": {"boost": boost, "rows": (-1, None)},
    }
    options = choices[edit]

    def ours(backend: str = "auto") -> Tensor:
        found = edited_attention(query, key, value, Visibility(), **options, backend=backend)
        assert isinstance(found, Tensor)
        return found

    def dense() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        many = {"enable_gqa": heads != heads_kv}
        if rows == 1:
            return F.scaled_dot_product_attention(q, k, v, **many).transpose(1, 2)
        if rows == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **many).transpose(1, 2)
        seen = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **many).transpose(1, 2)

    def authors() -> Tensor:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        k, v = (t.repeat_interleave(heads // heads_kv, 1) for t in (k, v))
        s = q @ k.transpose(2, 3) * dim**-0.5
        if edit in ("boost", "last row"):
            edited = s[:, :, -1:] if edit == "last row" else s
            changed = edited + boost[:, :, None] * edited.abs()
            s = torch.cat((s[:, :, :-1], changed), 2) if edit == "last row" else changed
        if edit == "bias":
            s = s - boost[:, :, None]
        if rows > 1:
            s = s + torch.full((rows, keys), torch.finfo(s.dtype).min, device=device).triu(keys - rows + 1)
        p = torch.softmax(s, -1, dtype=torch.float32).to(query.dtype)
        if edit == "groups":
            p = p * factors.to(p.dtype)[groups.long()][:, :, None]
        return (p @ v).transpose(1, 2).contiguous()

    named = {"ours": ours, "reference": lambda: ours("reference"), "dense": dense, "authors": authors}
    leaves = [t.requires_grad_() for t in (query, key, value)] if case.get("backward") else []
    return named, leaves, grad_out


def _measure(run: Contender) -> float:
    begun = time.thread_time()
    run()
    return time.thread_time() - begun


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edited_attention")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--only", help="only cases whose name contains this text")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    failed = False
    print("| input | ours / dense | authors / ours | ours ms |\n| --- | --- | --- | --- |")
    for name, case in CASES.items():
        if given.only and given.only not in name:
            continue
        named, _, _ = contenders(case)
        with torch.no_grad():
            wanted = named["reference"]()
            error = max(((named[peer]() - wanted).norm() / wanted.norm()).item() for peer in ("ours", "authors"))
            if error > TOLERANCE:
                print(f"| {name} | disagrees with the reference by {error:.1e} | | |")
                failed = True
                continue
            timed = ("ours", "dense", "authors")
            times: dict[str, list[float]] = {peer: [] for peer in timed}
            for _ in range(given.repeats):
                for peer in timed:
                    times[peer].append(_measure(named[peer]))
        middle = {peer: statistics.median(each) for peer, each in times.items()}
        ratios = f"{middle['ours'] / middle['dense']:.2f} | {middle['authors'] / middle['ours']:.2f}"
        print(f"| {name} | {ratios} | {middle['ours'] * 1e3:.2f} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
