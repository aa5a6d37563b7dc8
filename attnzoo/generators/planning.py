"""What a method would save, told before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from attnzoo.errors import UnsupportedError, check_choice, per_axis
from attnzoo.generators.handles import METHODS, find_targets
from attnzoo.generators.interception import self_attentions
from attnzoo.generators.layout import TokenLayout
from attnzoo.generators.schedule import choose_layers


def plan(
    pipe_or_model: Any,
    method: str,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int = 1,
    num_text: int = 0,
    grid: Sequence[int] | None = None,
    layers: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Grid, density and attention work of `method` at one output size; nothing is switched on, no tensor is made.

    height, width, num_frames: of the output in pixels and frames for a pipeline; in latent pixels and latent frames,
    as the model takes them, for a bare model. grid: tokens per axis instead of them.
    num_text: text tokens in the joint sequence (Flux 512, say); families whose text is read by cross-attention have 0.
    layers, options: as for `enable`.

    Returns, for the first denoiser: "model", "grid"; "window_density": mean share of the grid that a token of the grid
    sees on the finest layer; "density": computed query-key pairs of the chosen layers over all pairs, text included;
    "attention_flops", "attention_flops_dense": multiply-adds times two of QK^T and PV, per sample and forward, all
    self-attentions of the model; "flops_ratio": the second over the first, a bound on the speed-up of attention.

    Raises TypeError, ValueError or UnsupportedError as `enable` does.
    """
    target = find_targets(pipe_or_model)[0]
    family = target.family
    check_choice("method", method, sorted(METHODS))
    made = METHODS[method](family.rank, **options)
    if grid is not None:
        shape = per_axis("grid", grid, family.rank, low=1)
    else:
        if height is None or width is None:
            raise ValueError(f"give height and width, or grid; got height={height!r}, width={width!r}")
        per_axis("num_frames, height, width", (num_frames, height, width), 3, low=1)
        shape = family.latent_grid(*_latent(pipe_or_model, num_frames, height, width))
        if min(shape) < 1:
            raise ValueError(f"height={height}, width={width}, num_frames={num_frames} leave no tokens: grid {shape}")
    if num_text and family.text == "none":
        raise ValueError(f"num_text must be 0, {type(target.model).__name__} has no text in self-attention")
    modules = self_attentions(target.model, family)
    chosen = choose_layers(layers, list(modules))
    dense = computed = pairs = seen = 0.0
    for name, (module, role) in modules.items():
        own = family.grid_at(name, shape)
        joint = role == "joint"
        text = (num_text, family.text) if joint else (0, "none")
        layout = TokenLayout(own, *text, family.filling(own))
        share = made.density(layout) if name in chosen and made.reaches(own, shape) else 1.0
        flops = 4.0 * layout.length**2 * _width(module)
        dense, computed = dense + flops, computed + share * flops
        if name in chosen:
            pairs, seen = pairs + layout.length**2, seen + share * layout.length**2
    return {
        "model": type(target.model).__name__,
        "grid": shape,
        "window_density": made.density(TokenLayout(shape)),
        "density": seen / pairs,
        "attention_flops": computed,
        "attention_flops_dense": dense,
        "flops_ratio": dense / computed,
    }


def _latent(pipe_or_model: Any, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, height and width of an output; a bare model's are latent already."""
    if isinstance(pipe_or_model, nn.Module):
        return frames, height, width

    def ratio(*names: str) -> int | None:
        return next((int(getattr(pipe_or_model, n)) for n in names if getattr(pipe_or_model, n, None)), None)

    space = ratio("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    time = ratio("vae_scale_factor_temporal", "vae_temporal_compression_ratio") or 1
    vae = getattr(pipe_or_model, "vae", None)
    if space is None:
        channels = None if vae is None else getattr(vae.config, "block_out_channels", None)
        if vae is not None and channels is None:
            raise UnsupportedError(f"{type(pipe_or_model).__name__} does not tell its VAE's scale: pass grid=")
        space = 1 if channels is None else 2 ** (len(channels) - 1)  # no VAE: latents are pixels
    return (frames - 1) // time + 1, height // space, width // space


def _width(module: nn.Module) -> int:
    """heads * head_dim of a self-attention."""
    return int(getattr(module, "inner_dim", 0)) or int(module.to_q.out_features)  # type: ignore[union-attr, arg-type]
