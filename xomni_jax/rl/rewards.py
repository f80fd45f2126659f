"""The rewards of a configuration: clients of their services, and how their values count."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xomni_jax.core.config import ConfigError, Finite
from xomni_jax.core.preemption import Outage
from xomni_jax.core.tables import aligned
from xomni_jax.rewards.client import ClientConfig, NoAnswer, RewardClient
from xomni_jax.rewards.protocol import Health, Score


@dataclasses.dataclass(frozen=True)
class RewardConfig(ClientConfig):
    """One reward of config.rewards, under the name of its scorer.

    Attributes:
      weight: of its value in the sum; 0 only reports it, None does not ask the service at all.
      scale: factor of its value before weights, for rewards of different ranges; not where each is normalised before the sum
      minimum_with: name of another reward, which then counts as the smaller of the two values, such as that of a second reader of text;
        this one has weight 0
    """

    weight: Finite | None = None
    scale: Finite = 1.0
    minimum_with: str = ""


@dataclasses.dataclass(frozen=True)
class Rewards:
    """The rewards of a run.

    Attributes:
      configs, clients: of the rewards that are asked, by name.
      say: prints a line once per run.
      reasons: how often images could not be scored for each reason so far.
      about: what the service of each reward says of itself.
    """

    configs: Mapping[str, RewardConfig]
    clients: Mapping[str, RewardClient]
    say: Callable[[str], None] = print
    reasons: Counter = dataclasses.field(default_factory=Counter)
    about: dict[str, Health] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(
        cls,
        rewards: Mapping[str, RewardConfig],
        poll: Callable[[], None],
        run_dir: Path | None = None,
        say: Callable[[str], None] = print,
        others: bool = False,
    ) -> Rewards:
        """Clients of the configured rewards, whose names may be those of a user's own scorers. One replica of each must answer.

        A run that has started before waits for them, and wants the same versions as then. `others`: see `check_rewards`.

        Raises:
          ConfigError: no weight counts, a reward has no address, or the combination does not fit.
          RewardServiceError: a service does not answer, or another scorer or version does.
          Outage: a service does not answer to a run that goes on.
        """
        asked = check_rewards(rewards, others)
        file = run_dir and run_dir / "rewards.json"
        before = json.loads(file.read_text()) if file and file.is_file() else {}
        made = cls(asked, {}, say)
        try:
            for name, config in asked.items():
                options = {f.name: getattr(config, f.name) for f in dataclasses.fields(ClientConfig)}
                answers = run_dir and run_dir / "answers" / f"{name}-{jax.process_index()}.sqlite"
                made.clients[name] = client = RewardClient(name, poll=poll, say=say, answers=answers, **options)
                if name in before:
                    client.replicas.identity = before[name]["version"], before[name]["model_hash"]
                try:
                    made.about[name] = client.connect(config.max_wait if before else 0.0)
                except NoAnswer as error:
                    raise (Outage(str(error)) if before else error) from None
        except BaseException:
            made.close()
            raise
        say(made.table())
        return made

    @property
    def weights(self) -> dict[str, float]:
        """{name: weight}."""
        return {name: float(config.weight) for name, config in self.configs.items()}

    @property
    def minimum(self) -> dict[str, tuple[str, ...]]:
        """{name: other rewards, beside which it counts as the smallest value}."""
        pairs = [(config.minimum_with, name) for name, config in self.configs.items() if config.minimum_with]
        return {first: tuple(other for one, other in pairs if one == first) for first, _ in pairs}

    def check_together(self, rows: Sequence[int], chunk: int, chunks: int, group: int) -> None:
        """ConfigError if a scorer that compares images would get only some of them.

        Args:
          rows: of the `chunk` rollouts of a chunk, those whose scores this process asks for; a batch has `chunks` of them.
          group: rollouts of a prompt, which lie side by side.
        """
        whole = all(len(list(own)) == group for _, own in itertools.groupby(row // group for row in rows))
        for name, about in self.about.items():
            if about.scope == "set" and (chunks > 1 or len(rows) < chunk):
                raise ConfigError(
                    f"config.rewards.{name} compares all images of a step, but {chunks} chunks of a step are asked about apart and this "
                    f"process asks about {len(rows)} of {chunk} images of each; set config.rollout.chunks=1 and train on one host"
                )
            if about.scope == "group" and not whole:
                raise ConfigError(
                    f"config.rewards.{name} compares the {group} rollouts of a prompt, but this host has only some of those of a prompt; "
                    "give each host whole prompts: raise config.batch_size or lower config.rollout.chunks"
                )

    def asked(self, weights: Mapping[str, float]) -> set[str]:
        """The rewards that are asked about a prompt with these weights."""
        return set(weights) | {other for name in weights for other in self.minimum.get(name, ())}

    def weights_of(self, weights_P: Sequence[Mapping[str, float]], mode: str) -> dict[str, np.ndarray]:
        """{name: factors [P, 1] of its values} for prompts with these weights."""
        scale = {name: config.scale if mode == "sum_then_normalize" else 1.0 for name, config in self.configs.items()}
        return {name: np.array([[own.get(name, 0.0) * scale[name]] for own in weights_P]) for name in self.configs}

    def failures(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, float]:
        """Counts of failures by kind as metrics; says each reason once, and again when it has become ten times as frequent."""
        counts, examples, before = Counter(), {}, Counter(self.reasons)
        for name, of_name in scores.items():
            for score in of_name:
                if score.failed:
                    counts[f"reward/{name}/failed_{score.kind or 'scorer'}"] += 1
                    reason = name, re.sub(r"[0-9a-f]{8,}|\d+", "#", score.error)
                    self.reasons[reason] += 1
                    examples[reason] = score.error
        for reason, error in examples.items():
            if not before[reason] or len(str(self.reasons[reason])) > len(str(before[reason])):
                self.say(f"reward {reason[0]}: {self.reasons[reason]} images could not be scored so far: {error}")
        return dict(counts)

    def table(self) -> str:
        """What counts how much, and which scorers answer."""
        rows = [("reward", "weight", "scale", "version", "model", "addresses", "its values")]
        for name, config in self.configs.items():
            version, model_hash = self.clients[name].replicas.identity
            weight = f"{config.weight:g}" + f" (minimum of {config.minimum_with})" * bool(config.minimum_with)
            rows.append((name, weight, f"{config.scale:g}", version, model_hash[:12], str(len(config.urls)), self.about[name].scale))
        return aligned(rows)

    def commit(self) -> None:
        """A step is done: what scorers of whole sets remember now, they are told in the next one."""
        for client in self.clients.values():
            client.state = client.state_after

    def memory(self) -> dict[str, str]:
        """What they remember after the last step, as JSON-able text."""
        return {name: base64.b64encode(client.state).decode() for name, client in self.clients.items() if client.state}

    def remember(self, memory: Mapping[str, str]) -> None:
        """Goes on from a `memory`."""
        for name, client in self.clients.items():
            client.state = client.state_after = base64.b64decode(memory.get(name, ""))

    def record(self) -> dict[str, Any]:
        """What the values of the run depend on, for RUN/rewards.json."""
        identities = {name: client.replicas.identity for name, client in self.clients.items()}
        return {name: {"version": version, "model_hash": model_hash} for name, (version, model_hash) in identities.items()}

    def close(self) -> None:
        """Closes every client."""
        for client in self.clients.values():
            client.close()


def check_rewards(rewards: Mapping[str, RewardConfig], others: bool = False) -> dict[str, RewardConfig]:
    """The rewards that are asked. `others`: there are rewards beside these, so that none of them must count.

    Raises:
      ConfigError: see `Rewards.open`.
    """
    asked = {name: reward for name, reward in rewards.items() if reward.weight is not None}
    weights = {name: float(reward.weight) for name, reward in asked.items()}
    if not others and not any(weights.values()):
        raise ConfigError(f"config.rewards: the weights {weights or 'are all None'}; give at least one reward a weight other than 0")
    for name, reward in asked.items():
        if not reward.urls:
            raise ConfigError(f"config.rewards.{name}.urls is empty; give the address of a service, such as ('http://127.0.0.1:8001',)")
        if reward.minimum_with and (reward.weight or not weights.get(reward.minimum_with)):
            raise ConfigError(
                f"config.rewards.{name}.minimum_with={reward.minimum_with!r}: name a reward with a weight, and give {name} the weight 0"
            )
    return asked
