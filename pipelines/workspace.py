"""A folder of its own for every orchestrated run: a git worktree that shares DVC's cache.

Runs disturb neither the checkout nor each other, and what any of them has computed the others take
from the cache. The result of a run is a commit on a branch ``runs/<name>``.

Imports nothing heavy: DAG files load this module many times a minute.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pipelines.address import (
    DEFAULT_STORE,
    REGISTRY_VARIABLE,
    STORE_VARIABLE,
    anchor_address,
    find_registry,
)
from pipelines.errors import UserError

RUNS: Final = Path(".forecart/runs")
BRANCHES: Final = "runs/"
PARAMS: Final = "params.yaml"

# What a run is judged and repeated by.
_RESULTS: Final = (
    "dvc.lock",
    PARAMS,
    "champion.json",
    "reports/verdict.json",
    "reports/evaluation.json",
)
# Taken from the checkout as they are there, committed or not: what the person sees is what runs.
_TAKEN: Final = (PARAMS, "champion.json")
_READY: Final = ".ready"
_FINISHED: Final = ".finished"
# A run may wait for a person for weeks.
_ABANDONED_SECONDS: Final = 30 * 86_400
_UNBORN_SECONDS: Final = 5
_LOGIN: Final = frozenset({"GIT_ASKPASS", "GIT_SSH", "GIT_SSH_COMMAND", "GIT_SSL_CAINFO"})
_NOT_READ: Final = "fatal: Could not read from remote repository."
_IDENTITY: Final = ("-c", "user.name=forecart", "-c", "user.email=forecart@localhost")


def name_run(run_id: str) -> str:
    """Return a name for a run's folder and branch: safe in both, and its own."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", run_id).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


def locate(home: Path, run_id: str, stage: str | None = None) -> Path:
    """Return where the workspace of a run is, or will be; or one of a stage alone."""
    name = name_run(run_id)
    return home.resolve() / RUNS / (name if stage is None else f"{name}.{stage}")


def prepare(home: Path, run_id: str, changes: Mapping[str, Any]) -> Path:
    """Make the workspace of a run; once made it is left as it is, and is one to work in again.

    Args:
        home: the project's folder, a git checkout.
        run_id: of any characters.
        changes: dotted keys of params.yaml and their values; None = as in the checkout.

    Returns:
        The workspace's folder.

    Raises:
        UserError: the folder is no checkout with a commit, or a part of one, or a key or value is
            not valid.
    """
    home = home.resolve()
    folder = locate(home, run_id)
    if _reopen(folder):
        return folder
    _add(home, folder, "HEAD")
    for name in _TAKEN:
        if (home / name).exists():
            shutil.copyfile(home / name, folder / name)
    write_params(folder / PARAMS, home, changes)
    (folder / RUNS.parent / _READY).touch()
    return folder


def resume(home: Path, run_id: str) -> Path:
    """Return the workspace of a run to go on working in, so that no other run's end removes it.

    A run that is finished works again when somebody clears one of its tasks.

    Raises:
        UserError: the workspace is gone.
    """
    folder = locate(home, run_id)
    if not _reopen(folder):
        raise UserError(f"{folder}: the workspace is gone; clear the task prepare, too")
    return folder


def check_out(home: Path, folder: Path, commit: str) -> None:
    """Make a workspace of a commit, or bring one to it; what git does not track stays.

    Args:
        home: the project's folder.
        folder: of the workspace.
        commit: in the checkout's repository.
    """
    home = home.resolve()
    if _reopen(folder):
        _unlock(folder)
        run_git(folder, "checkout", "--quiet", "--force", "--detach", commit)
        return
    _add(home, folder, commit)
    (folder / RUNS.parent / _READY).touch()


def environment(home: Path, folder: Path) -> dict[str, str]:
    """Return variables that make commands in a workspace use its code and the shared registry."""
    path = filter(None, [str(folder), os.environ.get("PYTHONPATH")])
    store = os.environ.get(STORE_VARIABLE) or DEFAULT_STORE
    return {
        STORE_VARIABLE: anchor_address(store, home.resolve()),
        "PYTHONPATH": os.pathsep.join(path),
        REGISTRY_VARIABLE: find_registry(home),
    }


