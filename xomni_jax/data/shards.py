"""Files that make up one table: the numbers of their rows, what a process keeps open, and why a file cannot be read."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from xomni_jax.data.tables import FaultyRecord

_THREADS = 16  # that read indices: most of it is waiting for a disk or a bucket
_FOREIGN = {
    b"version https://git-lfs": "is a pointer of git-lfs in place of the file; fetch the file with: git lfs pull",
    b"\x1f\x8b": "is compressed with gzip, which allows no random access; unpack it",
    b"<": "is a web page or XML; download the file again",
}


class ShardIndex(Protocol):
    """What is known of a file before its rows are read; its length is their number.

    Attributes:
      content: tells it from the index of other rows, on every host alike.
    """

    @property
    def content(self) -> bytes: ...

    def __len__(self) -> int: ...


I = TypeVar("I", bound=ShardIndex)  # noqa: E741
T = TypeVar("T")


class Shards(ABC, Generic[I]):
    """Rows of several files, numbered through all of them in the order given: a `data.tables.Table` but for its rows and their places.

    A file that cannot be read is one row with a fault: what leaves out faulty rows goes on without it, everything else refuses it.

    Attributes:
      files: local paths, or those of a bucket as `etils.epath` gives them.
      indices: that of every file, or the fault for which it has none.
    """

    def __init__(self, files: Sequence[Path], root: Path, read_index: Callable[[Path], I]):
        """`read_index` raises FaultyRecord, its message a whole sentence, when it cannot read a file."""
        self.files, self.root, self.notes = files, root, list[str]()

        def index_or_fault(file: Path) -> I | FaultyRecord:
            try:
                return read_index(file)
            except FaultyRecord as fault:
                return fault

        with ThreadPoolExecutor(_THREADS) as pool:
            self.indices = list(pool.map(index_or_fault, files))
        self._ends = list(itertools.accumulate(1 if isinstance(index, FaultyRecord) else len(index) for index in self.indices))
        contents = (b"" if isinstance(index, FaultyRecord) else index.content for index in self.indices)
        parts = [(file.name, hashlib.sha256(content).hexdigest()) for file, content in zip(files, contents, strict=True)]
        self.digest = hashlib.sha256(repr(parts).encode()).hexdigest()

    @abstractmethod
    def row(self, file: Path, index: I, number: int) -> dict[str, Any]:
        """The columns of a file's row. FaultyRecord, with the reason alone, when it cannot be read."""

    @abstractmethod
    def place(self, index: I, number: int) -> str:
        """The place of a file's row, without the name of the file: "row 4"."""

    def readable(self) -> Iterator[tuple[Path, I]]:
        """The files that have an index, and it."""
        for file, index in zip(self.files, self.indices, strict=True):
            if not isinstance(index, FaultyRecord):
                yield file, index

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> dict[str, Any]:
        file, index, row = self._locate(number)
        if isinstance(index, FaultyRecord):
            raise index
        try:
            return self.row(file, index, row)
        except FaultyRecord as fault:
            raise FaultyRecord(f"{self.where(number)}: {fault}") from fault

    def where(self, number: int) -> str:
        """The file, and the place in it."""
        file, index, row = self._locate(number)
        return str(file) if isinstance(index, FaultyRecord) else f"{file} {self.place(index, row)}"

    def _locate(self, number: int) -> tuple[Path, I | FaultyRecord, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._ends, number)
        return self.files[shard], self.indices[shard], number - (self._ends[shard - 1] if shard else 0)


def _one(value: Any) -> int:
    return 1


class Recent(Generic[T]):
    """The values that were last made, up to a limit. Every process makes its own: neither a forked worker nor a pickled copy has any.

    Attributes:
      make: can be pickled.
      limit: of the costs of all values kept, of which there is always one; the garbage collector closes files that are left out.
      cost: of a value; can be pickled.
    """

    def __init__(self, make: Callable[..., T], limit: int, cost: Callable[[T], int] = _one):
        self.make, self.limit, self.cost = make, limit, cost
        self._of_process: dict[int, tuple[threading.Lock, OrderedDict[Any, T]]] = {}

    def __call__(self, *key: Any) -> T:
        """The value that `make(*key)` gives. Threads that want the same one wait for it instead of making it twice."""
        lock, values = self._of_process.setdefault(os.getpid(), (threading.Lock(), OrderedDict()))
        with lock:
            if key not in values:
                values[key] = self.make(*key)
                while len(values) > 1 and sum(map(self.cost, values.values())) > self.limit:
                    values.popitem(last=False)
            values.move_to_end(key)
            return values[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self.make, self.limit, self.cost)


def unreadable(file: Path, what: str, error: Exception | None = None) -> FaultyRecord:
    """The fault of a file that should be `what`, such as "parquet file", and cannot be read: why, and what to do."""
    if isinstance(error, OSError) and error.strerror:
        return FaultyRecord(f"{file} cannot be read: {error.strerror}")
    with file.open("rb") as stream:
        head = stream.read(64)
    reason = next((told for start, told in _FOREIGN.items() if head.startswith(start)), None)
    if not head:
        reason = "has no bytes: it was not written to its end; get it again, or take it out"
    told = f" ({first_line(error)})" if error else ""
    return FaultyRecord(f"{file} {reason or f'is no whole {what}, but damaged or cut off{told}; get it again, or take it out'}")


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
