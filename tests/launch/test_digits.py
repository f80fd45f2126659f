"""The classifiers of launch/digits.py: they learn, and the scorer and the features of scorer loo_fid are those of their file."""

import flax.traverse_util
import numpy as np
import pytest

from launch import digits
from xomni_jax.rewards.scorer import ServiceError, build_scorer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Bars, each class in rows of its own, and a classifier of them."""
    rng, labels = np.random.default_rng(0), np.arange(640) % 10
    images = rng.integers(0, 60, (640, 28, 28, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 4] = 255
    file = tmp_path_factory.mktemp("digits") / "bars.npz"
    params = flax.traverse_util.flatten_dict(digits.train(images, labels))
    np.savez(file, **{"/".join(name): np.asarray(x) for name, x in params.items()})
    return file, images[:20], labels[:20]


def test_the_probability_of_the_class_that_was_asked_for(trained):
    file, images, labels = trained
    scorer = build_scorer(f"{digits.__file__}:DigitScorer", {"model": str(file)})
    asked = [{"prompt": str(label)} for label in labels]
    wrong = [{"prompt": str((label + 5) % 10)} for label in labels]
    right = np.array([score.value for score in scorer.score(images, asked)])
    assert right.mean() > 0.9 > 0.1 > np.mean([score.value for score in scorer.score(images, wrong)])
    probabilities, features = digits.Classifier(str(file))(images)
    np.testing.assert_allclose(right, probabilities[np.arange(20), labels], rtol=1e-6)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    assert features.shape == (20, 64) and len(scorer.model_hash) == 64


def test_refusals(trained):
    file, images, _ = trained
    with pytest.raises(ServiceError, match="none.npz is no file; train a classifier with `python -m launch.digits DATA first none.npz`"):
        build_scorer(f"{digits.__file__}:DigitScorer", {"model": "none.npz"})
    with pytest.raises(ValueError, match="the images have 14x28 pixels; digits have 28x28"):
        digits.Classifier(str(file))(images[:, :14])
    with pytest.raises(SystemExit, match="python -m launch.digits DATA HALF OUT.npz"):
        digits.main(["data", "third", "out.npz"])
