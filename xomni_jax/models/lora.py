"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): a frozen kernel plus alpha / rank * a @ b, of which a and b are trained.

Adapters are a tree of their own, {path of a projection: {"lora_a": [layers, in.., rank], "lora_b": [layers, rank, out..]}}, float32.
`join` puts them beside the kernels, for `layers.Projection` to apply; `merge` adds them to the kernels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from xomni_jax.core.config import Natural, NonNegative, check_patterns
from xomni_jax.models.layers import Projection
from xomni_jax.models.registry import boxed_shapes


@dataclass(frozen=True)
class LoRAConfig:
    """Which kernels of a frozen model get adapters.

    Attributes:
      rank: inner size of an adapter; 0: no adapters, the model itself is trained
      alpha: an adapter's product is multiplied by alpha / rank
      targets: path patterns of the dense layers that get an adapter, such as ".*/(q|v)_proj"; the whole path must match
    """

    rank: Natural = 0
    alpha: NonNegative = 16.0
    targets: tuple[str, ...] = (".*",)

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        return self.alpha / max(self.rank, 1)


def projections(name: str, model_cfg: Any) -> tuple[dict[str, int], Any]:
    """({path of a projection: number of axes that its kernel contracts}, boxed shapes of the component's parameters)."""
    found: dict[str, int] = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, Projection):
            found["/".join(context.module.path)] = context.module.contract
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        return found, boxed_shapes(name, model_cfg)


def init_adapters(name: str, model_cfg: Any, cfg: LoRAConfig, key: jax.Array) -> Any:
    """Boxed adapters of a component: a is uniform within 1 / sqrt(inputs), as peft draws it, and b zero, so that nothing changes at first.

    Raises:
      ConfigError: a pattern of the targets matches no dense layer.
    """
    contracted, boxed = projections(name, model_cfg)
    check_patterns(cfg.targets, sorted(contracted), "config.lora.targets", "dense layer")
    kernels, out = flatten_dict(boxed), {}
    for number, path in enumerate(sorted(contracted)):
        if not any(re.fullmatch(pattern, path) for pattern in cfg.targets):
            continue
        where = tuple(path.split("/"))
        kernel = kernels[*where, "kernel"]
        shape, axes, first = kernel.value.shape, kernel.names, int(kernel.names[0] == "layers")
        inputs = first + contracted[path]
        bound = math.prod(shape[first:inputs]) ** -0.5
        a = jax.random.uniform(jax.random.fold_in(key, number), (*shape[:inputs], cfg.rank), minval=-bound, maxval=bound)
        b = jnp.zeros((*shape[:first], cfg.rank, *shape[inputs:]))
        out[*where, "lora_a"] = nn.LogicallyPartitioned(a, (*axes[:inputs], "lora"))
        out[*where, "lora_b"] = nn.LogicallyPartitioned(b, (*axes[:first], "lora", *axes[inputs:]))
    return unflatten_dict(out)


def beside(base: Any, adapters: Any) -> Any:
    """Both trees in one."""
    return unflatten_dict(flatten_dict(base, keep_empty_nodes=True) | flatten_dict(adapters))


def join(base: Any, adapters: Any, scale: float) -> Any:
    """Parameters that compute base and adapters together. Without a base the second argument is the whole model, returned as it is."""
    scaled = lambda path, x: x * scale if path[-1].key == "lora_a" else x  # noqa: E731
    return adapters if base is None else beside(base, jax.tree_util.tree_map_with_path(scaled, adapters))


def merge(params: Any, adapters: Any, scale: float) -> Any:
    """The parameters with every adapter added to its kernel; the sum is float32, the result of the kernel's dtype. Jit it."""
    flat, parts = flatten_dict(params, keep_empty_nodes=True), flatten_dict(adapters)
    for *where, leaf in parts:
        if leaf == "lora_a":
            a, b, kernel = parts[*where, "lora_a"], parts[*where, "lora_b"], flat[*where, "kernel"]
            layers, rank = a.shape[: a.ndim + b.ndim - 2 - kernel.ndim], a.shape[-1]
            product = jnp.matmul(a.reshape(*layers, -1, rank), b.reshape(*layers, rank, -1), precision=jax.lax.Precision.HIGHEST)
            flat[*where, "kernel"] = (kernel + scale * product.reshape(kernel.shape)).astype(kernel.dtype)
    return unflatten_dict(flat)
