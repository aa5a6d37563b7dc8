"""The attention blocks' part of the goldens adapter: names translated, the blocks are attnzoo's."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from attnzoo.backbones import blocks
from attnzoo.backbones.blocks.sparse import MaskPredictor, SparseAttention, SparseSettings, TokenMask
from attnzoo.backbones.dependencyvit import DependencyViT, ReversedAttention
from attnzoo.backbones.sparsifiner import Sparsifiner, sparsifiner_loss, teacher_outputs
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
        module = blocks.SimPool(**config, compat="official")
    else:
        module = blocks.probe_head(**config)
    return {"output": _load(module, tensors)(tensors["input"])}


def _msa_conv(config: dict[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    if variant == "op":
        kernel, dilation = (tuple(v) if isinstance(v, list) else v for v in (config["k"], config["dil"]))
        out = blocks.window_attention(tensors["q"], tensors["k"], tensors["v"], kernel, dilation, scale=config["scale"])
        return {"output": out}
    ours = {"input_channel": "channels", "output_channel": "out_channels"}
    config = {ours.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "mode"}
    block, got = _load(blocks.MSAConv2d(**{"padding": 1, **config}), tensors), {}
    _tap(block, {"inter.pre_relu": "mlp"}, got)
    return {"output": block(tensors["input"]), **got}


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The authors' configuration, as SparseSettings' fields; what it does not say is their default_config.py's."""
    cfg = {"PRUNE_ATTN_MATRIX_ROW": False, "BASIS_THRESHOLD": 0.0, "BASIS_COEF__USE_TOPK": False}
    cfg |= {"BASIS_COEF__TOPK": 8, "BASIS_COEF__THRESHOLD": 0.0, "ATTN_SCORE__USE_TOPK": False}
    cfg |= {k.removeprefix("SPAR__"): v for k, v in config["cfg"].items() if k.startswith("SPAR__")}
    return {
        "reduce_n_factor": config.get("rn", config.get("reduce_n_factor")),
        "reduce_c_factor": config.get("rc", config.get("reduce_c_factor")),
        "share_inout_proj": config["share"],
        "basis_threshold": cfg["BASIS_THRESHOLD"],
        "coef_topk": cfg["BASIS_COEF__TOPK"] if cfg["BASIS_COEF__USE_TOPK"] else None,
        "coef_threshold": cfg["BASIS_COEF__THRESHOLD"],
        "score_threshold": None if cfg["ATTN_SCORE__USE_TOPK"] else cfg["ATTN_SCORE__THRESHOLD"],
        "prune_rows": cfg["PRUNE_ATTN_MATRIX_ROW"],
    }


def _token_mask(tensors: Tensors) -> TokenMask | None:
    mask = next((tensors[k] for k in ("token_mask", "prev_token_mask", "prev_mask", "mask") if k in tensors), None)
    return None if mask is None else TokenMask(mask.bool(), int(mask[0].sum()))


def _reconstructs(config: dict[str, Any]) -> bool:
    return "train" in config.get("mode", "") and bool(config["cfg"].get("LOSS__USE_ATTN_RECON"))


