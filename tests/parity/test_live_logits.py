"""Guidance and the logit filters against transformers' own processors: which tokens stay, and their probabilities."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.oracle import masked_logp
from xomni_jax.sampling.logits import SamplingConfig, guide, sampling_mask

pytestmark = pytest.mark.parity

TEXT, CODES, SPECIALS, ROWS = 17, 61, 5, 40
LEAST = np.finfo(np.float32).min
RELEASED_ORDER = ("guidance", "suppress", "temperature", "top_k", "top_p", "min_p")
CORNERS = {
    "released": SamplingConfig(),
    "released-guided": SamplingConfig(guidance=2.5),
    "k": SamplingConfig(temperature=0.7, top_k=5, min_p=0.0),
    "p": SamplingConfig(temperature=1.7, top_k=0, top_p=0.8, min_p=0.0),
    "k-p-m": SamplingConfig(temperature=0.4, top_k=9, top_p=0.95, min_p=0.2),
    "one-is-left": SamplingConfig(top_k=500, top_p=0.3, min_p=1.0),
    "negative-only": SamplingConfig(top_k=7, guidance=0.0),
    "all": SamplingConfig(temperature=1.3, top_k=30, top_p=0.85, min_p=0.1, guidance=4.0),
}


def any_sampling(seed: int) -> SamplingConfig:
    """One of many settings, every filter on or off."""
    rng = np.random.default_rng(seed)
    return SamplingConfig(
        temperature=float(rng.choice([1.0, rng.uniform(0.2, 3.0)])),
        top_k=int(rng.choice([0, 1, 2, 3, 17, 50, 60, 61, 62, 999])),
        top_p=float(rng.choice([1.0, 0.999, rng.uniform(0.02, 0.98)])),
        min_p=float(rng.choice([0.0, 0.03, rng.uniform(0.001, 1.0), 1.0])),
        guidance=float(rng.choice([1.0, rng.uniform(0.0, 1.0), rng.uniform(1.0, 8.0)])),
    )


def scores(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Conditional and negative logits of the codes [B, V]; with ties, every value belongs to two or three codes, in both alike."""
    rng = np.random.default_rng(seed)
    distinct = np.argsort(rng.random((ROWS, CODES)), axis=-1)
    columns = distinct // 3 if ties else distinct
    return tuple(np.take_along_axis(rng.normal(size=(ROWS, CODES)) * 2, columns, axis=-1).astype(np.float32) for _ in "cn")


def whole_vocabulary(codes_BV: np.ndarray) -> np.ndarray:
    """What the released model returns: every id, those that are no code at the minimum."""
    return np.pad(codes_BV, ((0, 0), (TEXT, SPECIALS)), constant_values=LEAST)


def reference(cond_BV, neg_BV, s: SamplingConfig, order: tuple[str, ...] = RELEASED_ORDER) -> np.ndarray:
    """Log-probabilities [B, V] of the codes after transformers' processors on the whole vocabulary; -inf where a filter removed one."""
    import torch
    from transformers.generation import logits_process as lp
    from transformers.modeling_outputs import CausalLMOutput

    def negative_model(ids, **_):
        return CausalLMOutput(logits=torch.tensor(whole_vocabulary(neg_BV))[:, None])

    specials = [*range(TEXT + CODES, TEXT + CODES + SPECIALS)]
    processors = {
        "guidance": s.guidance != 1 and lp.UnbatchedClassifierFreeGuidanceLogitsProcessor(s.guidance, negative_model),
        "suppress": lp.SuppressTokensLogitsProcessor(specials),
        "temperature": s.temperature != 1 and lp.TemperatureLogitsWarper(s.temperature),
        "top_k": s.top_k and lp.TopKLogitsWarper(s.top_k),
        "top_p": s.top_p < 1 and lp.TopPLogitsWarper(s.top_p),
        "min_p": lp.MinPLogitsWarper(s.min_p),
    }
    ids, left = torch.zeros(len(cond_BV), 1, dtype=torch.long), torch.tensor(whole_vocabulary(cond_BV))
    for processor in filter(None, (processors[name] for name in order)):
        left = processor(ids, left)
    logp = torch.log_softmax(left, dim=-1).numpy()
    assert np.exp(logp[:, :TEXT]).max() == np.exp(logp[:, TEXT + CODES :]).max() == 0, "an id that is no code can be drawn"
    return logp[:, TEXT : TEXT + CODES]


def ours(cond_BV, neg_BV, s: SamplingConfig) -> np.ndarray:
    """Log-probabilities [B, V] of the codes, -inf where they cannot be drawn."""
    guided = guide(jnp.asarray(cond_BV), jnp.asarray(neg_BV), s.guidance)
    return np.asarray(masked_logp(guided, sampling_mask(guided, s), s.temperature))


def assert_equal(s: SamplingConfig, seed: int, ties: bool) -> None:
    cond, neg = scores(seed, ties)
    got, expected = ours(cond, neg, s), reference(cond, neg, s)
    if ties and s.top_p < 1:
        # torch sorts unstably: which of several equal tokens top-p keeps is its own business, how many of each score is not.
        got, expected = np.sort(got, axis=-1), np.sort(expected, axis=-1)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(np.exp(got), np.exp(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("name", CORNERS)
def test_corners(name, ties):
    assert_equal(CORNERS[name], 3, ties)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_two_hundred_settings(ties):
    """Forty rows each."""
    kept = []
    for seed in range(200):
        assert_equal(any_sampling(seed), seed, ties)
        kept.append(np.isfinite(ours(*scores(seed, ties), any_sampling(seed))).sum(-1).mean())
    assert min(kept) < 1.5 and max(kept) == CODES and np.mean([2 < k < CODES - 1 for k in kept]) > 0.3  # nothing is settled by one filter


@pytest.mark.parametrize(
    "order",
    [
        ("guidance", "suppress", "temperature", "top_p", "top_k", "min_p"),
        ("guidance", "suppress", "temperature", "top_k", "min_p", "top_p"),
        ("guidance", "suppress", "top_k", "top_p", "temperature", "min_p"),
        ("guidance", "suppress", "top_k", "top_p", "min_p", "temperature"),
        ("temperature", "guidance", "suppress", "top_k", "top_p", "min_p"),
    ],
    ids=["p-before-k", "m-before-p", "temperature-after-p", "temperature-last", "temperature-first"],
)
def test_another_order_would_be_noticed(order):
    cond, neg = scores(5, False)
    s = SamplingConfig(temperature=1.6, top_k=20, top_p=0.8, min_p=0.08, guidance=1.8)
    with np.errstate(invalid="ignore"):
        differs = np.isfinite(ours(cond, neg, s)) != np.isfinite(reference(cond, neg, s, order))
    assert differs.any(axis=-1).mean() > 0.2
