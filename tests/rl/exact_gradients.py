"""The expected gradient of the objective, by enumeration, beside the gradient that it stands for: python -m tests.rl.exact_gradients.

A policy is a table of logits, one row for every prefix, over all sequences of 3 tokens out of 4. The expectation runs over every group of
G sequences, as multisets with their probabilities, in float64; nothing is sampled. configs/methods/README.md has what is printed.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.rl.advantages import AdvantageConfig, group_advantages
from xomni_jax.rl.objectives import REDUCTIONS, GRPOConfig, grpo_loss

MAX_LENGTH = 5  # divisor of the reductions that scale
BLOCK = 8192  # groups at a time: with one shape every operation is compiled once
UNCLIPPED = dict(clip_low=1.0, clip_high=1e9)
PLAIN = AdvantageConfig(scale="none")  # an advantage that keeps the direction of the policy gradient
RLOO = AdvantageConfig(scale="none", baseline="rloo")


class World(NamedTuple):
    """All N sequences of up to L tokens, with what is paid for them.

    Attributes:
      tokens, rows, mask: [N, L]: tokens, the row of logits that each is drawn from (one per prefix), and which were sampled.
      policy, old, reference: logits [rows, V]; `old` drew the rollouts.
      reward: [N, S] of each of S segments.
      scored: [N] probability that a scorer answers.
    """

    tokens: np.ndarray
    rows: np.ndarray
    mask: np.ndarray
    policy: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    reward: np.ndarray
    scored: np.ndarray

    def logp(self, logits: Any) -> jax.Array:
        """Log-probs [N, L] of all tokens, 0 where none was sampled."""
        return jnp.where(self.mask, jax.nn.log_softmax(logits)[self.rows, self.tokens], 0.0)

    def chances(self, logits: Any) -> jax.Array:
        """Probabilities [N] of all sequences."""
        return jnp.exp(jnp.sum(self.logp(logits), -1))


def make_world(length: int = 3, symbols: int = 4, ends: bool = False, drift: float = 0.0, failing: str = "none", seed: int = 0) -> World:
    """A world with random logits and rewards.

    Args:
      ends: token 0 ends a sequence, so that their lengths differ.
      drift: standard deviation of the logits of the policy around those of the one that drew the rollouts; 0: on-policy.
      failing: of the scorer: none; evenly, 30% whatever the sequence; unevenly, by sequence.
    """
    rng = np.random.default_rng(seed)
    every = [
        s for s in itertools.product(range(symbols), repeat=length) if not ends or all(not b for a, b in itertools.pairwise(s) if not a)
    ]
    prefixes = {p: n for n, p in enumerate(dict.fromkeys(s[:t] for s in every for t in range(length)))}
    tokens = np.array(every)
    mask = np.cumprod(np.c_[np.ones(len(every)), tokens[:, :-1] != 0], -1).astype(bool) if ends else np.ones(tokens.shape, bool)
    shape = len(prefixes), symbols
    policy, reference = rng.normal(size=shape), rng.normal(size=shape)
    old = policy + drift * rng.normal(size=shape)
    # What is paid for the first two tokens depends on them alone, and what is paid for the last on all.
    first = rng.uniform(size=(symbols, symbols))[tokens[:, 0], tokens[:, 1 % length]]
    reward = np.stack([first, rng.uniform(size=len(every))], -1)
    scored = {"none": np.ones(len(every)), "evenly": np.full(len(every), 0.7), "unevenly": rng.uniform(0.3, 1.0, len(every))}[failing]
    return World(tokens, np.array([[prefixes[s[:t]] for t in range(length)] for s in every]), mask, policy, old, reference, reward, scored)


def multisets(n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All multisets of `size` of n things [M, size], and in how many orders each can be drawn [M]."""
    groups = np.array(list(itertools.combinations_with_replacement(range(n), size)))
    place = np.stack([(groups[:, : j + 1] == groups[:, j : j + 1]).sum(-1) for j in range(size)], -1)  # among its equals
    return groups, math.factorial(size) / place.prod(-1)


