"""Labelled pictures from a folder or the Hugging Face hub, and how a run walks through them.

    train/<class>/*.jpg and val/<class>/*.jpg      folder_data("DIR")
    <class>/*.jpg                                  folder_data("DIR", split=0.1)
    a dataset on the hub                           hub_data("ORG/NAME")

Anything else with a length and (PIL image, label) items goes into a `ClassificationData` as well.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from attnzoo.backbones.training import rng
from attnzoo.errors import ReachError, check_range

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "validation", "valid")


class Pictures(Protocol):
    """A sequence of (PIL image, label), label an int from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class ClassificationData:
    """What to train on and measure with.

    source: where it is from, in words. train: None where there is only something to measure with. classes: the names of
    labels 0, 1, ... fingerprint: changes when the pictures or their labels do; a run is continued only on the same.
    """

    source: str
    train: Pictures | None
    validation: Pictures
    classes: tuple[str, ...]
    fingerprint: str

    def limited(self, train: int | None = None, validation: int | None = None, seed: int = 0) -> ClassificationData:
        """At most this many pictures of each, drawn at random by `seed`; unchanged where None."""
        parts: dict[str, Any] = {}
        for part, count in (("train", train), ("validation", validation)):
            pictures = getattr(self, part)
            if count is None or pictures is None or count >= len(pictures):
                continue
            check_range(f"{part} images", count, 1)
            generator = torch.Generator().manual_seed(rng.derive(seed, rng.SPLIT, len(part)))
            parts[part] = _Subset(pictures, torch.randperm(len(pictures), generator=generator)[:count].tolist())
        if not parts:
            return self
        return replace(self, **parts, fingerprint=_digest([self.fingerprint, train, validation, seed]))


class _Subset:
    def __init__(self, pictures: Pictures, indices: Sequence[int]) -> None:
        self.pictures, self.indices = pictures, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pictures[self.indices[index]]


class _Files:
    """Picture files, opened when asked for."""

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return _decode(path, f"image {path!r}"), label


class _Hub:
    """timm's reader of a hub dataset."""

    def __init__(self, reader: Any, name: str) -> None:
        self.reader, self.name = reader, name

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        source, label = self.reader[index]
        return _decode(source, f"image {index} of {self.name}"), int(label)


def _decode(source: Any, what: str) -> Image.Image:
    try:
        with Image.open(source) as opened:
            opened.load()
            return opened.copy()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a broken PNG is a SyntaxError
        raise ValueError(f"{what} can't be read as a picture: {error}") from error


