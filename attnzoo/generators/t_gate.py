"""T-GATE: attention outputs kept over steps, and guidance dropped after a gate step.

Paper: Zhang et al., "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models" (arXiv:2404.02747).
Code: HaozheLiu-ST/T-GATE ab2a88f, tgate/SD.py and tgate_utils.py.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice, per_axis
from attnzoo.generators.chain import CROSS, SELF, Call, Layer, Method, Stage
from attnzoo.generators.forward import Forward, first_tensor, with_tensor
from attnzoo.generators.layout import StepContext, TokenLayout

_MEAN, _GATED = "mean", "gated"


class GateStep(NamedTuple):
    """What one step does. cross, own: "compute", "store" or "reuse" cross- and self-attention outputs; mean: what is
    stored is the mean of the branches; gated: guidance is over."""

    cross: str
    own: str
    mean: bool
    gated: bool


def gate_step_at(step: int, gate_step: int, sp_interval: int, fi_interval: int, warm_up: int) -> GateStep:
    """The official schedule (tgate_utils.py) at `step`; arguments as for `TGate`."""
    if step >= gate_step:
        return GateStep("reuse", "reuse" if step % fi_interval else "store", False, True)
    if step == gate_step - 1:
        return GateStep("store", "store", True, False)
    if step <= warm_up:
        return GateStep("compute", "store" if step == warm_up else "compute", False, False)
    return GateStep("compute", "reuse" if step % sp_interval else "store", False, False)


def gate_flags(total: int, gate_step: int, sp_interval: int, fi_interval: int, warm_up: int) -> Tensor:
    """bool [total, 5], the official flags: store cross, reuse cross, store self, reuse self, keep the batch's shape."""
    steps = [gate_step_at(i, gate_step, sp_interval, fi_interval, warm_up) for i in range(total)]
    return torch.tensor(
        [[s.cross == "store", s.cross == "reuse", s.own == "store", s.own == "reuse", not s.mean] for s in steps]
    )


