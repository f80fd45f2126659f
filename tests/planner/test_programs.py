"""The compiled programs of the released configurations stay what they are, until somebody means to change them."""

import json

import jax
import pytest

from tests.planner import programs
from xomni_jax.planner import gates


@pytest.mark.parametrize("gate", [g for g in gates.GATES if g.topology == "v6e-64"], ids=lambda g: g.config)
def test_the_programs_of_a_slice(gate):
    """All slices: python -m tests.planner.programs."""
    pytest.importorskip("libtpu")
    kept = json.loads(programs.KEPT.read_text())
    if kept["jax"] != jax.__version__:
        pytest.skip(f"the hashes are those of jax {kept['jax']}")
    found = dict(programs.hashes(gate))
    assert found == {name: value for name, value in kept["programs"].items() if name.startswith(f"{gate.config} {gate.topology} ")}
