"""The vision-language room: VAR and PAI on eight families, ways to generate, sessions, the methods' own."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
import vlm_models as tiny
from packaging.version import Version
from transformers import LogitsProcessor

from attnzoo import vlm
from attnzoo.errors import SeamError, UnsupportedError
from attnzoo.vlm import interception
from attnzoo.vlm.image_tokens import image_positions
from attnzoo.vlm.layer import edited_layer
from attnzoo.vlm.pai import pai
from attnzoo.vlm.var import VarRule, detect_dim_sink, known_dim_sink, var, var_groups, var_redistribute

EDITED = {"pai": {"alpha": 0.5}, "var": {"tau": 1.2, "layers": [1, 2, 3], "rho": 0.8, "summ": 0.02}}
NEUTRAL = {"pai": {"alpha": 0.0}, "var": {**EDITED["var"], "p": 1.0}}
METHODS = tuple(EDITED)
ROUNDING = 2e-5  # on logits of size 3 to 8, float32
PLAIN = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [tiny.IMAGE, tiny.VIDEO]}
KEPT = {"return_dict_in_generate": True, "output_logits": True}


@functools.cache
def model_of(family: str, implementation: str = "sdpa") -> tuple[Any, list[dict[str, Any]]]:
    return tiny.build(family, implementation)


def inputs_of(family: str, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    return tiny.batch(family, model_of(family)[1][rows])


def logits(model: Any, generate: Any = None, **kwargs: Any) -> torch.Tensor:
    """[B, steps, vocabulary] of one generation."""
    out = (generate or model.generate)(**PLAIN, **KEPT, **kwargs)
    return torch.stack(out.logits, 1)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def fingerprint(model: Any) -> Any:
    """What an edit touches: implementations, hooks, the generation config."""
    parts = [(type(m.config).__name__, m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return parts, hooks, model.generation_config.to_dict()


# --- the eight families ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_family(family: str, method: str) -> None:
    model, rows = model_of(family)
    inputs = inputs_of(family)
    stock = logits(model, **inputs)
    before = fingerprint(model)  # behind a first run, in which transformers hooks its own vision tower

    with vlm.edit(model, method, **NEUTRAL[method]):
        assert worst(logits(model, **inputs), stock) < ROUNDING, "neutral is not stock"
    with vlm.edit(model, method, **EDITED[method]) as session:
        out = model.generate(**inputs, **PLAIN, **KEPT)
        edited = torch.stack(out.logits, 1)
        for index, row in enumerate(rows):
            single = logits(model, **tiny.batch(family, [row]))
            assert worst(single, edited[index : index + 1]) < ROUNDING, f"row {index} alone differs"
        start = inputs["input_ids"].shape[1]
        whole = tiny.batch(family, rows, out.sequences[:, start:])
        uncached = session.forward(**whole, prompt_length=start).logits[:, start - 1 : -1]
        assert worst(uncached, edited) < ROUNDING, "cached differs from uncached"
    assert worst(edited, stock) > 0.05, "the edit did nothing"
    eager, _ = model_of(family, "eager")
    with vlm.edit(eager, method, **EDITED[method]):
        assert worst(logits(eager, **inputs), edited) < ROUNDING, "sdpa differs from the dense formulation"
    assert fingerprint(model) == before
    assert torch.equal(logits(model, **inputs), stock), "off is not bit-identical"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_the_text_tower_is_switched(family: str) -> None:
    model, _ = model_of(family)
    with vlm.edit(model, "pai"):
        names = {type(m).__name__: m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
        assert model.config.get_text_config()._attn_implementation == "attnzoo_sdpa"
        assert all(name == "sdpa" for kind, name in names.items() if "Vision" in kind), names


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_image_positions(family: str) -> None:
    model, rows = model_of(family)
    found = image_positions(model, inputs_of(family)["input_ids"], None)
    expected = [tiny.tokens_per_image(family, 0)]
    expected.append(sum(tiny.tokens_per_image(family, i) for i in ([1] if family == "paligemma" else [1, 2])))
    assert found.sum(1).tolist() == expected


def test_video_tokens_count_as_image_tokens() -> None:
    model, _ = model_of("qwen2_5_vl")
    ids = torch.tensor([[1, 5, 92, *[tiny.VIDEO] * 6, 93, 7, 8, 9]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(24, 96, generator=torch.Generator().manual_seed(3)),
        "video_grid_thw": torch.tensor([[1, 4, 6]]),
        "mm_token_type_ids": (ids == tiny.VIDEO).int() * 2,
    }
    stock = logits(model, **inputs)
    with vlm.edit(model, "pai", alpha=0.5):
        assert worst(logits(model, **inputs), stock) > 0.05


# --- ways to generate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("way", ["static", "no cache", "prompt lookup", "assistant"])
def test_same_answer_another_way(family: str, method: str, way: str) -> None:
    model, rows = model_of(family)
    assisted = way in ("prompt lookup", "assistant")
    inputs = inputs_of(family, slice(1, 2)) if assisted else inputs_of(family)
    extra: dict[str, Any] = {
        "static": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": model_of(family, "eager")[0]},
    }[way]
    try:
        logits(model, **inputs, **extra)
    except RuntimeError as broken:
        pytest.skip(f"this transformers can't do it without an edit either: {broken}")
    with vlm.edit(model, method, **EDITED[method]) as session:
        expected = logits(model, **inputs)
        if way == "assistant" and family == "gemma3" and Version(transformers.__version__) < Version("5.23"):
            pytest.skip("seen in 5.17: a rejected draft leaves Gemma 3's sliding mask shorter than its keys")
        assert worst(logits(model, session.generate, **inputs, **extra), expected) < ROUNDING
        if way != "no cache":
            assert worst(logits(model, **inputs, **extra), expected) < ROUNDING


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prefill_in_chunks(family: str, method: str) -> None:
    model, _ = model_of(family)
    inputs = inputs_of(family)
    try:
        stock = logits(model, **inputs, prefill_chunk_size=9)
    except (ValueError, RuntimeError) as refused:
        pytest.skip(f"this transformers refuses it: {refused}")
    if worst(stock, logits(model, **inputs)) > ROUNDING:
        pytest.skip("this transformers does not reproduce its own prefill in chunks")
    with vlm.edit(model, method, **EDITED[method]) as session:
        expected = logits(model, **inputs)
        assert worst(logits(model, session.generate, **inputs, prefill_chunk_size=9), expected) < ROUNDING
        with pytest.raises(UnsupportedError, match=r"session\.generate"):
            logits(model, **inputs, prefill_chunk_size=9)


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_sampling(method: str) -> None:
    inputs = inputs_of("llava")
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    found = []
    for implementation in ("sdpa", "eager"):
        model, _ = model_of("llava", implementation)
        stock = model.generate(**inputs, **beams)
        with vlm.edit(model, method, **NEUTRAL[method]):
            assert torch.equal(model.generate(**inputs, **beams), stock)
        with vlm.edit(model, method, **EDITED[method]) as session:
            torch.manual_seed(5)
            sampled = model.generate(**inputs, max_new_tokens=6, do_sample=True, num_return_sequences=2)
            found.append((model.generate(**inputs, **beams), session.generate(**inputs, **beams), sampled))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0], found[0][1])
    assert not torch.equal(found[0][0], stock)
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("method", METHODS)
def test_inputs_embeds(method: str) -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
    embeds = model.get_input_embeddings()(ids)
    merged = embeds.clone()
    features = model.get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)
    merged[ids == tiny.IMAGE] = torch.cat(list(features)).to(merged.dtype)
    with vlm.edit(model, method, **EDITED[method]) as session, torch.no_grad():
        expected = logits(model, input_ids=ids, pixel_values=pixels, **inputs)
        assert worst(logits(model, inputs_embeds=embeds, pixel_values=pixels, **inputs), expected) < ROUNDING
        own = logits(model, session.generate, inputs_embeds=merged, image_mask=ids == tiny.IMAGE, **inputs)
        assert worst(own, expected) < ROUNDING
        with pytest.raises(SeamError, match="image_mask"):
            model(inputs_embeds=merged, pixel_values=pixels[:0], **inputs)


def test_a_further_turn_on_one_cache() -> None:
    found = []
    for implementation in ("sdpa", "eager"):
        model, _ = model_of("llava", implementation)
        inputs = inputs_of("llava", slice(0, 1))
        with vlm.edit(model, ["pai", ("var", EDITED["var"])]) as session:
            first = session.generate(**inputs, **PLAIN, **KEPT)
            ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
            further = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "past_key_values": first.past_key_values,
            }
            with pytest.raises(UnsupportedError, match="a further turn"):
                model(input_ids=ids[:, -4:], past_key_values=first.past_key_values)
            found.append(logits(model, session.generate, **further))
        with vlm.edit(model, "pai"), pytest.raises(UnsupportedError, match="filled outside of this session"):
            model.generate(**further, **PLAIN)
    assert worst(*found) < ROUNDING


def test_a_prompt_without_a_picture_is_stock() -> None:
    model, _ = model_of("llava")
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    stock = logits(model, input_ids=ids)
    with vlm.edit(model, "pai"), vlm.edit(model, "var", **EDITED["var"]):
        assert worst(logits(model, input_ids=ids), stock) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, rows = tiny.build("llava")
    model.to(dtype)
    inputs = tiny.batch("llava", rows)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    stock = model(**inputs).logits
    for method in METHODS:
        with vlm.edit(model, method, **NEUTRAL[method]):
            out = model(**inputs).logits
        assert out.dtype == dtype and worst(out.float(), stock.float()) < 0.15


def test_every_edit_together_in_both_formulations() -> None:
    edits = [
        vlm.KeyBias((1, 2), keys="first", heads=(0, 3), rows="all", value=0.7),
        vlm.KeyBias((2,), keys="text", rows="answer", value=-0.4),
        vlm.HeadScale((2, 3), heads=(1, 5), factor=1.7, rows="after_image"),
        ("pai", {"alpha": 0.3}),
        ("var", EDITED["var"]),
    ]
    found = []
    for implementation in ("sdpa", "eager"):
        model, _ = model_of("llava", implementation)
        with vlm.edit(model, edits):
            found.append(logits(model, **inputs_of("llava")))
    assert worst(*found) < ROUNDING
    model, rows = model_of("llava")
    with vlm.edit(model, edits):
        for index, row in enumerate(rows):
            assert worst(logits(model, **tiny.batch("llava", [row])), found[0][index : index + 1]) < ROUNDING


def test_output_attentions_with_eager_are_the_edited_ones() -> None:
    model, _ = model_of("llava", "eager")
    inputs = inputs_of("llava")
    image = inputs["input_ids"] == tiny.IMAGE
    plain = model(**inputs, output_attentions=True).attentions
    with vlm.edit(model, "pai", alpha=3.0, layers=[2]):
        edited = model(**inputs, output_attentions=True).attentions
    on = [(a[:, :, -1] * image[:, None]).sum(-1) for a in (plain[2], edited[2])]
    assert torch.equal(plain[2][:, :, :-1], edited[2][:, :, :-1]) and torch.equal(plain[1], edited[1])
    assert (edited[2][:, :, -1].sum(-1) - 1).abs().max() < 1e-5 and worst(*on) > 0.01


def test_gradients_pass_through_both_formulations() -> None:
    found = []
    for implementation in interception.STOCK:
        model, _ = model_of("llava", implementation)
        model.zero_grad()
        with vlm.edit(model, ["pai", ("var", EDITED["var"])]):
            model(**inputs_of("llava")).logits[:, -1].square().sum().backward()
        found.append(model.get_input_embeddings().weight.grad.clone())
        model.zero_grad()
    assert found[0].abs().max() > 0.1 and worst(*found) < 1e-4 * found[0].abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_decoding_gives_the_same_answer(method: str) -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    compiling = transformers.CompileConfig(fullgraph=False, mode="default", backend="eager")
    compiling._compile_all_devices = True
    extra = {"cache_implementation": "static", "compile_config": compiling, "disable_compile": False}
    with vlm.edit(model, method, **EDITED[method]):
        assert worst(logits(model, **inputs, **extra), logits(model, **inputs)) < ROUNDING


# --- sessions ----------------------------------------------------------------------------------------------------


def test_nested_sessions_leave_in_any_order() -> None:
    model, _ = tiny.build("llava")
    inputs = inputs_of("llava")
    stock = logits(model, **inputs)
    before = fingerprint(model)  # behind a first run, in which transformers hooks its own vision tower
    with vlm.edit(model, ["pai", ("var", EDITED["var"])]):
        both = logits(model, **inputs)
    with vlm.edit(model, "var", **EDITED["var"]):
        only_var = logits(model, **inputs)
    first, second = vlm.edit(model, "pai"), vlm.edit(model, "var", **EDITED["var"])
    first.__enter__()
    second.__enter__()
    assert torch.equal(logits(model, **inputs), both)
    first.close()
    assert torch.equal(logits(model, **inputs), only_var)
    first.close()  # once more does nothing
    second.close()
    assert fingerprint(model) == before and torch.equal(logits(model, **inputs), stock)
    with first, pytest.raises(RuntimeError, match="open already"):  # a closed session can be opened again, once
        first.__enter__()
    with pytest.raises(RuntimeError, match="not open"):
        first.generate(**inputs)


def test_two_models_that_share_a_config() -> None:
    model, _ = tiny.build("llava")
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    inputs = inputs_of("llava")
    stock = logits(twin, **inputs)
    first = vlm.edit(model, "pai", alpha=0.5).__enter__()
    edited = logits(model, **inputs)
    assert torch.equal(logits(twin, **inputs), stock) and worst(edited, stock) > 0.05
    second = vlm.edit(twin, "pai", alpha=0.5).__enter__()
    first.close()
    assert torch.equal(logits(twin, **inputs), edited) and torch.equal(logits(model, **inputs), stock)
    second.close()
    assert model.config.text_config._attn_implementation == "sdpa"


def test_two_threads_with_a_method_each() -> None:
    model, _ = tiny.build("llava")
    inputs = inputs_of("llava")
    alone, together = {}, {}
    for method in METHODS:
        with vlm.edit(model, method, **EDITED[method]):
            alone[method] = logits(model, **inputs)
    opened, done = threading.Barrier(3), threading.Barrier(3)

    def work(method: str) -> None:
        with vlm.edit(model, method, **EDITED[method]):
            opened.wait(60)
            together[method] = [logits(model, **inputs) for _ in range(3)]
            done.wait(60)

    threads = [threading.Thread(target=work, args=(method,)) for method in METHODS]
    for thread in threads:
        thread.start()
    opened.wait(60)
    with pytest.raises(UnsupportedError, match="several threads"):
        model(**inputs)
    done.wait(60)
    for thread in threads:
        thread.join(60)
    for method in METHODS:
        assert all(torch.equal(own, alone[method]) for own in together[method])
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_streamer_in_another_thread() -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava", slice(0, 1))

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens.append(value.reshape(-1))

        def end(self) -> None:
            pass

    for own in (False, True):
        with vlm.edit(model, "pai", alpha=0.5) as session:
            expected = model.generate(**inputs, **PLAIN)
            streamer = Streamer()
            generate = session.generate if own else model.generate
            thread = threading.Thread(target=generate, kwargs={**inputs, **PLAIN, "streamer": streamer})
            thread.start()
            thread.join(60)
        assert torch.equal(torch.cat(streamer.tokens), expected[0])


def test_an_exception_passes_through_and_leaves_no_trace() -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("on purpose")

    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    stock = logits(model, **inputs)
    before = fingerprint(model)  # behind a first run, in which transformers hooks its own vision tower
    with pytest.raises(ZeroDivisionError, match="on purpose"), vlm.edit(model, "var", **EDITED["var"]):
        model.generate(**inputs, **PLAIN, logits_processor=[Broken()])
    assert fingerprint(model) == before and torch.equal(logits(model, **inputs), stock)


def test_an_edit_that_meets_no_layer_is_an_error() -> None:
    model, _ = tiny.build("llava")
    inputs = inputs_of("llava")
    with vlm.edit(model, "pai"):
        with pytest.raises(SeamError, match="forward of the model"):
            model.model(**inputs)
        text = model.model.language_model
        with pytest.raises(SeamError, match="forward of the model"):
            text(input_ids=inputs["input_ids"])
        model.set_attn_implementation({"text_config": "sdpa"})
        with pytest.raises(SeamError, match=r"layers \[2, 3\] .* not intercepted"):
            model(**inputs)
    assert text.config._attn_implementation == "sdpa"


# --- the methods' own ----------------------------------------------------------------------------------------------


def test_var_keeps_sums_and_moves_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    attn = torch.softmax(2 * torch.randn(2, 4, 9, 12, generator=generator).double(), -1)
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 2:8] = image[1, 4:9] = True
    sinks = torch.zeros_like(image)
    sinks[0, [0, 3]] = sinks[1, [1, 5, 6]] = True
    groups = var_groups(sinks, image)
    new, chosen = var_redistribute(attn, groups, VarRule(p=0.3, rho=0.6, summ=0.1))
    assert chosen.any() and not chosen.all()
    assert (new.sum(-1) - 1).abs().max() < 1e-12
    for b, h, q in chosen.nonzero().tolist():
        row, old = new[b, h, q], attn[b, h, q]
        assert torch.allclose(row[sinks[b]], 0.3 * old[sinks[b]])
        free = image[b] & ~sinks[b]
        assert torch.allclose(row[free] / old[free], (row[free] / old[free])[0])
        assert torch.equal(row[~image[b] & ~sinks[b]], old[~image[b] & ~sinks[b]])
    still = ~chosen
    assert torch.equal(new[still], attn[still])


def test_sink_dimensions() -> None:
    class Text:
        model_type, hidden_size, num_hidden_layers, vocab_size = "llama", 4096, 32, 32064

    assert known_dim_sink(Text) == (2533, 1415)
    Text.hidden_size, Text.num_hidden_layers = 5120, 40
    assert known_dim_sink(Text) == (2100, 4743)
    Text.model_type = "qwen2"
    assert known_dim_sink(Text) is None
    hidden = torch.randn(2, 6, 16)
    hidden[0, 0, [3, 9]] = torch.tensor([50.0, -60.0])
    hidden[1, 2, [1, 4]] = torch.tensor([-40.0, 30.0])
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :2] = False
    assert [sorted(row) for row in detect_dim_sink(hidden, real).tolist()] == [[3, 9], [1, 4]]


def test_official_and_corrected_var_differ_where_the_docstring_says() -> None:
    text = model_of("llava")[0].config.text_config
    assert var(text)[0].layers == (2,) and var(text, compat="official")[0].layers == (2, 3)
    assert pai(text)[0].layers == (2, 3)


def test_one_layer_on_plain_tensors_agrees_in_both_formulations() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 8, 40, 16, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 40, 16, generator=generator, dtype=torch.float64) for _ in "kv")
    hidden = torch.randn(2, 40, 64, generator=generator, dtype=torch.float64)
    image = torch.zeros(2, 40, dtype=torch.bool)
    image[0, 5:20] = image[1, 11:30] = True
    text = model_of("llava")[0].config.text_config
    edits = (*var(text, tau=1.5, layers=[2], rho=1.0, summ=0.0), *pai(text, 0.4, [2]))
    both = [
        edited_layer(edits, q, k, v, image, hidden, layer=2, num_layers=4, implementation=i) for i in ("sdpa", "eager")
    ]
    plain, _ = edited_layer(edits, q, k, v, image, layer=1, num_layers=4)
    assert worst(both[0][0], both[1][0]) < 1e-12
    assert torch.equal(both[0][0][0, :20], plain[0, :20]) and torch.equal(both[0][0][1, :30], plain[1, :30])
    assert worst(both[0][0][1, 30:], plain[1, 30:]) > 1e-3
