"""The Ibis backends, and the events as the expressions want them.

Times are integers (microseconds since the epoch) and amounts are integers (ten-thousandths), so
that sums are exact: they depend neither on the order of the rows nor on the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ibis
import pyarrow as pa
from ibis import _

from pipelines.config import Engine
from pipelines.events import EVENT_CODES, EVENT_SCHEMA, SESSION_GAP_SECONDS, EventType
from pipelines.io import DUCKDB_MEMORY, spill_to
from pipelines.spark import open_spark

DAY_US: Final = 86_400_000_000
SECOND_US: Final = 1_000_000
# Amounts are counted in this part of the currency unit.
AMOUNT_SCALE: Final = 10_000
# Larger prices and amounts would overflow exact sums; in no currency is one an order.
MAX_AMOUNT: Final = 1e13

_PURCHASE: Final = EVENT_CODES[EventType.PURCHASE]


@contextmanager
def connect(engine: Engine, spill: Path) -> Iterator[Any]:
    """Open an Ibis backend that computes in UTC and may spill to disk; close it at the end.

    Args:
        engine: which; Spark is opened by ``open_spark``.
        spill: folder for what DuckDB cannot hold in memory; what is there goes.

    Yields:
        An Ibis connection.

    Raises:
        UserError: Spark is asked for and not installed.
    """
    if engine is Engine.DUCKDB:
        with spill_to(spill) as folder:
            connection = ibis.duckdb.connect(temp_directory=folder, memory_limit=DUCKDB_MEMORY)
            try:
                yield connection
            finally:
                connection.disconnect()
        return
    with open_spark() as session:
        yield ibis.pyspark.connect(session)


def read_parquet(connection: Any, path: Path) -> Any:
    """Return a table expression over a Parquet file or a folder of day partitions."""
    if connection.name != "duckdb":
        return connection.read_parquet(str(path))
    files = sorted(path.glob("*/*.parquet")) if path.is_dir() else [path]
    return connection.read_parquet(files, hive_partitioning=False)


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
    """Return events by user number, with exact integers and what their order tells.

    Args:
        connection: where the expressions live.
        events: expression in the schema of ``pipelines.events``.
        users: of ``index_users``.

    Returns:
        Expression with the columns of events but ids, and
        user, us (microseconds since the epoch),
        number: position in the user's events by (time, event_id), from 0,
        code: ``EVENT_CODES``,
        price_units, amount_units: price and purchased amount (price x quantity; a missing price
        counts as 0, a missing quantity as 1) in 1 / ``AMOUNT_SCALE``,
        new_session, new_day: 1 at the first event of a session and of a UTC day,
        gap_s: whole seconds since the user's event before, null at the first,
        purchase_gap_days: whole UTC days since the day of the purchase before, at the first
        purchase of a day; else null,
        next_purchase_us: time of the user's next purchase, the event itself included; else null.
        Only what compares it with a cut may use it, as it looks ahead.
    """
    rows = (
        events.select(EVENT_SCHEMA.names)
        .join(users.select("user", "user_id"), "user_id")
        .mutate(
            us=microseconds(connection, _.ts),
            code=ibis.cases(*((_.event_type == n, c) for n, c in EVENT_CODES.items())),
            price=_.price.nullif(float("nan")),
            quantity=_.quantity.nullif(float("nan")),
        )
        .mutate(day=(_.us / DAY_US).floor().cast("int64"), is_purchase=_.code == _PURCHASE)
    )
    by_time = ibis.window(group_by="user", order_by=["us", "event_id"])
    from_last = ibis.window(
        group_by="user",
        order_by=[ibis.desc("us"), ibis.desc("event_id")],
        rows=(None, 0),
    )
    by_time_and_kind = ibis.window(group_by=["user", "is_purchase"], order_by=["us", "event_id"])
    rows = rows.mutate(
        number=ibis.row_number().over(by_time),
        us_before=_.us.lag().over(by_time),
        day_before=_.day.lag().over(by_time),
        session_before=_.session_id.lag().over(by_time),
        days_since_same=_.day - _.day.lag().over(by_time_and_kind),
        next_purchase_us=ibis.ifelse(_.is_purchase, _.us, ibis.null("int64")).min().over(from_last),
    )
    gap = _.us - _.us_before
    both_named = _.session_id.notnull() & _.session_before.notnull()
    new_session = ibis.ifelse(
        both_named, _.session_id != _.session_before, gap > SESSION_GAP_SECONDS * SECOND_US
    )
    is_first = _.us_before.isnull()
    amount = ibis.ifelse(_.is_purchase, _.price.fill_null(0.0) * _.quantity.fill_null(1.0), 0.0)
    return rows.select(
        "user",
        "us",
        "number",
        "code",
        "item_id",
        "category",
        "brand",
        "price",
        "quantity",
        "query",
        price_units=(_.price * AMOUNT_SCALE).round().cast("int64"),
        amount_units=(amount * AMOUNT_SCALE).round().cast("int64"),
        new_session=(is_first | new_session).cast("int64"),
        new_day=(is_first | (_.day != _.day_before)).cast("int64"),
        gap_s=(gap / SECOND_US).floor().cast("int64"),
        purchase_gap_days=ibis.ifelse(_.is_purchase, _.days_since_same, ibis.null("int64")).nullif(
            0
        ),
        next_purchase_us="next_purchase_us",
    )


def stack_cuts(events: Any, cut_times: Sequence[int], span: Any) -> Any:
    """Repeat the events once a cut, each time those of one span around it.

    A union of filters streams through both engines; a join on inequalities would not.

    Args:
        events: of ``prepare_events``.
        cut_times: microseconds since the epoch; the place in the list is the cut's number.
        span: function of a cut time that gives the filter.

    Returns:
        ``events`` with the columns cut and cut_us.
    """
    parts = [
        events.filter(span(us)).mutate(
            cut=ibis.literal(index, "int32"), cut_us=ibis.literal(us, "int64")
        )
        for index, us in enumerate(cut_times)
    ]
    return parts[0] if len(parts) == 1 else ibis.union(*parts)
