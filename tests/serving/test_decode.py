"""The fast reader takes nothing that the schema refuses, and reads the same values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.decode import decode_request, to_mapping
from serving.schema import PredictRequest

EVENT = {"event_type": "view", "ts": "2025-03-01T12:00:00.5+01:00", "item_id": "i", "price": 1}
GOOD = {"users": [{"user_id": "ann", "events": [EVENT], "profile": {"age": 3}}], "next_items": 2}


def list_fields(request: Any) -> Any:
    users = [
        (
            user.user_id,
            [to_mapping(event) for event in user.events],
            to_mapping(user.profile) if user.profile else None,
        )
        for user in request.users
    ]
    return users, request.now, request.next_items


def read_slowly(body: bytes) -> Any:
    try:
        found = PredictRequest.model_validate_json(body)
    except ValidationError:
        return None
    return list_fields(found)


def read_fast(body: bytes) -> Any:
    found = decode_request(body)
    return None if found is None else list_fields(found[0])


def test_a_good_request_is_read_fast() -> None:
    body = json.dumps(GOOD).encode()
    assert read_fast(body) == read_slowly(body) is not None


def change(**event: Any) -> bytes:
    user = {"user_id": "ann", "events": [EVENT | event]}
    return json.dumps({"users": [user]}).encode()


ODD_TIMES = [
    "2025-03-01T12:00:00Z", "2025-03-01 12:00:00Z", "2025-03-01t12:00:00z", "2025-03-01T12:00Z",
    "2025-03-01T12:00:00+0100", "2025-03-01T12:00:00-00:00", "2025-03-01T24:00:00Z",
    "2025-03-01T12:00:60Z", "2025-03-01T12:00:00.1234567Z", "2025-03-01T12:00:00.9999999Z",
    "2025-03-01T12:00:00,5Z", "2025-03-01", "1740830400", "1969-12-31T23:59:59Z",
    "2199-12-31T23:59:59.999999Z", "2200-01-01T00:00:00Z", "2199-12-31T23:59:59-01:00",
    "0000-01-01T00:00:00Z", "2025-02-29T00:00:00Z", "2025-03-01T12:00:00+23:59",
    "2025-03-01T12:00:00+24:00", "2025-03-01T12:00:00", " 2025-03-01T12:00:00Z", "",
]  # fmt: skip


@pytest.mark.parametrize("ts", ODD_TIMES)
def test_odd_times(ts: str) -> None:
    body = change(ts=ts)
    assert read_fast(body) in (None, read_slowly(body))


@pytest.mark.parametrize(
    "body",
    [
        change(price=float("nan")), change(price=10**400), change(price=-1), change(price=-0.0),
        change(price="1"), change(price=True), change(quantity=1e308), change(item_id="a\0"),
        change(quantity=0), change(quantity=-1), change(quantity=-1, event_type="purchase"),
        change(item_id="\ud800"), change(item_id="🛍" * 256), change(item_id="🛍" * 257),
        change(event_id=""), change(event_type="VIEW"), change(colour="red"),
        change(query="x" * 1025), json.dumps(GOOD | {"next_items": True}).encode(),
        json.dumps(GOOD | {"next_items": 2.0}).encode(),
        json.dumps(GOOD | {"next_items": 51}).encode(), json.dumps(GOOD | {"now": None}).encode(),
        json.dumps(GOOD).encode() + b" ", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        json.dumps(GOOD).encode() + b"x",
        change(price=1).replace(b'"price": 1', b'"price": 1e999'),
        change(price=1).replace(b'"price": 1', b'"price": 01'),
        change(item_id="q").replace(b'"q"', b'"\xff"'),
        change(item_id="q").replace(b'"q"', b'"a\tb"'),
        change(item_id="q").replace(b'"q"', b'"\\u0000"'),
        change(price=1).replace(b'"price": 1', b'"price": 1, "price": 2'), b"", b"null", b"[]",
    ],
)  # fmt: skip
def test_odd_bodies(body: bytes) -> None:
    assert read_fast(body) in (None, read_slowly(body))


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_subnormal=False)
    | st.text(max_size=5)
    | st.sampled_from(ODD_TIMES)
    | st.datetimes(timezones=st.timezones()).map(lambda ts: ts.isoformat())
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    event=st.dictionaries(st.sampled_from([*EVENT, "quantity", "query", "event_id"]), VALUES),
    profile=st.none() | st.dictionaries(st.sampled_from(["age", "region", "signup_ts"]), VALUES),
    rest=st.dictionaries(st.sampled_from(["now", "next_items"]), VALUES),
)
def test_whatever_is_read_fast_is_what_the_schema_reads(
    event: dict[str, Any], profile: Any, rest: dict[str, Any]
) -> None:
    user = {"user_id": "ann", "events": [EVENT | event], "profile": profile}
    body = json.dumps({"users": [user]} | rest).encode()
    assert read_fast(body) in (None, read_slowly(body))
