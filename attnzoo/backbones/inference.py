"""Classify pictures with any timm model: the function behind `attnzoo classify`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn

from attnzoo.backbones.weights import build_for, checkpoint_state, fit_state
from attnzoo.errors import ReachError, check_range

Picture = str | Path | Image.Image


def classify(
    images: Picture | Sequence[Picture],
    model: str | None = None,
    checkpoint: str | Path | None = None,
    hub: str | None = None,
    topk: int = 5,
) -> list[list[tuple[str | int, float]]]:
    """The `topk` most probable classes of each picture, best first.

    Args:
        images: a file, a PIL image, or a sequence of them; resized and normalised as the model's config says.
        model, checkpoint, hub: see `load_model`.
        topk: how many classes, at most the model's.

    Returns, per picture, (label, probability) pairs. The label is the model's own where its config has label names, the
    ImageNet description where the number of classes is that of an ImageNet set, else the class index.
    Raises what `load_model` raises; ReachError for a picture that is not there, ValueError for what Pillow can't read.
    """
    check_range("topk", topk, low=1)
    pictures = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    if not pictures:
        raise ValueError("images must hold at least one picture, got none")
    opened = [_open(picture) for picture in pictures]
    net = load_model(model, checkpoint, hub)
    labels = _labels(net)
    probabilities = [net(preprocess(net, picture)[None]).softmax(-1)[0] for picture in opened]
    results = []
    for row in probabilities:
        best = row.topk(min(topk, len(row)))
        results.append([(labels[i] if labels else i, p) for p, i in zip(best.values.tolist(), best.indices.tolist())])
    return results


def load_model(model: str | None = None, checkpoint: str | Path | None = None, hub: str | None = None) -> nn.Module:
    """A timm model in eval mode, without gradients, with weights from one of four places.

    Args:
        model: the timm name, such as "dinat_tiny". May be left out with `hub` and with a folder as `checkpoint`; where
            it is given too, it must be what they hold.
        checkpoint: a .safetensors or torch file with the weights of `model`, or a folder with timm's config.json and
            weights. Number of classes and image channels are read from the weights. torch files are read with
            weights_only=True, so that they can't run code.
        hub: a Hugging Face model id with timm weights.
            With neither: the published weights, downloaded by timm.

    Raises ValueError for a name that timm does not know (with close matches), for two sources at once or none, and for
    weights that do not fit (with the first mismatches); ReachError for a file or hub that can't be reached.
    """
    if checkpoint is not None and hub is not None:
        raise ValueError("give checkpoint or hub, not both")
    if model is not None and not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=4, cutoff=0.5)
        raise ValueError(f"model {model!r} is not a timm model" + (f"; close: {', '.join(close)}" if close else ""))
    if hub is not None:
        net = _from_source(f"hf-hub:{hub}", f"model {hub!r} on the hub", model)
    elif checkpoint is not None:
        path = Path(checkpoint)
        if not path.exists():
            raise ReachError(f"checkpoint {str(path)!r} does not exist")
        if path.is_dir():
            net = _from_source(f"local-dir:{path}", f"model folder {str(path)!r}", model)
        elif model is None:
            raise ValueError(f"model must be named for a checkpoint file ({path.name}): its weights do not say it")
        else:
            net = _from_file(model, path)
    elif model is None:
        raise ValueError("give a model name, a checkpoint folder or a hub id")
    else:
        net = _published(model)
    return net.eval().requires_grad_(False)


def preprocess(net: nn.Module, picture: Image.Image) -> Tensor:
    """The picture as the model's config wants it: [in_chans, H, W], resized, centre-cropped, normalised."""
    config = data_config(net)
    transform: Any = create_transform(**config, is_training=False)
    return transform(picture.convert("L" if config["input_size"][0] == 1 else "RGB"))


