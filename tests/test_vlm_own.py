"""What single methods of the vision-language room do, against plain formulas on tiny models; their bad input."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import vlm_models as tiny
from PIL import Image
from test_vlm_edges import folder, picture  # noqa: F401 (fixtures)
from transformers import AutoModelForImageTextToText

from attnzoo import vlm
from attnzoo.errors import UnsupportedError
from attnzoo.vlm.act import act_sinks, column_means
from attnzoo.vlm.carving import attention_regions, bounding_box, contrast_map, cut_out
from attnzoo.vlm.gift import saliency
from attnzoo.vlm.masks import mutual_mask
from attnzoo.vlm.paint import token_sets
from attnzoo.vlm.vhr import head_divergence, vision_aware_heads

ROUNDING = 2e-5


@functools.cache
def model_of(family: str, implementation: str = "sdpa") -> tuple[Any, list[dict[str, Any]]]:
    return tiny.build(family, implementation)


def inputs_of(family: str, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    return tiny.batch(family, model_of(family)[1][rows])


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def attentions(model: Any, inputs: dict[str, torch.Tensor], *methods: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        if not methods:
            return model(**inputs, output_attentions=True).attentions
        with vlm.edit(model, *methods, **kwargs):
            return model(**inputs, output_attentions=True).attentions


# --- gift ------------------------------------------------------------------------------------------------------------


def test_gift_is_its_formula() -> None:
    eager, _ = model_of("llava", "eager")
    inputs = inputs_of("llava", slice(1, 2))
    image = inputs["input_ids"][0] == tiny.IMAGE
    end = int(image.nonzero().max()) + 1
    plain = attentions(eager, inputs)
    with torch.no_grad():
        edited = attentions(eager, inputs, "gift", saliency_layers=[1], layers=[2], alpha=3.0)
    rows = plain[1][0]
    shift = (rows[:, end:] - rows[:, end - 1 : -1]).clamp_min(0)[:, :, image]
    kept = shift[shift.sum((1, 2)).topk(4).indices].mean((0, 1))
    mean, std = kept.mean(), kept.std()
    kept = kept.clamp(mean - 3 * std, mean + 3 * std)
    weight = torch.exp(3.0 * (kept - kept.min()) / (kept.max() - kept.min()))
    last = plain[2][0, :, -1].clone()
    looks, reads = last[:, image].sum(1).topk(4).indices, last[:, end:].sum(1).topk(4).indices
    before = last[looks][:, image].sum()
    last[looks[:, None], image.nonzero()[:, 0]] *= weight
    grown = last[looks][:, image].sum() / before
    last[reads[:, None], torch.arange(end, last.shape[1])] *= grown
    assert worst(edited[2][0, :, -1], last / last.sum(-1, keepdim=True)) < 1e-6
    assert torch.equal(edited[2][:, :, :-1], plain[2][:, :, :-1]) and grown > 1


def test_gift_reads_ahead_only_where_it_must() -> None:
    model, _ = model_of("llava")
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for layers, forwards in (([2, 3], 1), ([1, 2], 2)):
            calls.clear()
            with vlm.edit(model, "gift", saliency_layers=[1], layers=layers):
                model(**inputs_of("llava"))
            assert len(calls) == forwards
    finally:
        handle.remove()


def test_a_saliency_of_ones_own_and_words() -> None:
    model, _ = model_of("llava")
    inputs = inputs_of("llava")
    ids = inputs["input_ids"]
    own = torch.rand(ids.shape)
    with vlm.edit(model, "gift", saliency=own):
        first = model(**inputs).logits
    with vlm.edit(model, "gift", saliency=own.flip(0)):
        assert worst(model(**inputs).logits[:, -1], first[:, -1]) > 1e-3
    lengths = inputs["attention_mask"].sum(1).tolist()
    spans = [[(n - 4, n - 2)] for n in lengths]
    with vlm.edit(model, "gift", words=spans):
        by_span = model(**inputs).logits
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, -4:-2] = True
    with vlm.edit(model, "gift", words=mask):
        assert torch.equal(model(**inputs).logits, by_span)
    with vlm.edit(model, "gift", saliency=own[:, :4]), pytest.raises(ValueError, match="saliency must be"):
        model(**inputs)


def test_saliency_has_its_range_and_ignores_what_is_no_image() -> None:
    image = torch.tensor([[True] * 6 + [False] * 2, [False] * 4 + [True] * 4, [False] * 8])
    found = saliency(torch.rand(3, 8, dtype=torch.float64), image)
    assert found[0, :6].min() == 0 and found[0, :6].max() == 1 and not found[~image].any()


# --- paint -----------------------------------------------------------------------------------------------------------


def test_paint_takes_its_tokens_from_the_vision_tower() -> None:
    config = tiny.config("llava")
    config.vision_config.num_hidden_layers = 3  # so that the first and the last but one are two
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    eager = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    model.generation_config.pad_token_id = tiny.PAD
    inputs = inputs_of("llava")
    with torch.no_grad():
        vision = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    local, summary = token_sets(*(vision[i][:, :, 0, 1:].sum(1) for i in (0, -2)))
    assert local.any() and not (local & summary).any()
    image = inputs["input_ids"] == tiny.IMAGE

    def flags(chosen: torch.Tensor) -> Any:
        full = torch.zeros_like(image)
        full[image] = chosen.flatten()
        return lambda prompt: full

    edits = [vlm.LogitMap((2, 3), flags(local), alpha=0.7), vlm.LogitMap((2, 3), flags(summary), alpha=0.3)]
    with vlm.edit(model, edits):
        expected = model(**inputs).logits
    with vlm.edit(model, "paint"):
        assert worst(model(**inputs).logits, expected) < ROUNDING
    beams = {"num_beams": 3, "max_new_tokens": 3, "do_sample": False, "suppress_tokens": [tiny.IMAGE]}
    with vlm.edit(model, "paint"):
        out = model.generate(**inputs, **beams)
        single = model.generate(**inputs_of("llava", slice(1, 2)), **beams)
    with vlm.edit(model, edits):
        assert torch.equal(model.generate(**inputs, **beams), out)
    assert torch.equal(out[1:, inputs["input_ids"].shape[1] :], single[:, -3:])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "paligemma"])
def test_paint_is_refused_where_no_cls_token_is(family: str) -> None:
    with pytest.raises(UnsupportedError, match="CLS token"):
        vlm.edit(model_of(family)[0], "paint")


# --- pasta, zerotuning -----------------------------------------------------------------------------------------------


def test_pasta_scales_the_odds_of_what_is_outside() -> None:
    eager, _ = model_of("llava", "eager")
    inputs = inputs_of("llava")
    image = inputs["input_ids"] == tiny.IMAGE
    plain = attentions(eager, inputs)[1]
    edited = attentions(eager, inputs, "pasta", heads=[2], layers=[1], alpha=0.1)[1]
    weighted = plain[:, 2] * torch.where(image, 1.0, 0.1)[:, None]
    real = inputs["attention_mask"].bool()
    assert worst(edited[:, 2][real], (weighted / weighted.sum(-1, keepdim=True))[real]) < 1e-6
    assert worst(edited[:, :2], plain[:, :2]) < 1e-6


def test_zerotuning_finds_the_first_real_token() -> None:
    eager, _ = model_of("llava", "eager")
    inputs = inputs_of("llava")
    plain = attentions(eager, inputs)[0]
    edited = attentions(eager, inputs, "zerotuning", gamma=0.25)[0]
    for row, mask in enumerate(inputs["attention_mask"]):
        first = int(mask.argmax())
        weighted = plain[row, :, first:].clone()
        weighted[..., first] *= 0.25
        assert worst(edited[row, :, first:], weighted / weighted.sum(-1, keepdim=True)) < 1e-6
    official = attentions(eager, inputs, "zerotuning", gamma=0.25, compat="official")[0]
    padded = int(inputs["attention_mask"][0].argmax())
    assert padded > 0 and worst(official[0, :, padded:], plain[0, :, padded:]) < 1e-6


# --- act, vif --------------------------------------------------------------------------------------------------------


def test_act_moves_what_its_sinks_lose() -> None:
    eager, _ = model_of("llava", "eager")
    inputs = inputs_of("llava")
    real = inputs["attention_mask"].bool()
    plain = attentions(eager, inputs)[2]
    edited = attentions(eager, inputs, "act", layers=[2], threshold=0.06, beta=0.3, heads={2: [0, 3, 4]})[2]
    sinks = act_sinks(column_means((plain * real[:, None, :, None]).sum(2), real), 0.06)
    assert sinks[:, [0, 3, 4]].any()
    for row in range(2):
        for head in range(8):
            old, new = plain[row, head][real[row]], edited[row, head][real[row]]
            own = sinks[row, head] if head in (0, 3, 4) else torch.zeros_like(real[row])
            assert worst(new.sum(-1), torch.ones(len(new))) < 1e-6
            assert worst(new[:, own], 0.3 * old[:, own]) < 1e-6 if own.any() else torch.allclose(new, old, atol=1e-6)
            if own.any():
                free = old[:, ~own]
                assert worst(new[:, ~own], free * ((1 - 0.3 * old[:, own].sum(1)) / free.sum(1))[:, None]) < 1e-6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_vif_keeps_sums_and_gives_to_seen_keys_alone(implementation: str) -> None:
    eager, _ = model_of("llava", "eager")
    inputs = inputs_of("llava")
    real = inputs["attention_mask"].bool()
    layer = {"tau": 1.0, "middle": (2,), "deep": (), "alpha_middle": 0.5, "inactive": "image"}
    plain, edited = attentions(eager, inputs)[2], attentions(eager, inputs, "vif", **layer)[2]
    assert worst(edited.sum(-1).transpose(1, 2)[real], torch.ones(int(real.sum()), 8)) < 1e-6
    unseen = torch.triu(torch.ones(plain.shape[-2:]), 1).bool() | ~real[:, None, None]
    assert not edited.masked_select(unseen & real[:, None, :, None]).abs().max() > 1e-9
    moved = (plain - edited)[:, :, -1]
    image = inputs["input_ids"] == tiny.IMAGE
    assert (
        worst(
            edited[:, :, -1][image[:, None].expand(-1, 8, -1)], 0.5 * plain[:, :, -1][image[:, None].expand(-1, 8, -1)]
        )
        < 1e-6
    )
    receivers = real & ~image
    receivers[0, int(image[0].nonzero().max()) + 1 :] = False
    receivers[1, int(image[1].nonzero().max()) + 1 :] = False
    for row in range(2):
        got = -moved[row][:, receivers[row]]
        assert worst(got, got[:, :1].expand_as(got)) < 1e-6 and got.min() > 0
    official = attentions(eager, inputs, "vif", **layer, compat="official")[2]
    assert official.masked_select(unseen & real[:, None, :, None]).max() > 1e-4


def test_vif_says_where_key_norms_can_not_choose() -> None:
    model, _ = model_of("gemma3")
    with vlm.edit(model, "vif"), pytest.raises(UnsupportedError, match="inactive="):
        model(**inputs_of("gemma3"))


# --- vhr -------------------------------------------------------------------------------------------------------------


def head_outputs(
    model: Any, layers: tuple[int, ...], inputs: dict[str, torch.Tensor], *more: Any
) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    probe = vlm.Probe(layers, lambda r: found.update({r.layer: r.value[:, -1]}), what="outputs", rows="last")
    with vlm.edit(model, [*more, probe]), torch.no_grad():
        model(**inputs)
    return found


@pytest.mark.parametrize("stream", ["own", "shared"])
def test_vhr_scales_heads_that_see(stream: str) -> None:
    model, rows = model_of("llava")
    inputs = inputs_of("llava", slice(1, 2))
    ids = inputs["input_ids"]
    text = {"input_ids": ids[ids != tiny.IMAGE][None]}
    scales: list[Any] = []
    for layer in (1, 2, 3):
        reinforced = list(scales)
        seeing = head_outputs(model, (layer,), inputs, *reinforced)[layer]
        blind = head_outputs(model, (layer,), text, *(reinforced if stream == "shared" else []))[layer]
        chosen = vision_aware_heads(head_divergence(seeing, blind))[0].nonzero()[:, 0].tolist()
        assert 0 < len(chosen) <= 4
        scales.append(vlm.HeadScale((layer,), tuple(chosen), 2.0, rows="answer"))
    with vlm.edit(model, scales):
        expected = model(**inputs).logits
    with vlm.edit(model, "vhr", blind_stream=stream):
        assert worst(model(**inputs).logits[:, -1], expected[:, -1]) < ROUNDING


def test_vhr_outliers_and_median() -> None:
    seeing = torch.zeros(1, 8, 4)
    seeing[0, :, 0] = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 100])
    blind = torch.zeros(1, 8, 4)
    blind[0, 7, 1] = 50.0
    kept = head_divergence(seeing, blind, None)
    assert kept[0, 7] > 100 and vision_aware_heads(kept)[0].tolist() == [False] * 4 + [True] * 4
    for outliers in ("sample", "population"):
        assert head_divergence(seeing, blind, outliers)[0, 7] == 0
    assert vision_aware_heads(head_divergence(seeing, blind))[0].tolist() == [False] * 3 + [True] * 4 + [False]


# --- masks -----------------------------------------------------------------------------------------------------------


def test_mma_is_the_authors_mask() -> None:
    eager, _ = model_of("llava", "eager")
    inputs = inputs_of("llava", slice(0, 1))
    image = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    start, stop = int(image.min()), int(image.max()) + 1
    wanted = mutual_mask(inputs["attention_mask"][0], start, stop, inputs["input_ids"].shape[1])
    for attention in attentions(eager, inputs, "mma"):
        assert torch.equal((attention[0] > 1e-12).all(0), wanted[0].bool())


@pytest.mark.parametrize(("family", "scope"), [("paligemma", "prompt"), ("gemma3", "image")])
def test_prefix_is_the_mask_that_a_model_has_anyway(family: str, scope: str) -> None:
    model, _ = model_of(family)
    inputs = inputs_of(family)
    real = inputs["attention_mask"].bool()
    stock = model(**inputs).logits
    with vlm.edit(model, "prefix", scope=scope):
        assert worst(model(**inputs).logits[real], stock[real]) < ROUNDING


@pytest.mark.parametrize(
    ("method", "own", "seen"),
    [
        ("eemllm", {"sees": "self"}, lambda q, k, same, causal: causal & (~q | same)),
        ("eemllm", {"sees": "text"}, lambda q, k, same, causal: causal & (~q | ~k | same)),
        ("eemllm", {"sees": "nothing"}, lambda q, k, same, causal: causal & ~q),
        ("prefix", {"scope": "prompt"}, lambda q, k, same, causal: torch.ones_like(causal)),
        ("moda", {"part": "self"}, lambda q, k, same, causal: causal & (q == k)),
        ("moda", {"part": "cross"}, lambda q, k, same, causal: causal & ((q != k) | same)),
    ],
)
def test_masks_say_who_sees_whom(method: str, own: dict[str, Any], seen: Any) -> None:
    eager, _ = model_of("llava", "eager")
    inputs = inputs_of("llava", slice(0, 1))
    image = inputs["input_ids"][0] == tiny.IMAGE
    length = len(image)
    causal = torch.ones(length, length).tril().bool()
    wanted = seen(image[:, None], image[None], torch.eye(length).bool(), causal)
    found = attentions(eager, inputs, method, **own)[1][0]
    assert torch.equal((found > 0).all(0), wanted)


# --- carve -----------------------------------------------------------------------------------------------------------


def test_carve_cuts_what_the_question_looks_at() -> None:
    query, general = torch.full((2, 1, 36), 0.01), torch.full((3, 1, 36), 0.01)
    query[:, :, [14, 15, 20, 21]] = 0.2
    found = contrast_map(query, general, (6, 6), (60, 48))
    mask = attention_regions(found, 0.15, 1)
    left, top, right, bottom = bounding_box(mask)
    assert 15 <= left < 25 and 35 < right <= 45 and 12 <= top < 20 and 28 < bottom <= 36
    cut = cut_out(Image.new("RGB", (60, 48), "white"), mask)
    assert cut.width == 60 or cut.height == 48
    assert attention_regions(found, 1.0).all() and bounding_box(np.zeros((4, 5))) == (0, 0, 5, 4)


def test_carve_asks_three_times(folder: Path, picture: Path) -> None:  # noqa: F811
    from attnzoo.vlm.asking import load

    model, processor = load(folder, "cpu")
    shared = {"max_new_tokens": 4, "suffix": "", "general": "what is on"}
    plain = vlm.ask(picture, "a dog", model, processor=processor, max_new_tokens=4)
    whole = vlm.carve(model, processor, picture, "a dog", top_percent=1.0, **shared)
    assert whole.first_answer == whole.answer == plain, "the whole picture is the plain question"
    part = vlm.carve(model, processor, picture, "a dog", top_percent=0.3, **shared)
    assert part.first_answer == plain and 0 < part.mask.mean() <= 0.31
    assert part.attention.shape == part.mask.shape == (40, 30)
    both = vlm.carve(model, processor, picture, "a dog", top_percent=0.3, compat="official", **shared)
    assert np.array_equal(both.mask, part.mask)
    with pytest.raises(ValueError, match="query_maps and general_maps must be"):
        vlm.carve(model, processor, picture, "a dog", grid=(3, 3), **shared)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    ("gift", {"alpha": -1.0}, ValueError, "alpha must be from 0"),
    ("gift", {"layers": [7]}, ValueError, "0 to 3, got 7"),
    ("gift", {"query": 3}, TypeError, "query must be"),
    ("gift", {"words": [(3, 1)]}, ValueError, "words must hold pairs of integers"),
    ("paint", {"local": [1]}, ValueError, "local and summary go together"),
    ("paint", {"local": [-1], "summary": []}, ValueError, "local must hold integers"),
    ("paint", {"local": 3, "summary": []}, TypeError, "local must be an iterable"),
    ("pasta", {"alpha": 0.0}, ValueError, "alpha must be above 0"),
    ("pasta", {"heads": [8]}, ValueError, "heads must hold integers from 0 to 7"),
    ("pasta", {"heads": {1: [9]}}, ValueError, r"heads\[1\] must hold"),
    ("pasta", {"scale_position": "around"}, ValueError, "scale_position must be one of"),
    ("pasta", {"tokens": "sky"}, ValueError, "tokens must be one of"),
    ("pasta", {"tokens": torch.zeros(2, 3)}, ValueError, "tokens as a tensor must be bool"),
    ("zerotuning", {"gamma": 0}, ValueError, "gamma must be above 0"),
    ("zerotuning", {"span": (2, 1)}, ValueError, "span must hold pairs"),
    ("act", {"beta": 2.0}, ValueError, "beta must be from 0"),
    ("act", {"heads": "all"}, TypeError, "heads must be an iterable"),
    ("vif", {"tau": 0.0}, ValueError, "tau must be above 0"),
    ("vif", {"middle": [1], "deep": [1]}, ValueError, "must not share layers"),
    ("vif", {"middle": (), "deep": ()}, ValueError, "at least one layer"),
    ("vhr", {"blind": "hidden"}, ValueError, 'goes with blind_stream="own"'),
    ("vhr", {"rows": "some"}, ValueError, "rows must be one of"),
    ("vhr", {"outliers": "median"}, ValueError, "outliers must be one of"),
    ("mma", {"question": "sky"}, ValueError, "question must be one of"),
    ("eemllm", {"sees": "sky"}, ValueError, "sees must be one of"),
    ("prefix", {"scope": "answer"}, ValueError, "scope must be one of"),
    ("moda", {"part": "third"}, ValueError, "part must be one of"),
    ("giift", {}, ValueError, "did you mean 'gift'"),
]


@pytest.mark.parametrize(("method", "arguments", "kind", "told"), BAD)
def test_bad_input_is_named_before_anything_changes(method: str, arguments: Any, kind: Any, told: str) -> None:
    model, _ = model_of("llava")
    with pytest.raises(kind, match=told):
        vlm.edit(model, method, **arguments)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_tokens_that_do_not_fit_the_batch() -> None:
    model, _ = model_of("llava")
    with vlm.edit(model, "pasta", tokens=[[(0, 2)]] * 3), pytest.raises(ValueError, match="one list of spans per"):
        model(**inputs_of("llava"))
    with (
        vlm.edit(model, "pasta", tokens=torch.ones(1, 5, dtype=torch.bool)),
        pytest.raises(ValueError, match="tokens must be bool"),
    ):
        model(**inputs_of("llava"))


def test_published_settings() -> None:
    class Text:
        model_type, hidden_size, num_hidden_layers, num_attention_heads, vocab_size = "llama", 4096, 32, 32, 32064

    from attnzoo.vlm import METHODS

    watch, change = METHODS["gift"](Text)
    assert watch.layers == (11,) and change.layers == tuple(range(12, 23)) and change.assign.__self__.alpha == 5.0
    assert METHODS["act"](Text)[0].layers == tuple(range(2, 31))
    assert METHODS["vhr"](Text)[1].layers == (1, *range(18, 32))
    Text.model_type, Text.hidden_size, Text.num_hidden_layers, Text.vocab_size = "qwen2_vl_text", 3584, 28, 152064
    ahead, change = METHODS["gift"](Text)
    assert type(ahead).__name__ == "Rehearse" and change.layers == tuple(range(5, 19))
