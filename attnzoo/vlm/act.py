"""ACT, "Hidden Attention Sinks" (ICML 2024, arXiv 2406.15765; code GATECH-EIC/ACT, no licence): sinks give.

Keys other than the first that get much attention from all rows behind them are sinks; chosen heads give part of what
their rows spend on sinks to the other keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice
from attnzoo.vlm.checkpoints import published
from attnzoo.vlm.checks import as_heads, as_layers, as_number
from attnzoo.vlm.edits import Edit, Observe, Prompt, Regroup

OTHER, SINK = range(2)


def column_means(sums: Tensor, real: Tensor) -> Tensor:
    """What a key gets on average from rows that can see it, [B, H, N]; from column sums and real tokens [B, N]."""
    later = real.flip(-1).cumsum(-1).flip(-1)  # real rows at the key's place and behind it
    return sums / later.clamp_min(1).to(sums)[:, None]


def act_sinks(means: Tensor, threshold: float) -> Tensor:
    """bool [B, H, N]: keys with a mean above threshold, but for the first of them."""
    high = means > threshold
    return high & (high.cumsum(-1) > 1)


def act_rule(masses: Tensor, beta: float) -> Tensor:
    """Factors [..., 2] from the masses of other keys and sinks: sinks keep beta, others get the rest in proportion."""
    given = (1 - beta) * masses[..., SINK]
    other = masses[..., OTHER]
    gives = (other > 0) & (given > 0)
    up = torch.where(gives, 1 + given / torch.where(other > 0, other, 1.0), 1.0)
    return torch.stack([up, torch.where(gives, beta, 1.0)], -1)


@dataclass(frozen=True, eq=False)
class Sinks:
    """Each head's sinks in a prompt, noted by layer."""

    key: object
    threshold: float
    heads: Mapping[int, tuple[int, ...] | None]

    def look(self, layer: int, view: Any, prompt: Prompt) -> None:
        length = prompt.real.shape[1]
        sums = view.column_sums()[..., :length]
        found = act_sinks(column_means(sums, prompt.real.to(sums.device)), self.threshold)
        own = self.heads[layer]
        if own is not None:
            chosen = torch.zeros(found.shape[1], dtype=torch.bool, device=found.device)
            chosen[list(own)] = True
            found = found & chosen[:, None]
        prompt.notes[self.key, layer] = found.to(torch.uint8)

    def groups(self, prompt: Prompt, layer: int) -> Tensor:
        found: Tensor = prompt.notes[self.key, layer]
        return found


def act(
    text_config: Any,
    beta: float = 0.4,
    threshold: float = 0.1,
    heads: object = None,
    layers: object = None,
    compat: str | None = None,
) -> tuple[Edit, ...]:
    """The edit of ACT: in chosen heads, sinks keep beta of their attention, the row's other keys get the rest.

    beta: share that sinks keep; 1 changes nothing. threshold: a key is a sink where its mean attention, the column sum
        over the L - k rows that can see it, is above this; the first such key (normally the first token) is exempt.
    heads: head indices for every layer, or a dict {layer: head indices}; None: all heads. The authors choose heads by
        the accuracy that they give on calibration data; their lists are for LLaMA-2 and Mistral and are not shipped.
    layers: None: the authors' 2 .. 30 for 32 layers, elsewhere 2 .. last but one.
    compat: "official" edits the prompt's rows only. The default also edits generated rows, with the prompt's sinks.
        (The released code breaks while decoding: it takes one row for a square and its rows no longer sum to 1. That
        is not repeated in either mode.)

    Other differences from the authors' code, in both modes: every sequence of a batch for itself (theirs reads the
    first one), padding neither gives nor counts; a row that sees nothing but sinks is left as it is. The prompt must
    come in one forward. Column sums come from the kernel's second pass, not from a matrix.

    Raises TypeError or ValueError for a beta or threshold outside 0..1, wrong heads or layers, another compat.
    """
    check_choice("compat", compat, (None, "official"))
    beta, threshold = as_number("beta", beta, 0.0, 1.0), as_number("threshold", threshold, 0.0, 1.0)
    depth, count = text_config.num_hidden_layers, text_config.num_attention_heads
    own: dict[int, tuple[int, ...] | None]
    if layers is None and not isinstance(heads, Mapping):
        first, last = published(text_config).get("act", {}).get("layers", (2, max(2, depth - 2)))
        layers = range(first, last + 1)
    if isinstance(heads, Mapping):
        chosen = as_layers(list(heads) if layers is None else layers, depth, 0)
        own = {layer: as_heads(f"heads[{layer!r}]", heads.get(layer), count) for layer in chosen if layer in heads}
    else:
        own = dict.fromkeys(as_layers(layers, depth, 2), as_heads("heads", heads, count))
    if not own:
        raise ValueError(f"heads must name heads of some of the layers {layers!r}, got {heads!r}")
    sinks = Sinks(object(), threshold, own)
    rows = "prompt" if compat == "official" else "all"
    return (
        Observe(tuple(own), sinks.look),
        Regroup(tuple(own), sinks.groups, lambda masses, sizes: act_rule(masses, beta), 2, rows, source="prompt"),
    )
