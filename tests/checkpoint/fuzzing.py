"""Mutations of small files, and what a reader may do with them: give tensors within the file's size, or raise TensorFileError."""

import random
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence

from xomni_jax.checkpoint.tensor_file import TensorFile, TensorFileError

NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
MEMORY = 400_000  # bytes above the file's size: a traceback, an error's text, the objects of a few tensors


def mutate(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """One to three changes: bits, bytes, numbers, digits, cuts, insertions, repetitions, pieces of another seed."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(out) + 1)
        span = rng.choice((1, 1, 2, 4, 8, 16))
        kind = rng.randrange(9)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 1] = rng.randbytes(1)
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "big")))
        elif kind == 3:
            del out[at : at + span]
        elif kind == 4:
            out[at:at] = rng.randbytes(span)
        elif kind == 5:
            out[at:at] = out[at : at + span] * rng.randrange(1, 4)
        elif kind == 6:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            out[at : at + span] = other[start : start + rng.choice((span, 4 * span))]
        elif kind == 7 and rng.random() < 0.2:
            del out[at:]
        elif digits := [m.span() for m in re.finditer(rb"\d+", bytes(out))]:
            start, end = rng.choice(digits)
            out[start:end] = str(rng.choice(NUMBERS) + rng.choice((-1, 0, 1))).encode()
        if not out:
            out = bytearray(b"\0")
    return bytes(out)


def fuzz(
    opening: Callable[[bytes], TensorFile], seeds: Sequence[bytes], runs: int, kinds: int, survivors: int, mutate: Callable = mutate
) -> Counter:
    """Opens `runs` mutations and reads all they hold.

    Fails on any exception but TensorFileError, a tensor larger than the file, memory beyond the file's size (measured for every tenth),
    or five seconds of work for one input. At least `kinds` different sentences and `survivors` readable files show that inputs vary enough.
    """
    for data in seeds:
        assert opening(data).infos, "a seed must be sound"
    seen: Counter = Counter()
    for run in range(runs):
        rng = random.Random(run)
        data = mutate(rng, rng.choice(seeds), seeds)
        start, measured = time.process_time(), run % 10 == 0
        if measured:
            tracemalloc.start()
        try:
            file = opening(data)
            for key, info in file.infos.items():
                array = file.read(key)
                assert (array.shape, array.dtype) == (info.shape, info.dtype) and info.nbytes == array.nbytes <= len(file.data)
                assert len(array.tobytes()) == info.nbytes
            seen["readable"] += 1
        except TensorFileError as e:
            assert len(str(e)) < 1000 and "\n" not in str(e), f"run {run}: {e}"
            seen[re.sub(r"'[^']*'|\"[^\"]*\"|\d+|\[.*?\]", "_", str(e))] += 1
        except Exception as e:
            raise AssertionError(f"run {run}: {type(e).__name__}: {e}") from e
        finally:
            if measured:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert peak < MEMORY + 4 * len(data), f"run {run}: {peak} bytes for a file of {len(data)}"
        assert time.process_time() - start < 5, f"run {run} takes {time.process_time() - start:.0f} s"
    assert len(seen) >= kinds and seen["readable"] >= survivors, seen.most_common()
    return seen
