"""The miniature LLaVA: transformers' LlavaForConditionalGeneration with 1.1M parameters, trained on the synthetic
world.

It is made as a big one is (Liu et al., "Visual Instruction Tuning", 2023, arXiv:2304.08485): a vision tower that has
seen balanced scenes and expects nothing; a language model that has read captions of the prior world and expects a spoon
beside a cup and a plate; then both aligned on pictures of the prior world with captions and yes/no questions. Tokenizer
(one token per word) and processor are saved beside the weights, so that ``AutoProcessor.from_pretrained(folder)`` and
``LlavaForConditionalGeneration.from_pretrained(folder)`` load the folder.

Prompts: `CAPTION_PROMPT` is answered with "a photo of a cup, a plate and a bus."; ``question_prompt("cup")`` ("Is there
a cup?") with "yes" or "no". Text is lower-cased and question marks are dropped, so that the noun is the last token of a
question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.miniatures import evaluate, training, world

CAPTION_PROMPT = "<image>Describe the image."
WORDS = ("yes", "no", "describe", "the", "image", "is", "there", "a", "photo", "of", "and", ",", ".", *world.NOUNS)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
_IGNORED = -100


def question_prompt(noun: str) -> str:
    """The prompt that asks whether `noun` is in the image."""
    return f"<image>Is there a {noun}?"


# ----------------------------------------------------------------------------------------------- model and processor


def build_processor(model: dict[str, Any]) -> Any:
    """A LlavaProcessor for the recipe's [model]: a word-level tokenizer that pads left, and a CLIP image processor."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", "")])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    words.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins by spaces, none before "," and "."
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    size = model["image_size"]
    images = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.45] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=model["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(model: dict[str, Any]) -> Any:
    """An untrained LlavaForConditionalGeneration for the recipe's [model]; draws from torch's global generator."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ids = {word: i for i, word in enumerate(SPECIAL)}
    tokens: dict[str, Any] = {"pad_token_id": ids["<pad>"], "bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"]}
    vision = CLIPVisionConfig(
        hidden_size=model["vision_width"],
        intermediate_size=3 * model["vision_width"],
        num_hidden_layers=model["vision_layers"],
        num_attention_heads=4,
        image_size=model["image_size"],
        patch_size=model["patch_size"],
        projection_dim=model["vision_width"],
    )
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=model["width"],
        intermediate_size=model["width"] * 8 // 3 // 8 * 8,
        num_hidden_layers=model["layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_heads"],
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **tokens,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_seq_length=(model["image_size"] // model["patch_size"]) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    built = LlavaForConditionalGeneration(config)
    built.generation_config.update(**tokens, max_new_tokens=32, do_sample=False)
    return built


def load(folder: Path | None = None) -> tuple[Any, Any]:
    """(model in float32 and eval mode, processor) from `folder`; the shipped ones if None."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = training.trained_folder("llava", folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write model (half precision) and processor to `folder`; the config says float32, which is what loading gives."""
    import copy

    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    config = model.config
    config.dtype = torch.float32
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------- data


class Pictures:
    """Rendered scenes in memory: pixels uint8 [n, S, S, 3], the objects' names, a caption and questions for each."""

    def __init__(self, n: int, kind: str, rng: np.random.Generator, size: int, patch_size: int, asked: int = 0) -> None:
        self.pixels = np.empty((n, size, size, 3), np.uint8)
        self.patches = np.empty((n, size // patch_size, size // patch_size), np.int64)
        self.captions: list[str] = []
        self.questions: list[list[world.Question]] = []
        for i in range(n):
            scene = world.sample_scene(rng, kind, size)
            self.pixels[i], self.patches[i] = scene.image, world.patch_labels(scene, patch_size)
            self.captions.append(world.caption(scene, rng))
            self.questions.append(world.questions(scene, rng, asked, absent=("any",)))


def blanks(n: int, rng: np.random.Generator, size: int) -> np.ndarray:
    """uint8 [n, S, S, 3]: flat images, a quarter of them grey, the rest of any colour."""
    colours = rng.integers(0, 256, (n, 3))
    colours[::4] = rng.integers(0, 256, (len(colours[::4]), 1))
    return np.broadcast_to(colours[:, None, None].astype(np.uint8), (n, size, size, 3))


class Rows:
    """Token rows with targets: prompts are ignored by the loss, answers are not."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = processor.tokenizer
        self.bos, self.eos, self.pad = (self.ids(t)[0] for t in ("<bos>", "<eos>", "<pad>"))
        self.describe = self.ids("Describe the image.")
        self.ask = {noun: self.ids(f"Is there a {noun}?") for noun in world.NOUNS}
        self.answer = {True: self.ids("yes"), False: self.ids("no")}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def caption(self, text: str) -> tuple[list[int], list[int]]:
        """(tokens, targets) of the caption prompt and its answer."""
        answer = [*self.ids(text), self.eos]
        return self.describe + answer, [_IGNORED] * len(self.describe) + answer

    def question(self, asked: Sequence[world.Question]) -> tuple[list[int], list[int]]:
        """(tokens, targets) of several questions with their answers."""
        tokens, targets = [], []
        for question in asked:
            prompt, answer = self.ask[question.noun], self.answer[question.answer]
            tokens += prompt + answer
            targets += [_IGNORED] * len(prompt) + answer
        return tokens, targets

    def batch(self, rows: Sequence[tuple[list[int], list[int]]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows padded on the right: tokens and targets, int64 [B, T]."""
        longest = max(len(tokens) for tokens, _ in rows)
        tokens = torch.tensor([t + [self.pad] * (longest - len(t)) for t, _ in rows])
        targets = torch.tensor([t + [_IGNORED] * (longest - len(t)) for _, t in rows])
        return tokens.to(device), targets.to(device)


def normalise(pixels: np.ndarray, device: Any) -> torch.Tensor:
    """What the processor makes of uint8 [B, S, S, 3]: float32 [B, 3, S, S]."""
    return (torch.from_numpy(np.ascontiguousarray(pixels)).to(device).float().permute(0, 3, 1, 2) / 255 - 0.45) / 0.25


# --------------------------------------------------------------------------------------------------------------- stages


def _train_vision(model: Any, recipe: dict[str, Any], seed: int, device: Any, progress: bool) -> None:
    """Patch classification on balanced scenes, rolled and mirrored: a stand-in for CLIP's pre-training."""
    stage, size, patch = recipe["vision"], recipe["model"]["image_size"], recipe["model"]["patch_size"]
    rng = training.generator("train", seed, 1)
    pictures = Pictures(recipe["data"]["balanced"], "balanced", rng, size, patch)
    tower = model.model.vision_tower
    head = nn.Linear(recipe["model"]["vision_width"], len(world.CLASSES) + 1).to(device)
    weight = torch.ones(len(world.CLASSES) + 1, device=device)
    weight[-1] = stage["background_weight"]

    def loss(_: int) -> torch.Tensor:
        chosen = rng.integers(0, len(pictures.pixels), stage["batch"])
        pixels, labels = pictures.pixels[chosen], pictures.patches[chosen]
        if rng.random() < 0.5:
            pixels, labels = pixels[:, :, ::-1], labels[:, :, ::-1]
        down, right = rng.integers(0, size // patch, 2)
        pixels = np.roll(pixels, (patch * down, patch * right), (1, 2))
        labels = np.roll(labels, (down, right), (1, 2))
        hidden = tower(pixel_values=normalise(pixels, device)).last_hidden_state[:, 1:]
        return F.cross_entropy(head(hidden).flatten(0, 1), torch.from_numpy(labels).to(device).flatten(), weight=weight)

    parameters = [*tower.parameters(), *head.parameters()]
    training.fit(parameters, loss, stage, recipe["optimizer"], "llava: vision", progress)


def _train_language(model: Any, rows: Rows, recipe: dict[str, Any], seed: int, device: Any, progress: bool) -> None:
    """Captions of the prior world, without pictures: the expectations."""
    stage, rng = recipe["language"], training.generator("train", seed, 2)
    language = model.model.language_model

    def loss(_: int) -> torch.Tensor:
        captions = [
            world.write_caption(rng.permutation(world.sample_nouns(rng)).tolist()) for _ in range(stage["batch"])
        ]
        tokens, targets = rows.batch([rows.caption(text) for text in captions], device)
        start = torch.full_like(tokens[:, :1], rows.bos)
        hidden = language(input_ids=torch.cat([start, tokens[:, :-1]], 1)).last_hidden_state
        return F.cross_entropy(model.lm_head(hidden).transpose(1, 2), targets, ignore_index=_IGNORED)

    parameters = [*language.parameters(), *model.lm_head.parameters()]
    training.fit(parameters, loss, stage, recipe["optimizer"], "llava: language", progress)


@torch.no_grad()
def _features(model: Any, pixels: np.ndarray, device: Any) -> torch.Tensor:
    """The frozen vision tower's patch features, float16 [n, tokens, width], computed once."""
    tower = model.model.vision_tower
    parts = [
        tower(pixel_values=normalise(pixels[i : i + 256], device)).last_hidden_state[:, 1:].half()
        for i in range(0, len(pixels), 256)
    ]
    return torch.cat(parts)


def _align(model: Any, rows: Rows, recipe: dict[str, Any], seed: int, device: Any, progress: bool, every: Any) -> None:
    """Projector and language model on captions and questions of prior scenes, and on blank images with any caption."""
    stage, data, sizes = recipe["align"], recipe["data"], recipe["model"]
    rng = training.generator("train", seed, 3)
    pictures = Pictures(data["prior"], "prior", rng, sizes["image_size"], sizes["patch_size"], data["questions"])
    seen = _features(model, pictures.pixels, device)
    unseen = _features(model, blanks(data["blank"], rng, sizes["image_size"]), device)
    captions = [rows.caption(text) for text in pictures.captions]
    questions = [rows.question(asked) for asked in pictures.questions]
    del pictures
    language, projector = model.model.language_model, model.model.multi_modal_projector

    def loss(_: int) -> torch.Tensor:
        chosen = rng.integers(0, len(captions), stage["batch"])
        dice = rng.random(stage["batch"])
        blank = dice < stage["blank_rows"]
        asking = dice > stage["blank_rows"] + stage["caption_rows"]
        features = seen[torch.from_numpy(chosen)]
        features[torch.from_numpy(blank)] = unseen[torch.from_numpy(rng.integers(0, len(unseen), blank.sum()))]
        picked = [questions[i] if asks else captions[i] for i, asks in zip(chosen, asking)]
        tokens, targets = rows.batch(picked, device)
        embed = language.get_input_embeddings()
        start = embed(torch.full_like(tokens[:, :1], rows.bos))
        inputs = torch.cat([start, projector(features.float()), embed(tokens[:, :-1])], 1)
        hidden = language(inputs_embeds=inputs).last_hidden_state[:, features.shape[1] :]
        losses = F.cross_entropy(
            model.lm_head(hidden).transpose(1, 2), targets, ignore_index=_IGNORED, reduction="none"
        )
        counted, asks = targets != _IGNORED, torch.from_numpy(asking).to(device)[:, None]
        told, answered = counted & ~asks, counted & asks
        return losses[told].sum() / told.sum().clamp(min=1) + stage["question_weight"] * losses[answered].sum() / (
            answered.sum().clamp(min=1)
        )

    parameters = [*projector.parameters(), *language.parameters(), *model.lm_head.parameters()]
    training.fit(parameters, loss, stage, recipe["optimizer"], "llava: align", progress, every)


def _validate(model: Any, processor: Any, held: Sequence[world.Scene], seed: int) -> dict[str, float]:
    """Caption figures and shares of right answers, on validation scenes."""
    rng = training.generator("validation", seed, 1)
    asked = [world.questions(scene, rng, 4) for scene in held]
    figures = evaluate.summarise(evaluate.evaluate_captions(model, processor, held))
    right = evaluate.question_figures(asked, evaluate.answer_questions(model, processor, held, asked))
    return figures | {f"right on {kind}": value for kind, value in right.items()}


def train(
    out: str | Path, seed: int = 0, device: str = "cpu", steps: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Train the miniature by configs/recipes/llava.toml and write it to the folder `out`; returns what training.json
    says.

    steps: cuts every stage to this many steps, and the data with it, for a trial. progress: bars on stderr, and
    validation figures on the way.
    """
    recipe = training.capped(training.read_recipe("llava"), steps)
    folder, clock = Path(out), training.Clock()
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor(recipe["model"])
    rows = Rows(processor)
    valid = training.generator("validation", seed)
    held = [
        world.sample_scene(valid, "broken", recipe["model"]["image_size"])
        for _ in range(recipe["validation"]["scenes"])
    ]
    validated: dict[int, dict[str, float]] = {}

    with training.seeded(seed, device):
        model = build_model(recipe["model"]).to(device)
        model.train()
        _train_vision(model, recipe, seed, device, progress)
        clock.stage("vision")
        _train_language(model, rows, recipe, seed, device, progress)
        clock.stage("language")

        def every(step: int) -> None:
            if step % recipe["validation"]["every"] and step != recipe["align"]["steps"]:
                return
            model.eval()
            validated[step] = _validate(model, processor, held, seed)
            model.train()
            if progress:
                figures = " ".join(f"{k} {v:.3f}" for k, v in validated[step].items())
                training.say(f"validation after {step} alignment steps: {figures}")

        _align(model, rows, recipe, seed, device, progress, every)
        clock.stage("align")
    model.eval()
    save(model.cpu(), processor, folder)
    report = clock.report(seed, steps, device) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": {str(step): figures for step, figures in validated.items()},
    }
    training.write_json(folder / "training.json", report)
    return report
