"""The floor of the generator room: methods around modules and around the model, other roles, moving latents."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from generator_models import FAMILIES, UNetLoop, build, is_clean, run
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.generators import enable, handles
from attnzoo.generators.chain import CROSS, MLP, SELF, Method, Stage
from attnzoo.generators.forward import first_tensor, with_tensor


class Spy(Method):
    """Counts at every depth and changes nothing."""

    name = "spy"
    stage = Stage.REUSE
    roles = SELF | CROSS | MLP

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.seen: list[tuple[Any, ...]] = []

    def settings(self) -> dict[str, Any]:
        return {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, layout: Any, ctx: Any, layer: Any, next: Any
    ):
        self.seen.append(("attend", layer.role, layer.name, query.shape[-2], key.shape[-2], layout))
        return next(query, key, value, mask)

    def around(self, call: Any, layout: Any, ctx: Any, layer: Any) -> Any:
        self.seen.append(("around", layer.role, layer.name, layer.index))
        return call()

    def denoise(self, forward: Any, layout: Any, ctx: Any) -> Any:
        self.seen.append(("denoise", ctx.branch, ctx.parts))
        return forward()

    def forget(self) -> None:
        self.seen = []


class Doubled(Spy):
    """Runs the first half of a guided batch only, under a branch of its own, and gives its result for both halves."""

    name = "doubled"

    def denoise(self, forward: Any, layout: Any, ctx: Any) -> Any:
        half = {
            name: given[: len(given) // 2] if isinstance(given, Tensor) and len(given) > 1 else given
            for name, given in forward.given.items()
        }
        output = forward(branch="uncond", **half)
        return with_tensor(output, torch.cat([first_tensor(output)] * 2))


class Blank(Spy):
    """Answers zero."""

    name = "blank"
    around = Method.around

    def attend(self, query: Any, key: Any, value: Any, mask: Any, layout: Any, ctx: Any, layer: Any, next: Any) -> Any:
        self.seen.append((ctx.branch, len(query), None if layout.padding is None else len(layout.padding)))
        return torch.zeros_like(query)


class Pushing(Spy):
    """Moves the latents by one in the model's units."""

    name = "pushing"
    moves_latents = True

    def denoise(self, forward: Any, layout: Any, ctx: Any) -> Any:
        forward.move_latents(torch.ones(1))
        return forward()


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> None:
    for spy in (Spy, Blank, Doubled, Pushing):
        monkeypatch.setitem(handles.METHODS, spy.name, spy)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_role_is_met_once_and_nothing_changes(name: str, spies: None) -> None:
    torch.manual_seed(0)
    case = build(name)
    case.model.eval()
    dense = run(case)
    with enable(case.model, "spy") as handle:
        (spy,) = handle.methods("spy")
        assert torch.equal(run(case), dense)
        seen = list(spy.seen)
        layers = handle.report()["denoisers"][0]["layers"]
    assert torch.equal(run(case), dense) and not spy.seen
    assert seen[0] == ("denoise", "all", ("all",))
    around = [entry for entry in seen if entry[0] == "around"]
    assert sorted(e[2] for e in around) == sorted(layers)
    attends = [entry for entry in seen if entry[0] == "attend"]
    assert {e[2] for e in attends} == {e[2] for e in around if e[1] != "mlp"}
    for _, role, _, queries, keys, layout in attends:
        assert keys == (layout.num_context if role == "cross" else queries)
    assert any(e[1] == "mlp" for e in around)
    assert is_clean(case.model)


def test_half_of_a_batch_in_a_branch_of_its_own(spies: None) -> None:
    torch.manual_seed(0)
    case = build("pixart")
    case.model.eval()
    dense = run(case)
    with enable(case.model, "doubled", guidance=True):
        out = run(case)
    half = len(dense) // 2
    assert torch.allclose(out[:half], dense[:half], atol=1e-6) and torch.equal(out[:half], out[half:])


@pytest.mark.parametrize("name", ["pixart", "hunyuan_video"])
def test_branches_of_one_batch_are_its_rows(name: str, spies: None) -> None:
    torch.manual_seed(0)
    case = build(name)
    rows = 4
    inputs = {
        key: torch.cat([given] * rows)[:rows] if isinstance(given, Tensor) else given
        for key, given in case.inputs.items()
    }
    case = case._replace(inputs=inputs)
    dense = run(case)
    with enable(case.model, "blank", branches="cond", guidance=True) as handle:
        out = run(case)
        (blank,) = handle.methods("blank")
        seen = {entry for entry in blank.seen if entry[0] != "denoise"}
        assert seen == {("cond", 2, 2 if name == "hunyuan_video" else None)}
    assert torch.allclose(out[:2], dense[:2], atol=1e-5) and not torch.allclose(out[2:], dense[2:], atol=1e-3)
    with enable(case.model, "blank", guidance=True):
        assert torch.allclose(run(case)[2:], out[2:], atol=1e-5)
    with enable(case.model, "spy", branches="cond", guidance=True), pytest.raises(UnsupportedError, match="told apart"):
        run(case)


def test_guidance_is_its_handles_word(spies: None) -> None:
    case = build("pixart")
    dense = run(case)
    first = enable(case.model, "spy")
    with enable(case.model, "blank", branches="cond", guidance=True):
        with pytest.raises(ValueError, match="another handle"):
            enable(case.model, "doubled", guidance=False)
        assert not torch.equal(run(case), dense)
    with enable(case.model, "blank", branches="cond"), pytest.raises(UnsupportedError, match="no single branch"):
        run(case)  # nobody says any more what the batch holds
    first.disable()
    assert torch.equal(run(case), dense) and is_clean(case.model)


def test_heads_mean_nothing_to_a_method_around_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Around(Spy):
        name = "around"
        attend = Method.attend

    monkeypatch.setitem(handles.METHODS, "around", Around)
    with pytest.raises(UnsupportedError, match="heads"):
        enable(build("dit").model, "around", heads=[0])


def test_latents_move_before_the_step_and_the_scheduler_comes_back(spies: None) -> None:
    unet = build("unet").model.eval()
    pipe = UNetLoop(unet, diffusers.EulerDiscreteScheduler())
    torch.manual_seed(1)
    start = torch.randn(1, unet.config.in_channels, 8, 8)
    text = torch.randn(1, 5, unet.config.cross_attention_dim)
    plain = pipe(start, text)
    with enable(pipe, "pushing"):
        assert "step" in vars(pipe.scheduler)
        pushed = pipe(start, text)
    assert "step" not in vars(pipe.scheduler) and torch.equal(pipe(start, text), plain)
    pipe.shift = True
    assert torch.allclose(pipe(start, text), pushed, atol=1e-4) and not torch.allclose(pushed, plain, atol=1e-2)
    with pytest.raises(UnsupportedError, match="pipeline"):
        enable(unet, "pushing")


def test_a_change_of_cancelled_latents_does_not_reach_the_next_run(spies: None) -> None:
    unet = build("unet").model
    pipe = UNetLoop(unet, diffusers.EulerDiscreteScheduler())
    torch.manual_seed(1)
    start = torch.randn(1, unet.config.in_channels, 8, 8)
    text = torch.randn(1, 5, unet.config.cross_attention_dim)
    with enable(pipe, "pushing"):
        pushed = pipe(start, text)
        hook = unet.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)  # after the latents were moved
        with pytest.raises(ZeroDivisionError):
            pipe(start, text)
        hook.remove()
        assert torch.equal(pipe(start, text), pushed)
