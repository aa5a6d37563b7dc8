"""What beam search keeps of its beams, in two publications' rules; OPERA's loop drives either, and can go back in it.

Shapes: S prompts, N beams each. `advance` gets scores [S, N, V] of the next token and says which beam each new one
continues and with which token, both [S, N].
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

DEAD = -1e9  # transformers' score of beams that don't exist yet: all prompts begin with one


@dataclass(frozen=True)
class BeamRules:
    """What stays the same over a whole search. stopping: transformers' criteria, [rows, length] -> bool [rows]."""

    model: Any
    num_beams: int
    prompt_length: int
    max_length: int
    length_penalty: float
    early_stopping: bool | str
    eos: tuple[int, ...]
    pad: int
    stopping: Any


@dataclass(eq=False)
class StockBeams:
    """transformers' own beam search (generation/utils.py, `_beam_search`), through its own helpers."""

    rules: BeamRules
    length: int
    running: Tensor  # [S, N, max_length]
    running_scores: Tensor  # [S, N]
    running_parents: Tensor  # [S, N, max_length - prompt_length]
    finished: Tensor  # [S, N, max_length]
    finished_scores: Tensor  # [S, N], by length
    finished_parents: Tensor
    is_finished: Tensor  # bool [S, N]
    improvable: Tensor  # bool [S, 1]
    done: Tensor  # bool [S]

    @classmethod
    def begin(cls, rules: BeamRules, input_ids: Tensor, dtype: torch.dtype) -> StockBeams:
        batch, length = input_ids.shape
        shape = (batch, rules.num_beams)
        running = torch.full((*shape, rules.max_length), rules.pad, dtype=torch.int64, device=input_ids.device)
        running[:, :, :length] = input_ids[:, None]
        scores = torch.zeros(shape, dtype=dtype, device=input_ids.device)
        parents = torch.full((*shape, rules.max_length - length), -1, dtype=torch.int32, device=input_ids.device)
        dead = torch.full_like(scores, DEAD)
        scores[:, 1:] = DEAD
        no = torch.zeros(shape, dtype=torch.bool, device=input_ids.device)
        return cls(
            rules, length, running, scores, parents, running.clone(), dead, parents.clone(), no,
            ~no[:, :1], no[:, 0].clone(),
        )  # fmt: skip

    @property
    def sequences(self) -> Tensor:
        return self.running[:, :, : self.length]

    @property
    def scores(self) -> Tensor:
        return self.running_scores

    def advance(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        rules, model = self.rules, self.rules.model
        batch, beams, vocabulary = scores.shape
        keep = max(2, 1 + len(rules.eos)) * beams
        whole = (scores + self.running_scores[:, :, None]).reshape(batch, -1)
        top, sequences, parents = model._get_top_k_continuations(
            accumulated_log_probs=whole,
            running_sequences=self.running,
            running_beam_indices=self.running_parents,
            cur_len=self.length,
            decoder_prompt_len=rules.prompt_length,
            do_sample=False,
            beams_to_keep=keep,
            num_beams=beams,
            batch_size=batch,
        )
        hits = rules.stopping(sequences[:, :, : self.length + 1].flatten(0, 1), None).view(batch, keep)
        among = (torch.arange(keep, device=scores.device) < beams).to(torch.bool)
        self.running, self.running_scores, self.running_parents = model._get_running_beams_for_next_iteration(
            topk_log_probs=top,
            topk_running_sequences=sequences,
            topk_running_beam_indices=parents,
            next_token_hits_stopping_criteria=hits,
            num_beams=beams,
        )
        self.finished, self.finished_scores, self.finished_parents, self.is_finished = model._update_finished_beams(
            sequences=self.finished,
            topk_running_sequences=sequences,
            beam_scores=self.finished_scores,
            topk_log_probs=top,
            beam_indices=self.finished_parents,
            topk_running_beam_indices=parents,
            is_early_stop_heuristic_unsatisfied=self.improvable,
            is_sent_finished=self.is_finished,
            next_token_hits_stopping_criteria=hits,
            top_num_beam_mask=among,
            num_beams=beams,
            cur_len=self.length,
            decoder_prompt_len=rules.prompt_length,
            length_penalty=rules.length_penalty,
            early_stopping=rules.early_stopping,
        )
        place = self.length - rules.prompt_length
        chosen = self.running_parents[:, :, place].long() % beams
        tokens = self.running[:, :, self.length]
        self.length += 1
        self.improvable = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=self.improvable,
            running_beam_scores=self.running_scores,
            beam_scores=self.finished_scores,
            is_sent_finished=self.is_finished,
            cur_len=self.length,
            max_length=rules.max_length,
            decoder_prompt_len=rules.prompt_length,
            early_stopping=rules.early_stopping,
            length_penalty=rules.length_penalty,
        )
        full = self.is_finished.all(1) & (rules.early_stopping is True)
        self.done = ~self.improvable[:, 0] | full | hits.all(1)
        return chosen, tokens

    def select(self, samples: Tensor) -> StockBeams:
        """The bookkeeping of these prompts, apart from the others'; a copy."""
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        kept: dict[str, Any] = {n: v[samples].clone() for n, v in held.items() if isinstance(v, Tensor)}
        return replace(self, **kept)

    def snapshot(self) -> StockBeams:
        """What to go back to: every step makes new tensors, so that the old ones need no copy."""
        return replace(self)

    def results(self, count: int) -> list[list[tuple[Tensor, float]]]:
        """Per prompt its `count` best sequences, prompt included, best first, each with its score."""
        lengths = self.rules.prompt_length + (self.finished_parents >= 0).sum(-1)
        return [
            [
                (self.finished[s, n, : int(lengths[s, n])], float(self.finished_scores[s, n]))
                for n in range(count)
            ]
            for s in range(len(self.finished))
        ]  # fmt: skip


