"""MMDiT against diffusers, computed now."""

import pytest

from tests.models.test_mmdit import compare
from tests.parity.reference_mmdit import outputs

pytestmark = pytest.mark.parity


def test_live():
    compare(outputs(seed=1))
