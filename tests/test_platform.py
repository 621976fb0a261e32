from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.errors import UserError
from pipelines.graph import load_graph
from pipelines.platform import (
    PORTS,
    STATE,
    USER,
    _airflow_environment,
    _find_processes,
    _make_login,
    _plan_programs,
    _read_port,
    _record_session,
    _send,
    start,
    stop,
)

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[1]

# In the project's folder it takes the place of Airflow, whose start takes a minute.
AIRFLOW = """
import http.server, json, os, pathlib, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        parts = ("metadatabase", "scheduler", "dag_processor", "triggerer")
        self.answer(200, {part: {"status": "healthy"} for part in parts})

    def do_POST(self):
        self.answer(500 if pathlib.Path("broken").exists() else 201, {"access_token": "x"})

    def answer(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

if sys.argv[1] == "db":
    pathlib.Path("migrating").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.02)
elif sys.argv[1] == "api-server":
    port = int(os.environ["AIRFLOW__API__PORT"])
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
else:
    time.sleep(300)
"""


@pytest.mark.parametrize("text", ["many", "²", "", "0", "65536", "-1", "9" * 5000])
def test_a_port_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FORECART_AIRFLOW_PORT", text)
    with pytest.raises(UserError, match=r"FORECART_AIRFLOW_PORT=.*: not a port number"):
        _read_port("airflow", 8080)


def test_a_port_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _read_port("airflow", 8080) == 8080
    monkeypatch.setenv("FORECART_AIRFLOW_PORT", "65535")
    assert _read_port("airflow", 8080) == 65535


def test_the_login_is_drawn_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    login = _make_login(tmp_path)
    assert _make_login(tmp_path) == login
    assert list(login) == [USER]
    (file,) = (tmp_path / "airflow").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    # As a full disk leaves it.
    file.write_text("")
    assert len(_make_login(tmp_path)[USER]) == len(login[USER])
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("{")
    with pytest.raises(UserError, match=f"{file}, line 1: not valid JSON"):
        _make_login(tmp_path)


def test_a_stop_and_a_start_do_not_end_a_long_stage() -> None:
    """Tasks that were interrupted come to life before the API server listens."""
    # Airflow's own number, 5, is done with after some 8 seconds.
    assert int(_airflow_environment(ROOT, PORTS)["AIRFLOW__WORKERS__EXECUTION_API_RETRIES"]) > 10
    stages = load_graph(ROOT / "dvc.yaml").stages.values()
    long = [stage.hints for stage in stages if (stage.hints.timeout_minutes or 0) > 600]
    assert len(long) == 2
    assert all(hints.retries == 3 for hints in long)


