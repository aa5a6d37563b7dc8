"""VHR, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Reinforcement" (ACL 2025, arXiv 2412.13949).

A head's output with the image, against its output without it: heads that differ most are vision-aware, and are scaled.
No code is public; what the paper leaves open is an option here, and its default is stated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice, check_same, check_tensor
from attnzoo.vlm.checkpoints import carried, published
from attnzoo.vlm.checks import as_layers, as_number
from attnzoo.vlm.edits import Edit, HeadChoice, Mask, Probe, Prompt, Reading, Rehearse
from attnzoo.vlm.masks import hidden_image_rule, image_kinds

BLIND = ("removed", "hidden")


def head_divergence(seeing: Tensor, blind: Tensor, outliers: str | None = "sample") -> Tensor:
    """VHD [..., H]: the distance of head outputs with and without the image, [..., H, Dv] (Eq. 4), outliers set to 0.

    outliers (Eq. 6): a head is one where its VHD and its blind output's squared norm both lie above mean + standard
    deviation over the layer's heads; "sample" divides by H - 1, "population" by H, None keeps all.
    """
    check_tensor("seeing", seeing)
    check_same("dtype", seeing=seeing, blind=blind)
    found = (seeing - blind).norm(dim=-1)
    if outliers is None or found.shape[-1] < 2:
        return found
    blind_size = blind.square().sum(-1)
    correction = 1 if outliers == "sample" else 0
    far = torch.ones_like(found, dtype=torch.bool)
    for own in (found, blind_size):
        far &= own > own.mean(-1, keepdim=True) + own.std(-1, correction=correction, keepdim=True)
    return found.masked_fill(far, 0.0)


def vision_aware_heads(divergence: Tensor) -> Tensor:
    """bool [..., H]: heads above their layer's median (the mean of the two middle ones for an even number; Eq. 7)."""
    return divergence > torch.quantile(divergence, 0.5, dim=-1, keepdim=True)


def _work(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Heads:
    """Chooses a layer's heads: against what a rehearsal noted, or within a batch of seeing and blind prompts."""

    key: object
    outliers: str | None
    stream: str

    def against_notes(self, layer: int, outputs: Tensor, prompt: Prompt) -> Tensor:
        blind = prompt.notes[self.key, layer].to(outputs.device)
        return vision_aware_heads(head_divergence(_work(outputs), blind, self.outliers))

    def in_pairs(self, layer: int, outputs: Tensor, prompt: Prompt) -> Tensor:
        seeing, blind = _work(outputs).chunk(2)
        chosen = vision_aware_heads(head_divergence(seeing, blind, self.outliers))
        prompt.notes[self.key, layer] = chosen
        return torch.cat([chosen, chosen])

    def noted(self, layer: int, outputs: Tensor, prompt: Prompt) -> Tensor:
        found: Tensor = prompt.notes[self.key, layer]
        return found.to(outputs.device)

    def probe(self, layers: tuple[int, ...], prompt: Prompt) -> tuple[Edit, ...]:
        def tell(reading: Reading) -> None:
            prompt.notes[self.key, reading.layer] = _work(reading.value[:, -1])

        return (Probe(layers, tell, what="outputs", rows="last"),)


def vhr(
    text_config: Any,
    alpha: float = 2.0,
    layers: object = None,
    rows: str = "answer",
    blind_stream: str = "shared",
    blind: str = "removed",
    outliers: str | None = "sample",
) -> tuple[Edit, ...]:
    """The edit of VHR: in chosen layers, heads whose vision-aware head divergence is above the median are scaled.

    VHD of a head is || A - A' ||, its output before the output projection at the row that predicts the first answer
    token, with and without the image; 0 for outliers. Heads are chosen once per prompt, layer by layer, and kept.

    alpha: the authors' 2; 1 changes nothing.
    layers: None: "the second and last 14 layers" of 32 (0-based 1 and 18 .. 31), elsewhere the second and the last at
        the same share of the depth. (The paper takes the last 18 for InstructBLIP.)

    Open points of the paper, each with its default here:
    rows: which rows are scaled: "answer" (default: the row that predicts the first answer token and all generated ones)
        or "all" (also the prompt's).
    blind_stream: "shared" (default, what the text suggests): prompts with and without image run as one batch, and
        reinforced heads are reinforced in both, so that a later layer compares like with like; costs a prefill of
        twice the batch. "own": the blind stream runs alone and unreinforced; costs a text-only prefill.
    blind: the prompt without its image: "removed" (default: image tokens taken out, positions close up) or "hidden"
        (nobody sees image tokens, positions stay; only with blind_stream="own").
    outliers: the standard deviation of Eq. 6: "sample" (default, torch's), "population", or None for no outliers.
    Grouped-query heads: a head is a query head, alpha is the same.

    The prompt must come in one forward. Raises TypeError or ValueError for an alpha below 0, wrong layers or options.
    """
    alpha = as_number("alpha", alpha, 0.0)
    check_choice("rows", rows, ("answer", "all"))
    check_choice("blind_stream", blind_stream, ("shared", "own"))
    check_choice("blind", blind, BLIND)
    check_choice("outliers", outliers, ("sample", "population", None))
    if blind == "hidden" and blind_stream == "shared":
        raise ValueError('blind="hidden" goes with blind_stream="own"')
    depth = text_config.num_hidden_layers
    if layers is None:
        spans = published(text_config).get("vhr", {}).get("layers")
        spans = spans or [[min(1, depth - 1)] * 2, [carried(18, depth), depth - 1]]
        layers = [layer for first, last in spans for layer in range(first, last + 1)]
    chosen = as_layers(layers, depth, 1)
    heads = Heads(object(), outliers, blind_stream)
    if blind_stream == "shared":
        pairs = HeadChoice(chosen, heads.in_pairs, alpha, rows)
        return (Rehearse(lambda prompt: (pairs,), "both"), HeadChoice(chosen, heads.noted, alpha, rows))
    if blind == "removed":
        rehearsal = Rehearse(lambda prompt: heads.probe(chosen, prompt), "blind")
    else:
        hidden = Mask(tuple(range(depth)), image_kinds, hidden_image_rule)
        rehearsal = Rehearse(lambda prompt: (hidden, *heads.probe(chosen, prompt)))
    return (rehearsal, HeadChoice(chosen, heads.against_notes, alpha, rows))
