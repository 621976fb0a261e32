"""Spark builds the same features as DuckDB, bit by bit, and validates as pandas does."""

from __future__ import annotations

import json
import math
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


def test_spark_sets_aside_what_pandas_sets_aside(tmp_path: Path, spark: Any) -> None:
    rows = make_rows(10)
    break_rows(rows)
    write_events(tmp_path, rows)
    found = {}
    for engine in ENGINES:
        run(parse_params({"validate": {"engine": engine, "max_row_failure_share": 0.5}}), tmp_path)
        docs = tmp_path / "reports/data_docs"
        found[engine] = {
            "report": json.loads((tmp_path / "reports/validation.json").read_text()),
            "quarantine": pq.read_table(tmp_path / "data/quarantine/validate").to_pylist(),
            "valid": digest_directory(tmp_path / "data/valid"),
            "pages": sorted(str(p.relative_to(docs)) for p in docs.rglob("*.html")),
            "values": [
                line
                for page in sorted(docs.rglob("*.html"))
                for line in page.read_text().splitlines()
                if "unexpected" in line.lower() and "batch_data" not in line
            ],
        }
    assert found["pandas"]["report"]["quarantined"] == 17
    assert found["spark"] == found["pandas"]
    # Not ended by the stage: it was there before.
    assert spark.range(3).count() == 3


def rewrite(root: Path, day: str, change: Callable[[pa.Table], pa.Table]) -> None:
    path = root / EVENTS / f"day={day}" / "part-0.parquet"
    pq.write_table(change(pq.ParquetFile(path).read()), path)


def forget_users(root: Path, _rows: list[Row]) -> None:
    index = EVENT_SCHEMA.get_field_index("user_id")

    def change(table: pa.Table) -> pa.Table:
        ids = pa.array([None, *table["user_id"].to_pylist()[1:]])
        return table.set_column(index, "user_id", ids)

    for day in ("2025-03-03", "2025-03-04", "2025-03-05"):
        rewrite(root, day, change)


def turn_round(root: Path, _rows: list[Row]) -> None:
    rewrite(root, "2025-03-04", lambda table: table.take([1, 0, *range(2, 8)]))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (forget_users, "values_to_not_be_null of column user_id in suite events: 3 rows"),
        (turn_round, "to_be_increasing of column ts in suite events: 1 rows.*2025-03-04 00:00:00"),
    ],
)
def test_spark_stops_with_the_line_of_pandas(
    tmp_path: Path, spark: Any, damage: Callable[[Path, list[Row]], None], told: str
) -> None:
    rows = make_rows(3)
    write_events(tmp_path, rows)
    damage(tmp_path, rows)
    lines = []
    for engine in ENGINES:
        with pytest.raises(UserError, match=told) as error:
            run(parse_params({"validate": {"engine": engine}}), tmp_path)
        lines.append(str(error.value))
    assert lines[0] == lines[1]
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
    project.change({"features": {"engine": "duckdb"}})
    features = project.path / "data/features"
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