def commit(home: Path, run_id: str) -> str:
    """Commit a run's results to its branch; a second time nothing happens.

    Returns:
        The branch.

    Raises:
        UserError: the workspace is gone.
    """
    folder = resume(home, run_id)
    branch = BRANCHES + name_run(run_id)
    found = [name for name in _RESULTS if (folder / name).exists()]
    _unlock(folder)
    run_git(folder, "add", "--force", "--", *found)
    if run_git(folder, "diff", "--cached", "--name-only"):
        commit_index(folder, f"Run {run_id}")
    run_git(folder, "branch", "--force", branch, "HEAD")
    return branch


def commit_index(folder: Path, message: str, *options: str) -> None:
    """Commit what is staged in a workspace."""
    run_git(
        folder,
        *_IDENTITY,
        *("-c", "commit.gpgsign=false", "commit", "--quiet", "--no-verify"),
        *("--message", message, *options),
    )


def finish(home: Path, run_id: str, *, keep: int) -> list[str]:
    """Mark a run as finished and remove workspaces of old runs; their branches stay.

    Args:
        home: the project's folder.
        run_id: of the run that is over.
        keep: newest finished workspaces that stay.

    Returns:
        Names of those removed. Unfinished ones go when nothing was begun in them for a month; a
        machine on which no run has been has none.
    """
    folder = locate(home, run_id)
    if folder.exists():
        (folder / RUNS.parent / _FINISHED).touch()
    if not folder.parent.exists():
        return []
    removed = []
    ages = {}
    for path in folder.parent.iterdir():
        # Another may remove it meanwhile.
        with suppress(FileNotFoundError):
            if path.is_dir():
                ages[path] = _touched(path)
    finished = [path for path in ages if (path / RUNS.parent / _FINISHED).exists()]
    old = sorted(finished, key=lambda path: ages[path], reverse=True)[keep:]
    lost = [
        path
        for path, touched in ages.items()
        if path not in finished and time.time() - touched > _ABANDONED_SECONDS
    ]
    for path in [*old, *lost]:
        remove(home, path)
        removed.append(path.name)
    return sorted(removed)


def remove(home: Path, folder: Path) -> None:
    """Remove a workspace, whatever state it is in."""
    while folder.exists():
        # Another may be removing it, too: of what it took first, the rest is to go.
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
    run_git(home, "worktree", "prune")


def mend(home: Path) -> None:
    """Forget worktrees that a killed git has left half-made: beside them it fetches nothing."""
    place = home / run_git(home, "rev-parse", "--git-path", "worktrees").strip()
    for head in place.glob("*/HEAD"):
        # One that is being made has no commit for a moment either.
        unborn = not head.read_text(encoding="utf-8").strip("0\n")
        if unborn and time.time() - head.stat().st_mtime > _UNBORN_SECONDS:
            shutil.rmtree(head.parent, ignore_errors=True)


def refuse_unknown(conf: Mapping[str, Any], fields: Collection[str]) -> None:
    """Refuse a run's conf with names that no field has: the run would go on without them.

    Raises:
        UserError: it names them, and those that there are.
    """
    if unknown := conf.keys() - set(fields):
        names = ", ".join(sorted(unknown))
        raise UserError(f"unknown in conf: {names}; there are {', '.join(fields)}")


