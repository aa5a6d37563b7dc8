"""GIFT (ICML 2026, arXiv 2510.22067; code amazon-science/GIFT, CC BY-NC, not read here): follow the shift of the gaze.

Where a query word makes the model look more at a picture's token than the word before did, that token is salient. From
then on, heads that look at the picture look at salient tokens more, and heads that read the query keep up with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_choice, check_tensor
from attnzoo.vlm.checkpoints import carried, published
from attnzoo.vlm.checks import as_layers, as_number
from attnzoo.vlm.edits import Edit, Observe, Prompt, Regroup, Rehearse
from attnzoo.vlm.spans import Chooser, Tokens, check_tokens, chooser

OTHER, IMAGE, QUERY = range(3)
ROWS_AT_ONCE = 32


def gaze_shifts(probs: Tensor, previous: Tensor) -> Tensor:
    """max(A_i - A_{i-1}, 0) of attention rows and the rows before them, both [..., K]."""
    return (probs - previous).clamp_min(0)


def strongest_heads(per_head: Tensor) -> Tensor:
    """int64 [..., H // 2] (at least one): the heads with the largest numbers of per_head [..., H]."""
    return per_head.topk(max(1, per_head.shape[-1] // 2), dim=-1).indices


def saliency(shift: Tensor, image: Tensor) -> Tensor:
    """Saliency in 0 .. 1, [B, N], of image tokens (bool [B, N]) from their mean shift [B, N]; 0 elsewhere.

    Clipped to mean +- 3 standard deviations (unbiased) over the sequence's image tokens, then stretched from its
    minimum to its maximum.
    """
    check_tensor("image", image, 2, [torch.bool])
    count = image.sum(1, keepdim=True)
    mean = (shift * image).sum(1, keepdim=True) / count.clamp_min(1)
    spread = ((shift - mean).square() * image).sum(1, keepdim=True) / (count - 1).clamp_min(1)
    clipped = torch.minimum(torch.maximum(shift, mean - 3 * spread.sqrt()), mean + 3 * spread.sqrt())
    low = clipped.masked_fill(~image, torch.inf).amin(1, keepdim=True)
    high = clipped.masked_fill(~image, -torch.inf).amax(1, keepdim=True)
    width = (high - low).nan_to_num(0.0, 0.0, 0.0)
    return torch.where(image & (width > 0), (clipped - low) / torch.where(width > 0, width, 1.0), 0.0)


@dataclass(frozen=True, eq=False)
class Watch:
    """Notes the mean shift of one layer, [B, N], over its stronger half of heads and all query words."""

    key: object
    words: Chooser

    def __call__(self, layer: int, view: Any, prompt: Prompt) -> None:
        words = self.words(prompt) & prompt.real
        total: Tensor | None = None
        for low in range(0, view.length, ROWS_AT_ONCE):
            high = min(low + ROWS_AT_ONCE, view.length)
            here = words[:, low:high]
            if not bool(here.any()):
                continue
            begin = max(low - 1, 0)
            probs = view.rows(begin, high).probs()
            if not begin:
                probs = torch.nn.functional.pad(probs, (0, 0, 0, 0, 1 - low, 0))  # the first row shifts from nothing
            shift = (gaze_shifts(probs[:, 1:], probs[:, :-1]) * here.to(probs)[:, :, None, None]).sum(1)
            total = shift if total is None else total + shift
        if total is None:
            return
        image = prompt.image.to(total.device)
        total = total[..., : image.shape[1]] * image[:, None]
        heads = strongest_heads(total.sum(-1))
        chosen = total.gather(1, heads[..., None].expand(-1, -1, total.shape[2])).mean(1)
        count = words.sum(1, keepdim=True).clamp_min(1).to(chosen)
        prompt.notes.setdefault((self.key, "shifts"), {})[layer] = chosen / count


@dataclass(frozen=True, eq=False)
class GiftEdit:
    """The groups, the weights and the rule of GIFT for one `edit`."""

    key: object
    alpha: float
    query: Chooser
    given: Tensor | None

    def groups(self, prompt: Prompt, layer: int) -> Tensor:
        query = self.query(prompt) & ~prompt.image
        return torch.where(prompt.image, IMAGE, torch.where(query, QUERY, OTHER)).to(torch.uint8)

    def log_weights(self, prompt: Prompt) -> Tensor:
        """alpha S, [B, N]."""
        if self.given is not None:
            batch, length = prompt.image.shape
            given = self.given.to(prompt.image.device)
            if batch % len(given) or given.shape[1] < length:
                raise ValueError(f"saliency must be [{batch} or a divisor, {length}], got {tuple(given.shape)}")
            return self.alpha * given[:, :length].repeat_interleave(batch // len(given), 0) * prompt.image
        shifts = prompt.notes.get((self.key, "shifts"))
        if not shifts:  # a prompt without query words: nothing is salient
            return torch.zeros(prompt.image.shape, device=prompt.image.device)
        shift = torch.stack(list(shifts.values())).mean(0)
        return self.alpha * saliency(shift, prompt.image.to(shift.device))

    def rule(self, masses: Tensor, sizes: Tensor) -> Tensor:
        """Factors [B, R, H, 4] from the masses of other keys, image, query and the weighted image."""
        plain, weighted = masses[..., IMAGE], masses[..., -1]
        looks = torch.zeros_like(plain).scatter(-1, strongest_heads(plain), 1.0)
        reads = torch.zeros_like(plain).scatter(-1, strongest_heads(masses[..., QUERY]), 1.0)
        before = (plain * looks).sum(-1, keepdim=True)
        grown = torch.where(before > 0, (weighted * looks).sum(-1, keepdim=True) / before.clamp_min(1e-30), 1.0)
        factors = torch.stack([torch.ones_like(plain), 1 - looks, 1 + (grown - 1) * reads, looks], -1)
        total = (factors * masses).sum(-1, keepdim=True)
        return factors / torch.where(total > 0, total, 1.0)


def gift(
    text_config: Any,
    alpha: float | None = None,
    query: Tokens = None,
    words: Tokens = None,
    saliency_layers: object = None,
    layers: object = None,
    saliency: Tensor | None = None,
    compat: str | None = None,
) -> tuple[Edit, ...]:
    """The edit of GIFT. In rows that predict the answer, in the edited layers:

    the half of the heads with the most mass on the image weights its tokens with exp(alpha S); r is by how much their
    image mass grew, one number per row; the half with the most mass on the query multiplies that with r; rows are
    renormalised. S, the saliency of image tokens, comes from the prompt: per saliency layer, max(A_i - A_{i-1}, 0)
    over the query words i, the half of the heads with the largest sum, mean over layers, heads and words, clipped at 3
    standard deviations, stretched to 0 .. 1.

    alpha: None: the authors' (5 for LLaVA-1.5, 4 for Qwen2-VL 7B; 5 elsewhere). 0 changes nothing.
    query: the query's tokens (attnzoo.vlm.spans.check_tokens); None: the text behind the last image, chat template's
        own words included.
    words: those of the query whose gaze counts; None: all of it. The authors take content words (nouns, verbs,
        adjectives, adverbs, numbers by spaCy), which needs the text: pass their positions.
    saliency_layers, layers: None: the authors' for LLaVA-1.5 7B (11; 12 .. 22), 13B (10; 14 .. 20) and Qwen2-VL 7B (14;
        5 .. 18; configs/vlm_checkpoints.toml), elsewhere 7B's at the same share of the depth.
    saliency: float [B, N], a saliency of your own over the padded prompt; nothing is read from the prompt then.
    compat: "official" edits the last row of each forward instead of every row that predicts an answer token.

    Where a saliency layer lies above an edited one (Qwen2-VL), the prompt is read once more beforehand, as the authors'
    code always does; otherwise the prompt's own forward serves.

    Other differences from the authors' code, in both modes: every sequence of a batch for itself (theirs reads the
    first one); image and query positions from each sequence's own tokens instead of fixed offsets; the first token of
    the prompt shifts from nothing; masses in float32. Where the paper differs (r as a sum of ratios, the saliency layer
    chosen by its total shift) the code is followed.

    Raises TypeError or ValueError for an alpha below 0, layers or tokens that don't exist, another compat.
    """
    check_choice("compat", compat, (None, "official"))
    known = published(text_config).get("gift", {})
    depth = text_config.num_hidden_layers
    alpha = as_number("alpha", known.get("alpha", 5.0) if alpha is None else alpha, 0.0)
    if saliency_layers is None:
        saliency_layers = known.get("saliency", [carried(11, depth)])
    looked = as_layers(saliency_layers, depth, 0)
    if layers is None:
        first, last = known.get("layers", (max(carried(12, depth), looked[-1] + 1), carried(22, depth)))
        layers = range(first, max(first, last) + 1) if first < depth else [depth - 1]
    edited = as_layers(layers, depth, 0)
    read = chooser(None if query is None else check_tokens("query", query))
    told = read if words is None else chooser(check_tokens("words", words))
    if saliency is not None:
        check_tensor("saliency", saliency, 2, [torch.float32, torch.float64])
    key = object()
    own = GiftEdit(key, alpha, read, saliency)
    rows = "last" if compat == "official" else "answer"
    change = Regroup(
        edited,
        own.groups,
        own.rule,
        3,
        rows,
        source="prompt",
        copied=IMAGE,
        log_weights=own.log_weights,
    )
    if saliency is not None:
        return (change,)
    watch = Observe(looked, Watch(key, told))
    if looked[-1] >= edited[0]:
        return (Rehearse(lambda prompt: (watch,)), change)
    return (watch, change)
