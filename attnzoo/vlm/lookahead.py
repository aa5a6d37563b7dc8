"""The forwards of a loop that looks one token ahead: C candidates of every beam at once, then one of them is kept.

The candidates of a beam are C queries of one forward that see its cache and themselves, not each other, so nothing is
copied per candidate. Text towers with sliding layers get C rows per beam instead, as their windows count cache slots.
What was taken is remembered per step, so that any earlier state of the cache comes back bit for bit without the prompt
being read again, also where its beams have died out since.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from attnzoo.errors import SeamError, UnsupportedError
from attnzoo.vlm.edits import Probe, Reading

_PER_PROMPT = {"attention_mask": 0, "position_ids": -2, "token_type_ids": 0, "mm_token_type_ids": 0}
CACHES = ("cache", "past_key_values")  # the argument's and output's name since transformers 5.24, and before


class LastRows:
    """Keeps the last reading of a Probe: attention, largest over heads, by key position, [B, R, K]."""

    def __init__(self, layer: int):
        self.edit = Probe((layer,), self._keep, what="head_max")
        self._value: Tensor | None = None

    def _keep(self, reading: Reading) -> None:
        self._value = torch.nn.functional.pad(reading.value, (reading.first_key, 0))

    def take(self) -> Tensor:
        if self._value is None:
            raise SeamError("the last layer's attention was to be read, and was not: its Probe was not called")
        value, self._value = self._value, None
        return value


@dataclass(eq=False)
class Slot:
    """One response token of every beam: its keys and values in each layer [S x N, H, 1, D], and whom it continues."""

    keys: list[Tensor]
    values: list[Tensor]
    parents: Tensor  # [S, N]


@dataclass(eq=False)
class Found:
    """Of candidates [S, N, C]: the next token's logits [..., V] and attention by key position [..., K], own last."""

    logits: Tensor
    rows: Tensor


class Stream:
    """A model and one cache: a prompt [S, L], then tokens behind it, `repeats` rows to a prompt.

    model_kwargs: what `generate` hands to a decoding method. run: calls the model with a forward's arguments.
    """

    def __init__(self, model: Any, model_kwargs: dict[str, Any], cache: Any, run: Callable[..., Any] | None = None):
        self.model, self.kwargs, self.cache = model, dict(model_kwargs), cache
        self.run = model if run is None else run
        given = next((self.kwargs.pop(name) for name in CACHES if self.kwargs.get(name) is not None), None)
        if given is not None and given.get_seq_length():
            raise UnsupportedError("this way to decode begins with a prompt, not with a cache that holds some of it")
        self.named = CACHES[0] if CACHES[0] in inspect.signature(model.forward).parameters else CACHES[1]
        self.samples = 0
        self.prompt_length = 0
        self.tokens = 0  # response tokens in the cache

    def prompt(self, input_ids: Tensor) -> Tensor:
        """Logits [S, V] behind the prompt [S, L]."""
        kwargs = {**self.kwargs, self.named: self.cache}
        inputs = self.model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        output = self.run(**inputs, return_dict=True)
        self.samples, self.prompt_length = input_ids.shape
        if self.cache.get_seq_length() != self.prompt_length:
            raise UnsupportedError(f"{type(self.model).__name__} does not keep its keys in the cache it is given")
        return output.logits[:, -1]

    def forward(self, tokens: Tensor, repeats: int, apart: bool = False) -> Tensor:
        """Logits [rows, n, V] of tokens [rows, n]; apart: they stand at one place and don't see each other. Does not
        count them in `tokens`."""
        rows, count = tokens.shape
        past = self.prompt_length + self.tokens
        kwargs = dict(self.kwargs)
        kwargs["attention_mask"] = self._mask(repeats, past, count, apart)
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = count
        if (positions := kwargs.get("position_ids")) is not None:
            # [S, L], or [kinds, S, L] where a text tower counts along several axes
            last = positions[..., -1:]
            last = last.expand(*last.shape[:-2], self.samples, 1).repeat_interleave(repeats, -2)
            steps = torch.zeros(count) if apart else torch.arange(count)
            kwargs["position_ids"] = last + 1 + self.tokens + steps.to(last)
        if (kinds := kwargs.get("token_type_ids")) is not None:
            kwargs["token_type_ids"] = kinds[:, -1:].repeat_interleave(repeats, 0).expand(-1, count)
        if (kinds := kwargs.get("mm_token_type_ids")) is not None:
            kwargs["mm_token_type_ids"] = kinds.new_zeros(rows, count)
        kwargs[self.named] = self.cache
        inputs = self.model.prepare_inputs_for_generation(tokens, is_first_iteration=False, **kwargs)
        return self.run(**inputs, return_dict=True).logits

    def _mask(self, repeats: int, past: int, count: int, apart: bool) -> Tensor | None:
        known = self.kwargs.get("attention_mask")
        if not apart:
            if known is None:
                return None
            whole = torch.nn.functional.pad(known, (0, past + count - known.shape[1]), value=1)
            return whole.repeat_interleave(repeats, 0)
        rows = self.samples * repeats
        seen = torch.ones(rows, 1, count, past + count, dtype=torch.bool, device=self.device)
        if known is not None:
            seen[:, 0, :, : known.shape[1]] = known.bool().repeat_interleave(repeats, 0)[:, None]
        seen[:, :, :, past:] = torch.eye(count, dtype=torch.bool, device=seen.device)
        if self.model.config.get_text_config()._attn_implementation.endswith("eager"):
            dtype = self.model.dtype
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return seen

    @property
    def device(self) -> torch.device:
        return self.cache.layers[0].keys.device


