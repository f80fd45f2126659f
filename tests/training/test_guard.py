"""Steps that are skipped: nothing moves, they are counted and named, and too many in a row stop the run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.test_loop import Counter, go, lines, run, saved
from xomni_jax.training.guard import GuardConfig, counters, guarded
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.stage import EMAConfig, Grid, RunningStage
from xomni_jax.training.state import TrainState


def descent(guard=GuardConfig(), decay=0.5, average_every=1):
    """(guarded update of (state, gradient), its first state): Adam on three numbers with an average, and a counter in `extra`."""
    optimizer = Optimizer(
        OptimizerConfig(0.1, warmup_steps=0, schedule="constant", clip_norm=0.0), 100, decay=decay, average_every=average_every
    )
    params = {"w": jnp.array([1.0, -0.0, 3.0])}
    ema = {"w": jnp.array(params["w"])} if optimizer.averages else {}
    state = TrainState(jnp.int32(0), params, optimizer.transform.init(params), {"seen": jnp.int32(0)}, ema, counters(guard))

    @jax.jit
    def update(state, gradient):
        state, metrics = state.apply(optimizer, {"w": gradient})
        return state.replace(extra={"seen": state.extra["seen"] + 1}), metrics | {"loss/total": jnp.sum(gradient)}, gradient

    return guarded(update, guard), state


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state.replace(guard={}))]


def ones(value=1.0):
    return jnp.full(3, value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    update, state = descent()
    state, _, _ = update(state, ones())
    before = bits(state)
    state, metrics, given = update(state, jnp.array([1.0, bad, 1.0]))
    assert bits(state) == before and int(state.step) == 1 and int(state.extra["seen"]) == 1
    assert int(metrics["guard/skipped"]) == 1 and int(metrics["guard/in_row"]) == 1 and given.shape == (3,)
    state, metrics, _ = update(state, ones())
    assert bits(state) != before and int(state.step) == 2
    assert int(metrics["guard/skipped"]) == 1 and int(metrics["guard/in_row"]) == 0


def test_skipped_steps_leave_no_trace():
    """The run without the bad batches ends in the same bits."""
    ends = []
    for gradients in ((1.0, 2.0, 3.0), (1.0, np.nan, 2.0, np.inf, np.nan, 3.0)):
        update, state = descent()
        for value in gradients:
            state, _, _ = update(state, ones(value))
        ends.append(bits(state))
    assert ends[0] == ends[1]


def test_spikes_are_skipped_by_the_running_mean_of_the_norms():
    update, state = descent(GuardConfig(spike=3.0, decay=0.9))
    mean = None
    for value, made in ((2.0, True), (5.9, True), (7.3, False), (0.1, True), (6.2, True), (9.0, False)):
        norm = value * 3**0.5
        assert (mean is None or norm <= 3 * mean) == made, "the test's own numbers"
        before = bits(state)
        state, metrics, _ = update(state, ones(value))
        assert (bits(state) != before) == made
        if made:
            mean = norm if mean is None else 0.9 * mean + 0.1 * norm
        np.testing.assert_allclose(state.guard["norm"], mean, rtol=1e-5)
    assert int(metrics["guard/skipped"]) == 2


def test_spikes_pass_by_default_and_nothing_is_done_without_a_limit():
    update, state = descent()
    for value in (1.0, 1e6):
        state, metrics, _ = update(state, ones(value))
    assert int(metrics["guard/skipped"]) == 0
    update, state = descent(GuardConfig(limit=0, spike=2.0))
    assert not state.guard and "guard/skipped" not in update(state, ones())[1]


def test_after_the_limit_nothing_moves_any_more():
    """However late the host looks, the state is that of the last good step."""
    update, state = descent(GuardConfig(limit=2))
    state, _, _ = update(state, ones())
    before = bits(state)
    for value in (np.nan, np.nan, 1.0, 1.0):
        state, metrics, _ = update(state, ones(value))
    assert bits(state) == before and int(metrics["guard/in_row"]) == 4


# ---- in the loop: log_every is 2, save_every 3 ----
def stage(gradients, guard=GuardConfig()):
    """A run of seven steps of `descent` with these gradients."""
    update, state = descent(guard)

    def step(state, batch, number):
        assert batch == number
        return update(state, ones(gradients[number]))[:2]

    def export(state, directory, note):
        directory.mkdir()
        (directory / "w.json").write_text(json.dumps([float(x) for x in state.params["w"]]))

    return RunningStage(state, Counter(), step, export)


def skipped(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]


def test_the_examples_of_skipped_steps_are_named(tmp_path, capsys):
    go(run(tmp_path), stage([1, np.nan, 1, 1, np.inf, 1, 1]))
    assert skipped(tmp_path) == [
        {"step": 2, "grad_norm": "nan", "ids": ["example 1"]},
        {"step": 5, "grad_norm": "inf", "ids": ["example 4"]},
    ]
    assert [(line["step"], line.get("guard/skipped")) for line in lines(tmp_path)] == [(2, 1), (4, 1), (6, 2), (7, 2)]
    assert lines(tmp_path)[0]["loss/total"] is None and not any("guard/in_row" in line for line in lines(tmp_path))
    assert "step 5 was skipped: the norm of its gradient is inf; its examples: example 4 (see " in "".join(capsys.readouterr())
    assert saved(tmp_path) == [3, 6, 7] and (tmp_path / "run" / "model").exists()


def test_a_run_without_skipped_steps_says_nothing_of_them(tmp_path):
    go(run(tmp_path), stage([1] * 7))
    assert not (tmp_path / "run" / "skipped.jsonl").exists() and not any("guard/skipped" in line for line in lines(tmp_path))


def test_too_many_in_a_row_stop_the_run(tmp_path):
    config = run(tmp_path, guard=GuardConfig(limit=2))
    with pytest.raises(FloatingPointError) as error:
        go(config, stage([1, 1, 1, np.nan, np.nan, 1, 1], config.guard))
    told = str(error.value)
    assert "2 steps in a row were skipped (config.guard.limit); " in told and "skipped.jsonl has their examples" in told
    assert "at step 6, the last good checkpoint is step 3 in " in told and "\n" not in told
    assert [line["step"] for line in skipped(tmp_path)] == [4, 5, 6] and saved(tmp_path) == [3]


def test_a_resumed_run_names_each_skipped_step_once(tmp_path):
    """The run dies at step 6, after step 5 was written down, and goes on from step 3."""
    gradients = [1, np.nan, 1, 1, np.nan, 1, 1]
    broken = stage(gradients)
    step = broken.step
    broken.step = lambda state, batch, number: step(state, batch, number) if number < 6 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        go(run(tmp_path, save_every=4), broken)
    assert [line["step"] for line in skipped(tmp_path)] == [2, 5]
    go(run(tmp_path, save_every=4), stage(gradients))
    assert [line["step"] for line in skipped(tmp_path)] == [2, 5] and lines(tmp_path)[-1]["guard/skipped"] == 2


# ---- averages ----
def test_the_average_is_that_of_optax_and_of_the_formula():
    update, state = descent(decay=0.75)
    theirs = mine = np.asarray(state.params["w"])
    for value in (1.0, -2.0, 0.5):
        state, _, _ = update(state, ones(value))
        theirs = optax.incremental_update(np.asarray(state.params["w"]), theirs, 0.25)
        mine = 0.75 * mine + 0.25 * np.asarray(state.params["w"], np.float64)
    np.testing.assert_allclose(state.ema["w"], theirs, rtol=1e-6)
    np.testing.assert_allclose(state.ema["w"], mine, rtol=1e-6)
    np.testing.assert_array_equal(state.averaged().params["w"], state.ema["w"])
    assert not descent(decay=0.0)[1].ema


def test_a_copy_that_is_renewed_every_other_update():
    """Bit for bit the same in between; a renewal may round the sum of parameter and step anew."""
    update, state = descent(decay=0.0, average_every=2)
    for number in range(1, 6):
        before = np.array(state.ema["w"])
        state, _, _ = update(state, ones(number))
        if number % 2:
            np.testing.assert_array_equal(state.ema["w"], before)
        else:
            np.testing.assert_allclose(state.ema["w"], state.params["w"], rtol=np.finfo(np.float32).eps)


def test_frozen_parameters_have_no_average_and_bfloat16_ones_a_float32_one():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3)}
    optimizer = Optimizer(OptimizerConfig(0.01, warmup_steps=0), 10, train=("a",), decay=0.9)
    state = TrainState(jnp.int32(0), params, optimizer.transform.init(params), {}, {"a": jnp.ones(3)})
    state, _ = state.apply(optimizer, jax.tree.map(jnp.ones_like, params))
    assert set(state.ema) == {"a"} and state.ema["a"].dtype == jnp.float32 and 0.99 < float(state.ema["a"][0]) < 1
    assert state.averaged().params["a"].dtype == jnp.bfloat16 and (state.averaged().params["b"] == 1).all()
    start = state.starting_from({"a": jnp.zeros(3), "b": jnp.zeros(3)})
    assert not start.ema["a"].any() and start.ema["a"].dtype == jnp.float32 and start.params["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize("export", [True, False])
def test_grids_and_by_choice_the_model_have_the_average(tmp_path, export):
    seen, made = [], stage([1] * 7)
    made.grid = lambda state, step: (seen.append(state.params["w"]), Grid(np.zeros((1, 2, 2, 3), np.uint8), 1))[1]
    go(run(tmp_path, ema=EMAConfig(0.5, export=export)), made)
    last = json.loads((tmp_path / "run" / "model" / "w.json").read_text())
    # Adam at a constant gradient moves by 0.1 a step; the average with decay 0.5 lags by almost one step.
    np.testing.assert_allclose(seen[-1][0] - (1 - 0.7), 0.1 - 0.1 * 0.5**7, atol=1e-4)
    np.testing.assert_allclose(last, seen[-1] if export else np.array([1, 0, 3]) - 0.7, atol=1e-4)
