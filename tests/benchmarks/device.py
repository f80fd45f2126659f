"""How much of an accelerator our programs use: drawing codes against its bandwidth, a train step against its peak of operations."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from tests.benchmarks import machine
from tests.benchmarks.report import OURS, Report, duration
from xomni_jax.core import flops
from xomni_jax.core.tables import aligned
from xomni_jax.models.registry import init_params
from xomni_jax.models.transformer import PRESETS, ARConfig, ARTransformer
from xomni_jax.models.vocab_heads import head_logp
from xomni_jax.planner.chips import CHIPS
from xomni_jax.sampling.generate import generate_codes
from xomni_jax.training.optimizer import Optimizer, OptimizerConfig
from xomni_jax.training.state import TrainState

WARM_UPS = 2


class Size(NamedTuple):
    """A transformer and what it is given: images drawn at a time, their codes, rows of a train step and their tokens."""

    config: ARConfig
    images: int
    codes: int
    rows: int
    length: int


SIZES = {
    "tiny": Size(PRESETS["tiny"], 4, 16, 2, 32),
    # A billion parameters in the released model's proportions: 2 + 12 + 2 layers, 16,384 image codes, bfloat16.
    "1b": Size(
        dataclasses.replace(
            PRESETS["xomni-7b"], vocab_size=32_768, d_model=2048, mlp_dim=5632, n_heads=16, n_kv_heads=4, n_adapter_layers=2,
            n_language_layers=12, n_head_layers=2,
        ),
        64, 256, 8, 1024,
    ),
}  # fmt: skip

# Published peaks of NVIDIA's GPUs: bfloat16 operations per second without sparsity, bytes per second of memory.
GPUS = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100": (312e12, 1.56e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
}
TPUS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def peaks(kind: str) -> tuple[float, float] | None:
    """(bfloat16 operations, bytes) per second of a device by JAX's name of it, None for one that is not known."""
    if kind in TPUS:
        return CHIPS[TPUS[kind]].flops, CHIPS[TPUS[kind]].bandwidth
    return next((peak for name, peak in GPUS.items() if name in kind), None)


def run(size: str, repeats: int, seconds: float) -> Report:
    """Drawing codes and a train step on the first device, with the share of its published peaks that they reach."""
    device, made = jax.devices()[0], SIZES[size]
    peak = peaks(device.device_kind)
    (draw, draw_bytes), (train, train_flops) = drawing(made), training(made)
    draw_s, train_s = (timed(step, repeats, seconds / 2) for step in (draw, train))
    share = lambda value, of: f"{value / of:.1%}" if peak else "not known"
    rows = [
        ("", "seconds", "rate", "reached", "of its peak"),
        (
            f"drawing {made.images} images of {made.codes} codes", duration(draw_s), f"{made.images * made.codes / draw_s:.4g} codes/s",
            f"{draw_bytes / draw_s / 1e9:.4g} GB/s", share(draw_bytes / draw_s, peak and peak[1]),
        ),
        (
            f"train step of {made.rows} x {made.length} tokens", duration(train_s), f"{made.rows * made.length / train_s:.4g} tokens/s",
            f"{train_flops / train_s / 1e12:.4g} TFLOP/s", share(train_flops / train_s, peak and peak[0]),
        ),
    ]  # fmt: skip
    c = made.config
    lines = [
        f"device: {device.device_kind} ({device.platform}); a transformer of {c.n_layers} layers, width {c.d_model}, {jnp.dtype(c.dtype)}",
        "", aligned(rows), "",
        "Bytes: the weights and the filled part of the cache, read once for each code of all images; what else is read is not counted.",
        "Operations: products forward and backward, without what is computed again. Medians without the first runs, which compile.",
    ]  # fmt: skip
    data = {"draw_s": draw_s, "draw_bytes": draw_bytes, "train_s": train_s, "train_flops": train_flops, "peaks": peak}
    about = {"benchmark": "device", "size": size, "device": device.device_kind, "versions": machine.versions(OURS)}
    return Report("\n".join(lines), about | data)


def timed(step: Callable[[], Any], repeats: int, seconds: float) -> float:
    """Median seconds of a step."""
    for _ in range(WARM_UPS):
        jax.block_until_ready(step())
    took, end = [], time.perf_counter() + seconds
    while not took or len(took) < repeats and time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready(step())
        took.append(time.perf_counter() - began)
    return median(took)


def drawing(size: Size) -> tuple[Callable[[], Any], float]:
    """Images drawn from prompts of 32 tokens, and the bytes that any program must read for them."""
    c, prompt = size.config, 32
    model, params = ARTransformer(c), random_params(c, c.dtype)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, c.vocab_size, (size.images, prompt)), jnp.int32)
    lengths, keys = jnp.full(size.images, prompt, jnp.int32), jax.random.split(jax.random.key(0), (size.images, 1))
    draw = jax.jit(lambda params: generate_codes(model, params, ids, lengths, size.codes, keys)["codes"])
    read = {name: x for name, x in params.items() if name not in ("lm_embed", "mm_embed", "lm_head")}  # drawing a code needs none of those
    weights = sum(x.nbytes for x in jax.tree.leaves(read))
    token = 2 * c.n_layers * c.n_kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize  # keys and values
    cache = token * size.images * (prompt + (size.codes - 1) / 2)
    return lambda: draw(params), size.codes * (weights + cache)


def training(size: Size) -> tuple[Callable[[], Any], float]:
    """A train step on rows of image tokens with AdamW, weights and moments in float32, and the operations of its products.

    What rematerialisation computes again does not count as an operation of the step: three times the products of the forward pass do.
    """
    c = size.config
    model, optimizer = ARTransformer(c), Optimizer(OptimizerConfig(warmup_steps=0, schedule="constant"), 1)
    params = random_params(c, jnp.float32)
    state = TrainState(jnp.int32(0), params, optimizer.transform.init(params), {})
    codes = np.random.default_rng(0).integers(0, c.image_vocab_size, (size.rows, size.length))
    ids_BL = jnp.asarray(c.vocab_size + codes, jnp.int32)

    def loss(params):
        hidden_BLD = model.apply({"params": params}, ids_BL)
        return -jnp.mean(head_logp(model, params, "image", hidden_BLD[:, :-1], ids_BL[:, 1:] - c.vocab_size, chunk=256)[0])

    def step(state):
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply(optimizer, grads)[0], value

    compiled = jax.jit(step, donate_argnums=0)

    def once():
        nonlocal state
        state, value = compiled(state)
        return value

    return once, 3 * flops.count(jax.make_jaxpr(loss)(params)).total


def random_params(c: ARConfig, dtype: Any) -> Any:
    """Seeded parameters of a dtype, made on the device: normal of 0.02, norms at 1."""
    shapes = meta.unbox(jax.eval_shape(lambda: init_params("transformer", c, jax.random.key(0))))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def make(key):
        keys = jax.random.split(key, len(leaves))
        normal = lambda k, shape: 0.02 * jax.random.normal(k, shape, dtype)
        ones = [path[-1].key == "scale" for path, _ in leaves]
        return tree.unflatten([jnp.ones(x.shape, dtype) if one else normal(k, x.shape) for k, one, (_, x) in zip(keys, ones, leaves)])

    return jax.jit(make)(jax.random.key(0))
