"""The files of an evaluation, and how several processes add to them without losing or repeating anything.

    OUT/
      settings.json      everything that decides the outputs: suite, data, model and its hash, sampling, seed, batch shape, versions.
                         A command that would add outputs of other settings is refused
      images/            suites that draw: the images, in the benchmark's official layout
      parts/*.jsonl      finished outputs, one line per item, one file per process: {"id", "files" and "pixels"} or {"id", "answer"};
                         "files" are relative to OUT, "pixels" is the SHA-256 of the item's images
      judged/*.jsonl     {"id", "replies", "asked"}: the judge's replies, one list per repeat, and a hash of the questions
      judged/judge.json  which judge, and how it was asked
      items.jsonl        at the end: one line per item, sorted by id: {"id", "position" (in the published data, from 0), "prompt", "fields",
                         "images" (relative paths: one per repeat, or one where the official layout is a grid) or "answer", "replies",
                         "score", "verdicts", "record"}
      results.json       at the end: the suite's numbers, what they were made with, and whether they are comparable; see `results`

A line is complete or absent: it is written in one piece and flushed to the disk, and an incomplete last line is dropped, so a process may
be killed at any time. Lines are read from all files, whichever process wrote them: any number of processes may continue the work.
items.jsonl and results.json are functions of the lines alone, and are replaced as a whole.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xomni_jax.core.folders import lock, why_not_writable, why_taken, write_part, write_text

UNCOMPARED = ("path", "at")  # keys that may differ between machines or sittings


class RunError(ValueError):
    """A run directory that does not fit, or cannot be written. One sentence: what, where, what to do."""


class RunDirectory:
    """The directory of one evaluation of one suite, or of another `kind` of `core.folders.MARKERS`."""

    def __init__(self, path: str | Path, kind: str = "evaluation"):
        self.path = Path(path)
        if not str(path):
            raise RunError("--out is empty; give a folder")
        if taken := why_taken(self.path, kind):
            raise RunError(f"--out {self.path} {taken}; give another folder")
        if reason := why_not_writable(self.path):
            raise RunError(f"--out {self.path}: {reason}; give another folder")

    def claim(self, name: str, value: Mapping[str, Any], remedy: str) -> None:
        """Writes OUT/name once; afterwards refuses a value that differs, naming the first key. Processes may race for it.

        Raises:
          RunError: with `remedy`.
        """
        path, value = self.path / name, json.loads(json.dumps(value))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            mine = write_part(path, pretty_json(value))
            try:
                os.link(mine, path)
            except FileExistsError:
                pass  # another process was first; compared below
            except OSError:
                os.replace(mine, path)  # a file system without hard links
            mine.unlink(missing_ok=True)
        known = self.read(name)
        self.check(name, {key: value.get(key) for key in {**known, **value}}, remedy)

    def check(self, name: str, value: Mapping[str, Any], remedy: str) -> None:
        """Refuses a value some keys of which differ from those in OUT/name. Raises RunError with `remedy`."""
        known = self.read(name)
        if found := _difference({key: known.get(key) for key in value}, json.loads(json.dumps(value))):
            key, old, new = found
            raise RunError(f"{self.path / name}: {key} is {old}, this command has {new}; {remedy}")

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object in OUT/name."""
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except ValueError as e:
            raise RunError(f"{path}: not readable as JSON ({e}); delete it, or take another --out") from None

    def lines(self, kind: str) -> dict[str, dict[str, Any]]:
        """id -> record, over all files of "parts" or "judged".

        Raises:
          RunError: a malformed line (file and number), or an item made twice with different results.
        """
        found: dict[str, dict[str, Any]] = {}
        origin: dict[str, Path] = {}
        for path in sorted((self.path / kind).glob("*.jsonl")):
            for record in _read_lines(path):
                name = record["id"]
                if name in found and _difference(found[name], record):
                    raise RunError(f"{path} and {origin[name]}: item {name} has different results in the two; delete one of these files")
                found[name], origin[name] = record, path
        return found

    def writer(self, kind: str, worker: str) -> LineFile:
        """The file that one process appends to."""
        return LineFile(self.path / kind / f"{worker}.jsonl")

    def write(self, name: str, text: str) -> None:
        """Replaces OUT/name as a whole."""
        write_text(self.path / name, text)


class LineFile:
    """Append-only records of one process."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        if not lock(self._file):
            self._file.close()
            raise RunError(f"{path}: another process writes here; wait for it, or give each process its own --shard")
        self._file.seek(0)
        whole = self._file.read()
        self._file.truncate(whole.rfind(b"\n") + 1)  # drops the incomplete last line of a killed process

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line, on disk when this returns. A line that cannot be written whole is taken back."""
        line = json.dumps({**record, "at": round(time.time(), 3)}, ensure_ascii=False, sort_keys=True).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            if os.write(self._file.fileno(), line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(size)
            raise

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def json_line(value: Mapping[str, Any]) -> str:
    """One line of items.jsonl."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n"


def pretty_json(value: Any) -> str:
    """The text of settings.json and results.json; scores stay in the order in which a suite gives them."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _read_lines(path: Path) -> Iterable[dict[str, Any]]:
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                raise ValueError
        except ValueError:
            raise RunError(f"{path}, line {number}: no complete record; delete this line, its item is then made again") from None
        yield record


def _difference(old: Any, new: Any, key: str = "") -> tuple[str, str, str] | None:
    """The first key in which two JSON values differ, with both values as text; None where they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new} - set(UNCOMPARED)):
            if found := _difference(old.get(name), new.get(name), f"{key}.{name}" if key else name):
                return found
        return None
    return None if old == new else (key, json.dumps(old, ensure_ascii=False), json.dumps(new, ensure_ascii=False))
