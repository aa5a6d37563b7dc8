"""Ask a vision-language model about a picture, with or without an edit of its attention."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from attnzoo.errors import ReachError, UnsupportedError, check_range
from attnzoo.vlm.contrast import ICD_INSTRUCTION
from attnzoo.vlm.session import Named, edit

Picture = str | os.PathLike | Image.Image


def load(model: str | os.PathLike, device: str | torch.device | None = None) -> tuple[Any, Any]:
    """(model, processor): "miniature" is the one that ships with attnzoo, anything else a folder or a hub id.

    device: None means CUDA where there is one, else CPU. CUDA keeps the checkpoint's own type, the CPU uses float32.
    Raises ReachError where nothing can be read there, UnsupportedError for a model that takes no pictures.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if str(model) == "miniature":
        import attnzoo  # by its door: this room stands above the miniatures and does not import them

        shipped, processor = attnzoo.miniatures.load("llava")
        return shipped.to(device).eval(), processor
    name = os.fspath(model)
    try:
        processor = AutoProcessor.from_pretrained(name)
        dtype = "auto" if device.type == "cuda" else torch.float32
        found: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except OSError as error:
        raise ReachError(
            f"model {name!r} can't be read ({_first_line(error)}): give a folder that holds config.json, the "
            "processor's files and the weights, or a hub id while the hub can be reached (gated models need "
            '`hf auth login` first); model="miniature" needs neither'
        ) from error
    except (KeyError, ValueError) as error:
        raise UnsupportedError(
            f"model {name!r} is none that transformers loads as picture and text to text: {_first_line(error)}"
        ) from error
    return found.to(device).eval(), processor


def ask(
    image: Picture | Sequence[Picture],
    prompt: str,
    model: Any = "miniature",
    method: Named | Sequence[Named] | None = None,
    max_new_tokens: int = 64,
    *,
    processor: Any = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> str:
    """The model's greedy answer to `prompt` about one or several pictures.

        attnzoo.vlm.ask("dog.jpg", "What is on the sofa?", model="llava-hf/llava-1.5-7b-hf", method="var")

    image: path or PIL image, or several. prompt: the user's words; the processor's chat template, where it has one, is
    laid around them, unless they hold its image token: then they are the whole prompt.
    model: "miniature", a folder, a hub id, or a loaded model (then with its processor).
    method and kwargs: as for attnzoo.vlm.edit; None asks the model as it is.

    Raises ReachError for a picture or model that can't be read, and what `edit` raises.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt must be a text that is not empty, got {prompt!r}")
    if type(max_new_tokens) is not int:
        raise TypeError(f"max_new_tokens must be an integer, got {type(max_new_tokens).__name__}: {max_new_tokens!r}")
    check_range("max_new_tokens", max_new_tokens, 1)
    if method is None and kwargs:
        raise TypeError(f"arguments ({', '.join(kwargs)}) need a method; got method=None")
    pictures = [open_picture(p) for p in ([image] if isinstance(image, Picture) else image)]
    if not pictures:
        raise ValueError("image must hold at least one picture, got none")
    if isinstance(model, str | os.PathLike):
        model, processor = load(model, device)
    elif processor is None:
        raise TypeError("processor must be given with a loaded model, got None")
    inputs = prepare(processor, pictures, prompt).to(model.device)
    for name, value in inputs.items():
        if torch.is_floating_point(value):
            inputs[name] = value.to(model.dtype)
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    method, kwargs = _instructed(method, kwargs, processor)
    with torch.inference_mode():
        if method is None:
            tokens = model.generate(**inputs, **arguments)
        else:
            with edit(model, method, **kwargs) as session:
                tokens = session.generate(**inputs, **arguments)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def prepare(processor: Any, pictures: Sequence[Image.Image], prompt: str) -> Any:
    """The model's inputs for one user turn: all pictures, then the words."""
    token = getattr(processor, "image_token", None)
    if token is not None and token in prompt:  # the whole prompt, written by somebody who knows the model's form
        text = prompt
    elif getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        turn = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    else:
        own = type(processor).__name__ == "PaliGemmaProcessor"  # puts its image tokens in front by itself
        text = prompt if own or token is None else f"{token * len(pictures)}\n{prompt}"
    return processor(images=list(pictures), text=text, return_tensors="pt")


def _instructed(method: Any, kwargs: dict[str, Any], processor: Any) -> tuple[Any, dict[str, Any]]:
    """ICD's instruction in this processor's tokens, where "icd" is named without one."""

    def filled(entry: Any) -> Any:
        name, own = (entry, {}) if isinstance(entry, str) else entry if isinstance(entry, tuple) else (None, {})
        if name != "icd" or "instruction_ids" in own:
            return entry
        ids = processor.tokenizer(ICD_INSTRUCTION, add_special_tokens=False).input_ids
        return "icd", {"instruction_ids": ids, **own}

    if method == "icd":
        return "icd", {**filled("icd")[1], **kwargs}
    return [filled(entry) for entry in method] if isinstance(method, list) else filled(method), kwargs


def open_picture(picture: Any) -> Image.Image:
    """A path or PIL image as RGB; raises TypeError for anything else, ReachError for what can't be read."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, str | os.PathLike):
        raise TypeError(f"image must be a path, a PIL image or several of them, got {type(picture).__name__}")
    try:
        with Image.open(Path(picture)) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise ReachError(f"image {os.fspath(picture)!r} can't be read as a picture: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
