"""Features and labels against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.events import EVENT_CODES
from pipelines.features.store import Sequences, encode_events
from pipelines.model.timeline import DAY, Cuts, Timeline, bisect, feature_names
from tests.model.conftest import START, make_user


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=30), st.integers(-2, 22))
def test_bisect_is_searchsorted(values: list[int], wanted: int) -> None:
    ts = np.array([0, *sorted(values), 0], dtype=np.int64)
    low, high = np.array([1]), np.array([len(ts) - 1])
    found = bisect(ts, low, high, np.array([wanted]))
    assert found[0] == 1 + np.searchsorted(ts[1:-1], wanted)


def random_cuts(shop: Sequences, count: int = 200) -> tuple[Timeline, Cuts]:
    rng = np.random.default_rng(0)
    timeline = Timeline(shop)
    user = rng.integers(shop.users, size=count)
    ts = START + rng.integers(60 * DAY, size=count)
    # Cuts at the very time of an event are where off-by-one errors live.
    has = shop.offsets[user + 1] > shop.offsets[user]
    exact = has & (rng.random(count) < 0.5)
    ts[exact] = shop.ts[shop.offsets[user[exact]]]
    return timeline, timeline.cuts(user, ts)


def test_labels_equal_a_loop(shop: Sequences) -> None:
    timeline, cuts = random_cuts(shop)
    close = START + 50 * DAY
    cuts = cuts.take(cuts.ts <= close)
    labels = timeline.labels(cuts, events=["purchase", "any"], horizons=[3, 7], close=close)
    for row in range(len(cuts)):
        mine = slice(shop.offsets[cuts.user[row]], shop.offsets[cuts.user[row] + 1])
        cut = cuts.ts[row]
        later = [
            (t, k, p, q)
            for t, k, p, q in zip(
                shop.ts[mine], shop.type[mine], shop.price[mine], shop.quantity[mine], strict=True
            )
            if cut <= t < close
        ]
        bought = [(t, p * q) for t, k, p, q in later if k == EVENT_CODES["purchase"]]
        first = min((t for t, _ in bought), default=None)
        assert labels.delay[row, 0] == (np.inf if first is None else (first - cut) / DAY)
        assert labels.delay[row, 1] == (later[0][0] - cut) / DAY if later else True
        for column, days in enumerate([3, 7]):
            expected = sum(amount for t, amount in bought if t < cut + days * DAY)
            assert labels.amount[row, column] == pytest.approx(expected)


def test_features_equal_a_loop(shop: Sequences) -> None:
    timeline, cuts = random_cuts(shop)
    names = feature_names()
    features = timeline.features(cuts)
    assert features.shape == (len(cuts), len(names))
    assert np.isfinite(features).all()
    column = {name: features[:, i] for i, name in enumerate(names)}
    for row in range(len(cuts)):
        mine = slice(shop.offsets[cuts.user[row]], shop.offsets[cuts.user[row] + 1])
        cut = cuts.ts[row]
        past = shop.ts[mine] < cut
        recent = past & (shop.ts[mine] >= cut - 7 * DAY)
        searched = shop.type[mine] == EVENT_CODES["search"]
        assert column["search_7d"][row] == pytest.approx(np.log1p((searched & recent).sum()))
        assert column["seen_search"][row] == (searched & past).any()
        category = shop.category[mine]
        known = np.flatnonzero(past & (category > 0))
        same = past & (category == category[known[-1]]) if len(known) else past & False
        assert column["focus_ever"][row] == pytest.approx(np.log1p(same.sum()), abs=1e-6)
        viewed = same & (shop.type[mine] == EVENT_CODES["view"]) & recent
        assert column["focus_view_7d"][row] == pytest.approx(np.log1p(viewed.sum()), abs=1e-6)


def test_a_user_without_events_has_features() -> None:
    timeline = Timeline(encode_events([[], []]))
    cuts = timeline.cuts(np.array([0, 1]), np.array([START, START]))
    assert np.isfinite(timeline.features(cuts)).all()


def test_what_one_user_spends_changes_nothing_of_another() -> None:
    """Whatever is beside them in a batch, to the last bit."""
    rng = np.random.default_rng(5)
    ann = make_user(rng)
    rich = [dict(event, event_type="purchase", price=1e300, quantity=1e300) for event in ann]
    alone = Timeline(encode_events([ann]))
    beside = Timeline(encode_events([rich, ann, rich]))
    when = START + 61 * DAY
    told = beside.features(beside.cuts(np.arange(3), np.full(3, when)))
    expected = alone.features(alone.cuts(np.zeros(1, dtype=np.int64), np.array([when])))
    np.testing.assert_array_equal(told[1], expected[0])
    assert np.isfinite(told).all()
