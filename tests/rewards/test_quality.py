"""The quality scorer: its network equals the published one, and every kind of damage lowers the score."""

import pickle

import numpy as np
import pytest

from tests.rewards.damage import DAMAGES, auc_table
from tests.rewards.images import sign
from tests.rewards.running import service
from xomni_jax.data.rendered import RenderedConfig, render_example
from xomni_jax.rewards import protocol
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.scorer import ServiceError
from xomni_jax.rewards.services.efficientnet import EfficientNetLite0, read_legacy_torch
from xomni_jax.rewards.services.quality import QualityScorer, rendered_references


def test_features_equal_the_published_network():
    """Blocks 7 and 10 on one seeded image; numbers from efficientnet_lite_pytorch 0.1.0 under torch, float32."""
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    f = EfficientNetLite0()(image)
    assert f.shape == (2 * (80 + 112),) and f.dtype == np.float32
    np.testing.assert_allclose(f[:4], [2.1394472, -0.7793044, -2.4340835, -6.3015919], rtol=1e-4)
    np.testing.assert_allclose(f[80:82], [4.3131623, 3.9361932], rtol=1e-4)
    np.testing.assert_allclose(f[160:164], [-0.7412739, 2.2649620, -1.3475679, 0.7990243], rtol=1e-4)
    np.testing.assert_allclose(f[272:274], [3.9283438, 3.3247528], rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("references")
    for n, image in enumerate(rendered_references(120)):
        (path / f"{n}.png").write_bytes(protocol.encode_image(image))
    return path


def test_every_damage_lowers_the_score(folder):
    """Direction right everywhere on held-out words; damage to pixels is told with near certainty, misplaced patches less so.

    Through a real service, whose worker computes on one thread.
    """
    images = [render_example(5, n, RenderedConfig(split="heldout"))["image"] for n in range(16)]
    with service("quality", "--references", str(folder), "--workers", "1") as (_, url), RewardClient("quality", url) as client:
        table = auc_table(lambda image: client.score([image], [{"prompt": "", "targets": {}}])[0].value, images)
        score = client.score(images[:1], [{"prompt": "", "targets": {}}])[0]
    assert set(table) == set(DAMAGES)
    assert all(table[name] > 0.85 for name in table if name != "patches shuffled"), table
    assert table["patches shuffled"] > 0.55, table
    assert 0 <= score.value <= 1 and score.value == (1 + score.detail["cosine"]) / 2


def test_too_few_or_broken_references(tmp_path):
    with pytest.raises(ServiceError, match="holds 0 images"):
        QualityScorer(references=str(tmp_path / "absent"))
    for n in range(5):
        (tmp_path / f"{n}.png").write_bytes(protocol.encode_image(sign("A")) if n else b"broken")
    with pytest.raises(ServiceError, match="cannot be read"):
        QualityScorer(references=str(tmp_path))


def test_weights_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ServiceError, match="asks for"):
        read_legacy_torch(file)
    file.write_bytes(b"")
    with pytest.raises(ServiceError, match="cannot be read"):
        read_legacy_torch(file)
    with pytest.raises(ServiceError, match="cannot be read"):
        read_legacy_torch(tmp_path / "absent.pth")
