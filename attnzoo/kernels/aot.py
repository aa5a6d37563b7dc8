"""Compile the Triton kernels for GPUs that are not here, and read what they would occupy.

    python -m attnzoo.kernels.aot                          # the quick cases: every kernel once, for every target
    python -m attnzoo.kernels.aot --all                    # every case
    python -m attnzoo.kernels.aot --all --write docs/kernels.md
    python -m attnzoo.kernels.aot --kernel na_forward --target sm_90 --case "float16 d64 2-D"
    python -m attnzoo.kernels.aot --all --list             # what would be compiled

An operation's Triton module lists its cases in `AOT`: a case is a call of the operation's own launcher on meta tensors,
so that exactly what would be launched is compiled, with the arguments specialised as Triton specialises them (integers
that are 1 or multiples of 16, aligned pointers). Registers and spills are the assembler's: `ptxas -v` for NVIDIA, the
metadata of the amdgcn text for AMD; shared memory is Triton's. Results are kept in $XDG_CACHE_HOME/attnzoo/aot (by
default ~/.cache/attnzoo/aot) by a hash of kernel source, arguments, options, target and Triton's version.

Exit status: 0 when all is within the limits, 1 when a configuration breaks one, 2 for a call that can't be served.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnzoo.errors import UnsupportedError
from attnzoo.kernels.dispatch import interpreting
from attnzoo.kernels.launch import Launch, recording

OPERATIONS = (
    "attnzoo.kernels.neighborhood_attention.triton",
    "attnzoo.kernels.edited_attention.triton",
    "attnzoo.kernels.edited_attention.triton_backward",
    "attnzoo.kernels.edited_attention.triton_readout",
    "attnzoo.kernels.sampled_window_attention.triton",
    "attnzoo.kernels.block_sparse_attention.triton",
)
BEGIN, END = "<!-- aot: begin -->", "<!-- aot: end -->"


@dataclass(frozen=True)
class Target:
    """A GPU architecture: Triton's names for it, and the most shared memory one program may take, in bytes."""

    name: str
    vendor: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}


@dataclass(frozen=True)
class Case:
    """One call of an operation, as data.

    label: dtype, head dim, rank and whatever else distinguishes it. run: calls the operation's launcher on meta
    tensors. quick: belongs to the short list. spills: bytes per thread that a kernel may spill, by its name; 0 for
    the others.
    """

    label: str
    run: Callable[[], object]
    quick: bool = False
    spills: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What one compiled kernel occupies. registers and spill are per thread, shared and spill in bytes."""

    kernel: str
    case: str
    target: str
    tiles: str
    num_warps: int
    num_stages: int
    registers: int
    spill: int
    shared: int
    matrix_instructions: int
    spill_limit: int
    shared_limit: int

    @property
    def faults(self) -> list[str]:
        """The limits that it breaks."""
        faults = []
        if self.spill > self.spill_limit:
            faults.append(f"spills {self.spill} B, allowed {self.spill_limit}")
        if self.shared > self.shared_limit:
            faults.append(f"takes {self.shared} B of shared memory, there are {self.shared_limit}")
        return faults


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def _specialise(launched: Launch, target: Target) -> tuple[dict[str, str], dict[str, Any], dict[tuple, list], dict]:
    """(signature, constants, attributes, options) of a launch, as Triton's JIT would derive them from its arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple, list] = {}
    aligned = [["tt.divisibility", 16]]
    arguments = dict(launched.arguments)
    for position, parameter in enumerate(launched.kernel.params):
        name = parameter.name
        value = arguments.pop(name) if name in arguments else parameter.default
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            small = [["tt.pointer_range", 32]] if target.vendor == "hip" and value.nbytes <= 2**31 - 1 else []
            attributes[(position,)] = aligned + small
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(position,)] = aligned
        else:
            signature[name] = "fp32"
    return signature, constants, attributes, arguments


