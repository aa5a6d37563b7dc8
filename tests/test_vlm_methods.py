"""The matrix method x family on tiny random models: neutral, padded, cached, eager, off; other ways to generate."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import vlm_models as tiny
from transformers import LogitsProcessor
from vlm_methods import CASES, EDITED, neutral

from attnzoo import vlm
from attnzoo.errors import UnsupportedError

ROUNDING = 2e-5  # on logits of size 3 to 8, float32
QUICK = ("llava", "gemma3", "qwen2_5_vl")
PLAIN = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [tiny.IMAGE, tiny.VIDEO]}
KEPT = {"return_dict_in_generate": True, "output_logits": True}
NEW = [name for name in EDITED if name not in ("pai", "var")]  # those two have tests/test_vlm.py
NEW_CASES = [name for name, (method, _) in CASES.items() if method in NEW]


@functools.cache
def model_of(family: str, implementation: str = "sdpa") -> tuple[Any, list[dict[str, Any]]]:
    return tiny.build(family, implementation)


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    return tiny.batch(family, model_of(family)[1])


def logits(model: Any, generate: Any = None, **kwargs: Any) -> torch.Tensor:
    """[B, steps, vocabulary] of one generation."""
    out = (generate or model.generate)(**{**PLAIN, **KEPT, **kwargs})
    return torch.stack(out.logits, 1)


@functools.cache
def stock_of(family: str) -> torch.Tensor:
    return logits(model_of(family)[0], **inputs_of(family))


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def families() -> list[Any]:
    return [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in tiny.FAMILIES]


def open_case(model: Any, case: str) -> vlm.Session:
    method, own = CASES[case]
    return vlm.edit(model, method, **own)


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("method", NEW)
def test_neutral_is_stock(family: str, method: str) -> None:
    model, _ = model_of(family)
    inputs = inputs_of(family)
    stock = stock_of(family)
    before = model(**inputs, output_hidden_states=True)
    session = vlm.edit(model, method, **neutral(method))
    first = min(min(e.layers) for e in session.edits if hasattr(e, "layers"))
    with session:
        assert worst(logits(model, **inputs), stock) < ROUNDING, "neutral is not stock"
        within = model(**inputs, output_hidden_states=True)
    for layer in range(first + 1):
        assert torch.equal(within.hidden_states[layer], before.hidden_states[layer]), "an unedited layer changed"
    assert torch.equal(logits(model, **inputs), stock), "off is not bit-identical"


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("case", NEW_CASES)
def test_padded_cached_and_dense_agree(family: str, case: str) -> None:
    if case not in EDITED and family not in ("llava", "qwen2_5_vl", "gemma3", "smolvlm"):
        pytest.skip("a variant's own code is seen on four families")
    if case == "vif, relay tokens" and family == "gemma3":
        pytest.skip("its random keys have one norm: see test_vlm_own.py")
    model, rows = model_of(family)
    inputs = inputs_of(family)
    stock = stock_of(family)
    start = inputs["input_ids"].shape[1]
    with open_case(model, case) as session:
        out = model.generate(**inputs, **PLAIN, **KEPT)
        edited = torch.stack(out.logits, 1)
        for index, row in enumerate(rows):
            single = logits(model, **tiny.batch(family, [row]))
            assert worst(single, edited[index : index + 1]) < ROUNDING, f"row {index} alone differs"
        whole = tiny.batch(family, rows, out.sequences[:, start:])
        uncached = session.forward(**whole, prompt_length=start).logits[:, start - 1 : -1]
        if not (family == "paligemma" and CASES[case][0] in ("prefix", "mma")):
            assert worst(uncached, edited) < ROUNDING, "cached differs from uncached"
    same = (family, CASES[case][0]) in {("gemma3", "prefix"), ("paligemma", "prefix"), ("paligemma", "mma")}
    assert worst(edited, stock) > 0.02 or same, "the edit did nothing"
    eager, _ = model_of(family, "eager")
    with open_case(eager, case):
        assert worst(logits(eager, **inputs), edited) < ROUNDING, "sdpa differs from the dense formulation"
    assert torch.equal(logits(model, **inputs), stock), "off is not bit-identical"


@pytest.mark.parametrize("case", NEW_CASES)
def test_beams_static_cache_and_no_cache(case: str) -> None:
    inputs = inputs_of("llava")
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    found = []
    for implementation in ("sdpa", "eager"):
        model, _ = model_of("llava", implementation)
        with open_case(model, case) as session:
            found.append(model.generate(**inputs, **beams))
            if implementation == "sdpa":
                expected = logits(model, **inputs)
                static = logits(model, **inputs, cache_implementation="static")
                assert worst(static, expected) < ROUNDING
                assert worst(logits(model, session.generate, **inputs, use_cache=False), expected) < ROUNDING
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("method", NEW)
def test_an_exception_leaves_no_trace(method: str) -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("on purpose")

    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    stock = stock_of("llava")
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ZeroDivisionError, match="on purpose"), open_case(model, method):
        model.generate(**inputs, **PLAIN, logits_processor=[Broken()])
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(logits(model, **inputs), stock)


@pytest.mark.parametrize("other", [m for m in NEW if m not in ("gift", "act", "vif")])
def test_methods_stack_in_any_order(other: str) -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    named = [("var", EDITED["var"]), (other, EDITED[other]), ("pai", {"alpha": 0.3})]
    with vlm.edit(model, named):
        one = logits(model, **inputs)
    with vlm.edit(model, named[::-1]):
        assert worst(logits(model, **inputs), one) < ROUNDING
    with vlm.edit(model, named[:1] + named[2:]):
        assert worst(logits(model, **inputs), one) > 1e-3
    eager, _ = model_of("llava", "eager")
    with vlm.edit(eager, named):
        assert worst(logits(eager, **inputs), one) < ROUNDING


def test_what_can_not_stack_is_refused_by_name() -> None:
    model, _ = model_of("llava")
    with pytest.raises(UnsupportedError, match="re-weight key groups"):
        vlm.edit(model, [("gift", {"layers": [2]}), ("act", {"layers": [2]})])
    with pytest.raises(UnsupportedError, match="who sees whom"):
        vlm.edit(model, ["mma", "moda"])


@pytest.mark.parametrize("method", ["gift", "act", "vhr", "mma", "prefix"])
def test_a_prompt_in_parts_is_refused_where_it_must_be_whole(method: str) -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    try:
        logits(model, **inputs, prefill_chunk_size=9)
    except (ValueError, RuntimeError) as refused:
        pytest.skip(f"this transformers refuses it: {refused}")
    with open_case(model, method) as session, pytest.raises(UnsupportedError, match="whole prompt|one forward"):
        logits(model, session.generate, **inputs, prefill_chunk_size=9)


@pytest.mark.parametrize("method", NEW)
def test_a_prompt_without_a_picture(method: str) -> None:
    model, _ = model_of("llava")
    ids = torch.tensor([[1, 5, 6, 7, 8, 11, 12]])
    with open_case(model, method):
        assert logits(model, input_ids=ids).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    model, rows = tiny.build("llava")
    model.to(dtype)
    eager, _ = tiny.build("llava", "eager")
    eager.to(dtype)
    inputs = tiny.batch("llava", rows[1:])  # transformers' own eager attention gives NaN for padding in float64
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    stock = model(**inputs).logits
    for method in NEW:
        with vlm.edit(model, method, **neutral(method)):
            out = model(**inputs).logits
        assert out.dtype == dtype and worst(out.float(), stock.float()) < (0.15 if dtype != torch.float64 else 1e-12)
        if dtype == torch.float64:
            case = "vhr, own stream" if method == "vhr" else method  # the shared one pads
            with open_case(model, case), open_case(eager, case):
                real = inputs["attention_mask"].bool()
                one, two = (m(**inputs).logits[real] for m in (model, eager))
            assert worst(one, two) < 1e-5, method  # transformers' eager softmax is float32 whatever comes in
