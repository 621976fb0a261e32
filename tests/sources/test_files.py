"""Files source: finding, reading, mapping, and damage told by name."""

from __future__ import annotations

import bz2
import gzip
import json
import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import Files
from pipelines.errors import UserError
from pipelines.features.store import strip_unseen
from pipelines.sources import files as files_module
from pipelines.sources.base import SCHEMAS, Kind
from pipelines.sources.files import FilesSource
from pipelines.sources.mapping import _UNSEEN, connect

HEADER = "user_id,ts,event_type,item_id,price"
LINES = [
    "u1,2025-01-01T00:00:00Z,view,i1,1.5",
    "u2,2025-01-01T00:00:01Z,purchase,i2,2",
]


def read(root: Path, kind: Kind = Kind.EVENTS, **files: Any) -> dict[str, Any]:
    batches = list(FilesSource(Files(**files), root).read(kind))
    tables = [batch.table for batch in batches]
    refused = [batch.quarantined for batch in batches]
    for table in tables:
        assert table.schema == SCHEMAS[kind]
    return {
        "rows": pa.concat_tables(tables).to_pylist() if tables else [],
        "refused": pa.concat_tables(refused).to_pylist() if refused else [],
        "read": sum(batch.rows for batch in batches),
        "anonymous": sum(batch.anonymous for batch in batches),
        "ignored": sum(batch.ignored for batch in batches),
    }


def write_csv(path: Path, *lines: str, header: str = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def reasons(result: dict[str, Any]) -> list[tuple[int, str]]:
    return [(row["row"], row["reason"]) for row in result["refused"]]


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# -- formats and places ----------------------------------------------------------------------


def _as_dicts() -> list[dict[str, Any]]:
    return [dict(zip(HEADER.split(","), line.split(","), strict=True)) for line in LINES]


def test_every_format_gives_the_same_events(tmp_path: Path) -> None:
    text = "\n".join([HEADER, *LINES]) + "\n"
    lines = "\n".join(json.dumps(row) for row in _as_dicts()) + "\n\n"
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "a.tsv").write_text(text.replace(",", "\t"))
    (tmp_path / "semicolons.csv").write_text(text.replace(",", ";"))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.csv.bz2").write_bytes(bz2.compress(text.encode()))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(_as_dicts()), tmp_path / "a.parquet")
    results = {p.name: read(tmp_path, path=p.name) for p in sorted(tmp_path.iterdir())}
    expected = results["a.csv"]
    assert [row["ts"] for row in expected["rows"]] == [
        at("2025-01-01T00:00:00"),
        at("2025-01-01T00:00:01"),
    ]
    assert expected["rows"][1] == {
        **dict.fromkeys(SCHEMAS[Kind.EVENTS].names),
        "user_id": "u2",
        "ts": at("2025-01-01T00:00:01"),
        "event_type": "purchase",
        "item_id": "i2",
        "price": 2.0,
    }
    assert len(results) == 9
    for name, result in results.items():
        assert result == expected, name


def test_folder_glob_and_url(tmp_path: Path) -> None:
    write_csv(tmp_path / "shop/b/2.csv", LINES[1])
    write_csv(tmp_path / "shop/a/1.csv", LINES[0])
    (tmp_path / "shop/_SUCCESS").touch()
    (tmp_path / "shop/notes.md").write_text("not events")
    users = ["u1", "u2"]
    for path in ("shop", "shop/*/*.csv", "shop/**/*.csv", f"file://{tmp_path}/shop"):
        assert [row["user_id"] for row in read(tmp_path, path=path)["rows"]] == users, path
    memory = fsspec.filesystem("memory")
    memory.pipe("/shop/1.csv", (tmp_path / "shop/a/1.csv").read_bytes())
    memory.pipe("/shop/2.csv.gz", gzip.compress((tmp_path / "shop/b/2.csv").read_bytes()))
    try:
        assert [row["user_id"] for row in read(tmp_path, path="memory://shop")["rows"]] == users
        before = FilesSource(Files(path="memory://shop")).fingerprint()
        memory.pipe("/shop/1.csv", b"user_id,ts,event_type\n")
        assert FilesSource(Files(path="memory://shop")).fingerprint() != before
    finally:
        memory.rm("/shop", recursive=True)


def test_a_folder_holds_what_its_links_hold_once(tmp_path: Path) -> None:
    write_csv(tmp_path / "shop/a.csv", LINES[0])
    write_csv(tmp_path / "other/b.csv", LINES[1])
    (tmp_path / "shop/sub").symlink_to("../other")
    (tmp_path / "other/loop").symlink_to("../shop")
    (tmp_path / "shop/z").symlink_to("../other")
    assert [row["user_id"] for row in read(tmp_path, path="shop")["rows"]] == ["u1", "u2"]


def test_skipped_files_of_a_folder_are_told(tmp_path: Path) -> None:
    write_csv(tmp_path / "shop/a.csv", *LINES)
    for name in ("b.csv.zip", "c.json", "d.txt", "e.csv.xz", "_SUCCESS"):
        (tmp_path / "shop" / name).touch()
    source = FilesSource(Files(path="shop"), tmp_path)
    assert len(list(source.read(Kind.EVENTS))) == 1
    told = "; not read for their endings: b.csv.zip, c.json, d.txt and 1 more"
    assert source.tell_omissions() == told


