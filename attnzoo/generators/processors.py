"""Methods for those who think in diffusers' processors: `model.set_attn_processor(processor(model, "gna", ...))`."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn

from attnzoo.errors import UnsupportedError
from attnzoo.generators.handles import Handle, enable

__all__ = ["processor"]


class _Token:
    """What the processors of one call share; when the last of them is gone, so is the method."""


def processor(model: nn.Module, method: str, **options: Any) -> dict[str, Any]:
    """The model's own processors by name, copies of which in the method's layers switch `method` on where they are set.

        plain = model.attn_processors
        model.set_attn_processor(attnzoo.generators.processor(model, "gna", kernel_size=8))
        model.set_attn_processor(plain)  # off again

    model: a diffusers model with `set_attn_processor`, which the result is bound to. method, options: as for `enable`.
    Projections, rotary embeddings and all else stay the model's; the copies only say in which layers the middleware
    of `enable` acts, and it acts as long as they are the modules' processors. The method is taken off the model
    when the last copy is gone. Raises what `enable` raises, and TypeError for a pipeline.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a diffusers model, got {type(model).__name__}; give its transformer or unet")
    own = getattr(model, "attn_processors", None)
    if not isinstance(own, dict) or not hasattr(model, "set_attn_processor"):
        raise UnsupportedError(f"{type(model).__name__} has no set_attn_processor: use attnzoo.generators.enable")
    handle: Handle = enable(model, method, **options)
    try:
        (part,) = handle.parts
        layers = [name for name in part.denoiser.names(part.method.roles) if name in part.schedule.layers]
        if missing := [name for name in layers if f"{name}.processor" not in own]:
            raise UnsupportedError(f"these layers have no processor to stand for them: {', '.join(missing[:3])}")
        token, made = _Token(), dict(own)
        for name in layers:
            made[f"{name}.processor"] = copy.copy(own[f"{name}.processor"])
            made[f"{name}.processor"].attnzoo_token = token
        part.denoiser.only_under(part.method, weakref.ref(token))
    except BaseException:
        handle.disable()
        raise
    weakref.finalize(token, handle.disable)
    return made
