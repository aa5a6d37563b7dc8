"""Who sees whom, as edits: modality-mutual, composite, prefix and blockwise masks, self and cross blocks.

What these masks gain comes from models that were trained with them; on another model they are an experiment. None of
them forms the n x n mask: it is built for a run of rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice
from attnzoo.vlm.checks import as_layers
from attnzoo.vlm.edits import Edit, Mask, Prompt
from attnzoo.vlm.spans import Chooser, Tokens, check_tokens, chooser

PLAIN, IMAGE, QUESTION = range(3)


# --- modality-mutual attention (AKI) -------------------------------------------------------------------------------


def mutual_rule(seen: Tensor, rows: Tensor, keys: Tensor, itself: Tensor) -> Tensor:
    """Image rows also see the question."""
    return seen | ((rows == IMAGE) & (keys == QUESTION))


@dataclass(frozen=True, eq=False)
class _Mutual:
    question: Chooser

    def __call__(self, prompt: Prompt) -> Tensor:
        question = self.question(prompt) & ~prompt.image & prompt.real
        return torch.where(prompt.image, IMAGE, torch.where(question, QUESTION, PLAIN))


def mma(text_config: Any, question: Tokens = None, layers: object = None) -> tuple[Edit, ...]:
    """Modality-mutual attention (AKI, arXiv 2503.02597; code sony/aki, CC BY-NC): image tokens also see the question.

    question: its tokens (attnzoo.vlm.spans.check_tokens); None: the text behind the last image, up to the prompt's end,
        chat template's own words included. AKI ends it at its first <|assistant|>.
    layers: None: all. question="none" changes nothing.

    Only rows of the prompt change; answers stay causal. Differences from the authors' code: with several images all of
    them see the question (theirs breaks); batches keep their padding mask after the first token (theirs goes back to an
    all-ones mask of batch 1); rows of padding see nothing. `mutual_mask` is their function on one prompt.

    Raises TypeError or ValueError for wrong tokens or layers.
    """
    told = chooser(None if question is None else check_tokens("question", question))
    depth = text_config.num_hidden_layers
    return (Mask(as_layers(layers, depth, 0), _Mutual(told), mutual_rule, looks_ahead=True, rows="prompt"),)


def mutual_mask(attention_mask: Tensor, image_start: int, text_start: int, text_end: int) -> Tensor:
    """The authors' mask of one prompt, int64 [1, T, T], 1 where a row may attend.

    attention_mask: [T], 0 at padding, whose columns nobody sees. Image rows are image_start .. text_start - 1; the
    question is text_start .. text_end - 1 (vlm.py, _make_modality_mutual_mask).
    """
    length = len(attention_mask)
    place = torch.arange(length, device=attention_mask.device)
    kinds = torch.where((place >= image_start) & (place < text_start), IMAGE, PLAIN)
    kinds = torch.where((place >= text_start) & (place < text_end), QUESTION, kinds)
    causal = place <= place[:, None]
    found = mutual_rule(causal, kinds[:, None], kinds, place == place[:, None]) & attention_mask.bool()
    return found.long()[None]


def stack_masks(masks: list[Tensor]) -> Tensor:
    """[B, 1, T, T] from masks [1, t, t] of several lengths, filled with 0 below and to the right."""
    longest = max(mask.shape[-1] for mask in masks)
    fill = [torch.nn.functional.pad(m, (0, longest - m.shape[-1], 0, longest - m.shape[-1])) for m in masks]
    return torch.stack(fill)


def extend_mask(mask: Tensor, cached: bool = False) -> Tensor:
    """The authors' mask [1, 1, T + 1, T + 1] after one more token, which sees all; with a cache its row alone."""
    grown = torch.nn.functional.pad(mask, (0, 1, 0, 1))
    grown[..., -1, :] = 1
    return grown[..., -1:, :] if cached else grown


# --- composite attention (EE-MLLM) ---------------------------------------------------------------------------------


def composite_rule(seen: Tensor, rows: Tensor, keys: Tensor, itself: Tensor) -> Tensor:
    """Image rows see no other image token and no text: themselves alone."""
    return seen & ((rows != IMAGE) | itself)


def strict_composite_rule(seen: Tensor, rows: Tensor, keys: Tensor, itself: Tensor) -> Tensor:
    """Image rows see nothing; their attention is 0."""
    return seen & (rows != IMAGE)


def vision_rule(seen: Tensor, rows: Tensor, keys: Tensor, itself: Tensor) -> Tensor:
    """Image rows see no other image token, but the text before them."""
    return seen & ((rows != IMAGE) | (keys != IMAGE) | itself)


def hidden_image_rule(seen: Tensor, rows: Tensor, keys: Tensor, itself: Tensor) -> Tensor:
    """Nobody sees an image token but itself."""
    return seen & ((keys != IMAGE) | itself)


