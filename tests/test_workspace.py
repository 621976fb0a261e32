from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import yaml

from pipelines import workspace
from pipelines.config import load_params
from pipelines.errors import UserError
from pipelines.workspace import RUNS, check_out, locate, name_run, prepare

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout with one commit; DVC is set up in it."""
    from dvc.repo import Repo

    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (folder / ".gitignore").write_text("/.forecart/\n/reports/\n")
    (folder / "code.py").write_text("committed")
    git(folder, "init", "--quiet", "--initial-branch=main")
    Repo.init(str(folder)).close()
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "start")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def end(home: Path, run_id: str, *, age: float) -> None:
    """Let a run be finished, so many seconds ago."""
    mark = locate(home, run_id) / ".forecart/.finished"
    mark.touch()
    moment = time.time() - age
    os.utime(mark, (moment, moment))
    os.utime(mark.with_name(".ready"), (moment, moment))


@pytest.mark.parametrize(
    "run_id", ["manual__2025-01-01T00:00:00+00:00", "../../etc", "a b;c", "", "x" * 300, "é.lock"]
)
def test_names_are_safe_for_folders_and_branches(run_id: str) -> None:
    name = name_run(run_id)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name)
    subprocess.run(["git", "check-ref-format", f"refs/heads/runs/{name}"], check=True)


def test_run_ids_that_read_alike_have_names_of_their_own() -> None:
    assert len({name_run(run_id) for run_id in ("a b", "a:b", "a-b", "x" * 70, "x" * 71)}) == 5


def test_a_workspace_has_the_committed_code_and_the_changed_settings(home: Path) -> None:
    (home / "code.py").write_text("not committed")
    (home / "champion.json").write_text('{"version": 3}')
    before = (home / "params.yaml").read_text()
    changes = {"ingest.simulator.users": 77, "train.epochs": None, "train.device": "cpu"}
    folder = prepare(home, "one", changes)
    assert (folder / "code.py").read_text() == "committed"
    assert (folder / "champion.json").read_text() == '{"version": 3}'
    params = load_params(folder / "params.yaml")
    assert (params.ingest.simulator.users, params.train.device) == (77, "cpu")
    assert params.train.epochs == load_params(home / "params.yaml").train.epochs
    text = (folder / "params.yaml").read_text()
    assert "# Every setting of a run." in text
    assert (home / "params.yaml").read_text() == before
    assert prepare(home, "one", {"ingest.simulator.users": 88}) == folder
    assert (folder / "params.yaml").read_text() == text


def test_the_difference_shows_the_changed_settings_alone(home: Path) -> None:
    assert (prepare(home, "none", {}) / "params.yaml").read_text() == (
        home / "params.yaml"
    ).read_text()
    folder = prepare(home, "one", {"ingest.simulator.users": 77, "train.epochs": 2})
    before = (home / "params.yaml").read_text().splitlines()
    after = (folder / "params.yaml").read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split("#")[0].strip() for _, new in changed] == ["users: 77", "epochs: 2"]
    assert [old.split("#")[0].strip() for old, _ in changed] == ["users: 9000", "epochs: null"]


def test_settings_of_the_checkout_that_are_not_committed_count(home: Path) -> None:
    text = (home / "params.yaml").read_text().replace("users: 9000", "users: 500", 1)
    (home / "params.yaml").write_text(text)
    folder = prepare(home, "one", {})
    assert load_params(folder / "params.yaml").ingest.simulator.users == 500


def test_relative_files_stay_those_of_the_checkout(home: Path) -> None:
    changes = {"ingest.source": "files", "ingest.files.path": "exports/*.csv"}
    files = load_params(prepare(home, "one", changes) / "params.yaml").ingest.files
    assert files.path == f"{home}/exports/*.csv"
    assert files.users is None
    kept = ("s3://shop/*.csv", "/exports/day.csv")
    for path in kept:
        folder = prepare(home, path, changes | {"ingest.files.path": path})
        assert load_params(folder / "params.yaml").ingest.files.path == path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("sqlite:///shop.db", "sqlite:///{home}/shop.db"),
        ("sqlite+pysqlite:///shop/a.db?mode=ro", "sqlite+pysqlite:///{home}/shop/a.db?mode=ro"),
        ("sqlite:////shop/a.db", "sqlite:////shop/a.db"),
        ("postgresql://shop/events", "postgresql://shop/events"),
        (None, "sqlite:///{home}/.forecart/events.db"),
    ],
)
def test_a_database_beside_the_checkout_is_found_from_a_workspace(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, meant: str
) -> None:
    meant = meant.format(home=home)
    changes = {"ingest.source": "database", "ingest.database.url": given}
    folder = prepare(home, "one", changes)
    url = load_params(folder / "params.yaml").ingest.database.url
    assert url == (given and meant)
    monkeypatch.setenv("FORECART_STORE", given or "")
    assert workspace.environment(home, folder)["FORECART_STORE"] == meant


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "sqlite:///{home}/mlflow.db"),
        ("", "sqlite:///{home}/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///{home}/mlflow.db"),
        ("sqlite:///shop/runs.db", "sqlite:///{home}/shop/runs.db"),
        ("sqlite:////shop/runs.db", "sqlite:////shop/runs.db"),
        ("http://mlflow:5000", "http://mlflow:5000"),
    ],
)
def test_a_run_promotes_into_the_registry_of_the_checkout(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, meant: str
) -> None:
    """Its workspace goes, and a registry in it would go with it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if given is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    found = workspace.environment(home, locate(home, "one"))["MLFLOW_TRACKING_URI"]
    assert found == meant.format(home=home)


