"""The rendered data set: an endless, seeded sequence of signs with text and images of shapes, each with a question and its exact answer.

`render_example(seed, index, config)` is a pure function of its arguments. An example is a plain dict:

    image    uint8 [H, W, 3]
    columns  int32 [Y, X]      content of each 8-px token cell: 0 nothing, 1..26 a letter, 27.. a quarter of a shape of one colour
    caption, question, answer  str
    kind     "sign" | "shapes"
    targets  {"text": ["HELLO"], "background": "red"} or {"shapes": [{"shape", "colour", "count"}], "background": "white"}
    id       "train-0-17-32x64": split, seed, index and size, which identify the example
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from xomni_jax.core.config import ConfigError, check_known
from xomni_jax.data import glyphs, words
from xomni_jax.data.sources import ENDLESS, DataSection

PATCH = 8
LARGEST = 256  # pixels of a side that a model may have which learns from this set
COLOURS = {
    "red": (205, 35, 40),
    "green": (40, 150, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 210, 50),
    "purple": (130, 45, 165),
    "orange": (245, 130, 30),
    "cyan": (50, 200, 220),
    "pink": (245, 130, 195),
}
SIGN_GROUNDS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPE_GROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (12, 12, 12)}
NUMBERS = ("zero", "one", "two", "three", "four")
N_COLUMN_CLASSES = 1 + len(glyphs.LETTERS) + len(glyphs.SHAPES) * len(COLOURS) * 4

SIGN_CAPTIONS = ('{a} {c} sign that says "{t}"', '"{t}" on {a} {c} sign', 'a sign in {c} with the text "{t}"')
SHAPE_CAPTIONS = ("{n} {c} {s} on {g}", "{n} {c} {s} on a {g} background")
QUESTIONS = (
    "what does the sign say?",
    "what colour is the sign?",
    "how many shapes are there?",
    "which shape is it?",
    "which shapes are they?",
    "what colour is it?",
    "what colour are they?",
    "what colour is the background?",
)
_FIRST_TEMPLATE = 0.8  # share of the first caption template, which users are most likely to type
_GAP = 2  # px between shapes; 1 px to the edge

Example = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class RenderedConfig:
    """Distribution of the rendered examples.

    Attributes:
      split: train or heldout, whose words and combinations of shapes are in no training example; it has no made-up words
      sizes: (height, width) of the images in pixels, multiples of 8
      weights: how often each size is drawn
      text_lengths: fewest and most characters of a sign, for each size
      shapes: share of images with shapes instead of a sign
      shape_sizes: sizes that images of shapes may have
      pseudo_words: share of made-up words
      other_faces: share of signs that are not in the main typeface
      centred: share of signs in the vertical middle
      on_grid: share of images whose shapes are aligned to the token grid
    """

    split: words.Split = "train"
    sizes: tuple[Size, ...] = ((32, 64), (32, 128))
    weights: tuple[float, ...] = (0.6, 0.4)
    text_lengths: tuple[tuple[int, int], ...] = ((3, 8), (12, 16))
    shapes: float = 0.25
    shape_sizes: tuple[Size, ...] = ((32, 64),)
    pseudo_words: float = 0.3
    other_faces: float = 0.1
    centred: float = 0.5
    on_grid: float = 0.5

    def __post_init__(self):
        check_known(self, split=words.SPLITS)
        # A configuration file gives lists; tuples keep the config hashable.
        for name in ("sizes", "text_lengths", "shape_sizes"):
            object.__setattr__(self, name, tuple(tuple(int(v) for v in pair) for pair in getattr(self, name)))
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if not self.sizes or not len(self.sizes) == len(self.weights) == len(self.text_lengths):
            raise ValueError(
                f"sizes, weights and text_lengths hold {len(self.sizes)}, {len(self.weights)} and {len(self.text_lengths)}"
                " entries; give one of each per size."
            )
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"weights={self.weights} must be non-negative and not all 0.")
        for size, (low, high) in zip(self.sizes, self.text_lengths, strict=True):
            _check_size(size)
            fits = size[1] // PATCH * (size[0] // glyphs.CELL_Y)
            if not 2 <= low <= high <= fits:
                raise ValueError(f"text_lengths {(low, high)} of size {size[0]}x{size[1]} must lie within 2 and {fits} characters.")
        for name in ("shapes", "pseudo_words", "other_faces", "centred", "on_grid"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share; give a number from 0 to 1.")
        if self.shapes and not set(self.shape_sizes) & set(self.sizes):
            raise ValueError(f"shapes={self.shapes} but none of shape_sizes={self.shape_sizes} is among sizes={self.sizes}; add one.")
        for size in self.shape_sizes:
            if min(size) < 32:
                raise ValueError(f"shape_sizes holds {size[0]}x{size[1]}; four shapes need at least 32 px on each side.")


class RenderedSource:
    """The rendered set as a source: endless; a batch has images of one size, drawn by weight."""

    Options: ClassVar[type] = RenderedConfig

    def __init__(self, options: RenderedConfig, seed: int, batch_size: int):
        height, width = max(options.sizes, key=max)
        if max(height, width) > LARGEST:
            raise ConfigError(
                f"config.data.source=rendered: a model of {height}x{width} pixels should learn from real images; name them with "
                "config.data.source and config.data.path, or set config.data.source=rehearsal to try out the run on rendered signs"
            )
        self.options, self.seed, self.batch_size = options, seed, batch_size

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        size = draw_size(self.seed, index // self.batch_size, self.options)
        return render_example(self.seed, index, self.options, size) | {"size": size}


@dataclass(frozen=True)
class RehearsalConfig:
    """Signs of three to six letters, in images of the sizes that real ones have.

    Attributes:
      sizes: (height, width) of the images in pixels, multiples of 8; each is drawn equally often
    """

    sizes: tuple[Size, ...] = ((1152, 1152),)

    @property
    def signs(self) -> RenderedConfig:
        """The distribution of the signs."""
        n = len(self.sizes)
        return RenderedConfig(sizes=self.sizes, weights=(1.0,) * n, text_lengths=((3, 6),) * n, shapes=0.0)


class RehearsalSource(RenderedSource):
    """Signs in place of real images, to try out the run of a large model; without labels of token cells, whose size models differ in."""

    Options: ClassVar[type] = RehearsalConfig

    def __init__(self, options: RehearsalConfig, seed: int, batch_size: int):
        self.options, self.seed, self.batch_size = options.signs, seed, batch_size

    def __getitem__(self, index: int) -> Example:
        return {name: value for name, value in super().__getitem__(index).items() if name != "columns"}


def draw_size(seed: int, index: int, config: RenderedConfig) -> Size:
    """The image size of one example or one batch, by weight."""
    chances = np.cumsum(config.weights) / np.sum(config.weights)
    return config.sizes[int(np.searchsorted(chances, np.random.default_rng([seed, index, 1]).random(), side="right"))]


def render_example(seed: int, index: int, config: RenderedConfig, size: Size | None = None) -> Example:
    """Example number `index` of the sequence of `seed`. `size` (height, width) is drawn by weight if None."""
    size = draw_size(seed, index, config) if size is None else tuple(size)
    rng = np.random.default_rng([seed, index, 2 + words.SPLITS.index(config.split)])
    shapes = size in config.shape_sizes and rng.random() < config.shapes
    example = (_shapes_example if shapes else _sign_example)(rng, size, config)
    return example | {"id": f"{config.split}-{seed}-{index}-{size[0]}x{size[1]}"}


def render_sign(
    text: str, background: str, size: Size, face: str = glyphs.FACES[0], row: int | None = None, brightness: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Text on a coloured ground -> image uint8 [H, W, 3], columns int32 [Y, X].

    Letters stand on the 8-px grid, two token rows high, each line centred; `row` is the token row of the first line (None: the
    middle). Text wider than the image breaks at spaces. It must fit, and consist of A to Z and spaces.
    """
    height, width = size
    lines = wrap(text, width // PATCH)
    row = (height // PATCH - 2 * len(lines)) // 2 if row is None else row
    mask = np.zeros(size, np.float32)
    columns = np.zeros((height // PATCH, width // PATCH), np.int32)
    for i, line in enumerate(lines):
        y, x = row + 2 * i, (width // PATCH - len(line)) // 2
        ink = np.concatenate([glyphs.letter(face, c) for c in line], axis=1)
        mask[y * PATCH : y * PATCH + glyphs.CELL_Y, x * PATCH : x * PATCH + ink.shape[1]] = ink
        columns[y : y + 2, x : x + len(line)] = [letter_class(c) for c in line]

    ground = np.clip(np.array(COLOURS[background], np.float32) * brightness, 0, 255)
    light = ground @ np.array([0.299, 0.587, 0.114], np.float32) < 140
    return _blend(ground, mask, np.full(3, 255 if light else 0, np.float32)), columns


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken at spaces; no word may be longer."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return lines


def letter_class(char: str) -> int:
    """Label of a letter in `columns`; a space is 0."""
    return glyphs.LETTERS.index(char) + 1 if char != " " else 0


def shape_class(shape: str, colour: str) -> int:
    """Label of the upper left quarter of a shape in `columns`; upper right, lower left and lower right follow."""
    return 1 + len(glyphs.LETTERS) + 4 * (glyphs.SHAPES.index(shape) * len(COLOURS) + list(COLOURS).index(colour))


def sign_prompt(text: str, background: str, template: int = 0) -> str:
    """The caption of a sign."""
    return SIGN_CAPTIONS[template].format(t=text, c=background, a="an" if background == "orange" else "a")


def shapes_prompt(shape: str, colour: str, count: int, background: str, template: int = 0) -> str:
    """The caption of an image of shapes."""
    return SHAPE_CAPTIONS[template].format(n=NUMBERS[count], c=colour, s=shape + "s" * (count > 1), g=background)


def _sign_example(rng: np.random.Generator, size: Size, config: RenderedConfig) -> Example:
    text = _sign_text(rng, size, config)
    background = _pick(rng, SIGN_GROUNDS)
    face = _pick(rng, glyphs.FACES[1:]) if rng.random() < config.other_faces else glyphs.FACES[0]
    free = size[0] // PATCH - 2 * len(wrap(text, size[1] // PATCH))
    row = None if rng.random() < config.centred else int(rng.integers(free + 1))
    image, columns = render_sign(text, background, size, face, row, brightness=rng.uniform(0.9, 1.05))
    question, answer = _pick(rng, ((QUESTIONS[0], text), (QUESTIONS[1], background)), first=0.7)
    return {
        "image": image,
        "columns": columns,
        "caption": sign_prompt(text, background, _template(rng, SIGN_CAPTIONS)),
        "question": question,
        "answer": answer,
        "kind": "sign",
        "targets": {"text": [text], "background": background},
    }


def _sign_text(rng: np.random.Generator, size: Size, config: RenderedConfig) -> str:
    low, high = config.text_lengths[config.sizes.index(size)]
    pseudo = config.pseudo_words if config.split == "train" else 0.0
    for _ in range(200):
        text = words.phrase(rng, config.split, int(rng.integers(low, high + 1)), pseudo)
        # Breaking at spaces may need more lines than the number of characters alone.
        columns, rows = size[1] // PATCH, size[0] // glyphs.CELL_Y
        if max(map(len, text.split(" "))) <= columns and len(wrap(text, columns)) <= rows:
            return text
    raise ValueError(f"No text of {low} to {high} characters fits {size[0]}x{size[1]} in 200 draws; lower text_lengths of that size.")


def _shapes_example(rng: np.random.Generator, size: Size, config: RenderedConfig) -> Example:
    shape, colour, count = _pick(rng, shape_combinations(config.split))
    background = _pick(rng, tuple(SHAPE_GROUNDS))
    # Quarters apart: a label that all cells of a shape share would not tell the decoder which part of it stands where.
    quarters = np.zeros((4, *size), np.float32)
    for y, x, side in _places(rng, size, count, rng.random() < config.on_grid):
        drawn, half = glyphs.shape(shape, side), side // 2
        for q, (rows, cols) in enumerate(itertools.product((slice(half), slice(half, None)), repeat=2)):
            quarters[q, y : y + side, x : x + side][rows, cols] = drawn[rows, cols]
    mask = quarters.sum(0)
    scale = rng.uniform(0.93, 1.04)
    image = _blend(np.array(SHAPE_GROUNDS[background], np.float32), mask, np.clip(np.array(COLOURS[colour], np.float32) * scale, 0, 255))
    cover = quarters.reshape(4, size[0] // PATCH, PATCH, size[1] // PATCH, PATCH).mean((2, 4))
    many = count > 1
    answers = (
        (QUESTIONS[2], NUMBERS[count]),
        (QUESTIONS[3 + many], shape + "s" * many),
        (QUESTIONS[5 + many], colour),
        (QUESTIONS[7], background),
    )
    question, answer = _pick(rng, answers)
    return {
        "image": image,
        "columns": np.where(cover.sum(0) >= 0.1, shape_class(shape, colour) + cover.argmax(0), 0).astype(np.int32),
        "caption": shapes_prompt(shape, colour, count, background, _template(rng, SHAPE_CAPTIONS)),
        "question": question,
        "answer": answer,
        "kind": "shapes",
        "targets": {"shapes": [{"shape": shape, "colour": colour, "count": count}], "background": background},
    }


@functools.cache
def shape_combinations(split: words.Split) -> tuple[tuple[str, str, int], ...]:
    """The (shape, colour, count) of one split."""
    every = ((s, c, n) for s in glyphs.SHAPES for c in COLOURS for n in range(1, 5))
    return tuple(t for t in every if words.is_heldout_shape(*t) == (split == "heldout"))


def _places(rng: np.random.Generator, size: Size, count: int, on_grid: bool) -> list[tuple[int, int, int]]:
    """(y, x, side) of shapes that do not touch one another or the edge."""
    height, width = size
    if not on_grid:
        for _ in range(8):
            found: list[tuple[int, int, int]] = []
            for _ in range(40):
                side = int(rng.integers(12, 17))
                y, x = int(rng.integers(1, height - side)), int(rng.integers(1, width - side))
                if all(y >= v + s + _GAP or v >= y + side + _GAP or x >= u + s + _GAP or u >= x + side + _GAP for v, u, s in found):
                    found.append((y, x, side))
                    if len(found) == count:
                        return found
    # One per 2x2-token slot; 14 of 16 px keep the gap. Also used when free placement finds no room.
    rows, cols = height // 16, width // 16
    slots = rng.permutation(rows * cols)[:count]
    return [(int(s) // cols * 16 + 1, int(s) % cols * 16 + 1, 14) for s in slots]


def _blend(ground: np.ndarray, mask: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Ground colour [3] and ink colour [3] mixed by coverage [H, W] -> uint8 [H, W, 3]."""
    return (ground + mask[..., None] * (ink - ground) + 0.5).astype(np.uint8)


def _template(rng: np.random.Generator, templates: Sequence[str]) -> int:
    return 0 if rng.random() < _FIRST_TEMPLATE else int(rng.integers(1, len(templates)))


def _pick(rng: np.random.Generator, options: Sequence, first: float | None = None):
    """One option, uniformly; with `first`, the first one with that probability and else one of the others."""
    if first is not None:
        return options[0] if rng.random() < first else options[int(rng.integers(1, len(options)))]
    return options[int(rng.integers(len(options)))]


def _check_size(size: Size) -> None:
    if len(size) != 2 or any(s < 16 or s % PATCH for s in size):
        raise ValueError(f"size {'x'.join(map(str, size))} must be height x width, multiples of {PATCH} and at least 16 px.")


# What the training stages learn from when a configuration names nothing else: short and long signs in the main typeface, and some shapes.
SIGNS = DataSection(
    "rendered",
    RenderedConfig(weights=(0.7, 0.3), text_lengths=((3, 6), (12, 16)), shapes=0.2, other_faces=0.0, centred=1.0, on_grid=1.0),
)
