"""SIGKILL in the middle of xomni data tokenize: the same command goes on, and the folder is that of a job that was left alone."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import sys

from tests.data.making import make_codes, of_folder, write_images


def killed(place: str, after: int, *job) -> None:
    """Runs a job that kills its process at the `after`-th call of a function: while images are read, codes made, or files put in place."""
    from xomni_jax.data import files
    from xomni_jax.training import tokenize_data

    owner, name = {"read": (files, "read_image"), "pack": (tokenize_data, "packed"), "replace": (os, "replace")}[place]
    original, left = getattr(owner, name), [after]

    @functools.wraps(original)
    def until(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, until)
    sys.stderr = open(os.devnull, "w")
    make_codes(*job, shard=6, max_rejected="1")


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(model_dir, tmp_path):
    """Three kills, one after the other, at seeded moments of three kinds, in one folder."""
    images, rng = write_images(tmp_path / "images", 40), random.Random(5)
    (images / "011.png").write_bytes(b"x")
    make_codes(model_dir, of_folder(images), tmp_path / "straight", shard=6, max_rejected="1")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "straight").iterdir()}
    server = multiprocessing.get_context("forkserver")  # imports once; JAX starts in each process anew
    server.set_forkserver_preload(["tests.data.making", "xomni_jax.checkpoint.store"])
    finished = []
    # The second kill comes after at least one finished shard, which takes two files.
    for place, moments in (("read", range(10)), ("replace", range(2, 6)), ("pack", range(9))):
        process = server.Process(target=killed, args=(place, rng.choice(moments), model_dir, of_folder(images), tmp_path / "codes"))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (place, process.exitcode)
        finished.append(len(list((tmp_path / "codes").glob("codes-*.json"))))
        assert not (tmp_path / "codes" / "index.json").exists()
    assert finished == sorted(finished) and finished[-1] > 0
    make_codes(model_dir, of_folder(images), tmp_path / "codes", shard=6, max_rejected="1")
    assert {path.name: path.read_bytes() for path in (tmp_path / "codes").iterdir()} == whole
