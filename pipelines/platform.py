"""Starts and stops what a team uses daily: Airflow, the MLflow pages and the service.

Every program is started in a session of its own and with a marker in its environment. `stop` ends
exactly the processes of these sessions and those that carry the marker, so it also finds the
executor's children, which Airflow leaves behind when its scheduler is killed. One sign alone does
not do: a child may open a session of its own, and a program that renames itself (as Airflow's do)
may overwrite its environment.
"""

from __future__ import annotations

import json
import os
import re
import secrets
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

from pipelines.address import hide_login
from pipelines.errors import UserError, require
from pipelines.graph import load_graph
from pipelines.io import read_json, replace_file, take_lock, write_json

HOST = "127.0.0.1"
STATE = Path(".forecart")
MARKER = "FORECART_PLATFORM"
_PASSWORDS = "passwords.json"
_SESSIONS = "sessions.json"
USER = "admin"
PORTS = {"airflow": 8080, "mlflow": 5000, "service": 3000}


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process of the platform.

    Attributes:
        name: key of PORTS.
        command: argument list.
        port: loopback port it binds; None for a part that only the health of another tells of.
        health: path that answers 200 when it is ready.
        environment: variables on top of this process's.
    """

    name: str
    command: list[str]
    port: int | None
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
        UserError: the folder is no project, it runs already or is being started, Airflow is not
            installed, a port is in use, or a part does not become healthy or does not do what it is
            asked for.
    """
    root = root.resolve()
    # Before anything is written: it may be the wrong folder.
    load_graph(root / "dvc.yaml")
    (root / STATE).mkdir(parents=True, exist_ok=True)
    # Of two starts one would not get its ports, and end the other's programs with its own.
    with (root / STATE / "up.lock").open("wb") as lock:
        if not take_lock(lock.fileno()):
            raise UserError("the platform is being started already; wait until that is done")
        return _start(root, wait_seconds)


