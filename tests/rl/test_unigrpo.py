"""UniGRPO as a run: one reward for codes and denoising steps, either alone, and what its log-probs are."""

import jax
import numpy as np
import pytest

import xomni_jax
from tests.miniature import stage_config
from tests.rl.pixel_service import pixel_service
from tests.test_metrics import documented, generic
from tests.training.test_stages import assert_same, metrics, params, stop_after
from xomni_jax.core.config import ConfigError
from xomni_jax.rl.methods import unigrpo
from xomni_jax.training.run import run_stage

SMALL = ("decode.steps=4", "flow.window=2", "flow.within=3", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.01", "save_every=1")


def config(run_dir, model_dir, url, *overrides):
    """Three steps of four prompts with four rollouts each; one reward."""
    rewards = (f"rewards.ocr.urls=('{url}',)", "rewards.shapes.weight=None")
    return stage_config("../methods/unigrpo", run_dir, f"init_from={model_dir}", *rewards, "optimizer.rates=()", *SMALL, *overrides)


@pytest.fixture(scope="module")
def service():
    with pixel_service() as running:
        yield running


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, service):
    """A run in which both learn, in two updates per batch and two chunks."""
    run_dir = tmp_path_factory.mktemp("unigrpo") / "run"
    run_stage(config(run_dir, model_dir, service.url, *TWICE))
    return run_dir


TWICE = ("batch_size=8", "rollout.chunks=2", "grpo.updates_per_batch=2", "flow.clip=0.2")


def changed(run_dir, model_dir, name):
    before = xomni_jax.load(model_dir).params(name)
    after = xomni_jax.load(run_dir / "model").params(name)
    return any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_both_learn_from_one_reward(finished, model_dir):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert generic(line) <= documented("grpo") | documented("unigrpo") | {"loss/total"}
        # What the sampler drew the trainer finds again: float32 of means over 32 elements whose squares are divided by the noise.
        assert line["flow/logp_gap_max"] < 1e-4 and line["grpo/logp_gap_max"] < 1e-4
        assert line["reward/total/std"] > 0 and line["loss/total"] == pytest.approx(line["loss/grpo"] + line["flow/loss"], abs=1e-6)
        assert line["flow/penalty"] > 0, "after the first update it is no longer the reference"
    assert changed(finished, model_dir, "transformer") and changed(finished, model_dir, "mmdit")
    assert not changed(finished, model_dir, "t5")
    assert len(list((finished / "images").glob("*.png"))) == 3


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(finished, model_dir, service, tmp_path, monkeypatch):
    again = config(tmp_path / "run", model_dir, service.url, *TWICE)
    stop_after(2, monkeypatch)
    assert run_stage(again) is None
    monkeypatch.undo()
    run_stage(again)
    assert metrics(tmp_path / "run") == metrics(finished)
    for name in ("transformer", "mmdit"):
        assert_same(params(tmp_path / "run", name), params(finished, name))


def test_the_decoder_alone_learns_from_rollouts_of_equal_codes(model_dir, service, tmp_path, monkeypatch):
    drawn, decode = [], unigrpo.NoisySteps.__call__

    def seen(self, codes_BYX, *rest):
        drawn.append(np.asarray(codes_BYX))
        return decode(self, codes_BYX, *rest)

    monkeypatch.setattr(unigrpo.NoisySteps, "__call__", seen)
    images = []
    service.heard = images.extend
    run_stage(config(tmp_path / "run", model_dir, service.url, "learn=('mmdit',)", "steps=2"))
    service.heard = lambda images: None
    assert not changed(tmp_path / "run", model_dir, "transformer") and changed(tmp_path / "run", model_dir, "mmdit")
    for codes_BYX in drawn:
        groups = codes_BYX.reshape(-1, 4, *codes_BYX.shape[1:])
        assert (groups == groups[:, :1]).all() and not (groups[0] == groups[1]).all()
    assert len(set(images)) == len(images) == 32, "the rollouts differ by the noise of the decoder"
    lines = metrics(tmp_path / "run")
    assert all("grpo/kl" not in line and abs(line["flow/loss"]) < 1e-5 for line in lines[:1]), "on-policy, advantages sum to 0"


@pytest.mark.parametrize(
    "override, message",
    [
        ("flow.within=5", r"config\.flow\.within=5, but config\.decode\.steps=4"),
        ("decode.guidance=2.0", r"config\.decode\.guidance=2\.0: noisy steps are drawn and learned without guidance"),
    ],
)
def test_settings_that_do_not_fit(override, message, model_dir, service, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_stage(config(tmp_path / "run", model_dir, service.url, override))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_can_learn(model_dir):
    with pytest.raises(ConfigError, match="must hold transformer, mmdit, or both"):
        config("unused", model_dir, "http://127.0.0.1:9", "learn=('t5',)")
    with pytest.raises(ConfigError, match="leave lora.rank"):
        config("unused", model_dir, "http://127.0.0.1:9", "lora.rank=2")
