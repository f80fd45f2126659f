"""A run of GRPO with frozen models in fewer bits, a decoder on devices of its own and prompts of a file resumes bit for bit."""

import shutil
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.miniature import SIZE, configs, stage_config
from tests.rl.pixel_service import pixel_service
from tests.rl.test_grpo import grpo_config
from tests.training.test_stages import assert_same, metrics, params
from xomni_jax.rl import grpo
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.operations import CompileLog
from xomni_jax.training.run import run_stage

PROMPTS, WEIGHT = Path(__file__).parent / "prompts.jsonl", 2  # of the reward, in every line
OTHERS = (
    "rollout.reference_dtype=bfloat16", "mmdit.int8=True", "t5.int8=True", "mesh.fsdp=2", "decoder_mesh.fsdp=4", "rollout.chunks=2",
    "data.source=prompts", f"data.path={PROMPTS}", f"data.sizes=({SIZE},)",
    "entropy.coef=0.002", "entropy.target=0.5", "restraint.signals=(('image/colour_entropy', 0.0001),)", "restraint.settle=1",
    "rollout.refills=2",
    "sft.weight=0.5", "sft.batch_size=4", "sft.next_token.rows=4", "sft.next_token.row_length=64", f"sft.data.sizes=({SIZE},)",
    "sft.data.shapes=0.0", "sft.data.text_lengths=((2, 3),)", "sft.data.weights=(1.0,)",
)  # fmt: skip


def test_a_run_with_everything_else(model_dir, tmp_path, monkeypatch):
    decoders, make = [], grpo.make_image_decoder
    monkeypatch.setattr(grpo, "make_image_decoder", lambda *args: decoders.append(make(*args)) or decoders[-1])
    run, straight = tmp_path / "run", tmp_path / "straight"
    with pixel_service() as service:
        service.score = lambda image: float(zlib.crc32(image) > 0.85 * 2**32)  # half of the groups are flat
        config = grpo_config(run, model_dir, service.url, "steps=2", "grid_every=0", *OTHERS)
        with CompileLog() as log:
            assert run_stage(config) == run / "model"
            names = log.since()
        assert sum(name.startswith("jit(update)") for name in names) == 1  # for both steps, refilled or not
        shutil.copytree(run, straight)
        # As if it had been killed in the second step.
        shutil.rmtree(run / "checkpoints" / "2")
        shutil.rmtree(run / "model")
        assert run_stage(config) == run / "model"
    lines = metrics(run)
    assert lines == metrics(straight) and [line["step"] for line in lines] == [1, 2]
    assert_same(params(run, "transformer"), params(straight, "transformer"))
    for line in lines:
        assert 0 <= line["grpo/logp_gap_max"] < 1e-4 and line["grpo/ratio_mean"] == pytest.approx(1)
        assert 0 <= line["reward/ocr/mean"] < 1 and line["reward/masked_frac"] == 0 and line["optim/grad_norm"] > 0
        assert line["reward/total/mean"] == pytest.approx(WEIGHT * line["reward/ocr/mean"])
        assert 1 < line["loss/sft"] < 20
        assert line["rollout/refills"] <= 2 and line["rollout/replaced_frac"] <= 1
        assert line["control/entropy_coef"] > 0 and line["control/kl_coef"] >= 0.01
    assert any(line["rollout/replaced_frac"] for line in lines) and any(line["reward/ocr/mean"] for line in lines)
    # At first the reference is the policy, but for its rounding.
    kl = [line["grpo/kl"] for line in lines]
    assert 1e-8 < kl[0] < 1e-4 and kl[1] > 10 * kl[0]
    for decoder in decoders:
        kernels = {x.dtype for path, x in jax.tree_util.tree_leaves_with_path(decoder.params("mmdit")) if path[-1].key == "kernel"}
        assert kernels == {jnp.dtype("int8")} and decoder.mesh.size == 4


def test_a_plan_has_what_the_options_add(tmp_path):
    """The update takes packed rows and signals, gives a state like the one that it took, and the average is the only reference."""
    options = (
        "rollout.reference=average",
        "ema.every=7",
        *(option for option in OTHERS if option.startswith(("entropy", "restraint", "sft"))),
    )
    plain, cfg = (stage_config("grpo", tmp_path, "mesh.fsdp=2", "mesh.tensor=1", *more) for more in ((), options))
    mesh = make_mesh(dict(fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        made, before = (grpo.GRPOStage.programs(c, configs(), mesh) for c in (cfg, plain))
        update = made["policy-update"]
        state, metrics = jax.eval_shape(update.fn, *update.args)
    alike = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)  # noqa: E731
    assert alike(state) == alike(jax.eval_shape(made.create))
    assert {"loss/sft", "control/kl_coef", "control/fall", "grpo/kl"} <= set(metrics) and update.args[1] is None
    assert set(before.persistent) - set(made.persistent) == {"reference"} and set(made.persistent) - set(before.persistent) == {"average"}
    work, least = update.work, before["policy-update"].work
    assert work.tokens == least.tokens + 4 * 64 and work.learned > least.learned and work.head_gathers == least.head_gathers + 2
