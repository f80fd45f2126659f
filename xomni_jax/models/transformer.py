"""The unified autoregressive transformer: a Qwen2 decoder between vision layers, over text and image tokens (X-Omni, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from xomni_jax.models.attention import attend, check_attention, on_kernels
from xomni_jax.models.cached_attention import cached_attention
from xomni_jax.models.decode_attention import step_kernel
from xomni_jax.models.layers import Embed, RMSNorm, linear
from xomni_jax.models.stack import StackConfig, stacked
from xomni_jax.models.vocab_heads import Head, select
from xomni_jax.sharding.rules import constrain

ORDERS = ("raster", "spanning_tree")
STACKS = ("adapters", "language", "heads")

# Keys and values of every layer, per stack: {stack: (k, v)}. See `sampling.cache` for the shapes.
KV = dict[str, tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class ARConfig(StackConfig):
    """Sizes of an `ARTransformer`.

    Text ids are 0..vocab_size-1; multimodal ids follow: `image_vocab_size` image codes, then special and unused ids.

    Attributes:
      vocab_size: text ids
      mm_vocab_size: multimodal ids
      image_vocab_size: image codes
      d_model: width of the residual stream
      mlp_dim: width of the MLP's hidden layer
      n_heads: query heads
      n_kv_heads: key and value heads
      head_dim: width of one head
      n_language_layers: layers that text and image tokens pass
      n_adapter_layers: vision layers before them, whose output text tokens skip
      n_head_layers: vision layers after them
      rope_theta: base of the rotary frequencies
      grid_columns: columns of a grid of codes whose rotary positions are row and column, as in LlamaGen; 0: the place in the sequence
      condition_length: tokens before such a grid, which have no position in it; their queries and keys are zero
      order: in which the codes of an image come: raster (row by row), or spanning_tree (a random one for each image, as in STAR)
      qkv_bias: q, k and v have a bias
      rms_eps: of the RMSNorms
      attention: implementation of attention: auto, plain or splash; see `attention.attend`
      attention_chunk: queries per step of plain attention in a full pass; 0 takes all at once
      unroll: layers per step of the scan over them
      int8: the layers' kernels are stored in 8 bits, frozen; see `models.int8`
    """

    vocab_size: int
    mm_vocab_size: int
    image_vocab_size: int
    d_model: int
    mlp_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_language_layers: int
    n_adapter_layers: int
    n_head_layers: int
    rope_theta: float = 1e6
    grid_columns: int = 0
    condition_length: int = 1
    order: str = "raster"
    qkv_bias: bool = True
    rms_eps: float = 1e-6
    attention: str = "auto"
    attention_chunk: int = 0
    unroll: int = 1
    int8: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"ARConfig.n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; change one of them")
        if self.head_dim % (4 if self.grid_columns else 2):
            needs = "two pairs, of rows and columns; make it a multiple of 4" if self.grid_columns else "pairs; make it even"
            raise ValueError(f"ARConfig.head_dim={self.head_dim}: rotary positions need {needs}")
        if self.image_vocab_size > self.mm_vocab_size:
            raise ValueError(
                f"ARConfig.image_vocab_size={self.image_vocab_size} exceeds mm_vocab_size={self.mm_vocab_size}, which includes it; "
                "raise the latter"
            )
        if self.order not in ORDERS:
            raise ValueError(f"ARConfig.order={self.order!r} is unknown; choose one of {', '.join(ORDERS)}")
        super().__post_init__()
        check_attention("ARConfig", self.attention)
        if self.n_language_layers < 1 or self.n_adapter_layers < 0 or self.n_head_layers < 0:
            raise ValueError("ARConfig needs n_language_layers >= 1 and n_adapter_layers, n_head_layers >= 0; correct the layer counts")
        if self.unroll < 1:
            raise ValueError(f"ARConfig.unroll={self.unroll} is not a number of layers; use 1, or more to trade compilation time for speed")
        if self.attention_chunk < 0:
            raise ValueError(f"ARConfig.attention_chunk={self.attention_chunk} is negative; use 0 to attend all at once")

    @property
    def layers(self) -> dict[str, int]:
        """Layers per stack, in the order they run, empty stacks left out."""
        counts = zip(STACKS, (self.n_adapter_layers, self.n_language_layers, self.n_head_layers))
        return {name: n for name, n in counts if n}

    @property
    def n_layers(self) -> int:
        """All layers of the sequence."""
        return sum(self.layers.values())

    @property
    def total_vocab_size(self) -> int:
        """Text and multimodal ids together."""
        return self.vocab_size + self.mm_vocab_size


PRESETS: dict[str, ARConfig] = {
    "xomni-7b": ARConfig(
        vocab_size=152064, mm_vocab_size=16448, image_vocab_size=16384, d_model=3584, mlp_dim=18944, n_heads=28, n_kv_heads=4,
        head_dim=128, n_language_layers=28, n_adapter_layers=4, n_head_layers=4, attention_chunk=512, dtype=jnp.bfloat16, remat="full",
    ),
    "tiny": ARConfig(
        vocab_size=384, mm_vocab_size=576, image_vocab_size=512, d_model=128, mlp_dim=384, n_heads=4, n_kv_heads=2,
        head_dim=32, n_language_layers=3, n_adapter_layers=1, n_head_layers=1, rope_theta=1e4,  # with 1e6 few of 200 positions differ
        unroll=3,  # a CPU copies the carry of a loop
    ),
}  # fmt: skip


@struct.dataclass
class Context:
    """Inputs that all layers of one forward pass share.

    In a full pass B are sequences and L their tokens. In a cached pass B are prompts and L = W * R new tokens, W for each of R rollouts,
    which do not attend to one another.

    Attributes:
      image_BL: True at multimodal tokens.
      segments_BL: as in `ARTransformer.__call__`.
      queries_BL: rotary positions of the queries where they are not those of the tokens; see `ARTransformer.__call__`.
      lengths_B, column_BR: real tokens of each prompt, and tokens of each rollout in the cache; set in a cached pass only.
      stacked: with TPU kernels, the caches of all layers of the stack; `past` is then the index of the layer.
      collect: a full pass returns its keys and values.
    """

    positions_BL: jax.Array
    image_BL: jax.Array
    segments_BL: jax.Array | None = None
    queries_BL: jax.Array | None = None
    lengths_B: jax.Array | None = None
    column_BR: jax.Array | None = None
    stacked: tuple[jax.Array, ...] | None = None
    collect: bool = struct.field(pytree_node=False, default=False)


def rope_table(c: ARConfig, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, L, 1, H/2] of the angle of each pair. On a grid the first half of the pairs turns with the row, the second
    with the column, and both are zero before the grid (LlamaGen, arXiv 2406.06525 section 3.2)."""
    H = c.head_dim // 2 if c.grid_columns else c.head_dim
    freq = c.rope_theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle = lambda at_BL: at_BL.astype(jnp.float32)[:, :, None, None] * freq
    if not c.grid_columns:
        return jnp.cos(angle(positions_BL)), jnp.sin(angle(positions_BL))
    cell_BL = positions_BL - c.condition_length
    both = jnp.concatenate([angle(cell_BL // c.grid_columns), angle(cell_BL % c.grid_columns)], axis=-1)
    on_grid = (cell_BL >= 0)[:, :, None, None]
    return jnp.where(on_grid, jnp.cos(both), 0.0), jnp.where(on_grid, jnp.sin(both), 0.0)


def apply_rope(x_BLNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary positions in Qwen2's half-split form: pairs are (i, i + H/2). [B, L, N, H], [B, L, 1, H/2] -> [B, L, N, H] of x's dtype."""
    a, b = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLNH.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and as in Qwen2 with bias on q, k, v.

    (x [B, L, D], past | None, Context) -> (y [B, L, D], the layer's new (k, v) or None). New keys and values are
    [B, K, L, H] in a full pass with `collect`, [P, L, K, H] in a cached one.
    """

    cfg: ARConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, past: tuple[jax.Array, ...] | None, ctx: Context):
        c = self.cfg

        def heads(name: str, axis: str, n: int) -> jax.Array:
            y = linear(c, name, (n, c.head_dim), ("embed", axis, "head_dim"), bias=c.qkv_bias)(x_BLD)
            return constrain(y, "batch", "length", axis, "head_dim", name=name)

        q_BLNH, k_BLKH = heads("q_proj", "heads", c.n_heads), heads("k_proj", "kv_heads", c.n_kv_heads)
        v_BLKH = heads("v_proj", "kv_heads", c.n_kv_heads)
        rope = rope_table(c, ctx.positions_BL)
        q_BLNH = apply_rope(q_BLNH, *(rope if ctx.queries_BL is None else rope_table(c, ctx.queries_BL)))
        k_BLKH = apply_rope(k_BLKH, *rope)
        if past is None:
            y_BLNH = attend(
                q_BLNH, k_BLKH, v_BLKH, scale=c.head_dim**-0.5, kind=c.attention, causal=True,
                segments_BL=ctx.segments_BL, query_chunk=c.attention_chunk,
            )  # fmt: skip
            new = (k_BLKH.swapaxes(1, 2), v_BLKH.swapaxes(1, 2)) if ctx.collect else None
        else:
            q_BLKGH = q_BLNH.reshape(*q_BLNH.shape[:2], c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim)
            if ctx.stacked is None:
                y_BLKGH = cached_attention(q_BLKGH, k_BLKH, v_BLKH, past, ctx.lengths_B, ctx.column_BR, c.attention_chunk)
            else:
                y_BLKGH = step_kernel(q_BLKGH, k_BLKH, v_BLKH, ctx.stacked, past, ctx.lengths_B, ctx.column_BR)
            y_BLNH = y_BLKGH.reshape(q_BLNH.shape)
            new = (k_BLKH, v_BLKH)
        out = linear(c, "o_proj", c.d_model, ("heads", "head_dim", "embed"), bias=False, contract=2, init=_residual_init(c))
        return out(y_BLNH), new


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). [B, L, D] -> [B, L, D]."""

    cfg: ARConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c = self.cfg
        gate_BLF, up_BLF = (linear(c, name, c.mlp_dim, ("embed", "mlp"), bias=False)(x_BLD) for name in ("gate_proj", "up_proj"))
        down = linear(c, "down_proj", c.d_model, ("mlp", "embed"), bias=False, init=_residual_init(c))
        return down(nn.silu(gate_BLF) * up_BLF)


class DecoderLayer(nn.Module):
    """A pre-norm Qwen2 layer: (x [B, L, D], past, Context) -> (x [B, L, D], new keys and values or None).

    With `vision` only multimodal tokens take its output. Text tokens pass through unchanged, but the others attend to them.
    """

    cfg: ARConfig
    vision: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, past: tuple[jax.Array, ...] | None, ctx: Context):
        norm = dict(eps=self.cfg.rms_eps, dtype=self.cfg.dtype, param_dtype=self.cfg.param_dtype)
        y_BLD, new = Attention(self.cfg, name="attn")(RMSNorm(name="attn_norm", **norm)(x_BLD), past, ctx)
        y_BLD = x_BLD + y_BLD
        y_BLD = y_BLD + MLP(self.cfg, name="mlp")(RMSNorm(name="mlp_norm", **norm)(y_BLD))
        if self.vision:
            y_BLD = jnp.where(ctx.image_BL[:, :, None], y_BLD, x_BLD)
        return constrain(y_BLD, "batch", "length", "residual", name="residual"), new


class ARTransformer(nn.Module):
    """The unified model over text and multimodal ids. All methods are called as `model.apply({"params": p}, ..., method="name")`."""

    cfg: ARConfig

    def setup(self) -> None:
        c = self.cfg
        dtypes = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        self.lm_embed, self.mm_embed = (Embed(rows, c.d_model, **dtypes) for rows in (c.vocab_size, c.mm_vocab_size))
        self.lm_norm, self.mm_norm = (RMSNorm(c.rms_eps, **dtypes) for _ in range(2))
        self.lm_head, self.mm_head = (Head(c.d_model, rows, **dtypes) for rows in (c.vocab_size, c.mm_vocab_size))
        # Three stacks: the first training stage freezes `language` by its name, and generating text skips the other two. The last one's
        # parameters are called "heads" in checkpoints; they are transformer layers, before the vocabulary heads.
        self.adapters = _stack(c, c.n_adapter_layers, vision=True) if c.n_adapter_layers else None
        self.language = _stack(c, c.n_language_layers, vision=False)
        self.heads = _stack(c, c.n_head_layers, vision=True) if c.n_head_layers else None

    def __call__(self, ids_BL: jax.Array, positions_BL: jax.Array | None = None, segments_BL: jax.Array | None = None) -> jax.Array:
        """Hidden states after the final norm, [B, L, D], causal.

        Where codes come in another order than row by row, the query of a token has the position before that of the code that follows it.
        So it knows which cell it predicts, and the cells around that are as far away as they are row by row, where nothing changes.

        Args:
          ids_BL: int32 token ids, 0..vocab_size+mm_vocab_size-1.
          positions_BL: rotary positions; 0..L-1 without them. That of a code is the place it has row by row.
          segments_BL: packing: a token sees only earlier tokens of its own segment; 0 marks padding, whose outputs are undefined.
        """
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(ids_BL.shape[1]), ids_BL.shape)
        queries_BL = self._before_next(ids_BL, positions_BL) if self.cfg.order != "raster" else None
        ctx = Context(positions_BL, self._is_image(ids_BL), segments_BL, queries_BL)
        x_BLD, _ = self._run(self._embed(ids_BL), ctx)
        if self.is_initializing():  # this pass does not use the vocabulary heads, whose parameters must exist
            self.lm_head.weight(), self.mm_head.weight()
        return self._norm(x_BLD, ctx.image_BL)

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 logits over text ids [..., vocab_size]."""
        return self.lm_head(hidden)

    def image_logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 logits over image codes [..., image_vocab_size]; special multimodal ids cannot be sampled."""
        return self.mm_head(hidden, self.cfg.image_vocab_size)

    def prefill(self, ids_PS: jax.Array, lengths_P: jax.Array) -> tuple[jax.Array, KV]:
        """Runs right-padded prompts and keeps their keys and values.

        Args:
          ids_PS: prompts, padded on the right with any id. lengths_P: real tokens of each, at least 1.

        Returns:
          The hidden state [P, D] at each prompt's last real token, after the norm, and {stack: (k, v)} of [layers, P, K, S, H].
        """
        positions_PS = jnp.broadcast_to(jnp.arange(ids_PS.shape[1]), ids_PS.shape)
        image_PS = self._is_image(ids_PS)
        x_PSD, kv = self._run(self._embed(ids_PS), Context(positions_PS, image_PS, collect=True))
        last_P1 = lengths_P[:, None] - 1
        return self._norm(select(x_PSD, last_P1), jnp.take_along_axis(image_PS, last_P1, axis=1))[:, 0], kv

    def extend(
        self, ids_PWR: jax.Array, prompt: KV, lengths_P: jax.Array, generated: KV, column: jax.Array, moved: Any = None
    ) -> tuple[jax.Array, KV]:
        """W more tokens for each of R rollouts of P prompts; W = 1 is a decode step. Reads the caches, never writes them.

        Args:
          ids_PWR: the tokens to run; token w of a rollout has the position lengths_P + column + w.
          prompt: keys and values of `prefill`, shared by the rollouts. lengths_P: their real tokens.
          generated: {stack: (k, v)} of [layers, P, R, K, T, H]. Stacks that are missing do not run: without the vision layers, text
            alone may follow, which their output never reaches.
          column: tokens of each rollout that are cached, [P, R], or a scalar where all have equally many.
          moved: what is added to this position for keys and for queries, [P, W, R] each, where codes are in another order.

        Returns:
          Hidden states [P, W, R, D] after the norm, and the new {stack: (k, v)} of [layers, P, W * R, K, H].
        """
        P, W, R = ids_PWR.shape
        column_PR = jnp.broadcast_to(column, (P, R))
        positions_PWR = lengths_P[:, None, None] + column_PR[:, None] + jnp.arange(W)[:, None]
        ids_PL, positions_PL = ids_PWR.reshape(P, -1), positions_PWR.reshape(P, -1)
        keys_PL, queries_PL = (positions_PL, None) if moved is None else (positions_PL + by_PWR.reshape(P, -1) for by_PWR in moved)
        ctx = Context(keys_PL, self._is_image(ids_PL), queries_BL=queries_PL, lengths_B=lengths_P, column_BR=column_PR)
        past = {name: (*prompt[name], *generated[name]) for name in self.cfg.layers if name in generated}
        x_PLD, new = self._run(self._embed(ids_PL), ctx, past)
        return self._norm(x_PLD, ctx.image_BL).reshape(P, W, R, -1), new

    def _is_image(self, ids: jax.Array) -> jax.Array:
        return ids >= self.cfg.vocab_size

    def _before_next(self, ids_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
        code_BL = self._is_image(ids_BL) & (ids_BL < self.cfg.vocab_size + self.cfg.image_vocab_size)
        before_BL = jnp.where(code_BL[:, 1:], positions_BL[:, 1:] - 1, positions_BL[:, :-1])
        return jnp.concatenate([before_BL, positions_BL[:, -1:]], axis=1)

    def _embed(self, ids_BL: jax.Array) -> jax.Array:
        text_BLD = self.lm_embed(jnp.minimum(ids_BL, self.cfg.vocab_size - 1))
        image_BLD = self.mm_embed(jnp.maximum(ids_BL - self.cfg.vocab_size, 0))
        x_BLD = jnp.where(self._is_image(ids_BL)[..., None], image_BLD, text_BLD)
        return constrain(x_BLD, "batch", "length", "residual", name="residual")

    def _norm(self, x_BLD: jax.Array, image_BL: jax.Array) -> jax.Array:
        return jnp.where(image_BL[..., None], self.mm_norm(x_BLD), self.lm_norm(x_BLD))

    def _run(self, x_BLD: jax.Array, ctx: Context, past: dict[str, Any] | None = None) -> tuple[jax.Array, KV]:
        """All stacks in order, or those in `past`; new keys and values per stack (None where none are asked for)."""
        new: KV = {}
        # The kernel is for one token per rollout.
        kernels = past is not None and x_BLD.shape[1] == ctx.column_BR.shape[1] and on_kernels(self.cfg.attention)
        for name in self.cfg.layers if past is None else past:
            stack_past = past and past[name]
            if kernels:  # the compiler would copy a layer's slice of the cache for a kernel: pass the whole and the layer's index
                ctx, stack_past = ctx.replace(stacked=past[name]), jnp.arange(self.cfg.layers[name])
            x_BLD, new[name] = getattr(self, name)(x_BLD, stack_past, ctx)
        return x_BLD, new


def _residual_init(c: ARConfig):
    # Variance 1 / (2 x layers x fan-in), so that the scale of the residual stream does not grow with the depth at the start of training.
    return nn.initializers.variance_scaling(0.5 / c.n_layers, "fan_in", "truncated_normal")


def _stack(c: ARConfig, n: int, vision: bool) -> nn.Module:
    """n scanned layers: (x, past [n, ...] or None, Context) -> (x, new [n, ...] or None)."""
    return stacked(DecoderLayer, n, c.remat, (0, nn.broadcast), c.unroll)(c, vision)
