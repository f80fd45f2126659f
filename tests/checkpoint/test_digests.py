"""The hash of converted files goes at the pace of the conversion, and neither waits for ever."""

import hashlib
import threading

import numpy as np
import pytest

from xomni_jax.checkpoint import digests
from xomni_jax.checkpoint.digests import Digests


@pytest.fixture
def files(tmp_path, rng, monkeypatch):
    """Two files of 100 and 37 bytes, hashed by 10 bytes, neither side more than 30 ahead."""
    monkeypatch.setattr(digests, "LEAD", 30)
    monkeypatch.setattr(digests, "BLOCK", 10)
    for name, size in (("a", 100), ("b", 37)):
        (tmp_path / name).write_bytes(rng.integers(0, 256, size).astype(np.uint8).tobytes())
    return [str(tmp_path / name) for name in "ab"]


def until(condition):
    """Waits for another thread; the test hangs, and is ended, if it never comes."""
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("never")


def test_the_hash_waits_for_the_conversion(files):
    with Digests(files) as found:
        until(lambda: found.hashed == 40)  # the first block beyond the lead
        found.advance(0.5)
        until(lambda: found.hashed == 100)
        assert found.result() == {file: hashlib.sha256(open(file, "rb").read()).hexdigest() for file in files}


def test_the_conversion_waits_for_the_hash(files, monkeypatch):
    gate = threading.Event()
    real = Digests._sha256
    monkeypatch.setattr(Digests, "_sha256", lambda self, file: gate.wait() and real(self, file))
    with Digests(files) as found:
        found.advance(0.2)
        ahead = threading.Thread(target=found.advance, args=(0.3,))
        ahead.start()
        ahead.join(0.05)
        assert ahead.is_alive()
        gate.set()
        ahead.join(10)
        assert not ahead.is_alive()


def test_an_error_on_either_side_ends_both(files, tmp_path):
    with pytest.raises(KeyError), Digests(files):
        raise KeyError  # leaving the context ends the waiting thread
    with Digests(files) as found:
        (tmp_path / "b").unlink()
        found.advance(1.0)
        with pytest.raises(FileNotFoundError):
            found.result()


def test_a_process_without_files_never_waits():
    with Digests([]) as found:
        found.advance(1.0)
        assert found.result() == {}
