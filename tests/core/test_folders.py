"""Files that are written as a whole: where that fails, nothing is left behind, and the error names the file."""

import errno
import os

import pytest

from xomni_jax.core.folders import write_text


def test_a_file_that_does_not_fit_on_the_disk(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as refused:
        write_text(path, "new")
    assert (refused.value.errno, refused.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
