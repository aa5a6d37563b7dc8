"""Tiny random vision-language models of the families that attnzoo.vlm names, and prompts for them.

`build(family)` gives a model and two prompts of different length with one and (where the family takes it) two images at
different places; `batch` lays prompts side by side with padding on the left, as a processor does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE, VIDEO, PAD = 90, 91, 0
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm", "paligemma")
TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"image_size": 16, "patch_size": 4}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 92, "vision_end_token_id": 93}


def config(family: str, **text: Any) -> Any:
    """The family's config; `text` overrides entries of the text tower's."""
    import transformers as tf

    text = TEXT | text
    if family == "llava":
        vision = CLIPVisionConfig(**SMALL, **SQUARE)
        return tf.LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_index=IMAGE, vision_feature_layer=-1
        )
    if family == "llava_next":
        vision = CLIPVisionConfig(**SMALL, **SQUARE)
        pins = [[16, 32], [32, 16]]
        return tf.LlavaNextConfig(
            vision_config=vision,
            text_config=LlamaConfig(**text),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            image_grid_pinpoints=pins,
        )
    if family == "qwen2_5_vl":
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
        }
        vision |= {
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        }
        return tf.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": MROPE}, vision_config=vision, **QWEN)
    if family == "qwen3_vl":
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
        vision |= {
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
        }
        vision |= {"deepstack_visual_indexes": [0]}
        text |= {"rope_parameters": MROPE, "head_dim": 8}
        return tf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN)
    if family == "internvl":
        vision = {**SMALL, "image_size": [16, 16], "patch_size": [4, 4]}
        return tf.InternVLConfig(
            vision_config=vision, text_config=Qwen2Config(**text), image_token_id=IMAGE, downsample_ratio=0.5
        )
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * 2
        text |= {"sliding_window": 12, "layer_types": kinds, "head_dim": 8, "query_pre_attn_scalar": 8}
        vision = SiglipVisionConfig(**SMALL, **SQUARE)
        return tf.Gemma3Config(
            text_config=tf.Gemma3TextConfig(**text),
            vision_config=vision,
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
            boi_token_index=94,
            eoi_token_index=95,
        )
    if family == "smolvlm":
        vision = {**SMALL, **SQUARE}
        return tf.SmolVLMConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE, scale_factor=2
        )
    if family == "paligemma":
        vision = SiglipVisionConfig(**SMALL, **SQUARE, projection_dim=64)
        return tf.PaliGemmaConfig(
            vision_config=vision,
            text_config=GemmaConfig(**text, head_dim=8),
            image_token_index=IMAGE,
            projection_dim=64,
            hidden_size=64,
        )
    raise KeyError(family)


def tokens_per_image(family: str, index: int) -> int:
    if family == "llava_next":  # the base picture, then the tiles' grid with a newline token at the end of each row
        height, width = sizes(index)
        return 16 + (4 * height // 16) * (4 * width // 16 + 1)
    return {"llava": 16, "qwen2_5_vl": 6, "qwen3_vl": 6, "internvl": 4, "gemma3": 4, "smolvlm": 4, "paligemma": 16}[
        family
    ]


def sizes(index: int) -> tuple[int, int]:
    return [(16, 32), (32, 16), (16, 32)][index % 3]


def build(family: str, implementation: str = "sdpa", seed: int = 0, **text: Any) -> tuple[Any, list[dict[str, Any]]]:
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config(family, **text), attn_implementation=implementation).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    if family == "gemma3":  # its projection starts at zero, which would make every image token the same
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.5)
    generator = torch.Generator().manual_seed(seed + 1)
    return model, [
        prompt(family, generator, [0], 7),
        prompt(family, generator, [1] if family == "paligemma" else [1, 2], 12),
    ]


def prompt(family: str, generator: torch.Generator, images: list[int], words: int) -> dict[str, Any]:
    """One prompt: ids, and pixels [images, ...] as the family wants them."""

    def text(count: int) -> Tensor:
        return torch.randint(3, 80, (count,), generator=generator)

    spans = [torch.full((tokens_per_image(family, i),), IMAGE) for i in images]
    ids = torch.cat([torch.tensor([1]), text(3 if family != "paligemma" else 0)])
    for span in spans:
        if family.startswith("qwen"):
            span = torch.cat([torch.tensor([92]), span, torch.tensor([93])])
        ids = torch.cat([ids, span, text(2)])
    row: dict[str, Any] = {"ids": torch.cat([ids, text(words)])}
    if family.startswith("qwen"):
        row["pixels"] = torch.randn(4 * 6 * len(images), 3 * 2 * 4 * 4, generator=generator)
        row["grid"] = torch.tensor([[1, 4, 6]] * len(images))
    elif family == "llava_next":
        row["pixels"] = torch.randn(len(images), 3, 3, 16, 16, generator=generator)
        row["sizes"] = torch.tensor([sizes(i) for i in images])
    else:
        row["pixels"] = torch.randn(len(images), 3, 16, 16, generator=generator)
    return row


def batch(family: str, rows: list[dict[str, Any]], answer: Tensor | None = None) -> dict[str, Tensor]:
    """The model's inputs for these prompts (answer [B, n]: tokens that follow them), padded on the left."""
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row["ids"], (longest - len(row["ids"]), 0), value=PAD) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row["ids"]) for row in rows]).long()
    if answer is not None:
        ids, mask = torch.cat([ids, answer], 1), torch.cat([mask, torch.ones_like(answer)], 1)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if family == "smolvlm":
        most = max(len(row["pixels"]) for row in rows)
        pads = [(0, 0) * 3 + (0, most - len(row["pixels"])) for row in rows]
        inputs["pixel_values"] = torch.stack([torch.nn.functional.pad(r["pixels"], p) for r, p in zip(rows, pads)])
        return inputs
    inputs["pixel_values"] = torch.cat([row["pixels"] for row in rows])
    if family.startswith("qwen"):
        inputs["image_grid_thw"] = torch.cat([row["grid"] for row in rows])
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if family == "llava_next":
        inputs["image_sizes"] = torch.cat([row["sizes"] for row in rows])
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)
        if answer is not None:
            inputs["token_type_ids"][:, longest:] = 1
    return inputs
