from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.events import EVENT_SCHEMA
from serving.collect import CollectRequest
from serving.limits import MAX_CLOCK_SKEW
from serving.schema import (
    Event,
    PredictRequest,
    Profile,
    StoredRequest,
    Strict,
    resolve_now,
)

CLOCK = datetime(2025, 3, 1, tzinfo=UTC)


def make_request(*times: datetime, now: datetime | None = None) -> PredictRequest:
    events = [{"event_type": "view", "ts": t.isoformat()} for t in times]
    body: dict[str, Any] = {"users": [{"user_id": "a", "events": events}]}
    if now is not None:
        body["now"] = now.isoformat()
    return PredictRequest.model_validate_json(json.dumps(body))


def test_events_have_the_fields_of_the_event_schema() -> None:
    assert set(Event.model_fields) == set(EVENT_SCHEMA.names) - {"user_id"}


def test_now_is_the_clock_unless_given() -> None:
    before = CLOCK - timedelta(days=1)
    assert resolve_now(make_request(before), CLOCK) == CLOCK
    assert resolve_now(make_request(before, now=CLOCK - timedelta(hours=1)), CLOCK) < CLOCK


def test_times_are_compared_across_time_zones() -> None:
    # 01:30 at UTC+2 is half an hour before midnight UTC.
    ts = datetime.fromisoformat("2025-03-01T01:30:00+02:00")
    assert resolve_now(make_request(ts, now=CLOCK), CLOCK) == CLOCK


def test_a_faster_clock_is_waited_for() -> None:
    ts = CLOCK + timedelta(seconds=30)
    assert resolve_now(make_request(ts), CLOCK) == ts + timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("ts", "now"), [(CLOCK + MAX_CLOCK_SKEW, None), (CLOCK, CLOCK), (CLOCK + MAX_CLOCK_SKEW, CLOCK)]
)
def test_events_of_the_future_are_refused_by_name(ts: datetime, now: datetime | None) -> None:
    request = make_request(CLOCK - timedelta(days=1), ts, now=now)
    with pytest.raises(ValidationError) as caught:
        resolve_now(request, CLOCK)
    assert caught.value.errors()[0]["loc"] == ("users", 0, "events", 1, "ts")


@pytest.mark.parametrize("ts", ["1969-12-31T23:59:59Z", "2200-01-01T00:00:00Z"])
def test_times_outside_of_any_shop_are_refused(ts: str) -> None:
    with pytest.raises(ValidationError, match="between 1970 and 2200"):
        Event.model_validate_json(json.dumps({"event_type": "view", "ts": ts}))


VIEW = {"event_type": "view", "ts": "2025-01-01T00:00:00Z"}
MANY: dict[str, Any] = {f"k{i}": 1 for i in range(1000)}


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (
            PredictRequest,
            {"users": [{"user_id": "a", "events": [{}] * 99}] * 9},
            "users.0.events.0",
        ),
        (
            PredictRequest,
            {"users": [{"user_id": "a", "events": [VIEW, VIEW | MANY]}]},
            "users.0.events.1.k0",
        ),
        (PredictRequest, {"users": [{"user_id": "a", "events": [VIEW]} | MANY]}, "users.0.k0"),
        (
            PredictRequest,
            {"users": [{"user_id": "a", "profile": MANY, "events": [VIEW]}]},
            "users.0.profile.k0",
        ),
        (StoredRequest, {"user_ids": [1] * 999}, "user_ids.0"),
        (CollectRequest, {"events": [1] * 999}, "events.0"),
        (CollectRequest, {"events": [VIEW]} | MANY, "k0"),
        (Profile, MANY, "k0"),
    ],
)
def test_a_request_with_many_mistakes_is_told_of_few(
    model: type[Strict], body: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(body))
    assert caught.value.error_count() < 5
    assert ".".join(map(str, caught.value.errors()[0]["loc"])).startswith(field)
    if field.endswith("k0"):
        assert caught.value.errors()[0]["msg"] == "Extra inputs are not permitted"
