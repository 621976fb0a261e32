"""Machines that share a git remote and a DVC remote and no disk, each a clone of its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import relay
from pipelines.errors import UserError
from pipelines.graph import load_graph
from pipelines.io import digest_directory
from pipelines.workspace import locate, name_run
from tests.integration.conftest import ROOT, Project, clone_project
from tests.integration.test_pipeline import ran

RUN = "shared: 1"
STAGES = """
stages:
  first:
    cmd: python write.py a
    deps: [write.py]
    outs: [a.txt]
  left:
    cmd: python write.py b
    deps: [a.txt]
    outs: [b.txt]
  right:
    cmd: python write.py c
    deps: [a.txt]
    outs: [c.txt]
  last:
    cmd: python write.py d
    deps: [b.txt, c.txt]
    outs: [d.txt]
"""
WRITE = "import sys; open(f'{sys.argv[1]}.txt', 'w').write(sys.argv[1] * 3)"


def share(project: Project) -> list[Project]:
    """Commit a project, put it on a bare git remote and clone it twice."""
    folder = project.path.parent
    identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    project.run("dvc", "remote", "add", "--default", "store", str(folder / "store"))
    project.run("git", "add", "--all")
    project.run("git", *identity, "commit", "--quiet", "--message=share")
    project.run("git", "clone", "--quiet", "--bare", ".", str(folder / "remote.git"))
    machines = []
    for name in ("one", "two"):
        project.run("git", "clone", "--quiet", str(folder / "remote.git"), str(folder / name))
        machines.append(Project(folder / name))
    return machines


def read_published(machine: Project, place: str) -> dict[str, Any]:
    """The entries of a dvc.lock on the git remote."""
    remote = machine.path.parent / "remote.git"
    lock = subprocess.run(
        ["git", "show", f"{place}:dvc.lock"], cwd=remote, capture_output=True, check=True
    ).stdout
    stages: dict[str, Any] = yaml.safe_load(lock)["stages"]
    return stages


def has_object(store: Path, md5: str) -> bool:
    return (store / "files/md5" / md5[:2] / md5[2:]).exists()


def list_objects(store: Path, md5: str) -> list[str]:
    """An output's own hash, and those of its files when it is a folder."""
    if not md5.endswith(".dir"):
        return [md5]
    listing = json.loads((store / "files/md5" / md5[:2] / md5[2:]).read_text())
    return [md5, *(entry["md5"] for entry in listing)]


def run_stage(machine: Project, name: str, run_id: str = RUN) -> list[str]:
    """Run a stage as a worker does; those that DVC executed."""
    return ran(machine.run("forecart", "stage", name, "--run", run_id).stdout)


def run_stages(machine: Project, names: Sequence[str]) -> list[str]:
    return [ran for name in names for ran in run_stage(machine, name)]


def test_two_machines_run_every_stage_once_and_the_trainer_sees_no_raw_events(
    finished: Project, tmp_path: Path
) -> None:
    one, two = share(clone_project(tmp_path / "project"))
    stages = load_graph(one.path / "dvc.yaml").stages
    done = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for work in (
            {one: ("fingerprint", "ingest", "validate", "features")},
            {one: ("baselines",), two: ("pretrain", "train")},
            {one: ("evaluate",), two: ("package",)},
            {one: ("gate",)},
        ):
            for names in pool.map(run_stages, work.keys(), work.values()):
                done += names
    assert sorted(done) == sorted(stages)

    # The same results as on one machine.
    branch = one.run("forecart", "conclude", "--run", RUN).stdout.split()[0]
    published = read_published(one, branch)
    plain = yaml.safe_load((finished.path / "dvc.lock").read_text())["stages"]
    assert {k: v.get("outs") for k, v in published.items()} == {
        name: plain[name].get("outs") for name in stages
    }
    assert branch == f"runs/{name_run(RUN)}"
    assert (locate(one.path, RUN) / "reports/index.html").exists()

    # What the promotion reads, on a machine that has not computed it.
    promoted = relay.fetch(one.path, RUN, "origin", ("models/gpt", "reports/verdict.json"))
    verdict = json.loads((promoted / "reports/verdict.json").read_text())
    assert verdict["candidate"] == digest_directory(promoted / "models/gpt")

    store, cache = tmp_path / "store", two.path / ".dvc/cache"
    outs = {o["path"]: o["md5"] for entry in published.values() for o in entry["outs"]}
    assert has_object(cache, outs["data/features"])
    for raw in ("data/events", "data/valid"):
        assert not (two.path / raw).exists()
        assert not list((two.path / ".forecart/runs").glob(f"*/{raw}"))
        objects = list_objects(store, outs[raw])
        assert len(objects) > 100
        assert not [md5 for md5 in objects if has_object(cache, md5)]


@pytest.fixture
def machines(tmp_path: Path) -> list[Project]:
    """Two clones of a project whose stages take no time."""
    path = tmp_path / "project"
    path.mkdir()
    (path / "dvc.yaml").write_text(STAGES)
    (path / "write.py").write_text(WRITE)
    (path / ".gitignore").write_text("/.forecart/\n/*.txt\n")
    shutil.copyfile(ROOT / "params.yaml", path / "params.yaml")
    project = Project(path)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("dvc", "init", "--quiet")
    return share(project)


