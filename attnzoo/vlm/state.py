"""What a session knows while a model runs: about one prompt and its answer (CallState), about one forward (Step)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import SeamError, UnsupportedError
from attnzoo.kernels.edited_attention import Visibility
from attnzoo.vlm.attention import RowEdits, Rows, group_sizes
from attnzoo.vlm.edits import ROW_EDITS, Edit, HeadScale, KeyBias, LogitMap, Plan, Probe, Reading, Regroup

_FOREIGN = ("position_bias", "s_aux", "cache")  # arguments that change an attention in a way that edits don't know


@dataclass(eq=False)
class CallState:
    """One prompt (in one forward or in chunks) and the answer that follows it, bound to the cache that holds them.

    Everything here is about prompt positions, padding included; positions behind the prompt are plain text.
    """

    plan: Plan
    sessions: tuple[Any, ...]
    prompt: int = 0
    image: Tensor | None = None  # bool [B, prompt]
    real: Tensor | None = None  # bool [B, prompt], False at padding
    image_end: list[int] = field(default_factory=list)  # behind the last image token, 0 where there is none
    groups: dict[int, Tensor] = field(default_factory=dict)  # layer -> uint8 [B, prompt]
    sizes: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, G]
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)

    def extend(self, past: int, image: Tensor, real: Tensor, whole: Tensor | None = None) -> None:
        """Prompt positions past .. past + n - 1 are these, [B, n]; whatever was known behind `past` is forgotten.

        whole: the image tokens of the whole prompt, where chunks of it are still to come.
        """
        if past:
            image = torch.cat([self.before(self.image, past, False), image], 1)
            real = torch.cat([self.before(self.real, past, True), real], 1)
        self.image, self.real, self.prompt = image, real, image.shape[1]
        known = image if whole is None else whole
        place = torch.arange(1, known.shape[1] + 1, device=known.device)
        self.image_end = (known * place).amax(1).tolist()

    def select(self, sequences: Tensor) -> CallState:
        """What is known about these sequences [S] of the prompt, for a cache that holds them alone."""

        def own(known: Any) -> Any:
            return known[sequences.to(known.device)] if isinstance(known, Tensor) else known

        return replace(
            self,
            image=own(self.image),
            real=own(self.real),
            image_end=[self.image_end[i] for i in sequences.tolist()],
            groups={layer: own(known) for layer, known in self.groups.items()},
            sizes={layer: own(known) for layer, known in self.sizes.items()},
            memory={layer: {k: own(v) for k, v in known.items()} for layer, known in self.memory.items()},
        )

    @staticmethod
    def before(known: Tensor | None, past: int, fill: bool | int) -> Tensor:
        """The first `past` columns of `known` [B, n], filled up where it has fewer (generated tokens)."""
        assert known is not None
        missing = max(0, past - known.shape[1])
        return nn.functional.pad(known[:, :past], (0, missing), value=fill)

    def observe(self, layer: int, edit: Regroup, hidden_states: Tensor, past: int, stop: int) -> None:
        """Assign the layer's prompt positions past .. stop - 1 to groups, from their residual stream [B, n, C]."""
        assert self.image is not None and self.real is not None
        memory = self.memory.setdefault(layer, {})
        image, real = (t[:, past:stop].to(hidden_states.device) for t in (self.image, self.real))
        own = edit.assign(hidden_states, image, real, memory).to(torch.uint8)
        groups = torch.cat([self.before(self.groups[layer], past, 0), own], 1) if past else own
        self.groups[layer] = groups
        self.sizes[layer] = group_sizes(groups, edit.num_groups)


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

    def observe(self, layer: int, hidden_states: Tensor) -> None:
        """Called with the residual stream [B, N, C] that enters a decoder layer."""
        for edit in self.state.plan.get(layer, ()):
            if isinstance(edit, Regroup) and self.prompt_stop > self.past:
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
        edits = [(edit, self._starts(edit.rows, batch)) for edit in self.state.plan[layer]]
        changes = [(edit, own) for edit, own in edits if isinstance(edit, ROW_EDITS)]
        cuts = sorted({min(own) for _, own in edits} | {0, length})
        whole = any(min(own) == 0 for _, own in changes)
        covered = whole and all(own.count(own[0]) == batch for _, own in changes)
        output: Tensor | None = None
        weights: Tensor | None = None
        if not covered:
            output, weights = stock(module, query, key, value, mask, **kwargs)
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        pieces, rows_weights = [], []
        readings: dict[int, list[Tensor]] = {}
        for first, last in zip(cuts, cuts[1:]):
            here = [(edit, own) for edit, own in changes if min(own) <= first]
            active = [self._active(own, first, last, query.device) for _, own in here]
            reading = [
                index
                for index, (edit, own) in enumerate(edits)
                if isinstance(edit, Probe) and edit.what != "outputs" and min(own) <= first
            ]
            if here or reading:
                rows = Rows(
                    query[:, :, first:last],
                    key,
                    value,
                    scale,
                    kwargs.get("softcap"),
                    self._row_edits(layer, here, active, query, key),
                    dense,
                    None if dense else self._visibility(module, mask, first, last, key.shape[2], causal),
                    dense_mask(mask, first, last, length, key.shape[2], causal, query.device) if dense else None,
                )
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
        output = self._scale_heads(output, edits)
        for index, (edit, own) in enumerate(edits):
            if isinstance(edit, Probe) and min(own) < length:
                parts = readings.get(index)
                self._tell(edit, layer, min(own), output[:, min(own) :] if parts is None else parts, key)
        return output.contiguous(), weights

    def _read(self, probe: Any, rows: Rows) -> Tensor:
        if probe.what == "masses":
            assert self.state.image is not None
            offset = max(0, self.past + self.length - rows.key.shape[2])
            return rows.masses(self._slots(self.state.image, len(rows.query), rows.key, offset, False).byte(), 2)
        if probe.what == "column_sums":
            return rows.column_sums()
        return rows.probs({"head_max": "max", "head_mean": "mean"}.get(probe.what))

    def _tell(self, probe: Probe, layer: int, first: int, parts: Tensor | list[Tensor], key: Tensor) -> None:
        if isinstance(parts, Tensor):
            value = parts
        elif probe.what == "column_sums":
            value = torch.stack(parts).sum(0)
        else:
            value = torch.cat(parts, 1)
        image, real = self.state.image, self.state.real
        assert image is not None and real is not None
        places = self.past + first, self.past + self.length
        first_key = max(0, places[1] - key.shape[2])
        probe.tell(Reading(layer, probe.what, value, places, first_key, self.answer_start, image, real))

    def _scale_heads(self, output: Tensor, edits: list[tuple[Edit, list[int]]]) -> Tensor:
        """The head scales of these edits on output [B, N, H, Dv], each in its own rows."""
        for edit, own in edits:
            if not isinstance(edit, HeadScale) or min(own) == output.shape[1]:
                continue
            factor = torch.ones(output.shape[2], device=output.device, dtype=output.dtype)
            factor[list(edit.heads)] = edit.factor
            first = min(own)
            part = output[:, first:]
            on = self._active(own, first, output.shape[1], output.device)
            scaled = part * factor[:, None]
            scaled = scaled if on is None else torch.where(on[:, :, None, None], scaled, part)
            output = torch.cat([output[:, :first], scaled], 1) if first else scaled
        return output

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

    def _starts(self, rows: str, batch: int) -> list[int]:
        """The first edited row of this forward, per sequence (length: none)."""
        if rows == "all":
            return [0] * batch
        if rows == "last":
            return [self.length - 1] * batch
        if rows == "answer":
            return [min(max(self.answer_start - self.past, 0), self.length)] * batch
        ends = [min(max(end - self.past, 0), self.length) if end else self.length for end in self.state.image_end]
        return [end for end in ends for _ in range(batch // len(ends))]

    def _active(self, starts: list[int], first: int, last: int, device: torch.device) -> Tensor | None:
        """bool [B, R]: where an edit holds in rows first .. last - 1; None: everywhere."""
        if max(starts) <= first:
            return None
        return torch.arange(first, last, device=device) >= torch.tensor(starts, device=device)[:, None]

    def _row_edits(
        self,
        layer: int,
        here: Sequence[tuple[Edit, list[int]]],
        active: list[Tensor | None],
        query: Tensor,
        key: Tensor,
    ) -> RowEdits:
        batch, num_heads = query.shape[:2]
        offset = max(0, self.past + self.length - key.shape[2])  # a sliding cache holds the last keys only
        boost: Tensor | None = None
        bias: Tensor | None = None
        groups: Tensor | None = None
        num_groups, rule = 1, None
        for (edit, _), on in zip(here, active):
            if isinstance(edit, LogitMap):
                own = self._keys(edit, batch, num_heads, key, offset) * edit.alpha
                boost = own if boost is None else boost + own
            elif isinstance(edit, KeyBias):
                own = self._keys(edit, batch, num_heads, key, offset) * edit.value
                bias = own if bias is None else bias + own
            elif isinstance(edit, Regroup):
                if layer not in self.state.groups:
                    raise SeamError(f"the residual stream that enters layer {layer} was not seen: its hook did not run")
                groups = self._slots(self.state.groups[layer], batch, key, offset, 0)
                num_groups, rule = edit.num_groups, self._rule(edit, self.state.sizes[layer], batch, on)
        return RowEdits(boost, bias, groups, num_groups, rule)

    @staticmethod
    def _rule(edit: Regroup, sizes: Tensor, batch: int, active: Tensor | None) -> Callable[[Tensor], Tensor]:
        sizes = sizes.repeat_interleave(batch // len(sizes), 0)

        def rule(masses: Tensor) -> Tensor:
            factors = edit.rule(masses, sizes.to(masses.device))
            return factors if active is None else torch.where(active[:, :, None, None], factors, 1.0)

        return rule

    def _slots(self, known: Tensor, batch: int, key: Tensor, offset: int, fill: bool | int) -> Tensor:
        """Prompt positions [B0, prompt] as key slots [B, K]; slots behind the prompt are `fill`."""
        num_keys = key.shape[2]
        own = known[:, offset : offset + num_keys].to(key.device)
        own = nn.functional.pad(own, (0, num_keys - own.shape[1]), value=fill)
        return own.repeat_interleave(batch // len(own), 0)

    def _keys(self, edit: LogitMap | KeyBias, batch: int, num_heads: int, key: Tensor, offset: int) -> Tensor:
        """1.0 at the edit's keys and heads, float32 [B, H or 1, K]."""
        image, real = self.state.image, self.state.real
        assert image is not None and real is not None
        if edit.keys == "image":
            flags = self._slots(image, batch, key, offset, False)
        elif edit.keys == "text":
            flags = self._slots(real & ~image, batch, key, offset, True)
        else:
            first = nn.functional.one_hot(real.int().argmax(1), real.shape[1]).bool()
            flags = self._slots(first, batch, key, offset, False)
        chosen = flags[:, None].to(torch.float32)
        if edit.heads is None:
            return chosen
        heads = torch.zeros(num_heads, device=key.device)
        heads[list(edit.heads)] = 1.0
        return chosen * heads[None, :, None]

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


def dense_mask(
    mask: Tensor | None, first: int, last: int, length: int, num_keys: int, causal: bool, device: torch.device
) -> Tensor | None:
    """The rows' mask for `dense_rows`, from what transformers gives an attention function."""
    if mask is not None:
        return mask[:, :, first:last, :num_keys]
    if length == 1 or not causal:
        return None
    return torch.arange(num_keys, device=device) <= torch.arange(first, last, device=device)[:, None]