class Hypotheses:
    """The finished sequences of one prompt, as transformers 4.29 keeps them (generation/beam_search.py)."""

    def __init__(self, rules: BeamRules):
        self.rules = rules
        self.kept: list[tuple[float, Tensor]] = []
        self.worst = 1e9
        self.done = False

    def add(self, sequence: Tensor, log_probs: float) -> None:
        score = log_probs / sequence.shape[-1] ** self.rules.length_penalty
        if len(self.kept) < self.rules.num_beams or score > self.worst:
            self.kept.append((score, sequence))
            if len(self.kept) > self.rules.num_beams:
                order = sorted(range(len(self.kept)), key=lambda i: self.kept[i][0])
                del self.kept[order[0]]
                self.worst = min(score for score, _ in self.kept)
            else:
                self.worst = min(score, self.worst)

    def is_done(self, best: float, length: int) -> bool:
        if len(self.kept) < self.rules.num_beams:
            return False
        if self.rules.early_stopping is True:
            return True
        reach = length
        if self.rules.early_stopping == "never" and self.rules.length_penalty > 0.0:
            reach = self.rules.max_length
        return self.worst >= best / reach**self.rules.length_penalty


@dataclass(eq=False)
class OfficialBeams:
    """transformers 4.29's BeamSearchScorer, whose scores count the prompt's tokens in the length penalty."""

    rules: BeamRules
    sequences: Tensor  # [S, N, L]
    scores: Tensor  # [S, N]
    hypotheses: list[Hypotheses]
    done: Tensor  # bool [S]

    @classmethod
    def begin(cls, rules: BeamRules, input_ids: Tensor, dtype: torch.dtype) -> OfficialBeams:
        scores = torch.zeros(len(input_ids), rules.num_beams, dtype=torch.float32, device=input_ids.device)
        scores[:, 1:] = DEAD
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        sequences = input_ids[:, None].repeat(1, rules.num_beams, 1)
        return cls(rules, sequences, scores, [Hypotheses(rules) for _ in input_ids], done)

    @property
    def length(self) -> int:
        return self.sequences.shape[-1]

    def advance(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        batch, beams, vocabulary = scores.shape
        whole = (scores + self.scores[:, :, None]).view(batch, beams * vocabulary)
        top, index = torch.topk(whole, 2 * beams, dim=1, largest=True, sorted=True)
        parents, tokens = index // vocabulary, index % vocabulary
        chosen, ids, kept = (torch.zeros(batch, beams, dtype=t.dtype, device=t.device) for t in (parents, tokens, top))
        for s in range(batch):
            place = 0
            for rank in range(2 * beams):
                parent, token = int(parents[s, rank]), int(tokens[s, rank])
                if token in self.rules.eos:
                    if rank < beams:
                        self.hypotheses[s].add(self.sequences[s, parent].clone(), top[s, rank].item())
                    continue
                chosen[s, place], ids[s, place], kept[s, place] = parent, token, top[s, rank]
                place += 1
                if place == beams:
                    break
            own = self.hypotheses[s]
            own.done = own.done or own.is_done(top[s].max().item(), self.length + 1)
        self.scores = kept
        before = self.sequences.gather(1, chosen[..., None].expand(-1, -1, self.length))
        self.sequences = torch.cat([before, ids[..., None]], -1)
        full = self.rules.stopping(self.sequences.flatten(0, 1), None).view(batch, beams).all(1)
        self.done = full | torch.tensor([own.done for own in self.hypotheses], device=full.device)
        return chosen, ids

    def select(self, samples: Tensor) -> OfficialBeams:
        own = [copy.deepcopy(self.hypotheses[i]) for i in samples.tolist()]
        return OfficialBeams(self.rules, self.sequences[samples], self.scores[samples], own, self.done[samples])

    def snapshot(self) -> OfficialBeams:
        hypotheses = []
        for own in self.hypotheses:
            copied = copy.copy(own)
            copied.kept = list(own.kept)
            hypotheses.append(copied)
        return replace(self, hypotheses=hypotheses)

    def results(self, count: int) -> list[list[tuple[Tensor, float]]]:
        found = []
        for s, own in enumerate(self.hypotheses):
            own = copy.copy(own)
            own.kept = list(own.kept)
            if not own.done:
                for sequence, score in zip(self.sequences[s], self.scores[s].tolist()):
                    own.add(sequence, score)
            best = sorted(own.kept, key=lambda pair: pair[0])[::-1][:count]
            found.append([(self._ended(sequence), score) for score, sequence in best])
        return found

    def _ended(self, sequence: Tensor) -> Tensor:
        if not self.rules.eos or len(sequence) >= self.rules.max_length:
            return sequence
        return torch.cat([sequence, sequence.new_tensor([self.rules.eos[0]])])
