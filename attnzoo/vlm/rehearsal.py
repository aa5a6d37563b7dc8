"""The forward that runs before a prompt's own (edits.Rehearse), and its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnzoo.vlm.call import CallState
from attnzoo.vlm.edits import Plan

_SEQUENCES = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "mm_token_type_ids")
_DROPPED = (
    "cache",
    "past_key_values",
    "cache_position",
    "labels",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "attnzoo_step",
)


@contextmanager
def kept_positions(model: Any) -> Iterator[None]:
    """Qwen's models keep a prompt's rope_deltas between forwards: put back what stood there."""
    kept = [(m, m.rope_deltas) for m in model.modules() if hasattr(m, "rope_deltas")]
    try:
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas


def rehearsal_of(
    inputs: str, given: dict[str, Any], state: CallState, plan: Plan, stop: int
) -> tuple[dict[str, Any], CallState]:
    """(arguments of the forward, what is known about its prompt).

    given: the arguments of the prompt's own forward, of which the first `stop` tokens are the prompt.
    """
    kwargs = {name: value for name, value in given.items() if value is not None and name not in _DROPPED}
    kwargs |= {name: kwargs[name][:, :stop] for name in _SEQUENCES if name in kwargs and kwargs[name].ndim < 4}
    kwargs |= {"use_cache": False, "return_dict": True}
    mask = kwargs.get("attention_mask")
    image, real = state.image, state.real
    assert image is not None and real is not None
    if isinstance(mask, dict) or (mask is not None and mask.ndim == 4):
        kwargs["attention_mask"] = real.long()
    if "position_ids" in kwargs:
        kwargs["position_ids"] = kwargs["position_ids"][..., :stop]
    inner = CallState(plan, state.sessions, notes=state.notes)
    if inputs == "same":
        inner.extend(0, image, real, ids=state.ids)
        return kwargs, inner
    kwargs.setdefault("attention_mask", real.long())
    blind = _blind(kwargs, real & ~image)
    told = blind["attention_mask"].bool()
    nothing = torch.zeros_like(told)
    if inputs == "blind":
        inner.extend(0, nothing, told, ids=blind.get("input_ids"))
        return blind, inner
    missing = stop - told.shape[1]
    both = dict(kwargs)
    if "position_ids" in both:  # the prompts' own (with pictures in them), and plain ones for the blind
        plain = torch.nn.functional.pad((told.cumsum(1) - 1).clamp_min(0), (missing, 0))
        own = both["position_ids"]
        both["position_ids"] = torch.cat([own, plain.to(own).expand(*own.shape[:-2], -1, -1)], -2)
    for name, value in blind.items():
        if name in _SEQUENCES:
            pads = (0, 0) * (value.ndim - 2) + (missing, 0)
            both[name] = torch.cat([kwargs[name], torch.nn.functional.pad(value, pads)])
    real = torch.cat([real, torch.nn.functional.pad(told, (missing, 0))])
    inner.extend(0, torch.cat([image, torch.zeros_like(image)]), real, ids=both.get("input_ids"))
    return both, inner


def _blind(kwargs: dict[str, Any], told: Tensor) -> dict[str, Any]:
    """The sequences without the tokens where `told` [B, N] is False, padded on the left; no pictures, no positions."""
    counts = told.sum(1)
    longest = int(counts.max())
    order = told.int().argsort(dim=1, stable=True)[:, -longest:]  # what is told comes last, in its order
    there = torch.arange(longest, device=told.device) >= longest - counts[:, None]
    found: dict[str, Any] = {"use_cache": False, "return_dict": True, "attention_mask": there.long()}
    for name in _SEQUENCES:
        value = kwargs.get(name)
        if value is None or name == "attention_mask":
            continue
        index = order if value.ndim == 2 else order[..., None].expand(-1, -1, value.shape[2])
        own = value.gather(1, index.to(value.device))
        padding = ~(there if own.ndim == 2 else there[..., None]).to(own.device)
        found[name] = torch.where(padding, own[:, -1:], own)  # what stands in padding must be no image token
    return found
