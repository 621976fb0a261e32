"""Starts Spark, for every stage that may compute with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.errors import require


@contextmanager
def open_spark() -> Iterator[Any]:
    """Open a Spark session that computes in UTC; stop it at the end.

    A session that runs already is used and left running. Otherwise the master is what Spark's own
    configuration says, and all local cores where it says nothing.

    Yields:
        A SparkSession.

    Raises:
        UserError: Spark is not installed.
    """
    require("pyspark")
    # What is used of pandas works; the note would come dozens of times.
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

    running = SparkSession.getActiveSession() is not None
    settings = SparkConf().setAppName("forecart").set("spark.sql.session.timeZone", "UTC")
    settings.setIfMissing("spark.master", "local[*]")
    if str(settings.get("spark.master")).startswith("local"):
        settings.set("spark.driver.host", "127.0.0.1").set("spark.driver.bindAddress", "127.0.0.1")
        settings.setIfMissing("spark.ui.enabled", "false")
        settings.setIfMissing("spark.sql.shuffle.partitions", "4")
    settings.setIfMissing("spark.ui.showConsoleProgress", "false")
    settings.setIfMissing("spark.log.level", "ERROR")
    session = SparkSession.builder.config(conf=settings).getOrCreate()
    try:
        yield session
    finally:
        if not running:
            session.stop()