def _sparsifiner(config: dict[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    parts = {"mask_predictor": _mask_predictor, "attention": _sparse_attention, "model": _sparse_model}
    return {**parts, "train_loss": _train_loss}[variant](config, tensors)


def _mask_predictor(config: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    settings = SparseSettings(**_settings(config), attn_keep_rate=config["attn_keep_rate"], compat="official")
    module = _load(MaskPredictor(config["dim"], config["num_heads"], config["num_tokens"], settings), tensors)
    coef, scores, mask = module(tensors["q"], tensors["k"], _token_mask(tensors), _reconstructs(config))
    assert module.attn_budget == config["attn_budget_after"]
    return {"output": mask, "inter.approx_attn": scores, "inter.basis_coef": coef}


def _sparse_attention(config: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    settings = SparseSettings(
        **_settings(config),
        attn_keep_rate=config["attn_keep_rate"],
        token_keep_rate=config["token_keep_rate"],
        prune_tokens=config["prune"],
        compat="official",
    )
    module = SparseAttention(
        config["dim"], config["num_heads"], config["num_tokens"], settings, qkv_bias=config["qkv_bias"]
    )
    given = _token_mask(tensors)
    out, details = _load(module, tensors).detailed(tensors["input"], given, _reconstructs(config))
    left = details.token_mask
    if not _reconstructs(config):
        out, left = module(tensors["input"], given)
    got = {"output": out, "attn_mask": details.attn_mask, "inter.masked_attn": details.masked_attn}
    if left is not None:
        got["token_mask"] = left.mask
    return {**got, "inter.approx_attn": details.approx_attn}


def _sparse_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    same = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")
    return {k: config[k] for k in same}


def _sparse_model(config: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    model = Sparsifiner(
        **_sparse_kwargs(config),
        attn_keep_rate=config["ak"],
        token_keep_rate=config["tk"],
        prune_blocks=[i for i, here in enumerate(config["loc"]) if here],
        representation_size=config["rep"],
        settings=_settings(config),
        compat="official",
    )
    _load(model, tensors)
    details = model.forward_details(tensors["input"])
    last = details.layers[-1]
    got = {"output": model(tensors["input"]), "inter.features": details.features}
    got |= {"inter.attn_mask0": details.layers[0].attn_mask, "inter.attn_mask_last": last.attn_mask}
    return got if last.token_mask is None else {**got, "inter.token_mask_last": last.token_mask.mask}


def _train_loss(config: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    student = Sparsifiner(
        **_sparse_kwargs(config),
        attn_keep_rate=config["attn_keep_rate"],
        settings=_settings(config),
        compat="official",
    )
    teacher = VisionTransformer(**_sparse_kwargs(config))
    _load(student, tensors, "state.student.").train()
    _load(teacher, tensors, "state.teacher.")
    cfg = {"CLS": True, "CLS_DISTILL": True, "TOKEN_DISTILL": True}
    flags = {k.removeprefix("LOSS__USE_"): v for k, v in config["cfg"].items() if k.startswith("LOSS__USE_")}
    names = {"RATIO_LOSS": "ratio"}
    use = [names.get(k, k.lower()) for k, on in (cfg | flags).items() if on and k != "L1"]  # L1 is read by nobody
    weights = {
        names.get(k.split("__")[1], k.split("__")[1].lower()): v
        for k, v in config["cfg"].items()
        if k.startswith("LOSS__") and k.endswith("__WEIGHT")
    }
    with torch.enable_grad():
        details = student.forward_details(tensors["input"], reconstruct="attn_recon" in use)
        total, parts = sparsifiner_loss(
            details,
            tensors["labels"],
            teacher_outputs(teacher, tensors["input"]),
            use=use,
            weights=weights,
            token_criterion=config["cfg"].get("LOSS__TOKEN_DISTILL__CRITERION", "MSE").lower(),
            recon_criterion=config["cfg"].get("LOSS__ATTN_RECON__CRITERION", "MSE").lower(),
            ratio=config["cfg"].get("LOSS__RATIO_LOSS__RATIO", 0.25),
        )
        total.backward()
    attn = student.blocks[0].attn
    got = {"output": total.detach(), **{f"{name}_loss": part.detach() for name, part in parts.items()}}
    got |= {"inter.logits": details.logits.detach(), "inter.approx_attn0": details.layers[0].approx_attn.detach()}
    got |= {"inter.grad_proj_n0": attn.mask_predictor.proj_n.grad}
    got |= {"inter.grad_proj_back_n0": attn.mask_predictor.proj_back_n.grad, "inter.grad_qkv0": attn.qkv.weight.grad}
    return {k: v for k, v in got.items() if v is not None}


def _dependency(config: dict[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    x = tensors["input"]
    if variant == "reversed_attention":
        module = _load(ReversedAttention(**config), tensors)
        out, m = module(x, tensors["m_in"])
        return {"output": out, "m_out": m, "prune_mask": m[:, 0, 0]}
    ours = {"prune_layers": "prune_blocks"}
    return {"output": _load(DependencyViT(**{ours.get(k, k): v for k, v in config.items()}), tensors)(x)}


_SYSTEMS: dict[str, Callable[..., dict[str, Any]]] = {
    "triplet_attention": _triplet,
    "ulsam": _ulsam,
    "psa": _psa,
    "efficient_attention": _efficient,
    "efficient_probing": _probing,
    "msa_conv": _msa_conv,
    "sparsifiner": _sparsifiner,
    "dependencyvit_thirdparty": _dependency,
}
_BY_VARIANT = {"psa", "efficient_probing", "msa_conv", "sparsifiner", "dependencyvit_thirdparty"}


def run(meta: dict[str, Any], tensors: Tensors, backend: str | None = None) -> dict[str, Any]:
    """The expected values of one case."""
    system = meta["system"]
    more = (meta["variant"],) if system in _BY_VARIANT else ()
    with torch.no_grad(), use_backend(backend or "auto"):
        return _SYSTEMS[system](meta["config"], tensors, *more)


def load_published(system: str, entrypoint: str, state: Tensors) -> nn.Module:
    """The authors' `ResidualNet('ImageNet', depth, ...)` as timm's `resnet{depth}_triplet`, its checkpoint loaded."""
    depth = re.search(r"ResidualNet\('ImageNet',\s*(\d+)", entrypoint)
    assert depth, f"{system} has no entry point {entrypoint!r}"
    num_classes = state["fc.weight"].shape[0]
    model = timm.create_model(f"resnet{depth[1]}_triplet", num_classes=num_classes, device="meta").to_empty(
        device="cpu"
    )
    family = importlib.import_module(type(model).__module__)
    cfg = {**model.pretrained_cfg, "state_dict": state, "num_classes": num_classes}
    timm.models.load_pretrained(model, cfg, num_classes=num_classes, filter_fn=family.checkpoint_filter_fn)
    return model
