"""The two common uses of the engine: an image after a prompt, and a text after one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from xomni_jax.models.transformer import ARTransformer
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.logits import GREEDY, SamplingConfig
from xomni_jax.sampling.segments import Prompts, Segment, SegmentSpec, image_spec


def generate_codes(
    model: ARTransformer,
    params,
    prompt_ids_PS: jax.Array,
    lengths_P: jax.Array,
    n_codes: int,
    keys_PR: jax.Array,
    sampling: SamplingConfig = SamplingConfig(),
    negative: Prompts | None = None,
    return_mask: bool = False,
) -> dict[str, jax.Array | None]:
    """Samples exactly `n_codes` image codes for R rollouts of each of P prompts.

    Args:
      prompt_ids_PS: prompts that end in <IMAGE>, right-padded. lengths_P: their real tokens.
      n_codes: T = Y * X, static.
      keys_PR: PRNG keys; rollout (p, r) samples step t with fold_in(keys[p, r], t) and so does not depend on the others.
      negative: the prompts guidance steers away from (ids [P or 1, S'], lengths [P or 1]); needed when guidance is not 1.
      return_mask: also return which codes could have been sampled, for `Engine.score`.

    Returns:
      codes [P, R, T] int32, 0-based; logp [P, R, T] float32, under the truncated distribution each code was sampled from;
      sampling_mask: uint8 [P, R, T, ceil(image_vocab_size / 8)], eight codes per byte, or None.
    """
    engine, spec = Engine(model), image_spec(n_codes, sampling)
    prompt, state = engine.start(params, (prompt_ids_PS, lengths_P), keys_PR.shape[1], n_codes, negative if sampling.guided else None)
    image = engine.sample(params, prompt, state, spec, keys_PR, return_mask)[1]
    return {"codes": image.ids, "logp": image.logp, "sampling_mask": image.kept}


def generate_text(
    model: ARTransformer,
    params,
    prompt_ids_PS: jax.Array,
    lengths_P: jax.Array,
    max_new: int,
    stop_ids: Sequence[int],
    pad_id: int = 0,
) -> jax.Array:
    """Continues prompts (which may hold images) with the most probable text, as released, until every row has stopped.

    Args:
      prompt_ids_PS, lengths_P: right-padded prompts and their real tokens. max_new: static bound on new tokens.
      stop_ids: a row ends with the first of these, which is returned; every later entry is `pad_id`.

    Returns:
      ids [P, max_new] int32, text ids only.
    """
    spec = SegmentSpec("text", "text", max_new, GREEDY, tuple(stop_ids))
    keys_P1 = jax.random.split(jax.random.key(0), (prompt_ids_PS.shape[0], 1))  # `draw` needs some; greedy, it does not depend on them
    text = draw_text(model, params, (prompt_ids_PS, lengths_P), spec, keys_P1).rows()
    return jnp.where(text.mask, text.ids, pad_id)


def draw_text(model: ARTransformer, params, prompts: Prompts, spec: SegmentSpec, keys_PR: jax.Array) -> Segment:
    """Texts [P, R, L] after prompts (which may hold images), R of each."""
    engine = Engine(model)
    prompt, state = engine.start(params, prompts, keys_PR.shape[1], spec.length, vision=False)
    return engine.sample(params, prompt, state, spec, keys_PR)[1]


def make_answerer(model: ARTransformer, max_new: int, stop_id: int, pad_id: int) -> Callable[..., jax.Array]:
    """The jitted greedy `generate_text` (params, prompt ids [P, S], lengths [P]) -> ids [P, max_new]."""
    return jax.jit(lambda params, ids_PS, lengths_P: generate_text(model, params, ids_PS, lengths_P, max_new, (stop_id,), pad_id))
