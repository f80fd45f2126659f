"""Colours and shapes: contours on flat images are compared with targets["background"] and targets["shapes"]."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from xomni_jax.data.rendered import COLOURS, SHAPE_GROUNDS
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.scorer import Scorer, need
from xomni_jax.rewards.services.crop import background_colour, ink_mask

PALETTE: dict[str, tuple[int, int, int]] = {**COLOURS, **SHAPE_GROUNDS}
SHAPES = ("circle", "square", "triangle", "star")
_NAMES = tuple(PALETTE)
_TABLE = np.array([PALETTE[name] for name in _NAMES], np.float32)
_INK = ("white", "black", "grey")  # letters and their anti-aliased edges
_MIN_BACKGROUND = 0.25  # share of the pixels that counts as background at least, however much ink there is
_SCALE = 4  # enlargement: unenlarged contours of 12-pixel shapes are too coarse to tell a circle from a square
_MIN_AREA = 20  # pixels; smaller components are specks


class DrawnShape(NamedTuple):
    """One object seen in an image."""

    shape: str
    colour: str


class ShapesScorer(Scorer):
    """Mean of the checks that the targets "background" and "shapes" ask for; each is in [0, 1], and 1 when right.

    background              share of background pixels whose nearest palette colour is the wanted one
    count                   1 - |found - wanted| / larger of the two
    shape, colour, object   shapes, colours, (shape, colour) pairs in common / larger of the two counts

    Does not apply to items without these targets. Detail: background (its nearest palette colour), colour_exact, checks; with shapes
    also found and exact (all objects right).
    """

    name = "shapes"
    scale = "share of what the item asks for that is there, 0 to 1"
    range = (0.0, 1.0)
    version = "contours-1"

    def __init__(self) -> None:
        super().__init__()
        self._cv2 = need("cv2", self.name)
        self._cv2.setNumThreads(1)

    def score_image(self, image: np.ndarray, item: Item) -> Score:
        """See Scorer. ValueError when a target names a colour or shape that does not exist here."""
        background, shapes = item["targets"].get("background"), item["targets"].get("shapes")
        if not background and not shapes:
            return Score(None)
        seen = str(nearest_names(background_colour(image)))
        checks: dict[str, float] = {}
        detail: dict[str, Any] = {"background": seen}
        if background:
            _known(background, PALETTE, "colour")
            checks["background"] = background_share(image, background)
            detail["colour_exact"] = seen == background
        if shapes:
            wanted = _wanted(shapes)
            found = Counter(self.find(image))
            checks |= compare(found, wanted)
            detail |= {"found": [f"{f.colour} {f.shape}" for f in found.elements()], "exact": found == wanted}
        return Score(sum(checks.values()) / len(checks), None, detail | {"checks": checks})

    def find(self, image: np.ndarray) -> list[DrawnShape]:
        """Objects in an image, uint8 [Y, X, 3]."""
        return [found for found, _ in self.locate(image)]

    def locate(self, image: np.ndarray) -> list[tuple[DrawnShape, tuple[float, float, float, float]]]:
        """Objects with their boxes (left, top, right, bottom) in pixels."""
        cv2 = self._cv2
        large = cv2.resize(image, None, fx=_SCALE, fy=_SCALE, interpolation=cv2.INTER_CUBIC)
        ink = ink_mask(large).astype(np.uint8)
        contours, _ = cv2.findContours(ink, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        found = []
        for contour in contours:
            area = cv2.contourArea(contour)
            if area < _MIN_AREA * _SCALE**2:
                continue
            inside = np.zeros_like(ink)
            cv2.drawContours(inside, [contour], -1, 1, -1)
            core = cv2.erode(inside, np.ones((_SCALE + 1, _SCALE + 1), np.uint8))  # away from the anti-aliased edge
            pixels = large[(core if core.any() else inside).astype(bool)]
            left, top, width, height = (v / _SCALE for v in cv2.boundingRect(contour))
            kind = DrawnShape(self._shape(contour, area), str(nearest_names(np.median(pixels, axis=0))))
            found.append((kind, (left, top, left + width, top + height)))
        return found

    def _shape(self, contour: np.ndarray, area: float) -> str:
        """By solidity (a star is hollow between its points) and by how much of the enclosing circle is filled."""
        if area / max(self._cv2.contourArea(self._cv2.convexHull(contour)), 1.0) < 0.82:
            return "star"
        _, radius = self._cv2.minEnclosingCircle(contour)
        fill = area / (np.pi * radius**2)
        return "circle" if fill > 0.8 else "triangle" if fill < 0.52 else "square"


def nearest_names(pixels: np.ndarray) -> np.ndarray:
    """Name of the palette colour nearest to each pixel (Euclidean in RGB). [..., 3] of 0..255 -> [...] of str."""
    distance = ((np.asarray(pixels, np.float32)[..., None, :] - _TABLE) ** 2).sum(-1)
    return np.array(_NAMES)[distance.argmin(-1)]


def background_share(image: np.ndarray, wanted: str) -> float:
    """Share of the background whose nearest palette colour is `wanted`, in [0, 1]; a dense score, since every pixel counts.

    Background is everything that is neither ink nor next to ink, where colours mix. Pixels of the wanted colour are never ink. The
    divisor is at least a quarter of the image, so that hiding a wrong background under ink does not pay.
    """
    names = nearest_names(image)
    right = names == wanted
    beside = _grow(np.isin(names, _INK) & ink_mask(image)) if wanted not in _INK else _grow(ink_mask(image) & ~right)
    background = ~beside
    return float((right & background).sum() / max(background.sum(), _MIN_BACKGROUND * background.size))


def compare(found: Counter[DrawnShape], wanted: Counter[DrawnShape]) -> dict[str, float]:
    """The checks count, shape, colour and object of the found objects."""
    most = max(found.total(), wanted.total(), 1)

    def shared(key: Any) -> float:
        a, b = (Counter(key(f) for f in c.elements()) for c in (found, wanted))
        return (a & b).total() / most

    return {
        "count": 1 - abs(found.total() - wanted.total()) / most,
        "shape": shared(lambda f: f.shape),
        "colour": shared(lambda f: f.colour),
        "object": shared(lambda f: f),
    }


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _wanted(shapes: Any) -> Counter[DrawnShape]:
    wanted: Counter[DrawnShape] = Counter()
    if not isinstance(shapes, list) or not all(isinstance(s, dict) for s in shapes):
        raise ValueError("targets['shapes'] must be a list of maps with shape, colour and count")
    for s in shapes:
        count = s.get("count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 64:
            raise ValueError(f"targets['shapes'] wants count {count!r}; give 1 to 64")
        wanted[DrawnShape(_known(s.get("shape"), SHAPES, "shape"), _known(s.get("colour"), PALETTE, "colour"))] += count
    return wanted


def _known(name: Any, names: Any, kind: str) -> str:
    if name not in tuple(names):
        raise ValueError(f"{kind} {name!r} is not known here; choose one of {', '.join(names)}")
    return name
