"""The synthetic world that every miniature is trained on and measured in: numpy and Pillow only, seeded.

Twenty-four nouns are drawn as glyphs, one per (shape, colour): 6 shapes x 4 colours. Nouns live in 8 groups of 3 that
occur together ("kitchen": cup, plate, spoon); the members of a group share neither shape nor colour, so no visual cue
links them, only co-occurrence. Groups are drawn with Zipf frequencies (the r-th has weight 1/r). Backgrounds are a
random colour with a sinusoidal texture and Gaussian noise; a glyph is blended onto it with a *contrast* (the blending
weight, 1 = opaque). In a scene of several objects each stays in its cell of a 3 x 3 grid, so they don't overlap.

Kinds of scene:

=========  =============================================================================================================
single     one object of any of the 24 classes, anywhere in the image, 0.30 to 0.85 of the image's side across
prior      the complete trio of one group with probability 0.95 (else two of it) and 0 to 2 intruders, each from a
           different other group: what a language model learns its expectations from
broken     exactly two of a trio and 1 or 2 intruders: the third member ("bait") is absent
intact     a complete trio and 0 or 1 intruder
balanced   2 to 5 objects drawn independently: no expectation to learn
=========  =============================================================================================================

Difficulty: ``plain`` (contrast 0.85 to 1, noise 6), ``mixed`` (contrast 0.3 to 1 for each object, noise 4 to 20 and
texture 4 to 18 for each scene, in grey levels of 255) and ``hard`` (contrast 0.3 to 0.5, noise 14 to 20).

Everything is a function of the generator handed in: ``sample_scene(np.random.default_rng(7))`` is the same scene on
every machine with the same numpy and Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {"red": (225, 60, 50), "blue": (60, 120, 230), "green": (70, 190, 80), "yellow": (235, 200, 60)}

#: Class index 0..23 -> its name: ``CLASSES[6 * colour + shape]``.
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

#: Group -> its three nouns, most frequent group first.
GROUPS = {
    "kitchen": ("cup", "plate", "spoon"),
    "street": ("car", "bus", "sign"),
    "parlour": ("sofa", "lamp", "rug"),
    "park": ("tree", "bench", "bird"),
    "office": ("desk", "screen", "mouse"),
    "harbour": ("boat", "wave", "gull"),
    "bedroom": ("bed", "pillow", "clock"),
    "pitch": ("ball", "goal", "player"),
}
NOUNS = tuple(noun for trio in GROUPS.values() for noun in trio)
GROUP_OF = {noun: group for group, trio in GROUPS.items() for noun in trio}
GROUP_PROBABILITIES = np.array([1 / rank for rank in range(1, len(GROUPS) + 1)]) / sum(
    1 / rank for rank in range(1, len(GROUPS) + 1)
)

#: How often the group of a prior scene is complete.
COMPLETE = 0.95

KINDS = ("single", "prior", "broken", "intact", "balanced")
DIFFICULTIES = ("plain", "mixed", "hard")
RELATIONS = ("left of", "above")

_GRID = 3  # cells per side
_SUPERSAMPLE = 4  # glyphs are drawn this much larger and averaged down, so that edges are smooth


def _glyph(noun: str) -> tuple[str, str]:
    """(colour, shape) of a noun: group g, member m -> shape m + 3 (g mod 2), colour (g // 2 + m) mod 4.

    That uses each of the 24 pairs once, and no two members of a group share a shape or a colour.
    """
    group, member = divmod(NOUNS.index(noun), 3)
    return tuple(COLOURS)[(group // 2 + member) % len(COLOURS)], SHAPES[member + 3 * (group % 2)]


#: Noun -> class index, and back.
CLASS_OF = {noun: CLASSES.index(" ".join(_glyph(noun))) for noun in NOUNS}
NOUN_OF = {label: noun for noun, label in CLASS_OF.items()}


@dataclass(frozen=True)
class Object:
    """One glyph of a scene.

    ``box`` is (x0, y0, x1, y1) in pixels, half open, tight around the object's mask; ``cell`` is the (row, column) of
    the 3 x 3 grid that holds its centre; ``size`` its nominal width in pixels; ``contrast`` its blending weight.
    """

    noun: str
    shape: str
    colour: str
    box: tuple[int, int, int, int]
    cell: tuple[int, int]
    size: float
    contrast: float

    @property
    def label(self) -> int:
        """Class index, 0..23: ``CLASSES[label]`` is "red circle" and the like."""
        return CLASS_OF[self.noun]


@dataclass(frozen=True)
class Scene:
    """An image and everything that is known about it.

    ``image`` uint8 [S, S, 3]; ``objects`` in the order they were drawn; ``group`` the group that the scene is about
    (None for single, placed and balanced ones); ``masks`` bool [len(objects), S, S], the pixels that each object covers
    by half or more.
    """

    image: np.ndarray
    objects: tuple[Object, ...]
    group: str | None
    masks: np.ndarray = field(repr=False)

    @property
    def nouns(self) -> tuple[str, ...]:
        """Nouns that are there, as drawn."""
        return tuple(o.noun for o in self.objects)

    @property
    def bait(self) -> tuple[str, ...]:
        """Nouns of the scene's own group that are *not* there."""
        return tuple(n for n in GROUPS[self.group] if n not in self.nouns) if self.group else ()

    @property
    def co_occurring_absent(self) -> tuple[str, ...]:
        """Nouns that are not there although a member of their group is; the bait first."""
        here = {GROUP_OF[n] for n in self.nouns} - {self.group}
        return self.bait + tuple(n for n in NOUNS if GROUP_OF[n] in here and n not in self.nouns)


@dataclass(frozen=True)
class Question:
    """A yes/no question. ``kind``: "present" (the answer is yes), "random" or "co-occurring" (absent: no)."""

    noun: str
    answer: bool
    kind: str

    @property
    def text(self) -> str:
        return f"Is there a {self.noun}?"


# ------------------------------------------------------------------------------------------------------------- drawing


@lru_cache(maxsize=4096)
def _coverage(shape: str, radius: float, dx: float, dy: float) -> np.ndarray:
    """Anti-aliased coverage [side, side] in 0..1 of a glyph centred at (side / 2 + dx, side / 2 + dy) of a patch."""
    k = _SUPERSAMPLE
    side = 2 * int(np.ceil(radius + 1))
    canvas = Image.new("L", (side * k, side * k))
    pen = ImageDraw.Draw(canvas)
    r = radius * k
    x, y = (side / 2 + dx) * k, (side / 2 + dy) * k
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=255)
    elif shape == "square":
        pen.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=255)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x - r, y), (x, y + r), (x + r, y)], fill=255)
    elif shape == "cross":
        arm = 0.36 * r
        pen.rectangle([x - arm, y - r, x + arm, y + r], fill=255)
        pen.rectangle([x - r, y - arm, x + r, y + arm], fill=255)
    else:
        pen.ellipse([x - r, y - r, x + r, y + r], outline=255, width=max(1, round(0.42 * r)))
    return np.asarray(canvas, np.float32).reshape(side, k, side, k).mean((1, 3)) / 255


