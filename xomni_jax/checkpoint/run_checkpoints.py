"""The resumable states of a run, with sums that tell a damaged one."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from xomni_jax.checkpoint.store import CheckpointError, bit_sum, reading, writing
from xomni_jax.core.distributed import gather_json


class RunCheckpoints:
    """The resumable states of one training run: train state, data iterator and counters, saved together and atomically.

    A sum over the bits of all arrays and of the counters is stored with them, since TensorStore returns an array with a changed byte
    without an error.
    """

    def __init__(self, directory: str | Path, keep: int = 2, keep_every: int = 0):
        """Keeps the newest `keep`, and those of steps that are multiples of `keep_every` (0: no others)."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self.directory = Path(directory).absolute()
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The newest step, or None. A save that was cut off does not count."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, data: Mapping[str, Any], wait: bool = False) -> None:
        """Starts an asynchronous save; `wait` blocks until it is on disk. A step that is already saved is not saved again.

        Raises:
          CheckpointError: this save, or the one before, cannot be written.
        """
        if step not in self.manager.all_steps():
            stored = {"data": dict(data), "sum": checksum(state, data)}
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(stored))
            # Without force, Orbax silently skips a save that comes while another is being written, and each process decides for itself.
            writing(self.directory, lambda: self.manager.save(step, args=args, force=True))
        if wait:
            writing(self.directory, self.manager.wait_until_finished)

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, data) of the newest step that is whole, with the shapes, dtypes and shardings of `abstract_state`.

        Damaged steps after it are renamed to STEP.damaged, with a line of output for each.

        Raises:
          CheckpointError: there is no step, or none of them is whole.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                state, data = self._read(step, abstract_state)
            except CheckpointError as e:
                damaged[step] = str(e)
                continue
            self._set_aside(damaged, step)
            return step, state, data
        if not damaged:
            raise CheckpointError(f"{self.directory}: no checkpoint to resume from")
        newest = max(damaged)
        others = "the only checkpoint" if len(damaged) == 1 else "as can none of the earlier ones"
        raise CheckpointError(
            f"{self.directory / str(newest)}: cannot be restored ({damaged[newest]}), {others}; restore the folder from a copy, "
            "or start again with another run_dir"
        )

    def close(self) -> None:
        """Waits for pending saves and releases the manager."""
        try:
            writing(self.directory, self.manager.wait_until_finished)
        finally:
            self.manager.close()

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data) of a step. CheckpointError, in all processes if in one, with the reason why it cannot be read."""
        folder, why = self.directory / str(step), None
        try:
            # Not through the manager, which waits for the other processes before it returns: one of them may have failed.
            handler = ocp.StandardCheckpointHandler()
            state = reading(lambda: handler.restore(folder / "state", args=ocp.args.StandardRestore(abstract_state)), "{reason}")
            stored = reading(lambda: dict(json.loads((folder / "data" / "metadata").read_text())), "{reason}")
        except CheckpointError as e:
            why = str(e)
        if why := next(filter(None, gather_json(why)), None):
            raise CheckpointError(why)
        if stored.keys() != {"data", "sum"}:
            raise CheckpointError("it was written by another version of xomni_jax")
        data = stored["data"]
        if stored["sum"] != checksum(state, data):
            raise CheckpointError("its content has changed since it was written")
        return state, data

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
        """Renames damaged steps, so that the run can save these steps again."""
        for step, why in damaged.items():
            if jax.process_index() == 0:
                folder = self.directory / str(step)
                aside = folder.with_name(f"{step}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                print(f"{folder} is damaged ({why}); going on from step {good}, the damaged folder is now {aside.name}", flush=True)
        if damaged:
            gather_json(None)  # process 0 has renamed them
            self.manager.reload()


def checksum(state: Any, data: Mapping[str, Any]) -> list[int]:
    """What changes when a byte of a saved state or of its data changes."""
    return [int(bit_sum(state)), zlib.crc32(json.dumps(data, sort_keys=True).encode())]
