"""The model's side of an evaluation command: one model on one mesh for all its suites, and the settings that decide its outputs."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from xomni_jax.core.config import as_dict
from xomni_jax.core.distributed import connect
from xomni_jax.core.preemption import StopSignal
from xomni_jax.evaluation import runner
from xomni_jax.evaluation.answering import Answering
from xomni_jax.evaluation.generation import DrawConfig, Generation
from xomni_jax.evaluation.suite import Suite, check_images
from xomni_jax.inference import MODELS, InferenceConfig, open_model
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sharding.mesh import make_mesh

SAMPLED = 1 << 20  # bytes of the beginning and of the end of a file that go into a checkpoint's hash
VERSIONS = ("xomni_jax", "jax", "jaxlib", "flax", "transformers")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where, and how it draws. Sizes that are None: the suite's, else the model's own."""

    path: str
    mesh: Mapping[str, int] | None = None
    config: InferenceConfig | None = None  # of inference: how components are computed
    height: int | None = None
    width: int | None = None
    seed: int = 1234
    sampling: SamplingConfig = SamplingConfig(1.0, 50, 1.0, 0.03, 1.0)
    batch: int = 16
    decode_batch: int = 16


class ModelSession:
    """Makes outputs for suites. The model is opened when first needed."""

    def __init__(self, options: ModelOptions):
        self.options = options

    @functools.cached_property
    def model(self) -> XOmni:
        """The model on its mesh."""
        mesh = make_mesh(self.options.mesh)
        connect(mesh)
        return open_model(self.options.path, mesh, self.options.config)

    def run(self, work: runner.Work, stop: StopSignal) -> None:
        """Makes this process's outputs.

        Raises:
          RunError: the directory holds outputs of other settings.
        """
        suite, o = work.suite, self.options
        check_images(work.items)
        if suite.task == "answer":
            answering = Answering(self.model, suite.name, o.batch, suite.max_new_tokens)
            self.claim(work, {"max_new_tokens": suite.max_new_tokens})
            runner.answer(work, answering, stop)
        else:
            config = DrawConfig(*self.size(suite), o.seed, o.sampling, suite.repeats, o.batch, o.decode_batch)
            generation = Generation(self.model, suite.name, config)
            self.claim(work, asdict(config))
            runner.generate(work, generation, stop)

    def claim(self, work: runner.Work, how: Mapping[str, Any]) -> None:
        """Records the settings, or refuses a directory that has others."""
        if work.writes:
            work.run.claim("settings.json", self.settings(work, how), "take another --out, or the settings that it was begun with")

    def size(self, suite: Suite) -> tuple[int, int]:
        """Height and width of a suite's images."""
        own = self.model.description.get("settings", {}).get("size", {})
        own = suite.size or (own.get("height", 1152), own.get("width", 1152))
        return self.options.height or own[0], self.options.width or own[1]

    def settings(self, work: runner.Work, how: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides the outputs. Data-parallel axes of the mesh are left out: each part works on the same shapes."""
        device, mesh = jax.devices()[0], self.model.mesh.shape
        return {
            "suite": work.suite.name,
            "data": work.data,
            "model": {"path": str(self.options.path), "sha256": self.checkpoint_hash},
            "batch": self.options.batch,
            **how,
            **(
                {"computed": {name: as_dict(getattr(config, name)) for name in ("decode", *MODELS)}}
                if (config := self.options.config)
                else {}
            ),
            "mesh": {axis: mesh[axis] for axis in ("fsdp", "tensor")},
            "device": f"{device.platform} {device.device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        }

    @functools.cached_property
    def checkpoint_hash(self) -> str:
        """SHA-256 over the names and sizes of a model directory's files and over the first and last MiB of each."""
        root, digest = Path(self.options.path), hashlib.sha256()
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(root).as_posix()}\n{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLED))
                file.seek(max(SAMPLED, size - SAMPLED))
                digest.update(file.read(SAMPLED))
        return digest.hexdigest()
