"""`attnzoo demo`: the main job of every room on the embedded models, as one HTML page and the same numbers as JSON.

All scenes are drawn from streams that no choice was made on. Times are not shown: a laptop's are noise.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from attnzoo.miniatures import evaluate, load, training, world
from attnzoo.miniatures.report import Page, grid, heat

PROMPTS = (
    "a red circle",
    "a blue square",
    "a green triangle",
    "a yellow ring",
    "a red cross left of a blue diamond",
    "a yellow circle above a green square",
)
WINDOWS = (12, 8, 4)
EDITS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    # The authors spare layers 0 and 1 of 32; of four layers that would spare half.
    ("PAI, alpha 0.2", "pai", {"alpha": 0.2, "layers": range(4)}),
    ("PAI, alpha 0.5", "pai", {"alpha": 0.5, "layers": range(4)}),
    ("VAR", "var", {"layers": range(4)}),
)


def run(out: Path | str = "outputs", seed: int = 0, quick: bool = False, progress: bool = True) -> Path:
    """Write index.html, results.json and pictures/ into `out` and return the page's path.

    seed: of scenes, starting noise and resamples. quick: a fifth of the scenes, so wider intervals.
    Raises NotADirectoryError where `out` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out must be a folder, got the file {str(out)!r}")
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    page = Page(
        "attnzoo demo",
        "Three rooms on models of a megabyte or two, trained on a synthetic world by this library's own recipes. "
        "Every picture and number on this page was made by the run that wrote it.",
    )
    results: dict[str, Any] = {"seed": seed, "quick": quick}
    parts = (("backbones", _backbones), ("detector", _detector), ("generators", _generators), ("vlm", _vlm))
    for name, part in parts:
        results[name] = part(page, pictures, seed, quick, progress)
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return page.write(out / "index.html")


def _bar(steps: Sequence[Any], what: str, progress: bool) -> Any:
    return tqdm(steps, desc=what, disable=not progress, leave=True)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(difference: tuple[float, float, float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in difference))


# ------------------------------------------------------------------------------------------------------------ backbones


def _backbones(page: Page, pictures: Path, seed: int, quick: bool, progress: bool) -> dict[str, Any]:
    """Held-out digits and scenes classified, and where each stage looks, on a photograph too."""
    from attnzoo.backbones import attention_saliency
    from attnzoo.miniatures import classifiers

    page.section(
        "Backbones: a dilated neighborhood attention transformer, as a timm model",
        "Two tiny DiNATs: one read scikit-learn's handwritten digits, one the synthetic world. Both are the class that "
        "loads the authors' ImageNet checkpoints.",
    )
    images, labels = classifiers.held_out_digits()
    rng = training.generator("test", seed, 9)
    scenes = [world.sample_scene(rng, "single", 48, "mixed") for _ in range(100 if quick else 500)]
    sets = (
        ("dinat_digits", list(images), [int(x) for x in labels], [str(i) for i in range(10)]),
        ("dinat_world", [s.image for s in scenes], [s.objects[0].label for s in scenes], list(world.CLASSES)),
    )
    rows = []
    figures: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for name, pixels, truth, names in _bar(sets, "classify", progress):
        models[name] = model = load(name)
        said = classifiers.predict(model, pixels).argmax(-1).tolist()
        right = sum(a == b for a, b in zip(said, truth))
        low, high = evaluate.wilson_interval(right, len(truth))
        figures[name] = {"top1": right / len(truth), "n": len(truth), "interval": [low, high]}
        rows.append((name, _percent(right / len(truth)), f"{_percent(low)} to {_percent(high)}", len(truth)))
        shown = [Image.fromarray(p).convert("RGB") for p in pixels[:8]]
        sheet = grid([shown], [""], [names[i] for i in said[:8]], 96)
        sheet.save(pictures / f"{name}.png")
        page.figure(sheet, f"{name}: held-out pictures with what the model calls them.")
    page.table(("model", "top-1, held out", "95 % interval (Wilson)", "n"), rows)

    from sklearn.datasets import load_sample_image

    photograph = Image.fromarray(load_sample_image("flower.jpg"))
    photograph.thumbnail((320, 320))
    scene = Image.fromarray(scenes[0].image).resize((192, 192), Image.Resampling.NEAREST)
    looked = []
    for picture in _bar((scene, photograph), "where each stage looks", progress):
        small = scenes[0].image if picture is scene else np.asarray(photograph)
        maps = attention_saliency(models["dinat_world"], classifiers.to_tensor(models["dinat_world"], small))
        looked.append([picture, *(heat(picture, np.asarray(m, np.float32)) for m in maps)])
    stages = ["picture", *(f"stage {i + 1}" for i in range(len(looked[0]) - 1))]
    sheet = grid(looked, ["scene", "photograph"], stages, 220)
    sheet.save(pictures / "where_it_looks.png")
    page.figure(
        sheet,
        "Attention that each position receives in the last block of each stage, mean over heads, stretched to its own "
        "2nd and 98th percentile. The photograph is scikit-learn's flower.jpg; this model has never seen a photograph, "
        "so its maps show the mechanism at another size and shape, not knowledge.",
    )
    return figures


