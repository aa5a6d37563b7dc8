"""Pyramid attention broadcast: attention and feed-forward outputs answered again in later steps, by kind of layer.

Paper: Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast" (arXiv:2408.12588).
Code: NUS-HPC-AI-Lab/VideoSys 4cce477, videosys/core/pab/pab_mgr.py, and the tables of its pipelines.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_number, per_axis
from attnzoo.generators.chain import CROSS, MLP, SELF, Call, Layer, Method, Stage
from attnzoo.generators.forward import Forward
from attnzoo.generators.layout import StepContext, TokenLayout

KINDS = ("spatial", "temporal", "cross")
#: The authors' settings by their pipeline: ranges and thresholds (VideoSys 4cce477).
PRESETS: dict[str, dict[str, Any]] = {
    name: {f"{kind}_range": size for kind, size in zip(KINDS, ranges)} | {"threshold": threshold}
    for name, ranges, threshold in (
        ("latte", (2, 3, 6), (100, 800)),
        ("open_sora", (2, 4, 6), (450, 930)),
        ("open_sora_plan", (2, 4, 6), (100, 850)),
        ("allegro", (2, 4, 6), (100, 850)),
        ("cogvideox", (2, 1, 1), (100, 850)),
    )
}
#: Of our families the authors have tuned CogVideoX; Latte's table (diffusers' default, too) stands for the others.
FAMILY_PRESETS = {"CogVideoX": "cogvideox"}


def broadcast_reuse(step: int, noise_level: float, every: int, threshold: tuple[float, float]) -> bool:
    """Whether a layer that is computed `every` steps answers with what it has in `step`.

    noise_level: the timestep; it must lie strictly between the two thresholds.
    """
    return step % every != 0 and threshold[0] < noise_level < threshold[1]


def broadcast_schedule(timesteps: Sequence[float], every: int, threshold: tuple[float, float]) -> Tensor:
    """bool [len(timesteps)], `broadcast_reuse` of each step of a run; each run begins at step 0."""
    return torch.tensor([broadcast_reuse(i, float(t), every, threshold) for i, t in enumerate(timesteps)])


class _Phase(NamedTuple):
    """What the layers of each kind do: "compute", "store" or "reuse"; the blocks whose feed-forward layer stores, or
    answers again."""

    spatial: str
    temporal: str
    cross: str
    mlp_store: frozenset[int]
    mlp_reuse: frozenset[int]


class PAB(Method):
    """Answers with a layer's earlier output while the timestep lies between two thresholds.

    What is kept belongs to one branch (diffusers' own cache mixes the conditional and the unconditional call), and
    steps are the scheduler's, not calls.

    preset: the authors' table, one of `PRESETS`; None: that of the model's family. What is given beside it wins.
    spatial_range, temporal_range, cross_range: a layer of this kind is computed when step % range == 0 (1: always).
    Temporal are self-attentions with "temporal" in their name, spatial all other self-attentions (also over video).
    threshold: (low, high) on the training schedule's scale, 1000 to 0, for all kinds; spatial_threshold,
    temporal_threshold, cross_threshold: for one kind.
    mlp: {timestep: {"block": [numbers], "skip_count": n}}: at the step of this timestep (as an integer) the
    feed-forward layers of these blocks are computed, and the n steps after it get the same output. The block number is
    the first number in the layer's name. None: no feed-forward layer is skipped.

    The step must be known, see `Handle.new_run`. Neutral: all ranges 1.
    """

    name: ClassVar[str] = "pab"
    stage: ClassVar[Stage] = Stage.REUSE
    roles: ClassVar[frozenset[str]] = SELF | CROSS | MLP
    needs_noise_level: ClassVar[bool] = True

    def __init__(
        self,
        rank: int,
        *,
        preset: str | None = None,
        spatial_range: int | None = None,
        temporal_range: int | None = None,
        cross_range: int | None = None,
        threshold: tuple[float, float] | None = None,
        spatial_threshold: tuple[float, float] | None = None,
        temporal_threshold: tuple[float, float] | None = None,
        cross_threshold: tuple[float, float] | None = None,
        mlp: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        self.preset = preset or "latte"
        table = PRESETS[self.preset]
        every = (spatial_range, temporal_range, cross_range)
        bounds = (spatial_threshold, temporal_threshold, cross_threshold)
        self.every: dict[str, int] = {}
        self.threshold: dict[str, tuple[float, float]] = {}
        for kind, own, bound in zip(KINDS, every, bounds):
            name = f"{kind}_range"
            (self.every[kind],) = per_axis(name, table[name] if own is None else own, 1, low=1)
            named = {"threshold": threshold, f"{kind}_threshold": bound}
            given = [(name, pair) for name, pair in named.items() if pair is not None]
            self.threshold[kind] = _pair(*given[-1]) if given else table["threshold"]
        self.mlp = {} if mlp is None else _checked(mlp)
        self._at: tuple[int, int] = (-1, -1)
        self._from: dict[int, int] = {}  # block: the step whose feed-forward output is kept
        self._kept: dict[tuple[str, str], Any] = {}

    @classmethod
    def defaults(cls, family: str) -> dict[str, Any]:
        return {"preset": FAMILY_PRESETS.get(family)}

    def settings(self) -> dict[str, Any]:
        ranges = {f"{kind}_range": self.every[kind] for kind in KINDS}
        thresholds = {f"{kind}_threshold": self.threshold[kind] for kind in KINDS}
        return {"preset": self.preset, **ranges, **thresholds, "mlp": self.mlp or None}

    def phase(self, ctx: StepContext) -> Hashable:
        if ctx.step is None or ctx.noise_level is None:
            raise UnsupportedError(
                "pab needs to know the step: the model runs bare, or its scheduler has no step_index: "
                "call handle.new_run(total_steps) before each run"
            )
        if ctx.run != self._at[0] or ctx.step < self._at[1]:
            self.forget()
        level = ctx.noise_level
        found = []
        for kind in KINDS:
            if self.every[kind] == 1 or level <= self.threshold[kind][0]:
                found.append("compute")
            else:
                reuse = broadcast_reuse(ctx.step, level, self.every[kind], self.threshold[kind])
                found.append("reuse" if reuse else "store")
        starting = self.mlp.get(int(level))
        store = frozenset(starting[0]) if starting else frozenset()
        if starting and ctx.step != self._at[1]:
            self._from.update(dict.fromkeys(store, ctx.step + starting[1]))
        self._at = (ctx.run, ctx.step)
        reuse_of = frozenset(b for b, last in self._from.items() if b not in store and ctx.step <= last)
        return _Phase(found[0], found[1], found[2], store, reuse_of)

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        now: Any = self.phase(ctx)
        done = {kind for kind in KINDS if getattr(now, kind) == "compute"}
        blocks = now.mlp_store | now.mlp_reuse
        self._kept = {
            key: output
            for key, output in self._kept.items()
            if (key[0] not in done if key[0] in KINDS else _block(key[1].split("@")[0]) in blocks)
        }
        return forward()

    def around(self, call: Call, layout: TokenLayout, ctx: StepContext, layer: Layer) -> Any:
        now: Any = layer.phase
        if layer.role in MLP:
            kind, block = "mlp", _block(layer.name)
            todo = "store" if block in now.mlp_store else "reuse" if block in now.mlp_reuse else "compute"
        else:
            kind = "cross" if layer.role in CROSS else "temporal" if "temporal" in layer.name else "spatial"
            todo = getattr(now, kind)
        key = (kind, f"{layer.name}@{ctx.branch}")
        if todo == "reuse" and key in self._kept:
            return self._kept[key]
        output = call()
        if todo != "compute":
            self._kept[key] = (
                tuple(t.detach() if isinstance(t, Tensor) else t for t in output)
                if isinstance(output, tuple)
                else output.detach()
            )
        return output

    def state_bytes(self) -> int:
        kept = [t for out in self._kept.values() for t in (out if isinstance(out, tuple) else (out,))]
        return sum(t.nbytes for t in kept if isinstance(t, Tensor))

    def forget(self) -> None:
        self._kept, self._from, self._at = {}, {}, (-1, -1)


def _block(name: str) -> int | None:
    """Number of the block that a layer stands in: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def _pair(name: str, pair: Any) -> tuple[float, float]:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"{name} must be (low, high), got {pair!r}")
    for bound in pair:
        check_number(name, bound)
    if pair[0] > pair[1]:
        raise ValueError(f"{name} must be (low, high) with low <= high, got {pair!r}")
    return (pair[0], pair[1])


def _checked(mlp: Any) -> dict[int, tuple[tuple[int, ...], int]]:
    """`mlp` as {timestep: (blocks, skip_count)}."""
    wanted = 'mlp must be {timestep: {"block": [numbers], "skip_count": n}}'
    if not isinstance(mlp, Mapping):
        raise TypeError(f"{wanted}, got {type(mlp).__name__}")
    found = {}
    for level, entry in mlp.items():
        if type(level) is not int or not isinstance(entry, Mapping) or set(entry) != {"block", "skip_count"}:
            raise TypeError(f"{wanted}, got {level!r}: {entry!r}")
        blocks, count = entry["block"], entry["skip_count"]
        if not isinstance(blocks, Collection) or any(type(b) is not int or b < 0 for b in blocks):
            raise TypeError(f"{wanted}, got block={blocks!r}")
        per_axis("skip_count", count, 1, low=1)
        found[level] = (tuple(blocks), count)
    return found
