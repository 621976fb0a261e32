"""One promoter at a time, whichever machine it runs on.

Whoever changes the champion holds a lock of the tracking database meanwhile: an advisory lock of
PostgreSQL or MySQL, or a lock on a file beside an SQLite database. All of them end with their
holder, also with a killed one, so that there is none to clean up. Behind a tracking server
(http) the database is out of reach: there a file of the git repository is locked, which keeps the
promoters of one checkout and its workspaces apart, and the comparison with the verdict's champion
has to do for others.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import make_url

from pipelines.errors import UserError
from pipelines.io import take_lock

_WAIT_SECONDS: Final = 20.0
_PAUSE_SECONDS: Final = 0.1
_FOLDER: Final = Path(".forecart")


@contextmanager
def hold_lock(tracking_uri: str, name: str, root: Path) -> Iterator[None]:
    """Hold the lock of a registered model.

    Args:
        tracking_uri: of the registry.
        name: of the registered model.
        root: the project's folder.

    Raises:
        UserError: somebody else held it for longer than promotions take.
    """
    kind = tracking_uri.partition(":")[0]
    if kind.startswith("sqlite"):
        # Whichever link leads to it, the file is one.
        file = Path(make_url(tracking_uri).database or "mlflow.db").resolve()
        with _hold_file(file.with_name(f"{file.name}-{name}.lock"), name):
            yield
    elif kind.startswith(("postgresql", "mysql", "mariadb")):
        with _hold_database(tracking_uri, name):
            yield
    else:
        with _hold_file(_find_repository(root) / f"forecart-{name}.lock", name):
            yield


def _find_repository(root: Path) -> Path:
    """Return the folder that all worktrees of a checkout share, where there is no git its own."""
    git = shutil.which("git")
    if git is not None:
        # A hook's variables would lead git elsewhere.
        clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        done = subprocess.run(
            [git, "rev-parse", "--git-common-dir"],
            cwd=root,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return root / done.stdout.strip()
    return root / _FOLDER


@contextmanager
def _hold_file(path: Path, name: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not take_lock(handle, seconds=_WAIT_SECONDS):
            raise _explain(name)
        yield
    finally:
        os.close(handle)


@contextmanager
def _hold_database(uri: str, name: str) -> Iterator[None]:
    import sqlalchemy as sa

    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    engine = sa.create_engine(uri, poolclass=sa.pool.NullPool)
    is_postgres = engine.dialect.name == "postgresql"
    take = sa.select(
        sa.func.pg_try_advisory_lock(number)
        if is_postgres
        else sa.func.get_lock(f"forecart {number}", 0)
    )
    with engine.connect() as connection:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not connection.execute(take).scalar():
            if time.monotonic() > deadline:
                raise _explain(name)
            time.sleep(_PAUSE_SECONDS)
        # The lock ends with the connection.
        yield


def _explain(name: str) -> UserError:
    return UserError(f"somebody else is promoting {name} at this moment; try again later")
