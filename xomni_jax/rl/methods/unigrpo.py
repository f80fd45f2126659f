"""UniGRPO (2603.23500): one reward and one advantage for the transformer's tokens and for the steps of the image decoder that follow.

Codes are drawn and learned as in GRPO; the diffusion decoder draws some of its steps with noise (`sampling.flow_sde`), and learns from them
by `rl.flow_objective`. With `learn=("mmdit",)` it is FlowGRPO-Fast on the decoder alone, the rollouts of a prompt then share their codes;
with `learn=("transformer",)` it is GRPO with a noisy decoder.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from xomni_jax.core.config import ConfigError, NonNegative
from xomni_jax.core.preemption import StopSignal
from xomni_jax.core.program import Program, Programs, Work
from xomni_jax.data.sources import batches
from xomni_jax.models import transformer, work
from xomni_jax.models.registry import COMPONENTS, abstract_params, boxed_shapes, init_params
from xomni_jax.rl import grpo
from xomni_jax.rl.flow_objective import FlowConfig
from xomni_jax.rl.grpo import MODELS, Bucket, GRPORun, GRPOStage, abstract_batch, check_divides
from xomni_jax.rl.methods.noisy_decoder import FROZEN, FlowRows, NoisySteps, flow_gradient, make_flow_decode, noise_levels
from xomni_jax.rl.prompts import Prompts, all_prompts, check_prompts
from xomni_jax.rl.rollouts import Rollouts, param_converter
from xomni_jax.rl.trajectory import Trajectory
from xomni_jax.rl.update import Advantages, Policy, frozen_logp, loss_and_gradient
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, DecodeConfig, Decoder
from xomni_jax.sampling.flow_sde import FlowPath
from xomni_jax.sharding import abstract
from xomni_jax.sharding.arrays import local_rows
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS
from xomni_jax.training.accumulate import split_rows
from xomni_jax.training.adapters import export_trained
from xomni_jax.training.components import (
    check_heads,
    check_trainable,
    decode_settings,
    model_configs,
    open_model,
    read_description,
)
from xomni_jax.training.guard import guarded
from xomni_jax.training.loop import key_for
from xomni_jax.training.operations import FlopCount
from xomni_jax.training.optimizer import Optimizer
from xomni_jax.training.stage import Grid, RunningStage
from xomni_jax.training.state import TrainState, new_state

FLOW = 3  # purpose of a step's key: the window and the noise of denoising steps; beside those of `rollouts` and `grpo`
LEARNERS = ("transformer", "mmdit")


@dataclasses.dataclass(frozen=True)
class UniGRPORun(GRPORun):
    """GRPO of the transformer and the image decoder together.

    Attributes:
      learn: what learns: transformer, mmdit, or both; `optimizer.rates` gives mmdit/.* a rate of its own
      flow: how the image decoder draws and learns
      flow_weight: of the image decoder's part in the sum of both objectives
    """

    stage: str = "unigrpo"
    run_dir: str = "runs/unigrpo"
    learn: tuple[str, ...] = LEARNERS
    flow: FlowConfig = FlowConfig()
    flow_weight: NonNegative = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.learn or set(self.learn) - set(LEARNERS):
            raise ValueError(f"learn={self.learn} must hold transformer, mmdit, or both")
        if self.lora.rank or self.decoder_mesh.fsdp:
            raise ValueError("stage unigrpo trains whole components on one mesh; leave lora.rank and decoder_mesh.fsdp at 0")
        c, beside = self.rollout, self.sft.weight or self.entropy.coef or self.restraint.signals
        if beside or c.refills or c.reference != "start" or c.weights != "policy" or self.grpo.importance_cap:
            raise ValueError(
                "stage unigrpo has an update of its own; leave sft.weight, entropy.coef, restraint.signals, rollout.refills, "
                "rollout.reference, rollout.weights and grpo.importance_cap as they are"
            )
        if len(self.data.sizes) > 1:
            raise ValueError(f"data has images of {len(self.data.sizes)} sizes; stage unigrpo takes one")


# ---- programs ----
def make_update(
    policy: Policy,
    decoder: Decoder,
    vq: nn.Module,
    optimizer: Optimizer,
    advantages: Advantages,
    decode: DecodeConfig,
    grid: tuple[int, int],
    cfg: UniGRPORun,
) -> Callable[..., Any]:
    """The jitted update (state, frozen, batch, `FlowRows`, rewards [P, R], advantages [P, R] | None, key) -> (state, metrics).

    `frozen`: the references, under transformer (None without a KL term) and mmdit, and the other components of the decoder. The state is
    donated. Several updates per batch take a part of the rows each, as `grpo_update` does.
    """
    sigmas, updates, reference = noise_levels(decode, grid), cfg.grpo.updates_per_batch, bool(cfg.grpo.kl_coef)
    codes, flow = ("transformer" in cfg.learn), ("mmdit" in cfg.learn)

    def one_update(state: TrainState, rows: Any, frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        batch, old, ref, noisy = rows
        grads, metrics = jax.tree.map(jnp.zeros_like, state.params), {}
        if codes:
            grads["transformer"], metrics = loss_and_gradient(
                policy, state.params["transformer"], (batch, old, ref), cfg.grpo, cfg.accumulate
            )
        if flow:
            own, more = flow_gradient(decoder, vq, sigmas, grid, state.params["mmdit"], frozen, (batch, noisy), cfg.flow, cfg.accumulate)
            grads["mmdit"], metrics = jax.tree.map(lambda g: cfg.flow_weight * g, own), metrics | more
        metrics["loss/total"] = metrics.get("loss/grpo", 0.0) + cfg.flow_weight * metrics.get("flow/loss", 0.0)
        state, optim = state.apply(optimizer, grads)
        return state, metrics | optim

    def update(state, frozen, batch: Trajectory, noisy: FlowRows, reward_PR, given_PR, key):
        adv_PR, metrics = advantages(reward_PR, batch.ok[0].reshape(reward_PR.shape))
        batch = batch.replace(advantage=((adv_PR if given_PR is None else given_PR).reshape(-1),))
        old = frozen_logp(policy, state.params["transformer"], batch, cfg.accumulate) if codes and updates > 1 else None
        ref = frozen_logp(policy, frozen["transformer"], batch, cfg.accumulate) if codes and reference else None
        rows = (batch, old, ref, noisy)
        if updates == 1:
            state, learned = one_update(state, rows, frozen)
            return state, metrics | learned
        order_B = jax.random.permutation(key, batch.ok[0].shape[0])
        minibatches = split_rows(jax.tree.map(lambda x: x[order_B], rows), updates)
        state, stacked = jax.lax.scan(lambda state, rows: one_update(state, rows, frozen), state, minibatches)
        learned = {name: (jnp.max if name.endswith("_max") else jnp.mean)(value) for name, value in stacked.items()}
        # Trainer against sampler in the first update, before anything has changed.
        learned |= {name: stacked[name][0] for name in stacked if name.endswith("logp_gap_max")}
        return state, metrics | learned

    return jax.jit(update, donate_argnums=0)


class UniGRPOStage(GRPOStage):
    """UniGRPO, registered as a stage."""

    Config: ClassVar[type] = UniGRPORun

    @classmethod
    def programs(cls, cfg: UniGRPORun, models: Mapping[str, Any], mesh: Mesh, decoder_mesh: Mesh | None = None) -> Programs:
        """The programs of a step."""
        ar, c, decode = models["transformer"], cfg.rollout, decode_settings(cfg.decode, read_description(cfg.init_from))
        check_heads(ar.n_kv_heads, mesh)
        check_divides(cfg, mesh)
        cfg.flow.check_steps(decode.steps)
        if decode.guidance != 1.0:
            raise ConfigError(f"config.decode.guidance={decode.guidance}: noisy steps are drawn and learned without guidance; set it to 1")
        grid = IMAGE_TOKENIZERS["siglip_vq"](models["siglip_vq"]).layout(*cfg.data.sizes[0]).shape
        B, T = cfg.batch_size * cfg.grpo.rollouts_per_prompt, math.prod(grid)

        # ---- arrays that stay ----
        optimizer = cfg.make_optimizer(tuple(f"{name}/.*" for name in LEARNERS if name not in cfg.learn), cfg.grpo.updates_per_batch)
        init = lambda: {name: init_params(name, models[name], key_for(cfg.seed, i, 7)) for i, name in enumerate(LEARNERS)}
        create, state = new_state(init, optimizer, mesh, cfg.guard)
        boxed, params = boxed_shapes("transformer", ar), state.params["transformer"]
        frozen = {name: abstract_params(name, models[name], mesh) for name in ("siglip_vq", *FROZEN)} | {"mmdit": state.params["mmdit"]}
        keep = param_converter(boxed, mesh, c.reference_dtype)
        frozen["transformer"] = jax.eval_shape(keep, params) if cfg.grpo.kl_coef else None
        layout = param_converter(boxed, mesh, ar.dtype, ar.image_vocab_size)
        weights = jax.eval_shape(layout, params)

        # ---- programs ----
        policy = Policy(transformer.ARTransformer(ar), c.logit_chunk)
        decoder = Decoder(**{name: COMPONENTS[name].module(models[name]) for name in DECODER_COMPONENTS})
        vq = COMPONENTS["siglip_vq"].module(models["siglip_vq"])
        programs = cls.drawing(cfg, policy.model, grid, weights, mesh)
        programs["layout"] = Program(
            layout,
            (params,),
            "the policy's weights in the sampler's layout and number format",
            Work(),
            uses=("params",),
            freed=("sampler",),
        )
        latents = lambda n, *window: abstract.rows(mesh, (n, *window, T, models["mmdit"].in_channels), jnp.float32)
        texts = lambda n: [abstract.rows(mesh, (n, length), jnp.int32) for length in (decode.text_length, decode.pooled_length)]
        n, W = B // c.chunks, cfg.flow.window
        velocity = work.dense(state.params["mmdit"], work.mmdit_tokens(T, decode.text_length))
        text = work.dense(frozen["t5"], {"": decode.text_length}) + work.dense(frozen["clip"], {"": decode.pooled_length})
        parts = {name: frozen[name] for name in FROZEN} | {"mmdit": state.params["mmdit"]}
        programs["flow-decode"] = Program(
            make_flow_decode(vq, decoder, decode, cfg.flow),
            (
                frozen["siglip_vq"], parts, abstract.rows(mesh, (n, *grid), jnp.int32), *texts(n), latents(n),
                abstract.keys(mesh, (n,), "batch"), abstract.array(mesh, (), jnp.int32),
            ),
            f"{n} images, {decode.steps} steps, {W} of them noisy",
            Work(forward=n * (decode.steps * velocity + text), tokens=n * T, images=n),
            uses=("params", "frozen"),
            per_step=c.chunks,
        )  # fmt: skip
        path = FlowPath(abstract.rows(mesh, (B,), jnp.int32), latents(B, W), latents(B, W), latents(B, W))
        codes = work.policy_update(
            ar, B, c.prompt_length, T, cfg.accumulate, 1 + cfg.sampling.guided, bool(cfg.grpo.kl_coef), c.logit_chunk, mesh.shape
        )
        flow = dataclasses.replace(
            codes,
            learned=codes.learned * ("transformer" in cfg.learn) + 3 * B * W * velocity * ("mmdit" in cfg.learn),
            forward=codes.forward * ("transformer" in cfg.learn) + B * (W * velocity * bool(cfg.flow.penalty_coef) + text),
        )
        programs["unigrpo-update"] = Program(
            guarded(make_update(policy, decoder, vq, optimizer, functools.partial(cls.advantages, cfg), decode, grid, cfg), cfg.guard),
            (
                state, frozen, abstract_batch(cfg, ar, grid, mesh), FlowRows(path, *texts(B)),
                abstract.rows(mesh, (cfg.batch_size, cfg.grpo.rollouts_per_prompt), jnp.float32), None, abstract.keys(mesh, ()),
            ),
            f"{B} rollouts of {c.prompt_length} + {T} tokens and {W} denoising steps",
            flow,
            uses=("params", "optimizer", "frozen"),
            freed=("sampler",),
            state=state,
        )  # fmt: skip
        persistent = {"params": state.params, "optimizer": state.opt_state, "frozen": frozen, "sampler": weights}
        return Programs(mesh, programs, persistent, create)

    @classmethod
    def make(cls, cfg: UniGRPORun, mesh: Mesh, stop: StopSignal) -> RunningStage:
        """A run on the prompts of the configuration, starting from the model of `init_from`."""
        check_prompts(cfg)
        rows = local_rows(mesh, cfg.batch_size)
        prompts = batches(cfg.data, cfg.seed, cfg.batch_size, rows=rows, fields=("caption", "targets"))
        model = open_model(cfg.init_from, MODELS, mesh, cfg.stage)
        models = model_configs(cfg, MODELS, model)
        check_trainable(models, LEARNERS)
        for name, config in models.items():
            model.set_config(name, config)
        decode, grid = decode_settings(cfg.decode, model.description), model.grid(*cfg.data.sizes[0])
        made = cls.programs(cfg, models, mesh)
        start = {name: model.params(name) for name in LEARNERS}
        state = made.create().starting_from(start)
        frozen = {name: model.params(name) for name in ("siglip_vq", *FROZEN)} | {"mmdit": start["mmdit"], "transformer": None}
        if cfg.grpo.kl_coef:
            keep = param_converter(boxed_shapes("transformer", models["transformer"]), mesh, cfg.rollout.reference_dtype)
            frozen["transformer"] = keep(start["transformer"])
        model.release("transformer")
        rewards = grpo.open_rewards(cfg, mesh, stop)
        flops = FlopCount()
        rollouts = cls.rollouts(
            cfg,
            {name: made[name].fn for name in ("prefill", "rollout")},
            model,
            model,
            grid=grid,
            group=cfg.grpo.rollouts_per_prompt,
            cfg=cfg.rollout,
            advantage=cfg.advantage,
            sampling=cfg.sampling,
            decode=decode,
            sampler_params=lambda params: made["layout"].fn(params["transformer"]),
            rewards=rewards,
            stop=stop,
        )
        shared = "transformer" not in cfg.learn
        noisy = NoisyRollouts(**vars(rollouts), steps=NoisySteps(cfg.flow, flops(made["flow-decode"].fn), frozen), shared=shared)
        update = flops(made["unigrpo-update"].fn)

        def learn(state, frozen, batch, reward_PR, given_PR, key, *_):  # neither signals nor packed rows: see `UniGRPORun`
            return update(state, frozen, batch, noisy.steps.rows(), reward_PR, given_PR, key)

        def grid_of(state: TrainState, number: int) -> Grid:
            model.set_params("mmdit", state.params["mmdit"], models["mmdit"])
            return grpo.sample_grid(cfg, {cfg.data.sizes[0]: Bucket(rollouts, learn)}, state, number)

        data = Prompts(prompts, functools.partial(all_prompts, cfg, rows), rewards)
        return RunningStage(
            state,
            data,
            functools.partial(grpo.train_step, cfg, {cfg.data.sizes[0]: Bucket(noisy, learn)}, frozen, set(), data),
            lambda state, directory, note: export_trained(
                directory, {name: (state.params[name], models[name]) for name in cfg.learn}, cfg.lora, model, note
            ),
            grid_of,
            items_per_step=cfg.batch_size * cfg.grpo.rollouts_per_prompt,
            close=rewards.close,
            flops=lambda: flops.total,
            record={"rewards": rewards.record()},
        )


# ---- a run ----
@dataclasses.dataclass(frozen=True)
class NoisyRollouts(Rollouts):
    """Rollouts whose image decoder draws some steps with noise.

    Attributes:
      steps: decodes them.
      shared: the rollouts of a prompt have the same codes, so that their rewards differ by the decoder alone.
    """

    steps: NoisySteps
    shared: bool

    def __call__(self, params: Any, *asked: Any) -> Any:
        *_, key, _ = asked
        self.steps.begin(params["mmdit"], jax.random.fold_in(key, FLOW))
        return super().__call__(params, *asked)

    def keys(self, key: jax.Array, prompts: int) -> tuple[jax.Array, jax.Array]:
        """As without noise; shared codes have one key per prompt."""
        keys_PR, noise_keys_PR = super().keys(key, prompts)
        return jnp.broadcast_to(keys_PR[:, :1], keys_PR.shape) if self.shared else keys_PR, noise_keys_PR

    def images(self, codes_PRT: jax.Array, prompts: Sequence[str], noise_keys_B: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] of rollouts, on the mesh."""
        noise_BTC = self.model.noise(noise_keys_B, self.grid)
        with jax.set_mesh(self.model.mesh):
            return self.steps(codes_PRT.reshape(-1, *self.grid), *self.model.text_ids(prompts, self.decode), noise_BTC)
