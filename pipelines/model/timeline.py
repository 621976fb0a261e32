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

from pipelines.events import EVENT_CODES, EVENT_TYPES, MAX_PRICE, MAX_QUANTITY, EventType
from pipelines.features.store import MISSING_TIME, Sequences

DAY: Final = 86_400_000_000  # microseconds

ANY_EVENT: Final = "any"

_WINDOWS: Final = (0.25, 1.0, 3.0, 7.0, 14.0, 28.0, 90.0)  # days
_RARE_WINDOWS: Final = (1.0, 7.0, 28.0)  # days
_FOCUS_WINDOWS: Final = (1.0, 3.0, 7.0, 28.0)  # days
_PURCHASE_DAY_WINDOWS: Final = (28.0, 90.0)  # days
_NEW_ITEM_WINDOWS: Final = (7.0, 28.0)  # days
# The smallest amount that is told apart, and the largest that an event may add.
_MONEY: Final = 1e-4
_MOST_SPENT: Final = MAX_PRICE * MAX_QUANTITY
_FOCUS_TYPES: Final = (EventType.VIEW, EventType.SEARCH, EventType.ADD_TO_CART, EventType.PURCHASE)
_COUNTED: Final = (*_FOCUS_TYPES, "session", "active_day")
_RARE_TYPES: Final = tuple(name for name in EVENT_TYPES if name not in _FOCUS_TYPES)
# Of which there are sums before every event: those that are told in every window come first.
_SUMS: Final = (
    *_COUNTED,
    "spend",
    *_RARE_TYPES,
    "purchase_day",
    "item",
    "new_item",
    "category",
    "new_category",
    "price",
    "priced",
)
_SUM: Final = {name: place for place, name in enumerate(_SUMS)}
_OFTEN: Final = len(_COUNTED) + 1
_SINCE_PURCHASE: Final = (EventType.VIEW, EventType.SEARCH, EventType.ADD_TO_CART)
# What comes again and again, with gaps between, and what is told of them.
_PULSES: Final = ("event", "active_day", "purchase_day")
_OF_GAPS: Final = ("mean", "std", "last", "now")
_SHORTEST_GAP_SECONDS: Final = 600.0  # to which a silence is compared
_LONGEST_GAP_SECONDS: Final = 3_000_000_000  # whose square fits
_PROFILE: Final = ("age", "gender", "region")

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


def _spans(windows_days: Sequence[float]) -> Ints:
    """Return lengths of windows in microseconds, (windows, 1)."""
    return np.array([[int(days * DAY)] for days in windows_days])


