"""What cheaper image decoders cost GRPO: do their rewards rank the rollouts of a prompt as those of the full decoder?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.stats import kendalltau, spearmanr

import xomni_jax
from tests.benchmarks import machine
from tests.benchmarks.grpo import WORKERS
from tests.benchmarks.report import OURS, Report, machine_line
from tests.benchmarks.services import running
from tests.benchmarks.timing import BenchError
from xomni_jax.core.config import Overrides
from xomni_jax.core.tables import aligned
from xomni_jax.data.sources import first_batch
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rl.grpo import GRPORun
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.keys import NOISE, image_keys
from xomni_jax.training.components import decode_settings

PROMPTS, ROLLOUTS, AT_ONCE = 16, 8, 32  # groups, images of each, and images decoded at a time
WANTED = 0.95  # rank correlation with the full decoder, for every reward
FULL, NOISE_ROW = "full", "full, other noise"


def run(config: GRPORun) -> Report:
    """Draws groups of rollouts once, and decodes and scores them with every setting. The full decoder is that of the model directory.

    Raises:
      BenchError: no reward has a weight, or none varies within a group.
    """
    names = [name for name, reward in config.rewards.items() if reward.weight]
    if not names:
        raise BenchError("config.rewards: no weight is above 0; give at least one reward a weight")
    model, others = xomni_jax.load(config.init_from), machine.Others()
    full = decode_settings(Overrides(DecodeConfig), model.description)
    examples = first_batch(config.data, config.seed, PROMPTS)
    prompts, targets = examples["caption"], examples["targets"]
    grid = model.grid(*config.data.sizes[0])
    keys_PR = image_keys(config.seed, PROMPTS * ROLLOUTS).reshape(PROMPTS, ROLLOUTS)
    codes = np.asarray(model.sample_codes(prompts, grid, keys_PR, config.sampling)["codes"]).reshape(-1, *grid)
    items = [{"prompt": p, "targets": t, "group": str(n)} for n, (p, t) in enumerate(zip(prompts, targets)) for _ in range(ROLLOUTS)]
    texts, rows = [item["prompt"] for item in items], {}
    with running({name: WORKERS.get(name, 1) for name in names}) as urls:
        clients = {name: RewardClient(name, url) for name, url in urls.items()}
        for name, cfg in settings(full).items():
            images, seconds = decoded(model, codes, texts, cfg, config.seed + (name == NOISE_ROW))
            scores = {reward: np.array([s.value for s in client.score(images, items)], float) for reward, client in clients.items()}
            rows[name] = {"cfg": cfg, "seconds": seconds, "scores": {k: v.reshape(PROMPTS, ROLLOUTS) for k, v in scores.items()}}
        for client in clients.values():
            client.close()
    return report(rows, names, config.advantage.eps, others.cores())


def settings(full: DecodeConfig) -> dict[str, DecodeConfig]:
    """The full decoder first, again with other noise, then every smaller number of steps, and every interval of reuse."""
    named = {FULL: full, NOISE_ROW: full}
    named |= {f"steps={n}": dataclasses.replace(full, steps=n) for n in fewer(full.steps)}
    return named | {f"reuse={n}": dataclasses.replace(full, reuse=n) for n in range(2, min(full.steps, 4) + 1)}


def fewer(steps: int) -> list[int]:
    """Numbers of steps to try below `steps`: all up to 8, then each half as many again."""
    tried = [n for n in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24) if n < steps]
    return tried[::-1]


def decoded(model: XOmni, codes: np.ndarray, prompts: Sequence[str], cfg: DecodeConfig, seed: int) -> tuple[list[np.ndarray], float]:
    """Images with one noise per group, and the seconds of decoding without compilation."""
    noise = np.asarray(model.noise(image_keys(seed, PROMPTS, NOISE), codes.shape[1:])).repeat(ROLLOUTS, axis=0)

    def part(first: int) -> np.ndarray:
        at = slice(first, first + AT_ONCE)
        return np.asarray(jax.block_until_ready(model.decode_images(codes[at], prompts[at], noise[at], cfg)))

    part(0)
    began = time.perf_counter()
    images = np.concatenate([part(first) for first in range(0, len(codes), AT_ONCE)])
    return list(images), time.perf_counter() - began


def agreement(full_PR: np.ndarray, other_PR: np.ndarray, eps: float) -> dict[str, Any]:
    """Mean rank correlations within the groups whose rewards under the full decoder differ by a standard deviation above `eps`.

    The others have no order to keep, and are not among the "groups" that are counted. One in which the other decoder alone sees no
    difference counts 0.
    """
    found = []
    for a, b in zip(full_PR, other_PR):
        known = np.isfinite(a) & np.isfinite(b)
        a, b = a[known], b[known]
        if len(a) > 1 and np.std(a) > eps:
            found.append((spearmanr(a, b)[0], kendalltau(a, b)[0]) if np.ptp(b) else (0.0, 0.0))
    if not found:
        return {"spearman": None, "kendall": None, "groups": 0}
    spearman, kendall = np.mean(found, axis=0)
    return {"spearman": float(spearman), "kendall": float(kendall), "groups": len(found)}


def evaluations(cfg: DecodeConfig) -> int:
    """Runs of the MMDiT's blocks for an image, without guidance's second side."""
    return -(-cfg.steps // cfg.reuse)


def report(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], eps: float, busy: float | None) -> Report:
    """The table, and the configuration of the cheapest setting that ranks as the full decoder does."""
    full, data = rows[FULL], []
    for name, row in rows.items():
        found = {reward: agreement(full["scores"][reward], row["scores"][reward], eps) for reward in names}
        mean = {reward: float(np.nanmean(row["scores"][reward])) for reward in names}
        kept = {reward: a for reward, a in found.items() if a["groups"]}
        cfg = row["cfg"]
        about = {"name": name, "steps": cfg.steps, "reuse": cfg.reuse, "evaluations": evaluations(cfg), "seconds": row["seconds"]}
        data.append(about | {"agreement": found, "mean": mean, "enough": all(a["spearman"] >= WANTED for a in kept.values())})
    varied = [reward for reward in names if data[0]["agreement"][reward]["groups"]]
    if not varied:
        raise BenchError(
            f"no reward differs by more than {eps:g} within a group of rollouts; take a model or a temperature that draws different images"
        )
    table = [("", "block runs", "of the time", *(f"{name}: Spearman, Kendall, mean" for name in names))]
    for row in data:
        ranks = {name: f"{a['spearman']:.3f}, {a['kendall']:.3f}" if a["groups"] else "no order" for name, a in row["agreement"].items()}
        cells = [f"{said}, {row['mean'][name]:.3f}" for name, said in ranks.items()]
        table.append((row["name"], str(row["evaluations"]), f"{row['seconds'] / full['seconds']:.2f}", *cells))
    groups = ", ".join(f"{reward} in {data[0]['agreement'][reward]['groups']}" for reward in names)
    good = [row for row in data if row["enough"] and row["name"] not in (FULL, NOISE_ROW)]
    best = min(good, key=lambda row: (row["evaluations"], row["seconds"]), default=None)
    if best is None:
        said = f"no cheaper setting reaches {WANTED:g} for every reward; leave config.decode as it is"
    else:
        said = f"cheapest with {WANTED:g} for every reward: --config.decode.steps={best['steps']} --config.decode.reuse={best['reuse']}"
    lines = [
        f"decoder-price: {PROMPTS} groups of {ROLLOUTS} rollouts; rank correlation within groups with the full decoder ({FULL})",
        machine_line("one process", busy),
        f"groups whose rewards differ by more than config.advantage.eps={eps:g}: {groups}, of {PROMPTS}; the others have no order to keep",
        "", aligned(table), "", said,
    ]  # fmt: skip
    whole = {"benchmark": "decoder-price", "rows": data, "best": best, "versions": machine.versions(OURS), "machine": machine.describe()}
    return Report("\n".join(lines), whole)
