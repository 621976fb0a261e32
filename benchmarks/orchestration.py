"""Seconds of a run under Airflow beside a plain `dvc repro` of the same work.

Method: two fresh clones of the committed code, each with a cache of its own, one after the other.

    plain         `dvc repro`
    orchestrated  `forecart up`, then `forecart_train` triggered through the REST API with the form
                  as it is: from the run's queueing to the end of the task `commit`, after which a
                  plain run has nothing to compare with; the whole run is told beside it

The platform's start is not counted: it runs all day. Of every task the seconds between the end of
what it waited for and its own start are told, and the seconds that it ran.

    python benchmarks/orchestration.py [--users 9000]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BINARIES = Path(sys.executable).parent
DAG = "forecart_train"
POLL_SECONDS = 2


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=9_000)
    users = parser.parse_args().users
    with tempfile.TemporaryDirectory(prefix="forecart-bench-") as folder:
        plain = measure_plain(clone(Path(folder) / "plain"), users)
        orchestrated = measure_orchestrated(clone(Path(folder) / "orchestrated"), users)
    ratio = orchestrated["to_commit"] / plain
    print(json.dumps({"plain": plain, "orchestrated": orchestrated, "ratio": ratio}, indent=2))


def clone(path: Path) -> Path:
    """Clone the project's committed state."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(path)], check=True)
    return path


def measure_plain(project: Path, users: int) -> float:
    """Seconds of `dvc repro`."""
    params = project / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("users: 9000", f"users: {users}", 1))
    started = time.perf_counter()
    run(project, "dvc", "repro")
    return round(time.perf_counter() - started, 1)


def measure_orchestrated(project: Path, users: int) -> dict[str, Any]:
    """Seconds of the same work under Airflow."""
    ports = {f"FORECART_{name}_PORT": str(find_port()) for name in ("AIRFLOW", "MLFLOW", "SERVICE")}
    address = f"http://127.0.0.1:{ports['FORECART_AIRFLOW_PORT']}"
    try:
        run(project, "forecart", "up", **ports)
        passwords = json.loads((project / ".forecart/airflow/passwords.json").read_text())
        ((name, password),) = passwords.items()
        token = call(f"{address}/auth/token", {"username": name, "password": password})
        login = {"Authorization": f"Bearer {token['access_token']}"}
        runs = f"{address}/api/v2/dags/{DAG}/dagRuns"
        # The scheduler reads the DAG a few seconds after the start.
        body = {"logical_date": None, "conf": {"users": users}}
        run_id = call(runs, body, login)["dag_run_id"]
        while (found := call(f"{runs}/{run_id}", None, login))["state"] in ("queued", "running"):
            time.sleep(POLL_SECONDS)
        tasks = call(f"{runs}/{run_id}/taskInstances?limit=100", None, login)["task_instances"]
    finally:
        run(project, "forecart", "down", **ports)
    if found["state"] != "success":
        raise SystemExit(f"the run ended as {found['state']}: {tasks}")
    queued, ended = read_time(found["queued_at"]), read_time(found["end_date"])
    done = sorted((t for t in tasks if t["start_date"]), key=lambda t: str(t["start_date"]))
    before, table = queued, {}
    for task in done:
        start, end = read_time(task["start_date"]), read_time(task["end_date"])
        if task["state"] == "success":
            table[task["task_id"]] = {
                "waited": round(start - before, 1),
                "ran": round(end - start, 1),
            }
        before = end
    commit = next(t for t in done if t["task_id"] == "commit")
    return {
        "to_commit": round(read_time(commit["end_date"]) - queued, 1),
        "whole": round(ended - queued, 1),
        "tasks": table,
    }


def run(project: Path, *command: str, **variables: str) -> None:
    """Run a command of the environment to its end."""
    path = f"{BINARIES}{os.pathsep}{os.environ['PATH']}"
    extra = {"PATH": path, "PYTHONPATH": str(project)} | variables
    # One folder's registry must not be another's.
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        command, cwd=project, env=environment | extra, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def find_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def call(url: str, body: dict[str, Any] | None, headers: dict[str, str] | None = None) -> Any:
    """Call Airflow's REST API: POST with a body, GET without one."""
    request = urllib.request.Request(  # noqa: S310 - loopback, our own address
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | (headers or {}),
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.loads(answer.read())


def read_time(text: str) -> float:
    """Return a time of the REST API in seconds."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


if __name__ == "__main__":
    main()
