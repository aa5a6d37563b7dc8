"""The goldens of the vlm room's edits in the library's words."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.kernels.dispatch import use_backend
from attnzoo.vlm.act import act, column_means
from attnzoo.vlm.carving import attention_regions, bounding_box, contrast_map
from attnzoo.vlm.edits import Prompt
from attnzoo.vlm.gift import gaze_shifts, gift, saliency, strongest_heads
from attnzoo.vlm.layer import edited_layer
from attnzoo.vlm.masks import extend_mask, mutual_mask, stack_masks
from attnzoo.vlm.pai import pai
from attnzoo.vlm.paint import paint
from attnzoo.vlm.pasta import pasta, pasta_mask
from attnzoo.vlm.var import var, var_redistribute, var_sinks
from attnzoo.vlm.vif import key_norms, relay_tokens, vif
from attnzoo.vlm.zerotuning import zerotuning


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    with use_backend(backend) if backend else nullcontext():
        return _SYSTEMS[meta["system"]](meta["config"], tensors)


def _var(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden = tensors["in.hidden_states"]
    batch, length, width = hidden.shape
    end = config["image_start"] + config["image_len"]
    image = torch.zeros(batch, length, dtype=torch.bool)
    image[:, config["image_start"] : end] = True
    text = SimpleNamespace(num_hidden_layers=config["layer"] + 1, hidden_size=width)
    (edit,) = var(
        text,
        compat="official",
        dim_sink=config["dim_sink"],
        layers=[config["layer"]],
        **{name: config[name] for name in ("p", "rho", "summ", "tau")},
    )
    sinks = var_sinks(hidden, config["dim_sink"], config["tau"])
    groups = edit.assign(hidden, image, torch.ones_like(image), {})
    out = {"out.sink_indices": sinks.nonzero()[:, 1]}
    for name, attn in tensors.items():
        if name.startswith("in.attn_"):
            which = name.removeprefix("in.attn_")
            edited = torch.arange(attn.shape[2]) >= end if which.startswith("prefill") else None
            out[f"out.attn_{which}"], chosen = var_redistribute(attn, groups, edit.rule, edited)
            out[f"out.heads_{which}"] = chosen.nonzero()
    return out


def _pai(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden = tensors["in.hidden_states"]
    batch, length, _ = hidden.shape
    heads = (batch, length, -1, config["head_dim"])
    q, k, v = (F.linear(hidden, tensors[f"in.{n}_proj"]).view(heads).transpose(1, 2) for n in "qkv")
    image = torch.zeros(batch, length, dtype=torch.bool)
    image[:, config["img_start_idx"] : config["img_end_idx"]] = True
    out = {}
    for suffix, alpha in (("", config["alpha"]), ("_plain", 0.0)):
        edits = pai(SimpleNamespace(num_hidden_layers=3), alpha, [2], compat="official")
        shared = {"layer": 2, "num_layers": 3}
        output, _ = edited_layer(edits, q, k, v, image, **shared)
        _, weights = edited_layer(edits, q, k, v, image, implementation="eager", **shared)
        out[f"out.out{suffix}"] = F.linear(output.flatten(2), tensors["in.o_proj"])
        out[f"out.weights{suffix}"] = weights
    return out


def _text(layers: int, heads: int) -> SimpleNamespace:
    return SimpleNamespace(
        num_hidden_layers=layers, num_attention_heads=heads, hidden_size=0, vocab_size=0, model_type=""
    )


def _span(length: int, start: int, stop: int, batch: int = 1) -> Tensor:
    image = torch.zeros(batch, length, dtype=torch.bool)
    image[:, start:stop] = True
    return image


def _of_scores(edits: Any, scores: Tensor, image: Tensor, layer: int, layers: int, **where: Any) -> Tensor:
    """Edited probabilities of scores [B, H, Q, K] that are there already: the keys are unit vectors, so are the values.

    Once as the dense formulation reports them and once as the kernel's output; the latter is returned where they agree.
    """
    q = scores.clamp_min(-1e4)
    units = torch.eye(scores.shape[-1], dtype=scores.dtype).expand(*scores.shape[:2], -1, -1)
    shared = {"layer": layer, "num_layers": layers, "scale": 1.0, **where}
    output, _ = edited_layer(edits, q, units, units, image, **shared)
    _, weights = edited_layer(edits, q, units, units, image, implementation="eager", **shared)
    assert weights is not None
    torch.testing.assert_close(output.transpose(1, 2), weights, rtol=1e-4, atol=1e-6)
    return output.transpose(1, 2)


def _gift(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    vision = slice(config["vision_start_idx"], config["vision_end_idx"] + 1)
    query = config["query_start_idx"], config["query_end_idx"] + 1
    words = torch.tensor(config["selected_query_tokens"]) + query[0]
    chosen = []
    for name in sorted(n for n in tensors if n.startswith("in.attn_layer")):
        attn = tensors[name][0, :, :, vision]
        shifts = gaze_shifts(attn[:, words], attn[:, words - 1])
        chosen.append(shifts[strongest_heads(shifts.sum((1, 2)))])
    shifts = torch.stack(chosen)
    found = saliency(shifts.mean((0, 1, 2))[None], torch.ones(1, shifts.shape[-1], dtype=torch.bool))
    out = {"out.shifts_selected_heads": shifts, "out.saliency_map_exp": (config["alpha"] * found[0]).exp()}
    length = config["seq"]
    image = _span(length, vision.start, vision.stop)
    own = torch.zeros(1, length, dtype=shifts.dtype)
    own[:, vision] = found
    text = _text(3, config["num_heads"])
    settings = {"alpha": config["alpha"], "query": [query], "saliency": own, "layers": [1], "compat": "official"}
    for step in range(sum(n.startswith("in.q") for n in tensors)):
        q, k, v = (tensors[f"in.{n}{step}"] for n in "qkv")
        past = length + step - 1 if step else 0
        shared = {"layer": 1, "num_layers": 3, "past": past}
        output, _ = edited_layer(gift(text, **settings), q, k, v, image, **shared)
        _, weights = edited_layer(gift(text, **settings), q, k, v, image, implementation="eager", **shared)
        _, plain = edited_layer((), q, k, v, image, implementation="eager", **shared)
        out |= {f"out.out{step}": output, f"out.last_row_weights{step}": weights[:, :, -1]}
        out[f"out.last_row_weights_plain{step}"] = plain[:, :, -1]
    return out


def _paint(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden = tensors["in.hidden_states"]
    batch, length, _ = hidden.shape
    heads = (batch, length, -1, config["head_dim"])
    q, k, v = (F.linear(hidden, tensors[f"in.{n}_proj"]).view(heads).transpose(1, 2) for n in "qkv")
    image = _span(length, config["img_start_idx"], length, batch)
    edits = paint(
        _text(3, config["num_heads"]),
        config["alpha"],
        config["beta"],
        [2],
        config["top_tokens"],
        config["bottom_tokens"],
        "official",
    )
    shared = {"layer": 2, "num_layers": 3}
    output, _ = edited_layer(edits, q, k, v, image, **shared)
    _, weights = edited_layer(edits, q, k, v, image, implementation="eager", **shared)
    return {"out.out": F.linear(output.flatten(2), tensors["in.o_proj"]), "out.weights": weights}


def _pasta(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    batch, heads, length = config["batch"], config["num_heads"], config["input_len"]
    text = _text(1, heads)
    settings = {"alpha": config["alpha"], "heads": config["heads"], "scale_position": config["scale_position"]}
    spans = [[tuple(section[row]) for section in config["token_ranges"]] for row in range(batch)]
    edits = pasta(text, spans, compat="official", **settings)
    nothing = torch.zeros(batch, length, dtype=torch.bool)
    prompt = Prompt(nothing, ~nothing, None, [0] * batch, {})
    out = {
        f"out.{name.removeprefix('in.')}": pasta_mask(edits, mask, heads, prompt)
        for name, mask in tensors.items()
        if name.startswith("in.mask_")
    }
    if len(config["token_ranges"]) == 1:  # the code's other function, which knows two positions
        other = settings | {"scale_position": "span" if config["scale_position"] == "include" else "exclude"}
        alone = pasta_mask(pasta(text, spans, compat="official", **other), tensors["in.mask_prefill"], heads, prompt)
        out["out.mask_prefill_single_section_fn"] = alone
    out["out.attn_prefill"] = _of_scores(edits, tensors["in.logits_prefill"], nothing, 0, 1)
    return out


def _zerotuning(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    attn = tensors["in.attn"]
    batch, heads, length = attn.shape[:3]
    layer = config["layer_idx"]
    layers = max(config["target_layers"] or [layer]) + 1
    start, stop = config["range"]
    edits = zerotuning(
        _text(layers, heads),
        config["rate"],
        config["target_heads"],
        config["target_layers"],
        (start, stop) if stop > start else (0, 1),
        "official",
    )
    image = torch.zeros(batch, length, dtype=torch.bool)
    decode = tensors["in.attn_decode"]
    return {
        "out.attn": _of_scores(edits, attn.log(), image, layer, layers),
        "out.attn_decode": _of_scores(edits, decode.log(), image, layer, layers, past=decode.shape[3] - 1),
    }


def _act(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    attn = tensors["in.attn"]
    heads, length = config["num_heads"], config["seq"]
    layer = config["layer_index"]
    image = torch.zeros(len(attn), length, dtype=torch.bool)

    def run(chosen: list[int]) -> Tensor:
        text = _text(layer + 1, heads)
        edits = act(text, config["beta"], config["threshold"], chosen, [layer], "official")
        return _of_scores(edits, attn.log(), image, layer, layer + 1)

    out = {"out.attn_eval": run(config["heads"]), "out.debug_column_mean": column_means(attn.sum(2), ~image)[0]}
    return out | {f"out.attn_cal_head{head}": run([head]) for head in range(heads)}


def _vif(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    scores = tensors["in.scores"]
    batch, heads = scores.shape[:2]
    image, instruction, inactive = (
        tensors[f"in.{name}_mask"][None].expand(batch, -1) for name in ("vision", "instruction", "inactive_vision")
    )
    shared = {
        "tau": config["tau"],
        "inactive": inactive,
        "instruction": instruction,
        "compat": "official",
        "alpha_middle": config["alpha_mid"],
        "alpha_deep": config["alpha_deep"],
    }
    text = _text(1, heads)

    def run(middle: tuple[int, ...], deep: tuple[int, ...], **other: Any) -> Tensor:
        return _of_scores(vif(text, middle=middle, deep=deep, **(shared | other)), scores, image, 0, 1)

    norms = key_norms(tensors["in.key_states"])
    index, mask = relay_tokens(norms, config["relay_ratio"])
    return {
        "out.probs": run((0,), (), alpha_middle=0.0, compat=None),
        "out.middle": run((0,), ()),
        "out.deep": run((), (0,)),
        "out.keynorm": norms,
        "out.relay_idx": index,
        "out.relay_mask": mask,
    }


def _mma(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {
        f"out.mask_{i}": mutual_mask(
            tensors[f"in.attention_mask_2d_{i}"], item["image_start_idx"], item["text_start_idx"], item["text_end_idx"]
        )
        for i, item in enumerate(config["items"])
    }
    out["out.stacked"] = stack_masks(list(out.values()))
    if len(config["items"]) == 1:
        out["out.after_one_token_full"] = extend_mask(out["out.stacked"])
        out["out.after_one_token_cached"] = extend_mask(out["out.stacked"], cached=True)
    return out


def _carve(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = config["layers"]
    query, general = (tensors[f"in.{name}_maps"][:, layers] for name in ("query", "general"))
    fused = contrast_map(
        query, general, tuple(config["grid"]), tuple(config["image_size_wh"]), config["lam"], config["step_mode"]
    )
    mask = attention_regions(
        fused, config["top_percent"], config["min_keep_regions"], config["strategy"], config["outlier_percent"]
    )
    box = torch.tensor(bounding_box(mask))
    return {"out.fused": torch.from_numpy(fused), "out.mask": torch.from_numpy(mask), "out.bbox_xyxy": box}


_SYSTEMS = {
    "carve": _carve,
    "var": _var,
    "pai": _pai,
    "gift": _gift,
    "paint": _paint,
    "pasta": _pasta,
    "zerotuning": _zerotuning,
    "act": _act,
    "vif": _vif,
    "mma": _mma,
}
