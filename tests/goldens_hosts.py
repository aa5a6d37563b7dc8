"""The hosts' part of the goldens adapter: names translated, the models are attnzoo's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import goldens_backbones
import torch
from torch import Tensor, nn

from attnzoo import backbones
from attnzoo.backbones.blocks.agent_sd import AgentCrossAttention, AgentSDBlock, TokenMerge
from attnzoo.backbones.blocks.inline import InLineMixer
from attnzoo.backbones.blocks.mixture_of_heads import MixedHeads, MoHAttention
from attnzoo.backbones.hosts.mixers import Site
from attnzoo.backbones.hosts.vit import TokenAttention
from attnzoo.kernels.dispatch import use_backend

_CLASSES = {
    "agent_deit": "AgentDeiT",
    "agent_pvt": "AgentPVT",
    "agent_swin": "AgentSwin",
    "agent_cswin": "AgentCSwin",
    "inline_deit": "InLineDeiT",
    "inline_pvt": "InLinePVT",
    "inline_swin": "InLineSwin",
    "inline_cswin": "InLineCSwin",
}
_OURS = {"depth": "depths", "drop_rate": "proj_drop_rate"}


def _host(meta: dict[str, Any]) -> nn.Module:
    variant = meta["variant"]
    config = {k: v for k, v in meta["config"].items() if k not in ("class", "norm_layer")}
    if "cswin" in variant:
        config = {_OURS.get(k, k): v for k, v in config.items() if k != "patch_size"}
    if config.get("num_stages"):
        del config["num_stages"]
    return getattr(backbones, _CLASSES[variant])(**config)


def _states(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}


def _load(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """`model` with the case's state, by its family's own loader, strictly."""
    model = model.to(dtype).eval()
    family = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"])
    model.load_state_dict(family.checkpoint_filter_fn(_states(tensors), model), strict=True)
    return model


def _tap(model: nn.Module, meta: dict[str, Any], got: dict[str, Any]) -> None:
    """Hooks for the intermediates; a map is reshaped to the authors' tokens. Windows that are cut stay out."""
    for name, path in (meta.get("intermediates_meaning") or {}).items():
        shape = (meta.get("intermediates") or {}).get(name)
        if shape is None:
            continue

        def hook(_module: nn.Module, _inputs: Any, out: Tensor, name: str = name, shape: Any = shape) -> None:
            if out.shape[0] == shape[0]:
                got[name] = out.reshape(shape)

        model.get_submodule(path).register_forward_hook(hook)


