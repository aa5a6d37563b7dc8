"""PAINT, "Fixing Imbalanced Attention" (arXiv 2501.12206; code hasanar1f/PAINT): louder local and summary image tokens.

Which tokens they are, the vision tower's CLS token says: local ones draw its attention in the first layer, summary
ones, few and far above the rest, in the last but one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice, check_tensor
from attnzoo.kernels.edited_attention import Visibility, attention_probs
from attnzoo.vlm.checks import as_layers, as_number
from attnzoo.vlm.edits import Edit, LogitMap, Prompt, Tap

LOCAL, SUMMARY = "local", "summary"


def outliers(scores: Tensor) -> Tensor:
    """bool [B, P]: Tukey's upper outliers of scores [B, P], above Q3 + 1.5 (Q3 - Q1)."""
    check_tensor("scores", scores, 2)
    low, high = torch.quantile(scores, torch.tensor([0.25, 0.75], dtype=scores.dtype, device=scores.device), dim=1)
    return scores > (high + 1.5 * (high - low))[:, None]


def token_sets(first: Tensor, late: Tensor, share: float = 0.25) -> tuple[Tensor, Tensor]:
    """(local, summary), bool [B, P], from the CLS token's attention to P patches in the first and last-but-one layer.

    summary: outliers of `late`; local: the `share` of patches with the largest `first`, without summary.
    """
    summary = outliers(late)
    count = int(first.shape[1] * share)
    top = torch.zeros_like(summary).scatter(1, first.topk(count, dim=1).indices, True)
    return top & ~summary, summary


def vision_attentions(model: Any) -> list[Any]:
    """The vision tower's first and last-but-one self-attention.

    Raises UnsupportedError where the model has no tower with a CLS token and separate query and key projections.
    """
    text = model.config.get_text_config()
    for module in model.modules():
        layers = getattr(getattr(module, "encoder", module), "layers", None)
        if getattr(module, "config", text) is text or not isinstance(layers, torch.nn.ModuleList) or len(layers) < 2:
            continue
        attention = getattr(layers[0], "self_attn", None)
        embeddings = getattr(module, "embeddings", None)
        if hasattr(attention, "q_proj") and hasattr(attention, "k_proj") and hasattr(embeddings, "class_embedding"):
            return [layers[0].self_attn, layers[-2].self_attn]
    raise UnsupportedError(
        f"{type(model).__name__} has no vision tower whose CLS token could choose patches: give local= and summary=, "
        "the tokens' numbers within an image"
    )


def read_cls(index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], notes: dict[Any, Any]) -> None:
    """Note the CLS row's attention to patches [tiles, P], summed over heads, of vision layer 0 or -2."""
    hidden = args[0] if args else kwargs["hidden_states"]
    heads = (*hidden.shape[:2], module.num_heads, -1)
    query, key = module.q_proj(hidden[:, :1]), module.k_proj(hidden).view(heads)
    query = query.view(len(hidden), 1, *key.shape[2:])
    probs = attention_probs(query.detach(), key.detach(), Visibility(is_causal=False), module.scale, rows=None)
    notes["paint", index] = probs[:, 0, :, 1:].sum(1)


@dataclass(frozen=True)
class PaintTokens:
    """The local or summary tokens of a prompt, bool [B, N]."""

    which: str
    given: tuple[int, ...] | None

    def __call__(self, prompt: Prompt) -> Tensor:
        if self.given is not None:
            return numbered(prompt.image, self.given)
        if not bool(prompt.image.any()):
            return torch.zeros_like(prompt.image)
        if ("paint", 0) not in prompt.notes:
            raise UnsupportedError("the vision tower did not run in this session's forward: PAINT needs pixel values")
        local, summary = token_sets(prompt.notes["paint", 0], prompt.notes["paint", 1])
        chosen = (local if self.which == LOCAL else summary).flatten().to(prompt.image.device)
        count = int(prompt.image.sum())
        beams = max(1, count // max(1, len(chosen)))
        if count != beams * len(chosen) or len(prompt.image) % beams:
            raise UnsupportedError(
                f"{len(chosen)} patches of the vision tower became {count} image tokens, so which is which is not "
                "known: give local= and summary=, the tokens' numbers within an image"
            )
        flags = torch.zeros_like(prompt.image[::beams])
        flags[prompt.image[::beams]] = chosen
        return flags.repeat_interleave(beams, 0)


def numbered(image: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """bool [B, N]: image tokens with these numbers within their run of image tokens."""
    place = torch.arange(image.shape[1], device=image.device).expand(image.shape)
    before = torch.nn.functional.pad(image[:, :-1], (1, 0))
    start = torch.where(image & ~before, place, 0).cummax(1).values
    return image & torch.isin(place - start, torch.tensor(numbers, dtype=torch.int64, device=image.device))


def paint(
    text_config: Any,
    alpha: float = 0.7,
    beta: float = 0.3,
    layers: object = None,
    local: object = None,
    summary: object = None,
    compat: str | None = None,
) -> tuple[Edit, ...]:
    """The edit of PAINT: s <- s + alpha |s| on local, s + beta |s| on summary image tokens, all heads.

    alpha, beta: the authors' 0.7 and 0.3; both 0 changes nothing.
    layers: None: all from the third on (2, 3, ...), as the authors do.
    local, summary: numbers of the tokens within each image, from 0. None: from the vision tower, for models whose tower
        has a CLS token and whose image tokens are its patches one to one (LLaVA-1.5): summary tokens are the upper
        outliers (Tukey) of the CLS row in the last layer but one, local ones the quarter with the most of it in the
        first layer, without the summary's; summed over heads. Other models are refused by name without the numbers.
    compat: "official" edits the last row of each forward instead of every row that predicts an answer token.

    Other differences from the authors' code, in both modes: image positions from each sequence's own tokens, several
    images, beams and padding included; grouped-query heads (theirs has none); logits edited in float32. The code's
    third kind of token ("spatial") has a share of 0 there and is left out; so is its guidance, which is PAI's. The
    abstract's head-specific modulation is not in the released code.

    Raises TypeError or ValueError for alpha or beta below 0, wrong layers or numbers, another compat.
    """
    check_choice("compat", compat, (None, "official"))
    if (local is None) != (summary is None):
        raise ValueError("local and summary go together: give both or none (an empty tuple is a set without tokens)")
    rows = "last" if compat == "official" else "answer"
    edited = as_layers(layers, text_config.num_hidden_layers, 2)
    sets = (LOCAL, local, as_number("alpha", alpha, 0.0)), (SUMMARY, summary, as_number("beta", beta, 0.0))
    maps = tuple(
        LogitMap(edited, PaintTokens(name, _numbers(name, own)), None, rows, strength) for name, own, strength in sets
    )
    return maps if local is not None else (Tap(vision_attentions, read_cls), *maps)


def _numbers(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        numbers = tuple(value)
    except TypeError:
        raise TypeError(f"{name} must be an iterable of integers, got {type(value).__name__}: {value!r}") from None
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{name} must hold integers from 0 on, got {value!r}")
    return numbers
