"""Perturbed-attention guidance, whole or soft, on chosen heads, in both meanings that it has for joint attention.

Papers: Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance" (arXiv:2403.17377, ECCV
2024); Ahn et al., "Fine-Grained Perturbation Guidance via Attention Head Selection" (arXiv:2506.10978, 2025), whose
SoftPAG and HeadHunter came without code. Code of the end points: diffusers 0.42.1, PAG processors and guider.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.errors import UnsupportedError, check_choice, check_number, check_range
from attnzoo.generators.chain import Layer, Method, Next, Stage
from attnzoo.generators.forward import Forward, first_tensor, with_tensor
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.schedule import shorten
from attnzoo.kernels import edited_attention, merge_attentions
from attnzoo.kernels.edited_attention import Visibility

VARIANTS = ("identity", "masked")
_PERTURBED = "perturbed"


def identity_attention(query: Tensor, value: Tensor) -> Tensor:
    """What the identity map gives: every token its own value. query [B, heads, N, D], value [B, kv_heads, N, Dv]."""
    if value.shape[-2] != query.shape[-2]:
        raise ValueError(f"value must have query's {query.shape[-2]} tokens, got {value.shape[-2]}")
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layout: TokenLayout, scale: float | None = None
) -> Tensor:
    """Attention in which a token of the picture (references included) sees itself and the text, and text sees all.

    query, key, value: [B, heads, N, head_dim] in the layout's order; mask: as for SDPA. No N x N matrix is formed.
    """
    if not layout.num_text:
        return identity_attention(query, value)
    first, total = layout.text == "first", query.shape[-2]
    text = slice(0, layout.num_text) if first else slice(total - layout.num_text, total)
    image = slice(layout.num_text, total) if first else slice(0, total - layout.num_text)
    seen = rows = None
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], total, total)
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        seen, rows = mask[..., image, text], mask[..., text, :]
    q = query[:, :, image]
    own_key, own_value = (t[:, :, image].repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    to_text, lse = edited_attention(
        q.transpose(1, 2),
        key[:, :, text].transpose(1, 2),
        value[:, :, text].transpose(1, 2),
        Visibility(is_causal=False, mask=seen),
        scale,
        return_lse=True,
    )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    logit = (q.to(lse.dtype) * own_key.to(lse.dtype)).sum(-1).transpose(1, 2) * factor
    picture, _ = merge_attentions([to_text, own_value.transpose(1, 2)], [lse, logit])
    words = F.scaled_dot_product_attention(query[:, :, text], key, value, rows, scale=scale, enable_gqa=True)
    parts = [words, picture.transpose(1, 2)]
    return torch.cat(parts if first else parts[::-1], dim=2)


def soften(out: Tensor, perturbed: Tensor, strength: float) -> Tensor:
    """(1 - strength) out + strength perturbed: A' = (1 - u) A + u I needs the map's output only, not the map."""
    return out if strength == 0 else perturbed if strength == 1 else torch.lerp(out, perturbed, strength)


def perturbed_guidance(
    cond: Tensor, perturbed: Tensor, scale: float, uncond: Tensor | None = None, guidance_scale: float = 1.0
) -> Tensor:
    """uncond + guidance_scale (cond - uncond) + scale (cond - perturbed); without `uncond`, cond takes its place."""
    guided = cond if uncond is None else uncond + guidance_scale * (cond - uncond)
    return guided + scale * (cond - perturbed)


class SoftPAG(Method):
    """Steers away from what the model would predict with its attention maps pushed towards the identity.

    An extra conditional forward runs with the maps of the chosen layers and heads at A' = (1 - strength) A +
    strength I, and scale (cond - perturbed) is added to the prediction: to both branches, so that the pipeline's own
    guidance, of any weight, goes on unchanged. A pipeline without guidance (distilled) gets it on its one branch.

    scale: of the perturbed guidance; 0 is neutral (no extra forward). strength: u in 0 to 1; 1 is PAG.
    variant: the end point of joint text and image attention, which diffusers has twice: "identity": every token, text
    too, gets its own value (diffusers' guider); "masked": a token of the picture sees itself and all text, text sees
    all (diffusers' PAGJointAttnProcessor). Without text in the sequence both are the same.
    selection: {layer name: heads}, as `head_hunter` returns it; layers that it does not name stay as they are. None:
    all heads of the layers. Which layers matters: PAG's authors perturb "mid_block*" of Stable Diffusion.

    With two calls per step the conditional one must come first. The interior of strength has no official code: it is
    tested by its ends and its linearity.
    """

    name: ClassVar[str] = "soft_pag"
    stage: ClassVar[Stage] = Stage.POST_MIX

    def __init__(
        self,
        rank: int,
        *,
        scale: float = 3.0,
        strength: float = 1.0,
        variant: str = "identity",
        selection: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        check_number("scale", scale)
        check_number("strength", strength)
        check_range("strength", strength, 0, 1)
        check_choice("variant", variant, VARIANTS)
        self.scale, self.strength, self.variant = scale, strength, variant
        self.selection = None if selection is None else _checked(selection)
        self._shift: tuple[tuple[int, int | None], Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "strength": self.strength,
            "variant": self.variant,
            "selection": self.selection,
        }

    def check_layers(self, names: Collection[str]) -> None:
        if unknown := [name for name in self.selection or () if name not in names]:
            raise ValueError(
                f"selection names {unknown}, which are not among the chosen self-attentions: {shorten(list(names))}"
            )

    def phase(self, ctx: StepContext) -> Hashable:
        if ctx.branch.endswith(f":{_PERTURBED}"):
            return _PERTURBED
        return self.scale != 0 and "plain"

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        output = forward()
        if self.scale == 0:
            return output
        plain = first_tensor(output)
        at = (ctx.run, ctx.step)
        if ctx.parts == ("uncond",):
            if self._shift is None or self._shift[0] != at:
                raise UnsupportedError(
                    "soft_pag: the unconditional call came before the step's conditional one, whose guidance it needs: "
                    "run the conditional call first, or leave the pipeline's own guidance off"
                )
            shift, self._shift = self._shift[1], None
            return with_tensor(output, plain + shift)
        several = len(ctx.parts) > 1
        branch = "cond" if several else ctx.branch
        own = forward.part(branch) if several else {}
        perturbed = first_tensor(forward(branch=f"{branch}:{_PERTURBED}", **own))
        cond = plain.chunk(len(ctx.parts))[ctx.parts.index("cond")] if several else plain
        shift = self.scale * (cond - perturbed)
        latents = forward.given.get(forward.latents_name)
        if isinstance(latents, Tensor) and shift.ndim > 3 and shift.shape[1] == 2 * latents.shape[1]:
            shift[:, latents.shape[1] :] = 0  # a learned variance is not guided
        if ctx.parts == ("cond",):
            self._shift = (at, shift.detach())
        return with_tensor(output, plain + torch.cat([shift] * len(ctx.parts)))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: TokenLayout,
        ctx: StepContext,
        layer: Layer,
        next: Next,
    ) -> Tensor:
        heads = None if self.selection is None else self.selection.get(layer.name, ())
        if layer.phase != _PERTURBED or heads == ():
            return next(query, key, value, mask)
        if value.shape[-2] != query.shape[-2]:
            raise UnsupportedError(
                f"{layer.name}: soft_pag mixes in each token's own value, and another method changed them: "
                f"{query.shape[-2]} queries, {value.shape[-2]} values; choose other layers for one of the two"
            )
        if heads is not None and max(heads) >= query.shape[1]:
            raise UnsupportedError(f"selection: {layer.name} has {query.shape[1]} heads, got {list(heads)}")
        if self.strength == 1 and heads is None:
            return self._perturbed(query, key, value, mask, layout, layer)
        out = next(query, key, value, mask)
        mixed = soften(out, self._perturbed(query, key, value, mask, layout, layer), self.strength)
        if heads is None:
            return mixed
        chosen = torch.zeros(query.shape[1], dtype=torch.bool, device=query.device)
        chosen[list(heads)] = True
        return torch.where(chosen[:, None, None], mixed, out)

    def _perturbed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: TokenLayout,
        layer: Layer,
    ) -> Tensor:
        if self.variant == "identity":
            return identity_attention(query, value)
        return masked_attention(query, key, value, mask, layout, layer.scale)

    def state_bytes(self) -> int:
        return 0 if self._shift is None else self._shift[1].nbytes

    def forget(self) -> None:
        self._shift = None


def _checked(selection: Any) -> dict[str, tuple[int, ...]]:
    """`selection` with sorted heads. Raises TypeError or ValueError where it is no {name: head indices}."""
    if not isinstance(selection, Mapping):
        raise TypeError(f"selection must be {{layer name: heads}}, got {type(selection).__name__}")
    found = {}
    for name, heads in selection.items():
        if not isinstance(name, str) or not isinstance(heads, Collection) or any(type(h) is not int for h in heads):
            raise TypeError(f"selection must map layer names to head indices, got {name!r}: {heads!r}")
        if heads and min(heads) < 0:
            raise ValueError(f"selection must hold head indices from 0, got {name!r}: {heads!r}")
        found[name] = tuple(sorted(set(heads)))
    return found
