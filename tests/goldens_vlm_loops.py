"""The goldens of vlm/opera and vlm/vcd in the library's words."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from attnzoo import vlm
from attnzoo.kernels.dispatch import use_backend
from attnzoo.vlm.contrast import contrastive_logits, noisy_image
from attnzoo.vlm.decoding import Opera
from attnzoo.vlm.opera import aggregate_rows, common_place, penalised
from attnzoo.vlm.opera_loop import OperaStep


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    with use_backend(backend) if backend else nullcontext():
        if meta["system"] == "vcd":
            return _vcd(meta["config"], tensors)
        steps = meta["config"].get("steps")
        return _opera(meta["config"], tensors) if steps is None else _opera_steps(meta["config"], tensors)


def _vcd(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = contrastive_logits(tensors["in.logits"], tensors["in.logits_cd"], config["cd_alpha"], config["cd_beta"])
    noisy = noisy_image(tensors["in.image"], config["noise_step"], noise=tensors["in.noise"])
    return {"out.cd_logits": found, "out.noisy_image": noisy}


def _opera_steps(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    place = config["key_position"]
    for step in config["steps"]:
        raw, scores = tensors[f"in.s{step}.raw"], tensors[f"in.s{step}.candidate_token_scores"]
        image = torch.zeros(raw.shape[-1], dtype=torch.bool)
        image[place["image_start"] : place["image_end"] + 1] = True
        found = aggregate_rows(raw, image, place["response_start"], config["scale_factor"], official=True)
        out[f"out.s{step}.attn_local_scores"] = found.scores
        out[f"out.s{step}.penalty_scores"] = found.penalty
        out[f"out.s{step}.rollback_scores"] = found.largest
        out[f"out.s{step}.rollback_locs"] = found.place
        out[f"out.s{step}.image_attn"] = found.image
        out[f"out.s{step}.rollback_loc"] = common_place(found.place)[1]
        out[f"out.s{step}.penalised_scores"] = penalised(scores, found.penalty, config["penalty_weights"])
    return out


def _opera(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    prompt, place = tensors["in.prompt"], config["key_position"]
    model = _llava(config, tensors).to(tensors["in.weights.lm_head.weight"].dtype)
    image = torch.zeros(prompt.shape, dtype=torch.bool)
    image[:, place["image_start"] : place["image_end"]] = True
    steps: list[OperaStep] = []
    names = ("num_beams", "scale_factor", "threshold", "num_attn_candidates", "penalty_weights", "window_size")
    way = Opera(**{name: config[name] for name in names}, tell=steps.append, compat="official")
    with vlm.edit(model, way) as session:
        sequences = session.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            image_mask=image,
            max_new_tokens=config["max_new_tokens"],
            do_sample=False,
            length_penalty=config["length_penalty"],
            eos_token_id=config["eos_token_id"],
            pad_token_id=0,
        )
    positions = torch.tensor([step.rollback_positions[0] for step in steps])
    out = {
        "out.sequences": sequences,
        "out.len_after": torch.tensor([step.length for step in steps]),
        "out.rollback": positions >= 0,
        "out.rollback_pos": positions,
        "out.rollback_loc": torch.cat([step.places for step in steps]),
        "out.beam_idx": torch.cat([step.parents for step in steps]),
        "out.next_tokens": torch.cat([step.tokens for step in steps]),
        "out.next_beam_scores": torch.cat([step.scores for step in steps]),
        "out.penalty_scores": torch.cat([step.aggregation.penalty.to(prompt_dtype(tensors)) for step in steps]),
        "out.candidate_tokens": torch.cat([step.candidates for step in steps]),
    }
    for index, step in enumerate(steps):
        if step.rejected[0] is not None:
            out[f"out.reject_step{index}"] = step.rejected[0][None]
    return out


def prompt_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return tensors["in.weights.lm_head.weight"].dtype


def _llava(config: dict[str, Any], tensors: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """The golden's text tower in a model that could see: its vision tower is never run."""
    own = config["model_config"]
    text = LlamaConfig(
        **own, rope_parameters=config["rope_parameters"], attention_bias=config.get("attention_bias", False)
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=own["vocab_size"])
    )
    state = {name.removeprefix("in.weights."): value for name, value in tensors.items() if "weights." in name}
    model.model.language_model.load_state_dict(
        {name.removeprefix("model."): value for name, value in state.items() if name != "lm_head.weight"}
    )
    model.lm_head.load_state_dict({"weight": state["lm_head.weight"]})
    return model.eval()
