"""What is said of the log by day and as a whole, as tables for the suites."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pandas as pd

WEEKS: Final = 4
_FEWEST_WEEKS: Final = 3
# Makes the median absolute deviation of a normal sample its standard deviation.
_MAD_TO_SD: Final = 1.4826


def describe_days(counts: dict[date, int]) -> pd.DataFrame:
    """One row per day: events, deviation from its past, distance to the day before.

    Args:
        counts: events per day that has any.

    Returns:
        Columns day, events, deviation (robust standard deviations; NaN where fewer than three
        of the four same weekdays before have data), days_since_day_before (NaN at the first).
    """
    days = sorted(counts)
    rows = []
    for number, day in enumerate(days):
        past = [
            counts[other]
            for week in range(1, WEEKS + 1)
            if (other := date.fromordinal(day.toordinal() - 7 * week)) in counts
        ]
        deviation = np.nan
        if len(past) >= _FEWEST_WEEKS:
            middle = float(np.median(past))
            spread = _MAD_TO_SD * float(np.median(np.abs(np.array(past) - middle)))
            # A spread of a few weeks can be 0 by luck: counting noise and a tenth bound it.
            spread = max(spread, np.sqrt(middle), 0.1 * middle, 1.0)
            deviation = (counts[day] - middle) / spread
        rows.append(
            {
                "day": day.isoformat(),
                "events": counts[day],
                "deviation": deviation,
                "days_since_day_before": (day - days[number - 1]).days if number else np.nan,
            }
        )
    return pd.DataFrame(rows)


def describe_log(
    folder: Path, *, last: datetime, now: datetime, reference: datetime | None
) -> tuple[pd.DataFrame, list[str]]:
    """One row on the whole log, and examples of repeated event ids.

    Args:
        folder: of day partitions.
        last: time of the newest event.
        now: current time; events later than it cannot have happened.
        reference: what freshness is counted from (``until``); None = the newest event itself.
    """
    connection = duckdb.connect()
    pattern = f"{folder}/*/*.parquet"
    query = """
        SELECT count(*) AS events, count(*) FILTER (event_type = 'purchase') AS purchases
        FROM read_parquet($path, hive_partitioning = false)
    """
    events, purchases = connection.execute(query, {"path": pattern}).fetchall()[0]
    repeated = connection.execute(
        """
        SELECT event_id, count(*) - 1 AS extra
        FROM read_parquet($path, hive_partitioning = false)
        GROUP BY event_id HAVING count(*) > 1 ORDER BY event_id
        """,
        {"path": pattern},
    ).fetchall()
    connection.close()
    old = ((reference or last) - last).total_seconds() / 86_400
    row: dict[str, Any] = {
        "events": events,
        "purchases": purchases,
        "repeated_event_ids": sum(extra for _id, extra in repeated),
        "days_old": max(old, 0.0),
        "days_in_the_future": max((last - now).total_seconds() / 86_400, 0.0),
    }
    return pd.DataFrame([row]), [str(event_id) for event_id, _extra in repeated[:3]]
