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


class Histories:
    """Histories of one event type, of every user as of any time.

    Days are UTC days.
    """

    def __init__(self, sequences: Sequences, event: str | None) -> None:
        """Take the events of all users; of an event type, None = any."""
        users = sequences.users
        owner = np.repeat(np.arange(users), np.diff(sequences.offsets))
        day = sequences.ts // DAY_US
        self._begun = np.zeros(users)
        some = np.diff(sequences.offsets) > 0
        self._begun[some] = day[sequences.offsets[:-1][some]]

        kept = slice(None) if event is None else sequences.type == EVENT_CODES[EventType(event)]
        self._ts, self._owner, self._day = sequences.ts[kept], owner[kept], day[kept]
        owner, day = self._owner, self._day
        self._new_day = np.ones(len(day), bool)
        self._new_day[1:] = (owner[1:] != owner[:-1]) | (day[1:] != day[:-1])
        self._amounts = _purchase_amounts(sequences)[kept]
        self._first = np.zeros(users)
        self._first[owner[::-1]] = day[::-1]  # where a place comes again, the last value stays

    def at(self, when: datetime) -> Floats:
        """Return the histories of all U users, (U, 5), never NaN; only events before count.

        - days: how many days with the event;
        - observed: days since the user's first event of any type, its day not counted;
        - span: days from the first to the last day with the event, 0 without one;
        - age: days since the first day with the event, that day not counted, 0 without one;
        - amount: price x quantity of all purchases, in the currency unit.
        """
        users, now_us = len(self._begun), to_us(when)
        past = self._ts < now_us
        by = self._owner[past]
        last = np.zeros(users)
        last[by] = self._day[past]
        days = np.bincount(by, weights=self._new_day[past], minlength=users)
        has = days > 0
        now = now_us / DAY_US
        # Days after the first one that are over by then, and the span at least.
        age = np.maximum(now - self._first - 1, last - self._first)
        return np.column_stack(
            [
                days,
                np.maximum(now - self._begun - 1, 0),
                np.where(has, last - self._first, 0),
                np.where(has, age, 0),
                np.bincount(by, weights=self._amounts[past], minlength=users),
            ]
        )


def with_histories(table: SnapshotTable, known: Histories) -> SnapshotTable:
    """Return the table with the users' histories in place of the features.

    Args:
        table: R rows of users at cuts.
        known: histories of all users.

    Returns:
        The same rows, with features (R, 5).
    """
    features = np.zeros((len(table.user), len(COLUMNS)))
    for cut, iso in table.cut_times.items():
        rows = table.cut == cut
        features[rows] = known.at(datetime.fromisoformat(iso))[table.user[rows]]
    return replace(table, features=features, feature_names=list(COLUMNS))


def _purchase_amounts(sequences: Sequences) -> Floats:
    """(N,) price x quantity as the labels count it: no price is 0, no quantity is 1."""
    bought = sequences.type == EVENT_CODES[EventType.PURCHASE]
    price = np.nan_to_num(sequences.price[bought].astype(np.float64), nan=0.0)
    quantity = np.nan_to_num(sequences.quantity[bought].astype(np.float64), nan=1.0)
    amounts: Floats = np.zeros(sequences.events)
    amounts[bought] = price * quantity
    return amounts