def _detector(page: Page, pictures: Path, seed: int, quick: bool, progress: bool) -> dict[str, Any]:
    """What the detector finds in the first held-out scenes, mixed and hard."""
    from attnzoo.miniatures import detector

    page.section(
        "Detection: torchvision's Faster R-CNN on the same backbone",
        "attnzoo.backbones.detector puts torchvision's detectors on any of the timm models. This one finds the world's "
        "24 kinds of object; its mAP on held-out scenes is on its card.",
    )
    sheet = detector.contact_sheet(load("detector"), seed)
    sheet.save(pictures / "detections.png")
    page.figure(sheet, "The first six held-out scenes, mixed and hard, nothing picked, with class names and scores.")
    return {"scenes": 12}


# ----------------------------------------------------------------------------------------------------------- generators


@torch.inference_mode()
def _generators(page: Page, pictures: Path, seed: int, quick: bool, progress: bool) -> dict[str, Any]:
    """The same seeds dense and under three windows of generalised neighborhood attention."""
    from attnzoo import generators
    from attnzoo.miniatures import classifiers

    page.section(
        "Generators: the same seeds, dense and with generalised neighborhood attention",
        "A joint-attention transformer (diffusers' own class) with a 16 x 16 grid of image tokens. Each switch is one "
        "line, and off again at the end of its block.",
    )
    pipe = load("generator")
    pipe.set_progress_bar_config(disable=True)
    judge = load("dinat_world")
    wanted = [world.read_prompt(p)[0] for p in PROMPTS]
    single = [i for i, labels in enumerate(wanted) if len(labels) == 1]
    per_prompt = 2 if quick else 4
    steps = 12 if quick else 20

    def draw() -> list[np.ndarray]:
        prompts = [p for p in PROMPTS for _ in range(per_prompt)]
        noise = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
        made = pipe(prompts, num_inference_steps=steps, generator=noise, output_type="np").images
        return [(255 * np.asarray(x)).round().astype(np.uint8) for x in made]

    def judged(images: list[np.ndarray]) -> tuple[int, int]:
        chosen = [(i, k) for i in single for k in range(per_prompt)]
        said = classifiers.predict(judge, [images[i * per_prompt + k] for i, k in chosen]).argmax(-1).tolist()
        return sum(s == wanted[i][0] for s, (i, _) in zip(said, chosen)), len(chosen)

    runs: dict[str, list[np.ndarray]] = {}
    reports: dict[str, float] = {"dense": 1.0}
    for window in _bar((None, *WINDOWS), "generate", progress):
        if window is None:
            runs["dense"] = draw()
            continue
        name = f"{window} x {window}"
        with generators.enable(pipe, "gna", kernel_size=window):
            runs[name] = draw()
        reports[name] = generators.density((16, 16), (window, window))
    again = draw()
    restored = all(np.array_equal(a, b) for a, b in zip(runs["dense"], again))

    rows = []
    figures: dict[str, Any] = {"restored_exactly": restored, "prompts": list(PROMPTS), "steps": steps, "runs": {}}
    for name, images in runs.items():
        distance = float(np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(images, runs["dense"])]))
        right, n = judged(images)
        figures["runs"][name] = {"density": reports[name], "pixel_distance": distance, "recognised": right, "n": n}
        rows.append((name, _percent(reports[name]), f"{distance:.1f}", f"{right} of {n}"))
    header = ("window", "density of image-to-image attention", "mean pixel distance to dense (of 255)", "recognised")
    page.table(header, rows)
    page.text(
        "Recognised: single-object pictures that the embedded classifier names as asked. After the last switch the "
        f"dense pictures were drawn again: {'bit for bit the same' if restored else 'NOT the same'}.",
        note=True,
    )
    shown = [[Image.fromarray(images[i * per_prompt]) for i in range(len(PROMPTS))] for images in runs.values()]
    sheet = grid(shown, list(runs), [], 112)
    sheet.save(pictures / "gna.png")
    page.figure(
        sheet, "One column a prompt: " + "; ".join(PROMPTS) + ". One row a window; the same noise in each column."
    )
    return figures


# ------------------------------------------------------------------------------------------------------------------ vlm


