"""SHA-256 of the files that are converted, computed beside the conversion and at its pace."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

LEAD = 2**30  # bytes that either may be ahead: what one has read from the disk, the other finds in the page cache
BLOCK = 4 * 2**20


class Digests:
    """A thread that hashes files in their order, from entering the context until `result`; leaving the context ends it.

    OpenSSL hashes without Python's lock. A file larger than the page cache would be read from the disk twice if either side ran away.
    """

    def __init__(self, files: Sequence[str]):
        self.files, self.total = files, sum(map(os.path.getsize, files))
        self.hashed, self.converted, self.ended = 0, 0.0, False
        self.changed = threading.Condition()

    def __enter__(self) -> Digests:
        self.pool = ThreadPoolExecutor(1)
        self.digests = self.pool.submit(self._hash)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._set(ended=True)
        self.pool.shutdown()

    def result(self) -> dict[str, str]:
        """{file: its digest in hexadecimal}, awaited. OSError: a file cannot be read."""
        self._set(converted=self.total)
        return self.digests.result()

    def advance(self, share: float) -> None:
        """Takes note that a further share of the conversion is done, and waits while the hash is far behind."""
        self._set(converted=self.converted + share * self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.ended or self.converted <= self.hashed + LEAD)

    def _hash(self) -> dict[str, str]:
        try:
            return {file: self._sha256(file) for file in self.files}
        finally:
            self._set(ended=True)

    def _sha256(self, file: str) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
        with open(file, "rb", buffering=0) as source:
            while n := source.readinto(block):
                digest.update(block[:n])
                self._set(hashed=self.hashed + n)
                with self.changed:
                    self.changed.wait_for(lambda: self.ended or self.hashed <= self.converted + LEAD)
                if self.ended:
                    break
        return digest.hexdigest()

    def _set(self, **values: float) -> None:
        with self.changed:
            vars(self).update(values)
            self.changed.notify_all()
