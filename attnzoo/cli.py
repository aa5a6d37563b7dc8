"""The command line: thin doors to public functions. An error is one line that says what would help, exit status 2.

ATTNZOO_TRACEBACK=1 shows the traceback as well.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.table import Column, Table

from attnzoo.commands.classifiers import eval_classify, train_classify
from attnzoo.commands.options import Params, pairs_as_dict
from attnzoo.errors import AttnzooError, ReachError, check_choice

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Attention methods where you already work: timm, diffusers, transformers.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train an embedded model, or one of the backbones.")
app.add_typer(train_app, name="train")
train_app.command("classify")(train_classify)
eval_app = typer.Typer(no_args_is_help=True, help="Measure a model on labelled data.")
app.add_typer(eval_app, name="eval")
eval_app.command("classify")(eval_classify)


class _RunUnlessNamed(typer.core.TyperGroup):
    """A group whose command `run` needs no name: `bench OPERATION` is `bench run OPERATION`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(cls=_RunUnlessNamed, help="Time the kernels, or plan what a call would cost.")
app.add_typer(bench_app, name="bench")

_EXTRAS = {
    "diffusers": "generators",
    "accelerate": "train",
    "torchmetrics": "train",
    "transformers": "vlm",
    "open_clip": "clip",
    "gradio": "demo",
    "matplotlib": "demo",
    "sklearn": "demo",
    "pycocotools": "train",
}


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _beside(name: str) -> ModuleType:
    """A module that stands beside the package in a source checkout, not installed with it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / name.split(".")[0]).is_dir():
        raise FileNotFoundError(
            f"{name} is part of the source checkout, which was not found at {root}; clone the repository"
        )
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(root))


def _existing(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.is_file():
            raise ReachError(f"IMAGE {str(path)!r} is not a file; give the path of a picture that PIL can open")
    return paths


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for index.html and results.json.")] = Path("outputs"),
    seed: Annotated[int, typer.Option(help="Seed of scenes, samples and resamples.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer scenes and samples: wider intervals.")] = False,
) -> None:
    """Run the main job of every room on the embedded models and write one HTML page."""
    from attnzoo.miniatures.demo import run

    page = run(out, seed=seed, quick=quick)
    typer.echo(str(page))


@app.command("list")
def list_(
    room: Annotated[
        str | None, typer.Argument(help="kernels, backbones, generators or vlm; all of them without it.")
    ] = None,
) -> None:
    """List the catalogued methods."""
    from attnzoo import catalog

    table = Table(Column("method", no_wrap=True), "room", "status", "kernel", "paper")  # a name is whole, to be copied
    for method in catalog.list_methods(room):
        table.add_row(method.name, method.room, method.status, method.operation, method.paper)
    _console().print(table)


@app.command()
def info(
    method: Annotated[str | None, typer.Argument(help="A method's name; without it, this machine.")] = None,
) -> None:
    """Tell about one method, or about versions, devices and kernel back ends here."""
    from attnzoo import catalog

    table = Table(show_header=False)
    if method is not None:
        row = catalog.get(method)
        for key in (
            "name",
            "title",
            "room",
            "operation",
            "paper",
            "code",
            "licence",
            "weights_licence",
            "status",
            "why",
            "test",
        ):
            if value := getattr(row, key):
                table.add_row(key, str(value))
        if row.models:
            table.add_row("models", ", ".join(row.models))
        if row.neutral:
            table.add_row("neutral", ", ".join(f"{k}={v}" for k, v in row.neutral.items()))
    else:
        import platform

        import torch

        import attnzoo
        from attnzoo.kernels import dispatch

        table.add_row("attnzoo", attnzoo.__version__)
        table.add_row("python", platform.python_version())
        for name in ("torch", "triton", "timm", "diffusers", "transformers", "accelerate", "open_clip", "gradio"):
            try:
                table.add_row(name, importlib.import_module(name).__version__)
            except ImportError:
                table.add_row(name, "not installed")
        cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        table.add_row("GPU", cuda)
        table.add_row("CPU threads", str(torch.get_num_threads()))
        for backend in dispatch.BACKENDS:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            why = dispatch.device_reasons("neighborhood_attention", backend, device)
            table.add_row(f"kernels: {backend}", "; ".join(why) or "available")
        for room in ("backbones", "generators", "vlm"):
            table.add_row(f"methods in {room}", str(len(catalog.list_methods(room))))
    _console().print(table)


@app.command()
def check(
    what: Annotated[str, typer.Argument(help="miniatures: the shipped models against their bars.")] = "miniatures",
    name: Annotated[list[str] | None, typer.Option(help="Only these models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
) -> None:
    """Measure the shipped models on held-out data and compare with their bars; exit status 1 where one is missed."""
    from attnzoo import miniatures

    check_choice("WHAT", what, ("miniatures",))
    rows = miniatures.check(name or None)
    table = Table("model", "figure", "value", "95 % interval", "bar", "n", "")
    for row in rows:
        interval = "" if row["interval"] is None else "{:.3f} to {:.3f}".format(*row["interval"])
        verdict = "reported" if row["ok"] is None else "ok" if row["ok"] else "MISSED"
        table.add_row(row["name"], row["figure"], f"{row['value']:.3f}", interval, row["bar"], str(row["n"]), verdict)
    _console().print(table)
    if out is not None:
        out.write_text(json.dumps(rows, indent=1))
    if any(row["ok"] is False for row in rows):
        raise typer.Exit(1)


@bench_app.command("run")
def bench_run(
    operation: Annotated[
        str | None, typer.Argument(help="A kernel operation; every operation that has a benchmark without it.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu: ratios of thread CPU time against named peers; cuda: absolute times.")
    ] = "cpu",
    threads: Annotated[int, typer.Option(help="torch threads of the ratio runs.")] = 1,
    only: Annotated[str | None, typer.Option(help="One case's name.")] = None,
    minutes: Annotated[float, typer.Option(help="Time for everything; more cases mean fewer repeats.")] = 9.0,
    flex: Annotated[
        bool, typer.Option("--flex", help="flex_attention as a peer on a CPU too: it compiles long.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON, after each case.")] = None,
) -> None:
    """Time an operation against named peers, after their results were compared. The word `run` may be left out."""
    arguments = [*([operation] if operation else []), "--device", device, "--threads", str(threads)]
    arguments += ["--minutes", str(minutes), *(["--only", only] if only else []), *(["--flex"] if flex else [])]
    raise typer.Exit(_beside("benchmarks.ops").main([*arguments, *(["--json", str(out)] if out else [])]))


def _sizes(option: str, text: str) -> Any:
    """`18x24x24` as a tuple of ints, `7` as an int."""
    parts = text.lower().split("x")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{option} takes one number, or one per axis joined by x such as 18x24x24; got {text!r}")
    numbers = tuple(int(part) for part in parts)
    return numbers if len(numbers) > 1 else numbers[0]


@bench_app.command("plan")
def bench_plan(
    grid: Annotated[str, typer.Option(help="Tokens per axis, such as 30x48x80.")],
    kernel_size: Annotated[str, typer.Option(help="The window, one number or one per axis.")],
    stride: Annotated[str, typer.Option(help="One number or one per axis.")] = "1",
    dilation: Annotated[str, typer.Option(help="One number or one per axis.")] = "1",
    causal: Annotated[str, typer.Option(help="1 or 0, or one per axis such as 1x0x0.")] = "0",
    border: Annotated[str, typer.Option(help="shift, mask or zero.")] = "shift",
    batch: Annotated[int, typer.Option(help="Batch entries.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 1,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    additional_keys: Annotated[int, typer.Option(help="Keys that every query sees besides its window.")] = 0,
    tile: Annotated[
        list[str] | None, typer.Option(help="Another forward tile to try, QUERIES:KEYS such as 2x8x8:2x4x8.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Whose data sheet the estimated roofline takes.")] = "H100",
    as_json: Annotated[bool, typer.Option("--json", help="All counts as JSON.")] = False,
) -> None:
    """Count what neighborhood attention would cost before anything runs: exact FLOPs, density, speed-up bound."""
    import torch

    from attnzoo.kernels import plan_neighborhood_attention
    from attnzoo.kernels.planning import GPUS

    check_choice("--dtype", dtype, ("float16", "bfloat16", "float32"))
    check_choice("--gpu", gpu, GPUS)
    flags = causal.lower().split("x")
    if not set(flags) <= {"0", "1"}:
        raise ValueError(f"--causal takes 1 or 0, or one per axis such as 1x0x0; got {causal!r}")
    is_causal: Any = tuple(flag == "1" for flag in flags)
    tiles: list[Any] = []
    for text in tile or []:
        parts = [_sizes("--tile", part) for part in text.split(":")]
        tiles.append(tuple((part,) if isinstance(part, int) else part for part in parts))
    tokens = _sizes("--grid", grid)
    plan = plan_neighborhood_attention(
        (tokens,) if isinstance(tokens, int) else tokens,
        _sizes("--kernel-size", kernel_size),
        _sizes("--stride", stride),
        _sizes("--dilation", dilation),
        is_causal if len(is_causal) > 1 else is_causal[0],
        border=border,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        dtype=getattr(torch, dtype),
        additional_keys=additional_keys,
        maker="hip" if gpu.startswith("MI") else "cuda",
        tiles=tiles,
    )
    roofline = plan.roofline(gpu)
    if as_json:
        typer.echo(json.dumps({**plan.to_dict(), "estimated_roofline_ms": roofline}, indent=1))
        return
    summary = Table(show_header=False)
    summary.add_row("density", f"{100 * plan.density:.4g} % of all query-key pairs")
    table = Table("pass", "what", "queries", "keys", "warps / stages", "GFLOP", "executed / useful", "bound over dense")

    def row(name: str, what: str, walk: Any, flops: int, part: Any) -> None:
        tile_of = ["x".join(map(str, t)) for t in (walk.queries, walk.keys)] if walk else ["", ""]
        cut = f"{walk.num_warps} / {walk.num_stages}" if walk and walk.num_warps else ""
        figures = (f"{flops / 1e9:,.3f}", f"{flops / part.useful_flops:.2f}", f"{part.dense_flops / flops:.2f} x")
        table.add_row(name, what, *tile_of, cut, *figures)

    for name, part in (("forward", plan.forward), ("backward", plan.backward)):
        summary.add_row(f"{name}, dense", f"{part.dense_flops / 1e9:,.3f} GFLOP")
        summary.add_row(f"{name}, useful", f"{part.useful_flops / 1e9:,.3f} GFLOP, {part.ideal:.2f} x less than dense")
        if len(part.triton) > 1:
            for walk in part.triton:
                cut = ["x".join(map(str, t)) for t in (walk.queries, walk.keys)]
                warps = f"{walk.num_warps} / {walk.num_stages}"
                table.add_row(name, f"triton {walk.kernel}", *cut, warps, f"{walk.flops / 1e9:,.3f}", "", "")
            row(name, "triton, all kernels", None, part.executed_flops, part)
        else:
            row(name, "triton, the table's tiles", part.triton[0], part.executed_flops, part)
        for walk in part.others:
            row(name, "triton, other tiles", walk, walk.flops, part)
        row(name, "CPU path", part.tiled, part.tiled.flops, part)
    traffic = plan.traffic
    summary.add_row(
        "estimate: memory traffic forward",
        f"{traffic.once / 1e6:,.1f} MB if every tensor moves once, {traffic.walked / 1e6:,.1f} MB without any cache",
    )
    summary.add_row(
        f"estimate: roofline forward, {gpu}",
        f"at least {max(roofline['compute'], roofline['memory']):.4g} ms, bound by {roofline['bound']} "
        f"({roofline['compute']:.4g} ms of products at the data sheet's rate, {roofline['memory']:.4g} ms of memory)",
    )
    _console().print(summary)
    _console().print(table)


@train_app.command("miniature")
def train_miniature(
    name: Annotated[str, typer.Argument(help="llava, dinat_world, dinat_digits, detector or generator.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights and the model card.")] = Path("outputs/train"),
    seed: Annotated[int, typer.Option(help="Seed of weights, data and order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps per stage, for a short try; the recipe's without it.")
    ] = None,
) -> None:
    """Train one of the embedded models from its recipe."""
    from attnzoo import miniatures

    miniatures.train(name, out / name, seed=seed, device=device, steps=steps)
    typer.echo(str(out / name))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The authors' checkpoint: .pth or .safetensors.")],
    target: Annotated[Path, typer.Argument(help="A folder, or the .safetensors file to write in one.")],
    model: Annotated[str, typer.Option(help="The timm name of the model.")],
    settings: Params = None,
) -> None:
    """Write a published checkpoint as a folder that timm's local-dir: loads."""
    from attnzoo import backbones

    report = backbones.convert(source, target, model, **pairs_as_dict(settings))
    typer.echo(str(report))
    for what in ("renamed", "resampled"):
        for name, became in getattr(report, what).items():
            typer.echo(f"{what}: {name} -> {became}")
    for what in ("dropped", "made"):
        for name in getattr(report, what):
            typer.echo(f"{what}: {name}")


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures that PIL can open.")],
    model: Annotated[str, typer.Option(help="A timm name (dinat_tiny, nat_mini …), or miniature.")] = "miniature",
    checkpoint: Annotated[Path | None, typer.Option(help="Local weights: the authors' file or safetensors.")] = None,
    hub: Annotated[str | None, typer.Option(help="Weights on the Hugging Face hub, ORG/NAME.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
) -> None:
    """Classify pictures with one of the backbones."""
    from attnzoo import backbones

    _existing(images)
    if model == "miniature":
        if checkpoint or hub:
            raise ValueError(
                "--model miniature has its own weights: name a timm model to go with --checkpoint or --hub"
            )
        from attnzoo import miniatures

        found = miniatures.classify(images, topk=top_k)
    else:
        found = backbones.classify(images, model=model, checkpoint=checkpoint, hub=hub, topk=top_k)
    table = Table("image", *(f"top {i + 1}" for i in range(len(found[0]))))
    for path, rows in zip(images, found):
        table.add_row(str(path), *(f"{label} {probability:.3f}" for label, probability in rows))
    _console().print(table)


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Argument(help="What to draw. The miniature knows one or two coloured shapes.")
    ] = "a red circle",
    pipeline: Annotated[str, typer.Option(help="A diffusers folder or hub ID, or miniature.")] = "miniature",
    method: Annotated[str | None, typer.Option(help="A method of the generator room; none draws plainly.")] = None,
    settings: Params = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    height: Annotated[int | None, typer.Option(help="Pixels; the pipeline's default without it.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the pipeline's default without it.")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("outputs/generated.png"),
) -> None:
    """Generate a picture, plainly or with a method switched on."""
    from attnzoo import generators

    image = generators.generate(
        prompt,
        pipeline=pipeline,
        method=method,
        seed=seed,
        num_inference_steps=steps,
        height=height,
        width=width,
        **pairs_as_dict(settings),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)
    typer.echo(str(out))


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture that PIL can open.")],
    prompt: Annotated[str, typer.Argument(help="What to ask, in the model's own form.")],
    model: Annotated[str, typer.Option(help="A transformers folder or hub ID, or miniature.")] = "miniature",
    method: Annotated[str | None, typer.Option(help="A method of the vlm room; none answers plainly.")] = None,
    settings: Params = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
) -> None:
    """Ask a vision-language model about a picture, plainly or with a method switched on."""
    from attnzoo import vlm

    _existing([image])
    typer.echo(
        vlm.ask(image, prompt, model=model, method=method, max_new_tokens=max_new_tokens, **pairs_as_dict(settings))
    )


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=1024, max=65535, help="Port on 127.0.0.1.")] = 7860,
) -> None:
    """Serve the demo application on 127.0.0.1."""
    _beside("demos.app").main(port=port)


def main() -> None:
    """Entry point: what is wrong is one line on stderr, never a traceback."""
    try:
        app(standalone_mode=True)
    except ModuleNotFoundError as missing:
        name = (missing.name or "").split(".")[0]
        if os.environ.get("ATTNZOO_TRACEBACK") == "1" or name not in _EXTRAS:
            raise
        _fail(f"{name} is not installed: pip install 'attnzoo[{_EXTRAS[name]}]'")
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    except Exception as error:
        if os.environ.get("ATTNZOO_TRACEBACK") == "1":
            raise
        if isinstance(error, AttnzooError | ValueError | TypeError | OSError) and str(error):
            _fail(str(error))
        _fail(f"{type(error).__name__}: {error}; ATTNZOO_TRACEBACK=1 shows where")


def _fail(message: str, status: int = 2) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print("error:", message, markup=False)
    sys.exit(status)
