"""The store and the promotion lock on real PostgreSQL and MariaDB servers, killed under load."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from pipelines.config import Database
from pipelines.errors import UserError
from pipelines.events import to_us
from pipelines.registry import lock
from pipelines.sources.base import Kind
from pipelines.sources.database import DatabaseSource
from serving.stalls import CONNECT_SECONDS, READ_SECONDS
from serving.store import EVENTS, PROFILES, Store
from tests.integration.databases import Server, run_mariadb, run_postgres
from tests.serving.test_store import (
    make,
    test_a_profile_replaces_the_one_before,
    test_all_columns_come_back_as_they_were,
    test_an_erased_user_is_gone_and_no_one_else,
    test_an_event_is_stored_once,
    test_history_is_the_latest_before_in_order,
    test_profiles_of_one_user_told_side_by_side_leave_one,
    test_writers_side_by_side_store_each_event_once,
)

# The suite of the store, run here on servers.
__all__ = [
    "test_a_profile_replaces_the_one_before",
    "test_all_columns_come_back_as_they_were",
    "test_an_erased_user_is_gone_and_no_one_else",
    "test_an_event_is_stored_once",
    "test_history_is_the_latest_before_in_order",
    "test_profiles_of_one_user_told_side_by_side_leave_one",
    "test_writers_side_by_side_store_each_event_once",
]

NOON = 1_750_000_000_000_000
RUN = {"postgres": run_postgres, "mariadb": run_mariadb}


@pytest.fixture(scope="module", params=list(RUN))
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with RUN[request.param]() as running:
        yield running


@pytest.fixture
def store(server: Server) -> Iterator[Store]:
    opened = Store(server.url)
    EVENTS.drop(opened.engine, checkfirst=True)
    PROFILES.drop(opened.engine, checkfirst=True)
    opened.create()
    yield opened
    opened.close()


def test_ingest_reads_what_was_stored(store: Store, server: Server) -> None:
    store.append([make(f"e{i}", user=f"u{i}", ts=NOON + i, price=0.1) for i in range(5)])
    source = DatabaseSource(Database(url=server.url))
    rows = [row for batch in source.read(Kind.EVENTS) for row in batch.table.to_pylist()]
    assert [row["event_id"] for row in rows] == [f"e{i}" for i in range(5)]
    assert rows[4]["price"] == 0.1
    before = source.fingerprint()
    store.append([make("more", ts=NOON)])
    assert source.fingerprint() != before


def test_ingest_reads_the_profiles_that_were_told(store: Store, server: Server) -> None:
    store.append([make("e1", ts=NOON)])
    store.keep_profile("ann", {"age": 41.0, "region": "north", "signup_ts": NOON})
    source = DatabaseSource(Database(url=server.url))
    (batch,) = source.read(Kind.USERS)
    (row,) = batch.table.to_pylist()
    assert (row["user_id"], row["age"], row["gender"], row["region"]) == (
        "ann",
        41.0,
        None,
        "north",
    )
    assert to_us(row["signup_ts"]) == NOON
    before = source.fingerprint()
    store.keep_profile("ann", {"age": 42.0})
    assert source.fingerprint() != before


@pytest.fixture
def make_log(server: Server) -> Iterator[Callable[..., DatabaseSource]]:
    """Makes the table of somebody else's shop: its columns are who, at, cost, n and others."""
    engine = create_engine(server.url)

    def make_table(columns: str, *rows: str) -> DatabaseSource:
        with engine.begin() as connection:
            connection.execute(text(f"CREATE TABLE log ({columns})"))
            for row in rows:
                connection.execute(text(f"INSERT INTO log VALUES ({row})"))  # noqa: S608
        mapping = {"user_id": "who", "ts": "at", "event_type": {"value": "view"}}
        mapping |= {"price": "cost", "quantity": "n"}
        params = {"url": server.url, "events": "log", "mapping": mapping}
        return DatabaseSource(Database.model_validate(params))

    yield make_table
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS log"))
    engine.dispose()


