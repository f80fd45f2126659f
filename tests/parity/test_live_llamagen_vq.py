"""LlamaGen's tokenizer against torch, on fresh weights."""

import pytest

from tests.models.test_llamagen_vq import compare
from tests.parity.reference_llamagen_vq import outputs

pytestmark = pytest.mark.parity


def test_live():
    compare(outputs(seed=1))