def expected_gradient(w: World, cfg: GRPOConfig, advantage: AdvantageConfig, group: int, credit: Any = ((1.0, 1.0),)) -> np.ndarray:
    """Expectation over all groups of the gradient of `grpo_loss` with respect to the logits, [rows, V].

    Args:
      credit: weights of the rewards [segments, S]. One row: the sum is the reward of the whole sequence. Two: the first is credited to
        the first two tokens, the second to the last one.
    """
    N, L = w.tokens.shape
    p_N = np.asarray(w.chances(w.old))
    # A rollout is a sequence whose reward is known or not.
    chance_M = np.concatenate([p_N * w.scored, p_N * (1 - w.scored)])
    possible = np.flatnonzero(chance_M)
    groups, orders = multisets(len(possible), group)
    groups = possible[groups]
    sequence, ok, weight = groups % N, groups < N, orders * chance_M[groups].prod(-1)
    logp, old, ref = (np.asarray(w.logp(x)) for x in (w.policy, w.old, w.reference))
    on_policy = np.array_equal(w.policy, w.old)

    def slope(logp_GL, old_GL, ref_GL, mask_GL, reward_GS, ok_G):
        adv = jnp.stack([group_advantages((reward_GS @ jnp.array(c))[None], ok_G[None], advantage)[0][0] for c in credit], -1)
        adv = adv[:, 0] if len(credit) == 1 else adv[:, np.minimum(np.arange(L) // 2, 1)]
        old_GL = None if on_policy else old_GL
        return jax.grad(lambda x: grpo_loss(x, old_GL, ref_GL if cfg.kl_coef else None, adv, mask_GL & ok_G[:, None], cfg)[0])(logp_GL)

    slope_NL = np.zeros((N, L))
    for first in range(0, len(weight), BLOCK):
        own = np.arange(first, first + BLOCK) % len(weight)
        o, known = sequence[own], ok[own]
        slopes = np.asarray(jax.vmap(slope)(logp[o], old[o], ref[o], w.mask[o], w.reward[o], known))
        number = min(BLOCK, len(weight) - first)
        np.add.at(slope_NL, o[:number], slopes[:number] * weight[own[:number], None, None])
    return np.asarray(jax.vjp(w.logp, jnp.asarray(w.policy))[1](jnp.asarray(slope_NL))[0])


def reward_gradient(w: World, credit: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Gradient of the expected reward of a sequence given that it is scored."""

    def mean(logits):
        p_N = w.chances(logits) * w.scored
        return jnp.sum(p_N * (w.reward @ np.array(credit))) / jnp.sum(p_N)

    return np.asarray(jax.grad(mean)(jnp.asarray(w.policy)))


def kl_gradient(w: World, which: str) -> np.ndarray:
    """Gradient of a KL divergence.

    Args:
      which: sequence: KL(pi || ref) of whole sequences; token: of every token, summed along prefixes that are drawn by the policy but not
        differentiated; forward: KL(ref || pi) likewise.
    """
    p_N, ref = jax.lax.stop_gradient(w.chances(w.policy)), jax.nn.log_softmax(w.reference)

    def sequence(logits):
        return jnp.sum(w.chances(logits) * jnp.sum(w.logp(logits) - w.logp(w.reference), -1))

    def token(logits):
        logp = jax.nn.log_softmax(logits)
        of_row = jnp.sum(jnp.exp(logp) * (logp - ref) if which == "token" else jnp.exp(ref) * (ref - logp), -1)
        return jnp.sum(p_N[:, None] * jnp.where(w.mask, of_row[w.rows], 0.0))

    return np.asarray(jax.grad(sequence if which == "sequence" else token)(jnp.asarray(w.policy)))


# ---- what is claimed ----
def weight_of(w: World, cfg: GRPOConfig) -> float | None:
    """Weight of a rollout's sum over tokens in the loss; None where it depends on the length of the sequence."""
    length = w.mask.shape[1]
    if cfg.ratio == "trajectory":
        return 1.0
    inside, over = REDUCTIONS[cfg.reduction]
    if not w.mask.all() and (inside == "mean" or over == "tokens"):
        return None
    return 1 / length if inside == "mean" or over == "tokens" else 1 / MAX_LENGTH if inside == "scale" else 1.0


def known_counts(w: World, group: int) -> dict[int, float]:
    """{n: probability that n rollouts of a group are scored}."""
    p = float(np.sum(np.asarray(w.chances(w.old)) * w.scored))
    return {n: math.comb(group, n) * p**n * (1 - p) ** (group - n) for n in range(group + 1)}


def claimed_reward_factor(w: World, cfg: GRPOConfig, advantage: AdvantageConfig, group: int) -> float | None:
    """c where the expected gradient of the policy term is claimed to be -c times `reward_gradient`; None where it is biased."""
    weight, on_policy = weight_of(w, cfg), np.array_equal(w.policy, w.old)
    exact_ratio = cfg.ratio == "trajectory" and cfg.clip_low == 1 and cfg.clip_high > 1e6 and cfg.delta is None
    if weight is None or advantage.scale != "none" or advantage.clip is not None or not (on_policy or exact_ratio):
        return None
    compared = lambda n: 0 if n < 2 else n - 1 if advantage.baseline == "mean" else n
    rows = REDUCTIONS[cfg.reduction][1] == "rows"
    return weight * sum(p * compared(n) / (group if rows else max(n, 1)) for n, p in known_counts(w, group).items())


def claimed_kl(w: World, cfg: GRPOConfig, group: int) -> tuple[str, float] | None:
    """(which `kl_gradient`, c) where the expected gradient of the KL term is claimed to be c kl_coef times that; None: of none of them.

    Without failures, or where they strike evenly.
    """
    weight, on_policy, form = weight_of(w, cfg), np.array_equal(w.policy, w.old), (cfg.kl_estimator, cfg.kl_importance)
    if weight is None:
        return None
    counts = known_counts(w, group)
    weight *= sum(p * (n / group if REDUCTIONS[cfg.reduction][1] == "rows" else n > 0) for n, p in counts.items())
    if cfg.ratio == "trajectory" and form in (("k1", True), ("k3", True)):
        return "sequence", weight
    if cfg.ratio == "sequence" and form == ("k1", True) and on_policy and w.mask.all():
        return "sequence", weight / w.mask.shape[1]
    if on_policy and (form == ("k2", False) or cfg.ratio == "token" and form in (("k1", True), ("k3", True))):
        return "token", weight
    return ("forward", weight) if on_policy and form == ("k3", False) else None


# ---- tables ----
def comparison(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float]:
    """(factor c for which c `wanted` is nearest to `found`, what then remains, relative to it, and the cosine of the two)."""
    inner = float(np.sum(found * wanted))
    scale = inner / float(np.sum(wanted**2))
    return (
        scale,
        float(np.linalg.norm(found - scale * wanted) / np.linalg.norm(scale * wanted)),
        inner / float(np.linalg.norm(found) * np.linalg.norm(wanted)),
    )


def row(name: str, case: Any, groups: tuple[int, ...] = (2, 3)) -> list[str]:
    """Of the table of rewards: factor with groups of 2, then relative error and cosine for each size of a group."""
    found = [comparison(-expected_gradient(*case[:3], group, case[3]), reward_gradient(case[0])) for group in groups]
    return [name, f"{found[0][0]:.4f}", *(f"{x:.4f}" for _, *both in found for x in both)]


def grpo(**fields: Any) -> GRPOConfig:
    """A configuration without a KL term; those that scale divide by MAX_LENGTH."""
    return GRPOConfig(**{"kl_coef": 0.0, "max_length": MAX_LENGTH} | fields)


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def reward_cases() -> dict[str, tuple[World, GRPOConfig, AdvantageConfig, Any]]:
    """{name: (world, objective, advantage, credit of `expected_gradient`)}."""
    image, text, far, fails = make_world(), make_world(ends=True), make_world(drift=0.3), make_world(symbols=2, failing="unevenly")
    whole, follows, own = ((1.0, 1.0),), ((1.0, 1.0), (0.0, 1.0)), ((1.0, 0.0), (0.0, 1.0))
    return {
        "images, any reduction, ratio of tokens or sequences": (image, grpo(), PLAIN, whole),
        "images, ratio of trajectories": (image, grpo(ratio="trajectory"), PLAIN, whole),
        "images, baseline rloo": (image, grpo(), RLOO, whole),
        "images, divided by the group's deviation (default)": (image, grpo(), AdvantageConfig(), whole),
        "images, advantages clipped at 0.2": (image, grpo(), AdvantageConfig(scale="none", clip=0.2), whole),
        "texts, grpo": (text, grpo(), PLAIN, whole),
        "texts, dapo": (text, grpo(reduction="dapo"), PLAIN, whole),
        "texts, dr_grpo": (text, grpo(reduction="dr_grpo"), PLAIN, whole),
        "texts, seq-mean-token-sum": (text, grpo(reduction="seq-mean-token-sum"), PLAIN, whole),
        "texts, ratio of trajectories": (text, grpo(ratio="trajectory"), PLAIN, whole),
        "off-policy, ratio of tokens, no clip": (far, grpo(**UNCLIPPED), PLAIN, whole),
        "off-policy, ratio of tokens, clip 0.2": (far, grpo(), PLAIN, whole),
        "off-policy, ratio of tokens, clip 0.2, delta 1.5": (far, grpo(delta=1.5), PLAIN, whole),
        "off-policy, ratio of sequences, no clip": (far, grpo(ratio="sequence", **UNCLIPPED), PLAIN, whole),
        "off-policy, cispo": (far, grpo(reduction="cispo"), PLAIN, whole),
        "off-policy, ratio of trajectories, no clip": (far, grpo(ratio="trajectory", **UNCLIPPED), PLAIN, whole),
        "off-policy, ratio of trajectories, clip 0.2": (far, grpo(ratio="trajectory"), PLAIN, whole),
        "30% of scores fail": (make_world(symbols=2, failing="evenly"), grpo(), PLAIN, whole),
        "scores fail more for some images, grpo": (fails, grpo(), PLAIN, whole),
        "scores fail more for some images, dapo, rloo": (fails, grpo(reduction="dapo"), RLOO, whole),
        "two segments, each credited with all that follows": (image, grpo(), PLAIN, follows),
        "two segments, each credited with its own reward": (image, grpo(), PLAIN, own),
    }


def reward_table() -> str:
    """The policy term against the gradient of the expected reward."""
    head = ("policy term", "factor", "error, G = 2", "cosine", "error, G = 3", "cosine")
    return table(head, [row(name, case) for name, case in reward_cases().items()])


def kl_table() -> str:
    """The KL term, on-policy, against the gradients of three divergences."""
    w, rows = make_world(), []
    zero = w._replace(reward=np.zeros_like(w.reward))
    for ratio in ("token", "sequence", "trajectory"):
        for form in (("k2", False), ("k3", False), ("k1", True), ("k2", True), ("k3", True)):
            cfg = grpo(kl_coef=1.0, kl_estimator=form[0], kl_importance=form[1], ratio=ratio)
            if ratio == "token" or form[1]:  # without the importance weight the ratio has no part in it
                found = expected_gradient(zero, cfg, PLAIN, 2)
                errors = [comparison(found, kl_gradient(w, which))[1] for which in ("sequence", "token", "forward")]
                rows.append([form[0] + " x ratio" * form[1], ratio if form[1] else "any", *(f"{x:.4f}" for x in errors)])
    return table(("KL term", "ratio", "KL(pi, ref) of sequences", "of tokens at drawn prefixes", "KL(ref, pi) of tokens"), rows)


def tables() -> str:
    """Both."""
    with jax.enable_x64(True):
        return f"{reward_table()}\n\n{kl_table()}"


if __name__ == "__main__":
    print(tables())
