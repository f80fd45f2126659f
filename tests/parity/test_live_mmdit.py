"""MMDiT against diffusers, computed now."""

import dataclasses

import pytest

from tests.models.test_mmdit import CFG, compare
from tests.parity.reference_mmdit import outputs

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("change", [dict(), dict(remat="full", query_chunk=5, unroll=2), dict(remat="dots")], ids=str)
def test_live(change):
    """What saves memory or time changes neither the velocity nor a gradient."""
    compare(outputs(seed=1), dataclasses.replace(CFG, **change))
