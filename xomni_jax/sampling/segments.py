"""Segments: the tokens that follow a prompt, drawn by the model or given to it. A row is a prompt and its segments in their order."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from xomni_jax.core.config import check_known
from xomni_jax.sampling.logits import SamplingConfig

Prompts = tuple[jax.Array, jax.Array]  # right-padded ids [P or 1, S] and their real tokens [P or 1]


@dataclasses.dataclass(frozen=True)
class SegmentSpec:
    """How a segment is drawn.

    Attributes:
      name: by which rewards name it; unique within a trajectory
      kind: text (by the text head, until a stop id) or image (by the image head, exactly `length` codes)
      length: codes of an image; most tokens of a text
      sampling: temperature, truncation and guidance
      stop_ids: a text ends with the first of these, which belongs to it
    """

    name: str
    kind: str
    length: int
    sampling: SamplingConfig = SamplingConfig(top_k=0, min_p=0.0)
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_known(self, kind=("text", "image"))
        if self.length < 1:
            raise ValueError(f"segment {self.name!r} has length={self.length}; it needs at least one token")
        if self.kind == "image" and self.stop_ids:
            raise ValueError(f"segment {self.name!r} is an image, which has a fixed number of codes; leave out its stop_ids")


def image_spec(n_codes: int, sampling: SamplingConfig) -> SegmentSpec:
    """The one image of an X-Omni rollout."""
    return SegmentSpec("image", "image", n_codes, sampling)


@struct.dataclass
class Segment:
    """Tokens of rows [B] or [P, R] (written ... below), right-padded to L.

    Attributes:
      ids: int32 [..., L]: 0-based codes of an image; ids of the whole vocabulary, image prefixes among them, in a text.
      lengths: real tokens [...]; None where all L are.
      logp: [..., L] float32, that of each drawn token when it was drawn; None where the segment was given.
      kept: uint8 [..., L, ceil(V / 8)], eight ids per byte: the tokens that could be drawn, where sampling truncates.
      kind: text or image.
      spec: how it was drawn; None where it was given.
      order: int32 [..., L], the cell of each code of an image; None row by row.
    """

    ids: jax.Array
    lengths: jax.Array | None = None
    logp: jax.Array | None = None
    kept: jax.Array | None = None
    kind: str = struct.field(pytree_node=False, default="text")
    spec: SegmentSpec | None = struct.field(pytree_node=False, default=None)
    order: jax.Array | None = None

    @property
    def counts(self) -> jax.Array | int:
        """Real tokens of each row [...], or of all rows."""
        return self.ids.shape[-1] if self.lengths is None else self.lengths

    @property
    def mask(self) -> jax.Array:
        """True at real tokens, [..., L]."""
        if self.lengths is None:
            return jnp.ones(self.ids.shape, bool)
        return jnp.arange(self.ids.shape[-1]) < self.lengths[..., None]

    def rows(self) -> Segment:
        """The segment of rows [P, R] as that of rows [P * R]."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self)

    def tokens(self, vocab_size: int) -> jax.Array:
        """Ids of the whole vocabulary [..., L]; text ids are 0..vocab_size-1, image codes follow."""
        return self.ids + vocab_size if self.kind == "image" else self.ids


def append(ids_BS: jax.Array, lengths_B: jax.Array, segment: Segment, vocab_size: int) -> Prompts:
    """Right-padded rows with a segment [B, L] inserted before the padding: (ids [B, S + L], lengths [B])."""
    S, L = ids_BS.shape[1], segment.ids.shape[1]
    column_BM = jnp.broadcast_to(jnp.arange(S + L), (ids_BS.shape[0], S + L)) - lengths_B[:, None]
    spread = segment.replace(ids=jnp.take_along_axis(segment.ids, jnp.clip(column_BM, 0, L - 1), axis=1))
    tokens_BM = spread.tokens(vocab_size)
    end = L if segment.lengths is None else segment.lengths[:, None]
    before_BM = jnp.pad(ids_BS, ((0, 0), (0, L)))
    return jnp.where(column_BM < 0, before_BM, jnp.where(column_BM < end, tokens_BM, 0)), lengths_B + segment.counts


def placed(positions_BL: jax.Array, begins_B: jax.Array, order_BT: jax.Array) -> jax.Array:
    """Positions of rows in which the codes of an image, from entry `begins_B` on, have those of their cells."""
    t_BL = jnp.arange(positions_BL.shape[1]) - begins_B[:, None]
    cell_BL = jnp.take_along_axis(order_BT, jnp.clip(t_BL, 0, order_BT.shape[1] - 1), axis=1)
    return jnp.where((t_BL >= 0) & (t_BL < order_BT.shape[1]), begins_B[:, None] + cell_BL, positions_BL)