def test_a_given_format_takes_files_without_an_ending(tmp_path: Path) -> None:
    write_csv(tmp_path / "shop/0000_part_00", LINES[0])
    write_csv(tmp_path / "shop/0001_part_00.gz", LINES[1])
    packed = tmp_path / "shop/0001_part_00.gz"
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    (tmp_path / "shop/x.parquet").touch()
    source = FilesSource(Files(path="shop", format="csv"), tmp_path)
    assert sum(batch.rows for batch in source.read(Kind.EVENTS)) == 2
    assert source.tell_omissions() == "; not read for their endings: x.parquet"
    with pytest.raises(UserError, match=r"set ingest\.files\.format"):
        (tmp_path / "shop/x.parquet").unlink()
        read(tmp_path, path="shop")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.csv", "absent.csv: no such file or folder"),
        ("empty", "empty: no event files in this folder"),
        ("*.nothing", r"\*.nothing: no file matches"),
        ("what.dat", "ending tells no format"),
        ("book.xlsx", "ending tells no format; save the sheet as CSV"),
        ("nope://bucket/x.csv", "Protocol not known: nope"),
    ],
)
def test_nothing_to_read_names_the_path(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "what.dat").touch()
    (tmp_path / "book.xlsx").touch()
    source = FilesSource(Files(path=path), tmp_path)
    with pytest.raises(UserError, match=message):
        source.fingerprint()
    with pytest.raises(UserError, match=message):
        list(source.read(Kind.EVENTS))


def test_fingerprint_follows_content_and_names_alone(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write_csv(tmp_path / place / "shop/1.csv", LINES[0])
        write_csv(tmp_path / place / "users.csv", "u1", header="user_id")
    params = Files(path="shop", users="users.csv")
    here, there = (FilesSource(params, tmp_path / p) for p in ("here", "there"))
    first = here.fingerprint()
    assert first == there.fingerprint()
    assert str(tmp_path) not in json.dumps(first)
    write_csv(tmp_path / "there/shop/1.csv", LINES[0].replace("u1", "u3"))
    assert there.fingerprint() != first
    (tmp_path / "here/shop/1.csv").rename(tmp_path / "here/shop/2.csv")
    assert here.fingerprint() != first


@pytest.mark.parametrize("path", ["shop", "shop/*.csv"])
def test_fingerprint_tells_a_file_that_cannot_be_read(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_csv(tmp_path / "shop/a.csv", *LINES)
    (tmp_path / "shop/b.csv").symlink_to("nowhere.csv")
    source = FilesSource(Files(path=path), tmp_path)
    with pytest.raises(UserError, match=r"^b\.csv: .* link to nowhere"):
        source.fingerprint()
    (tmp_path / "shop/b.csv").unlink()

    def refuse(*_: Any) -> None:  # as file modes do, but not to root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files_module, "_describe_content", refuse)
    with pytest.raises(UserError, match=r"^a\.csv: no permission to read it"):
        source.fingerprint()


def test_fingerprint_is_light(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", *LINES)
    code = (
        "import sys; from pathlib import Path\n"
        "from pipelines.config import Files; from pipelines.sources.files import FilesSource\n"
        f"FilesSource(Files(path='e.csv'), Path({str(tmp_path)!r})).fingerprint()\n"
        "print([m for m in ('duckdb', 'pandas', 'ibis', 'torch') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


# -- mapping ---------------------------------------------------------------------------------


def test_mapping_of_columns_values_and_constants(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "e.csv",
        'A,1735689600,pv,"Red; large",x',
        "A,1735689601,4,shoes,x",
        "A,1735689602,noise,shoes,x",
        header="Who,When,What,Ref,price",
    )
    result = read(
        tmp_path,
        path="e.csv",
        mapping={
            "user_id": "Who",
            "ts": {"column": "When", "unit": "s"},
            "event_type": {"column": "What", "values": {"pv": "view", 4: "search", "noise": None}},
            "item_id": {"column": "Ref", "only": ["view"]},
            "query": {"column": "Ref", "only": ["search"]},
            "brand": {"value": "own"},
            "category": {"column": "Ref", "values": {"shoes": "footwear"}},
            "price": None,
        },
    )
    assert result["ignored"] == 1
    assert result["refused"] == []
    view, search = result["rows"]
    assert (view["item_id"], view["query"], view["brand"]) == ("Red; large", None, "own")
    assert (search["item_id"], search["query"], search["category"]) == (None, "shoes", "footwear")
    assert view["ts"] == at("2025-01-01T00:00:00")
    assert view["price"] is None


def test_spellings_of_null_can_be_named_for_every_column(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "e.csv",
        "u1,2025-01-01,view,NULL,NULL",
        "u1,2025-01-01,view,i1,NA",
        r"u1,2025-01-01,view,i1,\N",
        "u1,2025-01-01,view,i1,free",
        "u1,2025-01-01,view,i1,2.5",
        "u1,2025-01-01,view,i1,damaged",
        "NULL,2025-01-01,view,i1,1",
        "u1,NULL,view,i1,1",
    )
    nulls = {"NULL": None, "NA": None, r"\N": None}
    mapping = {
        name: {"column": name, "values": nulls | ({"free": "0"} if name == "price" else {})}
        for name in ("user_id", "ts", "item_id", "price")
    }
    result = read(tmp_path, path="e.csv", mapping=mapping)
    assert [row["price"] for row in result["rows"]] == [None, None, None, 0.0, 2.5]
    assert result["rows"][0]["item_id"] is None
    assert reasons(result) == [(6, "price is not a number"), (8, "missing ts")]
    assert result["anonymous"] == 1


@pytest.mark.parametrize("decimal", [".", ","])
def test_numbers_that_stand_for_null_can_be_named(tmp_path: Path, decimal: str) -> None:
    table = pa.table(
        {
            "user_id": ["u1"] * 2,
            "ts": ["2025-01-01"] * 2,
            "event_type": ["view"] * 2,
            "price": [-1.0, 2.5],
            "quantity": [-1, 2],
        }
    )
    pq.write_table(table, tmp_path / "e.parquet")
    empty = {"-1": None}
    mapping = {name: {"column": name, "values": empty} for name in ("price", "quantity")}
    result = read(tmp_path, path="e.parquet", mapping=mapping, decimal=decimal)
    found = [(row["price"], row["quantity"]) for row in result["rows"]]
    assert (found, result["refused"]) == ([(None, None), (2.5, 2.0)], [])


@pytest.mark.parametrize(
    ("text", "mapping", "expected"),
    [
        ("2025-01-01 12:00:00", {}, "2025-01-01T12:00:00"),
        ("2025-01-01T12:00:00.250+02:00", {}, "2025-01-01T10:00:00.250"),
        ("2019-10-01 00:00:00 UTC", {"timezone": "Asia/Tokyo"}, "2019-10-01T00:00:00"),
        ("2025-07-01 12:00:00", {"timezone": "Europe/London"}, "2025-07-01T11:00:00"),
        ("2025-07-01", {"timezone": "Asia/Tokyo"}, "2025-06-30T15:00:00"),
        ("2025/7/1 1:2", {"timezone": "Asia/Tokyo"}, "2025-06-30T16:02:00"),
        ("2025-07-01 10:00:00 PST", {"timezone": "Europe/London"}, "2025-07-01T17:00:00"),
        ("2025-07-01 10:00 Asia/Tokyo", {"timezone": "Europe/London"}, "2025-07-01T01:00:00"),
        ("2025-07-01 10:00:00.5-05", {"timezone": "Europe/London"}, "2025-07-01T15:00:00.5"),
        # As Shopify writes them.
        ("2025-07-01 12:00:00 +0200", {}, "2025-07-01T10:00:00"),
        ("2025-07-01 12:00:00  -03:30", {"timezone": "Asia/Tokyo"}, "2025-07-01T15:30:00"),
        # Clocks going back: the earlier of two.
        ("2024-11-03 01:30:00", {"timezone": "America/New_York"}, "2024-11-03T05:30:00"),
        ("2011-10-30 01:30:00", {"timezone": "Europe/London"}, "2011-10-30T00:30:00"),
        ("2011-10-30 02:00:00", {"timezone": "Europe/London"}, "2011-10-30T02:00:00"),
        # Clocks going forward: moved by the gap.
        ("2024-03-10 02:30:00", {"timezone": "America/New_York"}, "2024-03-10T07:30:00"),
        ("31/12/2024 23:59", {"format": "%d/%m/%Y %H:%M"}, "2024-12-31T23:59:00"),
        ("01.07.2025 12", {"format": "%d.%m.%Y %H", "timezone": "Europe/Berlin"},
         "2025-07-01T10:00:00"),
        ("2025-01-01 00:00 +0530", {"format": "%Y-%m-%d %H:%M %z"}, "2024-12-31T18:30:00"),
        ("1735689600.5", {"unit": "s"}, "2025-01-01T00:00:00.500"),
        ("1735689600123", {"unit": "ms"}, "2025-01-01T00:00:00.123"),
        ("1735689600123456", {"unit": "us"}, "2025-01-01T00:00:00.123456"),
    ],
)  # fmt: skip
def test_times(tmp_path: Path, text: str, mapping: dict[str, str], expected: str) -> None:
    write_csv(tmp_path / "e.csv", f"u1,{text},view,,")
    result = read(tmp_path, path="e.csv", mapping={"ts": {"column": "ts", **mapping}})
    assert [row["ts"] for row in result["rows"]] == [at(expected)], result["refused"]


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("soon", {}),
        ("2025-02-30", {}),
        ("infinity", {"timezone": "Europe/London"}),
        ("0001-01-01", {"timezone": "Europe/London"}),
        ("290000-01-01", {"timezone": "Europe/London"}),
        ("1735689600000", {"unit": "s"}),
        ("1735689600", {"unit": "ms"}),
        ("1e400", {"unit": "s"}),
        ("nan", {"unit": "s"}),
        ("12/31/2024", {"format": "%d/%m/%Y"}),
        *(
            (f"2025-01-01 10:00:00{rest}", {"timezone": zone})
            for rest in (" PM", " foo", " MSK", ".5 PDT", " 30")
            for zone in ("UTC", "America/New_York")
        ),
    ],
)
def test_bad_times_are_refused(tmp_path: Path, text: str, mapping: dict[str, str]) -> None:
    write_csv(tmp_path / "e.csv", f"u1,{text},view,,")
    result = read(tmp_path, path="e.csv", mapping={"ts": {"column": "ts", **mapping}})
    assert result["rows"] == []
    assert len(result["refused"]) == 1
    assert result["refused"][0]["reason"].startswith("ts ")
    assert json.loads(result["refused"][0]["record"])["ts"] == text


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"ts": {"column": "ts", "timezone": "Mars/Base"}},
            "ts.timezone: no time zone 'Mars/Base'",
        ),
        ({"ts": {"column": "ts", "format": "%Q"}}, "ts.format: not a strptime format"),
        ({"price": "UnitPrice"}, r"e.csv: no column UnitPrice .*mapping.price.*found user_id, ts"),
    ],
)
def test_bad_mapping_names_the_key(tmp_path: Path, mapping: Any, message: str) -> None:
    write_csv(tmp_path / "e.csv", *LINES)
    with pytest.raises(UserError, match=message):
        read(tmp_path, path="e.csv", mapping=mapping)


