"""The whole graph under the real DVC: from nothing to a Bento, twice, changed and killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from pipelines.processes import mend_lock
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
    named = "ensemble gpt with_mlp lightgbm lstm logistic recency majority oracle"
    assert set(named.split()) <= target["models"].keys()
    assert {"value", "low", "high"} == target["models"]["ensemble"]["roc_auc"].keys()
    model = json.loads((finished.path / "models/gpt/config.json").read_text())
    called = target["models"]["ensemble"]["threshold"]
    assert abs(called - model["thresholds"]["purchase_14d"]) < 1e-6
    assert {"diff", "low", "high"} == target["paired"]["ensemble-lightgbm"]["roc_auc"].keys()
    spend = evaluation["targets"]["spend_14d"]["models"]["ensemble"]
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


def test_a_run_killed_in_every_stage_ends_in_the_same_bytes(
    finished: Project, tmp_path: Path
) -> None:
    """Equal inputs give equal bytes, also in another folder and after a kill at any moment."""
    project = clone_project(tmp_path / "killed")
    moments = random.Random(5)
    stages = set(digests(finished))
    killed: set[str] = set()
    while killed != stages:
        killed.add(kill_in_stage(project, stages - killed, moments.uniform(0.1, 2.5)))
    # What had ended before a kill is not run again.
    mend_lock(project.path)
    unfinished = stages - digests(project).keys()
    assert set(ran(project.run("dvc", "repro").stdout)) <= {"fingerprint", *unfinished}
    assert digests(project) == digests(finished)


def kill_in_stage(project: Project, stages: set[str], delay: float) -> str:
    """Start DVC and kill it, its children too, in the first of some stages that it starts.

    The kill comes some seconds into the stage, or with the start of the next one. DVC orders
    stages that don't wait for each other anew in every run, so which one it is, it has to tell.
    """
    mend_lock(project.path)
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=project.path,
        env=project.environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    kill = partial(os.killpg, process.pid, signal.SIGKILL)
    timer = threading.Timer(delay, kill)
    assert process.stdout is not None
    told = []
    struck = ""
    for line in process.stdout:
        told.append(line)
        started = ran(line)
        if struck and started:
            break
        if stages.intersection(started):
            struck = started[0]
            timer.start()
    timer.cancel()
    if process.poll() is None:
        kill()
    process.communicate()
    assert struck, "".join(told)
    return struck


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
