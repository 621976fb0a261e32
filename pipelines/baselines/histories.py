"""What buy-till-you-die models and rates know of a user: how often, how long, when last.

These few numbers come from the event sequences, day by day, for the population of the snapshot
table. They are kept apart from its features, so that no other baseline gets them.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Final

import numpy as np

from pipelines.events import EVENT_CODES, EventType, to_us
from pipelines.features.engine import DAY_US
from pipelines.features.snapshot_table import Floats, SnapshotTable
from pipelines.features.store import Sequences

COLUMNS: Final = ["days", "observed", "span", "age", "amount"]
# Places in COLUMNS.
DAYS, OBSERVED, SPAN, AGE, AMOUNT = range(len(COLUMNS))


def with_histories(table: SnapshotTable, sequences: Sequences, event: str | None) -> SnapshotTable:
    """Return the table with the user's history of one event type in place of the features.

    Days are UTC days. Only events before the cut count.

    Args:
        table: R rows of users at cuts.
        sequences: events of all users.
        event: an event type; None = any.

    Returns:
        The same rows, with features (R, 5), never NaN:

        - days: how many days with the event;
        - observed: days since the user's first event of any type, its day not counted;
        - span: days from the first to the last day with the event, 0 without one;
        - age: days since the first day with the event, that day not counted, 0 without one;
        - amount: price x quantity of all purchases, in the currency unit.
    """
    users = sequences.users
    owner = np.repeat(np.arange(users), np.diff(sequences.offsets))
    day = sequences.ts // DAY_US
    begun = np.zeros(users)
    some = np.diff(sequences.offsets) > 0
    begun[some] = day[sequences.offsets[:-1][some]]

    kept = slice(None) if event is None else sequences.type == EVENT_CODES[EventType(event)]
    ts, owner, day = sequences.ts[kept], owner[kept], day[kept]
    new_day = np.ones(len(ts), bool)
    new_day[1:] = (owner[1:] != owner[:-1]) | (day[1:] != day[:-1])
    amounts = _purchase_amounts(sequences)[kept]
    first = np.zeros(users)
    first[owner[::-1]] = day[::-1]  # where a place comes again, the last value stays

    features = np.zeros((len(table.user), len(COLUMNS)))
    for cut, iso in table.cut_times.items():
        rows = table.cut == cut
        user = table.user[rows]
        cut_us = to_us(datetime.fromisoformat(iso))
        past = ts < cut_us
        by = owner[past]
        last = np.zeros(users)
        last[by] = day[past]
        days = np.bincount(by, weights=new_day[past], minlength=users)
        has = days > 0
        now = cut_us / DAY_US
        # Days after the first one that are over at the cut, and the span at least.
        age = np.maximum(now - first - 1, last - first)
        columns = [
            days,
            np.maximum(now - begun - 1, 0),
            np.where(has, last - first, 0),
            np.where(has, age, 0),
            np.bincount(by, weights=amounts[past], minlength=users),
        ]
        features[rows] = np.column_stack(columns)[user]
    return replace(table, features=features, feature_names=list(COLUMNS))


def _purchase_amounts(sequences: Sequences) -> Floats:
    """(N,) price x quantity as the labels count it: no price is 0, no quantity is 1."""
    bought = sequences.type == EVENT_CODES[EventType.PURCHASE]
    price = np.nan_to_num(sequences.price[bought].astype(np.float64), nan=0.0)
    quantity = np.nan_to_num(sequences.quantity[bought].astype(np.float64), nan=1.0)
    amounts: Floats = np.zeros(sequences.events)
    amounts[bought] = price * quantity
    return amounts
