"""X-Omni in JAX: discrete autoregressive image generation, trained with reinforcement learning.

import xomni_jax
model = xomni_jax.load(path)
model.generate('a red sign that says "HELLO"')[0].show()
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def load(path: Any, mesh: Any = None, dtype: Any = None, flux: Any = None):
    """Opens a model directory or a released one as downloaded. The arguments are those of `components.ModelComponents`.

    Importing the package alone touches no device.
    """
    from xomni_jax.pipeline import XOmni

    return XOmni(path, mesh, dtype, flux)
