"""A look at the examples of a source: images beside what their codes keep of them, captions, lengths, sizes, repeated images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xomni_jax.core.config import ConfigError
from xomni_jax.core.tables import aligned
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.data.sources import ENDLESS, DataSection, Example
from xomni_jax.evaluation.pages import image_data, write_page
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.batches import batches_by_shape
from xomni_jax.sampling.decoder import DECODER_COMPONENTS
from xomni_jax.sequence.tokenizer import TINY_TOKENIZER, MultimodalTokenizer

NEAR = 4  # of 64 bits in which the hashes of repeated images may differ, after another compression or scaling
NEAR_COLOUR = 12  # levels of 255 in which their mean colours may differ; the hashes of plain images are all alike
BARS = 12  # of the histogram of lengths


@dataclass
class Look:
    """What was found.

    Attributes:
      keys: numbers of the examples that were read. lengths: tokens of their captions. sizes: of their images, or of the codes.
      shown: the first of the examples. rejected: {number: reason}.
      hashes, colours: perceptual hash and mean colour of each image.
    """

    total: int
    keys: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    shown: list[Example] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)
    hashes: list[np.uint64] = field(default_factory=list)
    colours: list[np.ndarray] = field(default_factory=list)

    def repeated(self) -> list[tuple[int, list[int]]]:
        """(number of an example, those of later ones with the same image) as positions in `keys`."""
        hashes, colours, taken, groups = np.array(self.hashes), np.array(self.colours), set[int](), []
        for i in range(len(hashes)):
            if i not in taken:
                near = np.bitwise_count(hashes[i + 1 :] ^ hashes[i]) <= NEAR
                near &= np.abs(colours[i + 1 :] - colours[i]).max(-1) <= NEAR_COLOUR
                if same := [i + 1 + int(n) for n in np.flatnonzero(near) if i + 1 + n not in taken]:
                    groups.append((i, same))
                    taken.update(same)
        return groups


def look(data: DataSection, seed: int, model: XOmni | None, show: int, read: int) -> Look:
    """Reads the first `read` examples of a source; tokens are those of the model. ConfigError when no example can be used."""
    text = MultimodalTokenizer.load(model.folder("tokenizer") if model else TINY_TOKENIZER)
    records = data.epoch(seed)
    found = Look(len(records))
    for key in range(min(read, len(records))):
        try:
            example = records[key]
            if not {"image", "codes"} & example.keys():
                raise ValueError("it has no image")
        except (ValueError, OSError) as error:
            found.rejected[key] = str(error)
            continue
        example.setdefault("caption", example.get("question", ""))  # a conversation need not have a caption
        found.keys.append(key)
        found.captions.append(example["caption"])
        found.lengths.append(len(text.encode_text(example["caption"])))
        kind = "image" if "image" in example else "codes"
        found.sizes.append(f"{example[kind].shape[0]}x{example[kind].shape[1]} {'pixels' if kind == 'image' else kind}")
        if "image" in example:
            found.hashes.append(difference_hash(example["image"]))
            found.colours.append(example["image"].mean((0, 1)))
        if len(found.shown) < show:
            found.shown.append(example)
    if not found.keys:
        reason = next(iter(found.rejected.values()))
        raise ConfigError(f"config.data: none of the first {len(found.rejected)} records can be used; the first: {reason}")
    return found


def difference_hash(image: np.ndarray) -> np.uint64:
    """64 bits of an image [H, W, 3]: whether each of 8 x 8 cells is darker than the one to its right."""
    grey = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).view(">u8")[0].astype(np.uint64)


def reconstructions(model: XOmni | None, examples: Sequence[Example]) -> list[Image.Image | None]:
    """What the decoder makes of the codes of each example; None without a tokenizer or a decoder."""
    have = model.description["components"] if model else ()
    if model is None or not {"siglip_vq", *DECODER_COMPONENTS} <= set(have):
        return [None] * len(examples)
    codes = [e["codes"] if "codes" in e else None for e in examples]
    images = [n for n, code in enumerate(codes) if code is None]
    for n, code in zip(images, model.encode_ragged([to_pixels(examples[n]["image"]) for n in images])):
        codes[n] = code
    out: list[Image.Image | None] = [None] * len(examples)
    for batch in batches_by_shape([code.shape for code in codes], 8):
        decoded = model.decode([codes[n] for n in batch.items], [examples[n]["caption"] for n in batch.items])
        for n, image in zip(batch.items, decoded):
            out[n] = image
    return out


def tables(found: Look) -> dict[str, list[Sequence[str]]]:
    """{title: rows} for the terminal and for the page."""
    edges = np.unique(np.linspace(min(found.lengths), max(found.lengths) + 1, BARS + 1).astype(int))
    counts, _ = np.histogram(found.lengths, edges)
    spans = (f"{a} to {b - 1}" if b - a > 1 else str(a) for a, b in zip(edges, edges[1:]))
    out: dict[str, list[Sequence[str]]] = {
        "Tokens of a caption": [("tokens", "examples", "")]
        + [(span, str(n), ("#" * round(40 * n / counts.max())).ljust(40)) for span, n in zip(spans, counts) if n]
    }
    out["Sizes"] = [("height x width", "examples"), *((size, str(n)) for size, n in Counter(found.sizes).most_common())]
    if groups := found.repeated():
        named = lambda i: f"{found.keys[i]}: {found.captions[i][:60]}"  # noqa: E731
        out["Repeated images"] = [("first", "again"), *((named(i), "; ".join(map(named, same[:3]))) for i, same in groups)]
    if found.rejected:
        out["Cannot be used"] = [("reason", "record"), *((reason, str(key)) for key, reason in found.rejected.items())]
    return out


def summary(found: Look) -> str:
    """One line: how many examples were read, and what is wrong with them."""
    again = sum(len(same) for _, same in found.repeated())
    of = f" of {found.total}" if found.total < ENDLESS else ""
    told = f"{len(found.keys) + len(found.rejected)}{of} examples read: {len(found.rejected)} cannot be used, {again} repeat an image"
    return f"{told}; captions have {min(found.lengths)} to {max(found.lengths)} tokens, {np.median(found.lengths):g} in the middle"


def as_text(found: Look) -> str:
    """The findings for a terminal."""
    return "\n\n".join([summary(found), *(f"{title}\n{aligned(rows[:25])}" for title, rows in tables(found).items())])


def write_html(path: str | Path, title: str, found: Look, model: XOmni | None) -> Path:
    """Writes the page, which needs no other file."""
    cards: list[Mapping[str, Any]] = []
    for number, (example, made) in enumerate(zip(found.shown, reconstructions(model, found.shown))):
        pair = [("image", Image.fromarray(example["image"]))] if "image" in example else []
        pair += [("from its codes", made)] if made else []
        more = {k: v for k, v in example.items() if k not in ("image", "codes", "caption", "columns", "id")}
        cards.append(
            {
                "id": str(example.get("id", found.keys[number])),
                "caption": example["caption"],
                "tokens": found.lengths[number],
                "images": [(name, image_data(image)) for name, image in pair],
                "more": [(name, str(value)) for name, value in more.items()],
            }
        )
    return write_page(path, "data.html", title=title, lead=summary(found), cards=cards, tables=tables(found))
