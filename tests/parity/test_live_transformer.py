"""The unified transformer against torch and transformers, on fresh random numbers."""

from __future__ import annotations

import pytest

from tests.models.test_transformer import compare_mixed, compare_plain
from tests.parity.reference_transformer import outputs

pytestmark = pytest.mark.parity


def test_live_outputs_and_gradients():
    golden = outputs(seed=7)
    compare_mixed(golden)
    compare_plain(golden)
