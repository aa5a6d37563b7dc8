"""Backbones on a GPU beside timm's nearest: images per second and peak memory in bfloat16, forward and training.

    python -m benchmarks.gpu_backbones [--models NAME,...] [--sizes 224,512,1024] [--passes forward,training]
                                       [--out outputs/gpu_backbones] [--minutes 20] [--dry-run]

Per model, size and pass: ours, ours with flex_attention for the kernel (models of neighborhood attention), and timm's
nearest (`backbone_cases.PEERS`), under bfloat16 autocast, at the batches of BATCHES. A model is timed only after its
outputs on this GPU agree with the reference back end's, in float32 to 1e-5 or else in float64 to 1e-9, on an image of
its own size. Training is a forward and a backward pass with gradients of all parameters, without an optimiser. A
contender that fails (out of memory, flex where it can't say the pattern) is reported with its reason.

OUT/results.json is written after every row; a repeated run goes on where the last one stopped. --dry-run lists the
rows and needs no GPU.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.kernels import use_backend
from benchmarks import backbone_cases as cases
from benchmarks import measuring
from benchmarks.backbones import right
from benchmarks.gpu import Kept
from benchmarks.gpu_timing import CudaTimer, Timer

BATCHES = {224: 64, 512: 16, 1024: 4}
PASSES = ("forward", "training")
MODELS = (
    "dinat_tiny",
    "nat_tiny",
    "dinat_s_tiny",
    "agent_swin_tiny",
    "inline_swin_tiny",
    "vsa_swin_tiny",
    "transnext_tiny",
)
FLEX = ("nat", "dinat")  # families whose only kernel is one that flex can be asked for

Memory = Callable[[Callable[[], Any]], int]


def cuda_memory(run: Callable[[], Any]) -> int:
    """Bytes that the GPU's allocator holds at its peak in one run, the model's parameters and inputs included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def rows(models: list[str], sizes: list[int], passes: list[str]) -> list[tuple[str, int, str]]:
    """(model, size, pass), forward before training, small before large."""
    return [(name, size, what) for what in passes for size in sizes for name in models]


def contenders(name: str) -> dict[str, tuple[str, str | None]]:
    """{label: (model, back end)} of a row."""
    found: dict[str, tuple[str, str | None]] = {"ours": (name, None)}
    if name.startswith(FLEX):
        found["ours, flex"] = (name, "flex")
    return {**found, cases.PEERS[name]: (cases.PEERS[name], None)}


def runner(model: nn.Module, x: Tensor, what: str, backend: str | None) -> Callable[[], Any]:
    """One pass as a function of nothing, under bfloat16 autocast."""

    def run() -> Any:
        with use_backend(backend) if backend else nullcontext(), torch.autocast(x.device.type, torch.bfloat16):
            if what == "forward":
                with torch.no_grad():
                    return model(x)
            loss = model(x).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss

    return run


def checked(name: str, size: int, device: str) -> bool:
    """Whether a model's outputs on `device` are right at a size; see `benchmarks.backbones.right`."""
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    model = cases.perturb(cases.build(name, size)).to(device)
    peer = cases.build(cases.PEERS[name], size).to(device) if name.endswith("_attnzoo") else model
    with torch.inference_mode():
        return right(name, model, peer, x)


def measure(name: str, size: int, what: str, batch: int, device: str, timer: Timer, memory: Memory) -> dict[str, Any]:
    """One row: images per second and peak MiB by contender, and why a contender has none."""
    found: dict[str, Any] = {"batch": batch, "images": {}, "mib": {}, "absent": {}}
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    for label, (model_name, backend) in contenders(name).items():
        model = None
        try:
            model = cases.build(model_name, size).to(device).train(what == "training")
            run = runner(model, x, what, backend)
            found["mib"][label] = memory(run) / 2**20
            found["images"][label] = 1e3 * batch / timer(run)
        except Exception as error:
            found["mib"].pop(label, None)
            found["absent"][label] = measuring.reason(error)
        del model
    return found


def told(name: str, size: int, what: str, row: dict[str, Any]) -> Iterator[str]:
    """A row as text."""
    yield f"{name} at {size}, {what}, batch {row['batch']}, bfloat16:"
    for label, speed in row["images"].items():
        yield f"    {label}: {speed:,.0f} images/s, {row['mib'][label]:,.0f} MiB"
    for label, why in row["absent"].items():
        yield f"    {label}: {why}"


def dry_run(options: argparse.Namespace) -> Iterator[str]:
    """What would run, line by line."""
    for name, size, what in rows(options.models, options.sizes, options.passes):
        yield f"{name}/{size}/{what}: batch {BATCHES[size]}; {', '.join(contenders(name))}"


def run_rows(
    options: argparse.Namespace, kept: Kept, device: str, timer: Timer, memory: Memory, clock: Callable[[], float]
) -> bool:
    """All rows, what is kept already left out; False where outputs were wrong, ours failed or the time was over."""
    good, deadline = True, clock() + 60 * options.minutes
    for name, size, what in rows(options.models, options.sizes, options.passes):
        key, proof = f"{name}/{size}/{what}", f"check/{name}/{size}"
        row = kept.get(key)
        if row is None and clock() > deadline:
            print(f"{key}: not run, the {options.minutes:g} minutes are over")
            good = False
            continue
        if kept.get(proof) is None:
            try:
                kept.put(proof, {"ok": checked(name, size, device)})
            except Exception as error:
                kept.put(proof, {"ok": False, "failure": measuring.reason(error)})
        if not kept.get(proof)["ok"]:
            print(f"{key}: no speed, its outputs are not known to be right: {kept.get(proof)}")
            good = False
            continue
        if row is None:
            row = measure(name, size, what, BATCHES[size], device, timer, memory)
            if "ours" in row["images"]:
                kept.put(key, row)
        good &= "ours" in row["images"]
        print("\n".join(told(name, size, what, row)), flush=True)
    return good


def main(arguments: list[str] | None = None) -> int:
    """The command; see the module's text. Raises ValueError for arguments that can't be served."""

    def listed(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_backbones", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", type=listed, default=list(MODELS), help="names, joined by commas")
    parser.add_argument("--sizes", type=listed, default=[str(size) for size in BATCHES], help="of 224,512,1024")
    parser.add_argument("--passes", type=listed, default=list(PASSES), help="of forward,training")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_backbones"), help="folder for results.json")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the GPU, for everything")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; needs no GPU")
    options = parser.parse_args(arguments)
    known = {"models": list(cases.PEERS), "sizes": [str(size) for size in BATCHES], "passes": list(PASSES)}
    for name, choices in known.items():
        given = getattr(options, name)
        if not given or any(value not in choices for value in given):
            raise ValueError(f"--{name} must be of {', '.join(choices)}; got {', '.join(given) or 'nothing'}")
    if not options.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes}")
    options.sizes = [int(size) for size in options.sizes]
    if options.dry_run:
        print("\n".join(dry_run(options)))
        return 0
    if not torch.cuda.is_available():
        raise ValueError("gpu_backbones needs a GPU that torch sees, and it sees none (--dry-run says what would run)")
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    kept = Kept(options.out, machine)
    return int(not run_rows(options, kept, "cuda", CudaTimer(), cuda_memory, time.perf_counter))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