def _background(rng: np.random.Generator, size: int, noise: float, texture: float) -> np.ndarray:
    """float32 [S, S, 3]: a flat colour, a plane wave that differs between channels in strength, Gaussian noise."""
    base = rng.uniform(60, 150, 3)
    axis = np.arange(size, dtype=np.float32) / size
    fx, fy, phase = rng.uniform(1, 5), rng.uniform(1, 5), rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * (fx * axis[None, :] + fy * axis[:, None]) + phase)
    tint = rng.uniform(0.6, 1.0, 3)
    grain = rng.standard_normal((size, size, 3), dtype=np.float32)
    return (base + texture * wave[..., None] * tint + noise * grain).astype(np.float32)


def _conditions(rng: np.random.Generator, difficulty: str) -> tuple[float, float, tuple[float, float]]:
    """(noise, texture, contrast range) of one scene."""
    if difficulty == "plain":
        return 6.0, 8.0, (0.85, 1.0)
    if difficulty == "mixed":
        return rng.uniform(4, 20), rng.uniform(4, 18), (0.3, 1.0)
    return rng.uniform(14, 20), rng.uniform(10, 18), (0.3, 0.5)


def _compose(
    rng: np.random.Generator,
    size: int,
    difficulty: str,
    group: str | None,
    placed: Sequence[tuple[str, float, float, float]],
) -> Scene:
    """Draw the glyphs `placed` ((noun, centre x, centre y, radius) in pixels) on a fresh background."""
    noise, texture, contrasts = _conditions(rng, difficulty)
    canvas = _background(rng, size, noise, texture)
    objects, masks = [], np.zeros((len(placed), size, size), bool)
    for i, (noun, x, y, radius) in enumerate(placed):
        colour, shape = _glyph(noun)
        contrast = float(rng.uniform(*contrasts))
        x, y, radius = (
            round(4 * x) / 4,
            round(4 * y) / 4,
            round(8 * radius) / 8,
        )  # few distinct patches: the cache serves
        cx, cy = int(x), int(y)
        patch = _coverage(shape, radius, x - cx, y - cy)
        half = patch.shape[0] // 2
        top, left = cy - half, cx - half
        rows, cols = slice(max(0, top), min(size, cy + half)), slice(max(0, left), min(size, cx + half))
        cover = patch[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
        weight = contrast * cover[..., None]
        canvas[rows, cols] = canvas[rows, cols] * (1 - weight) + weight * np.array(COLOURS[colour], np.float32)
        masks[i, rows, cols] = cover >= min(0.5, cover.max())  # a thin ring may cover no pixel by half
        ys, xs = np.nonzero(masks[i])
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        cell = (min(_GRID - 1, int(_GRID * y / size)), min(_GRID - 1, int(_GRID * x / size)))
        objects.append(Object(noun, shape, colour, box, cell, 2 * radius, contrast))
    return Scene(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), tuple(objects), group, masks)


