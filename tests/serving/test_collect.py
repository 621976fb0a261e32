"""Events are judged one by one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.collect import CollectedEvent, Outcome, parse_event

CLOCK = datetime(2025, 3, 2, tzinfo=UTC)
GOOD = {"user_id": "ann", "event_type": "view", "ts": "2025-03-01T12:00:00.5+01:00"}


def test_a_good_event_becomes_a_row() -> None:
    row, result = parse_event(GOOD | {"price": 12, "event_id": "e1"}, CLOCK)
    assert row is not None
    assert (row["ts"], row["price"], row["event_type"]) == (1_740_826_800_500_000, 12.0, "view")
    assert (result.outcome, result.event_id) == (Outcome.ACCEPTED, "e1")


def test_without_an_id_the_content_is_the_id() -> None:
    ids = []
    for change in ({}, {"event_id": None}, {"price": 1.0}, {"ts": "2025-03-01T11:00:00.5Z"}):
        row, _ = parse_event(GOOD | change, CLOCK)
        assert row is not None
        ids.append(row["event_id"])
    assert ids[0] == ids[1] == ids[3]
    assert ids[2] != ids[0]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"user_id": "a\0b"}, "user_id"),
        ({"user_id": "ann "}, "user_id"),
        ({"user_id": "ann\n"}, "user_id"),
        ({"event_id": " e1"}, "event_id"),
        ({"event_id": "e\t1"}, "event_id"),
        ({"ts": "2025-03-02T00:05:01Z"}, "ts"),
        ({"price": 1.1e7}, "price"),
        ({"quantity": -1.1e6}, "quantity"),
        ({"quantity": 1e308}, "quantity"),
        ({"quantity": 0}, "quantity"),
        ({"event_type": "purchase", "quantity": 0}, "quantity"),
        ({"event_type": "remove_from_cart", "quantity": -1}, "quantity"),
        ({"ts": "yesterday"}, "ts"),
        ({"ts": "2025-03-01T12:00:00"}, "ts"),
        ({"event_type": "teleport"}, "event_type"),
        ({"price": -1}, "price"),
        ({"price": "1"}, "price"),
        ({"colour": "red"}, "colour"),
        ({"query": "x" * 2000}, "query"),
        ({"item_id": {"deep": ["er"]}}, "item_id"),
    ],
)
def test_a_bad_event_is_refused_with_its_field(change: dict[str, Any], field: str) -> None:
    row, result = parse_event(GOOD | change, CLOCK)
    assert row is None
    assert (result.outcome, result.field) == (Outcome.REJECTED, field)
    assert result.reason


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_subnormal=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


# The first drawing of a text builds tables of Unicode.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*GOOD, "price", "query", "odd"]), JSON))
def test_nothing_makes_it_fail(change: dict[str, Any]) -> None:
    row, result = parse_event(GOOD | change, CLOCK)
    assert (row is None) == (result.outcome is Outcome.REJECTED)


def test_of_many_unknown_fields_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"k{i}": 1 for i in range(1000)}
    seen: list[int] = []
    read = CollectedEvent.model_validate_json

    def note(data: str) -> CollectedEvent:
        seen.append(len(data))
        return read(data)

    monkeypatch.setattr(CollectedEvent, "model_validate_json", note)
    row, result = parse_event(many | GOOD, CLOCK)
    assert row is None
    assert (result.field, result.reason) == ("k0", "Extra inputs are not permitted")
    assert seen[0] < 500
