"""CoRL as a run: images and answers of the same items, their rewards, and what learns."""

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
from xomni_jax.core.preemption import StepRefused
from xomni_jax.data.preprocess import to_pixels
from xomni_jax.data.sources import first_batch
from xomni_jax.rewards.combine import column, combine
from xomni_jax.rewards.protocol import Score
from xomni_jax.rl.advantages import group_advantages
from xomni_jax.rl.methods import corl
from xomni_jax.rl.update import Policy, loss_and_gradient
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.training.run import run_stage

SMALL = ("optimizer.warmup_steps=0", "optimizer.learning_rate=0.01", "grid_every=10", "answers.length=5")
HALVES = ("batch_size=8", "rollout.chunks=2", "grpo.updates_per_batch=2", "rollout.segment=4", "save_every=2")


def config(run_dir, model_dir, url, *overrides, file="corl"):
    """Four items with four rollouts each; one service beside the method's own rewards."""
    rewards = (f"rewards.ocr.urls=('{url}',)", "rewards.shapes.weight=None")
    return stage_config(f"../methods/{file}", run_dir, f"init_from={model_dir}", *rewards, "optimizer.rates=()", *SMALL, *overrides)


@pytest.fixture(scope="module")
def service():
    with pixel_service() as running:
        yield running


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, service):
    """Three steps in two chunks and two updates per batch; what each drew and learned from."""
    seen, rows = [], corl.PairRollouts.rows

    def kept(self, drawn, total):
        out = rows(self, drawn, total)
        seen.append(jax.tree.map(np.asarray, (drawn.made, out[0])) + (drawn.scores, total))
        return out

    run_dir = tmp_path_factory.mktemp("corl") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corl.PairRollouts, "rows", kept)
        run_stage(config(run_dir, model_dir, service.url, *HALVES))
    return run_dir, seen


def test_a_run(finished):
    lines = metrics(finished[0])
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert generic(line) <= documented("grpo") | documented("corl")
        assert line["grpo/logp_gap_max"] < 1e-4  # float32: images and answers are found again after their own prompts
        own = {name: line[f"reward/{name}/mean"] for name in vars(corl.OwnWeights())}
        assert -1 <= own["matching"] <= 1 and -1 <= own["perceptual"] <= 1 and 0 <= own["format"] <= 1
        weighted = sum(weight * own[name] for name, weight in vars(corl.OwnWeights()).items()) + line["reward/ocr/mean"]
        assert line["reward/total/mean"] == pytest.approx(weighted, abs=1e-6)


