"""The adapter's part for CARE and Flowformer: names translated, the models are attnzoo's."""

from __future__ import annotations

import importlib
from typing import Any

import timm
import torch
from torch import Tensor, nn

from attnzoo.kernels.dispatch import use_backend

_ENTRY = {"care": str.lower, "flowformer": lambda _: "flowformer_cv"}


def _care(variant: str, config: dict[str, Any]) -> nn.Module:
    from attnzoo.backbones import CAREBlock, CARETokenMixer, CARETransformer

    if variant == "model":
        return CARETransformer(**config)
    attends, head_dim = config.pop("if_att"), config.pop("att_head_dim", 1)
    cls = CAREBlock if variant == "block" else CARETokenMixer
    return cls(**config, att_head_dim=head_dim if attends else None)


def _flowformer(variant: str, config: dict[str, Any]) -> nn.Module:
    from attnzoo.backbones import FlowAttention, Flowformer, FlowSelfAttention

    if variant == "model_cv":
        return Flowformer(**config)
    if variant == "flow_attention_cv":
        return FlowSelfAttention(**{"qkv_bias": True, **config})
    ours = {"d_input": "dim", "d_model": "attn_dim", "d_output": "dim_out", "n_heads": "num_heads"}
    config = {ours.get(k, k): v for k, v in config.items()}
    config["proj_drop"] = config.pop("drop_out", 0.0)
    return FlowAttention(**config, is_causal=variant.endswith("causal"))


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """The outputs of one case, and the outputs of the modules that it names as intermediates."""
    build = {"care": _care, "flowformer": _flowformer}[meta["system"]]
    inputs = [tensors[name] for name in meta["inputs"]]
    model = build(meta["variant"], dict(meta["config"])).to(inputs[0].dtype).eval()
    model.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    got: dict[str, Any] = {}
    named = dict(model.named_modules())
    places = {"stage0": "blocks.0", "down1": "patch_embed.1"} if meta["system"] == "flowformer" else _CARE_TAPS
    for name in meta.get("intermediates") or {}:
        path = places.get(name, name)
        if path in named:
            named[path].register_forward_hook(
                lambda _m, _i, out, name=name: got.update(
                    {f"inter.{name}": _as_stored(out, meta["intermediates"][name])}
                )
            )
    with torch.no_grad(), use_backend(backend or "auto"):
        out = model(*inputs)
    if isinstance(out, tuple):  # the token mixer's memory and features
        got["output_mem"], out = out
    got["output"] = out
    return got


_CARE_TAPS = {"inter1_fc2": "inter_layer.inter1_fc2", "stage2": "stages.2"}


def _as_stored(out: Tensor, shape: list[int]) -> Tensor:
    """The authors keep tokens in a row where ours are a map."""
    return out.reshape(shape)


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """`entrypoint` by timm, with a published checkpoint's tensors in it, by timm's own strict path."""
    import attnzoo  # noqa: F401  registers the names

    name = _ENTRY[system](entrypoint)
    head = "head.fc.weight" if system == "care" else "head.weight"
    num_classes = state[head].shape[0]
    model = timm.create_model(name, num_classes=num_classes, device="meta").to_empty(device="cpu")
    family = importlib.import_module(type(model).__module__)
    cfg = {**model.pretrained_cfg, "state_dict": state, "num_classes": num_classes}
    timm.models.load_pretrained(model, cfg, num_classes=num_classes, filter_fn=family.checkpoint_filter_fn)
    return model