def _start(root: Path, wait_seconds: float) -> str:
    state = root / STATE
    if next(_find_processes(state), None) is not None:
        raise UserError("the platform is running already; stop it with: make down")
    # Of an earlier start nothing lives, so that a number of its sessions may become another's.
    (state / _SESSIONS).unlink(missing_ok=True)
    require("airflow")
    programs = _plan_programs(root)
    pages = [p for p in programs if p.port is not None]
    for program in pages:
        _check_port(program)
    (state / "logs").mkdir(parents=True, exist_ok=True)
    login = _make_login(state)
    try:
        _migrate(programs[0], state)
        running = [(program, _launch(program, state)) for program in programs]
        for program, process in running:
            _await_health(program, process, state, wait_seconds)
        _create_pools(root, programs[0].address, login)
        write_json(state / "platform.json", {p.name: p.address for p in pages})
    except BaseException:
        stop(root)
        raise
    lines = [f"{p.name:<8} {p.address}" for p in pages]
    if all(p.name != "mlflow" for p in programs):
        lines.append(f"mlflow   {programs[0].environment['FORECART_MLFLOW']} (not started here)")
    lines.append(f"login    {USER} / {login[USER]} (Airflow)")
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

    Raises:
        UserError: a process is another user's.
    """
    state = root.resolve() / STATE
    count = 0
    # A dying supervisor may start one last child, so look again until nothing is found.
    while processes := list(_find_processes(state)):
        count += len(processes)
        for process in processes:
            _send(process.terminate)
        _, alive = psutil.wait_procs(processes, timeout=grace_seconds)
        for process in alive:
            _send(process.kill)
        psutil.wait_procs(alive, timeout=grace_seconds)
    for file in ("platform.json", _SESSIONS):
        (state / file).unlink(missing_ok=True)
    return f"stopped {count} processes" if count else "nothing was running"


def _plan_programs(root: Path) -> list[Program]:
    from pipelines.registry.champion import fetch_champion
    from pipelines.registry.connection import prepare_registry

    ports = {name: _read_port(name, default) for name, default in PORTS.items()}
    binaries = Path(sys.executable).parent
    path = {"PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
    store = prepare_registry(root)
    pages = _find_pages(store)
    airflow = path | _airflow_environment(root, ports)
    if pages is not None:
        airflow["FORECART_MLFLOW"] = pages
    server = ["api-server", "--host", HOST, "--port", str(ports["airflow"])]
    # `airflow standalone` would open its log servers on every network of the machine; with one
    # machine they are not needed, so the parts are started one by one without them.
    parts = {
        "airflow": server,
        "scheduler": ["scheduler", "--skip-serve-logs"],
        "dag-processor": ["dag-processor"],
        "triggerer": ["triggerer", "--skip-serve-logs"],
    }
    programs = [
        Program(
            name=name,
            command=[sys.executable, "-m", "airflow", *arguments],
            port=ports["airflow"] if name == "airflow" else None,
            health="/api/v2/monitor/health",
            environment=airflow,
        )
        for name, arguments in parts.items()
    ]
    if pages is None:
        programs.append(
            Program(
                name="mlflow",
                command=[
                    *[sys.executable, "-m", "mlflow", "server", "--workers", "1"],
                    *["--host", HOST, "--port", str(ports["mlflow"])],
                    *["--artifacts-destination", str(root / "mlartifacts")],
                ],
                port=ports["mlflow"],
                health="/health",
                # Everybody on the machine can read a command, and the address may hold a password.
                environment=path | {"MLFLOW_BACKEND_STORE_URI": store},
            )
        )
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
    return programs


def _find_pages(store: str) -> str | None:
    """Return where a browser finds the pages of an MLflow server; None where there is none yet.

    The server may have another address in a browser, which FORECART_MLFLOW tells. What is shown
    and linked to holds no password.
    """
    if not store.startswith(("http://", "https://")):
        return None
    return hide_login(os.environ.get("FORECART_MLFLOW") or store)


def _airflow_environment(root: Path, ports: dict[str, int]) -> dict[str, str]:
    home, port = root / STATE / "airflow", ports["airflow"]
    return {
        "AIRFLOW_HOME": str(home),
        "FORECART_HOME": str(root),
        "FORECART_MLFLOW": f"http://{HOST}:{ports['mlflow']}",
        "PYTHONPATH": str(root),
        "AIRFLOW__CORE__DAGS_FOLDER": str(root / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / _PASSWORDS),
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        # The executor starts as many processes, busy or not.
        "AIRFLOW__CORE__PARALLELISM": "4",
        # Between two stages it looks again this often, in seconds.
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.4",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://{HOST}:{port}/execution/",
        # The scheduler hands on what was interrupted before the API server listens. With Airflow's
        # own 5 tries a task gives up after some 8 seconds, and that costs it an attempt.
        "AIRFLOW__WORKERS__EXECUTION_API_RETRIES": "12",
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://{HOST}:{port}",
        "AIRFLOW__API__WORKERS": "1",
        # The parts of one start trust each other, and nobody from another start.
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_urlsafe(32),
        "AIRFLOW__API__SECRET_KEY": secrets.token_urlsafe(32),
        "FORECART_POOLS": ",".join(_list_pools(root)),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


def _read_port(name: str, default: int) -> int:
    variable = f"FORECART_{name.upper()}_PORT"
    text = os.environ.get(variable, str(default))
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
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
        process = subprocess.Popen(
            program.command,
            cwd=state.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _record_session(state, process)
    return process


def _await_health(
    program: Program, process: subprocess.Popen[bytes], state: Path, seconds: float
) -> None:
    if program.port is None:
        return
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
    needed = ("metadatabase", "scheduler", "dag_processor", "triggerer")
    return all(parts[part]["status"] == "healthy" for part in needed)


def _make_login(state: Path) -> dict[str, str]:
    """Return user and password of Airflow's pages, drawn at the first start and kept."""
    file = state / "airflow" / _PASSWORDS
    # An empty one is what a full disk has left.
    if not file.exists() or not file.stat().st_size:
        with replace_file(file) as partial:
            partial.touch(mode=0o600)
            partial.write_text(json.dumps({USER: secrets.token_urlsafe(12)}))
    login: dict[str, str] = read_json(file)
    return login


