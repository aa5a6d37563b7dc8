"""BlockSparsity and orders: what is built is what was said, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from test_kernels_block_sparse import close, dense, make, order_of
from torch import Tensor

from attnzoo.kernels import BlockSparsity, axis_order, block_sparse_attention, tile_order
from attnzoo.kernels.block_sparse_attention import patterns


def coordinates(grid: tuple[int, ...], dense_tokens: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """(coordinates of every token, zeros for those outside the grid; which those are)."""
    total = math.prod(grid) + len(dense_tokens)
    outside = torch.zeros(total, dtype=torch.bool)
    outside[dense_tokens] = True
    places = torch.zeros(len(grid), total, dtype=torch.long)
    places[:, ~outside] = torch.stack(torch.unravel_index(torch.arange(math.prod(grid)), grid))
    return tuple(places), outside


@pytest.mark.parametrize("pairs", [1, 4096, 1 << 22])
@pytest.mark.parametrize("order", ["none", "axes", "heads"])
def test_a_mask_function_becomes_blocks(pairs, order, monkeypatch):
    """Every pair as the function says it, text at both ends and in the middle, whatever is looked at at a time."""
    monkeypatch.setattr(patterns, "PAIRS", pairs)
    grid, ranges, heads = (3, 5, 6), [(0, 7), (40, 43), (100, 102)], 4
    places, outside = coordinates(grid, [*range(7), *range(40, 43), *range(100, 102)])

    def near(query, key, head):
        return ((query[1] - key[1]).abs() <= 1 + head) & ((query[2] - key[2]).abs() <= 2) & (query[0] >= key[0])

    orders = None
    if order == "axes":
        orders = torch.randperm(102)
    elif order == "heads":
        orders = torch.stack([torch.randperm(102) for _ in range(heads)])
    sparsity = BlockSparsity.from_function(
        near, grid, block_size=(16, 8), heads=heads, dense_queries=ranges, query_order=orders
    )
    h = torch.arange(heads)[:, None, None]
    want = near(tuple(p[:, None] for p in places), tuple(p[None] for p in places), h)
    want = (want | outside[:, None] | outside[None]).expand(heads, 102, 102)
    got = sparsity.element_mask().expand(1, heads, 102, 102)[0]
    for head in range(heads):
        along = order_of(orders, head, heads, 102)
        assert torch.equal(got[head], want[head][along][:, along])
    assert sparsity.tiles is not None and len(torch.unique(sparsity.tiles.flatten(1), dim=0)) == len(sparsity.tiles)
    q, k, v = (torch.randn(1, 102, heads, 8) for _ in range(3))
    got = block_sparse_attention(q, k, v, sparsity, return_lse=True)
    for a, b in zip(got, dense(q, k, v, want[None], None)):
        close(a, b)


def test_a_window_is_few_tiles():
    """64 x 64 tokens, window 7 x 7, tiles of 8 x 8 tokens as blocks: the interior shares its tiles."""
    order = tile_order((64, 64), 8)
    sparsity = BlockSparsity.from_function(
        lambda q, k: ((q[0] - k[0]).abs() <= 3) & ((q[1] - k[1]).abs() <= 3), (64, 64), query_order=order
    )
    assert sparsity.tiles is not None and len(sparsity.tiles) == 9
    assert sparsity.density == 22 * 22 / 64**2  # three neighbours along an axis, two at its ends
    assert int(sparsity.counts.max()) == 9


def test_another_grid_of_keys_and_function_of_broadcasts():
    sparsity = BlockSparsity.from_function(
        lambda q, k: k[0] < 3, (10,), (4, 5), (4, 5), dense_keys=[(20, 22)], dense_queries=[(3, 4)]
    )
    assert (sparsity.num_queries, sparsity.num_keys) == (11, 22)
    mask = sparsity.element_mask()[0, 0]
    want = torch.zeros(11, 22, dtype=torch.bool)
    want[:, :15], want[:, 20:], want[3] = True, True, True
    assert torch.equal(mask, want)


def test_from_mask_and_back():
    mask = torch.rand(2, 3, 4, 5) < 0.4
    sparsity = BlockSparsity.from_mask(mask, 50, 66, (16, 14))
    wide = BlockSparsity.from_mask(mask, 50, 66, (16, 14), trim=False)
    for made in (sparsity, wide, sparsity.to("cpu")):
        assert torch.equal(made.block_mask(), mask)
        assert made.density == pytest.approx(mask.double().mean().item())
        assert made.num_blocks == (4, 5) and made.indices.dtype == torch.int32
    assert sparsity.indices.shape[-1] == int(mask.sum(-1).max()) and wide.indices.shape[-1] == 5
    turned = sparsity.by_key()
    assert turned is sparsity.by_key()
    for b, h, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        listed = turned.indices[b, h, c, : turned.counts[b, h, c]].tolist()
        assert listed == mask[b, h, :, c].nonzero()[:, 0].tolist()
    assert BlockSparsity.from_mask(mask[0, 0], 50, 66, (16, 14)).indices.shape[:2] == (1, 1)


def test_algebra():
    """`&` and `|` are those of the masks; tiles that vanish or fill up become no block and whole blocks."""
    cases = [
        make(H=2, lists=(1, heads), Nq=37, Nk=41, block=(8, 16), density=0.6, partial=partial)
        for heads, partial in ((1, 0.5), (2, 0.7), (1, 0.0))
    ]
    masks = [c.sparsity.element_mask() for c in cases]
    for a in range(3):
        for b in range(3):
            both, either = cases[a].sparsity & cases[b].sparsity, cases[a].sparsity | cases[b].sparsity
            assert torch.equal(*torch.broadcast_tensors(both.element_mask(), masks[a] & masks[b]))
            assert torch.equal(*torch.broadcast_tensors(either.element_mask(), masks[a] | masks[b]))
            for made in (both, either):
                assert (
                    made.tiles is None or not made.tiles.flatten(1).all(1).any() and made.tiles.flatten(1).any(1).all()
                )
    even = BlockSparsity.from_function(lambda q, k: (q[0] + k[0]) % 2 == 0, (32,), block_size=8)
    odd = BlockSparsity.from_function(lambda q, k: (q[0] + k[0]) % 2 == 1, (32,), block_size=8)
    assert (even & odd).density == 0.0 and (even | odd).tiles is None and (even | odd).density == 1.0
    with pytest.raises(ValueError, match="one block_size"):
        even & BlockSparsity.from_function(lambda q, k: q[0] == k[0], (32,), block_size=4)
    with pytest.raises(ValueError, match="one query_order"):
        even & odd.with_orders(torch.arange(32), None)


@pytest.mark.parametrize("orders", [(0, 0), (1, 1), (2, 1)])
def test_global_tokens_of_a_block_mask(orders):
    case = make(H=2, Hkv=1, lists=(1, 2), Nq=37, Nk=41, block=(8, 16), density=0.3, partial=0.4, orders=orders)
    made = case.sparsity.with_dense(queries=[(30, 37)], keys=[(0, 3), (20, 21)])
    want = case.mask.clone()
    want[:, :, 30:], want[..., :3], want[..., 20] = True, True, True
    for h in range(2):
        i, j = order_of(made.query_order, h, 2, 37), order_of(made.key_order, h, 2, 41)
        assert torch.equal(made.element_mask().expand(1, 2, 37, 41)[0, h], want[0, h][i][:, j])
    close(block_sparse_attention(case.q, case.k, case.v, made), dense(case.q, case.k, case.v, want, None)[0])
    whole = BlockSparsity.from_mask(torch.zeros(3, 3, dtype=torch.bool), 24, 20, 8).with_dense(queries=[(8, 24)])
    assert whole.tiles is None and whole.density == pytest.approx(2 / 3)


def test_orders():
    order = axis_order((2, 3, 4), (2, 0, 1), 3, 2)
    assert order[:3].tolist() == [0, 1, 2] and order[-2:].tolist() == [27, 28]
    grid = torch.arange(24).view(2, 3, 4)
    assert torch.equal(order[3:27] - 3, grid.permute(2, 0, 1).flatten())
    tiles = tile_order((4, 5), (2, 3))
    assert tiles[:6].tolist() == [0, 1, 2, 5, 6, 7] and tiles[6:10].tolist() == [3, 4, 8, 9]
    assert sorted(tiles.tolist()) == list(range(20))
    # An order moves blocks, not results: full blocks along any order are dense attention.
    case = make(Nq=20, Nk=20, Hkv=2, density=1.0)
    out = block_sparse_attention(case.q, case.k, case.v, case.sparsity, query_order=tiles, key_order=tiles)
    close(out, dense(case.q, case.k, case.v, case.mask, None)[0])