def test_a_required_column_without_mapping_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "a/1.csv", *LINES)
    write_csv(tmp_path / "a/2.csv", "u1,view", header="user_id,event_type")
    with pytest.raises(UserError, match=r"2\.csv: no column ts; map it .* found user_id, event_ty"):
        read(tmp_path, path="a")
    (tmp_path / "e.jsonl").write_text('{"user_id": "a", "event_type": "view", "time": 1}\n')
    with pytest.raises(UserError, match=r"e\.jsonl: no column ts in any line; found .*time"):
        read(tmp_path, path="e.jsonl")


def test_json_keys_may_be_missing_from_a_line_and_need_no_escape(tmp_path: Path) -> None:
    rows = [
        {"user_id": 7, "ts": "2025-01-01", "event_type": "view", "a/b~'c": "x", "extra": [1]},
        {"user_id": None, "ts": "2025-01-01", "event_type": "view"},
        {"user_id": "8", "ts": "2025-01-01", "event_type": "search", "query": 'say "hi", é'},
    ]
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    result = read(tmp_path, path="e.jsonl", mapping={"item_id": "a/b~'c"})
    assert result["anonymous"] == 1
    assert [(r["user_id"], r["item_id"], r["query"]) for r in result["rows"]] == [
        ("7", "x", None),
        ("8", None, 'say "hi", é'),
    ]