def test_the_cache_is_the_checkouts_and_so_are_other_local_settings(home: Path) -> None:
    from dvc.config import Config

    (home / ".dvc/config").write_text("['remote \"shared\"']\n    url = ../../shared\n")
    (home / ".dvc/config.local").write_text("['remote \"store\"']\n    url = ../../backup\n")
    found = Config(str(prepare(home, "one", {}) / ".dvc"))
    assert found["cache"]["dir"] == str(home / ".dvc/cache")
    urls = {name: remote["url"] for name, remote in found["remote"].items()}
    assert urls == {"shared": str(home.parent / "shared"), "store": str(home.parent / "backup")}


def test_a_cache_that_lies_elsewhere_is_found(home: Path) -> None:
    from dvc.config import Config

    (home / ".dvc/config.local").write_text("[cache]\n    dir = ../../cache\n")
    found = Config(str(prepare(home, "one", {}) / ".dvc"))
    assert found["cache"]["dir"] == str(home.parent / "cache")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.epochs": 0}, "train.epochs"),
        ({"train.epoch": 2}, "train.epoch"),
        ({"ingest.until": "tomorrow"}, "ingest.until"),
    ],
)
def test_a_wrong_setting_is_named(home: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        prepare(home, "one", changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing is set\n",
        "package: {name: shop}\n",
        "ingest: {source: files, files: {path: b.csv}}\n",
        "train:\n",
    ],
)
def test_a_section_that_is_left_out_is_no_hindrance(home: Path, text: str) -> None:
    (home / "params.yaml").write_text(text)
    changes = {"train.epochs": 2, "ingest.simulator.days": 200, "ingest.files.path": "a.csv"}
    params = load_params(prepare(home, "one", changes) / "params.yaml")
    assert (params.train.epochs, params.ingest.simulator.days) == (2, 200)
    assert params.ingest.files.path == f"{home}/a.csv"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ingest: {files: {path: 5}}\n", "ingest.files.path: Input should be a valid string"),
        ("ingest: [1]\n", "expected a mapping with until, found [1]"),
        ("[1]\n", "expected a mapping with ingest, found [1]"),
        ("ingest: {files: 3}\n", "ingest.files: Input should be"),
        ("train: [1\n", "not valid YAML"),
        ("train: {}\ntrain: {}\n", "train is given a second time"),
    ],
)
def test_a_checkout_with_wrong_settings_is_told_so_in_one_line(
    home: Path, text: str, told: str
) -> None:
    (home / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"params\.yaml.*: {re.escape(told)}.*$"):
        prepare(home, "one", {"ingest.until": "2025-03-01"})