def _vlm(page: Page, pictures: Path, seed: int, quick: bool, progress: bool) -> dict[str, Any]:
    """Captions of scenes that break the prior: plain, with PAI, with VAR, and with the control of saying less."""
    from attnzoo import vlm

    page.section(
        "Vision-language: captions of scenes that break the prior",
        "The embedded LLaVA has learnt which objects go together. In these scenes one member of a familiar trio is "
        "missing, and it is often named all the same.",
    )
    model, processor = load("llava")
    rng = training.generator("test", seed, 10)
    scenes = [world.sample_scene(rng, "broken") for _ in range(80 if quick else 400)]

    runs: dict[str, list[evaluate.CaptionRow]] = {}
    for name, method, settings in _bar((("plain", "", {}), *EDITS), "caption", progress):
        edit: AbstractContextManager | None = vlm.edit(model, method, **settings) if method else None
        runs[name] = evaluate.evaluate_captions(model, processor, scenes, edit)
    plain = runs["plain"]
    figures: dict[str, Any] = {"n": len(scenes), "runs": {}}
    rows = []
    for name, captions in runs.items():
        figure = evaluate.summarise(captions)
        entry: dict[str, Any] = dict(figure)
        cells = [name, _percent(figure["chair_s"]), _percent(figure["recall"]), f"{figure['named']:.2f}"]
        if captions is plain:
            cells += ["", "", "", ""]
        else:
            change = evaluate.paired_bootstrap(plain, captions, seed=seed)
            probability, control = evaluate.matched_control(plain, figure["chair_s"])
            gain = _over_control(plain, captions, seed)
            entry |= {"change": {k: list(v) for k, v in change.items()}, "recall_over_control": list(gain)}
            entry["control"] = {"drop_probability": probability, **control}
            cells += [_points(change["chair_s"]), _points(change["recall"]), _percent(control["recall"]), _points(gain)]
        figures["runs"][name] = entry
        rows.append(cells)
    page.table(
        (
            "captions",
            "CHAIR_s",
            "recall",
            "objects named",
            "change of CHAIR_s, points",
            "change of recall, points",
            "recall of the control at the same CHAIR_s",
            "recall over the control, points",
        ),
        rows,
    )
    page.text(
        f"{len(scenes)} scenes; brackets are 95 % paired bootstrap intervals over scenes (1000 resamples), for one "
        "trained model and no correction for the number of rows. CHAIR_s: captions that name an absent object. The "
        "control drops the last-named object of a plain caption at random, at the rate that reaches the edit's CHAIR_s "
        "(in closed form, refitted in each resample): saying less lowers CHAIR too, and only what is over the control "
        "is more than that.",
        note=True,
    )
    _plot(page, pictures, runs)
    _examples(page, pictures, scenes, runs)
    return figures


def _over_control(
    plain: list[evaluate.CaptionRow], edited: list[evaluate.CaptionRow], seed: int
) -> tuple[float, float, float]:
    """Recall of the edit minus the control's at the edit's CHAIR_s, with its paired bootstrap interval."""

    def gain(pairs: Sequence[tuple[evaluate.CaptionRow, evaluate.CaptionRow]]) -> float:
        before, after = [a for a, _ in pairs], evaluate.summarise([b for _, b in pairs])
        return after["recall"] - evaluate.matched_control(before, after["chair_s"])[1]["recall"]

    pairs = list(zip(plain, edited))
    return (gain(pairs), *evaluate.bootstrap_interval(pairs, gain, seed=seed))


def _plot(page: Page, pictures: Path, runs: dict[str, list[evaluate.CaptionRow]]) -> None:
    """Recall against CHAIR_s: every run, and the line that dropping the last-named object walks along."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    control = [evaluate.drop_last_control(runs["plain"], p) for p in np.linspace(0, 1, 21)]
    axes.plot(
        [c["chair_s"] for c in control], [c["recall"] for c in control], "--", color="grey", label="say less (control)"
    )
    for marker, (name, captions) in zip("o^sx", runs.items(), strict=True):
        at = evaluate.summarise(captions)
        axes.scatter(at["chair_s"], at["recall"], label=name, marker=marker, s=60, zorder=3)
    axes.set_xlabel("CHAIR_s (captions that name an absent object)")
    axes.set_ylabel("recall of present objects")
    axes.legend()
    axes.grid(alpha=0.3)
    path = pictures / "chair.png"
    figure.savefig(path)
    with Image.open(path) as image:
        page.figure(image.convert("RGB"), "Left is fewer hallucinations, up is more of what is there.")


def _examples(
    page: Page, pictures: Path, scenes: Sequence[world.Scene], runs: dict[str, list[evaluate.CaptionRow]]
) -> None:
    """Six scenes in which the plain caption names something absent, with every run's caption."""
    chosen = [i for i, row in enumerate(runs["plain"]) if row.absent][:6]
    sheet = grid([[Image.fromarray(scenes[i].image) for i in chosen]], [""], [], 144)
    sheet.save(pictures / "broken_scenes.png")
    page.figure(sheet, "The first six scenes in which the plain caption names an absent object, left to right.")
    for number, i in enumerate(chosen):
        lines = [f"<b>Scene {number + 1}</b> holds {html.escape(', '.join(scenes[i].nouns))}."]
        lines += [f"{html.escape(name)}: {_marked(captions[i])}" for name, captions in runs.items()]
        page.markup("<br>".join(lines))


def _marked(row: evaluate.CaptionRow) -> str:
    """The caption with absent objects marked."""
    text = html.escape(row.caption)
    for noun in row.absent:
        text = re.sub(rf"\b{noun}\b", f"<span class=absent>{noun}</span>", text)
    return text