def read(source: DatabaseSource) -> list[dict[str, Any]]:
    return [row for batch in source.read(Kind.EVENTS) for row in batch.table.to_pylist()]


def test_ingest_reads_every_digit_of_ids_and_amounts(
    make_log: Callable[..., DatabaseSource],
) -> None:
    source = make_log(
        "who NUMERIC(20, 2), at TIMESTAMP, cost NUMERIC(9, 2), n DOUBLE PRECISION",
        "9007199254740993, '2025-03-01 10:00:00', 1.50, 0.9166934251630467",
        "9007199254740992, '2025-03-01 10:00:00', 1.50, 0.1",
        "12.50, '2025-03-01 10:00:00', 1.50, 1e-12",
    )
    assert sorted((row["user_id"], row["price"], row["quantity"]) for row in read(source)) == [
        ("12.5", 1.5, 1e-12),
        ("9007199254740992", 1.5, 0.1),
        ("9007199254740993", 1.5, 0.9166934251630467),
    ]


@pytest.mark.parametrize("server", ["postgres"], indirect=True)
def test_ingest_takes_a_number_that_is_none_as_null(
    make_log: Callable[..., DatabaseSource],
) -> None:
    source = make_log(
        "who NUMERIC, at TIMESTAMP, cost NUMERIC, n INTEGER",
        "'NaN', '2025-03-01', 1, 1",
        "7, '2025-03-01', 'NaN', 1",
    )
    (batch,) = source.read(Kind.EVENTS)
    assert batch.anonymous == 1
    assert [(row["user_id"], row["price"]) for row in batch.table.to_pylist()] == [("7", None)]


@pytest.mark.parametrize("server", ["mariadb"], indirect=True)
def test_ingest_tells_ids_of_bytes_apart(make_log: Callable[..., DatabaseSource]) -> None:
    ids = ["fffe0000000000000000000000000001", "fffd0000000000000000000000000001"]
    rows = [f"0x{digits}, '2025-03-01', 1, 1" for digits in ids]
    source = make_log("who BINARY(16), at TIMESTAMP, cost DOUBLE, n INTEGER", *rows)
    assert sorted(row["user_id"] for row in read(source)) == sorted(ids)


def test_ingest_reads_a_table_with_a_column_that_has_no_order(
    make_log: Callable[..., DatabaseSource],
) -> None:
    rows = [f"""'u{i}', '2025-03-01', 1, 1, '{{"a": {i}}}'""" for i in (2, 1)]
    source = make_log("who CHAR(2), at TIMESTAMP, cost INTEGER, n INTEGER, note JSON", *rows)
    assert [row["user_id"] for row in read(source)] == ["u1", "u2"]
    assert source.fingerprint()["events"]["rows"] == 2


@pytest.mark.parametrize("server", ["postgres"], indirect=True)
@pytest.mark.parametrize("kind", ["TIMESTAMP", "TIMESTAMPTZ", "DATE"])
def test_ingest_refuses_the_row_of_a_time_without_end_alone(
    make_log: Callable[..., DatabaseSource], kind: str
) -> None:
    times = ["2025-03-01", "infinity", "-infinity", "0044-03-15 BC", "12025-03-01", "2025-03-02"]
    rows = [f"'u{i}', '{time}', 1, 1" for i, time in enumerate(times)]
    source = make_log(f"who TEXT PRIMARY KEY, at {kind}, cost INTEGER, n INTEGER", *rows)
    (batch,) = source.read(Kind.EVENTS)
    refused = batch.quarantined.to_pylist()
    assert [row["row"] for row in refused] == [2, 3, 4, 5]
    assert all(row["reason"].startswith("ts ") for row in refused)
    assert "infinity" in refused[0]["record"]
    assert [row["ts"].day for row in batch.table.to_pylist()] == [1, 2]


