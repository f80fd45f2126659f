"""The rewards of a configuration: services, their weights, and connections to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xomni_jax.core.config import ConfigError, build
from xomni_jax.rewards.client import RewardClient


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One reward: its service's addresses, and its weight in the sum; None does not ask it."""

    urls: tuple[str, ...]
    weight: float | None = None


def open_clients(section: Mapping[str, Any], poll: Callable[[], None]) -> tuple[dict[str, RewardClient], dict[str, float]]:
    """Clients and weights of the configured rewards; every service must answer before a step is taken."""
    rewards = {name: build(RewardConfig, reward, f"config.rewards.{name}") for name, reward in section.items()}
    weights = {name: float(reward.weight) for name, reward in rewards.items() if reward.weight is not None}
    if not any(weights.values()) or not np.isfinite(list(weights.values())).all():
        raise ConfigError(f"config.rewards: the weights {weights or 'are all None'}; give at least one reward a weight other than 0")
    clients = {name: RewardClient(name, rewards[name].urls, poll=poll) for name in weights}
    try:
        for client in clients.values():
            client.health()
    except ValueError:
        close_all(clients)
        raise
    return clients, weights


def close_all(clients: Mapping[str, RewardClient]) -> None:
    """Ends every connection and what is under way."""
    for client in clients.values():
        client.close()
