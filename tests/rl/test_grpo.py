"""The GRPO stage as a run: services over HTTP, gates, stopping and going on."""

import dataclasses
import io
import json
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import xomni_jax
from tests.benchmarks.faults import fault_proxy
from tests.miniature import CODES, GRID, SIZE, stage_config
from tests.rl.pixel_service import pixel_service
from tests.test_metrics import documented, generic
from tests.training.test_stages import assert_same, metrics, params
from xomni_jax.checkpoint.run_checkpoints import RunCheckpoints
from xomni_jax.core.config import ConfigError
from xomni_jax.core.preemption import StepRefused, StopSignal
from xomni_jax.models.registry import boxed_shapes, init_params
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rl import grpo, rollouts
from xomni_jax.rl.advantages import AdvantageConfig
from xomni_jax.rl.rewards import RewardConfig, Rewards
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sampling.segments import Segment, image_spec
from xomni_jax.sharding.abstract import path_name
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import param_shardings
from xomni_jax.training.operations import CompileLog
from xomni_jax.training.run import policy_mesh, run_stage

PROMPTS = ["data.source=prompts", "data.path={}/p.csv", "data.text_targets=True"]
FREE = "http://127.0.0.1:9"  # the discard port: nobody answers


def grpo_config(run_dir, model_dir, url, *overrides):
    """Three steps of four prompts with four rollouts each; one reward."""
    rewards = (f"rewards.ocr.urls=('{url}',)", "rewards.shapes.weight=None", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.01")
    return stage_config("grpo", run_dir, f"init_from={model_dir}", *rewards, "save_every=1", *overrides)


@pytest.fixture(scope="module")
def service():
    """One service for all runs; `hooks[n]` runs before its n-th answer."""
    with pixel_service() as running:
        running.hooks = {}
        running.before = lambda call: running.hooks.pop(call, lambda: None)()
        yield running


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, service):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("grpo") / "run"
    assert run_stage(grpo_config(run_dir, model_dir, service.url)) == run_dir / "model"
    return run_dir


def test_a_run_learns_from_pixels(finished, model_dir):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["grpo/logp_gap_max"] < 1e-4 and line["grpo/ratio_mean"] == pytest.approx(1)
        assert 0 < line["reward/ocr/mean"] < 1 and line["reward/total/std"] > 0 and line["reward/masked_frac"] == 0
        assert {"grpo/kl", "grpo/entropy", "image/edge_density", "image/colour_entropy", "optim/grad_norm", "loss/grpo"} <= set(line)
    # On-policy the reference is the policy itself in the first step, and not afterwards.
    assert abs(lines[0]["grpo/kl"]) < 1e-9 and lines[2]["grpo/kl"] > 0
    timings = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"perf/rollout_s", "perf/decode_s", "perf/reward_wait_s", "perf/update_s"} <= generic(timings) <= documented("grpo")
    assert sorted(p.name for p in (finished / "images").glob("*.png")) == [f"step_{n:06d}.png" for n in (0, 2, 3)]
    before = {k: np.asarray(v) for k, v in flat(xomni_jax.load(model_dir).params("transformer")).items()}
    after = params(finished, "transformer")
    assert not np.array_equal(before["mm_head/kernel"], after["mm_head/kernel"])
    described = json.loads((finished / "model" / "model.json").read_text())
    assert described["components"]["transformer"]["note"] == {"run": "grpo", "step": 3, "seed": 0}
    assert described["settings"] == json.loads((model_dir / "model.json").read_text())["settings"]


def flat(tree):
    from xomni_jax.checkpoint.conversion import flatten

    return flatten(tree)


def test_ctrl_c_in_the_middle_of_a_step(finished, model_dir, service, tmp_path):
    """The signal comes while the second step waits for its rewards."""
    service.hooks[service.calls + 2] = lambda: os.kill(os.getpid(), signal.SIGINT)
    config = grpo_config(tmp_path / "run", model_dir, service.url)
    assert run_stage(config) is None
    assert len(metrics(tmp_path / "run")) in (1, 2)
    assert run_stage(config) == tmp_path / "run" / "model"
    assert metrics(tmp_path / "run") == metrics(finished)
    assert_same(params(tmp_path / "run", "transformer"), params(finished, "transformer"))


