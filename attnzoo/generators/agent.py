"""Agent attention in a pretrained Stable Diffusion, without training.

Paper: Han et al., "Agent Attention", ECCV 2024, arXiv:2312.08874, section 5.3. Code: LeapLabTHU/Agent-Attention
207ce3e (agentsd/; licence not verified). The mathematics is `attnzoo.backbones.blocks.agent_sd`, which says what
differs from the authors' code; here it acts on a diffusers model.

    tokens = ToMe merge of the attention's input at `ratio`; agents = the same at `agent_ratio`
    out    = unmerge(to_out(softmax(q A^T scale^k_scale2) softmax(A k^T scale) v + k_shortcut v)),  A = to_q(agents)

Where the agents are not fewer than half of the tokens, plain attention of the merged tokens. Merged is by the cosine
similarity of the block's input (before its norm1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnzoo.errors import UnsupportedError, check_choice, check_number, check_range, per_axis
from attnzoo.generators.chain import SELF, Call, Layer, Method, Next, Stage
from attnzoo.generators.forward import Forward
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.kernels import pooled_attention

EARLY, LATE = "early", "late"


class Agent(Method):
    """Merged tokens and agents in the self-attentions of the highest resolution; needs timm (`attnzoo.backbones`).

    ratio: merged share of the tokens. agent_ratio, cell: of the first steps, the agents' merged share and the cell of
        which one token stays a destination, one number or (sy, sx); late_agent_ratio, late_cell: of the other steps.
    early_steps: share of the steps that are the first ones (the authors': 20 of 50). 1.0 makes the step not matter.
    k_scale2: power of the second softmax's scale. k_shortcut: share of the values that is added.
    max_downsample: layers whose maps are further reduced from the latents stay whole.
    seed: chooses a random destination in each cell, another one per layer and step (the authors' use_rand); None: the
        top left one. compat: of `TokenMerge`.
    watch: called with a name and a tensor: "normed" (the attention's input), "merged", "agent", "attn1_out",
        "unmerged".

    The defaults are the authors' two phases, in the second of which the agents are too many and are not used.
    ratio=0.0 with both agent ratios 0.0 is neutral. Models with rotary embeddings or text in the sequence: refused by
    name (a merged token has no place). Corrected against the authors' diffusers branch, which is broken: the phases
    follow the step by themselves, and nothing stays behind.
    """

    name: ClassVar[str] = "agent"
    stage: ClassVar[Stage] = Stage.KERNEL
    roles: ClassVar[frozenset[str]] = SELF

    def __init__(
        self,
        rank: int,
        *,
        ratio: float = 0.4,
        agent_ratio: float = 0.95,
        cell: int | Sequence[int] = 4,
        late_agent_ratio: float = 0.5,
        late_cell: int | Sequence[int] = 2,
        early_steps: float = 0.4,
        k_scale2: float = 0.3,
        k_shortcut: float = 0.075,
        max_downsample: int = 1,
        seed: int | None = None,
        compat: str = "default",
        watch: Callable[[str, Tensor], Any] | None = None,
    ) -> None:
        """rank: axes of the model's grid, 2. Raises TypeError, ValueError or UnsupportedError, naming the argument."""
        super().__init__(rank)
        if rank != 2:
            raise UnsupportedError(f"agent merges tokens of an image, this model's grid has {rank} axes")
        shares = {
            "ratio": ratio,
            "agent_ratio": agent_ratio,
            "late_agent_ratio": late_agent_ratio,
            "early_steps": early_steps,
        }
        for name, share in shares.items():
            check_number(name, share)
            check_range(name, share, 0.0, 1.0)
        check_number("k_scale2", k_scale2)
        check_number("k_shortcut", k_shortcut)
        per_axis("max_downsample", max_downsample, 1, low=1)
        if seed is not None and type(seed) is not int:
            raise TypeError(f"seed must be int or None, got {type(seed).__name__}")
        check_choice("compat", compat, ("default", "official"))
        if watch is not None and not callable(watch):
            raise TypeError(f"watch must be callable, got {type(watch).__name__}")
        self.ratio, self.early_steps = ratio, early_steps
        self.phases = {
            EARLY: (agent_ratio, per_axis("cell", cell, 2, low=1)),
            LATE: (late_agent_ratio, per_axis("late_cell", late_cell, 2, low=1)),
        }
        self.k_scale2, self.k_shortcut, self.max_downsample = k_scale2, k_shortcut, max_downsample
        self.seed, self.compat, self.watch = seed, compat, watch
        from attnzoo.backbones.blocks.agent_sd import TokenMerge  # timm, which the rest of this room does not need

        self._merge = TokenMerge
        self._inputs: dict[str, Tensor] = {}  # of the blocks, within one forward
        self._agents: Tensor | None = None  # [B, A, heads, head_dim], within one module's call

    def settings(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "agent_ratio": self.phases[EARLY][0],
            "cell": self.phases[EARLY][1],
            "late_agent_ratio": self.phases[LATE][0],
            "late_cell": self.phases[LATE][1],
            "early_steps": self.early_steps,
            "k_scale2": self.k_scale2,
            "k_shortcut": self.k_shortcut,
            "max_downsample": self.max_downsample,
            "seed": self.seed,
            "compat": self.compat,
        }

    def density(self, layout: TokenLayout) -> float:
        """On a layer that is acted on; deeper levels than max_downsample stay dense."""
        count = layout.num_grid
        shares = {}
        for phase, (agent_ratio, (sy, sx)) in self.phases.items():
            height, width = layout.grid
            sources = count - (height // sy) * (width // sx)
            tokens = count - min(sources, int(count * self.ratio))
            agents = count - min(sources, int(count * agent_ratio))
            shares[phase] = min(2 * agents * tokens, tokens**2) / count**2
        return self.early_steps * shares[EARLY] + (1 - self.early_steps) * shares[LATE]

    def reaches(self, grid: tuple[int, ...], whole: tuple[int, ...]) -> bool:
        return math.ceil(math.sqrt(math.prod(whole) // math.prod(grid))) <= self.max_downsample

    def phase(self, ctx: StepContext) -> Hashable:
        if self.early_steps in (0.0, 1.0):
            return EARLY if self.early_steps else LATE
        if ctx.step is None or ctx.total is None:
            raise UnsupportedError(
                "agent has two phases and needs to know the step: call handle.new_run(total_steps) before each run, or "
                "set early_steps to 0.0 or 1.0"
            )
        return EARLY if ctx.step < self.early_steps * ctx.total else LATE

    @contextmanager
    def watching(self, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """Within the block, the inputs of the blocks around the attentions `names` are known."""
        hooks = []
        try:
            for name in names:
                block = model.get_submodule(name.rpartition(".")[0])
                norm = getattr(block, "norm1", None)
                if isinstance(norm, nn.Module):
                    hooks.append(norm.register_forward_pre_hook(_Keep(self._inputs, name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._inputs.clear()
            self._agents = None

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        layers = forward.layers(self)
        reached = [name for name, grid in layers.items() if self.reaches(grid, layout.grid)]
        if not reached:
            finest = min(math.prod(layout.grid) // math.prod(grid) for grid in layers.values())
            wanted = math.ceil(math.sqrt(finest))
            raise UnsupportedError(
                f"agent reaches none of its {len(layers)} layers: the finest sees {1 / finest:.3g} of the latents' "
                f"places (SDXL has no attention at full resolution); set max_downsample to {wanted}"
            )
        with self.watching(forward.model, reached):
            return forward()

    def around(self, call: Call, layout: TokenLayout, ctx: StepContext, layer: Layer) -> Any:
        hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
        if layer.role != "image" or layout.num_text or call.kwargs.get("image_rotary_emb") is not None:
            raise UnsupportedError(
                f"{layer.name}: agent merges tokens, and a merged one has no place for a rotary embedding or beside "
                "text: it is for models such as Stable Diffusion's UNets"
            )
        own = layout.for_layer(layer.role, hidden.shape[1], layer.name)
        if own is None:
            raise UnsupportedError(f"{layer.name}: agent wants the layout's tokens, got {hidden.shape[1]}")
        agent_ratio, (sy, sx) = self.phases[layer.phase if layer.phase in self.phases else self.phase(ctx)]  # type: ignore
        height, width = own.grid
        if not self.reaches(own.grid, layout.grid) or (self.ratio == 0.0 and agent_ratio == 0.0):
            return call()
        merge = self._merge(
            self._inputs.pop(layer.name, hidden),
            height,
            width,
            self.ratio,
            agent_ratio,
            min(sy, height),
            min(sx, width),
            generator=self._generator(ctx, layer),
            compat=self.compat,
        )
        tokens, agents = merge.merge(hidden)
        if agents is not None:
            self._agents = call.module.to_q(agents).unflatten(-1, (call.module.heads, -1))
        try:
            kwargs = {} if call.args else {"hidden_states": tokens}
            args = (tokens,) if call.args else ()
            out = call(*args, layout=replace(own, grid=(tokens.shape[1],), pyramid=False), **kwargs)
        finally:
            self._agents = None
        whole = merge.unmerge(out)
        if self.watch is not None:
            seen = {"normed": hidden, "merged": tokens, "agent": agents, "attn1_out": out, "unmerged": whole}
            for name, tensor in seen.items():
                if tensor is not None:
                    self.watch(name, tensor)
        return whole

    def _generator(self, ctx: StepContext, layer: Layer) -> torch.Generator | None:
        if self.seed is None:
            return None
        return torch.Generator().manual_seed((self.seed * 100_003 + (ctx.step or 0)) * 10_007 + layer.index)

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
        agents = self._agents
        if agents is None:
            return next(query, key, value, mask)
        if mask is not None:
            raise UnsupportedError(f"{layer.name}: agent has no attention mask")
        scale = query.shape[-1] ** -0.5 if layer.scale is None else layer.scale
        out = pooled_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            agents,
            scale,
            query_scale=scale**self.k_scale2,
        )
        return out.transpose(1, 2) + self.k_shortcut * value


class _Keep:
    """A forward pre-hook that keeps the module's first argument under a name."""

    def __init__(self, kept: dict[str, Tensor], name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            self.kept[self.name] = args[0]
