"""The rewards of a configuration: clients of their services, and their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from xomni_jax.core.config import ConfigError, Finite
from xomni_jax.rewards.client import RewardClient


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One reward of config.rewards, under the name of its scorer.

    Attributes:
      urls: addresses of its service; several are replicas of one scorer.
      weight: of its value in the sum; 0 only reports it, None does not ask the service at all.
    """

    urls: tuple[str, ...] = ()
    weight: Finite | None = None


def open_clients(rewards: Mapping[str, RewardConfig], poll: Callable[[], None]) -> tuple[dict[str, RewardClient], dict[str, float]]:
    """Clients and weights of the configured rewards. Every service must answer; the names may be those of a user's own scorers.

    Raises:
      ConfigError: no weight counts, or a reward has no address.
      RewardServiceError: a service does not answer, or another scorer does.
    """
    weights = {name: float(reward.weight) for name, reward in rewards.items() if reward.weight is not None}
    if not any(weights.values()):
        raise ConfigError(f"config.rewards: the weights {weights or 'are all None'}; give at least one reward a weight other than 0")
    for name in weights:
        if not rewards[name].urls:
            raise ConfigError(f"config.rewards.{name}.urls is empty; give the address of a service, such as ('http://127.0.0.1:8001',)")
    clients = {name: RewardClient(name, rewards[name].urls, poll=poll) for name in weights}
    try:
        for client in clients.values():
            client.health()
    except ValueError:
        close_all(clients)
        raise
    return clients, weights


def close_all(clients: Mapping[str, RewardClient]) -> None:
    """Closes every client."""
    for client in clients.values():
        client.close()
