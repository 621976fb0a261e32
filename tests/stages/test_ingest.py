"""The fingerprint and ingest stages: partitions, rules, counts, and runs that must stop."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines import config
from pipelines.errors import UserError
from pipelines.events import EVENT_SCHEMA, ITEM_SCHEMA, USER_SCHEMA
from pipelines.io import digest_directory
from pipelines.sources.base import QUARANTINE_SCHEMA
from pipelines.stages import fingerprint, ingest

HEADER = "user_id,ts,event_type,item_id,price,quantity"


def write_csv(path: Path, *lines: str, header: str = HEADER) -> None:
    path.write_text("\n".join([header, *lines]) + "\n")


def run(root: Path, *, files: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    section = {"source": "files", "files": {"path": "e.csv", **(files or {})}, **options}
    params = config.parse_params({"ingest": section})
    fingerprint.run(params, root)
    ingest.run(params, root)
    report: dict[str, Any] = json.loads((root / "reports/ingest.json").read_text())
    return report


def events(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "data/events").glob("day=*/part-0.parquet"))
    tables = [pq.ParquetFile(file).read() for file in files]
    for file, table in zip(files, tables, strict=True):
        assert table.schema == EVENT_SCHEMA
        days = set(pc.strftime(table.column("ts"), "day=%Y-%m-%d").to_pylist())
        assert days == {file.parent.name}
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["ts"], row["event_id"]))
    return rows


def quarantined(root: Path) -> pa.Table:
    return ds.dataset(root / "data/quarantine/ingest", schema=QUARANTINE_SCHEMA).to_table()


def test_days_report_and_entities(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "e.csv",
        "u2,2025-01-02T23:59:59.999999,purchase,i1,3,2",
        "u1,2025-01-02T00:00:00,view,i1,4,",
        "u1,2025-01-01T10:00:00,view,i2,,",
        ",2025-01-01T10:00:00,view,i2,,",
        "u1,2025-01-03T10:00:00,refund,i1,-1,-1",
    )
    report = run(tmp_path)
    assert [row["event_type"] for row in events(tmp_path)] == ["view", "view", "purchase", "refund"]
    assert report == {
        "rows": 5,
        "anonymous": 1,
        "ignored": 0,
        "after_until": 0,
        "quarantined": {"rows": 0, "share": 0.0, "reasons": {}, "entities": {}},
        "duplicates": 0,
        "refunds": 1,
        "events": 4,
        "users": 2,
        "items": 2,
        "first_ts": "2025-01-01T10:00:00Z",
        "last_ts": "2025-01-03T10:00:00Z",
        "event_types": {
            "view": 2, "search": 0, "add_to_cart": 0, "remove_from_cart": 0, "wishlist": 0,
            "purchase": 1, "refund": 1, "review": 0,
        },
    }  # fmt: skip
    items = pq.read_table(tmp_path / "data/entities/items.parquet")
    assert items.schema == ITEM_SCHEMA
    # Last seen at 3; the negative price of the refund is an adjustment.
    assert [(row["item_id"], row["price"]) for row in items.to_pylist()] == [
        ("i1", 3.0),
        ("i2", None),
    ]
    users = pq.read_table(tmp_path / "data/entities/users.parquet")
    assert users.schema == USER_SCHEMA
    assert users.num_rows == 0
    assert quarantined(tmp_path).num_rows == 0


def test_users_and_items_tables_keep_the_last_row_of_an_id(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", "u1,2025-01-01,view,i1,1,")
    write_csv(tmp_path / "users.csv", "u2,20", "u1,30", "u1,31", "u3,x", header="user_id,age")
    write_csv(tmp_path / "items.csv", "i9,shoes,5", header="item_id,category,price")
    files = {"users": "users.csv", "items": "items.csv"}
    report = run(tmp_path, files=files, max_quarantine_share=0.5)
    users = pq.read_table(tmp_path / "data/entities/users.parquet").to_pylist()
    assert [(row["user_id"], row["age"]) for row in users] == [("u1", 31.0), ("u2", 20.0)]
    items = pq.read_table(tmp_path / "data/entities/items.parquet").to_pylist()
    assert [(row["item_id"], row["category"], row["price"]) for row in items] == [
        ("i9", "shoes", 5.0)
    ]
    assert report["with_profile"] == 1
    assert report["quarantined"]["entities"] == {"age is not a number": 1}
    assert quarantined(tmp_path).column("source").to_pylist() == ["users.csv"]
    with pytest.raises(UserError, match=r"1 of 5 rows of users and items \(20.0%\)"):
        run(tmp_path, files=files)


def test_shoppers_with_two_spellings_of_an_id_and_those_without_profile_are_told(
    tmp_path: Path,
) -> None:
    rows = [f"{user},2025-01-01T00:00:0{i},view,i1,1," for i, user in enumerate(["7", "8", "9"])]
    (tmp_path / "log").mkdir()
    write_csv(tmp_path / "log/a.csv", *rows)
    write_csv(tmp_path / "log/b.csv", *(row.replace(",", ".0,", 1) for row in rows[:2]))
    write_csv(tmp_path / "users.csv", "9,20", "10,30", header="user_id,age")
    section = {"source": "files", "files": {"path": "log", "users": "users.csv"}}
    params = config.parse_params({"ingest": section})
    fingerprint.run(params, tmp_path)
    told = ingest.run(params, tmp_path)
    assert "5 users (1 with a profile)" in told
    assert "; 2 shoppers have a second id that ends in .0, such as 7.0: write both alike" in told


@pytest.mark.parametrize("source", ["files", "database"])
def test_an_items_table_fills_what_events_lack(tmp_path: Path, source: str) -> None:
    log = [
        ("e1", "u1", "2025-01-01T00:00:01", "purchase", "i1", None, None, None),
        ("e2", "u1", "2025-01-01T00:00:02", "purchase", "i1", "hats", "own", 7.0),
        ("e3", "u1", "2025-01-01T00:00:03", "view", "i2", None, None, None),
        ("e4", "u1", "2025-01-01T00:00:04", "search", None, None, None, None),
        ("e5", "u1", "2025-01-01T00:00:05", "purchase", "i1", None, "own", 0.0),
    ]
    columns = ["event_id", "user_id", "ts", "event_type", "item_id", "category", "brand", "price"]
    # The last row of an id counts, as in the table that is written.
    shelf = [("i1", "bags", "acme", 10.0), ("i1", "shoes", "acme", 20.0), ("i3", "x", "y", 1.0)]
    frames = {
        "e": pd.DataFrame(log, columns=columns),
        "items": pd.DataFrame(shelf, columns=ITEM_SCHEMA.names),
    }
    if source == "files":
        for name, frame in frames.items():
            frame.to_csv(tmp_path / f"{name}.csv", index=False)
        section: dict[str, Any] = {"path": "e.csv", "items": "items.csv"}
    else:
        with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
            for name, frame in frames.items():
                frame.to_sql(name, connection, index=False)
        section = {"url": "sqlite:///shop.db", "events": "e", "items": "items"}
    params = config.parse_params({"ingest": {"source": source, source: section}})
    fingerprint.run(params, tmp_path)
    assert ingest.run(params, tmp_path).endswith(", 2 filled from the items table")
    assert [(row["category"], row["brand"], row["price"]) for row in events(tmp_path)] == [
        ("shoes", "acme", 20.0),
        ("hats", "own", 7.0),
        (None, None, None),
        (None, None, None),
        ("shoes", "own", 0.0),
    ]
    assert json.loads((tmp_path / "reports/ingest.json").read_text())["filled"] == 2


def test_a_price_below_nothing_fills_nothing(tmp_path: Path) -> None:
    """It would have the row rules set a good event aside."""
    write_csv(tmp_path / "e.csv", "u1,2025-01-01,purchase,i1,,1", "u1,2025-01-02,purchase,i2,,1")
    write_csv(tmp_path / "items.csv", "i1,-20", "i2,20", header="item_id,price")
    assert run(tmp_path, files={"items": "items.csv"})["filled"] == 1
    assert [row["price"] for row in events(tmp_path)] == [None, 20.0]


def test_ids_do_not_depend_on_the_items_table(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", "u1,2025-01-01,purchase,i1,,1", "u1,2025-01-02,purchase,i1,,1")
    write_csv(tmp_path / "items.csv", "i1,20", header="item_id,price")
    assert "filled" not in run(tmp_path)
    before = events(tmp_path)
    assert run(tmp_path, files={"items": "items.csv"})["filled"] == 2
    assert events(tmp_path) == [row | {"price": 20.0} for row in before]


def test_a_purchase_of_a_negative_quantity_is_a_refund(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "e.csv",
        "u1,2025-01-01T00:00:01,purchase,i1,2.5,-3",
        "u1,2025-01-01T00:00:02,purchase,i1,2.5,3",
        "u1,2025-01-01T00:00:03,purchase,i1,-2.5,1",
        "u1,2025-01-01T00:00:04,purchase,i1,2.5,",
    )
    report = run(tmp_path)
    assert report["refunds"] == 1
    assert [(row["event_type"], row["price"], row["quantity"]) for row in events(tmp_path)] == [
        ("refund", 2.5, 3.0),
        ("purchase", 2.5, 3.0),
        ("purchase", -2.5, 1.0),  # left to the row rules of validation
        ("purchase", 2.5, None),
    ]


def test_repeated_lines(tmp_path: Path) -> None:
    line = "u1,2025-01-01,view,i1,1,1"
    other = "u1,2025-01-01,view,i1,1,2"
    write_csv(tmp_path / "e.csv", line, other, line, line)
    assert run(tmp_path)["duplicates"] == 2
    dropped = {row["event_id"] for row in events(tmp_path)}
    assert len(dropped) == 2
    assert run(tmp_path, files={"keep_repeats": True})["duplicates"] == 0
    kept = {row["event_id"] for row in events(tmp_path)}
    assert len(events(tmp_path)) == 4
    assert dropped < kept
    assert sorted(i[-2:] for i in kept - dropped) == ["-2", "-3"]


def test_null_and_empty_cells_do_not_share_a_hash(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u", "ts": "2025-01-01", "event_type": "view", "item_id": "a", "brand": None},
        {"user_id": "u", "ts": "2025-01-01", "event_type": "view", "item_id": None, "brand": "a"},
        {"user_id": "u", "ts": "2025-01-01", "event_type": "view", "item_id": 'a","b'},
    ]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(tmp_path, files={"path": "e.jsonl"})["events"] == 3


@pytest.mark.parametrize("keep", [False, True])
def test_ids_of_the_source_keep_the_first_by_time(tmp_path: Path, keep: bool) -> None:
    write_csv(
        tmp_path / "e.csv",
        "a,u1,2025-01-02,view,later",
        "a,u1,2025-01-01,view,first",
        "a,u1,2025-01-01,view,second",
        "a,u1,2025-01-01,view,first",
        ",u1,2025-01-01,view,hashed",
        header="event_id,user_id,ts,event_type,item_id",
    )
    report = run(tmp_path, files={"keep_repeats": keep}, max_quarantine_share=0.4)
    assert report["duplicates"] == 1
    assert report["quarantined"]["reasons"] == {"event_id of another event": 2}
    assert {row["item_id"] for row in events(tmp_path)} == {"first", "hashed"}
    refused = quarantined(tmp_path).to_pylist()
    assert [(row["source"], row["row"]) for row in refused] == [("e.csv", 1), ("e.csv", 3)]
    assert json.loads(refused[0]["record"])["item_id"] == "later"


def test_a_column_that_is_no_event_id_stops_the_run(tmp_path: Path) -> None:
    header = "session,user_id,ts,event_type,item_id"
    for name in ("1.csv", "2.csv"):
        lines = [f"s{name[0]},u{name[0]},2025-01-01T00:00:0{i},view,i{i}" for i in range(5)]
        write_csv(tmp_path / name, *lines, header=header)
    files = {"path": "*.csv", "mapping": {"event_id": "session"}}
    with pytest.raises(UserError) as caught:
        run(tmp_path, files=files)
    message = str(caught.value)
    assert "8 of 10 rows (80.0%)" in message
    assert "event_id of another event (8, e.g. 1.csv row 2: " in message
    assert "map event_id to a column with an id of its own for each event, or to null" in message
    found = [(row["source"], row["row"]) for row in quarantined(tmp_path).to_pylist()]
    assert found == [(name, row) for name in ("1.csv", "2.csv") for row in range(2, 6)]
    assert run(tmp_path, files={"path": "*.csv", "mapping": {"event_id": None}})["events"] == 10


def test_a_file_that_is_delivered_twice_holds_duplicates(tmp_path: Path) -> None:
    lines = [f"u1,2025-01-01T00:00:0{i},view,i{i}" for i in range(5)]
    header = "user_id,ts,event_type,item_id"
    params = {"ingest": {"source": "files", "files": {"path": "*.csv"}}}
    for given in (True, False):
        for name in ("1.csv", "2.csv"):
            ids = [f"e{i},{line}" for i, line in enumerate(lines)] if given else lines
            write_csv(tmp_path / name, *ids, header=f"event_id,{header}" if given else header)
        report = run(tmp_path, files={"path": "*.csv"})
        assert (report["events"], report["duplicates"]) == (5, 5)
        told = ingest.run(config.parse_params(params), tmp_path)
        assert ("map event_id or set ingest.files.keep_repeats" in told) != given


def test_until_is_a_snapshot(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "e.csv",
        "u1,2025-01-01T23:59:59.999999,view,i1,1,",
        "u1,2025-01-02T00:00:00,view,i1,9,",
    )
    report = run(tmp_path, until="2025-01-02")
    assert (report["events"], report["after_until"]) == (1, 1)
    assert pq.read_table(tmp_path / "data/entities/items.parquet").to_pylist()[0]["price"] == 1.0
    with pytest.raises(UserError, match=r"zero events: of 2 rows 2 not before ingest\.until 2024"):
        run(tmp_path, until="2024-01-01")


def test_too_many_bad_rows_stop_the_run_and_can_be_looked_at(tmp_path: Path) -> None:
    good = [f"u1,2025-01-01T00:00:{i:02},view,i1,1," for i in range(17)]
    write_csv(tmp_path / "e.csv", *good)
    run(tmp_path)
    before = digest_directory(tmp_path / "data/events")
    write_csv(
        tmp_path / "e.csv", *good, "u1,today,view,,,", "u1,2025-01-01,dance,,,", "u1,,view,,,"
    )
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    message = str(caught.value)
    assert "3 of 20 rows (15.0%)" in message
    assert "ingest.max_quarantine_share (5.0%)" in message
    assert (
        'unknown event_type: dance 1 (1, e.g. e.csv row 19: {"event_type": "dance", "user_id"'
        in message
    )
    assert "\n" not in message
    table = quarantined(tmp_path)
    assert table.schema == QUARANTINE_SCHEMA
    assert [(row["row"], row["reason"]) for row in table.to_pylist()] == [
        (18, "ts cannot be read"),
        (19, "unknown event_type"),
        (20, "missing ts"),
    ]
    assert digest_directory(tmp_path / "data/events") == before
    assert run(tmp_path, max_quarantine_share=0.15)["quarantined"]["rows"] == 3


def test_rows_left_out_on_purpose_hide_no_bad_ones(tmp_path: Path) -> None:
    """Of 40 purchases 30 are lost; a thousand pings beside them are none of the matter."""
    pings = [f"u1,2025-01-01T00:{i // 60:02}:{i % 60:02},ping,,," for i in range(960)]
    nobody = [f",2025-01-01T01:00:{i:02},view,i1,1," for i in range(40)]
    bad = [f"u1,day {i},purchase,i1,1,1" for i in range(30)]
    good = [f"u1,2025-01-02T00:00:{i:02},purchase,i1,1,1" for i in range(10)]
    write_csv(tmp_path / "e.csv", *pings, *nobody, *bad, *good)
    values = {"ping": None, "purchase": "purchase", "view": "view"}
    mapping = {"event_type": {"column": "event_type", "values": values}}
    with pytest.raises(UserError, match=r"30 of 40 rows \(75\.0%\)"):
        run(tmp_path, files={"mapping": mapping})


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (
            "u1,20.01.2025 01:09,view,i1,1",
            'in mapping.ts.format how it is written, such as "%d.%m.',
        ),
        ("u1,1737335364123456,view,i1,1", "in mapping.ts.unit whether it is in s, ms or us"),
        ("u1,2025-01-01,,i1,1", "map it as {value: purchase} where all rows are of one type"),
        ('u1,2025-01-01,view,i1,"9,90"', 'ingest.files.decimal: "," reads decimal commas'),
        ("u1,2025-01-01,view,i1,EUR 9.90", "leave out currencies and units"),
        ("u1,2025-01-01,view,i1,9.90 \N{EURO SIGN}", "leave out currencies and units"),
    ],
)
def test_what_to_do_is_told_with_the_reason(tmp_path: Path, line: str, advice: str) -> None:
    write_csv(tmp_path / "e.csv", line, header="user_id,ts,event_type,item_id,price")
    with pytest.raises(UserError, match=re.escape(advice)):
        run(tmp_path)


def test_what_to_do_is_told_of_users_too(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", "u1,2025-01-01,view,i1,1,")
    write_csv(tmp_path / "u.csv", "u1,20.01.2025", header="user_id,since")
    files = {"users": "u.csv", "users_mapping": {"signup_ts": "since"}}
    with pytest.raises(UserError) as caught:
        run(tmp_path, files=files)
    assert 'u.csv row 1: {"since": "20.01.2025"' in str(caught.value)
    assert "say in users_mapping.signup_ts.format how it is written" in str(caught.value)


def test_too_many_unknown_event_types_are_named(tmp_path: Path) -> None:
    kinds = ["kauf"] * 5 + ["ansicht"] * 9 + [" kauf"] * 2 + ["x" * 300, "view"]
    lines = [f"{'n' * 200},u1,2025-01-01T00:00:{i:02},{kind}" for i, kind in enumerate(kinds)]
    write_csv(tmp_path / "e.csv", *lines, header="user_id,brand,ts,what")
    mapping = {"event_type": {"column": "what", "values": {"view": "view"}}}
    with pytest.raises(UserError) as caught:
        run(tmp_path, files={"mapping": mapping})
    message = str(caught.value)
    assert f"unknown event_type: ansicht 9, kauf 7, {'x' * 37}... 1 (17, e.g. " in message
    assert 'e.csv row 1: {"what": "kauf", "user_id": "nnn' in message
    assert "say in mapping.event_type.values what they are; null leaves a type out" in message
    mapping["event_type"]["values"] |= {"kauf": "purchase", "ansicht": None, "x" * 300: None}
    assert run(tmp_path, files={"mapping": mapping})["events"] == 8


def test_a_german_export_is_told_what_it_needs(tmp_path: Path) -> None:
    lines = [f"u1;2025-01-01 00:00:{i:02};view;Käse;{i},90" for i in range(20)]
    text = "\n".join(["user_id;ts;event_type;item_id;price", *lines])
    (tmp_path / "e.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(UserError, match=r"not UTF-8 \(20, .*: say in ingest\.files\.encoding what"):
        run(tmp_path)
    with pytest.raises(
        UserError, match=r'price is not a number \(20, .*\): ingest\.files\.decimal: ","'
    ):
        run(tmp_path, files={"encoding": "cp1252"})
    run(tmp_path, files={"encoding": "windows-1252", "decimal": ","})
    assert [(row["item_id"], row["price"]) for row in events(tmp_path)][:2] == [
        ("Käse", 0.9),
        ("Käse", 1.9),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "zero events: the source holds no rows"),
        ([",2025-01-01,view,,,"], r"zero events: of 1 rows 1 anonymous \(no user id\)"),
    ],
)
def test_zero_events(tmp_path: Path, lines: list[str], message: str) -> None:
    write_csv(tmp_path / "e.csv", *lines)
    with pytest.raises(UserError, match=message):
        run(tmp_path)
    assert not (tmp_path / "data/events").exists()


def test_a_corrupt_file_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    write_csv(tmp_path / "shop/1.csv", "u1,2025-01-01,view,i1,1,")
    run(tmp_path, files={"path": "shop"})
    before = digest_directory(tmp_path / "data")
    (tmp_path / "shop/2.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"^2\.parquet: not a readable parquet file"):
        run(tmp_path, files={"path": "shop"})
    (tmp_path / "shop/2.parquet").unlink()
    fingerprint.run(
        config.parse_params({"ingest": {"source": "files", "files": {"path": "shop"}}}), tmp_path
    )
    assert digest_directory(tmp_path / "data") == before


def test_a_killed_run_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", "u1,2025-01-01,view,i1,1,")
    for rubbish in (
        "data/.ingest.spill",
        "data/.events.partial",
        "data/quarantine/.ingest.partial",
    ):
        (tmp_path / rubbish).mkdir(parents=True)
        (tmp_path / rubbish / "half.parquet").write_bytes(b"PAR1")
    run(tmp_path)
    names = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "data").rglob("*")}
    assert not [name for name in names if "/." in name or "half" in name]


def test_bytes_depend_neither_on_the_run_nor_on_the_order_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "_ROWS_PER_GROUP", 100)
    draw = random.Random(3)
    lines = [
        f"u{draw.randrange(9)},2025-01-0{draw.randrange(1, 4)}T00:00:{draw.randrange(60):02}"
        f",view,i{draw.randrange(20)},{draw.randrange(1, 99)},"
        for _ in range(3000)
    ]
    digests = set()
    for attempt in range(3):
        root = tmp_path / str(attempt)
        root.mkdir()
        write_csv(root / "e.csv", *lines)
        run(root)
        digests.add(
            (digest_directory(root / "data/events"), digest_directory(root / "data/entities"))
        )
        draw.shuffle(lines)
    assert len(digests) == 1
    groups = pq.ParquetFile(tmp_path / "0/data/events/day=2025-01-01/part-0.parquet").metadata
    assert groups.num_row_groups > 1


def test_simulated_events(tmp_path: Path) -> None:
    params = config.parse_params(
        {"ingest": {"simulator": {"users": 50, "days": 20, "seed": 3, "start": "2025-03-01"}}}
    )
    fingerprint.run(params, tmp_path)
    line = ingest.run(params, tmp_path)
    assert not line.startswith("ingest")
    report = json.loads((tmp_path / "reports/ingest.json").read_text())
    assert report["events"] == report["rows"] == len(events(tmp_path)) > 100
    assert report["first_ts"] >= "2025-03-01"
    assert report["last_ts"] < "2025-03-21"
    first = digest_directory(tmp_path / "data")
    ingest.run(params, tmp_path)
    assert digest_directory(tmp_path / "data") == first


def test_fingerprint_changes_with_the_simulator(tmp_path: Path) -> None:
    digests = set()
    for seed in (1, 1, 2):
        params = config.parse_params({"ingest": {"simulator": {"seed": seed}}})
        fingerprint.run(params, tmp_path)
        digests.add(json.loads((tmp_path / "data/source.json").read_text())["digest"])
    assert len(digests) == 2


def test_a_source_that_changed_after_its_fingerprint_stops_the_run(tmp_path: Path) -> None:
    write_csv(tmp_path / "1.csv", "u1,2025-01-01,view,i1,1,")
    run(tmp_path, files={"path": "*.csv"})
    before = digest_directory(tmp_path / "data/events")
    params = config.parse_params({"ingest": {"source": "files", "files": {"path": "*.csv"}}})
    write_csv(tmp_path / "2.csv", "u2,2025-01-01,view,i1,1,")
    with pytest.raises(UserError, match=r"changed before or while it was read; run dvc repro"):
        ingest.run(params, tmp_path)
    (tmp_path / "2.csv").unlink()
    write_csv(tmp_path / "1.csv", "u1,2025-01-01,view,i1,2,")  # as long as before
    with pytest.raises(UserError, match=r"changed before or while it was read"):
        ingest.run(params, tmp_path)
    assert digest_directory(tmp_path / "data/events") == before
    fingerprint.run(params, tmp_path)
    ingest.run(params, tmp_path)
    assert digest_directory(tmp_path / "data/events") != before


def test_ingest_wants_the_fingerprint_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source\.json"):
        ingest.run(config.parse_params({}), tmp_path)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"event_type": {"value": "buy"}}, "no event type 'buy'"),
        ({"event_type": {"column": "e", "values": {"a": "buy"}}}, "no event type 'buy'"),
        ({"user_id": None}, "user_id is needed by every row"),
        ({"ts": {"column": "t", "only": ["view"]}}, "ts is needed by every row"),
        ({"colour": "c"}, "no such column: colour"),
        ({"ts": {"column": "t", "zone": "UTC"}}, r"unknown key ingest\.files\.mapping\.ts\.zone"),
    ],
)
def test_mapping_params_are_checked(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.parse_params({"ingest": {"files": {"mapping": mapping}}})


def test_a_day_that_is_not_over_is_told() -> None:
    params, now = config.Params(), datetime(2025, 6, 19, 3, tzinfo=UTC)
    told = ingest._advise_end("2025-06-19T02:59:59Z", params, now)
    assert "2025-06-19 is not over yet: ingest.until: 2025-06-19 leaves it out" in told
    assert not ingest._advise_end("2025-06-18T23:59:59Z", params, now)
    ended = params.ingest.model_copy(update={"until": now})
    assert not ingest._advise_end(
        "2025-06-19T02:59:59Z", params.model_copy(update={"ingest": ended}), now
    )
