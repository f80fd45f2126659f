"""Leave-one-out FID: the paper's worked numbers, brute force, memory over requests, and the scorer on images."""

import re

import numpy as np
import pytest

from tests.rewards.images import sign
from xomni_jax.core.config import ConfigError
from xomni_jax.core.registry import RegistryError
from xomni_jax.rewards import protocol
from xomni_jax.rewards.scorer import ServiceError, build_scorer
from xomni_jax.rewards.services.loo_fid import LeaveOneOutFID, read_statistics, write_statistics

REAL = np.array([0.0, 1.0]), np.diag([1.0, 0.25])
OUTLIER = [[0.0, 1.0], [1.0, 1.5], [-1.0, 0.5], [4.0, 3.0]]
COLLAPSED = [[0.2, 1.0], [0.2, 1.0], [0.2, 1.0], [-1.0, 0.4]]
NO_STATE = ([0, 0], [0, 0], 0)
WORKED = {  # options, (mean, square, calls) before, samples, FID, rewards; from a float64 transcription of the paper's code
    "outlier": (
        {}, NO_STATE, OUTLIER, 2.1979282665335043,
        [1.4150600643267093, 0.7347878181276863, 1.8862221388066653, -2.1558363855199354],
    ),
    "collapsed": ({}, NO_STATE, COLLAPSED, 0.3209618943214929, [-0.005175456696123681] * 3 + [0.9690351056596906]),
    "average": (
        {"decay": 0.5}, ([0.1, 0.9], [0.65, 0.97], 0), OUTLIER, 0.6781144502584333,
        [0.509698685606746, 0.2757622399332895, 0.6276434351764657, -0.6283449227887621],
    ),
    "average, debiased": (
        {"decay": 0.9, "debias": True}, ([0.0271, 0.2439], [0.17615, 0.26287], 3), OUTLIER, 0.24204380827026561,
        [0.20929611303828521, 0.11052373522739922, 0.2565394106012451, -0.18536076230135456],
    ),
    "average, from a start": (
        {"decay": 0.99, "debias": True}, ([0.001, 0.009], [0.0065, 0.0097], 1), OUTLIER, 0.6842774813819382,
        [0.5136696731640641, 0.277903183695437, 0.6326991870058202, -0.6345775963873312],
    ),
    "two samples": ({}, NO_STATE, OUTLIER[:2], 0.624999999998, [1.8749970000039997, 0.6249970000039999]),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKED)
def test_worked_numbers(name):
    options, (mean, square, calls), samples, fid, rewards = WORKED[name]
    made = LeaveOneOutFID(*REAL, **options)
    made.restore({"mean": np.array(mean), "square": np.array(square), "calls": np.array(calls)})
    got, got_fid = made.rewards(np.array(samples))
    np.testing.assert_allclose(got, rewards, atol=1e-9)
    assert got_fid == pytest.approx(fid, abs=1e-9)


def test_worked_numbers_of_whole_covariances():
    made = LeaveOneOutFID(REAL[0], np.array([[1.0, 0.3], [0.3, 0.25]]), full=True)
    rewards, fid = made.rewards(np.array(OUTLIER))
    assert fid == pytest.approx(2.507506439615508, abs=1e-7)
    np.testing.assert_allclose(rewards, [1.4455037635315602, 0.7826797281739379, 1.8578999230636946, -2.3303035775516605], atol=1e-7)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("decay, debias", [(None, False), (0.7, False), (0.7, True)])
def test_brute_force(rng, full, decay, debias):
    """Three calls of other sizes; every mean and covariance recomputed from the weighted samples themselves."""
    basis = rng.normal(size=(5, 5))
    real = rng.normal(size=5), basis @ basis.T
    made, history = LeaveOneOutFID(*real, full, decay, debias), []

    def moments(calls):
        """Weighted mean and covariance of the samples of all calls, the last of which may lack one."""
        if decay is None:
            calls = calls[-1:]
        ages = range(len(calls) - 1, -1, -1)
        shares = [(1 - (decay or 0)) * (decay or 0) ** age for age in ages]
        if not debias and decay:
            shares[0] /= 1 - decay  # the average starts with the first call
        weights = np.concatenate([np.full(len(x), share / len(x)) for x, share in zip(calls, shares)])
        x = np.concatenate(calls)
        mean = np.average(x, axis=0, weights=weights)
        return mean, (x - mean).T @ ((x - mean) * weights[:, None]) / weights.sum()

    def fid(mean, covariance):
        gap = ((real[0] - mean) ** 2).sum()
        if full:
            roots = np.sqrt(np.linalg.eigvals(real[1] @ covariance).astype(complex)).real
            return gap + np.trace(real[1] + covariance) - 2 * roots.sum()
        return gap + ((np.sqrt(np.diag(real[1])) - np.sqrt(np.diag(covariance))) ** 2).sum()

    for count in (9, 3, 6):
        samples = rng.normal(size=(count, 5))
        rewards, whole = made.rewards(samples)
        history.append(samples)
        assert whole == pytest.approx(fid(*moments(history)), abs=1e-5)
        without = [fid(*moments([*history[:-1], np.delete(samples, n, 0)])) for n in range(count)]
        np.testing.assert_allclose(rewards, np.array(without) - whole, atol=1e-5)


