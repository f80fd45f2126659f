"""Eight simulated devices for every test; set before jax starts its backend."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tests compile far more than they compute
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

from tests.miniature import model_dir  # noqa: F401 - a fixture


def pytest_collection_modifyitems(config, items):
    """Live parity needs torch: without the extra those tests are left out of the collection, not skipped one by one."""
    try:
        import torch  # noqa: F401
    except ImportError:
        config.hook.pytest_deselected(items=[i for i in items if "parity" in i.keywords])
        items[:] = [i for i in items if "parity" not in i.keywords]


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(0)
