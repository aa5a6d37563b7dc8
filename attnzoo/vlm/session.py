"""Sessions: edits that are open on a model, and how each forward of it finds its own."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from attnzoo.errors import SeamError, UnsupportedError, check_tensor
from attnzoo.vlm import interception
from attnzoo.vlm.call import CallState
from attnzoo.vlm.decoding import Decoding, make_decoding, split_decoding
from attnzoo.vlm.edits import Edit, Plan, Rehearse, Tap, make_plan
from attnzoo.vlm.image_tokens import image_positions, image_token_ids, refuse_unsupported
from attnzoo.vlm.interception import ARGUMENT, LOCK, PASSED
from attnzoo.vlm.methods import METHODS, Named, edits_of
from attnzoo.vlm.rehearsal import kept_positions, rehearsal_of
from attnzoo.vlm.state import Step

__all__ = ["METHODS", "Named", "Session", "edit", "real_tokens"]

_CACHES = ("cache", "past_key_values")  # the argument's and output's name since transformers 5.24, and before
_PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(eq=False)
class _Call:
    """What `session.generate` and `session.forward` know beyond a plain call.

    also: edits that hold for this call alone (what a decoding loop reads). plain: no edit holds for this call.
    """

    session: Session
    prompt_length: int | None
    image_mask: Tensor | None
    also: tuple[Edit, ...] = ()
    plain: bool = False


_open_here: ContextVar[tuple[Session, ...]] = ContextVar("attnzoo_vlm_open", default=())
_call: ContextVar[_Call | None] = ContextVar("attnzoo_vlm_call", default=None)
_rehearsed: ContextVar[tuple[nn.Module, Step] | None] = ContextVar("attnzoo_vlm_rehearsed", default=None)
_ahead: ContextVar[dict[Any, Any] | None] = ContextVar("attnzoo_vlm_ahead", default=None)
_running: ContextVar[tuple[nn.Module, Step] | None] = ContextVar("attnzoo_vlm_running", default=None)
_records: weakref.WeakKeyDictionary[nn.Module, _Record] = weakref.WeakKeyDictionary()


class _Record:
    """The sessions that are open on one model, and the hooks that serve them all."""

    def __init__(self, model: PreTrainedModel):
        self.sessions: list[Session] = []
        self.states: weakref.WeakKeyDictionary[Cache, CallState] = weakref.WeakKeyDictionary()
        self.parameters = list(inspect.signature(model.forward).parameters)
        layers = interception.decoder_layers(model)
        self.attentions: list[Any] = [layer.self_attn for layer in layers]
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        for index, layer in enumerate(layers):
            self.handles.append(layer.register_forward_pre_hook(_residual_hook(index), with_kwargs=True))
        interception.mark(self.attentions)
        self.generation = getattr(model, "generation_config", None)
        self.compiling = getattr(self.generation, "disable_compile", None)
        if self.generation is not None and self.compiling is None:
            self.generation.disable_compile = True  # transformers compiles static caches' decoding; edits are Python

    def close(self) -> None:
        if self.generation is not None and self.compiling is None:
            self.generation.disable_compile = None
        interception.unmark(self.attentions)
        for handle in self.handles:
            handle.remove()

    def applicable(self, model: nn.Module) -> tuple[Session, ...]:
        """The sessions that hold for the call that is running in this thread."""
        call = _call.get()
        if call is not None and call.session.model is model:
            return () if call.plain else call.session.stack()
        still = tuple(self.sessions)
        own = tuple(s for s in _open_here.get() if s in still)
        if own or not still:
            return own
        if len({s.owner for s in still}) > 1:
            raise UnsupportedError(
                f"{len(still)} sessions are open on this model in several threads, and this call belongs to none: "
                "call session.generate(...) of the one that is meant"
            )
        return still

    def before(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the model: put this forward's Step among its arguments."""
        inner = _rehearsed.get()
        if inner is not None and inner[0] is model:
            _running.set(inner)
            return args, {**kwargs, ARGUMENT: inner[1]}
        sessions = self.applicable(model)
        given = dict(zip(self.parameters, args)) | kwargs
        step: Any = self.step(model, sessions, given) if sessions else PASSED
        _running.set((model, step) if sessions else None)
        return args, {**kwargs, ARGUMENT: step}

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the model: was every layer edited? Bind what is known about the prompt to its cache."""
        _running.set(None)
        step = kwargs.get(ARGUMENT)
        if not isinstance(step, Step) or output is None:  # None: an exception passes
            return
        missed = sorted(set(step.state.plan) - step.met)
        if missed:
            raise SeamError(
                f"layers {missed} of {type(model).__name__} were to be edited, but their attention was not intercepted"
            )
        cache = _cache_of(output)
        if cache is not None:
            self.states[cache] = step.state

    def step(self, model: Any, sessions: tuple[Session, ...], given: dict[str, Any]) -> Step:
        call = _call.get()
        call = call if call is not None and call.session.model is model else None
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if ids is not None else embeds
        check_tensor("input_ids (or inputs_embeds)", source)
        assert source is not None
        length = source.shape[1]
        if call is None and any(s.decoding is not None for s in sessions):
            raise UnsupportedError(
                f"this session decodes with {next(s.decoding for s in sessions if s.decoding is not None)!r}, which "
                "plain model.generate(...) would not do: call session.generate(...) or session.forward(...)"
            )
        cache = _first(given.get, _CACHES)
        past = int(cache.get_seq_length()) if cache is not None else 0
        keep = given.get("logits_to_keep")
        keep = keep if isinstance(keep, int) and 0 < keep <= length else None
        declared = call.prompt_length if call is not None else None
        if past == 0:
            state = CallState(_plan(sessions, call.also if call is not None else ()), sessions)
            for session, notes in (_ahead.get() or {}).items():
                state.notes.update(notes if session in sessions else {})
            _ahead.set(None)
            if cache is not None:
                self.states[cache] = state
            stop = declared if declared is not None else length - (keep or 1) + 1
        else:
            state = self._known(cache, sessions)
            stop = declared if declared is not None else state.prompt
            if declared is None and length > 1 and keep != length:
                raise UnsupportedError(
                    f"{length} new tokens behind {past} cached ones: part of the prompt (a further turn, prefill in "
                    "chunks) or of the answer? Call session.generate(...) or session.forward(..., prompt_length=...)"
                )
        prompt_stop = min(past + length, stop)
        if prompt_stop > past:
            self._read_prompt(model, state, given, call, past, prompt_stop, last=prompt_stop == stop)
            for rehearsal in _of_kind(sessions, Rehearse):
                if past or prompt_stop < stop:
                    raise UnsupportedError("an edit that runs a forward ahead needs the whole prompt in one forward")
                self._rehearse(model, state, given, rehearsal, stop)
        return Step(state, past, length, stop - 1, max(prompt_stop, past))

    def _rehearse(self, model: Any, state: CallState, given: dict[str, Any], rehearsal: Rehearse, stop: int) -> None:
        """Run the forward that an edit wants to have seen; it writes into the prompt's notes."""
        text = model.config.get_text_config()
        plan = make_plan(rehearsal.edits(state.facts), text.num_hidden_layers, text.num_attention_heads)
        inputs, inner = rehearsal_of(rehearsal.inputs, given, state, plan, stop)
        if "logits_to_keep" in self.parameters:
            inputs["logits_to_keep"] = 1
        outer, step = _running.get(), Step(inner, 0, inner.prompt, inner.prompt - 1, inner.prompt)
        token = _rehearsed.set((model, step))
        try:
            with torch.no_grad(), kept_positions(model):
                model(**inputs)
        finally:
            _rehearsed.reset(token)
            _running.set(outer)

    def _known(self, cache: Any, sessions: tuple[Session, ...]) -> CallState:
        state = self.states.get(cache)
        if state is None or state.sessions != sessions:
            raise UnsupportedError(
                "past_key_values was filled outside of this session (before it opened, under other edits, or it is a "
                "copy), so where its image tokens are is not known: run the prompt within the session"
            )
        return state

    @staticmethod
    def _read_prompt(
        model: Any, state: CallState, given: dict[str, Any], call: _Call | None, past: int, stop: int, last: bool
    ) -> None:
        """Note image tokens and padding of prompt positions past .. stop - 1, the first columns of this forward."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        source: Any = ids if ids is not None else embeds
        rows, length = source.shape[:2]
        count = stop - past
        whole = None
        if call is not None and call.image_mask is not None:
            whole = call.image_mask.to(source.device)
            whole = whole.repeat_interleave(max(1, rows // len(whole)), 0)
            image = whole[:, past:stop]
            if image.shape != (rows, count):
                raise ValueError(f"image_mask must be [{rows}, prompt length] here, got {tuple(call.image_mask.shape)}")
        else:
            image = image_positions(model, ids, None if ids is not None else embeds)[:, :count]
        if past and state.image is not None and len(state.image) != rows:
            raise UnsupportedError(f"the prompt began with {len(state.image)} sequences and goes on with {rows}")
        real = real_tokens(given.get("attention_mask"), past, length, image.device)
        real = torch.ones_like(image) if real is None else real[:, :count].expand(image.shape)
        if last and not bool(real[:, -1].all()):
            raise UnsupportedError(
                "a prompt ends in padding: pad on the left (processor.tokenizer.padding_side = 'left'), and where a "
                "prompt comes in chunks call session.generate(...), which knows its end"
            )
        if not bool((image if whole is None else whole).any()) and any(given.get(name) is not None for name in _PIXELS):
            raise SeamError(
                f"pixel values were given, but no image token {image_token_ids(model.config)} stands in the prompt; "
                "with inputs_embeds that hold image features already, pass image_mask to session.generate"
            )
        state.extend(past, image, real, whole, None if ids is None else ids[:, :count])


def real_tokens(mask: Any, past: int, length: int, device: torch.device) -> Tensor | None:
    """bool [B or 1, length]: which of the forward's tokens are no padding; None: all.

    mask: what a model's forward gets: [B, past + length], or prepared masks [B, 1, length, K], one or a dict of them,
    in which a padding token does not see itself.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None:
        return None
    check_tensor("attention_mask", mask)
    mask = mask.to(device)
    if mask.ndim == 2:
        if mask.shape[1] < past + length:
            raise ValueError(f"attention_mask must cover {past + length} tokens, got {tuple(mask.shape)}")
        return mask[:, past : past + length].bool()
    if mask.ndim != 4 or mask.shape[2] != length:
        raise ValueError(f"attention_mask must be [B, tokens] or [B, 1, {length}, keys], got {tuple(mask.shape)}")
    first = past - max(0, past + length - mask.shape[3])
    own = mask[:, 0].diagonal(first, 1, 2)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def _first(get: Callable[[str], Any], names: Iterable[str]) -> Any:
    """The first of the named values that is not None."""
    return next((value for name in names if (value := get(name)) is not None), None)


