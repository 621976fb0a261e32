"""Turns flat columns into the numbers and codes of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipelines.features.store import Sequences, ranges
from pipelines.model.network import GAP_BINS, NEXT_GAP_BINS, PRICE_BINS, QUANTITY_BINS
from pipelines.model.timeline import DAY, Cuts, Timeline

MISSING: Final = 0
UNKNOWN: Final = 1
_FIRST_CODE: Final = 2

_SECOND: Final = 1_000_000
# Edges of the piecewise-linear encoding of a time gap, from seconds to a quarter.
_GAP_EDGES: Final = np.log1p(
    np.array([0, 10, 60, 300, 1800, 7200, 28800, 86400, 259200, 604800, 1209600, 2419200, 7776000])
)
# Likewise of a log price, standardised, and of a log quantity.
_PRICE_EDGES: Final = np.linspace(-2.0, 2.0, PRICE_BINS + 1)
_QUANTITY_EDGES: Final = np.log1p(np.array([0, 1, 2, 3, 6, 12, 48]))
# Edges of the classes of the gap to the next event; the last class is "later".
_NEXT_GAP_EDGES: Final = np.array([30, 120, 600, 3600, 28800, 172800, 604800]) * _SECOND


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Mean and standard deviation of a number."""

    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True, kw_only=True)
class NextEvents:
    """What pretraining wants to know of N events.

    Attributes:
        classes: int64 (N,) each: type, interval of the gap before, content.
        price: float32 (N,), standardised log price; NaN where there is none.
    """

    classes: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    price: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What was known of texts and numbers when the model was fitted.

    Attributes:
        category, brand, gender, region: hashes (``hash_text``) that have a code of their own.
        item, item_id: hashes and ids of the items that can be told to come next, by frequency.
        log_price, log_quantity, age: scales of log1p price, log1p quantity, and years.
    """

    category: tuple[int, ...] = ()
    brand: tuple[int, ...] = ()
    item: tuple[int, ...] = ()
    item_id: tuple[str, ...] = ()
    gender: tuple[int, ...] = ()
    region: tuple[int, ...] = ()
    log_price: Scale = Scale()
    log_quantity: Scale = Scale()
    age: Scale = Scale()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Vocabulary:
        """Build from an object of lists of hashes and of scales."""
        return cls(
            category=tuple(value["category"]),
            brand=tuple(value["brand"]),
            item=tuple(value["item"]),
            item_id=tuple(value["item_id"]),
            gender=tuple(value["gender"]),
            region=tuple(value["region"]),
            log_price=Scale(**value["log_price"]),
            log_quantity=Scale(**value["log_quantity"]),
            age=Scale(**value["age"]),
        )


class Coder:
    """Maps hashes to codes: 0 = missing, 1 = unknown, then the known ones in order."""

    def __init__(self, hashes: tuple[int, ...]) -> None:
        known = np.array(hashes, dtype=np.uint32)
        order = np.argsort(known, kind="stable")
        self._sorted = known[order]
        self._codes = order.astype(np.int64) + _FIRST_CODE
        self.size = len(known) + _FIRST_CODE

    def __call__(self, hashes: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the codes of some hashes."""
        if len(self._sorted):
            place = np.searchsorted(self._sorted, hashes)
            place = np.minimum(place, len(self._sorted) - 1)
            codes = np.where(self._sorted[place] == hashes, self._codes[place], UNKNOWN)
        else:
            codes = np.full(len(hashes), UNKNOWN, dtype=np.int64)
        return np.where(hashes == 0, MISSING, codes)


def encode_pieces(x: NDArray[np.floating[Any]], edges: NDArray[Any]) -> NDArray[np.float32]:
    """Piecewise-linear encoding (Gorishniy et al. 2022) of M numbers, (M, edges - 1).

    How far a number has come through each interval between two edges, 0 to 1.
    """
    low, high = edges[:-1], edges[1:]
    return np.asarray(np.clip((x[:, None] - low) / (high - low), 0.0, 1.0), dtype=np.float32)


