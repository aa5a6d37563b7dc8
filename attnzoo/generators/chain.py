"""Middleware around one attention call: what a method is, and the ordered chain of them in one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.generators.layout import StepContext, TokenLayout

Next = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


class Stage(IntEnum):
    """Precedence, outermost first: whether to compute, from what, with which mask, what to do with the result, how.

    A post-mix acts on what the kernel returned, so in the nesting it stands just outside the kernel.
    """

    REUSE = 0
    KEYS_VALUES = 1
    MASK = 2
    POST_MIX = 3
    KERNEL = 4


@dataclass(frozen=True)
class Layer:
    """The intercepted call's layer: its module name, its place among the intercepted ones, and the call's options."""

    name: str
    index: int
    scale: float | None = None
    dropout_p: float = 0.0


class Method(ABC):
    """Base of the methods. One object serves one denoiser for the life of its handle."""

    name: ClassVar[str]
    stage: ClassVar[Stage]

    def __init__(self, rank: int) -> None:
        """rank: axes of the model's grid. A method adds its own arguments, all by keyword, and checks them here."""
        self.rank = rank

    @abstractmethod
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
        """One attention: query, key, value [B, heads, N, head_dim], mask as for SDPA -> [B, heads, N, head_dim].

        `next(query, key, value, mask)` is the rest of the chain; at the end stands the stock SDPA call.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The method's arguments, for the report."""

    def density(self, layout: TokenLayout) -> float:
        """Share of query-key pairs of the whole sequence that are computed under `layout`."""
        return 1.0

    def state_bytes(self) -> int:
        """Bytes of tensors that the method keeps between calls."""
        return 0


@dataclass(frozen=True)
class Link:
    """One method in one layer's chain. slot: the method's place in the phase; heads: None for all of them."""

    method: Method
    slot: int
    heads: tuple[int, ...] | None = None

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
        """The method on its own heads; the other heads go on along the chain."""
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
