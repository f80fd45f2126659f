"""A look at every record of a source: what can be used, what cannot and why, what repeats, and which files hold nothing."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xomni_jax.core.config import ConfigError
from xomni_jax.data.conversations import counted
from xomni_jax.data.files import FilesConfig, Records, check_excluded, check_images, excluded_texts
from xomni_jax.data.records import Record
from xomni_jax.data.tables import FaultyRecord

EXAMPLES = 3  # of every reason


@dataclass
class Checked:
    """What was found.

    Attributes:
      skipped: (place, reason) of the records that cannot be used.
      amended: (place, note) of records that are used otherwise than they are written.
      duplicates: (place, place of the first) of records with the same texts and images.
      repeated_ids: how many records have an id that an earlier one has; nothing depends on ids.
      notes: what is no record and yet should be known, such as files without records.
    """

    records: int
    notes: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    amended: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    repeated_ids: int = 0

    def lines(self) -> Iterator[str]:
        """The summary, with a few examples of every reason."""
        yield f"{counted(self.records, 'record')}, {self.records - len(self.skipped)} good, {len(self.skipped)} cannot be used"
        for title, found in (("cannot be used", self.skipped), ("amended", self.amended)):
            kinds: dict[str, list[str]] = {}
            for place, reason in found:
                kinds.setdefault(_kind(reason), []).append(f"{place}: {reason}")
            for kind, examples in sorted(kinds.items(), key=lambda item: -len(item[1])):
                yield f"{title}, {len(examples)}: {kind}"
                yield from (f"    {example}" for example in examples[:EXAMPLES])
        if self.duplicates:
            yield f"{len(self.duplicates)} are kept that repeat another record"
            yield from (f"    {place} repeats {first}" for place, first in self.duplicates[:EXAMPLES])
        if self.repeated_ids:
            yield f"{self.repeated_ids} have the id of an earlier record; ids need not be unique"
        yield from self.notes

    def rows(self) -> Iterator[dict[str, Any]]:
        """Everything that was found, for a file of JSON lines."""
        yield from ({"where": place, "skipped": reason} for place, reason in self.skipped)
        yield from ({"where": place, "amended": note} for place, note in self.amended)
        yield from ({"where": place, "repeats": first} for place, first in self.duplicates)
        yield from ({"note": note} for note in self.notes)


def check(options: FilesConfig, prompts: bool) -> Checked:
    """Reads every record of a source with its images, in several threads. ConfigError when the files cannot be opened."""
    records = Records(options.path, options, prompts)
    out, seen, ids = Checked(len(records), list(records.notes)), {}, set()
    for number, found in enumerate(records.map(functools.partial(_look, records, excluded_texts(options.exclude)))):
        if isinstance(found, str):
            place = records.where(number)
            out.skipped.append((place, found.removeprefix(f"{place}: ")))
            continue
        content, id, notes = found
        out.amended += [(records.where(number), note) for note in notes]
        if content in seen:
            out.duplicates.append((records.where(number), records.where(seen[content])))
        seen.setdefault(content, number)
        out.repeated_ids += bool(id) and id in ids
        ids.add(id)
    return out


def _look(records: Records, excluded: Mapping[str, str], number: int) -> str | tuple[bytes, str, tuple[str, ...]]:
    """(hash of the content, id, notes) of a record, or why it cannot be used."""
    try:
        record = records[number]
        check_images(record, whole=True)
        check_excluded(record, excluded)
    except (FaultyRecord, ConfigError) as fault:
        return str(fault)
    return _content(record), record.id, record.notes


def _content(record: Record) -> bytes:
    said = repr((record.texts, record.turns, record.roles, record.targets, record.metadata))
    content = hashlib.blake2b(said.encode(), digest_size=16)
    for image in record.images:
        content.update(image if isinstance(image, bytes) else image.read_bytes())
    return content.digest()


def _kind(reason: str) -> str:
    """A reason without what differs from record to record."""
    reason = re.sub(r"the image .+? (cannot be read|lies outside|is a web address)", r"an image \1", reason)
    reason = re.sub(r"the prompt .+ stands in .+, which", "a prompt stands in a file or suite which", reason)
    return re.sub(r"\d+", "N", reason)
