"""The store on SQLite: idempotent, ordered, durable; the same suite runs on servers elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest
from sqlalchemy.exc import SQLAlchemyError

from pipelines.address import STORE_VARIABLE
from pipelines.errors import UserError
from serving.store import Erased, Store, find_url

NOON = 1_750_000_000_000_000


def make(event_id: str, user: str = "ann", ts: int = 1, **more: Any) -> dict[str, Any]:
    return {"event_id": event_id, "user_id": user, "ts": ts, "event_type": "view", **more}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 'deep/events.db'}")
    opened.create()
    yield opened
    opened.close()


def test_an_event_is_stored_once(store: Store) -> None:
    assert store.append([make("a"), make("b"), make("a")]) == [True, True, False]
    assert store.append([make("b", ts=9), make("c")]) == [False, True]
    kept = store.history(["ann"], before=100, limit=10)["ann"]
    assert [event["event_id"] for event in kept] == ["a", "b", "c"]
    assert [event["ts"] for event in kept] == [1, 1, 1]


def test_history_is_the_latest_before_in_order(store: Store) -> None:
    store.append([make(f"e{ts}", ts=ts) for ts in (5, 3, 9, 7)])
    store.append([make("other", user="Ann", ts=4)])
    found = store.history(["ann", "Ann", "bob"], before=9, limit=2)
    assert [event["ts"] for event in found["ann"]] == [5, 7]
    assert [event["event_id"] for event in found["Ann"]] == ["other"]
    assert found["bob"] == []


def test_all_columns_come_back_as_they_were(store: Store) -> None:
    event = make(
        "ü-1",
        user="Зоя 🛍",
        ts=1_750_000_000_123_456,
        item_id="i'; DROP TABLE events; --",
        category="c",
        brand="b",
        price=0.1,
        quantity=-2.0,
        query="red shoes",
        session_id="s",
    )
    store.append([event])
    assert store.history(["Зоя 🛍"], before=2**60, limit=1)["Зоя 🛍"] == [event]


def test_an_erased_user_is_gone_and_no_one_else(store: Store) -> None:
    store.append([make("a"), make("b"), make("c", user="bob")])
    store.keep_profile("ann", {"age": 40.0})
    store.keep_profile("bob", {"age": 50.0})
    assert store.erase("ann") == Erased(events=2, profile=True)
    assert store.erase("ann") == Erased(events=0, profile=False)
    assert list(store.profiles(["ann", "bob"])) == ["bob"]
    found = store.history(["ann", "bob"], before=100, limit=10)
    assert (len(found["ann"]), len(found["bob"])) == (0, 1)


def test_writers_side_by_side_store_each_event_once(store: Store) -> None:
    batches = [[make(f"e{i}") for i in range(k, k + 40)] for k in range(0, 80, 10)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(store.append, batches))
    assert len(store.history(["ann"], before=100, limit=1000)["ann"]) == 110


@pytest.mark.parametrize("repeat", range(5))
def test_a_new_store_is_opened_by_many_at_once(tmp_path: Path, repeat: int) -> None:
    count = 8
    together = Barrier(count)

    def use(number: int) -> list[bool]:
        opened = Store(f"sqlite:///{tmp_path / 'events.db'}")
        together.wait(30)
        try:
            opened.create()
            return opened.append([make(f"e{number}")])
        finally:
            opened.close()

    with ThreadPoolExecutor(count) as pool:
        assert list(pool.map(use, range(count))) == [[True]] * count


def test_the_text_of_an_erased_event_is_in_no_file(store: Store, tmp_path: Path) -> None:
    def find(text: bytes) -> list[str]:
        files = (tmp_path / "deep").iterdir()
        return sorted(file.name for file in files if text in file.read_bytes())

    store.append([make(f"e{n}", query="a secret wish") for n in range(50)])
    store.append([make("other", user="bob", query="red shoes")])
    assert find(b"a secret wish")
    store.erase("ann")
    assert find(b"a secret wish") == []
    assert find(b"red shoes")


def test_a_reader_holds_up_no_erasure(store: Store) -> None:
    store.append([make("a"), make("b", user="bob")])
    with store.engine.connect() as reader:
        reading = reader.exec_driver_sql("SELECT * FROM events")
        reading.fetchone()
        began = time.monotonic()
        assert store.erase("ann") == Erased(events=1, profile=False)
        assert time.monotonic() - began < 5
    assert store.erase("bob") == Erased(events=1, profile=False)


def test_what_shoppers_did_is_for_the_user_who_serves_alone(store: Store, tmp_path: Path) -> None:
    store.append([make("a")])
    files = list((tmp_path / "deep").glob("events.db*"))
    assert len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def move_away(path: Path) -> None:
    """Move a database of SQLite with what belongs to it, which leaves open files open."""
    aside = path.parent.with_name("aside")
    aside.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        file.rename(aside / file.name)


def test_what_is_acknowledged_after_the_file_has_gone_is_in_the_new_one(
    store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "deep/events.db"
    store.append([make("a")])
    move_away(path)
    assert store.append([make("b")]) == [True]
    store.keep_profile("ann", {"age": 40.0})
    again = Store(f"sqlite:///{path}")
    (event,) = again.history(["ann"], before=100, limit=10)["ann"]
    assert event["event_id"] == "b"
    assert again.profiles(["ann"])["ann"]["age"] == 40.0
    again.close()
    shutil.rmtree(path.parent)
    assert store.history(["ann"], before=100, limit=10)["ann"] == []
    assert store.append([make("b")]) == [True]
    old = Store(f"sqlite:///{tmp_path / 'aside/events.db'}")
    (event,) = old.history(["ann"], before=100, limit=10)["ann"]
    assert event["event_id"] == "a"
    old.close()


def test_what_goes_with_the_file_while_it_is_written_is_not_acknowledged(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep/events.db"
    insert_new = store._insert_new

    def move_first() -> Any:
        monkeypatch.setattr(store, "_insert_new", insert_new)
        move_away(path)
        return insert_new()

    monkeypatch.setattr(store, "_insert_new", move_first)
    with pytest.raises(UserError, match="exchanged"):
        store.append([make("a")])
    assert store.append([make("a")]) == [True]
    again = Store(f"sqlite:///{path}")
    assert len(again.history(["ann"], before=100, limit=10)["ann"]) == 1
    again.close()


def test_a_file_that_comes_and_goes_takes_nothing_acknowledged_with_it(
    store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "deep/events.db"
    kept: list[set[str]] = [set() for _ in range(4)]

    def write(writer: int) -> None:
        while not done.is_set():
            names = [f"{writer}-{len(kept[writer])}"]
            with suppress(UserError, SQLAlchemyError):
                store.append([make(names[0])])
                kept[writer].update(names)

    done = Event()
    threads = [Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    files = [path]
    try:
        for turn in range(5):
            time.sleep(0.1)
            path.parent.rename(tmp_path / f"aside{turn}")
            files.append(tmp_path / f"aside{turn}/events.db")
        time.sleep(0.1)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    found = set()
    for file in files:
        opened = Store(f"sqlite:///{file}")
        events = opened.history(["ann"], before=100, limit=10**6)["ann"]
        found |= {event["event_id"] for event in events}
        opened.close()
    assert set().union(*kept) <= found
    assert len(found) > 50


def test_there_is_no_store_that_nobody_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    with pytest.raises(UserError, match="set FORECART_STORE"):
        find_url()
    monkeypatch.setenv(STORE_VARIABLE, "")
    with pytest.raises(UserError, match="set FORECART_STORE"):
        find_url()


@pytest.mark.parametrize(
    ("url", "lasts"),
    [
        ("sqlite:///events.db", False),
        ("sqlite+pysqlite:///.forecart/events.db", False),
        ("sqlite:////var/lib/events.db", True),
        ("sqlite:///:memory:", True),
        ("sqlite:///file:/var/lib/events.db?uri=true", True),
        ("postgresql://shop@db/events", True),
    ],
)
def test_a_file_in_the_folder_of_the_server_is_no_store(
    url: str, lasts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORE_VARIABLE, url)
    if lasts:
        assert find_url() == url
        return
    with pytest.raises(UserError, match="whole path"):
        find_url()


def test_a_profile_replaces_the_one_before(store: Store) -> None:
    told = {"age": 33.5, "gender": "f", "region": "Île-de-France 🛍", "signup_ts": NOON}
    store.keep_profile("Zoë", told)
    store.keep_profile("zoë", {"region": "south"})
    assert store.profiles(["Zoë", "nobody"]) == {"Zoë": {"user_id": "Zoë", **told}}
    store.keep_profile("Zoë", {"age": 34.0})
    nothing = {"gender": None, "region": None, "signup_ts": None}
    assert store.profiles(["Zoë"])["Zoë"] == {"user_id": "Zoë", "age": 34.0, **nothing}


def test_a_profile_that_could_not_be_kept_is_not_acknowledged(store: Store) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE profiles")
    with pytest.raises(SQLAlchemyError, match="profiles"):
        store.keep_profile("ann", {"age": 33.0})


def test_profiles_of_one_user_told_side_by_side_leave_one(store: Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda age: store.keep_profile("ann", {"age": age}), range(1, 13)))
    assert store.profiles(["ann"])["ann"]["age"] in range(1, 13)


def test_a_wrong_address_is_told() -> None:
    for url in ("nonsense", "nosuchdb://host/x"):
        with pytest.raises(UserError, match="FORECART_STORE"):
            Store(url)
    with pytest.raises(UserError, match="FORECART_STORE: the port in the address is not a number"):
        Store("postgresql://a:1,b:2/x")


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("mysql://u:p@127.0.0.1/x", "pymysql"),
        ("mariadb://u:p@127.0.0.1/x", "pymysql"),
        ("postgres://u:p@127.0.0.1/x", "psycopg"),
        ("postgresql://u:p@127.0.0.1/x", "psycopg"),
    ],
)
def test_an_address_without_a_driver_gets_the_one_that_is_installed(url: str, driver: str) -> None:
    assert Store(url).engine.driver == driver


def test_the_name_of_a_database_on_a_server_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("postgresql://u:p@127.0.0.1/deep/events.db", "sqlite:///:memory:", "sqlite://"):
        Store(url).close()
    assert list(tmp_path.iterdir()) == []


def test_many_users_and_many_events_go_into_several_queries(store: Store) -> None:
    users = [f"u{n}" for n in range(1201)]
    for user in users[::400]:
        store.keep_profile(user, {"age": 40.0})
    assert list(store.profiles(users)) == ["u0", "u400", "u800", "u1200"]
    events = [make(f"e{n}") for n in range(1201)]
    store.append(events[::400])
    assert store.append(events) == [n % 400 > 0 for n in range(1201)]