# -------------------------------------------------------------------------------------------------------------- scenes


def _choose(rng: np.random.Generator, items: Sequence[str], n: int) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))[:n]]


def _cast(rng: np.random.Generator, kind: str) -> tuple[str | None, list[str]]:
    """(group, nouns) of a scene with several objects."""
    if kind == "balanced":
        return None, _choose(rng, NOUNS, int(rng.integers(2, 6)))
    group = tuple(GROUPS)[rng.choice(len(GROUPS), p=GROUP_PROBABILITIES)]
    trio = _choose(rng, GROUPS[group], 3)
    if kind == "prior":
        intruders = int(rng.integers(0, 3))
        trio = trio if rng.random() < COMPLETE else trio[:2]
    elif kind == "intact":
        intruders = int(rng.integers(0, 2))
    else:
        intruders = int(rng.integers(1, 3))
        trio = trio[:2]
    others = _choose(rng, [g for g in GROUPS if g != group], intruders)
    return group, trio + [GROUPS[g][rng.integers(3)] for g in others]


def sample_nouns(rng: np.random.Generator, kind: str = "prior") -> list[str]:
    """The nouns of one scene of `kind`, without drawing it (a language model's text needs no picture)."""
    _check_choice("kind", kind, KINDS[1:])
    return _cast(rng, kind)[1]