def _migrate(airflow: Program, state: Path) -> None:
    """Make or upgrade Airflow's database."""
    log = state / "logs" / "migrate.log"
    with log.open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "airflow", "db", "migrate"],
            cwd=state.parent,
            env=os.environ | airflow.environment | {MARKER: str(state)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise UserError(f"Airflow's database could not be made; see {log}")


def _list_pools(root: Path) -> list[str]:
    pools = {stage.hints.pool for stage in load_graph(root / "dvc.yaml").stages.values()}
    return sorted(filter(None, pools))


def _create_pools(root: Path, airflow: str, login: dict[str, str]) -> None:
    """Create the pools that stages name; a task whose pool is missing would wait for ever."""
    account = {"username": USER, "password": login[USER]}
    try:
        token = _post(f"{airflow}/auth/token", account, {})["access_token"]
        for pool in _list_pools(root):
            body = {"name": pool, "slots": 1, "description": "created by forecart up"}
            try:
                _post(f"{airflow}/api/v2/pools", body, {"Authorization": f"Bearer {token}"})
            except urllib.error.HTTPError as error:
                if error.code != 409:  # it exists
                    raise
    except OSError as error:
        log = root / STATE / "logs" / "airflow.log"
        raise UserError(f"Airflow did not create its pools: {error}; see {log}") from None


def _post(url: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
    request = urllib.request.Request(  # noqa: S310 - loopback, our own address
        url,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | headers,
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.loads(answer.read())


def _find_processes(state: Path) -> Iterator[psutil.Process]:
    sessions = _read_sessions(state)
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            number = os.getsid(process.pid)
            # A session whose first process has ended keeps its number: the kernel gives it to no
            # other process before the last one of the session has ended.
            in_session = number in sessions and _read_start(number) in (None, sessions[number])
            if in_session or _is_marked(process, state):
                yield process


def _is_marked(process: psutil.Process, state: Path) -> bool:
    try:
        return process.environ().get(MARKER) == str(state)
    except psutil.Error:
        return False


def _record_session(state: Path, process: subprocess.Popen[bytes]) -> None:
    """Note a program's session with its start, which tells it from a later one of that number."""
    known = _read_sessions(state) | {process.pid: _read_start(process.pid)}
    content = {"origin": _find_origin(state), "sessions": {str(k): v for k, v in known.items()}}
    write_json(state / _SESSIONS, content)


def _read_sessions(state: Path) -> dict[int, float | None]:
    if not (state / _SESSIONS).exists():
        return {}
    content = read_json(state / _SESSIONS)
    if content.get("origin") != _find_origin(state):
        return {}
    return {int(pid): started for pid, started in content["sessions"].items()}


def _find_origin(state: Path) -> dict[str, Any]:
    """Return what tells this platform's numbers of processes from others.

    A copy of the project has a copy of the record, too. And numbers begin anew with the machine and
    with the container: a restarted one has the machine's boot id as before, and often the number of
    its namespace, which the kernel gives anew, but its first process began later.
    """
    origin: dict[str, Any] = {"project": str(state.parent), "first": _read_start(1)}
    # There is neither without /proc.
    with suppress(OSError):
        origin["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        origin["namespace"] = Path("/proc/self/ns/pid").stat().st_ino
    return origin


def _read_start(pid: int) -> float | None:
    """Return when a process began; None where there is none of that number.

    In ticks since the machine's start, which setting the clock does not move; on systems without
    /proc in seconds.
    """
    try:
        if psutil.LINUX:
            # The second field, a name in brackets, may hold spaces and brackets.
            return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
        return psutil.Process(pid).create_time()
    except (OSError, psutil.Error):
        return None


def _send(signal: Callable[[], None]) -> None:
    """Send a signal to a process, which may be gone.

    Raises:
        UserError: it is another user's.
    """
    try:
        signal()
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied as error:
        owner = psutil.Process(error.pid).username()
        what = f"process {error.pid} of the platform belongs to {owner}"
        raise UserError(f"{what}; run make down as that user") from None
