"""Probes of the vision-language room: what they read is what transformers' eager attention would report."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import vlm_models as tiny

from attnzoo import vlm

READ = ("probs", "head_max", "head_mean", "masses", "column_sums", "outputs")
PLAIN = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [tiny.IMAGE, tiny.VIDEO]}


@functools.cache
def model_of(family: str, implementation: str = "sdpa") -> tuple[Any, list[dict[str, Any]]]:
    return tiny.build(family, implementation)


def expected(what: str, attention: torch.Tensor, reading: vlm.Reading) -> torch.Tensor:
    """What `what` says of eager's attention [B, H, N, K], for the rows that were read."""
    rows = attention[:, :, -(reading.rows[1] - reading.rows[0]) :].transpose(1, 2)
    if what == "probs":
        return rows
    if what == "masses":
        keys = torch.zeros(rows.shape[0], rows.shape[3])
        image = reading.image[:, reading.first_key :].float()
        keys[:, : image.shape[1]] = image
        on = (rows * keys[:, None, None]).sum(-1)
        return torch.stack([rows.sum(-1) - on, on], -1)
    return {"head_max": rows.amax(2), "head_mean": rows.mean(2), "column_sums": rows.sum(1)}[what]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_readings_are_eagers_attention(family: str, implementation: str) -> None:
    model, rows = model_of(family, implementation)
    inputs = tiny.batch(family, rows)
    stock = model.generate(**inputs, **PLAIN, return_dict_in_generate=True, output_logits=True)
    seen: list[vlm.Reading] = []
    probes = [vlm.Probe((1, 2), seen.append, what=what) for what in READ]
    with vlm.edit(model, probes):
        out = model.generate(**inputs, **PLAIN, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(torch.stack(out.logits), torch.stack(stock.logits)), "a probe changes nothing"
    eager, _ = model_of(family, "eager")
    answer = eager.generate(**inputs, **PLAIN, return_dict_in_generate=True, output_attentions=True)
    assert len(seen) == 4 * 2 * len(READ)
    length = inputs["input_ids"].shape[1]
    for index, reading in enumerate(seen):
        step = index // (2 * len(READ))
        assert reading.rows == (length - 1 + step, length + step) and reading.answer_start == length - 1
        if reading.what == "outputs":
            assert reading.value.shape[:2] == (2, 1)
            continue
        want = expected(reading.what, answer.attentions[step][reading.layer], reading)
        assert reading.value.shape == want.shape, reading.what
        assert (reading.value - want).abs().max() < 2e-6, reading.what


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_readings_show_logit_edits_and_many_rows(implementation: str) -> None:
    model, rows = model_of("llava", implementation)
    eager, _ = model_of("llava", "eager")
    inputs = tiny.batch("llava", rows)
    seen: list[vlm.Reading] = []
    bias = vlm.KeyBias((2,), keys="image", rows="all", value=1.5)
    probes = [vlm.Probe((2,), seen.append, what=what, rows="all") for what in READ[:-1]]
    with vlm.edit(eager, [bias, "pai"]):
        attention = eager(**inputs, output_attentions=True).attentions[2]
    with vlm.edit(model, [*probes, bias, "pai"]):
        model(**inputs)
    real = inputs["attention_mask"].bool()
    for reading in seen:
        want = expected(reading.what, attention, reading)
        got = reading.value
        if reading.what == "column_sums":  # transformers' padding rows see all keys alike, ours see none
            want = (attention * real[:, None, :, None]).sum(2)
        else:
            got, want = got[real], want[real]
        assert (got - want).abs().max() < 1e-5, reading.what


def test_an_outputs_probe_sees_head_scales() -> None:
    model, rows = model_of("llava")
    inputs = tiny.batch("llava", rows)
    plain: list[vlm.Reading] = []
    scaled: list[vlm.Reading] = []
    with vlm.edit(model, vlm.Probe((3,), plain.append, what="outputs")):
        model(**inputs)
    with vlm.edit(model, [vlm.Probe((3,), scaled.append, what="outputs"), vlm.HeadScale((3,), (1,), 2.0)]):
        model(**inputs)
    factor = torch.ones(8)
    factor[1] = 2
    assert torch.equal(scaled[0].value, plain[0].value * factor[:, None])


def test_bad_probes() -> None:
    with pytest.raises(ValueError, match="what must be one of"):
        vlm.Probe((1,), print, what="dreams")
    with pytest.raises(ValueError, match="rows must be one of"):
        vlm.Probe((1,), print, rows="after_image")
    with pytest.raises(TypeError, match="tell must be a function"):
        vlm.Probe((1,), 3)  # type: ignore[arg-type]
