"""Values that follow from the code and a few settings, kept between processes: traced programs and shapes of parameters.

JAX keeps what XLA compiled; tracing and lowering a model takes longer than reading that. Both lie in JAX's folder of compiled programs
($JAX_COMPILATION_CACHE_DIR, which the command line sets to ~/.cache/xomni_jax/xla); JAX_ENABLE_COMPILATION_CACHE=false turns both off.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax import export

T = TypeVar("T")


def kept(about: Any, make: Callable[[], T]) -> T:
    """What `make()` returns, or returned in an earlier process for an equal `about`; it must be picklable."""
    if not jax.config.jax_enable_compilation_cache or not jax.config.jax_compilation_cache_dir:
        return make()
    settings = sorted((name, repr(value)) for name, value in jax.config.values.items())
    key = hashlib.sha256(repr((about, source_digest(), jax.__version__, settings)).encode()).hexdigest()
    path = Path(jax.config.jax_compilation_cache_dir) / "traced" / key
    with suppress(OSError):
        return pickle.loads(path.read_bytes())
    value = make()
    with suppress(OSError):  # a full disk is no reason to fail
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps(value))
        part.replace(path)
    return value


@functools.cache
def source_digest() -> str:
    """Hash of the package's source, so that no other version's value is taken."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def kept_program(fn: Callable[..., Any], about: Any, donate: int | None = None) -> Callable[..., Any]:
    """A jitted function of arrays on one device that is traced once for each set of shapes, whatever the number of processes.

    Args:
      about: everything but the arguments' shapes on which the program depends; compared by its `repr`.
      donate: the argument that may be overwritten.
    """
    programs: dict[Any, tuple[Callable[..., Any], Any]] = {}

    def call(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        shapes = str(tree), tuple((x.shape, str(x.dtype)) for x in leaves)
        if shapes not in programs:
            data, out = kept((about, shapes), lambda: _traced(fn, args))
            before = [len(jax.tree.leaves(arg)) for arg in args]
            first = sum(before[:donate])
            donated = () if donate is None else tuple(range(first, first + before[donate]))
            programs[shapes] = jax.jit(export.deserialize(bytearray(data)).call, donate_argnums=donated), out
        program, out = programs[shapes]
        return jax.tree.unflatten(out, program(*leaves))

    return call


def _traced(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bytes, Any]:
    """The program on flat lists of arrays, serialised, and the structure of its results."""
    leaves, tree = jax.tree.flatten(args)
    results = []

    def flat(*leaves: Any) -> list[Any]:
        out, structure = jax.tree.flatten(fn(*jax.tree.unflatten(tree, leaves)))
        results.append(structure)  # while it is traced: tracing takes seconds, and is done once
        return out

    return bytes(export.export(jax.jit(flat))(*leaves).serialize()), results[0]
