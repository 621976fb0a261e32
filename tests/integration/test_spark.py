"""Spark builds the same features as DuckDB, bit by bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq

from pipelines.io import digest_directory
from tests.integration.conftest import Project

SPARK_WANTED = "Spark needs Java: install default-jre-headless, for example by `make system`"


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