def write_params(path: Path, home: Path, changes: Mapping[str, Any]) -> None:
    """Change some settings of a params.yaml, comments stay.

    Args:
        path: of the file.
        home: against which a relative path of files, or of an SQLite database, is taken.
        changes: dotted keys and values; None = no change.

    Raises:
        UserError: a key is unknown or a value not valid.
    """
    from ruamel.yaml import YAML

    from pipelines.config import load_params, read_settings

    # What is wrong with the file is told as every command tells it.
    read_settings(path)
    yaml = YAML()
    yaml.preserve_quotes = True
    # What is not changed is written as it was, so that a comparison shows what is.
    yaml.width = 4096
    yaml.indent(sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    settings = yaml.load(path.read_text(encoding="utf-8"))
    if settings is None:
        settings = {}
    for key, value in changes.items():
        if value is not None:
            _change(settings, path, key, value)
    # Only of what is valid it is known where the addresses are.
    _dump(yaml, settings, path)
    load_params(path)
    files = (settings.get("ingest") or {}).get("files") or {}
    for name in ("path", "users", "items"):
        given = files.get(name)
        if given and "://" not in given and not Path(given).is_absolute():
            files[name] = str(home / given)
    database = (settings.get("ingest") or {}).get("database") or {}
    if url := database.get("url"):
        database["url"] = anchor_address(url, home)
    _dump(yaml, settings, path)


def _change(settings: Any, path: Path, key: str, value: Any) -> None:
    """Set a dotted key in the content of a file."""
    first, _, rest = key.partition(".")
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a mapping with {first}, found {settings!r}")
    if not rest:
        settings[first] = value
        return
    # Whoever needs nothing else than the defaults may leave a section out.
    if settings.get(first) is None:
        settings[first] = {}
    _change(settings[first], path, rest, value)


def _dump(yaml: Any, settings: Any, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(settings, file)


def run_git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return what it printed.

    Raises:
        UserError: git failed; the line that tells why is in it.
    """
    git = shutil.which("git")
    if git is None:
        raise UserError("git is not installed; workspaces of runs need it")
    # A hook or a caller's variable must not lead git elsewhere, and DVC's hooks would check out
    # or push everything. How to log in to a remote is the caller's to say; nobody can be asked.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k in _LOGIN}
    done = subprocess.run(
        [git, "-c", f"core.hooksPath={os.devnull}", *arguments],
        cwd=folder,
        # In English, so that the line of the error is found among others.
        env={"GIT_TERMINAL_PROMPT": "0"} | clean | {"LANGUAGE": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        told = _find_error(done.stderr or done.stdout)
        shown = [argument for argument in arguments if argument != "--"][:2]
        raise UserError(f"git {' '.join(shown)} in {folder}: {told}")
    return done.stdout


def _find_error(text: str) -> str:
    """Return the line of git's message that says what is wrong; advice may follow on it."""
    lines = text.strip().splitlines() or ["no message"]
    marked = [n for n, line in enumerate(lines) if line.startswith(("fatal:", "error:"))]
    first = marked[0] if marked else len(lines) - 1
    # Of a remote that is not reached, the program that git asked has told why.
    if first and lines[first] == _NOT_READ:
        first -= 1
    return lines[first]


def _add(home: Path, folder: Path, commit: str) -> None:
    """Make a workspace; a half-made one is made anew. The caller marks it as ready."""
    remove(home, folder)
    top = Path(run_git(home, "rev-parse", "--show-toplevel").rstrip("\n"))
    # Its settings would be written to the repository's top, where no stage looks for them.
    if top.resolve() != home:
        raise UserError(f"{home}: runs need a git repository of their own; this one is {top}'s")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Forced twice, it takes the place of one that was killed while git was making it.
    options = ("--quiet", "--detach", "--force", "--force")
    run_git(home, "worktree", "add", *options, str(folder), commit)
    _share_cache(home, folder)
    (folder / RUNS.parent).mkdir(exist_ok=True)


def _reopen(folder: Path) -> bool:
    """Let a workspace count as one of a run that is not over; False where it is none."""
    marks = folder / RUNS.parent
    if not (marks / _READY).exists():
        return False
    # First, since an old one without the other mark is taken for lost.
    (marks / _READY).touch()
    (marks / _FINISHED).unlink(missing_ok=True)
    return True


def _unlock(folder: Path) -> None:
    """Remove the lock that a killed git has left; one task at a time acts in a workspace."""
    lock = run_git(folder, "rev-parse", "--git-path", "index.lock").strip()
    (folder / lock).unlink(missing_ok=True)


def _share_cache(home: Path, folder: Path) -> None:
    """Point a workspace at the checkout's cache and at what else is set for this machine alone."""
    from dvc.config import Config

    if not (home / ".dvc").is_dir():
        raise UserError(f"{home}: not a DVC project: no folder .dvc")
    theirs = Config(str(home / ".dvc"))
    with Config(str(folder / ".dvc")).edit("local") as ours:
        # DVC resolves relative paths when it reads, and makes them relative to the new place when
        # it writes; those of committed remotes would lead elsewhere from a workspace.
        ours.update(theirs.load_one("local"))
        ours["remote"] = theirs.load_one("repo")["remote"] | ours["remote"]
        ours["cache"]["dir"] = theirs["cache"].get("dir") or str(home / ".dvc/cache")


def _touched(folder: Path) -> float:
    """Return when a workspace was last marked; one that is being made has no mark yet."""
    marks = [folder / RUNS.parent / name for name in (_FINISHED, _READY)]
    found = [path for path in marks if path.exists()] or [folder]
    return max(path.stat().st_mtime for path in found)
