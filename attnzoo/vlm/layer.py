"""One layer's edited attention on plain tensors: what a session does inside a model, without the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnzoo.errors import check_choice, check_tensor
from attnzoo.vlm.attention import RowEdits, dense_rows
from attnzoo.vlm.call import CallState
from attnzoo.vlm.edits import Edit, make_plan
from attnzoo.vlm.state import Step, dense_mask


class _Bare(nn.Module):
    """What transformers' attention functions ask of the module they serve."""

    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


def edited_layer(
    edits: tuple[Edit, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image: Tensor,
    hidden_states: Tensor | None = None,
    *,
    layer: int,
    num_layers: int,
    scale: float | None = None,
    implementation: str = "sdpa",
    past: int = 0,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """A prompt's causal attention in one layer, with `edits` as the methods of attnzoo.vlm.METHODS make them.

    query [B, H, N, D], key and value [B, Hkv, N, D] after rotation; image [B, N] bool; hidden_states [B, N, C], the
    residual stream that enters the layer, for edits that ask for it. scale: None means D ** -0.5.
    past: above 0, the query rows are generated ones: those behind `past` keys; image is then the prompt's [B, N0].
    causal: False, all rows see all keys.
    Returns (output [B, N, H, D], probabilities [B, H, N, K] with implementation="eager", None with "sdpa").
    """
    check_choice("implementation", implementation, ("sdpa", "eager"))
    check_tensor("image", image, 2, [torch.bool])
    length = query.shape[2]
    state = CallState(make_plan(edits, num_layers, query.shape[1]), ())
    state.extend(0, image, torch.ones_like(image))
    prompt = past or length
    step = Step(state, past=past, length=length, answer_start=state.prompt - 1, prompt_stop=prompt)
    mask = None
    if past or not causal:
        place = torch.arange(key.shape[2], device=key.device)
        mask = place <= torch.arange(past, past + length, device=key.device)[:, None]
        mask = (mask if causal else torch.ones_like(mask))[None, None]
    if hidden_states is not None:
        step.observe(layer, hidden_states)
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def eager(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        seen = dense_mask(mask, 0, q.shape[2], q.shape[2], k.shape[2], True, q.device)
        return dense_rows(q, k, v, seen, kwargs["scaling"], RowEdits())

    stock = eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = _Bare(query.shape[1] // key.shape[1])
    if layer not in state.plan:
        return stock(module, query, key, value, mask, scaling=scale)
    return step.attend(layer, module, stock, implementation == "eager", query, key, value, mask, scaling=scale)
