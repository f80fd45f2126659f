"""One of two real processes, or the only one, to compare with: everything that needs a second one and no signal, in one start-up.

It writes what it finds for the test.

python -m tests.processes.member FOLDER, started by launch/local.py; FOLDER/plan.json says which model and services.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from tests import kept_programs
from tests.miniature import configs, stage_changes
from xomni_jax.checkpoint.store import save_component
from xomni_jax.cli.train import run_in_group
from xomni_jax.core import distributed
from xomni_jax.core.config import Changes
from xomni_jax.core.process_group import ProcessGroup
from xomni_jax.data.rendered import RenderedConfig
from xomni_jax.data.sources import DataSection, batches
from xomni_jax.pipeline import XOmni
from xomni_jax.sharding import arrays
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import MESH_AXES
from xomni_jax.training.run import run_stage
from xomni_jax.training.stage import resolve

B = 8
MESHES = {
    "fsdp": dict(fsdp=4),
    "fsdp and tensor": dict(fsdp=2, tensor=2),
    "tensor across processes": dict(tensor=4),
}


def interleaved() -> Mesh:
    """As a slice's topology may order devices: neighbours on the mesh are of different processes."""
    devices = np.array(jax.devices()).reshape(2, 2).T.reshape(1, 1, 4, 1)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def rows_on_meshes() -> dict:
    """Batches from hosts' rows and back, and who has what."""
    out = {}
    meshes = {name: make_mesh(axes) for name, axes in MESHES.items()}
    for name, mesh in {**meshes, "interleaved": interleaved()}.items():
        rows, owned = arrays.local_rows(mesh, B), arrays.owned_rows(mesh, B)
        table = np.arange(B * 3, dtype=np.float32).reshape(B, 3)
        x = arrays.spread(mesh, table[rows], B)
        data = next(iter(batches(DataSection("rendered", RenderedConfig()), 5, B, rows=rows, prefetch=0)))
        out[name] = {
            "rows": rows,
            "owned": owned,
            "whole": arrays.whole(x).tolist(),
            "here": arrays.rows_here(x, rows).tolist(),
            "sum": float(jax.jit(lambda x: (x * x).sum())(x)),
            "shared": arrays.share({"id": data["id"]}, rows, B)["id"],
        }
    return out


def sft(folder: Path, name: str, model: str, *overrides: str) -> ConfigDict:
    """What a configuration of SFT changes to cut it down."""
    return stage_changes("sft", folder / name, f"init_from={model}", "steps=3", "grid_every=0", "mesh.fsdp=2", *overrides)


def grpo(folder: Path, name: str, model: str, url: str, *overrides: str) -> ConfigDict:
    """The same of GRPO; one reward."""
    rewards = (f"rewards.ocr.urls=('{url}',)", "rewards.shapes.weight=None", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.01")
    return stage_changes("grpo", folder / name, f"init_from={model}", *rewards, "steps=2", "grid_every=0", "mesh.fsdp=2", *overrides)


def run_changed(changes: ConfigDict, group: ProcessGroup | None) -> None:
    """A whole run."""
    run_stage(resolve(Changes(changes.to_dict())), group=group)


def among_several(folder: Path, model: str) -> dict:
    """What only several processes can show."""
    out = {"values": distributed.gather_json({"a": ["x" * 3000, jax.process_index()]}), "meshes": rows_on_meshes()}
    # A component that one process wrote, written again by two.
    params = XOmni(model, make_mesh(dict(fsdp=2, tensor=2))).params("siglip_vq")
    kernel = params["vit"]["blocks"]["fc1"]["kernel"]
    save_component(folder / "copy", "siglip_vq", params, configs()["siglip_vq"])
    return out | {"kernel": [kernel.size, [s.data.size for s in kernel.addressable_shards]]}


def main(folder: Path) -> None:
    """The whole programme. What FOLDER already holds of a run is gone on with."""
    kept_programs.install()
    plan = json.loads((folder / "plan.json").read_text())
    group = distributed.start({"config.seed": 0})  # launch/local.py sets the environment of one process, too

    def programme():
        index, several, model = jax.process_index(), jax.process_count() > 1, plan["model"]
        out = {"description": distributed.description()} | (among_several(folder, model) if several else {})
        run_changed(sft(folder, "sft", model), group)
        if (folder / "moved").is_dir():
            run_changed(sft(folder, "moved", model), group)
        run_changed(grpo(folder, "grpo", model, plan["urls"][index], f"grid_every={2 if several else 0}"), group)
        run_changed(grpo(folder, "apart", model, plan["urls"][index], "mesh.tensor=1", "decoder_mesh.fsdp=2"), group)
        (folder / f"out_{index}.json").write_text(json.dumps(out))

    run_in_group(group, programme)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
