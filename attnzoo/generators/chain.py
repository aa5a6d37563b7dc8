"""Middleware: what a method is, at three depths, and the ordered chains of them.

A method may stand around one attention call (`attend`), around a whole attention or feed-forward module (`around`),
and around the denoiser's forward (`denoise`); it overrides what it needs, and costs nothing where it overrides nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.generators.layout import StepContext, TokenLayout

if TYPE_CHECKING:
    from attnzoo.generators.forward import Forward

Next = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

SELF = frozenset({"joint", "image"})
CROSS = frozenset({"cross"})
MLP = frozenset({"mlp"})


class Stage(IntEnum):
    """Precedence, outermost first: whether to compute, from what, with which mask, what to do with the result, how.

    A post-mix acts on what the kernel returned, so in the nesting it stands just outside the kernel.
    """

    REUSE = 0
    KEYS_VALUES = 1
    MASK = 2
    POST_MIX = 3
    KERNEL = 4


@dataclass(frozen=True, eq=False)
class Call:
    """A module's call as `Method.around` sees it: `call()` runs the rest of the chain and at its end the module.

    module, args, kwargs: what is called and with what.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    layout: TokenLayout
    run: Callable[[tuple[Any, ...], Mapping[str, Any], TokenLayout], Any]

    def __call__(self, *args: Any, layout: TokenLayout | None = None, **kwargs: Any) -> Any:
        """Run with `args` in the place of the first ones and `kwargs` in the place of those of their names.

        layout: the tokens of the changed call, where a method changed their number.
        """
        layout = self.layout if layout is None else layout
        return self.run((*args, *self.args[len(args) :]), {**self.kwargs, **kwargs}, layout)


@dataclass(frozen=True)
class Layer:
    """The layer of a call: its module name, its place among those of its kind, its role, and the call's options.

    role: "joint", "image", "cross" or "mlp", see `Family.role`. phase: what the method's `phase` gave for this forward.
    """

    name: str
    index: int
    scale: float | None = None
    dropout_p: float = 0.0
    role: str = "joint"
    phase: Hashable = True


class Method(ABC):
    """Base of the methods. One object serves one denoiser for the life of its handle.

    roles: of the modules it acts on; layers= chooses among these. moves_latents: it calls `Forward.move_latents`.
    needs_noise_level: it reads `ctx.noise_level`, which costs one device synchronisation per forward.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    roles: ClassVar[frozenset[str]] = SELF
    moves_latents: ClassVar[bool] = False
    needs_noise_level: ClassVar[bool] = False

    def __init__(self, rank: int) -> None:
        """rank: axes of the model's grid. A method adds its own arguments, all by keyword, and checks them here."""
        self.rank = rank

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
        """One attention: query [B, heads, N, head_dim], key and value [B, heads, M, head_dim], mask as for SDPA.

        Returns [B, heads, N, head_dim]. `next(query, key, value, mask)` is the rest of the chain; at the end stands the
        stock SDPA call. layout: the layer's own (a UNet level's grid); in cross-attention M is `layout.num_context`.
        Inside torch.compile read `layer.phase`, not `ctx`: a step counter would be a constant of the graph.
        """
        return next(query, key, value, mask)

    def around(self, call: Call, layout: TokenLayout, ctx: StepContext, layer: Layer) -> Any:
        """One module: `call()` runs it and returns its output, a tensor or a tuple of them; or return another in its
        place. `call(*args, **kwargs)` runs it with other arguments. layout: the whole forward's. Inside torch.compile
        read `layer.phase`, not `ctx`.
        """
        return call()

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        """One forward of the denoiser: `forward()` runs it, `forward(branch=, **changed)` with other arguments."""
        return forward()

    def phase(self, ctx: StepContext) -> Hashable:
        """What the layers must know of the step, as few values as there are kinds of step: each is one graph."""
        return True

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The method's arguments, for the report."""

    def density(self, layout: TokenLayout) -> float:
        """Share of query-key pairs of the whole sequence that are computed under `layout`."""
        return 1.0

    def reaches(self, grid: tuple[int, ...], whole: tuple[int, ...]) -> bool:
        """Whether the method acts on layers that see `grid`, where the model's is `whole` (a UNet's levels)."""
        return True

    def state_bytes(self) -> int:
        """Bytes of tensors that the method keeps between calls."""
        return 0

    def forget(self) -> None:  # noqa: B027  most methods keep nothing
        """Free what the method keeps between calls; called when it is disabled."""

    def refuse_compiling(self, layer: Layer) -> None:
        """Raise UnsupportedError inside torch.compile: for methods whose layers keep or read Python state."""
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                f"{layer.name}: method {self.name!r} keeps state between the calls of a layer and can't be compiled: "
                "leave compiled layers out with layers=, or compile nothing"
            )

    @classmethod
    def defaults(cls, family: str) -> dict[str, Any]:
        """Options that `enable` fills in where the caller gives none. family: name of the adapter ("Flux", "UNet")."""
        return {}

    def check_layers(self, names: Collection[str]) -> None:  # noqa: B027  most methods name none
        """Raise ValueError where the method's own arguments name a layer that is not among `names`."""

    @classmethod
    def overrides(cls, part: str) -> bool:
        """Whether the method does anything in "attend", "around", "denoise" or "phase"."""
        return getattr(cls, part) is not getattr(Method, part)


