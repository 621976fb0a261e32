"""Snapshot features: what is known of a user at a cut, as numbers for the baselines.

Recency, frequency and money over several windows, per event type, with the diversity and
concentration of categories, rhythm, what happened since the last purchase, and the profile.
Every column counts events before the cut alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Final

import ibis
import numpy as np
import pyarrow as pa
from ibis import _
from numpy.typing import NDArray

from pipelines.events import EVENT_CODES, EventType
from pipelines.features.cuts import Cut
from pipelines.features.engine import AMOUNT_SCALE, DAY_US, stack_cuts
from pipelines.features.store import MISSING_TIME, Sequences

# Types that are counted in every window; others only where they are predicted. All types are
# counted over all time.
WINDOWED_TYPES: Final = (
    EventType.VIEW,
    EventType.SEARCH,
    EventType.ADD_TO_CART,
    EventType.PURCHASE,
)
_SINCE_PURCHASE: Final = (EventType.VIEW, EventType.SEARCH, EventType.ADD_TO_CART)
_PURCHASE: Final = EVENT_CODES[EventType.PURCHASE]
_SECONDS_PER_DAY: Final = 86_400
# Guards ratios to a mean gap against users with all events in one instant.
_SHORTEST_GAP_DAYS: Final = 0.01
_KEYS: Final = ["cut", "user"]


def build_snapshots(
    events: Any,
    *,
    cuts: Sequence[Cut],
    windows_days: Sequence[int],
    active_within_days: float | None,
    predicted_types: Sequence[str] = (),
) -> Any:
    """Return one row per cut and user in the population at that cut.

    Args:
        events: of ``pipelines.features.engine.prepare_events``.
        cuts: when; numbered from 0 without holes.
        windows_days: lengths of the counting windows; a window of d days at a cut holds
            cut - d days <= ts < cut.
        active_within_days: only users with an event in the last so many days; None = all.
        predicted_types: event types to count in every window besides the usual ones.

    Returns:
        Expression with user, cut and the columns f_*, without the profile's.
    """
    windows = sorted(set(windows_days))
    past = stack_cuts(events, [c.us for c in cuts], lambda us: _.us < us)
    past = past.mutate(age_us=_.cut_us - _.us).mutate(
        # The number of windows that are too short to hold the event.
        window=ibis.cases(
            *((_.age_us <= days * DAY_US, n) for n, days in enumerate(windows)), else_=len(windows)
        )
    )
    windowed = [t for t in EVENT_CODES if t in WINDOWED_TYPES or t in predicted_types]
    parts = [
        _summarise(past, windows, windowed),
        _summarise_distinct(past, windows, "category", "categories", share=True),
        _summarise_distinct(past, windows, "item_id", "items", share=False),
    ]
    table = reduce(_join_left, parts)
    if active_within_days is not None:
        table = table.filter(_.f_recency <= active_within_days)
    counts = [n for n in table.columns if n.startswith(("f_categories", "f_items"))]
    return table.mutate(
        # Whoever saw no category has no row in that part: that is a count of 0.
        **{name: table[name].fill_null(0) for name in counts},
        # A null stays one: DuckDB's greatest() would skip it.
        f_recency_over_gap=_.f_recency
        / ibis.ifelse(_.f_gap_mean < _SHORTEST_GAP_DAYS, _SHORTEST_GAP_DAYS, _.f_gap_mean),
        f_purchase_recency_over_gap=_.f_recency_purchase / _.f_purchase_gap_mean,
    )


def _join_left(left: Any, right: Any) -> Any:
    return left.left_join(right, _KEYS).drop([f"{key}_right" for key in _KEYS])


def _sum(column: Any, where: Any = None) -> Any:
    return column.sum(where=where).fill_null(0)


def _days(age_us: Any) -> Any:
    return age_us.cast("float64") / DAY_US


def _summarise(past: Any, windows: Sequence[int], windowed_types: Sequence[str]) -> Any:
    """Recency, frequency, money and rhythm.

    Events are first summed into cells (user, type, window), which are few: dozens of conditional
    sums over cells cost less than over events.
    """
    cells = past.group_by(*_KEYS, "code", "window").aggregate(
        n=_.count(),
        sessions=_.new_session.sum(),
        days=_.new_day.sum(),
        amount=_.amount_units.sum(),
        youngest=_.age_us.min(),
        oldest=_.age_us.max(),
        prices=_.price_units.count(),
        price_sum=_sum(_.price_units),
        price_max=_.price_units.max(),
        last=_.number.max(),
        last_gap=_.gap_s.argmax(_.number),
        gaps=_.gap_s.count(),
        gap_sum=_sum(_.gap_s),
        # A user's gaps add up to the span at most, so that 64 bits hold this for 90 years.
        gap_squares=_sum(_.gap_s * _.gap_s),
        purchase_gaps=_.purchase_gap_days.count(),
        purchase_gap_sum=_sum(_.purchase_gap_days),
        purchase_gap_squares=_sum(_.purchase_gap_days * _.purchase_gap_days),
        purchase_gap_last=_.purchase_gap_days.argmax(_.number, where=_.purchase_gap_days.notnull()),
        since_purchase=(_.next_purchase_us.isnull() | (_.next_purchase_us >= _.cut_us))
        .cast("int64")
        .sum(),
    )
    gap_mean = _.gap_sum.sum().cast("float64") / _.gaps.sum().nullif(0) / _SECONDS_PER_DAY
    columns: dict[str, Any] = {
        "f_recency": _days(_.youngest.min()),
        "f_tenure": _days(_.oldest.max()),
        "f_events": _.n.sum(),
        "f_sessions": _.sessions.sum(),
        "f_days_active": _.days.sum(),
        "f_spend": _.amount.sum().cast("float64") / AMOUNT_SCALE,
        "f_price_mean": _.price_sum.sum().cast("float64") / _.prices.sum().nullif(0) / AMOUNT_SCALE,
        "f_price_max": _.price_max.max().cast("float64") / AMOUNT_SCALE,
        "f_last_type": _.code.argmax(_.last),
        "f_gap_last": _.last_gap.argmax(_.last).cast("float64") / _SECONDS_PER_DAY,
        "f_gap_mean": gap_mean,
        "f_gap_std": _spread(_.gaps, _.gap_sum, _.gap_squares) / _SECONDS_PER_DAY,
        "f_purchase_gap_mean": _.purchase_gap_sum.sum().cast("float64")
        / _.purchase_gaps.sum().nullif(0),
        "f_purchase_gap_std": _spread(_.purchase_gaps, _.purchase_gap_sum, _.purchase_gap_squares),
        "f_purchase_gap_last": _.purchase_gap_last.argmax(_.last, where=_.purchase_gaps > 0),
        "f_purchase_amount_mean": _.amount.sum().cast("float64")
        / _.n.sum(where=_.code == _PURCHASE)
        / AMOUNT_SCALE,
    }
    for name, code in EVENT_CODES.items():
        columns[f"f_{name}"] = _sum(_.n, _.code == code)
        columns[f"f_recency_{name}"] = _days(_.youngest.min(where=_.code == code))
    for name in _SINCE_PURCHASE:
        columns[f"f_{name}_since_purchase"] = _sum(_.since_purchase, _.code == EVENT_CODES[name])
    for number, days in enumerate(windows):
        inside = _.window <= number
        columns[f"f_events_{days}d"] = _sum(_.n, inside)
        columns[f"f_sessions_{days}d"] = _sum(_.sessions, inside)
        columns[f"f_days_active_{days}d"] = _sum(_.days, inside)
        columns[f"f_spend_{days}d"] = _sum(_.amount, inside).cast("float64") / AMOUNT_SCALE
        for name in windowed_types:
            columns[f"f_{name}_{days}d"] = _sum(_.n, inside & (_.code == EVENT_CODES[name]))
    return cells.group_by(*_KEYS).aggregate(**columns)


def _spread(count: Any, total: Any, squares: Any) -> Any:
    """Standard deviation from exact sums; null below two values."""
    n = count.sum().cast("float64")
    mean = total.sum().cast("float64") / n.nullif(0)
    variance = squares.sum().cast("float64") / n.nullif(0) - mean * mean
    return ibis.ifelse(n >= 2, ibis.greatest(variance, 0.0).sqrt(), ibis.null("float64"))


def _summarise_distinct(
    past: Any, windows: Sequence[int], column: str, name: str, *, share: bool
) -> Any:
    """How many different values, and the share of the most frequent one, per window."""
    by_value = (
        past.filter(_[column].notnull())
        .group_by(*_KEYS, column)
        .aggregate(
            n_all=_.count(),
            **{f"n_{d}": (_.window <= k).cast("int64").sum() for k, d in enumerate(windows)},
        )
    )
    columns: dict[str, Any] = {}
    for window in ("all", *windows):
        suffix = "" if window == "all" else f"_{window}d"
        n = by_value[f"n_{window}"]
        columns[f"f_{name}{suffix}"] = (n > 0).cast("int64").sum()
        if share:
            columns[f"f_top_category_share{suffix}"] = n.max() / n.sum().cast("float64").nullif(0)
    return by_value.group_by(*_KEYS).aggregate(**columns)


def profile_features(
    sequences: Sequences,
    vocabulary: dict[str, list[int]],
    *,
    user: NDArray[np.int32],
    cut_us: NDArray[np.int64],
) -> pa.Table:
    """Return the columns of the profile for rows (user, cut).

    Args:
        sequences: holds the profiles.
        vocabulary: of ``pipelines.features.vocabulary.fit_vocabulary``.
        user: (R,) user numbers.
        cut_us: (R,) microseconds since the epoch.

    Returns:
        f_age (years), f_gender and f_region (place in the vocabulary from 1, 0 = not in it),
        f_days_since_signup; NaN where missing. A sign-up after the cut is not known at it.
    """
    signup = sequences.signup_ts[user]
    known = (signup != MISSING_TIME) & (signup <= cut_us)
    since = np.where(known, (cut_us - np.where(known, signup, cut_us)) / DAY_US, np.nan)
    return pa.table(
        {
            "f_days_since_signup": since,
            "f_age": sequences.age[user].astype(np.float64),
            "f_gender": _place(sequences.gender, vocabulary["gender"])[user],
            "f_region": _place(sequences.region, vocabulary["region"])[user],
        }
    )


def _place(hashes: NDArray[np.uint32], known: Sequence[int]) -> NDArray[np.float64]:
    codes = {0: np.nan} | {code: float(place) for place, code in enumerate(known, start=1)}
    return np.array([codes.get(int(code), 0.0) for code in hashes], dtype=np.float64)
