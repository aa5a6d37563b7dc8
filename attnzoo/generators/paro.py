"""PAROAttention: per head the order of the grid's axes that makes attention block-wise, and static masks of blocks.

Paper: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual
Generation Models", NeurIPS 2025, arXiv:2506.16054. No public code: adapted. Which statement each step comes from:

    abstract    "Pattern-Aware token ReOrdering ... unifies the diverse attention patterns into a hardware-friendly
                block-wise pattern": blocks are cut along an order of the tokens, per head
    abstract    "lower density (20%-30%)": the default density
    reviews of the paper (openreview UPELg2oUo3, as paperhub.cn quotes them): "the best permutation choice from the 6
                possible cases"
    a summary   (paperium.net, article 12618): the permutation is determined offline, and applying it changes address
                arithmetic only: here the kernel reads through the order, nothing is moved
    from memory of the paper (shared/specs/generators.md, section 2.1), to be checked: the choice minimises a mix of a
                block-sparsity score and of max / mean within blocks (what quantisation suffers from); blocks of 64; one
                mask for the first and one for the second half of the steps; text is untouched

Ours: both scores are divided by their mean over the permutations before they are mixed; a head's mask are the blocks of
the largest mean mass over the calibration, and in each row the largest one. The 8-bit option is queries times keys;
products with the values stay in their dtype (the paper has INT8 and INT4 there, too).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice, check_number, check_range
from attnzoo.generators.block_mass import Mass, block_counts, block_mass, largest
from attnzoo.generators.blocks import BlockMethod, Choice, grid_first, grid_of, visible_keys
from attnzoo.generators.chain import Layer, Next
from attnzoo.generators.forward import Forward
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.tables import load_table, save_table
from attnzoo.kernels import axis_order
from attnzoo.kernels.block_sparse_attention.orders import in_order

EARLY, LATE = "early", "late"
RECORD = (None, "order", "mask")


def permutations(rank: int) -> list[tuple[int, ...]]:
    """The orders of the axes: (0, 1, 2), (0, 2, 1), ..., the grid's own first."""
    return list(itertools.permutations(range(rank)))


