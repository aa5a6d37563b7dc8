"""What a session knows about one prompt and the answer that follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.vlm.attention import group_sizes
from attnzoo.vlm.edits import Plan, Prompt, Regroup


@dataclass(eq=False)
class CallState:
    """One prompt (in one forward or in chunks) and the answer that follows it, bound to the cache that holds them.

    Everything here is about prompt positions, padding included; positions behind the prompt are plain text.
    """

    plan: Plan
    sessions: tuple[Any, ...]
    prompt: int = 0
    image: Tensor | None = None  # bool [B, prompt]
    real: Tensor | None = None  # bool [B, prompt], False at padding
    image_end: list[int] = field(default_factory=list)  # behind the last image token, 0 where there is none
    ids: Tensor | None = None  # int64 [B, prompt]
    groups: dict[int, Tensor] = field(default_factory=dict)  # layer -> uint8 [B, prompt] or [B, H, prompt]
    sizes: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, G] or [B, H, G]
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: dict[Any, Any] = field(default_factory=dict)
    flags: dict[Any, Tensor] = field(default_factory=dict)  # what functions of the prompt said, forgotten by `extend`

    @property
    def facts(self) -> Prompt:
        assert self.image is not None and self.real is not None
        return Prompt(self.image, self.real, self.ids, self.image_end, self.notes)

    def known(self, key: Any, function: Callable[[], Tensor]) -> Tensor:
        """What `function` says about the prompt, asked once for each length of it."""
        if key not in self.flags:
            self.flags[key] = function()
        return self.flags[key]

    def extend(
        self, past: int, image: Tensor, real: Tensor, whole: Tensor | None = None, ids: Tensor | None = None
    ) -> None:
        """Prompt positions past .. past + n - 1 are these, [B, n]; whatever was known behind `past` is forgotten.

        whole: the image tokens of the whole prompt, where chunks of it are still to come.
        """
        if past:
            image = torch.cat([self.before(self.image, past, False), image], 1)
            real = torch.cat([self.before(self.real, past, True), real], 1)
            if ids is not None and self.ids is not None:
                ids = torch.cat([self.before(self.ids, past, -1), ids], 1)
        self.ids = ids
        self.flags = {}
        self.image, self.real, self.prompt = image, real, image.shape[1]
        known = image if whole is None else whole
        place = torch.arange(1, known.shape[1] + 1, device=known.device)
        self.image_end = (known * place).amax(1).tolist()

    def select(self, sequences: Tensor) -> CallState:
        """What is known about these sequences [S] of the prompt, for a cache that holds them alone."""
        rows = len(self.real) if self.real is not None else 0

        def own(known: Any) -> Any:
            if isinstance(known, dict):
                return {key: own(value) for key, value in known.items()}
            if isinstance(known, Tensor) and known.ndim and len(known) == rows:
                return known[sequences.to(known.device)]
            return known

        return replace(
            self,
            image=own(self.image),
            real=own(self.real),
            image_end=[self.image_end[i] for i in sequences.tolist()],
            ids=own(self.ids),
            groups=own(self.groups),
            sizes=own(self.sizes),
            memory=own(self.memory),
            notes=own(self.notes),
            flags=own(self.flags),
        )

    @staticmethod
    def before(known: Tensor | None, past: int, fill: bool | int) -> Tensor:
        """The first `past` columns of `known` [B, n], filled up where it has fewer (generated tokens)."""
        assert known is not None
        missing = max(0, past - known.shape[-1])
        return nn.functional.pad(known[..., :past], (0, missing), value=fill)

    def observe(self, layer: int, edit: Regroup, hidden_states: Tensor, past: int, stop: int) -> None:
        """Assign the layer's prompt positions past .. stop - 1 to groups, from their residual stream [B, n, C]."""
        assert self.image is not None and self.real is not None
        memory = self.memory.setdefault(layer, {})
        image, real = (t[:, past:stop].to(hidden_states.device) for t in (self.image, self.real))
        own = edit.assign(hidden_states, image, real, memory).to(torch.uint8)
        groups = torch.cat([self.before(self.groups[layer], past, 0), own], 1) if past else own
        self.groups[layer] = groups
        self.sizes[layer] = group_sizes(groups, edit.num_groups)