def encode_gap(gap: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Return the code of gaps in microseconds, (M, GAP_BINS)."""
    return encode_pieces(np.log1p(np.maximum(gap, 0) / _SECOND), _GAP_EDGES)


def encode_calendar(ts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Sine and cosine of the hour of the day and the day of the week (UTC), (M, CALENDAR)."""
    day = 2 * np.pi * ((ts % DAY) / DAY)
    week = 2 * np.pi * ((ts % (7 * DAY)) / (7 * DAY))
    return np.stack([np.sin(day), np.cos(day), np.sin(week), np.cos(week)], axis=1).astype(
        np.float32
    )


class Tokenizer:
    """Codes and numbers of profile, event and NOW tokens."""

    def __init__(self, vocabulary: Vocabulary, *, item_buckets: int, query_buckets: int) -> None:
        self.vocabulary = vocabulary
        self.item_buckets = item_buckets
        self.query_buckets = query_buckets
        self.category = Coder(vocabulary.category)
        self.brand = Coder(vocabulary.brand)
        self.known_item = Coder(vocabulary.item)
        self.gender = Coder(vocabulary.gender)
        self.region = Coder(vocabulary.region)

    def profiles(
        self, sequences: Sequences, users: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return numbers (P, PROFILE_NUMBERS) and codes (P, 2) of users."""
        age = np.asarray(sequences.age)[users]
        scale = self.vocabulary.age
        missing = np.isnan(age)
        numbers = np.stack([_standardise(age, scale), missing], axis=1).astype(np.float32)
        codes = np.stack(
            [
                self.gender(np.asarray(sequences.gender)[users]),
                self.region(np.asarray(sequences.region)[users]),
            ],
            axis=1,
        )
        return numbers, codes

    def events(
        self, timeline: Timeline, index: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return numbers (E, EVENT_NUMBERS) and codes (E, 4) of events at flat indices."""
        sequences = timeline.sequences
        ts = timeline.ts[index]
        first = index == timeline.offsets[timeline.user[index]]
        gap = np.where(first, 0, ts - timeline.ts[np.maximum(index - 1, 0)])
        price = np.asarray(sequences.price)[index]
        quantity = np.asarray(sequences.quantity)[index]
        with np.errstate(invalid="ignore"):
            log_quantity = np.log1p(np.maximum(quantity, 0.0))
            scaled_price = _standardise(np.log1p(price), self.vocabulary.log_price)
        flags = [
            scaled_price,
            np.isnan(price),
            _standardise(log_quantity, self.vocabulary.log_quantity),
            np.asarray(sequences.session_start)[index],
            first,
        ]
        numbers = np.concatenate(
            [
                encode_gap(gap),
                encode_calendar(ts),
                encode_pieces(scaled_price, _PRICE_EDGES),
                encode_pieces(np.nan_to_num(log_quantity), _QUANTITY_EDGES),
                np.stack(flags, axis=1).astype(np.float32),
            ],
            axis=1,
        )
        item = np.asarray(sequences.item)[index].astype(np.int64)
        codes = np.stack(
            [
                timeline.type[index].astype(np.int64),
                self.category(np.asarray(sequences.category)[index]),
                self.brand(np.asarray(sequences.brand)[index]),
                np.where(item == 0, MISSING, item % self.item_buckets + 1),
            ],
            axis=1,
        )
        return numbers, codes

    def queries(
        self, sequences: Sequences, index: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return which of the events carry a search text, its n-grams, and where each begins."""
        query = np.asarray(sequences.query)[index].astype(np.int64)
        offsets = sequences.query_offsets
        lengths = np.asarray(offsets[query + 1] - offsets[query])
        rows = np.flatnonzero(lengths > 0)
        starts, lengths = np.asarray(offsets[query[rows]]), lengths[rows]
        tokens = np.asarray(sequences.query_tokens)[ranges(starts, lengths)].astype(np.int64)
        return rows, tokens % self.query_buckets + 1, np.cumsum(lengths) - lengths

    def nows(self, timeline: Timeline, cuts: Cuts) -> NDArray[np.float32]:
        """Return numbers (M, NOW_NUMBERS) of NOW tokens."""
        has = cuts.position > timeline.offsets[cuts.user]
        gap = np.full(len(cuts), 10**15, dtype=np.int64)  # no history: an endless silence
        gap[has] = cuts.ts[has] - timeline.ts[cuts.position[has] - 1]
        tenure = (np.log1p(timeline.tenure(cuts)) / 3.0 - 1.0)[:, None].astype(np.float32)
        return np.concatenate([encode_gap(gap), encode_calendar(cuts.ts), tenure], axis=1)

    def items(self, hashes: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return codes of items among those that can be told to come next, -1 = none of them."""
        return np.maximum(self.known_item(hashes) - _FIRST_CODE, -1)

    def next_events(
        self, timeline: Timeline, index: NDArray[np.int64], next_codes: int
    ) -> NextEvents:
        """Describe the event after each of some events.

        The content is the category, or the item where the data name no categories.
        """
        following = index + 1
        gap = timeline.ts[following] - timeline.ts[index]
        if self.vocabulary.category:
            content = self.category(np.asarray(timeline.sequences.category)[following])
        else:
            content = np.asarray(timeline.sequences.item)[following].astype(np.int64)
        price = np.log1p(np.maximum(np.asarray(timeline.sequences.price)[following], 0.0))
        scale = self.vocabulary.log_price
        return NextEvents(
            classes=(
                timeline.type[following].astype(np.int64),
                np.searchsorted(_NEXT_GAP_EDGES, gap, side="right").astype(np.int64),
                content % next_codes,
            ),
            price=((price - scale.mean) / max(scale.std, 1e-6)).astype(np.float32),
        )


assert len(_NEXT_GAP_EDGES) + 1 == NEXT_GAP_BINS  # noqa: S101 - two modules, one number
assert len(_GAP_EDGES) - 1 == GAP_BINS  # noqa: S101
assert len(_QUANTITY_EDGES) - 1 == QUANTITY_BINS  # noqa: S101


def _standardise(x: NDArray[np.floating[Any]], scale: Scale) -> NDArray[np.float32]:
    scaled = np.clip((x - scale.mean) / max(scale.std, 1e-6), -5.0, 5.0)
    return np.where(np.isnan(scaled), np.float32(0.0), scaled).astype(np.float32)
