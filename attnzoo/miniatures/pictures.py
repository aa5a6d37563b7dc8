"""The synthetic world's single objects as labelled pictures, for the trainer of `attnzoo.backbones.training`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from attnzoo.errors import check_choice, check_range
from attnzoo.miniatures import training, world

if TYPE_CHECKING:
    from attnzoo.backbones.training import ClassificationData

#: The stream of random numbers of these pictures; classifiers.py uses 10 to 12.
_PURPOSE = 20


class WorldPictures:
    """Scenes of one object each, picture i a function of (split, seed, i): classes in turn, drawn when asked for.

    Items are (PIL image of size x size pixels, label 0 to 23). difficulty: see `world`.
    """

    def __init__(self, split: str, count: int, size: int = 48, difficulty: str = "mixed", seed: int = 0) -> None:
        check_choice("split", split, training.SPLITS)
        check_choice("difficulty", difficulty, world.DIFFICULTIES)
        check_range("count", count, 1)
        check_range("size", size, 24)
        self.split, self.count, self.size, self.difficulty, self.seed = split, count, size, difficulty, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        label = index % len(world.CLASSES)
        rng = training.generator(self.split, self.seed, _PURPOSE + index * 100)
        scene = world.sample_scene(rng, "single", self.size, self.difficulty, label)
        return Image.fromarray(scene.image), label


def world_data(
    train: int = 12000, validation: int = 1200, size: int = 48, difficulty: str = "mixed", seed: int = 0
) -> ClassificationData:
    """`train` and `validation` pictures of the world's 24 classes, in equal numbers; the two share no scene.

    Raises ValueError for an unknown difficulty and sizes below 24.
    """
    from attnzoo.backbones.training import ClassificationData

    parts = [WorldPictures(split, n, size, difficulty, seed) for split, n in (("train", train), ("test", validation))]
    mark = f"world-{train}-{validation}-{size}-{difficulty}-{seed}"
    return ClassificationData("miniature", parts[0], parts[1], world.CLASSES, mark)
