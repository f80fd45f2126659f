"""Texts that a policy writes beside its images: how they are drawn, where they end, and what must learn."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from xomni_jax.components import ModelComponents
from xomni_jax.core.config import ConfigError
from xomni_jax.core.program import Programs
from xomni_jax.rl.grpo import GRPORun
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.segments import Segment, SegmentSpec
from xomni_jax.sequence.tokenizer import MultimodalTokenizer


@functools.lru_cache(1)
def tokenizer_of(init_from: str) -> MultimodalTokenizer:
    """The tokenizer of the model that a run starts from."""
    return ModelComponents(init_from).tokenizer if init_from else MultimodalTokenizer.load()


def text_spec(name: str, length: int, sampling: SamplingConfig, stop: int) -> SegmentSpec:
    """A text of at most `length` tokens, which ends with `stop`, at the temperature of the images.

    It is not truncated: its log-probs would need a mask of the whole vocabulary.
    """
    return SegmentSpec(name, "text", length, SamplingConfig(temperature=sampling.temperature, top_k=0, min_p=0.0), (stop,))


def ended_at(text: Segment, stop: int) -> jax.Array:
    """Which texts [...] end within their bound."""
    return jnp.any((text.ids == stop) & text.mask, axis=-1)


@jax.jit
def folded(keys_PR: jax.Array, n: int) -> jax.Array:
    """Keys of the n-th segment of each row."""
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, n)))(keys_PR)


def check_text_head(cfg: GRPORun, made: Programs, texts: str) -> None:
    """Refuses a run whose `texts` cannot learn."""
    if not cfg.lora.rank and "lm_head/kernel" not in cfg.make_optimizer().trained(made.persistent["params"]):
        raise ConfigError(
            f"config.train={cfg.train}, config.freeze={cfg.freeze}: the text head does not learn, so that {texts} cannot; let "
            "lm_head/kernel learn"
        )
