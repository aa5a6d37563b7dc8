"""The generator room's block-sparse methods: the goldens' names translated here, the library computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn

from attnzoo.generators import StepContext, TokenLayout, window_mask
from attnzoo.generators.agent import EARLY, Agent
from attnzoo.generators.chain import Link, Method
from attnzoo.generators.freeswim import DUAL, FreeSwim, inward_window
from attnzoo.generators.interception import AttentionHook, Frame, Intercept
from attnzoo.generators.seer import SeerGate, choose_by_ratio, choose_by_threshold, pooled_target
from attnzoo.generators.sparge import block_scales, delta_lists, select_blocks
from attnzoo.generators.video_infinity import VideoInfinity
from attnzoo.kernels import BlockSparsity, block_sparse_attention, edited_attention
from attnzoo.kernels.edited_attention import Visibility


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """See tests/goldens.py."""
    systems = {
        "sparge_block_select": _sparge,
        "seer_attention": _seer_attention,
        "freeswim": _freeswim,
        "agent_attention_sd": _agent,
        "video_infinity": _video_infinity,
    }
    return systems[meta["system"]](meta, tensors, backend or "auto")


def _sparge(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    config = meta["config"]
    query, key = tensors["in.q"], tensors["in.k"]
    options: dict[str, Any] = {
        name: torch.tensor(config[name]) if isinstance(config[name], list) else config[name]
        for name in ("simthreshd1", "cdfthreshd", "topk", "is_causal", "attention_sink")
    }
    options |= {"block_size": (config["BLKQ"], config["BLKK"]), "compat": "official"}
    found = select_blocks(query, key, **options)
    fused = select_blocks(query, key, smooth_k=True, **options)
    lut, counts = delta_lists(found.mask)
    return {
        "out.block_map": found.mask,
        "out.lut": lut,
        "out.valid_block_num": counts,
        "out.q_pool": found.query_pool,
        "out.k_pool": found.key_pool,
        "out.q_selfsim": found.query_similar,
        "out.k_selfsim": found.key_similar,
        "out.fused_block_map": fused.mask,
        "out.k_mean": fused.key_mean,
        "out.q_scale": block_scales(query, config["BLKQ"]),
        "out.k_scale": block_scales(key, config["BLKK"], fused.key_mean),
    }


def _seer_attention(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    return (_seer_gate if meta["variant"] == "gate" else _seer_target)(meta["config"], tensors, backend)


def _seer_gate(c: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    query, key = (tensors[name].transpose(1, 2) for name in ("q", "k"))
    gate = SeerGate(
        c["hq"],
        c["D"],
        c["hk"],
        block_size=c["bs"],
        pooling=c["cls"],
        hidden_size=c["hid"],
        force_double=c["force"],
        dtype=query.dtype,
    )
    gate.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    rotary = (tensors["block_cos"], tensors["block_sin"]) if "block_cos" in tensors else None
    with torch.no_grad():
        logits = gate(query, key, tensors["block_attention_mask"], rotary)
    found: dict[str, Any] = {}
    if c["method"] == "threshold":
        scores = found["inter.scores"] = logits.softmax(-1)
        mask = choose_by_threshold(scores, c["thr"], causal=True, last_dense=c["dense"])
    else:
        ratio = next(c[name] for name in ("nz_ratio", "ratio", "nz", "thr") if name in c)
        mask = choose_by_ratio(logits, ratio, causal=True, last_dense=c["dense"])
    if "v" in tensors:
        sparsity = BlockSparsity.from_mask(mask, c["L"], c["L"], c["bs"])
        rows = (tensors["q"], tensors["k"], tensors["v"].transpose(1, 2))
        out = block_sparse_attention(*rows, sparsity, is_causal=True, backend=backend)
        assert isinstance(out, Tensor)
        found["attn_output"] = out.transpose(1, 2)
    return {**found, "output": mask}


def _seer_target(c: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    query, key, value = (tensors[name] for name in ("q", "k", "v"))
    rows = (t.transpose(1, 2) for t in (query, key, value))
    out = edited_attention(*rows, Visibility(is_causal=c["causal"]), c["sm_scale"], backend=backend)
    assert isinstance(out, Tensor)
    return {
        "output": pooled_target(query, key, c["bs"], c["sm_scale"], causal=c["causal"]),
        "attn_output": out.transpose(1, 2),
    }


def _through(method: Method, phase: Any, layout: TokenLayout, module: nn.Module, *inputs: Tensor) -> Tensor:
    """A module of diffusers' with `method` on its attention call."""
    hook = AttentionHook(None, "attn1", 0, "image")  # type: ignore[arg-type]
    with torch.no_grad(), Intercept(hook, (Link(method, 0, phase=phase),), Frame(layout, StepContext(), (phase,))):
        return module(*inputs)


