"""Events from SQL tables: those that the service stores, and those of others."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from pipelines.address import STORE_VARIABLE
from pipelines.config import ColumnMapping, Database
from pipelines.errors import UserError
from pipelines.sources.base import Kind
from pipelines.sources.database import DatabaseSource
from serving.collect import parse_event
from serving.store import Store

CLOCK = datetime(2025, 4, 1, tzinfo=UTC)

EVENTS: list[dict[str, Any]] = [
    {"user_id": "ann", "event_type": "view", "ts": "2025-03-01T12:00:00.123456Z", "price": 1.5},
    {"user_id": "bob", "event_type": "search", "ts": "2025-03-02T00:00:00Z", "query": "red"},
    {"user_id": "ann", "event_type": "purchase", "ts": "2025-02-01T00:00:00Z", "quantity": 2},
]


def collect(path: Path, events: list[dict[str, Any]]) -> str:
    url = f"sqlite:///{path}"
    store = Store(url)
    store.create()
    rows = [row for row, _ in (parse_event(event, CLOCK) for event in events) if row]
    assert all(store.append(rows))
    store.close()
    return url


def read(source: DatabaseSource, kind: Kind = Kind.EVENTS) -> list[dict[str, Any]]:
    return [row for batch in source.read(kind) for row in batch.table.to_pylist()]


def test_what_the_service_stored_is_read_as_it_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORE_VARIABLE, collect(tmp_path / "events.db", EVENTS))
    found = read(DatabaseSource(Database()))
    assert [row["user_id"] for row in found] == ["ann", "bob", "ann"]
    for row, sent in zip(found, EVENTS, strict=True):
        assert row["ts"] == datetime.fromisoformat(sent["ts"])
        assert row["event_type"] == sent["event_type"]
        assert (row["price"], row["query"]) == (sent.get("price"), sent.get("query"))
    assert len({row["event_id"] for row in found}) == 3


def test_what_is_added_or_deleted_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    source = DatabaseSource(Database(url=collect(path, EVENTS[:2])))
    first = source.fingerprint()
    assert source.fingerprint() == first
    collect(path, EVENTS[2:])
    second = source.fingerprint()
    assert second != first
    Store(f"sqlite:///{path}").erase("bob")
    assert source.fingerprint() not in (first, second)


def make_log(path: Path, *rows: tuple[Any, ...], columns: str | None = None) -> DatabaseSource:
    """Make a table of somebody else's shop."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        columns = (
            columns or "id INTEGER PRIMARY KEY, who TEXT, at DATETIME, cost NUMERIC, n INTEGER"
        )
        connection.execute(text(f"CREATE TABLE log ({columns}, note TEXT)"))
        for row in rows:
            marks = ", ".join("?" * len(row))
            connection.exec_driver_sql(f"INSERT INTO log VALUES ({marks}, 'x')", row)  # noqa: S608
    mapping = {"user_id": "who", "ts": "at", "event_type": {"value": "view"}}
    mapping |= {"price": "cost", "quantity": "n"}
    return DatabaseSource(
        Database.model_validate({"url": f"sqlite:///{path}", "events": "log", "mapping": mapping})
    )


def change(path: Path, statement: str) -> None:
    with create_engine(f"sqlite:///{path}").begin() as connection:
        connection.execute(text(statement))


def test_values_that_do_not_suit_their_column_cost_their_row_alone(tmp_path: Path) -> None:
    at = "2025-03-01 10:00:00.000000"
    source = make_log(
        tmp_path / "shop.db",
        (1, "ann", at, 9.5, 1),
        (2, "ann", "gestern", 9.5, 1),
        (3, "ann", at, "teuer", 1),
        (4, "ann", at, 9.5, "zwei"),
        (5, 17.0, "2025-03-01", "9.5", 2.5),
        (6, None, 3, b"\xff", b"\xff"),
        (7, "ann", 1740823200, 9, 1),
    )
    (batch,) = source.read(Kind.EVENTS)
    found = [(row["row"], row["reason"]) for row in batch.quarantined.to_pylist()]
    assert found == [
        (2, "ts cannot be read"),
        (3, "price is not a number"),
        (4, "quantity is not a number"),
        (7, "ts cannot be read"),
    ]
    assert (batch.rows, batch.anonymous) == (7, 1)
    assert '"at":"gestern"' in batch.quarantined.column("record")[0].as_py()
    assert [(r["user_id"], r["price"], r["quantity"]) for r in batch.table.to_pylist()] == [
        ("ann", 9.5, 1.0),
        ("17.0", 9.5, 2.5),
    ]
    assert batch.table.to_pylist()[0]["ts"] == datetime(2025, 3, 1, 10, tzinfo=UTC)
    assert source.fingerprint()["events"]["rows"] == 7


