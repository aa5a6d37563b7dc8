"""The image-to-image models' part of the goldens adapter: names translated, the models are attnzoo's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backbones import restoration
from attnzoo.backbones.restoration import a2n, hat
from attnzoo.backbones.restoration.hat_blocks import fit_window, overlap_index, self_index
from attnzoo.kernels.dispatch import use_backend

# What changes nothing in the authors' code either: flags that are not read, layers that are always timm's defaults.
_UNREAD = {"patch_size", "use_checkpoint", "norm_layer", "act_layer", "x_size", "input_resolution", "class", "H", "W"}


def _config(meta: dict[str, Any], **names: str) -> dict[str, Any]:
    config = {k: v for k, v in meta["config"].items() if k not in _UNREAD}
    if "qk_scale" in config:
        config["qk_scale"] = config["qk_scale"] or None  # 0.0 is "none" there
    return {names.get(k, k): v for k, v in config.items()}


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)  # type: ignore[return-value]


def _hab(meta: dict[str, Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    config = _config(meta, window_size="window", shift_size="shift", qk_scale="scale", drop="proj_drop")
    config["window"], config["shift"] = fit_window(
        config.get("window", 7), config.get("shift", 0), _pair(meta["config"]["input_resolution"])
    )
    return restoration.HAB(**config), (self_index(config["window"]),)


def _ocab(meta: dict[str, Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    config = _config(meta, window_size="window", qk_scale="scale")
    config["overlap"] = int(config["window"] * config.pop("overlap_ratio"))
    return restoration.OCAB(**config), (overlap_index(config["window"], config["overlap"]),)


def _model(meta: dict[str, Any]) -> nn.Module:
    if meta["system"] == "a2n":
        return restoration.A2N(**_config(meta, scale="upscale", nf="embed_dim", unf="up_dim", nb="depth"))
    config = _config(meta, qk_scale="scale", drop_rate="proj_drop_rate")
    patch = _pair(meta["config"].get("patch_size", 1))
    config["img_size"] = tuple(size // step for size, step in zip(_pair(config.get("img_size", 64)), patch))
    defaults = {"embed_dim": 96, "depths": (6,) * 4, "num_heads": (6,) * 4, "window_size": 7, "mlp_ratio": 4.0}
    return restoration.HAT(**{**defaults, "upsampler": "", **config}, compat="official")


_TAPS = {
    "hab": {"conv_block": "conv_block", "attn": "attn.proj"},
    "ocab": {"qkv": "qkv", "proj": "proj"},
    "aab": {"adm": "ADM", "attention": "attention", "non_attention": "non_attention"},
    "model": {
        "conv_first": "conv_first",
        "hab0": "layers.0.residual_group.blocks.0",
        "ocab0": "layers.0.residual_group.overlap_attn",
        "trunk_conv": "trunk_conv",
    },
    "upsample": {},
}


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """The output of one case, and the intermediates that it names."""
    variant, x, extra = meta["variant"], tensors["input"], ()
    if variant == "hab":
        model, extra = _hab(meta)
    elif variant == "ocab":
        model, extra = _ocab(meta)
    elif variant == "upsample":
        model = restoration.Upsample(meta["config"]["scale"], meta["config"]["num_feat"])
    elif variant == "aab":
        model = restoration.AAB(**_config(meta, nf="dim", K="num_weights", t="temperature"))
    else:
        model = _model(meta)
    model = model.to(x).eval()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    if variant == "model":
        state = (a2n if meta["system"] == "a2n" else hat).checkpoint_filter_fn(state, model)  # type: ignore[arg-type]
    model.load_state_dict(state, strict=True)
    got: dict[str, Any] = {}
    shapes = meta.get("intermediates") or {}
    for name, path in _TAPS[variant].items():
        if name in shapes:
            tap = lambda _m, _i, out, name=name: got.update({f"inter.{name}": out.reshape(shapes[name])})  # noqa: E731
            model.get_submodule(path).register_forward_hook(tap)
    with torch.no_grad(), use_backend(backend or "auto"):
        if variant in ("hab", "ocab"):  # the authors' blocks take tokens
            size = tuple(meta["config"]["x_size"])
            got["output"] = model(x.unflatten(1, size), *(t.to(x.device) for t in extra)).flatten(1, 2)
        else:
            got["output"] = model(x)
    return got


_NAMES = {"HAT-S_SRx": "hat_s_x", "HAT_SRx": "hat_x", "HAT-L_SRx": "hat_l_x", "A2N_x": "a2n_x"}


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """The model that `entrypoint` published, with a checkpoint's tensors in it, strictly."""
    model = restoration.create(_NAMES[entrypoint[:-1]] + entrypoint[-1], device="meta").to_empty(device="cpu")
    family = a2n if system == "a2n" else hat
    model.load_state_dict(family.checkpoint_filter_fn(state, model), strict=True)  # type: ignore[arg-type]
    return model