def image_kinds(prompt: Prompt) -> Tensor:
    """1 at image tokens, int64 [B, N]."""
    return torch.where(prompt.image, IMAGE, PLAIN)


def as_ever(seen: Tensor, rows: Tensor, keys: Tensor, itself: Tensor) -> Tensor:
    """What was seen is seen."""
    return seen


COMPOSITE = {"self": composite_rule, "nothing": strict_composite_rule, "text": vision_rule, "all": as_ever}


def eemllm(text_config: Any, sees: str = "self", layers: object = None) -> tuple[Edit, ...]:
    """EE-MLLM's composite attention (arXiv 2408.11795) as a mask: only text asks, image tokens don't attend to others.

    sees: what image rows see: "self" (themselves, so their attention gives their own value), "nothing" (attention 0;
        the residual stream and the feed-forward remain), "text" (only image-to-image attention is removed, text before
        the image stays seen), "all" (as ever: changes nothing). How the paper treats image tokens between layers is not
        settled by what was at hand; "self" is this library's choice.
    layers: None: all. Image rows still pass the layers' projections and feed-forwards: the mask saves their attention's
        meaning, not its time.

    Raises ValueError for another `sees`, TypeError or ValueError for wrong layers.
    """
    check_choice("sees", sees, tuple(COMPOSITE))
    chosen = as_layers(layers, text_config.num_hidden_layers, 0)
    return (Mask(chosen, image_kinds, COMPOSITE[sees], rows="prompt"),)


# --- prefix and blockwise masks (Croc, PaliGemma, Gemma 3) ---------------------------------------------------------


def same_block_rule(seen: Tensor, rows: Tensor, keys: Tensor, itself: Tensor) -> Tensor:
    """Tokens of one block, kinds above 0, see each other."""
    return seen | ((rows > 0) & (rows == keys))


def _prefix_kinds(prompt: Prompt) -> Tensor:
    return prompt.real.long()


def _block_kinds(prompt: Prompt) -> Tensor:
    before = torch.nn.functional.pad(prompt.image[:, :-1], (1, 0))
    return (prompt.image & ~before).cumsum(1) * prompt.image


PREFIX = {
    "prompt": (_prefix_kinds, same_block_rule),
    "image": (_block_kinds, same_block_rule),
    "none": (image_kinds, as_ever),
}


def prefix(text_config: Any, scope: str = "prompt", layers: object = None) -> tuple[Edit, ...]:
    """Bidirectional attention within the prompt: a prefix language model (Croc, PaliGemma), or blockwise (Gemma 3).

    scope: "prompt": every prompt token sees the whole prompt (PaliGemma's rule; Croc's mixed attention, where all rows
        see every key before a sample's first supervised label, arXiv 2410.14332); "image": the image tokens of a run
        see each other (transformers' block_sequence_ids); "none": as ever, which changes nothing.
    layers: None: all.

    Difference from Croc's code, which overwrites the padding mask inside the prefix: padding is never seen. Croc lets
    rows behind the prefix see what they see anyway: all of it.

    Raises ValueError for another scope, TypeError or ValueError for wrong layers.
    """
    check_choice("scope", scope, tuple(PREFIX))
    chosen = as_layers(layers, text_config.num_hidden_layers, 0)
    kinds, rule = PREFIX[scope]
    return (Mask(chosen, kinds, rule, looks_ahead=True, rows="prompt"),)


# --- self and cross blocks (MODA) ----------------------------------------------------------------------------------


def self_rule(seen: Tensor, rows: Tensor, keys: Tensor, itself: Tensor) -> Tensor:
    """Tokens see their own modality."""
    return seen & ((rows == IMAGE) == (keys == IMAGE))


def cross_rule(seen: Tensor, rows: Tensor, keys: Tensor, itself: Tensor) -> Tensor:
    """Tokens see the other modality, and themselves."""
    return seen & (((rows == IMAGE) != (keys == IMAGE)) | itself)


MODULAR = {"self": self_rule, "cross": cross_rule, "both": as_ever}


def moda(text_config: Any, part: str = "self", layers: object = None) -> tuple[Edit, ...]:
    """MODA's modular masks (arXiv 2507.04635): attention split into a self-modal and a cross-modal block.

    part: "self": image tokens see image tokens, text sees text; "cross": each sees the other modality and itself;
        "both": as ever, which changes nothing. MODA is trained and adds up both with a duplex aligner between the
        modalities' spaces; only the split is here.
    layers: None: all.

    Raises ValueError for another part, TypeError or ValueError for wrong layers.
    """
    check_choice("part", part, tuple(MODULAR))
    chosen = as_layers(layers, text_config.num_hidden_layers, 0)
    return (Mask(chosen, image_kinds, MODULAR[part]),)
