"""Meshes over several TPU slices: only replica lies between them. The slices are descriptions that libtpu makes, not hardware."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

SLICES_OF_EACH_REPLICA = """
import json, sys
from jax.experimental import topologies
from xomni_jax.sharding.mesh import make_mesh
topology, slices, axes = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
try:
    mesh = make_mesh(axes, devices)
    slices_of_each = [sorted({getattr(d, "slice_index", 0) for d in replica.ravel()}) for replica in mesh.devices]
    print(json.dumps([mesh.devices.shape, slices_of_each, len({d.id for d in mesh.devices.ravel()})]))
except ValueError as e:
    print(json.dumps(str(e)))
"""


def made(*case):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    }
    done = subprocess.run(
        [sys.executable, "-c", SLICES_OF_EACH_REPLICA, json.dumps(case)],
        env=env | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    "case, result",
    [
        (("v5e:4x4", 2, {"replica": 2, "data": 4, "fsdp": 4}), [[2, 4, 4, 1], [[0], [1]], 32]),
        (("v5p:2x2x2", 2, {"replica": 4, "fsdp": -1, "tensor": 2}), [[4, 1, 2, 2], [[0], [0], [1], [1]], 16]),
        (("v6e:4x4", 1, {"data": 1, "fsdp": 8, "tensor": 2}), [[1, 1, 8, 2], [[0]], 16]),
    ],
)
def test_a_replica_lies_in_one_slice(case, result):
    assert made(*case) == result


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_other_axes_do_not_lie_between_slices():
    assert "replica=1 does not divide over 2 slices" in made("v5e:4x4", 2, {"fsdp": -1})
