"""The unified transformer and the logit filters against torch and transformers, on fresh random numbers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_transformer import compare_mixed, compare_plain
from tests.parity.reference_transformer import outputs
from xomni_jax.sampling.logits import SamplingConfig, kept_mask

pytestmark = pytest.mark.parity


def test_live_outputs_and_gradients():
    golden = outputs(seed=7)
    compare_mixed(golden)
    compare_plain(golden)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.7, top_k=5, min_p=0.0),
        SamplingConfig(temperature=1.7, top_k=0, top_p=0.8, min_p=0.0),
        SamplingConfig(temperature=0.4, top_k=9, top_p=0.95, min_p=0.2),
        SamplingConfig(top_k=500, top_p=0.3, min_p=1.0),
    ],
    ids=lambda s: f"T{s.temperature}-k{s.top_k}-p{s.top_p}-m{s.min_p}",
)
@pytest.mark.parametrize("ties", [False, True])
def test_kept_tokens_equal_those_of_transformers(sampling, ties):
    import torch
    from transformers.generation import logits_process as lp

    scores = np.random.default_rng(3).normal(size=(40, 61)).astype(np.float32) * 2
    if ties:
        scores = np.round(scores)
    warpers = [lp.TemperatureLogitsWarper(sampling.temperature)]
    warpers += [lp.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [lp.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [lp.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    expected = torch.tensor(scores)
    for warper in warpers:
        expected = warper(None, expected)
    kept, expected = np.asarray(kept_mask(jnp.asarray(scores), sampling)), np.isfinite(expected.numpy())
    if ties and sampling.top_p < 1:
        # torch sorts unstably: which of several equal tokens top-p keeps is its own business, how many of each score is not.
        kept, expected = (np.sort(np.where(mask, scores, -np.inf), axis=-1) for mask in (kept, expected))
    np.testing.assert_array_equal(kept, expected)
