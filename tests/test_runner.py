from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipelines.errors import UserError
from pipelines.graph import Graph, load_graph
from pipelines.processes import mend_lock
from pipelines.runner import run, split

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent

# Fails unless the other one has begun before it ends.
MEET = """
import pathlib, sys, time
own, other = sys.argv[1:]
pathlib.Path(own).touch()
until = time.monotonic() + 60
while not pathlib.Path(other).exists():
    if time.monotonic() > until:
        sys.exit(f"{other} never began")
    time.sleep(0.05)
"""


def make(folder: Path, stages: dict[str, Any]) -> Graph:
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    return load_graph(folder / "dvc.yaml")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    from dvc.repo import Repo

    Repo.init(str(tmp_path), no_scm=True).close()
    return tmp_path


def test_what_is_measured_runs_alone() -> None:
    blocks = split(load_graph(ROOT / "dvc.yaml"))
    assert all(len(block) == 1 for block in blocks for chain in block if "package" in chain)
    assert [("pretrain", "train"), ("baselines",)] in blocks


@pytest.mark.parametrize("seed", range(50))
def test_every_stage_comes_once_after_all_that_it_depends_on(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    names = [f"s{number}" for number in range(draw.randint(1, 9))]
    stages: dict[str, Any] = {}
    for place, name in enumerate(names):
        ups = draw.sample(names[:place], draw.randint(0, min(place, 2)))
        stages[name] = {"cmd": "true", "deps": ups, "outs": [name]}
    alone = frozenset(draw.sample(names, draw.randint(0, 1)))
    graph = make(tmp_path, stages)
    done: set[str] = set()
    for block in split(graph, alone):
        for chain in block:
            before = set(done)
            for name in chain:
                assert set(graph.upstream[name]) <= before
                before.add(name)
            assert len(block) == 1 or not alone & set(chain)
        for chain in block:
            assert not done & set(chain)
            done |= set(chain)
    assert done == set(names)


def test_what_does_not_wait_runs_side_by_side(project: Path) -> None:
    (project / "meet.py").write_text(MEET)
    stages = {
        name: {"cmd": f"{sys.executable} meet.py {name} {other}", "deps": ["in"], "outs": [name]}
        for name, other in (("a", "b"), ("b", "a"))
    }
    stages["end"] = {"cmd": "cat a b > end", "deps": ["a", "b"], "outs": ["end"]}
    (project / "in").write_text("in")
    make(project, stages)
    run(project)
    assert (project / "end").exists()
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    assert set(lock["stages"]) == {"a", "b", "end"}


def test_a_lock_torn_by_a_kill_is_mended(project: Path) -> None:
    make(project, {"a": {"cmd": "touch a", "outs": ["a"]}})
    run(project)
    table = project / ".dvc/tmp/rwlock"
    assert table.exists()
    for torn in ("", '{"read": {"a"'):
        table.write_text(torn)
        (project / "a").unlink()
        run(project)
        assert (project / "a").exists()
        json.loads(table.read_text())


@pytest.fixture
def bystander() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "300"])
    yield process.pid
    process.kill()
    process.wait()


def enter(project: Path, pid: int, command: str, minutes_ago: float) -> Path:
    """Write DVC's table as the command does when it reads and makes a."""
    table = project / ".dvc/tmp/rwlock"
    entry = {"pid": pid, "cmd": command}
    path = str(project / "a")
    table.write_text(json.dumps({"write": {path: entry}, "read": {path: [entry]}}))
    written = time.time() - 60 * minutes_ago
    os.utime(table, (written, written))
    return table


def test_a_lock_of_a_process_whose_number_another_has_is_not_waited_for(
    project: Path, bystander: int
) -> None:
    make(project, {"a": {"cmd": "touch a", "outs": ["a"]}})
    enter(project, bystander, "dvc repro a", 5)
    run(project)
    assert (project / "a").exists()