def test_answers_follow_the_real_images_of_their_items(finished, model_dir, service):
    model, run = xomni_jax.load(model_dir), config("unused", model_dir, service.url, *HALVES)
    examples = first_batch(run.data, run.seed, 8)
    codes = np.asarray(model.encode_pixels(to_pixels(examples["image"])))
    _, rows, scores, _ = finished[1][0]
    image, answer = rows.passes
    for n in range(32):
        asked = model.tokenizer.understanding_prompt(codes[n // 4], examples["question"][n // 4])
        assert answer.prompts[0][n, : answer.prompts[1][n]].tolist() == asked.tolist()
        ids = answer.segments[0].ids[n, : answer.segments[0].lengths[n]]
        right = corl.answer_scores("(.+)", model.tokenizer.decode_text(ids), examples["answer"][n // 4])
        assert (scores["accuracy"][n].value, scores["format"][n].value) == right
    drawn, real = (np.asarray(model.semantics(x)) for x in (image.segments[0].ids.reshape(-1, 2, 4), codes))
    cosine = (drawn * np.repeat(real, 4, 0)).sum(-1) / np.linalg.norm(drawn, axis=-1) / np.linalg.norm(np.repeat(real, 4, 0), axis=-1)
    np.testing.assert_allclose([s.value for s in scores["perceptual"]], cosine.mean((1, 2)), atol=1e-5)  # float32


def test_matching_is_that_of_the_hidden_states(finished, model_dir):
    """One row alone, without padding."""
    model = xomni_jax.load(model_dir)
    net, weights = model.module("transformer"), model.params("transformer")
    _, rows, scores, _ = finished[1][0]  # of the first step: under the parameters of `model_dir`
    image, length = rows.passes[0], int(rows.passes[0].prompts[1][5])
    ids = np.concatenate([image.prompts[0][5, :length], image.segments[0].ids[5] + net.cfg.vocab_size])
    hidden = net.apply({"params": weights}, jnp.asarray(ids)[None])
    words = length - len(model.tokenizer.image_prefix(2, 4))
    alone = corl.token_matching(hidden[:, length:], hidden[:, :words], jnp.ones((1, words), bool))
    assert scores["matching"][5].value == pytest.approx(float(alone[0]), abs=1e-5)


@pytest.mark.parametrize("kind", ["image", "answer"])
def test_each_pass_trains_its_own_head(finished, model_dir, kind):
    model = xomni_jax.load(model_dir)
    t = finished[1][0][1].passes[corl.KINDS.index(kind)]
    t = t.replace(advantage=(np.where(np.arange(32) % 2, 1.0, -1.0).astype(np.float32),))
    run = config("unused", model_dir, "http://127.0.0.1:9")
    with jax.set_mesh(model.mesh):
        loss = lambda p: loss_and_gradient(Policy(model.module("transformer"), 0), p, (t, None, None), run.grpo, 1)  # noqa: E731
        grads, _ = jax.jit(loss)(model.params("transformer"))
    assert [float(jnp.abs(grads[head]["kernel"]).max()) > 0 for head in ("mm_head", "lm_head")] == [kind == "image", kind == "answer"]


def test_a_refined_stage_leaves_the_other_pass_alone(model_dir, service, tmp_path):
    """Answers alone, with services that only report: images are drawn, and their head does not change."""
    weights = ("rewards.ocr.weight=0.0", "steps=1")
    run_stage(config(tmp_path / "run", model_dir, service.url, *weights, file="corl_answers"))
    before, after = (xomni_jax.load(path).params("transformer") for path in (model_dir, tmp_path / "run" / "model"))
    assert np.array_equal(before["mm_head"]["kernel"], after["mm_head"]["kernel"])
    (line,) = metrics(tmp_path / "run")
    assert line["reward/total/mean"] == pytest.approx(0.8 * (line["reward/accuracy/mean"] + line["reward/format/mean"]), abs=1e-6)
    assert "reward/matching/mean" not in line and "reward/ocr/mean" in line and "grpo/kl" in line


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(finished, model_dir, service, tmp_path, monkeypatch):
    again = config(tmp_path / "run", model_dir, service.url, *HALVES)
    stop_after(2, monkeypatch)
    assert run_stage(again) is None
    run_stage(again)
    assert metrics(tmp_path / "run") == metrics(finished[0])
    assert_same(params(tmp_path / "run", "transformer"), params(finished[0], "transformer"))


def test_worked_numbers():
    """Of the published code: token matching, and four rollouts of one item with their advantages."""
    image, text = jnp.array([[[1.0, 0], [0, 1], [1, 1]]]), jnp.array([[[1.0, 0], [-1, 0.5], [9, 9]]])
    assert float(corl.token_matching(image, text, jnp.array([[True, True, False]]))[0]) == pytest.approx(0.720857, abs=1e-6)
    values = {"cycle": [1.1, 0.9, 1.3, 1.0], "matching": [0.30, 0.28, 0.35, 0.25], "accuracy": [1, 0, 1, 0], "format": [1, 1, 0, 0]}
    columns = {name: column([Score(x) for x in own], 1) for name, own in values.items()}
    total = combine(columns, {"cycle": 1.0, "matching": 1.0, "accuracy": 0.8, "format": 0.8})
    np.testing.assert_allclose(total.total_PR, [[3.00, 1.98, 2.45, 1.25]])
    advantage, _ = group_advantages(total.total_PR, total.ok_PR)
    np.testing.assert_allclose(advantage, [[1.119089, -0.256177, 0.377524, -1.240436]], atol=1e-6)


def test_texts():
    form = corl.AnswerConfig().form
    assert corl.answer_scores(form, "<think>a\nb</think>\n<answer> Red</answer>", "red") == (1, 1)
    assert corl.answer_scores(form, "<think></think><answer>blue</answer>", "red") == (0, 1)
    assert corl.answer_scores(form, "red", "red") == (0, 0)
    assert corl.word_f1('a red sign that says "HELLO"', "hello, red") == pytest.approx(2 * 2 / 8)
    with pytest.raises(
        StepRefused, match=r"question 'why\?' has \d+ tokens beside the codes of its image; raise config\.answers\.prompt_length"
    ):
        corl.questions(MultimodalTokenizer.load(), [np.zeros((2, 4), int)], ["why?"], corl.AnswerConfig(prompt_length=9))
    assert corl.word_f1("red", "blue") == corl.word_f1("red", "") == 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("answers.form='.+'",), r"has no group in parentheses"),
        (("answers.form='('",), r"is no regular expression"),
        (("freeze=('lm_head/.*',)",), "the text head does not learn, so that answers cannot"),
        (("credit=(('total','thought',1.0),)",), "names the segment 'thought'; the method draws answer, image"),
        (("rewards.ocr.weight=0.0", *(f"own.{name}=0.0" for name in vars(corl.OwnWeights()))), "all weights are 0"),
    ],
)
def test_settings_that_do_not_fit(overrides, message, model_dir, service, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_stage(config(tmp_path / "run", model_dir, service.url, *overrides))
    assert not (tmp_path / "run" / "checkpoints").exists()
