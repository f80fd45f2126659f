"""TwiG-GRPO as a run: what follows which prompt, what a later thought changes, and what learns."""

import dataclasses

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
from xomni_jax.rl import grpo
from xomni_jax.rl.methods import thoughts
from xomni_jax.rl.methods.thoughts import ThinkingSampler, drawing_programs, score_of
from xomni_jax.rl.trajectory import Passes, credited
from xomni_jax.rl.update import Policy, loss_and_gradient
from xomni_jax.sequence.padding import pad_prompts
from xomni_jax.training.run import run_stage

SMALL = ("optimizer.warmup_steps=0", "optimizer.learning_rate=0.01", "grid_every=10", "thoughts.length=5")
HALVES = ("batch_size=8", "rollout.chunks=2", "grpo.updates_per_batch=2", "rollout.segment=2", "save_every=2", "steps=3")
KINDS = ["thought", "band", "reflection", "redraw"] * 2


def config(run_dir, model_dir, url, *overrides):
    """Four prompts with four rollouts each, images of two bands of four codes; one reward."""
    rewards = (f"rewards.ocr.urls=('{url}',)", "rewards.shapes.weight=None")
    return stage_config("../methods/twig", run_dir, f"init_from={model_dir}", *rewards, "optimizer.rates=()", *SMALL, *overrides)


@pytest.fixture(scope="module")
def service():
    with pixel_service() as running:
        yield running


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, service):
    """A run in two chunks and two updates per batch."""
    run_dir = tmp_path_factory.mktemp("twig") / "run"
    run_stage(config(run_dir, model_dir, service.url, *HALVES))
    return run_dir


