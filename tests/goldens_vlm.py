"""The goldens of vlm/var and vlm/pai in the library's words."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.kernels.dispatch import use_backend
from attnzoo.vlm.layer import edited_layer
from attnzoo.vlm.pai import pai
from attnzoo.vlm.var import var, var_redistribute, var_sinks


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    with use_backend(backend) if backend else nullcontext():
        return {"var": _var, "pai": _pai}[meta["system"]](meta["config"], tensors)


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
