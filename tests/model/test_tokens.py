"""Numbers of tokens."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from pipelines.events import EVENT_CODES
from pipelines.features.store import Sequences, encode_events, hash_query, hash_text
from pipelines.model.network import (
    CALENDAR,
    EVENT_NUMBERS,
    GAP_BINS,
    PRICE_BINS,
    QUANTITY_BINS,
)
from pipelines.model.timeline import DAY, Timeline
from pipelines.model.tokens import (
    MISSING,
    UNKNOWN,
    Coder,
    Scale,
    Tokenizer,
    Vocabulary,
    encode_calendar,
    encode_gap,
    encode_pieces,
)


def test_a_number_fills_its_intervals_from_below() -> None:
    edges = np.array([0.0, 1.0, 3.0])
    found = encode_pieces(np.array([-1.0, 0.5, 2.0, 9.0]), edges)
    np.testing.assert_array_equal(found, [[0, 0], [0.5, 0], [1, 0.5], [1, 1]])
    assert found.dtype == np.float32


def test_a_negative_quantity_counts_as_nothing() -> None:
    def encode(quantity: float) -> NDArray[np.float32]:
        event = {"ts": 1, "event_type": "add_to_cart", "quantity": quantity}
        timeline = Timeline(encode_events([[event]]))
        tokenizer = Tokenizer(Vocabulary(), item_buckets=4, query_buckets=4)
        return tokenizer.events(timeline, np.arange(1))[0]

    with np.errstate(all="raise"):
        for quantity in (-0.5, -1.0, -7.0):
            np.testing.assert_array_equal(encode(quantity), encode(0.0))


def test_prices_and_quantities_are_told_in_pieces() -> None:
    prices = [0.0, 1.0, 10.0, 40.0, 1e6, None]
    quantities = [None, 1.0, 2.0, 5.0, 1000.0, None]
    events = [
        {"ts": i, "event_type": "purchase", "item_id": "a", "price": price, "quantity": quantity}
        for i, (price, quantity) in enumerate(zip(prices, quantities, strict=True))
    ]
    timeline = Timeline(encode_events([events]))
    scale = Scale(mean=float(np.log1p(10.0)), std=1.0)
    vocabulary = Vocabulary(log_price=scale)
    tokenizer = Tokenizer(vocabulary, item_buckets=4, query_buckets=4)
    numbers, _ = tokenizer.events(timeline, np.arange(len(events)))
    assert numbers.shape == (len(events), EVENT_NUMBERS)
    assert np.isfinite(numbers).all()
    first = GAP_BINS + CALENDAR
    price = numbers[:, first : first + PRICE_BINS].sum(axis=1)
    quantity = numbers[:, first + PRICE_BINS :][:, :QUANTITY_BINS].sum(axis=1)
    # The mean lies in the middle; none at all stands there, too, and a flag says so.
    np.testing.assert_allclose(price[[0, 2, 4, 5]], [0, PRICE_BINS / 2, PRICE_BINS, PRICE_BINS / 2])
    assert (np.diff(price[:5]) > 0).all()
    assert (np.diff(quantity[:5]) > 0).all()
    assert quantity[0] == 0
    missing = numbers[:, first + PRICE_BINS + QUANTITY_BINS + 1]
    np.testing.assert_array_equal(missing, [0, 0, 0, 0, 0, 1])


def test_known_hashes_have_their_codes_in_the_order_given() -> None:
    coder = Coder((70, 20, 90))
    hashes = np.array([70, 20, 90, 0, 1, 50, 4_000_000_000], dtype=np.uint32)
    assert coder(hashes).tolist() == [2, 3, 4, MISSING, UNKNOWN, UNKNOWN, UNKNOWN]
    assert coder.size == 5
    nothing = Coder(())
    assert nothing(hashes).tolist() == [UNKNOWN] * 3 + [MISSING] + [UNKNOWN] * 3


def test_the_calendar_goes_round_in_a_day_and_in_a_week() -> None:
    midnight = 20_000 * DAY
    found = encode_calendar(midnight + np.array([0, DAY // 4, DAY // 2, DAY, 7 * DAY]))
    np.testing.assert_allclose(found[:3, :2], [[0, 1], [1, 0], [0, -1]], atol=1e-6)
    np.testing.assert_allclose(found[3, :2], found[0, :2], atol=1e-6)
    np.testing.assert_allclose(found[4], found[0], atol=1e-6)
    np.testing.assert_allclose(np.hypot(found[:, 2], found[:, 3]), 1, atol=1e-6)
    # A day is a seventh of the week's circle.
    np.testing.assert_allclose(found[0, 2:] @ found[3, 2:], np.cos(2 * np.pi / 7), atol=1e-6)


def test_a_gap_is_told_from_seconds_to_a_quarter() -> None:
    second = 1_000_000
    gaps = np.array([-1, 0, 10 * second, 3600 * second, DAY, 7 * DAY, 90 * DAY, 900 * DAY])
    filled = encode_gap(gaps).sum(axis=1)
    np.testing.assert_allclose(filled[[0, 1, 2, 4, 5, 6, 7]], [0, 0, 1, 7, 9, 12, 12], atol=1e-5)
    assert 4 < filled[3] < 5


def test_blanks_around_a_text_are_no_part_of_it() -> None:
    """Ingest strips what a model learns from; what is asked of it is stripped, too."""

    def encode(blank: str, none: str | None) -> Sequences:
        names = {
            "item_id": "a",
            "category": "shoes",
            "brand": "x",
            "query": "red",
            "session_id": "s",
        }
        events = [
            {"ts": 1, "event_type": "view"} | {k: v + blank for k, v in names.items()},
            {"ts": 2, "event_type": "view"} | names,
            {"ts": 3, "event_type": "view"} | names | {"session_id": f"{blank}t"},
            {"ts": 4, "event_type": "view"} | names | {"session_id": "t"},
            {"ts": 5, "event_type": "view"} | dict.fromkeys(names, none),
        ]
        return encode_events([events], [{"gender": f"{blank}f", "region": f"{blank}r"}])

    plain, blank = encode("", None), encode(" \u00a0\t\u200b", "\u3000 ")
    for field in fields(Sequences):
        np.testing.assert_array_equal(getattr(plain, field.name), getattr(blank, field.name))
    assert plain.session_start.tolist() == [1, 0, 1, 0, 0]


def test_an_event_is_coded_by_what_it_is_and_what_went_before() -> None:
    ann = [
        {"ts": 5 * DAY, "event_type": "view", "item_id": "a", "category": "shoes", "brand": "x"},
        {"ts": 6 * DAY, "event_type": "search", "query": "Red shoes"},
        {"ts": 6 * DAY + 1, "event_type": "purchase", "item_id": "b", "category": "hats"},
    ]
    bob = [{"ts": 50 * DAY, "event_type": "view"}]
    timeline = Timeline(encode_events([ann, bob], [{"age": 30.0, "gender": "f"}, None]))
    vocabulary = Vocabulary(
        category=(hash_text("shoes"),), gender=(hash_text("f"),), age=Scale(mean=20.0, std=5.0)
    )
    tokenizer = Tokenizer(vocabulary, item_buckets=3, query_buckets=5)
    numbers, codes = tokenizer.events(timeline, np.arange(4))
    kinds = [EVENT_CODES[name] for name in ("view", "search", "purchase", "view")]
    assert codes[:, 0].tolist() == kinds
    assert codes[:, 1].tolist() == [2, MISSING, UNKNOWN, MISSING]
    assert codes[:, 2].tolist() == [UNKNOWN, MISSING, MISSING, MISSING]
    buckets = [hash_text(name) % 3 + 1 for name in "ab"]
    assert codes[:, 3].tolist() == [buckets[0], MISSING, buckets[1], MISSING]
    # The first event of a user has nothing before it, whatever another one did.
    gaps = np.array([0, DAY, 1, 0])
    np.testing.assert_array_equal(numbers[:, :GAP_BINS], encode_gap(gaps))
    assert numbers[:, -1].tolist() == [1, 0, 0, 1]
    profile, marks = tokenizer.profiles(timeline.sequences, np.array([0, 1]))
    np.testing.assert_array_equal(profile, [[2, 0], [0, 1]])
    assert marks.tolist() == [[2, MISSING], [MISSING, MISSING]]
    rows, tokens, offsets = tokenizer.queries(timeline.sequences, np.array([0, 1, 3, 1]))
    grams = [gram % 5 + 1 for gram in hash_query("red shoes")]
    assert rows.tolist() == [1, 3]
    assert tokens.tolist() == grams + grams
    assert offsets.tolist() == [0, len(grams)]


def test_what_comes_next_is_told_in_classes() -> None:
    events = [
        {"ts": 0, "event_type": "view", "item_id": "a"},
        {"ts": 29_999_999, "event_type": "search"},
        {"ts": 60_000_000, "event_type": "add_to_cart", "item_id": "a", "price": 9.0},
        {"ts": 60_000_000 + 7 * DAY, "event_type": "purchase", "item_id": "b", "category": "hats"},
    ]
    timeline = Timeline(encode_events([events]))
    scale = Scale(mean=float(np.log1p(9.0)) - 1.0, std=2.0)
    tokenizer = Tokenizer(Vocabulary(log_price=scale), item_buckets=3, query_buckets=5)
    after = tokenizer.next_events(timeline, np.arange(3), 7)
    kinds, gaps, content = (part.tolist() for part in after.classes)
    assert kinds == [EVENT_CODES[name] for name in ("search", "add_to_cart", "purchase")]
    assert gaps == [0, 1, 7]
    assert content == [0, hash_text("a") % 7, hash_text("b") % 7]
    np.testing.assert_allclose(after.price, [np.nan, 0.5, np.nan])
    shoes = Vocabulary(category=(hash_text("shoes"), hash_text("hats")))
    tokenizer = Tokenizer(shoes, item_buckets=3, query_buckets=5)
    content = tokenizer.next_events(timeline, np.arange(3), 7).classes[2].tolist()
    assert content == [MISSING, MISSING, 3]


def test_items_that_can_come_next_are_counted_from_nought() -> None:
    items = Vocabulary(item=(hash_text("b"), hash_text("a")), item_id=("b", "a"))
    tokenizer = Tokenizer(items, item_buckets=3, query_buckets=5)
    hashes = np.array([hash_text("a"), hash_text("b"), hash_text("c"), 0], dtype=np.uint32)
    assert tokenizer.items(hashes).tolist() == [1, 0, -1, -1]


def test_now_knows_how_long_nothing_has_happened() -> None:
    events = [{"ts": 10 * DAY, "event_type": "view"}, {"ts": 12 * DAY, "event_type": "view"}]
    timeline = Timeline(encode_events([events, []]))
    cuts = timeline.cuts(np.array([0, 0, 0, 1]), np.array([10, 11, 13, 13]) * DAY)
    tokenizer = Tokenizer(Vocabulary(), item_buckets=3, query_buckets=5)
    numbers = tokenizer.nows(timeline, cuts)
    endless = 10**15
    gaps = encode_gap(np.array([endless, DAY, DAY, endless]))
    np.testing.assert_array_equal(numbers[:, :GAP_BINS], gaps)
    np.testing.assert_array_equal(numbers[:, GAP_BINS:-1], encode_calendar(cuts.ts))
    tenure = np.log1p([0.0, 1.0, 3.0, 0.0]) / 3 - 1
    np.testing.assert_allclose(numbers[:, -1], tenure, rtol=1e-6)
