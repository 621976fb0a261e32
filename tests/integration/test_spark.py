"""Spark builds the same features as DuckDB, bit by bit, and validates as pandas does."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import parse_params
from pipelines.errors import UserError
from pipelines.events import EVENT_SCHEMA
from pipelines.io import digest_directory
from pipelines.spark import open_spark
from pipelines.stages.validate import EVENTS, run
from tests.integration.conftest import Project
from tests.stages.test_validate import Row, make_rows, write_events

SPARK_WANTED = "Spark needs Java: install default-jre-headless, for example by `make system`"
ENGINES = ("pandas", "spark")
NULLABLE = pa.schema([field.with_nullable(True) for field in EVENT_SCHEMA])


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    """A session that runs already, which each validation takes instead of starting its own."""
    assert shutil.which("java"), SPARK_WANTED
    with open_spark() as session:
        yield session


def break_rows(rows: list[Row]) -> None:
    wrong: list[Row] = [
        {"price": -4.0},
        {"price": math.inf},
        {"price": -math.inf, "event_type": "dance"},
        {"price": math.nan, "quantity": math.nan},  # missing, as null is
        {"price": -0.0},
        {"quantity": -0.0},
        {"quantity": -1.0, "event_type": "refund"},
        {"event_type": ""},
        {"user_id": ""},
        {"user_id": "\N{GRINNING FACE}" * 256},
        {"user_id": "\N{GRINNING FACE}" * 257, "item_id": "", "price": -1e-300},
        {"query": "é" * 1025},
        {"query": "", "brand": 'a "b"\n\u2028'},
    ]
    for row, change in zip(rows[5::3], wrong, strict=False):
        row.update(change)
    # A day without one good row.
    for row in rows[64:72]:
        row["price"] = -2.5
    # Times that differ by a microsecond, and not at all.
    rows[1]["ts"] = rows[2]["ts"] - timedelta(microseconds=1)
    rows[3]["ts"] = rows[2]["ts"]


def break_files(folder: Path) -> None:
    """Break what the ingest stage never writes: required columns, the order, the days."""
    for number, path in enumerate(sorted(folder.glob("*/*.parquet"))):
        rows = pq.ParquetFile(path).read().to_pylist()
        if number == 3:
            rows[4]["user_id"] = rows[5]["user_id"] = rows[5]["event_id"] = None
            rows[6]["ts"] = None
        if number == 4:
            rows[0], rows[1] = rows[1], rows[0]
        pq.write_table(pa.Table.from_pylist(rows, NULLABLE), path)
    (folder / "day=2025-03-05").rename(folder / "day=2025-03-02")


def soften_rules(path: Path) -> None:
    """Let no rule stop the run, so that the report tells of all."""
    suite = json.loads(path.read_text())
    for rule in suite["expectations"]:
        rule["severity"] = "warning"
    path.write_text(json.dumps(suite))


def test_spark_reports_and_sets_aside_what_pandas_does(tmp_path: Path, spark: Any) -> None:
    rows = make_rows(10)
    break_rows(rows)
    write_events(tmp_path, rows)
    break_files(tmp_path / EVENTS)
    soften_rules(tmp_path / "expectations/events.json")
    found = {}
    for engine in ENGINES:
        run(parse_params({"validate": {"engine": engine, "max_row_failure_share": 0.5}}), tmp_path)
        docs = tmp_path / "reports/data_docs"
        found[engine] = {
            "report": json.loads((tmp_path / "reports/validation.json").read_text()),
            "quarantine": pq.read_table(tmp_path / "data/quarantine/validate").to_pylist(),
            "valid": digest_directory(tmp_path / "data/valid"),
            "pages": {
                str(page.relative_to(docs)): tell_values(page.read_text())
                for page in docs.rglob("*.html")
            },
        }
    report = found["pandas"]["report"]
    failed = {(e["rule"], e["column"]): e["failed_rows"] for e in report["expectations"]}
    assert failed["column_values_to_be_increasing", "ts"] == 2
    assert failed["column_pair_values_to_be_equal", "day_of_ts"] == 9
    assert failed["column_values_to_not_be_null", "user_id"] == 2
    assert report["quarantined"] == 16
    assert found["spark"] == found["pandas"]
    # Not ended by the stage: it was there before.
    assert spark.range(3).count() == 3


def tell_values(page: str) -> str:
    """A page without what it tells of the table itself: its kind and the hash of a pandas one."""
    page = re.sub(r"(Pandas|Spark)DataFrame", "", page)
    return re.sub(r"<tr>(?:(?!</tr>).)*pandas_data_fingerprint.*?</tr>", "", page, flags=re.DOTALL)


def test_spark_stops_with_the_line_of_pandas(tmp_path: Path, spark: Any) -> None:
    write_events(tmp_path, make_rows(3))
    path = tmp_path / EVENTS / "day=2025-03-04/part-0.parquet"
    pq.write_table(pq.ParquetFile(path).read().take([1, 0, *range(2, 8)]), path)
    lines = []
    for engine in ENGINES:
        with pytest.raises(UserError) as error:
            run(parse_params({"validate": {"engine": engine}}), tmp_path)
        lines.append(str(error.value))
    assert "column_values_to_be_increasing of column ts in suite events: 1 rows" in lines[0]
    assert lines[1] == lines[0]
    assert not (tmp_path / "data/valid").exists()


def test_spark_fetches_no_more_bad_rows_than_stop_the_run(tmp_path: Path, spark: Any) -> None:
    rows = make_rows(50)
    for row in rows:
        row["price"] = -1.0
    for row in rows[::4]:
        row["quantity"] = 0.0
    write_events(tmp_path, rows)
    lines = []
    for engine in ENGINES:
        with pytest.raises(UserError) as error:
            run(parse_params({"validate": {"engine": engine}}), tmp_path)
        lines.append(str(error.value))
    assert lines[0].startswith("validation failed: 400 of 400 rows (100.0%) break")
    assert lines[1] == lines[0].replace("400 of", "at least 400 of", 1)


def test_spark_gives_the_features_that_duckdb_gives(take_finished: Callable[[], Project]) -> None:
    assert shutil.which("java"), SPARK_WANTED
    project = take_finished()
    project.change({"features": {"engine": "duckdb", "max_shoppers": 200}})
    features = project.path / "data/features"
    assert "drawn by chance" in project.run("forecart", "features").stdout
    expected = pq.read_table(features / "snapshots.parquet")
    sequences = digest_directory(features / "sequences")

    project.change({"features": {"engine": "spark"}})
    told = project.run("forecart", "features")
    assert "Traceback" not in told.stderr
    found = pq.read_table(features / "snapshots.parquet")
    assert found.schema == expected.schema
    for name in expected.column_names:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert digest_directory(features / "sequences") == sequences
