"""Features and labels against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.events import EVENT_CODES, MAX_PRICE, MAX_QUANTITY
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


def make_varied_shop() -> Sequences:
    """Few events of any kind, some days apart, with items, categories and prices or without."""
    rng = np.random.default_rng(7)
    kinds = list(EVENT_CODES)

    def draw(values: list[Any]) -> Any:
        return values[rng.integers(len(values))]

    users = [
        [
            {
                "ts": START + int(at),
                "event_type": draw([*kinds, "purchase", "view"]),
                "item_id": draw([None, "i1", "i2", "i3"]),
                "category": draw([None, "a", "b"]),
                "price": draw([None, 0.0, 3.5, 20.0]),
            }
            for at in np.sort(rng.integers(60 * DAY, size=rng.integers(25)))
        ]
        for _ in range(60)
    ]
    profiles = [{"region": draw([None, "north", "south"])} for _ in users]
    return encode_events(users, profiles)


@pytest.mark.parametrize("varied", [False, True])
def test_features_equal_a_loop(shop: Sequences, varied: bool) -> None:
    shop = make_varied_shop() if varied else shop
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
        assert (column["since_search"][row] == 10.0) == (not (searched & past).any())
        category = shop.category[mine]
        known = np.flatnonzero(past & (category > 0))
        same = past & (category == category[known[-1]]) if len(known) else past & False
        assert column["focus_ever"][row] == pytest.approx(np.log1p(same.sum()), abs=1e-6)
        viewed = same & (shop.type[mine] == EVENT_CODES["view"]) & recent
        assert column["focus_view_7d"][row] == pytest.approx(np.log1p(viewed.sum()), abs=1e-6)
        told = tell_habits(shop, int(cuts.user[row]), int(cut))
        for name, value in told.items():
            assert column[name][row] == pytest.approx(value, abs=1e-5), name


def tell_habits(shop: Sequences, user: int, cut: int) -> dict[str, float]:
    """What is known of one user's rhythm and habits, event by event."""
    mine = range(shop.offsets[user], shop.offsets[user + 1])
    past = [i for i in mine if shop.ts[i] < cut]
    bought = [i for i in past if shop.type[i] == EVENT_CODES["purchase"]]

    def first_of_days(events: list[int]) -> list[int]:
        return [
            i
            for k, i in enumerate(events)
            if k == 0 or shop.ts[i] // DAY != shop.ts[events[k - 1]] // DAY
        ]

    told = {}
    pulses = {
        "event": past,
        "active_day": first_of_days(past),
        "purchase_day": first_of_days(bought),
    }
    for pulse, events in pulses.items():
        seconds = [int(shop.ts[i]) // 1_000_000 for i in events]
        gaps = np.diff(seconds)
        some, several = len(gaps) > 0, len(gaps) > 1
        told |= {
            f"gap_mean_{pulse}": np.log1p(gaps.mean()) if some else -1.0,
            f"gap_std_{pulse}": np.log1p(gaps.std()) if several else -1.0,
            f"gap_last_{pulse}": np.log1p(gaps[-1]) if some else -1.0,
        }
        if some:
            silence = (cut - shop.ts[events[-1]]) / 1e6
            told[f"gap_now_{pulse}"] = np.log1p(silence / max(gaps.mean(), 600.0))
    told["active_day_ever"] = np.log1p(len(pulses["active_day"]))
    recent = [i for i in pulses["purchase_day"] if shop.ts[i] >= cut - 28 * DAY]
    told["purchase_day_28d"] = np.log1p(len(recent))
    after = [i for i in past if not bought or i > bought[-1]]
    views = [i for i in after if shop.type[i] == EVENT_CODES["view"]]
    told["after_purchase_view"] = np.log1p(len(views))
    quantity = np.nan_to_num(shop.quantity, nan=1.0)
    spent = sum(float(np.nan_to_num(shop.price[i])) * float(quantity[i]) for i in bought)
    told["mean_purchase"] = np.log1p(spent / max(len(bought), 1))
    prices = [float(shop.price[i]) for i in past if np.isfinite(shop.price[i])]
    told["mean_price"] = np.log1p(np.mean(prices) if prices else 0.0)
    for name, column in (("item", shop.item), ("category", shop.category)):
        seen = [int(column[i]) for i in past if column[i] > 0]
        told[f"new_{name}_ever"] = np.log1p(len(set(seen)))
        told[f"top_{name}"] = max(map(seen.count, seen)) / len(seen) if seen else 0.0
    fresh = [
        i
        for k, i in enumerate(past)
        if shop.item[i] > 0 and shop.item[i] not in shop.item[past[:k]]
    ]
    told["new_item_7d"] = np.log1p(sum(shop.ts[i] >= cut - 7 * DAY for i in fresh))
    age = float(shop.age[user])
    told["age"] = age if np.isfinite(age) else -1.0
    told["region"] = shop.region[user] / 2**32
    return told


def test_a_user_without_events_has_features() -> None:
    timeline = Timeline(encode_events([[], []]))
    cuts = timeline.cuts(np.array([0, 1]), np.array([START, START]))
    assert np.isfinite(timeline.features(cuts)).all()


def test_the_largest_purchase_that_is_accepted_counts_whole() -> None:
    """The report judges a model by it."""
    event = {"ts": 2 * DAY, "event_type": "purchase", "price": MAX_PRICE, "quantity": MAX_QUANTITY}
    timeline = Timeline(encode_events([[event]]))
    cuts = timeline.cuts(np.zeros(1, dtype=np.int64), np.array([DAY]))
    labels = timeline.labels(cuts, events=("purchase",), horizons=(7,), close=30 * DAY)
    assert labels.amount[0, 0] == pytest.approx(MAX_PRICE * MAX_QUANTITY)


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


def test_what_happens_from_the_cut_on_is_not_looked_at() -> None:
    rng = np.random.default_rng(11)
    ann = make_user(rng)
    when = START + 30 * DAY
    before = [event for event in ann if event["ts"] < when]
    assert 0 < len(before) < len(ann)
    whole, part = Timeline(encode_events([ann])), Timeline(encode_events([before]))
    told, expected = (
        timeline.features(timeline.cuts(np.zeros(1, dtype=np.int64), np.array([when])))
        for timeline in (whole, part)
    )
    np.testing.assert_array_equal(told, expected)
