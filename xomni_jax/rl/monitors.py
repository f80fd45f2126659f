"""Metrics that show when a policy exploits its rewards: a line when one leaves its range, and when it comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xomni_jax.core.config import Finite

Watch = tuple[tuple[str, Finite, Finite], ...]
USUAL: Watch = (
    ("image/edge_density", 1.0, 255.0),  # backgrounds are erased
    ("image/colour_entropy", 0.5, 6.0),  # all images get the same colours
    ("text/repeated_frac", 0.0, 0.2),  # writing the text again and again pleases some readers
    ("reward/total/std", 1e-3, 1e9),  # the images of a group are alike, and nothing can be learned from them
)


def crossings(watch: Watch, metrics: Mapping[str, Any], outside: set[str]) -> Sequence[str]:
    """Lines about watched metrics that have left their range or come back; `outside` has the names of those that are out, and is kept."""
    lines = []
    for name, low, high in watch:
        if name not in metrics:
            continue
        value = float(metrics[name])
        out = not low <= value <= high
        if out != (name in outside):
            lines.append(f"warning: {name} is {value:.3g}, " + (f"outside of {low:g} to {high:g}" if out else "in its range again"))
            outside ^= {name}
    return lines
