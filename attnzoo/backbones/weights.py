"""The authors' checkpoint files into models, with a report of what was changed on the way, or a refusal that says why.

    report = attnzoo.backbones.load_published(model, "dinat_tiny_in1k_224.pth")
    attnzoo.backbones.convert("dinat_tiny_in1k_224.pth", "dinat_tiny/model.safetensors", model="dinat_tiny")

What a file may be: safetensors, or a torch file of plain tensors (read with weights_only=True, so that it can't run
code); the parameters at its top or under state_dict_ema, model_ema, params_ema, state_dict, model or params; with
"module." or "backbone."-like prefixes. Renaming and resampling are the family's (`checkpoint_filter_fn` of the model's
module).
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import unwrap_checkpoint
from attnzoo.errors import ReachError

__all__ = ["LoadReport", "convert", "load_published"]

_PREFIXES = ("backbone.", "encoder.", "model.")


@dataclass(frozen=True)
class LoadReport:
    """What happened to a checkpoint on its way into a model.

    loaded: how many tensors the model took. renamed: the file's name of a tensor -> the model's, where they differ.
    resampled: the model's name -> (the file's shape, the model's shape). dropped: names of the file that the model has
    no place for (buffers that are computed, heads of another task). made: names of the model that the file lacks and
    its family computed from others.
    """

    loaded: int
    renamed: dict[str, str]
    resampled: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dropped: tuple[str, ...]
    made: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded"]
        for what, found in (
            ("renamed", self.renamed),
            ("resampled", self.resampled),
            ("dropped", self.dropped),
            ("made", self.made),
        ):
            if found:
                names = list(found)
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{len(names)} {what} ({', '.join(names[:3])}{more})")
        return ", ".join(parts)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a safetensors or torch file, as a dict.

    Raises ReachError where it can't be read, ValueError where it is cut off, holds code, or is no dict.
    """
    path = Path(path)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ReachError(f"checkpoint {str(path)!r} can't be read: {error.strerror or error}") from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A cut-off torch file may be an OSError as well: a place in it is sought that it doesn't have.
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(
            f"checkpoint {str(path)!r} is neither safetensors nor a torch file of plain tensors: {lines[0][:200]}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {str(path)!r} must hold a dict of tensors, got {type(content).__name__}")
    return content