@pytest.mark.parametrize("server", ["postgres"], indirect=True)
def test_ingest_reads_times_whatever_style_a_server_writes_them_in(
    server: Server, make_log: Callable[..., DatabaseSource]
) -> None:
    rows = ["'ann', '2025-03-01 10:00:00.5+02', 1, 1", "'bob', '2025-08-01 10:00:00Z', 1, 1"]
    source = make_log("who TEXT PRIMARY KEY, at TIMESTAMPTZ, cost INTEGER, n INTEGER", *rows)
    engine = create_engine(server.url)
    styles = ("SET datestyle TO 'SQL, DMY'", "SET timezone TO 'Europe/London'")
    with engine.begin() as connection:
        for style in styles:
            connection.execute(text(f"ALTER ROLE forecart {style}"))
    try:
        found = [row["ts"].isoformat() for row in read(source)]
    finally:
        with engine.begin() as connection:
            connection.execute(text("ALTER ROLE forecart RESET ALL"))
        engine.dispose()
    assert found == ["2025-03-01T08:00:00.500000+00:00", "2025-08-01T10:00:00+00:00"]


def test_a_killed_server_loses_nothing_that_was_acknowledged(store: Store, server: Server) -> None:
    stop = threading.Event()
    acknowledged: list[str] = []

    def write(writer: int) -> None:
        number = 0
        while not stop.is_set():
            batch = [make(f"w{writer}-{number + i}") for i in range(10)]
            try:
                store.append(batch)
            except SQLAlchemyError:
                time.sleep(0.05)
                continue  # sent again, as a client does
            acknowledged.extend(event["event_id"] for event in batch)
            number += 10

    writers = [threading.Thread(target=write, args=(i,)) for i in range(3)]
    for writer in writers:
        writer.start()
    for _ in range(2):
        time.sleep(0.7)
        server.kill()
        server.start()
    time.sleep(0.5)
    stop.set()
    for writer in writers:
        writer.join(30)
    assert len(acknowledged) > 50
    kept = [e["event_id"] for e in store.history(["ann"], before=2**60, limit=10**6)["ann"]]
    assert len(kept) == len(set(kept))
    assert set(acknowledged) <= set(kept)


def test_a_stopped_server_is_given_up_and_taken_up_again(store: Store, server: Server) -> None:
    """What listens goes on, and says nothing."""
    store.append([make("a")])
    assert server.process is not None
    main = psutil.Process(server.process.pid)
    stopped = [*main.children(recursive=True), main]
    for process in stopped:
        process.suspend()
    began = time.monotonic()
    try:
        with pytest.raises(SQLAlchemyError):
            store.append([make("b")])
        assert time.monotonic() - began < 2 * READ_SECONDS + CONNECT_SECONDS + 2
    finally:
        for process in stopped:
            process.resume()
    assert store.append([make("a"), make("c")]) == [False, True]


def test_a_lock_that_is_kept_is_not_waited_for(store: Store) -> None:
    store.keep_profile("ann", {"age": 40.0})
    with store.engine.begin() as other:
        other.execute(PROFILES.update().values(age=41.0))
        began = time.monotonic()
        with pytest.raises(SQLAlchemyError):
            store.keep_profile("ann", {"age": 42.0})
        assert time.monotonic() - began < READ_SECONDS + 3
        if store.engine.dialect.name == "postgresql":
            # Nor does the server wait on for somebody who has gone; MariaDB has a limit by itself.
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            with store.engine.connect() as connection:
                assert connection.exec_driver_sql(waiting).scalar() == 0
    assert store.profiles(["ann"])["ann"]["age"] == 41.0
    store.keep_profile("ann", {"age": 43.0})
    assert store.profiles(["ann"])["ann"]["age"] == 43.0


HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from pipelines.registry.lock import hold_lock
with hold_lock(sys.argv[1], "model", Path(sys.argv[2])):
    print("taken", flush=True)
    time.sleep(60)
"""


def test_one_promoter_holds_the_lock_and_its_death_frees_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 0.5)
    command = [sys.executable, "-c", HOLD, server.url, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        with (
            pytest.raises(UserError, match="somebody else is promoting"),
            lock.hold_lock(server.url, "model", tmp_path),
        ):
            pass
        with lock.hold_lock(server.url, "another", tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 10.0)
    with lock.hold_lock(server.url, "model", tmp_path):
        pass
