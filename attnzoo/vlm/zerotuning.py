"""ZeroTuning (arXiv 2505.11739; code FeijiangHan/ZeroTuning, no licence): a knob on the first token's attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice
from attnzoo.vlm.checks import as_heads, as_layers, as_number
from attnzoo.vlm.edits import Edit, KeyBias, Prompt
from attnzoo.vlm.spans import check_tokens, resolve


@dataclass(frozen=True)
class Slots:
    """Keys start .. stop - 1 of the padded prompt, or of the prompt without its padding."""

    start: int
    stop: int
    padded: bool

    def __call__(self, prompt: Prompt) -> Tensor:
        if not self.padded:
            return resolve([(self.start, self.stop)], prompt)
        place = torch.arange(prompt.real.shape[1], device=prompt.real.device)
        return ((place >= self.start) & (place < self.stop)).expand(prompt.real.shape)


def zerotuning(
    text_config: Any,
    gamma: float = 0.6,
    heads: object = None,
    layers: object = None,
    span: tuple[int, int] = (0, 1),
    compat: str | None = None,
) -> tuple[Edit, ...]:
    """The edit of ZeroTuning: in chosen heads A[..., 0] *= gamma, rows renormalised; the same as + log(gamma) on key 0.

    gamma: above 1 strengthens the first token, below 1 weakens it; 1 changes nothing. The authors search it (and the
        heads) per task; 0.6, which gives two fifths of a sink's weight to the rest, is this library's starting point.
    heads: head indices, None: all. layers: layer indices, None: all.
    span: (start, stop) of the keys that are scaled, (0, 1) the first token.
    compat: "official" counts span from the PADDED row's start, as the code does, so that with left padding nothing real
        is scaled. The default counts from a sequence's first real token.

    Other difference, in both modes: the shipped modelling file calls an undefined name; what is repeated is the
    function that it means to call.

    Raises TypeError or ValueError for a gamma not above 0, a head, layer or span that does not exist, another compat.
    """
    check_choice("compat", compat, (None, "official"))
    gamma = as_number("gamma", gamma, 0.0)
    if gamma == 0:
        raise ValueError("gamma must be above 0, got 0.0")
    check_tokens("span", [span])
    keys = Slots(span[0], span[1], compat == "official")
    own = as_heads("heads", heads, text_config.num_attention_heads)
    return (KeyBias(as_layers(layers, text_config.num_hidden_layers, 0), keys, own, "all", math.log(gamma)),)
