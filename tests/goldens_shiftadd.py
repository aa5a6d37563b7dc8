"""ShiftAddViT's part of the goldens adapter: names translated, the layers and models are attnzoo's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import goldens_backbones
from torch import Tensor, nn, no_grad

from attnzoo.backbones.blocks.shiftadd import Conv2dShift, LinearShift, LinearShiftQ, MixtureLinear, MixtureMlp
from attnzoo.backbones.blocks.shiftadd_attention import ATTENTIONS
from attnzoo.kernels.dispatch import use_backend

_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "linear_shift_ps": LinearShift,
    "linear_shift_q": LinearShiftQ,
    "conv2d_shift_ps": Conv2dShift,
    "moe_fc": lambda **config: MixtureLinear(**config, compat="official"),
    "moe_mlp": lambda **config: MixtureMlp(**config, compat="official"),
}
_TYPES = {
    "linangular_ksh": "LinAngular",
    "linangular_binary": "LinAngular_binary",
    "linangular_binary_sparse": "LinAngular_binary",
}
_TAPS = {
    "hash_bits": ("qk_quant", "fast_attention"),
    "dconv_v": ("dconv",),
    "qkv": ("qkv",),
    "to_qk": ("to_qk",),
    "gates": ("gate",),
}


def _build(variant: str, config: dict[str, Any]) -> nn.Module:
    if variant in _LAYERS:
        return _LAYERS[variant](**{k: v for k, v in config.items() if k != "shift_range"})
    name = variant.removeprefix("attn_")
    given = {("linear_attn" if k == "linear" else k): v for k, v in config.items() if k not in ("H", "W")}
    if "binary" in name:
        given["compat"] = "official"
    return ATTENTIONS[_TYPES.get(name, name)](**given)


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """One case: the output, and what its modules compute on the way."""
    x, config = tensors["input"], meta["config"]
    layer = _build(meta["variant"], config).to(x.dtype).eval()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    layer.load_state_dict(state, strict=True)
    got: dict[str, Any] = {}
    shapes = meta.get("intermediates") or {}
    for name, paths in _TAPS.items():
        for path in paths:
            if name in shapes and hasattr(layer, path):
                getattr(layer, path).register_forward_hook(
                    lambda _m, _i, out, name=name: got.update({name: out.reshape(shapes[name])})
                )
    with no_grad(), use_backend(backend or "auto"):
        if isinstance(layer, LinearShiftQ):
            got["weight_q"] = layer.quantised()
        size = ((config["H"], config["W"]),) if "H" in config else ()
        attends = meta["variant"].startswith("attn_")
        got["output"] = layer(x, *(size or (None,))) if attends else layer(x)
    return got


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """`entrypoint` (the authors' pvt_v2_b0 is our shiftadd_pvt_v2_b0, or _moe where it has gates), strictly."""
    mixed = "_moe" if any(".gate.gate." in name for name in state) else ""
    return goldens_backbones.load_published(system, f"shiftadd_{entrypoint}{mixed}", state)
