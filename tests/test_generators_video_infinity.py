"""Video-Infinity's dual scope: what is visible, biases, full video attention, and two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("diffusers")

from generator_models import as_double, build, is_clean, run

from attnzoo.errors import UnsupportedError
from attnzoo.generators import enable
from attnzoo.generators.chain import Layer
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.video_infinity import (
    VideoInfinity,
    dual_scope_attention,
    phase_biases,
    scope,
    spread_frames,
    take_frames,
)

PHASES = {
    "local_phase": {"t": 800, "local_bias": 0.4, "global_bias": -0.3},
    "global_phase": {"t": 600, "global_bias": 0.9},
}


@pytest.mark.parametrize("compat", ["default", "official"])
@pytest.mark.parametrize(
    ("frames", "clips", "padding", "top_k"), [(12, 3, 2, 4), (10, 2, 3, 6), (6, 1, 0, 3), (8, 4, 1, 0)]
)
def test_scopes_say_what_they_say(frames: int, clips: int, padding: int, top_k: int, compat: str) -> None:
    length = frames // clips
    spread = spread_frames(frames, top_k, clips, compat)
    assert len(spread) <= top_k and all(0 <= f < frames for f in spread)
    for clip in range(clips):
        found = scope(frames, padding, top_k, clips, clip, compat)
        assert not bool((found.near & found.far).any())
        for row in range(length):
            own = clip * length + row
            around = list(range(own - padding, own + padding + 1))
            near = [found.frames[j] for j in range(len(found.frames)) if found.near[row, j]]
            far = [found.frames[j] for j in range(len(found.frames)) if found.far[row, j]]
            if compat == "official":
                assert near == [f if 0 <= f < frames else -1 for f in around] and far == spread
            else:
                assert near == [f for f in around if 0 <= f < frames]
                assert sorted(far) == sorted(set(spread) - set(near)) and len(set(far)) == len(far)


def test_biases_and_bad_input() -> None:
    for t, wanted in ((700, (0.4, 0.6)), (900, (0.0, 0.9)), (500, (0.4, -0.3))):
        assert phase_biases(t, **PHASES) == pytest.approx(wanted)
    assert phase_biases(1.0, None, None) == (0.0, 0.0)
    case = build("wan")
    for options, error, words in (
        ({"padding": -1}, ValueError, "padding"),
        ({"top_k": 1.5}, TypeError, "top_k"),
        ({"local_phase": {"local_bias": 1}}, ValueError, "local_phase"),
        ({"global_phase": 3}, TypeError, "global_phase"),
        ({"compat": "x"}, ValueError, "compat"),
        ({"group": "world"}, ValueError, "initialised"),
        ({"token_num_scale": 1}, TypeError, "token_num_scale"),
    ):
        with pytest.raises(error, match=words):
            enable(case.model, "video_infinity", **options)
    with pytest.raises(UnsupportedError, match="frames"):
        enable(build("flux").model, "video_infinity")
    with pytest.raises(ValueError, match="divide"):
        scope(7, 1, 1, 2)
    with pytest.raises(ValueError, match="padding"):
        scope(8, 5, 1, 2, compat="official")


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, method: VideoInfinity, biases: tuple[float, float], pad: Any
) -> Tensor:
    """Dense attention with a bias for every pair of tokens, the scopes frame by frame."""
    frames, start, n = layout.grid[0], layout.grid_start, layout.num_grid
    places = n // frames
    length = frames // method.clips
    out = F.scaled_dot_product_attention(q, k, v, pad)  # text queries
    for clip in range(method.clips):
        own = scope(frames, method.padding, method.top_k, method.clips, clip, method.compat)
        others = [i for i in range(layout.length) if not start <= i < start + n]

        def pick(t: Tensor, own: Any = own, others: Any = others) -> Tensor:
            grid = t[:, :, start : start + n].unflatten(2, (frames, places)).transpose(1, 2)
            rows = take_frames(grid, own.frames).transpose(1, 2).flatten(2, 3)
            return torch.cat([rows, t[:, :, others]], 2)

        bias = torch.full(own.near.shape, -math.inf, dtype=q.dtype)
        bias[own.near], bias[own.far] = biases
        bias = bias.repeat_interleave(places, 0).repeat_interleave(places, 1)
        bias = F.pad(bias, (0, len(others))).expand(len(q), 1, -1, -1).clone()
        if pad is not None:
            bias[:, 0, :, -len(others) :] += torch.zeros(pad.shape).masked_fill(~pad, -math.inf)[:, 0, :, others]
        rows = slice(start + clip * length * places, start + (clip + 1) * length * places)
        scale = q.shape[-1] ** -0.5 * (1.0 if method.token_num_scale else method.attn_scale)
        query = q[:, :, rows]
        if method.token_num_scale:
            count = (own.near | own.far).sum(1).double().log() / math.log(16)
            query = query * count.repeat_interleave(places)[:, None]
        out[:, :, rows] = (query @ pick(k).transpose(-1, -2) * scale + bias).softmax(-1) @ pick(v)
    return out


@pytest.mark.parametrize("compat", ["default", "official"])
@pytest.mark.parametrize("biases", [(0.0, 0.0), (0.5, -0.7)])
@pytest.mark.parametrize(
    ("layout", "padded"),
    [
        (TokenLayout((6, 2, 3)), False),
        (TokenLayout((6, 1, 1)), False),
        (TokenLayout((6, 2, 2), 5, "first"), False),
        (TokenLayout((6, 2, 2), 5, "last"), True),
    ],
)
def test_full_attention_is_dense_attention_with_the_biases(
    layout: TokenLayout, padded: bool, biases: tuple[float, float], compat: str
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, layout.length, 8, dtype=torch.float64) for _ in range(3))
    pad = None
    if padded:
        pad = torch.ones(2, 1, 1, layout.length, dtype=torch.bool)
        pad[1, ..., -2:] = False

    def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)

    for options in ({}, {"token_num_scale": True}, {"attn_scale": 1.3}):
        method = VideoInfinity(3, padding=1, top_k=2, clips=2, block_size=4, compat=compat, **options)
        got = method.attend(q, k, v, pad, layout, StepContext(), Layer("x", 0, phase=biases), stock)
        wanted = by_hand(q, k, v, layout, method, biases, pad)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox", "ltx", "qwen_image"])
def test_on_every_video_family(family: str) -> None:
    case = build(family)
    dense = run(case)
    with enable(case.model, "video_infinity", padding=4096):
        assert torch.equal(run(case), dense)
    if case.grid[0] > 2:
        with enable(case.model, "video_infinity", padding=0, top_k=1) as handle:
            on = run(case)
            row = handle.report()["denoisers"][0]
            assert row["state_bytes"] > 0 and 0 < row["density"] < 1
            assert torch.equal(run(case), on)
        assert not torch.allclose(on, dense, atol=1e-4)
        with enable(case.model, "video_infinity", padding=1, top_k=1, **PHASES):
            assert not torch.allclose(run(case), dense, atol=1e-4)
        wide = as_double(build(family))
        with enable(wide.model, "video_infinity", padding=0, top_k=1):
            assert run(wide).dtype == torch.float64
    assert torch.equal(run(case), dense) and is_clean(case.model)


def _rank(rank: int, world: int, folder: str) -> None:
    """One process: its clip of the video, temporal and full attention; both are saved."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        video = torch.load(f"{folder}/in.pt", weights_only=True)
        length = video["q"].shape[2] // world
        mine = [video[n][:, :, rank * length : (rank + 1) * length] for n in "qkv"]
        out = {}
        for compat in ("default", "official"):
            options = {"padding": 2, "top_k": 4, "local_bias": 0.2, "compat": compat}
            out[compat] = dual_scope_attention(*mine, group="world", **options)
        layout = TokenLayout((length // 2, 1, 2), 2, "last")  # the same numbers as frames of two places, and two texts
        tokens = [torch.cat([t, video[f"{n}_text"]], 2) for t, n in zip(mine, "qkv")]
        method = VideoInfinity(3, padding=1, top_k=2, group=dist.group.WORLD, block_size=4)
        layer = Layer("x", 0, phase=(0.0, 0.0))
        stock = F.scaled_dot_product_attention
        out["full"] = method.attend(*tokens, None, layout, StepContext(), layer, stock)[:, :, :length]
        case = build("wan")
        with enable(case.model, "video_infinity", group="world"):
            try:
                run(case)
            except UnsupportedError as error:
                out["refused"] = torch.tensor("begins at 0" in str(error))
        torch.save(out, f"{folder}/out{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    torch.manual_seed(2)
    video = {n: torch.randn(3, 2, 12, 8) for n in "qkv"} | {f"{n}_text": torch.randn(3, 2, 2, 8) for n in "qkv"}
    torch.save(video, tmp_path / "in.pt")
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"out{rank}.pt", weights_only=True) for rank in range(2)]
    for compat in ("default", "official"):
        one = dual_scope_attention(
            *(video[n] for n in "qkv"), padding=2, top_k=4, clips=2, local_bias=0.2, compat=compat
        )
        torch.testing.assert_close(torch.cat([p[compat] for p in parts], 2), one)
    layout = TokenLayout((6, 1, 2), 2, "last")
    whole = [torch.cat([video[n], video[f"{n}_text"]], 2) for n in "qkv"]
    method = VideoInfinity(3, padding=1, top_k=2, clips=2, block_size=4)
    stock = F.scaled_dot_product_attention
    full = method.attend(*whole, None, layout, StepContext(), Layer("x", 0, phase=(0.0, 0.0)), stock)
    torch.testing.assert_close(torch.cat([p["full"] for p in parts], 2), full[:, :, :12])
    assert all(bool(p["refused"]) for p in parts)
