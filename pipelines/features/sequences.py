"""Event sequences: the flat columns of ``pipelines.features.store``, built by an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from ibis import _
from numpy.typing import NDArray

from pipelines.features.engine import fetch_batches
from pipelines.features.store import MISSING_TIME, Sequences, hash_query, hash_text

_BATCH_ROWS: Final = 1 << 18
_HASHED: Final = {"item": "item_id", "category": "category", "brand": "brand"}
_COPIED: Final = {
    "ts": ("us", np.int64),
    "type": ("code", np.uint8),
    "price": ("price", np.float32),
    "quantity": ("quantity", np.float32),
    "session_start": ("new_session", np.uint8),
}


def write_sequences(
    connection: Any, events: Any, people: pa.Table, folder: Path
) -> tuple[Sequences, dict[int, str]]:
    """Write all events, sorted by (user, ts, event_id), as flat columns.

    The engine sorts, out of core where it must; rows arrive in batches and go to files of their
    final size, so that memory holds one batch. Each distinct text is hashed once.

    Args:
        connection: where the expressions live.
        events: of ``pipelines.features.engine.prepare_events``.
        people: of ``pipelines.features.engine.index_users``, sorted by user.
        folder: an existing directory.

    Returns:
        The sequences, mapped from the files, and the ids of items by their hash.
    """
    counts = events.group_by("user").aggregate(n=_.count()).order_by("user").to_pyarrow()
    offsets = np.concatenate([[0], np.cumsum(counts["n"].to_numpy())]).astype(np.int64)
    rows = events.order_by("user", "number").select(
        *(column for column, _dtype in _COPIED.values()), *_HASHED.values(), "query"
    )
    dtypes: dict[str, Any] = {name: dtype for name, (_column, dtype) in _COPIED.items()}
    dtypes |= dict.fromkeys(_HASHED, np.uint32) | {"query": np.int32}
    files = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(int(offsets[-1]),)
        )
        for name, dtype in dtypes.items()
    }
    hashes: dict[str, dict[str | None, int]] = {name: {} for name in _HASHED}
    queries: dict[str | None, int] = {None: 0, "": 0}
    low = 0
    for batch in fetch_batches(connection, rows, _BATCH_ROWS):
        place = slice(low, low + batch.num_rows)
        for name, (column, _dtype) in _COPIED.items():
            files[name][place] = batch.column(column).to_numpy(zero_copy_only=False)
        for name, column in _HASHED.items():
            _learn(batch.column(column), hashes[name], hash_text)
            files[name][place] = _code(batch.column(column), hashes[name])
        _learn(batch.column("query"), queries, lambda _text: len(queries) - 1)
        files["query"][place] = _code(batch.column("query"), queries)
        low = place.stop
    for file in files.values():
        file.flush()
    grams = [hash_query(text) for text in queries if text]
    others: dict[str, NDArray[Any]] = {
        "offsets": offsets,
        "query_offsets": np.cumsum([0, 0, *(len(g) for g in grams)]).astype(np.int64),
        "query_tokens": np.array([token for g in grams for token in g], dtype=np.uint32),
        "age": people["age"].to_numpy().astype(np.float32),
        "gender": _hash_column(people["gender"]),
        "region": _hash_column(people["region"]),
        "signup_ts": _signup_us(people["signup_ts"]),
    }
    for name, values in others.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)
    # Of the few ids that share a hash, the last in the alphabet names it, whatever came first.
    names = {code: text for text, code in sorted((t, c) for t, c in hashes["item"].items() if t)}
    return Sequences.load(folder), names


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