def test_parquet_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": pa.array([17850.0, None, float("nan")]),
            "ts": pa.array([datetime(2025, 7, 1, 12)] * 3, pa.timestamp("ns")),
            "event_type": pa.array(["view"] * 3).dictionary_encode(),
            "item_id": pa.array([b"i1", b"i1", b"i1"]),
            "price": pa.array(["1.25"] * 3).cast(pa.decimal128(10, 2)),
            "category": pa.array([3, 3, 3], pa.int8()),
            "brand": pa.array(["120.00"] * 3).cast(pa.decimal128(10, 2)),
            "session_id": pa.array(["120"] * 3).cast(pa.decimal128(20, 0)),
        }
    )
    pq.write_table(table, tmp_path / "e.parquet")
    mapping = {"ts": {"column": "ts", "timezone": "Europe/London"}}
    result = read(tmp_path, path="e.parquet", mapping=mapping)
    assert result["anonymous"] == 2
    (row,) = result["rows"]
    assert (row["user_id"], row["item_id"], row["price"], row["category"]) == (
        "17850",
        "i1",
        1.25,
        "3",
    )
    assert (row["brand"], row["session_id"]) == ("120", "120")
    assert row["ts"] == at("2025-07-01T11:00:00")
    for column, message in [
        (pa.array([1, 2, 3]), "holds numbers, not times; say in"),
        (pa.array([True, False, True]), "of type bool, which holds no time"),
    ]:
        changed = table.set_column(1, "ts", column)
        pq.write_table(changed, tmp_path / "e.parquet")
        with pytest.raises(UserError, match=message):
            read(tmp_path, path="e.parquet")
    days = table.set_column(1, "ts", pa.array([date(2025, 7, 1)] * 3))
    pq.write_table(days, tmp_path / "e.parquet")
    assert read(tmp_path, path="e.parquet")["rows"][0]["ts"] == at("2025-07-01T00:00:00")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([b"i1", b"i2\0", None]), ["i1", "i2", None]),
        (pa.array([b"i1", b"\xff\0\x01", None]), ["i1", "ff0001", None]),
        (pa.array([b"i1", b"\xff\x01", None]).dictionary_encode(), ["i1", "ff01", None]),
        (pa.array([b"\x01\xff", b"ab", None], pa.binary(2)), ["01ff", "ab", None]),
    ],
)
def test_bytes_of_parquet_are_text_or_their_digits(
    tmp_path: Path, column: pa.Array, expected: list[str | None]
) -> None:
    table = pa.table(
        {
            "user_id": ["a", "b", "c"],
            "ts": pa.array([datetime(2025, 7, 1, 12)] * 3),
            "event_type": ["view"] * 3,
            "item_id": column,
            "price": pa.array([1.5, 2, 3], pa.float16()),
        }
    )
    pq.write_table(table, tmp_path / "e.parquet")
    rows = read(tmp_path, path="e.parquet")["rows"]
    assert [row["item_id"] for row in rows] == expected
    assert [row["price"] for row in rows] == [1.5, 2.0, 3.0]


def test_nested_values_are_no_text(tmp_path: Path) -> None:
    """Some exports keep the items of an order in one list: as text they would be an item's name."""
    items = pa.array([[{"item_id": "i1"}, {"item_id": "i2"}]])
    table = pa.table({"user_id": ["a"], "ts": ["2025-07-01"], "event_type": ["purchase"]})
    pq.write_table(table.append_column("items", items), tmp_path / "e.parquet")
    with pytest.raises(UserError, match=r"e.parquet: column items holds a list or an obj"):
        read(tmp_path, path="e.parquet", mapping={"item_id": "items"})
    rows = [{**_as_dicts()[0], "items": value} for value in (["i1"], {"a": 1}, "[i1", "{i}", None)]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = read(tmp_path, path="e.jsonl", mapping={"item_id": "items"})
    assert reasons(result) == [
        (1, "items holds a list or an object"),
        (2, "items holds a list or an object"),
    ]
    assert [row["item_id"] for row in result["rows"]] == ["[i1", "{i}", None]


def test_a_column_of_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    prices = pa.array(["1.25"]).cast(pa.decimal256(40, 2))
    table = pa.table({"user_id": ["a"], "ts": ["2025-07-01"], "event_type": ["view"]})
    pq.write_table(table.append_column("price", prices), tmp_path / "e.parquet")
    with pytest.raises(UserError, match=r"e.parquet: .*cannot be read: .*price \(decimal256"):
        read(tmp_path, path="e.parquet")


@pytest.mark.parametrize(
    ("column", "unit"),
    [
        (pa.array([1735689600, None]), "s"),
        (pa.array([1735689600123, None]), "ms"),
        (pa.array([1735689600.5, float("nan")]), "s"),
        (pa.array(["1735689600123456", None]).cast(pa.decimal128(16, 0)), "us"),
    ],
)
def test_numbers_of_a_typed_column_are_times(tmp_path: Path, column: pa.Array, unit: str) -> None:
    table = pa.table({"user_id": ["u1"] * 2, "ts": column, "event_type": ["view"] * 2})
    pq.write_table(table, tmp_path / "e.parquet")
    result = read(tmp_path, path="e.parquet", mapping={"ts": {"column": "ts", "unit": unit}})
    fraction = {"s": ".5", "ms": ".123", "us": ".123456"}[unit]
    if pa.types.is_integer(column.type) and unit == "s":
        fraction = ""
    assert [row["ts"] for row in result["rows"]] == [at(f"2025-01-01T00:00:00{fraction}")]
    assert reasons(result) == [(2, "missing ts")]


def test_a_time_with_a_zone_is_not_moved_to_another(tmp_path: Path) -> None:
    times = pa.array([at("2025-07-01T12:00:00")], pa.timestamp("us", "America/New_York"))
    table = pa.table({"user_id": ["u1"], "ts": times, "event_type": ["view"]})
    pq.write_table(table, tmp_path / "e.parquet")
    mapping = {"ts": {"column": "ts", "timezone": "Asia/Tokyo"}}
    (row,) = read(tmp_path, path="e.parquet", mapping=mapping)["rows"]
    assert row["ts"] == at("2025-07-01T12:00:00")


