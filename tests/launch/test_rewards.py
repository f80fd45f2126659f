"""launch/rewards: every service of the compose file is a scorer, is confined, and is reached by its own port of this machine alone."""

import dataclasses
from pathlib import Path

import yaml

from xomni_jax.rewards.scorer import scorer_class

COMPOSE = Path(__file__).parents[2] / "launch" / "rewards" / "compose.yaml"


def test_services_are_confined():
    services, ports = yaml.safe_load(COMPOSE.read_text())["services"], []
    for name, service in services.items():
        assert service["command"][:3] == ["xomni", "serve-reward", name]
        assert service["user"] == "10001:10001" and service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"]
        assert "XOMNI_REWARD_TOKEN" in service["environment"] and "/ready" in service["healthcheck"]["test"][-1]
        (port,) = service["ports"]
        assert port.startswith("127.0.0.1:") and port.endswith(":8000")
        ports.append(port)
        options = {field.name for field in dataclasses.fields(scorer_class(name).Options)}
        assert all(f"--{needed.replace('_', '-')}" in service["command"] for needed in options & {"model", "official_code"})
        if "--model" in service["command"]:
            assert service["profiles"] == ["gpu"] and service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 1
    assert len(set(ports)) == len(ports)
