"""What a session does while a model runs: one forward (Step) of a prompt or its answer (CallState, in call.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import SeamError, UnsupportedError
from attnzoo.kernels.edited_attention import MASK_ELEMENTS, Visibility
from attnzoo.vlm.attention import RowEdits, Rows, group_sizes, sees
from attnzoo.vlm.call import CallState
from attnzoo.vlm.edits import (
    ROW_EDITS,
    HeadChoice,
    HeadScale,
    KeyBias,
    LayerEdit,
    LogitMap,
    Mask,
    Observe,
    Probe,
    Prompt,
    Reading,
    Regroup,
    Spread,
)

_FOREIGN = ("position_bias", "s_aux", "cache")  # arguments that change an attention in a way that edits don't know
MOST_ROWS = 512  # edited at a time


@dataclass(frozen=True)
class Span:
    """The rows of one forward that an edit holds for: from starts[b] in sequence b, up to `stop`."""

    starts: list[int]
    stop: int

    @property
    def first(self) -> int:
        return min(self.starts)

    @property
    def even(self) -> bool:
        return self.starts.count(self.starts[0]) == len(self.starts)

    def holds(self, row: int) -> bool:
        """Whether any sequence's rows have begun, and not ended, at `row`."""
        return self.first <= row < self.stop


@dataclass(frozen=True, eq=False)
class View:
    """A layer's attention over a prompt, for Observe: rows(first, last) gives a run of its rows."""

    layer: int
    length: int
    rows: Callable[[int, int], Rows]

    def column_sums(self) -> Tensor:
        """What each key gets from all rows, [B, H, K]."""
        steps = range(0, self.length, MOST_ROWS)
        return torch.stack([self.rows(i, min(i + MOST_ROWS, self.length)).column_sums() for i in steps]).sum(0)


