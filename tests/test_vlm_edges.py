"""The vision-language room's edges: asking, bad input, refusals, and the facts of transformers that it stands on."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

import transformers
import vlm_models as tiny
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnzoo import vlm
from attnzoo.errors import ReachError, UnsupportedError
from attnzoo.vlm import interception

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "what", "is", "on", "the", "sofa", "?", "user", ":", "a", "dog")


@functools.cache
def llava() -> tuple[Any, dict[str, torch.Tensor]]:
    model, rows = tiny.build("llava")
    return model, tiny.batch("llava", rows)


# --- asking ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with processor and tokenizer, as `save_pretrained` lays it down."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)
    wrapped.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    processor = LlavaProcessor(
        images, wrapped, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}user : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}",
    )  # fmt: skip
    config = tiny.config("llava", vocab_size=len(WORDS))
    config.image_token_index = WORDS.index("<image>")
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    place = tmp_path_factory.mktemp("tiny_llava")
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(place)
    return place


@pytest.mark.parametrize("method", [None, "var", "pai", ["pai", "var"]])
def test_ask(folder: Path, picture: Path, method: Any) -> None:
    answer = vlm.ask(picture, "what is on the sofa ?", folder, method, max_new_tokens=4)
    again = vlm.ask([Image.open(picture)], "what is on the sofa ?", str(folder), method, max_new_tokens=4)
    assert answer == again and set(answer.split()) <= set(WORDS)


def test_ask_passes_arguments_on(folder: Path, picture: Path) -> None:
    plain = vlm.ask(picture, "what is on the sofa ?", folder, max_new_tokens=12)
    louder = vlm.ask(picture, "what is on the sofa ?", folder, "pai", max_new_tokens=12, alpha=40.0)
    assert plain != louder


def test_ask_a_loaded_model(folder: Path, picture: Path) -> None:
    from attnzoo.vlm.asking import load

    model, processor = load(folder, "cpu")
    expected = vlm.ask(picture, "a dog", folder, "pai", max_new_tokens=4)
    assert vlm.ask(picture, "a dog", model, "pai", max_new_tokens=4, processor=processor) == expected
    with pytest.raises(TypeError, match="processor must be given"):
        vlm.ask(picture, "a dog", model)


def test_ask_says_what_can_not_be_reached(folder: Path, picture: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ReachError, match=r"image .*nowhere\.png"):
        vlm.ask(tmp_path / "nowhere.png", "a dog", folder)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ReachError, match=r"text\.png"):
        vlm.ask(tmp_path / "text.png", "a dog", folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (tmp_path / "no_such_folder", tmp_path):
        with pytest.raises((ReachError, UnsupportedError), match="miniature|transformers loads"):
            vlm.ask(picture, "a dog", name)
    with pytest.raises(ValueError, match="prompt"):
        vlm.ask(picture, " ", folder)
    with pytest.raises(ValueError, match="max_new_tokens"):
        vlm.ask(picture, "a dog", folder, max_new_tokens=0)
    with pytest.raises(TypeError, match="alpha"):
        vlm.ask(picture, "a dog", folder, alpha=1.0)
    with pytest.raises(ValueError, match="at least one picture"):
        vlm.ask([], "a dog", folder)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    (("nothing",), {}, ValueError, "'pai', 'var'"),
    ((["pai", "nothing"],), {}, ValueError, "'nothing'"),
    (([],), {}, ValueError, "at least one method"),
    ((3,), {}, TypeError, "methods must be"),
    (([3],), {}, TypeError, "methods must hold"),
    ((["pai"],), {"alpha": 0.3}, TypeError, "need one method"),
    (("pai",), {"p": 0.3}, TypeError, "'pai' has no argument 'p'"),
    (("pai",), {"alpha": "loud"}, TypeError, "alpha must be a number, got str"),
    (("pai",), {"alpha": True}, TypeError, "alpha must be a number, got bool"),
    (("pai",), {"alpha": -0.1}, ValueError, "alpha must be from 0"),
    (("pai",), {"alpha": float("nan")}, ValueError, "alpha must be finite"),
    (("pai",), {"layers": [1, 4]}, ValueError, "0 to 3, got 4"),
    (("pai",), {"layers": []}, ValueError, "at least one layer"),
    (("pai",), {"layers": 2}, TypeError, "iterable of integers"),
    (("pai",), {"layers": [1.0]}, TypeError, "layers must hold integers"),
    (("pai",), {"compat": "paper"}, ValueError, "compat must be one of None, 'official'"),
    (("var",), {"p": 1.5}, ValueError, "p must be from 0"),
    (("var",), {"rho": -1}, ValueError, "rho must be from 0"),
    (("var",), {"summ": "half"}, TypeError, "summ must be a number"),
    (("var",), {"tau": 8.0}, ValueError, "tau must be below sqrt"),
    (("var",), {"dim_sink": [64]}, ValueError, "dim_sink must hold integers from 0 to 63"),
    (("var",), {"dim_sink": 5}, TypeError, "dim_sink must be an iterable"),
    ((["var", "var"],), {}, UnsupportedError, "layer 2 has two edits"),
    ((vlm.HeadScale((1,), heads=(8,), factor=2.0),), {}, ValueError, "heads must hold integers from 0 to 7"),
    ((vlm.LogitMap((9,), alpha=1.0),), {}, ValueError, "0 to 3, got 9"),
]


@pytest.mark.parametrize(("methods", "arguments", "kind", "told"), BAD)
def test_bad_input_is_named_before_anything_changes(methods: Any, arguments: Any, kind: Any, told: str) -> None:
    model, _ = llava()
    with pytest.raises(kind, match=told):
        vlm.edit(model, *methods, **arguments)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_bad_edits() -> None:
    with pytest.raises(ValueError, match="keys must be one of"):
        vlm.KeyBias((1,), keys="sky", value=1.0)
    with pytest.raises(ValueError, match="rows must be one of"):
        vlm.LogitMap((1,), rows="after_image", alpha=1.0)
    with pytest.raises(ValueError, match="at least one layer"):
        vlm.HeadScale((), heads=(1,), factor=2.0)


def test_what_is_no_model_for_edits() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        vlm.edit(torch.nn.Linear(2, 2), "pai")
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**tiny.TEXT, "num_hidden_layers": 1}))
    with pytest.raises(UnsupportedError, match="vision-language"):
        vlm.edit(text, "pai")


def test_nested_duplicates_are_refused_and_leave_the_outer_session() -> None:
    model, _ = llava()
    with vlm.edit(model, "var"):
        with pytest.raises(UnsupportedError, match="two edits"):
            vlm.edit(model, "var").__enter__()
        assert model.config.text_config._attn_implementation == "attnzoo_sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"


def test_right_padding_and_dropout_and_foreign_masks_are_refused() -> None:
    model, inputs = llava()
    mask = inputs["attention_mask"].clone()
    mask[0, -1] = 0
    with vlm.edit(model, "pai"):
        with pytest.raises(UnsupportedError, match="pad on the left"):
            model(**{**inputs, "attention_mask": mask})
        with pytest.raises(ValueError, match="attention_mask must cover"):
            model(**{**inputs, "attention_mask": mask[:, :3]})
        with pytest.raises(UnsupportedError, match="'s_aux', which edits don't know"):
            model(**inputs, s_aux=torch.zeros(8))
    dropping, _ = tiny.build("llava", attention_dropout=0.1)
    dropping.train()
    with vlm.edit(dropping, "pai"), pytest.raises(UnsupportedError, match="dropout"):
        dropping(**inputs)


def test_other_implementations_are_refused_by_name() -> None:
    model, _ = tiny.build("llava")
    model.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(UnsupportedError, match=r"'flex_attention'; edits serve 'sdpa', 'eager'"):
        vlm.edit(model, "pai")


def test_cross_attention_is_refused_by_name() -> None:
    vision = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"image_size": 16, "patch_size": 4, "intermediate_size": 48, "vision_output_dim": 64, "max_num_tiles": 2}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]]}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = tiny.TEXT | {"cross_attention_layers": [1], "rope_parameters": rope, "eos_token_id": 2}
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=90)
    model = transformers.MllamaForConditionalGeneration(config)
    with pytest.raises(UnsupportedError, match="cross-attention"):
        vlm.edit(model, "pai")


# --- upstream seams: facts of transformers that the room relies on ---------------------------------------------------


def test_seam_names_can_be_registered_and_a_dict_sets_the_text_tower_alone() -> None:
    for table in (AttentionInterface, AttentionMaskInterface):
        assert list(inspect.signature(table.register).parameters)[:2] == ["key", "value"]
    name = interception.registered_name("sdpa")
    assert ALL_ATTENTION_FUNCTIONS[name] is not ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    model, _ = tiny.build("llava")
    model.set_attn_implementation({"text_config": name})
    kinds = {k: getattr(model.config, k)._attn_implementation for k in ("text_config", "vision_config")}
    assert kinds == {"text_config": name, "vision_config": "sdpa"} and model.config._attn_implementation == "sdpa"


def test_seam_without_a_mask_function_padding_is_dropped() -> None:
    """Why the pair is registered: an attention function alone gets no mask, silently."""
    model, inputs = tiny.build("llava")[0], llava()[1]
    stock = model(**inputs).logits
    AttentionInterface.register("attnzoo_test_no_mask", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation({"text_config": "attnzoo_test_no_mask"})
    bare = model(**inputs).logits
    assert torch.allclose(bare[1], stock[1], atol=1e-5)
    assert not torch.allclose(bare[0, -1], stock[0, -1], atol=1e-2)


@pytest.mark.parametrize("implementation", interception.STOCK)
def test_seam_what_an_attention_function_is_given(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    stock = interception.stock_attention

    def spy(module: Any, name: str) -> Any:
        def attention(m: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
            seen.append({"layer": m.layer_idx, "q": q.shape, "k": k.shape, "mask": mask, **kwargs})
            return stock(module, name)(m, q, k, v, mask, **kwargs)

        return attention

    monkeypatch.setattr(interception, "stock_attention", spy)
    model, rows = tiny.build("llava", implementation)
    with vlm.edit(model, "pai", layers=[3]):
        model(**tiny.batch("llava", rows))
        padded = seen[:4]
        model(**tiny.batch("llava", rows[:1]))
    assert [call["layer"] for call in padded] == [0, 1, 2, 3]
    batch, length = tiny.batch("llava", rows)["input_ids"].shape
    assert padded[0]["q"] == (batch, 8, length, 8) and padded[0]["k"] == (batch, 4, length, 8)
    assert padded[0]["scaling"] == pytest.approx(8**-0.5) and padded[0]["dropout"] == 0.0
    mask, alone = padded[0]["mask"], seen[4]["mask"]
    assert mask.shape == (batch, 1, length, length)
    if implementation == "sdpa":
        assert mask.dtype == torch.bool and alone is None
    else:
        assert mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_seam_a_decoder_layer_is_given_the_residual_stream_and_our_argument() -> None:
    model, inputs = llava()
    seen = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], interception.ARGUMENT in kwargs))

    handle = interception.decoder_layers(model)[2].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with vlm.edit(model, "pai"):
            states = model(**inputs, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    assert torch.equal(seen[0][0], states[2]) and seen[0][1]


def test_seam_generate_refuses_arguments_that_it_does_not_know() -> None:
    model, inputs = llava()
    with pytest.raises(ValueError, match="attnzoo_step"):
        model.generate(**inputs, max_new_tokens=1, attnzoo_step=1)


def test_seam_caches_are_weakly_referable_and_told_apart() -> None:
    import weakref

    first, second = transformers.DynamicCache(), transformers.DynamicCache()
    table = weakref.WeakKeyDictionary({first: 1, second: 2})
    assert table[first] == 1 and table[second] == 2
    del first
    assert len(table) == 1


def test_seam_generate_asks_for_the_logits_of_the_rows_that_answer() -> None:
    """Assisted decoding runs prompt and candidates in one forward: logits_to_keep says where the prompt ends."""
    model, inputs = llava()
    kept = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        kept.append((kwargs["input_ids"].shape[1], kwargs.get("logits_to_keep")))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        one = {k: v[1:] for k, v in inputs.items()}
        one["pixel_values"] = inputs["pixel_values"][1:]
        model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=[tiny.IMAGE])
        plain = list(kept)
        kept.clear()
        model.generate(
            **one, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3, suppress_tokens=[tiny.IMAGE]
        )
    finally:
        handle.remove()
    length = inputs["input_ids"].shape[1]
    assert plain == [(length, 1), (1, 1)]
    assert kept[0][0] - kept[0][1] + 1 == length
    assert all(length == keep for length, keep in kept[1:])


def test_seam_disable_compile_is_none_by_default() -> None:
    model, _ = tiny.build("llava")
    assert model.generation_config.disable_compile is None
    with vlm.edit(model, "pai"):
        assert model.generation_config.disable_compile is True
    assert model.generation_config.disable_compile is None
