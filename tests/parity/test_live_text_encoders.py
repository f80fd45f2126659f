"""Text encoders against transformers, computed now."""

import pytest

from tests.models.test_text_encoders import compare_clip, compare_t5
from tests.parity import reference_clip, reference_t5

pytestmark = pytest.mark.parity


def test_live_t5():
    compare_t5(reference_t5.outputs(seed=1))


def test_live_clip():
    compare_clip(reference_clip.outputs(seed=1))
