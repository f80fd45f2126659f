"""Outputs of other programs in place of a model of ours: a folder of images, a file of answers, a chat model that answers."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from xomni_jax.data.images import UnreadableImage, read_image
from xomni_jax.evaluation.judges import open_model
from xomni_jax.evaluation.suite import GridLayout, Item, SuiteError, tiles
from xomni_jax.evaluation.suite_run import SuiteRun
from xomni_jax.evaluation.suites.reading import read_rows
from xomni_jax.rewards.chat import is_endpoint
from xomni_jax.rewards.chat.replies import Unreadable

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_ALL = -1  # in place of the number of an image
_SHOWN = 5  # missing ids that an error lists


class Source(Protocol):
    """What makes outputs. `settings` is what decides them, for settings.json."""

    settings: Mapping[str, Any]

    def make(self, items: Sequence[Item]) -> Iterator[list[tuple[Any, ...]]]:
        """Batch by batch (item, images, what else is recorded), or (item, {"answer", ...}) for a suite of questions."""
        ...


def other_source(run: SuiteRun) -> Source | None:
    """The source of outputs that the configuration names in place of a model of ours, if any. Raises SuiteError if it does not fit."""
    config, drawn = run.config, run.suite.task == "generate"
    other = config.images or config.answers or is_endpoint(str(config.inference.model))
    if other and config.adapter:
        raise SuiteError("--adapter changes a model directory, and another program makes the outputs here; leave one of the two out")
    if config.images or config.answers:
        if bool(config.images) != drawn:
            raise SuiteError(
                f"{run.suite.name} {'draws images' if drawn else 'asks questions'}; give {'--images' if drawn else '--answers'}"
            )
        return FolderImages(run, Path(config.images)) if config.images else FileAnswers(run, Path(config.answers))
    if is_endpoint(str(config.inference.model)):
        if drawn:
            raise SuiteError(f"{run.suite.name} needs images, and a chat model draws none; give the images that it made with --images DIR")
        return ChatAnswers(run)
    return None


def image_digest(images: Sequence[Image.Image]) -> str:
    """SHA-256 of the sizes and pixels of some images."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


class FolderImages:
    """Images that another program drew, in a folder or in folders below it, named by item:

        ID_K.png, ID/K.png or ID/samples/K.png   image K of the item, K from 0, with any leading zeros
        ID.png                                   its only image, or all of them as the tiles of a square, row by row

    where .png may be .jpg, .jpeg or .webp. If no file bears an id, ID is the position of the item in the published order, from 0.

    Raises:
      SuiteError: the folder lacks images of some items.
    """

    def __init__(self, run: SuiteRun, folder: Path):
        self.settings = {"repeats": run.suite.repeats, "images": {"path": str(folder)}}
        self._suite = run.suite
        self._files = self._find(run, folder)
        missing = [item.id for item in run.items if not self._paths(item)]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + ", ..." * (len(missing) > _SHOWN)
            raise SuiteError(
                f"--images {folder} lacks images of {len(missing)} of {len(run.items)} items: {shown}; "
                f"each needs {' '.join(f'ID_{k}.png' for k in range(run.suite.repeats))}, where ID is its id or its position from 0"
            )

    def make(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, list[Image.Image], dict[str, Any]]]]:
        """See Source."""
        for item in items:
            opened = [self._opened(path) for path in self._paths(item)]
            images = opened if len(opened) == self._suite.repeats else tiles(opened[0], self._suite.repeats)
            if isinstance(self._suite, GridLayout) and len({image.size for image in images}) > 1:
                raise SuiteError(f"the images of item {item.id} differ in size, and {self._suite.name} tiles them; give images of one size")
            yield [(item, images, {})]

    def _paths(self, item: Item) -> list[Path]:
        """The files of an item's images, or the one that holds all of them; none if some are missing."""
        files = self._files.get(item.id, {})
        if all(k in files for k in range(self._suite.repeats)):
            return [files[k] for k in range(self._suite.repeats)]
        return [files[_ALL]] if _ALL in files and isinstance(self._suite, GridLayout) else []

    def _opened(self, path: Path) -> Image.Image:
        try:
            return read_image(path)
        except UnreadableImage as error:
            raise SuiteError(f"the image {path} cannot be read: {error}; make it again") from error

    def _find(self, run: SuiteRun, folder: Path) -> Mapping[str, dict[int, Path]]:
        """Item id -> {number of the image: file}; `_ALL` is a file with all images of an item."""
        if not folder.is_dir():
            raise SuiteError(f"--images {folder} is no directory; give the folder with the images")
        by_id: dict[str, dict[int, Path]] = defaultdict(dict)
        by_position: dict[str, dict[int, Path]] = defaultdict(dict)
        ids = {str(position): name for name, position in run.positions.items()}
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            numbered = re.fullmatch(r"(.+?)(?:_|/samples/|/)(\d+)", stem)
            whole = [(stem, 0 if self._suite.repeats == 1 else _ALL)]
            for name, k in whole + ([(numbered[1], int(numbered[2]))] if numbered else []):
                for key in {name, name.rpartition("/")[2]}:  # also in folders that are not named by item
                    if key in run.positions:
                        by_id[key][k] = path
                    elif key.isdigit() and str(int(key)) in ids:
                        by_position[ids[str(int(key))]][k] = path
        return by_id or by_position


