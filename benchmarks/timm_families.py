"""timm's own models with and without attnzoo's kernel, in one run: what is worth a variant and what is not.

    python -m benchmarks.timm_families [NAME[@SIZE] ...] [--runs 5]

Per model and image size: both are compared on the same image and weights first (no number where they disagree, and exit
status 1), then run in turns on one thread; printed are medians of the thread's CPU time and their ratio, timm / ours.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time

import timm
import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from attnzoo.backbones.maxvit_cells import use_cell_attention
from attnzoo.kernels import neighborhood_attention

DEFAULT = [
    "maxvit_tiny_tf_224@224",
    "maxvit_tiny_tf_384@384",
    "maxvit_tiny_tf_512@512",
    "maxvit_small_tf_512@512",
    "maxvit_base_tf_512@512",
    "halonet26t@256",
    "halonet26t@512",
    "halonet50ts@256",
    "halonet50ts@512",
]
TOLERANCE = 1e-5


class HaloNeighborhood(HaloAttn):
    """timm's halo attention as windows with stride block_size, zero border, relative logits as a bias by query."""

    def forward(self, x: Tensor) -> Tensor:
        if self.block_stride != 1:
            return super().forward(x)
        batch, _, height, width = x.shape
        query = self.q(x).view(batch, self.num_heads, -1, height, width).permute(0, 3, 4, 1, 2).contiguous()
        both = self.kv(x).view(batch, self.num_heads, -1, height, width).permute(0, 3, 4, 1, 2).contiguous()
        key, value = both.split([self.dim_head_qk, self.dim_head_v], -1)
        slots, block = torch.arange(self.win_size), self.block_size
        index = [slots - (torch.arange(n) % block)[:, None] + self.win_size - 1 for n in (height, width)]
        by_row = torch.einsum("byxhd,ykd->byxhk", query, self.pos_embed.height_rel[index[0]])
        by_column = torch.einsum("byxhd,xkd->byxhk", query, self.pos_embed.width_rel[index[1]])
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(-2)
        bias = bias * self.scale if self.scale_pos_embed else bias
        window = (self.win_size, block)
        out = neighborhood_attention(query, key, value, *window, border="zero", bias=bias, scale=self.scale)
        return self.pool(out.permute(0, 3, 4, 1, 2).reshape(batch, -1, height, width))


def convert(model: nn.Module) -> None:
    """Put our kernel into a copy of timm's model, in place."""
    halos = [m for m in model.modules() if type(m) is HaloAttn]
    for layer in halos:
        layer.__class__ = HaloNeighborhood
    if not halos:
        use_cell_attention(model)


def agree(theirs: nn.Module, ours: nn.Module, x: Tensor) -> bool:
    """Whether both compute the same; in float64 where float32's rounding grows too much through untrained layers."""
    want, got = theirs(x), ours(x)
    if (got - want).norm() <= TOLERANCE * want.norm():
        return True
    theirs, ours = (copy.deepcopy(model).double() for model in (theirs, ours))
    want, got = theirs(x.double()), ours(x.double())
    return bool((got - want).norm() <= 1e-9 * want.norm())


def measure(name: str, size: int, runs: int) -> str | None:
    """One line of the table; None where the two disagree."""
    theirs = timm.create_model(name).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator))
    ours = copy.deepcopy(theirs)
    convert(ours)
    x = torch.randn(1, 3, size, size, generator=generator)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        if not agree(theirs, ours, x):
            return None
        for _ in range(runs):
            for model, taken in zip((theirs, ours), times):
                start = time.thread_time()
                model(x)
                taken.append(time.thread_time() - start)
    medians = [1e3 * statistics.median(t) for t in times]
    return f"| {name} | {size} | {medians[0]:.0f} ms | {medians[1]:.0f} ms | {medians[0] / medians[1]:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=DEFAULT, help="NAME or NAME@SIZE, timm's names")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | image | timm | attnzoo | timm / attnzoo |\n| --- | ---: | ---: | ---: | ---: |")
    failed = 0
    for entry in arguments.models:
        name, _, size = entry.partition("@")
        size = int(size or timm.models.get_pretrained_cfg(name).input_size[-1])
        line = measure(name, size, arguments.runs)
        failed += line is None
        print(line or f"{name} at {size}: the two disagree", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