def test_a_change_may_complete_the_settings_of_the_checkout(home: Path) -> None:
    (home / "params.yaml").write_text("ingest: {source: files}\n")
    folder = prepare(home, "one", {"ingest.files.path": "a.csv"})
    assert load_params(folder / "params.yaml").ingest.files.path == f"{home}/a.csv"


def test_a_half_made_workspace_is_made_anew(home: Path) -> None:
    folder = prepare(home, "one", {})
    (folder / ".forecart/.ready").unlink()
    (folder / "params.yaml").unlink()
    assert (prepare(home, "one", {}) / "params.yaml").exists()


def test_what_a_killed_git_leaves_is_not_in_the_way(home: Path) -> None:
    folder = prepare(home, "one", {})
    inside = home / ".git/worktrees" / folder.name
    (inside / "index.lock").touch()
    workspace.commit(home, "one")
    (inside / "index.lock").touch()
    workspace.check_out(home, folder, "HEAD")
    # It was killed while it made the worktree.
    (folder / ".forecart/.ready").unlink()
    (inside / "locked").write_text("initializing")
    (inside / "HEAD").write_text("0" * 40 + "\n")
    workspace.mend(home)
    assert inside.exists()  # it may be in the making
    os.utime(inside / "HEAD", (0, 0))
    workspace.mend(home)
    assert not inside.exists()
    assert (prepare(home, "one", {}) / "code.py").exists()


def test_results_are_committed_once_and_the_checkout_is_left_alone(home: Path) -> None:
    head = git(home, "rev-parse", "HEAD")
    folder = prepare(home, "one", {"train.epochs": 2})
    (folder / "reports").mkdir()
    (folder / "reports/verdict.json").write_text("{}")
    (folder / "reports/index.html").write_text("large")
    branch = workspace.commit(home, "one")
    first = git(home, "rev-parse", branch)
    assert git(home, "rev-parse", f"{branch}~1") == head
    changed = git(home, "diff", "--name-only", head, branch).split()
    assert changed == ["params.yaml", "reports/verdict.json"]
    assert git(home, "show", f"{branch}:reports/verdict.json") == "{}"
    assert workspace.commit(home, "one") == branch
    assert git(home, "rev-parse", branch) == first
    assert git(home, "status", "--short") == ""
    assert git(home, "rev-parse", "HEAD") == head


def test_the_newest_workspaces_stay_and_all_branches(home: Path) -> None:
    for age, run_id in enumerate(("new", "older", "oldest")):
        prepare(home, run_id, {})
        workspace.commit(home, run_id)
        end(home, run_id, age=100.0 * age)
    prepare(home, "running", {})
    removed = workspace.finish(home, "new", keep=2)
    assert removed == [name_run("oldest")]
    left = {path.name for path in (home / RUNS).iterdir()}
    assert left == {name_run(run_id) for run_id in ("new", "older", "running")}
    assert len(git(home, "branch", "--list", "runs/*").splitlines()) == 3
    assert name_run("oldest") not in git(home, "worktree", "list")


@pytest.mark.parametrize("act", [workspace.resume, workspace.commit, prepare, check_out])
def test_a_finished_run_that_works_again_keeps_its_workspace(
    home: Path, act: Callable[..., Any]
) -> None:
    again = prepare(home, "again", {})
    # Long enough ago to be taken for lost, too.
    end(home, "again", age=31 * 86_400.0)
    prepare(home, "other", {})
    arguments: dict[Any, tuple[Any, ...]] = {prepare: ("again", {}), check_out: (again, "HEAD")}
    act(home, *arguments.get(act, ("again",)))
    assert workspace.finish(home, "other", keep=0) == [name_run("other")]
    # Once it is over for good, it goes.
    assert workspace.finish(home, "again", keep=0) == [name_run("again")]


@pytest.mark.parametrize("act", [workspace.resume, workspace.commit])
def test_a_workspace_that_is_gone_is_told_in_one_line(
    home: Path, act: Callable[[Path, str], Any]
) -> None:
    folder = prepare(home, "one", {})
    workspace.remove(home, folder)
    told = f"^{folder}: the workspace is gone; clear the task prepare, too$"
    with pytest.raises(UserError, match=told):
        act(home, "one")
    assert not folder.exists()