def sample_scene(
    rng: np.random.Generator, kind: str = "single", size: int = 48, difficulty: str = "mixed", label: int | None = None
) -> Scene:
    """One scene; the module's docstring says what each `kind` and `difficulty` is.

    size: the image's side in pixels, 24 or more (the miniatures use 32 and 48).
    label: for ``single``, the class wanted (0..23); drawn uniformly if None.
    Raises ValueError for an unknown kind or difficulty, a size below 24 or a label out of range.
    """
    _check_choice("kind", kind, KINDS)
    _check_choice("difficulty", difficulty, DIFFICULTIES)
    _check_size(size)
    if label is not None and (kind != "single" or label not in NOUN_OF):
        raise ValueError(
            f"label must be from 0 to {len(CLASSES) - 1} and goes with kind='single', got {label!r} with kind={kind!r}"
        )
    if kind == "single":
        noun = NOUN_OF[int(rng.integers(len(CLASSES))) if label is None else label]
        radius = size * rng.uniform(0.15, 0.425)
        x, y = rng.uniform(radius, size - radius, 2)
        return _compose(rng, size, difficulty, None, [(noun, x, y, radius)])
    group, nouns = _cast(rng, kind)
    cell = size / _GRID
    placed = []
    for noun, index in zip(nouns, rng.permutation(_GRID * _GRID)):
        radius = cell * rng.uniform(0.30, 0.46)
        row, col = divmod(int(index), _GRID)
        dx, dy = rng.uniform(-1, 1, 2) * (cell / 2 - radius)
        placed.append((noun, (col + 0.5) * cell + dx, (row + 0.5) * cell + dy, radius))
    return _compose(rng, size, difficulty, group, placed)


def placed_scene(
    rng: np.random.Generator,
    size: int = 32,
    num_objects: int = 1,
    difficulty: str = "plain",
    prompt: str | None = None,
) -> tuple[Scene, str]:
    """A scene of one or two large objects and the prompt that names them: what the generator miniature learns.

    One object: "a red circle", near the middle, 0.5 to 0.75 of the side across. Two: "a red circle left of a blue
    square" or "a red circle above a blue square", of different classes, 0.34 to 0.46 of the side across.
    prompt: draws a scene that this prompt describes (`num_objects` is then ignored); drawn at random if None.
    Raises ValueError for `num_objects` other than 1 and 2, an unknown difficulty, a size below 24, or a prompt of
    another form.
    """
    _check_choice("difficulty", difficulty, DIFFICULTIES)
    _check_choice("num_objects", num_objects, (1, 2))
    _check_size(size)
    if prompt is None:
        labels = rng.permutation(len(CLASSES))[:num_objects].tolist()
        relation = RELATIONS[rng.integers(len(RELATIONS))] if num_objects == 2 else None
        prompt = write_prompt(labels, relation)
    else:
        labels, relation = read_prompt(prompt)
    jitter = rng.uniform(-1, 1, (len(labels), 2))
    if len(labels) == 1:
        radius = size * rng.uniform(0.25, 0.375)
        x, y = size / 2 + jitter[0] * min(size / 2 - radius, size / 10)
        return _compose(rng, size, difficulty, None, [(NOUN_OF[labels[0]], x, y, radius)]), prompt
    placed = []
    for i, label in enumerate(labels):
        radius = size * rng.uniform(0.17, 0.23)
        along = size * (0.25 + 0.5 * i) + jitter[i, 0] * (size / 4 - radius)
        across = size / 2 + jitter[i, 1] * size / 8
        x, y = (along, across) if relation == "left of" else (across, along)
        placed.append((NOUN_OF[label], x, y, radius))
    return _compose(rng, size, difficulty, None, placed), prompt


# ---------------------------------------------------------------------------------------------------------------- text


def write_prompt(labels: Sequence[int], relation: str | None = None) -> str:
    """One label: "a red circle"; two and a `relation` ("left of", "above"): "a red circle left of a blue square"."""
    names = [f"a {CLASSES[label]}" for label in labels]
    if (len(names), relation is None) not in ((1, True), (2, False)):
        raise ValueError(f"labels must be one, or two with a relation, got {len(names)} with relation={relation!r}")
    if relation is None:
        return names[0]
    _check_choice("relation", relation, RELATIONS)
    return f"{names[0]} {relation} {names[1]}"