def _accumulate(values: NDArray[Any]) -> Ints:
    """Return the sums of whole numbers before every index, (N + 1, ...).

    Should they not fit, they wrap around, and differences that do fit are right all the same.
    """
    before = np.zeros((len(values) + 1, *values.shape[1:]), dtype=np.int64)
    np.cumsum(values, axis=0, out=before[1:])
    return before


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
        if len(parts) == 1:
            return parts[0]
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
    def _spent(self) -> Ints:
        """Money spent before every flat index, (N + 1,), in ``_MONEY``.

        Whole numbers, whose differences are exact: what one shopper spends, however much, changes
        nothing of the others.
        """
        price = np.nan_to_num(np.asarray(self.sequences.price, dtype=np.float64))
        quantity = np.nan_to_num(np.asarray(self.sequences.quantity, dtype=np.float64), nan=1.0)
        bought = self.type == EVENT_CODES[EventType.PURCHASE]
        spent = np.where(bought, np.clip(price * quantity, -_MOST_SPENT, _MOST_SPENT), 0.0)
        return _accumulate(np.rint(spent / _MONEY).astype(np.int64))

    @cached_property
    def _sums(self) -> Ints:
        """Sums of ``_SUMS`` before every flat index, (N + 1, sums); money in ``_MONEY``."""
        sums = np.zeros((len(self.ts) + 1, len(_SUMS)), dtype=np.int64)
        values = sums[1:]
        for name in EVENT_TYPES:
            values[:, _SUM[name]] = self.type == EVENT_CODES[name]
        values[:, _SUM["session"]] = self.sequences.session_start
        _, values[:, _SUM["active_day"]], values[:, _SUM["purchase_day"]] = self._pulses
        price = np.asarray(self.sequences.price, dtype=np.float64)
        priced = np.isfinite(price)
        price = np.clip(np.where(priced, price, 0.0), 0.0, _MOST_SPENT)
        values[:, _SUM["price"]] = np.rint(price / _MONEY)
        values[:, _SUM["priced"]] = priced
        for name, times in self._times.items():
            values[:, _SUM[name]] = times > 0
            values[:, _SUM[f"new_{name}"]] = times == 1
        # In place, as there are many; should they not fit, see _accumulate.
        np.cumsum(values, axis=0, out=values)
        sums[:, _SUM["spend"]] = self._spent
        return sums

    @cached_property
    def _pulses(self) -> NDArray[np.bool_]:
        """Which events are a beat of each of ``_PULSES``, (pulses, N)."""
        day = self.ts // DAY
        bought = np.flatnonzero(self.type == EVENT_CODES[EventType.PURCHASE])
        flags = np.ones((len(_PULSES), len(self.ts)), dtype=bool)
        flags[1, 1:] = (day[1:] != day[:-1]) | (self.user[1:] != self.user[:-1])
        flags[2] = False
        first = np.ones(len(bought), dtype=bool)
        before, after = bought[:-1], bought[1:]
        first[1:] = (day[after] != day[before]) | (self.user[after] != self.user[before])
        flags[2, bought[first]] = True
        return flags

    @cached_property
    def _gaps(self) -> tuple[Ints, Ints, Ints]:
        """The rhythm of every pulse.

        Index of the last beat and the sum of squared gaps (s^2) before every flat index, both
        (N + 1, pulses), and the gap that ends with every beat, (N, pulses), seconds.
        """
        count = len(self.ts)
        last = np.full((count + 1, len(_PULSES)), -1, dtype=np.int64)
        gaps = np.zeros((count, len(_PULSES)), dtype=np.int64)
        seconds = self.ts // 1_000_000
        for pulse, flags in enumerate(self._pulses):
            beats = np.flatnonzero(flags)
            last[beats + 1, pulse] = beats
            same = self.user[beats[1:]] == self.user[beats[:-1]]
            passed = np.minimum(seconds[beats[1:]] - seconds[beats[:-1]], _LONGEST_GAP_SECONDS)
            gaps[beats[1:], pulse] = np.where(same, passed, 0)
        return np.maximum.accumulate(last, axis=0), _accumulate(gaps * gaps), gaps

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
        order = self._sort_by(category)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        last = np.full(len(self.ts) + 1, -1, dtype=np.int64)
        last[1:] = np.where(category > 0, np.arange(len(self.ts)), -1)
        return order, rank, np.maximum.accumulate(last)

    def _sort_by(self, values: NDArray[np.uint32]) -> Ints:
        """Return the order of events by user, then value, then time."""
        return np.argsort((self.user << 32) | values, kind="stable")

    def _find_starts(self, order: Ints, values: NDArray[np.uint32]) -> Ints:
        """Return for every place of ``_sort_by`` the first one of its user and value."""
        value, user = values[order], self.user[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (value[1:] != value[:-1]) | (user[1:] != user[:-1])
        return np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))

    @cached_property
    def _times(self) -> dict[str, Ints]:
        """How many times a user had touched an event's item, and category, with it, (N,).

        0 where the event names none.
        """
        item = np.asarray(self.sequences.item)
        category = np.asarray(self.sequences.category)
        order = self._sort_by(item)
        result = {}
        for name, values, places, starts in (
            ("item", item, order, self._find_starts(order, item)),
            ("category", category, self._focus[0], self._focus_starts),
        ):
            times = np.empty(len(places), dtype=np.int64)
            times[places] = np.arange(len(places)) - starts + 1
            times[values == 0] = 0
            result[name] = times
        return result

    @cached_property
    def _most(self) -> dict[str, Ints]:
        """The most of ``_times`` that a user had up to every event, (N,)."""
        result = {}
        for name, times in self._times.items():
            step = int(times.max(initial=0)) + 1
            result[name] = np.maximum.accumulate(times + self.user * step) - self.user * step
        return result

    @cached_property
    def _focus_counts(self) -> NDArray[np.int64]:
        """Events of the focus types before every place of the (user, category) order."""
        codes = np.array([EVENT_CODES[name] for name in _FOCUS_TYPES])
        return _accumulate(self.type[self._focus[0]][:, None] == codes)

    def cuts(self, user: NDArray[np.integer[Any]], ts: Ints) -> Cuts:
        """Locate cuts in the flat columns."""
        users: Ints = np.asarray(user, dtype=np.int64)
        position = bisect(self.ts, self.offsets[users], self.offsets[users + 1], ts)
        return Cuts(user=users, ts=np.asarray(ts, dtype=np.int64), position=position)

    def after(self, index: Ints) -> Cuts:
        """Return the cuts right after some events, which see them."""
        return Cuts(user=self.user[index], ts=self.ts[index] + 1, position=index + 1)

    def features(self, cuts: Cuts) -> Floats:
        """Return ``len(feature_names())`` features of every cut, (M, F); all are finite."""
        start, position, now = self.offsets[cuts.user], cuts.position, cuts.ts
        low = bisect(self.ts, start, position, now - _spans(_WINDOWS))
        sums = self._sums[position] - self._sums[np.concatenate([low, start[None]])]
        often = sums[:, :, :_OFTEN].astype(np.float64)
        often[:, :, -1] = np.maximum(often[:, :, -1], 0.0) * _MONEY
        rare = sums[[*map(_WINDOWS.index, _RARE_WINDOWS), -1], :, _OFTEN : _SUM["purchase_day"]]
        last = self._last[position]
        seen = last >= start[:, None]
        days = (now[:, None] - self.ts[np.maximum(last, 0)]) / DAY if len(self.ts) else 0.0
        columns: list[NDArray[Any]] = [
            _flatten(np.log1p(often)),
            _flatten(np.log1p(rare)),
            np.where(seen, np.log1p(np.maximum(days, 0.0) * 24), 10.0),
            np.log1p(self.tenure(cuts))[:, None],
            self._focus_features(cuts),
            self._gap_features(cuts, sums[-1]),
            self._habit_features(cuts, sums),
            self._profile_features(cuts),
        ]
        return np.concatenate(columns, axis=1).astype(np.float32)

    def _gap_features(self, cuts: Cuts, ever: Ints) -> NDArray[Any]:
        """Mean, spread and last of the gaps of each pulse, and the silence since, (M, ...).

        Args:
            cuts: M cuts.
            ever: sums up to them, (M, sums).
        """
        if not len(self.ts):
            return np.full((len(cuts), len(_PULSES) * len(_OF_GAPS)), -1.0)
        start, position = self.offsets[cuts.user], cuts.position
        last, squares, gaps = self._gaps
        beats = ever[:, [_SUM["active_day"], _SUM["active_day"], _SUM["purchase_day"]]]
        beats[:, 0] = position - start
        count = beats - 1  # of gaps, (M, pulses): the first beat of a user ends none
        final = np.maximum(last[position], 0)
        # So they add up to what lies between the first and the last.
        first = np.stack([start, start, self._next(EventType.PURCHASE)[start]], axis=1)
        between = (
            self.ts[final] // 1_000_000 - self.ts[np.minimum(first, len(self.ts) - 1)] // 1_000_000
        )
        several = np.maximum(count, 1)
        mean = np.maximum(between, 0) / several
        square = (squares[position] - squares[start]) / several
        spread = np.sqrt(np.maximum(square - mean * mean, 0.0))
        silence = (cuts.ts[:, None] - self.ts[final]) / 1e6
        silence /= np.maximum(mean, _SHORTEST_GAP_SECONDS)
        told = np.stack([mean, spread, gaps[final, np.arange(len(_PULSES))], silence], axis=2)
        known = np.repeat((count > 0)[:, :, None], len(_OF_GAPS), axis=2)
        known[:, :, _OF_GAPS.index("std")] = count > 1
        return np.where(known, np.log1p(np.maximum(told, 0.0)), -1.0).reshape(len(cuts), -1)

    def _habit_features(self, cuts: Cuts, sums: Ints) -> NDArray[Any]:
        """What else is told of how somebody shops, (M, ...).

        Args:
            cuts: M cuts.
            sums: within ``_WINDOWS`` and ever before them, (windows + 1, M, sums).
        """
        start, position = self.offsets[cuts.user], cuts.position

        def tell(name: str, windows: Sequence[float]) -> Ints:
            return sums[[*map(_WINDOWS.index, windows), -1], :, _SUM[name]]

        bought = self._last[position, EVENT_CODES[EventType.PURCHASE] - 1]
        since = np.where(bought >= start, bought + 1, start)
        wanted = [_SUM[name] for name in _SINCE_PURCHASE]
        after = self._sums[position[:, None], wanted] - self._sums[since[:, None], wanted]
        ever = sums[-1]
        spent = np.maximum(ever[:, _SUM["spend"]], 0) * _MONEY
        price = ever[:, _SUM["price"]] * _MONEY
        counted = [
            *tell("purchase_day", _PURCHASE_DAY_WINDOWS),
            *after.T,
            spent / np.maximum(ever[:, _SUM["purchase"]], 1),
            price / np.maximum(ever[:, _SUM["priced"]], 1),
            *tell("new_item", _NEW_ITEM_WINDOWS),
            ever[:, _SUM["new_category"]],
        ]
        shares = [
            np.where(position > start, most[position - 1], 0) / np.maximum(ever[:, _SUM[name]], 1)
            if len(self.ts)
            else np.zeros(len(cuts))
            for name, most in self._most.items()
        ]
        return np.stack([*np.log1p(np.stack(counted)), *shares], axis=1)

    def _profile_features(self, cuts: Cuts) -> NDArray[Any]:
        """Age in years, -1 = not told, and groups as numbers whose order says nothing, (M, 3)."""
        age = np.asarray(self.sequences.age, dtype=np.float64)[cuts.user]
        groups = [getattr(self.sequences, name)[cuts.user] / 2.0**32 for name in _PROFILE[1:]]
        return np.stack([np.where(np.isfinite(age), age, -1.0), *groups], axis=1)

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
        low = bisect(self._focus_ts, same_from, place + 1, cuts.ts - _spans(_FOCUS_WINDOWS))
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
        return self._find_starts(self._focus[0], np.asarray(self.sequences.category))

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


