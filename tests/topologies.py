"""TPU slices that are not there, for ahead-of-time compilation."""

from __future__ import annotations

import importlib.util
import os

import pytest

from xomni_jax.sharding.mesh import make_mesh


def tpu_mesh(topology: str, **axes: int):
    """A mesh over the devices of a slice; skips the test where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    # No cloud is asked, and a second process may load the library.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    return make_mesh(axes, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