def test_it_starts_from_statistics(rng):
    """A start is what the average holds, and with debias one call of it."""
    x = rng.normal(size=(50, 2))
    start = x.mean(0), np.cov(x, rowvar=False)
    for debias in (False, True):
        made = LeaveOneOutFID(*REAL, decay=0.9, debias=debias, start=start)
        factor = 0.1 if debias else 1.0
        np.testing.assert_allclose(made.state()["mean"], factor * start[0])
        np.testing.assert_allclose(made.state()["square"], factor * (start[0] ** 2 + start[1].diagonal()))
        assert made.state()["calls"] == int(debias)


def test_memory_is_saved_and_restored(rng):
    one, calls = LeaveOneOutFID(*REAL, decay=0.8), rng.normal(size=(3, 4, 2))
    one.rewards(calls[0])
    two = LeaveOneOutFID(*REAL, decay=0.8)
    two.restore({name: value.copy() for name, value in one.state().items()})
    for x in calls[1:]:
        np.testing.assert_array_equal(one.rewards(x)[0], two.rewards(x)[0])
    two.restore({})
    np.testing.assert_array_equal(two.rewards(calls[0])[0], LeaveOneOutFID(*REAL, decay=0.8).rewards(calls[0])[0])


def signs(ground, count=6):
    return [sign(letter, 32, 48, ground) for letter in "ABCDEFGHIJKLMNOP"[:count]]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    for n, image in enumerate(signs((205, 40, 40), 16)):
        (folder / f"{n}.png").write_bytes(protocol.encode_image(image))
    return folder


def test_images_like_the_real_ones_help(references, tmp_path):
    options = {"references": str(references), "features": "efficientnet", "statistics": str(tmp_path / "real.npz"), "batch": 3}
    scorer = build_scorer("loo_fid", options)
    images = [*signs((205, 40, 40)), sign("#%", 40, 40, (20, 60, 220))]
    items = [{"prompt": "", "targets": {}}] * len(images)
    scores = scorer.score(images, items)
    assert [s.value > 0 for s in scores] == [True] * 6 + [False] and len({s.detail["fid"] for s in scores}) == 1
    # A service that starts again reads the statistics alone, and goes on where the first one stopped.
    again = build_scorer("loo_fid", {k: v for k, v in options.items() if k != "references"} | {"batch": 32})
    again.restore(scorer.state())
    second, repeated = scorer.score(images[1:], items[1:]), again.score(images[1:], items[1:])
    np.testing.assert_allclose([s.value for s in second], [s.value for s in repeated], rtol=1e-4)
    assert [s.value for s in second] != [s.value for s in scores[1:]]
    assert scorer.scope == "set" and scorer.version == again.version
    assert re.fullmatch("loo-fid/efficientnet/real-[0-9a-f]{8}/diagonal/decay-0.5", scorer.version)
    (alone,) = scorer.score(images[:1], items[:1])
    assert alone.value is None and alone.error == "leave-one-out FID needs at least two images in one request"


def test_bad_input(references, tmp_path):
    given = {"references": str(references), "features": "efficientnet"}
    for options, kind, said in (
        ({}, ConfigError, "give the real images as references=FOLDER, or as statistics=FILE.npz"),
        (given | {"decay": 1.0}, ConfigError, "decay=1.0 must be at least 0 and less than 1"),
        (given | {"batch": 0}, ConfigError, "batch=0 must be at least 1"),
        (given | {"references": str(tmp_path)}, ServiceError, "holds 0 images; give a folder of 2 or more"),
        (given | {"start": str(tmp_path / "x.npz")}, ServiceError, "x.npz cannot be read as an npz file with `mu` and `sigma`"),
        (given | {"statistics": "/none/x.npz"}, ServiceError, "--statistics /none/x.npz cannot be written"),
        ({"features": "efficientnet", "statistics": str(tmp_path / "x.npz")}, ServiceError, "does not exist; give --references FOLDER"),
    ):
        with pytest.raises(kind, match=said):
            build_scorer("loo_fid", options)
    file = tmp_path / "other.npz"
    write_statistics(file, np.zeros(3), np.zeros((3, 3)))
    assert read_statistics(file, 3)[1].shape == (3, 3)
    with pytest.raises(ServiceError, match=r"has a `mu` of \[3\] and a `sigma` of \[3, 3\]; these features are 384"):
        build_scorer("loo_fid", given | {"statistics": str(file)})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ServiceError, match="cannot be read as an npz file"):
        build_scorer("loo_fid", given | {"statistics": str(file)})
    assert not list(tmp_path.glob("*.part*"))


def test_features_of_ones_own(references, tmp_path):
    """A function in a file makes them from the options; what is compared is then the mean colour alone."""
    (tmp_path / "own.py").write_text(
        "import numpy as np\n\ndef colours(options):\n    return lambda images: np.stack([np.asarray(x).mean((0, 1)) for x in images])\n"
    )
    own = {"references": str(references), "features": f"{tmp_path / 'own.py'}:colours", "decay": 0.0}
    scorer, items = build_scorer("loo_fid", own), [{"prompt": "", "targets": {}}] * 7
    values = [s.value for s in scorer.score([*signs((205, 40, 40)), sign("A", 32, 48, (20, 60, 220))], items)]
    assert min(values[:6]) > 0 > values[6] and len(scorer.state()["mean"]) == 3
    with pytest.raises(RegistryError, match="the features 'nets' is unknown; use one of inception, clip, efficientnet"):
        build_scorer("loo_fid", own | {"features": "nets"})
