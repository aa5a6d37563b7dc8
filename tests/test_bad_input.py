"""Bad input, room by room and at the command line: an error that names what was wrong, before anything is changed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import attnzoo
from attnzoo import cli, generators, miniatures, vlm
from attnzoo.errors import ReachError, UnsupportedError
from attnzoo.kernels import edited_attention, neighborhood_attention, not_supported_reasons, use_backend


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(shape, dtype=dtype) for _ in range(3))


def attend(*args: Any, shape: tuple[int, ...] = (1, 8, 8, 2, 8), **kwargs: Any) -> Any:
    return neighborhood_attention(*qkv(*shape), *args, **kwargs)


def double_backward() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 8, 2, 8))
    (grad,) = torch.autograd.grad(neighborhood_attention(q, k, v, 3).sum(), q, create_graph=True)
    grad.sum().backward()


KERNELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "query of a wrong rank": (lambda: neighborhood_attention(*qkv(8, 8), 3), ValueError, "query"),
    "query is a list": (lambda: neighborhood_attention([1], *qkv(1, 8, 2, 8)[1:], 3), TypeError, "query"),
    "window larger than the grid": (lambda: attend(9), ValueError, "kernel_size"),
    "window times dilation larger": (lambda: attend(3, dilation=4), ValueError, "dilation"),
    "stride larger than the window": (lambda: attend(3, stride=5), ValueError, "stride"),
    "window of zero": (lambda: attend(0), ValueError, "kernel_size"),
    "window of floats": (lambda: attend(3.0), TypeError, "kernel_size"),
    "three windows for two axes": (lambda: attend((3, 3, 3)), ValueError, "kernel_size"),
    "unknown border": (lambda: attend(3, border="wrap"), ValueError, "border"),
    "unknown back end": (lambda: attend(3, backend="cuda"), ValueError, "backend"),
    "back end that can't serve": (lambda: attend(3, backend="triton"), UnsupportedError, "triton"),
    "use_backend of a wrong name": (lambda: use_backend("fast").__enter__(), ValueError, "backend"),
    "bias of a wrong shape": (lambda: attend(3, bias=torch.randn(2, 4, 5)), ValueError, "bias"),
    "mixed dtypes": (
        lambda: neighborhood_attention(torch.randn(1, 8, 2, 8), *qkv(1, 8, 2, 8, dtype=torch.float16)[1:], 3),
        (TypeError, ValueError),
        "dtype",
    ),
    "integers": (
        lambda: neighborhood_attention(*(torch.ones(1, 8, 2, 8).int() for _ in range(3)), 3),
        TypeError,
        "int32",
    ),
    "keys without values": (
        lambda: attend(3, additional_keys=torch.randn(1, 4, 2, 8)),
        ValueError,
        "additional_values",
    ),
    "heads that don't divide": (
        lambda: neighborhood_attention(torch.randn(1, 8, 3, 8), *qkv(1, 8, 2, 8)[1:], 3),
        ValueError,
        "heads",
    ),
    "double backward": (double_backward, RuntimeError, "neighborhood_attention"),
    "unknown operation": (
        lambda: not_supported_reasons("convolution", "tiled", *qkv(1, 8, 2, 8)),
        ValueError,
        "convolution",
    ),
    "edited: rule without groups": (lambda: edited_attention(*qkv(1, 8, 2, 8), rule=lambda m: m), ValueError, "groups"),
    "edited: key_bias of a wrong shape": (
        lambda: edited_attention(*qkv(1, 8, 2, 8), key_bias=torch.zeros(1, 2, 7)),
        ValueError,
        "key_bias",
    ),
}

BACKBONES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "picture smaller than window x dilation": (
        lambda: timm.create_model("dinat_mini", embed_dim=16, num_heads=(1, 1, 1, 1))(torch.randn(1, 3, 64, 64)),
        ValueError,
        "pad_small",
    ),
    "unknown model": (lambda: attnzoo.backbones.classify([blank()], model="dinat_tinny"), ValueError, "dinat_tiny"),
    "checkpoint that is not there": (
        lambda: attnzoo.backbones.classify([blank()], model="nat_mini", checkpoint="nowhere.pth"),
        ReachError,
        "nowhere.pth",
    ),
    "heads that don't divide the width": (
        lambda: timm.create_model("nat_mini", embed_dim=30, num_heads=(4, 4, 4, 4)),
        ValueError,
        "num_heads",
    ),
}


def blank() -> Image.Image:
    return Image.fromarray(np.zeros((48, 48, 3), np.uint8))


def transformer() -> Any:
    return miniatures.load("generator").transformer


GENERATORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown method": (lambda: generators.enable(transformer(), "gnaa", kernel_size=3), ValueError, "gna"),
    "not a pipeline": (lambda: generators.enable(torch.nn.Linear(2, 2), "gna", kernel_size=3), Exception, "Linear"),
    "no window": (lambda: generators.enable(transformer(), "gna"), TypeError, "kernel_size"),
    "window of zero": (lambda: generators.enable(transformer(), "gna", kernel_size=0), ValueError, "kernel_size"),
    "stride over the window": (
        lambda: generators.enable(transformer(), "gna", kernel_size=3, stride=4),
        ValueError,
        "stride",
    ),
    "window of three axes": (
        lambda: generators.enable(transformer(), "gna", kernel_size=(3, 3, 3)),
        ValueError,
        "kernel_size",
    ),
    "layers that are not there": (
        lambda: generators.enable(transformer(), "gna", kernel_size=3, layers="attic*"),
        ValueError,
        "layers",
    ),
    "options of another method": (
        lambda: generators.enable(transformer(), "gna", kernel_size=3, alpha=1),
        TypeError,
        "alpha",
    ),
    "a prompt of unknown words": (lambda: miniatures.load("generator")("a purple giraffe"), ValueError, "purple"),
    "density of a wrong rank": (lambda: generators.density((8, 8), (3, 3, 3)), ValueError, "kernel_size"),
}


def llava() -> Any:
    return miniatures.load("llava")[0]


def edit(*args: Any, **kwargs: Any) -> Any:
    with vlm.edit(llava(), *args, **kwargs):
        raise AssertionError("nothing was refused")


VLM: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown method": (lambda: edit("paii"), ValueError, "pai"),
    "not a model": (lambda: vlm.edit(torch.nn.Linear(2, 2), "pai").__enter__(), TypeError, "model"),
    "layer that is not there": (lambda: edit("pai", layers=[99]), ValueError, "layers"),
    "alpha is text": (lambda: edit("pai", alpha="much"), TypeError, "alpha"),
    "p out of range": (lambda: edit("var", p=1.5), ValueError, "p"),
    "unknown setting": (lambda: edit("pai", gama=1.1), TypeError, "gama"),
    "model that is not there": (lambda: vlm.ask(blank(), "hello", model="./nowhere"), ReachError, "nowhere"),
}

ROOMS = {"kernels": KERNELS, "backbones": BACKBONES, "generators": GENERATORS, "vlm": VLM}


@pytest.mark.parametrize("room, kind", [(room, kind) for room, table in ROOMS.items() for kind in table])
def test_the_error_names_it(room: str, kind: str):
    call, error, word = ROOMS[room][kind]
    with pytest.raises(error) as caught:
        call()
    assert word in str(caught.value), f"{caught.value!s} does not name {word!r}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good picture, a file that is none, and no network."""
    blank().save(tmp_path / "scene.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


COMMANDS: dict[str, tuple[str, str]] = {
    "picture that is not there": ("classify missing.png", "missing.png"),
    "file that is no picture": ("classify notes.txt", "notes.txt"),
    "model nobody has": ("classify scene.png --model nonsense_net", "nonsense_net"),
    "checkpoint that is not there": ("classify scene.png --model nat_mini --checkpoint gone.pth", "gone.pth"),
    "checkpoint of something else": ("classify scene.png --model nat_mini --checkpoint notes.txt", "notes.txt"),
    "hub out of reach": ("classify scene.png --model nat_mini --hub someone/nothing", "someone/nothing"),
    "checkpoint for the miniature": ("classify scene.png --checkpoint gone.pth", "miniature"),
    "method nobody has": ("generate --method gnaa", "gna"),
    "setting that is none": ("generate --method gna --set kernel_size", "KEY=VALUE"),
    "window of zero": ("generate --method gna --set kernel_size=0", "kernel_size"),
    "setting without a method": ("generate --set kernel_size=3", "method"),
    "prompt of unknown words": ("generate 'a purple giraffe'", "purple"),
    "size that is no multiple": ("generate --height 33", "height"),
    "no steps": ("generate --steps 0", "steps"),
    "pipeline folder that is not there": ("generate --pipeline ./gone", "gone"),
    "pipeline out of reach": ("generate --pipeline someone/nothing", "someone/nothing"),
    "asking about no picture": ("ask missing.png hello", "missing.png"),
    "vlm method nobody has": ("ask scene.png hello --method vaar", "var"),
    "vlm out of reach": ("ask scene.png hello --model someone/nothing", "someone/nothing"),
    "alpha of text": ("ask scene.png hello --method pai --set alpha=much", "alpha"),
    "room nobody built": ("list attic", "attic"),
    "method not in the catalogue": ("info gnaa", "gna"),
    "nothing to check": ("check weather", "WHAT"),
    "miniature nobody trains": ("train miniature gpt", "gpt"),
    "training of no steps": ("train miniature llava --steps 0", "steps"),
    "operation nobody wrote": ("bench convolution", "convolution"),
    "no threads": ("bench --threads 0", "threads"),
    "demo into a file": ("demo --out notes.txt", "notes.txt"),
    "port of the system": ("serve --port 80", "port"),
    "command nobody wrote": ("paint", "paint"),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_line_says_it_in_one_line(kind: str, here: Path, monkeypatch, capsys):
    command, word = COMMANDS[kind]
    before = sorted(p.name for p in here.iterdir())
    monkeypatch.setattr(sys, "argv", ["attnzoo", *shlex.split(command)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert word in said and "Traceback" not in said and "bug" not in said and "ATTNZOO_TRACEBACK" not in said, said
    assert sorted(p.name for p in here.iterdir()) == before
