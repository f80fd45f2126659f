"""Janus-Pro-R1 as a run: what is drawn and given, what is rewarded, and what is learned."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xomni_jax
from tests.miniature import stage_config
from tests.rl.pixel_service import pixel_service
from tests.test_metrics import documented, generic
from tests.training.test_stages import assert_same, metrics, params, stop_after
from xomni_jax.core.config import ConfigError
from xomni_jax.rewards.combine import Combined
from xomni_jax.rl.advantages import AdvantageConfig
from xomni_jax.rl.methods import janus_pro_r1 as janus
from xomni_jax.rl.methods import judged_images
from xomni_jax.rl.methods.judged_images import says
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.training.run import run_stage

ASKED = "Does the image show what was asked for? Answer yes or no, and say why."
SMALL = (
    "optimizer.warmup_steps=0",
    "optimizer.learning_rate=0.01",
    "save_every=6",
    "grid_every=10",
    "verdict.length=5",
    f"verdict.question={ASKED!r}",
)
OWN = "credit=(('verdict','verdict',1.0),)"
HALVES = ("batch_size=8", "rollout.chunks=2", "grpo.updates_per_batch=2", "rollout.segment=4", "steps=10", "verdict.threshold=-1", OWN)


def config(run_dir, model_dir, url, *overrides):
    """Four prompts with four rollouts each; one reward."""
    rewards = (f"rewards.ocr.urls=('{url}',)", "rewards.shapes.weight=None")
    own = (f"init_from={model_dir}", f"verdict.question={ASKED!r}", "optimizer.rates=()")
    return stage_config("../methods/janus_pro_r1", run_dir, *own, *rewards, *SMALL, *overrides)


@pytest.fixture(scope="module")
def service():
    with pixel_service() as running:
        yield running


@pytest.fixture(scope="module")
def patched():
    """A random model says neither yes nor no: the parity of the first id decides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judged_images, "says", lambda tokenizer, ids_PRL, lengths_PR: ids_PRL[..., 0] % 2)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, service, patched):
    """A run in two chunks and two updates per batch, all images good; what it learned from, and how many images were scored."""
    seen, heard, call = [], [], janus.JudgedRollouts.__call__

    def kept(self, *args):
        out = call(self, *args)
        seen.append(out)
        return out

    run_dir = tmp_path_factory.mktemp("janus") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(janus.JudgedRollouts, "__call__", kept)
        service.heard = heard.extend
        run_stage(config(run_dir, model_dir, service.url, *HALVES))
        service.heard = lambda images: None
    return run_dir, seen, len(heard)


def test_a_run(finished):
    lines = metrics(finished[0])
    assert [line["step"] for line in lines] == [*range(1, 11)]
    for line in lines:
        assert generic(line) <= documented("grpo") | documented("janus_pro_r1")
        # Float32: what the sampler drew piece by piece the trainer finds again in one pass, texts and both images.
        assert line["grpo/logp_gap_max"] < 1e-4
        assert 0 < line["verdict/yes_frac"] < 1 and line["reward/total/first"] != line["reward/total/mean"]
    assert finished[2] == sum(round(32 * (2 - line["verdict/yes_frac"])) for line in lines), "no second images of accepted ones"
    assert len(list((finished[0] / "images").glob("*.png"))) == 2


def test_what_a_trajectory_holds(finished, model_dir):
    """Prompt, image, question, verdict, its end, prefix, image, in the tokens of the tokenizer."""
    rows, final, images, _ = finished[1][0]
    text = xomni_jax.load(model_dir).tokenizer
    first, question, verdict, prefix, last = jax.tree.map(np.asarray, rows.segments)
    asked = text.conversation_prompt([("user", [ASKED])])
    for n in range(len(first.ids)):
        assert question.ids[n].tolist() == [text.eom, *asked]
        said = verdict.ids[n, : verdict.lengths[n]].tolist()
        given = prefix.ids[n, : prefix.lengths[n]].tolist()
        whole = [*said, *given]
        assert whole.count(text.end_of_turn) == 1 and whole[-len(text.image_prefix(2, 4)) :] == text.image_prefix(2, 4).tolist()
        assert verdict.lengths[n] == 5 or said[-1] == text.end_of_turn
    assert not np.array_equal(first.ids, last.ids)
    yes = verdict.ids[:, 0] % 2 == 1
    assert yes.any() and not yes.all() and len(images) == len(yes) and final.ok_PR.all()