def checkpoint_state(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The parameters in a checkpoint file, out of the entry they lie in and without prefixes that `model` lacks."""
    state = clean_state_dict(unwrap_checkpoint(read_checkpoint(path)))
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"checkpoint {str(path)!r} holds no tensors")
    if model is None:
        return state
    own = set(model.state_dict())
    for prefix in _PREFIXES:
        bare = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if len(own & set(bare)) > len(own & set(state)):
            return bare
    return state


def fit_state(state: dict[str, Tensor], model: nn.Module, what: str) -> tuple[dict[str, Tensor], LoadReport]:
    """`state` as `model` takes it, strictly, and the report. Raises ValueError naming the first mismatches; changes
    nothing."""
    name_of_model = repr(getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        fitted = dict(state) if filter_fn is None else dict(filter_fn(dict(state), model))
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{what} does not fit {name_of_model}: {type(error).__name__}: {error}") from error
    if spoilt := [name for name, value in fitted.items() if value.is_floating_point() and value.isnan().any()]:
        more = f" and {len(spoilt) - 3} more" if len(spoilt) > 3 else ""
        raise ValueError(f"{what} holds NaN in {', '.join(spoilt[:3])}{more}: its training has diverged")
    own = model.state_dict()
    wrong = [
        f"{name} is {tuple(fitted[name].shape)} and must be {tuple(value.shape)}"
        for name, value in own.items()
        if name in fitted and fitted[name].shape != value.shape
    ]
    counters = ("num_batches_tracked",)
    missing = [f"{name} is missing" for name in own if name not in fitted and not name.endswith(counters)]
    foreign = [] if wrong else _foreign(fitted, model)
    problems = wrong + missing + [f"{name} has no place in the model" for name in foreign]
    if problems:
        shown = "; ".join(problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        hint = ""
        classifier = _weight_of(getattr(model, "pretrained_cfg", {}), "classifier")
        if classifier in own and classifier in fitted and len(own[classifier]) != len(fitted[classifier]):
            hint = f" (build the model with num_classes={len(fitted[classifier])})"
        raise ValueError(f"{what} does not fit {name_of_model}: {shown}{more}{hint}")
    origin = {value.data_ptr(): name for name, value in state.items() if value.numel()}
    renamed = {
        origin[value.data_ptr()]: name
        for name, value in fitted.items()
        if name not in state and value.numel() and value.data_ptr() in origin
    }
    report = LoadReport(
        loaded=sum(name in own for name in fitted),
        renamed=renamed,
        resampled={
            name: (tuple(state[name].shape), tuple(value.shape))
            for name, value in fitted.items()
            if name in state and state[name].shape != value.shape
        },
        dropped=tuple(name for name in state if name not in renamed and not (name in fitted and name in own)),
        made=tuple(name for name in fitted if name not in state and name not in renamed.values()),
    )
    return fitted, report


def _foreign(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Names in `state` that `model` has no place for; its modules' own loading hooks are asked, on a copy without data
    (a stored buffer that is computed now is taken, say)."""
    tensors = [*model.parameters(), *model.buffers()]
    without_data: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        without_data[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    shell = copy.deepcopy(model, without_data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no-op.*")  # copying into a tensor without data is meant here
        return list(shell.load_state_dict(state, strict=False).unexpected_keys)


def load_published(model: nn.Module, path: str | Path) -> LoadReport:
    """Load the authors' checkpoint file into `model`, strictly, and say what was changed on the way.

    model: any timm model, or one of `restoration`; families of attnzoo know their authors' names. path: see the
    module's text. Position tables and relative position biases of another size are resampled. Parameters are copied,
    in the model's dtype and device.
    Raises ReachError for a file that can't be read, ValueError for one that is no checkpoint or another model's, with
    the first mismatches; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    fitted, report = fit_state(checkpoint_state(path, model), model, f"checkpoint {Path(path).name!r}")
    model.load_state_dict(fitted, strict=False)  # fit_state was strict; only counters may be absent
    return report


def _weight_of(cfg: dict[str, Any], layer: str) -> str:
    """The weight of the layer that `cfg` names; the first's where it names several (two heads of a distilled model)."""
    name = cfg.get(layer)
    return f"{name[0] if isinstance(name, tuple | list) and name else name}.weight"


def build_for(name: str, state: dict[str, Tensor], cfg: dict[str, Any], **kwargs: Any) -> nn.Module:
    """timm's `name` with the number of classes and image channels that the weights have, and further arguments."""
    sizes: dict[str, Any] = {}
    for argument, layer, axis in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        weight = state.get(_weight_of(cfg, layer))
        if isinstance(weight, Tensor) and weight.ndim > axis:
            sizes[argument] = weight.shape[axis]
    return timm.create_model(name, **(sizes | kwargs))


def convert(source: str | Path, target: str | Path, model: str, **kwargs: Any) -> LoadReport:
    """Write the authors' checkpoint `source` as a timm folder that `timm.create_model("local-dir:FOLDER")` loads.

    target: a folder, for FOLDER/model.safetensors, or the path of a .safetensors file; config.json is written beside.
    model: the timm name. kwargs: further arguments of the model, kept in config.json.
    Raises what `load_published` raises, and ValueError for a target that is neither, or a folder that holds another
    model; then nothing is written.
    """
    target = Path(target)
    if target.suffix not in ("", ".safetensors"):
        raise ValueError(f"target must be a folder or a .safetensors file, got {str(target)!r}")
    weights = target if target.suffix else target / "model.safetensors"
    config = weights.parent / "config.json"
    others = [p.name for p in weights.parent.glob("*.safetensors") if p != weights]
    if others or (config.exists() and not weights.exists()):
        found = ", ".join(others) or "config.json"
        raise ValueError(f"target folder {str(weights.parent)!r} holds another model ({found}): give an empty one")
    if not timm.is_model(model):
        raise ValueError(f"model {model!r} is not a timm model")
    state = checkpoint_state(source)
    cfg = timm.models.get_pretrained_cfg(model)
    net = timm.create_model(model, **kwargs) if kwargs else build_for(model, state, cfg.to_dict() if cfg else {})
    fitted, report = fit_state(checkpoint_state(source, net), net, f"checkpoint {Path(source).name!r}")
    net.load_state_dict(fitted, strict=False)
    weights.parent.mkdir(parents=True, exist_ok=True)
    arguments = {**kwargs, "num_classes": net.num_classes}
    if hasattr(net, "in_chans"):
        arguments["in_chans"] = net.in_chans
    save_file({name: value.contiguous().clone() for name, value in net.state_dict().items()}, weights)
    save_config_for_hf(net, str(config), model_args=arguments)
    return report
