"""OPERA's decoding loop: beam search that looks one token ahead and may go back (the mathematics is in opera.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput

from attnzoo.vlm.beams import BeamRules, OfficialBeams, StockBeams
from attnzoo.vlm.lookahead import LookAhead
from attnzoo.vlm.opera import (
    EARLY,
    Aggregation,
    aggregate,
    candidates_only,
    common_place,
    extend_products,
    penalised,
    without_rejected,
)


@dataclass(frozen=True, eq=False)
class OperaStep:
    """What one step of the loop did, for prompts `samples` [S]; N beams, C candidates.

    rollback_positions: per prompt the response position that was chosen anew, -1 where none was. rejected: per prompt
    the flat positions (beam x vocabulary + token) that were taken there before, or None.
    """

    samples: Tensor
    candidates: Tensor  # [S, N, C]
    aggregation: Aggregation
    places: Tensor  # [S]
    rollback_positions: list[int]
    rejected: list[Tensor | None]
    parents: Tensor  # [S, N]
    tokens: Tensor  # [S, N]
    scores: Tensor  # [S, N], of the beams now
    length: int  # of the sequences now, prompt included


@dataclass(eq=False)
class _State:
    """The search before step T of one or several prompts: what going back puts back."""

    beams: Any
    products: Tensor  # [S, N, T]
    places: Tensor  # [S, N, T + 1]: each beam's common place of every step so far, this one's with it
    parents: Tensor | None  # [S, N]: what led here
    tokens: Tensor | None


@dataclass(eq=False)
class _Memory:
    """Of one prompt: how often each position was chosen anew, and what was taken there."""

    times: dict[int, int] = field(default_factory=dict)
    rejected: dict[int, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class _Cohort:
    """Prompts that have the same length, so that one forward serves them."""

    samples: Tensor  # [S], which prompts of the batch
    ahead: LookAhead
    beams: Any
    logits: Tensor  # [S, N, V]
    products: Tensor  # [S, N, T]
    places: Tensor  # [S, N, steps]
    image: Tensor  # bool [S, prompt]
    memories: list[_Memory]
    history: dict[int, _State] = field(default_factory=dict)
    parents: Tensor | None = None
    tokens: Tensor | None = None

    def part(self, samples: Tensor, adopt: Callable[..., None]) -> _Cohort:
        """These of its prompts, on their own; a copy."""

        def own(value: Any) -> Any:
            return value[samples] if isinstance(value, Tensor) else value

        ahead = self.ahead.split(samples)
        adopt(self.ahead.cache, ahead.cache, samples)
        history = {
            at: _State(s.beams.select(samples), *(own(v) for v in (s.products, s.places, s.parents, s.tokens)))
            for at, s in self.history.items()
        }
        return _Cohort(
            self.samples[samples],
            ahead,
            self.beams.select(samples),
            own(self.logits),
            own(self.products),
            own(self.places),
            own(self.image),
            [self.memories[i] for i in samples.tolist()],
            history,
            own(self.parents),
            own(self.tokens),
        )


@dataclass(frozen=True, eq=False)
class OperaLoop:
    """A decoding method for `generate(custom_generate=...)`; see attnzoo.vlm.opera for the arguments."""

    num_beams: int
    num_return_sequences: int
    scale_factor: float
    threshold: int | None
    num_attn_candidates: int
    penalty_weights: float
    window_size: int
    official: bool
    length_penalty: float
    early_stopping: bool | str
    image: Tensor  # bool [B, prompt]
    adopt: Callable[..., None]
    open: Callable[[Any], None]
    tell: Callable[[OperaStep], object] | None = None

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        model_kwargs.pop("synced_gpus", None)
        eos = generation_config._eos_token_tensor
        pad = generation_config._pad_token_tensor
        eos = () if eos is None else tuple(eos.reshape(-1).tolist())
        rules = BeamRules(
            model,
            self.num_beams,
            input_ids.shape[1],
            generation_config.max_length,
            self.length_penalty,
            self.early_stopping,
            eos,
            self._padding(None if pad is None else int(pad), eos),
            stopping_criteria,
        )
        depth = model.config.get_text_config().num_hidden_layers
        remember = self.threshold is not None
        ahead = LookAhead(model, depth - 1, model_kwargs, self.num_beams, remember)
        self.open(ahead.read.edit)
        logits = ahead.prefill(input_ids)
        work = torch.promote_types(logits.dtype, torch.float32)
        kind = OfficialBeams if self.official else StockBeams
        samples = torch.arange(len(input_ids), device=input_ids.device)
        nothing = torch.zeros(len(input_ids), self.num_beams, 0, dtype=work, device=logits.device)
        queue = [
            _Cohort(
                samples,
                ahead,
                kind.begin(rules, input_ids, work),
                logits,
                nothing,
                nothing.long(),
                self.image.to(input_ids.device),
                [_Memory() for _ in samples],
            )
        ]
        found: dict[int, list[tuple[Tensor, float]]] = {}
        while queue:
            cohort = queue.pop()
            while True:
                parts = self._advance(cohort, logits_processor)
                if parts:
                    queue += parts
                    break
                done = cohort.beams.done
                if not bool(done.any()):
                    continue
                results = cohort.beams.results(self.num_return_sequences)
                found |= {int(cohort.samples[i]): results[i] for i in done.nonzero()[:, 0].tolist()}
                if bool(done.all()):
                    break
                cohort = cohort.part((~done).nonzero()[:, 0], self.adopt)
        return self._output(found, rules, generation_config)

    def _padding(self, pad: int | None, eos: tuple[int, ...]) -> int:
        """What stands behind an answer that is shorter than others: as transformers has it, where 0 is no padding."""
        if self.official:
            return pad if pad is not None else eos[0] if eos else 0
        return (pad or eos[0]) if eos else -1

    def _advance(self, cohort: _Cohort, processor: Any) -> list[_Cohort]:
        """One token more. Where some of several prompts go back, nothing but the cohort's parts, which no longer have
        one length together and do the step on their own."""
        beams, ahead = cohort.beams, cohort.ahead
        logits = cohort.logits.to(cohort.products.dtype)
        before = logits if self.official else self._log_probs(beams, logits, processor)
        scores, candidates = before.topk(min(self.num_attn_candidates, logits.shape[-1]), dim=-1)
        count = candidates.shape[-1]
        found = ahead.look(candidates)
        products, image = self._extend(cohort, cohort.products, found.rows)
        judged = aggregate(products, image, self.official)
        per_beam, place = common_place(judged.place)
        places = torch.cat([cohort.places, per_beam[..., None]], -1)
        back = [self._position(cohort, i, places[i], int(place[i])) for i in range(len(place))]
        going = [i for i, position in enumerate(back) if position is not None]
        if going and len(back) > 1:
            ahead.drop(count)
            groups = [[i] for i in going] + [[i for i in range(len(back)) if back[i] is None]]
            return [cohort.part(torch.tensor(own, device=place.device), self.adopt) for own in groups if own]
        cohort.places = places
        now = cohort.products.shape[-1]
        cohort.history[now] = _State(beams.snapshot(), cohort.products, places, cohort.parents, cohort.tokens)
        cohort.history.pop(now - self.window_size, None)
        position = back[0] if going else None
        if position is None:
            parents, tokens = beams.advance(self._scores(beams, before, scores, candidates, judged, processor))
            self._follow(cohort, parents, tokens, candidates, found, products)
        else:
            ahead.drop(count)
            self._go_back(cohort, position, processor)
        if self.tell is not None:
            self.tell(
                OperaStep(
                    cohort.samples,
                    candidates,
                    judged,
                    place,
                    [-1 if position is None else position for position in back],
                    [cohort.memories[i].rejected.get(p) if p is not None else None for i, p in enumerate(back)],
                    _given(cohort.parents),
                    _given(cohort.tokens),
                    cohort.beams.scores,
                    cohort.beams.length,
                )
            )
        return []

    def _extend(self, cohort: _Cohort, products: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Column products [S, N, C, T + 1] with these rows [S, N, C, K], and the rows' attention to the image."""
        weights = rows.to(products.dtype)
        weights = weights / weights.sum(-1, keepdim=True)
        prompt = cohort.ahead.prompt_length
        image = (weights[..., :prompt] * cohort.image[:, None, None]).sum(-1)
        before = products[:, :, None].expand(*rows.shape[:3], -1)
        return extend_products(before, weights[..., prompt:], self.scale_factor, log=not self.official), image

    @staticmethod
    def _log_probs(beams: Any, logits: Tensor, processor: Any) -> Tensor:
        return processor(beams.sequences.flatten(0, 1), logits.log_softmax(-1).flatten(0, 1)).view_as(logits)

    def _scores(
        self, beams: Any, before: Tensor, scores: Tensor, candidates: Tensor, judged: Aggregation, processor: Any
    ) -> Tensor:
        """What beam search adds up, [S, N, V]."""
        if self.official:
            chosen = penalised(scores, judged.penalty, self.penalty_weights)
            return self._log_probs(beams, candidates_only(chosen, candidates, before.shape[-1]), processor)
        if self.penalty_weights:
            among = penalised(scores, judged.penalty, self.penalty_weights).log_softmax(-1)
            scores = among + scores.logsumexp(-1, keepdim=True)
        return torch.full_like(before, -torch.inf).scatter(-1, candidates, scores)

    # --- forth and back ----------------------------------------------------------------------------------------------

    def _follow(
        self, cohort: _Cohort, parents: Tensor, tokens: Tensor, candidates: Tensor, found: Any, products: Tensor
    ) -> None:
        """The look-ahead of what was chosen becomes the state; what was not looked at is run now."""
        own = _take(candidates, parents) == tokens[..., None]
        count = candidates.shape[-1]
        if bool(own.any(-1).all()):
            which = own.int().argmax(-1)
            cohort.ahead.keep(parents, which, count)
            cohort.logits = _pick(found.logits, parents, which)
            cohort.products = _pick(products, parents, which)
            self._chosen(cohort, parents, tokens)
        else:
            cohort.ahead.drop(count)
            self._run(cohort, parents, tokens)

    def _run(self, cohort: _Cohort, parents: Tensor, tokens: Tensor) -> None:
        found = cohort.ahead.step(parents, tokens)
        cohort.logits = found.logits[:, :, 0]
        cohort.products = self._extend(cohort, _take(cohort.products, parents), found.rows)[0][:, :, 0]
        self._chosen(cohort, parents, tokens)

    def _chosen(self, cohort: _Cohort, parents: Tensor, tokens: Tensor) -> None:
        cohort.parents, cohort.tokens = parents, tokens
        if not self.official:
            cohort.places = _take(cohort.places, parents)

    def _position(self, cohort: _Cohort, prompt: int, places: Tensor, place: int) -> int | None:
        """The response position that a prompt chooses anew, or None. places [N, T]: of its beams' steps."""
        if self.threshold is None or place < EARLY:
            return None
        if not bool(((places == place).sum(-1) > int(self.threshold)).all()):
            return None
        times, most = cohort.memories[prompt].times, self.num_attn_candidates
        length, position = places.shape[-1], place + 1
        if self.official and position >= self.window_size:
            return None
        if times.get(position, 0) >= most:
            position -= 1
            if times.get(position, 0) >= most:
                return None
        if self.official and length - position > self.window_size + 1:
            position = max(1, length - self.window_size - 1)
        target = min(position, length - 2)
        return position if target >= 1 and target in cohort.history else None

    def _go_back(self, cohort: _Cohort, position: int, processor: Any) -> None:
        """The one prompt of a cohort chooses `position` anew, without what was taken there before."""
        memory, history = cohort.memories[0], cohort.history
        memory.times[position] = memory.times.get(position, 0) + 1
        target = min(position, max(history) - 1)
        state, after = history[target], history[target + 1]
        for later in [at for at in history if at > target]:
            del history[later]
        vocabulary = cohort.logits.shape[-1]
        taken = (_given(after.parents) * vocabulary + _given(after.tokens)).reshape(-1)
        forget = [position + 1] if self.official else [at for at in memory.rejected if at > position]
        for at in forget:
            memory.rejected.pop(at, None)
        if position in memory.rejected:
            taken = torch.cat([memory.rejected[position], taken])
        memory.rejected[position] = taken
        cohort.beams = beams = replace(state.beams)
        cohort.products, cohort.places = state.products, state.places
        logits = cohort.ahead.back(target, _given(state.tokens)).to(cohort.products.dtype)
        if self.official:
            scores = self._log_probs(beams, without_rejected(logits[0], taken)[None], processor)
        else:
            scores = self._log_probs(beams, logits, processor)
            scores = scores.reshape(-1).scatter(0, taken, -torch.inf).view_as(logits)
        self._run(cohort, *beams.advance(scores))

    def _output(self, found: dict[int, list[tuple[Tensor, float]]], rules: BeamRules, config: Any) -> Any:
        rows = [row for sample in sorted(found) for row in found[sample]]
        longest = max(len(sequence) for sequence, _ in rows)
        sequences = torch.stack([
            torch.nn.functional.pad(sequence, (0, longest - len(sequence)), value=rules.pad) for sequence, _ in rows
        ])  # fmt: skip
        if not config.return_dict_in_generate:
            return sequences
        scores = torch.tensor([score for _, score in rows], device=sequences.device)
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores)  # type: ignore[arg-type]


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _take(value: Tensor, parents: Tensor) -> Tensor:
    """value [S, N, ...] of the beams parents [S, N]."""
    return value[torch.arange(len(parents), device=parents.device)[:, None], parents]


def _pick(value: Tensor, parents: Tensor, which: Tensor) -> Tensor:
    """value [S, N, C, ...] of candidate which [S, N] of the beams parents [S, N]."""
    return value[torch.arange(len(parents), device=parents.device)[:, None], parents, which]
