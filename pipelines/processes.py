"""Commands of orchestrated tasks: their output is passed on, and none outlives its task.

What a kill leaves behind, processes or a torn lock, is cleared away before the next one.

Imports nothing heavy: DAG files load this module many times a minute.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Final

# Set for a command and inherited by all that it starts, so that what outlives its task is found.
MARKER: Final = "FORECART_STAGE"


class Command:
    """One command at a time.

    Args:
        mark: of the task; a later attempt has the same.
    """

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._process: subprocess.Popen[str] | None = None

    def run(self, command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> int:
        """Run a command to its end and print what it prints.

        What an earlier, killed attempt left running is ended first: DVC would refuse to touch
        paths that it still holds.

        Returns:
            The exit code.
        """
        end_leftovers(self.mark)
        mend_lock(folder)
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=command_environment() | dict(variables) | {MARKER: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            for line in self._process.stdout or ():
                print(line, end="", flush=True)
            return self._process.wait()
        except BaseException:
            self.kill()
            self._process.wait()
            raise

    def kill(self) -> None:
        """End the command, its children too; safe in a signal handler, as it does not wait."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def end_leftovers(mark: str) -> None:
    """Kill every process that carries the mark, and wait until it is gone."""
    import psutil

    leftovers = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARKER) == mark:
                print(f"ending process {process.pid} of an earlier attempt", flush=True)
                process.kill()
                leftovers.append(process)
    psutil.wait_procs(leftovers, timeout=10)


def mend_lock(folder: Path) -> None:
    """Clear DVC's table of who reads and writes what of what a kill has left in it.

    DVC writes it in place, and refuses all work in a project where it cannot be read. Entries of
    processes that are gone it drops where they are in the way, but not once another process has
    the number, as happens soon in a restarted container: that one it would wait for in vain.
    """
    table = folder / ".dvc/tmp/rwlock"
    if not _is_torn(table) and not _find_mistaken(table):
        return
    from dvc.lock import LockError, make_lock

    # Torn, or being written: by nobody who does not hold this. Whoever holds it goes on.
    guard = make_lock(str(table.with_name("rwlock.lock")), tmp_dir=str(table.parent))
    with suppress(LockError), guard:
        if _is_torn(table):
            print(f"removing {table}, which a killed process left half written", flush=True)
            table.unlink()
        elif mistaken := _find_mistaken(table):
            numbers = ", ".join(str(entry["pid"]) for entry in mistaken)
            print(f"removing {numbers} from {table}: other processes by now", flush=True)
            _drop(table, mistaken)


def _is_torn(table: Path) -> bool:
    try:
        json.loads(table.read_bytes())
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def _find_mistaken(table: Path) -> list[dict[str, Any]]:
    """Return a table's entries whose number is another process's by now.

    That one began after the table was last written, and has other arguments: where the clock was
    set, the one that is entered seems to have begun later, too, and it fails at its end where its
    entry is gone. An entry of no process here may be of another machine that shares the folder.
    """
    try:
        written = table.stat().st_mtime
        content = json.loads(table.read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    found: list[dict[str, Any]] = []
    for entry in chain(content.get("write", {}).values(), *content.get("read", {}).values()):
        if entry not in found and _is_another(entry, written):
            found.append(entry)
    return found


def _is_another(entry: dict[str, Any], written: float) -> bool:
    import psutil

    # They follow on a path, which need not be what the process was started by.
    arguments = entry["cmd"].partition(" ")[2]
    with suppress(psutil.Error):
        process = psutil.Process(entry["pid"])
        begun_later = process.create_time() > written
        return begun_later and not " ".join(process.cmdline()).endswith(arguments)
    return False


def _drop(table: Path, entries: list[dict[str, Any]]) -> None:
    """Write a table without some entries; the caller holds its guard."""
    from pipelines.io import write_json

    content = json.loads(table.read_bytes())
    writes = content.get("write", {}).items()
    reads = content.get("read", {}).items()
    left = {path: [one for one in readers if one not in entries] for path, readers in reads}
    content = {
        "write": {path: writer for path, writer in writes if writer not in entries},
        "read": {path: readers for path, readers in left.items() if readers},
    }
    write_json(table, content)


def command_environment() -> dict[str, str]:
    """This process's environment, with the commands of its interpreter first on the path."""
    binaries = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": os.pathsep.join(filter(None, [binaries, os.environ.get("PATH")])),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }
