"""LlamaGen's class-conditional model against outputs of the public code: likelihoods, gradients, greedy samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.models import golden
from xomni_jax.models.transformer import ARTransformer
from xomni_jax.models.vocab_heads import token_logp
from xomni_jax.sampling.generate import generate_codes
from xomni_jax.sampling.logits import SamplingConfig, guide, sampling_mask, temper


def inputs(model: ARTransformer, want: dict[str, np.ndarray], classes: np.ndarray | None = None) -> np.ndarray:
    """[class, all codes but the last] as ids of ours."""
    classes = want["class_ids"] if classes is None else classes
    return np.concatenate([classes[:, None], want["token_ids"][:, :-1] + model.cfg.vocab_size], axis=1).astype(np.int32)


def compare_c2i(model: ARTransformer, params, want: dict[str, np.ndarray], samples=("greedy_no_cfg", "greedy_cfg")) -> None:
    """All of it, to 1e-4 of the largest value, gradients to 1e-3; sampled codes equal."""
    none = np.full_like(want["class_ids"], model.cfg.vocab_size - 1)

    @jax.jit
    def logits(params, ids):
        return model.apply({"params": params}, model.apply({"params": params}, ids), method="image_logits")

    cond, uncond = (logits(params, inputs(model, want, classes)) for classes in (None, none))
    golden.assert_close(cond, want["logits_cond"], "conditional logits")
    golden.assert_close(uncond, want["logits_uncond"], "unconditional logits")
    scale = float(want["cfg_scale"])
    guided = guide(cond, uncond, scale)
    golden.assert_close(guided, jax.nn.log_softmax(want["logits_cfg"]) + _shift(want, scale), "guided scores")
    golden.assert_close(token_logp(cond, jnp.asarray(want["token_ids"]))[0], want["logprob_cond"], "log-probabilities")

    def loss(params):
        return -jnp.mean(token_logp(logits(params, inputs(model, want)), jnp.asarray(want["token_ids"]))[0])

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    golden.assert_close(value, want["loss_cond"], "loss")
    golden.assert_close(gradients["mm_head"]["kernel"].T, want["train.grad.output.weight"], "head gradient", 1e-3)
    golden.assert_close(gradients["lm_embed"]["table"], want["train.grad.cls_embedding"], "class gradient", 1e-3)

    settings = SamplingConfig(temperature=0.9, top_k=13, top_p=0.8, min_p=0.0)
    at = jnp.asarray(want["logits_cfg"][:, 3])
    kept = jnp.where(sampling_mask(at, settings), temper(at, 0.9), -jnp.inf)
    golden.assert_close(jax.nn.softmax(kept), want["probs_t0.9_topk13_topp0.8_at_pos3"], "top-k and top-p")

    one, keys = np.ones(len(none), np.int32), jax.random.split(jax.random.key(0), (len(none), 1))
    for name in samples:
        guidance = 1.0 if name == "greedy_no_cfg" else scale
        greedy = SamplingConfig(temperature=0.0, guidance=guidance, top_k=0, min_p=0.0)
        negative = (none[:1, None].astype(np.int32), one[:1]) if guidance != 1 else None
        prompts = want["class_ids"][:, None].astype(np.int32)
        made = generate_codes(model, params, prompts, one, want["token_ids"].shape[1], keys, greedy, negative)
        np.testing.assert_array_equal(made["codes"][:, 0], want[f"{name}.ids"], err_msg=name)


def _shift(want: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """What guidance of log-softmaxes adds to the log-softmax of guided logits: the same for all codes of a position."""
    total = lambda x: np.asarray(jax.scipy.special.logsumexp(x, axis=-1, keepdims=True))  # noqa: E731
    cond, uncond, mixed = (total(want[name]) for name in ("logits_cond", "logits_uncond", "logits_cfg"))
    return mixed - uncond - scale * (cond - uncond)
