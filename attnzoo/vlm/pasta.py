"""PASTA, "Tell Your Model Where to Attend" (ICLR 2024, arXiv 2311.02262; code QingruZhang/PASTA): steered heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice, check_range
from attnzoo.vlm.checks import as_heads, as_layers, as_number
from attnzoo.vlm.edits import Edit, KeyBias, Prompt
from attnzoo.vlm.spans import Tokens, check_tokens, per_span

POSITIONS = ("exclude", "include", "generation", "span")


@dataclass(frozen=True, eq=False)
class PastaKeys:
    """How often log(alpha) is added to each prompt key: integers [B, N]."""

    tokens: Tokens
    scale_position: str
    official: bool

    def __call__(self, prompt: Prompt) -> Tensor:
        parts = torch.stack(per_span(self.tokens, prompt))
        if not self.official:
            parts = parts.any(0, keepdim=True)
        if self.scale_position == "exclude":
            return (~parts & prompt.real).sum(0)
        if self.scale_position == "include":
            return parts.sum(0) - prompt.real.int()
        if self.scale_position == "span":
            return parts.sum(0)
        return prompt.real.int() * len(parts)


def pasta(
    text_config: Any,
    tokens: Tokens = "image",
    alpha: float = 0.01,
    heads: object = None,
    layers: object = None,
    scale_position: str = "exclude",
    compat: str | None = None,
) -> tuple[Edit, ...]:
    """The edit of PASTA: in chosen heads, prompt keys outside of the highlighted part have their odds scaled by alpha.

    tokens: the part to highlight (see attnzoo.vlm.spans.check_tokens). "image" is the library's choice for
        vision-language models; the paper highlights instructions.
    alpha: the authors' 0.01; 1 changes nothing.
    heads: head indices for every layer, or a dict {layer: head indices}; None: all heads. The authors find heads by
        profiling on several tasks; their lists are for text models and are not shipped.
    layers: an iterable of layer indices; None: all (with a dict of heads: its layers).
    scale_position: "exclude": + log(alpha) outside of the part; "include": - log(alpha) outside (use alpha > 1), which
        is the code's "part + log(alpha), then the whole prompt - log(alpha)"; "generation": + log(alpha) on the whole
        prompt, which weakens it against what was generated; "span": + log(alpha) on the part alone, which is what
        "include" means in the code's function for one section.
    compat: "official" repeats the code for several spans: each is a section of its own, so that with "exclude" a
        section lowers the other sections too, and "include" and "generation" count once per section. The default
        takes the spans together.

    Other differences from the authors' code, in both modes: padding is no prompt key; the bias is added in float32,
    not in the model's type; no float mask is needed (theirs breaks where transformers gives none).

    Raises TypeError or ValueError for an alpha not above 0, wrong tokens, heads, layers, scale_position or compat.
    """
    check_choice("compat", compat, (None, "official"))
    check_choice("scale_position", scale_position, POSITIONS)
    alpha = as_number("alpha", alpha, 0.0)
    if alpha == 0:
        raise ValueError("alpha must be above 0, got 0.0")
    keys = PastaKeys(check_tokens("tokens", tokens), scale_position, compat == "official")
    depth, count = text_config.num_hidden_layers, text_config.num_attention_heads
    value = math.log(alpha)
    if isinstance(heads, Mapping):
        given = {layer: as_heads(f"heads[{layer!r}]", own, count) for layer, own in heads.items()}
        chosen = as_layers(list(given) if layers is None else layers, depth, 0)
        return tuple(KeyBias((layer,), keys, given[layer], "all", value) for layer in chosen if layer in given)
    check_range("num_hidden_layers", depth, 1)
    return (KeyBias(as_layers(layers, depth, 0), keys, as_heads("heads", heads, count), "all", value),)


def pasta_bias(edits: tuple[Edit, ...], num_heads: int, prompt: Prompt, num_keys: int) -> Tensor:
    """What the edits add to the logits of each key, float64 [B, H, num_keys]."""
    total = torch.zeros(len(prompt.real), num_heads, num_keys, dtype=torch.float64)
    for edit in edits:
        assert isinstance(edit, KeyBias) and callable(edit.keys)
        own = torch.nn.functional.pad(edit.keys(prompt), (0, num_keys - prompt.real.shape[1])) * edit.value
        on = torch.zeros(num_heads, dtype=torch.float64)
        on[list(range(num_heads)) if edit.heads is None else list(edit.heads)] = 1.0
        total = total + own[:, None] * on[:, None]
    return total


def pasta_mask(edits: tuple[Edit, ...], mask: Tensor, num_heads: int, prompt: Prompt) -> Tensor:
    """A float mask [B, 1, Q, K] with the edits in it, [B, H, Q, K]: what the authors' code hands to the model."""
    return mask + pasta_bias(edits, num_heads, prompt, mask.shape[3]).to(mask.dtype)[:, :, None]
