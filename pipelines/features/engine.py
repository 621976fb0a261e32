"""The Ibis backends, and the events as the expressions want them.

Times are integers (microseconds since the epoch) and amounts are integers (hundredths), so that
sums are exact: they neither depend on the order of the rows nor on the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import ibis
import pyarrow as pa
from ibis import _

from pipelines.config import Engine
from pipelines.events import SESSION_GAP_SECONDS

DAY_US: Final = 86_400_000_000
SECOND_US: Final = 1_000_000


def connect(engine: Engine) -> Any:
    """Open an Ibis backend that computes in UTC.

    Args:
        engine: which.

    Returns:
        An Ibis connection; close it with ``disconnect``.
    """
    if engine is Engine.DUCKDB:
        return ibis.duckdb.connect()
    from pyspark.sql import SparkSession

    session = (
        SparkSession.builder.master("local[2]")
        .appName("forecart")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.shuffle.partitions", "4")
        .config("spark.sql.ansi.enabled", "true")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    return ibis.pyspark.connect(session)


def read_parquet(connection: Any, path: Path) -> Any:
    """Return a table expression over a Parquet file or a folder of day partitions."""
    if connection.name == "duckdb":
        pattern = f"{path}/*/*.parquet" if path.is_dir() else str(path)
        return connection.read_parquet(pattern, hive_partitioning=False)
    return connection.read_parquet(str(path))


@ibis.udf.scalar.builtin(name="epoch_us", signature=(("timestamp('UTC', 6)",), "int64"))
def _epoch_us(ts):  # type: ignore[no-untyped-def]
    """DuckDB's name for it."""


@ibis.udf.scalar.builtin(name="unix_micros", signature=(("timestamp('UTC', 6)",), "int64"))
def _unix_micros(ts):  # type: ignore[no-untyped-def]
    """Spark's name for it."""


def microseconds(connection: Any, ts: Any) -> Any:
    """Exact microseconds since the epoch. Ibis itself has whole seconds only, which round."""
    return _epoch_us(ts) if connection.name == "duckdb" else _unix_micros(ts)


def fetch_batches(connection: Any, table: Any, rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of an expression in batches, without holding all of them."""
    if connection.name == "duckdb":
        # Ibis 12 asks DuckDB for its batches by a name that DuckDB 2 no longer has.
        yield from connection.con.sql(connection.compile(table)).to_arrow_reader(rows)
    else:
        yield from table.to_pyarrow_batches(chunk_size=rows)


def index_users(events: Any, profiles: Any) -> Any:
    """Return (user, user_id, profile columns): everybody with an event, numbered by user_id."""
    ids = events.select("user_id").distinct()
    users = ids.left_join(profiles, "user_id").drop("user_id_right")
    return users.mutate(user=ibis.row_number().over(ibis.window(order_by=_.user_id)).cast("int32"))


def prepare_events(connection: Any, events: Any, users: Any) -> Any:
    """Return events by user number, with exact integers and the marks of new sessions and days.

    Columns: user, us, event_type, item_id, category, price, cents (of a purchase: price x
    quantity), new_session, new_day, gap_s (seconds since the user's event before, null at the
    first).
    """
    amount = _.price.fill_null(0.0) * _.quantity.fill_null(1.0)
    is_purchase = _.event_type == "purchase"
    rows = (
        events.join(users.select("user", "user_id"), "user_id")
        .mutate(us=microseconds(connection, _.ts))
        .mutate(cents=ibis.ifelse(is_purchase, (amount * 100).round().cast("int64"), 0))
    )
    order = ibis.window(group_by="user", order_by=["us", "event_id"])
    rows = rows.mutate(before=_.us.lag().over(order), session_before=_.session_id.lag().over(order))
    gap = _.us - _.before
    by_gap = gap > SESSION_GAP_SECONDS * SECOND_US
    named = _.session_id.notnull() & _.session_before.notnull()
    new_session = ibis.ifelse(named, _.session_id != _.session_before, by_gap)
    return rows.select(
        "user",
        "us",
        "event_type",
        "item_id",
        "category",
        "price",
        "cents",
        new_session=(_.before.isnull() | new_session).cast("int64"),
        new_day=(_.before.isnull() | ((_.us / DAY_US).floor() != (_.before / DAY_US).floor())).cast(
            "int64"
        ),
        gap_s=(gap / SECOND_US).floor().cast("int64"),
    )
