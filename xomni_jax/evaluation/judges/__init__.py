"""Judges: what reads or looks at images so that a suite's rules can score them."""

from xomni_jax.evaluation.judges.opening import open_judge

__all__ = ["open_judge"]
