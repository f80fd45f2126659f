"""Where the stored (not compressed) entries of a zip archive lie, so that they can be used as memory maps. Every field is checked."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

from xomni_jax.checkpoint.tensor_file import TensorFileError, show

LOCAL, CENTRAL, END, END64, LOCATOR64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 record"


class Entry(NamedTuple):
    """One line of the central directory, and where its data start."""

    name: str
    flags: int
    method: int
    packed: int
    size: int
    header: int
    offset: int = 0


class ZipDirectory:
    """`entries`: {name: Entry} of an archive.

    Raises:
      TensorFileError: at construction, for a truncated archive, entries that overlap, names that come twice.
    """

    def __init__(self, path: Path, data: mmap.mmap | bytes):
        self.path, self.data = path, data
        self.entries: dict[str, Entry] = {}
        start, lines = self._lines()
        end, last = 0, ""
        for entry in sorted(lines, key=lambda e: e.header):
            if entry.name in self.entries:
                raise self.error(f"its entry {show(entry.name)} comes twice")
            if entry.header < end:  # also how a small "zip bomb" lets many names share the same bytes
                raise self.error(f"its entries {show(last)} and {show(entry.name)} overlap")
            entry = entry._replace(offset=self._data_offset(entry))
            end, last = entry.offset + entry.packed, entry.name
            if end > start:
                raise self.error(f"its entry {show(entry.name)} reaches beyond the data")
            self.entries[entry.name] = entry

    def error(self, what: str, mend: str = "the file is damaged or cut off; download it again") -> TensorFileError:
        """An error that names the file."""
        return TensorFileError(f"{self.path}: {what}; {mend}")

    def span(self, name: str) -> tuple[int, int]:
        """(offset, size) of an entry's bytes in the file.

        Raises:
          TensorFileError: it is not there, compressed or encrypted.
        """
        if name not in self.entries:
            raise self.error(f"its entry {show(name)} is not there")
        entry = self.entries[name]
        if entry.flags & 1:
            raise self.error(f"its entry {show(name)} is encrypted", "save it again without a password")
        if entry.method != 0 or entry.packed != entry.size:
            raise self.error(f"its entry {show(name)} is compressed", "save it again with torch.save, which stores entries as they are")
        return entry.offset, entry.size

    def read(self, name: str) -> bytes:
        """The bytes of a small entry."""
        offset, size = self.span(name)
        return bytes(self.data[offset : offset + size])

    def _unpack(self, form: str, offset: int) -> tuple[int, ...]:
        """`struct.unpack` inside the file's bounds."""
        if offset < 0 or offset + struct.calcsize(form) > len(self.data):
            raise self.error("its zip directory points outside the file")
        return struct.unpack_from(form, self.data, offset)

    def _end(self) -> tuple[int, int, int]:
        """(entries, size, offset) of the central directory, from the end record or its 64-bit twin."""
        at = self.data.rfind(END, max(0, len(self.data) - 22 - FULL16))
        if at < 0 or at + 22 > len(self.data):
            raise self.error("its zip directory is missing")
        *_, disks, _, total, size, offset, comment = self._unpack("<4s4H2IH", at)
        if at + 22 + comment != len(self.data):
            raise self.error("its zip directory does not end with the file")
        if FULL16 in (disks, total) or FULL32 in (size, offset):
            mark, _, at64, _ = self._unpack("<4sIQI", at - 20)
            mark64, _, _, _, _, _, _, total, size, offset = self._unpack("<4sQ2H2I4Q", at64) if mark == LOCATOR64 else (b"",) * 10
            if mark64 != END64:
                raise self.error("its 64-bit zip directory is missing")
        if offset + size > at:
            raise self.error("its zip directory points outside the file")
        return total, size, offset

    def _lines(self) -> tuple[int, list[Entry]]:
        """(where the directory starts, its entries)."""
        total, size, start = self._end()
        at, end, entries = start, start + size, []
        while at < end:
            mark, _, _, flags, method, _, _, _, packed, full, n, extra, comment, _, _, _, header = self._unpack("<4s6H3I5H2I", at)
            if mark != CENTRAL or at + 46 + n + extra + comment > end:
                raise self.error("its zip directory is no list of entries")
            name = self._name(bytes(self.data[at + 46 : at + 46 + n]))
            full, packed, header = self._wide((full, packed, header), at + 46 + n, extra, name)
            entries.append(Entry(name, flags, method, packed, full, header))
            at += 46 + n + extra + comment
        if len(entries) != total:
            raise self.error(f"its zip directory promises {total} entries and lists {len(entries)}")
        return start, entries

    def _name(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"its entry {raw[:80]!r} has a name that is not UTF-8") from None

    def _wide(self, values: tuple[int, ...], at: int, length: int, name: str) -> list[int]:
        """Fields that did not fit into 32 bits, replaced from the zip64 extra field (which holds just those, in this order)."""
        end, wide = at + length, iter(())
        while at + 4 <= end:
            kind, size = self._unpack("<2H", at)
            if kind == 1 and at + 4 + size <= end:
                wide = iter(self._unpack(f"<{size // 8}Q", at + 4))
            at += 4 + size
        try:
            return [next(wide) if v == FULL32 else v for v in values]
        except (StopIteration, RuntimeError):
            raise self.error(f"its entry {show(name)} lacks its 64-bit sizes") from None

    def _data_offset(self, entry: Entry) -> int:
        """Where the entry's data start, from its local header, which must agree with the directory."""
        mark, _, _, method, _, _, _, _, _, n, extra = self._unpack("<4s5H3I2H", entry.header)
        name = bytes(self.data[entry.header + 30 : entry.header + 30 + n])
        if mark != LOCAL or name != entry.name.encode() or method != entry.method:
            raise self.error(f"its entry {show(entry.name)} is not where the zip directory says")
        return entry.header + 30 + n + extra