def read_prompt(prompt: str) -> tuple[list[int], str | None]:
    """The inverse of `write_prompt`: (labels, relation). Raises ValueError for a prompt of another form."""
    text = " ".join(prompt.lower().split())
    relation = next((r for r in RELATIONS if f" {r} " in text), None)
    parts = text.split(f" {relation} ") if relation else [text]
    labels = [CLASSES.index(p[2:]) for p in parts if p.startswith("a ") and p[2:] in CLASSES]
    if len(labels) != len(parts) or len(parts) > 2:
        forms = "'a COLOUR SHAPE' or 'a COLOUR SHAPE left of|above a COLOUR SHAPE'"
        raise ValueError(
            f"prompt must be {forms} with colours {', '.join(COLOURS)} and shapes {', '.join(SHAPES)}, got {prompt!r}"
        )
    return labels, relation


def write_caption(nouns: Sequence[str]) -> str:
    """The caption that names these nouns in this order: "a photo of a cup, a plate and a bus."."""
    if not nouns:
        raise ValueError("nouns must hold at least one noun, got none")
    names = [f"a {noun}" for noun in nouns]
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"a photo of {listed}."


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that names every object once: what is easier to see tends to come first, in no fixed order."""
    visible = np.array([o.contrast * o.size for o in scene.objects]) * rng.uniform(0.7, 1.4, len(scene.objects))
    return write_caption([scene.objects[i].noun for i in np.argsort(-visible)])


def named_nouns(text: str) -> list[str]:
    """The nouns of this world that `text` names, each once, in order of first mention."""
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    return list(dict.fromkeys(w for w in words if w in GROUP_OF))


def questions(
    scene: Scene, rng: np.random.Generator, n: int, absent: Sequence[str] = ("random", "co-occurring")
) -> list[Question]:
    """`n` questions, half of them (rounded up) about something that is there, shuffled.

    The others take the kinds in `absent` in turn: "random", any absent noun none of whose group is there;
    "co-occurring", an absent noun of the scene's own group (the bait) where there is one, else of the group of another
    object that is there; "any", any absent noun. Where a scene has no noun of a kind, any absent one stands in. Nothing
    is asked twice as long as the scene has enough nouns to ask about.
    Raises ValueError for an unknown kind in `absent`.
    """
    for kind in absent:
        _check_choice("absent", kind, ("random", "co-occurring", "any"))
    here = {GROUP_OF[noun] for noun in scene.nouns}
    unseen = [noun for noun in NOUNS if noun not in scene.nouns]
    pools = {
        "random": [noun for noun in unseen if GROUP_OF[noun] not in here],
        "co-occurring": list(scene.bait or scene.co_occurring_absent),
        "any": unseen,
    }
    present = _choose(rng, scene.nouns, len(scene.nouns))
    asked: list[Question] = []
    for i in range(n):
        if i % 2 == 0:
            asked.append(Question(present[i // 2 % len(present)], True, "present"))
            continue
        pool = pools[absent[i // 2 % len(absent)]] or unseen
        fresh = [noun for noun in pool if all(q.noun != noun for q in asked)] or pool
        noun = fresh[rng.integers(len(fresh))]
        asked.append(Question(noun, False, "co-occurring" if GROUP_OF[noun] in here else "random"))
    return [asked[i] for i in rng.permutation(n)]


def patch_labels(scene: Scene, patch_size: int = 8) -> np.ndarray:
    """int64 [S / patch_size, S / patch_size]: the class that covers over 0.15 of a patch; else 24, background."""
    size = scene.image.shape[0]
    if patch_size < 1 or size % patch_size:
        raise ValueError(f"patch_size must divide the image's side {size}, got {patch_size}")
    n = size // patch_size
    cover = scene.masks.reshape(-1, n, patch_size, n, patch_size).mean((2, 4))
    labels = np.array([o.label for o in scene.objects])[cover.argmax(0)]
    return np.where(cover.max(0) > 0.15, labels, len(CLASSES)).astype(np.int64)


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    # errors.check_choice says the same; this module stays importable without torch, which errors.py needs.
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_size(size: int) -> None:
    if not isinstance(size, (int, np.integer)) or size < 24:
        raise ValueError(f"size must be a whole number of at least 24 pixels, got {size!r}")
