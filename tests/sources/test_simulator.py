from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow.compute as pc
import pytest

from pipelines.events import EVENT_SCHEMA, ITEM_SCHEMA, USER_SCHEMA
from pipelines.sources.shop import clock_time, operational_time
from pipelines.sources.simulator import DAY_US, SimulatedShop, SimulatorParams, simulate

PARAMS = SimulatorParams(users=1500, days=120, seed=3)


@pytest.fixture(scope="module")
def shop() -> SimulatedShop:
    return simulate(PARAMS)


def test_the_tables_have_the_schema(shop: SimulatedShop) -> None:
    assert shop.events.schema == EVENT_SCHEMA
    assert shop.users.schema == USER_SCHEMA
    assert shop.items.schema == ITEM_SCHEMA
    assert shop.users.num_rows == PARAMS.users


def test_the_seed_decides(shop: SimulatedShop) -> None:
    again = simulate(PARAMS)
    assert again.events.equals(shop.events)
    assert again.users.equals(shop.users)
    other = simulate(SimulatorParams(users=1500, days=120, seed=4))
    assert not other.events.equals(shop.events)


def test_times_lie_in_the_span_and_ascend_strictly_per_user(shop: SimulatedShop) -> None:
    micros = shop.events["ts"].cast("int64").to_numpy() - PARAMS.start_us
    assert micros.min() >= 0
    assert micros.max() < PARAMS.days * DAY_US
    user = shop.events["user_id"].to_numpy()
    same = user[1:] == user[:-1]
    assert (np.diff(micros)[same] > 0).all()


def test_identifiers_are_unique_and_every_type_occurs(shop: SimulatedShop) -> None:
    assert pc.count_distinct(shop.events["event_id"]).as_py() == shop.events.num_rows
    assert pc.count_distinct(shop.events["event_type"]).as_py() == 8


def test_a_session_is_what_the_gap_rule_says(shop: SimulatedShop) -> None:
    rows = shop.events.slice(0, 5000).select(["user_id", "ts", "session_id"]).to_pylist()
    for before, after in pairwise(rows):
        if before["user_id"] != after["user_id"]:
            continue
        long = (after["ts"] - before["ts"]).total_seconds() > 30 * 60
        assert (before["session_id"] != after["session_id"]) == long


def test_searches_carry_text_and_others_an_item(shop: SimulatedShop) -> None:
    is_search = pc.equal(shop.events["event_type"], "search")
    assert pc.equal(is_search, pc.is_valid(shop.events["query"])).to_pylist().count(False) == 0
    assert pc.equal(is_search, pc.is_null(shop.events["item_id"])).to_pylist().count(False) == 0


def test_base_rates_are_useful(shop: SimulatedShop) -> None:
    micros = shop.events["ts"].cast("int64").to_numpy() - PARAMS.start_us
    user = shop.events["user_id"].to_numpy(zero_copy_only=False)
    kind = shop.events["event_type"].to_numpy(zero_copy_only=False)
    cut = 92 * DAY_US
    active = set(user[(micros < cut) & (micros >= cut - 28 * DAY_US)])
    ahead = (micros >= cut) & (micros < cut + 14 * DAY_US)
    buyers = active & set(user[ahead & (kind == "purchase")])
    searchers = active & set(user[ahead & (kind == "search")])
    assert 0.10 < len(buyers) / len(active) < 0.22
    assert 0.35 < len(searchers) / len(active) < 0.70


def test_clock_time_inverts_operational_time() -> None:
    days = np.random.default_rng(0).uniform(-100, 200, 10_000)
    back = clock_time(operational_time(days), -100, 200)
    assert np.abs(back - days).max() * DAY_US < 1
    assert (np.diff(operational_time(np.linspace(-10, 10, 5000))) > 0).all()