def test_ids_in_a_column_of_numbers_stay_whole(tmp_path: Path) -> None:
    columns = "id INTEGER PRIMARY KEY, who STRING, at DATE, cost NUMERIC, n BOOLEAN"
    rows = [(i, who, "2025-03-01", 1, 1) for i, who in enumerate(("17", "ann", 2.0**60), 1)]
    found = read(make_log(tmp_path / "shop.db", *rows, columns=columns))
    assert [row["user_id"] for row in found] == ["17", "ann", str(2**60)]
    assert found[0]["quantity"] == 1.0


def test_ids_in_a_column_of_decimals_keep_every_digit(tmp_path: Path) -> None:
    columns = "id INTEGER PRIMARY KEY, who NUMERIC(20, 0), at DATE, cost NUMERIC(9, 2), n DOUBLE"
    ids = ["9007199254740992", "9007199254740993", "740993.00"]
    rows = [(i, who, "2025-03-01", "1.50", 0.9166934251630467) for i, who in enumerate(ids)]
    found = read(make_log(tmp_path / "shop.db", *rows, columns=columns))
    assert [row["user_id"] for row in found] == ["9007199254740992", "9007199254740993", "740993"]
    assert (found[0]["price"], found[0]["quantity"]) == (1.5, 0.9166934251630467)


def test_times_in_a_column_of_decimals_need_a_unit(tmp_path: Path) -> None:
    columns = "id INTEGER PRIMARY KEY, who TEXT, at NUMERIC, cost NUMERIC, n INTEGER"
    source = make_log(tmp_path / "shop.db", (1, "ann", 1740823200.5, 9.5, 1), columns=columns)
    with pytest.raises(UserError, match="holds numbers, not times; say in"):
        read(source)
    source._params.mapping["ts"] = ColumnMapping(column="at", unit="s")
    assert read(source)[0]["ts"] == datetime(2025, 3, 1, 10, 0, 0, 500_000, tzinfo=UTC)


def test_what_is_changed_in_place_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shop.db"
    rows = [(i, "ann", f"2025-03-01 10:00:0{i}.000000", 9.5, i) for i in range(1, 6)]
    source = make_log(path, *rows)
    first = source.fingerprint()
    assert first["events"]["rows"] == 5
    monkeypatch.setattr("pipelines.sources.database._ROWS_PER_CHUNK", 2)
    assert source.fingerprint() == first
    change(path, "UPDATE log SET note = 'not read'")
    assert source.fingerprint() == first
    change(path, "UPDATE log SET cost = 9.75 WHERE id = 3")
    assert source.fingerprint() != first
    change(path, "UPDATE log SET cost = 9.5 WHERE id = 3")
    assert source.fingerprint() == first


def test_what_was_read_is_compared_with_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    rows = [(i, "ann", f"2025-03-01 10:00:0{i}.000000", 9.5, i) for i in range(1, 6)]
    source = make_log(path, *rows)
    first = source.fingerprint()
    read(source)
    assert source.fingerprint_read() == first
    change(path, "UPDATE log SET cost = 9.75 WHERE id = 3")
    read(source)
    assert source.fingerprint_read() != first


