"""Layers that all models share: projections that name their logical axes, norms, convolution, embedding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xomni_jax.sharding.rules import constrain

Dtype = Any


def named(init: Callable, *axes: str | None) -> Callable:
    """An initialiser whose parameter carries its logical axes, for `sharding.rules`."""
    return nn.with_logical_partitioning(init, axes)


class Projection(nn.Module):
    """A dense map between named axes: contracts the last `contract` axes of x with the kernel, appends `features`.

    Where the parameters hold `lora_a` and `lora_b` (`lora.join`), their product is added to the kernel without being computed.

    Attributes:
      features: output sizes, e.g. (heads, head_dim).
      axes: logical axis names of the kernel: the contracted axes, then the output axes.
      contract: how many trailing axes of the input are contracted.
      bias: whether to add a bias over the output axes.
      dtype, param_dtype: of the computation and of the parameters.
      init: kernel initialiser of a 2-D (in, out) matrix.
      int8: the kernel is int8 with a float32 scale per output, from `int8.quantize`; it cannot be trained,
        but adapters can.
    """

    features: Sequence[int]
    axes: Sequence[str | None]
    contract: int = 1
    bias: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    init: Callable = nn.initializers.lecun_normal()
    int8: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        into, out = tuple(x.shape[-self.contract :]), tuple(self.features)

        def init(key, shape, dtype):
            return self.init(key, (math.prod(into), math.prod(out)), dtype).reshape(shape)

        kernel_init, kernel_dtype = (nn.initializers.zeros, jnp.int8) if self.int8 else (init, self.param_dtype)
        kernel = self.param("kernel", named(kernel_init, *self.axes), into + out, kernel_dtype)
        dims = tuple(range(x.ndim - self.contract, x.ndim)), tuple(range(self.contract))
        y = jax.lax.dot_general(x.astype(self.dtype), kernel.astype(self.dtype), (dims, ((), ())))
        if self.int8:
            scale = self.param("kernel_scale", named(nn.initializers.ones, *self.axes[self.contract :]), out, jnp.float32)
            y = (y * scale).astype(self.dtype)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name).astype(self.dtype) for name in ("lora_a", "lora_b"))
            y = y + jnp.tensordot(jax.lax.dot_general(x.astype(self.dtype), a, (dims, ((), ()))), b, 1)
        if self.bias:
            b = self.param("bias", named(nn.initializers.zeros, *self.axes[self.contract :]), out, self.param_dtype)
            y = y + b.astype(self.dtype)
        return y


def linear(cfg: Any, name: str, features: int | Sequence[int], axes: Sequence[str | None], bias: bool = True, **kw: Any) -> Projection:
    """A `Projection` whose number formats are those of a model's config: its `dtype`, `param_dtype` and, where it has one, `int8`."""
    features, int8 = (features,) if isinstance(features, int) else features, getattr(cfg, "int8", False)
    return Projection(features, axes, bias=bias, dtype=cfg.dtype, param_dtype=cfg.param_dtype, int8=int8, name=name, **kw)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32, returned in `dtype`."""

    eps: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", named(nn.initializers.ones, "norm"), (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


def scale_and_shift(norm: nn.Module, x: jax.Array) -> jax.Array:
    """x * scale + bias over the last axis, in float32, with the parameters of the normalisation `norm`."""
    scale = norm.param("scale", named(nn.initializers.ones, "norm"), (x.shape[-1],), norm.param_dtype)
    bias = norm.param("bias", named(nn.initializers.zeros, "norm"), (x.shape[-1],), norm.param_dtype)
    return x * scale.astype(jnp.float32) + bias.astype(jnp.float32)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32, returned in `dtype`; `affine` adds scale and bias."""

    eps: float = 1e-6
    affine: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        mean = jnp.mean(x, axis=-1, keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, axis=-1, keepdims=True) + self.eps)
        return (scale_and_shift(self, x) if self.affine else x).astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation over (rows, columns, channels of a group) of [..., Y, X, C], in float32, returned in `dtype`."""

    groups: int = 32
    eps: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        g = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, channels // self.groups)
        over = (-4, -3, -1)
        mean = jnp.mean(g, axis=over, keepdims=True)
        g = (g - mean) * jax.lax.rsqrt(jnp.mean((g - mean) ** 2, axis=over, keepdims=True) + self.eps)
        return scale_and_shift(self, g.reshape(x.shape)).astype(self.dtype)


class Conv(nn.Module):
    """2-D convolution on [B, Y, X, C] with a bias.

    Attributes:
      padding: ((top, bottom), (left, right)).
      out_axis: logical axis of the features; None replicates them.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    out_axis: str | None = "channels_out"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        init = named(nn.initializers.lecun_normal(), "conv", "conv", "channels_in", self.out_axis)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        bias = self.param("bias", named(nn.initializers.zeros, self.out_axis), (self.features,), self.param_dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel.astype(self.dtype), (self.stride,) * 2, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias.astype(self.dtype)


class Embed(nn.Module):
    """A lookup table [V, D]; ids [...] -> [..., D] in `dtype`. Out-of-range ids are the caller's error and are clamped."""

    rows: int
    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param("table", named(self.init, "vocab", "embed"), (self.rows, self.features), self.param_dtype)
        return lookup(table, ids, self.rows, self.dtype, self.param_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lookup(table_VD: jax.Array, ids: jax.Array, rows: int, dtype: Dtype, param_dtype: Dtype) -> jax.Array:
    """Rows of a table by id, [...] -> [..., D] in `dtype`; ids are clamped to 0..rows-1.

    With a table sharded over both axes the partitioner would exchange activations by all-to-all and gather the gradient in float32.
    Here the table is gathered over its width in `dtype`, and the gradient, summed in float32, is scattered once.
    """
    return jnp.take(constrain(table_VD.astype(dtype), "vocab", None, name="table"), ids, axis=0, mode="clip")


def _lookup_forward(table_VD, ids, rows, dtype, param_dtype):
    return lookup(table_VD, ids, rows, dtype, param_dtype), ids


def _lookup_backward(rows, dtype, param_dtype, ids, gradient):
    total_VD = jnp.zeros((rows, gradient.shape[-1]), jnp.float32).at[jnp.clip(ids, 0, rows - 1)].add(gradient.astype(jnp.float32))
    total_VD = constrain(constrain(total_VD, "vocab", None, name="table"), "vocab", "embed", name="table")
    return total_VD.astype(param_dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
