"""Projects to run for real: copies of this one with a small shop, in folders of their own."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "ingest": {"simulator": {"users": 600, "days": 140}},
    "cuts": {"train": 3},
    "train": {
        **{"epochs": 1, "width": 16, "layers": 1, "heads": 2, "context": 32, "stride": 24},
        "compare": ["mlp"],
        "trees": {"rounds": 20},
    },
    "baselines": {
        "lightgbm": {"rounds": 30},
        "lstm": {"epochs": 1, "width": 16, "context": 32},
    },
    "evaluation": {"bootstrap_samples": 50},
    "gate": {"min_users": 50, "min_positives": 5},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(str(item.fspath)).is_relative_to(ROOT / "tests" / "integration"):
            item.add_marker("integration")


class Project:
    """A copy of the project in a folder of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str, check: bool = True, **options: Any) -> Any:
        """Run a command of the environment in the folder; output is captured as text."""
        result = subprocess.run(
            command,
            cwd=self.path,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=options.pop("timeout", 600),
            check=False,
            **options,
        )
        if check and result.returncode != 0:
            raise AssertionError(f"{command}: {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def environment(self) -> dict[str, str]:
        """This process's environment, with the tests' interpreter first on the path."""
        binaries = str(Path(sys.executable).parent)
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AIRFLOW_"))}
        return keep | {
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "1",
        }

    def change(self, changes: dict[str, Any]) -> None:
        """Merge changes into the folder's params.yaml."""
        file = self.path / "params.yaml"
        params = yaml.safe_load(file.read_text())
        _merge(params, changes)
        file.write_text(yaml.safe_dump(params, sort_keys=False))

    def copy(self, path: Path) -> Project:
        """Copy everything, results and cache included."""
        shutil.copytree(self.path, path, symlinks=True)
        return Project(path)


def _merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def clone_project(path: Path) -> Project:
    """Make a fresh repository from this project's files, as a clone would hold them."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        source = ROOT / name
        if source.is_file() and name != "dvc.lock":
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, path / name)
    project = Project(path)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("git", "add", "--all")
    identity = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
    project.run("git", *identity, "commit", "--quiet", "--message=start")
    project.change(SMALL)
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh copy with a small shop; nothing has run."""
    return clone_project(tmp_path / "project")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy in which the pipeline has run. Tests that change it take a copy."""
    own = tmp_path_factory.mktemp("finished") / "project"
    # Processes that test side by side have folders of their own in a common one: one of them runs
    # the pipeline, the others wait for it.
    base = tmp_path_factory.getbasetemp()
    common = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    common.mkdir(exist_ok=True)
    with (common / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = common / "done"
        if not done.exists():
            shutil.rmtree(common / "project", ignore_errors=True)
            clone_project(common / "project").run("forecart", "run")
            done.touch()
        return Project(common / "project").copy(own)


@pytest.fixture
def take_finished(finished: Project, tmp_path: Path) -> Callable[[], Project]:
    """Make private copies of the finished project."""
    count = iter(range(100))
    return lambda: finished.copy(tmp_path / f"copy{next(count)}")
