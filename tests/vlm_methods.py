"""Every method's settings for the tiny random models: the catalogue's neutral ones and ones that change answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo import catalog
from attnzoo.vlm import METHODS
from attnzoo.vlm.edits import Prompt


def every_other(prompt: Prompt) -> Tensor:
    """Every other image token: for towers whose keys' norms can't choose."""
    return prompt.image & (prompt.image.cumsum(1) % 2 == 1)


# Tokens by number, for models whose vision tower has no CLS token.
SETS = {"local": (0, 2), "summary": (1, 3)}
EDITED: dict[str, dict[str, Any]] = {
    "pai": {"alpha": 0.5},
    "var": {"tau": 1.2, "layers": [1, 2, 3], "rho": 0.8, "summ": 0.02},
    "gift": {},
    "paint": SETS,
    "pasta": {"alpha": 0.05},
    "zerotuning": {"gamma": 0.2},
    "act": {"threshold": 0.08, "layers": [1, 2, 3], "beta": 0.1},
    "vif": {"alpha_middle": 0.4, "alpha_deep": 0.5, "inactive": every_other},
    "vhr": {},
    "mma": {},
    "eemllm": {},
    "prefix": {"scope": "image"},
    "moda": {"part": "cross"},
}
# Other ways of a method that run other code.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gift, saliency above": ("gift", {"saliency_layers": [2], "layers": [1, 3]}),
    "vhr, own stream": ("vhr", {"blind_stream": "own"}),
    "vhr, hidden image": ("vhr", {"blind_stream": "own", "blind": "hidden", "rows": "all"}),
    "eemllm, nothing": ("eemllm", {"sees": "nothing"}),
    "eemllm, text": ("eemllm", {"sees": "text"}),
    "prefix, prompt": ("prefix", {"scope": "prompt"}),
    "moda, self": ("moda", {"part": "self"}),
    "vif, relay tokens": ("vif", {"alpha_middle": 0.4, "relay_ratio": 0.3}),
    "act, prompt": ("act", {**EDITED["act"], "compat": "official"}),
    "pasta, heads by layer": ("pasta", {"heads": {1: [0, 3], 3: [2]}, "alpha": 0.02, "tokens": "question"}),
}
CASES = {**{name: (name, own) for name, own in EDITED.items()}, **VARIANTS}
assert set(EDITED) == set(METHODS)


def neutral(method: str) -> dict[str, Any]:
    """The method's arguments that reproduce the plain model, from its row in the catalogue."""
    given = EDITED[method] if method in ("var", "act", "vif") else {}
    return {**(SETS if method == "paint" else {}), **given, **catalog.get(method).neutral}