def _source(launched: Launch, target: Target) -> tuple[Any, Any, dict[str, Any]]:
    """(Triton's source object, Triton's target, options) of a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = _specialise(launched, target)
    source = ASTSource(fn=launched.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, GPUTarget(target.vendor, target.arch, target.warp_size), options


def _compile(launched: Launch, target: Target) -> tuple[str, Callable[[], Any]]:
    """(hash of all that decides the result, the compilation itself)."""
    import triton

    source, gpu, options = _source(launched, target)
    text = json.dumps([triton.__version__, source.hash(), asdict(target), sorted(options.items())])
    return hashlib.sha256(text.encode()).hexdigest(), lambda: triton.compile(source, target=gpu, options=options)


def front_end(launched: Launch, target: Target) -> str:
    """The launch as Triton's intermediate language: types and shapes are checked, nothing is assembled.

    A fraction of a second where a compilation takes several; it finds what the interpreter lets pass. Raises
    triton's CompilationError for a kernel that is not well-formed.
    """
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    source, gpu, options = _source(launched, target)
    backend = make_backend(gpu)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    return str(source.make_ir(gpu, parsed, functions, modules, context))


def _number(pattern: str, text: str, what: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise UnsupportedError(f"aot: no {what} in the assembler's report; this Triton writes it in another form")
    return int(found[1])


def _resources(compiled: Any, target: Target) -> dict[str, int]:
    """registers, spill (bytes per thread), shared (bytes) and the count of matrix instructions."""
    if target.vendor == "hip":
        text = compiled.asm["amdgcn"]
        return {
            "registers": _number(r"\.vgpr_count:\s+(\d+)", text, "vgpr_count"),
            "spill": 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text, "vgpr_spill_count"),
            "shared": compiled.metadata.shared,
            "matrix_instructions": len(re.findall(r"\bv_mfma", text)),
        }
    from triton.backends.nvidia.compiler import get_ptxas

    text = compiled.asm["ptx"]
    architecture = re.search(r"\.target (sm_\w+)", text)
    if architecture is None:
        raise UnsupportedError("aot: the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(text)
        command = [get_ptxas(target.arch).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={architecture[1]}"]
        report = subprocess.run([*command, str(path), "-o", os.devnull], capture_output=True, text=True, check=True)
    return {
        "registers": _number(r"Used (\d+) registers", report.stderr, "register count"),
        "spill": _number(r"(\d+) bytes spill stores", report.stderr, "spill count"),
        "shared": compiled.metadata.shared,
        "matrix_instructions": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", text)),
    }


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "attnzoo", "aot")


def _tiles(launched: Launch) -> str:
    """The tiles of a launch: the product of TQ0.. by that of TK0.., or the block sizes by name."""
    sizes = {"TQ": 1, "TK": 1}
    for name, value in launched.arguments.items():
        if name[:2] in sizes and name[2:].isdigit():
            sizes[name[:2]] *= value
    if sizes != {"TQ": 1, "TK": 1}:
        return f"{sizes['TQ']} x {sizes['TK']}"
    named = (f"{k} {v}" for k, v in launched.arguments.items() if re.fullmatch(r"(BLOCK_[MN]|ROWS|KEYS|BM|BN)", k))
    return ", ".join(named)


def measure(launched: Launch, case: Case, target: Target) -> Measured:
    """Compile one launch for a target, or take the result of an equal compilation from the cache.

    Raises UnsupportedError under TRITON_INTERPRET=1: then there is nothing to compile.
    """
    if interpreting():
        raise UnsupportedError("aot: TRITON_INTERPRET=1 is set, so that Triton interprets; unset it to compile")
    digest, compilation = _compile(launched, target)
    kept = _cache_folder() / f"{digest}.json"
    if kept.exists():
        found = json.loads(kept.read_text())
    else:
        found = _resources(compilation(), target)
        kept.parent.mkdir(parents=True, exist_ok=True)
        whole = kept.with_suffix(f".{os.getpid()}")  # renamed when complete: two processes may compile the same
        whole.write_text(json.dumps(found))
        whole.replace(kept)
    name = launched.kernel.__name__
    return Measured(
        kernel=name,
        case=case.label,
        target=target.name,
        tiles=_tiles(launched),
        num_warps=launched.arguments["num_warps"],
        num_stages=launched.arguments["num_stages"],
        spill_limit=case.spills.get(name, 0),
        shared_limit=target.shared_limit,
        **found,
    )


def cases(quick: bool) -> list[Case]:
    """The cases of all operations; with `quick` the short list."""
    listed: list[Case] = []
    for name in OPERATIONS:
        listed += [case for case in importlib.import_module(name).AOT if case.quick or not quick]
    return listed


def launches(case: Case, target: Target) -> list[Launch]:
    """What a case launches on a target's kind of GPU, one launch per kernel."""
    with recording(target.vendor) as launched:
        case.run()
    return list({each.kernel.__name__: each for each in launched}.values())


