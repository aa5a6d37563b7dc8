"""The methods by name, each a function of the text tower's config that gives its edits."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_args

from attnzoo.vlm.act import act
from attnzoo.vlm.decoding import DECODINGS
from attnzoo.vlm.edits import Edit
from attnzoo.vlm.gift import gift
from attnzoo.vlm.masks import eemllm, mma, moda, prefix
from attnzoo.vlm.pai import pai
from attnzoo.vlm.paint import paint
from attnzoo.vlm.pasta import pasta
from attnzoo.vlm.var import var
from attnzoo.vlm.vhr import vhr
from attnzoo.vlm.vif import vif
from attnzoo.vlm.zerotuning import zerotuning

METHODS: dict[str, Callable[..., tuple[Edit, ...]]] = {
    "pai": pai,
    "var": var,
    "gift": gift,
    "paint": paint,
    "pasta": pasta,
    "zerotuning": zerotuning,
    "act": act,
    "vif": vif,
    "vhr": vhr,
    "mma": mma,
    "eemllm": eemllm,
    "prefix": prefix,
    "moda": moda,
}

Named = str | tuple[str, dict[str, Any]] | Edit


def edits_of(text_config: Any, methods: Any, kwargs: dict[str, Any]) -> tuple[Edit, ...]:
    """The edits that names, pairs and edits stand for (see attnzoo.vlm.edit, which says what it raises)."""
    kinds = get_args(Edit)
    single = isinstance(methods, (str, *kinds)) or (
        isinstance(methods, tuple) and len(methods) == 2 and isinstance(methods[1], dict)
    )
    named: list[Any] = [methods] if single else _listed(methods)
    if kwargs and (not single or not isinstance(methods, str)):
        raise TypeError(f"arguments ({', '.join(kwargs)}) need one method, given by name; got {methods!r}")
    edits: list[Edit] = []
    for entry in named:
        if isinstance(entry, kinds):
            edits.append(entry)
            continue
        name, own = (entry, kwargs) if isinstance(entry, str) else _pair(entry)
        if name not in METHODS:
            names = (*METHODS, *DECODINGS)
            near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"methods must name some of {', '.join(map(repr, names))}, got {name!r}{hint}")
        accepted = [p for p in inspect.signature(METHODS[name]).parameters if p != "text_config"]
        for argument in own:
            if argument not in accepted:
                raise TypeError(f"{name!r} has no argument {argument!r}; it has {', '.join(accepted)}")
        edits.extend(METHODS[name](text_config, **own))
    return tuple(edits)


def _listed(methods: Any) -> list[Any]:
    if not isinstance(methods, Iterable):
        raise TypeError(f"methods must be a name, (name, arguments), an edit, or an iterable of these; got {methods!r}")
    named = list(methods)
    if not named:
        raise ValueError("methods must name at least one method, got none")
    return named


def _pair(entry: Any) -> tuple[str, dict[str, Any]]:
    if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], dict)):
        raise TypeError(f"methods must hold names, (name, arguments) pairs or edits, got {entry!r}")
    return entry
