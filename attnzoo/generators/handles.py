"""Switching methods on and off: `enable` and the handle that it returns."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from torch import nn

from attnzoo.errors import UnsupportedError, check_choice, per_axis
from attnzoo.generators.adapters import FAMILIES, REFUSED, Family, family_of
from attnzoo.generators.chain import Method
from attnzoo.generators.hooks import Denoiser, denoiser_of
from attnzoo.generators.methods import METHODS
from attnzoo.generators.schedule import (
    Schedule,
    StepTracker,
    choose_branches,
    choose_heads,
    choose_layers,
    choose_steps,
)

_switching = threading.RLock()


class Target(NamedTuple):
    """One denoiser that a call means. name: the pipeline's component, "" for a bare model; wrapper: torch.compile's."""

    name: str
    model: nn.Module
    wrapper: nn.Module | None
    family: Family


def find_targets(pipe_or_model: Any) -> list[Target]:
    """The denoisers of a pipeline, or the one that a model is. Raises TypeError where there is none."""
    if isinstance(pipe_or_model, nn.Module):
        candidates = {"": pipe_or_model}
    elif isinstance(getattr(pipe_or_model, "components", None), Mapping):
        candidates = {n: c for n, c in pipe_or_model.components.items() if isinstance(c, nn.Module)}
    else:
        raise TypeError(f"expected a diffusers pipeline or model, got {type(pipe_or_model).__name__}")
    targets = []
    for name, candidate in candidates.items():
        original = getattr(candidate, "_orig_mod", None)
        model = candidate if original is None else original
        family = family_of(model)
        if family is not None:
            targets.append(Target(name, model, None if original is None else candidate, family))
    if not targets:
        refused = {base.__name__ for c in candidates.values() for base in type(c).__mro__ if base.__name__ in REFUSED}
        if refused:
            raise UnsupportedError("; ".join(f"{name}: {REFUSED[name]}" for name in sorted(refused)))
        got = ", ".join(sorted({type(c).__name__ for c in candidates.values()})) or "no model at all"
        raise UnsupportedError(f"no denoiser of a known family in {got}; known are {', '.join(sorted(FAMILIES))}")
    return targets


class Part(NamedTuple):
    """One method on one denoiser. name: the pipeline's component, "" for a bare model."""

    name: str
    denoiser: Denoiser
    method: Method
    schedule: Schedule


