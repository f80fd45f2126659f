"""Model directories on disk: one Orbax tree per component.

A model directory is what `xomni_jax.load` takes:

    DIR/model.json        format, and for every component its configuration and provenance; settings, such as the decoder's steps;
                          released: the published configurations that the model was converted from, which an export restores
    DIR/<component>/      Orbax tree of the component's parameters (see `models.registry` for the components)
    DIR/tokenizer/        the text tokenizer, as transformers saves it
    DIR/tokenizer_t5/     the tokenizers of the decoder's T5 and CLIP (FLUX.1-dev's tokenizer_2 and tokenizer), each optional:
    DIR/tokenizer_clip/     without its folder an encoder reads the text tokenizer's ids, as in the tiny model
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from xomni_jax.checkpoint.conversion import flatten, unflatten
from xomni_jax.core.distributed import explain_silence
from xomni_jax.core.folders import write_text
from xomni_jax.models.section import COMPUTATION

FORMAT = 1
DAMAGED = "cannot be read, it is incomplete or damaged ({reason}); restore it or write it again"
HASHED = 1 << 20  # bytes of the beginning and of the end of a file that go into a checkpoint's hash
TOKENIZERS = ("tokenizer", "tokenizer_t5", "tokenizer_clip")

# Orbax logs what it raises as well, once in each of its threads, with a page of traceback.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or does not fit; the message says which, where, and what to do."""


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def config_to_json(cfg: Any) -> dict[str, Any]:
    """A model's config dataclass as JSON: dtypes by name, tuples as lists."""

    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value if value is None or isinstance(value, (bool, int, float, str)) else jnp.dtype(value).name

    return {f.name: plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg) if f.init}


RENAMED_FIELDS = {"at_once": "microbatch"}  # {name in older model directories: name}


def config_from_json(cls: type, data: Mapping[str, Any], where: str) -> Any:
    """The inverse of `config_to_json`; the error names an unknown or missing field."""
    data = {RENAMED_FIELDS.get(name, name): value for name, value in data.items()}
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(data) - names)
    if unknown:
        raise CheckpointError(f"{where}: {cls.__name__} has no field {unknown[0]!r}; the checkpoint is of another version")

    def typed(name, value):
        if name.endswith("dtype") and isinstance(value, str):
            return jnp.dtype(value)
        return tuple(typed("", v) for v in value) if isinstance(value, list) else value

    try:
        return cls(**{name: typed(name, value) for name, value in data.items()})
    except TypeError as e:
        raise CheckpointError(f"{where}: {e}") from None


def read_model_json(directory: str | Path) -> dict[str, Any]:
    """The description of a model directory.

    Raises:
      CheckpointError: not a model directory, unreadable, or of an unknown format.
    """
    path = Path(directory) / "model.json"
    if not path.parent.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a model directory (it holds model.json)")
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no model.json here; give a model directory, such as RUN/model of a training run, "
            "or make one of a downloaded checkpoint with xomni convert"
        )
    try:
        data = json.loads(path.read_text())
    except ValueError as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e}); restore it from the run that wrote it") from None
    if not isinstance(data, dict) or not isinstance(data.get("components"), dict):
        raise CheckpointError(f"{path}: lists no components; restore it from the run that wrote it")
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {data.get('format')!r}, this version reads format {FORMAT}")
    return data


def checkpoint_hash(directory: str | Path) -> str:
    """SHA-256 over the names and sizes of a model directory's files and over the first and last MiB of each."""
    root, digest = Path(directory), hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}\n{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(HASHED))
            file.seek(max(HASHED, size - HASHED))
            digest.update(file.read(HASHED))
    return digest.hexdigest()


def model_json_or_new(directory: str | Path) -> dict[str, Any]:
    """The description of a model directory; that of an empty model where there is none yet."""
    return read_model_json(directory) if (Path(directory) / "model.json").is_file() else {"format": FORMAT, "components": {}}