class FileAnswers:
    """Answers of another program: a jsonl, json, csv or tsv file with the fields id and answer.

    Raises:
      SuiteError: the file cannot be read, or lacks answers.
    """

    def __init__(self, run: SuiteRun, path: Path):
        self.settings = {"answers": {"path": str(path)}}
        self._answers: dict[str, str] = {}
        for row in read_rows(path):
            name, answer = str(row.get("id", kind=(str, int))), row.get("answer", kind=(str, int, float))
            if name in self._answers:
                raise SuiteError(f"{row.where}: item {name!r} has an answer already; keep one")
            self._answers[name] = str(answer).strip()
        missing = [item.id for item in run.items if item.id not in self._answers]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + ", ..." * (len(missing) > _SHOWN)
            raise SuiteError(f"--answers {path} has no answer for {len(missing)} of {len(run.items)} items: {shown}")

    def make(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, dict[str, Any]]]]:
        """See Source."""
        yield [(item, {"answer": self._answers[item.id]}) for item in items]


class ChatAnswers:
    """A chat model behind MODEL@URL that answers the questions. An answer that cannot be read is empty and "unanswered" says why."""

    def __init__(self, run: SuiteRun):
        spec = str(run.config.inference.model)
        self._chat, self._tokens, self._model = run.config.chat, run.suite.max_new_tokens, open_model(spec)
        chat = {"max_new_tokens": self._tokens, "format": self._chat.image_format or "PNG"}
        self.settings = {"model": {"name": self._model.name, "path": spec}, **chat}

    def make(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, dict[str, Any]]]]:
        """See Source."""
        with ThreadPoolExecutor(self._chat.concurrency) as pool:
            try:
                yield from ([(item, made)] for item, made in zip(items, pool.map(self._answer, items)))
            finally:
                pool.shutdown(cancel_futures=True)
                self._model.close()

    def _answer(self, item: Item) -> dict[str, Any]:
        from xomni_jax.evaluation.judges.chat import answered
        from xomni_jax.rewards.chat.messages import encoded

        image = item.image().convert("RGB")
        made = {"image": image_digest([image])}
        try:
            file = encoded(image, self._chat.image_format or "PNG")
            return made | {"answer": answered(self._model, item.prompt, self._tokens, self._chat.thinking_tokens, file).strip()}
        except Unreadable as error:
            return made | {"answer": "", "unanswered": str(error)}
