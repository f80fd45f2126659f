"""The table of launch/star.sh.

python -m launch.star OUT DATA FILE    scores the digits of DATA/heldout with OUT/{spanning_tree,raster}, redraws masked parts, writes FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np

import xomni_jax
from xomni_jax.core.tables import aligned
from xomni_jax.data.images import read_image
from xomni_jax.data.preprocess import preprocess
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.keys import image_keys, image_orders
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.segments import Segment, image_spec
from xomni_jax.sequence.orders import tree_order
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.sharding.arrays import whole

MODELS = ("spanning_tree", "raster")
DIGITS, BATCH, SEED = 512, 64, 11
ORDERS = 8  # per digit, over which log-probs are averaged
SMALLEST, LARGEST = 6, 24  # masked cells of 49
FREE = SamplingConfig(top_k=0, min_p=0.0)
COLUMNS = ("nats", "mixture", "masked_nats", "wrong_codes", "pixel_error")


def masks(grid: tuple[int, int]) -> np.ndarray:
    """Connected sets of cells, bool [DIGITS, Y, X]: the beginnings of tree orders of boxes that lie anywhere in the grid."""
    rng, out = np.random.default_rng(SEED), np.zeros((DIGITS, *grid), bool)
    for mask in out:
        shape = tuple(rng.integers(3, n + 1) for n in grid)  # of a box that the mask lies in
        y, x = (rng.integers(n - m + 1) for n, m in zip(grid, shape))
        size = min(int(rng.integers(SMALLEST, LARGEST + 1)), shape[0] * shape[1])
        box = np.zeros(shape, bool)
        box.ravel()[tree_order(shape, rng)[:size]] = True
        mask[y : y + shape[0], x : x + shape[1]] = box
    return out


def logp(model: XOmni, prompts: list[str], codes: np.ndarray, orders: np.ndarray | None) -> np.ndarray:
    """Log-prob of each code [P, T] given those before it in its order, row by row in the result."""
    ids, lengths = pad_prompts([model.tokenizer.generation_prompt(p, *codes.shape[1:]) for p in prompts], 32)
    flat = codes.reshape(len(codes), -1)
    drawn = flat if orders is None else np.take_along_axis(flat, orders, axis=1)
    found = np.asarray(_score(model)(model.params("transformer"), (ids, lengths), drawn, orders))
    return found if orders is None else np.take_along_axis(found, np.argsort(orders, axis=1), axis=1)


def _score(model: XOmni):
    if not hasattr(model, "score_program"):

        def score(params, prompts, drawn, orders):
            image = Segment(drawn, kind="image", spec=image_spec(drawn.shape[1], FREE), order=orders)
            return Engine(model.module("transformer")).score(params, prompts, (image,))[0][0]

        model.score_program = jax.jit(score)
    return model.score_program


def measure(model: XOmni, prompts: list[str], codes: np.ndarray, masked: np.ndarray) -> dict[str, float]:
    """Means over the digits: nats of a code, and of a masked one given the rest; share of wrong codes and squared error of pixels there."""
    order, grid, nats, mixture, masked_nats, wrong, error = model.config("transformer").order, codes.shape[1:], [], [], [], [], []
    for start in range(0, DIGITS, BATCH):
        rows = slice(start, start + BATCH)
        text, own, hidden = prompts[rows], codes[rows], masked[rows]
        keys = jax.vmap(lambda key: jax.random.split(key, ORDERS))(image_keys(SEED, np.arange(start, start + BATCH)))
        # ---- how likely the digits are ----
        orders = image_orders(order, grid, keys)
        each = np.stack([logp(model, text, own, None if orders is None else orders[:, r]) for r in range(1 if orders is None else ORDERS)])
        nats.append(-each.mean(axis=(0, 2)))
        whole_image = each.sum(axis=2)
        mixture.append(-(np.logaddexp.reduce(whole_image, axis=0) - np.log(len(whole_image))) / own[0].size)
        # ---- what is masked, given the rest ----
        orders = image_orders(order, grid, keys[:, :1], ~hidden)
        found = logp(model, text, own, None if orders is None else orders[:, 0]).reshape(own.shape)
        masked_nats.append([-row[at].mean() for row, at in zip(found, hidden)])
        drawn = whole(model.sample_codes(text, grid, keys[:, :1], FREE, 32, np.where(hidden, -1, own))["codes"])[:, 0]
        assert (drawn == own)[~hidden].all()
        wrong.append([(a != b)[at].mean() for a, b, at in zip(drawn, own, hidden)])
        images, real = (np.asarray(whole(model.decode_images(c, text, None)), np.float32) / 127.5 for c in (drawn, own))
        pixels = hidden.repeat(4, axis=1).repeat(4, axis=2)
        error.append([((a - b)[at] ** 2).mean() for a, b, at in zip(images, real, pixels)])
    every = (np.concatenate(x) for x in (nats, mixture, masked_nats, wrong, error))
    return {name: {"mean": float(x.mean()), "se": float(x.std(ddof=1) / np.sqrt(DIGITS))} for name, x in zip(COLUMNS, every, strict=True)}


def main(out: Path, data: Path, file: Path) -> None:
    """Prints the table, and writes it with the losses of the two runs."""
    lines = [json.loads(line) for line in (data / "heldout" / "metadata.jsonl").read_text().splitlines()[:DIGITS]]
    table: dict[str, dict] = {}
    for name in MODELS:
        model = xomni_jax.load(out / name / "model")
        images = [read_image(data / "heldout" / line["file_name"]) for line in lines]
        codes = np.stack(model.encode_ragged([preprocess(image, model.preprocess_config) for image in images], BATCH))
        table[name] = measure(model, [line["text"] for line in lines], codes, masks(codes.shape[1:]))
        metrics = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        curves = {key: [(m["step"], m[key]) for m in metrics if key in m] for key in ("loss/image", "validation/loss/image")}
        table[name] |= {"curves": curves}
    file.write_text(json.dumps(table, indent=1) + "\n")
    rows = [[name, *(f"{table[name][c]['mean']:.4f} +- {table[name][c]['se']:.4f}" for c in COLUMNS)] for name in MODELS]
    print(aligned([["model", *COLUMNS], *rows]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
