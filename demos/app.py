"""The demo application: one tab a room, on the embedded models. `attnzoo serve`, or `python demos/app.py`.

Listens on 127.0.0.1 only; uploads, queue and the time of a job are bounded.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from attnzoo import generators, miniatures, vlm
from attnzoo.backbones import attention_saliency
from attnzoo.miniatures import classifiers, world
from attnzoo.miniatures.llava import CAPTION_PROMPT
from attnzoo.miniatures.report import heat

MAX_UPLOAD = "8mb"
MAX_SIDE = 512
JOB_SECONDS = 120
QUEUE = 16

load = functools.cache(miniatures.load)


def _bounded(image: np.ndarray | None) -> Image.Image:
    if image is None:
        raise gr.Error("Give a picture first: upload one, or draw a scene.")
    picture = Image.fromarray(image).convert("RGB")
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


def draw_scene(kind: str, seed: float) -> np.ndarray:
    """A scene of the synthetic world, enlarged for the eye."""
    scene = world.sample_scene(np.random.default_rng(int(seed)), kind)
    return np.asarray(Image.fromarray(scene.image).resize((240, 240), Image.Resampling.NEAREST))


def look(image: np.ndarray | None, name: str) -> tuple[dict[str, float], list[tuple[np.ndarray, str]]]:
    """The classifier's five likeliest classes, and where each stage looks."""
    picture = _bounded(image)
    model = load(name)
    names = list(world.CLASSES) if name == "dinat_world" else [str(i) for i in range(10)]
    if name == "dinat_world":
        pixels = np.asarray(picture.resize((48, 48), Image.Resampling.BILINEAR))
    else:
        pixels = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX))
    probabilities = classifiers.predict(model, pixels[None])[0]
    tensor = classifiers.to_tensor(model, pixels[None], model.pretrained_cfg["input_size"][-1])
    maps = attention_saliency(model, tensor)
    shown = [(np.asarray(heat(picture, np.asarray(m, np.float32))), f"stage {i + 1}") for i, m in enumerate(maps)]
    return {names[i]: float(p) for i, p in enumerate(probabilities)}, shown


