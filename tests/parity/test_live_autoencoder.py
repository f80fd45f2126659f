"""Autoencoder against diffusers, computed now."""

import pytest

from tests.models.test_autoencoder import compare
from tests.parity.reference_autoencoder import outputs

pytestmark = pytest.mark.parity


def test_live():
    compare(outputs(seed=1))
