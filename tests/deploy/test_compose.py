"""The compose file holds together: names exist, nothing is open to the network, no secret is in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy/compose"
TEXT = (FOLDER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_what_a_service_waits_for_exists_and_can_come_about() -> None:
    for service in SERVICES.values():
        for name, wait in service.get("depends_on", {}).items():
            other = SERVICES[name]
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in other
            else:
                assert wait["condition"] == "service_completed_successfully"
                assert other["restart"] == "on-failure"


def test_volumes_and_secrets_are_declared() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (FOLDER / source).is_file()
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


def test_ports_are_bound_to_loopback() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_secret_comes_from_the_environment() -> None:
    wanted = set(re.findall(r"\$\{(\w+)", TEXT))
    offered = dict(
        line.split("=", 1)
        for line in (FOLDER / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert set(offered) == wanted
    assert not any(offered.values())
    assert all(f"${{{name}:?" in TEXT for name in wanted)


def test_images_are_named_by_version() -> None:
    for service in SERVICES.values():
        assert not service["image"].endswith(":latest")
        assert ":" in service["image"]
