"""Everything about a (user, cut) pair that follows from the flat columns: features and labels.

The same functions serve training at random cuts and prediction at one: a feature reads events
before the cut alone, a label events from the cut on alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipelines.events import EVENT_CODES, EVENT_TYPES, EventType
from pipelines.features.store import MISSING_TIME, Sequences

DAY: Final = 86_400_000_000  # microseconds

ANY_EVENT: Final = "any"

_WINDOWS: Final = (0.25, 1.0, 3.0, 7.0, 14.0, 28.0, 90.0)  # days
_FOCUS_WINDOWS: Final = (0.25, 1.0, 3.0, 7.0, 28.0)  # days
# The smallest amount that is told apart, and the largest that an event may add.
_MONEY: Final = 1e-4
_MOST_SPENT: Final = 1e11
_SPANS: Final = np.array([[int(w * DAY)] for w in _WINDOWS])
_FOCUS_SPANS: Final = np.array([[int(w * DAY)] for w in _FOCUS_WINDOWS])
_COUNTED: Final = (*EVENT_TYPES, "session")
_FOCUS_TYPES: Final = (EventType.VIEW, EventType.SEARCH, EventType.ADD_TO_CART, EventType.PURCHASE)

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def bisect(ts: NDArray[np.int64], low: Ints, high: Ints, value: Ints) -> Ints:
    """Return for every query the first index in [low, high) with ``ts >= value``, else high.

    A binary search of all queries at once, in the shape of ``value``, to which the bounds are
    broadcast; ``ts`` ascends within every [low, high).
    """
    span = int((high - low).max(initial=0))
    found = np.broadcast_to(low, value.shape)
    for bit in reversed(range(span.bit_length())):
        ahead = found + (1 << bit)
        less = ts[np.minimum(ahead, len(ts)) - 1] < value
        found = np.where(less & (ahead <= high), ahead, found)
    return found.copy() if not span else found


def _flatten(by_window: NDArray[Any]) -> NDArray[Any]:
    """(windows, M, C) -> (M, windows x C)."""
    return by_window.transpose(1, 0, 2).reshape(by_window.shape[1], -1)


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """M points in the lives of users.

    Attributes:
        user: int64 (M,).
        ts: int64 (M,), microseconds; the history is what happened strictly before.
        position: int64 (M,), flat index of the user's first event at or after ``ts``.
    """

    user: Ints
    ts: Ints
    position: Ints

    def __len__(self) -> int:
        return len(self.user)

    @classmethod
    def join(cls, parts: Sequence[Cuts]) -> Cuts:
        """Put cuts end to end."""
        return cls(
            user=np.concatenate([part.user for part in parts]),
            ts=np.concatenate([part.ts for part in parts]),
            position=np.concatenate([part.position for part in parts]),
        )

    def take(self, rows: Any) -> Cuts:
        """Return some of the cuts."""
        return Cuts(user=self.user[rows], ts=self.ts[rows], position=self.position[rows])


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What followed M cuts.

    Attributes:
        delay: float64 (M, E), days until the first event of each name, inf = none in the data.
        observed_days: float64 (M,), days from the cut to the end of what may be seen.
        amount: float32 (M, H), price x quantity bought within each horizon.
    """

    delay: NDArray[np.float64]
    observed_days: NDArray[np.float64]
    amount: Floats


