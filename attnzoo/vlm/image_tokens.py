"""Where each model family keeps its image tokens: the one table of the room.

A processor writes one placeholder id per image feature into `input_ids`, so image positions are the places of that id.
Families differ in the config's names for it, in how many spans an image takes and in what stands between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnzoo.errors import UnsupportedError, check_tensor


@dataclass(frozen=True)
class Family:
    """Names of the config entries that hold placeholder ids, and what is worth knowing about the spans."""

    title: str
    ids: tuple[str, ...]
    note: str = ""


_TOKEN = ("image_token_id",)
FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA-1.5", _TOKEN, "one span per image, 576 tokens at 336 pixels"),
    "llava_next": Family("LLaVA-NeXT", _TOKEN, "one span per image; base and tiles, end-of-row tokens counted in"),
    "qwen2_vl": Family(
        "Qwen2-VL", ("image_token_id", "video_token_id"), "as many as the picture's patches, merged 2 x 2"
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL", ("image_token_id", "video_token_id"), "as many as the picture's patches, merged 2 x 2"
    ),
    "qwen3_vl": Family("Qwen3-VL", ("image_token_id", "video_token_id"), "timestamps stand between a video's frames"),
    "internvl": Family("InternVL", _TOKEN, "one span per tile"),
    "gemma3": Family("Gemma 3", _TOKEN, "256 per image or crop, seen in both directions; sliding layers"),
    "smolvlm": Family("SmolVLM", _TOKEN, "one span per tile, row and column marks between them"),
    "idefics3": Family("Idefics3", _TOKEN, "one span per tile, row and column marks between them"),
    "paligemma": Family("PaliGemma", _TOKEN, "first in the prompt; the whole prompt is seen in both directions"),
}
_OTHERS = Family("other", ("image_token_id", "image_token_index", "video_token_id", "video_token_index"))


def refuse_unsupported(model: nn.Module) -> None:
    """Raise UnsupportedError for a model whose image does not stand among the keys of its self-attention."""
    config: Any = model.config
    told = f"{type(model).__name__} (model_type {config.model_type!r})"
    if config.model_type == "mllama" or getattr(config.get_text_config(), "cross_attention_layers", None):
        raise UnsupportedError(f"{told} reads images by cross-attention: its self-attention has no image keys to edit")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{told} is an encoder-decoder: edits are for decoders that read image tokens themselves"
        )


def image_token_ids(config: Any) -> tuple[int, ...]:
    """The placeholder ids (images, and videos where the family has them) of a transformers config.

    Raises UnsupportedError where the config names none.
    """
    family = FAMILIES.get(config.model_type, _OTHERS)
    found = [getattr(config, name, None) for name in family.ids]
    ids = tuple(dict.fromkeys(i for i in found if isinstance(i, int)))
    if not ids:
        raise UnsupportedError(
            f"the config of model_type {config.model_type!r} names no image token "
            f"(looked for {', '.join(family.ids)}): is this a vision-language model?"
        )
    return ids


def image_positions(model: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """bool [B, N], True at image tokens.

    With inputs_embeds [B, N, C] alone, positions whose embedding is exactly the placeholder's (what transformers itself
    compares); embeddings into which image features were already merged match nowhere: pass image_mask then.
    """
    ids = image_token_ids(model.config)
    if input_ids is not None:
        check_tensor("input_ids", input_ids, 2)
        return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))
    check_tensor("inputs_embeds", inputs_embeds, 3)
    assert inputs_embeds is not None
    embedding = cast(Any, model).get_input_embeddings()
    here = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    for token in ids:
        if token < embedding.weight.shape[0]:
            placeholder = embedding(torch.tensor([token], device=embedding.weight.device)).to(inputs_embeds.device)
            here |= (inputs_embeds == placeholder.to(inputs_embeds.dtype)).all(-1)
    return here
