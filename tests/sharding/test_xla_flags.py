"""The table of compiler flags: one source, printed for scripts and shown in the documentation, and known to libtpu."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xomni_jax.sharding.xla_flags import CHIPS, FLAGS, chip_of, flags_of, libtpu_init_args, main, markdown_table

ROOT = Path(__file__).parents[2]
TOPOLOGY = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Loads libtpu with the flags, as a process on a slice does, and compiles a sharded matmul for that chip.
COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices), ("fsdp",))
w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
jax.jit(lambda x, w: jnp.sum(x @ w)).trace(w, w).lower(lowering_platforms=("tpu",)).compile()
print("compiled")
"""


def compile_with(chip, args):
    env = os.environ | {"LIBTPU_INIT_ARGS": args, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    env |= {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE, TOPOLOGY[chip]], env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip", CHIPS)
def test_libtpu_knows_every_flag(chip):
    said = compile_with(chip, libtpu_init_args(chip, slices=2))
    assert "compiled" in said, said


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_refuses_a_flag_it_does_not_know():
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in compile_with("v6e", "--xla_tpu_no_such_flag=true")


def test_documentation_shows_this_table():
    assert markdown_table() in (ROOT / "launch/README.md").read_text()


def test_every_flag_has_a_chip_and_a_reason_and_is_set_once():
    assert all(set(f.chips) <= set(CHIPS) and f.chips and len(f.reason) > 20 for f in FLAGS)
    for chip in CHIPS:
        names = [f.name for f in flags_of(chip, slices=2)]
        assert len(names) == len(set(names)), chip


def test_command_line(capsys):
    assert main(["v5litepod-16"]) == 0
    alone = capsys.readouterr().out.split()
    assert alone == [f"--{f.name}={f.value}" for f in FLAGS if "v5e" in f.chips and not f.multislice]
    main(["v5e", "--slices", "2"])
    assert set(capsys.readouterr().out.split()) - set(alone) == {f"--{f.name}={f.value}" for f in FLAGS if f.multislice}
    for words, sentence in [(["gpu-8"], "is no TPU slice"), ([], "name a slice"), (["v4", "--slices", "0"], "must be at least 1")]:
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert sentence in capsys.readouterr().err


def test_names_of_slices():
    assert [chip_of(n) for n in ("v6e-64", "V5P-64", "v5p:2x4x4", "v5litepod-256", "tpu7x-128", "v4")] == [
        "v6e",
        "v5p",
        "v5p",
        "v5e",
        "tpu7x",
        "v4",
    ]