@pytest.mark.parametrize("call, steps", [(1, 0), (3, 1)], ids=["image", "step"])
def test_a_signal_in_the_middle_of_a_rollout(call, steps, finished, model_dir, service, tmp_path, monkeypatch):
    """It ends after the segment: in the image before the first step or in the second step, which leaves no trace and is made again."""
    sample, counted, let = rollouts.Sampler.__call__, [], service.calls

    def told(self, *args):
        *args, between = args
        counted.append(0)

        def signalled():
            counted[-1] += 1
            if len(counted) == call and counted[-1] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            between()

        return sample(self, *args, signalled)

    monkeypatch.setattr(rollouts.Sampler, "__call__", told)
    config = grpo_config(tmp_path / "run", model_dir, service.url, "rollout.segment=3")  # 8 codes: four segments of 2
    assert run_stage(config) is None
    assert counted == [3] * (call - 1) + [2] and service.calls - let == steps
    monkeypatch.undo()
    assert run_stage(config) == tmp_path / "run" / "model"
    assert metrics(tmp_path / "run") == metrics(finished)
    assert_same(params(tmp_path / "run", "transformer"), params(finished, "transformer"))


def test_segments_are_one_program(model):
    """On a mesh what one call leaves is what the next one expects, so that nothing is compiled again or copied."""
    net, mesh = model.module("transformer"), make_mesh(dict(fsdp=4, tensor=2))
    boxed = jax.eval_shape(lambda: init_params("transformer", net.cfg, jax.random.key(0)))
    params = rollouts.param_converter(boxed, mesh, jnp.float32, CODES)(
        jax.device_put(model.params("transformer"), param_shardings(boxed, mesh))
    )
    args = params, np.full((4, 3), 3, np.int32), np.full(4, 3, np.int32), jax.random.split(jax.random.key(1), (4, 2)), None
    with jax.set_mesh(mesh), CompileLog() as log:
        sampler = rollouts.Sampler.make(net, (2, 4), SamplingConfig(top_k=0, min_p=0.0), 3)
        assert (sampler.segment, sampler.segments) == (2, 4)
        out = sampler(*args, lambda: None)
        assert sum("draw" in name for name in log.since()) == 1
        prompt, state = sampler.start(*args)
        places = lambda s: [x.data.unsafe_buffer_pointer() for x in s.cache.kv["language"][0].addressable_shards]  # noqa: E731
        before = places(state)
        assert places(sampler.draw(params, prompt, state, args[3])[0]) == before
    assert out["codes"].shape == (4, 2, 8)


def test_too_many_failures_stop_the_run_and_nothing_is_lost(finished, model_dir, service, tmp_path):
    service.fails = lambda call: failing
    failing = False

    def fail():
        nonlocal failing
        failing = True

    service.hooks[service.calls + 3] = fail
    config = grpo_config(tmp_path / "run", model_dir, service.url, "save_every=100", "rollout.max_fail_frac=0.05")
    with pytest.raises(StepRefused, match=r"6% of a step.s rollouts could not be scored \(limit config.rollout.max_fail_frac=5%\): ocr"):
        run_stage(config)
    checkpoints = RunCheckpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.latest() == 2
    checkpoints.close()
    failing = False
    assert run_stage(config) == tmp_path / "run" / "model"
    assert metrics(tmp_path / "run") == metrics(finished)


def test_faults_of_the_way_change_nothing(finished, model_dir, service, tmp_path):
    """Every request meets some: as long as all is scored in the end, the run is the one without them, bit for bit."""
    patient = ("chunk=1", "concurrency=8", "backoff=0.002", "timeout=0.5", "attempts=100")
    with fault_proxy(service.url, 0.6, slow=0.7) as proxy:
        config = grpo_config(tmp_path / "run", model_dir, proxy.url, *(f"rewards.ocr.{option}" for option in patient))
        assert run_stage(config) == tmp_path / "run" / "model"
        assert proxy.met.total() > 20
    assert metrics(tmp_path / "run") == metrics(finished)
    assert_same(params(tmp_path / "run", "transformer"), params(finished, "transformer"))


