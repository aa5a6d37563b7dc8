"""What `plan_neighborhood_attention` foretells, against what the kernels walk: pair by pair, product by product."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import generators
from attnzoo.kernels import Plan, neighborhood_logits, plan_neighborhood_attention, planning
from attnzoo.kernels.neighborhood_attention import table, tiled
from attnzoo.kernels.planning import Walk

ROOT = Path(__file__).resolve().parents[1]

# grid, kernel_size, then options of the call
CASES: dict[str, dict[str, Any]] = {
    "2d": {"grid": (13, 11), "kernel_size": 7},
    "1d causal": {"grid": (70,), "kernel_size": 33, "stride": 5, "is_causal": True},
    "3d stride": {"grid": (6, 9, 8), "kernel_size": (4, 5, 6), "stride": (2, 5, 3)},
    "dilation does not divide": {"grid": (13, 18), "kernel_size": (3, 5), "dilation": (2, 3)},
    "groups of fewer tokens than a tile's start": {"grid": (9, 5), "kernel_size": (2, 3), "dilation": (4, 1)},
    "mask": {"grid": (9, 7), "kernel_size": 7, "dilation": 2, "border": "mask"},
    "mask, dilation beyond the grid": {"grid": (3, 9), "kernel_size": 3, "dilation": 5, "border": "mask"},
    "zero": {"grid": (9, 7), "kernel_size": (7, 4), "border": "zero"},
    "zero, causal": {"grid": (9, 7), "kernel_size": (6, 4), "is_causal": (False, True), "border": "zero"},
    "cells": {"grid": (12, 8), "kernel_size": 4, "stride": 4},
    "whole grid": {"grid": (7, 7), "kernel_size": 7},
    "additional keys": {"grid": (9, 8), "kernel_size": 5, "additional_keys": 9},
}


# -- the windows' rule, once more and one query at a time --------------------------------------------------------------


@dataclass
class OneAxis:
    size: int
    kernel: int
    stride: int
    dilation: int
    causal: bool
    border: str

    def window(self, p: int, length: int) -> tuple[int, int]:
        """First and one past the last position that the query at position p of a group of `length` takes part with."""
        if self.causal:
            leader = min(p // self.stride * self.stride + self.stride - 1, length - 1)
            return max(leader - self.kernel + 1, 0), p + 1
        leader = min(p // self.stride * self.stride + self.stride // 2, length - 1)
        first = leader - self.kernel // 2
        if self.border == "shift":
            first = min(max(first, 0), length - self.kernel)
        last = first + self.kernel
        return (max(first, 0), min(last, length)) if self.border == "mask" else (first, last)

    def groups(self) -> list[int]:
        return [len(range(g, self.size, self.dilation)) for g in range(min(self.dilation, self.size))]

    def seen(self) -> int:
        """Pairs of a query and a key of the grid."""
        return sum(
            len([j for j in range(*self.window(p, length)) if 0 <= j < length])
            for length in self.groups()
            for p in range(length)
        )

    def hulls(self, queries: int) -> list[int]:
        """The length of the hull of each query tile's windows, over all groups; tiles of a group's longest sibling."""
        found = []
        for length in self.groups():
            for t in range(0, max(self.groups()), queries):
                members = [p for p in range(t, t + queries) if p < length] or [length - 1]
                windows = [self.window(p, length) for p in members]
                found.append(max(last for _, last in windows) - min(first for first, _ in windows))
        return found

    def meeting(self, first: int, last: int, length: int) -> list[int]:
        """The queries of a group of `length` whose windows hold one of the keys first .. last."""
        windows = [self.window(p, length) for p in range(length)]
        return [p for p, (low, high) in enumerate(windows) if low <= last and first < high and first <= last]

    def ranges(self, keys: int) -> list[int]:
        """How many queries meet each key tile, over all groups; tiles of a group's longest sibling."""
        return [
            len(self.meeting(t, min(t + keys, length) - 1, length))
            for length in self.groups()
            for t in range(0, max(self.groups()), keys)
        ]


def axes_of(case: dict[str, Any]) -> list[OneAxis]:
    rank = len(case["grid"])

    def each(name: str, default: Any) -> tuple:
        value = case.get(name, default)
        return value if isinstance(value, tuple) else (value,) * rank

    columns = (each("kernel_size", 1), each("stride", 1), each("dilation", 1), each("is_causal", False))
    return [OneAxis(*row, case.get("border", "shift")) for row in zip(case["grid"], *columns)]


