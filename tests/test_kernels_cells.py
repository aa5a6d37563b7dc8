"""The CPU path of neighborhood attention where windows are closed cells, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from attnzoo.kernels import neighborhood_attention
from attnzoo.kernels.neighborhood_attention import tiling


@pytest.mark.parametrize("chunk", [None, 700], ids=["roomy", "tight"])
@pytest.mark.parametrize(
    "grid, kernel_size, stride, dilation, border",
    [
        ((6, 8), (3, 4), (1, 2), (2, 2), "shift"),
        ((6, 8), (3, 2), (3, 2), (1, 1), "mask"),
        ((12, 8), (3, 2), (3, 2), (2, 2), "zero"),
        ((12, 8), (3, 4), (3, 1), (2, 2), "shift"),
        ((12,), (3,), (3,), (2,), "shift"),
        ((4, 4, 6), (2, 4, 3), (2, 1, 3), (1, 1, 1), "shift"),
    ],
)
def test_windows_that_cut_the_grid_into_cells(grid, kernel_size, stride, dilation, border, chunk, monkeypatch):
    """On the CPU path: block, grid and widest-dilation attention, with biases, some of them -inf."""
    if chunk:
        monkeypatch.setattr(tiling, "CHUNK", chunk)
    for heads_kv, bias in ((4, None), (2, 0.0), (4, -torch.inf)):
        query = torch.randn(2, *grid, 4, 5, dtype=torch.float64, requires_grad=True)
        key = torch.randn(2, *grid, heads_kv, 5, dtype=torch.float64, requires_grad=True)
        value = torch.randn(2, *grid, heads_kv, 6, dtype=torch.float64, requires_grad=True)
        inputs, table = [query, key, value], None
        if bias is not None:
            table = torch.randn(4, *(2 * k - 1 for k in kernel_size), dtype=torch.float64)
            table[1] += bias
            inputs.append(table.requires_grad_())
        found = []
        for backend in ("tiled", "reference"):
            out, lse = neighborhood_attention(
                query, key, value, kernel_size, stride, dilation,
                border=border, bias=table, return_lse=True, backend=backend,
            )  # fmt: skip
            weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
            weight_lse = torch.linspace(1, 2, lse.numel(), dtype=lse.dtype).view_as(lse) * lse.isfinite()
            found.append([out, lse, *torch.autograd.grad([out, lse], inputs, [weight, weight_lse])])
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