def _cache_of(output: Any) -> Cache | None:
    cache = _first(lambda name: getattr(output, name, None), _CACHES)
    if cache is None and isinstance(output, tuple):
        cache = next((part for part in output if isinstance(part, Cache)), None)
    return cache if isinstance(cache, Cache) else None


def _residual_hook(layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = kwargs.get(ARGUMENT)
        if isinstance(step, Step):
            step.observe(layer, args[0] if args else kwargs["hidden_states"])

    return hook


def _of_kind(sessions: tuple[Session, ...], kind: type) -> list[Any]:
    return [edit for session in sessions for edit in session.edits if isinstance(edit, kind)]


def _tap_hook(tap: Tap, index: int, model: nn.Module, session: Session) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = _running.get()
        if running is not None and running[0] is model and session in running[1].state.sessions:
            tap.read(index, module, args, kwargs, running[1].state.notes)
        elif running is None:  # generate() may encode pictures before the prompt's forward
            notes = (_ahead.get() or {}).get(session, {})
            _ahead.set({session: notes})
            tap.read(index, module, args, kwargs, notes)

    return hook


def _plan(sessions: tuple[Session, ...], also: tuple[Edit, ...] = ()) -> Plan:
    config = sessions[0].model.config.get_text_config()
    edits = (*(edit for session in sessions for edit in session.edits), *also)
    return make_plan(edits, config.num_hidden_layers, config.num_attention_heads)


class Session:
    """Edits on one model, from `with` to its end; made by `edit`, which checks everything.

    Within the block every `model.generate(...)` and `model(...)` of the opening thread is edited, and so is one in a
    thread that opened no session of its own (a streamer's, say) as long as only one thread has sessions on this model.
    `session.generate(...)` means this session from any thread. Sessions nest, in any order of exit; the last one puts
    back the text tower's attention implementation and takes all hooks away.
    """

    def __init__(self, model: PreTrainedModel, edits: tuple[Edit, ...], decoding: Decoding | None = None):
        self.model = model
        self.edits = edits
        self.decoding = decoding
        self.owner: int | None = None
        self._below: tuple[Session, ...] = ()
        self._taps: list[Any] = []

    @property
    def is_open(self) -> bool:
        record = _records.get(self.model)
        return record is not None and self in record.sessions

    def stack(self) -> tuple[Session, ...]:
        """This session and those that were open around it, as far as they still are."""
        return tuple(s for s in (*self._below, self) if s.is_open)

    def __enter__(self) -> Session:
        with LOCK:
            if self.is_open:
                raise RuntimeError("this session is open already: make another with edit(...)")
            below = tuple(s for s in _open_here.get() if s.model is self.model and s.is_open)
            _plan((*below, self))
            interception.acquire(self.model)
            try:
                record = _records.get(self.model)
                if record is None:
                    record = _records[self.model] = _Record(self.model)
            except BaseException:
                interception.release(self.model)
                raise
            record.sessions.append(self)
            for tap in _of_kind((self,), Tap):
                for index, module in enumerate(tap.find(self.model)):
                    hook = _tap_hook(tap, index, self.model, self)
                    self._taps.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self.owner, self._below = threading.get_ident(), below
        _open_here.set((*(s for s in _open_here.get() if s.is_open), self))
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session; a second call does nothing."""
        with LOCK:
            record = _records.get(self.model)
            if record is None or self not in record.sessions:
                return
            record.sessions.remove(self)
            for handle in self._taps:
                handle.remove()
            self._taps = []
            if not record.sessions:
                record.close()
                del _records[self.model]
            interception.release(self.model)
        _open_here.set(tuple(s for s in _open_here.get() if s is not self))

    def generate(
        self,
        *args: Any,
        image_mask: Tensor | None = None,
        decoding: str | tuple[str, dict[str, Any]] | Decoding | None = None,
        **kwargs: Any,
    ) -> Any:
        """`model.generate` under this session, from any thread.

        It knows where the prompt ends, so further turns on one cache, prefill in chunks and use_cache=False are edited
        as the plain case is. image_mask: bool [B, prompt length], for `inputs_embeds` that hold image features already.
        decoding: a way to decode, as for `edit`; None: the one of this session or of those around it, or plain.
        Raises RuntimeError where the session is not open.
        """
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        known = mask if isinstance(mask, Tensor) and mask.ndim == 2 else inputs
        length = None if known is None else known.shape[1]
        if image_mask is None and isinstance(inputs, Tensor) and inputs.ndim == 2 and inputs.shape[1] == length:
            image_mask = image_positions(self.model, inputs, None)
        way = self._way(decoding)
        if way is None:
            return self._run(cast(Any, self.model).generate, length, image_mask, args, kwargs)

        def generate(*own: Any, **named: Any) -> Any:
            return way.generate(self, own, named, image_mask)

        return self._run(generate, length, image_mask, args, kwargs)

    def _way(self, decoding: Any) -> Decoding | None:
        if isinstance(decoding, str):
            return make_decoding(decoding, {})
        if isinstance(decoding, tuple):
            return make_decoding(*decoding)
        if decoding is not None:
            return decoding
        ways = [s.decoding for s in self.stack() if s.decoding is not None]
        if len(ways) > 1:
            raise UnsupportedError(f"a session decodes in one way, got {len(ways)} of them nested: {ways}")
        return ways[0] if ways else None

    def also(self, *edits: Edit) -> None:
        """For a decoding loop, within `generate`: these edits hold from here to the call's end."""
        call = _call.get()
        assert call is not None and call.session is self
        call.also = (*call.also, *edits)

    def adopt(self, cache: Cache, other: Cache, sequences: Tensor) -> None:
        """For a decoding loop, within `generate`: `other` holds these sequences [S] of `cache`, prompt and answer."""
        states = _records[self.model].states
        states[other] = states[cache].select(sequences)

    def forward(
        self, *args: Any, prompt_length: int | None = None, image_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """`model(...)` under this session; positions from prompt_length on are an answer that is scored, not prompt."""
        return self._run(self.model, prompt_length, image_mask, args, kwargs)

    def plain_forward(self, *args: Any, **kwargs: Any) -> Any:
        """`model(...)` without the edits, for a decoding's second view."""
        token = _call.set(_Call(self, None, None, plain=True))
        try:
            return self.model(*args, **kwargs)
        finally:
            _call.reset(token)

    def _run(
        self, function: Callable[..., Any], prompt_length: int | None, image_mask: Tensor | None, args: Any, kwargs: Any
    ) -> Any:
        if not self.is_open:
            raise RuntimeError("the session is not open: use it within `with attnzoo.vlm.edit(...) as session:`")
        if image_mask is not None:
            check_tensor("image_mask", image_mask, 2, [torch.bool])
        token = _call.set(_Call(self, prompt_length, image_mask))
        try:
            return function(*args, **kwargs)
        finally:
            _call.reset(token)


def edit(model: PreTrainedModel, methods: Named | Iterable[Named], **kwargs: Any) -> Session:
    """Edit the attention of a vision-language model's text tower within a `with` block.

        with attnzoo.vlm.edit(model, "var", p=0.6):
            model.generate(**inputs)
        with attnzoo.vlm.edit(model, ["pai", ("var", {"rho": 0.2})]) as session:
            session.generate(**inputs)

    model: a transformers model whose text tower runs on "sdpa" or "eager".
    methods: a name of attnzoo.vlm.METHODS, (name, {its arguments}), an Edit of attnzoo.vlm.edits, or an iterable of
        these.
    kwargs: arguments of the method, where there is one, by name: those of METHODS[name] but for the first.

    Raises TypeError or ValueError for a wrong model, method or argument, and UnsupportedError for a model or attention
    implementation that can't be edited; nothing has been changed then.
    """
    if not isinstance(model, PreTrainedModel):
        hint = ": pass its get_base_model()" if hasattr(model, "get_base_model") else ""
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}{hint}")
    refuse_unsupported(model)
    image_token_ids(model.config)
    interception.text_config_key(model.config)
    interception.check_implementation(model.config)
    depth = len(interception.decoder_layers(model))
    text = model.config.get_text_config()
    if depth != text.num_hidden_layers:
        raise UnsupportedError(f"the text tower has {depth} layers, its config says {text.num_hidden_layers}")
    methods, kwargs, decoding = split_decoding(methods, kwargs)
    edits = edits_of(text, methods, kwargs) if decoding is None or methods else ()
    make_plan(edits, depth, text.num_attention_heads)
    for tap in edits:
        if isinstance(tap, Tap):
            tap.find(model)
    return Session(model, edits, decoding)
