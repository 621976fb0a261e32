"""Snapshot features: what is known of a user at a cut, as numbers for the baselines.

Recency, frequency and money over several windows, per event type, with category diversity and
concentration, rhythm, what happened since the last purchase, and the profile. Every column counts
events before the cut alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Final

import ibis
from ibis import _

from pipelines.events import EVENT_TYPES
from pipelines.features.cuts import Cut
from pipelines.features.engine import DAY_US

# Types that are counted in every window; the rest are rare and counted over all time.
WINDOWED_TYPES: Final = (
    "view",
    "search",
    "add_to_cart",
    "remove_from_cart",
    "wishlist",
    "purchase",
)
# Guards ratios to a mean gap against users with two events in one instant.
_SHORTEST_GAP_DAYS: Final = 0.01
_SINCE_PURCHASE: Final = ("view", "search", "add_to_cart")


def build_snapshots(
    events: Any,
    users: Any,
    *,
    cut: Cut,
    windows_days: Sequence[int],
    active_within_days: float | None,
) -> Any:
    """Return one row per user in the population at a cut.

    Args:
        events: of ``pipelines.features.engine.prepare_events``.
        users: of ``index_users``, with gender_code, region_code and signup_us.
        cut: when.
        windows_days: lengths of the counting windows.
        active_within_days: only users with an event in the last so many days; None = all.

    Returns:
        Expression with user, cut and the columns f_*.
    """
    past = events.filter(_.us < cut.us).mutate(age_us=cut.us - _.us)
    parts = [
        _summarise(past, windows_days),
        _summarise_categories(past, windows_days),
        _summarise_purchases(past),
    ]
    table = reduce(lambda left, right: left.left_join(right, "user").drop("user_right"), parts)
    if active_within_days is not None:
        table = table.filter(_.f_recency <= active_within_days)
    profile = users.select("user", "age", "gender_code", "region_code", "signup_us")
    table = table.left_join(profile, "user").drop("user_right")
    since_signup = _days(cut.us - _.signup_us)
    return table.mutate(
        cut=ibis.literal(cut.index, "int32"),
        f_days_since_signup=since_signup,
        f_age=_.age,
        f_gender=_.gender_code,
        f_region=_.region_code,
        f_purchase_recency_over_gap=_.f_recency_purchase
        / ibis.greatest(_.f_purchase_gap_mean, _SHORTEST_GAP_DAYS),
        f_recency_over_gap=_.f_recency / ibis.greatest(_.f_gap_mean, _SHORTEST_GAP_DAYS),
    ).drop("age", "gender_code", "region_code", "signup_us")


def _days(age_us: Any) -> Any:
    return age_us.cast("float64") / DAY_US


def _within(days: int) -> Any:
    return _.age_us <= days * DAY_US


def _count(condition: Any) -> Any:
    return condition.fill_null(False).cast("int64").sum()


def _summarise(past: Any, windows_days: Sequence[int]) -> Any:
    columns: dict[str, Any] = {
        "f_recency": _days(_.age_us.min()),
        "f_tenure": _days(_.age_us.max()),
        "f_events": _.count(),
        "f_sessions": _.new_session.sum(),
        "f_days_active": _.new_day.sum(),
        "f_spend": _.cents.sum() / 100.0,
        "f_items": _.item_id.nunique(),
        "f_price_mean": _.price.round(2).cast("decimal(18, 2)").sum().cast("float64")
        / ibis.greatest(_.price.count(), 1),
        "f_price_max": _.price.max(),
        "f_gap_last": _.gap_s.argmin(_.age_us) / 86_400.0,
    }
    gaps, gap_sum = _.gap_s.count(), _.gap_s.sum().cast("float64") / 86_400
    squares = (_.gap_s.cast("float64") / 86_400).round(3).pow(2).round(6)
    columns["f_gap_mean"] = gap_sum / gaps.nullif(0)
    columns["f_gap_rms"] = (
        squares.cast("decimal(28, 6)").sum().cast("float64") / gaps.nullif(0)
    ).sqrt()
    for name in EVENT_TYPES:
        is_type = _.event_type == name
        columns[f"f_recency_{name}"] = _days(_.age_us.min(where=is_type))
        columns[f"f_{name}"] = _count(is_type)
    for days in windows_days:
        inside = _within(days)
        columns[f"f_events_{days}d"] = _count(inside)
        columns[f"f_sessions_{days}d"] = _.new_session.sum(where=inside).fill_null(0)
        columns[f"f_days_active_{days}d"] = _.new_day.sum(where=inside).fill_null(0)
        columns[f"f_spend_{days}d"] = _.cents.sum(where=inside).fill_null(0) / 100.0
        for name in WINDOWED_TYPES:
            columns[f"f_{name}_{days}d"] = _count(inside & (_.event_type == name))
    return past.group_by("user").aggregate(**columns)


def _summarise_categories(past: Any, windows_days: Sequence[int]) -> Any:
    """How many categories, and the share of the one seen most, per window."""
    counts = {f"n_{days}": _count(_within(days)) for days in windows_days}
    by_category = (
        past.filter(_.category.notnull())
        .group_by("user", "category")
        .aggregate(n_all=_.count(), last_us=_.us.max(), **counts)
    )
    columns: dict[str, Any] = {}
    for name in ("all", *windows_days):
        suffix = "" if name == "all" else f"_{name}d"
        n = by_category[f"n_{name}"]
        columns[f"f_categories{suffix}"] = _count(n > 0)
        columns[f"f_top_category_share{suffix}"] = n.max() / n.sum().nullif(0)
    return by_category.group_by("user").aggregate(**columns)


def _summarise_purchases(past: Any) -> Any:
    """The user's own buying rhythm, and what happened since the last purchase."""
    order = ibis.window(group_by="user", order_by="us")
    bought = past.filter(_.event_type == "purchase").mutate(
        days_before=_days(_.us - _.us.lag().over(order)).round(3)
    )
    total = _.days_before.cast("decimal(18, 3)").sum().cast("float64")
    squares = _.days_before.pow(2).round(6).cast("decimal(28, 6)").sum().cast("float64")
    count = _.days_before.count().nullif(0)
    rhythm = bought.group_by("user").aggregate(
        last_us=_.us.max(),
        f_purchase_gap_mean=total / count,
        f_purchase_gap_rms=(squares / count).sqrt(),
        f_purchase_gap_last=_.days_before.argmax(_.us),
        f_purchase_amount_mean=_.cents.sum() / 100.0 / _.count(),
    )
    since = (
        past.select("user", "us", "event_type")
        .left_join(rhythm.select("user", "last_us"), "user")
        .drop("user_right")
        .filter(_.last_us.isnull() | (_.us > _.last_us))
        .group_by("user")
        .aggregate(
            **{f"f_{name}_since_purchase": _count(_.event_type == name) for name in _SINCE_PURCHASE}
        )
    )
    everybody = past.select("user").distinct()
    table = everybody.left_join(rhythm.drop("last_us"), "user").drop("user_right")
    return table.left_join(since, "user").drop("user_right")
