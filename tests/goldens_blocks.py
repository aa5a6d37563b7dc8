"""The attention blocks' part of the goldens adapter: names translated, the blocks are attnzoo's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backbones import blocks
from attnzoo.kernels.dispatch import use_backend

Tensors = dict[str, Tensor]


def _state(tensors: Tensors, prefix: str = "state.") -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load(module: nn.Module, tensors: Tensors, prefix: str = "state.") -> nn.Module:
    module.to(next(v for v in tensors.values() if v.is_floating_point()).dtype)
    module.load_state_dict(_state(tensors, prefix), strict=True)
    return module.eval()


def _tap(module: nn.Module, taps: dict[str, str], got: dict[str, Any]) -> None:
    for name, path in taps.items():
        module.get_submodule(path).register_forward_hook(lambda _m, _i, out, name=name: got.update({name: out}))


def _triplet(config: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    block, got = _load(blocks.TripletAttention(**config), tensors), {}
    names = ("cw", "hc") if config.get("no_spatial") else ("cw", "hc", "hw")
    _tap(block, {f"inter.{name}": name for name in names}, got)
    return {"output": block(tensors["input"]), **got}


def _ulsam(config: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    block, got = _load(blocks.ULSAM(config["nin"], config["num_splits"]), tensors), {}
    _tap(block, {"inter.sub0_point": "subspaces.0.conv_point"}, got)
    return {"output": block(tensors["input"]), **got}


def _psa(config: dict[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    kind = blocks.PolarizedParallel if variant == "psa_p" else blocks.PolarizedSequential
    block = _load(kind(config["inplanes"], compat="official"), tensors)
    x = tensors["input"]
    return {"output": block(x), "spatial_pool": block.weigh_channels(x), "channel_pool": block.weigh_positions(x)}


def _efficient(config: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    block = blocks.EfficientAttention(
        config["in_channels"], config["key_channels"], config["head_count"], config["value_channels"]
    )
    got: dict[str, Any] = {}
    _load(block, tensors)
    _tap(block, {f"inter.{name}": name for name in ("keys", "queries", "reprojection")}, got)
    return {"output": block(tensors["input"]), **got}


def _probing(config: dict[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    config = {k: v for k, v in config.items() if k != "head"}
    if variant == "ep":
        module: nn.Module = blocks.EfficientProbing(**config)
    elif variant == "simpool":
        module = blocks.SimPool(**config)
    else:
        module = blocks.probe_head(**config)
    return {"output": _load(module, tensors)(tensors["input"])}


def _msa_conv(config: dict[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    if variant == "op":
        kernel, dilation = (tuple(v) if isinstance(v, list) else v for v in (config["k"], config["dil"]))
        out = blocks.window_attention(
            tensors["q"], tensors["k"], tensors["v"], kernel, dilation, scale=config["scale"]
        )
        return {"output": out}
    ours = {"input_channel": "channels", "output_channel": "out_channels"}
    config = {ours.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "mode"}
    block, got = _load(blocks.MSAConv2d(**{"padding": 1, **config}), tensors), {}
    _tap(block, {"inter.pre_relu": "mlp"}, got)
    return {"output": block(tensors["input"]), **got}


_SYSTEMS: dict[str, Callable[..., dict[str, Any]]] = {
    "triplet_attention": _triplet,
    "ulsam": _ulsam,
    "psa": _psa,
    "efficient_attention": _efficient,
    "efficient_probing": _probing,
    "msa_conv": _msa_conv,
}
_BY_VARIANT = {"psa", "efficient_probing", "msa_conv", "sparsifiner", "dependencyvit_thirdparty"}


def run(meta: dict[str, Any], tensors: Tensors, backend: str | None = None) -> dict[str, Any]:
    """The expected values of one case."""
    system = meta["system"]
    more = (meta["variant"],) if system in _BY_VARIANT else ()
    with torch.no_grad(), use_backend(backend or "auto"):
        return _SYSTEMS[system](meta["config"], tensors, *more)
