"""Ends the waiting for a database that does not answer: drivers wait without end by themselves.

A server that is stopped, or a network that swallows what is sent, keeps connections open and says
nothing in them. What an address says itself, such as ``?connect_timeout=10``, is left as it is.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Engine, event

if TYPE_CHECKING:
    import psycopg

# Until a connection is there, until a server says anything, and until one of the pool is free.
CONNECT_SECONDS: Final = 3
READ_SECONDS: Final = 5
POOL_SECONDS: Final = 5

_SOCKET: Final = {
    "connect_timeout": CONNECT_SECONDS,
    "read_timeout": READ_SECONDS,
    "write_timeout": READ_SECONDS,
}
# By driver, in the driver's own words. psycopg knows none for reading: see `_wait_in_time`.
_ARGUMENTS: Final[dict[str, dict[str, int]]] = {
    "psycopg": {"connect_timeout": CONNECT_SECONDS},
    "psycopg2": {"connect_timeout": CONNECT_SECONDS},
    "pymysql": _SOCKET,
    "mysqldb": _SOCKET,
}


def plan_waiting(url: Any) -> dict[str, Any]:
    """Return the options of ``create_engine`` that bound how long a server is waited for.

    Args:
        url: of SQLAlchemy. SQLite has no server.
    """
    if url.get_backend_name() == "sqlite":
        return {}
    arguments = _ARGUMENTS.get(url.get_driver_name(), {})
    left = {name: value for name, value in arguments.items() if name not in url.query}
    return {"connect_args": left, "pool_timeout": POOL_SECONDS}


def bound_statements(engine: Engine) -> None:
    """Bound how long PostgreSQL works on a statement, and how long its driver waits for it."""
    if engine.dialect.name != "postgresql":
        return
    if "statement_timeout" not in str(engine.url.query.get("options", "")):
        # For the transaction alone: a pooler may give the session to somebody else.
        event.listen(engine, "begin", _set_timeout)
    if engine.dialect.driver == "psycopg":
        event.listen(engine, "do_connect", _connect)


def _set_timeout(connection: Connection) -> None:
    # What waits for a lock would go on there though nobody waits for it here any more.
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {READ_SECONDS * 1000}")


def _connect(_dialect: Any, _record: Any, arguments: Any, parameters: Any) -> Any:
    return _make_connection().connect(*arguments, **parameters)


@cache
def _make_connection() -> type[psycopg.Connection[Any]]:
    """Return psycopg's connection, with an end to its waiting."""
    # Here, since a store in SQLite needs no driver.
    import psycopg

    class Connection(psycopg.Connection[Any]):
        def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
            return super().wait(_wait_in_time(self, gen), *arguments, **options)

    return Connection


def _wait_in_time(connection: psycopg.Connection[Any], steps: Any) -> Generator[Any, Any, Any]:
    """Take psycopg's steps, each of which waits for the server, until it is silent for too long.

    psycopg looks ten times a second whether it is to go on, and says then that nothing is ready.
    """
    from psycopg import OperationalError

    until = time.monotonic() + READ_SECONDS
    try:
        awaited = next(steps)
        while True:
            ready = yield awaited
            if ready:
                until = time.monotonic() + READ_SECONDS
            elif time.monotonic() > until:
                # Or rolling back would wait as long again.
                connection.pgconn.finish()
                raise OperationalError(f"the server said nothing for {READ_SECONDS} seconds")
            awaited = steps.send(ready)
    except StopIteration as end:
        return end.value