@pytest.mark.parametrize(
    ("store", "named", "pages"),
    [
        ("http://mlflow:5000", "", "http://mlflow:5000"),
        ("https://me:secret@mlflow/", "", "https://mlflow/"),
        ("http://mlflow:5000", "https://pages.shop/mlflow", "https://pages.shop/mlflow"),
        ("sqlite:///elsewhere.db", "https://pages.shop", "http://127.0.0.1:5000"),
        ("", "", "http://127.0.0.1:5000"),
    ],
)
def test_a_server_of_mlflow_takes_the_place_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, named: str, pages: str
) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: x}}")
    monkeypatch.delenv("FORECART_MLFLOW_PORT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("FORECART_MLFLOW", named)
    programs = {program.name: program for program in _plan_programs(tmp_path)}
    assert ("mlflow" in programs) != store.startswith("http")
    if "mlflow" in programs:
        place = store.removeprefix("sqlite:///") or "mlflow.db"
        address = f"sqlite:///{tmp_path / place}"
        # Not in the command, which everybody on the machine can read.
        assert programs["mlflow"].environment["MLFLOW_BACKEND_STORE_URI"] == address
        assert address not in programs["mlflow"].command
    assert programs["airflow"].environment["FORECART_MLFLOW"] == pages


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A recorded session of two processes, of which neither carries the marker."""
    (tmp_path / STATE).mkdir()
    command = ["sh", "-c", "sleep 300 & echo $!; wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    _record_session(tmp_path / STATE, process)
    yield process
    with suppress(psutil.NoSuchProcess):
        child.kill()
    process.communicate()


def count_found(project: Path) -> int:
    return len(list(_find_processes(project / STATE)))


def change_record(project: Path, part: str, values: dict[str, Any]) -> None:
    file = project / STATE / "sessions.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {part: content[part] | values}))


def test_a_session_is_found_while_one_of_its_processes_lives(
    tmp_path: Path, program: subprocess.Popen[bytes]
) -> None:
    assert count_found(tmp_path) == 2
    program.kill()
    program.wait()
    assert count_found(tmp_path) == 1


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere the clock tells when a process began")
@pytest.mark.parametrize("step", [-30, -90, 30, 90])
def test_a_clock_that_is_set_loses_no_session(
    tmp_path: Path, program: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    booted = psutil.boot_time() + step
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted)
    psutil.process_iter.cache_clear()
    assert count_found(tmp_path) == 2


def test_a_later_session_of_the_same_number_is_somebody_elses(
    tmp_path: Path, program: subprocess.Popen[bytes]
) -> None:
    change_record(tmp_path, "sessions", {str(program.pid): 1})
    assert count_found(tmp_path) == 0


@pytest.mark.parametrize("part", ["first", "boot", "namespace"])
def test_after_a_restart_no_number_is_ours(
    tmp_path: Path, program: subprocess.Popen[bytes], part: str
) -> None:
    """Not even that of a session whose first process has ended, which nothing else would tell."""
    program.kill()
    program.wait()
    change_record(tmp_path, "origin", {part: 1})
    assert count_found(tmp_path) == 0


def test_a_copy_of_the_project_stops_nothing_of_the_original(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, program: subprocess.Popen[bytes]
) -> None:
    copy = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(tmp_path, copy)
    assert stop(copy) == "nothing was running"
    assert count_found(tmp_path) == 2
    assert stop(tmp_path) == "stopped 2 processes"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project whose Airflow is quick, and whose MLflow runs elsewhere."""
    (tmp_path / "airflow.py").write_text(AIRFLOW)
    (tmp_path / "dvc.yaml").write_text(
        "stages: {a: {cmd: x, outs: [a], meta: {airflow: {pool: gpu}}}}"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("FORECART_AIRFLOW_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setattr("pipelines.platform.require", lambda package: None)
    yield tmp_path
    stop(tmp_path)


def test_a_second_start_leaves_the_first_alone(shop: Path) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(start, shop)
        try:
            while not (shop / "migrating").exists():
                assert not first.done()
                time.sleep(0.02)
            with pytest.raises(UserError, match="being started already"):
                start(shop)
        finally:
            (shop / "go").touch()
        assert "make down" in first.result()
    assert count_found(shop) == 4
    with pytest.raises(UserError, match="running already"):
        start(shop)
    assert stop(shop) == "stopped 4 processes"


def test_a_folder_that_is_no_project_is_left_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/dvc\.yaml: no such file$"):
        start(tmp_path)
    assert not list(tmp_path.iterdir())


def test_sessions_of_a_killed_platform_are_not_kept(shop: Path) -> None:
    (shop / "go").touch()
    (shop / STATE).mkdir()
    killed = subprocess.Popen(["true"], start_new_session=True)
    _record_session(shop / STATE, killed)
    killed.wait()
    start(shop)
    sessions = json.loads((shop / STATE / "sessions.json").read_text())["sessions"]
    assert len(sessions) == 4
    assert str(killed.pid) not in sessions


def test_an_airflow_without_its_pools_is_told_in_a_line_and_stopped(shop: Path) -> None:
    (shop / "go").touch()
    (shop / "broken").touch()
    with pytest.raises(UserError, match=r"its pools: HTTP Error 500: [^\n]*airflow\.log$"):
        start(shop)
    assert count_found(shop) == 0
    assert not (shop / STATE / "platform.json").exists()


def test_a_signal_that_is_refused_is_told_in_a_line() -> None:
    def refuse() -> None:
        raise psutil.AccessDenied(os.getpid())

    owner = psutil.Process().username()
    with pytest.raises(UserError, match=f"process {os.getpid()} .* belongs to {owner}; run make"):
        _send(refuse)


# Who is not root has no other user's process at hand.
@pytest.mark.skipif(os.getuid() != 0, reason="wants to be root, to be another user than it was")
def test_a_platform_of_another_user_is_told_in_a_line() -> None:
    # The folders of pytest are for their owner alone.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        project = Path(folder)
        project.chmod(0o755)
        (project / STATE).mkdir()
        process = subprocess.Popen(["sleep", "300"], user="nobody", start_new_session=True)
        _record_session(project / STATE, process)
        os.seteuid(pwd.getpwnam("daemon").pw_uid)
        try:
            with pytest.raises(UserError, match=f"{process.pid} of the platform belongs to nobody"):
                stop(project)
        finally:
            os.seteuid(0)
            running = process.poll() is None
            process.kill()
            process.wait()
        assert running
        assert (project / STATE / "sessions.json").exists()