class TGate(Method):
    """Up to the gate self-attention is recomputed every sp_interval steps; then text and guidance are settled.

    At step gate_step - 1 the mean over both branches of every attention's output is kept. From gate_step on
    cross-attention answers with it for good, self-attention is recomputed when step % fi_interval == 0, and the model
    sees one branch instead of two, whose prediction stands for both: the pipeline's own guidance then changes nothing.
    A batch of both branches is halved; of two calls the second (the unconditional) is answered by the first.

    gate_step: at least 1; sp_interval: of recomputing self-attention after step warm_up and before the gate;
    fi_interval: the same after it. In a joint sequence of text and picture the attention counts as self-attention, and
    only the pieces of the paper that it has apply. The step must be known, see `Handle.new_run`.
    compat: "official" keeps the NEGATIVE prompt's half after the gate, as the authors' code does; the default keeps the
    prompt's own. Where cross-attention is the text's only way in (Stable Diffusion, PixArt) both are the same, but
    SDXL's pooled prompt and size conditions, and joint sequences, would follow the negative prompt.
    Neutral: sp_interval=1 and a gate beyond the last step.
    """

    name: ClassVar[str] = "t_gate"
    stage: ClassVar[Stage] = Stage.REUSE
    roles: ClassVar[frozenset[str]] = SELF | CROSS

    def __init__(
        self,
        rank: int,
        *,
        gate_step: int = 10,
        sp_interval: int = 5,
        fi_interval: int = 1,
        warm_up: int = 2,
        compat: str | None = None,
    ) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        super().__init__(rank)
        (self.gate_step,) = per_axis("gate_step", gate_step, 1, low=1)
        (self.sp_interval,) = per_axis("sp_interval", sp_interval, 1, low=1)
        (self.fi_interval,) = per_axis("fi_interval", fi_interval, 1, low=1)
        (self.warm_up,) = per_axis("warm_up", warm_up, 1, low=0)
        check_choice("compat", compat, (None, "official"))
        self.compat = compat
        self._at: tuple[int, int] = (-1, -1)
        self._kept: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        self._of_calls: dict[str, set[str]] = {}
        self._answer: tuple[int, Any] | None = None  # the conditional call's output, for the unconditional one

    def settings(self) -> dict[str, Any]:
        return {
            "gate_step": self.gate_step,
            "sp_interval": self.sp_interval,
            "fi_interval": self.fi_interval,
            "warm_up": self.warm_up,
            "compat": self.compat,
        }

    def at(self, step: int) -> GateStep:
        """What the method does in `step`; what would never be read is not stored."""
        now = gate_step_at(step, self.gate_step, self.sp_interval, self.fi_interval, self.warm_up)
        interval = self.fi_interval if now.gated or now.mean else self.sp_interval
        return now._replace(own="compute") if now.own == "store" and interval == 1 else now

    def phase(self, ctx: StepContext) -> Hashable:
        if ctx.step is None:
            raise UnsupportedError(
                "t_gate needs to know the step: the model runs bare, or its scheduler has no step_index: "
                "call handle.new_run(total_steps) before each run"
            )
        return self.at(ctx.step)

    def denoise(self, forward: Forward, layout: TokenLayout, ctx: StepContext) -> Any:
        assert ctx.step is not None  # phase
        if ctx.run != self._at[0] or ctx.step < self._at[1]:
            self.forget()
        self._at = (ctx.run, ctx.step)
        if not self.at(ctx.step).gated:
            return forward()
        self._kept = {key: kept for key, kept in self._kept.items() if key[1].split(":")[0] in (_MEAN, _GATED)}
        if len(ctx.parts) > 1:
            branch = "uncond" if self.compat == "official" else "cond"
            output = forward(branch=f"{branch}:{_GATED}", **forward.part(branch))
            return with_tensor(output, torch.cat([first_tensor(output)] * len(ctx.parts)))
        if ctx.parts == ("uncond",):
            if self.compat == "official":
                raise UnsupportedError(
                    "t_gate: compat='official' keeps the negative prompt's branch, which this pipeline calls second"
                )
            if self._answer is not None and self._answer[0] == ctx.step:
                return self._answer[1]
        output = forward()
        if ctx.parts == ("cond",):
            self._answer = (ctx.step, with_tensor(output, first_tensor(output).detach()))
        return output

    def around(self, call: Call, layout: TokenLayout, ctx: StepContext, layer: Layer) -> Any:
        now: Any = layer.phase
        todo = now.cross if layer.role in CROSS else now.own
        if todo == "compute":
            return call()
        if todo == "reuse" and (kept := self._recall(layer.name, ctx.branch, now)) is not None:
            return kept if len(kept) > 1 else kept[0]
        output = call()
        if todo == "store":
            kept = tuple(t.detach() for t in (output if isinstance(output, tuple) else (output,)))
            if now.mean and len(ctx.parts) > 1:
                kept = tuple(torch.stack(t.chunk(len(ctx.parts))).mean(0) for t in kept)
            key = f"{_MEAN}:{ctx.branch}" if now.mean else _GATED if now.gated else ctx.branch
            self._kept[layer.name, key] = kept
            if now.mean:
                self._of_calls.setdefault(layer.name, set()).add(key)
        return output

    def _recall(self, layer: str, branch: str, now: GateStep) -> tuple[Tensor, ...] | None:
        """What is kept for this call; after the gate, the mean of the branches where nothing is newer."""
        if not now.gated:
            return self._kept.get((layer, branch))
        if layer in self._of_calls:  # stored by one call per branch: their mean is formed when it is first needed
            parts = [self._kept.pop((layer, key)) for key in self._of_calls.pop(layer)]
            self._kept[layer, _MEAN] = tuple(torch.stack(same).mean(0) for same in zip(*parts))
        return self._kept.get((layer, _GATED)) or self._kept.get((layer, _MEAN))

    def state_bytes(self) -> int:
        kept = [t for tensors in self._kept.values() for t in tensors]
        if self._answer is not None:
            kept.append(first_tensor(self._answer[1]))
        return sum(t.nbytes for t in kept)

    def forget(self) -> None:
        self._kept, self._of_calls, self._answer, self._at = {}, {}, None, (-1, -1)
