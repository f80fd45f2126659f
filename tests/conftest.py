"""Eight simulated devices for every test; set before jax starts its backend."""

import atexit
import glob
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tests compile far more than they compute
# In one piece, and with the older emitters where there are some: a third less time to compile, and speed does not matter here.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")),
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Stages compile the same programs again in every run, in this process, in its workers and in those that tests start.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="xomni-tests-xla-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

from tests import kept_programs
from tests.miniature import ROOT, model_dir  # noqa: F401 - a fixture

kept_programs.install()


def pytest_collection_modifyitems(config, items):
    """Marks the modules in slow.txt and puts them first, in its order.

    Tests whose peer is not here are left out: live parity without torch, tesseract without its data.
    """
    slow = {name: n for n, name in enumerate((ROOT / "tests" / "slow.txt").read_text().split())}
    place = {item: slow.get(str(item.path.relative_to(ROOT)), len(slow)) for item in items}
    for item in items:
        if place[item] < len(slow):
            item.add_marker(pytest.mark.slow)
    items.sort(key=place.get)  # the longest first, so that no worker is left with one at the end
    missing = set() if importlib.util.find_spec("torch") else {"parity"}
    folders = [os.environ.get("TESSDATA_PREFIX", "/none"), *glob.glob("/usr/share/tesseract-ocr/*/tessdata")]
    if not any(os.path.isfile(os.path.join(folder, "eng.traineddata")) for folder in folders):
        missing.add("tesseract")
    left_out = [item for item in items if missing & set(item.keywords)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def own_programs():
    """For a test that changes what programs are made of."""
    kept_programs.forget()
    yield
    kept_programs.forget()


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(0)