def test_what_a_scorer_of_whole_sets_remembers_is_saved(model_dir, tmp_path):
    """The third step is interrupted, and repeated with another service: it is told what the first one remembered after the second step."""
    config = lambda run, url: grpo_config(tmp_path / run, model_dir, url, "rollout.chunks=1")  # noqa: E731
    with pixel_service(scope="set") as alone:
        run_stage(config("whole", alone.url))
    assert alone.states[0] == b"" and len(set(alone.states)) == 3
    with pixel_service(scope="set", before=lambda call: call == 3 and os.kill(os.getpid(), signal.SIGTERM)) as first:
        assert run_stage(config("parts", first.url)) is None
    with pixel_service(scope="set") as second:
        run_stage(config("parts", second.url))
    assert first.states == alone.states and second.states == alone.states[2:]
    assert_same(params(tmp_path / "parts", "transformer"), params(tmp_path / "whole", "transformer"))


def test_a_sampler_that_lies_about_its_log_probs_is_found(own_programs, model_dir, service, tmp_path, monkeypatch):
    sample = Engine.sample

    def tampered(*args, **kwargs):
        state, image = sample(*args, **kwargs)
        return state, image.replace(logp=image.logp.at[0, 1, 2].add(2e-3))

    monkeypatch.setattr(Engine, "sample", tampered)
    with pytest.raises(FloatingPointError, match=r"sampler and trainer differ by 2\.0\de-03 in a log-prob at step 1 \(limit 0.0001\)"):
        run_stage(grpo_config(tmp_path / "run", model_dir, service.url, "grid_every=0"))
    assert not (tmp_path / "run" / "model").exists()


@pytest.fixture(scope="module")
def model(model_dir):
    """On one device."""
    return xomni_jax.load(model_dir)


def one_batch(model, service, cfg, image_decoder=None):
    """Greedy: the rollouts of a prompt have the same codes."""
    return measured_batch(model, service, cfg, image_decoder)[:3]


def measured_batch(model, service, cfg, image_decoder=None, temperature=0.0):
    """`one_batch`, and its metrics."""
    greedy = SamplingConfig(temperature, top_k=0, min_p=0.0)
    with RewardClient("ocr", service.url) as client:
        net = model.module("transformer")
        make = rollouts.Rollouts(
            model,
            image_decoder or model,
            GRID,
            3,
            cfg,
            AdvantageConfig(),
            greedy,
            model.decode_config,
            Sampler.make(net, GRID, greedy, cfg.segment, return_mask=True),
            rollouts.param_converter(boxed_shapes("transformer", net.cfg), model.mesh, net.cfg.dtype, net.cfg.image_vocab_size),
            Rewards({"ocr": RewardConfig(weight=1.0)}, {"ocr": client}),
            StopSignal(),
        )
        rows, total, images, measured = make(
            model.params("transformer"), ["a red sign", "blue"], [{}] * 2, [None] * 2, [None] * 2, jax.random.key(4)
        )
    return jax.tree.map(np.asarray, rows), total, images.reshape(2, 3, *SIZE, 3), measured


def test_a_group_shares_its_noise(model, service):
    """With the group's noise, equal codes are the same image; in one chunk or two."""
    rows, total, images = one_batch(model, service, rollouts.RolloutConfig(chunks=1))
    codes = rows.segments[0].ids.reshape(2, 3, -1)
    assert (codes == codes[:, :1]).all() and codes.max() < CODES
    assert (images == images[:, :1]).all() and not np.array_equal(images[0, 0], images[1, 0])
    assert (total.total_PR == total.total_PR[:, :1]).all()
    again, _, other = one_batch(model, service, rollouts.RolloutConfig(chunks=2))
    np.testing.assert_array_equal(again.segments[0].ids, rows.segments[0].ids)
    assert np.abs(other.astype(int) - images).max() <= 1
    _, _, other = one_batch(model, service, rollouts.RolloutConfig(chunks=1, noise="independent"))
    assert not np.array_equal(other[0, 0], other[0, 1])


