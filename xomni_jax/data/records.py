"""Records: what the columns of a row mean, whatever the format of its file. One function, `make_record`, and the tables of names beside it.

A column that is null, or an empty list, counts as absent: writers fill what a row lacks with it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xomni_jax.core.config import Positive
from xomni_jax.data.conversations import Conversation, counted, of_llava, of_messages, of_questions
from xomni_jax.data.tables import FaultyRecord, is_local, path_of

CAPTION_COLUMNS = (
    "text", "txt", "caption", "captions", "prompt", "instruction", "edit_prompt", "edited_prompt_list", "prompt_en", "prompt_zh",
    "captions/text",
)  # fmt: skip
IMAGE_COLUMNS = (
    "file_name", "image", "image_path", "img_path", "path", "images", "file_names", "file_path", "real_image", "image1", "image/encoded",
)  # fmt: skip
INPUT_COLUMNS = ("input", "input_image", "input_images", "src_img", "original_image", "source_image")
OUTPUT_COLUMNS = ("output", "output_image", "edited_img", "edited_image", "target_image")
ID_COLUMNS = (
    "id", "__key__", "key", "sample_id", "item_id", "omni_edit_id", "prompt_id", "promptid", "image_id", "image/id", "index",
)  # fmt: skip
CONVERSATIONS: dict[str, Callable[[Any, Any], Conversation]] = {
    "conversations": of_llava,
    "messages": of_messages,
    "texts": of_questions,
    "prompt": of_messages,  # where it is a list
}
TEXT_REWARDS = ("ocr", "paddle_ocr", "got_ocr", "tesseract")  # that read the text of an image: a prompt that names one must quote it
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm")
_CELLS = ("targets", "rewards", "weight", "size")  # which tables leave empty in the rows that lack them
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
_X2I_MARK = re.compile(r"<img><\|image_(\d+)\|></img>")
_DATA_URI = re.compile(r"data:[\w/+.-]*;base64,")

Image = bytes | Path


@dataclass(frozen=True)
class Columns:
    """Which columns count, where the tables of usual names do not say it.

    Attributes:
      image: column of the image or its path, a.b inside nested ones; empty - the first usual name
      caption: column of the caption or prompt, likewise; of several, separated by commas, the first that a record has
      images: folder that holds the images, to which paths are relative unless they are absolute; empty - the one that holds the file
      split: split of a data set of TensorFlow Datasets; empty - train, or the only one; files of other kinds are named by the path
      imageless: texts and conversations without an image are records, too; pretrain and sft learn from them
      text_targets: every text in double quotes, straight or curly, is a target that the image must show; a prompt without any is faulty
      rewards: (name, weight) pairs of the rewards that judge what names none itself, such as (("ocr", 1.0), ("shapes", 0.5)); other rewards
        are neither asked nor counted for it; empty: all of config.rewards
    """

    image: str = ""
    caption: str = ""
    images: str = ""
    split: str = ""
    imageless: bool = False
    text_targets: bool = False
    rewards: tuple[tuple[str, Positive], ...] = ()


@dataclass(frozen=True)
class Record:
    """One record of a source.

    Attributes:
      key: name of the source's part and number of the record in it; nothing else is unique.
      where: its place, for messages.
      texts: captions, wordings of an instruction, or the prompt.
      images: encoded bytes, or the path of a file under the root; in the order in which marks show them.
      roles: of the images, where they differ: "input" or "output", or what the file calls them.
      turns: (user | assistant | plain, text with a mark `<image N>` where image N is shown), see `conversations`.
      system: the instruction above the turns.
      targets: what rewards look for: {"text": [...], "objects": [...], ...}.
      rewards: weights of the rewards that judge it; empty: those of the configuration.
      weight: how often it is drawn, relative to others.
      size: (height, width) in pixels to draw, where the record says it.
      metadata: the other columns.
      id: what the file calls the record; it may repeat.
      notes: what was amended or left out, in words.
    """

    key: str
    where: str
    texts: tuple[str, ...] = ()
    images: tuple[Image, ...] = ()
    roles: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    system: str = ""
    targets: Mapping[str, Any] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    weight: float = 1.0
    size: tuple[int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    notes: tuple[str, ...] = ()


class _Row:
    """The columns of a row that are present, of which those that are taken become part of a record, the others its metadata."""

    def __init__(self, columns: Mapping[str, Any], root: Path, absolute: bool):
        self.columns = {
            name: value
            for name, value in columns.items()
            if not (value is None or isinstance(value, list) and not value or isinstance(value, str) and not value and name in _CELLS)
        }
        self.given, self.root, self.absolute = columns, root, absolute
        self.notes: list[str] = []
        self.metadata: dict[str, Any] = {}

    def take(self, *names: str) -> Any:
        """The value of the first of these columns that is present, None where none is; a.b looks inside a nested object."""
        for name in names:
            if name in self.columns:
                return self.columns.pop(name)
            if "." in name and (value := _nested(self.columns, name)) is not None:
                return value
        return None

    def object(self, name: str, kind: type, called: str) -> Any:
        """The value of a column, empty where it is absent; text is read as JSON, for tables without nested columns."""
        value = _from_json(self.take(name))
        if value is not None and not isinstance(value, kind):
            raise FaultyRecord(f"the column {name!r} is no {called}")
        return kind() if value is None else value


def quoted_texts(prompt: str) -> list[str]:
    """The texts in double quotes, straight or curly: what an image of the prompt must show."""
    return [text for text in ((a or b).strip() for a, b in _QUOTED.findall(prompt)) if text]


def make_record(
    columns: Mapping[str, Any],
    key: str,
    where: str,
    root: Path,
    how: Columns,
    *,
    prompt: bool = False,
    rewards: Mapping[str, float] = MappingProxyType({}),
) -> Record:
    """The record of a row. Files of images are not opened.

    Args:
      root: the folder to which paths are relative, unless `how` names another.
      prompt: whether it is to be drawn: it needs a text alone. Otherwise it needs an image with a text, or a conversation.
      rewards: weights of its rewards, where the row has none of its own; those of `how` where this is empty, too.

    Raises:
      FaultyRecord: it lacks something, or a column holds what cannot be used; the message begins with `where`.
    """
    columns = _webvid(columns) if "videoid" in columns else columns
    row = _Row(columns, path_of(how.images) if how.images else root, bool(how.images))
    try:
        return _record(row, key, where, how, prompt, rewards)
    except FaultyRecord as fault:
        raise FaultyRecord(f"{where}: {fault}") from None


def _record(row: _Row, key: str, where: str, how: Columns, prompt: bool, rewards: Mapping[str, float]) -> Record:
    marked = row.columns.get("input_images") is not None
    images = _images(row, how)
    shown, roles = [image for image, _ in images], [role for _, role in images]
    talk = _conversation(row, shown)
    texts = [talk.turns[0][1]] if talk and prompt else _texts(row, how, needed=talk is None)
    if talk is not None:
        shown, roles = talk.images, talk.roles
    elif marked:
        texts, shown = _numbered(texts, shown, roles)
    targets, rewards = row.object("targets", dict, "object"), _rewards(row.take("rewards")) or rewards or dict(how.rewards)
    if (how.text_targets or set(TEXT_REWARDS) & set(rewards)) and "text" not in targets:
        targets = targets | {"text": quoted_texts(" ".join(texts[:1]))}
        if not targets["text"]:
            raise FaultyRecord("no text in double quotes that the image is to show")
    if not prompt and talk is None and not shown and not how.imageless:
        raise FaultyRecord(_lacks(row, "image", how.image, IMAGE_COLUMNS) + " (config.data.imageless=True: learn from the text)")
    if not prompt and talk is not None and not any(role == "assistant" for role, _ in talk.turns):
        raise FaultyRecord("no answer of an assistant to learn from")
    weight, size, id = row.take("weight"), row.take("size"), row.take(*ID_COLUMNS)
    metadata = _metadata(row)
    if isinstance(preferred := metadata.get("human_preference"), Sequence) and len(preferred) != len(shown):
        raise FaultyRecord(f"{counted(len(shown), 'image')} but {counted(len(preferred), 'preference')}")
    return Record(
        key,
        where,
        tuple(texts),
        tuple(_reference(image, row) for image in shown),
        tuple(roles) if any(roles) else (),
        tuple((role, clean(text, "the conversation")) for role, text in talk.turns) if talk else (),
        clean(talk.system, "the conversation") if talk and talk.system else "",
        targets,
        rewards,
        _number(weight, "weight") if weight is not None else 1.0,
        _size(size) if size is not None else None,
        metadata,
        str(id if id is not None else metadata.get("global_id", "")),
        tuple(row.notes + (talk.notes if talk else [])),
    )


def _webvid(columns: Mapping[str, Any]) -> dict[str, Any]:
    """A row of WebVid's table, whose files lie beside it as videos/PAGE_DIR/VIDEOID.mp4, with the usual names of columns."""
    row = dict(columns)
    row["id"], row["text"] = row.pop("videoid"), row.pop("name", None)
    return row | {"file_name": f"videos/{row.get('page_dir') or '.'}/{row['id']}.mp4"}


