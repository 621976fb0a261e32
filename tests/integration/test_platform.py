"""`forecart up` and `forecart down` with the real Airflow and MLflow."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.platform import MARKER, STATE, _find_processes
from tests.integration.conftest import Project

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def marked(project: Project) -> list[psutil.Process]:
    return list(_find_processes(project.path / STATE))


def listening(ports: dict[str, int]) -> list[int]:
    """Those of the ports that somebody still answers on."""
    found = []
    for port in ports.values():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                found.append(port)
    return found


def bound(project: Project) -> list[Any]:
    """Addresses that the project's processes listen on; some processes end while they are asked."""
    found = []
    for process in marked(project):
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
            found += [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    return found


def everybody() -> Iterator[str]:
    """Command lines of all processes."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield " ".join(process.cmdline())


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    chosen = {name: free_port() for name in ("airflow", "mlflow", "service")}
    for name, port in chosen.items():
        monkeypatch.setenv(f"FORECART_{name.upper()}_PORT", str(port))
    return chosen


@pytest.fixture
def running(project: Project, ports: dict[str, int]) -> Iterator[str]:
    try:
        yield project.run("forecart", "up").stdout
    finally:
        project.run("forecart", "down")


def call(url: str, body: dict[str, Any] | None = None, token: str | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(
        urllib.request.Request(url, data=data, headers=headers), timeout=30
    ) as answer:
        return json.loads(answer.read())


def tell_of_events(airflow: str, token: str) -> str:
    """Run what the README says to whoever loads events; return which asset Airflow was told of."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (commands,) = [block for block in blocks if "/assets/events" in block]
    # The scheduler reads the DAGs a few seconds after the start.
    deadline = time.monotonic() + 120
    while call(f"{airflow}/api/v2/assets", token=token)["total_entries"] < 2:
        assert time.monotonic() < deadline
        time.sleep(1)
    variables = os.environ | {"AIRFLOW": airflow, "TOKEN": token}
    subprocess.run(["sh", "-euc", commands], env=variables, check=True, capture_output=True)
    (event,) = call(f"{airflow}/api/v2/assets/events", token=token)["asset_events"]
    return str(event["uri"])


def test_up_shows_the_dag_and_down_leaves_nothing(
    project: Project, ports: dict[str, int], running: str
) -> None:
    airflow = f"http://127.0.0.1:{ports['airflow']}"
    assert airflow in running
    assert f"http://127.0.0.1:{ports['mlflow']}" in running
    assert "not started: no champion yet" in running
    user, _, password = running.split("login")[1].split("(", maxsplit=1)[0].partition("/")
    token = call(f"{airflow}/auth/token", {"username": user.strip(), "password": password.strip()})[
        "access_token"
    ]
    assert call(f"{airflow}/api/v2/pools/gpu", token=token)["slots"] == 1
    assert tell_of_events(airflow, token).startswith("forecart://events")
    addresses = bound(project)
    assert {ports["airflow"], ports["mlflow"]} <= {address.port for address in addresses}
    assert {address.ip for address in addresses} <= {"127.0.0.1", "::1"}
    again = project.run("forecart", "up", check=False)
    assert again.returncode == 2
    assert "running already" in again.stderr
    assert "stopped" in project.run("forecart", "down").stdout
    assert marked(project) == []
    assert listening(ports) == []
    assert not any(str(project.path) in line for line in everybody())
    assert "nothing was running" in project.run("forecart", "down").stdout


def test_a_port_in_use_is_told_and_nothing_is_started(
    project: Project, ports: dict[str, int]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports["mlflow"]))
        taken.listen()
        result = project.run("forecart", "up", check=False)
    assert result.returncode == 2
    assert f"port {ports['mlflow']} for mlflow is in use" in result.stderr
    assert "FORECART_MLFLOW_PORT" in result.stderr
    assert marked(project) == []


def test_down_ends_what_a_killed_supervisor_left(project: Project) -> None:
    marker = os.environ | {MARKER: str(project.path / STATE)}
    orphan = subprocess.Popen(["sleep", "300"], env=marker, start_new_session=True)
    try:
        assert "stopped 1 processes" in project.run("forecart", "down").stdout
        assert orphan.wait(timeout=10) != 0
    finally:
        orphan.kill()


def test_a_port_that_is_none_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORECART_AIRFLOW_PORT", "many")
    result = project.run("forecart", "up", check=False)
    assert result.returncode == 2
    assert "FORECART_AIRFLOW_PORT" in result.stderr
    assert not (Path(project.path) / STATE / "logs").exists()