def _weights(tensors: dict[str, Tensor], prefix: str = "w.") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _freeswim(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    c = meta["config"]
    grid, hidden = (c["frames"], c["height"], c["width"]), tensors["in.hidden_states"]
    base = (2 * c["d_h"] + 1, 2 * c["d_w"] + 1)
    attention = WanAttention(hidden.shape[-1], c["heads"], c["head_dim"], eps=1e-6, processor=WanAttnProcessor())
    attention.to(hidden.dtype).load_state_dict(_weights(tensors))
    method = FreeSwim(3, base_grid=base, scale=c["attention_scale"], backend=backend)
    return {
        "out.mask": window_mask(grid, inward_window(grid, base)),
        "out.out": _through(method, (DUAL, "cond"), TokenLayout(grid), attention, hidden),
    }


def _agent(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    """The method inside diffusers' own transformer block, with the authors' weights and a plain feed-forward."""
    c, x, context = meta["config"], tensors["in.x"], tensors["in.context"]
    weights, dim = _weights(tensors), tensors["in.x"].shape[-1]
    model = nn.Module()
    block = BasicTransformerBlock(dim, c["heads"], c["head_dim"], cross_attention_dim=context.shape[-1])
    hidden = weights["ff.0.weight"].shape[0]
    block.ff = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))  # type: ignore[assignment]
    block.to(x.dtype).load_state_dict(weights)
    model.block = block
    got: dict[str, Any] = {}
    method = Agent(
        2,
        ratio=c["ratio"],
        agent_ratio=c["agent_ratio"],
        cell=(c["sy"], c["sx"]),
        early_steps=1.0,
        k_scale2=c["k_scale2"],
        k_shortcut=c["k_shortcut"],
        max_downsample=c["max_downsample"],
        compat="official",
        watch=lambda name, tensor: got.setdefault(f"out.{name}", tensor),
    )
    hook = AttentionHook(SimpleNamespace(frame=None), "block.attn1", 0, "image")  # type: ignore[arg-type]
    hook.links = (Link(method, 0),)
    hook.fn_ref = SimpleNamespace(original_forward=block.attn1.forward)
    hook.denoiser.frame = Frame(TokenLayout(tuple(c["grid"]), pyramid=True), StepContext(), (EARLY,))
    block.attn1.forward = lambda *args, **kwargs: hook.new_forward(block.attn1, *args, **kwargs)
    with torch.no_grad(), method.watching(model, ["block.attn1"]):
        got["out.block_out"] = block(x, encoder_hidden_states=context)
    return got


def _video_infinity(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str) -> dict[str, Any]:
    """All ranks' clips in one process; tests/test_generators_video_infinity.py has two processes."""
    c, hidden = meta["config"], tensors["in.hidden_states"]
    ranks, places, frames, dim = hidden.shape
    attention = Attention(dim, heads=c["heads"], dim_head=c["head_dim"]).to(hidden.dtype)
    attention.load_state_dict(_weights(tensors))
    names = {"t": "t", "local_biase": "local_bias", "global_biase": "global_bias"}
    moving = c["dynamic_scale"] or {}
    phases = {
        name: {names[key]: number for key, number in moving[name].items()}
        for name in ("local_phase", "global_phase")
        if name in moving
    }
    method = VideoInfinity(
        3,
        padding=c["padding"],
        top_k=c["top_k"],
        attn_scale=c["attn_scale"],
        token_num_scale=c["token_num_scale"],
        clips=ranks,
        compat="official",
        backend=backend,
        **phases,
    )
    phase = method.phase(StepContext(timestep=float(moving.get("t", 0.0))))
    video = hidden.transpose(0, 1).reshape(places, ranks * frames, dim)
    out = _through(method, phase, TokenLayout((ranks * frames, 1, 1)), attention, video)
    return {"out.out": out.view(places, ranks, frames, dim).transpose(0, 1)}