# ---- texts ----
def clean(text: Any, what: str) -> str:
    """A text without white space around it, in Unicode's composed form. FaultyRecord when it is none, empty, or no Unicode."""
    text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    if not isinstance(text, str) or not text.strip():
        raise FaultyRecord(f"{what} holds no text")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise FaultyRecord(f"{what} is not Unicode")
    return unicodedata.normalize("NFC", text.strip())


def _texts(row: _Row, how: Columns, needed: bool) -> list[str]:
    usual = [name.strip() for name in how.caption.split(",")] if how.caption else CAPTION_COLUMNS
    name = next((name for name in usual if _nested(row.columns, name) is not None), None)
    if name is None:
        if needed:
            raise FaultyRecord(_lacks(row, "caption", how.caption, CAPTION_COLUMNS))
        return []
    value = row.take(name)
    value = _from_json(value) if name in ("captions", "edited_prompt_list") else value
    if isinstance(value, Mapping):  # of names and captions, or what TensorFlow Datasets makes of a sequence
        value = value["text"] if "text" in value else list(value.values())
    entries = [entry.get("text") if isinstance(entry, Mapping) else entry for entry in (value if isinstance(value, list) else [value])]
    if not entries:
        raise FaultyRecord(f"no caption: the column {name!r} is empty")
    return [clean(entry, f"the column {name!r}") for entry in entries]


