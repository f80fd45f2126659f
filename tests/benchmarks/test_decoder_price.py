"""`xomni bench decoder-price`: rank correlations by hand, and what is proposed."""

import numpy as np
import pytest

from tests.benchmarks import decoder_price as price
from tests.benchmarks.timing import BenchError
from xomni_jax.sampling.decoder import DecodeConfig

FULL = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5], [0.4, 0.3, 0.2, 0.1]])


def test_agreement_by_hand():
    """One pair swapped of four: Spearman 1 - 6 * 2 / (4 * 15) = 0.8, Kendall (5 - 1) / 6; a group without an order does not count."""
    other = np.array([[0.1, 0.3, 0.2, 0.4], [0.1, 0.2, 0.3, 0.4], [0.9, 0.5, 0.4, 0.2]])
    found = price.agreement(FULL, other, 0.0)
    assert found["groups"] == 2
    assert found["spearman"] == pytest.approx((0.8 + 1) / 2) and found["kendall"] == pytest.approx((4 / 6 + 1) / 2)
    flat = np.full_like(FULL, 0.7)
    assert price.agreement(FULL, flat, 0.0)["spearman"] == 0 and price.agreement(flat, FULL, 0.0)["groups"] == 0
    assert price.agreement(FULL, other, 0.2)["groups"] == 0  # the standard deviation is 0.11
    unknown = np.where(np.arange(4) == 1, np.nan, other)
    assert price.agreement(FULL, unknown, 0.0)["spearman"] == pytest.approx(1)  # without the swapped pair


def test_settings_are_cheaper_than_the_full_decoder():
    found = price.settings(DecodeConfig(steps=4))
    assert list(found) == ["full", "full, other noise", "steps=3", "steps=2", "steps=1", "reuse=2", "reuse=3", "reuse=4"]
    assert [price.evaluations(cfg) for cfg in found.values()] == [4, 4, 3, 2, 1, 2, 2, 1]


def rows(**scores):
    cfgs = price.settings(DecodeConfig(steps=4))
    return {name: {"cfg": cfgs[name], "seconds": 2.0, "scores": {"ocr": score}} for name, score in scores.items()}


def test_the_cheapest_that_ranks_alike_is_proposed():
    measured = rows(full=FULL, **{"steps=2": FULL + 0.3, "steps=1": FULL[::-1], "reuse=2": FULL[::-1]})
    report = price.report(measured, ["ocr"], 1e-6, None)
    assert "--config.decode.steps=2 --config.decode.reuse=1" in report.text and report.data["best"]["name"] == "steps=2"
    none = price.report(rows(full=FULL, **{"steps=2": FULL[::-1]}), ["ocr"], 1e-6, None)
    assert "no cheaper setting reaches 0.95" in none.text and none.data["best"] is None
    with pytest.raises(BenchError, match="no reward differs by more than 1e-06 within a group"):
        price.report(rows(full=np.zeros((2, 4))), ["ocr"], 1e-6, None)
