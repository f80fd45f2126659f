"""Remote rewards: what a scorer is, the services that host scorers, and the trainer's client. README.md beside this file explains them."""

from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.scorer import Scorer

__all__ = ["Item", "Score", "Scorer"]
