"""Random trajectories against a plain forward pass over each row alone: `python -m tests.sampling.trajectories --count 200`.

A trajectory is a row of up to five segments, drawn or given, texts and images. `check` draws a batch of rows with the engine, scores it,
and recomputes every row without a cache, without padding between tokens and without the others: its hidden states in float32, the
log-probs, entropies and draws from them in NumPy.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.test_transformer import CFG as BASE
from tests.models.test_transformer import random_params
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.segments import Segment, SegmentSpec

CFG = dataclasses.replace(
    BASE, vocab_size=24, mm_vocab_size=20, image_vocab_size=14, n_adapter_layers=1, n_language_layers=1, n_head_layers=1
)
V, IMAGE = CFG.vocab_size, CFG.vocab_size + 15  # an id that stands for <IMAGE>
BOXED, PARAMS = random_params(CFG)
P, R, S, LONGEST = 4, 2, 6, 6  # prompts, rollouts, tokens of a prompt, tokens of a segment
STOPS = (3, 7, 11, 19)
SAMPLINGS = (
    SamplingConfig(top_k=0, min_p=0.0),
    SamplingConfig(temperature=0.7, top_k=0, min_p=0.0),
    SamplingConfig(temperature=1.2, top_k=6, top_p=0.9, min_p=0.05),
    SamplingConfig(temperature=0.0, top_k=0, min_p=0.0),
)
GUIDANCE = 1.8
NEGATIVE = np.array([[8, 2, IMAGE]], np.int32), np.array([3], np.int32)
# Most that two float32 passes of this model may differ in a log-prob: some 1,000 roundings of values up to 10.
SCORE_GAP, SAMPLE_GAP = 1e-5, 1e-4


class Gaps(NamedTuple):
    """Largest differences: of `score` to the plain pass in log-prob and entropy, of `sample` to `score`; tokens drawn otherwise."""

    logp: float
    entropy: float
    sample: float
    tokens: int


def random_plan(rng: np.random.Generator) -> list[Segment | SegmentSpec]:
    """One to five segments: specs of those to draw, the others as given; at least one is drawn."""
    plan = [_random_segment(rng, n) for n in range(rng.integers(1, 6))]
    if not any(isinstance(s, SegmentSpec) for s in plan):
        plan[-1] = SegmentSpec("last", "image", 3)
    return plan


def _random_segment(rng: np.random.Generator, n: int) -> Segment | SegmentSpec:
    length = int(rng.integers(1, LONGEST + 1))
    sampling = SAMPLINGS[rng.integers(len(SAMPLINGS))]
    if rng.random() < 0.4:
        sampling = dataclasses.replace(sampling, guidance=GUIDANCE)
    match rng.choice(["text", "image", "words", "prefix", "codes"], p=[0.3, 0.3, 0.15, 0.1, 0.15]):
        case "text":
            return SegmentSpec(f"text{n}", "text", length, sampling, STOPS)
        case "image":
            return SegmentSpec(f"image{n}", "image", length, sampling)
        case "words":  # some rows have none
            return Segment(rng.integers(0, V, (P, R, length)).astype(np.int32), rng.integers(0, length + 1, (P, R)).astype(np.int32))
        case "prefix":
            return Segment(np.broadcast_to(np.array([V + 14, 5, IMAGE], np.int32), (P, R, 3)))
        case _:
            return Segment(rng.integers(0, CFG.image_vocab_size, (P, R, length)).astype(np.int32), kind="image")


def random_rows(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Prompts [P, S], their lengths [P], keys [P, R]."""
    ids = rng.integers(0, V + CFG.image_vocab_size, (P, S)).astype(np.int32)
    return ids, rng.integers(1, S + 1, P).astype(np.int32), jax.random.split(jax.random.key(int(rng.integers(1 << 30))), (P, R))


def draw(engine: Engine, params, plan, ids, lengths, keys, negative=None) -> list[Segment]:
    """Runs a plan; segment n is drawn with fold_in(key, n)."""
    tokens = sum(s.length if isinstance(s, SegmentSpec) else s.ids.shape[-1] for s in plan)
    prompt, state = engine.start(params, (ids, lengths), R, tokens, negative)
    out = []
    for n, part in enumerate(plan):
        if isinstance(part, SegmentSpec):
            own = jax.vmap(jax.vmap(lambda key, n=n: jax.random.fold_in(key, n)))(keys)
            state, part = engine.sample(params, prompt, state, part, own, return_mask=part.sampling.truncates)
        else:
            state = engine.extend(params, prompt, state, part)
        out.append(part)
    return out


def guided(plan) -> bool:
    """Whether any segment needs negative prompts."""
    return any(isinstance(s, SegmentSpec) and s.sampling.guided for s in plan)


@functools.cache
def plain_logits():
    """Row [L] -> the logits of both heads at every position, by one pass without a cache."""
    model = ARTransformer(CFG)

    def run(ids):
        hidden = model.apply({"params": PARAMS}, ids[None])
        return {kind: model.apply({"params": PARAMS}, hidden, method=f"{kind}_logits")[0] for kind in ("text", "image")}

    return jax.jit(run)