def _run_host(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    got: dict[str, Any] = {}
    model = _load(_host(meta), tensors, tensors["input"].dtype)
    _tap(model, meta, got)
    return {**got, "output": model(tensors["input"])}


def _run_inline_attention(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    config = meta["config"]
    size = tuple(config["window_size"])
    site = Site(config["dim"], config["num_heads"], size, size, 0, 0)
    attention = TokenAttention(site, InLineMixer(site, config.get("kernel_func", "identity")), config["qkv_bias"])
    state = {k.replace("residual.", "mixer.residual."): v for k, v in _states(tensors).items()}
    attention.to(tensors["input"].dtype).load_state_dict(state, strict=True)
    return {"output": attention(tensors["input"])}


def _run_sd_attention(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    c, x = meta["config"], tensors["input"]
    shares = {"k_scale2": c["k_scale2"], "k_shortcut": c["k_shortcut"]}
    layer = AgentCrossAttention(c["dim"], None, c["heads"], c["dim_head"], **shares).to(x.dtype)
    layer.load_state_dict(_states(tensors), strict=True)
    return {"output": layer(x, tensors["agent"])}


def _run_sd_merge(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    c, x = meta["config"], tensors["input"]
    merge = TokenMerge(x, c["h"], c["w"], c["ratio"], c["agent_ratio"], c["sy"], c["sx"], compat="official")
    out, agents = merge.merge(x)
    got = {"output": out, "unmerged": merge.unmerge(out), "dst_index": merge.dst_index, "src_index": merge.src_index}
    return {**got, "edge_idx": merge.edge_idx, **({} if agents is None else {"agent_tokens": agents})}


def _run_sd_block(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    c, latent = meta["config"], tensors["latent"]
    state = {k.removeprefix("blk."): v for k, v in _states(tensors).items()}
    hidden = state["ff.0.weight"].shape[0]
    ff = nn.Sequential(nn.Linear(c["dim"], hidden), nn.GELU(), nn.Linear(hidden, c["dim"]))
    merging = {k: c[k] for k in ("ratio", "agent_ratio", "sx", "sy")}
    block = AgentSDBlock(c["dim"], c["heads"], c["dim_head"], c["cdim"], ff, **merging, compat="official")
    block.to(latent.dtype).load_state_dict(state, strict=True)
    got: dict[str, Any] = {}
    for name, layer in (("attn1", block.attn1), ("attn2", block.attn2)):
        layer.register_forward_hook(lambda _m, _i, out, name=name: got.update({f"{name}_out": out}))
    block.attn1.register_forward_pre_hook(lambda _m, inputs: got.update({"attn1_in": inputs[0]}))
    return {**got, "output": block(latent.flatten(2).transpose(1, 2), tensors["context"], tuple(latent.shape[2:]))}


def _run_moh_attention(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    layer = MoHAttention(**meta["config"]).to(tensors["input"].dtype)
    layer.load_state_dict(_states(tensors), strict=True)
    got: dict[str, Any] = {}
    layer.proj.register_forward_pre_hook(lambda _m, inputs: got.update(preproj=inputs[0]))
    for name in ("wg", "wg_0", "wg_1"):
        if hasattr(layer, name):
            flat = partial(lambda _m, _i, out, name: got.update({name: out.flatten(0, 1)}), name=name)
            getattr(layer, name).register_forward_hook(flat)
    return {**got, "output": layer(tensors["input"])}


def _run_moh_dit(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    config = {k: v for k, v in meta["config"].items() if k not in ("class", "moh")}
    if not meta["config"].get("moh", True):
        config["shared_head"] = None
    x = tensors["input"]
    model = backbones.MoHDiT(**config, compat="official").to(x.dtype).eval()
    model.load_state_dict(_states(tensors), strict=True)
    got: dict[str, Any] = {}
    _tap(model, meta, got)
    return {**got, "output": model(x, tensors["t"], tensors["y"])}


def _run_moh_vit(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    from attnzoo.backbones.moh_transnext import MoHTransNeXt

    config = {k: v for k, v in meta["config"].items() if k not in ("class", "norm_layer")}
    eps = float(str(meta["config"].get("norm_layer", "")).partition("eps=")[2].rstrip(")") or 1e-5)
    x, got = tensors["input"], {}
    model = _load(MoHTransNeXt(**config, norm_layer=partial(nn.LayerNorm, eps=eps)), tensors, x.dtype)
    _tap(model, meta, got)
    return {**got, "output": model(x)}


def _run_moh_vit_attention(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    from attnzoo.backbones.blocks.aggregated import CosineAttention

    c, x = meta["config"], tensors["input"]
    cosine = CosineAttention(c["dim"], c["num_heads"], qkv_bias=c["qkv_bias"], pretrain_size=(c["H"], c["W"]))
    layer = MixedHeads(cosine, c["dim"], c["num_heads"], c["shared_head"], c["routed_head"]).to(x.dtype)
    ours = ("proj.", "wg.", "wg_0.", "wg_1.")
    state = {k if k.startswith(ours) else f"inner.{k}": v for k, v in _states(tensors).items()}
    layer.load_state_dict(state, strict=True)
    return {"output": layer(x.unflatten(1, (c["H"], c["W"]))).flatten(1, 2)}


_RUNS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Any]]] = {
    **dict.fromkeys(_CLASSES, _run_host),
    "inline_attn_kernel": _run_inline_attention,
    "moh_vit": _run_moh_vit,
    "moh_vit_attn": _run_moh_vit_attention,
    "moh_dit": _run_moh_dit,
    "moh_dit_attn": _run_moh_attention,
    "agentsd_attn": _run_sd_attention,
    "agentsd_merge": _run_sd_merge,
    "agentsd_block": _run_sd_block,
}


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """One case: the outputs, and the intermediates that are cheap to give."""
    with torch.no_grad(), use_backend(backend or "auto"):
        return _RUNS[meta["variant"]](meta, tensors)


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """`entrypoint` with a published checkpoint's tensors in it, strictly: by timm, or the diffusion transformers."""
    name = entrypoint.split(" ")[0].lower()
    if name not in backbones.MOH_DIT:
        return goldens_backbones.load_published(system, entrypoint, state)
    model = backbones.moh_dit(name, device="meta")
    model.load_state_dict(state, strict=True, assign=True)
    return model
