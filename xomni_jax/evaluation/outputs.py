"""The model's side of an evaluation: opens the model, records the settings that decide its outputs, makes them and saves them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from xomni_jax.core.config import as_dict
from xomni_jax.core.distributed import connect, gather_json
from xomni_jax.core.preemption import StopRequested, StopSignal
from xomni_jax.evaluation.answering import answer
from xomni_jax.evaluation.generation import Generation
from xomni_jax.evaluation.run import EvalConfig, SuiteRun
from xomni_jax.evaluation.suite import Item, check_images
from xomni_jax.inference import MODELS, open_model
from xomni_jax.pipeline import XOmni
from xomni_jax.sharding.mesh import make_mesh

HASHED = 1 << 20  # bytes of the beginning and of the end of a file that go into a checkpoint's hash
VERSIONS = ("xomni_jax", "jax", "jaxlib", "flax", "transformers")
SAVERS = 4  # threads that compress images


def model_opener(config: EvalConfig) -> Callable[[], XOmni]:
    """A function that opens the configured model on its mesh, once."""

    @functools.cache
    def opened() -> XOmni:
        mesh = make_mesh(config.mesh)
        connect(mesh)
        return open_model(config.inference.model, mesh, config.inference if config.components else None)

    return opened


def make_outputs(run: SuiteRun, model: Callable[[], XOmni], stop: StopSignal) -> None:
    """Makes this process's outputs that do not exist yet.

    Raises:
      SuiteError: an image of a question is missing, or a prompt or image does not suit the model.
      RunError: the directory holds outputs of other settings.
      StopRequested: what is finished is kept.
    """
    check_images(run.items)
    suite, opened = run.suite, model()
    if suite.task == "generate":
        generation = Generation(opened, suite, run.config)
        _claim_settings(run, opened, generation.settings)
        _generate(run, generation, stop)
        return
    _claim_settings(run, opened, {"max_new_tokens": suite.max_new_tokens})
    left = _left(run)
    with run.appending("parts", "answered", len(left)) as add:
        for answers in answer(opened, suite, run.config.inference.batch, left):
            add({"id": item.id, "answer": text, "fitted": changed} for item, text, changed in answers)
            stop.check()


def _claim_settings(run: SuiteRun, model: XOmni, how: Mapping[str, Any]) -> None:
    """Records everything that decides the outputs, or raises RunError when the directory was begun with other settings.

    Data-parallel axes of the mesh are left out: each part computes in the same shapes, however many there are.
    """
    if not run.writes:
        return
    config, device = run.config, jax.devices()[0]
    settings = {
        "suite": run.suite.name,
        "data": run.data,
        "model": {"path": str(config.inference.model), "sha256": checkpoint_hash(config.inference.model)},
        "batch": config.inference.batch,
        **how,
        **({"computed": {name: as_dict(getattr(config.inference, name)) for name in ("decode", *MODELS)}} if config.components else {}),
        "mesh": {axis: model.mesh.shape[axis] for axis in ("fsdp", "tensor")},
        "device": f"{device.platform} {device.device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }
    run.directory.claim("settings.json", settings, "take another --out, or the settings that it was begun with")


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


def _left(run: SuiteRun) -> list[Item]:
    """This worker's items without outputs, the same on all its processes."""
    ids = {item.id for item in run.mine()} - set(run.outputs()) if run.writes else set()
    if run.process[1] > 1:
        ids = set(gather_json(sorted(ids))[0])
    return [item for item in run.mine() if item.id in ids]


def _generate(run: SuiteRun, generation: Generation, stop: StopSignal) -> None:
    """Draws images and saves them in the official layout; images are compressed while the next ones are drawn."""
    left, staging = _left(run), run.path / ".drawing" / run.worker
    if run.writes:
        shutil.rmtree(staging, ignore_errors=True)  # of a killed process
    with run.appending("parts", "drawn", len(left)) as add, ThreadPoolExecutor(SAVERS) as pool:
        saving: deque[list[Future]] = deque()
        for drawn in generation.draw(left):
            saving.append([pool.submit(_save, run, staging, *one) for one in drawn] if run.writes else [])
            stopping = stop.reached()
            while len(saving) > (0 if stopping else 1):
                add(future.result() for future in saving.popleft())
            if stopping:
                raise StopRequested
        add(future.result() for futures in saving for future in futures)
    if run.writes:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            staging.parent.rmdir()  # unless another worker still uses it


def _save(run: SuiteRun, staging: Path, item: Item, images: Sequence[Image.Image], more: Mapping[str, Any]) -> dict[str, Any]:
    """Saves the images of one item by way of an empty folder, which tells the file names of the suite's layout."""
    folder = staging / hashlib.sha256(item.id.encode()).hexdigest()[:16]
    run.suite.save(folder, item, images)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for name in names:
        target = run.path / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, target)
    shutil.rmtree(folder)
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.size).encode() + image.tobytes())
    files = [f"images/{name}" for name in names if name.endswith((".png", ".webp", ".jpg"))]
    return {"id": item.id, "files": files, "pixels": digest.hexdigest(), **more}
