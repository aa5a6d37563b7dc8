"""How a text tower's attention comes to us: registered pairs, set for the tower alone and put back exactly.

Two pairs of names, `attnzoo_sdpa` and `attnzoo_eager`, are registered with transformers' AttentionInterface and
AttentionMaskInterface when the first edit opens, and stay: transformers has no public way to take a name back, and a
name that no config mentions does nothing. Without the mask half transformers drops padding masks silently.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnzoo.errors import SeamError, UnsupportedError
from attnzoo.vlm.state import Step

ARGUMENT = "attnzoo_step"
STOCK = ("sdpa", "eager")
LOCK = threading.RLock()

_edited_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_implementations: dict[int, list[Any]] = {}  # id(text config) -> [text config, what was there, how many sessions]


class Passed:
    """Travels in a Step's place where no edit applies to a call."""


PASSED = Passed()


def stock_attention(module: nn.Module, name: str) -> Callable[..., Any]:
    """transformers' own function `name` for this attention module, as its modelling file would pick it."""
    for cls in type(module).__mro__:
        file = sys.modules.get(cls.__module__)
        if name == "eager" and hasattr(file, "eager_attention_forward"):
            return file.eager_attention_forward  # type: ignore[union-attr]
        if name != "eager" and hasattr(file, "ALL_ATTENTION_FUNCTIONS"):
            return file.ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[union-attr]
    if name == "eager":
        raise SeamError(f"{type(module).__name__}'s modelling file has no eager_attention_forward")
    return ALL_ATTENTION_FUNCTIONS[name]


def _pair(name: str) -> Callable[..., Any]:
    dense = name == "eager"

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        step = kwargs.pop(ARGUMENT, None)
        stock = stock_attention(module, name)
        if not isinstance(step, Step):
            if step is None and module in _edited_modules:
                raise SeamError(
                    f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')} was called, but not through "
                    "the forward of the model that `edit` was given (or that model drops keyword arguments): nothing "
                    "would be edited"
                )
            return stock(module, query, key, value, attention_mask, **kwargs)
        layer = getattr(module, "layer_idx", None)
        if layer is None or not step.state.plan.get(layer):
            return stock(module, query, key, value, attention_mask, **kwargs)
        return step.attend(layer, module, stock, dense, query, key, value, attention_mask, **kwargs)

    return attention


def registered_name(stock: str) -> str:
    """The name that stands in for `stock`, registered with both of transformers' tables on first use."""
    name = f"attnzoo_{stock}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])
        AttentionInterface.register(name, _pair(stock))
    return name


def text_config_key(config: Any) -> str:
    """The name under which a model's config holds its text tower's config."""
    text = config.get_text_config()
    for key in config.sub_configs:
        if getattr(config, key, None) is text:
            return key
    raise UnsupportedError(
        f"the config of model_type {config.model_type!r} holds no text config of its own among "
        f"{sorted(config.sub_configs)}: is this a vision-language model?"
    )


def decoder_layers(model: Any) -> list[nn.Module]:
    """The text tower's decoder layers, in order. Raises UnsupportedError where they don't look as transformers' do."""
    text = model.config.get_text_config()
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and getattr(module, "config", None) is text:
            strange = [
                i
                for i, layer in enumerate(layers)
                if getattr(getattr(layer, "self_attn", None), "layer_idx", None) != i
            ]
            if strange:
                raise UnsupportedError(
                    f"{type(module).__name__} has layers without self-attention of their own: {strange}"
                )
            return list(layers)
    raise UnsupportedError(f"no decoder layers that belong to the text config were found in {type(model).__name__}")


def check_implementation(config: Any) -> str:
    """The stock implementation that the text tower runs on; raises UnsupportedError for one that edits don't serve."""
    name = config.get_text_config()._attn_implementation
    stock = (name or "").removeprefix("attnzoo_")
    if stock not in STOCK:
        raise UnsupportedError(
            f"the text tower runs on {name!r}; edits serve {', '.join(map(repr, STOCK))}: call "
            f"model.set_attn_implementation({{{text_config_key(config)!r}: 'sdpa'}}) first"
        )
    return stock


def acquire(model: Any) -> None:
    """Let the model's text tower, and nothing else, run on our pair; call with LOCK held."""
    text, key = model.config.get_text_config(), text_config_key(model.config)
    entry = _implementations.get(id(text))
    if entry is None:
        stock = check_implementation(model.config)
        name = registered_name(stock)
        model.set_attn_implementation({key: name})
        if text._attn_implementation != name:
            raise SeamError(
                f"set_attn_implementation left the text tower on {text._attn_implementation!r}, not on {name!r}"
            )
        entry = _implementations[id(text)] = [text, stock, 0]
    entry[2] += 1


def release(model: Any) -> None:
    """Undo one `acquire`; the last one puts back what was there. Call with LOCK held."""
    text, key = model.config.get_text_config(), text_config_key(model.config)
    entry = _implementations[id(text)]
    entry[2] -= 1
    if entry[2] == 0:
        del _implementations[id(text)]
        if text._attn_implementation == f"attnzoo_{entry[1]}":
            model.set_attn_implementation({key: entry[1]})


def mark(modules: list[nn.Module]) -> None:
    """These attention modules must not be reached without a step."""
    _edited_modules.update(modules)


def unmark(modules: list[nn.Module]) -> None:
    _edited_modules.difference_update(modules)