def test_what_the_service_collects_after_the_fingerprint_is_the_next_runs(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    params = Database(url=collect(path, EVENTS[:2]))
    Store(f"sqlite:///{path}").keep_profile("ann", {"age": 33.0})
    found = DatabaseSource(params).fingerprint()
    collect(path, EVENTS[2:])
    Store(f"sqlite:///{path}").keep_profile("ann", {"age": 34.0})
    source = DatabaseSource(params, found=found)
    assert [row["user_id"] for row in read(source)] == ["ann", "bob"]
    assert read(source, Kind.USERS)[0]["age"] == 34.0
    assert source.fingerprint_read() == found
    assert len(read(DatabaseSource(params))) == 3


def test_tables_of_others_are_mapped(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE log (who TEXT, at TIMESTAMP, what TEXT, cost NUMERIC(10, 2))")
        )
        connection.execute(text("CREATE TABLE people (who TEXT PRIMARY KEY, age INTEGER)"))
        connection.execute(text("INSERT INTO people VALUES ('ann', 33)"))
        connection.execute(
            text("INSERT INTO log VALUES ('ann', '2025-03-01 10:00:00.000000', 'transaction', 9.9)")
        )
    params = Database.model_validate(
        {
            "url": "sqlite:///shop.db",
            "events": "log",
            "users": "people",
            "users_mapping": {"user_id": "who"},
            "mapping": {
                "user_id": "who",
                "ts": {"column": "at", "timezone": "Europe/Berlin"},
                "event_type": {"column": "what", "values": {"transaction": "purchase"}},
                "price": "cost",
            },
        }
    )
    source = DatabaseSource(params, tmp_path)
    (row,) = read(source)
    assert (row["user_id"], row["event_type"], row["price"]) == ("ann", "purchase", 9.9)
    assert row["ts"] == datetime(2025, 3, 1, 9, tzinfo=UTC)
    assert read(source, Kind.USERS)[0]["age"] == 33
    assert read(source, Kind.ITEMS) == []


def test_mistakes_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = collect(tmp_path / "events.db", EVENTS)
    for params, match in (
        (Database(url=url, events="log"), "there is no table log"),
        (
            Database(url=f"sqlite:///{tmp_path}/none.db"),
            "none.db: no such database; correct ingest.database.url",
        ),
        (Database(url="nonsense"), "ingest.database.url: "),
        (
            Database.model_validate({"url": url, "mapping": {"price": "cost"}}),
            r"events: no column cost \(ingest\.database\.mapping\.price\); found number, event_id",
        ),
        (
            Database.model_validate({"url": url, "mapping": {"ts": {"column": "number"}}}),
            "say in ingest.database.mapping.ts.unit",
        ),
        (
            Database.model_validate(
                {"url": url, "mapping": {"ts": {"column": "ts", "unit": "us", "timezone": "x"}}}
            ),
            "ingest.database.mapping.ts.timezone: no time zone 'x'",
        ),
    ):
        with pytest.raises(UserError, match=match):
            DatabaseSource(params).fingerprint()
            list(DatabaseSource(params).read(Kind.EVENTS))
    for address, match in (("sqlite:///none.db", "set FORECART_STORE"), ("x", "FORECART_STO")):
        monkeypatch.setenv(STORE_VARIABLE, address)
        with pytest.raises(UserError, match=match):
            DatabaseSource(Database(), tmp_path).fingerprint()
    make_log(tmp_path / "shop.db")
    change(tmp_path / "shop.db", "ALTER TABLE log RENAME COLUMN who TO whom")
    params = Database.model_validate(
        {"url": f"sqlite:///{tmp_path}/shop.db", "events": "log", "mapping": {"user_id": "who"}}
    )
    with pytest.raises(UserError, match=r"log: no column who \(ingest\.database\.mapping\.user_id"):
        DatabaseSource(params).fingerprint()


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("postgresql://u:hunter2@127.0.0.1:1/x", "psycopg://127.0.0.1:1/x: connection"),
        ("postgresql://127.0.0.1:1/x?password=hunter2", r"/x\?password=\*\*\*: connection"),
        ("mysql://u:hunter2@127.0.0.1:1/x?foo=1", r"//127.0.0.1:1/x\?foo=1: .*'foo'"),
        ("mysql://u:hunter2@127.0.0.1:1/x?charset=foo", r"charset=foo: "),
    ],
)
def test_what_a_driver_says_is_one_line_without_the_password(address: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        DatabaseSource(Database(url=address)).fingerprint()
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
