"""Layout and faithfulness in the generator room: the goldens' names translated, the library computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from attnzoo.generators import StepContext, TokenLayout
from attnzoo.generators.conform import conform_loss, strongest
from attnzoo.generators.interception import alone
from attnzoo.generators.ms_diffusion import GroundingResampler, MSDiffusion, inside_boxes, layout_bias, phrase_bias


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """See tests/goldens.py."""
    return _RUNS[meta["system"]](meta, tensors)


def _states(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}


def _ms_diffusion(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    runs = {"box_masks": _box_masks, "resampler": _resampler}
    return runs.get(meta["variant"], _masked)(meta["config"], tensors)


def _box_masks(c: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    boxes = tensors["boxes"]
    inside = inside_boxes(boxes, (c["n"], c["n"]))

    def per_head(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(c["heads"], dim=0)

    return {
        "output": per_head(layout_bias(inside, c["num_tokens"], c["num_dummy"], boxes.dtype)),
        "text_bias": per_head(phrase_bias(inside, tensors["phrase_idxes"], c["text"], boxes.dtype)),
        "background": per_head(~inside.any(1)),
    }


def _masked(c: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    states, text = _states(tensors), tensors["encoder_hidden_states"][:, : c["text_tokens"]]
    module = Attention(
        c["dim"],
        c["cross"],
        heads=c["heads"],
        dim_head=c["dim"] // c["heads"],
        bias=c.get("to_qkv_bias", False),
        out_bias=c.get("to_out_bias", True),
    ).to(text.dtype)
    own = ("processor.to_k_ip.weight", "processor.to_v_ip.weight")
    module.load_state_dict({n: t for n, t in states.items() if n not in own}, strict=True)
    pseudo = {name: c[name] for name in ("mask_threshold", "start_step") if name in c}
    if pseudo:
        pseudo["phrase_idxes"] = tensors["phrase_idxes"]
    method = MSDiffusion(
        2,
        image_tokens=tensors["encoder_hidden_states"][:, c["text_tokens"] :],
        boxes=tensors["boxes"],
        weights={f"layer.{n.removeprefix('processor.')}": states[n] for n in own},
        num_tokens=c["num_tokens"],
        num_dummy=c["num_dummy_tokens"],
        scale=c["scale"],
        subject_scales=c.get("subject_scales"),
        zero_background=c.get("need_image", True),
        compat="official",
        **pseudo,
    )
    layout = TokenLayout((c["n"], c["n"]), num_context=c["text_tokens"])
    calls = c.get("calls", 1)
    got: dict[str, Any] = {}
    module.to_out[0].register_forward_pre_hook(lambda _m, inputs: got.update({"inter.pre_out": inputs[0]}))
    for index in range(calls):
        name = "output" if index == calls - 1 else f"output_{index}"
        with alone(module, method, layout, StepContext(), role="cross"):
            got[name] = module(tensors[f"input_{index}" if "calls" in c else "input"], text)
    if calls > 1:
        got.pop("inter.pre_out")
    return got


def _resampler(c: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    sizes = {n: c[n] for n in ("dim", "depth", "dim_head", "heads", "num_queries", "embedding_dim", "output_dim")}
    layer = GroundingResampler(
        **sizes,
        ff_mult=c["ff_mult"],
        phrase_dim=c["phrase"],
        fourier_freqs=c["ff"],
        max_seq_len=c["max_seq_len"],
        apply_pos_emb=c["pos"],
        num_latents_mean_pooled=c["mp"],
        shortcut=c["shortcut"],
        shortcut_scale=c["scale"],
    ).to(tensors["input"].dtype)
    layer.load_state_dict(_states(tensors), strict=True)
    drop = torch.tensor(c["drop"]) if c["drop"] is not None else None
    boxes, phrases = tensors["boxes"], tensors["phrase_embeds"]
    return {
        "inter.fourier": layer.fourier(boxes),
        "inter.grounding_latents": layer.start(boxes, phrases),
        "output": layer(tensors["input"], boxes, phrases, drop),
    }


def _conform(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    c = dict(meta["config"])
    groups, previous = c.pop("token_groups"), tensors["in.attention_maps_t_plus_one"]
    options = {name: value for name, value in c.items() if name != "use_previous_maps"}
    with torch.enable_grad():
        logits = tensors["in.attention_logits"].detach().requires_grad_()
        maps = logits.softmax(-1)
        loss = conform_loss(maps, groups, previous if c["use_previous_maps"] else None, **options)
        (gradient,) = torch.autograd.grad(loss, logits)
    largest = strongest(maps.detach(), groups, "official")
    return {"out.loss": loss.detach(), "out.grad_logits": gradient, "out.max_attention_first_token": largest}


_RUNS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Any]]] = {
    "conform": _conform,
    "ms_diffusion": _ms_diffusion,
}
