"""HeadHunter: which heads to perturb, found greedily for an objective of the user's.

Paper: Ahn et al., "Fine-Grained Perturbation Guidance via Attention Head Selection" (arXiv:2506.10978, 2025); no code:
in every round each head that is not yet chosen is tried together with those that are, and the best are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from attnzoo.errors import UnsupportedError, check_range, per_axis
from attnzoo.generators.handles import enable, find_targets
from attnzoo.generators.interception import self_attentions
from attnzoo.generators.schedule import choose_layers

Head = tuple[str, int]


@dataclass(frozen=True)
class Hunt:
    """What `head_hunter` found. heads: in the order of their choice, as (layer name, head).

    scores: the objective with the heads of round 1, 2, ... on; baseline: without any. tried: the objective of each
    candidate together with the heads chosen before, per round.
    """

    heads: tuple[Head, ...]
    scores: tuple[float, ...]
    baseline: float
    tried: tuple[dict[Head, float], ...] = field(repr=False)

    @property
    def selection(self) -> dict[str, list[int]]:
        """The same for `enable(pipe, "soft_pag", selection=...)`."""
        found: dict[str, list[int]] = {}
        for name, head in self.heads:
            found.setdefault(name, []).append(head)
        return found


def head_hunter(
    pipe_or_model: Any,
    objective: Callable[[Any], float],
    *,
    rounds: int = 1,
    top_k: int = 1,
    layers: Any = None,
    candidates: Iterable[Head] | None = None,
    progress: bool = True,
    **options: Any,
) -> Hunt:
    """The heads whose perturbation raises `objective` most, `top_k` more in each of `rounds` greedy rounds.

    objective: called with `pipe_or_model` while "soft_pag" is on with the heads to judge; runs it on the prompts and
    seeds that it wants and returns a number, larger is better (a preference model's mean score, say). It should be
    the same for the same heads: fix the seeds.
    layers: as for `enable`; candidates: (layer name, head) pairs instead of all heads of these layers.
    options: of `SoftPAG`: scale, strength, variant, steps.
    The first denoiser is searched. It calls the objective 1 + rounds x candidates + rounds times at most, with a
    progress bar over the candidates; the pipeline is as before afterwards, also when the objective raises.

    Raises TypeError or ValueError for bad arguments and for an objective that returns no finite number.
    """
    per_axis("rounds", rounds, 1, low=1)
    per_axis("top_k", top_k, 1, low=1)
    if "selection" in options or "heads" in options:
        raise TypeError("head_hunter finds the heads itself: give no selection= and no heads=")
    pool = _candidates(pipe_or_model, layers, candidates)
    check_range("rounds * top_k", rounds * top_k, 1, len(pool))

    def score(heads: Collection[Head]) -> float:
        selection = Hunt(tuple(heads), (), 0.0, ()).selection
        with enable(pipe_or_model, "soft_pag", selection=selection, **options):
            return _finite(objective(pipe_or_model), heads)

    baseline = _finite(objective(pipe_or_model), ())
    chosen: list[Head] = []
    scores: list[float] = []
    tried: list[dict[Head, float]] = []
    with tqdm(total=sum(len(pool) - top_k * r for r in range(rounds)), desc="heads", disable=not progress) as bar:
        for turn in range(rounds):
            found: dict[Head, float] = {}
            for head in pool:
                if head in chosen:
                    continue
                found[head] = score([*chosen, head])
                bar.update()
                bar.set_postfix_str(f"round {turn + 1}/{rounds}, best {max(found.values()):.4g}", refresh=False)
            best = sorted(found, key=found.__getitem__, reverse=True)[:top_k]
            chosen += best
            scores.append(found[best[0]] if top_k == 1 else score(chosen))
            tried.append(found)
    return Hunt(tuple(chosen), tuple(scores), baseline, tuple(tried))


def _finite(value: Any, heads: Collection[Head]) -> float:
    if not math.isfinite(value := float(value)):
        raise ValueError(f"objective must return a finite number, got {value} with heads {list(heads)}")
    return value


def _candidates(pipe_or_model: Any, layers: Any, candidates: Iterable[Head] | None) -> list[Head]:
    target = find_targets(pipe_or_model)[0]
    modules = self_attentions(target.model, target.family)
    heads = {name: _heads(name, module) for name, (module, _) in modules.items()}
    if candidates is None:
        chosen = choose_layers(layers, list(modules))
        return [(name, head) for name in modules if name in chosen for head in range(heads[name])]
    if layers is not None:
        raise TypeError("give layers= or candidates=, not both")
    pool = list(dict.fromkeys((name, head) for name, head in candidates))
    for name, head in pool:
        if name not in heads or not 0 <= head < heads[name]:
            raise ValueError(f"candidates must be (layer name, head) of this model, got {(name, head)!r}")
    return pool


def _heads(name: str, module: nn.Module) -> int:
    count = getattr(module, "heads", None) or getattr(module, "num_heads", None)
    if not isinstance(count, int):
        raise UnsupportedError(f"{name}: {type(module).__name__} does not tell how many heads it has")
    return count