def test_the_orders_of_codes_are_stored_with_rollouts(model_dir, model, service, monkeypatch):
    """Of STAR: what is decoded lies row by row, and the trainer finds the sampler's log-probs (limit: rollout.max_logp_gap)."""
    star, decoded, decode = xomni_jax.load(model_dir), [], XOmni.decode_images
    config = dataclasses.replace(model.config("transformer"), order="spanning_tree")
    star.set_params("transformer", model.params("transformer"), config)
    monkeypatch.setattr(XOmni, "decode_images", lambda self, codes, *rest: decoded.append(np.asarray(codes)) or decode(self, codes, *rest))
    rows = measured_batch(star, service, rollouts.RolloutConfig(chunks=2), temperature=1.0)[0]
    (image,) = rows.segments
    assert len(np.unique(image.order, axis=0)) > 1
    codes = np.zeros_like(image.ids)
    np.put_along_axis(codes, image.order, image.ids, axis=1)
    np.testing.assert_array_equal(codes.reshape(-1, *GRID), np.concatenate(decoded))
    logp = Engine(star.module("transformer")).score(star.params("transformer"), rows.prompts, rows.segments)[0][0]
    np.testing.assert_allclose(logp, image.logp, atol=1e-4)


def test_images_are_encoded_again(model, service):
    """Every second of six images; of those that count a third of the codes is another one."""
    images = np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3), np.uint8)
    codes = np.stack([model.encode([image])[0] for image in images]).reshape(2, 3, -1)
    codes[0, 1] += 1  # does not count
    codes[1, 1] += 1
    seen = SimpleNamespace(cfg=rollouts.RolloutConfig(reencode=3), grid=GRID, model=model)
    assert rollouts.Rollouts.reencoded(seen, jnp.asarray(codes), jnp.asarray(images)) == {"image/reencode_frac": pytest.approx(2 / 3)}
    for count in (0, 3):
        measured = measured_batch(model, service, rollouts.RolloutConfig(chunks=1, reencode=count))[3]
        assert ("image/reencode_frac" in measured) == bool(count)


def test_a_decoder_on_devices_of_its_own_draws_the_same(model, service):
    shared, _, images = one_batch(model, service, rollouts.RolloutConfig(chunks=2))
    apart = model.on(make_mesh(dict(data=2), jax.devices()[6:]))
    rows, _, other = one_batch(model, service, rollouts.RolloutConfig(chunks=2), apart)
    np.testing.assert_array_equal(rows.segments[0].ids, shared.segments[0].ids)
    assert np.abs(other.astype(int) - images).max() <= 1
    used = {d for x in jax.tree.leaves(apart.decoder_params()) for d in x.sharding.device_set}
    assert used == set(jax.devices()[6:])


def test_a_decoder_mesh_takes_its_devices_from_the_policys(model, tmp_path):
    config = stage_config("grpo", tmp_path, "mesh.fsdp=3", "mesh.tensor=2", "decoder_mesh.fsdp=2")
    policy, decoder = policy_mesh(config), grpo.make_image_decoder(config, model)
    assert policy.shape["fsdp"] == 3 and decoder is not model and decoder.mesh.shape["fsdp"] == 2
    assert set(policy.devices.flat) == set(jax.devices()[:6]) and set(decoder.mesh.devices.flat) == set(jax.devices()[6:])
    shared = stage_config("grpo", tmp_path)
    assert policy_mesh(shared).size == 8 and grpo.make_image_decoder(shared, model) is model
    with pytest.raises(ValueError, match="8 of 8 devices apart"):
        policy_mesh(stage_config("grpo", tmp_path, "decoder_mesh.fsdp=8"))


def test_frozen_models_in_8_bits_draw_nearly_the_same(model, service):
    shared, _, images = one_batch(model, service, rollouts.RolloutConfig(chunks=2))
    small = model.on(model.mesh)
    for name in ("mmdit", "t5"):
        small.set_config(name, dataclasses.replace(model.config(name), int8=True))
    _, _, other = one_batch(model, service, rollouts.RolloutConfig(chunks=2), small)
    kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(small.params("mmdit")) if path[-1].key == "kernel"]
    assert {x.dtype for x in kernels} == {jnp.dtype("int8")} and all(x.dtype == jnp.float32 for x in jax.tree.leaves(model.params("mmdit")))
    assert 0 < np.abs(other.astype(float) - images).mean() < 4  # of 255


