"""The equality that the benchmarks check before they time anything, at sizes that take no time."""

import dataclasses

import pytest

from tests.benchmarks import autoregressive, mmdit, peers
from tests.benchmarks.timing import BenchError, measure
from xomni_jax.models.mmdit import MMDiTConfig
from xomni_jax.models.transformer import ARConfig

pytestmark = pytest.mark.parity

AR = ARConfig(
    vocab_size=23, mm_vocab_size=19, image_vocab_size=13, d_model=20, mlp_dim=28, n_heads=6, n_kv_heads=2, head_dim=4,
    n_language_layers=3, n_adapter_layers=0, n_head_layers=0,
)  # fmt: skip
MMDIT = MMDiTConfig(
    in_channels=6, d_model=30, n_heads=3, axes_dims=(2, 2, 6), n_double=2, n_single=3, text_dim=11, pooled_dim=9, semantic_dim=7,
)  # fmt: skip


def check(title_and_cases):
    title, cases = title_and_cases
    assert "float32" in title and any(case.yardstick for case in cases)
    for case in cases:
        result = measure(case, repeats=1, seconds=1)
        assert result.difference <= case.tolerance and len(result.ratios) == 1
    return cases


def test_decoding_gives_the_same_tokens():
    cases = check(autoregressive.decode_cases(AR, batches=(1, 3), prompt=5, new=4))
    tokens = cases[2].ours()
    assert tokens.shape == (3, 4) and len(set(tokens.ravel().tolist())) > 1


def test_training_gives_the_same_losses_until_one_side_is_a_step_ahead():
    case = check(autoregressive.train_cases(AR, batch=2, length=7))[0]
    case.peer()
    with pytest.raises(BenchError, match="train step, 2 x 7: the two sides differ"):
        measure(case, repeats=1, seconds=1)


@pytest.mark.parametrize("guided", [True, False])
def test_velocities_are_the_same(guided):
    check(mmdit.cases(dataclasses.replace(MMDIT, guidance_embed=guided), (3, 4), batches=(2,), text=5))


def test_a_model_with_vision_layers_is_no_qwen2():
    with pytest.raises(BenchError, match="no vision layers; set n_adapter_layers=0"):
        peers.qwen2(dataclasses.replace(AR, n_head_layers=1), {})
