"""The table of launch/loo_fid.sh.

python -m launch.loo_fid OUT DATA FILE    draws digits with OUT/c2i and OUT/{instance,early,both}_SEED, judges them and writes FILE

The classifier OUT/first.npz gave the reward; OUT/second.npz, of the other half of DATA/train, judges, against the digits of DATA/heldout.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

import xomni_jax
from launch.digits import Classifier, read_digits
from xomni_jax.core.tables import aligned
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.services.loo_fid import LeaveOneOutFID
from xomni_jax.sampling.keys import image_keys
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sharding.arrays import whole

VARIANTS = ("instance", "early", "both")
GUIDANCES = (1.0, 1.5, 2.0)  # of the model before; after, digits are drawn without
EACH, BATCH, SEED = 50, 100, 7  # digits of each class, and of a batch; the seed is no run's
COLUMNS = ("reward", "judge", "entropy", "fid", "class_fid")


def draw(model: XOmni, guidance: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(uint8 images [10 x EACH, 28, 28, 3] by class, labels, minus the mean log-prob of a code in nats: its entropy given the class)."""
    labels = np.repeat(np.arange(10), EACH)
    keys, sampling, images, logp = image_keys(SEED, len(labels)), SamplingConfig(top_k=0, min_p=0.0, guidance=guidance), [], []
    for start in range(0, len(labels), BATCH):
        rows = slice(start, start + BATCH)
        prompts = [str(label) for label in labels[rows]]
        out = model.sample_codes(prompts, model.grid(28, 28), keys[rows, None], sampling)
        logp.append(whole(out["logp"]))
        images.append(whole(model.decode_images(out["codes"][:, 0], prompts, None)))
    return np.concatenate(images), labels, -float(np.mean(logp))


class Judge:
    """What is measured of digits, against real ones."""

    def __init__(self, out: Path, real: np.ndarray, labels: np.ndarray):
        self.reward, self.judge = Classifier(str(out / "first.npz")), Classifier(str(out / "second.npz"))
        features = self.judge(real)[1].astype(np.float64)
        self.real = [_fid(features), *(_fid(features[labels == digit]) for digit in range(10))]

    def __call__(self, images: np.ndarray, labels: np.ndarray, entropy: float) -> dict[str, float]:
        """COLUMNS: probability of the class by the classifier of the reward and by the judge, entropy of a code, and diagonal FID of the
        judge's features, of all digits and on average over the digits of each class."""
        rows, (judged, features) = np.arange(len(labels)), self.judge(images)
        features = features.astype(np.float64)
        of_all, *of_class = (
            fid.fid(x.mean(0), (x**2).mean(0))
            for fid, x in zip(self.real, [features, *(features[labels == digit] for digit in range(10))], strict=True)
        )
        values = self.reward(images)[0][rows, labels].mean(), judged[rows, labels].mean(), entropy, of_all, np.mean(of_class)
        return {name: float(value) for name, value in zip(COLUMNS, values, strict=True)}


def _fid(features_ND: np.ndarray) -> LeaveOneOutFID:
    return LeaveOneOutFID(features_ND.mean(0), np.cov(features_ND, rowvar=False))


def collect(out: Path, data: Path) -> dict[str, dict[str, float]]:
    """{run: what was measured}. OUT/measured.json keeps it, so that a run is measured once."""
    file, (real, labels) = out / "measured.json", read_digits(data / "heldout")
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}
    judge, model = Judge(out, real, labels), xomni_jax.load(out / "c2i" / "model")
    held = np.concatenate([np.flatnonzero(labels == digit)[:EACH] for digit in range(10)])

    def reconstructed() -> np.ndarray:
        parts = (model.encode_pixels(to_pixels(x)) for x in np.split(real[held], len(held) // BATCH))
        return np.concatenate([whole(model.decode_images(codes, [], None)) for codes in parts])

    wanted = {
        "real digits": lambda: (real[held], labels[held], 0.0),
        "real digits through the tokenizer": lambda: (reconstructed(), labels[held], 0.0),
        **{f"before, guidance {guidance:g}": partial(draw, model, guidance) for guidance in GUIDANCES},
        **{
            run.name: lambda run=run: draw(xomni_jax.load(run / "model"), 1.0)
            for name in VARIANTS
            for run in sorted(out.glob(f"{name}_*"))
            if (run / "model").is_dir()
        },
    }
    for name, images in wanted.items():
        if name not in found:
            found[name] = judge(*images())
            file.write_text(json.dumps(found))
    return {name: found[name] for name in wanted}


def table(found: dict[str, dict[str, float]]) -> str:
    """A row per run."""
    return aligned([("run", *COLUMNS), *((name, *(f"{values[c]:.4f}" for c in COLUMNS)) for name, values in found.items())])


def main(arguments: list[str]) -> None:
    """See the module."""
    if len(arguments) != 3:
        sys.exit(__doc__)
    found = collect(Path(arguments[0]), Path(arguments[1]))
    print(table(found))
    rounded = {run: {name: round(value, 6) for name, value in values.items()} for run, values in found.items()}
    Path(arguments[2]).write_text(json.dumps(rounded, indent=1) + "\n")
    print(arguments[2])


if __name__ == "__main__":
    main(sys.argv[1:])