def test_an_unfinished_workspace_goes_after_a_month(home: Path) -> None:
    prepare(home, "now", {})
    lost = prepare(home, "lost", {}) / ".forecart/.ready"
    moment = time.time() - 31 * 86_400
    os.utime(lost, (moment, moment))
    assert workspace.finish(home, "now", keep=5) == [name_run("lost")]


def test_a_workspace_that_is_being_made_is_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run ends meanwhile."""
    prepare(home, "ended", {})
    share_cache = workspace._share_cache

    def share(*folders: Path) -> None:
        assert workspace.finish(home, "ended", keep=5) == []
        share_cache(*folders)

    monkeypatch.setattr(workspace, "_share_cache", share)
    folder = prepare(home, "new", {})
    assert (folder / "code.py").exists()
    # One that was killed then has no mark for ever, and goes like others.
    (folder / ".forecart/.ready").unlink()
    os.utime(folder, (0, 0))
    assert workspace.finish(home, "ended", keep=5) == [name_run("new")]


def test_a_workspace_that_another_removes_meanwhile_is_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(home, "ended", {})
    other = prepare(home, "other", {})
    touched = workspace._touched

    def look(folder: Path) -> float:
        if folder == other:
            workspace.remove(home, other)
        return touched(folder)

    monkeypatch.setattr(workspace, "_touched", look)
    assert workspace.finish(home, "ended", keep=5) == []


def test_two_that_remove_a_workspace_at_once_both_succeed(home: Path) -> None:
    for _ in range(5):
        folder = prepare(home, "ended", {})
        for number in range(300):
            (folder / f"{number}/a").mkdir(parents=True)
        start = Barrier(2)

        def act(start: Barrier = start, folder: Path = folder) -> None:
            start.wait()
            workspace.remove(home, folder)

        with ThreadPoolExecutor(max_workers=2) as pool:
            for done in [pool.submit(act) for _ in range(2)]:
                done.result()
        assert not folder.exists()


def test_a_machine_without_workspaces_has_none_to_remove(home: Path) -> None:
    assert workspace.finish(home, "elsewhere", keep=5) == []


def test_without_git_history_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="git worktree"):
        prepare(tmp_path, "one", {})


def test_a_folder_within_a_repository_is_refused(home: Path, tmp_path: Path) -> None:
    shop = home / "shop"
    shop.mkdir()
    (shop / "params.yaml").write_text((home / "params.yaml").read_text())
    git(home, "add", "--all")
    git(home, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "shop")
    for act in (lambda: prepare(shop, "one", {}), lambda: check_out(shop, shop / "run", "HEAD")):
        with pytest.raises(UserError, match=rf"^{shop}: .* of their own; this one is {home}'s$"):
            act()
    assert [path.name for path in shop.iterdir()] == ["params.yaml"]
    assert len(git(home, "worktree", "list").splitlines()) == 1
    (tmp_path / "link").symlink_to(home)
    assert (prepare(tmp_path / "link", "one", {}) / "code.py").exists()


def test_the_params_are_as_they_were_but_for_the_change(home: Path) -> None:
    folder = prepare(home, "one", {"ingest.until": "2025-03-01"})
    before = yaml.safe_load((home / "params.yaml").read_text())
    after = yaml.safe_load((folder / "params.yaml").read_text())
    before["ingest"]["until"] = after["ingest"]["until"]
    assert after == before


def test_of_a_remote_that_is_not_there_git_tells_what_is_wrong(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    with pytest.raises(UserError, match=r"fatal: 'nosuch' does not appear to be a git repository$"):
        workspace.run_git(home, "ls-remote", "nosuch")
    monkeypatch.setenv("GIT_SSH_COMMAND", "echo no such host >&2; false")
    with pytest.raises(UserError, match=r"no such host$"):
        workspace.run_git(home, "ls-remote", "ssh://nobody@localhost/shop")
