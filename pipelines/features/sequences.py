"""Event sequences: the flat columns of ``pipelines.features.store``, built by an engine."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from ibis import _
from numpy.typing import NDArray

from pipelines.events import EVENT_CODES, SESSION_GAP_SECONDS
from pipelines.features.engine import SECOND_US, fetch_batches, microseconds
from pipelines.features.store import MISSING_TIME, Sequences, hash_query, hash_text

_BATCH_ROWS: Final = 1 << 18
_HASHED: Final = ("item_id", "category", "brand", "session_id")


def build_sequences(connection: Any, events: Any, users: Any) -> Sequences:
    """Sort all events by (user, ts, event_id) and code them.

    The engine sorts (out of core where it must); rows arrive in batches and are written into
    flat arrays, so that texts are never all in memory. Each distinct text is hashed once.

    Args:
        connection: where the expressions live.
        events: expression in the schema of ``pipelines.events``.
        users: of ``pipelines.features.engine.index_users``.
    """
    rows = (
        events.join(users.select("user", "user_id"), "user_id")
        .mutate(us=microseconds(connection, _.ts))
        .order_by("user", "us", "event_id")
        .select("user", "us", "event_type", *_HASHED, "price", "quantity", "query")
    )
    total = int(events.count().execute())
    user = np.empty(total, np.int64)
    columns: dict[str, NDArray[Any]] = {
        "us": np.empty(total, np.int64),
        "event_type": np.empty(total, np.uint8),
        "price": np.empty(total, np.float32),
        "quantity": np.empty(total, np.float32),
        "query": np.empty(total, np.int32),
        **{name: np.empty(total, np.uint32) for name in _HASHED},
    }
    hashes: dict[str, dict[str | None, int]] = {name: {} for name in _HASHED}
    queries: dict[str | None, int] = {None: 0, "": 0}
    low = 0
    for batch in fetch_batches(connection, rows, _BATCH_ROWS):
        high = low + batch.num_rows
        user[low:high] = batch.column("user").to_numpy()
        columns["us"][low:high] = batch.column("us").to_numpy()
        columns["event_type"][low:high] = _code(batch.column("event_type"), EVENT_CODES)
        for name in ("price", "quantity"):
            columns[name][low:high] = batch.column(name).to_numpy(zero_copy_only=False)
        for name in _HASHED:
            _learn(batch.column(name), hashes[name], hash_text)
            columns[name][low:high] = _code(batch.column(name), hashes[name])
        _learn(batch.column("query"), queries, lambda _text: len(queries) - 1)
        columns["query"][low:high] = _code(batch.column("query"), queries)
        low = high
    people = users.order_by("user").to_pyarrow()
    texts = sorted((number, text) for text, number in queries.items() if number > 0)
    grams = [hash_query(text) for _number, text in texts]
    return Sequences(
        offsets=np.searchsorted(user, np.arange(people.num_rows + 1)).astype(np.int64),
        ts=columns["us"],
        type=columns["event_type"],
        item=columns["item_id"],
        category=columns["category"],
        brand=columns["brand"],
        price=columns["price"],
        quantity=columns["quantity"],
        query=columns["query"],
        session_start=_find_session_starts(user, columns["us"], columns["session_id"]),
        query_offsets=np.cumsum([0, 0, *(len(g) for g in grams)]).astype(np.int64),
        query_tokens=np.array([token for g in grams for token in g], dtype=np.uint32),
        age=people["age"].to_numpy().astype(np.float32),
        gender=_hash_column(people["gender"]),
        region=_hash_column(people["region"]),
        signup_ts=_signup_us(people["signup_ts"]),
    )


def _learn(column: pa.Array, known: dict[str | None, int], number: Any) -> None:
    for text in column.unique().to_pylist():
        if text not in known:
            known[text] = number(text)


def _code(column: pa.Array, codes: dict[Any, int]) -> NDArray[np.int64]:
    """Map texts to numbers through the batch's distinct values; a missing text is 0."""
    coded = column.dictionary_encode()
    table = np.array([codes[text] for text in coded.dictionary.to_pylist()] + [0], dtype=np.int64)
    index = coded.indices.fill_null(len(table) - 1).to_numpy(zero_copy_only=False)
    mapped: NDArray[np.int64] = table[index]
    return mapped


def _hash_column(column: pa.ChunkedArray) -> NDArray[np.uint32]:
    return np.array([hash_text(text) for text in column.to_pylist()], dtype=np.uint32)


def _signup_us(column: pa.ChunkedArray) -> NDArray[np.int64]:
    micros = column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    filled: NDArray[np.int64] = micros.fill_null(MISSING_TIME).to_numpy()
    return filled


def _find_session_starts(
    user: NDArray[np.int64], us: NDArray[np.int64], session: NDArray[np.uint32]
) -> NDArray[np.uint8]:
    starts = np.ones(len(us), bool)
    named = (session[1:] > 0) & (session[:-1] > 0)
    by_gap = np.diff(us) > SESSION_GAP_SECONDS * SECOND_US
    starts[1:] = (np.diff(user) != 0) | np.where(named, np.diff(session) != 0, by_gap)
    return starts.astype(np.uint8)
