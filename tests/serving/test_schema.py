from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.events import EVENT_SCHEMA
from serving.collect import CollectRequest
from serving.limits import MAX_CLOCK_SKEW, MAX_EVENTS, MAX_ITEMS, MAX_USERS
from serving.schema import (
    EraseRequest,
    Event,
    ExplainRequest,
    ItemsQuestion,
    PredictionQuestion,
    PredictRequest,
    Profile,
    StoredRequest,
    Strict,
    resolve_now,
)

CLOCK = datetime(2025, 3, 1, tzinfo=UTC)
VIEW = {"event_type": "view", "ts": "2025-01-01T00:00:00Z"}


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
    assert f"before now ({(now or CLOCK).isoformat()})" in caught.value.errors()[0]["msg"]


def test_a_refusal_names_the_time_that_was_asked_for() -> None:
    hour_ago = CLOCK - timedelta(hours=1)
    with pytest.raises(ValidationError) as caught:
        resolve_now(make_request(hour_ago, now=hour_ago), CLOCK)
    assert f"before now ({hour_ago.isoformat()})" in str(caught.value)


@pytest.mark.parametrize("ts", ["1969-12-31T23:59:59Z", "2200-01-01T00:00:00Z"])
def test_times_outside_of_any_shop_are_refused(ts: str) -> None:
    with pytest.raises(ValidationError, match="between 1970 and 2200"):
        Event.model_validate_json(json.dumps({"event_type": "view", "ts": ts}))


@pytest.mark.parametrize("user_id", ["", " ann", "ann ", "ann\n", "a\tnn", "a\0nn", "a\x7fnn"])
@pytest.mark.parametrize("model", [StoredRequest, EraseRequest, ExplainRequest])
def test_an_id_that_a_database_might_take_for_another_is_refused(
    model: type[Strict], user_id: str
) -> None:
    def ask(name: str) -> Strict:
        listed: dict[type[Strict], dict[str, Any]] = {
            StoredRequest: {"user_ids": [name]},
            EraseRequest: {"user_id": name},
            ExplainRequest: {"user_id": name, "target": "purchase_14d"},
        }
        return model.model_validate_json(json.dumps(listed[model]))

    with pytest.raises(ValidationError, match="user_id"):
        ask(user_id)
    ask("Зоя Ann-1 🛍")


@pytest.mark.parametrize("field", ["item_id", "category", "brand", "query", "session_id"])
def test_text_that_would_end_early_elsewhere_is_refused(field: str) -> None:
    Event.model_validate_json(json.dumps(VIEW | {field: "red shoes"}))
    with pytest.raises(ValidationError, match="NUL"):
        Event.model_validate_json(json.dumps(VIEW | {field: "red\0shoes"}))


def test_one_shopper_is_explained_sent_or_stored() -> None:
    def ask(**told: Any) -> ExplainRequest:
        body = {"target": "purchase_14d"} | told
        return ExplainRequest.model_validate_json(json.dumps(body))

    sent = {"user_id": "ann", "events": [VIEW]}
    assert ask(user=sent).user_id is None
    assert ask(user_id="ann").user is None
    for told in ({}, {"user": sent, "user_id": "ann"}):
        with pytest.raises(ValidationError, match="send either user or user_id"):
            ask(**told)


def test_a_call_holds_so_much_and_no_more() -> None:
    def ask(users: int = 1, events: int = 1, **more: Any) -> PredictRequest:
        listed = [{"user_id": f"u{i}", "events": [VIEW] * events} for i in range(users)]
        return PredictRequest.model_validate_json(json.dumps({"users": listed} | more))

    assert ask().next_items == 0
    assert len(ask(users=MAX_USERS).users) == MAX_USERS
    assert len(ask(events=MAX_EVENTS).users[0].events) == MAX_EVENTS
    assert ask(next_items=MAX_ITEMS).next_items == MAX_ITEMS
    wrong: tuple[dict[str, int], ...] = (
        {"users": 0},
        {"users": MAX_USERS + 1},
        {"events": 0},
        {"events": MAX_EVENTS + 1},
        {"next_items": -1},
        {"next_items": MAX_ITEMS + 1},
    )
    for sizes in wrong:
        with pytest.raises(ValidationError, match=next(iter(sizes))):
            ask(**sizes)
    assert StoredRequest.model_validate_json('{"user_ids": ["ann"]}').next_items == 0
    for count in (0, MAX_USERS + 1):
        with pytest.raises(ValidationError, match="user_ids"):
            StoredRequest.model_validate_json(json.dumps({"user_ids": ["ann"] * count}))


def test_an_address_asks_for_no_more_items_than_there_are_told() -> None:
    assert PredictionQuestion.model_validate({}).next_items == 0
    assert ItemsQuestion.model_validate({}).count == 10
    assert ItemsQuestion.model_validate({"count": str(MAX_ITEMS)}).count == MAX_ITEMS
    for count in ("0", str(MAX_ITEMS + 1)):
        with pytest.raises(ValidationError, match="count"):
            ItemsQuestion.model_validate({"count": count})


@pytest.mark.parametrize(("age", "taken"), [(0, True), (150, True), (-0.1, False), (150.1, False)])
def test_an_age_is_that_of_somebody_alive(age: float, taken: bool) -> None:
    text = json.dumps({"age": age})
    if taken:
        assert Profile.model_validate_json(text).age == age
        return
    with pytest.raises(ValidationError, match="age"):
        Profile.model_validate_json(text)


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