@torch.inference_mode()
def compare(prompt: str, seed: float, steps: float, window: float, stride: float) -> Iterator[tuple[Any, Any, str]]:
    """The same noise dense and under a window; yields after each picture, so that the first shows early."""
    pipe = load("generator")

    def draw() -> np.ndarray:
        noise = torch.Generator().manual_seed(int(seed))
        began = time.monotonic()

        def in_time(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
            if time.monotonic() - began > JOB_SECONDS:
                raise gr.Error(f"The job took longer than {JOB_SECONDS} s and was stopped.")
            return kwargs

        made = pipe(prompt, num_inference_steps=int(steps), generator=noise, callback_on_step_end=in_time)
        return np.asarray(made.images[0].resize((256, 256), Image.Resampling.NEAREST))

    try:
        dense = draw()
        yield dense, None, "dense drawn"
        with generators.enable(pipe, "gna", kernel_size=int(window), stride=int(stride)):
            edited = draw()
    except ValueError as error:
        raise gr.Error(str(error)) from error
    size = (int(window),) * 2
    density = generators.density((16, 16), size, (int(stride),) * 2)
    distance = np.abs(dense.astype(float) - edited).mean()
    yield (
        dense,
        edited,
        f"density {100 * density:.1f} % of image-to-image attention; mean pixel distance {distance:.1f} of 255",
    )


@torch.inference_mode()
def ask(image: np.ndarray | None, prompt: str, method: str, alpha: float) -> tuple[str, str, str]:
    """The plain answer, the edited one, and the nouns that differ."""
    picture = _bounded(image)
    if not prompt.strip():
        raise gr.Error("Give a prompt.")
    model, processor = load("llava")
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")

    def answer() -> str:
        made = model.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(made, skip_special_tokens=True)[0]

    settings = {"layers": range(4)} | ({"alpha": alpha} if method == "pai" else {})
    try:
        plain = answer()
        with vlm.edit(model, method, **settings):
            edited = answer()
    except ValueError as error:
        raise gr.Error(str(error)) from error
    before, after = set(world.named_nouns(plain)), set(world.named_nouns(edited))
    gone, new = sorted(before - after), sorted(after - before)
    return plain, edited, f"no longer named: {', '.join(gone) or 'none'}; newly named: {', '.join(new) or 'none'}"


def build() -> gr.Blocks:
    """The application, not yet served."""
    with gr.Blocks(title="attnzoo", analytics_enabled=False) as page:
        gr.Markdown("# attnzoo\nThree rooms on the embedded models. Methods are switched on for one job and off again.")
        with gr.Tab("Backbones"), gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", type="numpy", sources=["upload", "clipboard"])
                drawn = gr.Button("Draw a scene")
                which = gr.Radio(["dinat_world", "dinat_digits"], value="dinat_world", label="Model")
                classify = gr.Button("Classify", variant="primary")
            with gr.Column():
                label = gr.Label(num_top_classes=5, label="Classes")
                gallery = gr.Gallery(label="Where each stage looks", columns=4)
            scene_seed = gr.Number(0, precision=0, visible=False)
            drawn.click(lambda n: n + 1, scene_seed, scene_seed).then(
                lambda n: draw_scene("single", n), scene_seed, picture
            )
            classify.click(look, [picture, which], [label, gallery])
        with gr.Tab("Generators"), gr.Row():
            with gr.Column():
                prompt = gr.Textbox("a red circle left of a blue square", label="Prompt", max_length=120)
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                steps = gr.Slider(4, 50, 20, step=1, label="Steps")
                window = gr.Slider(2, 16, 6, step=1, label="Window (kernel_size)")
                stride = gr.Slider(1, 16, 1, step=1, label="Stride")
                with gr.Row():
                    go, stop = gr.Button("Generate", variant="primary"), gr.Button("Cancel")
            with gr.Column():
                with gr.Row():
                    dense = gr.Image(label="Dense", interactive=False)
                    sparse = gr.Image(label="Generalised neighborhood attention", interactive=False)
                said = gr.Textbox(label="What it is", interactive=False)
            job = go.click(compare, [prompt, seed, steps, window, stride], [dense, sparse, said])
            stop.click(None, cancels=[job])
        with gr.Tab("Vision-language"), gr.Row():
            with gr.Column():
                asked = gr.Image(label="Picture", type="numpy", sources=["upload", "clipboard"])
                kind = gr.Radio(["broken", "intact"], value="broken", label="Scene: breaks the prior, or keeps it")
                scene_number = gr.Number(0, precision=0, minimum=0, label="Scene number")
                place = gr.Button("Draw the scene")
                question = gr.Textbox(CAPTION_PROMPT, label="Prompt", max_length=400)
                method = gr.Radio(["pai", "var"], value="pai", label="Method")
                alpha = gr.Slider(0, 2, 0.5, step=0.1, label="PAI's alpha")
                send = gr.Button("Ask", variant="primary")
            with gr.Column():
                plain = gr.Textbox(label="Plain", interactive=False)
                edited = gr.Textbox(label="Edited", interactive=False)
                changed = gr.Textbox(label="Change", interactive=False)
            place.click(draw_scene, [kind, scene_number], asked)
            send.click(ask, [asked, question, method, alpha], [plain, edited, changed])
    # One job at a time: the models are shared, and a method is switched on for the job's model.
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def main(port: int = 7860, block: bool = True) -> Any:
    """Serve on 127.0.0.1:`port` until interrupted (or return at once with block=False, for tests)."""
    return build().launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        max_file_size=MAX_UPLOAD,
        max_threads=8,
        prevent_thread_lock=not block,
        ssr_mode=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=7860)
    main(parser.parse_args().port)
