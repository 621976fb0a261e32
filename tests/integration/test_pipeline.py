"""The whole graph under the real DVC: from nothing to a Bento, twice, changed and killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.integration.conftest import Project, clone_project

TakeProject = Callable[[], Project]


def ran(output: str) -> list[str]:
    """Names of the stages that DVC ran, in order."""
    return re.findall(r"Running stage '(\w+)'", output)


def digests(project: Project) -> dict[str, list[str]]:
    """Content hashes of every output that dvc.lock names, by stage."""
    lock = yaml.safe_load((project.path / "dvc.lock").read_text())
    return {
        name: [out["md5"] for out in stage.get("outs", [])]
        for name, stage in lock["stages"].items()
    }


def test_the_first_run_writes_what_people_rely_on(finished: Project) -> None:
    evaluation = json.loads((finished.path / "reports/evaluation.json").read_text())
    assert {"source", "events", "users", "first_ts", "last_ts"} <= evaluation["data"].keys()
    target = evaluation["targets"]["purchase_14d"]
    assert {"gpt", "lightgbm", "logistic", "recency", "majority", "oracle"} <= target[
        "models"
    ].keys()
    assert {"value", "low", "high"} == target["models"]["gpt"]["roc_auc"].keys()
    assert {"diff", "low", "high"} == target["paired"]["gpt-lightgbm"]["roc_auc"].keys()
    spend = evaluation["targets"]["spend_14d"]["models"]["gpt"]
    assert {"mae", "gini", "top_decile_capture", "total_ratio"} <= spend.keys()
    verdict = json.loads((finished.path / "reports/verdict.json").read_text())
    assert {"passed", "checks", "candidate", "champion", "data"} <= verdict.keys()
    assert all({"name", "passed", "value", "limit", "why"} <= c.keys() for c in verdict["checks"])
    assert (finished.path / "reports/index.html").stat().st_size > 10_000
    assert (finished.path / "build/bento/bento.yaml").exists()
    summary = finished.run("forecart", "summary").stdout
    assert "purchase_14d" in summary
    assert "Next:" in summary


def test_an_unchanged_repeat_only_looks_at_the_source(take_finished: TakeProject) -> None:
    project = take_finished()
    started = time.monotonic()
    again = project.run("dvc", "repro")
    assert ran(again.stdout) == ["fingerprint"]
    assert time.monotonic() - started < 30


def test_a_changed_param_reruns_only_what_depends_on_it(take_finished: TakeProject) -> None:
    project = take_finished()
    project.change({"evaluation": {"seed": 2}})
    assert ran(project.run("dvc", "repro").stdout) == ["fingerprint", "evaluate", "gate"]


def test_equal_inputs_give_equal_bytes(finished: Project, tmp_path: Path) -> None:
    other = clone_project(tmp_path / "other")
    other.run("dvc", "repro")
    assert digests(other) == digests(finished)


def test_a_run_killed_in_mid_stage_is_completed_by_the_next(
    finished: Project, tmp_path: Path
) -> None:
    project = clone_project(tmp_path / "killed")
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=project.path,
        env=project.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (project.path / "data/valid").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    project.run("dvc", "repro")
    assert digests(project) == digests(finished)


def test_a_full_disk_is_told_in_one_line_and_mended_by_the_next_run(
    project: Project, finished: Project
) -> None:
    # No file may grow past 4 kB: writes of data fail as on a full disk.
    limited = project.run(
        "sh", "-c", "ulimit -f 8; forecart fingerprint && exec forecart ingest", check=False
    )
    assert limited.returncode == 2
    assert "Traceback" not in limited.stderr
    assert not (project.path / "data/events").exists()
    project.run("dvc", "repro", "ingest")
    assert digests(project)["ingest"] == digests(finished)["ingest"]


def test_dvc_draws_the_stages(finished: Project) -> None:
    graph = finished.run("dvc", "dag", "--mermaid").stdout
    for stage in yaml.safe_load((finished.path / "dvc.yaml").read_text())["stages"]:
        assert stage in graph