def test_only_what_is_certainly_another_process_loses_its_lock(
    project: Path, bystander: int
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid, command, minutes_ago in (
        (bystander, "dvc repro a", -5),  # it began before
        (bystander, "/bin/sleep 300", 5),  # the clock was set
        (gone.pid, "dvc repro a", 5),  # of another machine
    ):
        table = enter(project, pid, command, minutes_ago)
        before = table.read_text()
        mend_lock(project)
        assert table.read_text() == before
    entered = enter(project, bystander, "dvc repro a", 5)
    content = json.loads(entered.read_text())
    other = {"pid": os.getpid(), "cmd": "dvc repro b"}
    content["read"][str(project / "a")].append(other)
    content["write"]["b"] = other
    table.write_text(json.dumps(content))
    written = (psutil.Process().create_time() + psutil.Process(bystander).create_time()) / 2
    os.utime(table, (written, written))
    mend_lock(project)
    left = {"write": {"b": other}, "read": {str(project / "a"): [other]}}
    assert json.loads(table.read_text()) == left


@pytest.mark.integration
def test_a_lock_that_is_being_written_is_left_alone(project: Path) -> None:
    from dvc.lock import make_lock

    table = project / ".dvc/tmp/rwlock"
    table.write_text("")
    with make_lock(str(project / ".dvc/tmp/rwlock.lock"), tmp_dir=str(table.parent)):
        mend_lock(project)
    assert table.exists()
    mend_lock(project)
    assert not table.exists()


def test_stages_find_forecart_where_it_is_not_on_the_path(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    make(project, {"a": {"cmd": "forecart --help > help.txt", "outs": ["help.txt"]}})
    run(project)
    assert "validate" in (project / "help.txt").read_text()


def test_what_failed_is_told_and_the_others_are_gone_on_with(project: Path) -> None:
    make(
        project,
        {
            "bad": {"cmd": "exit 3", "outs": ["bad"]},
            "good": {"cmd": "sleep 1; touch good", "outs": ["good"]},
            "end": {"cmd": "touch end", "deps": ["bad", "good"], "outs": ["end"]},
        },
    )
    with pytest.raises(UserError, match="not done: bad; see above"):
        run(project)
    assert set(yaml.safe_load((project / "dvc.lock").read_text())["stages"]) == {"good"}
    assert not (project / "end").exists()


def test_of_a_chain_only_what_is_left_is_told(project: Path) -> None:
    made = make(
        project,
        {
            "print": {"cmd": "touch print", "outs": ["print"], "always_changed": True},
            "read": {"cmd": "touch read", "deps": ["print"], "outs": ["read"]},
            "learn": {"cmd": "exit 3", "deps": ["read"], "outs": ["learn"]},
            "tell": {"cmd": "touch tell", "deps": ["learn"], "outs": ["tell"]},
            "other": {"cmd": "touch other", "outs": ["other"]},
        },
    )
    assert split(made)[0][0] == ("print", "read", "learn", "tell")
    with pytest.raises(UserError, match="not done: learn tell; see above"):
        run(project)


@pytest.mark.integration
def test_what_another_run_holds_is_told_and_not_what_is_done(project: Path) -> None:
    wait = "touch began; while [ ! -e go ]; do sleep 0.1; done; touch c"
    make(
        project,
        {
            "a": {"cmd": "touch a", "outs": ["a"]},
            "b": {"cmd": "touch b", "deps": ["a"], "outs": ["b"]},
            "c": {"cmd": wait, "deps": ["b"], "outs": ["c"]},
        },
    )
    first = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "run"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    until = time.monotonic() + 60
    while not (project / "began").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    try:
        with pytest.raises(UserError, match="not done: c; see above"):
            run(project)
    finally:
        (project / "go").touch()
    assert first.wait(60) == 0


@pytest.mark.integration
@pytest.mark.parametrize(
    ("number", "to_all", "code", "before"),
    [
        (signal.SIGINT, True, 130, ""),
        (signal.SIGINT, True, 130, "trap '' INT; "),
        (signal.SIGTERM, False, 143, ""),
    ],
)
def test_a_signal_ends_all_of_it(
    project: Path, number: signal.Signals, to_all: bool, code: int, before: str
) -> None:
    """Ctrl-C in a terminal reaches the whole group, what a service manager sends the first.

    A stage that does not hear it is ended, too.
    """
    stages = {
        name: {"cmd": f"{own}touch {name}.began; sleep 300; touch {name}", "outs": [name]}
        for name, own in (("a", ""), ("b", before))
    }
    stages["end"] = {"cmd": "touch end", "deps": ["a", "b"], "outs": ["end"]}
    make(project, stages)
    process = subprocess.Popen(
        # What a shell starts in the background ignores interrupts, and so do its children.
        ["env", "--default-signal=INT", sys.executable, "-m", "pipelines.cli", "run"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not all((project / f"{name}.began").exists() for name in ("a", "b")):
        assert time.monotonic() < until
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 4  # of each stage DVC and its command
    (os.killpg if to_all else os.kill)(process.pid, number)
    process.communicate(timeout=120)
    assert process.returncode == code
    _, left = psutil.wait_procs(started, timeout=10)
    assert not left
    assert not (project / "a").exists()
    assert not (project / "end").exists()
    # Nothing holds the project: the next run begins at once.
    make(project, {name: {"cmd": f"touch {name}", "outs": [name]} for name in ("a", "b")})
    run(project)
    assert (project / "b").exists()
