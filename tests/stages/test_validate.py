"""The validate stage with the real Great Expectations."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import parse_params
from pipelines.errors import UserError
from pipelines.events import EVENT_SCHEMA
from pipelines.io import digest_directory
from pipelines.stages.validate import run
from pipelines.validation.days import describe_days

ROOT = Path(__file__).resolve().parents[2]
START = datetime(2025, 3, 3, tzinfo=UTC)
Row = dict[str, Any]


def make_rows(days: int = 36, per_day: int = 8) -> list[Row]:
    return [
        {
            "event_id": f"e{day}-{n}",
            "user_id": f"u{n}",
            "ts": START + timedelta(days=day, hours=n),
            "event_type": "purchase" if n == 0 else "view",
            "item_id": "i1",
            "price": 9.5,
            "quantity": 1.0 if n == 0 else None,
        }
        for day in range(days)
        for n in range(per_day)
    ]


def write_events(root: Path, rows: list[Row], schema: pa.Schema = EVENT_SCHEMA) -> None:
    shutil.copytree(ROOT / "expectations", root / "expectations")
    by_day: dict[str, list[Row]] = {}
    for row in rows:
        by_day.setdefault(row["ts"].date().isoformat(), []).append(row)
    for day, part in by_day.items():
        folder = root / "data/events" / f"day={day}"
        folder.mkdir(parents=True)
        part.sort(key=lambda r: (r["ts"], r["event_id"]))
        table = pa.Table.from_pylist(part, schema=EVENT_SCHEMA).select(schema.names)
        pq.write_table(table, folder / "part-0.parquet")


def validate(root: Path, **settings: float) -> dict[str, Any]:
    run(parse_params({"validate": settings}), root)
    report: dict[str, Any] = json.loads((root / "reports/validation.json").read_text())
    return report


def count_rows(folder: Path) -> int:
    return sum(pq.ParquetFile(p).metadata.num_rows for p in folder.rglob("*.parquet"))


def test_clean_events_pass_unchanged_twice_with_the_same_bytes(tmp_path: Path) -> None:
    rows = make_rows()
    write_events(tmp_path, rows)
    report = validate(tmp_path)
    assert report["passed"]
    assert report["quarantined"] == 0
    # Not an empty folder, of which DVC would warn.
    assert pq.read_table(tmp_path / "data/quarantine/validate").num_rows == 0
    assert report["warnings"] == []
    assert count_rows(tmp_path / "data/valid") == len(rows)
    docs = tmp_path / "reports/data_docs"
    page = (docs / "index.html").read_text()
    assert "great-expectations-web-assets" not in page
    before = [digest_directory(tmp_path / p) for p in ("data/valid", "reports/data_docs")]
    validate(tmp_path)
    assert [digest_directory(tmp_path / p) for p in ("data/valid", "reports/data_docs")] == before


def test_rows_that_break_a_rule_are_set_aside_with_the_reason(tmp_path: Path) -> None:
    rows = make_rows()
    rows[3]["price"] = -4.0
    rows[11]["event_type"] = "dance"
    rows[16]["quantity"] = 0.0
    write_events(tmp_path, rows)
    report = validate(tmp_path)
    assert report["passed"]
    assert report["quarantined"] == 3
    assert count_rows(tmp_path / "data/valid") == len(rows) - 3
    kept = pq.read_table(tmp_path / "data/quarantine/validate").to_pylist()
    reasons = {json.loads(r["record"])["event_id"]: r["reason"] for r in kept}
    assert reasons == {
        "e0-3": "column_values_to_be_between(price)",
        "e1-3": "column_values_to_be_in_set(event_type)",
        "e2-0": "column_values_to_be_between(quantity)",
    }
    for row in kept:  # counted from 1, as those of ingest
        source = pq.read_table(tmp_path / row["source"]).to_pylist()
        assert source[row["row"] - 1]["event_id"] == json.loads(row["record"])["event_id"]
    assert any("price" in warning and "-4.0" in warning for warning in report["warnings"])


def test_days_that_are_checked_in_parts_are_judged_as_one_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stages.validate.ROWS_AT_ONCE", 24)
    rows = make_rows(5)
    for number in (*range(16, 24), 26, 39):  # the third day whole
        rows[number]["price"] = -1.0
    write_events(tmp_path, rows)
    # Exactly as many as may be.
    report = validate(tmp_path, max_row_failure_share=0.25)
    assert (report["rows"], report["quarantined"]) == (40, 10)
    (rule,) = (e for e in report["expectations"] if not e["passed"])
    assert (rule["column"], rule["failed_rows"], rule["share"]) == ("price", 10, 0.25)
    kept = pq.read_table(tmp_path / "data/quarantine/validate").to_pylist()
    found = [(row["source"].split("/")[2], row["row"]) for row in kept]
    third = [("day=2025-03-05", row) for row in range(1, 9)]
    assert found == [*third, ("day=2025-03-06", 3), ("day=2025-03-07", 8)]
    valid = {
        path.parent.name: pq.ParquetFile(path).read().column("event_id").to_pylist()
        for path in (tmp_path / "data/valid").rglob("*.parquet")
    }
    assert {day: len(ids) for day, ids in sorted(valid.items())} == {
        "day=2025-03-03": 8,
        "day=2025-03-04": 8,
        "day=2025-03-06": 7,
        "day=2025-03-07": 7,
    }
    bad = {json.loads(row["record"])["event_id"] for row in kept}
    ids = {row["event_id"] for row in rows}
    assert {name for part in valid.values() for name in part} == ids - bad


def test_too_many_bad_rows_stop_the_run_and_leave_nothing(tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows[::10]:
        row["price"] = -1.0
    write_events(tmp_path, rows)
    with pytest.raises(UserError, match=r"10\.\d%.*between of column price: 29 rows.*-1\.0"):
        validate(tmp_path)
    assert not (tmp_path / "data/valid").exists()
    assert not (tmp_path / "reports/data_docs").exists()


def test_an_event_id_on_two_days_is_critical(tmp_path: Path) -> None:
    rows = make_rows()
    rows[100]["event_id"] = rows[0]["event_id"]
    write_events(tmp_path, rows)
    with pytest.raises(UserError, match=r"repeated_event_ids.*1 rows.*e0-0"):
        validate(tmp_path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    schema = EVENT_SCHEMA.remove(EVENT_SCHEMA.get_field_index("price"))
    write_events(tmp_path, make_rows(3), schema)
    with pytest.raises(UserError, match="price"):
        validate(tmp_path)


def test_an_event_in_the_wrong_partition_is_critical(tmp_path: Path) -> None:
    write_events(tmp_path, make_rows(3))
    folder = tmp_path / "data/events"
    (folder / "day=2025-03-05").rename(folder / "day=2025-03-09")
    with pytest.raises(UserError, match="day_of_ts"):
        validate(tmp_path)


def test_a_day_of_ten_times_the_volume_is_a_warning(tmp_path: Path) -> None:
    rows = make_rows()
    day = START + timedelta(days=35)
    rows += [
        {"event_id": f"x{n}", "user_id": "u1", "ts": day + timedelta(hours=9), "event_type": "view"}
        for n in range(80)
    ]
    write_events(tmp_path, rows)
    report = validate(tmp_path)
    assert report["passed"]
    assert any("deviation" in warning for warning in report["warnings"])


def test_stale_data_are_critical_where_freshness_is_asked_for(tmp_path: Path) -> None:
    write_events(tmp_path, make_rows(3))
    settings = {"validate": {"max_staleness_days": 2}, "ingest": {"until": "2025-04-01T00:00:00"}}
    with pytest.raises(UserError, match="days_old"):
        run(parse_params(settings), tmp_path)
    # From the newest event itself nothing would ever be old.
    with pytest.raises(UserError, match=r"counts from ingest\.until, which is not set"):
        run(parse_params({"validate": {"max_staleness_days": 2}}), tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"expectations": [{"type": "expect_wonders", "kwargs": {}}]}', "expect_wonders"),
        ("{", "not a suite"),
    ],
)
def test_a_damaged_suite_is_named(tmp_path: Path, text: str, named: str) -> None:
    write_events(tmp_path, make_rows(3))
    (tmp_path / "expectations/events.json").write_text(text)
    with pytest.raises(UserError, match=rf"events\.json.*{named}"):
        validate(tmp_path)


def test_a_corrupt_partition_is_named(tmp_path: Path) -> None:
    write_events(tmp_path, make_rows(3))
    (tmp_path / "data/events/day=2025-03-04/part-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="day=2025-03-04"):
        validate(tmp_path)


def test_deviation_counts_same_weekdays_only() -> None:
    monday = date(2025, 3, 3)
    counts = {monday + timedelta(days=d): 100 if d % 7 else 1000 for d in range(36)}
    days = describe_days(counts)
    assert days["deviation"].isna().sum() == 21
    assert days["deviation"].abs().max() == 0
    counts[monday + timedelta(days=35)] = 100
    assert describe_days(counts)["deviation"].iloc[-1] < -6
