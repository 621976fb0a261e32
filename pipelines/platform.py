"""Starts and stops what a team uses daily: Airflow, the MLflow pages and the service.

Every process is started with a marker in its environment, which its descendants inherit, and
`stop` ends exactly the processes that carry it. That also finds the executor's children that
`airflow standalone` leaves behind when it is interrupted.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.errors import UserError
from pipelines.graph import load_graph
from pipelines.io import write_json

HOST = "127.0.0.1"
STATE = Path(".forecart")
MARKER = "FORECART_PLATFORM"
PORTS = {"airflow": 8080, "mlflow": 5000, "service": 3000}


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process of the platform.

    Attributes:
        name: key of PORTS.
        command: argument list.
        port: loopback port it binds.
        health: path that answers 200 when it is ready.
        environment: variables on top of this process's.
    """

    name: str
    command: list[str]
    port: int
    health: str
    environment: dict[str, str]

    @property
    def address(self) -> str:
        """Where a person opens it."""
        return f"http://{HOST}:{self.port}"


def start(root: Path, *, wait_seconds: float = 180) -> str:
    """Start the platform and wait until every part is healthy.

    Args:
        root: the project's folder.
        wait_seconds: per part; then everything is stopped again.

    Returns:
        Addresses and login, for people.

    Raises:
        UserError: it runs already, a port is in use, or a part does not become healthy.
    """
    root = root.resolve()
    state = root / STATE
    if next(_find_processes(state), None) is not None:
        raise UserError("the platform is running already; stop it with: make down")
    programs = _plan_programs(root)
    for program in programs:
        _check_port(program)
    (state / "logs").mkdir(parents=True, exist_ok=True)
    try:
        running = [(program, _launch(program, state)) for program in programs]
        for program, process in running:
            _await_health(program, process, state, wait_seconds)
    except BaseException:
        stop(root)
        raise
    user, password = _read_login(state)
    _create_pools(root, programs[0].address, user, password)
    write_json(state / "platform.json", {p.name: p.address for p in programs})
    lines = [f"{p.name:<8} {p.address}" for p in programs]
    lines.append(f"login    {user} / {password} (Airflow)")
    if all(p.name != "service" for p in programs):
        lines.append("service  not started: no champion yet; run: .venv/bin/forecart promote")
    lines.append(f"logs     {state / 'logs'}")
    lines.append("stop     make down")
    return "\n".join(lines)


def stop(root: Path, *, grace_seconds: float = 15) -> str:
    """End every process that `start` started and their descendants.

    Args:
        root: the project's folder.
        grace_seconds: between asking a process to end and killing it.
    """
    state = root.resolve() / STATE
    count = 0
    # A dying supervisor may start one last child, so look again until nothing is found.
    while processes := list(_find_processes(state)):
        count += len(processes)
        for process in processes:
            _ignore_gone(process.terminate)
        _, alive = psutil.wait_procs(processes, timeout=grace_seconds)
        for process in alive:
            _ignore_gone(process.kill)
        psutil.wait_procs(alive, timeout=grace_seconds)
    (state / "platform.json").unlink(missing_ok=True)
    return f"stopped {count} processes" if count else "nothing was running"


def _plan_programs(root: Path) -> list[Program]:
    from pipelines.registry.champion import fetch_champion

    state = root / STATE
    binaries = Path(sys.executable).parent
    ports = {name: _read_port(name, default) for name, default in PORTS.items()}
    path = {"PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
    store = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    programs = [
        Program(
            name="airflow",
            command=[sys.executable, "-m", "airflow", "standalone"],
            port=ports["airflow"],
            health="/api/v2/monitor/health",
            environment=path | _airflow_environment(root, ports["airflow"]),
        ),
        Program(
            name="mlflow",
            command=[
                *[sys.executable, "-m", "mlflow", "server", "--workers", "1"],
                *["--host", HOST, "--port", str(ports["mlflow"])],
                *["--backend-store-uri", store],
                *["--artifacts-destination", str(root / "mlartifacts")],
            ],
            port=ports["mlflow"],
            health="/health",
            environment=path,
        ),
    ]
    if fetch_champion(root) is not None:
        programs.append(
            Program(
                name="service",
                command=[
                    *[sys.executable, "-m", "pipelines.cli", "serve"],
                    *["--host", HOST, "--port", str(ports["service"])],
                ],
                port=ports["service"],
                health="/readyz",
                environment=path,
            )
        )
    (state / "airflow").mkdir(parents=True, exist_ok=True)
    return programs


def _airflow_environment(root: Path, port: int) -> dict[str, str]:
    home = root / STATE / "airflow"
    return {
        "AIRFLOW_HOME": str(home),
        "FORECART_HOME": str(root),
        "PYTHONPATH": str(root),
        "AIRFLOW__CORE__DAGS_FOLDER": str(root / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://{HOST}:{port}/execution/",
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://{HOST}:{port}",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


def _read_port(name: str, default: int) -> int:
    variable = f"FORECART_{name.upper()}_PORT"
    text = os.environ.get(variable, str(default))
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise UserError(f"{variable}={text!r}: not a port number")
    return int(text)


def _check_port(program: Program) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, program.port))
        except OSError:
            variable = f"FORECART_{program.name.upper()}_PORT"
            raise UserError(
                f"port {program.port} for {program.name} is in use; free it or set {variable}"
            ) from None


def _launch(program: Program, state: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | program.environment | {MARKER: str(state)}
    with (state / "logs" / f"{program.name}.log").open("wb") as log:
        return subprocess.Popen(
            program.command,
            cwd=state.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _await_health(
    program: Program, process: subprocess.Popen[bytes], state: Path, seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while not _is_healthy(program):
        log = state / "logs" / f"{program.name}.log"
        if process.poll() is not None:
            raise UserError(f"{program.name} ended with code {process.returncode}; see {log}")
        if time.monotonic() > deadline:
            raise UserError(f"{program.name} was not healthy after {seconds:.0f} s; see {log}")
        time.sleep(0.5)


def _is_healthy(program: Program) -> bool:
    try:
        with urllib.request.urlopen(program.address + program.health, timeout=5) as answer:  # noqa: S310 - loopback, our own address
            body = answer.read()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    if program.name != "airflow":
        return True
    parts = json.loads(body)
    return all(parts[part]["status"] == "healthy" for part in ("metadatabase", "scheduler"))


def _read_login(state: Path) -> tuple[str, str]:
    file = state / "airflow" / "simple_auth_manager_passwords.json.generated"
    logins: dict[str, str] = json.loads(file.read_text())
    return next(iter(logins.items()))


def _create_pools(root: Path, airflow: str, user: str, password: str) -> None:
    """Create the pools that stages name; a task whose pool is missing would wait for ever."""
    wanted = {s.hints.pool for s in load_graph(root / "dvc.yaml").stages.values()} - {None}
    login = {"username": user, "password": password}
    token = _post(f"{airflow}/auth/token", login, {})["access_token"]
    for pool in sorted(filter(None, wanted)):
        body = {"name": pool, "slots": 1, "description": "created by forecart up"}
        try:
            _post(f"{airflow}/api/v2/pools", body, {"Authorization": f"Bearer {token}"})
        except urllib.error.HTTPError as error:
            if error.code != 409:  # it exists
                raise


def _post(url: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
    request = urllib.request.Request(  # noqa: S310 - loopback, our own address
        url,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | headers,
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.loads(answer.read())


def _find_processes(state: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == str(state) and process.pid != os.getpid():
                yield process
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue


def _ignore_gone(act: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        act()
