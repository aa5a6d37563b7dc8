"""Layout and faithfulness in the generator room: the goldens' names translated, the library computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from attnzoo.generators import StepContext, TokenLayout
from attnzoo.generators.attention_regulation import AttentionRegulation, regulation_loss
from attnzoo.generators.bounded_attention import BoundedAttention, hide_from_subjects, hide_from_words
from attnzoo.generators.chain import Layer
from attnzoo.generators.clusters import cluster_masks
from attnzoo.generators.conform import conform_loss, strongest
from attnzoo.generators.interception import alone
from attnzoo.generators.map_guidance import Maps
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


def _attention_regulation(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    c = meta["config"]
    names = ("target_ids", "eos_id", "max_iter", "lr", "decay", "global_decay", "gamma", "delta", "epsilon")
    method = AttentionRegulation(2, **{name: c[name] for name in names}, compat="official")
    weights = {name: c[name] for name in ("threshold", "gamma", "delta", "epsilon")}
    got = {"out.loss": regulation_loss(tensors["in.loss_modified_maps"], tensors["in.loss_weights"], **weights).mean()}
    layer, grid = Layer("layer", 0, role="cross"), (c["map_width"], c["map_width"])
    for step in range(c["steps"]):
        logits = tensors[f"in.logits_{step}"].unflatten(1, grid)
        ctx = StepContext(step, c["steps"])
        edited = method.edit(logits, ctx, layer, tensors[f"in.init_weights_{step}"])
        got[f"out.edit_delta_{step}"] = (edited - logits)[..., c["target_ids"]].flatten(1, 2)
    return got


def _bounded_attention(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    c = meta["config"]
    grid, heads, count = (c["resolution"], c["resolution"]), c["heads"], len(c["boxes_x0y0x1y1"])
    names = ("subject_token_indices", "leading_token_indices", "filter_token_indices", "eos_token_index")
    method = BoundedAttention(
        2,
        boxes=c["boxes_x0y0x1y1"],
        **{name: c[name] for name in names},
        num_clusters_per_box=c["n_clusters"] // count,
        resolution=grid,
        compat="official",
    )
    parts = {name: tensors[f"in.{name}"].unflatten(0, (-1, heads)) for name in _QKV}
    layers = (Layer("self", 0, c["scale"], role="image"), Layer("cross", 0, c["scale"], role="cross"))
    layout = TokenLayout(grid, num_context=parts["k_cross"].shape[2])
    both = StepContext(0, 50, parts=("uncond", "cond"))
    boxes = method.subjects(grid, both, c["batch"], None)
    method._grid = grid

    def calls(maps: Maps, given: dict[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        method._recording, outs = maps, {}
        try:
            for kind, layer in zip(("self", "cross"), layers):
                q, k, v = (given[f"{part}_{kind}"] for part in "qkv")
                out = method.attend(q, k, v, None, layout, ctx, layer, partial(_stock, scale=c["scale"]))
                outs[f"out.{kind}_out"] = out.transpose(1, 2).flatten(2)
        finally:
            method._recording = None
        return outs

    maps = Maps()
    got: dict[str, Any] = calls(maps, parts, both)
    for kind in ("self", "cross"):
        for one in maps.of(kind, grid):
            method.remember(kind, one[c["batch"] :])
        got[f"out.mean_{kind}_map"] = method._means[kind][0]

    def doubled(mask: Tensor, cross: bool = False) -> Tensor:
        return torch.cat([torch.ones_like(mask) if cross else mask, mask])[:, None]

    words = (method.words, method.filter, c["eos_token_index"], layout.num_context)
    got["out.cross_mask_denoise"] = doubled(hide_from_words(boxes, *words), cross=True)
    got["out.cross_mask_guidance"] = doubled(hide_from_words(boxes, *words, from_background=True), cross=True)
    got["out.self_mask_denoise"] = doubled(hide_from_subjects(boxes))

    def record(latents: Tensor) -> Maps:
        moved = latents.transpose(1, 2)[:, None]
        half = {name: tensor[c["batch"] :] for name, tensor in parts.items()}
        for name in ("q_self", "k_self", "q_cross"):
            half[name] = half[name] + moved
        found, method._guiding = Maps(), True
        calls(found, half, StepContext(0, 50))
        method._guiding = False
        return found

    with torch.enable_grad():
        start = tensors["in.latents"].detach().requires_grad_()
        loss = method.loss(record(start), layout, both)
        (got["out.grad"],) = torch.autograd.grad(loss, start)
    got["out.loss"] = loss.detach()
    got["out.normalized_loss"] = method.normalized(loss.detach(), c["batch"])
    got["out.latents_after_update_i0"] = method.descend(tensors["in.latents"], record, layout, StepContext(0, 50))
    labels = tensors["in.cluster_labels"].long()
    cross = method._means["cross"][0]
    got["out.self_masks_from_clusters"] = cluster_masks(labels, c["n_clusters"], cross, boxes)
    fixed = got["out.self_masks_fixed"] = method.find_subjects(grid, labels)
    got["out.self_mask_after_clustering"] = doubled(hide_from_subjects(fixed))
    return got


def _stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


_QKV = [f"{part}_{kind}" for kind in ("self", "cross") for part in "qkv"]
_RUNS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Any]]] = {
    "attention_regulation": _attention_regulation,
    "bounded_attention": _bounded_attention,
    "conform": _conform,
    "ms_diffusion": _ms_diffusion,
}