def data_config(net: nn.Module, **overrides: Any) -> dict[str, Any]:
    """timm's input config of a model of 1 or 3 channels, with means and deviations for each; overrides that are None
    are left out (img_size, crop_pct, interpolation, mean, std)."""
    given = {key: value for key, value in overrides.items() if value is not None}
    config = resolve_data_config({"in_chans": getattr(net, "in_chans", None), **given}, model=net)
    channels = getattr(net, "in_chans", config["input_size"][0])
    config["input_size"] = (channels, *config["input_size"][1:])
    if channels not in (1, 3):
        raise ValueError(f"model takes {channels} channels; pictures can be given to models of 1 or 3")
    for key in ("mean", "std"):
        values = config[key]
        if len(values) != channels:
            config[key] = (sum(values) / len(values),) * channels
    return config


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    try:
        with Image.open(picture) as opened:
            opened.load()
            return opened.copy()
    except UnidentifiedImageError as error:
        raise ValueError(f"image {str(picture)!r} is not a picture that Pillow can read") from error
    except OSError as error:
        raise ReachError(f"image {str(picture)!r} can't be read: {error.strerror or error}") from error


def _published(model: str) -> nn.Module:
    cfg = _config(model)
    if not any(cfg.get(source) for source in ("url", "file", "hf_hub_id")):
        raise ValueError(f"model {model!r} has no published weights that timm could load: give checkpoint or hub")
    try:
        return timm.create_model(model, pretrained=True)
    except Exception as error:
        if _is_reach(error):
            raise ReachError(
                f"the published weights of {model!r} can't be reached ({_sentence(error)}): give checkpoint, a file "
                "that you downloaded"
            ) from error
        raise


def _config(model: str) -> dict[str, Any]:
    """timm's pretrained config of a name, empty where it has none; ValueError for a tag that does not exist."""
    try:
        cfg = timm.models.get_pretrained_cfg(model)
    except RuntimeError as error:
        raise ValueError(f"model {model!r}: {_sentence(error)}") from error
    return {} if cfg is None else cfg.to_dict()


def _from_source(name: str, what: str, model: str | None) -> nn.Module:
    try:
        net = timm.create_model(name, pretrained=True)
    except Exception as error:
        if _is_reach(error):
            raise ReachError(f"{what} can't be reached: {_sentence(error)}") from error
        if isinstance(error, (RuntimeError, KeyError, ValueError)):
            raise ValueError(f"{what} can't be loaded: {_sentence(error)}") from error
        raise
    architecture = getattr(net, "pretrained_cfg", {}).get("architecture")
    if model is not None and architecture != model.split(".")[0]:
        raise ValueError(f"{what} holds {architecture!r}, not model={model!r}")
    return net


def _from_file(model: str, path: Path) -> nn.Module:
    net = build_for(model, checkpoint_state(path), _config(model))
    fitted, _ = fit_state(checkpoint_state(path, net), net, f"checkpoint {path.name!r}")
    net.load_state_dict(fitted, strict=False)
    return net


def class_names(net: nn.Module) -> list[str] | None:
    """The names of a classifier's outputs as folders are named: its config's, or ImageNet's synsets by their number."""
    names = getattr(net, "pretrained_cfg", {}).get("label_names")
    if names and len(names) == getattr(net, "num_classes", None):
        return list(names)
    subset = infer_imagenet_subset(net)
    return list(ImageNetInfo(subset).label_names()) if subset else None


def _labels(net: nn.Module) -> list[str] | None:
    cfg: dict[str, Any] = getattr(net, "pretrained_cfg", {})
    names, descriptions = cfg.get("label_names"), cfg.get("label_descriptions") or {}
    count = getattr(net, "num_classes", None)
    if names and len(names) == count:
        return [str(descriptions.get(name, name)) for name in names]
    subset = infer_imagenet_subset(net)
    return list(ImageNetInfo(subset).label_descriptions()) if subset else None


def _is_reach(error: BaseException) -> bool:
    """A failure of the network or of a file, as the hub's client, httpx and urllib say it (no common base class)."""
    if isinstance(error, (OSError, ValueError)):
        return isinstance(error, OSError)
    return any(cls.__module__.split(".")[0] in ("huggingface_hub", "httpx", "requests") for cls in type(error).__mro__)


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) < 200 else text[:200] + " ..."