class Timeline:
    """Prefix sums over flat columns, from which windows are differences."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        self.ts: Ints = np.asarray(sequences.ts)
        self.type = np.asarray(sequences.type)
        self.offsets: Ints = np.asarray(sequences.offsets)
        self.user: Ints = np.repeat(
            np.arange(sequences.users, dtype=np.int64), np.diff(self.offsets)
        )

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        """Events of each kind before every flat index, (N + 1, kinds)."""
        flags = np.zeros((len(self.ts) + 1, len(_COUNTED)), dtype=np.int64)
        codes = np.arange(1, len(EVENT_TYPES) + 1)
        flags[1:, : len(EVENT_TYPES)] = self.type[:, None] == codes
        flags[1:, -1] = self.sequences.session_start
        return flags.cumsum(axis=0)

    @cached_property
    def _spent(self) -> Ints:
        """Money spent before every flat index, (N + 1,), in ``_MONEY``.

        Whole numbers, whose differences are exact: what one shopper spends, however much, changes
        nothing of the others.
        """
        price = np.nan_to_num(np.asarray(self.sequences.price, dtype=np.float64))
        quantity = np.nan_to_num(np.asarray(self.sequences.quantity, dtype=np.float64), nan=1.0)
        bought = self.type == EVENT_CODES[EventType.PURCHASE]
        spent = np.where(bought, np.clip(price * quantity, -_MOST_SPENT, _MOST_SPENT), 0.0)
        before = np.zeros(len(spent) + 1, dtype=np.int64)
        np.cumsum(np.rint(spent / _MONEY).astype(np.int64), out=before[1:])
        return before

    @cached_property
    def _last(self) -> NDArray[np.int64]:
        """Index of the last event of each type before every flat index, (N + 1, types)."""
        index = np.full((len(self.ts) + 1, len(EVENT_TYPES)), -1, dtype=np.int64)
        rows = np.arange(len(self.ts))
        known = (self.type >= 1) & (self.type <= len(EVENT_TYPES))
        index[rows[known] + 1, self.type[known].astype(np.int64) - 1] = rows[known]
        return np.maximum.accumulate(index, axis=0)

    @cached_property
    def _focus(self) -> tuple[Ints, Ints, Ints]:
        """Order of events by user and category, its inverse, and the last categorised index."""
        category = np.asarray(self.sequences.category)
        order = np.lexsort((np.arange(len(self.ts)), category, self.user))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        last = np.full(len(self.ts) + 1, -1, dtype=np.int64)
        last[1:] = np.where(category > 0, np.arange(len(self.ts)), -1)
        return order, rank, np.maximum.accumulate(last)

    @cached_property
    def _focus_counts(self) -> NDArray[np.int64]:
        """Events of the focus types before every place of the (user, category) order."""
        order, _, _ = self._focus
        flags = np.zeros((len(self.ts) + 1, len(_FOCUS_TYPES)), dtype=np.int64)
        codes = np.array([EVENT_CODES[name] for name in _FOCUS_TYPES])
        flags[1:] = self.type[order][:, None] == codes
        return flags.cumsum(axis=0)

    def cuts(self, user: NDArray[np.integer[Any]], ts: Ints) -> Cuts:
        """Locate cuts in the flat columns."""
        users: Ints = np.asarray(user, dtype=np.int64)
        position = bisect(self.ts, self.offsets[users], self.offsets[users + 1], ts)
        return Cuts(user=users, ts=np.asarray(ts, dtype=np.int64), position=position)

    def features(self, cuts: Cuts) -> Floats:
        """Return ``len(feature_names())`` features of every cut, (M, F); all are finite."""
        start, position, now = self.offsets[cuts.user], cuts.position, cuts.ts
        tenure = self.tenure(cuts)
        low = np.concatenate([bisect(self.ts, start, position, now - _SPANS), start[None]])
        counts = self._counts[position] - self._counts[low]  # (windows, M, counted)
        spent = np.maximum(self._spent[position] - self._spent[low], 0) * _MONEY
        by_window = np.log1p(np.concatenate([counts, spent[..., None]], axis=2))
        columns: list[NDArray[Any]] = [_flatten(by_window)]
        last = self._last[position]
        seen = last >= start[:, None]
        days = (now[:, None] - self.ts[np.maximum(last, 0)]) / DAY if len(self.ts) else 0.0
        columns.append(np.where(seen, np.log1p(np.maximum(days, 0.0) * 24), 10.0))
        columns.append(seen)
        columns.append(np.log1p(tenure)[:, None])
        columns.append(self._focus_features(cuts))
        return np.concatenate(columns, axis=1).astype(np.float32)

    def _focus_features(self, cuts: Cuts) -> NDArray[Any]:
        """Recent counts within the category that the user touched last, (M, ...)."""
        _, rank, last_of = self._focus
        width = len(_FOCUS_WINDOWS) * len(_FOCUS_TYPES)
        if not len(self.ts):
            return np.zeros((len(cuts), width + 1))
        start = self.offsets[cuts.user]
        last = last_of[cuts.position]
        known = last >= start
        # Events of one user and category lie together in `order`, in time order, so the place
        # of the last one ends every window.
        place = np.where(known, rank[np.maximum(last, 0)], 0)
        same_from = self._focus_starts[place]
        low = bisect(self._focus_ts, same_from, place + 1, cuts.ts - _FOCUS_SPANS)
        counts = self._focus_counts[place + 1] - self._focus_counts[low]  # (windows, M, types)
        ever = np.log1p(place + 1 - same_from)[:, None]
        columns = np.concatenate([_flatten(np.log1p(counts)), ever], axis=1)
        return columns * known[:, None]

    @cached_property
    def _focus_ts(self) -> Ints:
        return self.ts[self._focus[0]]

    @cached_property
    def _focus_starts(self) -> Ints:
        """First place of the (user, category) group that every place belongs to."""
        order = self._focus[0]
        category = np.asarray(self.sequences.category)[order]
        user = self.user[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (category[1:] != category[:-1]) | (user[1:] != user[:-1])
        return np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))

    @cached_property
    def _items(self) -> tuple[Ints, Ints]:
        """Indices of events that name an item, and how many of them lie before every index."""
        named = np.asarray(self.sequences.item) > 0
        return np.flatnonzero(named), np.concatenate([[0], np.cumsum(named)])

    def recent_items(self, cuts: Cuts, count: int) -> NDArray[np.uint32]:
        """Return hashes of the items touched last before every cut, latest first, (M, count).

        An item touched twice stands there twice; 0 = there are no more.
        """
        index, before = self._items
        place = before[cuts.position][:, None] - 1 - np.arange(count)
        there = place >= before[self.offsets[cuts.user]][:, None]
        if not len(index):
            return np.zeros(place.shape, dtype=np.uint32)
        items = np.asarray(self.sequences.item)[index[np.where(there, place, 0)]]
        return np.where(there, items, np.uint32(0))

    def next_item(self, cuts: Cuts, close: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Return the hash of the first item touched from every cut on, 0 = none, (M,).

        Args:
            cuts: M cuts.
            close: int64 (M,), microseconds; nothing at or after it is looked at.
        """
        index, before = self._items
        place = before[cuts.position]
        there = place < before[self.offsets[cuts.user + 1]]
        if not len(index):
            return np.zeros(len(cuts), dtype=np.uint32)
        event = index[np.where(there, place, 0)]
        there &= self.ts[event] < close
        return np.where(there, np.asarray(self.sequences.item)[event], np.uint32(0))

    def tenure(self, cuts: Cuts) -> NDArray[np.float64]:
        """Return days since the sign-up, or since the first event where that is not known."""
        start = self.offsets[cuts.user]
        has = cuts.position > start
        first = np.full(len(cuts), 0, dtype=np.int64)
        first[:] = cuts.ts
        first[has] = self.ts[start[has]]
        signup = np.asarray(self.sequences.signup_ts)[cuts.user]
        known = (signup != MISSING_TIME) & (signup < first)
        first = np.where(known, signup, first)
        return np.asarray((cuts.ts - first) / DAY)

    def labels(
        self, cuts: Cuts, *, events: Sequence[str], horizons: Sequence[int], close: int
    ) -> Labels:
        """Return what followed every cut.

        Args:
            cuts: M cuts, none after ``close``.
            events: E event types, or ``ANY_EVENT``.
            horizons: H horizons in days, for the amounts.
            close: microseconds; nothing at or after it is looked at.
        """
        end = bisect(self.ts, cuts.position, self.offsets[cuts.user + 1], np.full(len(cuts), close))
        delay = np.full((len(cuts), len(events)), np.inf)
        for column, name in enumerate(events):
            following = cuts.position if name == ANY_EVENT else self._next(name)[cuts.position]
            found = following < end
            delay[found, column] = (self.ts[following[found]] - cuts.ts[found]) / DAY
        amount = np.zeros((len(cuts), len(horizons)), dtype=np.float32)
        for column, days in enumerate(horizons):
            until = bisect(self.ts, cuts.position, end, cuts.ts + days * DAY)
            amount[:, column] = (self._spent[until] - self._spent[cuts.position]) * _MONEY
        observed = (close - cuts.ts) / DAY
        return Labels(delay=delay, observed_days=observed, amount=amount)

    def _next(self, name: str) -> Ints:
        """Index of the first event of a type at or after every flat index, (N + 1,)."""
        if name not in self._next_cache:
            count = len(self.ts)
            index = np.full(count + 1, count, dtype=np.int64)
            index[:-1] = np.where(self.type == EVENT_CODES[name], np.arange(count), count)
            self._next_cache[name] = np.minimum.accumulate(index[::-1])[::-1]
        return self._next_cache[name]

    @cached_property
    def _next_cache(self) -> dict[str, Ints]:
        return {}


def feature_names() -> list[str]:
    """Names of the columns of ``Timeline.features``, in order."""
    names: list[str] = []
    for window in [*(f"{w:g}d" for w in _WINDOWS), "ever"]:
        names += [f"{kind}_{window}" for kind in _COUNTED] + [f"spend_{window}"]
    names += [f"since_{kind}" for kind in EVENT_TYPES] + [f"seen_{kind}" for kind in EVENT_TYPES]
    names.append("tenure")
    for window_days in _FOCUS_WINDOWS:
        names += [f"focus_{kind}_{window_days:g}d" for kind in _FOCUS_TYPES]
    return [*names, "focus_ever"]