def test_times_and_lengths_are_taken_up_to_their_limits(tmp_path: Path) -> None:
    longest, words = "u" * 256, "w" * 1024
    write_csv(
        tmp_path / "e.csv",
        f"{longest},1971-01-01T00:00:00Z,view,{'i' * 257},",
        f"{longest},1971-01-01T00:00:00Z,view,{longest},",
        f"{longest},2199-12-31T23:59:59.999999Z,view,,{words}",
        "u1,1970-12-31T23:59:59.999999Z,view,,",
        "u1,2200-01-01T00:00:00Z,view,,",
        f"u1,2025-01-01T00:00:00Z,view,,{words}w",
        header="user_id,ts,event_type,item_id,query",
    )
    result = read(tmp_path, path="e.csv")
    assert [row["user_id"] for row in result["rows"]] == [longest] * 2
    assert result["rows"][1]["query"] == words
    assert reasons(result) == [
        (1, "item_id is longer than 256 characters"),
        (4, "ts is not between 1971 and 2199"),
        (5, "ts is not between 1971 and 2199"),
        (6, "query is longer than 1024 characters"),
    ]


def test_two_columns_of_one_name_are_told_where_they_are_wanted(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", "u1,2025-01-01,view,a,b", header="user_id,ts,event_type,x,x")
    (row,) = read(tmp_path, path="e.csv")["rows"]
    assert row["user_id"] == "u1"
    with pytest.raises(UserError, match=r"e\.csv: there are two columns x"):
        read(tmp_path, path="e.csv", mapping={"item_id": "x"})


def test_values_may_hold_quotation_marks_and_numbers(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", "u1,2025-01-01,it's seen,7,", "u1,2025-01-02,it's seen,7.5,")
    values = {"it's seen": "view"}
    mapping = {
        "event_type": {"column": "event_type", "values": values},
        "brand": {"value": "o'clock"},
        "category": {"value": 2.0},
        "quantity": {"value": 1.5},
        "item_id": {"column": "item_id", "values": {7: "seven's"}},
    }
    rows = read(tmp_path, path="e.csv", mapping=mapping)["rows"]
    assert [(r["event_type"], r["item_id"]) for r in rows] == [("view", "seven's"), ("view", "7.5")]
    assert {(r["brand"], r["category"], r["quantity"]) for r in rows} == {("o'clock", "2", 1.5)}


def test_text_is_stripped_and_empty_text_is_null(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "e.csv",
        " u1\t, 2025-01-01 , view,  , 1 ",
        "é ,2025-01-01,view,é,",
        "é,2025-01-01,view,,",
        "\ufeffu1\u00a0,2025-01-01,view,\u200b \u00a0,",
        "u1\0,2025-01-01,view,a\u00a0b\u3000,",
    )
    rows = read(tmp_path, path="e.csv")["rows"]
    assert [(r["user_id"], r["item_id"], r["price"]) for r in rows] == [
        ("u1", None, 1.0), ("é", "é", None), ("é", None, None),
        ("u1", None, None), ("u1", "a\u00a0b", None),
    ]  # fmt: skip


def test_the_service_strips_as_ingest_does() -> None:
    """What a model learnt under one name is asked for under the same."""
    marks = [chr(code) for code in range(1, 0x10000) if not 0xD800 <= code < 0xE000]
    texts = [f"{mark}a{mark}b{mark}{mark}" for mark in marks] + ["", " ", "\u200b \u00a0", "a", "é"]
    with connect() as connection:
        found = connection.execute(
            "SELECT nullif(regexp_replace(text, ?, '', 'g'), '') FROM (SELECT unnest(?) AS text)",
            [_UNSEEN, texts],
        ).fetchall()
    assert [strip_unseen(text) for text in texts] == [text for (text,) in found]


@pytest.mark.parametrize("line", ["{i},2025-01-01,view,,", "{i},2025-01-01,view,,\n"])
def test_rows_keep_their_order(tmp_path: Path, line: str) -> None:
    write_csv(tmp_path / "e.csv", *(line.format(i=i) for i in range(100_000)))
    for _ in range(3):
        rows = read(tmp_path, path="e.csv")["rows"]
        assert [row["user_id"] for row in rows] == [str(i) for i in range(100_000)]


def test_columns_that_differ_by_case_are_two(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "e.csv", "u1,2025-01-01,view,1,2", header="user_id,ts,event_type,Price,price"
    )
    result = read(tmp_path, path="e.csv", mapping={"price": "Price", "quantity": "price"})
    assert (result["rows"][0]["price"], result["rows"][0]["quantity"]) == (1.0, 2.0)


def test_a_column_that_differs_from_the_schema_by_case_is_told(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", LINES[0], header="user_id,ts,event_type,item_id,Price")
    with pytest.raises(
        UserError, match=r"e\.csv: column Price .* ingest\.files\.mapping\.price: Pr"
    ):
        read(tmp_path, path="e.csv")
    assert read(tmp_path, path="e.csv", mapping={"price": "Price"})["rows"][0]["price"] == 1.5
    assert read(tmp_path, path="e.csv", mapping={"price": None})["rows"][0]["price"] is None
    write_csv(tmp_path / "i.csv", "i1,2", header="item_id,PRICE")
    with pytest.raises(
        UserError, match=r"i\.csv: column PRICE .*files\.items_mapping\.price: PRICE"
    ):
        read(tmp_path, Kind.ITEMS, path="e.csv", items="i.csv")


@pytest.mark.parametrize("odd", ["0.csv", "2.csv"])
def test_an_optional_column_that_another_file_lacks_is_told(tmp_path: Path, odd: str) -> None:
    """No failure: searches in a file of their own have no price."""
    write_csv(tmp_path / "a/1.csv", LINES[0])
    write_csv(tmp_path / "a" / odd, LINES[1], header=HEADER.replace("price", "unit_price"))
    for mapping, told in (
        ({}, f"; columns that are not everywhere, null there: price in {odd} (as in 1.csv)"),
        ({"price": None}, ""),
    ):
        source = FilesSource(Files(path="a", mapping=mapping), tmp_path)
        assert sum(batch.rows for batch in source.read(Kind.EVENTS)) == 2
        assert source.tell_omissions() == told


def test_a_key_that_another_file_of_json_lines_lacks_is_told(tmp_path: Path) -> None:
    """A few lines may lack a key by chance, many of an export that renamed it do not."""
    rows = [{**_as_dicts()[1], "sku": "i1"}] * 1000
    renamed = [{("article" if k == "sku" else k): v for k, v in row.items()} for row in rows]
    for number, content in enumerate([rows, rows[:1], renamed[:999]]):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / f"{number}.jsonl").write_text(text)
    source = FilesSource(Files(path="*.jsonl", mapping={"item_id": "sku"}), tmp_path)
    assert sum(batch.rows for batch in source.read(Kind.EVENTS)) == 2000
    assert source.tell_omissions() == ""
    (tmp_path / "2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    assert sum(batch.rows for batch in source.read(Kind.EVENTS)) == 2001
    told = "; columns that are not everywhere, null there: sku in 2.jsonl (as in 0.jsonl)"
    assert source.tell_omissions() == told


def test_a_column_of_nulls_alone_is_as_if_absent(tmp_path: Path) -> None:
    users = {"user_id": ["u1"], "age": pa.nulls(1), "region": pa.nulls(1), "signup_ts": pa.nulls(1)}
    pq.write_table(pa.table(users), tmp_path / "u.parquet")
    write_csv(tmp_path / "e.csv", *LINES)
    (row,) = read(tmp_path, Kind.USERS, path="e.csv", users="u.parquet")["rows"]
    assert row == {"user_id": "u1", "age": None, "gender": None, "region": None, "signup_ts": None}


def test_users_and_items(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", *LINES)
    header = "user_id,age,gender,region,signup_ts"
    write_csv(tmp_path / "u.csv", "u1,33,f,,2024-05-01", "u2,old,m,,", header=header)
    files = {"path": "e.csv", "users": "u.csv"}
    result = read(tmp_path, Kind.USERS, **files)
    assert result["rows"] == [
        {"user_id": "u1", "age": 33.0, "gender": "f", "region": None, "signup_ts": at("2024-05-01")}
    ]
    assert reasons(result) == [(2, "age is not a number")]
    assert read(tmp_path, Kind.ITEMS, **files)["rows"] == []


def test_users_and_items_have_mappings_of_their_own(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", *LINES)
    header = "Kunde;Alter;seit"
    write_csv(tmp_path / "u.csv", "u1;unbekannt;20.01.2025 03:00", "u2;41;", header=header)
    write_csv(tmp_path / "i.csv", "i1;9,90", header="Artikel;Preis")
    files = {"path": "e.csv", "users": "u.csv", "items": "i.csv", "decimal": ","}
    with pytest.raises(
        UserError, match=r"u.csv: no column user_id; map it in ingest.files.users_mapping.user_id"
    ):
        read(tmp_path, Kind.USERS, **files)
    since = {"column": "seit", "format": "%d.%m.%Y %H:%M", "timezone": "Europe/Berlin"}
    files["users_mapping"] = {
        "user_id": "Kunde",
        "age": {"column": "Alter", "values": {"unbekannt": None}},
        "signup_ts": since,
        "region": {"value": "de"},
    }
    files["items_mapping"] = {"item_id": "Artikel", "price": "Preis"}
    rows = read(tmp_path, Kind.USERS, **files)["rows"]
    assert [(r["user_id"], r["age"], r["region"], r["signup_ts"]) for r in rows] == [
        ("u1", None, "de", at("2025-01-20T02:00:00")),
        ("u2", 41.0, "de", None),
    ]
    assert read(tmp_path, Kind.ITEMS, **files)["rows"][0]["price"] == 9.9
    source = FilesSource(Files(**files | {"users_mapping": {"user_id": "Kunde"}}), tmp_path)
    list(source.read(Kind.USERS))
    assert source.tell_omissions() == "; columns that are not used: Alter, seit of u.csv"
    since["timezone"] = "Nowhere"
    with pytest.raises(UserError, match=r"ingest.files.users_mapping.signup_ts.timezone: no time"):
        read(tmp_path, Kind.USERS, **files)


# -- damage ----------------------------------------------------------------------------------


def test_each_bad_row_has_its_number_and_reason(tmp_path: Path) -> None:
    good = "u1,2025-01-01,view,i1,1"
    write_csv(
        tmp_path / "e.csv",
        good,
        "u1,2025-01-01,view,i1,1,surplus",
        '"u\n1",2025-01-01,view,"i,1",1',
        "u1,,view,i1,1",
        "u1,2025-01-01",
        good,
        "u1,2025-01-01,dance,i1,1",
        "u1,2025-01-01,,i1,1",
        "u1,2025-01-01,view,i1,cheap",
        "u1,2025-01-01,view,i1,inf",
        f"{'u' * 257},2025-01-01,view,i1,1",
        ",2025-01-01,dance,i1,cheap",
        "u1,2025-01-01,view,i1,nan",
        "u1,2025-01-01,view,i1,-3",
    )
    result = read(tmp_path, path="e.csv")
    assert reasons(result) == [
        (2, "more values than columns"),
        (4, "missing ts"),
        (5, "fewer values than columns"),
        (7, "unknown event_type"),
        (8, "missing event_type"),
        (9, "price is not a number"),
        (10, "price is not a number"),
        (11, "user_id is longer than 256 characters"),
    ]
    assert {row["source"] for row in result["refused"]} == {"e.csv"}
    assert json.loads(result["refused"][3]["record"]) == {
        "user_id": "u1", "ts": "2025-01-01", "event_type": "dance", "item_id": "i1", "price": "1",
    }  # fmt: skip
    assert json.loads(result["refused"][0]["record"]) == {"line": "u1,2025-01-01,view,i1,1,surplus"}
    assert [row["price"] for row in result["rows"]] == [1.0, 1.0, 1.0, None, -3.0]
    assert result["anonymous"] == 1
    assert result["read"] == 14 == len(result["rows"]) + len(result["refused"]) + 1


def test_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    lines = [b"u1,2025-01-01,view,caf\xe9,1", LINES[0].encode(), b"\xff,1", b"u1,2025-01-01,view,,"]
    (tmp_path / "e.csv").write_bytes(b"\n".join([HEADER.encode(), *lines]))
    result = read(tmp_path, path="e.csv")
    assert reasons(result) == [(1, "not UTF-8"), (3, "fewer values than columns")]
    assert len(result["rows"]) == 2
    (tmp_path / "e.jsonl").write_bytes(
        b'{"user_id": "\xff", "ts": "2025-01-01", "event_type": "view"}\n'
        b'{"user_id": "a", "ts": "2025-01-01", "event_type": "view"}\n'
        b"{broken\n[1]\n\n"
    )
    result = read(tmp_path, path="e.jsonl")
    assert reasons(result) == [(1, "not UTF-8"), (3, "not a JSON object"), (4, "not a JSON object")]
    assert [row["user_id"] for row in result["rows"]] == ["a"]


def test_empty_lines_and_files(tmp_path: Path) -> None:
    write_csv(tmp_path / "e.csv", LINES[0], "", LINES[1], "", "")
    assert read(tmp_path, path="e.csv")["read"] == 2
    write_csv(tmp_path / "none.csv")
    assert read(tmp_path, path="none.csv")["read"] == 0
    (tmp_path / "none.jsonl").touch()
    assert read(tmp_path, path="none.jsonl")["read"] == 0
    (tmp_path / "void.csv").touch()
    with pytest.raises(UserError, match=r"void\.csv: the file is empty"):
        read(tmp_path, path="void.csv")
    (tmp_path / "bare.csv").write_text(HEADER)
    assert read(tmp_path, path="bare.csv")["read"] == 0
    write_csv(tmp_path / "hours/1.csv", LINES[0])
    (tmp_path / "hours/0.csv").touch()
    (tmp_path / "hours/2.csv.gz").write_bytes(gzip.compress(b""))
    assert read(tmp_path, path="hours")["read"] == 1


@pytest.mark.parametrize("name", ["e.parquet", "e.csv.gz", "e.jsonl.gz"])
@pytest.mark.parametrize("damage", ["cut", "garbled", "no such thing"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    rows = [{"user_id": f"u{i}", "ts": "2025-01-01", "event_type": "view"} for i in range(5000)]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif "csv" in name:
        lines = "".join(f"{r['user_id']},2025-01-01,view\n" for r in rows)
        path.write_bytes(gzip.compress(b"user_id,ts,event_type\n" + lines.encode()))
    else:
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "cut": content[:middle],
            "garbled": content[: middle // 4] + b"\xaa" * middle + content[middle // 4 + middle :],
            "no such thing": b"hello, hello, hello",
        }[damage]
    )
    with pytest.raises(UserError, match=rf"^{name}: "):
        read(tmp_path, path=name)


@pytest.mark.parametrize("line", ['u1,2025-01-01,view,"i1,1', 'u1,2025-01-01,view,i1,"1'])
@pytest.mark.parametrize("following", [1, 2000])
def test_an_open_quotation_mark_does_not_swallow_rows_in_silence(
    tmp_path: Path, line: str, following: int
) -> None:
    write_csv(tmp_path / "e.csv", LINES[0], line, *(LINES * following))
    with pytest.raises(UserError, match=r"e\.csv, row 2: .*seems not to be closed; close it"):
        read(tmp_path, path="e.csv")


@pytest.mark.parametrize("second", ['u1,2025-01-01,view,"i1,1', 'u1,2025-01-01,"view,i1,1'])
@pytest.mark.parametrize("between", [0, 1, 40])
def test_every_line_between_two_open_quotation_marks_is_refused(
    tmp_path: Path, second: str, between: int
) -> None:
    first = 'u1,2025-01-01,view,"i1,1'
    middle = ["u3,2025-01-01,view,i3,1"] * between
    write_csv(tmp_path / "e.csv", LINES[0], first, *middle, second, *LINES)
    result = read(tmp_path, path="e.csv")
    assert [row["user_id"] for row in result["rows"]] == ["u1", "u1", "u2"]
    assert reasons(result) == [(2, "a quotation mark seems not to be closed")] * (between + 2)
    assert result["read"] == between + 5
    assert all("u3" in row["record"] for row in result["refused"][1:-1])
    plain = read(tmp_path, path="e.csv", quoted=False)
    assert len(plain["rows"]) + len(plain["refused"]) == between + 5
    assert plain["rows"][1]["item_id"] == '"i1'


def test_open_marks_in_a_column_that_is_not_mapped_swallow_nothing_in_silence(
    tmp_path: Path,
) -> None:
    notes = ['"Nr. 5 Eau' if i % 500 == 7 else "x" for i in range(1000)]
    lines = [f"u{i},2025-01-01,view,{note}" for i, note in enumerate(notes)]
    write_csv(tmp_path / "e.csv", *lines, header="user_id,ts,event_type,note")
    result = read(tmp_path, path="e.csv")
    assert (len(result["rows"]), len(result["refused"])) == (499, 501)
    assert result["read"] == 1000


def test_long_values_stop_only_where_an_open_quotation_mark_may_be(tmp_path: Path) -> None:
    long = "x" * 70_000
    row = {"user_id": "u1", "ts": "2025-01-01", "event_type": "view", "html": long}
    (tmp_path / "e.jsonl").write_text(json.dumps(row) + "\n")
    assert len(read(tmp_path, path="e.jsonl")["rows"]) == 1
    write_csv(tmp_path / "e.csv", f"u1,2025-01-01,view,{long}", header="user_id,ts,event_type,html")
    assert len(read(tmp_path, path="e.csv")["rows"]) == 1
    with pytest.raises(UserError, match=r"e\.csv, row 1: a value of over 65536 bytes"):
        read(tmp_path, path="e.csv", mapping={"query": "html"})
    refused = read(tmp_path, path="e.csv", mapping={"query": "html"}, quoted=False)
    assert refused["read"] == 1


def test_text_of_several_lines_is_text(tmp_path: Path) -> None:
    notes = ["red, blue\nand green", "one\n\ntwo\n", "soft, warm, light, and\nlasting", "a\nb"]
    quoted = [f'u1,2025-01-01,search,"{note}",1' for note in notes]
    write_csv(tmp_path / "e.csv", *quoted, header="user_id,ts,event_type,query,price")
    result = read(tmp_path, path="e.csv")
    assert [row["query"] for row in result["rows"]] == [note.strip() for note in notes]
    assert result["refused"] == []


def test_quotation_marks_within_values_are_text(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "e.csv",
        'u1,2025-01-01,view,5" nail,1',
        'u1,2025-01-01,view,"5"" ""nail"" x",1',
    )
    rows = read(tmp_path, path="e.csv")["rows"]
    assert [row["item_id"] for row in rows] == ['5" nail', '5" "nail" x']


def test_other_encodings_are_told(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_bytes("\n".join([HEADER, *LINES]).encode("utf-16"))
    with pytest.raises(UserError, match=r"e\.csv: the first line is not UTF-8; say in ingest\.fil"):
        read(tmp_path, path="e.csv")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("name", ["e.csv", "e.jsonl"])
def test_text_of_other_encodings_is_read(tmp_path: Path, encoding: str, name: str) -> None:
    lines = [HEADER, 'u1,2025-01-01,view,"Käse, ""jung""",1', *LINES * 40_000]
    if name == "e.jsonl":
        row = {"user_id": "u1", "ts": "2025-01-01", "event_type": "view", "item_id": 'Käse, "jung"'}
        lines = [json.dumps(row, ensure_ascii=False)] * 2
    (tmp_path / name).write_bytes("\n".join(lines).encode(encoding))
    result = read(tmp_path, path=name, encoding=encoding)
    assert result["rows"][0]["item_id"] == 'Käse, "jung"'
    assert len(result["rows"]) == result["read"] == (2 if name == "e.jsonl" else 80_001)


def test_utf16_without_a_mark_of_its_order_is_told(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_bytes("\n".join([HEADER, *LINES]).encode("utf-16-be"))
    with pytest.raises(UserError, match=r"e\.csv: not utf-16 \(.*BOM\); say in ingest\.files\.enc"):
        read(tmp_path, path="e.csv", encoding="utf-16")
    assert len(read(tmp_path, path="e.csv", encoding="utf-16-be")["rows"]) == 2


def test_bytes_that_are_no_text_of_the_encoding_cost_their_row_alone(tmp_path: Path) -> None:
    lines = [LINES[0].encode(), b"u1,2025-01-01,view,caf\x81,1", LINES[1].encode()]
    (tmp_path / "e.csv").write_bytes(b"\n".join([HEADER.encode(), *lines]))
    result = read(tmp_path, path="e.csv", encoding="cp1252")
    assert reasons(result) == [(2, "not cp1252")]
    assert len(result["rows"]) == 2


def test_an_encoding_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="no such encoding"):
        Files(path="e.csv", encoding="klingon")


def test_decimal_commas(tmp_path: Path) -> None:
    texts = ["12,90", "1.234,5", "-1.234.567", "7", "12.90", "1.23,4", "1,2,3", "", "nan", "x"]
    lines = [f"u{i};2025-01-01;view;i1;{text}" for i, text in enumerate(texts)]
    write_csv(tmp_path / "e.csv", *lines, header=HEADER.replace(",", ";"))
    result = read(tmp_path, path="e.csv", decimal=",")
    prices = [row["price"] for row in result["rows"]]
    assert prices == [12.9, 1234.5, -1234567.0, 7.0, None, None]
    assert reasons(result) == [(row, "price is not a number") for row in (5, 6, 7, 10)]
    row = {"user_id": "u1", "ts": "2025-01-01", "event_type": "view", "price": 12.9}
    (tmp_path / "e.jsonl").write_text(json.dumps(row))
    assert read(tmp_path, path="e.jsonl", decimal=",")["rows"][0]["price"] == 12.9


def test_row_numbers_hold_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources.files._BLOCK_BYTES", 1 << 12)
    lines = []
    for i in range(1, 3001):
        kind = "dance" if i % 100 == 0 else "view"
        lines.append(f"u{i},2025-01-01,{kind},{'i' * (i % 7)},{',' if i % 130 == 0 else ''}")
    write_csv(tmp_path / "e.csv", *lines)
    result = read(tmp_path, path="e.csv")
    found = {row["row"]: row["reason"] for row in result["refused"]}
    assert {n for n, r in found.items() if r == "more values than columns"} == set(
        range(130, 3001, 130)
    )
    assert {n for n, r in found.items() if r == "unknown event_type"} == {
        n for n in range(100, 3001, 100) if n % 130
    }
    assert result["read"] == 3000
    bad = set(found)
    assert [r["user_id"] for r in result["rows"]] == [
        f"u{i}" for i in range(1, 3001) if i not in bad
    ]


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=300),
    ending=st.sampled_from(["csv", "jsonl", "csv.gz", "parquet"]),
    encoding=st.sampled_from(["utf-8", "utf-16", "cp1252"]),
)
def test_any_bytes_are_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str, encoding: str
) -> None:
    root = tmp_path_factory.mktemp("any")
    head = f"{HEADER}\n".encode(encoding) if ending == "csv" else b""
    (root / f"e.{ending}").write_bytes(head + content)
    try:
        result = read(root, path=f"e.{ending}", encoding=encoding)
    except UserError as error:
        assert f"e.{ending}" in str(error)
    else:
        kept = len(result["rows"]) + len(result["refused"]) + result["anonymous"]
        assert result["read"] == kept
