"""The flow sampler against diffusers, computed now."""

import pytest

from tests.parity.reference_flow import outputs
from tests.sampling.test_flow import compare

pytestmark = pytest.mark.parity


def test_live():
    compare(outputs(seed=1))
