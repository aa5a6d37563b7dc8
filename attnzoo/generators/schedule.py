"""When and where a method acts, and the counting of steps and runs."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from attnzoo.errors import UnsupportedError
from attnzoo.generators.latents import LatentShift
from attnzoo.generators.layout import StepContext

_WHOLE = ("all", "cond_uncond")  # calls that hold every branch; the second is diffusers' own name for one


@dataclass(frozen=True)
class Schedule:
    """layers: module names. steps, branches, heads: None for all of them."""

    layers: frozenset[str]
    steps: slice | frozenset[int] | None = None
    branches: frozenset[str] | None = None
    heads: tuple[int, ...] | None = None

    def active(self, ctx: StepContext) -> bool:
        """Whether the method acts in a forward at `ctx`. Raises UnsupportedError where `ctx` can't tell."""
        branch = ctx.branch.split(":")[0]  # a method's own "cond:perturbed" is a "cond"
        if self.branches is not None:
            if len(ctx.parts) > 1:
                if not self.branches.intersection(ctx.parts):
                    return False
            elif branch in _WHOLE and branch not in self.branches and not self.branches >= {"cond", "uncond"}:
                raise UnsupportedError(
                    f"branches={sorted(self.branches)}: this call carries no single branch's name (its pipeline runs "
                    "all branches in one batch, or the model runs bare): use model.cache_context(name), tell "
                    "enable(guidance=True) that a batch holds both, or leave branches=None"
                )
            if branch not in _WHOLE and branch not in self.branches:
                return False
        if self.steps is None:
            return True
        if ctx.step is None or ctx.total is None:
            raise UnsupportedError(
                "steps= needs to know the step: the model runs bare, or its scheduler has no step_index: "
                "call handle.new_run(total_steps) before each run"
            )
        if isinstance(self.steps, slice):
            return ctx.step in range(ctx.total)[self.steps]
        return ctx.step in self.steps or ctx.step - ctx.total in self.steps


def choose_layers(layers: Any, names: list[str]) -> frozenset[str]:
    """The module names that `layers` means: None (all), a name or pattern (`single*`), an index, a slice, or several.

    Raises TypeError for another kind and ValueError where an entry matches nothing.
    """
    if layers is None:
        return frozenset(names)
    entries = [layers] if isinstance(layers, (str, int, slice)) else layers
    if not isinstance(entries, Iterable):
        raise TypeError(f"layers must be names, patterns, indices or a slice, got {type(layers).__name__}")
    chosen: set[str] = set()
    for entry in entries:
        if isinstance(entry, str):
            matched = [n for n in names if fnmatchcase(n, entry) or fnmatchcase(n, f"{entry}.*")]
        elif isinstance(entry, slice):
            matched = names[entry]
        elif type(entry) is int:
            matched = names[entry : entry + 1 or None] if -len(names) <= entry < len(names) else []
        else:
            raise TypeError(f"layers must hold names, patterns, indices or slices, got {type(entry).__name__}")
        if not matched:
            raise ValueError(f"layers={entry!r} matches none of the {len(names)} self-attentions: {shorten(names)}")
        chosen.update(matched)
    if not chosen:
        raise ValueError(f"layers={layers!r} chooses none of the {len(names)} self-attentions: {shorten(names)}")
    return frozenset(chosen)


def choose_steps(steps: Any) -> slice | frozenset[int] | None:
    """`steps` as a slice or a set of indices (negative: from the end); None for all.

    Raises TypeError for another kind and ValueError for an empty collection.
    """
    if steps is None or isinstance(steps, slice):
        return steps
    entries = [steps] if type(steps) is int else steps
    if not isinstance(entries, Collection) or isinstance(entries, str) or any(type(s) is not int for s in entries):
        raise TypeError(f"steps must be a slice, a range or step indices, got {steps!r}")
    if not entries:
        raise ValueError("steps must name at least one step, got none")
    return frozenset(entries)


def choose_heads(heads: Any) -> tuple[int, ...] | None:
    """`heads` as sorted head indices; None for all. Raises TypeError or ValueError for anything else."""
    if heads is None:
        return None
    entries = [heads] if type(heads) is int else heads
    if not isinstance(entries, Collection) or isinstance(entries, str) or any(type(h) is not int for h in entries):
        raise TypeError(f"heads must be head indices, got {heads!r}")
    if not entries or min(entries) < 0:
        raise ValueError(f"heads must hold indices from 0, got {heads!r}")
    return tuple(sorted(set(entries)))


def choose_branches(branches: Any) -> frozenset[str] | None:
    """`branches` as a set of names; None for all. Raises TypeError or ValueError for anything else."""
    if branches is None:
        return None
    entries = [branches] if isinstance(branches, str) else branches
    if not isinstance(entries, Collection) or any(not isinstance(b, str) for b in entries):
        raise TypeError(f"branches must be names such as 'cond' and 'uncond', got {branches!r}")
    if not entries:
        raise ValueError("branches must name at least one branch, got none")
    return frozenset(entries)


def shorten(names: list[str], most: int = 8) -> str:
    """The first `most` names, and how many more there are."""
    return ", ".join(names[:most]) + (f", ... {len(names) - most} more" if len(names) > most else "")