def test_entries_published_at_once_are_both_kept(
    machines: list[Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machines
    run_stage(one, "first")
    push = relay._push

    def push_late(*arguments: Any, **options: Any) -> None:
        # Between reading and writing the run, the other machine writes it.
        monkeypatch.setattr(relay, "_push", push)
        assert run_stage(two, "right") == ["right"]
        push(*arguments, **options)

    monkeypatch.setattr(relay, "_push", push_late)
    relay.run_stage(one.path, RUN, "left", "origin")
    ref = f"refs/forecart/runs/{name_run(RUN)}"
    assert list(read_published(one, ref)) == ["first", "left", "right"]
    assert run_stage(two, "last") == ["last"]


def test_machines_that_start_and_run_at_once_do_not_disturb_each_other(
    machines: list[Project],
) -> None:
    def start_all(name: str) -> list[subprocess.Popen[str]]:
        return [
            subprocess.Popen(
                [sys.executable, "-m", "pipelines.cli", "stage", name, "--run", RUN],
                cwd=machine.path,
                env=machine.environment() | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for machine, name in zip(machines, name.split(), strict=True)
        ]

    for both in ("first first", "left right"):
        for process in start_all(both):
            assert process.wait(timeout=120) == 0, process.stdout and process.stdout.read()
    ref = f"refs/forecart/runs/{name_run(RUN)}"
    assert list(read_published(machines[0], ref)) == ["first", "left", "right"]


def test_a_stage_killed_before_it_is_published_is_not_computed_again(
    machines: list[Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machines
    relay.start(one.path, RUN, {}, "origin")

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(relay, "publish", kill)
        with pytest.raises(KeyboardInterrupt):
            relay.run_stage(one.path, RUN, "first", "origin")
    with pytest.raises(UserError, match="left comes after first"):
        relay.run_stage(two.path, RUN, "left", "origin")
    # On another machine, from what was pushed.
    assert run_stage(two, "first") == []
    assert run_stage(one, "first") == []
    assert "done already" in relay.run_stage(one.path, RUN, "first", "origin")
    # A second run takes everything from the remote as well, and the first's branch stays.
    assert [run_stage(two, name) for name in ("left", "right", "last")] == [
        ["left"],
        ["right"],
        ["last"],
    ]
    branch = relay.conclude(one.path, RUN, "origin")
    assert relay.conclude(two.path, RUN, "origin") == branch
    relay.end(two.path, RUN, "origin")
    assert list(read_published(one, branch)) == ["first", "left", "right", "last"]
    assert run_stage(one, "first", "2") == []
    # A run that is over can still be looked at.
    assert (relay.fetch(one.path, RUN, "origin", ["d.txt"]) / "d.txt").read_text() == "ddd"


def test_a_stage_killed_at_any_moment_is_completed_by_the_next_attempt(
    machines: list[Project],
) -> None:
    one, two = machines
    moments = random.Random(7)
    for machine in (one, two, one, two):
        process = subprocess.Popen(
            ["forecart", "stage", "first", "--run", RUN],
            cwd=machine.path,
            env=machine.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(moments.uniform(0.3, 2.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run_stage(one, "first")
    run_stage(two, "left")
    folder = relay.fetch(one.path, RUN, "origin", ["a.txt", "b.txt"])
    assert [(folder / name).read_text() for name in ("a.txt", "b.txt")] == ["aaa", "bbb"]


def test_a_stage_whose_inputs_change_meanwhile_is_not_published(
    machines: list[Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machines
    run_stage(one, "first")
    publish = relay.publish

    def publish_late(*arguments: Any) -> None:
        monkeypatch.setattr(relay, "publish", publish)
        with monkeypatch.context() as patch:
            patch.setattr(relay, "_read_lock", read_changed)
            relay.publish(two.path, RUN, "first", "origin")
        publish(*arguments)

    read_lock = relay._read_lock

    def read_changed(folder: Path) -> dict[str, Any]:
        entries = read_lock(folder)
        for out in entries["first"]["outs"]:
            out["md5"] = "0" * 32
        return entries

    relay.workspace.check_out(
        two.path, locate(two.path, RUN, "first"), relay._read_tip(two.path, RUN, "origin")
    )
    monkeypatch.setattr(relay, "publish", publish_late)
    with pytest.raises(UserError, match=r"a\.txt changed while left ran"):
        relay.run_stage(one.path, RUN, "left", "origin")
    assert list(read_published(one, f"refs/forecart/runs/{name_run(RUN)}")) == ["first"]


def test_what_is_missing_is_told_in_one_line(machines: list[Project]) -> None:
    one, _ = machines
    with pytest.raises(UserError, match="not on the git remote origin"):
        relay.run_stage(one.path, "unknown", "first", "origin")
    relay.start(one.path, RUN, {}, "origin")
    for name in ("third", "/../../../victim"):
        with pytest.raises(UserError, match=rf"stage {name}: not in dvc\.yaml"):
            relay.run_stage(one.path, RUN, name, "origin")
    assert not list((one.path / ".forecart/runs").iterdir())
    assert not (one.path / "victim").exists()
    with pytest.raises(UserError, match="not done: first, left, right, last"):
        relay.conclude(one.path, RUN, "origin")
    with pytest.raises(UserError, match="git ls-remote"):
        relay.start(one.path, RUN, {}, "elsewhere")


def test_what_cannot_be_run_is_not_published(machines: list[Project]) -> None:
    one, _ = machines
    wrong = {
        ("nosuch", "--run", "x"): "stage nosuch: not in dvc.yaml, which has first, ",
        ("first", "--run", ""): "a run that machines share needs a name",
        ("first", "--run", "x", "--remote=--upload-pack=touch"): "cannot begin with -",
    }
    for arguments, told in wrong.items():
        done = one.run("forecart", "stage", *arguments, check=False)
        assert done.returncode == 2
        assert told in done.stderr
        assert done.stderr.count("\n") == 1
    assert one.run("git", "ls-remote", "origin", "refs/forecart/*").stdout == ""
    assert not list((one.path / ".forecart/runs").iterdir())
    assert "--upload-pack" not in str(list(one.path.iterdir()))
