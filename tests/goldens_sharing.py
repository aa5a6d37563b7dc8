"""The goldens of guidance, reuse, sharing and editing in generators: names are translated here, the library computes.

A case of one attention layer runs diffusers' own module, whose attention call the method answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo import generators
from attnzoo.generators.chain import Layer
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.pab import broadcast_schedule
from attnzoo.generators.soft_pag import SoftPAG, perturbed_guidance
from attnzoo.generators.style_aligned import StyleAligned, adain, own_layers, shared_group_norm
from attnzoo.generators.t_gate import gate_flags


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """See tests/goldens.py."""
    with torch.no_grad():
        return _SYSTEMS[meta["system"]](meta["config"], tensors)


class _Answered(TorchFunctionMode):
    """Answers the attention call of one layer by `attend(query, key, value, mask, next)`."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3] if args else (kwargs.pop(n) for n in ("query", "key", "value"))
        mask = (kwargs or {}).get("attn_mask", args[3] if len(args) > 3 else None)
        return self.attend(query, key, value, mask, lambda q, k, v, m: func(q, k, v, m))


@contextmanager
def _under(method: Any, layout: TokenLayout, ctx: StepContext | None = None, **of_layer: Any) -> Iterator[None]:
    """Within, attention calls are answered by `method` alone."""
    ctx, layer = ctx or StepContext(), Layer("layer", 0, **of_layer)
    with _Answered(lambda q, k, v, m, next: method.attend(q, k, v, m, layout, ctx, layer, next)):
        yield


def _weights(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _attention(state: dict[str, Tensor], heads: int, dtype: torch.dtype, joint: bool = False) -> Attention:
    """diffusers' attention with these weights."""
    width = state["to_q.weight"].shape[0]
    more = {"added_kv_proj_dim": width, "context_pre_only": False} if joint else {}
    module = Attention(
        width,
        heads=heads,
        dim_head=width // heads,
        bias="to_q.bias" in state,
        out_bias="to_out.0.bias" in state,
        processor=JointAttnProcessor2_0() if joint else AttnProcessor2_0(),
        **more,
    )
    module.load_state_dict(state, strict=True)
    return module.to(dtype)


def _pag(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    x, text = tensors["in.x"], tensors["in.text"]
    alone = _attention(_weights(tensors, "w.self."), config["heads"], x.dtype)
    joint = _attention(_weights(tensors, "w.joint."), config["heads"], x.dtype, joint=True)
    picture = TokenLayout((1, x.shape[1]))
    both = TokenLayout((1, x.shape[1]), text.shape[1], "last")
    halves = list(zip(("plain", "perturbed"), x.chunk(2), text.chunk(2)))
    found = {}
    classic, mode = SoftPAG(2, variant="masked"), SoftPAG(2, variant="identity")
    outs = []
    for phase, part, _ in halves:
        with _under(classic, picture, phase=phase):
            outs.append(alone(part))
    found["out.self_out"] = torch.cat(outs)
    pairs = []
    for phase, part, words in halves:
        with _under(classic, both, phase=phase):
            pairs.append(joint(part, words))
    found["out.joint_out"], found["out.joint_text_out"] = (torch.cat(parts) for parts in zip(*pairs))
    with _under(mode, picture, phase="perturbed"):
        found["out.mode_self_out"] = alone(x)
    with _under(mode, both, phase="perturbed"):
        found["out.mode_joint_out"], found["out.mode_joint_text_out"] = joint(x, text)
    found["out.guided"] = perturbed_guidance(
        tensors["in.pred_cond"],
        tensors["in.pred_perturbed"],
        config["pag_scale"],
        tensors["in.pred_uncond"],
        config["guidance_scale"],
    )
    return found


def _tgate(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    latents = tensors["in.latents"]
    unet = diffusers.UNet2DConditionModel.from_config(config["unet"]).to(latents.dtype).eval()
    unet.load_state_dict({n: t.to(latents.dtype) for n, t in _weights(tensors, "w.").items()}, strict=True)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    pipe = diffusers.StableDiffusionPipeline(
        None, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    total = config["num_inference_steps"]
    schedule = {name: config[name] for name in ("gate_step", "sp_interval", "fi_interval", "warm_up")}

    def draw() -> Tensor:
        steps: list[Tensor] = []

        def note(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            steps.append(given["latents"].clone())
            return given

        pipe(
            prompt_embeds=tensors["in.prompt_embeds"],
            negative_prompt_embeds=tensors["in.negative_prompt_embeds"],
            latents=latents,
            guidance_scale=config["guidance_scale"],
            num_inference_steps=total,
            output_type="latent",
            callback_on_step_end=note,
        )
        return torch.stack(steps)

    plain, batches = draw(), []
    handle = unet.conv_in.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
    with generators.enable(pipe, "t_gate", compat="official", **schedule) as gate:
        gate.new_run(total)
        gated = draw()
    handle.remove()
    return {
        "out.latents_plain": plain,
        "out.latents_tgate": gated,
        "out.flags_cacache_careuse_sacache_sareuse_keepshape": gate_flags(total, **schedule),
        "out.unet_batch": torch.tensor(batches),
        "out.timesteps": scheduler.timesteps,
    }


def _pab_schedule(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    timesteps, found = tensors["in.timesteps"].tolist(), {}
    for kind in ("spatial", "temporal", "cross"):
        every = config[f"{kind}_range"] if config[f"{kind}_broadcast"] else 1
        reuse = broadcast_schedule(timesteps, every, tuple(config[f"{kind}_threshold"]))
        found[f"out.{kind}_reuse"] = torch.stack([reuse, reuse])
    return found


def _style_aligned(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    x = tensors["in.hidden_states"]
    layer = _attention(_weights(tensors, "w."), config["heads"], x.dtype)
    flags = ("share_attention", "adain_queries", "adain_keys", "adain_values")
    options: dict[str, Any] = {name: config[name] == "True" for name in flags}
    options |= {name: float(config[name]) for name in ("shared_score_scale", "shared_score_shift")}
    layout, ctx = TokenLayout((1, x.shape[1])), StepContext(parts=("uncond", "cond"))
    found = {}
    for name, method in (
        ("shared_out", StyleAligned(2, **options)),
        ("full_share_out", StyleAligned(2, full_attention_share=True)),
    ):
        with _under(method, layout, ctx):
            found[f"out.{name}"] = layer(x)
    norm = torch.nn.GroupNorm(4, x.shape[2]).to(x.dtype)
    picture = x.transpose(1, 2)[..., None].repeat(1, 1, 1, 2)
    return found | {
        "out.adain": adain(x, groups=2),
        "out.shared_group_norm": shared_group_norm(norm, picture, groups=2),
        "out.only_self_switch_levels_0_25_50_75_100": torch.stack([own_layers(12, i / 4) for i in range(5)]),
    }


_SYSTEMS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Any]]] = {
    "pab_schedule": _pab_schedule,
    "pag": _pag,
    "style_aligned": _style_aligned,
    "tgate": _tgate,
}
