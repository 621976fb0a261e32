"""The way to MLflow: the address, the client, and what ails them, in one line."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines.address import (
    REGISTRY,
    REGISTRY_VARIABLE,
    find_registry,
    hide_login,
    parse_address,
)
from pipelines.config import PARAMS_FILE, load_params
from pipelines.errors import UserError
from pipelines.io import spill_to

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PAUSES: Final = (0, 4, 8)  # seconds before a server is called again
_CALL_SECONDS: Final = 10  # that a call may take
# By the kind of database, what its drivers call the seconds until they give up.
_WAITS: Final = {
    "sqlite": "timeout",
    "postgresql": "connect_timeout",
    "mysql": "connect_timeout",
    "mariadb": "connect_timeout",
}
# What a gateway answers for a server that is not there.
_ABSENT: Final = (502, 503, 504)


def connect(root: Path) -> MlflowClient:
    """Return a client of the registry that MLFLOW_TRACKING_URI names, else the project's own.

    MLflow's address for the whole process stays as it is: setting it would set the environment
    variable too, and bind all projects of the process to one registry.

    Raises:
        UserError: MLflow cannot open it, or its server or database does not answer.
    """
    from mlflow import MlflowClient

    uri = prepare_registry(root)
    if uri.startswith(("http://", "https://")):
        _call(uri)
    elif uri.startswith(tuple(_WAITS)):
        _open(uri, root)
    with _telling(root):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def prepare_registry(root: Path) -> str:
    """Return MLflow's address; a local file of SQLite that is not there is made first.

    MLflow makes its tables in place, one by one. One that was killed meanwhile, or two at once,
    would leave a file with which no later one could go on.

    Raises:
        UserError: it cannot be made.
    """
    from sqlalchemy import make_url

    # A command says what it did; that MLflow creates its tables is not news.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # What ails the database is raised, too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    uri = find_registry(root)
    if not uri.startswith("sqlite"):
        return uri
    with _telling(root):
        url = make_url(uri)
        # One in memory has no name, and one that begins so has SQLite's own form.
        if not url.database or url.database.startswith((":memory:", "file:")):
            return uri
        # A link leads to where the file is to be.
        path = Path(url.database).resolve()
        if not _is_made(path):
            with hold_alone(path.with_name(f"{path.name}.lock")):
                if not _is_made(path):
                    _make_database(url.drivername, path)
    return uri


def _is_made(path: Path) -> bool:
    # SQLite makes an empty file before it writes to it.
    return path.exists() and path.stat().st_size > 0


def _make_database(driver: str, path: Path) -> None:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # What SQLite keeps beside a file is in the folder, too, and goes with it after a kill.
    with spill_to(path.with_name(f"{path.name}.partial")) as folder:
        partial = f"{driver}:///{folder / path.name}"
        store = SqlAlchemyStore(partial, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        # Whoever opened it by this name would look for it there.
        store.engine.dispose()
        (folder / path.name).replace(path)


@contextmanager
def _telling(root: Path) -> Iterator[None]:
    """Tell in one line what MLflow, its database or the system says against an address."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise UserError(f"{_name_address(root)}: {tell(error)}") from None
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        told = f"{file}{error.strerror or tell(error)}"
        raise UserError(f"{_name_address(root)}: {told}") from None


def _name_address(root: Path) -> str:
    """Return what names the registry: the variable, or the project's own file."""
    given = os.environ.get(REGISTRY_VARIABLE)
    return REGISTRY_VARIABLE if given else str(root.resolve() / REGISTRY)


@contextmanager
def hold_alone(path: Path) -> Iterator[None]:
    """Hold a lock on a file; it ends with its holder, also with a killed one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _call(uri: str) -> None:
    """Wait for an MLflow server, some ten seconds where nothing answers.

    MLflow itself tries for four minutes before it says anything. That is left as it is for the
    requests that follow: a training of hours should outlive an outage. A variable of the
    environment would reach it, through `forecart run` and the orchestrator.

    Raises:
        UserError: nothing answers.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=len(_PAUSES),
            backoff_factor=2,
            backoff_jitter=0,
            retry_codes=_ABSENT,
            raise_on_status=False,
            timeout=_CALL_SECONDS,
            respect_retry_after_header=False,
        )
    except MlflowException as error:
        raise UserError(f"MLFLOW_TRACKING_URI: {hide_login(uri)}: {_tell_cause(error)}") from None
    # Any other answer will do; whether it is a good one is for the requests that follow.
    if answer.status_code in _ABSENT:
        told = f"answers {answer.status_code} {answer.reason}"
        raise UserError(f"MLFLOW_TRACKING_URI: {hide_login(uri)}: {told}")


def _open(uri: str, root: Path) -> None:
    """Open MLflow's database once; a server may be starting, and is tried as often as ``_call``.

    MLflow itself tries for two minutes before it says anything, also where a file is no database.

    Raises:
        UserError: it cannot be opened.
    """
    import sqlalchemy as sa
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    try:
        kind = parse_address(uri).get_backend_name()
        engine = sa.create_engine(
            uri, poolclass=sa.pool.NullPool, connect_args={_WAITS[kind]: _CALL_SECONDS}
        )
        # SQLite opens a file when it is first read.
        question = sa.text("PRAGMA schema_version" if kind == "sqlite" else "SELECT 1")
        for pause in () if kind == "sqlite" else _PAUSES:
            try:
                with engine.connect() as database:
                    database.execute(question)
                return
            except OperationalError:
                time.sleep(pause)
        with engine.connect() as database:
            database.execute(question)
    except (SQLAlchemyError, ImportError) as error:
        given = f": {hide_login(uri)}" if os.environ.get(REGISTRY_VARIABLE) else ""
        raise UserError(f"{_name_address(root)}{given}: {_tell_cause(error)}") from None


def explain(error: Exception, root: Path) -> str | None:
    """Tell in one line what ails MLflow or its database or server.

    Args:
        error: that an act ended with.
        root: the project's folder.

    Returns:
        The address and the cause; None where the error is of another kind, or not MLflow's.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import DatabaseError

    # Other libraries have databases and servers of their own.
    passed = traceback.walk_tb(error.__traceback__)
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in passed)
    raised = isinstance(error, (DatabaseError, sqlite3.DatabaseError, RequestException))
    if not isinstance(error, MlflowException) and not (
        raised and any(name.startswith("mlflow.") for name in modules)
    ):
        return None
    return f"MLflow at {hide_login(find_registry(root))}: {_tell_cause(error)}"


def _tell_cause(error: BaseException) -> str:
    """Return what the machine said of it, where it did, else what the library says."""
    first = error
    while (under := error.__cause__ or error.__context__) is not None:
        error = under
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return tell(error if isinstance(error, (OSError, sqlite3.Error)) else first)


def read_name(root: Path) -> str:
    """Return the name under which models are registered."""
    return load_params(root / PARAMS_FILE).package.name


def open_registry(root: Path) -> tuple[MlflowClient, str]:
    """Return the registry and the name in it; where no project is, none is made.

    Raises:
        UserError: the folder is no project's, or MLflow cannot open the registry.
    """
    name = read_name(root)
    return connect(root), name


def name_registry(registry: MlflowClient) -> str:
    """Return a registry's address for people, without a password."""
    return hide_login(str(registry.tracking_uri))


def tell(error: BaseException) -> str:
    """Return the first line of what a library says."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
