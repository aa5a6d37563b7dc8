"""VSA's part of the goldens adapter: names translated, the modules are attnzoo's."""

from __future__ import annotations

import re
from typing import Any

import goldens_backbones
import torch
from torch import Tensor, nn

from attnzoo.backbones.blocks.vsa import VSA
from attnzoo.backbones.vitae_vsa import ViTAEVSA, checkpoint_filter_fn
from attnzoo.kernels.dispatch import use_backend

_OURS = {
    "token_dims": "dims",
    "embed_dims": "stem_dims",
    "NC_depth": "depths",
    "NC_heads": "num_heads",
    "RC_heads": "reduction_heads",
    "downsample_ratios": "strides",
    "RC_op": "reduction_op",
    "NC_group": "groups",
    "RC_group": "reduction_groups",
    "qk_scale": "scale",
    "drop_rate": "proj_drop_rate",
}
# What the authors' class has where a case does not say; img_size and relative_pos do nothing here.
_THEIRS = {
    "token_dims": 64,
    "embed_dims": 64,
    "NC_depth": [2, 2, 6, 2],
    "NC_heads": 4,
    "RC_heads": [1, 1, 1, 1],
    "NC_group": [1, 32, 64, 64],
    "RC_group": [1, 1, 1, 1],
    "wide_pcm": True,
    "cpe": False,
}
_IGNORED = ("class", "img_size", "stages", "relative_pos", "attn_drop_rate", "attn_drop", "num_deform")


def _states(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}


def _drop_index(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.endswith("relative_position_index")}


def _run_attention(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    config = {k: v for k, v in meta["config"].items() if k not in _IGNORED}
    config = {_OURS.get(k, k): v for k, v in config.items()}
    pad = "both" if meta["variant"] == "vsa_attn_det" else "end"
    x, got = tensors["input"], {}
    layer = VSA(**config, pad=pad, compat="official").to(x.dtype)
    layer.load_state_dict(_drop_index(_states(tensors)), strict=True)
    for name, module in (("raw_offsets", layer.sampling_offsets[2]), ("raw_scales", layer.sampling_scales[2])):
        module.register_forward_hook(lambda _m, _i, out, name=name: got.update({name: out}))
    layer.qkv.register_forward_hook(lambda _m, _i, out: got.update(qkv=out))
    return {**got, "output": layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)}


def _run_model(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    given = {**_THEIRS, **meta["config"]}
    for kind in ("RC_tokens_type", "NC_tokens_type"):
        assert set(given.pop(kind, ["VSA"])) <= {"VSA", *"VSA"}, given
    depths = given["NC_depth"]
    if isinstance(depths, int):
        given["NC_depth"] = [depths] * given.get("stages", 4)
    config = {_OURS.get(k, k): v for k, v in given.items() if k not in _IGNORED and k != "norm_layer"}
    x, got = tensors["input"], {}
    model = ViTAEVSA(**config, compat="official").to(x.dtype).eval()
    model.load_state_dict(checkpoint_filter_fn(_states(tensors), model), strict=True)
    for name, path in (meta.get("intermediates_meaning") or {}).items():
        if re.search(r"\.attn$", path):
            tap = lambda _m, _i, out, name=name: got.update({name: out.permute(0, 3, 1, 2)})  # noqa: E731
            model.get_submodule(path).register_forward_hook(tap)
    return {**got, "output": model(x)}


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """One case: the output, and the intermediates that are cheap to give."""
    with torch.no_grad(), use_backend(backend or "auto"):
        return (_run_model if meta["variant"] == "vitae_vsa" else _run_attention)(meta, tensors)


def load_published(system: str, entrypoint: str, state: dict[str, Tensor]) -> nn.Module:
    """`entrypoint` by timm (the authors' names are aliases), with a published checkpoint's tensors in it, strictly."""
    return goldens_backbones.load_published(system, entrypoint, state)
