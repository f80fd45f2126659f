"""Expected gradients over all groups: exact where they are claimed to be unbiased, elsewhere as far off as the documents say."""

import itertools

import jax
import numpy as np
import pytest

from tests.miniature import ROOT
from tests.rl import exact_gradients as exact
from xomni_jax.rl.objectives import REDUCTIONS

TOLERANCE = 1e-10  # of the largest entry, in float64
KL_COEF = 0.3
RATIOS = [("trajectory", "grpo")] + [(r, name) for r in ("token", "sequence") for name in REDUCTIONS if name not in ("bnpo", "token-mean")]
KL_FORMS = [None, ("k2", False), ("k3", False), ("k1", True), ("k2", True), ("k3", True)]
WORLDS = {
    "images": exact.make_world(),
    "texts": exact.make_world(ends=True),
    "off-policy": exact.make_world(drift=0.3),
    "failing": exact.make_world(symbols=2, failing="evenly"),
    "unevenly": exact.make_world(symbols=2, failing="unevenly"),
}


@pytest.fixture(autouse=True)
def float64():
    """For all of it."""
    with jax.enable_x64(True):
        yield


def combinations(world):
    """(configuration, advantage) of every ratio, reduction and KL form; clips and baselines take turns, as the terms are added.

    Failures that depend on the sequence leave no divergence that the KL term could be compared with.
    """
    turns = itertools.cycle(itertools.product((exact.PLAIN, exact.RLOO), ({}, dict(delta=1.5), exact.UNCLIPPED)))
    for ratio, reduction in RATIOS:
        for form in KL_FORMS[:2] if world == "failing" else KL_FORMS[:1] if world == "unevenly" else KL_FORMS:
            advantage, clip = next(turns)
            kl = dict(kl_estimator=form[0], kl_importance=form[1], kl_coef=KL_COEF) if form else {}
            yield exact.grpo(ratio=ratio, reduction=reduction, **kl, **(exact.UNCLIPPED if world == "off-policy" else clip)), advantage


def claim(w, cfg, advantage, group):
    """The gradient that is claimed for the whole loss; None: nothing is."""
    factor, kl = exact.claimed_reward_factor(w, cfg, advantage, group), exact.claimed_kl(w, cfg, group)
    if factor is None or cfg.kl_coef and kl is None:
        return None
    return -factor * exact.reward_gradient(w) + (cfg.kl_coef * kl[1] * exact.kl_gradient(w, kl[0]) if cfg.kl_coef else 0.0)


@pytest.mark.parametrize("world, number", [("images", 77), ("texts", 37), ("off-policy", 3), ("failing", 34), ("unevenly", 17)])
def test_what_is_claimed_to_be_unbiased_is(world, number):
    """Rewards, and rewards less a KL divergence, of all groups of two."""
    w, checked = WORLDS[world], 0
    for cfg, advantage in combinations(world):
        if (wanted := claim(w, cfg, advantage, 2)) is None:
            continue
        found = exact.expected_gradient(w, cfg, advantage, 2)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max(), err_msg=f"{cfg} {advantage}")
        checked += 1
    assert checked == number


@pytest.mark.parametrize(
    "world, fields",
    [
        ("images", dict(kl_coef=KL_COEF)),
        ("images", dict(ratio="trajectory", kl_coef=KL_COEF, kl_importance=True)),
        ("texts", dict(reduction="dr_grpo", kl_coef=KL_COEF, kl_estimator="k2")),
        ("failing", dict(reduction="dapo")),
        ("unevenly", dict(reduction="cispo")),
    ],
)
def test_groups_of_three(world, fields):
    w, cfg = WORLDS[world], exact.grpo(**fields)
    wanted = claim(w, cfg, exact.PLAIN, 3)
    found = exact.expected_gradient(w, cfg, exact.PLAIN, 3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def test_what_is_not_claimed_is_biased_and_the_documents_say_by_how_much():
    """The claims are no narrower than the truth; the command prints groups of three as well."""
    text = (ROOT / "configs" / "methods" / "README.md").read_text()
    for name, case in exact.reward_cases().items():
        cells = exact.row(name, case, (2,))
        assert "| " + " | ".join(cells) + " |" in text
        if len(case[3]) == 1:
            assert (exact.claimed_reward_factor(*case[:3], 2) is None) == (float(cells[2]) > 1e-3), name
    assert exact.kl_table() in text
