"""Reading and writing artefacts: atomic, deterministic, quiet where nobody looks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError

T = TypeVar("T")

# What DuckDB may hold of events before it spills: by default it takes most of the machine's memory,
# where others work, too, and is no faster for it.
DUCKDB_MEMORY = "4GB"

_CHUNK = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LOOK_SECONDS = 0.02  # between two looks whether a lock is free

# A spreadsheet takes a cell that begins like this for a formula, unless it is a plain number.
# The signs of full width (U+FF1D and so on) are the same to some.
_FORMULA = re.compile(r"\s*(?![+-]?[\d.]+$)[=+\-@\t\r\n|%\uff1d\uff0b\uff0d\uff20]")


def take_lock(handle: int, *, seconds: float = 0.0) -> bool:
    """Lock an open file against all others; the lock ends with its holder, also with a killed one.

    Args:
        handle: of the file.
        seconds: how long another holder is waited for.

    Returns:
        False where another one still holds it.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(_LOOK_SECONDS)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a sibling path to write to; rename it over ``path`` when the block succeeds.

    A reader therefore sees the old file or the whole new one, also after a kill.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this thread alone: another one may write the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def spill_to(folder: Path) -> Iterator[Path]:
    """Make a folder for what does not fit into memory; it goes at the end.

    Its name is fixed, so that what a killed run left is found again. In the project and not where
    temporary files go: that is memory itself on many systems.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yield an empty sibling directory; put it in place of ``path`` when the block succeeds.

    What a killed predecessor left is removed first. Between removing the old directory and
    the rename there is a moment with neither, never one with a mixture.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys sorted, so that equal values give equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that writes it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deep") from None


def say_count(number: int, noun: str) -> str:
    """Say how many there are, ``noun`` being the word for one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def guard_cells(cells: Iterable[str | None]) -> list[str | None]:
    """Keep spreadsheets from running texts as formulas: such a text gets a leading apostrophe.

    That is what OWASP advises against CSV injection. Numbers stay as they are.
    """
    return [f"'{cell}" if cell and _FORMULA.match(cell) else cell for cell in cells]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically (zstd)."""
    with replace_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def is_digest(value: Any) -> bool:
    """Tell whether a value, of a file that anybody can edit, is a digest."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def digest_file(path: Path) -> str:
    """Return ``sha256:<hex>`` of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def digest_directory(path: Path, pattern: str = "*") -> str:
    """Return ``sha256:<hex>`` over the relative names and contents of a directory's files.

    Args:
        path: the directory.
        pattern: which files of it and of the folders below count, by name.

    Raises:
        UserError: the directory is missing or empty.
    """
    files = sorted(p for p in path.rglob(pattern) if p.is_file()) if path.is_dir() else []
    if not files:
        raise UserError(f"{path}: no such directory, or it is empty")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        digest.update(digest_file(file).encode() + b"\0")
    return f"sha256:{digest.hexdigest()}"


def progress(
    iterable: Iterable[T], desc: str, *, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Iterate with a progress bar on standard error; silent when that is no terminal."""
    from tqdm import tqdm

    bar: Iterator[T] = iter(
        tqdm(
            iterable,
            desc=desc,
            total=total,
            unit=unit,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=False,
        )
    )
    return bar
