"""Parts of a prompt that a user points at: spans, a mask, or a function of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice
from attnzoo.vlm.edits import Prompt

Tokens = Any  # see `check_tokens`


def question(prompt: Prompt) -> Tensor:
    """bool [B, N]: the text behind the last image, what most methods take for the question."""
    return prompt.behind_image


NAMED: dict[str, Callable[[Prompt], Tensor]] = {
    "image": lambda prompt: prompt.image,
    "question": question,
    "none": lambda prompt: torch.zeros_like(prompt.image),
}


def check_tokens(name: str, tokens: Tokens) -> Tokens:
    """`tokens` as it is, or TypeError / ValueError where it is none of:

    "image", "question" (the text behind the last image) or "none"; a bool tensor [B or 1, N] over the padded prompt; a
    function of attnzoo.vlm.edits.Prompt that gives one; a list of (start, stop) spans that holds for every sequence, or
    a list of such lists, one per sequence. Spans count from a sequence's first token that is no padding.
    """
    if callable(tokens):
        return tokens
    if isinstance(tokens, str):
        check_choice(name, tokens, tuple(NAMED))
        return NAMED[tokens]
    if isinstance(tokens, Tensor):
        if tokens.dtype != torch.bool or tokens.ndim != 2:
            raise ValueError(f"{name} as a tensor must be bool [B or 1, N], got {tokens.dtype} {tuple(tokens.shape)}")
        return tokens
    if not isinstance(tokens, Sequence) or not tokens:
        raise TypeError(
            f"{name} must be (start, stop) spans, a list of them per sequence, a bool tensor [B, N] or a function of "
            f"the prompt; got {type(tokens).__name__}: {tokens!r}"
        )
    for spans in [tokens] if _is_span(tokens[0]) else tokens:
        if not isinstance(spans, Sequence) or not all(_is_span(span) for span in spans):
            raise ValueError(f"{name} must hold pairs of integers 0 <= start < stop, got {tokens!r}")
    return tokens


def _is_span(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(type(end) is int for end in value)
        and 0 <= value[0] < value[1]
    )


def per_span(tokens: Tokens, prompt: Prompt) -> list[Tensor]:
    """The parts as bool [B, N], one for each span where spans are given (one for the whole else)."""
    batch, length = prompt.real.shape
    if callable(tokens) or isinstance(tokens, Tensor):
        found = tokens(prompt) if callable(tokens) else tokens
        found = found.to(prompt.real.device)
        if found.dtype != torch.bool or found.shape[1] < length or batch % len(found):
            raise ValueError(
                f"tokens must be bool [{batch} or a divisor, {length} or more], got {found.dtype} {tuple(found.shape)}"
            )
        return [found[:, :length].repeat_interleave(batch // len(found), 0) & prompt.real]
    rows = [tokens] if _is_span(tokens[0]) else list(tokens)
    if batch % len(rows):
        raise ValueError(f"tokens must have one list of spans per sequence, got {len(rows)} for a batch of {batch}")
    rows = [row for row in rows for _ in range(batch // len(rows))]
    place = torch.arange(length, device=prompt.real.device) - prompt.real.int().argmax(1)[:, None]
    empty = (0, 0)
    parts = []
    for index in range(max(map(len, rows))):
        ends = torch.tensor([row[index] if index < len(row) else empty for row in rows], device=place.device)
        parts.append((place >= ends[:, :1]) & (place < ends[:, 1:]) & prompt.real)
    return parts


def resolve(tokens: Tokens, prompt: Prompt) -> Tensor:
    """The parts together, bool [B, N]."""
    return torch.stack(per_span(tokens, prompt)).any(0)


Chooser = Callable[[Prompt], Tensor]


def chooser(tokens: Tokens | None) -> Chooser:
    """A function of the prompt for these tokens; None: `question`."""
    return question if tokens is None else lambda prompt: resolve(tokens, prompt)
