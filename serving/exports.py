"""Erases a shopper from what was written for other people: scores, and CSV files made of them.

FORECART_EXPORTS names them: folders of scores (data/scores of a project) and CSV files.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TextIO

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.io import guard_cells, replace_file, take_lock, write_table

EXPORTS_VARIABLE: Final = "FORECART_EXPORTS"

_USER: Final = "user_id"
# Beside a folder of scores: its chunks while it is made, and the lock of who makes it.
_PARTIAL: Final = ".scores"
_DESCRIPTION: Final = "_scores.json"

# How long another one who writes is waited for.
_WAIT_SECONDS: Final = 3.0


def find_exports() -> list[Path]:
    """Return the folders and files that FORECART_EXPORTS names.

    Raises:
        UserError: one of them from the folder that is worked in. A server works in that of its
            code, where there are none, and who is erased would stay in them unseen.
    """
    names = os.environ.get(EXPORTS_VARIABLE, "").split(os.pathsep)
    exports = [Path(name) for name in names if name]
    for path in exports:
        if not path.is_absolute():
            raise UserError(f"{EXPORTS_VARIABLE}: {path}: it needs its whole path")
    return exports


def erase_exported(exports: Sequence[Path], user_id: str) -> int:
    """Remove a user from exports; what is not there holds nobody.

    Args:
        exports: folders of scores, CSV files.
        user_id: whom.

    Returns:
        How many rows that were.

    Raises:
        UserError: scores are being written, and nothing was removed from them; or a file is no CSV.
            From all others they were removed.
    """
    count = 0
    problems = []
    for path in exports:
        try:
            count += _erase(path, user_id)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return count


def _erase(path: Path, user_id: str) -> int:
    if path.is_file():
        try:
            # What a link names, and not the link, whose place the file would take.
            return _erase_lines(path.resolve(), user_id)
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path.name}: no CSV file ({error})") from None
    if path.is_dir() or (path.parent / _PARTIAL).is_dir():
        with _keep_from_scoring(path.parent / _PARTIAL):
            return _erase_rows(path, user_id)
    return 0


def _erase_rows(folder: Path, user_id: str) -> int:
    """Rewrite the Parquet files that hold a user, those of an interrupted run too."""
    count = 0
    for file in [*folder.glob("*.parquet"), *(folder.parent / _PARTIAL).glob("*/*.parquet")]:
        found = pq.read_table(file, columns=[_USER], filters=[(_USER, "==", user_id)]).num_rows
        if found:
            table = pq.read_table(file)
            mode = file.stat().st_mode
            write_table(file, table.filter(pc.not_equal(table[_USER], user_id)))
            file.chmod(mode)
            count += found
    description = folder / _DESCRIPTION
    if count and description.exists():
        # Whoever shows the scores reads them again when this has changed.
        description.touch()
    return count


def _erase_lines(path: Path, user_id: str) -> int:
    """Rewrite a CSV file without a user's lines."""
    names = {user_id, *guard_cells([user_id])}
    count = 0
    with _open_alone(path) as source, replace_file(path) as partial:
        read: list[str] = []
        lines = csv.reader(_note(source, read))
        # Spreadsheets put a mark of the order of bytes before it.
        head = [name.removeprefix("\ufeff").strip('"') for name in next(lines, [])]
        if head and _USER not in head:
            raise UserError(f"{path.name}: no column {_USER}; columns are parted by commas")
        column = head.index(_USER) if head else 0
        with partial.open("w", newline="", encoding="utf-8") as target:
            shutil.copymode(path, partial)
            # As they were written, quotes and all.
            target.writelines(read)
            read.clear()
            for line in lines:
                if column < len(line) and line[column] in names:
                    count += 1
                else:
                    target.writelines(read)
                read.clear()
    return count


def _note(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    """Yield lines, and note which ones were."""
    for line in lines:
        read.append(line)
        yield line


@contextmanager
def _open_alone(path: Path) -> Iterator[TextIO]:
    """Open a file that others replace as well, one after the other."""
    while True:
        with path.open(newline="", encoding="utf-8") as file:
            _lock(file.fileno())
            # Who held it before has put another one in its place.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


@contextmanager
def _keep_from_scoring(folder: Path) -> Iterator[None]:
    """Keep `forecart score` from writing meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    """Lock a file: another erasure ends soon, and is waited for.

    Raises:
        UserError: it is held for longer.
    """
    if not take_lock(handle, seconds=_WAIT_SECONDS):
        raise UserError("the exports are being written; erase again when that has ended")