class Handle:
    """The methods that one `enable` call switched on. Leaving a `with` block disables it."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._guided: StepTracker | None = None  # the tracker that this handle told about guidance

    def disable(self) -> None:
        """Take the methods away; the last handle on a denoiser takes the hooks with it. Twice does no harm."""
        with _switching:
            for _, denoiser, method, _ in self._parts:
                denoiser.remove(method)
                del denoiser.owners[method.name]
                _follow_latents(denoiser)
                if not denoiser.methods:
                    denoiser.detach()
            self._parts = []
            if self._guided is not None:
                self._guided.guided = None
                self._guided = None

    @property
    def enabled(self) -> bool:
        """Whether the methods are on."""
        return bool(self._parts)

    def new_run(self, total: int) -> None:
        """A run of `total` denoising steps begins: for bare models, and for schedulers without step_index.

        Steps are then counted by changes of the timestep. Raises TypeError or ValueError for a bad `total`.
        """
        per_axis("total", total, 1, low=1)
        if not self._parts:
            raise ValueError("new_run on a handle that is disabled")
        for tracker in {id(d.tracker): d.tracker for _, d, _, _ in self._parts}.values():
            tracker.new_run(total)

    @property
    def parts(self) -> list[Part]:
        """Every method on every denoiser."""
        return list(self._parts)

    def methods(self, name: str) -> list[Method]:
        """The objects of the method `name`, one per denoiser. Raises KeyError where this handle has none."""
        found = [method for _, _, method, _ in self._parts if method.name == name]
        if not found:
            raise KeyError(
                f"this handle has no method {name!r}; it has {sorted({m.name for _, _, m, _ in self._parts})}"
            )
        return found

    def report(self) -> dict[str, Any]:
        """What is on, per denoiser: intercepted layers, last grid and step, density per layer, bytes of state."""
        return {"enabled": self.enabled, "denoisers": [_describe(*part) for part in self._parts]}

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def _describe(name: str, denoiser: Denoiser, method: Method, schedule: Schedule) -> dict[str, Any]:
    last = denoiser.last
    return {
        "component": name,
        "model": type(denoiser.model).__name__,
        "method": method.name,
        "settings": method.settings(),
        "layers": [n for n in denoiser.names(method.roles) if n in schedule.layers],
        "grid": None if last is None else last.layout.grid,
        "num_text": None if last is None else last.layout.num_text,
        "step": None if last is None else last.ctx.step,
        "total": None if last is None else last.ctx.total,
        "run": None if last is None else last.ctx.run,
        "branch": None if last is None else last.ctx.branch,
        "density": None if last is None else method.density(last.layout),
        "state_bytes": method.state_bytes(),
    }


def enable(
    pipe_or_model: Any,
    method: str | Sequence[tuple[str, Mapping[str, Any]]],
    *,
    grid: Sequence[int] | None = None,
    guidance: bool | None = None,
    **options: Any,
) -> Handle:
    """Switch attention methods on in a diffusers pipeline or model; returns the handle that switches them off.

    pipe_or_model: a pipeline (all its denoisers of known families), a transformer or UNet, or torch.compile of one.
    method: a name ("gna") with its arguments as `options`, or a list of (name, options).
    grid: tokens per axis, where the model can't tell it from its arguments (Flux compiled as a whole).
    guidance: whether one call's batch holds the unconditional and the conditional half; None: as the pipeline's
    `do_classifier_free_guidance` says (a bare model and some pipelines don't).

    Options of every method, beside its own (see `GNA`):
    layers: which of the modules that the method acts on: names or patterns ("single*"), indices, slices; None for all.
    steps: which denoising steps: a slice, a range or indices (negative from the end); None for all.
    heads: which heads, the others stay dense; None for all.
    branches: names that the pipeline gives its calls ("cond", "uncond"); None for all.

    Nothing is changed where it raises: TypeError or ValueError for a bad argument (also for a method that is already
    on), UnsupportedError for an unknown model family.
    """
    if isinstance(method, str):
        wanted: list[tuple[str, Mapping[str, Any]]] = [(method, options)]
    else:
        if options:
            raise TypeError(f"with a list of methods, options belong in the list: got {', '.join(options)} beside it")
        wanted = [*_pairs(method)]
    with _switching:
        plan = []
        tracker = StepTracker()
        for target in find_targets(pipe_or_model):
            denoiser = denoiser_of(target.model) or Denoiser(target.model, target.family, tracker)
            tracker = denoiser.tracker
            size = None if grid is None else per_axis("grid", grid, target.family.rank, low=1)
            built = [_build(denoiser, name, dict(given)) for name, given in wanted]
            names = [m.name for m, _ in built]
            if len(set(names)) < len(names):
                raise ValueError(f"method names must differ in one list, got {names}")
            plan.append((target, denoiser, size, built))
        if guidance is not None and tracker.guided not in (None, guidance):
            raise ValueError(f"guidance={guidance}: another handle on this model says {tracker.guided}")
        handle = Handle()
        if not isinstance(pipe_or_model, nn.Module):
            tracker.follow(pipe_or_model)
        if any(made.moves_latents for _, _, _, built in plan for made, _ in built):
            tracker.keep_latents_movable(True)
        if guidance is not None and tracker.guided is None:
            tracker.guided, handle._guided = guidance, tracker
        for target, denoiser, size, built in plan:
            denoiser.tracker = tracker
            denoiser.grid = size or denoiser.grid
            if not denoiser.methods:
                denoiser.attach()
            if target.wrapper is not None:
                denoiser.wrap(target.wrapper)
            for made, schedule in built:
                denoiser.add(made, schedule)
                denoiser.owners[made.name] = handle
                handle._parts.append(Part(target.name, denoiser, made, schedule))
    return handle


def _follow_latents(denoiser: Denoiser) -> None:
    """Take the wrapper off the scheduler once no method of this denoiser moves latents."""
    if not any(method.moves_latents for method, _ in denoiser.methods):
        denoiser.tracker.keep_latents_movable(False)


def _pairs(methods: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(methods, Sequence) or not methods:
        raise TypeError(f"method must be a name or a list of (name, options), got {methods!r}")
    for entry in methods:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Mapping)):
            raise TypeError(f"method must hold (name, options) pairs, got {entry!r}")
        yield entry[0], entry[1]


def _build(denoiser: Denoiser, name: str, options: dict[str, Any]) -> tuple[Method, Schedule]:
    """A method and its schedule for one denoiser, all arguments checked."""
    check_choice("method", name, sorted(METHODS))
    if name in denoiser.owners:
        raise ValueError(
            f"method {name!r} is already on for this {type(denoiser.model).__name__} (pipelines made by from_pipe "
            "share their denoiser): disable its handle first"
        )
    options = {**METHODS[name].defaults(type(denoiser.family).__name__), **options}
    names = denoiser.names(METHODS[name].roles)
    if not names:
        kinds = " or ".join(sorted(METHODS[name].roles))
        raise UnsupportedError(
            f"method {name!r} acts on {kinds} layers, and this {type(denoiser.model).__name__} has none that is known"
        )
    schedule = Schedule(
        choose_layers(options.pop("layers", None), names),
        choose_steps(options.pop("steps", None)),
        choose_branches(options.pop("branches", None)),
        choose_heads(options.pop("heads", None)),
    )
    _check_options(name, options)
    if schedule.heads is not None and not METHODS[name].overrides("attend"):
        raise UnsupportedError(
            f"method {name!r} acts on whole modules, so heads={list(schedule.heads)} means nothing to it"
        )
    made = METHODS[name](denoiser.family.rank, **options)
    made.check_layers([layer for layer in names if layer in schedule.layers])
    return made, schedule


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise TypeError, in the caller's words, unless `options` are what the method takes."""
    taken = [p for p in inspect.signature(METHODS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = [p.name for p in taken]
    if missing := [p.name for p in taken if p.default is p.empty and p.name not in options]:
        raise TypeError(f"method {name!r} needs {', '.join(missing)}=; it takes {', '.join(known)}")
    if unknown := [option for option in options if option not in known]:
        raise TypeError(f"method {name!r} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
