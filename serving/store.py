"""Where collected events and profiles are kept: SQLite by default, else PostgreSQL or MariaDB.

What `append` has returned is committed, with SQLite to the file that has the store's name: one that
was moved away or deleted meanwhile would take it along. Events are known by their id: storing one
again changes nothing, so that a client may send again what it had no answer for.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    insert,
    select,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)

from pipelines.address import STORE_VARIABLE, anchor_address, parse_address
from pipelines.errors import UserError
from pipelines.events import EVENT_SCHEMA, MAX_ID_LENGTH, MAX_QUERY_LENGTH, USER_SCHEMA
from serving.stalls import CONNECT_SECONDS, bound_statements, plan_waiting

_EXAMPLE: Final = "sqlite:////whole/path/to/events.db"

_CHUNK: Final = 500  # ids in one query; SQLite allows some tens of thousands of parameters

_METADATA: Final = MetaData()
# MySQL compares texts by letter, not by byte, unless told; ids differ by case.
_ID: Final = String(MAX_ID_LENGTH).with_variant(
    mysql.VARCHAR(MAX_ID_LENGTH, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)
_QUERY: Final = String(MAX_QUERY_LENGTH).with_variant(
    mysql.VARCHAR(MAX_QUERY_LENGTH, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)
_TYPES: Final[dict[str, Any]] = {
    "ts": BigInteger,
    "price": Double,
    "quantity": Double,
    "query": _QUERY,
    "age": Double,
    "signup_ts": BigInteger,
}


def _number() -> Column[int]:
    """Return the key that tells the order of arrival."""
    kind = BigInteger().with_variant(Integer, "sqlite")
    return Column("number", kind, primary_key=True, autoincrement=True)


# Times are microseconds since the epoch, which all databases keep exactly. `number` tells the
# order of arrival, so that a reader sees at once whether anything has come.
EVENTS: Final = Table(
    "events",
    _METADATA,
    _number(),
    *(
        Column(f.name, _TYPES.get(f.name, _ID), nullable=f.nullable, unique=f.name == "event_id")
        for f in EVENT_SCHEMA
    ),
    Index("events_by_user", "user_id", "ts"),
    mysql_charset="utf8mb4",
    # Numbers are never given twice, also after the last events were erased.
    sqlite_autoincrement=True,
)
_COLUMNS: Final = tuple(f.name for f in EVENT_SCHEMA)

# A profile that is told anew gets a new number, by which a reader sees the change.
PROFILES: Final = Table(
    "profiles",
    _METADATA,
    _number(),
    *(
        Column(f.name, _TYPES.get(f.name, _ID), nullable=f.nullable, unique=f.name == "user_id")
        for f in USER_SCHEMA
    ),
    mysql_charset="utf8mb4",
    sqlite_autoincrement=True,
)
_TRIES: Final = 20
# Less than a caller waits (serving.errands), so that no thread waits for nobody.
_BUSY_MS: Final = 6_000
_DEADLOCK: Final = 1213  # ER_LOCK_DEADLOCK


@dataclass(frozen=True, kw_only=True)
class Erased:
    """What was deleted of a user.

    Attributes:
        events: how many.
        profile: whether there was one.
    """

    events: int
    profile: bool


def find_url() -> str:
    """Return the store's address, which FORECART_STORE names.

    There is no other: a server works in the folder of its code, which for a Bento is made anew with
    every model, and whatever was collected there would go with it.

    Raises:
        UserError: it names none, or a file in that folder.
    """
    url = os.environ.get(STORE_VARIABLE)
    if not url:
        raise UserError(f"nothing is collected here: set {STORE_VARIABLE}, such as {_EXAMPLE}")
    if anchor_address(url, Path("/")) != url:
        raise UserError(f"{STORE_VARIABLE}: the file needs its whole path, such as {_EXAMPLE}")
    return url


class Store:
    """Events in a database.

    Args:
        url: of SQLAlchemy; ``sqlite:///file``, ``postgresql://...``, ``mysql://...``.

    Raises:
        UserError: the address is none that SQLAlchemy knows.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = parse_address(url)
            self._path = _find_path(parsed)
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            # A connection that the server has closed is noticed before it is used.
            self.engine: Engine = create_engine(parsed, pool_pre_ping=True, **plan_waiting(parsed))
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, OSError) as error:
            raise UserError(f"{STORE_VARIABLE}: {error}") from None
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _set_durable)
        bound_statements(self.engine)
        # The file that the tables are in, of SQLite.
        self._opened: os.stat_result | None = None
        self._opening = threading.Lock()

    def create(self) -> None:
        """Create the tables that are missing."""
        # Before: of what takes the file's place meanwhile it is not known what is in it.
        file = None if self._path is None else _make_file(self._path)
        began = time.monotonic()
        for left in reversed(range(_TRIES)):
            try:
                _METADATA.create_all(self.engine)
                self._opened = file
                return
            except (OperationalError, ProgrammingError, IntegrityError):
                # Another one who opens the store has made a table since it was looked for; but
                # whoever is waited for in vain, as long as that takes, will not answer now either.
                is_late = time.monotonic() - began >= CONNECT_SECONDS - 0.5
                if not left or (is_late and self.engine.dialect.name != "sqlite"):
                    raise
                _pause()

    def append(self, events: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Store events in one transaction.

        Args:
            events: with the columns of the event schema, ``ts`` in microseconds, ``event_id`` set.

        Returns:
            For each whether it is new; what is returned is durable.
        """
        if not events:
            return []
        ids = [str(event["event_id"]) for event in events]
        rows = {
            event_id: {name: event.get(name) for name in _COLUMNS}
            for event_id, event in zip(ids, events, strict=True)
        }
        with self._change() as connection:
            known = self._find_known(connection, list(rows))
            fresh = [row for event_id, row in rows.items() if event_id not in known]
            if fresh:
                connection.execute(self._insert_new(), fresh)
        seen = set(known)
        new = []
        for event_id in ids:
            new.append(event_id not in seen)
            seen.add(event_id)
        return new

    def history(
        self, user_ids: Sequence[str], *, before: int, limit: int
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the latest events of some users, each user's in the order of time.

        Args:
            user_ids: who.
            before: microseconds; events at or after it are left out.
            limit: most events a user.
        """
        columns = [EVENTS.c[name] for name in _COLUMNS]
        found: dict[str, list[dict[str, Any]]] = {}
        with self._read() as connection:
            for user_id in dict.fromkeys(user_ids):
                query = (
                    select(*columns)
                    .where(EVENTS.c.user_id == user_id, EVENTS.c.ts < before)
                    .order_by(EVENTS.c.ts.desc(), EVENTS.c.event_id.desc())
                    .limit(limit)
                )
                rows = [dict(row._mapping) for row in connection.execute(query)]
                found[user_id] = rows[::-1]
        return found

    def keep_profile(self, user_id: str, profile: Mapping[str, Any]) -> None:
        """Store what is known of a user, in place of what was; returned means durable.

        Args:
            user_id: whose.
            profile: with the columns of the user schema, ``signup_ts`` in microseconds.
        """
        row = {f.name: profile.get(f.name) for f in USER_SCHEMA} | {"user_id": user_id}
        for left in reversed(range(_TRIES)):
            try:
                with self._change() as connection:
                    connection.execute(delete(PROFILES).where(PROFILES.c.user_id == user_id))
                    connection.execute(insert(PROFILES), row)
                return
            except (IntegrityError, OperationalError) as error:
                # Another writer told the same user's in the meantime.
                crossed = isinstance(error, IntegrityError) or _is_deadlock(error)
                if not crossed or not left:
                    raise
                _pause()

    def profiles(self, user_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return what is known of some users; of whom nothing is, is left out."""
        columns = [PROFILES.c[f.name] for f in USER_SCHEMA]
        found: dict[str, dict[str, Any]] = {}
        ids = list(dict.fromkeys(user_ids))
        with self._read() as connection:
            for low in range(0, len(ids), _CHUNK):
                query = select(*columns).where(PROFILES.c.user_id.in_(ids[low : low + _CHUNK]))
                for row in connection.execute(query):
                    found[row.user_id] = dict(row._mapping)
        return found

    def erase(self, user_id: str) -> Erased:
        """Delete everything about a user."""
        with self._change() as connection:
            events = connection.execute(delete(EVENTS).where(EVENTS.c.user_id == user_id))
            profiles = connection.execute(delete(PROFILES).where(PROFILES.c.user_id == user_id))
            erased = Erased(events=events.rowcount, profile=profiles.rowcount > 0)
        if self.engine.dialect.name == "sqlite":
            self._empty_log()
        return erased

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        self._follow()
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        """Begin a transaction; once this has ended, what it did is in the store.

        Raises:
            UserError: the file was exchanged meanwhile; what was done may have gone with it.
        """
        opened = self._follow()
        with self.engine.begin() as connection:
            yield connection
        if not self._is_named(opened):
            raise UserError(f"{STORE_VARIABLE}: {self._path}: exchanged while it was written")

    def _follow(self) -> os.stat_result | None:
        """Open the file anew where another one, or none, has taken its name; return which it is."""
        with self._opening:
            if not self._is_named(self._opened):
                self.engine.dispose()
                self.create()
            return self._opened

    def _is_named(self, file: os.stat_result | None) -> bool:
        """Return whether a file has the store's name; a server has no file."""
        if self._path is None:
            return True
        try:
            return file is not None and os.path.samestat(file, self._path.stat())
        except FileNotFoundError:
            return False

    def _empty_log(self) -> None:
        """Take out of SQLite's log of changes what was erased; a reader who needs it keeps it."""
        with suppress(OperationalError), self.engine.connect() as connection:
            # Not waiting for readers: the next erasure, or closing the store, does the same.
            connection.exec_driver_sql("PRAGMA busy_timeout=0")
            try:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.exec_driver_sql(f"PRAGMA busy_timeout={_BUSY_MS}")

    def _find_known(self, connection: Connection, ids: Sequence[str]) -> set[str]:
        known: set[str] = set()
        for low in range(0, len(ids), _CHUNK):
            query = select(EVENTS.c.event_id).where(EVENTS.c.event_id.in_(ids[low : low + _CHUNK]))
            known.update(connection.execute(query).scalars())
        return known

    def _insert_new(self) -> Any:
        """An insert that leaves alone what another writer stored in the meantime."""
        name = self.engine.dialect.name
        if name == "postgresql":
            return postgresql.insert(EVENTS).on_conflict_do_nothing()
        if name == "sqlite":
            return sqlite.insert(EVENTS).on_conflict_do_nothing()
        return insert(EVENTS).prefix_with("IGNORE")


def _find_path(url: Any) -> Path | None:
    """Return SQLite's file; None for a database in memory, or one that only SQLite can find."""
    name = str(url.database or "")
    if url.get_backend_name() != "sqlite" or name in ("", ":memory:") or name.startswith("file:"):
        return None
    return Path(name)


def _make_file(path: Path) -> os.stat_result:
    """Make SQLite's file where there is none, for its user alone, and return which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        # An existing one is not opened: closing it would end the locks that SQLite has on it.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    return path.stat()


def _is_deadlock(error: OperationalError) -> bool:
    """Return whether the server (MariaDB) ended one of two transactions that waited for another."""
    arguments: tuple[Any, ...] = getattr(error.orig, "args", ())
    return _DEADLOCK in arguments[:1]


def _set_durable(connection: Any, _record: Any) -> None:
    """Commit to the disk, and let readers and the writer go on side by side."""
    cursor = connection.cursor()
    # First: the next ones may have to wait for another one who opens it.
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    # What is deleted is overwritten.
    cursor.execute("PRAGMA secure_delete=ON")
    cursor.close()


def _pause() -> None:
    """Let another writer go first."""
    time.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - not a secret
