"""Decoding loops of the vision-language room: OPERA, and contrastive decoding with VCD, ICD and PAI's guidance."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import vlm_models as tiny
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer
from vlm_methods import CASES

from attnzoo import vlm
from attnzoo.errors import ReachError, SeamError, UnsupportedError
from attnzoo.vlm import lookahead
from attnzoo.vlm.opera import aggregate, aggregate_rows, common_place, extend_products
from attnzoo.vlm.opera_loop import OperaStep

STEPS = 14
BEAMS: dict[str, Any] = {"num_beams": 5, "max_new_tokens": STEPS, "do_sample": False, "pad_token_id": tiny.PAD}
CONTRASTS: dict[str, dict[str, Any]] = {
    "vcd": {"alpha": 1.0},
    "icd": {"instruction_ids": [5, 9, 12, 7]},
    "pai_guidance": {"gamma": 1.6},
}
SUPPRESS = {"suppress_tokens": [tiny.IMAGE, tiny.VIDEO]}


@functools.cache
def model_of(family: str, implementation: str = "sdpa") -> tuple[Any, list[dict[str, Any]]]:
    return tiny.build(family, implementation)


def inputs_of(family: str, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    return tiny.batch(family, model_of(family)[1][rows])


def answers(sequences: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def opera(family: str, inputs: dict[str, torch.Tensor], implementation: str = "sdpa", **own: Any) -> torch.Tensor:
    model, _ = model_of(family, implementation)
    generation = {name: own.pop(name) for name in list(own) if name in BEAMS or name.endswith("token_id")}
    with vlm.edit(model, "opera", **own) as session:
        return session.generate(**inputs, **BEAMS | SUPPRESS | generation)


# --- OPERA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "smolvlm"])
def test_without_penalty_it_is_transformers_beam_search(family: str) -> None:
    model, _ = model_of(family)
    inputs = inputs_of(family)
    stock = model.generate(**inputs, **BEAMS, **SUPPRESS)
    assert torch.equal(opera(family, inputs, penalty_weights=0.0, threshold=None), stock)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_that_end_are_transformers_too(early_stopping: bool | str) -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    free = model.generate(**inputs, **BEAMS, **SUPPRESS)
    ends = [int(free[0, -9]), int(free[1, -5])]
    how: dict[str, Any] = {"eos_token_id": ends, "early_stopping": early_stopping, "length_penalty": 0.7}
    how |= {"num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    stock = model.generate(**inputs, **BEAMS, **SUPPRESS, **how)
    del how["output_scores"]
    with vlm.edit(model, "opera", penalty_weights=0.0, threshold=None, num_attn_candidates=15) as session:
        own = session.generate(**inputs, **BEAMS, **SUPPRESS, **how)
    assert torch.equal(own.sequences, stock.sequences)
    assert torch.allclose(own.sequences_scores, stock.sequences_scores, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("compat", [None, "official"])
def test_a_batch_is_its_rows_and_sdpa_is_eager(family: str, compat: str | None) -> None:
    rows = model_of(family)[1]
    both = inputs_of(family)
    how: dict[str, Any] = {"compat": compat, "penalty_weights": 30.0}
    whole = answers(opera(family, both, **how), both)
    for index, row in enumerate(rows):
        alone = tiny.batch(family, [row])
        assert answers(opera(family, alone, **how), alone)[0] == whole[index]
    assert answers(opera(family, both, "eager", **how), both) == whole
    assert whole != answers(opera(family, both, **how | {"penalty_weights": 0.0, "threshold": None}), both)


PLANTED, AT = 40, 11


class Planted(LogitsProcessor):
    """The token that everything later looks at, at response position AT of every beam."""

    def __init__(self) -> None:
        self.start = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.start = self.start or input_ids.shape[1]
        if input_ids.shape[1] - self.start == AT:
            scores = scores.clone()
            scores[:, PLANTED] = scores.amax(-1) + 50.0
        return scores


@functools.cache
def leaning_model(implementation: str = "sdpa") -> tuple[Any, list[dict[str, Any]]]:
    """A tiny LLaVA whose last layer looks at the planted token, wherever it stands."""
    model, rows = tiny.build("llava", implementation, attention_bias=True)
    attention, embedding = model.model.language_model.layers[-1].self_attn, model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[PLANTED] *= 60 / embedding[PLANTED].norm()
        attention.k_proj.weight[3::8] = 20 * embedding[PLANTED] / 60  # the slowest pair of each head turns least
        attention.q_proj.bias[3::8] = 2.0
        model.lm_head.weight[PLANTED] = 0.0
    return model, rows


def lean(
    rows: list[dict[str, Any]], implementation: str = "sdpa", **own: Any
) -> tuple[list[list[int]], list[OperaStep]]:
    """The answers and steps of a search that goes back."""
    model, _ = leaning_model(implementation)
    inputs, steps = tiny.batch("llava", rows), []
    how = {"scale_factor": 6.0, "threshold": 3, "num_attn_candidates": 3, "num_beams": 3, "tell": steps.append}
    call = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tiny.PAD, **SUPPRESS}
    with vlm.edit(model, [*own.pop("edits", ()), ("opera", how | own)]) as session:
        found = answers(session.generate(**inputs, **call, logits_processor=[Planted()]), inputs)
    return found, steps


@pytest.mark.parametrize("compat", [None, "official"])
def test_prompts_go_back_for_themselves(compat: str | None) -> None:
    rows = leaning_model()[1]
    whole, steps = lean(rows, compat=compat)
    back = [(int(s.samples[i]), p) for s in steps for i, p in enumerate(s.rollback_positions) if p >= 0]
    assert back, "this setting is meant to go back"
    for index, row in enumerate(rows):
        alone, own = lean([row], compat=compat)
        assert alone[0] == whole[index]
        single = [p for s in own for p in s.rollback_positions if p >= 0]
        assert single == [p for sample, p in back if sample == index]


def test_what_was_rejected_is_not_taken_again() -> None:
    seen = 0
    for step in lean(leaning_model()[1])[1]:
        for index, rejected in enumerate(step.rejected):
            if rejected is not None:
                vocabulary = tiny.TEXT["vocab_size"]
                taken = step.parents[index] * vocabulary + step.tokens[index]
                assert not torch.isin(taken, rejected).any()
                seen += 1
    assert seen


def test_going_back_restores_the_cache_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[tuple[int, int], list[torch.Tensor]] = {}
    compared = []
    remember, back = lookahead.LookAhead._remember, lookahead.LookAhead.back

    def keep(self: Any, parents: torch.Tensor) -> None:
        remember(self, parents)
        held[id(self), self.tokens] = [t.clone() for layer in self.cache.layers for t in (layer.keys, layer.values)]

    def compare(self: Any, tokens: int, last: torch.Tensor) -> torch.Tensor:
        logits = back(self, tokens, last)
        now = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        compared.append(all(torch.equal(a, b) for a, b in zip(now, held[id(self), tokens])))
        return logits

    monkeypatch.setattr(lookahead.LookAhead, "_remember", keep)
    monkeypatch.setattr(lookahead.LookAhead, "back", compare)
    for row in leaning_model()[1]:
        lean([row])
    assert compared and all(compared)


def test_a_forward_a_step_and_none_of_the_prompt_again() -> None:
    model, _ = model_of("llava", "sdpa")
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    try:
        inputs = inputs_of("llava")
        opera("llava", inputs, threshold=None)
    finally:
        handle.remove()
    assert lengths == [inputs["input_ids"].shape[1]] + [5] * STEPS


def test_running_products_are_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 3, 14, 14, generator=generator, dtype=torch.float64).tril()
    image = torch.arange(14) < 4
    found = aggregate_rows(rows, image, 6, 5.0)
    local = 5.0 * (rows / rows.sum(-1, keepdim=True))[..., 6:, 6:]
    want = torch.stack([1e-7 * local[..., j:, j].prod(-1) for j in range(8)], -1)
    assert torch.allclose(found.scores, want) and torch.equal(found.place, want.argmax(-1))
    assert torch.allclose(found.penalty, -(rows / rows.sum(-1, keepdim=True))[..., -1, :4].sum(-1))
    plain = aggregate_rows(rows, image, 6, 5.0, official=True)
    assert plain.scores.dtype == torch.float16


def test_corrected_scores_know_no_float16() -> None:
    small = torch.tensor([1e-9, 1e-3]).log()
    assert aggregate(small, torch.tensor(0.0)).place == 1
    assert aggregate(small.exp(), torch.tensor(0.0), official=True).place == 0  # both underflow
    large = extend_products(torch.full((11,), 200.0), torch.full((12,), 0.5), 50.0, log=True)
    assert aggregate(large, torch.tensor(0.0)).penalty.isfinite()
    assert aggregate(large.exp(), torch.tensor(0.0), official=True).penalty.isinf()
    assert common_place(torch.tensor([[[3, 3, 1], [2, 1, 2], [4, 4, 0]]]))[0].tolist() == [[3, 2, 4]]


def test_opera_stacks_with_edits() -> None:
    inputs = inputs_of("llava")
    found = []
    for implementation in ("sdpa", "eager"):
        model, _ = model_of("llava", implementation)
        with vlm.edit(model, [("pai", {"alpha": 1.5}), ("var", {"tau": 1.2, "summ": 0.02}), "opera"]) as session:
            found.append(session.generate(**inputs, **BEAMS, **SUPPRESS))
    assert torch.equal(*found)
    assert not torch.equal(found[0], opera("llava", inputs))
    edits = [("pai", {"alpha": 0.3}), ("var", {"tau": 1.2, "summ": 0.02})]
    rows = leaning_model()[1]
    whole, steps = lean(rows, edits=edits)
    assert any(p >= 0 for step in steps for p in step.rollback_positions)
    assert [lean([row], edits=edits)[0][0] for row in rows] == whole
    assert lean(rows, "eager", edits=edits)[0] == whole


STACKED = [case if case in ("vhr", "paint") else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", STACKED)
def test_every_edit_under_opera(case: str) -> None:
    """A batch that goes back prompt by prompt is its rows: what an edit knows of a prompt goes with it."""
    rows = leaning_model()[1]
    edits = [CASES[case]]
    whole, _ = lean(rows, edits=edits)
    assert [lean([row], edits=edits)[0][0] for row in rows] == whole


@pytest.mark.parametrize("name", ["vcd", "pai_guidance"])
@pytest.mark.parametrize("case", STACKED)
def test_every_edit_under_a_contrast(case: str, name: str) -> None:
    model, rows = model_of("llava")
    both = inputs_of("llava")
    how = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, **SUPPRESS}
    with vlm.edit(model, [CASES[case], (name, CONTRASTS.get(name, {}))]) as session:
        whole = answers(session.generate(**both, **how), both)
        for index, row in enumerate(rows):
            alone = tiny.batch("llava", [row])
            assert answers(session.generate(**alone, **how), alone)[0] == whole[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, rows = tiny.build("llava")
    model.to(dtype)
    inputs = tiny.batch("llava", rows)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    stock = model.generate(**inputs, max_new_tokens=5, do_sample=False, **SUPPRESS)
    for name in ("opera", *CONTRASTS):
        with vlm.edit(model, name, **CONTRASTS.get(name, {})) as session:
            found = session.generate(**inputs, max_new_tokens=5, do_sample=False, **SUPPRESS)
        assert found.shape == stock.shape


def test_opera_refuses_by_name() -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    with vlm.edit(model, "opera") as session:
        with pytest.raises(UnsupportedError, match="do_sample=False"):
            session.generate(**inputs, max_new_tokens=2, do_sample=True)
        with pytest.raises(UnsupportedError, match="streamer"):
            session.generate(**inputs, max_new_tokens=2, do_sample=False, streamer=Collected())
        with pytest.raises(ValueError, match="num_return_sequences"):
            session.generate(**inputs, **BEAMS, num_return_sequences=6)
        with pytest.raises(UnsupportedError, match=r"session\.generate"):
            model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(UnsupportedError, match="begins with a prompt"):
            output = session.forward(**inputs)
            session.generate(**inputs, **BEAMS, **{n: output[n] for n in lookahead.CACHES if n in output})
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False) is not None


# --- contrastive -----------------------------------------------------------------------------------------------------


def second_view(name: str, inputs: dict[str, torch.Tensor], row: dict[str, Any], family: str) -> dict[str, Any]:
    """What a contrastive way shows the model beside one prompt, built by hand."""
    ids, found = inputs["input_ids"][0], dict(inputs)
    image = (ids == tiny.IMAGE).nonzero()[:, 0]
    if name == "vcd":
        return vlm.contrast.noisy_inputs(inputs, 500, 0)
    if name == "icd":
        end = int(image[-1]) + 1
        new = torch.cat([ids[:end], torch.tensor(CONTRASTS["icd"]["instruction_ids"]), ids[end:]])
    else:
        new = ids[ids != tiny.IMAGE]
        found = {}
    found |= {"input_ids": new[None], "attention_mask": torch.ones_like(new)[None]}
    if "mm_token_type_ids" in inputs and name == "icd":
        found["mm_token_type_ids"] = (new[None] == tiny.IMAGE).int()
    return found


def combined(name: str, scores: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if name == "pai_guidance":
        l, u = scores.log_softmax(-1), other.log_softmax(-1)
        found = 1.6 * (l - u) + u
    else:
        found = 2 * scores - other
        l = scores
    return found.masked_fill(l < l.max(-1, keepdim=True).values + torch.tensor(0.1).log(), -torch.inf)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("name", CONTRASTS)
def test_greedy_is_the_formula_without_a_cache(family: str, name: str) -> None:
    """Every step from two whole forwards, prompt by prompt, against the batch with left padding."""
    model, rows = model_of(family)
    both = inputs_of(family)
    with vlm.edit(model, name, **CONTRASTS[name]) as session:
        own = answers(session.generate(**both, max_new_tokens=5, do_sample=False, **SUPPRESS), both)
    for index, row in enumerate(rows):
        first = tiny.batch(family, [row])
        second = second_view(name, first, row, family)
        for step in range(5):
            with torch.no_grad():
                pair = [model(**_longer(view, own[index][:step])).logits[:, -1] for view in (first, second)]
            pair[0][:, SUPPRESS["suppress_tokens"]] = -torch.inf
            assert int(combined(name, *pair).argmax()) == own[index][step]


def _longer(inputs: dict[str, torch.Tensor], tokens: list[int]) -> dict[str, torch.Tensor]:
    found = dict(inputs)
    for name, new in (("input_ids", tokens), ("attention_mask", [1] * len(tokens)), ("mm_token_type_ids", None)):
        if name in inputs:
            extra = torch.tensor([new if new is not None else [0] * len(tokens)], dtype=inputs[name].dtype)
            found[name] = torch.cat([inputs[name], extra.view(1, -1)], 1)
    if "token_type_ids" in inputs:
        found["token_type_ids"] = torch.cat(
            [inputs["token_type_ids"], torch.zeros(1, len(tokens), dtype=torch.long)], 1
        )
    return found


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("way", ["sampling", "beams", "beams of two"])
def test_other_ways_to_decode(name: str, way: str) -> None:
    model, rows = model_of("llava")
    both = inputs_of("llava")
    how: dict[str, Any] = {
        "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
        "beams": {"num_beams": 4},
        "beams of two": {"num_beams": 2, "num_return_sequences": 2},
    }[way]
    with vlm.edit(model, name, **CONTRASTS[name]) as session:
        torch.manual_seed(3)
        whole = answers(session.generate(**both, max_new_tokens=6, **how), both)
        if way == "sampling":
            torch.manual_seed(3)
            assert answers(session.generate(**both, max_new_tokens=6, **how), both) == whole
            return
        count = how.get("num_return_sequences", 1)
        for index, row in enumerate(rows):
            alone = tiny.batch("llava", [row])
            single = answers(session.generate(**alone, max_new_tokens=6, **how), alone)
            assert single == whole[index * count : (index + 1) * count]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_neutral_contrasts_are_plain(how: dict[str, Any]) -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")

    def run(generate: Any) -> torch.Tensor:
        torch.manual_seed(1)
        return generate(**inputs, max_new_tokens=6, **how)

    stock = run(model.generate)
    ways = (("vcd", {"alpha": 0.0}), ("icd", {"alpha": 0.0}), ("pai_guidance", {"gamma": 1.0}))
    for name, own in ways:
        with vlm.edit(model, name, **own, beta=0.0) as session:
            assert torch.equal(run(session.generate), stock)
    assert torch.equal(run(model.generate), stock)


def test_vcd_with_alpha_0_takes_the_same_greedy_way() -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    stock = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with vlm.edit(model, "vcd", alpha=0.0) as session:
        assert torch.equal(session.generate(**inputs, max_new_tokens=6, do_sample=False), stock)


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.reshape(-1))

    def end(self) -> None:
        pass


def test_streaming_from_another_thread_and_stacking() -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava", slice(0, 1))
    with vlm.edit(model, [("pai", {"alpha": 1.0}), "vcd"]) as session:
        expected = session.generate(**inputs, max_new_tokens=6, do_sample=False)
        streamer = Collected()
        call = {**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=session.generate, kwargs=call)
        thread.start()
        thread.join(60)
    assert torch.equal(torch.cat(streamer.tokens), expected[0])
    with vlm.edit(model, "vcd") as session:
        assert torch.equal(
            session.generate(**inputs, max_new_tokens=6, do_sample=False),
            session.generate(**inputs, max_new_tokens=6, do_sample=False, decoding="vcd"),
        )


def test_two_threads_with_two_ways_do_not_meet() -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    how = {"max_new_tokens": 8, "do_sample": False}
    alone, together = {}, {}
    for name in ("opera", "vcd"):
        with vlm.edit(model, name) as session:
            alone[name] = session.generate(**inputs, **how)

    def run(name: str) -> None:
        with vlm.edit(model, name) as session:
            together[name] = session.generate(**inputs, **how)

    threads = [threading.Thread(target=run, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(torch.equal(together[name], alone[name]) for name in alone)


@pytest.mark.parametrize("name", ["opera", "vcd", "pai_guidance"])
def test_an_exception_leaves_no_trace(name: str) -> None:
    class Broken(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 3:
                raise ZeroDivisionError("on purpose")
            return scores

    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    before = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    settings = copy.deepcopy(model.generation_config.to_dict())
    with pytest.raises(ZeroDivisionError), vlm.edit(model, name) as session:
        session.generate(**inputs, max_new_tokens=9, do_sample=False, logits_processor=[Broken()])
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == before
    assert model.generation_config.to_dict() == settings
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), stock)


def test_contrasts_refuse_by_name() -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    with vlm.edit(model, "vcd") as session:
        with pytest.raises(UnsupportedError, match="prompt_lookup_num_tokens"):
            session.generate(**inputs, max_new_tokens=2, prompt_lookup_num_tokens=2)
        with pytest.raises(ValueError, match="needs a prompt with a picture"):
            session.generate(input_ids=torch.tensor([[1, 5, 6]]), max_new_tokens=2)
        with pytest.raises(UnsupportedError, match="give input_ids"):
            session.generate(inputs_embeds=torch.zeros(1, 3, 64), max_new_tokens=2)
    with vlm.edit(model, "icd") as session, pytest.raises(TypeError, match="instruction_ids"):
        session.generate(**inputs, max_new_tokens=2)
    with vlm.edit(model, "vcd") as session:
        view = vlm.contrast.SecondView(session, inputs)
        view.logits(inputs["input_ids"])
        with pytest.raises(SeamError, match="one token at a time"):
            view.logits(inputs["input_ids"])


BAD = [
    ("opera", {"num_beams": 1}, ValueError, "num_beams must be from 2"),
    ("opera", {"threshold": 1.5}, TypeError, "threshold must be an integer"),
    ("opera", {"scale_factor": 0.0}, ValueError, "scale_factor must be above 0"),
    ("opera", {"compat": "paper"}, ValueError, "compat must be one of"),
    ("vcd", {"alpha": -1.0}, ValueError, "alpha must be from 0"),
    ("vcd", {"beta": 2.0}, ValueError, "beta must be from 0"),
    ("vcd", {"noise_step": 1000}, ValueError, "noise_step must be from 0"),
    ("vcd", {"gamma": 1.0}, TypeError, "'vcd' has no argument 'gamma'"),
    ("pai_guidance", {"gamma": 0.5}, ValueError, "gamma must be from 1"),
    ("icd", {"instruction_ids": []}, TypeError, "instruction_ids must hold integers"),
    (["vcd", "opera"], {}, UnsupportedError, "decodes in one way, got 2"),
]


@pytest.mark.parametrize(("methods", "arguments", "kind", "told"), BAD)
def test_bad_input_is_named(methods: Any, arguments: Any, kind: Any, told: str) -> None:
    with pytest.raises(kind, match=told):
        vlm.edit(model_of("llava")[0], methods, **arguments)


# --- DoLa ------------------------------------------------------------------------------------------------------------


def test_dola_runs_the_recipe_that_it_is_given(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(model, dola_layers, **kwargs):\n"
        "    return dola_layers, model.generate(**kwargs)\n"
    )  # fmt: skip
    stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    how = {"trust_remote_code": True, "repo": str(tmp_path), "dola_layers": "low"}
    with vlm.edit(model, "dola", **how) as session:
        layers, sequences = session.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert layers == "low" and torch.equal(sequences, stock)
    with vlm.edit(model, "dola") as session, pytest.raises(ValueError, match="trust_remote_code must be True"):
        session.generate(**inputs, max_new_tokens=4)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for repo in (str(tmp_path / "nowhere"), "transformers-community/dola-that-is-not"):
        told = pytest.raises(ReachError, match=r"can't be read .*custom_generate/generate\.py")
        with vlm.edit(model, "dola", trust_remote_code=True, repo=repo) as session, told:
            session.generate(**inputs, max_new_tokens=4)