@dataclass(frozen=True)
class Link:
    """One method in one layer's chain. slot: the method's place in the phase; heads, branches: None for all of them.

    token: it acts only where the module's processor carries what this returns; None: everywhere.
    """

    method: Method
    slot: int
    heads: tuple[int, ...] | None = None
    phase: Hashable = True
    branches: frozenset[str] | None = None
    token: Callable[[], Any] | None = None

    def meant_for(self, module: Any) -> bool:
        """Whether it acts in `module` as it is now."""
        if self.token is None:
            return True
        carried = getattr(module.processor, "attnzoo_token", None)
        return carried is not None and carried is self.token()

    def in_phase(self, phase: Hashable) -> Link:
        """The same in a forward whose phase for this method is `phase`."""
        return self if phase is True else replace(self, phase=phase)

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
        """The method on its own branches and heads; the others go on along the chain."""
        layer = layer if self.phase is True else replace(layer, phase=self.phase)
        if not self.only_some(ctx):
            return self._on_heads(query, key, value, mask, layout, ctx, layer, next)
        count, batch = len(ctx.parts), query.shape[0]
        if batch % count:
            raise UnsupportedError(f"{layer.name}: a batch of {batch} holds no {count} equal parts ({ctx.parts})")
        outs = []
        for index, branch in enumerate(ctx.parts):
            rows = slice(index * batch // count, (index + 1) * batch // count)
            q, k, v = query[rows], key[rows], value[rows]
            own = mask[rows] if mask is not None and mask.ndim == 4 and mask.shape[0] == batch else mask
            if branch in (self.branches or ()):
                part = replace(ctx, branch=branch, parts=(branch,))
                outs.append(self._on_heads(q, k, v, own, layout.for_rows(rows), part, layer, next))
            else:
                outs.append(next(q, k, v, own))
        return torch.cat(outs)

    def only_some(self, ctx: StepContext) -> bool:
        """Whether the batch holds several branches and the method acts on a part of them."""
        return self.branches is not None and len(ctx.parts) > 1 and not self.branches.issuperset(ctx.parts)

    def _on_heads(
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
        if self.heads is None:
            return self.method.attend(query, key, value, mask, layout, ctx, layer, next)
        total = query.shape[1]
        if max(self.heads) >= total or key.shape[1] != total:
            raise UnsupportedError(
                f"heads={list(self.heads)}: {layer.name} has {total} query heads and {key.shape[1]} key heads; "
                f"heads must lie in 0 to {total - 1} and every query head needs a key head of its own"
            )
        own = list(self.heads)
        rest = [head for head in range(total) if head not in self.heads]

        def part(tensor: Tensor | None, heads: list[int]) -> Tensor | None:
            return tensor if tensor is None or tensor.ndim < 4 or tensor.shape[1] == 1 else tensor[:, heads]

        outs = [
            self.method.attend(query[:, own], key[:, own], value[:, own], part(mask, own), layout, ctx, layer, next)
        ]
        if rest:
            outs.append(next(query[:, rest], key[:, rest], value[:, rest], part(mask, rest)))
        order = own + rest
        return torch.cat(outs, dim=1)[:, sorted(range(total), key=order.__getitem__)]


def run_chain(
    links: tuple[Link, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    layout: TokenLayout,
    ctx: StepContext,
    layer: Layer,
    stock: Next,
) -> Tensor:
    """The links in their order around `stock`; all tokens in canonical order."""
    if not links:
        return stock(query, key, value, mask)

    def following(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return run_chain(links[1:], query, key, value, mask, layout, ctx, layer, stock)

    return links[0].attend(query, key, value, mask, layout, ctx, layer, following)


def run_around(links: tuple[Link, ...], layout: TokenLayout, ctx: StepContext, layer: Layer, call: Call) -> Any:
    """The links that stand around a module, in their order around `call`."""
    if not links:
        return call.run(call.args, call.kwargs, layout)
    link, rest = links[0], links[1:]
    if link.only_some(ctx):
        raise UnsupportedError(
            f"{layer.name}: method {link.method.name!r} acts on whole modules, whose batch holds {ctx.parts} here: "
            f"branches={sorted(link.branches or ())} can't be told apart"
        )
    own = layer if link.phase is True else replace(layer, phase=link.phase)

    def following(args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: TokenLayout) -> Any:
        return run_around(rest, layout, ctx, layer, replace(call, args=args, kwargs=kwargs))

    return link.method.around(replace(call, layout=layout, run=following), layout, ctx, own)
