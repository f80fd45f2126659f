"""Several codes per pass (`sampling.parallel`) against one: speed, codes found per pass, and whether the images are the same."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import xomni_jax
from tests.benchmarks import machine, timing
from tests.benchmarks.report import OURS, Report, machine_line
from xomni_jax.core.tables import aligned
from xomni_jax.data.rendered import RenderedConfig
from xomni_jax.data.sources import DataSection, first_batch
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.keys import image_keys
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.parallel import ParallelSampler
from xomni_jax.sampling.segments import image_spec
from xomni_jax.sequence.padding import pad_prompts

GRID, LENGTHS = (4, 16), (12, 16)  # codes of an image, and letters of its sign
BATCHES, WINDOWS, COMPARED = (1, 16, 64), (4, 8, 16), 256


def run(path: str, repeats: int, seconds: float) -> Report:
    """Images of 64 codes on held-out signs, with the released sampling and without truncation."""
    model, before, rows, data = xomni_jax.load(path), machine.load(), [], []
    share = seconds / (len(BATCHES) * len(WINDOWS))
    for window in WINDOWS:
        for name, sampling in (("free", SamplingConfig(top_k=0, min_p=0.0, window=window)), ("released", SamplingConfig(window=window))):
            found = passes(model, sampling)
            row = {"window": window, "sampling": name, **found}
            if name == "free":
                row["ratios"] = {B: timing.measure(case(model, sampling, B), repeats, share).ratio for B in BATCHES}
            data.append(row)
            rates = [f"{row['ratios'][B]:.2f}" if "ratios" in row else "" for B in BATCHES]
            per_pass = f"{found['mean']:.2f}", f"{found['slowest']:.2f}", f"{found['unequal']} of {COMPARED}"
            rows.append((str(window), name, *per_pass, *rates))
    head = ("window", "sampling", "codes a pass", "slowest image", "other images", *(f"speed, batch {B}" for B in BATCHES))
    lines = [
        f"window: images of {GRID[0]} x {GRID[1]} codes, {COMPARED} of them compared with those drawn one by one",
        machine_line("one process", None) + ("" if None in (before, machine.load()) else f"; load {before:g} before"),
        "", aligned([head, *rows]), "",
        "Speed: time of one code per pass over ours. Free: temperature 1 without truncation; released: top-k 50, min-p 0.03.",
    ]  # fmt: skip
    return Report(
        "\n".join(lines), {"benchmark": "window", "rows": data, "versions": machine.versions(OURS), "machine": machine.describe()}
    )


@functools.cache
def prompts(model: XOmni, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [count, S] and lengths of the prompts of held-out signs."""
    signs = RenderedConfig(
        "heldout", sizes=((8 * GRID[0], 8 * GRID[1]),), weights=(1.0,), text_lengths=(LENGTHS,), shapes=0.0, pseudo_words=0.0
    )
    captions = first_batch(DataSection("rendered", signs), 0, count)["caption"]
    return pad_prompts([model.tokenizer.generation_prompt(caption, *GRID) for caption in captions])


def drawer(model: XOmni, sampling: SamplingConfig):
    """The jitted (params, ids, lengths, keys) -> (codes [B, T], passes [B])."""
    engine, T = Engine(model.module("transformer")), GRID[0] * GRID[1]
    spec = image_spec(T, sampling)

    def one_by_one(params, ids, lengths, keys):
        prompt, state = engine.start(params, (ids, lengths), 1, T)
        image = engine.sample(params, prompt, state, spec, keys[:, None])[1]
        return image.ids[:, 0], jnp.full(len(ids), T)

    def together(params, ids, lengths, keys):
        parallel = ParallelSampler(engine, spec, GRID[1])
        prompt, state = engine.start(params, (ids, lengths), 1, parallel.room)
        draft = parallel.advance(params, prompt, parallel.begin(params, state, keys[:, None]), keys[:, None], T)
        return parallel.image(draft).ids[:, 0], draft.passes[:, 0]

    return jax.jit(one_by_one if sampling.window == 1 else together)


def passes(model: XOmni, sampling: SamplingConfig) -> dict[str, float]:
    """Codes per pass, as a mean over images and of the slowest, and how many images differ from those drawn one by one."""
    args = model.params("transformer"), *prompts(model, COMPARED), image_keys(1, COMPARED)
    codes, count = drawer(model, sampling)(*args)
    alone, _ = drawer(model, SamplingConfig(**{**vars(sampling), "window": 1}))(*args)
    T = codes.shape[1]
    return {
        "mean": T / float(np.mean(count)),
        "slowest": T / int(np.max(count)),
        "unequal": int(np.sum(np.any(np.asarray(codes) != np.asarray(alone), axis=1))),
    }


def case(model: XOmni, sampling: SamplingConfig, batch: int) -> timing.Case:
    """`batch` images in windows against the same one by one; an image with a near tie may differ."""
    args = model.params("transformer"), *prompts(model, batch), image_keys(1, batch)
    ours, peer = drawer(model, sampling), drawer(model, SamplingConfig(**{**vars(sampling), "window": 1}))
    return timing.Case(
        f"batch {batch}, window {sampling.window}", lambda: ours(*args)[0], lambda: jax.block_until_ready(peer(*args)[0]),
        timing.unequal_share, 0.05, batch, "images",
    )  # fmt: skip