def walked(case: dict[str, Any], queries: tuple[int, ...], keys: tuple[int, ...]) -> int:
    """Pairs that the query-major kernels compute per head, tile by tile of the whole grid."""
    pairs = 0
    extra = -(-case.get("additional_keys", 0) // math.prod(keys))
    for hulls in itertools.product(*(axis.hulls(q) for axis, q in zip(axes_of(case), queries))):
        steps = math.prod(-(-hull // k) for hull, k in zip(hulls, keys))
        pairs += (steps + extra) * math.prod(queries) * math.prod(keys)
    return pairs


def walked_by_keys(case: dict[str, Any], queries: tuple[int, ...], keys: tuple[int, ...]) -> int:
    """Pairs that the key-major kernel computes per head: each key tile against the queries that see some of it."""
    per_axis = (sum(-(-n // q) for n in axis.ranges(k)) for axis, q, k in zip(axes_of(case), queries, keys))
    return math.prod(per_axis) * math.prod(queries) * math.prod(keys)


@pytest.mark.parametrize("causal, border", [(False, "shift"), (False, "mask"), (False, "zero"), (True, "shift")])
def test_the_queries_of_a_range_of_keys_are_exactly_those_that_see_it(causal: bool, border: str) -> None:
    """Every size up to 11, every window, stride, dilation and range of keys: none left out, none too many."""
    for size, kernel, dilation in itertools.product(range(1, 12), range(1, 14), range(1, 4)):
        for stride in range(1, kernel + 1):
            axis = OneAxis(size, kernel, stride, dilation, causal, border)
            for length in set(axis.groups()):
                if border == "shift" and not causal and kernel > length:
                    continue  # refused
                for first, last in itertools.combinations_with_replacement(range(length), 2):
                    low, high = planning._queries_of(
                        first, last, length, (size, kernel, stride, dilation, causal, border)
                    )
                    assert list(range(low, high)) == axis.meeting(first, last, length), (axis, first, last)
                assert planning._queries_of(length, length - 1, length, (size, kernel, stride, 1, causal, border)) == (
                    0,
                    0,
                )


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_those_of_the_windows(name: str) -> None:
    case = CASES[name]
    plan = plan_neighborhood_attention(**case, tiles=[((2,) * len(case["grid"]), (4,) * len(case["grid"]))])
    tokens, extra = math.prod(case["grid"]), case.get("additional_keys", 0)
    assert plan.useful_pairs == math.prod(axis.seen() for axis in axes_of(case)) + tokens * extra
    assert plan.dense_pairs == tokens * (tokens + extra)
    assert plan.density == plan.useful_pairs / plan.dense_pairs
    if case.get("border") != "zero":  # its zero vectors have finite logits
        options = {k: v for k, v in case.items() if k not in ("grid", "kernel_size", "additional_keys")}
        query = torch.randn(1, *case["grid"], 1, 8)
        logits = neighborhood_logits(query, query, case["kernel_size"], **options)
        assert plan.useful_pairs == torch.isfinite(logits).sum() + tokens * extra
    for walk in (*plan.forward.triton, *plan.forward.others, plan.backward.triton[0]):
        assert walk.pairs == walked(case, walk.queries, walk.keys), walk
        assert walk.pairs == walk.steps * math.prod(walk.queries) * math.prod(walk.keys) >= plan.useful_pairs
    walk = plan.backward.triton[1]
    assert walk.kernel == "grad_key_value" and walk.pairs == walked_by_keys(case, walk.queries, walk.keys)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pairs_of_any_geometry(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    case: dict[str, Any] = {"border": data.draw(st.sampled_from(["shift", "mask", "zero"]))}
    rows = []
    for _ in range(rank):
        size = data.draw(st.integers(1, 14))
        dilation = data.draw(st.integers(1, size if case["border"] == "shift" else size + 2))
        most = size // dilation if case["border"] == "shift" else 9
        kernel = data.draw(st.integers(1, max(1, most)))
        rows.append((size, kernel, data.draw(st.integers(1, kernel)), dilation, data.draw(st.booleans())))
    case |= dict(zip(("grid", "kernel_size", "stride", "dilation", "is_causal"), zip(*rows)))
    tiles = tuple(data.draw(st.sampled_from([1, 2, 4, 8])) for _ in range(2 * rank))
    plan = plan_neighborhood_attention(**case, tiles=[(tiles[:rank], tiles[rank:])])
    assert plan.useful_pairs == math.prod(axis.seen() for axis in axes_of(case))
    for walk in (*plan.forward.triton, *plan.forward.others):
        assert walk.pairs == walked(case, walk.queries, walk.keys)
    fill = (1,) * (3 - rank)
    with table.forcing({"grad_key_value": table.Config((*fill, *tiles[:rank]), (*fill, *tiles[rank:]), 4, 1)}):
        walk = plan_neighborhood_attention(**case).backward.triton[1]
    assert walk.pairs == walked_by_keys(case, walk.queries, walk.keys)
    if case["border"] == "shift":
        options = {name: case[name] for name in ("kernel_size", "stride", "dilation", "is_causal")}
        assert generators.density(case["grid"], **options) == pytest.approx(plan.density, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_cpu_path_executes_what_was_foretold(name: str) -> None:
    case = CASES[name]
    plan = plan_neighborhood_attention(**case, batch=2, heads=4, heads_kv=2, head_dim=12, head_dim_v=8)
    extra = case.get("additional_keys", 0)
    query = torch.randn(2, *case["grid"], 4, 12)
    key, value = torch.randn(2, *case["grid"], 2, 12), torch.randn(2, *case["grid"], 2, 8)
    more = (torch.randn(2, extra, 2, 12), torch.randn(2, extra, 2, 8)) if extra else (None, None)
    with FlopCounterMode(display=False) as forward:
        out, lse = tiled.forward(query, key, value, None, *more, plan.problem)
    with FlopCounterMode(display=False) as backward:
        tiled.backward(out, None, query, key, value, None, *more, out, lse, plan.problem)
    assert forward.get_total_flops() == plan.forward.tiled.flops
    assert backward.get_total_flops() == plan.backward.tiled.flops


# -- the Triton kernels, in the interpreter's own process --------------------------------------------------------------

INTERPRETED = {  # with heads and heads_kv; few steps, each costs the interpreter 15 ms
    "2d": (1, 1),
    "1d causal": (2, 1),
    "3d stride": (1, 1),
    "groups of fewer tokens than a tile's start": (1, 1),
    "zero, causal": (1, 1),
    "additional keys": (1, 1),
}


def count_products() -> dict[str, list[int]]:
    """FLOPs of the products that each kernel computes, forward and backward, by case."""
    import triton.runtime.interpreter as interpreter

    from attnzoo.kernels.neighborhood_attention import triton as kernels

    total = [0]
    original = interpreter.InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        total[0] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return original(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = counted
    found = {}
    for name in INTERPRETED:
        case, problem = CASES[name], interpreted_plan(name).problem
        query, key = (torch.randn(1, *case["grid"], h, 24) for h in (problem.num_heads, problem.num_heads_kv))
        extra = case.get("additional_keys", 0)
        more = (torch.randn(1, extra, 1, 24),) * 2 if extra else (None, None)
        with table.forcing(interpreted_configs(problem.rank)):
            counts = []
            out, lse = kernels.forward(query, key, key, None, *more, problem)
            counts.append(total[0])
            kernels.backward(out, None, query, key, key, None, *more, out, lse, problem)
            counts.append(total[0] - counts[0])
        found[name], total[0] = counts, 0
    return found


def interpreted_configs(rank: int) -> dict[str, table.Config]:
    shapes = {1: ((16,), (32,)), 2: ((4, 8), (8, 8)), 3: ((2, 4, 4), (4, 4, 4))}[rank]
    queries, keys = ((*(1,) * (3 - rank), *shape) for shape in shapes)
    return dict.fromkeys(table.KERNELS, table.Config(queries, keys, 4, 1))


def interpreted_plan(name: str) -> Plan:
    heads, heads_kv = INTERPRETED[name]
    with table.forcing(interpreted_configs(len(CASES[name]["grid"]))):
        return plan_neighborhood_attention(
            **CASES[name], heads=heads, heads_kv=heads_kv, head_dim=24, dtype=torch.float32
        )


def test_the_triton_kernels_execute_what_was_foretold() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    for name, (forward, backward) in counted.items():
        plan = interpreted_plan(name)
        assert forward == plan.forward.executed_flops, name
        assert backward == plan.backward.executed_flops, name
    assert set(counted) == set(INTERPRETED)


# -- known figures -----------------------------------------------------------------------------------------------------

# grid, window, stride, query tile, key tile: executed / useful, as another simulator of the same walk printed it
# (its "dyn" rows; windows of border "shift").
KNOWN = [
    ((56, 56), 7, 1, (8, 8), (8, 8), 5.22),
    ((56, 56), 7, 1, (16, 8), (8, 8), 8.21),
    ((56, 56), 7, 1, (8, 8), (4, 4), 4.50),
    ((56, 56), 7, 7, (8, 8), (4, 4), 5.22),
    ((28, 28), 7, 1, (8, 8), (8, 8), 5.22),
    ((28, 28), 7, 1, (8, 8), (16, 8), 5.97),
    ((7, 7), 7, 1, (8, 8), (8, 8), 1.71),
    ((64, 64), 24, 1, (16, 8), (8, 8), 1.88),
    ((64, 64), 24, 1, (8, 8), (8, 8), 1.56),
    ((64, 64), 24, 4, (8, 8), (8, 4), 1.41),
    ((64, 64), 24, 8, (16, 8), (8, 8), 1.17),
    ((64, 64), 24, 8, (8, 8), (8, 8), 1.00),
    ((64, 64), 24, 16, (16, 8), (8, 8), 1.00),
    ((64, 64), 24, 24, (16, 8), (8, 8), 1.25),
    ((256, 256), 80, 1, (16, 8), (8, 8), 1.22),
    ((256, 256), 80, 1, (16, 16), (16, 8), 1.31),
    ((256, 256), 80, 8, (16, 8), (8, 8), 1.07),
    ((256, 256), 80, 16, (16, 8), (8, 8), 1.00),
    ((30, 48, 80), (18, 24, 24), 1, (2, 8, 8), (2, 4, 8), 1.54),
    ((30, 48, 80), (18, 24, 24), (2, 4, 8), (2, 8, 8), (2, 4, 8), 1.11),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 4, 8), 1.00),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 4), (4, 4, 4), 1.19),
]


@pytest.mark.parametrize("grid, window, stride, queries, keys, waste", KNOWN)
def test_figures_of_another_simulator(grid, window, stride, queries, keys, waste) -> None:
    plan = plan_neighborhood_attention(grid, window, stride, head_dim=128, tiles=[(queries, keys)])
    (walk,) = (
        w for w in (*plan.forward.triton, *plan.forward.others) if (w.queries, w.keys) == (tuple(queries), tuple(keys))
    )
    assert plan.forward.of(walk)["waste"] == pytest.approx(waste, abs=0.005)
    assert plan.forward.of(walk)["bound"] == pytest.approx(plan.forward.ideal / plan.forward.of(walk)["waste"])


def test_a_video_model() -> None:
    plan = plan_neighborhood_attention((30, 48, 80), (18, 24, 24), (16, 8, 8), head_dim=128, heads=24)
    assert plan.density == pytest.approx(0.09) and plan.forward.ideal == pytest.approx(100 / 9)
    assert plan.forward.dense_flops == 4 * 115200**2 * 128 * 24
    assert plan.backward.useful_flops == 2.5 * plan.forward.useful_flops
    walks = [*plan.forward.triton, *plan.backward.triton]
    assert [walk.kernel for walk in walks] == ["forward", "grad_query", "grad_key_value"]
    assert all(walk.pairs == plan.useful_pairs for walk in walks)  # windows, strides and tiles are aligned
    assert plan.backward.bound == pytest.approx(plan.forward.bound * 5 / 7)  # the logits are formed in both kernels
    (walk,) = plan.forward.triton
    cfg = table.config("forward", 3, 128, 128, 2, False, "cuda")
    assert (walk.queries, walk.keys, walk.num_warps) == (cfg.queries, cfg.keys, cfg.num_warps)
    told = plan.roofline("H100")
    assert told["bound"] == "compute" and told["compute"] == pytest.approx(plan.forward.executed_flops / 989.4e9)
    assert plan.traffic.once < plan.traffic.walked
    assert json.loads(json.dumps(plan.to_dict()))["forward"]["bound"] == plan.forward.bound


def test_an_image_model() -> None:
    plan = plan_neighborhood_attention((256, 256), 80, 16, head_dim=128, heads=24)
    assert plan.forward.bound == pytest.approx(10.24) and plan.backward.bound == pytest.approx(10.24 * 5 / 7)


def test_head_dims_are_as_wide_as_the_kernel_computes_them() -> None:
    narrow, wide = (plan_neighborhood_attention((16, 16), 5, head_dim=d) for d in (24, 32))
    assert narrow.forward.executed_flops == wide.forward.executed_flops
    assert narrow.forward.useful_flops < wide.forward.useful_flops


def test_a_bias_may_take_other_tiles() -> None:
    plain, biased = (plan_neighborhood_attention((32, 32), 7, head_dim=64, biased=b) for b in (False, True))
    assert plain.forward.triton[0].keys == (8, 8) and biased.forward.triton[0].keys == (4, 8)


@pytest.mark.parametrize(
    "change, error, named",
    [
        ({"grid": ()}, ValueError, "grid"),
        ({"grid": 8}, ValueError, "grid"),
        ({"grid": (8, 8, 8, 8)}, ValueError, "grid"),
        ({"grid": (8, 0)}, ValueError, r"grid\[1\]"),
        ({"grid": (8, 8.0)}, TypeError, r"grid\[1\]"),
        ({"kernel_size": 9}, ValueError, "kernel_size"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size"),
        ({"stride": 5}, ValueError, "stride"),
        ({"dilation": 3}, ValueError, "dilation"),
        ({"is_causal": 1}, TypeError, "is_causal"),
        ({"border": "wrap"}, ValueError, "border"),
        ({"heads": 0}, ValueError, "heads"),
        ({"heads": 3, "heads_kv": 2}, ValueError, "heads"),
        ({"batch": True}, TypeError, "batch"),
        ({"head_dim": 257}, ValueError, "head_dim"),
        ({"dtype": torch.int32}, ValueError, "dtype"),
        ({"dtype": "float16"}, TypeError, "dtype"),
        ({"additional_keys": -1}, ValueError, "additional_keys"),
        ({"maker": "intel"}, ValueError, "maker"),
        ({"tiles": [((8, 8), (8,))]}, ValueError, "tiles"),
        ({"tiles": [((8, 7), (8, 8))]}, ValueError, "tiles"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        plan_neighborhood_attention(**{"grid": (8, 8), "kernel_size": 4, **change})


def test_an_unknown_gpu_is_named() -> None:
    plan = plan_neighborhood_attention((8, 8), 3)
    with pytest.raises(ValueError, match="H100"):
        plan.roofline("H1000")
    with pytest.raises(ValueError, match="dtype"):
        plan_neighborhood_attention((8, 8), 3, dtype=torch.float64).roofline("H100")


def test_the_table_reads_every_kind_of_entry() -> None:
    entry = {"queries": 64, "keys": [4, 8], "warps": 4, "stages": 2, "biased": {"keys": 16}, "hip": {"warps": 8}}
    entry["cuda"] = {"2-D": {"queries": [16, 8], "keys": 64, "warps": 8, "stages": 3}}
    contents = {"tiles": table.packaged()["tiles"], "kernels": {"forward": {"2": {"32": entry}}}}
    table.use_table(contents)
    try:
        found = {
            (biased, maker): table.config("forward", 2, 20, 32, 2, biased, maker)
            for biased in (False, True)
            for maker in ("cuda", "hip")
        }
    finally:
        table.use_table(None)
    assert found[False, "cuda"] == table.Config((1, 16, 8), (1, 8, 8), 8, 3)
    assert found[True, "cuda"] == table.Config((1, 8, 8), (1, 4, 4), 4, 2)
    assert found[False, "hip"] == table.Config((1, 8, 8), (1, 4, 8), 8, 2)
    assert found[True, "hip"] == table.Config((1, 8, 8), (1, 4, 4), 8, 2)
    assert table.config("forward", 2, 20, 32, 2, False, "cuda").queries == (1, 8, 8)


def test_walks_are_plain_values() -> None:
    plan = plan_neighborhood_attention((8, 8), 3)
    assert isinstance(plan.forward.tiled, Walk) and plan == plan_neighborhood_attention((8, 8), 3)


if __name__ == "__main__":
    print(json.dumps(count_products()))
