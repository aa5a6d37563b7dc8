"""ViF's reallocation (arXiv 2509.21789; code YU-deep/ViF, no licence): mass from what is not looked at, spread evenly.

The paper's other part, a trained block that re-reads "relay" tokens, is not here; neither is its multi-agent setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice, check_range, check_tensor
from attnzoo.vlm.checks import as_layers, as_number
from attnzoo.vlm.edits import Edit, Observe, Prompt, Spread
from attnzoo.vlm.spans import Chooser, Tokens, check_tokens, chooser, resolve

OTHER, ACTIVE, INACTIVE, INSTRUCTION = range(4)
SAME_NORM = 1e-3
_EPS = 1e-6


def key_norms(key: Tensor) -> Tensor:
    """The norm of each token's key, [B, N] from [B, N, C] (all kv heads side by side)."""
    check_tensor("key", key, 3)
    return key.norm(dim=-1)


def relay_tokens(signal: Tensor, relay_ratio: float = 0.02, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(int64 [B, k] by size, bool [B, N]): the relay_ratio of tokens with the largest signal [B, N], at least one.

    The authors' z-score and sigmoid (omega) keep the order, so they don't matter. image: bool [B, N], tokens to choose
    from, for all sequences as many as the sequence with the fewest gives.
    """
    check_tensor("signal", signal, 2)
    check_range("relay_ratio", relay_ratio, 0.0, 1.0)
    counts = torch.full((len(signal),), signal.shape[1]) if image is None else image.sum(1).cpu()
    each = [max(1, int(n * relay_ratio)) if n else 0 for n in counts.tolist()]
    ranked = signal if image is None else signal.masked_fill(~image, -torch.inf)
    index = ranked.topk(max(each, default=0), dim=1).indices
    mask = torch.zeros(signal.shape, dtype=torch.bool, device=signal.device)
    for row, own in enumerate(each):
        mask[row, index[row, :own]] = True
    return index[:, : min(each, default=0)], mask


@dataclass(frozen=True)
class VifRule:
    """(factors, gifts) of the four groups: takers keep 1 - alpha, receivers share what they lose by their number."""

    alpha: float
    takes: tuple[int, ...]
    gets: tuple[int, ...]
    official: bool = False

    def __call__(self, masses: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        takes, gets = list(self.takes), list(self.gets)
        counts = counts.to(masses.dtype).expand(masses.shape)
        receivers = counts[..., gets].sum(-1, keepdim=True)
        taken = self.alpha * masses[..., takes].sum(-1, keepdim=True)
        there = receivers > 0
        factors, gifts = torch.ones_like(masses), torch.zeros_like(masses)
        factors[..., takes] = 1 - self.alpha
        gifts[..., gets] = taken * counts[..., gets] / (receivers + (_EPS if self.official else 0.0)).clamp_min(_EPS)
        if self.official:
            total = (factors * masses + gifts).sum(-1, keepdim=True) + _EPS
            return factors / total, gifts / total
        return torch.where(there, factors, 1.0), torch.where(there, gifts, 0.0)


@dataclass(frozen=True, eq=False)
class VifGroups:
    key: object
    instruction: Chooser
    inactive: Tokens
    relay_ratio: float

    def look(self, layer: int, view: Any, prompt: Prompt) -> None:
        """Note the relay tokens of the first edited layer's keys."""
        key = view.rows(0, 1).key  # [B, Hkv, K, D]
        norms = key_norms(key.transpose(1, 2).flatten(2))[:, : prompt.image.shape[1]]
        image = prompt.image.to(norms.device)
        if bool(image.any()):
            own = norms[image]
            if float(own.amax() - own.amin()) < SAME_NORM * float(own.mean()):
                raise UnsupportedError(
                    "the keys of this text tower all have one norm, which can't choose relay tokens: give inactive="
                )
        prompt.notes[self.key] = relay_tokens(norms, self.relay_ratio, image)[1]

    def __call__(self, prompt: Prompt, layer: int) -> Tensor:
        if self.inactive is not None:
            inactive = resolve(self.inactive, prompt) & prompt.image
        else:
            inactive = prompt.image & ~prompt.notes[self.key].to(prompt.image.device)
        instruction = self.instruction(prompt) & ~prompt.image
        visual = torch.where(inactive, INACTIVE, ACTIVE)
        text = torch.where(instruction, INSTRUCTION, OTHER)
        return torch.where(prompt.image, visual, text).to(torch.uint8)


def vif(
    text_config: Any,
    tau: float = 0.8,
    alpha_middle: float = 0.2,
    alpha_deep: float = 0.1,
    middle: object = None,
    deep: object = None,
    inactive: Tokens = None,
    instruction: Tokens = None,
    relay_ratio: float = 0.02,
    compat: str | None = None,
) -> tuple[Edit, ...]:
    """The edits of ViF's reallocation, on every row, at temperature tau.

    In middle layers, alpha_middle of the mass on inactive image tokens and the instruction goes to all other keys in
    equal parts; in deep layers, alpha_deep of the mass on the image goes to the instruction's keys in equal parts.

    tau: divides the logits. tau=1 with both alphas 0 changes nothing.
    middle, deep: layer indices; None: the second and the last third, this library's choice (the code has a stub for
        the model). An empty tuple leaves one out.
    inactive: the inactive image tokens (attnzoo.vlm.spans.check_tokens). None: all but the relay tokens, which are the
        relay_ratio of the image's tokens with the largest key norm in the first middle layer; the code takes a mask
        from its caller, so the rule is this library's. Towers that normalise keys without a weight of their own give
        all the same norm and are refused.
    instruction: None: the text behind the last image, without what is generated.
    compat: "official" repeats the released code: keys that a row does not see, later ones included, are given their
        part, and 1e-6 stands in two denominators, so that rows sum to a little less than 1. The default gives to keys
        that the row sees, and where there is none takes nothing.

    Raises TypeError or ValueError for tau not above 0, an alpha or ratio outside 0..1, wrong layers or tokens, another
    compat.
    """
    check_choice("compat", compat, (None, "official"))
    official = compat == "official"
    tau = as_number("tau", tau, 0.0)
    if tau == 0:
        raise ValueError("tau must be above 0, got 0.0")
    alphas = as_number("alpha_middle", alpha_middle, 0.0, 1.0), as_number("alpha_deep", alpha_deep, 0.0, 1.0)
    depth = text_config.num_hidden_layers
    third = max(1, depth // 3)
    sets = [
        range(third, depth - third) if middle is None else middle,
        range(depth - third, depth) if deep is None else deep,
    ]
    chosen = [as_layers(own, depth, 0) if not _empty(own) else () for own in sets]
    if not any(chosen):
        raise ValueError("middle and deep must name at least one layer, got none")
    if set(chosen[0]) & set(chosen[1]):
        raise ValueError(f"middle and deep must not share layers, got {sorted(set(chosen[0]) & set(chosen[1]))}")
    told = chooser(None if instruction is None else check_tokens("instruction", instruction))
    inactive = None if inactive is None else check_tokens("inactive", inactive)
    groups = VifGroups(object(), told, inactive, as_number("relay_ratio", relay_ratio, 0.0, 1.0))
    rules = (
        VifRule(alphas[0], (INACTIVE, INSTRUCTION), (OTHER, ACTIVE), official),
        VifRule(alphas[1], (ACTIVE, INACTIVE), (INSTRUCTION,), official),
    )
    edits: list[Edit] = [
        Spread(own, groups, rule, 4, "all", temperature=tau, leaky=official) for own, rule in zip(chosen, rules) if own
    ]
    if inactive is None:
        edits.insert(0, Observe((min(c for own in chosen for c in own),), groups.look))
    return tuple(edits)


def _empty(value: object) -> bool:
    return isinstance(value, tuple | list | range) and len(value) == 0
