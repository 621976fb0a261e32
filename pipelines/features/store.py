"""Event sequences as flat columns: what the model reads in training and in serving.

The features stage writes these columns, the service encodes requests into them, so a model
sees one form of history wherever it runs. Texts are stored as CRC-32 hashes: a sequence then
depends on no model's vocabulary, and a model maps hashes to codes of its own.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from operator import lt
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.events import (
    EPOCH,
    EVENT_CODES,
    MAX_PRICE,
    MAX_QUANTITY,
    MICROSECOND,
    SESSION_GAP_SECONDS,
    EventType,
    to_us,
)

MISSING_TIME: Final = int(np.iinfo(np.int64).min)
MICROSECONDS: Final = 1_000_000

# What an event has where it says nothing.
_NOTHING: Final = dict.fromkeys(
    ("item_id", "category", "brand", "price", "quantity", "query", "session_id")
) | {"event_id": ""}

_WORD: Final = re.compile(r"\w+")

_DTYPES: Final[dict[str, Any]] = {
    "offsets": np.int64,
    "ts": np.int64,
    "type": np.uint8,
    "item": np.uint32,
    "category": np.uint32,
    "brand": np.uint32,
    "price": np.float32,
    "quantity": np.float32,
    "query": np.int32,
    "session_start": np.uint8,
    "query_offsets": np.int64,
    "query_tokens": np.uint32,
    "age": np.float32,
    "gender": np.uint32,
    "region": np.uint32,
    "signup_ts": np.int64,
}
_EVENT_COLUMNS: Final = (
    "ts",
    "type",
    "item",
    "category",
    "brand",
    "price",
    "quantity",
    "query",
    "session_start",
)
_PROFILE_COLUMNS: Final = ("age", "gender", "region", "signup_ts")


def hash_text(text: str | None) -> int:
    """Return the CRC-32 of the UTF-8 text; 0 for a missing text (a hash of 0 becomes 1)."""
    if not text:
        return 0
    return zlib.crc32(text.encode("utf-8")) or 1


def strip_unseen(text: str | None) -> str | None:
    """Return a text without what is not seen at its ends, as ingest strips it; None for nothing."""
    if not text or ("!" <= text[0] <= "~" and "!" <= text[-1] <= "~"):
        return text or None
    start, end = 0, len(text)
    while start < end and _is_unseen(text[start]):
        start += 1
    while start < end and _is_unseen(text[end - 1]):
        end -= 1
    return text[start:end] or None


def _is_unseen(mark: str) -> bool:
    """Is it white space of any script, a mark without width, or a control?"""
    kind = unicodedata.category(mark)
    return kind[0] == "Z" or kind in {"Cc", "Cf"}


def hash_query(text: str | None) -> list[int]:
    """Return the hashes of the word unigrams, then bigrams, of a search text.

    The text is case-folded and split at whatever is no letter, digit or underscore; a bigram
    is two neighbouring words joined by one space.
    """
    words = _WORD.findall(text.casefold()) if text else []
    bigrams = [f"{first} {second}" for first, second in pairwise(words)]
    return [hash_text(gram) for gram in (*words, *bigrams)]


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Events of U users, N in all, sorted by user, time and event id.

    Attributes:
        offsets: int64 (U + 1,), events of user u are ``offsets[u]:offsets[u + 1]``.
        ts: int64 (N,), microseconds since the epoch, UTC.
        type: uint8 (N,), ``EVENT_CODES``.
        item, category, brand: uint32 (N,), ``hash_text``; 0 = missing.
        price, quantity: float32 (N,), NaN = missing.
        query: int32 (N,), row of the query table, 0 = none.
        session_start: uint8 (N,), 1 at the first event of a session.
        query_offsets: int64 (Q + 1,), tokens of query q are ``query_offsets[q]:...[q + 1]``;
            query 0 is empty.
        query_tokens: uint32 (T,), ``hash_query``.
        age: float32 (U,), NaN = missing.
        gender, region: uint32 (U,), ``hash_text``.
        signup_ts: int64 (U,), microseconds, ``MISSING_TIME`` = missing.
    """

    offsets: NDArray[np.int64]
    ts: NDArray[np.int64]
    type: NDArray[np.uint8]
    item: NDArray[np.uint32]
    category: NDArray[np.uint32]
    brand: NDArray[np.uint32]
    price: NDArray[np.float32]
    quantity: NDArray[np.float32]
    query: NDArray[np.int32]
    session_start: NDArray[np.uint8]
    query_offsets: NDArray[np.int64]
    query_tokens: NDArray[np.uint32]
    age: NDArray[np.float32]
    gender: NDArray[np.uint32]
    region: NDArray[np.uint32]
    signup_ts: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            if getattr(self, name).dtype != dtype:
                found = getattr(self, name).dtype
                raise UserError(f"sequences: column {name} is {found}, expected {np.dtype(dtype)}")
        events = int(self.offsets[-1])
        for name in _EVENT_COLUMNS:
            if len(getattr(self, name)) != events:
                raise UserError(f"sequences: column {name} does not hold {events} events")
        for name in _PROFILE_COLUMNS:
            if len(getattr(self, name)) != self.users:
                raise UserError(f"sequences: column {name} does not hold {self.users} users")

    @property
    def users(self) -> int:
        """Number of users."""
        return len(self.offsets) - 1

    @property
    def events(self) -> int:
        """Number of events."""
        return int(self.offsets[-1])

    @classmethod
    def load(cls, directory: Path) -> Sequences:
        """Memory-map the columns that ``save`` or the features stage wrote.

        Raises:
            UserError: a column is missing or damaged.
        """
        columns: dict[str, Any] = {}
        for field in fields(cls):
            path = directory / f"{field.name}.npy"
            try:
                # An empty file cannot be mapped, so short columns are read.
                small = path.stat().st_size < 4096
                columns[field.name] = np.load(
                    path, mmap_mode=None if small else "r", allow_pickle=False
                )
            except FileNotFoundError:
                raise UserError(f"{path}: no such file; run the features stage") from None
            except ValueError as error:
                raise UserError(f"{path}: not a readable column ({error})") from None
        return cls(**columns)

    def save(self, directory: Path) -> None:
        """Write one ``.npy`` file a column into an existing directory."""
        for field in fields(self):
            np.save(directory / f"{field.name}.npy", getattr(self, field.name), allow_pickle=False)

    def take(self, users: NDArray[np.integer[Any]]) -> Sequences:
        """Return the sequences of some users, in the order given (the query table is shared)."""
        lengths = (self.offsets[1:] - self.offsets[:-1])[users]
        rows = ranges(self.offsets[:-1][users], lengths)
        columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in _EVENT_COLUMNS}
        columns |= {name: getattr(self, name)[users] for name in _PROFILE_COLUMNS}
        return Sequences(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            query_offsets=self.query_offsets,
            query_tokens=self.query_tokens,
            **columns,
        )

    def without(self, events: NDArray[np.integer[Any]]) -> Sequences:
        """Return the sequences less some events, given by their flat indices."""
        kept = np.ones(self.events, dtype=bool)
        kept[events] = False
        before = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        columns: dict[str, Any] = {name: getattr(self, name)[kept] for name in _EVENT_COLUMNS}
        columns |= {name: getattr(self, name) for name in _PROFILE_COLUMNS}
        return Sequences(
            offsets=before[self.offsets],
            query_offsets=self.query_offsets,
            query_tokens=self.query_tokens,
            **columns,
        )

    def slice(self, low: int, high: int) -> Sequences:
        """Return the sequences of users ``low:high`` without touching those of the others.

        Their cost follows the users taken, not all users; the query table is shared.
        """
        first, last = int(self.offsets[low]), int(self.offsets[high])
        columns: dict[str, Any] = {
            n: np.array(getattr(self, n)[first:last]) for n in _EVENT_COLUMNS
        }
        columns |= {n: np.array(getattr(self, n)[low:high]) for n in _PROFILE_COLUMNS}
        return Sequences(
            offsets=np.asarray(self.offsets[low : high + 1] - first, dtype=np.int64),
            query_offsets=self.query_offsets,
            query_tokens=self.query_tokens,
            **columns,
        )


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate ``arange(start, start + length)`` over all pairs, without a loop."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    places: NDArray[np.int64] = np.arange(total, dtype=np.int64)
    places += np.repeat(starts - (ends - lengths), lengths)
    return places