@jax.jit
def plain_draws(key: jax.Array, z_LV: jax.Array) -> jax.Array:
    """Token t of [L] drawn with fold_in(key, t)."""
    return jax.vmap(lambda t, z_V: jax.random.categorical(jax.random.fold_in(key, t), z_V))(jnp.arange(len(z_LV)), z_LV)


def log_softmax(z: np.ndarray) -> np.ndarray:
    """In float64; -inf where z is."""
    z = z.astype(np.float64) - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def plain_row(prompts, segments, p: int, r: int) -> list[dict[str, np.ndarray]]:
    """For each drawn segment of row (p, r): z [n, V], log-probs and entropy of its n tokens under the truncated, guided distribution."""
    length = S + 5 * LONGEST  # one compilation; what stands behind the row is not seen
    logits = []
    for ids, lengths in prompts:
        row, begins = list(ids[p % len(ids)][: lengths[p % len(ids)]]), []
        for s in segments:
            begins.append(len(row))
            n = s.ids.shape[-1] if s.lengths is None else s.lengths[p, r]
            row += list(s.ids[p, r, :n] + (V if s.kind == "image" else 0))
        logits.append((jax.tree.map(np.asarray, plain_logits()(np.array(row + [0] * (length - len(row)), np.int32))), begins))
    out = []
    for i, s in enumerate(segments):
        if s.spec is None:
            continue
        n, c = s.ids.shape[-1] if s.lengths is None else s.lengths[p, r], s.spec.sampling
        sides = [all_logits[s.kind][begins[i] - 1 : begins[i] - 1 + n] for all_logits, begins in logits]
        z = sides[0].astype(np.float64)
        if c.guided:
            cond, neg = map(log_softmax, sides)
            z = neg + c.guidance * (cond - neg)
        z = z / (c.temperature or 1.0)
        if s.kept is not None:
            z = np.where(np.unpackbits(s.kept[p, r, :n], axis=-1, count=z.shape[-1]).astype(bool), z, -np.inf)
        logp = log_softmax(z)
        entropy = -np.sum(np.exp(logp) * np.where(np.isfinite(logp), logp, 0), axis=-1)
        out.append({"z": z, "logp": logp[np.arange(n), s.ids[p, r, :n]], "entropy": entropy, "segment": i, "n": n})
    return out


def check(seed: int, plan: list[Segment | SegmentSpec] | None = None) -> Gaps:
    """Draws and scores random rows, of a random plan if none is given. Raises AssertionError for a text that does not end as it should."""
    rng = np.random.default_rng(seed)
    plan = plan or random_plan(rng)
    ids, lengths, keys = random_rows(rng)
    engine, negative = Engine(ARTransformer(CFG)), NEGATIVE if guided(plan) else None
    segments = jax.jit(lambda params: draw(engine, params, plan, ids, lengths, keys, negative))(PARAMS)
    rows = [s.rows() for s in segments]
    prompts = np.repeat(ids, R, axis=0), np.repeat(lengths, R)
    scored = jax.jit(lambda params: engine.score(params, prompts, rows, negative, chunk=4))(PARAMS)
    segments, scored = jax.tree.map(np.asarray, (segments, scored))
    drawn, gaps, other = [n for n, s in enumerate(segments) if s.spec is not None], [], 0
    for p in range(P):
        for r in range(R):
            for k, want in enumerate(plain_row([(ids, lengths), NEGATIVE], segments, p, r)):
                s, n = segments[want["segment"]], want["n"]
                if s.kind == "text":
                    stops = np.flatnonzero(np.isin(s.ids[p, r, :n], STOPS))
                    assert n == s.spec.length if not len(stops) else stops[0] == n - 1, (seed, p, r, s.ids[p, r], n)
                logp, entropy = (x.reshape(P, R, -1)[p, r, :n] for x in scored[k])
                key = jax.random.fold_in(keys[p, r], drawn[k])
                again = plain_draws(key, np.pad(want["z"], ((0, LONGEST - n), (0, 0))).astype(np.float32))
                other += int(np.sum(np.asarray(again)[:n] != s.ids[p, r, :n]))
                gaps.append([np.abs(x).max() for x in (logp - want["logp"], entropy - want["entropy"], s.logp[p, r, :n] - logp)])
    return Gaps(*np.max(gaps, axis=0), other)


def main(arguments: list[str]) -> int:
    """Prints the largest differences; the exit code is 1 if one is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="trajectories (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default 0)")
    args = parser.parse_args(arguments)
    batches = -(-args.count // (P * R))
    found = []
    for seed in range(args.seed, args.seed + batches):
        found.append(check(seed))
        print(f"\r{len(found) * P * R} trajectories", end="", file=sys.stderr)
    logp, entropy, sample, tokens = np.array(found).T
    print(f"\n{batches * P * R} trajectories of 1 to 5 segments in {batches} plans")
    print(f"score against a plain pass: log-prob {logp.max():.1e}, entropy {entropy.max():.1e} (limit {SCORE_GAP:.0e})")
    print(f"sample against score: log-prob {sample.max():.1e} (limit {SAMPLE_GAP:.0e})")
    print(f"tokens that the plain pass draws otherwise: {int(tokens.sum())}")
    return int(max(logp.max(), entropy.max()) > SCORE_GAP or sample.max() > SAMPLE_GAP or tokens.any())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