def table(rows: Iterable[Measured]) -> str:
    """The measurements as a Markdown table."""
    head = "| kernel | case | target | tile | warps / stages | registers | spill B | shared KB | matrix instr. |"
    lines = [head, "|" + " --- |" * (head.count("|") - 1)]
    for row in rows:
        mark = " **over**" if row.faults else ""
        cells = (
            row.kernel,
            row.case,
            row.target,
            row.tiles,
            f"{row.num_warps} / {row.num_stages}",
            row.registers,
            row.spill,
            f"{row.shared / 1024:.0f}{mark}",
            row.matrix_instructions,
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Put `text` between the two marks of a Markdown file; everything else in it stays.

    Raises ValueError where the file does not hold both marks.
    """
    page = path.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"--write: {path} must hold the lines {BEGIN} and {END}")
    before, rest = page.split(BEGIN, 1)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attnzoo.kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every case, not only the quick ones")
    parser.add_argument("--case", help="only cases whose label contains this text (out of all)")
    parser.add_argument("--kernel", help="only kernels whose name contains this text")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (may be repeated)")
    parser.add_argument("--list", action="store_true", help="name what would be compiled, and compile nothing")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this Markdown file")
    given = parser.parse_args(arguments)
    if interpreting():
        print("aot: TRITON_INTERPRET=1 is set, so that Triton interprets; unset it to compile", file=sys.stderr)
        return 2
    wanted = [
        (launched, case, target)
        for case in cases(quick=not given.all and given.case is None)
        if given.case is None or given.case in case.label
        for target in (TARGETS[name] for name in given.target or TARGETS)
        for launched in launches(case, target)
        if given.kernel is None or given.kernel in launched.kernel.__name__
    ]
    if not wanted:
        print("aot: nothing matches --case, --kernel and --target", file=sys.stderr)
        return 2
    if given.list:
        print(
            "\n".join(
                f"| {launched.kernel.__name__} | {case.label} | {target.name} |" for launched, case, target in wanted
            )
        )
        return 0
    rows = []
    begun = time.perf_counter()
    for launched, case, target in wanted:
        row = measure(launched, case, target)
        rows.append(row)
        told = f"{row.registers} registers, {row.spill} B spilled, {row.shared} B shared"
        print(f"{row.kernel} [{row.case}] {row.target}: {told}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row.kernel)  # stable: cases and targets keep their order
    printed = table(rows)
    print(printed)
    faults = [f"{row.kernel} [{row.case}] {row.target}: {fault}" for row in rows for fault in row.faults]
    print(f"{len(rows)} kernels, {len(faults)} over a limit, {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    for fault in faults:
        print(fault, file=sys.stderr)
    if given.write is not None:
        write(given.write, printed)
    return 1 if faults else 0


if __name__ == "__main__":
    from attnzoo.kernels import aot  # the module under its own name: `Case` must be one class, not two

    sys.exit(aot.main())