def _numbered(texts: list[str], images: list[Any], roles: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Marks of X2I, which count from 1 and come in any order, as `<image N>`, and the input images in the order of their marks."""
    marks = [int(n) for text in texts for n in _X2I_MARK.findall(text)]
    inputs, order = roles.count("input"), list(dict.fromkeys(marks))
    if sorted(order) != list(range(1, inputs + 1)):
        raise FaultyRecord(f"{counted(inputs, 'input image')} but marks for {', '.join(map(str, sorted(order))) or 'none'} of them")
    texts = [_X2I_MARK.sub(lambda found: f"<image {order.index(int(found[1]))}>", text) for text in texts]
    return texts, [images[n - 1] for n in order] + images[inputs:]


def _conversation(row: _Row, images: list[Any]) -> Conversation | None:
    """What the first of the columns of conversations holds; a question with its answer is one, too."""
    for name, read in CONVERSATIONS.items():
        if isinstance(said := _from_json(row.given.get(name)), list):
            if not said or not all(isinstance(turn, Mapping) for turn in said):
                raise FaultyRecord(f"no text: the column {name!r} holds no turns")
            row.take(name)
            return read(said, images)
    if "question" in row.columns and "answer" in row.columns:
        question, answer = (clean(row.take(name), f"the column {name!r}") for name in ("question", "answer"))
        return of_questions([{"user": question, "assistant": answer}], images)
    return None


# ---- images ----
def _images(row: _Row, how: Columns) -> list[tuple[Any, str]]:
    """The images of a row, which are bytes, paths or maps of these, each with its role or ""."""
    if how.image:
        return [(image, "") for image in _listed(row.take(how.image))]
    if "media" in row.columns:  # UniRL
        return [_medium(n, entry) for n, entry in enumerate(row.take("media"))]
    if isinstance(row.given.get("data"), list):  # Janus-Pro-R1: candidates with their labels
        return _candidates(row)
    named = [name for name in row.columns if name.endswith(("_file_name", "_file_names"))]  # Hugging Face's imagefolder
    if named:
        return [(image, name.rpartition("_file_name")[0]) for name in named for image in _listed(row.take(name))]
    inputs = [(image, "input") for name in INPUT_COLUMNS for image in _listed(row.take(name))]
    outputs = [(image, "output") for name in OUTPUT_COLUMNS for image in _listed(row.take(name))]
    if inputs and not outputs:
        raise FaultyRecord("no output image: " + _lacks(row, "image", "", OUTPUT_COLUMNS))
    if inputs or outputs:
        return inputs + outputs
    usual = [name for name in IMAGE_COLUMNS if name in row.columns][:1] or [name for name in row.columns if _is_image(row.columns[name])]
    return [(image, "") for name in usual for image in _listed(row.take(name))]


def _medium(number: int, entry: Any) -> tuple[Any, str]:
    for name in ("modality", "role", "uri"):
        if not isinstance(entry, Mapping) or not isinstance(entry.get(name), str):
            raise FaultyRecord(f"media[{number}] lacks {name!r}")
    if entry["modality"] != "image":
        raise FaultyRecord(f"media[{number}] is of modality {entry['modality']!r}; only images are read")
    return entry["uri"], entry["role"]


def _candidates(row: _Row) -> list[tuple[Any, str]]:
    """Those whose file exists; their probabilities and states become metadata."""
    kept = []
    for n, entry in enumerate(row.take("data") or []):
        reference = _reference(entry.get("img_path"), row)
        if not isinstance(reference, bytes) and not reference.is_file():
            row.notes.append(f"data[{n}] is left out: missing image file {entry['img_path']}")
        else:
            kept.append(entry)
    if not kept:
        raise FaultyRecord("no candidates")
    row.metadata |= {name: [entry.get(name) for entry in kept] for name in ("prob", "state")}
    return [(entry["img_path"], "") for entry in kept]


def _reference(image: Any, row: _Row) -> Image:
    """Encoded bytes, or the path of a file under the root."""
    if isinstance(image, Mapping):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise FaultyRecord(f"an image is {type(image).__name__ if image else 'empty'}, neither a path nor encoded bytes")
    if found := _DATA_URI.match(image):
        try:
            return base64.b64decode(image[found.end() :], validate=True)
        except binascii.Error as error:
            raise FaultyRecord(f"an image in a data: URI is not base64 ({error})") from None
    if "://" in image:
        raise FaultyRecord(f"the image {image} is a web address, which is not fetched; give a file")
    # Links are followed: those of Hugging Face's cache lead out of the folder.
    root = row.root if not is_local(row.root) else Path(os.path.abspath(row.root))
    file = root / os.path.normpath(image)
    if os.path.isabs(image) and not row.absolute or ".." in file.parts or not file.is_relative_to(root):
        raise FaultyRecord(f"the image {image} lies outside {row.root}; config.data.images names the folder that may hold it")
    return file


# ---- other columns ----
def _metadata(row: _Row) -> dict[str, Any]:
    """The columns that are left, without nulls and bytes; those of the objects that hold metadata in known layouts are among them."""
    for name in [name for name in row.columns if name.startswith("sub_dims")]:  # UniGenBench: an object in a cell
        inside = _from_json(row.columns.pop(name))
        if isinstance(inside, Mapping):
            row.metadata |= inside
        else:
            row.notes.append(f"{name} is not JSON; kept without it")
    row.metadata |= row.object("metadata", dict, "object")
    row.metadata |= {k: v for k, v in row.object("reward_model", dict, "object").items() if k == "ground_truth"}  # verl
    return row.metadata | {name: _without_nulls(value) for name, value in row.columns.items() if not _is_image(value)}


def _rewards(value: Any) -> dict[str, float]:
    """{reward: weight}, also of a list of maps with one key each (DeepGen-RL)."""
    value = _from_json(value)
    maps = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(entry, Mapping) for entry in maps):
        raise FaultyRecord("rewards is no object of weights by the names of rewards")
    return {name: _number(weight, f"the weight of the reward {name!r}") for entry in maps for name, weight in entry.items()}


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise FaultyRecord(f"{what} is {value!r}; give a positive number")
    return number


def _size(value: Any) -> tuple[int, int]:
    value = _from_json(value)
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(side, int) and side > 0 for side in value):
        raise FaultyRecord(f"size is {value!r}; give [height, width] in pixels")
    return value[0], value[1]


def _lacks(row: _Row, what: str, chosen: str, usual: Sequence[str]) -> str:
    """That a row has no such column with a value, and which it has."""
    asked = [chosen] if chosen else usual
    if null := [name for name in asked if name in row.given]:
        return f"no {what}: the column {null[0]!r} is empty"
    none = f"config.data.{what}={chosen!r} is no column" if chosen else f"none of {', '.join(usual)} is a column"
    remedy = "" if chosen or usual is OUTPUT_COLUMNS else f"; config.data.{what}=COLUMN chooses one"
    return f"no {what}: {none}; there are {', '.join(map(str, row.given)) or 'none'}{remedy}"


def _listed(value: Any) -> list[Any]:
    """The images in a column: none, one or several; an empty text stands for none."""
    values = value if isinstance(value, list) else [value]
    return [image for image in values if image is not None and image != "" and not _is_null_image(image)]


def _is_null_image(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("bytes") is None and not value.get("path")


def _is_image(value: Any) -> bool:
    """Whether a value is told to be an image by its type alone."""
    return isinstance(value, bytes) or isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)


def _nested(columns: Any, name: str) -> Any:
    """The value of a column; `a.b` looks inside a nested object."""
    if not isinstance(columns, Mapping):
        return None
    if name in columns:
        return columns[name]
    first, _, rest = name.partition(".")
    return _nested(columns.get(first), rest) if rest else None


def _from_json(value: Any) -> Any:
    """Text that is an object or a list in JSON, as tables without nested columns hold it, as this; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