class LookAhead(Stream):
    """One cache of all beams of S prompts, and what was put into it since the prompt.

    layer: whose attention is read. remember: keep what `back` needs.
    """

    def __init__(self, model: Any, layer: int, model_kwargs: dict[str, Any], num_beams: int, remember: bool):
        kinds = DynamicCache(config=model.config.get_text_config())
        if any(getattr(kinds, "is_linear", ())):
            raise UnsupportedError(
                f"{type(model).__name__} has layers without attention, whose states can't be taken back"
            )
        super().__init__(model, model_kwargs, DynamicCache())  # of plain layers: all of them can be cropped
        self.num_beams, self.remember = num_beams, remember
        self.read = LastRows(layer)
        self.windows = any(getattr(kinds, "is_sliding", ()))
        self.trellis: list[Slot] = []

    # --- forwards ----------------------------------------------------------------------------------------------------

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Logits [S, N, V] behind the prompt [S, L]; the cache then has N rows per prompt."""
        logits = self.prompt(input_ids)
        self.read.take()
        self.cache.batch_repeat_interleave(self.num_beams)
        return logits[:, None].expand(-1, self.num_beams, -1)

    def look(self, candidates: Tensor) -> Found:
        """One forward with all candidates [S, N, C]; the cache then holds C slots more, until `keep` or `drop`."""
        count = candidates.shape[-1]
        if self.windows:
            self.cache.batch_repeat_interleave(count)
            logits, rows = self._forward(candidates.reshape(-1, 1), repeats=self.num_beams * count)
            shape = candidates.shape
            return Found(logits[:, 0].view(*shape, -1), rows[:, 0].view(*shape, -1))
        logits, rows = self._forward(candidates.flatten(0, 1), repeats=self.num_beams, apart=True)
        past = self.prompt_length + self.tokens
        own = rows[..., past:].diagonal(dim1=1, dim2=2)
        rows = torch.cat([rows[..., :past], own[..., None]], -1)
        shape = candidates.shape[:2]
        return Found(logits.unflatten(0, shape), rows.unflatten(0, shape))

    def keep(self, parents: Tensor, which: Tensor, count: int) -> None:
        """Of `count` candidates per beam, beam n becomes candidate which[s, n] of beam parents[s, n]."""
        rows = self._flat(parents)
        if self.windows:
            self.cache.batch_select_indices(rows * count + which.reshape(-1))
        else:
            self.cache.reorder_cache(rows)
            for layer in self.cache.layers:
                place = layer.keys.shape[2] - count
                index = (place + which.reshape(-1)).to(layer.keys.device)
                layer.keys = _kept(layer.keys, index, place)
                layer.values = _kept(layer.values, index, place)
        self.tokens += 1
        self._remember(parents)

    def drop(self, count: int) -> None:
        """Forget the candidates."""
        if self.windows:
            self.cache.batch_select_indices(torch.arange(self.samples * self.num_beams, device=self.device) * count)
            self.cache.crop(-1)
        else:
            self.cache.crop(-count)

    def step(self, parents: Tensor, tokens: Tensor) -> Found:
        """Beams continue as parents [S, N] say, with tokens [S, N]: one forward of them; logits [S, N, 1, V]."""
        self.cache.reorder_cache(self._flat(parents))
        logits, rows = self._forward(tokens.reshape(-1, 1), repeats=self.num_beams)
        self.tokens += 1
        self._remember(parents)
        shape = tokens.shape
        return Found(logits.unflatten(0, shape), rows.unflatten(0, shape))

    def _forward(self, tokens: Tensor, repeats: int, apart: bool = False) -> tuple[Tensor, Tensor]:
        return self.forward(tokens, repeats, apart), self.read.take()

    # --- going back --------------------------------------------------------------------------------------------------

    def _remember(self, parents: Tensor) -> None:
        if self.remember:
            layers = self.cache.layers
            last = [[states[:, :, -1:].clone() for states in (layer.keys, layer.values)] for layer in layers]
            self.trellis.append(Slot([k for k, _ in last], [v for _, v in last], parents))

    def back(self, tokens: int, last: Tensor) -> Tensor:
        """Back to `tokens` response tokens, at least 1, of which `last` [S, N] is the last; their logits [S, N, V].

        The cache is then, bit for bit, what it was; only the last token is run once more, for its logits.
        """
        self.cache.crop(-self.tokens)
        slots, self.trellis = self.trellis[:tokens], self.trellis[:tokens]
        beams = torch.arange(self.samples * self.num_beams, device=self.device)
        lineage = []
        for slot in reversed(slots):
            lineage.append(beams)
            beams = self._flat(slot.parents).to(beams.device)[beams]
        lineage.reverse()
        for index, layer in enumerate(self.cache.layers):
            for name in ("keys", "values"):
                parts = [getattr(slot, name)[index][own] for slot, own in zip(slots, lineage)]
                setattr(layer, name, torch.cat([getattr(layer, name), *parts], 2))
        self.cache.crop(-1)
        self.tokens = tokens - 1
        logits, _ = self._forward(last.reshape(-1, 1), repeats=self.num_beams)
        self.cache.crop(-1)
        for index, layer in enumerate(self.cache.layers):
            layer.keys = torch.cat([layer.keys, slots[-1].keys[index]], 2)
            layer.values = torch.cat([layer.values, slots[-1].values[index]], 2)
        self.tokens = tokens
        return logits.view(*last.shape, -1)

    def split(self, samples: Tensor) -> LookAhead:
        """These prompts with a cache of their own; a copy. A session must be told (`Session.adopt`)."""
        other = copy.copy(self)
        own = self._rows_of(samples)
        other.cache = copy.deepcopy(self.cache)
        other.cache.batch_select_indices(own)
        other.samples = len(samples)
        other.trellis = [
            Slot([k[own] for k in slot.keys], [v[own] for v in slot.values], slot.parents[samples])
            for slot in self.trellis
        ]
        for name, batch_axis in _PER_PROMPT.items():
            value = self.kwargs.get(name)
            if isinstance(value, Tensor) and value.shape[batch_axis] == self.samples:
                other.kwargs = other.kwargs | {name: value.index_select(batch_axis % value.ndim, samples)}
        return other

    def _rows_of(self, samples: Tensor) -> Tensor:
        beams = torch.arange(self.num_beams, device=samples.device)
        return (samples[:, None] * self.num_beams + beams).reshape(-1)

    def _flat(self, parents: Tensor) -> Tensor:
        """[S, N] beams of each prompt as rows of the cache."""
        first = torch.arange(len(parents), device=parents.device)[:, None] * self.num_beams
        return (parents + first).reshape(-1)


def _kept(states: Tensor, index: Tensor, place: int) -> Tensor:
    """States [B, H, K, D] up to `place`, and one more slot per row."""
    own = states.gather(2, index[:, None, None, None].expand(-1, states.shape[1], 1, states.shape[3]))
    return torch.cat([states[:, :, :place], own], 2)