class StepTracker:
    """Counts steps and runs: from a pipeline's scheduler, else from changes of the timestep since `new_run`.

    The scheduler is asked of the pipeline at each forward, because users exchange it. One tracker may serve the
    several denoisers of one pipeline (Wan 2.2).
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline: weakref.ref[Any] | None = None
        self._scheduler: Any = None
        self._timesteps: Any = None
        self._values: list[float] = []
        self._seen: set[str] = set()  # branches that came at this step
        self._declared: int | None = None
        self._step = -1
        self._timestep: float | None = None
        self._run = -1
        self._shift: LatentShift | None = None
        self._moved_at: Any = None  # timestep of the forward that may move latents
        self.guided: bool | None = None  # whether a batch holds both branches; None: as the pipeline says
        if pipeline is not None:
            self.follow(pipeline)

    def follow(self, pipeline: Any) -> None:
        """From now on steps come from `pipeline`'s scheduler."""
        self._pipeline, self._declared = weakref.ref(pipeline), None

    def new_run(self, total: int) -> None:
        """A run of `total` steps begins; steps are counted by changes of the timestep."""
        self._declared, self._step, self._timestep = total, -1, None
        self._run += 1

    def keep_latents_movable(self, wanted: bool) -> None:
        """From now on `move_latents` works, or (False) the scheduler is as it was."""
        if wanted and self._shift is None:
            shift = LatentShift()
            if (scheduler := self._current_scheduler()) is None:
                raise UnsupportedError(
                    "this method moves the pipeline's latents through its scheduler: enable it on a pipeline"
                )
            shift.follow(scheduler)
            self._shift = shift
        elif not wanted and self._shift is not None:
            self._shift.release()
            self._shift = None

    def move_latents(self, shift: torch.Tensor) -> None:
        """See `Forward.move_latents`."""
        if self._shift is None:
            raise UnsupportedError("no method that moves latents is enabled on this pipeline")
        self._shift.add(shift, self._moved_at)

    def advance(self, timestep: Any, context: Any, parts: tuple[str, ...] = ("uncond", "cond")) -> StepContext:
        """The context of a forward with `timestep`. context: diffusers' CacheContext, or None.

        parts: the branches of a batch that holds both.
        """
        branch = "all" if context is None else context.name.removeprefix("pred_")  # a guider's "pred_cond"
        scheduler = self._current_scheduler()
        if self._shift is not None:
            self._shift.follow(scheduler)
        if self._declared is not None:
            step: int | None = self._count(timestep)
            total: int | None = self._declared
        elif hasattr(scheduler, "step_index") and getattr(scheduler, "timesteps", None) is not None:
            step, total = self._from_scheduler(scheduler)
        elif getattr(scheduler, "num_inference_steps", None) is not None and hasattr(scheduler, "timesteps"):
            step, total = self._from_timesteps(scheduler.timesteps, timestep, branch)
        else:
            step = total = None
        if self._shift is not None:
            self._shift.expect((self._run, step))
            self._moved_at = timestep
        inside = parts if branch in _WHOLE and self._guided() else (branch,)
        return StepContext(step, total, timestep, branch, max(self._run, 0), inside)

    def _guided(self) -> bool:
        """Whether calls that name no branch hold both."""
        if self.guided is not None:
            return self.guided
        pipeline = self._pipeline() if self._pipeline is not None else None
        return bool(getattr(pipeline, "do_classifier_free_guidance", False))

    def _current_scheduler(self) -> Any:
        pipeline = self._pipeline() if self._pipeline is not None else None
        if pipeline is not None:  # else the last one seen: from_pipe's siblings go on with it
            self._scheduler = getattr(pipeline, "scheduler", None)
        return self._scheduler

    def _from_scheduler(self, scheduler: Any) -> tuple[int, int]:
        step = scheduler.step_index
        if step is None:  # no step taken yet; image-to-image begins later in the schedule
            step = getattr(scheduler, "begin_index", None) or 0
        # set_timesteps makes a new tensor, so one run keeps one; the same one going backwards is a new run, too.
        if scheduler.timesteps is not self._timesteps or step < self._step:
            self._timesteps = scheduler.timesteps
            self._run += 1
        self._step = int(step)
        return self._step, len(scheduler.timesteps)

    def _from_timesteps(self, timesteps: Any, timestep: Any, branch: str) -> tuple[int | None, int | None]:
        """The place of `timestep` in the schedule: for schedulers that keep no count (DDIM, PNDM).

        PNDM's schedule holds one timestep twice: the second time is when a branch comes again.
        """
        if timesteps is not self._timesteps:
            self._timesteps, self._step, self._seen = timesteps, -1, set()
            self._values = [float(t) for t in timesteps]
            self._run += 1
        value = float(timestep.reshape(-1)[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        if value not in self._values:
            return None, None
        here = self._step
        if here < 0 or self._values[here] != value:
            later = [i for i, v in enumerate(self._values) if v == value and i > here]
            place = later[0] if later else self._values.index(value)
        else:
            again = branch in self._seen and here + 1 < len(self._values) and self._values[here + 1] == value
            place = here + 1 if again else here
        if place != here:
            self._run += place < here
            self._step, self._seen = place, set()
        self._seen.add(branch)
        return place, len(self._values)

    def _count(self, timestep: Any) -> int:
        value = float(timestep.reshape(-1)[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        if value != self._timestep:  # guidance by two calls repeats the timestep
            self._step, self._timestep = self._step + 1, value
        if self._declared is not None and self._step >= self._declared:
            raise UnsupportedError(
                f"step {self._step + 1} of a run of {self._declared}: call handle.new_run(total) again"
            )
        return self._step
