"""Classifiers of the digits of xomni data make mnist, as a reward, as features of scorer loo_fid, and as a judge.

python -m launch.digits DATA HALF OUT.npz    trains on one half of DATA/train (first or second, in an order drawn once: records 0, 2, ...
    are of other writers than 1, 3, ...) and writes the classifier, and beside it OUT.statistics.npz, the moments of the half's features,
    for `xomni serve-reward loo_fid --statistics`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from PIL import Image

from xomni_jax.rewards import Score, Scorer
from xomni_jax.rewards.model_files import model_hash
from xomni_jax.rewards.scorer import ServiceError
from xomni_jax.rewards.services.loo_fid import write_statistics

SIDE, WIDTH, BATCH, EPOCHS = 28, 64, 64, 3
HALVES = ("first", "second")


class Network(nn.Module):
    """Digits [B, 28, 28] in [0, 1] -> (logits [B, 10], features [B, 64])."""

    @nn.compact
    def __call__(self, x_BYX: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x_BYX[..., None]
        for channels in (16, 32):
            x = nn.relu(nn.Conv(channels, (3, 3), (2, 2))(x))
        features_BD = nn.relu(nn.Dense(WIDTH)(x.reshape(len(x), -1)))
        return nn.Dense(10)(features_BD), features_BD


class Classifier:
    """A trained network of a file. ServiceError where there is none."""

    def __init__(self, file: str):
        if not Path(file).is_file():
            raise ServiceError(f"{file or 'the model'} is no file; train a classifier with `python -m launch.digits DATA first {file}`")
        with np.load(file) as arrays:
            params = flax.traverse_util.unflatten_dict({tuple(name.split("/")): arrays[name] for name in arrays.files})
        self._run = jax.jit(lambda x_BYX: Network().apply({"params": params}, x_BYX))

    def __call__(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images [28, 28, 3] -> (probability of each class [N, 10], features [N, 64])."""
        x_BYX = np.stack(images)[..., 0] / np.float32(255)
        if x_BYX.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"the images have {x_BYX.shape[1]}x{x_BYX.shape[2]} pixels; digits have {SIDE}x{SIDE}")
        logits, features = self._run(np.pad(x_BYX, ((0, -len(x_BYX) % BATCH), (0, 0), (0, 0))))  # few shapes, few programs
        return np.asarray(nn.softmax(logits))[: len(x_BYX)], np.asarray(features)[: len(x_BYX)]


class DigitScorer(Scorer):
    """The probability of the digit that was asked for."""

    name = "digit"
    scale = "a probability, of real digits 0.98 on average"
    range = (0.0, 1.0)

    @dataclass(frozen=True)
    class Options:
        """The classifier.

        Attributes:
          model: its file, as python -m launch.digits writes it.
        """

        model: str = ""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._classifier, self.model_hash = Classifier(self.options.model), model_hash(self.options.model)

    def score(self, images: Sequence[np.ndarray], items: Sequence[Any]) -> list[Score]:
        """See Scorer. A prompt is the number of a class."""
        probabilities = self._classifier(images)[0]
        return [Score(float(p[int(item["prompt"])])) for p, item in zip(probabilities, items, strict=True)]


def features(options: Any) -> Callable[[Sequence[Image.Image]], np.ndarray]:
    """Features of a classifier for scorer loo_fid: its `--features launch/digits.py:features --model FILE`."""
    classifier = Classifier(options.model)
    return lambda images: classifier([np.asarray(image.resize((SIDE, SIDE))) for image in images])[1]


def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images [N, 28, 28, 3], labels [N]) of a split."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("L")) for row in rows])
    return np.repeat(images[..., None], 3, -1), np.array([int(row["concept"]) for row in rows])


def train(images_NYXC: np.ndarray, labels_N: np.ndarray, seed: int = 0) -> Any:
    """Parameters after `EPOCHS` of Adam on the cross-entropy."""
    steps = EPOCHS * (len(labels_N) // BATCH)
    optimizer, net = optax.adam(optax.cosine_decay_schedule(2e-3, steps)), Network()
    params = net.init(jax.random.key(seed), jnp.zeros((1, SIDE, SIDE)))["params"]
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, x_BYX, label_B):
        def loss(params):
            logits, _ = net.apply({"params": params}, x_BYX / 255.0)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label_B).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        for rows in rng.permutation(len(labels_N))[: len(labels_N) // BATCH * BATCH].reshape(-1, BATCH):
            params, state = update(params, state, images_NYXC[rows, :, :, 0], labels_N[rows])
    return params


def main(arguments: list[str]) -> None:
    """See the module."""
    if len(arguments) != 3 or arguments[1] not in HALVES or not arguments[2].endswith(".npz"):
        sys.exit(__doc__)
    (data, half, file), (images, labels) = arguments, read_digits(Path(arguments[0]) / "train")
    order = np.random.default_rng(0).permutation(len(labels)).reshape(2, -1)
    own, other = order if half == "first" else order[::-1]
    params = train(images[own], labels[own])
    np.savez(file, **{"/".join(name): np.asarray(x) for name, x in flax.traverse_util.flatten_dict(params).items()})
    classifier = Classifier(file)
    found = classifier(images[own])[1].astype(np.float64)
    write_statistics(Path(file).with_suffix(".statistics.npz"), found.mean(0), np.cov(found, rowvar=False))
    seen, unseen = ((classifier(images[rows])[0].argmax(-1) == labels[rows]).mean() for rows in (own, other))
    print(f"{file}: right for {seen:.2%} of {data}'s {half} half and {unseen:.2%} of the other")


if __name__ == "__main__":
    main(sys.argv[1:])
