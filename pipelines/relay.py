"""Runs that several machines work on: a stage here, the next one there, with no disk in common.

What they share is a git remote and a DVC remote. The state of a run is one commit on the git
remote, ``refs/forecart/runs/<name>``: code and settings of the run, and a dvc.lock with the
entries of the stages done so far. A worker takes it, lets DVC fetch what its stage reads, runs
the stage, pushes what it wrote, and then adds the stage's entry. The ref is moved under the
condition that it is still where it was read; who loses that race merges anew. So an entry that can
be read says that its data are on the DVC remote, and no entry is lost. A run that is concluded is
the branch ``runs/<name>``.

Imports nothing heavy: DAG files load this module many times a minute.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from pipelines import workspace
from pipelines.errors import UserError
from pipelines.graph import Graph, load_graph, parse_graph
from pipelines.processes import command_environment, mend_lock
from pipelines.workspace import BRANCHES, PARAMS, run_git

REFS: Final = "refs/forecart/runs/"
LOCK: Final = "dvc.lock"
REPORTS: Final = ("reports/verdict.json", "reports/evaluation.json", "reports/index.html")

_GRAPH: Final = "dvc.yaml"
_ATTEMPTS: Final = 20
_PAUSE_SECONDS: Final = 1.0


def start(
    home: Path, run_id: str, changes: Mapping[str, Any], remote: str, stage: str | None = None
) -> None:
    """Publish a run without results; a run that was published before is left as it is.

    Args:
        home: the project's folder, a git checkout.
        run_id: of any characters.
        changes: dotted keys of params.yaml and their values; None = as in the checkout.
        remote: name of the git remote.
        stage: that the run is started for.

    Raises:
        UserError: a key or value is not valid, there is no such stage, or the remote cannot be
            reached.
    """
    if _find_tip(home, run_id, remote)[0] is not None:
        return
    # What was left here by a start that was killed may have other settings.
    workspace.remove(home, workspace.locate(home, run_id))
    folder = workspace.prepare(home, run_id, changes)
    if stage is not None:
        try:
            _check_stage(load_graph(folder / _GRAPH), stage)
        except UserError:
            workspace.remove(home, folder)
            raise
    given = [name for name in (PARAMS, "champion.json") if (folder / name).exists()]
    run_git(folder, "add", "--force", "--", *given)
    # Entries of earlier runs do not say that their data were pushed.
    run_git(folder, "rm", "--quiet", "--force", "--ignore-unmatch", "--", LOCK)
    workspace.commit_index(folder, f"Run {run_id}", "--allow-empty")
    try:
        _push(folder, run_id, remote, lease="")
    except UserError:
        # Of two that start one run at once, the first has done it.
        if _find_tip(home, run_id, remote)[0] is None:
            raise
    workspace.remove(home, folder)


def run_stage(home: Path, run_id: str, stage: str, remote: str, *, force: bool = False) -> str:
    """Run one stage of a run and publish its result.

    Killed at any point and called again, here or on another machine, it ends the same.

    Args:
        home: the project's folder, a git checkout with a default DVC remote.
        run_id: of a run that was started.
        stage: of dvc.yaml.
        remote: name of the git remote.
        force: also when DVC knows the result.

    Returns:
        What was done, for people.

    Raises:
        UserError: there is no such run or stage, a stage before it is not done, it fails, or a
            remote cannot be reached.
    """
    tip = _read_tip(home, run_id, remote)
    graph = parse_graph(run_git(home, "show", f"{tip}:{_GRAPH}"), Path(_GRAPH))
    # The workspace is named after the stage.
    _check_stage(graph, stage)
    folder = workspace.locate(home, run_id, stage)
    _take(home, folder, tip)
    entries = _read_lock(folder)
    waits = [up for up in graph.upstream[stage] if up not in entries]
    if waits:
        raise UserError(f"run {run_id}: {stage} comes after {', '.join(waits)}")
    if stage in entries and not _find_moved(entries, stage) and not force:
        workspace.remove(home, folder)
        return f"{stage} is done already in run {run_id}"
    # Of a stage whose inputs are not here DVC cannot see that they have changed; without an entry
    # it fetches them and looks.
    _write_lock(folder, graph, {k: v for k, v in entries.items() if k != stage})
    options = ["--force"] if force else []
    _run_dvc(home, folder, stage, "repro", "--single-item", "--pull", *options, stage)
    _run_dvc(home, folder, stage, "push", "--run-cache", stage)
    publish(home, run_id, stage, remote)
    workspace.remove(home, folder)
    return f"{stage} is published in run {run_id}"


def publish(home: Path, run_id: str, stage: str, remote: str) -> None:
    """Merge the entry of a stage in its workspace into the published run.

    Raises:
        UserError: the stage's inputs have been computed anew meanwhile, or the remote cannot be
            reached or changes faster than one can write.
    """
    folder = workspace.locate(home, run_id, stage)
    graph = load_graph(folder / _GRAPH)
    entry = _read_lock(folder)[stage]
    for _ in range(_ATTEMPTS):
        tip, lease = _find_tip(home, run_id, remote)
        if tip is None:
            raise UserError(f"run {run_id}: not on {remote} any more")
        _take(home, folder, tip)
        entries = _read_lock(folder) | {stage: entry}
        if moved := _find_moved(entries, stage):
            workspace.remove(home, folder)
            raise UserError(
                f"run {run_id}: {', '.join(moved)} changed while {stage} ran; run it again"
            )
        _write_lock(folder, graph, entries)
        run_git(folder, "add", "--force", "--", LOCK)
        workspace.commit_index(folder, f"Run {run_id}", "--amend")
        try:
            return _push(folder, run_id, remote, lease=lease)
        except UserError:
            if _find_tip(home, run_id, remote) == (tip, lease):
                raise
        _pause()
    raise UserError(f"run {run_id}: {remote} was changed by others {_ATTEMPTS} times; try again")


def conclude(home: Path, run_id: str, remote: str) -> str:
    """Fetch the reports of a run whose stages are done, and publish its branch.

    Returns:
        The branch, here and on the remote.

    Raises:
        UserError: a stage is not done, or a remote cannot be reached.
    """
    folder = fetch(home, run_id, remote, REPORTS)
    graph, entries = load_graph(folder / _GRAPH), _read_lock(folder)
    undone = [s for s in graph.stages if s not in entries or _find_moved(entries, s)]
    if undone:
        raise UserError(f"run {run_id}: not done: {', '.join(undone)}")
    # One commit makes the branch, as it does where all workers share a disk.
    run_git(folder, "reset", "--quiet", "--soft", "HEAD~1")
    branch = workspace.commit(home, run_id)
    place = f"refs/heads/{branch}"
    theirs = _list_refs(home, remote, place).get(place)
    if theirs is None or not _are_alike(home, remote, place, theirs, branch):
        push = ("push", "--quiet", "--no-verify", "--force")
        run_git(home, *push, "--", remote, f"{branch}:{place}")
    return branch


def fetch(home: Path, run_id: str, remote: str, outputs: Iterable[str]) -> Path:
    """Make the run's workspace on this machine, with some outputs of its stages in it.

    Args:
        home: the project's folder.
        run_id: of the run.
        remote: name of the git remote.
        outputs: paths; what no stage has published is left out.

    Returns:
        The workspace's folder.

    Raises:
        UserError: there is no such run, or a remote cannot be reached.
    """
    folder = workspace.locate(home, run_id)
    _take(home, folder, _read_tip(home, run_id, remote))
    published = _list_outs(_read_lock(folder))
    wanted = [path for path in outputs if path in published]
    if wanted:
        _run_dvc(home, folder, "fetch", "pull", "--quiet", "--force", *wanted)
    return folder


def end(home: Path, run_id: str, remote: str) -> None:
    """Remove the published state of a run; its branch stays."""
    ref = REFS + workspace.name_run(run_id)
    if ref in _list_refs(home, remote, ref):
        run_git(home, "push", "--quiet", "--no-verify", "--delete", "--", remote, ref)


def _check_stage(graph: Graph, stage: str) -> None:
    if stage not in graph.stages:
        raise UserError(f"stage {stage}: not in dvc.yaml, which has {', '.join(graph.stages)}")


def _find_tip(home: Path, run_id: str, remote: str) -> tuple[str | None, str]:
    """Return the published commit of a run, fetched, and what the ref has to be to move it.

    A run that is over has a branch alone.
    """
    if not run_id.strip():
        raise UserError("a run that machines share needs a name")
    name = workspace.name_run(run_id)
    ref, branch = REFS + name, f"refs/heads/{BRANCHES}{name}"
    problem = ""
    for _ in range(_ATTEMPTS):
        known = _list_refs(home, remote, ref, branch)
        if not known:
            return None, ""
        place = ref if ref in known else branch
        try:
            run_git(home, "fetch", "--quiet", "--no-write-fetch-head", "--", remote, place)
            run_git(home, "cat-file", "-e", f"{known[place]}^{{commit}}")
        except UserError as error:
            # It may have been moved between the calls, or a killed task have left half a worktree.
            problem = str(error)
            workspace.mend(home)
            _pause()
        else:
            return known[place], known.get(ref, "")
    raise UserError(f"run {run_id}: {problem}")


def _pause() -> None:
    """Wait for a moment that differs, so that those who met part."""
    time.sleep(random.uniform(0, _PAUSE_SECONDS))  # noqa: S311 - not a secret


def _read_tip(home: Path, run_id: str, remote: str) -> str:
    tip, _ = _find_tip(home, run_id, remote)
    if tip is None:
        raise UserError(f"run {run_id}: not on the git remote {remote}")
    return tip


def _take(home: Path, folder: Path, tip: str) -> None:
    """Bring a workspace to a published commit, with no other entries than the published ones."""
    # That of a killed attempt names results that nobody has pushed.
    (folder / LOCK).unlink(missing_ok=True)
    workspace.check_out(home, folder, tip)


def _list_refs(home: Path, remote: str, *refs: str) -> dict[str, str]:
    # Git would take it for an option, and some options name a program to run.
    if remote.startswith("-"):
        raise UserError(f"git remote {remote}: a name or an address cannot begin with -")
    lines = run_git(home, "ls-remote", "--", remote, *refs).splitlines()
    return {name: commit for commit, name in (line.split("\t") for line in lines)}


def _push(folder: Path, run_id: str, remote: str, *, lease: str) -> None:
    """Move the run's ref to the workspace's commit if it is what the lease says; empty: none."""
    ref = REFS + workspace.name_run(run_id)
    condition = f"--force-with-lease={ref}:{lease}"
    run_git(folder, "push", "--quiet", "--no-verify", condition, "--", remote, f"HEAD:{ref}")


def _are_alike(home: Path, remote: str, place: str, theirs: str, ours: str) -> bool:
    run_git(home, "fetch", "--quiet", "--no-write-fetch-head", "--", remote, place)
    trees = run_git(home, "rev-parse", f"{theirs}^{{tree}}", f"{ours}^{{tree}}").split()
    return trees[0] == trees[1]


def _read_lock(folder: Path) -> dict[str, Any]:
    path = folder / LOCK
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    stages: dict[str, Any] = content.get("stages", {})
    return stages


def _write_lock(folder: Path, graph: Graph, entries: Mapping[str, Any]) -> None:
    # The graph's order, so that equal runs have equal files whoever was first.
    ordered = {name: entries[name] for name in graph.stages if name in entries}
    content = yaml.safe_dump({"schema": "2.0", "stages": ordered}, sort_keys=False)
    (folder / LOCK).write_text(content, encoding="utf-8")


def _list_outs(entries: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the outputs of all entries with their hashes."""
    return {o["path"]: o.get("md5") for entry in entries.values() for o in entry.get("outs", ())}


def _find_moved(entries: Mapping[str, Any], stage: str) -> list[str]:
    """Return the inputs of a stage that are not what the stages before it have written."""
    outs = _list_outs(entries)
    deps = {dep["path"]: dep.get("md5") for dep in entries[stage].get("deps", ())}
    return [path for path, found in deps.items() if outs.get(path, found) != found]


def _run_dvc(home: Path, folder: Path, name: str, *arguments: str) -> None:
    """Run DVC in a workspace; what it prints is passed on.

    Raises:
        UserError: it failed.
    """
    mend_lock(folder)
    command: Sequence[str] = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=command_environment() | workspace.environment(home, folder),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        what = f"{name}: dvc {arguments[0]} ended with code {done.returncode}"
        raise UserError(f"{what}; {folder} is left as it was")