def encode_events(
    users: Sequence[Sequence[Any]],
    profiles: Sequence[Mapping[str, Any] | None] | None = None,
) -> Sequences:
    """Encode the events of a request.

    Args:
        users: for every user the events, each a dict with the columns of ``EVENT_SCHEMA``
            (missing or None where not known), or an object with such attributes. ``ts`` is an
            aware datetime or microseconds since the epoch.
        profiles: for every user a mapping with the columns of ``USER_SCHEMA``, or None.

    Returns:
        Sequences of ``len(users)`` users; events are sorted by time and event id.
    """
    ordered = [order_events(events) for events in users]
    lengths = [len(times) for times, _ in ordered]
    ts = list(chain.from_iterable(times for times, _ in ordered))
    events = list(chain.from_iterable(events for _, events in ordered))
    hashes, queries, names = _Hashes(), _Queries(), _Names()
    columns: dict[str, Iterable[Any]] = {
        "ts": ts,
        "type": map(EVENT_CODES.__getitem__, [event.event_type for event in events]),
        "item": map(hashes.__getitem__, [event.item_id for event in events]),
        "category": map(hashes.__getitem__, [event.category for event in events]),
        "brand": map(hashes.__getitem__, [event.brand for event in events]),
        "query": map(queries.__getitem__, [event.query for event in events]),
    }
    arrays: dict[str, Any] = {
        name: np.fromiter(values, dtype=_DTYPES[name], count=len(ts))
        for name, values in columns.items()
    }
    # NumPy reads None as NaN in a column of floats. What was stored when more was accepted counts
    # as the most that is.
    price = np.array([event.price for event in events], dtype=np.float64)
    quantity = np.array([event.quantity for event in events], dtype=np.float64)
    arrays["price"] = np.clip(price, -MAX_PRICE, MAX_PRICE).astype(np.float32)
    arrays["quantity"] = np.clip(quantity, -MAX_QUANTITY, MAX_QUANTITY).astype(np.float32)
    _turn_refunds(arrays["type"], arrays["quantity"])
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    sessions = map(names.__getitem__, [event.session_id for event in events])
    session = np.fromiter(sessions, dtype=np.int64, count=len(ts))
    arrays["session_start"] = _start_sessions(offsets, arrays["ts"], session)
    grams = queries.grams
    people = [p or {} for p in profiles] if profiles is not None else [{} for _ in users]
    if len(people) != len(users):
        raise ValueError(f"{len(people)} profiles for {len(users)} users")
    return Sequences(
        offsets=offsets,
        query_offsets=np.cumsum([0, *(len(g) for g in grams)]).astype(np.int64),
        query_tokens=np.array([token for g in grams for token in g], dtype=np.uint32),
        age=np.array([_number(p.get("age")) for p in people], dtype=np.float32),
        gender=np.array([hashes[p.get("gender")] for p in people], dtype=np.uint32),
        region=np.array([hashes[p.get("region")] for p in people], dtype=np.uint32),
        signup_ts=np.array(
            [MISSING_TIME if p.get("signup_ts") is None else to_us(p["signup_ts"]) for p in people],
            dtype=np.int64,
        ),
        **arrays,
    )