def permutation_scores(mass: Mass, density: float, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(lost, uneven), [H] each, of one permutation's blocks; less is better in both.

    lost: share of the grid's mass outside of the `density` largest blocks of every row. uneven: max / mean within a
    block, weighted by the blocks' mass.
    """
    kept = (mass.mass * largest(mass.mass, density)).sum((-1, -2))
    total = mass.mass.sum((-1, -2))
    ratio = mass.peak * block_size[1] / mass.mass.clamp(min=torch.finfo(mass.mass.dtype).tiny)
    uneven = (ratio * mass.mass).sum((-1, -2)) / total
    return (1.0 - kept / total).mean(0), uneven.mean(0)


def static_mask(mass: Tensor, density: float) -> Tensor:
    """bool [H, nq, nk]: the `density` largest blocks of a head, and of each row the largest; mass [H, nq, nk]."""
    flat = mass.flatten(1)[:, None, None]
    chosen = largest(flat, density)[:, 0, 0].view_as(mass)
    return chosen | torch.zeros_like(chosen).scatter(-1, mass.argmax(-1, keepdim=True), True)


@dataclass(frozen=True, eq=False)
class ParoLayer:
    """One layer's tables. axes: int [H, rank], the order of the axes per head. early, late: bool [H, nq, nk]."""

    grid: tuple[int, ...]
    block_size: tuple[int, int]
    axes: Tensor
    early: Tensor
    late: Tensor

    def order(self, device: torch.device) -> Tensor:
        """int64 [H, N]: the tokens along each head's order."""
        return torch.stack([axis_order(self.grid, tuple(row)) for row in self.axes.tolist()]).to(device)


class ParoTables(dict[str, ParoLayer]):
    """The tables of a denoiser's layers by name, made by `calibrate_paro`, for one checkpoint and grid."""

    def save(self, path: str | os.PathLike[str], **about: str) -> None:
        """Write a safetensors file; about: strings that stand in it (the checkpoint's name, say)."""
        tensors = {}
        for name, layer in self.items():
            tensors[f"{name}|shape"] = torch.tensor([*layer.grid, *layer.block_size])
            tensors[f"{name}|axes"] = layer.axes
            tensors[f"{name}|early"], tensors[f"{name}|late"] = layer.early, layer.late
        save_table(path, tensors, **{**about, "kind": "paro"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ParoTables:
        """The tables of a file that `save` wrote. Raises as `load_table`, and ValueError for another kind of table."""
        tensors, about = load_table(path)
        if about.get("kind") != "paro":
            raise ValueError(f"path must hold tables of paro, {path} holds {about.get('kind', 'others')}")
        made = cls()
        for name in dict.fromkeys(key.rpartition("|")[0] for key in tensors):
            shape = tensors[f"{name}|shape"].tolist()
            rest = (tensors[f"{name}|{part}"] for part in ("axes", "early", "late"))
            made[name] = ParoLayer(tuple(shape[:-2]), (shape[-2], shape[-1]), *rest)
        return made


class Paro(BlockMethod):
    """Static blocks along per-head orders of the axes; `calibrate_paro` makes the tables.

    tables: a `ParoTables`, or the path of its file, for the layers that the method acts on and their grids.
    qk_int8, skip_threshold, backend: of `attnzoo.kernels.block_sparse_attention`.
    record: "order" or "mask": the two passes of the calibration, see `calibrate_paro`: attention is dense (neutral),
        and what the calls show is kept.
    block_size, density, mix: of the calibration: tokens of a block; share of the blocks that is to be kept; weight of
        the sparsity score (the rest is the other's).
    """

    name: ClassVar[str] = "paro"

    def __init__(
        self,
        rank: int,
        *,
        tables: Any = None,
        record: str | None = None,
        block_size: int | Sequence[int] = 64,
        density: float = 0.3,
        mix: float = 0.5,
        skip_threshold: float | None = None,
        qk_int8: bool = False,
        backend: str = "auto",
    ) -> None:
        """rank: axes of the model's grid. Raises TypeError or ValueError, naming the argument."""
        check_choice("record", record, RECORD)
        if isinstance(tables, str | os.PathLike):
            tables = ParoTables.load(tables)
        if tables is None and record != "order":
            raise TypeError("paro needs tables=, made by calibrate_paro")
        if tables is not None:
            if not isinstance(tables, Mapping) or not all(isinstance(t, ParoLayer) for t in tables.values()):
                raise TypeError(f"tables must be a ParoTables or a path, got {type(tables).__name__}")
            sizes = {t.block_size for t in tables.values()}
            if len(sizes) != 1:
                raise ValueError(f"tables must be of one block_size, got {sorted(sizes)}")
            block_size = sizes.pop()
        super().__init__(rank, block_size=block_size, qk_int8=qk_int8, skip_threshold=skip_threshold, backend=backend)
        for name, number in (("density", density), ("mix", mix)):
            check_number(name, number)
            check_range(name, number, 0.0, 1.0)
        self.tables: Mapping[str, ParoLayer] | None = tables
        self.record, self.wanted, self.mix = record, density, mix
        self._halves = any(not torch.equal(t.early, t.late) for t in (tables or {}).values())
        self._orders: dict[str, Tensor] = {}
        self._masks: dict[tuple[str, Hashable], Tensor] = {}
        self._scores: dict[str, tuple[tuple[int, ...], list[Tensor]]] = {}  # grid, [permutations, 2, H] per call
        self._masses: dict[tuple[str, Hashable], tuple[int, Tensor]] = {}  # how many, their sum [H, nq, nk]

    def settings(self) -> dict[str, Any]:
        return {"record": self.record, "density": self.wanted, "mix": self.mix, **self.block_settings()}

    def expected(self, layout: TokenLayout) -> float | None:
        if self.record is not None:
            return 1.0
        assert self.tables is not None
        own = [t for t in self.tables.values() if t.grid == layout.grid]
        shares = [float((t.early.float().mean() + t.late.float().mean()) / 2) for t in own]
        return sum(shares) / len(shares) if shares else None

    def state_bytes(self) -> int:
        kept = [*self._orders.values(), *self._masks.values(), *(mass for _, mass in self._masses.values())]
        kept += [score for _, scores in self._scores.values() for score in scores]
        return super().state_bytes() + sum(t.nbytes for t in kept)

    def forget(self) -> None:
        super().forget()
        self._orders, self._masks, self._scores, self._masses = {}, {}, {}, {}

    def phase(self, ctx: StepContext) -> Hashable:
        if self.record == "order":
            return EARLY
        if ctx.step is None or ctx.total is None:
            if self.record is None and not self._halves:
                return LATE
            raise UnsupportedError(
                "paro has a mask for each half of the steps and needs to know the step: call "
                "handle.new_run(total_steps) before each run"
            )
        return EARLY if 2 * ctx.step < ctx.total else LATE

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        if self.tables is not None:  # outside of what torch.compile compiles, for it reads values
            device = forward.latents.device
            for name in forward.layers(self):
                if name in self.tables:
                    own = self.tables[name]
                    self._order(name, own, device)
                    for half in (EARLY, LATE):
                        self._mask(name, own, half, device)
        return forward()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: TokenLayout,
        ctx: StepContext,
        layer: Layer,
        next: Next,
    ) -> Tensor:
        if self.record is not None:
            if query.shape[1] != key.shape[1]:
                raise UnsupportedError(f"{layer.name}: paro wants a key head for each query head")
            with torch.no_grad():
                self._note(grid_of(layout, query), key, visible_keys(mask), layout, layer)
            return next(query, key, value, mask)
        return super().attend(query, key, value, mask, layout, ctx, layer, next)

    def _note(self, query: Tensor, key: Tensor, seen: Tensor | None, layout: TokenLayout, layer: Layer) -> None:
        """One call of the calibration."""
        key, seen = grid_first(layout, key), None if seen is None else grid_first(layout, seen, 1)
        if seen is not None and not bool(seen[:, : layout.num_grid].all()):
            raise UnsupportedError(f"{layer.name}: paro's calibration wants no mask over the grid's tokens")
        inside = layout.num_grid

        def mass_along(order: Tensor) -> Mass:
            """order: [H or 1, num_grid]."""
            keys = torch.cat([in_order(key[:, :, :inside], order), key[:, :, inside:]], 2)
            return block_mass(in_order(query, order), keys, inside, self.block_size, layer.scale, seen=seen)

        if self.record == "mask":
            own = self._table(layer.name, layout, query.shape[1])
            mass = mass_along(self._order(layer.name, own, query.device)).mass
            count, total = self._masses.get((layer.name, layer.phase), (0, torch.zeros_like(mass[0])))
            self._masses[layer.name, layer.phase] = count + len(mass), total + mass.sum(0)
            return
        found = []
        for axes in permutations(len(layout.grid)):
            blocks = mass_along(axis_order(layout.grid, axes).to(query.device)[None])
            found.append(torch.stack(permutation_scores(blocks, self.wanted, self.block_size)))
        grid, scores = self._scores.setdefault(layer.name, (layout.grid, []))
        if grid != layout.grid:
            raise UnsupportedError(f"{layer.name}: the calibration saw two grids, {grid} and {layout.grid}")
        scores.append(torch.stack(found))

    def orders(self) -> ParoTables:
        """After the first pass: tables with each head's best order; their masks are full. Raises ValueError before."""
        if not self._scores:
            raise ValueError("no call was recorded: run the pipeline under record='order' first")
        made = ParoTables()
        for name, (grid, scores) in self._scores.items():
            lost, uneven = torch.stack(scores).mean(0).unbind(1)  # [permutations, H]

            def relative(score: Tensor) -> Tensor:
                return score / score.mean(0).clamp(min=torch.finfo(score.dtype).tiny)

            best = (self.mix * relative(lost) + (1.0 - self.mix) * relative(uneven)).argmin(0).cpu()
            axes = torch.tensor(permutations(len(grid)))[best]
            full = torch.ones(len(axes), *block_counts(math.prod(grid), self.block_size), dtype=torch.bool)
            made[name] = ParoLayer(grid, self.block_size, axes, full, full)
        return made

    def masks(self) -> ParoTables:
        """After the second pass: the tables with both masks; a half that had no call has the other's.

        Raises ValueError where nothing was recorded.
        """
        if not self._masses or self.tables is None:
            raise ValueError("no call was recorded: run the pipeline under record='mask' first")
        made = ParoTables()
        for name in dict.fromkeys(name for name, _ in self._masses):
            own, found = self.tables[name], {}
            for half in (EARLY, LATE):
                if (name, half) in self._masses:
                    count, total = self._masses[name, half]
                    found[half] = static_mask(total / count, self.wanted).cpu()
            early, late = found.get(EARLY, found.get(LATE)), found.get(LATE, found.get(EARLY))
            assert early is not None and late is not None
            made[name] = ParoLayer(own.grid, own.block_size, own.axes, early, late)
        return made

    def _table(self, layer: str, layout: TokenLayout, heads: int) -> ParoLayer:
        assert self.tables is not None
        if layer not in self.tables:
            raise UnsupportedError(f"tables hold nothing for {layer}: calibrate it, or leave it out with layers=")
        own = self.tables[layer]
        if own.grid != layout.grid or len(own.axes) != heads:
            raise UnsupportedError(
                f"tables for {layer} are of grid {own.grid} and {len(own.axes)} heads, this call has {layout.grid} and "
                f"{heads}: calibrate for this size"
            )
        return own

    def _order(self, layer: str, own: ParoLayer, device: torch.device) -> Tensor:
        if layer not in self._orders or self._orders[layer].device != device:
            self._orders[layer] = own.order(device)
        return self._orders[layer]

    def _mask(self, layer: str, own: ParoLayer, half: str, device: torch.device) -> Tensor:
        mask = self._masks.get((layer, half))
        if mask is None or mask.device != device:
            mask = self._masks[layer, half] = (own.early if half == EARLY else own.late).to(device)[None]
        return mask

    def choose(
        self, query: Tensor, key: Tensor, seen: Tensor | None, layout: TokenLayout, ctx: StepContext, layer: Layer
    ) -> Choice | None:
        own = self._table(layer.name, layout, query.shape[1])
        mask = self._mask(layer.name, own, EARLY if layer.phase == EARLY else LATE, query.device)
        return Choice(mask, self._order(layer.name, own, query.device))


def calibrate_paro(
    pipe_or_model: Any,
    run: Callable[[], Any],
    *,
    layers: Any = None,
    density: float = 0.3,
    mix: float = 0.5,
    block_size: int | Sequence[int] = 64,
    new_run: int | None = None,
) -> ParoTables:
    """The tables for `enable(pipe, "paro", tables=...)`: `run()` is called twice and must run the pipeline each time.

    The first time each head's order of the axes is chosen, the second time its masks; both are dense runs. On a
    pipeline of several denoisers the first one of a known family is calibrated.
    density, mix, block_size: see `Paro`. new_run: steps of a run where no scheduler tells them (bare models).
    Raises as `enable`.
    """
    from attnzoo.generators.handles import enable, find_targets  # it names all methods, this one too

    model = find_targets(pipe_or_model)[0].model
    target = pipe_or_model if model is pipe_or_model else _First(pipe_or_model, model)
    common = {"layers": layers, "density": density, "mix": mix, "block_size": block_size}
    found = None
    for record in ("order", "mask"):
        with enable(target, "paro", record=record, tables=found, **common) as handle:
            if new_run is not None:
                handle.new_run(new_run)
            run()
            (method,) = handle.methods("paro")
            assert isinstance(method, Paro)
            found = method.orders() if record == "order" else method.masks()
    assert found is not None
    return found


class _First:
    """A pipeline seen with one of its denoisers."""

    def __init__(self, pipeline: Any, model: Any) -> None:
        self._pipeline = pipeline
        self.components = {name: c for name, c in pipeline.components.items() if c is model}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)
