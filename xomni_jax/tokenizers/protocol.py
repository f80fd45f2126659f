"""What the rest of the package knows of an image tokenizer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the codes of one image lie in a sequence.

    Attributes:
      shape: sizes of the axes of its codes, such as (Y, X). The text before an image's codes names them. By default codes are drawn in
        row-major order.
    """

    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """T: codes of an image."""
        return math.prod(self.shape)

    def unflatten(self, codes: Any) -> Any:
        """Codes in drawing order [..., T] -> [..., *shape]."""
        return codes.reshape(*codes.shape[:-1], *self.shape)


class ImageTokenizer(Protocol):
    """An image tokenizer; its methods are pure functions of the parameters of one component."""

    @property
    def component(self) -> str:
        """Name of the component, in `models.registry` and in model directories."""

    @property
    def config(self) -> Any:
        """Config of the component; it has `codebook_size` and `patch`."""

    @property
    def axes(self) -> str:
        """Names of the axes of an image's codes, such as "Y X"."""

    @property
    def has_decoder(self) -> bool:
        """Whether `pixels` works, so that no diffusion decoder is needed."""

    def layout(self, height: int, width: int, frames: int = 1) -> Layout:
        """The layout of an image, or of a clip. Raises ValueError for sizes that are not whole tokens."""

    def encode(self, params: Any, pixels: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] (clips: [B, frames, H, W, 3]) -> codes [B, *shape] int32."""

    def semantics(self, params: Any, codes: jax.Array) -> jax.Array:
        """Codes [B, *shape] -> what they stand for, [B, *shape, C]: the input of a diffusion decoder."""

    def pixels(self, params: Any, codes: jax.Array) -> jax.Array:
        """Codes [B, *shape] -> pixels as `encode` takes them, float32, not clipped."""
