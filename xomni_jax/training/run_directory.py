"""The directory of a training run: one writer at a time, and a command that continues the run which it holds."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xomni_jax.checkpoint.store import checkpoint_hash, read_model_json, write_json
from xomni_jax.core.config import ConfigError, as_dict, defaults, flat
from xomni_jax.core.folders import lock, why_taken
from xomni_jax.core.tables import bytes_text
from xomni_jax.rewards.client import ClientConfig
from xomni_jax.training.stage import RunConfig

MAY_CHANGE = (
    "run_dir",
    "init_from",
    "steps",
    "log_every",
    "save_every",
    "save_minutes",
    "grid_every",
    "wandb",
    "keep",
    "keep_every",
    "watch",
)
CLIENT_FIELDS = {field.name for field in dataclasses.fields(ClientConfig)}


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Makes the directory of a run and keeps other processes from training in it. One process of a run claims it for all.

    The lock ends with the process. Between hosts it works where the file system has locks (NFS, Lustre), not on a mounted bucket.

    Raises:
      ConfigError: another process trains here, the folder holds something else, or it cannot be written.
    """
    if taken := why_taken(run_dir, "training run"):
        raise ConfigError(f"config.run_dir={run_dir} {taken}; name another folder for the run")
    ready = False
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "lock").open("a+") as file:
            if not lock(file):
                file.seek(0)
                raise ConfigError(f"config.run_dir={run_dir}: {file.read().strip()} trains here; wait for it, or name another folder")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            ready = True
            try:
                yield
            finally:
                if [path.name for path in run_dir.iterdir()] == ["lock"]:  # refused before it began
                    shutil.rmtree(run_dir)
    except OSError as e:
        if ready and e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # not about this folder
        remedy = "make room, the same command goes on" if ready else "mend that, or name another folder"
        raise ConfigError(f"config.run_dir={run_dir} cannot be written ({e.strerror or e}); {remedy}") from None


def check_continues(cfg: RunConfig) -> None:
    """Refuses a configuration that differs from that of the run's checkpoints. Without checkpoints there is nothing to continue.

    A resumed run may change what does not affect a step, such as logging intervals and the addresses of services. It may also change
    `steps` to train longer; schedules then follow the new length. Where the run and its model lie does not matter: the model is compared
    by its content. A key that is newer than the run may have its default.

    Raises:
      ConfigError: the run was started with another value of some key, or with another model.
    """
    run_dir = Path(cfg.run_dir)
    path = run_dir / "config.json"
    if not path.is_file() or not any(folder.name.isdigit() for folder in (run_dir / "checkpoints").glob("*")):
        return
    try:
        old = flat(json.loads(path.read_text()))
    except ValueError:
        raise ConfigError(f"{path} is damaged; restore it, or name another run_dir") from None
    new = flat(plain(described(cfg)))
    old = {key: value for key, value in flat(plain(defaults(cfg))).items() if key in new} | old
    for key in sorted(old.keys() | new.keys()):
        if not may_change(key) and not same(old.get(key), new.get(key)):
            was, now = (f"{values.get(key)!r}" for values in (old, new))
            if key == "init_from_sha256":
                key, was, now = "init_from", f"{old['init_from']!r}", f"another model, in {cfg.init_from!r}"
            raise ConfigError(
                f"{run_dir}: this run was started with config.{key}={was}, now it is {now}; use another run_dir or delete this one"
            )


def save_config(cfg: RunConfig) -> None:
    """Writes RUN/config.json: every key with its value, and a hash of the model that the run starts from."""
    write_json(Path(cfg.run_dir) / "config.json", plain(described(cfg)))


def plain(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree as it is read back from a JSON file."""
    return json.loads(json.dumps(tree, default=str))


def described(cfg: RunConfig) -> dict[str, Any]:
    """What RUN/config.json holds."""
    if cfg.init_from:
        read_model_json(cfg.init_from)  # says what is wrong with it
    return as_dict(cfg) | {"init_from_sha256": checkpoint_hash(cfg.init_from) if cfg.init_from else ""}


def may_change(key: str) -> bool:
    """Whether a run may be resumed with another value of this key."""
    return key in MAY_CHANGE or is_address(key)


def is_address(key: str) -> bool:
    """Whether a key of a reward says how its service is reached, which may differ from start to start and from host to host."""
    return ".rewards." in f".{key}" and key.rpartition(".")[2] in CLIENT_FIELDS


def same(old: Any, new: Any) -> bool:
    """Whether two values of a key mean the same. A path may be spelled differently; a class of the user's own may lie elsewhere."""
    if old == new or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    return os.path.realpath(old) == os.path.realpath(new) or ".py:" in old and os.path.basename(old) == os.path.basename(new)


def check_room(run_dir: Path, state_bytes: int) -> None:
    """Refuses a run whose first checkpoint does not fit on the disk."""
    if (free := shutil.disk_usage(run_dir).free) < state_bytes:
        raise ConfigError(
            f"config.run_dir={run_dir}: a checkpoint takes {bytes_text(state_bytes)}, the disk has {bytes_text(free)} left; make room"
        )
