"""A tokenizer of pixels learns to reconstruct images through its codes, and is a model that the other commands take."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import linen as nn

import xomni_jax
from xomni_jax.core.config import Changes
from xomni_jax.models.layers import Projection, named
from xomni_jax.models.quantizer import normalize, quantize_straight_through
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.codebook import even_usage
from xomni_jax.training.run import run_stage
from xomni_jax.training.stage import resolve
from xomni_jax.training.state import new_state
from xomni_jax.training.vq import make_update

SIZE = (16, 16)


def config(run_dir, **changes):
    values = dict(
        stage="vq", run_dir=str(run_dir), steps=12, batch_size=8, log_every=1, save_every=100, grid_every=12,
        llamagen_vq=dict(codebook_size=64, z_channels=16, in_features=16, block_channels=(16,), layers_per_block=1, groups=8),
        data=dict(sizes=(SIZE,), weights=(1.0,), text_lengths=((2, 2),), shapes=0.0),
        tokenizer=dict(warmup_steps=3, ramp_steps=2, start_batches=1, restart_every=4), validation=dict(every=6, batches=1),
        optimizer=dict(learning_rate=2e-3, warmup_steps=1), mesh=dict(data=8, fsdp=1),
    )  # fmt: skip
    return resolve(Changes(values | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq") / "run"
    run_stage(config(folder))
    return folder


def test_reconstruction_gets_better(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss/l2"] < 0.7 * lines[0]["loss/l2"]
    validated = [line["validation/loss/l2"] for line in lines if line.get("validation/loss/l2") is not None]
    assert len(validated) == 2 and max(validated) < lines[0]["loss/l2"]
    assert 0 < lines[-1]["validation/codes/used"] <= 1 and (run / "images" / "step_000012.png").is_file()
    assert lines[-1]["loss/total"] == pytest.approx(lines[-1]["loss/l2"] + lines[-1]["loss/quantizer"], rel=1e-5)


def test_the_model_encodes_and_decodes(run):
    model = xomni_jax.load(run / "model")
    image = np.full((*SIZE, 3), 200, np.uint8)
    codes = np.stack(model.encode([image]))
    assert codes.shape == (1, *model.grid(*SIZE)) and model.image_size() == SIZE
    assert np.asarray(model.decode(codes)[0]).shape == image.shape


def test_a_run_goes_on_from_a_model(run, tmp_path):
    """Its codebook is kept, whose rows a new start would draw again."""
    slow = dict(steps=1, grid_every=0, validation=dict(every=0), optimizer=dict(learning_rate=1e-9))
    more = config(tmp_path / "more", init_from=str(run / "model"), **slow)
    run_stage(more)
    old, new = (xomni_jax.load(path / "model").params("llamagen_vq")["codebook"] for path in (run, tmp_path / "more"))
    np.testing.assert_allclose(new, old, atol=1e-6)


class OneLayer(nn.Module):
    """A tokenizer without depth, which compiles in a moment."""

    @nn.compact
    def __call__(self, pixels_BHWC, skip_B):
        codebook = self.param("codebook", named(nn.initializers.normal(), None, None), (7, 2))
        z = normalize(Projection((2,), (None, None), bias=True)(pixels_BHWC))
        q = quantize_straight_through(z, codebook, skip_B)
        return {"pixels": Projection((3,), (None, None), bias=True)(q.rows), "codes": q.codes, "z": z, "losses": q.losses, "usage": q.usage}


def test_micro_batches_change_nothing(tmp_path, rng):
    cfg, vq, key = config(tmp_path), OneLayer(), jax.random.key(0)
    batch = {"pixels": rng.uniform(-1, 1, (4, 3, 2, 3)).astype(np.float32)}
    init = lambda: {"tokenizer": vq.init(key, batch["pixels"], None)["params"]}  # noqa: E731
    found = []
    for parts in (1, 2):
        optimizer = cfg.make_optimizer()
        create, _ = new_state(init, optimizer, make_mesh({}, jax.devices()[:1]), cfg.guard, lambda: even_usage(7))
        state, metrics, z = make_update(vq, optimizer, cfg.tokenizer, parts)(create(), batch, key, np.float32(0.5))
        found.append((metrics, state.extra["usage"], state.params))
    assert z.shape == (4, 3, 2, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)
