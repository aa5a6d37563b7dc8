"""One picture from a prompt, with a method on or off: what `attnzoo generate` does."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from attnzoo.errors import ReachError, UnsupportedError, check_range
from attnzoo.generators.handles import enable


def load_pipeline(pipeline: str | Path, device: str | None = None) -> Any:
    """A diffusers pipeline by local folder or hub ID, or the shipped "miniature".

    device: None means CUDA where there is one, else CPU; half precision (bfloat16) on CUDA, float32 on CPU.
    Raises ReachError where the folder or the hub can't be reached.
    """
    if pipeline == "miniature":
        import attnzoo  # by its door: this room stands above the miniatures and does not import them

        loaded = attnzoo.miniatures.load("generator")
        return loaded if device is None else loaded.to(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    folder = Path(pipeline).expanduser()
    local = folder.is_dir()
    if local and not (folder / "model_index.json").is_file():
        raise ReachError(
            f"{folder} is no diffusers pipeline: it has no model_index.json (a pipeline's save_pretrained)"
        )
    if not local and (folder.is_absolute() or str(pipeline).startswith((".", "~")) or str(pipeline).count("/") != 1):
        raise ReachError(
            f"there is no folder {str(pipeline)!r}; give a pipeline's folder, a hub ID OWNER/NAME, or miniature"
        )
    try:
        loaded = DiffusionPipeline.from_pretrained(str(folder) if local else str(pipeline), dtype=dtype)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise ReachError(
            f"can't load the pipeline {str(pipeline)!r}: {reason} (without a network, download it elsewhere and give "
            "the folder; a gated model needs `hf auth login`)"
        ) from error
    return loaded.to(device)


def generate(
    prompt: str,
    *,
    pipeline: Any = "miniature",
    method: str | None = None,
    seed: int = 0,
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Any:
    """A picture (PIL) that `pipeline` draws for `prompt`, with `method` and its `options` on, as for `enable`.

    pipeline: a folder, a hub ID, "miniature", or a pipeline object, which is left as it was.
    seed: of the starting noise, drawn on CPU so that it is the same on every machine.
    num_inference_steps, height, width (pixels): the pipeline's defaults where None.

    Raises ReachError where the pipeline can't be reached, UnsupportedError where it makes no pictures from prompts,
    and what `enable` raises; TypeError for options without a method.
    """
    if method is None and options:
        raise TypeError(f"options {', '.join(sorted(options))} need a method, got method=None")
    check_range("seed", seed, 0, 2**63 - 1)
    pipe = load_pipeline(pipeline, device) if isinstance(pipeline, (str, Path)) else pipeline
    if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedError(
            f"{type(pipe).__name__} takes no prompt: call it inside `with enable(pipe, ...)` instead"
        )
    sizes = {"num_inference_steps": num_inference_steps, "height": height, "width": width}
    given = {name: value for name, value in sizes.items() if value is not None}
    scope = enable(pipe, method, **options) if method is not None else contextlib.nullcontext()
    with scope, torch.inference_mode():
        output = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **given)
    if not hasattr(output, "images"):
        raise UnsupportedError(
            f"{type(pipe).__name__} makes no pictures: call it inside `with enable(pipe, ...)` instead"
        )
    return output.images[0]
