"""Numbers of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.features.store import encode_events
from pipelines.model.network import (
    CALENDAR,
    EVENT_NUMBERS,
    GAP_BINS,
    PRICE_BINS,
    QUANTITY_BINS,
)
from pipelines.model.timeline import Timeline
from pipelines.model.tokens import Scale, Tokenizer, Vocabulary, encode_pieces


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