def population(timeline: Timeline, ts: int, active_days: float | None) -> Cuts:
    """Return a cut at ``ts`` for everyone in the population then."""
    users = np.arange(timeline.sequences.users, dtype=np.int64)
    cuts = timeline.cuts(users, np.full(len(users), ts, dtype=np.int64))
    inside = cuts.position > timeline.offsets[:-1]
    if active_days is not None and len(timeline.ts):
        last = timeline.ts[np.maximum(cuts.position - 1, 0)]
        inside &= last >= ts - int(active_days * DAY)
    return cuts.take(np.flatnonzero(inside))


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Return so many of the places 0 to ``count`` - 1 at most, evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def feature_names() -> list[str]:
    """Names of the columns of ``Timeline.features``, in order."""

    def tell(kinds: Sequence[str], windows: Sequence[float], *, ever: bool = True) -> list[str]:
        ends = [f"{days:g}d" for days in windows] + ["ever"] * ever
        return [f"{kind}_{end}" for end in ends for kind in kinds]

    return [
        *tell([*_COUNTED, "spend"], _WINDOWS),
        *tell(_RARE_TYPES, _RARE_WINDOWS),
        *(f"since_{kind}" for kind in EVENT_TYPES),
        "tenure",
        *tell([f"focus_{kind}" for kind in _FOCUS_TYPES], _FOCUS_WINDOWS, ever=False),
        "focus_ever",
        *(f"gap_{told}_{pulse}" for pulse in _PULSES for told in _OF_GAPS),
        *tell(["purchase_day"], _PURCHASE_DAY_WINDOWS),
        *(f"after_purchase_{kind}" for kind in _SINCE_PURCHASE),
        "mean_purchase",
        "mean_price",
        *tell(["new_item"], _NEW_ITEM_WINDOWS),
        "new_category_ever",
        "top_item",
        "top_category",
        *_PROFILE,
    ]
