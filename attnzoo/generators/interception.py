"""Around one module of a denoiser: its chain of methods, and the attention call within that they answer.

diffusers' own mechanism (hooks/layer_skip.py): a ModelHook enters a TorchFunctionMode that answers
F.scaled_dot_product_attention around the unchanged processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo.errors import SeamError, UnsupportedError
from attnzoo.generators.adapters import Family
from attnzoo.generators.chain import MLP, SELF, Call, Layer, Link, Method, run_around, run_chain
from attnzoo.generators.layout import StepContext, TokenLayout

if TYPE_CHECKING:
    from collections.abc import Hashable

    from attnzoo.generators.hooks import Denoiser

ATTENTION_HOOK = "attnzoo_attention"


@dataclass(frozen=True, eq=False)
class Frame:
    """What one forward's layers read. phase: per slot, False where that method does not act, else `Method.phase`'s."""

    layout: TokenLayout
    ctx: StepContext
    phase: tuple[Hashable, ...]


class AttentionHook(ModelHook):
    """Around one attention or feed-forward module: its chain answers the module, or the attention call within it."""

    fn_ref: Any

    def __init__(self, denoiser: Denoiser | None, name: str, index: int, role: str) -> None:
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
        frame = None if self.denoiser is None else self.denoiser.frame
        if frame is None:
            raise SeamError(
                f"{self.name} ran outside of its model's forward, so its token layout is unknown (gradient "
                "checkpointing recomputes blocks so; it is not supported while a method is enabled)"
            )
        acting = [(link, frame.phase[link.slot]) for link in self.links if link.meant_for(module)]
        links = tuple(link.in_phase(phase) for link, phase in acting if phase is not False)
        if not links:
            return self.fn_ref.original_forward(*args, **kwargs)
        outer = tuple(link for link in links if link.method.overrides("around"))
        if not outer:
            return self._intercepted(links, frame, module, args, kwargs)
        layer = Layer(self.name, self.index, role=self.role)

        def stock(args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: TokenLayout) -> Any:
            own = frame if layout is frame.layout else replace(frame, layout=layout)
            return self._intercepted(links, own, module, args, kwargs)

        return run_around(outer, frame.layout, frame.ctx, layer, Call(module, args, kwargs, frame.layout, stock))

    def _intercepted(
        self, links: tuple[Link, ...], frame: Frame, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The module with its attention call answered by those links that attend."""
        links = tuple(link for link in links if link.method.overrides("attend"))
        if not links or self.role in MLP:
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
        if query.ndim == 4:
            layout = self.frame.layout.for_layer(hook.role, num_queries, hook.name, num_keys)
        if layout is None:  # an image prompt adapter, the image of image-to-video, ...
            self.passed.append((num_queries, num_keys))
            return stock(query, key, value, attn_mask)
        if is_causal:
            raise UnsupportedError(f"{hook.name}: is_causal attention over a grid is not supported")
        ctx = self.frame.ctx if layout.masks != "compact" else self._of_sample(query)
        self.taken += 1
        layer = Layer(hook.name, hook.index, scale, dropout_p, hook.role)
        order = layout.permutation
        if order is None:
            return run_chain(self.links, query, key, value, attn_mask, layout, ctx, layer, stock)
        if attn_mask is not None:
            raise UnsupportedError(f"{hook.name}: a mask over a permuted sequence is not supported")
        back = order.argsort()
        query = query[:, :, back]
        if hook.role in SELF:
            key, value = key[:, :, back], value[:, :, back]
        return run_chain(self.links, query, key, value, None, layout, ctx, layer, stock)[:, :, order]

    def _of_sample(self, query: Tensor) -> StepContext:
        """The context of one sample's call, where a layer calls attention once per sample, in their order."""
        ctx, padding = self.frame.ctx, self.frame.layout.padding
        if len(ctx.parts) == 1 or padding is None or len(query) != 1:
            return ctx
        part = ctx.parts[self.taken * len(ctx.parts) // len(padding)]
        return replace(ctx, branch=part, parts=(part,))


@contextmanager
def alone(
    module: nn.Module, method: Method, layout: TokenLayout, ctx: StepContext | None = None, role: str = "joint"
) -> Iterator[None]:
    """Within the block `method` answers the attention of the one `module`, which needs no denoiser around it.

    For a layer by itself, in a test or in a processor. role, layout: of its calls, see `Family.role`. Raises SeamError
    at the end of the block where no call was answered.
    """
    hook = AttentionHook(None, "layer", 0, role)
    mode = Intercept(hook, (Link(method, 0),), Frame(layout, ctx or StepContext(), (True,)))
    with mode:
        yield
    if not mode.taken:
        raise SeamError(hook._missed(module, mode.passed, layout))


def known_modules(model: nn.Module, family: Family) -> dict[str, tuple[nn.Module, str]]:
    """The modules of `model` that a method can stand around, by name, each with its role."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        role = family.role(name)
        if role is None:
            continue
        if role in MLP or hasattr(module, "processor"):
            if role in SELF and getattr(module, "is_cross_attention", False):
                continue
            found[name] = (module, role)
    return found


def self_attentions(model: nn.Module, family: Family) -> dict[str, tuple[nn.Module, str]]:
    """The self-attention modules of `model` by name, each with its role."""
    return {name: entry for name, entry in known_modules(model, family).items() if entry[1] in SELF}
