"""The tokenizer against torch on fresh weights, and its pieces against torch's own operators."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.siglip_vq_parity import compare
from xomni_jax.models.vit import resize_positions

pytestmark = pytest.mark.parity


def test_fresh_weights():
    """The golden comparison with another seed, so that nothing hangs on the stored numbers."""
    from tests.parity.reference_siglip_vq import outputs

    compare(outputs(seed=11))


@pytest.mark.parametrize("rows, columns", [(1, 13), (7, 7), (3, 19), (2, 5)])
def test_positions_are_torch_interpolate(rng, rows, columns):
    """Half-pixel bilinear without antialiasing, shrinking and growing."""
    import torch

    grid = rng.normal(size=(7, 7, 5)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(grid).permute(2, 0, 1)[None], size=(rows, columns), mode="bilinear", align_corners=False, antialias=False
    )
    ours = resize_positions(jnp.asarray(grid), rows, columns)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), rtol=1e-5, atol=1e-6)
