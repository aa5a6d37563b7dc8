"""FAN's and TAP/ADL's part of the goldens adapter: names translated, layers and models are attnzoo's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from goldens_backbones import load_published as load_published
from torch import Tensor, nn

from attnzoo.backbones import (
    FAN,
    TAPRVT,
    ChannelProcessing,
    FANSwin,
    RVTAttention,
    TokenAwarePooling,
    attention_diversification_loss,
)
from attnzoo.backbones.fan_swin import checkpoint_filter_fn as fan_swin_filter
from attnzoo.kernels.dispatch import use_backend

_FAN = (
    "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "in_chans", "qkv_bias",
    "channel_dims", "cls_attn_layers", "use_pos_embed", "tokens_norm", "hybrid_patch_size",
)  # fmt: skip
_SWIN = (
    "img_size", "patch_size", "window_size", "embed_dim", "depths", "num_heads", "mlp_ratio", "num_classes",
    "in_chans", "qkv_bias", "mlp_type",
)  # fmt: skip
_RVT = {"patch_size": "patch_size", "base_dims": "base_dims", "depth": "depths", "heads": "heads",
        "mlp_ratio": "mlp_ratio", "num_classes": "num_classes", "in_chans": "in_chans"}  # fmt: skip


def _fan(config: dict[str, Any], tap: bool) -> nn.Module:
    args = {"tokens_norm": False, **{k: config[k] for k in _FAN if k in config}}
    if config.get("eta") is not None:
        args["eta"] = config["eta"]
    if config.get("c_head_num"):
        args["channel_heads"] = config["c_head_num"]
    if backbone := config.get("backbone"):
        args.update(hybrid_depths=backbone["depths"], hybrid_dims=backbone["dims"])
    if tap:
        args["num_scales"] = config.get("num_scales", 1)
    return FAN(**args, norm_layer=partial(nn.LayerNorm, eps=config.get("norm_eps", 1e-6)))


def _rvt(config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    args = {ours: config[theirs] for theirs, ours in _RVT.items() if theirs in config}
    masks = [tensor for name, tensor in state.items() if name.endswith("att_mask")]
    if masks:
        args.update(masked_blocks=len(masks), mask_grid=(masks[0].shape[1], 1), compat="official")
    return TAPRVT(**args, num_scales=config.get("num_scales", 1))


def _layer(variant: str, config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    if variant == "channel_processing":
        heads = config.get("c_head_num") or config["num_heads"]
        return ChannelProcessing(config["dim"], heads, config["mlp_hidden_dim"], qkv_bias=config["qkv_bias"])
    if variant == "tap":
        return TokenAwarePooling(config["dim"], config["num_scales"])
    grid = (state["att_mask"].shape[1], 1) if config.get("use_mask") else None
    shared = {"qkv_bias": config["qkv_bias"], "mask_grid": grid, "compat": "official"}
    return RVTAttention(config["dim"], config["num_heads"], **shared)


def _build(meta: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    variant, config = meta["variant"], meta["config"]
    if variant == "fan_swin":
        return FANSwin(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in _SWIN})
    if variant == "rvt":
        return _rvt(config, state)
    if variant.startswith("fan"):
        return _fan(config, meta["system"] == "tapadl")
    return _layer(variant, config, state)


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """The outputs of one case, and of the loss the gradients as well."""
    variant, config = meta["variant"], meta["config"]
    if variant.startswith("adl"):
        maps = [tensors[f"attn{i}"].clone().requires_grad_() for i in range(config["layers"])]
        loss = attention_diversification_loss(maps, config["threshold"], compat="official")
        loss.backward()
        grads = {f"inter.grad_attn{i}": m.grad for i, m in enumerate(maps)}
        return {"output": loss.detach()[None], **grads}
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    if variant == "tap":
        state = {k.removeprefix("dilation_predictor."): v for k, v in state.items()}
    x = tensors["input"]
    model = _build(meta, state).to(x.dtype).eval()
    if variant == "fan_swin":
        state = fan_swin_filter(state, model)
    model.load_state_dict(state)
    with torch.no_grad(), use_backend(backend or "auto"):
        if variant == "tap":
            x = x.permute(0, 2, 3, 1)
            return {"output": model(x).permute(0, 3, 1, 2), "mask": model.weights(x)[:, None]}
        if variant == "channel_processing":
            x = x.unflatten(1, (config["H"], config["W"]))
            return {"output": model(x).flatten(1, 2), "inter.channel_gate": model.gate(x)[..., None]}
        if variant == "rvt_masked_attention":
            attentions: list[Tensor] = []
            return {"output": model(x[:, :, None], attentions)[:, :, 0], "attn": attentions[0]}
        if meta["system"] == "tapadl":
            output, attentions = model.forward_attentions(x)
            assert torch.allclose(model(x), output, rtol=1e-4, atol=1e-4)  # the fused path is the same model
            return {"output": output, "attn_last": attentions[-1]}
        return {"output": model(x)}
