"""What to download for a suite: names, sizes and checksums as the publishers state them, and whether a directory holds it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xomni_jax.evaluation.suite import SuiteError

GITHUB, HUGGING_FACE = "GitHub repository", "Hugging Face dataset"
VLMEVALKIT = f"data sets of VLMEvalKit ({GITHUB} open-compass/VLMEvalKit, whose code names the addresses)"


@dataclass(frozen=True)
class Download:
    """Files of one publisher.

    Attributes:
      origin: where they are published, by the name of the repository.
      files: name below the data directory, where * stands for any text -> "SIZE ALGORITHM:HEX" as far as they are known. ALGORITHM is
        sha256, md5 or git, the id of the file's blob in its repository.
      remark: what else must be done with them.
    """

    origin: str
    files: Mapping[str, str]
    remark: str = ""

    def __str__(self) -> str:
        return f"{', '.join(self.files)} from the {self.origin}" + (f" ({self.remark})" if self.remark else "")


def described(alternatives: Sequence[Sequence[Download]]) -> str:
    """One sentence part that names the files and their publishers."""
    return ", or ".join("; ".join(map(str, needed)) for needed in alternatives)


def listing(alternatives: Sequence[Sequence[Download]]) -> Iterator[str]:
    """Lines for a reader: each file with its size and checksum."""
    for number, needed in enumerate(alternatives):
        yield from ["or instead:"] * bool(number)
        for download in needed:
            yield f"from the {download.origin}:" if not download.remark else f"from the {download.origin}; {download.remark}:"
            for name, known in download.files.items():
                size, digest = _known(known)
                yield "  ".join(filter(None, (f"  {name}", f"{size:,} bytes" if size else "size not stated", digest.replace(":", " "))))


def check(alternatives: Sequence[Sequence[Download]], data: Path, folders: Sequence[str]) -> list[str]:
    """One line per file of the alternative of which most is there.

    Raises:
      SuiteError: a file is missing, or is not the published one by its size or checksum; the message lists every such file.
    """
    found = [[_state(data, folders, *file) for download in needed for file in download.files.items()] for needed in alternatives]
    lines, wrong = min(((states, [s for s in states if not s.endswith(": ok")]) for states in found), key=lambda pair: len(pair[1]))
    if wrong:
        raise SuiteError(f"{data}: {len(wrong)} of {len(lines)} files do not fit: " + "; ".join(wrong))
    return lines


def _state(data: Path, folders: Sequence[str], name: str, known: str) -> str:
    paths = next(filter(None, (sorted((data / folder).glob(name)) for folder in ("", *folders))), [])
    if not paths:
        return f"{name} is missing"
    size, digest = _known(known)
    if size and paths[0].stat().st_size != size:
        return f"{paths[0]} has {paths[0].stat().st_size:,} bytes, the published file {size:,}"
    algorithm, _, wanted = digest.partition(":")
    if digest and _DIGESTS[algorithm](paths[0]) != wanted:
        return f"{paths[0]} has another {algorithm} checksum than the published file"
    many = f" ({len(paths)} files)" if len(paths) > 1 else ""
    return f"{name}{many}: ok"


def _known(known: str) -> tuple[int, str]:
    """Size (0 where none is stated) and "ALGORITHM:HEX" (or "")."""
    words = known.split()
    return next((int(w) for w in words if w.isdigit()), 0), next((w for w in words if ":" in w), "")


def _digest(path: Path, algorithm: str, start: bytes = b"") -> str:
    with path.open("rb") as file:
        digest = hashlib.new(algorithm, start, usedforsecurity=False)
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


_DIGESTS: dict[str, Callable[[Path], str]] = {
    "sha256": lambda path: _digest(path, "sha256"),
    "md5": lambda path: _digest(path, "md5"),
    "git": lambda path: _digest(path, "sha1", b"blob %d\0" % path.stat().st_size),
}