def test_a_run(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert generic(line) <= documented("grpo") | documented("twig")
        # Float32: what the sampler drew in each pass the trainer finds again under that pass's prompt.
        assert line["grpo/logp_gap_max"] < 1e-4
        assert 0 <= line["thought/unended_frac"] <= 1 <= line["thought/tokens"] <= 5
    assert {file.name for file in (finished / "images").glob("*.png")} == {"step_000000.png", "step_000003.png"}


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(finished, model_dir, service, tmp_path, monkeypatch):
    again = config(tmp_path / "run", model_dir, service.url, *HALVES)
    stop_after(2, monkeypatch)
    assert run_stage(again) is None
    run_stage(again)
    assert metrics(tmp_path / "run") == metrics(finished)
    assert_same(params(tmp_path / "run", "transformer"), params(finished, "transformer"))


def drawn(model_dir, *overrides):
    """(what the sampler returns for two prompts with four rollouts each, the model) without a run."""
    run, model = config("unused", model_dir, "http://127.0.0.1:9", *overrides), xomni_jax.load(model_dir)
    net, weights = model.module("transformer"), model.params("transformer")
    ids = [model.tokenizer.generation_prompt(p, 2, 4) for p in ("red", "green")]
    keys_PR = jax.random.split(jax.random.key(0), (2, 4))
    with jax.set_mesh(model.mesh):
        programs = drawing_programs(dataclasses.replace(run, batch_size=2), net, (2, 4), jax.eval_shape(lambda: weights), model.mesh)
        sampler = ThinkingSampler.of(run, {name: program.fn for name, program in programs.items()}, (2, 4))
        return sampler(weights, *pad_prompts(ids, run.rollout.prompt_length), keys_PR, None), model


@pytest.fixture(scope="module")
def reflected(model_dir):
    """With reflections. A random model writes no scores: the length of the reflection decides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thoughts, "score_of", lambda text: 100.0 * (len(text) % 2))
        made, model = drawn(model_dir, "thoughts.reflection='Good?'", "rollout.prompt_length=24")
    return made, jax.tree.map(np.asarray, tuple(made["passes"])), model


def test_what_follows_which_prompt(reflected):
    """Prompt, thoughts and bands of every row, in the tokens of the tokenizer; a redrawn band has its reflection for a thought."""
    made, passes, model = reflected
    text = model.tokenizer
    questions = {"thought": thoughts.ThoughtConfig().question, "reflection": "Good?"}
    asks = {kind: text.conversation_prompt([("user", [words])]).tolist() for kind, words in questions.items()}
    prefix, line = text.image_prefix(2, 4).tolist(), text.encode_text("\n").tolist()
    assert len(passes) == len(KINDS)
    redrawn = 0
    for n in range(8):
        rows = [t.prompts[0][n, : t.prompts[1][n]].tolist() for t in passes]
        base = rows[0][: -len(asks["thought"])]
        assert base == text.encode_text(("red", "green")[n // 4]).tolist()
        written, codes, band = [], [], []
        for t, row, kind in zip(passes, rows, KINDS):
            segment = t.segments[0]
            shown = [*prefix, *(text.vocab_size + c for c in codes + (band if kind == "reflection" else []))]
            told = [i for words in written for i in line + words]
            closed = [*shown, text.eom] if len(shown) > len(prefix) else []
            if kind in asks:
                assert row == base + told + closed + asks[kind]
                words = segment.ids[n, : segment.lengths[n]].tolist()
                words = words[:-1] if words[-1] == text.end_of_turn else words
                if kind == "thought":
                    written.append(words)
                    continue
                again = len(text.decode_text(words)) % 2 == 0
                written[-1] = words if again else written[-1]
            elif kind == "band":
                told = [i for words in written for i in line + words]
                assert row == base + told + shown
                band = segment.ids[n].tolist()
            else:
                assert row == base + told + shown and t.ok[0][n] == again, "a redraw that was not asked for does not learn"
                redrawn += again
                codes += segment.ids[n].tolist() if again else band
        assert np.asarray(made["codes"]).reshape(8, -1)[n].tolist() == codes
    assert 0 < redrawn < 16


def test_only_what_the_credit_map_names_learns(reflected):
    """Of each pass alone its own head gets a gradient and the other none, whatever stands in the other passes."""
    _, passes, model = reflected
    advantage_B, ok_B = jnp.where(jnp.arange(8) % 2, 1.0, -1.0), jnp.ones(8, bool)
    run = grpo.GRPORun().grpo

    @jax.jit
    def norms(params, rows):
        grads, metrics = loss_and_gradient(Policy(model.module("transformer"), 0), params, (rows, None, None), run, 1)
        return [jnp.abs(grads[head]["kernel"]).max() for head in ("lm_head", "mm_head")], metrics["grpo/logp_gap_max"]

    def learned(*kinds):
        credit = tuple(("total", kind, 1.0) for kind in kinds)
        shares = zip(*credited(credit, {"total": advantage_B}, {"total": ok_B}, KINDS))
        rows = Passes(tuple(t.replace(advantage=(a,), ok=(o & t.ok[0],)) for t, (a, o) in zip(passes, shares, strict=True)))
        with jax.set_mesh(model.mesh):
            found, gap = norms(model.params("transformer"), rows)
        assert gap < 1e-4  # float32: the same log-probs as when they were drawn
        return [float(x) > 0 for x in found]

    assert learned(*KINDS[:4]) == [True, True]
    assert learned("thought") == learned("reflection") == [True, False]
    assert learned("band") == learned("redraw") == [False, True]


def test_a_later_thought_changes_no_earlier_band(model_dir):
    codes = [np.asarray(drawn(model_dir, f"thoughts.given=('a sign','{words}')")[0]["codes"]) for words in ("a red sky", "a blue sea")]
    np.testing.assert_array_equal(codes[0][..., :4], codes[1][..., :4])
    assert (codes[0][..., 4:] != codes[1][..., 4:]).any()


def test_scores_of_reflections():
    assert [score_of(text) for text in ("85, make it blue", " 7", "100.", "0 nothing")] == [85, 7, 100, 0]
    assert all(np.isnan(score_of(text)) for text in ("", "good", "250", "it is 85"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("thoughts.bands=3",), r"config\.thoughts\.bands=3 does not divide the 2 rows of an image's codes; use a divisor"),
        (("thoughts.given=('a',)",), r"given has 1 thoughts for bands=2; give one for each band"),
        (("freeze=('lm_head/.*',)",), "the text head does not learn, so that thoughts cannot"),
        (("credit=(('total','verdict',1.0),)",), "names the segment 'verdict'; the method draws band, redraw, reflection, thought"),
        (("thoughts.question='<MM-Token-3>?'",), r"config\.thoughts: .* contains the multimodal token <MM-Token-3>"),
        (("rollout.refills=1",), "leave rollout.refills"),
    ],
)
def test_settings_that_do_not_fit(overrides, message, model_dir, service, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_stage(config(tmp_path / "run", model_dir, service.url, *overrides))
    assert not (tmp_path / "run" / "checkpoints").exists()
