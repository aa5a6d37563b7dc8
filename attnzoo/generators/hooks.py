"""The room's hold on a denoiser: one root hook, and one hook with one chain per self-attention module.

diffusers' own mechanism (hooks/layer_skip.py): a ModelHook enters a TorchFunctionMode that answers
F.scaled_dot_product_attention around the unchanged processor. Nothing else of the model is touched, and `detach`
takes away all that `attach` added.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo.errors import SeamError, UnsupportedError
from attnzoo.generators.adapters import Family
from attnzoo.generators.chain import Layer, Link, Method, run_chain
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.schedule import Schedule, StepTracker

ROOT_HOOK = "attnzoo_root"
ATTENTION_HOOK = "attnzoo_attention"


@dataclass(frozen=True, eq=False)
class Frame:
    """What one forward's layers read. phase: per slot, whether that method acts in this forward."""

    layout: TokenLayout
    ctx: StepContext
    phase: tuple[bool, ...]


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
        layers = self_attentions(model, family)
        self.hooks = {
            name: AttentionHook(self, name, index, role) for index, (name, (_, role)) in enumerate(layers.items())
        }
        self._modules = {name: module for name, (module, _) in layers.items()}
        self._created: list[nn.Module] = []
        self._outer: dict[nn.Module, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    # ---------------------------------------------------------------- attaching

    def attach(self) -> None:
        """Register the hooks on the model."""
        for name, hook in self.hooks.items():
            self._register(self._modules[name], hook, ATTENTION_HOOK)
        self._register(self.model, RootHook(self), ROOT_HOOK)
        HookRegistry.check_if_exists_or_initialize(self.model).invalidate_child_registries_cache()

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
                    return inner(*args, **kwargs)
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
        for module in self._modules.values():
            self._unregister(module, ATTENTION_HOOK)
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
        """Take `method` out of every chain."""
        self.methods = [(m, s) for m, s in self.methods if m is not method]
        self._relink()

    def _relink(self) -> None:
        order = sorted(range(len(self.methods)), key=lambda slot: self.methods[slot][0].stage)
        for name, hook in self.hooks.items():
            chain = [(slot, *self.methods[slot]) for slot in order]
            hook.links = tuple(Link(m, slot, s.heads) for slot, m, s in chain if name in s.layers)

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
            ctx = self.tracker.advance(given.get("timestep"), self.branches._context)
        layout = self.family.layout(given, self.grid)
        self.frame = Frame(layout, ctx, tuple(s.active(ctx) for _, s in self.methods))

    def leave(self) -> None:
        """The forward is over, in whatever way."""
        self.last, self.frame = self.frame, None

    def _check_company(self) -> None:
        """Refuse what would act on the same attentions without knowing of us."""
        if getattr(self.model, "_parallel_config", None) is not None:
            raise UnsupportedError("context parallelism shards text and image apart: not supported, disable it first")
        for name, module in self._modules.items():
            others = HookRegistry.check_if_exists_or_initialize(module).hooks if self.hooks[name].links else {}
            for hook in others.values():
                if isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores:
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
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            self.denoiser.leave()

    def reset_state(self, module: nn.Module) -> nn.Module:
        """diffusers calls this between runs; runs are told apart by the scheduler, so nothing is to be done."""
        return module


class AttentionHook(ModelHook):
    """Around one self-attention module: its chain answers the module's scaled_dot_product_attention."""

    fn_ref: Any

    def __init__(self, denoiser: Denoiser, name: str, index: int, role: str) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.name = name
        self.index = index
        self.role = role
        self.links: tuple[Link, ...] = ()

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, intercepted where a method of its chain acts in this phase."""
        if not self.links:
            return self.fn_ref.original_forward(*args, **kwargs)
        frame = self.denoiser.frame
        if frame is None:
            raise SeamError(
                f"{self.name} ran outside of its model's forward, so its token layout is unknown (gradient "
                "checkpointing recomputes blocks so; it is not supported while a method is enabled)"
            )
        links = tuple(link for link in self.links if frame.phase[link.slot])
        if not links:
            return self.fn_ref.original_forward(*args, **kwargs)
        mode = Intercept(self, links, frame)
        with mode:
            output = self.fn_ref.original_forward(*args, **kwargs)
        if not mode.taken:
            raise SeamError(self._missed(module, mode.passed, frame.layout))
        return output

    def _missed(self, module: nn.Module, passed: list[tuple[int, int]], layout: TokenLayout) -> str:
        processor = getattr(module, "processor", None)
        backend = getattr(processor, "_attention_backend", None)
        others = [n for n in HookRegistry.check_if_exists_or_initialize(module).hooks if n != ATTENTION_HOOK]
        if others and not passed:
            return (
                f"{self.name}: no attention was computed; another hook ({', '.join(others)}) may have answered beneath "
                "attnzoo's: enable attnzoo's method first, and the cache or skip after it"
            )
        if passed:
            return (
                f"{self.name}: no attention call has the layout's {layout.length} tokens (grid {layout.grid}, "
                f"{layout.num_text} text); calls with (queries, keys) {passed} were left alone"
            )
        return (
            f"{self.name}: {type(processor).__name__} never called F.scaled_dot_product_attention; its attention "
            f"backend is {str(getattr(backend, 'value', backend) or 'the process-wide default')!r}: use 'native', "
            "model.set_attention_backend('native')"
        )


class Intercept(TorchFunctionMode):
    """Answers the self-attention call of one module; every other function and attention goes its way."""

    def __init__(self, hook: AttentionHook, links: tuple[Link, ...], frame: Frame) -> None:
        super().__init__()
        self.hook = hook
        self.links = links
        self.frame = frame
        self.taken = 0
        self.passed: list[tuple[int, int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return func(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        hook, num_queries, num_keys = self.hook, query.shape[-2], key.shape[-2]
        layout = None
        if num_queries == num_keys and query.ndim == 4:
            layout = self.frame.layout.for_layer(hook.role, num_queries, hook.name)
        if layout is None:  # cross-attention, an image prompt adapter, ...
            self.passed.append((num_queries, num_keys))
            return stock(query, key, value, attn_mask)
        if is_causal:
            raise UnsupportedError(f"{hook.name}: is_causal self-attention over a grid is not supported")
        self.taken += 1
        layer = Layer(hook.name, hook.index, scale, dropout_p)
        order = layout.permutation
        if order is None:
            return run_chain(self.links, query, key, value, attn_mask, layout, self.frame.ctx, layer, stock)
        if attn_mask is not None:
            raise UnsupportedError(f"{hook.name}: a mask over a permuted sequence is not supported")
        query, key, value = (t[:, :, order.argsort()] for t in (query, key, value))
        return run_chain(self.links, query, key, value, None, layout, self.frame.ctx, layer, stock)[:, :, order]


def self_attentions(model: nn.Module, family: Family) -> dict[str, tuple[nn.Module, str]]:
    """The self-attention modules of `model` by name, each with its role."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        if issubclass(type(module), (Attention, AttentionModuleMixin)):
            role = None if getattr(module, "is_cross_attention", False) else family.role(name)
            if role is not None:
                found[name] = (module, role)
    return found


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