def save_component(directory: str | Path, name: str, params: Any, config: Any, note: Mapping[str, Any] | None = None) -> None:
    """Writes one component's parameters and records it in model.json, replacing an earlier one of that name.

    Args:
      directory: the model directory, made if needed.
      name: a name of `models.registry`.
      params: the parameter tree, empty for a component without parameters; every process calls this with its shards.
      config: the config dataclass that rebuilds the component.
      note: JSON-able provenance (run, step, metrics).
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    if jax.tree.leaves(params):

        def write() -> None:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(directory / name, params, force=True)

        writing(directory / name, write)
    if jax.process_index() == 0:
        data = model_json_or_new(directory)
        data["components"][name] = {"config": config_to_json(config), "note": dict(note or {})}
        write_json(directory / "model.json", data)


def save_settings(directory: str | Path, **settings: Any) -> None:
    """Records in model.json how the model is run by default: {name: frozen dataclass}."""
    data = read_model_json(directory)
    data.setdefault("settings", {}).update({name: config_to_json(value) for name, value in settings.items()})
    write_json(Path(directory) / "model.json", data)


def copy_components(source: str | Path, target: str | Path, names: tuple[str, ...]) -> None:
    """Copies components, all tokenizers, settings and published configurations of one model directory into another, unchanged."""
    source, target = Path(source), Path(target)
    data, out = read_model_json(source), model_json_or_new(target)
    target.mkdir(parents=True, exist_ok=True)
    out["components"] |= {name: data["components"][name] for name in names if name in data["components"]}
    out |= {key: data[key] | out.get(key, {}) for key in ("settings", "released") if key in data}
    for name in (*names, *TOKENIZERS):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    write_json(target / "model.json", out)


def load_component(directory: str | Path, name: str, wanted: Any, dtype: Any = None) -> Any:
    """Restores one component into the shapes and shardings of `wanted` (tree of ShapeDtypeStruct).

    The stored dtype is kept unless `dtype` is given. The cast then happens here, on the device; Orbax would cast silently.

    Raises:
      CheckpointError: missing, truncated, or other keys or shapes than the model has.
    """
    path = Path(directory).absolute() / name
    if not path.is_dir():
        raise CheckpointError(f"{path}: this model directory has no {name}; train or convert it first")

    def read():
        with ocp.StandardCheckpointer() as checkpointer:
            stored, expected = array_metadata(checkpointer, path), flatten(wanted)
            check_fit(path, stored, expected)
            target = {k: jax.ShapeDtypeStruct(v.shape, stored[k].dtype, sharding=v.sharding) for k, v in expected.items()}
            return checkpointer.restore(path, unflatten(target))

    params = reading(read, f"{path}: {DAMAGED}")
    return params if dtype is None else jax.jit(lambda t: jax.tree.map(lambda x: x.astype(dtype), t), donate_argnums=0)(params)


def fingerprint(name: str, params: Any, config: Any) -> str:
    """Identifies a component by its values and its config, however it is stored and split over devices: 16 hexadecimal digits."""
    about = {key: value for key, value in config_to_json(config).items() if key not in COMPUTATION}
    arrays = flatten(params)
    sums = {key: [arrays[key].shape, arrays[key].dtype.name, int(total)] for key, total in placed_sums(arrays).items()}
    return hashlib.sha256(json.dumps([name, about, sums], sort_keys=True).encode()).hexdigest()[:16]


class QuietEventLoop(asyncio.SelectorEventLoop):
    """An event loop that prints nothing after a failed read.

    Orbax closes its loop at the first array that cannot be read. The coroutines of the other arrays are then abandoned, and TensorStore's
    threads report to a closed loop; Python would print a traceback for each. This loop cancels the coroutines before it closes, as
    `asyncio.run` does, and drops late reports.
    """

    def close(self) -> None:
        while not self.is_running() and not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.Handle:
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            return asyncio.Handle(callback, args, self, context)  # which nothing will run


class QuietEventLoopPolicy(asyncio.DefaultEventLoopPolicy):
    """Makes Orbax use `QuietEventLoop`."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return QuietEventLoop()


READ_LOCK = threading.RLock()  # the policy is global to the process


def reading(action: Callable[[], Any], sentence: str) -> Any:
    """Runs a read through Orbax; a failure is raised as a CheckpointError of `sentence`, with the cause in place of {reason}.

    Errors of the JAX runtime, such as too little memory or a process that does not answer, pass unchanged: the files are not at fault.
    """
    with READ_LOCK:
        before = asyncio.get_event_loop_policy()
        asyncio.set_event_loop_policy(QuietEventLoopPolicy())
        try:
            return action()
        except (CheckpointError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:  # noqa: BLE001 - many kinds for damaged files; the user needs the directory, not the kind
            if explain_silence(e):
                raise
            raise CheckpointError(sentence.replace("{reason}", first_line(e))) from None
        finally:
            asyncio.set_event_loop_policy(before)


def writing(directory: Path, action: Callable[[], Any]) -> None:
    """Runs a write through Orbax; a failure is raised as a CheckpointError, unless a process did not answer."""
    try:
        action()
    except Exception as e:  # noqa: BLE001 - many kinds; the user needs the directory and the cause
        if explain_silence(e):
            raise
        why = "the disk is full" if re.search(r"No space left|Disk quota|RESOURCE_EXHAUSTED", str(e)) else first_line(e)
        raise CheckpointError(f"{directory}: cannot be written ({why}); mend that, and run the same command again") from None


def first_line(e: Exception) -> str:
    """The beginning of an error of Orbax, which may fill a page."""
    return str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__


def array_metadata(checkpointer: ocp.StandardCheckpointer, path: Path) -> dict[str, Any]:
    """{"a/b/c": object with shape and dtype} of a stored tree."""
    metadata = checkpointer.metadata(path)
    for attribute in ("item_metadata", "tree"):  # None where files are missing
        metadata = getattr(metadata, attribute, None)
    if metadata is None:
        raise ValueError("the list of its arrays is missing")
    return flatten(metadata)


def check_fit(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses a stored tree whose keys or shapes differ from the model's; the error names the first."""
    missing, extra = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or extra:
        which = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which the model has not"
        raise CheckpointError(f"{path}: {which} ({len(missing)} missing, {len(extra)} unknown); it belongs to another configuration")
    for key in sorted(expected):
        if tuple(stored[key].shape) != tuple(expected[key].shape):
            raise CheckpointError(f"{path}: {key} has shape {tuple(stored[key].shape)}, the model wants {tuple(expected[key].shape)}")


@jax.jit
def bit_sum(tree: Any) -> jax.Array:
    """Sum of all values of a tree, taken as unsigned integers, modulo 2^32: the same for every sharding."""
    return sum(jnp.sum(_bits(x)) for x in jax.tree.leaves(tree))


@jax.jit
def placed_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The sum of each array as of `bit_sum`, but every value counts with a weight that depends on its place."""

    def placed_sum(x: jax.Array) -> jax.Array:
        place = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
        return jnp.sum(_bits(x) * (jnp.uint32(2654435761) * place + 1))

    return jax.tree.map(placed_sum, arrays)


def _bits(x: jax.Array) -> jax.Array:
    return x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
