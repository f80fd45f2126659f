"""The flow sampler against diffusers, computed now."""

import numpy as np
import pytest

from tests.parity.reference_flow import outputs
from tests.sampling.test_flow import compare
from xomni_jax.sampling.flow import flow_sigmas

pytestmark = pytest.mark.parity


def test_live():
    compare(outputs(seed=1))


@pytest.mark.parametrize("steps", [1, 2, 28, 50])
@pytest.mark.parametrize("grid", [(24, 24), (3, 5), (16, 16), (64, 64), (72, 72), (24, 72), (72, 31)], ids=str)
def test_noise_levels_of_the_flux_pipeline(steps, grid):
    """FLUX.1-dev's scheduler as its pipeline sets it, for images of any shape; its timesteps are 1000 sigma."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

    config = dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(grid[0] * grid[1])
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sigmas = flow_sigmas(steps, grid[0] * grid[1])
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(1000 * sigmas[:-1], timesteps.numpy(), rtol=1e-6)