def test_which_segments_learn_what():
    """Two groups of two, the default credit: the last image of a trajectory counts where it was asked for."""

    def known(values):
        total = np.array(values)
        return Combined(total, np.isfinite(total), None, {"reward/total/mean": 0.0})

    verdict = SimpleNamespace(lengths=jnp.array([[2, 2], [2, 2]]))
    drawn = janus.Judged((None, None, verdict), np.array([[1, 0], [0, -1]]), np.array([[True, True], [False, True]]))
    first, final = known([[0.9, 0.2], [0.6, np.nan]]), known([[0.9, 0.4], [0.1, 0.5]])
    run = janus.JanusProR1Run(verdict=judged_images.VerdictConfig(threshold=0.5))
    advantages, oks, told = drawn.worth(first, final, run, AdvantageConfig(eps=1e-9))
    np.testing.assert_array_equal(np.array(oks), [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]])
    # generation 1.8 and 0.6, verdict 2 and 1: each is half the sum's deviation away from its mean, 1 / sqrt(2), to float32's 1e-6.
    np.testing.assert_allclose(np.array(advantages), [[2**0.5, -(2**0.5), 0, 0]] * 3, atol=1e-6)
    assert told["verdict/accuracy"] == told["verdict/good_frac"] == pytest.approx(2 / 3) and told["verdict/unclear_frac"] == 0.25


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(finished, model_dir, service, patched, tmp_path, monkeypatch):
    again = config(tmp_path / "run", model_dir, service.url, *HALVES)
    stop_after(6, monkeypatch)
    assert run_stage(again) is None
    run_stage(again)
    assert metrics(tmp_path / "run") == metrics(finished[0])
    assert_same(params(tmp_path / "run", "transformer"), params(finished[0], "transformer"))


def test_verdicts_are_learned(finished):
    """Where every image is good and verdicts are all that counts, more and more verdicts say yes and end."""
    right = [line["verdict/accuracy"] for line in metrics(finished[0])]
    print(right)
    assert np.mean(right[-3:]) > np.mean(right[:3]) + 0.2


def test_rewards_of_trajectories():
    """By hand, T = 2; NaN: the image could not be scored."""
    first, final = np.array([[0.9, 0.2, 0.2, np.nan, 0.3]]), np.array([[0.9, 0.7, 0.2, 0.1, np.nan]])
    yes, right = np.array([[True, False, True, False, False]]), np.array([[True, True, False, False, True]])
    got = janus.bilevel(first, final, yes, right)
    np.testing.assert_allclose(got["generation"], [[1.8, 0.9, 0.4, np.nan, np.nan]])
    np.testing.assert_array_equal(got["verdict"], [[2, 1, 0, np.nan, 1]])


def test_the_first_word_is_the_verdict():
    text = MultimodalTokenizer.load()
    answers = ["Yes, red.", " no: blue", "yesterday", "", "The image, yes"]
    ids = [np.append(text.encode_text(answer), text.end_of_turn) for answer in answers]
    lengths = np.array([[len(x) for x in ids]])
    padded = np.stack([np.pad(x, (0, lengths.max() - len(x))) for x in ids])[None]
    assert says(text, padded, lengths).tolist() == [[1, 0, -1, -1, -1]]
    lengths[0, 0] = 0
    assert says(text, padded, lengths)[0, 0] == -1


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("verdict.length=0",), r"config\.verdict\.length"),
        (("freeze=('lm_head/.*',)",), "the text head does not learn"),
        (("credit=(('ocr','first',1.0),)",), "names the reward 'ocr'; this run has final, first, generation, verdict"),
        (("credit=(('final','thought',1.0),)",), "names the segment 'thought'; the method draws final, first, verdict"),
        (("verdict.question='<MM-Token-3>?'",), r"config\.verdict\.question: .* contains the multimodal token <MM-Token-3>"),
        (("rollout.refills=1",), "leave rollout.refills"),
        (("credit=()",), r"config\.credit is empty"),
    ],
)
def test_settings_that_do_not_fit(overrides, message, model_dir, service, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_stage(config(tmp_path / "run", model_dir, service.url, *overrides))
    assert not (tmp_path / "run" / "checkpoints").exists()