@dataclass(eq=False)
class Step:
    """One forward of `length` tokens behind `past` others: what travels to every attention layer as an argument."""

    state: CallState
    past: int
    length: int
    answer_start: int  # position of the first row that predicts an answer token
    prompt_stop: int  # positions past .. prompt_stop - 1 of this forward belong to the prompt
    met: set[int] = field(default_factory=set)
    _seen: dict[tuple[int, int, int], tuple[Tensor, Visibility]] = field(default_factory=dict)
    _weights: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)  # of edits' keys, alike in many layers

    def observe(self, layer: int, hidden_states: Tensor) -> None:
        """Called with the residual stream [B, N, C] that enters a decoder layer."""
        for edit in self.state.plan.get(layer, ()):
            if isinstance(edit, Regroup) and edit.source == "residual" and self.prompt_stop > self.past:
                own = hidden_states[:, : self.prompt_stop - self.past]
                self.state.observe(layer, edit, own, self.past, self.prompt_stop)

    def attend(
        self,
        layer: int,
        module: nn.Module,
        stock: Callable[..., tuple[Tensor, Tensor | None]],
        dense: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's attention: `stock` for rows without an edit, the edited rows beside it."""
        self._check(layer, module, query, kwargs)
        self.met.add(layer)
        batch, length = query.shape[0], query.shape[2]
        edits = [(edit, self._span(edit.rows, batch)) for edit in self.state.plan[layer]]
        changes = [(edit, own) for edit, own in edits if isinstance(edit, ROW_EDITS)]
        step = MOST_ROWS
        if any(isinstance(edit, Mask) for edit, _ in changes):
            step = min(step, max(1, MASK_ELEMENTS // (batch * key.shape[2])))
        ends = {end for _, own in edits for end in (own.first, own.stop)}
        cuts = sorted(ends | {0, length} | set(range(0, length, step) if changes else ()))
        covered = any(own.first == 0 and own.even and own.stop == length for _, own in changes)
        output: Tensor | None = None
        weights: Tensor | None = None
        if not covered:
            output, weights = stock(module, query, key, value, mask, **kwargs)
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        masks = [edit for edit, _ in changes if isinstance(edit, Mask)]

        def rows_of(first: int, last: int, edits: RowEdits) -> Rows:
            part, softcap = query[:, :, first:last], kwargs.get("softcap")
            if masks:
                seen = self._masked(masks[0], mask, first, last, batch, key, causal)
                return Rows(part, key, value, scale, softcap, edits, dense, Visibility(False, 0, mask=seen), seen)
            if dense:
                dense_seen = dense_mask(mask, first, last, length, key.shape[2], causal, query.device)
                return Rows(part, key, value, scale, softcap, edits, True, None, dense_seen)
            visibility = self._visibility(module, mask, first, last, key.shape[2], causal)
            return Rows(part, key, value, scale, softcap, edits, False, visibility, None)

        if self.prompt_stop > self.past:
            for edit, _ in edits:
                if isinstance(edit, Observe):
                    self._refuse_chunks(f"what an edit of layer {layer} reads from the prompt's attention")
                    assert self.state.real is not None
                    real = self.state.real.repeat_interleave(batch // len(self.state.real), 0).to(query.device)
                    plain = RowEdits()

                    def seen_rows(first: int, last: int, real: Tensor = real, plain: RowEdits = plain) -> Rows:
                        return replace(rows_of(first, last, plain), real=real[:, first:last])

                    view = View(layer, self.prompt_stop, seen_rows)
                    edit.look(layer, view, self.state.facts)
        pieces, rows_weights = [], []
        readings: dict[int, list[Tensor]] = {}
        for first, last in zip(cuts, cuts[1:]):
            here = [(edit, own) for edit, own in changes if own.holds(first)]
            active = [self._active(own, first, last, query.device) for _, own in here]
            reading = [
                index
                for index, (edit, own) in enumerate(edits)
                if isinstance(edit, Probe) and edit.what != "outputs" and own.holds(first)
            ]
            if here or reading:
                rows = rows_of(first, last, self._row_edits(layer, here, active, query, key))
                for index in reading:
                    readings.setdefault(index, []).append(self._read(edits[index][0], rows))
            if not here:
                assert output is not None
                pieces.append(output[:, first:last])
                rows_weights.append(weights[:, :, first:last] if weights is not None else None)
                continue
            out, probs = rows.output()
            if output is not None and all(on is not None for on in active):
                anywhere = torch.stack([on for on in active if on is not None]).any(0)
                out = torch.where(anywhere[:, :, None, None], out, output[:, first:last])
            pieces.append(out)
            rows_weights.append(probs)
        if changes:
            output = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]
            weights = torch.cat([w for w in rows_weights if w is not None], 2) if dense else None
        assert output is not None
        output = self._scale_heads(layer, output, edits)
        for index, (edit, own) in enumerate(edits):
            if isinstance(edit, Probe) and own.first < own.stop:
                parts = readings.get(index)
                self._tell(edit, layer, own, output[:, own.first : own.stop] if parts is None else parts, key)
        return output.contiguous(), weights

    def _read(self, probe: Any, rows: Rows) -> Tensor:
        if probe.what == "masses":
            assert self.state.image is not None
            offset = max(0, self.past + self.length - rows.key.shape[2])
            return rows.masses(self._slots(self.state.image, len(rows.query), rows.key, offset, False).byte(), 2)
        if probe.what == "column_sums":
            return rows.column_sums()
        return rows.probs({"head_max": "max", "head_mean": "mean"}.get(probe.what))

    def _tell(self, probe: Probe, layer: int, own: Span, parts: Tensor | list[Tensor], key: Tensor) -> None:
        if isinstance(parts, Tensor):
            value = parts
        elif probe.what == "column_sums":
            value = torch.stack(parts).sum(0)
        else:
            value = torch.cat(parts, 1)
        image, real = self.state.image, self.state.real
        assert image is not None and real is not None
        places = self.past + own.first, self.past + own.stop
        first_key = max(0, self.past + self.length - key.shape[2])
        probe.tell(Reading(layer, probe.what, value, places, first_key, self.answer_start, image, real))

    def _scale_heads(self, layer: int, output: Tensor, edits: list[tuple[LayerEdit, Span]]) -> Tensor:
        """The head scales of these edits on output [B, N, H, Dv], each in its own rows."""
        batch, length, num_heads = output.shape[:3]
        for edit, own in edits:
            if isinstance(edit, HeadScale):
                heads = torch.zeros(1, num_heads, dtype=torch.bool, device=output.device)
                heads[:, list(edit.heads)] = True
            elif isinstance(edit, HeadChoice):
                heads = self._chosen_heads(layer, edit, output)
            else:
                continue
            first, stop = own.first, own.stop
            if first >= stop:
                continue
            factor = torch.where(heads, edit.factor, 1.0).to(output.dtype)[:, None, :, None]
            part = output[:, first:stop]
            on = self._active(own, first, stop, output.device)
            scaled = part * factor
            scaled = scaled if on is None else torch.where(on[:, :, None, None], scaled, part)
            pieces = [output[:, :first], scaled, output[:, stop:]]
            output = torch.cat(pieces, 1) if first or stop < length else scaled
        return output

    def _chosen_heads(self, layer: int, edit: HeadChoice, output: Tensor) -> Tensor:
        """bool [B, H], chosen in the forward that holds the last prompt row; until then none."""
        notes, key = self.state.notes, ("heads", id(edit), layer)
        row = self.answer_start - self.past
        if key not in notes or 0 <= row < self.length:
            if edit.rows != "answer":
                self._refuse_chunks(f"the heads of layer {layer}, which are chosen at the end of the prompt,")
            if not 0 <= row < self.length:
                return torch.zeros(1, output.shape[2], dtype=torch.bool, device=output.device)
            notes[key] = edit.choose(layer, output[:, row], self.state.facts)
        chosen: Tensor = notes[key]
        return chosen.repeat_interleave(len(output) // len(chosen), 0)

    def _refuse_chunks(self, what: str) -> None:
        if self.past and self.prompt_stop > self.past or self.prompt_stop <= self.answer_start:
            raise UnsupportedError(
                f"{what} needs the whole prompt in one forward; here it comes in parts (prefill in chunks, or a "
                "further turn on one cache)"
            )

    def _masked(
        self, edit: Mask, mask: Tensor | None, first: int, last: int, batch: int, key: Tensor, causal: bool
    ) -> Tensor:
        """bool [B, 1 or H, R, K]: what rows first .. last - 1 see under the edit."""
        if edit.looks_ahead and self.prompt_stop > self.past:
            self._refuse_chunks("a mask that lets tokens see later ones")
        num_keys = key.shape[2]
        offset = max(0, self.past + self.length - num_keys)
        place = torch.arange(num_keys, device=key.device) + offset
        rows = torch.arange(first, last, device=key.device) + self.past
        seen = dense_mask(mask, first, last, self.length, num_keys, causal, key.device)
        if seen is None:
            seen = torch.ones(1, 1, last - first, num_keys, dtype=torch.bool, device=key.device)
        seen = sees(seen) if seen.ndim == 4 else seen[None, None]
        marks = self.state.known(("mask", id(edit)), lambda: edit.mark(self.state.facts))
        kinds = self._slots(marks, batch, key, offset, 0)
        where = (rows - offset).clamp(0)  # a row that a sliding cache has let go of is no row of this forward
        real = self.state.real
        assert real is not None
        there = self._slots(real, batch, key, offset, True) & (place < self.past + self.length)
        found = edit.rule(seen, kinds[:, None, where, None], kinds[:, None, None], rows[:, None] == place)
        return found & there[:, None, None]

    def _check(self, layer: int, module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> None:
        name = type(module).__name__
        if query.shape[2] != self.length:
            raise SeamError(
                f"{name} of layer {layer} got {query.shape[2]} rows where the model's input has {self.length}"
            )
        if kwargs.get("dropout"):
            raise UnsupportedError(f"edits don't know attention dropout ({kwargs['dropout']}): call model.eval() first")
        for other in _FOREIGN:
            if kwargs.get(other) is not None:
                raise UnsupportedError(f"{name} of layer {layer} uses {other!r}, which edits don't know")

    def _span(self, rows: str, batch: int) -> Span:
        """Which rows of this forward an edit holds for."""
        length = self.length
        if rows == "all":
            return Span([0] * batch, length)
        if rows == "prompt":
            return Span([0] * batch, self.prompt_stop - self.past)
        if rows == "last":
            return Span([length - 1] * batch, length)
        if rows == "answer":
            return Span([min(max(self.answer_start - self.past, 0), length)] * batch, length)
        ends = [min(max(end - self.past, 0), length) if end else length for end in self.state.image_end]
        return Span([end for end in ends for _ in range(batch // len(ends))], length)

    def _active(self, own: Span, first: int, last: int, device: torch.device) -> Tensor | None:
        """bool [B, R]: where an edit holds in rows first .. last - 1; None: everywhere."""
        if max(own.starts) <= first:
            return None
        return torch.arange(first, last, device=device) >= torch.tensor(own.starts, device=device)[:, None]

    def _row_edits(
        self,
        layer: int,
        here: Sequence[tuple[LayerEdit, Span]],
        active: list[Tensor | None],
        query: Tensor,
        key: Tensor,
    ) -> RowEdits:
        batch, num_heads = query.shape[:2]
        offset = max(0, self.past + self.length - key.shape[2])  # a sliding cache holds the last keys only
        boost: Tensor | None = None
        bias: Tensor | None = None
        changed: dict[str, Any] = {}
        for (edit, _), on in zip(here, active):
            if isinstance(edit, LogitMap):
                own = self._keys(edit, batch, num_heads, key, offset)
                boost = own if boost is None else boost + own
            elif isinstance(edit, KeyBias):
                own = self._keys(edit, batch, num_heads, key, offset)
                bias = own if bias is None else bias + own
            elif isinstance(edit, Regroup | Spread):
                own_groups, sizes = self._groups(layer, edit)
                changed = {
                    "groups": self._slots(own_groups, batch, key, offset, 0),
                    "num_groups": edit.num_groups,
                }
                if isinstance(edit, Spread):
                    changed |= {"share": self._share(edit, on), "temperature": edit.temperature, "leaky": edit.leaky}
                else:
                    changed |= {"rule": self._rule(edit, sizes, batch, on)}
                    if edit.log_weights is not None:
                        weights = self.state.known(("weights", id(edit)), self._asked(edit.log_weights))
                        changed |= {
                            "copied": edit.copied,
                            "log_weights": self._slots(weights.to(_work(key)), batch, key, offset, 0),
                        }
        return RowEdits(boost, bias, **changed)

    def _asked(self, function: Callable[[Prompt], Tensor]) -> Callable[[], Tensor]:
        return lambda: function(self.state.facts)

    def _groups(self, layer: int, edit: Regroup | Spread) -> tuple[Tensor, Tensor]:
        """The groups of the prompt's keys and how many keys each has."""
        if isinstance(edit, Spread) or edit.source == "prompt":
            found = self.state.known(("groups", layer), lambda: edit.assign(self.state.facts, layer).to(torch.uint8))
            return found, self.state.known(("sizes", layer), lambda: group_sizes(found, edit.num_groups))
        if layer not in self.state.groups:
            raise SeamError(f"the residual stream that enters layer {layer} was not seen: its hook did not run")
        return self.state.groups[layer], self.state.sizes[layer]

    @staticmethod
    def _share(edit: Spread, active: Tensor | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def share(masses: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
            factors, gifts = edit.rule(masses, counts)
            if active is None:
                return factors, gifts
            here = active[:, :, None, None]
            return torch.where(here, factors, 1.0), torch.where(here, gifts, 0.0)

        return share

    @staticmethod
    def _rule(edit: Regroup, sizes: Tensor, batch: int, active: Tensor | None) -> Callable[[Tensor], Tensor]:
        sizes = sizes.repeat_interleave(batch // len(sizes), 0)

        def rule(masses: Tensor) -> Tensor:
            factors = edit.rule(masses, sizes.to(masses.device))
            if active is None:
                return factors
            still = torch.ones_like(factors)
            if edit.copied is not None:
                still[..., -1] = 0.0
            return torch.where(active[:, :, None, None], factors, still)

        return rule

    def _slots(self, known: Tensor, batch: int, key: Tensor, offset: int, fill: bool | int) -> Tensor:
        """Prompt positions [B0, ..., prompt] as key slots [B, ..., K]; slots behind the prompt are `fill`."""
        num_keys = key.shape[2]
        own = known[..., offset : offset + num_keys].to(key.device)
        own = nn.functional.pad(own, (0, num_keys - own.shape[-1]), value=fill)
        return own.repeat_interleave(batch // len(own), 0)

    def _keys(self, edit: LogitMap | KeyBias, batch: int, num_heads: int, key: Tensor, offset: int) -> Tensor:
        """What the edit adds for each key, by its strength: float [B, H or 1, K]."""
        where = (id(edit), batch, key.shape[2], offset, key.dtype, key.device)
        if where not in self._weights:
            strength = edit.alpha if isinstance(edit, LogitMap) else edit.value
            weights = self._key_weights(edit, batch, key, offset)[:, None].to(_work(key)) * strength
            if edit.heads is not None:
                heads = torch.zeros(num_heads, device=key.device, dtype=weights.dtype)
                heads[list(edit.heads)] = 1.0
                weights = weights * heads[None, :, None]
            self._weights[where] = weights
        return self._weights[where]

    def _key_weights(self, edit: LogitMap | KeyBias, batch: int, key: Tensor, offset: int) -> Tensor:
        """The weights of the edit's keys, 1 at named ones, [B, K]."""
        image, real = self.state.image, self.state.real
        assert image is not None and real is not None
        if callable(edit.keys):
            own = self.state.known(("keys", id(edit)), self._asked(edit.keys))
            return self._slots(own.to(_work(key)), batch, key, offset, 0)
        if edit.keys == "image":
            return self._slots(image, batch, key, offset, False)
        if edit.keys == "text":
            return self._slots(real & ~image, batch, key, offset, True)
        first = nn.functional.one_hot(real.int().argmax(1), real.shape[1]).bool()
        return self._slots(first, batch, key, offset, False)

    def _visibility(
        self, module: nn.Module, mask: Tensor | None, first: int, last: int, num_keys: int, causal: bool
    ) -> Visibility:
        """What rows first .. last - 1 see, in the kernel's words; a mask that these can't say is handed on as it is."""
        if mask is None:  # transformers: then causal from the upper left, or one row that sees everything
            return Visibility(is_causal=causal and self.length > 1, query_offset=first)
        if mask.dtype != torch.bool or mask.shape[1] != 1:
            return Visibility(is_causal=False, query_offset=0, mask=mask[:, :, first:last])
        if last - first == 1:
            return Visibility(is_causal=False, query_offset=0, key_mask=mask[:, 0, first, :num_keys])
        known = self._seen.get((id(mask), first, last))
        if known is None:
            known = mask, self._describe(module, mask[:, :, first:last, :num_keys], first)
            self._seen[id(mask), first, last] = known
        return known[1]

    def _describe(self, module: nn.Module, rows: Tensor, first: int) -> Visibility:
        num_keys, real = rows.shape[3], self.state.real
        assert real is not None
        offset = max(0, self.past + self.length - num_keys)
        place = self.past - offset + first
        slots = nn.functional.pad(
            real[:, offset : offset + num_keys], (0, max(0, offset + num_keys - real.shape[1])), value=True
        )
        slots = slots.repeat_interleave(max(1, rows.shape[0] // len(slots)), 0).to(rows.device)
        i = place + torch.arange(rows.shape[2], device=rows.device)[:, None]
        j = torch.arange(num_keys, device=rows.device)
        window = getattr(module, "sliding_window", None)
        pattern = j <= i if window is None else (j <= i) & (i - j < window)
        if bool((rows == (pattern & slots[:, None, None])).all()):
            return Visibility(is_causal=True, query_offset=place, window_size=window, key_mask=slots)
        return Visibility(is_causal=False, query_offset=0, mask=rows)


def _work(key: Tensor) -> torch.dtype:
    return torch.promote_types(key.dtype, torch.float32)


def dense_mask(
    mask: Tensor | None, first: int, last: int, length: int, num_keys: int, causal: bool, device: torch.device
) -> Tensor | None:
    """The rows' mask for `dense_rows`, from what transformers gives an attention function."""
    if mask is not None:
        return mask[:, :, first:last, :num_keys]
    if length == 1 or not causal:
        return None
    return torch.arange(num_keys, device=device) <= torch.arange(first, last, device=device)[:, None]