def folder_data(
    root: str | Path,
    split: float | None = None,
    train: bool = True,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> ClassificationData:
    """Pictures in folders named after their classes, sorted as timm sorts them ("2" before "10").

    Args:
        root: holds train/ and val/ (or validation/), each with a folder a class; or, with `split`, the classes' folders
            themselves. Without training, val/ is taken where there is one, else root itself.
        split: the share of each class to validate with, drawn by `seed`; at least one picture a class.
        train: whether training pictures are wanted.
        classes: the model's class names, in order (`inference.class_names`). Folders are matched to them by name where
            all are among them, and by order where none is and there are as many.

    Files without a picture's ending are left out; a file that has one and is no picture is an error when it is read,
    which names it.
    Raises ReachError for a folder that isn't there or holds no pictures, ValueError for one of another form, a class
    folder without pictures, and where the two halves or the model have other classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise ReachError(f"data {str(root)!r} is not a folder")
    train_root, val_root = _named(root, TRAIN_NAMES), _named(root, VALIDATION_NAMES)
    if split is not None:
        check_range("split", split, 0.0, 1.0)
        if train_root and val_root:
            raise ValueError(f"split={split} goes with one folder of classes; {str(root)!r} has train and val already")
        return _split(train_root or root, split, train, classes, seed)
    if not train:
        samples, names = _scan(val_root or root, classes)
        return ClassificationData(str(root), None, _Files(samples), names, _fingerprint(root, samples))
    if not (train_root and val_root):
        raise ValueError(
            f"data {str(root)!r} must hold the folders train and val, each with a folder per class; "
            "or give a split (such as 0.1) to hold part of one folder back"
        )
    kept, names = _scan(train_root, classes)
    held, _ = _scan(val_root, names, f"{train_root.name}/")
    return ClassificationData(str(root), _Files(kept), _Files(held), names, _fingerprint(root, kept + held))


def _named(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _scan(
    root: Path, classes: Sequence[str] | None, of: str = "the model"
) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    folders = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    samples, found = find_images_and_targets(str(root))
    found.pop("", None)  # pictures beside the folders have no class
    if not found:
        raise ReachError(f"data folder {str(root)!r} holds no pictures in folders of their classes")
    if empty := sorted(set(folders) - {Path(path).relative_to(root).parts[0] for path, _ in samples}):
        raise ValueError(f"data folder {str(root)!r} has classes without pictures: {', '.join(empty[:5])}")
    names, labels = tuple(found), {name: label for label, name in enumerate(found)}
    if classes is not None:
        labels = _labels(names, classes, str(root), of)
        names = tuple(classes)
    pairs = [(path, Path(path).parent.name) for path, _ in samples if Path(path).parent != root]
    return [(path, labels[name]) for path, name in pairs], names


def _labels(found: Sequence[str], wanted: Sequence[str], where: str, of: str) -> dict[str, int]:
    """The label of each folder: by name where all are among `wanted`; a model's classes also by order where there are
    as many. ValueError else, with counts and strangers."""
    if set(found) <= set(wanted):
        order = {name: label for label, name in enumerate(wanted)}
        return {name: order[name] for name in found}
    if len(found) == len(wanted) and of == "the model" and not set(found) & set(wanted):
        return {name: label for label, name in enumerate(found)}
    strangers = [name for name in found if name not in set(wanted)]
    raise ValueError(
        f"classes don't match: {where!r} has {len(found)}, {of} has {len(wanted)}; "
        f"{len(strangers)} of them are in the data only: {', '.join(strangers[:3])}"
    )


def _split(root: Path, share: float, train: bool, classes: Sequence[str] | None, seed: int) -> ClassificationData:
    samples, names = _scan(root, classes)
    generator = torch.Generator().manual_seed(rng.derive(seed, rng.SPLIT))
    kept: list[tuple[str, int]] = []
    held: list[tuple[str, int]] = []
    for label, name in enumerate(names):
        own = [sample for sample in samples if sample[1] == label]
        if not own:
            continue
        if len(own) < 2:
            raise ValueError(f"split needs at least two pictures a class, class {name!r} has {len(own)}")
        count = min(max(1, round(share * len(own))), len(own) - 1)
        chosen = set(torch.randperm(len(own), generator=generator)[:count].tolist())
        for i, sample in enumerate(own):
            (held if i in chosen else kept).append(sample)
    source = f"{root}, {share:g} of it held out"
    mark = _fingerprint(root, kept) + _fingerprint(root, held)
    return ClassificationData(source, _Files(kept) if train else None, _Files(held), names, mark)


def hub_data(
    name: str, train_split: str = "train", val_split: str = "validation", train: bool = True
) -> ClassificationData:
    """A dataset of the Hugging Face hub with columns image and label, by timm's reader.

    Raises ReachError where the package datasets is not installed or the hub can't be reached, ValueError for a dataset
    without class names.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ReachError(f"data 'hf:{name}' needs the package datasets: pip install datasets")
    readers = []
    for split in (train_split, val_split) if train else (val_split,):
        try:
            readers.append(create_dataset(f"hfds/{name}", split=split).reader)
        except Exception as error:  # the hub's client, the network and the dataset's builder have no common base
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ReachError(f"data 'hf:{name}' (split {split!r}) can't be reached: {line[:200]}") from error
    names = tuple(readers[0].class_to_idx)
    if not names:
        raise ValueError(f"data 'hf:{name}' has no class names: its label column must be a ClassLabel")
    sets = [_Hub(reader, name) for reader in readers]
    mark = _digest([name, train_split, val_split, names, *map(len, sets)])
    return ClassificationData(f"hf:{name}", sets[0] if train else None, sets[-1], names, mark)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _fingerprint(root: Path, samples: Sequence[tuple[str, int]]) -> str:
    return _digest([f"{Path(path).relative_to(root)} {label}" for path, label in samples])


# ------------------------------------------------------------------------------------------------------ into batches


@dataclass(frozen=True)
class Unreadable:
    """A picture that could not be read, on its way out of a worker (an exception would lose its text there)."""

    why: str


class Transformed(Dataset):
    """Pictures as tensors. Keys are indices, or (epoch, index): then what the transform draws depends on these and
    `seed` only, in whichever process it runs."""

    def __init__(
        self, pictures: Pictures, transform: Callable[[Image.Image], Tensor], mode: str, seed: int = 0
    ) -> None:
        self.pictures, self.transform, self.mode, self.seed = pictures, transform, mode, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int] | Unreadable:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        try:
            picture, label = self.pictures[index]
        except ValueError as error:
            return Unreadable(str(error))
        with rng.isolated(self.seed, rng.IMAGE, epoch, index):
            return self.transform(picture.convert(self.mode)), label


def collate(samples: list[Any]) -> Any:
    """A batch, or the first `Unreadable` in it."""
    return next((s for s in samples if isinstance(s, Unreadable)), None) or default_collate(samples)


def checked(batch: Any) -> tuple[Tensor, Tensor]:
    """The batch; ValueError for one with an unreadable picture, naming it."""
    if isinstance(batch, Unreadable):
        raise ValueError(batch.why)
    return batch


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The keys of one process's batches, from any step of any epoch on.

    A step's global batch is the next chunks x batch_size entries of the epoch's order. It is cut so that each chunk
    holds pictures and their mirror images in it: `timm.data.Mixup` mixes entry i with entry -1 - i, so the pairs are
    the same however many chunks there are. Pictures that fill no global batch wait for the next epoch's order.

    Raises ValueError where the pictures don't fill one global batch.
    """

    def __init__(self, count: int, batch_size: int, accumulate: int, rank: int, processes: int, seed: int) -> None:
        self.count, self.batch_size, self.accumulate = count, batch_size, accumulate
        self.rank, self.processes, self.seed = rank, processes, seed
        self.global_batch = batch_size * accumulate * processes
        self.steps = count // self.global_batch
        self.epoch = self.first = 0
        if not self.steps:
            raise ValueError(
                f"{count} training pictures don't fill one global batch of {self.global_batch} "
                f"(batch_size {batch_size} x {processes} processes x grad_accum {accumulate})"
            )

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def chunk(self, micro: int) -> int:
        """Which of the global batch's chunks the `micro`-th backward pass of this process takes."""
        return micro * self.processes + self.rank

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(rng.derive(self.seed, rng.ORDER, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        size, half = self.global_batch, self.batch_size // 2
        for step in range(self.first, self.steps):
            batch = order[step * size : (step + 1) * size]
            for micro in range(self.accumulate):
                chunk = self.chunk(micro)
                if self.batch_size % 2:
                    own = batch[chunk * self.batch_size : (chunk + 1) * self.batch_size]
                else:
                    own = (
                        batch[chunk * half : (chunk + 1) * half]
                        + batch[size - (chunk + 1) * half : size - chunk * half]
                    )
                yield [(self.epoch, index) for index in own]
