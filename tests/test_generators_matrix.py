"""Every method on every family: served (on differs, off is exact, an exception leaves no trace) or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from generator_models import FAMILIES, Case, build, is_clean, run

from attnzoo import catalog, generators
from attnzoo.errors import UnsupportedError

#: Settings that work on tiny models; a method's own tests hold what it computes.
SETTINGS: dict[str, dict[str, Any]] = {
    "adaspa": {"sparsity": 0.5, "search_steps": (0,), "block_size": 4},
    "agent": {"early_steps": 1.0},
    "aligned_gen": {},
    "attention_regulation": {"target_ids": [1], "eos_id": 3, "max_iter": 2},
    "bounded_attention": {},
    "conform": {},
    "ditctrl": {"start_step": 0},
    "freecus": {"subject": [1, 2]},
    "freeswim": {"base_grid": (3, 3), "dual": False},
    "gna": {"kernel_size": 2},
    "ms_diffusion": {},
    "pab": {},
    "paro": {"record": "order"},
    "rf_edit": {"inject_step": 1},
    "seer": {},
    "soft_pag": {},
    "sparge": {"topk": 0.4, "block_size": 4},
    "style_aligned": {},
    "t_gate": {},
    "video_infinity": {"padding": 1, "top_k": 1},
}
#: Need what a bare model does not have (a pipeline, weights, recorded passes): whole in their own files.
ELSEWHERE = {
    "bounded_attention": "test_layout_guidance.py",
    "conform": "test_conform.py",
    "freecus": "test_generators_editing.py",
    "ms_diffusion": "test_ms_diffusion.py",
    "paro": "test_generators_search.py",
    "rf_edit": "test_generators_editing.py",
    "seer": "test_generators_sparse.py",
}
HERE = sorted(set(SETTINGS) - set(ELSEWHERE))


ALL = frozenset(FAMILIES)
#: Which families each method serves; the others it refuses by name.
SERVED: dict[str, frozenset[str]] = {
    "adaspa": ALL,
    "agent": frozenset({"pixart", "dit", "unet"}),
    "aligned_gen": frozenset({"flux", "flux2"}),
    "attention_regulation": frozenset({"pixart", "unet"}),
    "ditctrl": frozenset({"flux", "sd3", "cogvideox", "flux2"}),
    "freeswim": ALL,
    "gna": ALL,
    "pab": ALL,
    "soft_pag": ALL,
    "sparge": ALL,
    "style_aligned": ALL - {"mochi"},
    "t_gate": ALL,
    "video_infinity": frozenset({"wan", "hunyuan_video", "cogvideox", "ltx", "qwen_image", "mochi", "cosmos"}),
}


#: Reuse what earlier steps made: at the first step they are the plain model, and act in their own files.
LATER = {"adaspa", "pab", "t_gate"}
#: So few frames that the method's window holds them all.
WHOLE = {("video_infinity", "ltx"), ("video_infinity", "qwen_image")}


def pair(name: str) -> Case:
    """At least two different samples, as methods that share between samples need."""
    torch.manual_seed(0)
    case = build(name)
    if name != "cogvideox":
        return case
    inputs = {
        name: torch.cat([given, given.roll(1, -1)]) if isinstance(given, Tensor) and len(given) == 1 else given
        for name, given in case.inputs.items()
    }
    return case._replace(inputs=inputs)


def test_no_method_is_forgotten() -> None:
    assert set(SETTINGS) == set(generators.METHODS), "a row of settings for every method, or a file of its own"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HERE)
def test_served_or_refused(name: str, family: str) -> None:
    case = pair(family)
    dense = run(case)
    served = family in SERVED[name]
    try:
        handle = generators.enable(case.model, name, **SETTINGS[name])
    except UnsupportedError as error:
        assert not served and (name in str(error) or type(case.model).__name__ in str(error) or "axes" in str(error))
        assert is_clean(case.model)
        return
    with handle:
        handle.new_run(4)
        try:
            on = run(case)
        except UnsupportedError:
            on = None
        assert (on is not None) == served, f"{name} on {family}"
        if on is not None:
            assert bool(on.isfinite().all())
            with pytest.raises(ValueError, match="already"):
                generators.enable(case.model, name, **SETTINGS[name])
            assert name in LATER or torch.equal(on, dense) == ((name, family) in WHOLE), f"{name} on {family}"
            last = [m for m in case.model.modules() if isinstance(m, torch.nn.Linear)][-1]
            hook = last.register_forward_pre_hook(lambda *_: 1 / 0)  # in the middle of the forward
            with pytest.raises(ZeroDivisionError):
                run(case)
            hook.remove()
            handle.new_run(4)
            assert torch.equal(run(case), on)
    assert is_clean(case.model) and torch.equal(run(case), dense)


@pytest.mark.parametrize("family", ["flux", "wan", "unet"])
@pytest.mark.parametrize("name", [n for n in HERE if n != "gna"])
def test_two_methods_in_either_order_of_leaving(name: str, family: str) -> None:
    if family not in SERVED[name]:
        pytest.skip(f"{name} does not serve {family}")
    case = pair(family)
    dense = run(case)
    for first_out in (0, 1):
        handles = [
            generators.enable(case.model, name, **SETTINGS[name]),
            generators.enable(case.model, "gna", kernel_size=case.kernel_size),
        ]
        handles[0].new_run(4)
        try:
            run(case)
        except UnsupportedError as error:
            assert "gna" in str(error) or name in str(error)  # refused together, by name
        handles[first_out].disable()
        handles[1 - first_out].new_run(4)
        run(case)  # the one that stays goes on
        handles[1 - first_out].disable()
        assert is_clean(case.model) and torch.equal(run(case), dense)


@pytest.mark.parametrize("name", HERE)
def test_two_models_do_not_meet(name: str) -> None:
    family = sorted(SERVED[name])[0]
    first, second = pair(family), pair(family)
    dense = run(second)
    with generators.enable(first.model, name, **SETTINGS[name]) as handle:
        handle.new_run(4)
        on = run(first)
        assert torch.equal(run(second), dense)
        with generators.enable(second.model, name, **SETTINGS[name]) as other:
            other.new_run(4)
            run(second)
            handle.new_run(4)
            assert torch.equal(run(first), on)
    assert torch.equal(run(second), dense) and is_clean(second.model)


@pytest.mark.parametrize("file", sorted(set(ELSEWHERE.values())))
def test_what_is_tested_elsewhere_is(file: str) -> None:
    assert Path(__file__).with_name(file).is_file()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HERE)
def test_neutral_is_dense_bit_for_bit(name: str, family: str) -> None:
    neutral = catalog.get(name).neutral
    if not neutral or family not in SERVED[name]:
        pytest.skip("no neutral setting, or not served")
    case = pair(family)
    dense = run(case)
    with generators.enable(case.model, name, **{**SETTINGS[name], **neutral}) as handle:
        handle.new_run(4)
        assert torch.equal(run(case), dense)
