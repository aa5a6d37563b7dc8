"""Sharing and editing with recorded passes: the goldens' names translated, the library computes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor
from torch.nn import functional as F

from attnzoo.generators import StepContext, TokenLayout
from attnzoo.generators.aligned_gen import AlignedGen
from attnzoo.generators.chain import Layer
from attnzoo.generators.ditctrl import DiTCtrl, scaled_per_frame
from attnzoo.generators.freecus import FreeCus
from attnzoo.generators.handles import enable
from attnzoo.generators.interception import alone
from attnzoo.generators.rf_solver import integrate


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """See tests/goldens.py."""
    runs = {"aligned_gen": _aligned_gen, "freecus": _freecus, "ditctrl": _ditctrl, "rf_solver": _rf_solver}
    return runs[meta["system"]](meta["config"], tensors)


def _freecus(c: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    image, reference = tensors["in.image_tokens"], tensors["in.ref_image_tokens"]
    width, double = image.shape[-1], not c["single_stream"]
    added = {"added_kv_proj_dim": width, "context_pre_only": False} if double else {"pre_only": True}
    module = FluxAttention(width, heads=c["heads"], dim_head=width // c["heads"], bias=True, eps=1e-6, **added)
    weights = {n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")}
    module.to(image.dtype).load_state_dict(weights, strict=True)
    method = FreeCus(1, subject=c["ref_token_indices"], scale=c["scale"])
    text = tensors["in.text_tokens"].shape[1]
    layout = TokenLayout((image.shape[1],), text, "first")

    def call(images: Tensor, texts: Tensor) -> Tensor:
        texts = texts.to(images.dtype)
        return module(images, texts)[0] if double else module(torch.cat([texts, images], 1))[:, text:]

    with alone(module, method, layout), method.recording():
        got = {"out.ref_out_image": call(reference, tensors["in.ref_text_tokens"])}
    got["out.stored_key"], got["out.stored_value"] = next(iter(method._kept.values()))
    with alone(module, method, layout):
        got["out.out_image"] = call(image, tensors["in.text_tokens"])
    return {**got, "out.out_image_non_vital": call(image, tensors["in.text_tokens"])}


def _aligned_gen(c: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    image, text = tensors["in.image_tokens"], tensors["in.text_tokens"]
    width, double = image.shape[-1], not c["single_stream"]
    weights = {n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")}
    added = {"added_kv_proj_dim": width, "context_pre_only": False, "added_proj_bias": "add_q_proj.bias" in weights}
    module = FluxAttention(
        width,
        heads=c["heads"],
        dim_head=c["head_dim"],
        bias="to_q.bias" in weights,
        eps=1e-6,
        **(added if double else {"pre_only": True}),
    )
    module.to(image.dtype).load_state_dict(weights, strict=True)
    whole, moved = ((tensors[f"in.{n}_cos"], tensors[f"in.{n}_sin"]) for n in ("rope", "ref_rope"))
    method = AlignedGen(2, style_lambda="decrease" if c["style_lambda_mode"] == "decrease" else c["style_lambda"])
    method._tables = whole, moved
    layout = TokenLayout((c["h"], c["w"]), text.shape[1], "first")

    def call() -> tuple[Tensor, ...]:
        if double:
            return module(image, text, image_rotary_emb=whole)
        return (module(torch.cat([text, image], 1), image_rotary_emb=whole),)

    names = ("out.out", "out.text_out"), ("out.plain", "out.plain_text")
    with alone(module, method, layout, StepContext(timestep=c["timestep"])):
        shared = call()
    return {**dict(zip(names[0], shared)), **dict(zip(names[1], call()))}


def _ditctrl(c: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    layout = TokenLayout((c["frames"], c["height"], c["width"]), c["text_length"], "first")
    ctx = StepContext(5, 50, parts=("uncond", "cond"))
    words = {name: c[name] for name in ("ref_token_idx", "cur_token_idx", "thres")}
    first, second = (tuple(tensors[f"in.{part}{tail}"] for part in "qkv") for tail in ("0", ""))
    stock = partial(F.scaled_dot_product_attention)
    guided = DiTCtrl(3, **words)
    plain = DiTCtrl(3).attend(*second, None, layout, ctx, Layer("b", 1), stock)
    guided.accumulate(*first[:2], layout, ctx, Layer("a", 0))
    got = {"out.out_kv_share_mask_guided": guided.attend(*second, None, layout, ctx, Layer("b", 1), stock)}
    assert guided._maps is not None
    got["out.map_ref_tokens"], got["out.map_cur_tokens"] = (scaled_per_frame(m) for m in guided._maps[2:])
    return {**got, "out.out_kv_share_plain": plain, "out.out_layer_outside": stock(*first)}


def _flux(c: dict[str, Any], weights: dict[str, Tensor]) -> FluxTransformer2DModel:
    """The authors' Flux (Black Forest Labs' names) as diffusers'. Its narrower MLPs are filled up with zeros."""
    p, width = c["flux_params"], c["flux_params"]["hidden_size"]
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=p["in_channels"],
        num_layers=p["depth"],
        num_single_layers=p["depth_single_blocks"],
        attention_head_dim=width // p["num_heads"],
        num_attention_heads=p["num_heads"],
        joint_attention_dim=p["context_in_dim"],
        pooled_projection_dim=p["vec_in_dim"],
        guidance_embeds=p["guidance_embed"],
        axes_dims_rope=tuple(p["axes_dim"]),
    )
    names = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    embedders = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
    for theirs, ours in embedders.items():
        names |= {
            f"{theirs}.{a}_layer": f"time_text_embed.{ours}_embedder.linear_{b}" for a, b in (("in", 1), ("out", 2))
        }
    for n in range(p["depth"]):
        a, b = f"double_blocks.{n}", f"transformer_blocks.{n}"
        names |= {f"{a}.img_mod.lin": f"{b}.norm1.linear", f"{a}.txt_mod.lin": f"{b}.norm1_context.linear"}
        names |= {f"{a}.img_attn.proj": f"{b}.attn.to_out.0", f"{a}.txt_attn.proj": f"{b}.attn.to_add_out"}
        for side, ff in (("img", "ff"), ("txt", "ff_context")):
            names |= {f"{a}.{side}_mlp.0": f"{b}.{ff}.net.0.proj", f"{a}.{side}_mlp.2": f"{b}.{ff}.net.2"}
    for n in range(p["depth_single_blocks"]):
        a, b = f"single_blocks.{n}", f"single_transformer_blocks.{n}"
        names |= {f"{a}.modulation.lin": f"{b}.norm.linear", f"{a}.linear2": f"{b}.proj_out"}
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stem, kind = name.rsplit(".", 1)
        block = f"transformer_blocks.{name.split('.')[1]}"
        block = f"single_{block}" if name.startswith("single") else block
        if stem in names:
            state[f"{names[stem]}.{kind}"] = tensor
        elif kind == "scale":
            part = "query" in name and "q" or "k"
            state[f"{block}.attn.norm_{'added_' if 'txt_attn' in name else ''}{part}.weight"] = tensor
        elif stem.endswith("qkv"):
            ours = "add_{}_proj" if "txt_attn" in name else "to_{}"
            state |= {f"{block}.attn.{ours.format(q)}.{kind}": t for q, t in zip("qkv", tensor.chunk(3))}
        elif stem.endswith("linear1"):
            state |= {f"{block}.attn.to_{q}.{kind}": t for q, t in zip("qkv", tensor.split(width))}
            state[f"{block}.proj_mlp.{kind}"] = tensor[3 * width :]
        else:
            assert stem == "final_layer.adaLN_modulation.1", name
            state[f"norm_out.linear.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        short = [d for a, b in zip(reversed(shapes[name]), reversed(tensor.shape)) for d in (0, a - b)]
        state[name] = F.pad(tensor, short)
    dtype = next(iter(weights.values())).dtype
    model.to(dtype).load_state_dict(state, strict=True)
    return model.eval()


def _rf_edit(c: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    image = tensors["in.img"]
    model = _flux(c, {n.removeprefix("w."): t.to(image.dtype) for n, t in tensors.items() if n.startswith("w.")})
    times = tensors["in.timesteps"].tolist()

    def velocity(side: str, guidance: float) -> Any:
        def call(x: Tensor, t: float) -> Tensor:
            return model(
                x,
                encoder_hidden_states=tensors[f"in.{side}_txt"],
                pooled_projections=tensors[f"in.{side}_vec"],
                timestep=torch.full((1,), t, dtype=x.dtype),
                img_ids=tensors["in.img_ids"][0],
                txt_ids=tensors["in.txt_ids"][0],
                guidance=torch.full((1,), guidance, dtype=x.dtype),
                return_dict=False,
            )[0]

        return call

    source, target = velocity("src", c["guidance_inversion"]), velocity("tgt", c["guidance_edit"])
    vital = [f"single_transformer_blocks.{n}.attn" for n in range(20, c["flux_params"]["depth_single_blocks"])]
    with enable(model, "rf_edit", inject_step=c["inject_step"], layers=vital) as handle:
        edit = handle.methods("rf_edit")[0]
        inverted = edit.integrate(source, image, times[::-1], "record")
        edited = edit.integrate(target, inverted, times, "inject")
    plain = integrate(target, inverted, times)
    name = f"out.edited_inject{c['inject_step']}"
    return {"out.inverted": inverted, name: edited, "out.edited_no_inject": plain}


def _rf_solver(c: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    if "flux_params" in c:
        return _rf_edit(c, tensors)
    a, b, drift = (tensors[f"in.{name}"] for name in ("A", "b", "C"))
    calls: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return torch.tanh(x @ a + t * b) - 0.5 * x @ drift

    times = tensors["in.timesteps"].tolist()
    inverted = integrate(velocity, tensors["in.x0"], times[::-1])
    got = {"out.inverted": inverted, "out.nfe_times_inversion": torch.tensor(calls)}
    calls.clear()
    got["out.reconstructed"] = integrate(velocity, inverted, times)
    return {**got, "out.nfe_times_sampling": torch.tensor(calls)}