def _turn_refunds(kind: NDArray[Any], quantity: NDArray[np.float32]) -> None:
    """Make a purchase of a negative quantity a refund, as ingest does, in place."""
    purchase, refund = EVENT_CODES[EventType.PURCHASE], EVENT_CODES[EventType.REFUND]
    kind[(kind == purchase) & (quantity < 0)] = refund
    paid = (kind == purchase) | (kind == refund)
    np.abs(quantity, out=quantity, where=paid)


def _to_record(event: Any) -> Any:
    """Return an object with the attributes of an event, whatever it is."""
    return SimpleNamespace(**_NOTHING | event) if isinstance(event, dict) else event


def order_events(events: Sequence[Any]) -> tuple[list[int], Sequence[Any]]:
    """Return the times of a user's events in microseconds, and the events, by time and id.

    Args:
        events: of ``encode_events``; the result has attributes, also where these are dicts.
    """
    if events and isinstance(events[0], dict):
        events = [_to_record(event) for event in events]
    told = [event.ts for event in events]
    try:
        # As ``to_us`` does, without a call for each.
        ts = [(time - EPOCH) // MICROSECOND for time in told]
    except TypeError:
        ts = [to_us(time) for time in told]
    # Most come in order.
    if not all(map(lt, ts, ts[1:])):
        order = sorted(range(len(ts)), key=lambda i: (ts[i], str(events[i].event_id)))
        return [ts[i] for i in order], [events[i] for i in order]
    return ts, events


class _Hashes(dict[str | None, int]):
    """``hash_text`` of stripped texts, each but once."""

    def __missing__(self, text: str | None) -> int:
        code = self[text] = hash_text(strip_unseen(text))
        return code


class _Queries(dict[str | None, int]):
    """Rows of the query table, of stripped texts; 0 = no query.

    Attributes:
        grams: the table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grams: list[list[int]] = [[]]

    def __missing__(self, text: str | None) -> int:
        stripped = strip_unseen(text)
        if stripped is None or stripped != text:
            row = 0 if stripped is None else self[stripped]
        else:
            row = len(self.grams)
            self.grams.append(hash_query(text))
        self[text] = row
        return row


class _Names(dict[str | None, int]):
    """Numbers of stripped texts, from 1 on; 0 = none."""

    def __missing__(self, text: str | None) -> int:
        name = strip_unseen(text)
        number = self[text] = 0 if name is None else len(self) + 1 if name == text else self[name]
        return number


def _start_sessions(
    offsets: NDArray[np.int64], ts: NDArray[np.int64], session: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Return 1 at the first event of a session, (N,).

    Where two events that follow each other both name their session the names tell, elsewhere the
    time between them does.

    Args:
        offsets: int64 (U + 1,), of users.
        ts: int64 (N,), microseconds.
        session: int64 (N,), number of the session's name; 0 = none.
    """
    starts = np.ones(len(ts), dtype=np.uint8)
    before, after = session[:-1], session[1:]
    far = np.diff(ts) > SESSION_GAP_SECONDS * MICROSECONDS
    starts[1:] = np.where((before > 0) & (after > 0), before != after, far)
    # An empty user at the end has its offset behind the last event.
    first = offsets[:-1]
    starts[first[first < len(ts)]] = 1
    return starts


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
