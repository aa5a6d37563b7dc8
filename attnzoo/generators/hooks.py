"""The room's hold on a denoiser: one root hook, and one hook with one chain per module that a method acts on.

Nothing else of the model is touched, and `detach` takes away all that `attach` added.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from torch import nn

from attnzoo.errors import UnsupportedError
from attnzoo.generators.adapters import Family
from attnzoo.generators.chain import SELF, Link, Method
from attnzoo.generators.forward import Forward
from attnzoo.generators.interception import ATTENTION_HOOK, AttentionHook, Frame, known_modules
from attnzoo.generators.layout import StepContext
from attnzoo.generators.schedule import Schedule, StepTracker

ROOT_HOOK = "attnzoo_root"


class _NoState(BaseState):
    """The root hook keeps a StateManager only to be told the cache context; there is nothing to reset."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        return None


class Denoiser:
    """One model under the room's hooks, for as long as any handle acts on it."""

    def __init__(self, model: nn.Module, family: Family, tracker: StepTracker) -> None:
        self.model = model
        self.family = family
        self.grid: tuple[int, ...] | None = None
        self.tracker = tracker
        self.branches: Any = StateManager(cast(Any, _NoState))
        self.methods: list[tuple[Method, Schedule]] = []
        self.owners: dict[str, Any] = {}
        self.frame: Frame | None = None
        self.last: Frame | None = None
        self.entered_outside = False
        self.lock = threading.RLock()
        self._modules = {}
        self.hooks: dict[str, AttentionHook] = {}  # the self-attentions'
        self.others: dict[str, AttentionHook] = {}  # cross-attentions' and feed-forward layers'
        kinds: dict[str, int] = {}
        for name, (module, role) in known_modules(model, family).items():
            kind = "self" if role in SELF else role
            index = kinds[kind] = kinds.get(kind, -1) + 1
            (self.hooks if kind == "self" else self.others)[name] = AttentionHook(self, name, index, role)
            self._modules[name] = module
        self._attached: set[str] = set()
        self._tokens: dict[Method, Callable[[], Any]] = {}
        self._around: tuple[int, ...] = ()  # slots of the methods around the whole forward, outermost first
        self._created: list[nn.Module] = []
        self._outer: dict[nn.Module, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    # ---------------------------------------------------------------- attaching

    def attach(self) -> None:
        """Register the hooks on the model."""
        for name, hook in self.hooks.items():
            self._attach(name, hook)
        self._register(self.model, RootHook(self), ROOT_HOOK)
        HookRegistry.check_if_exists_or_initialize(self.model).invalidate_child_registries_cache()

    def _attach(self, name: str, hook: AttentionHook) -> None:
        self._register(self._modules[name], hook, ATTENTION_HOOK)
        self._attached.add(name)

    def names(self, roles: frozenset[str]) -> list[str]:
        """Names of the modules of these roles, in the model's order."""
        hooks = {**self.hooks, **self.others}
        return [name for name in self._modules if hooks[name].role in roles]

    def wrap(self, wrapper: nn.Module) -> None:
        """Build the frames outside of `wrapper`, torch.compile's module around the model; once is enough.

        A step counter inside the graph would be a constant of it, or compile it anew every step.
        """
        if wrapper in self._outer:
            return
        inner = wrapper.forward

        def outside(*args: Any, **kwargs: Any) -> Any:
            if not self.methods:
                return inner(*args, **kwargs)
            with self.lock:
                self.enter(args, kwargs)
                self.entered_outside = True
                try:
                    return self.call(inner, args, kwargs)
                finally:
                    self.entered_outside = False
                    self.leave()

        wrapper.forward = outside
        self._outer[wrapper] = (inner, outside)

    def detach(self) -> None:
        """Take all hooks away, and the registries that were made for them."""
        for wrapper, (inner, outside) in self._outer.items():
            if wrapper.forward is outside:
                wrapper.forward = inner
        self._outer.clear()
        self._unregister(self.model, ROOT_HOOK)
        for name in self._attached:
            self._unregister(self._modules[name], ATTENTION_HOOK)
        self._attached.clear()
        registry = _registry(self.model)
        if registry is not None:
            registry.invalidate_child_registries_cache()
        self.frame = self.last = None

    def _register(self, module: nn.Module, hook: ModelHook, name: str) -> None:
        if _registry(module) is None:
            self._created.append(module)
        with _beneath_accelerate(module):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)

    def _unregister(self, module: nn.Module, name: str) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(module)
        with _beneath_accelerate(module):
            registry.remove_hook(name, recurse=False)
        if registry.hooks:
            return
        # remove_hook leaves the class's own forward behind as an attribute of the instance.
        own = module.__dict__.get("forward")
        if own is not None and getattr(own, "__func__", None) is type(module).forward:
            del module.forward
        if module in self._created:
            del module._diffusers_hook

    # ---------------------------------------------------------------- methods

    def add(self, method: Method, schedule: Schedule) -> None:
        """Append `method` to the chains of its layers, at its stage's place."""
        self.methods.append((method, schedule))
        self._relink()

    def remove(self, method: Method) -> None:
        """Take `method` out of every chain, and free what it keeps."""
        self.methods = [(m, s) for m, s in self.methods if m is not method]
        self._tokens.pop(method, None)
        self._relink()
        method.forget()

    def only_under(self, method: Method, token: Callable[[], Any]) -> None:
        """From now on `method` acts in modules whose processor carries `token()`, see `generators.processor`."""
        self._tokens[method] = token
        self._relink()

    def _relink(self) -> None:
        order = sorted(range(len(self.methods)), key=lambda slot: self.methods[slot][0].stage)
        chain = [(slot, *self.methods[slot]) for slot in order]
        for name, hook in {**self.hooks, **self.others}.items():
            hook.links = tuple(
                Link(m, slot, s.heads, branches=s.branches, token=self._tokens.get(m))
                for slot, m, s in chain
                if name in s.layers and hook.role in m.roles
            )
            if name in self.others and hook.links and name not in self._attached:
                self._attach(name, hook)
            elif name in self.others and not hook.links and name in self._attached:
                self._unregister(self._modules[name], ATTENTION_HOOK)
                self._attached.discard(name)
        self._around = tuple(slot for slot in order if self.methods[slot][0].overrides("denoise"))
        registry = _registry(self.model)
        if registry is not None:
            registry.invalidate_child_registries_cache()

    def layers_of(self, method: Method, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The modules that `method` acts on, by name in the model's order, each with its part of the model's `grid`."""
        chosen = next(s.layers for m, s in self.methods if m is method)
        return {name: self.family.grid_at(name, grid) for name in self.names(method.roles) if name in chosen}

    # ---------------------------------------------------------------- one forward

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Build the frame that the layers of this forward read."""
        given = self.family.arguments(args, kwargs)
        ctx = StepContext()
        if torch.compiler.is_compiling():
            if any(s.steps is not None or s.branches is not None for _, s in self.methods):
                raise UnsupportedError(
                    "steps= and branches= can't be followed from inside a compiled whole model (they would be "
                    "constants of the graph): torch.compile first and then enable, or compile its blocks instead"
                )
        else:
            self._check_company()
            ctx = self.tracker.advance(self.family.timestep(given), self.branches._context, self.family.parts)
            if any(m.needs_noise_level for m, _ in self.methods):
                level = self.family.noise_level(given)
                level = level.reshape(-1)[0] if isinstance(level, torch.Tensor) else level
                ctx = replace(ctx, noise_level=float(level))
        self.frame = self.frame_for(given, ctx)

    def frame_for(self, given: Mapping[str, Any], ctx: StepContext) -> Frame:
        """The frame of a forward with these arguments."""
        layout = self.family.layout(given, self.grid)
        return Frame(layout, ctx, tuple(s.active(ctx) and m.phase(ctx) for m, s in self.methods))

    def run(self, given: Mapping[str, Any], frame: Frame, stock: Callable[..., Any], after: int = -1) -> Any:
        """A forward inside `frame`: the methods around it that stand behind place `after`, then the model."""
        outer, self.frame = self.frame, frame
        try:
            for place in range(after + 1, len(self._around)):
                slot = self._around[place]
                if frame.phase[slot] is not False:
                    forward = Forward(self, given, frame, stock).at(place)
                    return self.methods[slot][0].denoise(forward, frame.layout, frame.ctx)
            return stock(**given)
        finally:
            self.frame = outer

    def call(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The forward whose frame `enter` made, with the methods around it."""
        assert self.frame is not None
        if not any(self.frame.phase[slot] is not False for slot in self._around):
            return stock(*args, **kwargs)
        return self.run(self.family.arguments(args, kwargs), self.frame, stock)

    def leave(self) -> None:
        """The forward is over, in whatever way."""
        self.last, self.frame = self.frame, None

    def _check_company(self) -> None:
        """Refuse what would act on the same attentions without knowing of us."""
        if getattr(self.model, "_parallel_config", None) is not None:
            raise UnsupportedError("context parallelism shards text and image apart: not supported, disable it first")
        for name, hook in self.hooks.items():
            module = self._modules[name]
            others = HookRegistry.check_if_exists_or_initialize(module).hooks if hook.links else {}
            for other in others.values():
                if isinstance(other, AttentionProcessorSkipHook) and other.skip_attention_scores:
                    raise UnsupportedError(
                        f"{name}: a diffusers guider skips attention scores (PAG) on a layer that attnzoo also "
                        "intercepts; leave that layer out with layers="
                    )


class RootHook(ModelHook):
    """Around the denoiser's forward: builds its frame, and clears it also when an exception passes through."""

    _is_stateful = True
    fn_ref: Any

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.branches = denoiser.branches  # cache_context looks for StateManager attributes

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The model's forward inside one frame; another thread's forward on this model waits."""
        denoiser = self.denoiser
        if denoiser.entered_outside:
            return self.fn_ref.original_forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._framed(args, kwargs)
        with denoiser.lock:
            return self._framed(args, kwargs)

    def _framed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.denoiser.enter(args, kwargs)
        try:
            return self.denoiser.call(self.fn_ref.original_forward, args, kwargs)
        finally:
            self.denoiser.leave()

    def reset_state(self, module: nn.Module) -> nn.Module:
        """diffusers calls this between runs; runs are told apart by the scheduler, so nothing is to be done."""
        return module


@contextmanager
def _beneath_accelerate(module: Any) -> Iterator[None]:
    """Within the block `module.forward` is what accelerate's offload hook wraps, if it has one.

    accelerate keeps the wrapped forward in `_old_forward` and puts it back at the end of each offloaded run: a hook on
    top of its wrapper would be lost after the first one.
    """
    if "_hf_hook" not in vars(module) or "_old_forward" not in vars(module):
        yield
        return
    outer, module.forward = module.forward, module._old_forward
    try:
        yield
    finally:
        module._old_forward, module.forward = module.forward, outer


def _registry(module: nn.Module) -> Any:
    """The module's HookRegistry, None where it has none yet."""
    return getattr(module, "_diffusers_hook", None)


def denoiser_of(model: nn.Module) -> Denoiser | None:
    """The room's hold on `model`, None where no handle acts on it."""
    registry = _registry(model)
    hook = None if registry is None else registry.get_hook(ROOT_HOOK)
    return None if hook is None else hook.denoiser