def test_the_samplers_layout_computes_the_same(model):
    """bfloat16 matrices whole along their width; norm gains keep float32, so that sampler and trainer agree bit for bit."""
    net = model.module("transformer")
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    boxed = jax.eval_shape(lambda: init_params("transformer", net.cfg, jax.random.key(0)))
    params = jax.device_put(model.params("transformer"), param_shardings(boxed, mesh))
    assert "fsdp" in str(params["language"]["mlp"]["up_proj"]["kernel"].sharding.spec)
    placed = rollouts.param_converter(boxed, mesh, jnp.bfloat16, CODES)(params)
    # Of the heads only what draws codes.
    assert set(params) - set(placed) == {"lm_head"} and placed["mm_head"]["kernel"].shape[1] == CODES < params["mm_head"]["kernel"].shape[1]
    wanted = {name: params[name] for name in placed} | {"mm_head": {"kernel": params["mm_head"]["kernel"][:, :CODES]}}
    for (path, x), want in zip(jax.tree_util.tree_leaves_with_path(placed), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == (jnp.float32 if path[-1].key == "scale" else jnp.bfloat16)
        assert "fsdp" not in str(x.sharding.spec)
        np.testing.assert_array_equal(x, np.asarray(want).astype(x.dtype))
    small = ARTransformer(dataclasses.replace(net.cfg, dtype=jnp.bfloat16))
    ids = np.arange(8, dtype=np.int32)[None] % 7
    run = jax.jit(lambda p: small.apply({"params": p}, ids))
    as_stored = jax.tree.map(np.asarray, (params, placed))
    np.testing.assert_array_equal(run(as_stored[0]), run(as_stored[1]))


def test_a_sampler_in_8_bits_is_corrected_and_held_to_a_limit(model_dir, service, tmp_path):
    more = ["steps=2", "grpo.importance_cap=2", "rollout.weights=int8", "grid_every=0"]
    # Random weights of width 32 round far worse than those of a trained model (1.5e-5 nats a code for the one in the package).
    run_stage(grpo_config(tmp_path / "run", model_dir, service.url, *more, "rollout.max_sampler_kl=0.02"))
    first, second = metrics(tmp_path / "run")
    assert 0 < first["grpo/sampler_kl"] < 0.01 and first["grpo/logp_gap_max"] > 1e-4  # of other weights than the policy's
    assert first["grpo/importance_mean"] == pytest.approx(1, abs=0.05) and second["grpo/importance_cut_frac"] == 0
    with pytest.raises(
        FloatingPointError, match="nats a code away from the policy at step 1 .limit config.rollout.max_sampler_kl=1e-09.; set"
    ):
        run_stage(grpo_config(tmp_path / "strict", model_dir, service.url, *more, "rollout.max_sampler_kl=1e-9"))


@pytest.mark.parametrize(
    "more, words",
    [((), "set config.grpo.importance_cap, such as 2"), (("grpo.importance_cap=2", "lora.rank=2"), "adapters are not rounded")],
)
def test_8_bits_need_a_correction_and_no_adapters(more, words, model_dir, tmp_path):
    with pytest.raises(ConfigError, match=words):
        run_stage(grpo_config(tmp_path / "run", model_dir, FREE, "rollout.weights=int8", *more))


def test_the_sampler_in_8_bits_draws_what_its_weights_score(model):
    """Its log-probs replay with the rounded weights to float32's rounding, and every kernel is within half a step of the policy's."""
    net = model.module("transformer")
    small = ARTransformer(dataclasses.replace(net.cfg, int8=True))
    mesh, boxed = make_mesh(dict(fsdp=4, tensor=2)), boxed_shapes("transformer", small.cfg)
    params = jax.device_put(model.params("transformer"), param_shardings(boxed_shapes("transformer", net.cfg), mesh))
    placed = rollouts.param_converter(boxed, mesh, jnp.float32, CODES, int8=True)(params)
    kernel, layer = params["language"]["mlp"]["up_proj"]["kernel"], placed["language"]["mlp"]["up_proj"]
    assert layer["kernel"].dtype == jnp.int8 and "fsdp" not in str(layer["kernel"].sharding.spec)
    scale = np.asarray(layer["kernel_scale"])[:, None]
    assert (np.abs(np.asarray(layer["kernel"]) * scale - np.asarray(kernel)) <= scale * (0.5 + 1e-4)).all()

    alone = jax.tree.map(np.asarray, placed)
    ids, lengths, keys = (
        np.arange(12, dtype=np.int32).reshape(2, 6) % 7,
        np.array([6, 4], np.int32),
        jax.random.split(jax.random.key(0), (2, 2)),
    )
    sampling = SamplingConfig(top_k=0, min_p=0.0)
    out = Sampler.make(small, GRID, sampling)(alone, ids, lengths, keys, None)
    codes, logp = (np.asarray(out[name]).reshape(4, -1) for name in ("codes", "logp"))
    prompts = np.repeat(ids, 2, 0), np.repeat(lengths, 2)
    segment = Segment(codes, None, logp, None, "image", image_spec(codes.shape[1], sampling))
    again = {
        net_: Engine(net_).score(p, prompts, (segment,), None, 0)[0][0]
        for net_, p in ((small, alone), (net, jax.tree.map(np.asarray, params)))
    }
    np.testing.assert_allclose(again[small], logp, atol=1e-4)
    assert np.abs(again[net] - logp).max() > 1e-3


def test_adapters_learn_on_a_base_in_8_bits_which_is_the_reference_as_well(model_dir, service, tmp_path):
    """Sampler and trainer agree on base and adapters (the run checks it); the policy starts at the reference and leaves it."""
    more = ["steps=2", "lora.rank=2", "transformer.int8=True", "grpo.kl_coef=0.1", "grid_every=0", "optimizer.rates=()"]
    run_stage(grpo_config(tmp_path / "run", model_dir, service.url, *more))
    first, second = metrics(tmp_path / "run")
    assert first["grpo/kl"] < 1e-9 < second["grpo/kl"] and second["grpo/logp_gap_max"] < 1e-4
    before, after = xomni_jax.load(model_dir).params("transformer"), params(tmp_path / "run", "transformer")
    changed = {path_name(path) for path, x in jax.tree.leaves_with_path(before) if not np.array_equal(x, after[path_name(path)])}
    assert len(changed) == 3 * 7 and all(name.endswith("_proj/kernel") for name in changed)
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").exists()


def test_every_image_size_has_programs_of_its_own(model_dir, service, tmp_path, monkeypatch):
    """Prompts of two sizes, of which one source names its reward: batches of one size each, and no program is made twice."""
    (tmp_path / "wide.txt").write_text('a "A"\na "B"\n')
    (tmp_path / "tall.jsonl").write_text('{"prompt": "\\"C\\"", "size": [32, 16]}\n{"prompt": "\\"D\\"", "size": [32, 16]}')
    listed = "[{path: wide.txt, rewards: [{ocr: 2}]}, {path: tall.jsonl, name: tall, rewards: [{ocr: 1}]}]"
    (tmp_path / "mix.yaml").write_text(f"datasets: {listed}")
    sizes = []
    monkeypatch.setattr(service, "heard", lambda images: sizes.extend(Image.open(io.BytesIO(image)).size for image in images))
    source = ["data.source=prompts", f"data.path={tmp_path / 'mix.yaml'}", "data.sizes=((16,32),(32,16))"]
    with CompileLog() as log:
        run_stage(grpo_config(tmp_path / "run", model_dir, service.url, *source, "steps=4", "grid_every=0"))
        assert sum("draw" in name for name in log.since()) <= 2
    assert sizes and {sizes[n : n + 16][0] for n in range(0, 64, 16)} == {(32, 16), (16, 32)}
    assert all(len(set(sizes[n : n + 16])) == 1 for n in range(0, 64, 16))
    for line in metrics(tmp_path / "run"):
        (source,) = {name.split("/")[3] for name in line if name.startswith("reward/total/mean/")}
        weight = {"wide": 2, "tall": 1}[source]
        assert line["reward/total/mean"] == pytest.approx(weight * line[f"reward/ocr/mean/{source}"])
        assert line["reward/total/mean"] == pytest.approx(line[f"reward/total/mean/{source}"])


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([f"rewards.ocr.urls=('{FREE}',)"], f"no reward service answers at {FREE} .*xomni serve-reward ocr"),
        (["rewards.ocr.urls=('localhost:80',)"], "must begin with http"),
        (["rewards.ocr.weight=None"], "config.rewards: the weights are all None; give at least one"),
        (["rewards.ocr.weight=heavy"], "config.rewards.ocr.weight=heavy: expected float"),
        (["rewards.quality.weight=heavy"], "config.rewards.quality.weight=heavy: expected float | None"),
        (["rollout.chunks=3"], "config.rollout.chunks=3 does not divide config.batch_size=4"),
        (["rollout.chunks=2"], "leaves 2 prompts a chunk, which config.mesh cannot split 4 ways"),
        (["accumulate=3"], "config.accumulate=3 does not divide rollouts per config.grpo.updates_per_batch=16"),
        (["accumulate=8"], "rollouts per config.grpo.updates_per_batch / config.accumulate=2 does not split over the 4 ways"),
        (["transformer.int8=True"], "config.transformer.int8=True: kernels in 8 bits cannot learn"),
        (["grpo.updates_per_batch=3"], "config.grpo.updates_per_batch=3 does not divide the 16 rollouts"),
        (["rollout.combine=sum"], "combine='sum' is unknown"),
        (["rollout.segment=0"], "config.rollout.segment=0: expected int >= 1"),
        (["rollout.prompt_length=12"], "raise config.rollout.prompt_length"),
        (
            [*PROMPTS, "data.sizes=((16,32),(20,32))"],
            "config.data.sizes: 20x32 pixels are not whole 8x8 tokens; the nearest size that is: 16x32",
        ),
        ([*PROMPTS, "data.sizes=((32,16),)"], r"p.csv row 1: the size \(16, 32\) is not among config.data.sizes"),
        (
            [*PROMPTS, "data.sizes=((16,32),(32,16))", "rollout.refills=1"],
            "config.rollout.refills: a step's prompts may be of another size",
        ),
        (["restraint.signals=(('reward/judge/mean',0.1),)"], "config.restraint.signals: reward/judge/mean is not measured in this run"),
        (
            [
                "sft.weight=0.1",
                "sft.next_token.rows=4",
                "sft.data.sizes=((16,32),)",
                *(line.replace("data.", "sft.data.", 1) for line in PROMPTS),
            ],
            "config.sft.data.source=prompts: its examples have no question, answer",
        ),
        (["rollout.reference=average"], "config.rollout.reference=average: the run keeps no average; set config.ema.decay"),
        (["entropy.target=0.5"], "config.entropy: target=0.5 steers the weight coef, which is 0"),
        (["data.sizes=((16,64),)"], "16x64: the long side may have at most 48 pixels"),
        (["decode.steps=0"], "config.decode: decode.steps=0 must be at least 1"),
        (["grpo.kl_estimator=k4"], "config.grpo: kl_estimator='k4' is unknown"),
        (["sampling.top_p=0.0"], "config.sampling: sampling top_p=0.0 is outside"),
    ],
)
def test_nonsense_is_refused(overrides, words, model_dir, service, tmp_path):
    (tmp_path / "p.csv").write_text('prompt,size\n"a ""B""","[16, 32]"\n')
    with pytest.raises(ValueError, match=words) as error:
        run_stage(grpo_config(tmp_path / "run", model_dir, service.url, *(line.format(tmp_path) for line in overrides)))
    assert "\n" not in str(error.value)
    assert "prompt_length" in words or not (tmp_path / "run").exists()


def test_a_service_of_another_kind_is_refused(model_dir, tmp_path):
    with pixel_service("shapes") as other, pytest.raises(ValueError, match="serves 'shapes', not 'ocr'"):
        run_stage(grpo_config(tmp_path / "run", model_dir, other.url))


def test_misspelt_keys_of_a_reward_are_found(model_dir, service, tmp_path):
    with pytest.raises(ConfigError, match="config.rewards.ocr.wieght: unknown key; did you mean weight"):
        grpo_config(tmp_path / "run", model_dir, service.url, "rewards.ocr.wieght=1.0")
    assert dataclasses.is_dataclass(RewardConfig)
